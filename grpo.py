"""GRPO by hand: sample a group, normalise its rewards, log-probabilities in one packed pass, clipped loss with KL.

Shapes: B prompts (a micro-batch), G completions of each, N = B * G, P prompt tokens, C completion tokens (padded to
the longest), V vocabulary, H hidden. This file knows tensors, not tasks.

A group shares one long video prompt, so everything up to the prompt's last token happens once per prompt, never once
per completion. Sampling: the vision tower and the prefill run once, then the cache is repeated G times. Training: one
row holds the whole group,

    [ prompt ][ o_1 ][ o_2 ] ... [ o_G ]

where o_i attends to the prompt and to itself, and its positions continue the prompt's as if the others were absent.
The result equals G separate rows (tests/test_grpo.py) for an eighth of the prompt's work.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, DynamicCache, Qwen2_5_VLForConditionalGeneration
from transformers.image_processing_base import ImageProcessingMixin

LOGIT_CHUNK = 256  # positions whose (chunk, V) float32 logits exist at one time


class Processor(NamedTuple):
    """What stands between text, pixels and a checkpoint's tensors."""

    tokenizer: object
    pixels: dict  # the checkpoint's preprocessor_config.json: image_mean and image_std of a pixel in [0, 1]
    eos: torch.Tensor  # ids that end a completion
    banned: torch.Tensor  # ids never sampled: they would ask for video features


def newest_checkpoint(folder):
    """-> the newest complete checkpoint in a run's output folder, or None."""
    return max(Path(folder).glob("checkpoint-[0-9]*[0-9]"), default=None)


def load_model(name, device):
    """Load Qwen2.5-VL and what belongs to it -> (model, Processor); bfloat16 on GPUs, float32 on CPUs.

    Raises OSError, one sentence, when there is no such checkpoint.
    """
    path = newest_checkpoint(name) or name
    try:
        # sdpa by name: "eager" would add a boolean mask as 0 and 1, silently.
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(path)
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(path)
        if not {"image_mean", "image_std"} <= pixels.keys():
            raise ValueError("its preprocessor_config.json states no image_mean and image_std")
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"--model {name}: no Qwen2.5-VL checkpoint could be loaded ({reason}); give a folder that holds "
                        "one or a hub id that this machine can reach.") from error
    if model.config.model_type != "qwen2_5_vl":
        raise OSError(f"--model {name}: is a {model.config.model_type}; only Qwen2.5-VL is supported.")
    ends = model.generation_config.eos_token_id or []
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    as_ids = lambda ids: torch.tensor(sorted(ids), device=device)  # noqa: E731
    banned = {model.config.video_token_id, model.config.image_token_id}
    return model.to(device), Processor(tokenizer, pixels, as_ids(ends), as_ids(banned))


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
    """Run the vision tower over a micro-batch -> a list of B (visual tokens, H) tensors."""
    patches = torch.cat([p.patches for p in prompts]).to(model.dtype)
    return list(model.get_video_features(patches, torch.cat([p.grid for p in prompts])).pooler_output)


def embed_prompt(model, prompt, features):
    """(P, H): token embeddings with the visual features in place of the video pads."""
    embeddings = model.get_input_embeddings()(prompt.ids)
    pads = (prompt.ids == model.config.video_token_id).unsqueeze(-1)
    return embeddings.masked_scatter(pads, features.to(embeddings.dtype))


def decode(model, embeddings, positions, attend, cache=None):
    """Run the language model -> (rows, L, H). `attend` is a (rows, 1, L, keys) bool mask, or None for plain causal.

    The mask goes in as the dictionary the model makes of any other: it is used as it stands.
    """
    return model.model.language_model(
        inputs_embeds=embeddings, position_ids=positions, attention_mask={"full_attention": attend},
        past_key_values=cache, use_cache=cache is not None).last_hidden_state


def scaled_logits(model, hidden, temperature, banned):
    """(..., H) -> (..., V) float32 logits over temperature; one function for sampling and training, so both agree.

    `banned` ids (the video and image pads, which would break feature scattering) get the lowest finite value.
    """
    logits = model.lm_head(hidden).float() / temperature
    return logits.index_fill(-1, banned, torch.finfo(torch.float32).min)


@torch.no_grad()
def sample_group(model, prompts, G, max_new_tokens, eos, banned, temperature=1.0, generator=None, features=None):
    """Sample G completions of each of B prompts together (the o_1 ... o_G of Eq. 3) -> Rollout.

    Tower and prefill run once per prompt; rows of different length are padded on the left. `temperature` 0 decodes
    greedily, and its log-probabilities are those of temperature 1. `eos` and `banned` are 1-D id tensors.
    """
    was_training = model.training
    model.eval()  # gradient checkpointing would drop the cache
    B, device = len(prompts), prompts[0].ids.device
    lengths = torch.tensor([len(p.ids) for p in prompts], device=device)
    L = int(lengths.max())
    features = features or visual_features(model, prompts)
    embedded = [embed_prompt(model, p, f) for p, f in zip(prompts, features)]
    embeddings = torch.stack([nn.functional.pad(e, (0, 0, L - len(e), 0)) for e in embedded])  # (B, L, H)
    positions = torch.stack([nn.functional.pad(p.positions, (L - len(p.ids), 0)) for p in prompts], dim=1)  # (3, B, L)
    real = torch.arange(L, device=device) >= L - lengths.unsqueeze(1)  # (B, L)
    attend = None
    if not real.all():
        causal = torch.ones(L, L, dtype=torch.bool, device=device).tril()
        itself = torch.eye(L, dtype=torch.bool, device=device)  # a padded row must attend to something
        attend = (causal & real.unsqueeze(1) | itself).unsqueeze(1)  # (B, 1, L, L)

    cache = DynamicCache()
    hidden = decode(model, embeddings, positions, attend, cache)[:, -1].repeat_interleave(G, dim=0)  # (N, H)
    cache.batch_repeat_interleave(G)
    last = positions[:, :, -1].repeat_interleave(G, dim=1)  # (3, N)
    padded = None if attend is None else real.repeat_interleave(G, dim=0)  # (N, L)

    N = B * G
    ended = torch.zeros(N, dtype=torch.bool, device=device)
    ids, logps, mask = [], [], []
    for step in range(max_new_tokens):
        logits = scaled_logits(model, hidden, temperature or 1.0, banned)  # (N, V)
        if temperature:
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        else:
            token = logits.argmax(-1)
        logp = logits.gather(1, token.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)
        ids.append(token.masked_fill(ended, 0))
        logps.append(logp.masked_fill(ended, 0.0))
        mask.append(~ended)
        ended = ended | torch.isin(token, eos)
        if step + 1 == max_new_tokens or ended.all():
            break
        embeddings = model.get_input_embeddings()(ids[-1]).unsqueeze(1)  # (N, 1, H)
        attend = None
        if padded is not None:
            attend = nn.functional.pad(padded, (0, step + 1), value=True).view(N, 1, 1, -1)
        hidden = decode(model, embeddings, (last + 1 + step).unsqueeze(-1), attend, cache)[:, -1]
    model.train(was_training)
    return Rollout(torch.stack(ids, 1), torch.stack(logps, 1), torch.stack(mask, 1), ended)


def pack(prompts, ids, mask):
    """Lay B groups out as B rows [prompt][o_1]...[o_G], padded on the right.

    `ids`, `mask` are (N, C). Returns completion ids (B lists of (K_b,)), positions (3, B, L), attend (B, 1, L, L) and
    for each completion token the flat index, in (B * L), of the position that predicts it: the token before it, which
    for the first token of every o_i is the prompt's last.
    """
    G, device = len(ids) // len(prompts), ids.device
    tokens, positions, groups, predictors = [], [], [], []
    for prompt, o, m in zip(prompts, ids.split(G), mask.split(G)):
        P, lengths = len(prompt.ids), m.sum(1)
        k = torch.cat([torch.arange(n, device=device) for n in lengths.tolist()])  # place within its completion
        tokens.append(o[m])
        positions.append(torch.cat([prompt.positions, prompt.positions[:, -1:] + 1 + k], dim=1).T)
        group = torch.repeat_interleave(torch.arange(1, G + 1, device=device), lengths)
        groups.append(torch.cat([group.new_zeros(P), group]))
        predictors.append(torch.where(k == 0, P - 1, P - 1 + torch.arange(len(k), device=device)))
    group = pad_sequence(groups, batch_first=True, padding_value=-1)  # (B, L): 0 prompt, i for o_i, -1 padding
    L = group.shape[1]
    same = group.unsqueeze(2) == group.unsqueeze(1)
    prompt_key = (group == 0).unsqueeze(1) & (group >= 0).unsqueeze(2)
    attend = (same | prompt_key) & torch.ones(L, L, dtype=torch.bool, device=device).tril()
    predictor = torch.cat([p + b * L for b, p in enumerate(predictors)])
    return tokens, pad_sequence(positions, batch_first=True).permute(2, 0, 1), attend.unsqueeze(1), predictor


def group_logps(model, prompts, ids, mask, banned, temperature=1.0, features=None):
    """Log-probabilities of B groups' completions in one packed pass -> (logps, entropy), both (N, C) float32.

    Only positions that predict a completion token reach the vocabulary, LOGIT_CHUNK at a time and recomputed in the
    backward pass, so no (tokens x V) tensor of the group ever exists. Values at padding are 0; entropy carries no
    gradient. `features` given means a frozen tower; else it runs here, with gradients if it is trained.
    """
    features = features or visual_features(model, prompts)
    tokens, positions, attend, predictor = pack(prompts, ids, mask)
    embed = model.get_input_embeddings()
    rows = [torch.cat([embed_prompt(model, p, f), embed(o)]) for p, f, o in zip(prompts, features, tokens)]
    hidden = decode(model, pad_sequence(rows, batch_first=True), positions, attend)
    hidden = hidden.flatten(0, 1)[predictor]  # (tokens of all completions, H)

    def chunk(h, target):
        logits = scaled_logits(model, h, temperature, banned)
        normaliser = logits.logsumexp(-1)
        with torch.no_grad():
            entropy = normaliser - (logits.softmax(-1) * logits).sum(-1)
        return logits.gather(1, target.unsqueeze(1)).squeeze(1) - normaliser, entropy

    pairs = zip(hidden.split(LOGIT_CHUNK), torch.cat(tokens).split(LOGIT_CHUNK))
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
