"""GRPO by hand: advantages within a group, the clipped loss with KL, sampling, and log-probabilities.

A group is one prompt (a video and a question) with G completions. Each is sampled, rewarded, and compared with the
others of its group; the policy then moves towards those that did better. First comes the arithmetic (Eq. 3 and 4),
which is plain tensors, then the two functions that run the model.

A group shares one long video prompt, so everything up to its last token is computed once. While sampling, all
completions read the prompt's keys and values (engine/model/decoding.py). Training packs B groups into one row

    [ prompt_1 ] ... [ prompt_B ][ o_1 ][ o_2 ] ... [ o_N ]

in which each o_i attends to its prompt and to itself (engine/model/attention.py): equal to N separate rows
(tests/test_attention.py) for 1/G of the prompts' work.

Shapes: B prompts, G completions of each, N = B * G, P prompt tokens, C completion tokens (padded on the right to the
longest), V vocabulary, H hidden size. This file knows tensors, not tasks.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.model.attention import embed, pack, run_language_model, visual_features
from engine.model.decoding import Decoder
from engine.model.prompts import Prompt

MAX_LOGITS_AT_ONCE = 2**25  # 220 positions of Qwen2.5-VL's vocabulary: 128 MiB in float32, and each copy as much

# ------------------------------------------------------------------------------------------------ advantages and loss


def group_advantages(rewards: Tensor) -> Tensor:
    """(B, G) rewards -> (B, G) advantages: (r - mean) / (std + 1e-4) within each group, unbiased std (Eq. 3).

    A group of equal rewards has advantage 0: it teaches nothing, and needs the 1e-4 (released code) for its division.
    Raises ValueError for groups of one.
    """
    if rewards.shape[1] < 2:
        raise ValueError("a group needs at least two completions to compare; use --group-size 2 or more.")
    r = rewards.double()  # in float32 rounding would give eight equal rewards of 1.7 the advantage 1e-3 instead of 0
    mean = r.mean(dim=1, keepdim=True)
    std = r.std(dim=1, keepdim=True)
    return ((r - mean) / (std + 1e-4)).to(rewards.dtype)


def grpo_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor, mask: Tensor,
              clip_epsilon: float = 0.2, kl_coef: float = 0.04, reduction: str = "completion") -> tuple[Tensor, dict]:
    """Clipped policy loss plus KL penalty (Eq. 3 and 4) -> (loss, metrics).

    `logps`, `old_logps`, `ref_logps` and `mask` are (N, C), `advantages` (N,). `mask` is True on completion tokens.
    `ref_logps` None leaves the KL penalty out. `reduction` "completion" is the mean over each completion's tokens, then
    over completions; "token" is the mean over all tokens given here, as in the released code.

    Paper: Eq. 3 has one ratio per sequence, its clipping left out. Here each token has one, clipped as in PPO.
    """
    mask = mask.to(logps.dtype)
    advantages = advantages.unsqueeze(1)  # (N, 1): every token of a completion has its completion's advantage

    def mean(x):
        if reduction == "token":
            return (x * mask).sum() / mask.sum().clamp(min=1)
        tokens = mask.sum(dim=1).clamp(min=1)
        return ((x * mask).sum(dim=1) / tokens).mean()

    ratio = torch.exp(logps - old_logps)  # pi_theta / pi_old, Eq. 3
    clipped = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon)
    # The smaller of the two: beyond the clip no gain is left, while a loss counts in full.
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    is_low = (ratio < 1 - clip_epsilon) & (advantages < 0)
    is_high = (ratio > 1 + clip_epsilon) & (advantages > 0)
    metrics = {"clip_low": mean(is_low.float()).item(), "clip_high": mean(is_high.float()).item()}

    if ref_logps is not None:
        # Eq. 4: the k3 estimate of KL(pi_theta || pi_ref), never negative and of low variance. As a loss the plain
        # difference logps - ref_logps (k1) would do nothing: its expected gradient is 0 (docs/reading.md).
        gap = ref_logps - logps
        gap = gap.clamp(max=20.0)  # exp(20) is 5e8: a token further off would be the whole loss; now it has no gradient
        kl = torch.exp(gap) - gap - 1
        per_token = per_token + kl_coef * kl
        metrics["kl"] = mean(kl).item()
    return mean(per_token), metrics


# ------------------------------------------------------------------------------------------------ sampling


class Rollout(NamedTuple):
    """Sampled completions of B prompts, prompt by prompt."""

    ids: Tensor  # (N, C), the end-of-turn token included, zeros after it
    logps: Tensor  # (N, C) float32, as recorded while sampling
    mask: Tensor  # (N, C) bool, True on the completion's tokens
    ended: Tensor  # (N,) bool, False where the limit cut it off


def scaled_logits(model: nn.Module, hidden: Tensor, temperature: float, banned: Tensor) -> Tensor:
    """(..., H) -> (..., V) float32 logits over temperature; one function for sampling and training, so both agree.

    `banned` ids (control tokens, and those that no text spells) get the lowest finite value: -inf makes entropy nan.
    """
    logits = model.lm_head(hidden).float() / temperature
    return logits.index_fill(-1, banned, torch.finfo(torch.float32).min)


@torch.no_grad()
def sample_group(model: nn.Module, prompts: list[Prompt], G: int, max_new_tokens: int, eos: Tensor, banned: Tensor,
                 temperature: float = 1.0, generator: torch.Generator | None = None,
                 features: list[Tensor] | None = None) -> Rollout:
    """Sample G completions of each of B prompts together: the o_1 ... o_G of Eq. 3.

    A completion ends with an id of `eos` (1-D) or after `max_new_tokens`. `temperature` 0 decodes greedily; its
    log-probabilities are those of temperature 1. `features`, (visual tokens, H) a prompt, save the tower's pass.
    """
    was_training = model.training
    model.eval()  # also switches gradient checkpointing off
    device = prompts[0].ids.device
    N = len(prompts) * G
    ids = torch.zeros(N, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(N, max_new_tokens, device=device)
    mask = torch.zeros(N, max_new_tokens, dtype=torch.bool, device=device)
    ended = torch.zeros(N, dtype=torch.bool, device=device)

    decoder = Decoder(model, prompts, G, max_new_tokens, features)
    hidden = decoder.start()  # (N, H)
    for step in range(max_new_tokens):
        all_logps = scaled_logits(model, hidden, temperature or 1.0, banned).log_softmax(dim=-1)  # (N, V)
        if temperature == 0:
            token = all_logps.argmax(dim=-1, keepdim=True)  # (N, 1)
        else:
            # NaN would end the program here; as it is, the loss will be NaN and the step left out.
            token = torch.multinomial(all_logps.exp().nan_to_num_(1.0), 1, generator=generator)
        logp = all_logps.gather(1, token).squeeze(1)  # (N,)
        token = token.squeeze(1)
        live = ~ended
        ids[:, step] = token * live
        logps[:, step] = logp * live
        mask[:, step] = live
        ended |= torch.isin(token, eos)  # ended rows stay in the batch, so shapes never change; the mask hides them
        if ended.all() or step + 1 == max_new_tokens:
            break
        hidden = decoder.step(token)
    model.train(was_training)
    length = int(mask.sum(dim=1).max())  # of the longest completion
    return Rollout(ids[:, :length], logps[:, :length], mask[:, :length], ended)


# ------------------------------------------------------------------------------------------------ log-probabilities


def group_logps(model: nn.Module, prompts: list[Prompt], ids: Tensor, mask: Tensor, banned: Tensor,
                temperature: float = 1.0, features: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of B groups' completions in one packed pass -> (logps, entropy), both (N, C) float32.

    `ids` and `mask` are (N, C). Values at padding are 0, and entropy carries no gradient. Pass the videos' `features`
    where the vision tower is frozen; without them it runs here, with gradients if it is trained.
    """
    features = features or visual_features(model, prompts)
    # The hidden state before a token predicts it: predictor[k] is its place in the row, for the k-th of ids[mask].
    attention, positions, predictor = pack(prompts, mask)
    row = embed(model, prompts, features, ids[mask])
    hidden = run_language_model(model, row, positions, attention)[0, predictor]  # (tokens of all completions, H)

    def chunk(h, target):
        """(n, H) hidden states and the (n,) ids they predict -> log-probabilities and entropy, both (n,)."""
        logits = scaled_logits(model, h, temperature, banned)
        normaliser = logits.logsumexp(-1)
        with torch.no_grad():
            entropy = normaliser - (logits.softmax(-1) * logits).sum(-1)
        return logits.gather(1, target.unsqueeze(1)).squeeze(1) - normaliser, entropy

    # A (tokens, V) tensor of the whole group would not fit: some positions at a time, recomputed in the backward pass.
    at_once = max(1, MAX_LOGITS_AT_ONCE // model.config.text_config.vocab_size)
    logps, entropy = [], []
    for h, target in zip(hidden.split(at_once), ids[mask].split(at_once)):
        chunk_logps, chunk_entropy = checkpoint(chunk, h, target, use_reentrant=False)
        logps.append(chunk_logps)
        entropy.append(chunk_entropy)
    blank = torch.zeros(mask.shape, device=hidden.device)  # filled where mask is True, row by row as ids[mask] was read
    return blank.masked_scatter(mask, torch.cat(logps)), blank.masked_scatter(mask, torch.cat(entropy))


class Policy(nn.Module):
    """A model whose forward is `group_logps`: DistributedDataParallel averages gradients of passes through forward."""

    def __init__(self, model: nn.Module, banned: Tensor, temperature: float):
        super().__init__()
        self.model = model
        self.banned = banned
        self.temperature = temperature

    def forward(self, prompts, ids, mask, features):
        return group_logps(self.model, prompts, ids, mask, self.banned, self.temperature, features)
