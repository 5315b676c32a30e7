"""One new token of every completion at a time, with the prompt's keys and values stored and read once for its group.

Shapes as in attention.py; G completions of each of B prompts, N = B * G in all.
"""

import functools
import warnings
from typing import NamedTuple

import torch

from engine.model.attention import embed, pack_prompts, run_language_model, visual_features

ROOM = 2**28  # bytes; a recording takes some 20 MiB


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
        self.caches = Cached.after(attention.keys_values, prompts, G, max_new_tokens)
        self.steps = 0
        self.forward = None

    def start(self):
        """-> (N, H) the hidden state at each completion's prompt's last token, which predicts the first token."""
        return self.prompt_hidden

    def step(self, token):
        """Append `token` (N,) to the completions -> (N, H) the hidden state that predicts the next one.

        On a GPU the next call overwrites the result.
        """
        self.caches[0].advance_to(self.steps)
        self.steps += 1
        position = self.last_position + self.steps  # (3, N, 1)
        if self.forward is None:
            self.forward = self._make_forward(token, position)
        return self.forward(token, position)

    def _make_forward(self, token, position):
        forward = functools.partial(advance, self.model, self.caches)  # with self in it, the caches would outlive it
        if token.device.type != "cuda":
            return functools.partial(forward, run_layer)
        # Python would launch some 2,000 small kernels a token; a graph launches them at once.
        return record_graph(forward, compiled_layer(), (token, position))


class Cached(NamedTuple):
    """A layer's attention of one new token of each completion to its prompt, its own earlier tokens and itself.

    A recorded graph reads and writes these tensors in place, so they are never allocated anew.
    """

    prompt_k: torch.Tensor  # (B, kv_heads, P, D), padded on the right
    prompt_v: torch.Tensor
    own_k: torch.Tensor  # (N, kv_heads, C, D), filled up to `place`
    own_v: torch.Tensor
    place: torch.Tensor  # () the new token's place in `own_k`; one tensor for all layers, like `allowed`
    allowed: torch.Tensor  # (N, 1, 1, P + C) bool, False at the prompts' padding and after `place`

    @classmethod
    def after(cls, keys_values, prompts, G, max_new_tokens):
        """-> every layer's cache after a prefill, with room for `max_new_tokens` of each completion."""
        B, kv_heads, P, D = keys_values[0][0].shape
        device = keys_values[0][0].device
        shape = (B * G, kv_heads, max_new_tokens, D)
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts], device=device).repeat_interleave(G)
        allowed = torch.arange(P + max_new_tokens, device=device) < lengths.unsqueeze(1)  # (N, P + C)
        shared = torch.zeros((), dtype=torch.long, device=device), allowed.view(B * G, 1, 1, -1)
        return [cls(keys, values, keys.new_zeros(shape), values.new_zeros(shape), *shared)
                for keys, values in keys_values]

    def advance_to(self, step):
        """Move on to the completions' token number `step`, in all layers."""
        P = self.prompt_k.shape[2]
        self.place.fill_(step)
        self.allowed[..., P + step] = True

    def attend(self, query, key, value, scaling):
        """(N, heads, 1, D) queries, (N, kv_heads, 1, D) keys and values -> (N, 1, heads, D)."""
        self.own_k.index_copy_(2, self.place.view(1), key)
        self.own_v.index_copy_(2, self.place.view(1), value)
        N, heads, _, D = query.shape
        B, kv_heads, P, _ = self.prompt_k.shape

        query = query.reshape(N, kv_heads, -1, D)  # (N, kv_heads, heads / kv_heads, D)
        to_prompt = by_completion(attention_scores(by_prompt(query, B), self.prompt_k), N)
        to_own = attention_scores(query, self.own_k)
        weights = torch.cat([to_prompt, to_own], dim=-1) * scaling  # (N, kv_heads, heads / kv_heads, P + C)
        weights = weights.masked_fill_(~self.allowed, -torch.inf).softmax(-1).to(query.dtype)
        from_prompt = by_completion(by_prompt(weights[..., :P], B) @ self.prompt_v, N)
        from_own = weights[..., P:] @ self.own_v
        return (from_prompt + from_own).reshape(N, 1, heads, D)


def by_prompt(x, B):
    """(N, kv_heads, q, D) -> (B, kv_heads, N / B * q, D): a group's queries side by side, so its keys are read once."""
    kv_heads, last = x.shape[1], x.shape[-1]
    return x.unflatten(0, (B, -1)).transpose(1, 2).reshape(B, kv_heads, -1, last)


def by_completion(x, N):
    """(B, kv_heads, N / B * q, D) -> (N, kv_heads, q, D): the way back."""
    B, kv_heads, _, last = x.shape
    return x.view(B, kv_heads, N // B, -1, last).transpose(1, 2).reshape(N, kv_heads, -1, last)


def attention_scores(query, key):
    """query @ key^T in float32: in bfloat16 a score of 100 would be off by a quarter."""
    if query.dtype == torch.float32:
        return query @ key.mT
    # bfloat16 is used on CUDA alone (checkpoints.load_model), and only there does bmm have out_dtype.
    product = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32)
    return product.unflatten(0, query.shape[:2])


# ------------------------------------------------------------------------------------------------ one step
def advance(model, caches, through_layer, token, position):
    """Tokens (N,) at positions (3, N, 1) -> hidden states (N, H)."""
    text = model.model.language_model
    hidden = text.embed_tokens(token).unsqueeze(1)  # (N, 1, H)
    rotary = text.rotary_emb(hidden, position)
    for layer, cache in zip(text.layers, caches):
        hidden = through_layer(layer, hidden, rotary, cache)
    return text.norm(hidden)[:, 0]


def run_layer(layer, hidden, rotary, cache):
    """One decoder layer. All are alike, so that compiled it is compiled once, not once for each of 36."""
    return layer(hidden, attention_mask=cache, position_embeddings=rotary)


@functools.cache
def compiled_layer():
    """-> `run_layer`, compiled for sizes that change."""
    torch._dynamo.config.recompile_limit = 32  # versions for one prompt or several, one completion or several
    return torch.compile(run_layer, dynamic=True)


def record_graph(forward, through_layer, inputs):
    """Record forward(through_layer, *inputs) as a CUDA graph -> a function of the inputs alone.

    Its next call overwrites its output, and so may the next recording.
    """
    through_layer = usable(forward, through_layer, inputs)
    graph = torch.cuda.CUDAGraph()
    stream, keeper = recording_room()
    free, _ = torch.cuda.mem_get_info()
    if free < ROOM:  # while a graph is recorded, the allocator takes new memory and gives none back
        torch.cuda.empty_cache()
    torch.cuda.synchronize()
    # `with torch.cuda.graph(...)` would empty both caches here in each iteration: the device's, and that of pinned host
    # memory, where the layers' inputs of the training pass lie (1.1 GiB for 3B). Pinning them anew takes long.
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=keeper.pool(), capture_error_mode="thread_local")  # NCCL's thread also calls CUDA
        try:
            output = forward(through_layer, *inputs)
        finally:
            graph.capture_end()

    def replay(*new):
        for old, x in zip(inputs, new):
            old.copy_(x)
        graph.replay()
        return output

    return replay


@functools.cache
def recording_room():
    """-> (stream, graph) for all recordings of this process, which take the same memory one after the other.

    The graph is empty and keeps the memory between them, as in PyTorch's own torch/_inductor/cudagraph_trees.py.
    """
    stream = torch.cuda.Stream()
    keeper = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "The CUDA Graph is empty"
        with torch.cuda.graph(keeper, stream=stream, capture_error_mode="thread_local"):
            pass
    return stream, keeper


def usable(forward, compiled, inputs):
    """Run a step, which compiles: that must not happen while recording -> `compiled`, or `run_layer` where it fails.

    After a failure nothing is compiled any more: each iteration would try again, and fail after some seconds.
    """
    try:
        forward(compiled, *inputs)
        return compiled
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, no Python.h, no Triton: many kinds
        reason = " ".join(str(error).split("\n")[:2])  # torch names the backend first, then what it raised
        warnings.warn(f"a decoding step could not be compiled ({reason}); sampling goes on without, more slowly",
                      stacklevel=2)
        torch._dynamo.config.disable = True
        forward(run_layer, *inputs)
        return run_layer
