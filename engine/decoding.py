"""One new token of every completion at a time, with the prompt's keys and values stored and read once for its group.

Shapes as in attention.py; G completions of each of B prompts, N = B * G in all.
"""

import functools
from typing import NamedTuple

import torch

from engine.attention import embed, pack_prompts, run_language_model, visual_features


class Decoder:
    """Runs tower and prompts once, then the language model over one token of N completions a step.

    The buffers have their full length from the start, and completions that have ended stay in the batch. So every step
    has the same shapes, and a GPU can record it once as a CUDA graph.
    """

    def __init__(self, model, prompts, G, max_new_tokens, features=None):
        """`features` from `visual_features`, if they are there already."""
        attention, positions, last = pack_prompts(prompts)
        features = features or visual_features(model, prompts)
        hidden = run_language_model(model, embed(model, prompts, features), positions, attention)[0, last]
        self.model = model
        self.prompt_hidden = hidden.repeat_interleave(G, dim=0)  # (N, H)
        self.last_position = positions[:, 0, last].repeat_interleave(G, dim=1).unsqueeze(2)  # (3, N, 1)
        self.cache = Cached.after(attention.keys_values, prompts, G, max_new_tokens)
        self.steps = 0
        self.forward = None

    def start(self):
        """-> (N, H) the hidden state at each completion's prompt's last token, which predicts the first token."""
        return self.prompt_hidden

    def step(self, token):
        """Append `token` (N,) to the completions -> (N, H) the hidden state that predicts the next one.

        On a GPU the next call overwrites the result.
        """
        self.cache.at(self.steps)
        self.steps += 1
        position = self.last_position + self.steps  # (3, N, 1)
        if self.forward is None:
            self.forward = self._make_forward(token, position)
        return self.forward(token, position)

    def _make_forward(self, token, position):
        forward = functools.partial(advance, self.model, self.cache)  # with self in it, the cache would outlive its use
        if token.device.type != "cuda":
            return forward
        # Python would launch some 2,000 small kernels a token; a graph launches them at once.
        torch._dynamo.config.recompile_limit = 32  # versions for one prompt or several, one completion or several, ...
        compiled = torch.compile(advance, dynamic=True)
        return record(functools.partial(compiled, self.model, self.cache), (token, position))


class Cached(NamedTuple):
    """Attention of one new token of each completion to its prompt, its own earlier tokens and itself.

    A recorded graph reads and writes these tensors in place, so they are never allocated anew.
    """

    prompts: list  # a layer's (keys, values), each (B, kv_heads, P, D), padded on the right
    own: list  # a layer's (keys, values), each (N, kv_heads, C, D), filled up to `place`
    place: torch.Tensor  # () the new token's place in `own`
    allowed: torch.Tensor  # (N, 1, 1, P + C) bool, False at the prompts' padding and after `place`

    @classmethod
    def after(cls, keys_values, prompts, G, max_new_tokens):
        """-> the cache after a prefill, with room for `max_new_tokens` of each completion."""
        B, kv_heads, P, D = keys_values[0][0].shape
        device = keys_values[0][0].device
        shape = (B * G, kv_heads, max_new_tokens, D)
        own = [(keys.new_zeros(shape), values.new_zeros(shape)) for keys, values in keys_values]
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts], device=device).repeat_interleave(G)
        allowed = torch.arange(P + max_new_tokens, device=device) < lengths.unsqueeze(1)  # (N, P + C)
        return cls(keys_values, own, torch.zeros((), dtype=torch.long, device=device), allowed.view(B * G, 1, 1, -1))

    def at(self, step):
        """Move on to the completions' token number `step`."""
        P = self.prompts[0][0].shape[2]
        self.place.fill_(step)
        self.allowed[..., P + step] = True

    def attend(self, layer, query, key, value, scaling):
        """(N, heads, 1, D) queries, (N, kv_heads, 1, D) keys and values -> (N, 1, heads, D)."""
        prompt_k, prompt_v = self.prompts[layer]
        own_k, own_v = self.own[layer]
        own_k.index_copy_(2, self.place.view(1), key)
        own_v.index_copy_(2, self.place.view(1), value)
        N, heads, _, D = query.shape
        B, kv_heads, P, _ = prompt_k.shape

        query = query.reshape(N, kv_heads, -1, D)  # (N, kv_heads, heads / kv_heads, D)
        to_prompt = by_completion(scores(by_prompt(query, B), prompt_k), N)
        to_own = scores(query, own_k)
        weights = torch.cat([to_prompt, to_own], dim=-1) * scaling  # (N, kv_heads, heads / kv_heads, P + C)
        weights = weights.masked_fill_(~self.allowed, -torch.inf).softmax(-1).to(query.dtype)
        from_prompt = by_completion(by_prompt(weights[..., :P], B) @ prompt_v, N)
        from_own = weights[..., P:] @ own_v
        return (from_prompt + from_own).reshape(N, 1, heads, D)


def by_prompt(x, B):
    """(N, kv_heads, q, D) -> (B, kv_heads, N / B * q, D): a group's queries side by side, so its keys are read once."""
    kv_heads, last = x.shape[1], x.shape[-1]
    return x.unflatten(0, (B, -1)).transpose(1, 2).reshape(B, kv_heads, -1, last)


def by_completion(x, N):
    """(B, kv_heads, N / B * q, D) -> (N, kv_heads, q, D): the way back."""
    B, kv_heads, _, last = x.shape
    return x.view(B, kv_heads, N // B, -1, last).transpose(1, 2).reshape(N, kv_heads, -1, last)


def scores(query, key):
    """query @ key^T in float32: in bfloat16 a score of 100 would be off by a quarter."""
    if query.dtype == torch.float32:
        return query @ key.mT
    # bfloat16 is used on CUDA alone (checkpoints.load_model), and only there does bmm have out_dtype.
    product = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32)
    return product.unflatten(0, query.shape[:2])


def advance(model, cache, token, position):
    """Tokens (N,) at positions (3, N, 1) -> hidden states (N, H)."""
    embeddings = model.get_input_embeddings()(token).unsqueeze(1)  # (N, 1, H)
    return run_language_model(model, embeddings, position, cache)[:, 0]


def record(step, inputs):
    """Record step(*inputs) as a CUDA graph -> a function like it, whose output its next call overwrites."""
    step(*inputs)  # compiles, which must not happen while recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(*inputs)

    def replay(*new):
        for old, x in zip(inputs, new):
            old.copy_(x)
        graph.replay()
        return output

    return replay
