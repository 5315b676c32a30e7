"""grpo.py: advantages and loss by hand and by plain loops, sampling, and log-probabilities."""

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared import tiny_model, token_ids
from test_attention import library_logits, library_logps

import grpo


def sample(tokenizer, model, prompts, banned, **kwargs):
    # A handful of ordinary bytes end a completion too, so that the lengths differ.
    eos = torch.cat([token_ids(tokenizer, "<|im_end|>"), torch.arange(40, 52)])
    arguments = dict(G=4, max_new_tokens=20, eos=eos, generator=torch.Generator().manual_seed(3)) | kwargs
    return grpo.sample_group(model, prompts, banned=banned, **arguments)


# ------------------------------------------------------------------------------------------------ advantages, loss


def test_advantages_by_hand():
    # mean 1, deviations -1, 0, 1, 0; unbiased variance 2/3, std 0.8165
    advantages = grpo.group_advantages(torch.tensor([[0.0, 1.0, 2.0, 1.0]]))
    assert torch.allclose(advantages, torch.tensor([[-1.0, 0.0, 1.0, 0.0]]) / (math.sqrt(2 / 3) + 1e-4))


def test_equal_rewards_give_zero_advantage():
    assert not grpo.group_advantages(torch.full((3, 8), 1.7)).abs().gt(1e-6).any()


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        grpo.group_advantages(torch.ones(4, 1))


@given(st.lists(st.lists(st.floats(0, 2), min_size=4, max_size=4), min_size=1, max_size=5), st.floats(0.1, 10))
def test_advantages_sum_to_zero_and_each_group_stands_alone(rows, shift):
    rewards = torch.tensor(rows, dtype=torch.float64)
    advantages = grpo.group_advantages(rewards)
    assert torch.allclose(advantages.sum(1), torch.zeros(len(rows), dtype=torch.float64), atol=1e-6)
    assert torch.allclose(grpo.group_advantages(rewards + shift), advantages, atol=1e-6)
    assert torch.allclose(grpo.group_advantages(rewards[:1]), advantages[:1], atol=1e-9)


def plain_loss(logps, old, ref, advantages, mask, epsilon, beta, reduction):
    """Eq. 3 and 4 with clipping, one number at a time."""
    per_completion, every = [], []
    for n in range(len(mask)):
        tokens = []
        for t in range(mask.shape[1]):
            if mask[n, t]:
                ratio = math.exp(logps[n, t] - old[n, t])
                clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
                value = -min(ratio * advantages[n], clipped * advantages[n])
                if ref is not None:
                    gap = float(ref[n, t] - logps[n, t])
                    value += beta * (math.exp(gap) - gap - 1)
                tokens.append(float(value))
        every += tokens
        per_completion.append(sum(tokens) / len(tokens))
    values = per_completion if reduction == "completion" else every
    return sum(values) / len(values)


@pytest.mark.parametrize("reduction", ["completion", "token"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.04, 1.0])
def test_loss_matches_a_plain_python_loop(reduction, kl_coef):
    torch.manual_seed(0)
    logps, old, ref = (-torch.rand(6, 5, dtype=torch.float64) * 2 for _ in range(3))
    mask = torch.arange(5) < torch.tensor([1, 5, 3, 2, 4, 5]).unsqueeze(1)
    advantages = torch.randn(6, dtype=torch.float64)
    ref = ref if kl_coef else None
    arguments = (logps, old, ref, advantages, mask, 0.2, kl_coef, reduction)
    loss, metrics = grpo.grpo_loss(*arguments)
    assert loss.item() == pytest.approx(plain_loss(*arguments), abs=1e-12)
    assert ("kl" in metrics) == (ref is not None)
    assert 0 < metrics["clip_low"] < 1 and 0 < metrics["clip_high"] < 1


def test_clipped_loss_by_hand():
    # One token each. Ratio 1.5, advantage +1: clipped to 1.2. Ratio 0.5, advantage -1: clipped to 0.8.
    # Ratio 1.5, advantage -1: the worse value stands, 1.5. Advantage 0: nothing is clipped.
    old = torch.zeros(5, 1)
    logps = torch.log(torch.tensor([[1.5], [0.5], [1.5], [0.5], [1.5]])).requires_grad_()
    mask = torch.ones(5, 1, dtype=torch.bool)
    loss, metrics = grpo.grpo_loss(logps, old, None, torch.tensor([1.0, -1.0, -1.0, 0.0, 0.0]), mask)
    assert loss.item() == pytest.approx((-1.2 + 0.8 + 1.5) / 5)
    loss.backward()
    assert logps.grad.flatten().tolist() == pytest.approx([0, 0, 1.5 / 5, 0, 0])  # clipped tokens pull no more
    assert metrics["clip_high"] == pytest.approx(1 / 5) and metrics["clip_low"] == pytest.approx(1 / 5)


def test_kl_by_hand():
    # reference half as likely: gap = log 0.5; exp(gap) - gap - 1 = 0.5 + 0.6931 - 1 = 0.1931
    logps, ref = torch.zeros(1, 1), torch.full((1, 1), math.log(0.5))
    loss, metrics = grpo.grpo_loss(logps, logps, ref, torch.zeros(1), torch.ones(1, 1), kl_coef=0.04)
    assert metrics["kl"] == pytest.approx(0.193147, abs=1e-6)
    assert loss.item() == pytest.approx(0.04 * 0.193147, abs=1e-7)


def test_fresh_policy_has_ratio_one_and_the_policy_gradient():
    logps = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss, metrics = grpo.grpo_loss(logps, logps.detach(), logps.detach(), torch.tensor([2.0, -1.0]), mask)
    loss.backward()
    assert metrics == {"clip_low": 0, "clip_high": 0, "kl": 0}
    # -advantage / tokens of the completion / completions
    assert logps.grad.tolist() == [[-0.5, -0.5], [0.5, 0.0]]


def test_padding_never_changes_the_loss():
    torch.manual_seed(1)
    logps, old, ref = (-torch.rand(4, 3) for _ in range(3))
    mask, advantages = torch.ones(4, 3, dtype=torch.bool), torch.randn(4)

    def pad(x, value):
        return torch.nn.functional.pad(x, (0, 5), value=value)

    for reduction in ("completion", "token"):
        plain, _ = grpo.grpo_loss(logps, old, ref, advantages, mask, reduction=reduction)
        padded, _ = grpo.grpo_loss(pad(logps, -3.0), pad(old, 2.0), pad(ref, 1.0), advantages, pad(mask, False),
                                   reduction=reduction)
        assert torch.allclose(plain, padded)


def test_a_collapsed_token_does_not_overflow_the_kl():
    loss, metrics = grpo.grpo_loss(torch.full((1, 1), -200.0), torch.full((1, 1), -200.0), torch.zeros(1, 1),
                                   torch.ones(1), torch.ones(1, 1))
    assert math.isfinite(loss.item()) and math.isfinite(metrics["kl"])


# ------------------------------------------------------------------------------------------------ sampling


def test_completions_stop_at_their_end_token_and_are_blank_after_it(tokenizer, model, prompts, banned):
    rollout = sample(tokenizer, model, prompts, banned, max_new_tokens=12)
    for ids, logps, mask, ended in zip(*rollout):
        n = int(mask.sum())
        assert mask[:n].all() and not ids[n:].any() and not logps[n:].any()
        stops = [int(t) in range(40, 52) or t == tokenizer.eos_token_id for t in ids[:n]]
        assert not any(stops[:-1]) and stops[-1] == bool(ended)
        assert ended or n == 12


def test_banned_ids_are_never_sampled_however_likely(tokenizer, model, prompts, banned):
    with torch.no_grad():  # lm_head rows: the banned ids would win every draw
        model.lm_head.weight[banned] = 50 * torch.randn(2, 32)
    rollout = sample(tokenizer, model, prompts, banned)
    assert not torch.isin(rollout.ids[rollout.mask], banned).any()


def test_greedy_decoding_is_the_argmax_of_the_plain_model(tokenizer, model, prompts, banned):
    rollout = sample(tokenizer, model, prompts, banned, G=1, temperature=0.0)
    for prompt, ids, logps, mask in zip(prompts, rollout.ids, rollout.logps, rollout.mask):
        with torch.no_grad():
            logits = library_logits(model, prompt, ids[mask])
        logits[:, banned] = -math.inf
        best = logits.log_softmax(-1).max(-1)  # of every position, given what was written before it
        assert best.indices.tolist() == ids[mask].tolist()
        assert torch.allclose(best.values, logps[mask], atol=1e-5)  # those of temperature 1


def test_sampling_alone_or_in_a_batch_gives_the_same_distribution(tokenizer, model, prompts, banned):
    together = sample(tokenizer, model, prompts, banned, G=1, temperature=0.0)
    for b, prompt in enumerate(prompts):
        alone = sample(tokenizer, model, [prompt], banned, G=1, temperature=0.0)
        n = int(alone.mask.sum())
        assert together.ids[b][together.mask[b]].tolist() == alone.ids[0, :n].tolist()
        assert torch.allclose(together.logps[b, :n], alone.logps[0, :n], atol=1e-5)


def test_sampled_frequencies_follow_the_recorded_probabilities(tokenizer, prompts, banned):
    model = tiny_model(tokenizer)
    rollout = sample(tokenizer, model, prompts[:1], banned, G=4000, max_new_tokens=1, temperature=0.5)
    chosen = rollout.ids[:, 0] == rollout.ids[:, 0].mode().values
    p, count = float(rollout.logps[chosen][0].exp()), int(chosen.sum())
    assert abs(count - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p))


def test_completions_that_end_do_not_change_the_others(tokenizer, model, prompts, banned):
    # Few ids end a completion: some end at once, others run to the limit.
    rollout = sample(tokenizer, model, prompts, banned, G=6, max_new_tokens=80, eos=torch.arange(40, 47),
                     generator=torch.Generator().manual_seed(1))
    lengths = rollout.mask.sum(1)
    assert lengths.min() < 10 and lengths.max() == 80 and len(lengths.unique()) > 6
    logps, _ = grpo.group_logps(model, prompts, rollout.ids, rollout.mask, banned)
    assert (logps - rollout.logps).abs().max() < 1e-5


def test_the_batch_ends_with_its_longest_completion(tokenizer, model, prompts, banned):
    rollout = sample(tokenizer, model, prompts, banned, max_new_tokens=200)
    assert rollout.ended.all() and rollout.ids.shape[1] == rollout.mask.sum(1).max() < 200


def test_features_that_are_there_already_change_nothing(tokenizer, model, prompts, banned, monkeypatch):
    plain = sample(tokenizer, model, prompts, banned)
    features = grpo.visual_features(model, prompts)
    monkeypatch.setattr(model, "get_video_features", None)  # the tower does not run again
    assert all(torch.equal(a, b) for a, b in zip(plain, sample(tokenizer, model, prompts, banned, features=features)))


# ------------------------------------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_while_sampling_equal_those_of_the_packed_pass(tokenizer, model, prompts, banned, temperature):
    first = prompts[0].positions
    assert first[0, -1] > len(prompts[0].ids)  # the video's time span exceeds the prompt's length
    rollout = sample(tokenizer, model, prompts, banned, temperature=temperature)
    logps, _ = grpo.group_logps(model, prompts, rollout.ids, rollout.mask, banned, temperature)
    assert (logps - rollout.logps).abs().max() < 1e-5


def test_gradients_of_the_chunked_vocabulary_do_not_depend_on_the_chunk(tokenizer, model, prompts, banned, monkeypatch):
    rollout = sample(tokenizer, model, prompts, banned)
    gradients = []
    for positions in (1000, 7):
        monkeypatch.setattr(grpo, "MAX_LOGITS_AT_ONCE", positions * len(tokenizer))
        model.zero_grad()
        grpo.group_logps(model, prompts, rollout.ids, rollout.mask, banned)[0].sum().backward()
        gradients.append(model.lm_head.weight.grad.clone())
    assert torch.allclose(*gradients, atol=1e-5)


def test_entropy_of_a_flat_distribution_is_log_of_the_vocabulary(tokenizer, model, prompts, banned):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rollout = sample(tokenizer, model, prompts, banned)
    _, entropy = grpo.group_logps(model, prompts, rollout.ids, rollout.mask, banned, temperature=0.5)
    allowed = len(tokenizer) - 2
    assert torch.allclose(entropy[rollout.mask], torch.tensor(math.log(allowed)), atol=1e-5)
    assert torch.allclose(rollout.logps[rollout.mask], torch.tensor(-math.log(allowed)), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_logps_at_a_temperature_are_the_librarys(tokenizer, model, prompts, banned, temperature):
    rollout = sample(tokenizer, model, prompts, banned, temperature=temperature)
    for n, (ids, logps, mask) in enumerate(zip(rollout.ids, rollout.logps, rollout.mask)):
        with torch.no_grad():
            expected = library_logps(model, prompts[n // 4], ids[mask], banned, temperature)
        assert (logps[mask] - expected).abs().max() < 1e-4


def test_logits_of_a_bfloat16_model_are_divided_in_float32(tokenizer, banned):
    model = tiny_model(tokenizer).bfloat16()
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = grpo.scaled_logits(model, hidden, 0.7, banned)
    exact = model.lm_head(hidden).double() / 0.7
    allowed = [i for i in range(len(tokenizer)) if i not in banned]
    assert logits.dtype == torch.float32
    assert (logits[:, allowed] - exact[:, allowed]).abs().max() < 1e-6


def test_a_model_that_drops_features_while_it_trains_samples_with_all_of_them(tokenizer, model, prompts, banned):
    plain = sample(tokenizer, model, prompts, banned, temperature=0.0)
    norm = model.model.language_model.norm
    model.model.language_model.norm = torch.nn.Sequential(norm, torch.nn.Dropout(0.5))
    model.train()
    assert torch.equal(sample(tokenizer, model, prompts, banned, temperature=0.0).ids, plain.ids)
    assert model.training  # and goes on training


def test_the_cache_is_freed_when_sampling_ends(tokenizer, model, prompts, banned, monkeypatch):
    alive = []
    begin = grpo.Decoder.__init__

    def noted(decoder, *arguments):
        alive.append(weakref.ref(decoder))
        begin(decoder, *arguments)

    monkeypatch.setattr(grpo.Decoder, "__init__", noted)
    gc.disable()  # a cycle would wait for the collector
    sample(tokenizer, model, prompts, banned)
    gc.enable()
    assert [decoder() for decoder in alive] == [None]
