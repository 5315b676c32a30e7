"""GRPO by hand: sample a group, normalise its rewards, log-probabilities in one packed pass, clipped loss with KL.

Shapes: B prompts, G completions of each, N = B * G, P prompt tokens, C completion tokens (padded to the longest), V
vocabulary, H hidden. This file knows tensors, not tasks.

A group shares one long video prompt, so everything up to the prompt's last token happens once per prompt, never once
per completion. Sampling: the vision tower and the prefill run once, and all completions read the one cache of their
prompt. Training: one row holds the whole group,

    [ prompt ][ o_1 ][ o_2 ] ... [ o_G ]

where o_i attends to the prompt and to itself, and its positions continue the prompt's as if the others were absent.
The result equals G separate rows (tests/test_grpo.py) for an eighth of the prompt's work.
"""

import functools
import itertools
import types
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

LOGITS = 2**25  # float32 logits that exist at one time: 220 positions of the published vocabulary


class Prompt(NamedTuple):
    """One prompt with its video, on the model's device."""

    ids: torch.Tensor  # (P,)
    positions: torch.Tensor  # (3, P), data.position_ids
    patches: torch.Tensor  # (patches, 1176), data.patchify
    grid: torch.Tensor  # (1, 3)


class Rollout(NamedTuple):
    """Sampled completions of B prompts, prompt by prompt."""

    ids: torch.Tensor  # (N, C), the end-of-turn token included, zeros after it
    logps: torch.Tensor  # (N, C) float32, as recorded while sampling
    mask: torch.Tensor  # (N, C) bool, True on the completion's tokens
    ended: torch.Tensor  # (N,) bool, False where the limit cut it off


def visual_features(model, prompts):
    """Run the vision tower -> a list of B (visual tokens, H) tensors."""
    features = []
    for _, alike in itertools.groupby(prompts, key=lambda p: p.grid[0, 1:].tolist()):  # frames of one size: no padding
        patches, grids = zip(*((p.patches, p.grid) for p in alike))
        features += model.get_video_features(torch.cat(patches).to(model.dtype), torch.cat(grids)).pooler_output
    return features


def embed(model, prompts, features, more):
    """(1, T, H): embeddings of all prompts' tokens and of `more` (completions), visual features in place of video pads."""
    ids = torch.cat([p.ids for p in prompts] + [more])  # one call: each would have a gradient of the whole matrix
    embeddings = model.get_input_embeddings()(ids)
    pads = (ids == model.config.video_token_id).unsqueeze(-1)
    pads[len(ids) - len(more):] = False
    return embeddings.masked_scatter(pads, torch.cat(features).to(embeddings.dtype)).unsqueeze(0)


# ------------------------------------------------------------------------------------------------ attention


class Packed(NamedTuple):
    """What attends to what in one row of T tokens, [prompt_1] ... [prompt_B][o_1] ... [o_N], without any padding.

    Every layer but attention sees the row as it is. Attention takes it apart: a prompt attends to itself, a completion
    to its prompt and itself. What a mask over the row would forbid is mostly never computed.
    """

    shapes: list  # (B, P), and unless this is a prefill (N, C): rows and columns of the padded parts
    places: torch.Tensor  # (B * P + N * C,) where in the row each column of the parts stands; at padding anywhere
    back: torch.Tensor  # (T,) the reverse: each token's column
    allowed: torch.Tensor | None  # (N, 1, C, P + C) bool: the keys of a completion's query, its prompt's first
    kept: list  # a prefill collects each layer's (keys, values) of the prompts here, for Decoding

    def attend(self, layer, query, key, value, scaling):
        """(1, heads, T, D) queries, (1, kv, T, D) keys and values -> (1, T, heads, D)."""
        (q, *own_q), (k, *own_k), (v, *own_v) = (_take(x, self.places, self.shapes) for x in (query, key, value))
        # Right padding needs no mask: no real query comes after it.
        outputs = [nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)]
        if self.allowed is None:
            self.kept.append((k.contiguous(), v.contiguous()))  # else every decoding step would copy them
        else:
            (N, heads, C, D), (B, kv, _, _) = own_q[0].shape, k.shape
            # (N, kv, P + C, D): a group's prompt, seen by each of its completions, before the completion's own.
            k, v = (torch.cat([x.unsqueeze(1).expand(-1, N // B, -1, -1, -1), y.unflatten(0, (B, -1))], 3).flatten(0, 1)
                    for x, y in ((k, own_k[0]), (v, own_v[0])))
            # The heads that share keys stand one after the other as queries, so no key is repeated for them.
            out = nn.functional.scaled_dot_product_attention(
                own_q[0].reshape(N, kv, -1, D), k, v, attn_mask=self.allowed.repeat(1, 1, heads // kv, 1), scale=scaling)
            outputs.append(out.reshape(N, heads, C, D))
        return torch.cat([o.transpose(1, 2).flatten(0, 1) for o in outputs]).index_select(0, self.back).unsqueeze(0)


class Decoding(NamedTuple):
    """One new token of each of N completions: keys and values of a prompt are stored, and read, once for its group."""

    prompts: list  # a layer's (keys, values), each (B, kv, P, D), padded on the right
    own: list  # a layer's (keys, values), each (N, kv, room, D), filled up to `place`
    place: torch.Tensor  # () the new token's place in `own`
    unseen: torch.Tensor  # (N, 1, 1, P + room) bool, True at padding and after `place`

    def attend(self, layer, query, key, value, scaling):
        """(N, heads, 1, D) queries, (N, kv, 1, D) keys and values -> (N, 1, heads, D)."""
        (prompt_k, prompt_v), (own_k, own_v) = self.prompts[layer], self.own[layer]
        own_k.index_copy_(2, self.place.view(1), key)
        own_v.index_copy_(2, self.place.view(1), value)
        (N, heads, _, D), (B, kv, P, _) = query.shape, prompt_k.shape

        def together(x):  # (N, kv, heads / kv, -) -> (B, kv, N / B * heads / kv, -): a group side by side
            return x.unflatten(0, (B, -1)).transpose(1, 2).reshape(B, kv, -1, x.shape[-1])

        def apart(x):
            return x.view(B, kv, N // B, -1, x.shape[-1]).transpose(1, 2).reshape(N, kv, -1, x.shape[-1])

        query = query.reshape(N, kv, -1, D)  # (N, kv, heads / kv, D)
        scores = torch.cat([apart(_scores(together(query), prompt_k)), _scores(query, own_k)], -1) * scaling
        weights = scores.masked_fill_(self.unseen, -torch.inf).softmax(-1).to(query.dtype)
        out = apart(together(weights[..., :P]) @ prompt_v) + weights[..., P:] @ own_v
        return out.reshape(N, 1, heads, D)

    def at(self, step):
        """Move on to the completions' token number `step`."""
        self.place.fill_(step)
        self.unseen[..., self.prompts[0][0].shape[2] + step] = False


def _scores(query, key):
    """query @ key^T in float32, as sdpa computes it: in bfloat16 a score of 100 would be off by a quarter."""
    if query.dtype == torch.float32:
        return query @ key.mT
    product = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32)  # CUDA only
    return product.unflatten(0, query.shape[:2])


def _take(x, places, shapes):
    """(1, heads, T, D) -> for each of `shapes` (rows, columns) a tensor (rows, heads, columns, D)."""
    parts = x[0].transpose(0, 1).index_select(0, places).split([rows * columns for rows, columns in shapes])
    return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, shapes)]


def group_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """The language model's attention; in place of a mask it is given a Packed or a Decoding."""
    return attention_mask.attend(module.layer_idx, query, key, value, scaling), None


def window_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **kwargs):
    """The vision tower's attention within frames or windows, all in one batch: (1, heads, T, D) -> (1, T, heads, D).

    transformers would call sdpa for one window after the other, some 200 of them in each of 28 layers.
    """
    starts, lengths = cu_seq_lens_q[:-1].long(), cu_seq_lens_q.diff()
    column = torch.arange(max_length_q, device=query.device)
    inside = column < lengths.unsqueeze(1)  # (windows, S)
    places = torch.where(inside, starts.unsqueeze(1) + column, 0).flatten()
    q, k, v = (_take(x, places, [inside.shape])[0] for x in (query, key, value))
    allowed = None if inside.all() else inside[:, None, None]
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling)
    return out.transpose(1, 2)[inside].unsqueeze(0), None


AttentionInterface.register("group", group_attention)
AttentionInterface.register("window_flash", window_attention)  # only names with "flash" are given the windows at once


def speed_up(model):
    """Give Qwen2.5-VL the attention above and a faster first layer; `model(...)` and `generate` no longer work then."""
    model.set_attn_implementation({"text_config": "group", "vision_config": "window_flash"})
    first = model.model.visual.patch_embed
    first.forward = types.MethodType(_embed_patches, first)


def _embed_patches(self, patches):
    """The tower's first layer: a convolution whose stride is its kernel, three times as slow as a matrix product."""
    return nn.functional.linear(patches, self.proj.weight.flatten(1))


def pack(prompts, mask=None):
    """Lay B groups out as one row [prompt_1] ... [prompt_B][o_1] ... [o_N] -> (Packed, positions, predictor).

    `mask` (N, C) marks the completions' tokens; without it the row is a prefill of the prompts alone. `positions` is
    (3, 1, T); those of every completion continue its prompt's. `predictor` is the place of the token that predicts each
    completion token: the one before it, which for the first of every o_i is its prompt's last; in a prefill, (B,), each
    prompt's last.
    """
    device = prompts[0].ids.device
    lengths = torch.tensor([len(p.ids) for p in prompts], device=device)
    filled = torch.arange(max(len(p.ids) for p in prompts), device=device) < lengths.unsqueeze(1)  # (B, P)
    positions, last = torch.cat([p.positions for p in prompts], 1), lengths.cumsum(0) - 1
    if mask is None:
        layout = Packed([filled.shape], _places(filled), filled.flatten().nonzero().squeeze(1), None, [])
        return layout, positions.unsqueeze(1), last
    G, (N, C) = len(mask) // len(prompts), mask.shape
    both = torch.cat([filled.flatten(), mask.flatten()])
    places, k = _places(both), torch.arange(C, device=device)
    causal = (k <= k.unsqueeze(1)).expand(N, C, C)
    allowed = torch.cat([filled.repeat_interleave(G, 0).unsqueeze(1).expand(-1, C, -1), causal], 2).unsqueeze(1)
    more = positions[:, last].repeat_interleave(G, 1).unsqueeze(2) + 1 + k  # (3, N, C)
    own = places[filled.numel():].view(N, C)
    predictor = torch.cat([last.repeat_interleave(G).unsqueeze(1), own[:, :-1]], 1)
    layout = Packed([filled.shape, mask.shape], places, both.nonzero().squeeze(1), allowed, [])
    return layout, torch.cat([positions, more[:, mask]], 1).unsqueeze(1), predictor[mask]


def _places(filled):
    """bool -> flat: for each True its number among all; for False, some number."""
    return filled.flatten().cumsum(0) - 1


def decode(model, embeddings, positions, layout):
    """Run the language model over (rows, L, H) embeddings; attention is `layout`'s, a Packed or a Decoding."""
    return model.model.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False,
                                      attention_mask={"full_attention": layout}).last_hidden_state


# ------------------------------------------------------------------------------------------------ rollouts


def scaled_logits(model, hidden, temperature, banned):
    """(..., H) -> (..., V) float32 logits over temperature; one function for sampling and training, so both agree.

    `banned` ids (the video and image pads, which would break feature scattering) get the lowest finite value.
    """
    logits = model.lm_head(hidden).float() / temperature
    return logits.index_fill(-1, banned, torch.finfo(torch.float32).min)


def choose(model, hidden, noise, temperature, banned):
    """(N, H) -> tokens (N,) and their log-probabilities (N,).

    With `noise` (N, V) drawn from the exponential distribution of mean 1, the largest p / noise is a draw from p; with
    ones it is the most likely token.
    """
    logits = scaled_logits(model, hidden, temperature, banned)
    token = (logits - noise.log()).argmax(-1)
    return token, logits.gather(1, token.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)


def advance(model, cache, temperature, banned, token, position, noise):
    """Tokens (N,) at positions (3, N, 1) -> the next tokens and their log-probabilities."""
    embeddings = model.get_input_embeddings()(token).unsqueeze(1)  # (N, 1, H)
    return choose(model, decode(model, embeddings, position, cache)[:, 0], noise, temperature, banned)


def record(step, inputs):
    """Record step(*inputs) as a CUDA graph -> a function like it, whose outputs its next call overwrites."""
    step(*inputs)  # compiles, which must not happen while recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*inputs)

    def replay(*new):
        for old, x in zip(inputs, new):
            old.copy_(x)
        graph.replay()
        return outputs

    return replay


@torch.no_grad()
def sample_group(model, prompts, G, max_new_tokens, eos, banned, temperature=1.0, generator=None, features=None):
    """Sample G completions of each of B prompts together (the o_1 ... o_G of Eq. 3) -> Rollout.

    Tower and prefill run once per prompt. `temperature` 0 decodes greedily, and its log-probabilities are those of
    temperature 1. `eos` and `banned` are 1-D id tensors. The buffers have their full length from the start, and ended
    completions stay in the batch, so that every step has the same shapes: a GPU records one graph.
    """
    was_training = model.training
    model.eval()  # a layer that gradient checkpointing runs may run again, and would keep its keys twice
    B, device, V = len(prompts), prompts[0].ids.device, model.config.text_config.vocab_size
    N, room = B * G, max_new_tokens
    layout, positions, ends = pack(prompts)
    features = features or visual_features(model, prompts)
    hidden = decode(model, embed(model, prompts, features, ends[:0]), positions, layout)[0, ends]
    hidden = hidden.repeat_interleave(G, dim=0)  # (N, H)
    last = positions[:, 0, ends].repeat_interleave(G, dim=1).unsqueeze(2)  # (3, N, 1)
    lengths, P = torch.tensor([len(p.ids) for p in prompts], device=device), layout.shapes[0][1]
    unseen = torch.arange(P + room, device=device) >= lengths.repeat_interleave(G).unsqueeze(1)
    own = [tuple(x.new_zeros(N, x.shape[1], room, x.shape[3]) for x in pair) for pair in layout.kept]
    cache = Decoding(layout.kept, own, torch.zeros_like(ends[0]), unseen.view(N, 1, 1, -1))
    ids = torch.zeros(N, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(N, max_new_tokens, device=device)
    mask = torch.zeros(N, max_new_tokens, dtype=torch.bool, device=device)
    ended = torch.zeros(N, dtype=torch.bool, device=device)

    def noise(n):
        q = torch.ones(n, V, device=device)
        return q.exponential_(generator=generator) if temperature else q

    scale, forward = temperature or 1.0, None
    token, logp = choose(model, hidden, noise(N), scale, banned)
    for step in range(max_new_tokens):
        live = ~ended
        ids[:, step], logps[:, step], mask[:, step] = token * live, logp * live, live
        ended |= torch.isin(token, eos)
        if step + 1 == max_new_tokens or ended.all():
            break
        cache.at(step)
        inputs = token, last + 1 + step, noise(N)
        if forward is None:
            forward = functools.partial(advance, model, cache, scale, banned)
            if device.type == "cuda":  # some 2,000 small kernels a token otherwise, each launched by Python
                torch._dynamo.config.recompile_limit = 32  # one prompt or several, one completion or several, ...
                compiled = torch.compile(advance, dynamic=True)
                forward = record(functools.partial(compiled, *forward.args), inputs)
        token, logp = forward(*inputs)
    model.train(was_training)
    steps = step + 1
    return Rollout(ids[:, :steps], logps[:, :steps], mask[:, :steps], ended)


def group_logps(model, prompts, ids, mask, banned, temperature=1.0, features=None):
    """Log-probabilities of B groups' completions in one packed pass -> (logps, entropy), both (N, C) float32.

    Only positions that predict a completion token reach the vocabulary, some at a time and recomputed in the backward
    pass, so no (tokens x V) tensor of the group ever exists. Values at padding are 0; entropy carries no
    gradient. `features` given means a frozen tower; else it runs here, with gradients if it is trained.
    """
    features = features or visual_features(model, prompts)
    layout, positions, predictor = pack(prompts, mask)
    row = embed(model, prompts, features, ids[mask])
    hidden = decode(model, row, positions, layout)[0, predictor]  # (tokens of all completions, H)

    def chunk(h, target):
        logits = scaled_logits(model, h, temperature, banned)
        normaliser = logits.logsumexp(-1)
        with torch.no_grad():
            entropy = normaliser - (logits.softmax(-1) * logits).sum(-1)
        return logits.gather(1, target.unsqueeze(1)).squeeze(1) - normaliser, entropy

    at_once = max(1, LOGITS // model.config.text_config.vocab_size)
    pairs = zip(hidden.split(at_once), ids[mask].split(at_once))
    logps, entropy = zip(*(checkpoint(chunk, h, target, use_reentrant=False) for h, target in pairs))
    blank = torch.zeros(mask.shape, device=hidden.device)
    return blank.masked_scatter(mask, torch.cat(logps)), blank.masked_scatter(mask, torch.cat(entropy))


class Policy(nn.Module):
    """A model whose forward is `group_logps`: DistributedDataParallel averages only what enters through forward."""

    def __init__(self, model, banned, temperature):
        super().__init__()
        self.model, self.banned, self.temperature = model, banned, temperature

    def forward(self, prompts, ids, mask, features):
        return group_logps(self.model, prompts, ids, mask, self.banned, self.temperature, features)


def group_advantages(rewards):
    """(B, G) rewards -> (B, G) advantages: (r - mean) / (std + 1e-4) within each group, unbiased std (Eq. 3).

    A group of equal rewards has advantage 0. Raises ValueError for groups of one.
    """
    if rewards.shape[1] < 2:
        raise ValueError("a group needs at least two completions to compare; use --group-size 2 or more.")
    r = rewards.double()  # in float32, eight rewards of 1.7 differ from their mean by 1e-7, a thousandth of 1e-4
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).to(rewards.dtype)


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, clip_epsilon=0.2, kl_coef=0.04, reduction="completion"):
    """Clipped policy loss plus KL penalty (Eq. 3 and 4, with the clipping the paper leaves out of its formulas).

    `logps`, `old_logps`, `ref_logps` (or None) and `mask` are (N, C), `advantages` (N,). Paper: Eq. 3 has one ratio a
    sequence; this is the usual one a token. `reduction` "completion" is the mean over each completion's tokens, then
    over completions; "token" the mean over all tokens (the released code's). Returns (loss, metrics).
    """
    mask = mask.to(logps.dtype)
    advantages = advantages.unsqueeze(1)  # (N, 1)

    def mean(x):
        if reduction == "token":
            return (x * mask).sum() / mask.sum().clamp(min=1)
        return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()

    ratio = torch.exp(logps - old_logps)  # pi_theta / pi_old, Eq. 3
    clipped = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    metrics = {
        "clip_low": mean(((ratio < 1 - clip_epsilon) & (advantages < 0)).float()).item(),
        "clip_high": mean(((ratio > 1 + clip_epsilon) & (advantages > 0)).float()).item(),
    }
    if ref_logps is not None:
        gap = (ref_logps - logps).clamp(max=20.0)  # exp of more overflows on a token the policy has given up
        kl = torch.exp(gap) - gap - 1  # the k3 estimator of KL(pi_theta || pi_ref), Eq. 4
        per_token = per_token + kl_coef * kl
        metrics["kl"] = mean(kl).item()
    return mean(per_token), metrics


class MasterAdamW(torch.optim.Optimizer):
    """AdamW whose state holds a float32 master copy of every parameter that is not float32 itself.

    A bfloat16 weight has 8 bits: an update of 1e-6 to a weight of 0.02 is lost in rounding, here it accumulates. The
    masters live in the optimiser's state so that ZeroRedundancyOptimizer shards them over ranks with the moments.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, grad = self.state[p], p.grad.float()
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(grad), exp_avg_sq=torch.zeros_like(grad))
                    if p.dtype != torch.float32:
                        state["master"] = p.float()
                master = state.get("master", p)
                state["step"] += 1
                master.mul_(1 - lr * group["weight_decay"])
                state["exp_avg"].lerp_(grad, 1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
                deviation = (state["exp_avg_sq"] / (1 - b2 ** state["step"])).sqrt_().add_(group["eps"])
                master.addcdiv_(state["exp_avg"], deviation, value=-lr / (1 - b1 ** state["step"]))
                if master is not p:
                    p.copy_(master)
                del grad, deviation  # else they live on beside the next parameter's
