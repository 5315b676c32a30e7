"""The method's arithmetic: advantages, loss, and the shared prompt against the repeated one."""

import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st

import data
import grpo
from conftest import tiny_model


def make_prompt(tokenizer, model, height, width, frames, text, fps=0.4, seed=0):
    """A prompt over random frames; fps 0.4 makes the video's time positions run past the prompt's length."""
    noise = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 255, (frames, 3, height, width), dtype=torch.uint8, generator=noise)
    patches, grid = data.patchify(images, [0.5] * 3, [0.3] * 3)
    ids = data.encode_prompt(tokenizer, text, len(patches) // 4)
    positions = data.position_ids(ids, grid[0].tolist(), fps, model.config.video_token_id, 2)
    return grpo.Prompt(torch.tensor(ids), positions, patches, grid)


def token_ids(tokenizer, *names):
    return torch.tensor([tokenizer.convert_tokens_to_ids(name) for name in names])


@pytest.fixture()
def banned(tokenizer):
    return token_ids(tokenizer, "<|video_pad|>", "<|image_pad|>")


@pytest.fixture()
def prompts(tokenizer, model):
    """Two prompts of different length and frame size."""
    return [make_prompt(tokenizer, model, 56, 84, 24, "when is the door opened"),
            make_prompt(tokenizer, model, 28, 56, 12, "add a verb", seed=1)]


def sample(tokenizer, model, prompts, banned, **kwargs):
    # A handful of ordinary bytes end a completion too, so that the lengths differ.
    eos = torch.cat([token_ids(tokenizer, "<|im_end|>"), torch.arange(40, 52)])
    arguments = dict(G=4, max_new_tokens=20, generator=torch.Generator().manual_seed(3)) | kwargs
    return grpo.sample_group(model, prompts, eos=eos, banned=banned, **arguments)


def repeated_logps(model, prompt, completion, banned, temperature=1.0):
    """The plain computation: the library's own model on one prompt with its video and one completion."""
    model.set_attn_implementation("sdpa")
    del model.model.visual.patch_embed.forward
    ids = torch.cat([prompt.ids, completion]).unsqueeze(0)
    more = prompt.positions[:, -1:] + 1 + torch.arange(len(completion))
    logits = model(input_ids=ids, position_ids=torch.cat([prompt.positions, more], 1).unsqueeze(1),
                   pixel_values_videos=prompt.patches, video_grid_thw=prompt.grid).logits[0] / temperature
    grpo.speed_up(model)
    logits[:, banned] = -math.inf
    predicted = logits.log_softmax(-1)[len(prompt.ids) - 1:-1]
    return predicted.gather(1, completion.unsqueeze(1)).squeeze(1)


# ------------------------------------------------------------------------------------------------ packed pass


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train_vision", [False, True])
def test_packed_group_equals_repeated_prompts_in_values_and_gradients(tokenizer, model, prompts, banned,
                                                                      checkpointing, train_vision):
    rollout = sample(tokenizer, model, prompts, banned)
    assert len(set(rollout.mask.sum(1).tolist())) > 2  # completions of different length
    weights = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    model.model.visual.requires_grad_(train_vision)

    plain = [repeated_logps(model, prompts[n // 4], rollout.ids[n][rollout.mask[n]], banned) for n in range(8)]
    sum((logp * weights[n, :len(logp)]).sum() for n, logp in enumerate(plain)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    features = None if train_vision else [f.detach() for f in grpo.visual_features(model, prompts)]
    logps, _ = grpo.group_logps(model, prompts, rollout.ids, rollout.mask, banned, features=features)
    (logps * weights).sum().backward()

    assert (logps[rollout.mask] - torch.cat(plain)).abs().max() < 1e-5
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-5 * max(1, expected[name].abs().max()), name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_while_sampling_equal_those_of_the_packed_pass(tokenizer, model, prompts, banned, temperature):
    first = prompts[0].positions
    assert first[0, -1] > len(prompts[0].ids)  # the video's time span exceeds the prompt's length
    rollout = sample(tokenizer, model, prompts, banned, temperature=temperature)
    logps, _ = grpo.group_logps(model, prompts, rollout.ids, rollout.mask, banned, temperature)
    assert (logps - rollout.logps).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_logps_at_a_temperature_are_the_librarys(tokenizer, model, prompts, banned, temperature):
    rollout = sample(tokenizer, model, prompts, banned, temperature=temperature)
    with torch.no_grad():
        for n, (ids, logps, mask) in enumerate(zip(rollout.ids, rollout.logps, rollout.mask)):
            expected = repeated_logps(model, prompts[n // 4], ids[mask], banned, temperature)
            assert (logps[mask] - expected).abs().max() < 1e-4


def test_a_video_pad_inside_a_completion_is_a_token_like_others(tokenizer, model, prompts):
    pad = int(token_ids(tokenizer, "<|video_pad|>"))
    more = torch.tensor([65, pad, 66])
    with torch.no_grad():
        features = grpo.visual_features(model, prompts)
        row = grpo.embed(model, prompts, features, more)[0]
        assert torch.equal(row[-3:], model.get_input_embeddings()(more))
    pads = torch.cat([prompt.ids for prompt in prompts]) == pad
    assert torch.equal(row[:-3][pads], torch.cat(features))


def test_logits_of_a_bfloat16_model_are_divided_in_float32(tokenizer, banned):
    model = tiny_model(tokenizer).bfloat16()
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = grpo.scaled_logits(model, hidden, 0.7, banned)
    exact = model.lm_head(hidden).double() / 0.7
    allowed = [i for i in range(len(tokenizer)) if i not in banned]
    assert logits.dtype == torch.float32
    assert (logits[:, allowed] - exact[:, allowed]).abs().max() < 1e-6


def test_the_vision_tower_sees_the_same_windows_as_the_librarys(tokenizer, model):
    # 10 x 12 patches in windows of 8 x 8: whole ones, and narrow ones at the right and lower edges.
    prompts = [make_prompt(tokenizer, model, 140, 168, 4, "a"), make_prompt(tokenizer, model, 56, 56, 2, "b", seed=1)]
    found = torch.cat(grpo.visual_features(model, prompts))
    model.set_attn_implementation("sdpa")
    del model.model.visual.patch_embed.forward
    assert (found - torch.cat(grpo.visual_features(model, prompts))).abs().max() < 1e-5


def test_scores_of_a_decoding_step_are_those_of_float32(monkeypatch):
    # Keys with a large common offset, as biases give them: rounding a score of 300 to bfloat16 would move it by one.
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))  # CPUs have none
    noise = torch.Generator().manual_seed(0)
    (q, k, own), (v, w) = ((torch.randn(n, 1, m, 16, generator=noise) for n, m in sizes)
                           for sizes in (((2, 1), (1, 40), (2, 1)), ((1, 40), (2, 1))))
    q, k, v, own, w = (x.bfloat16() for x in (q + 4, k + 4, v, own + 4, w))
    buffers = [(torch.zeros(2, 1, 3, 16).bfloat16(), torch.zeros(2, 1, 3, 16).bfloat16())]
    unseen = torch.arange(43).expand(2, 1, 1, 43) > 40
    found = grpo.Decoding([(k, v)], buffers, torch.tensor(0), unseen).attend(0, q, own, w, 1.0)
    keys, values = (torch.cat([x.expand(2, -1, -1, -1), y], 2).double() for x, y in ((k, own), (v, w)))
    expected = (q.double() @ keys.mT).softmax(-1) @ values
    assert (found[:, 0].double() - expected[:, :, 0]).abs().max() < 0.02


def test_gradients_of_the_chunked_vocabulary_do_not_depend_on_the_chunk(tokenizer, model, prompts, banned, monkeypatch):
    rollout = sample(tokenizer, model, prompts, banned)
    gradients = []
    for positions in (1000, 7):
        monkeypatch.setattr(grpo, "LOGITS", positions * len(tokenizer))
        model.zero_grad()
        grpo.group_logps(model, prompts, rollout.ids, rollout.mask, banned)[0].sum().backward()
        gradients.append(model.lm_head.weight.grad.clone())
    assert torch.allclose(*gradients, atol=1e-5)


def test_entropy_of_a_flat_distribution_is_log_of_the_vocabulary(tokenizer, model, prompts, banned):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rollout = sample(tokenizer, model, prompts, banned)
    _, entropy = grpo.group_logps(model, prompts, rollout.ids, rollout.mask, banned)
    allowed = len(tokenizer) - 2
    assert torch.allclose(entropy[rollout.mask], torch.tensor(math.log(allowed)), atol=1e-5)
    assert torch.allclose(rollout.logps[rollout.mask], torch.tensor(-math.log(allowed)), atol=1e-5)


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
    rollout = sample(tokenizer, model, prompts, banned, G=1, temperature=0.0, max_new_tokens=6)
    for prompt, ids, mask in zip(prompts, rollout.ids, rollout.mask):
        written = prompt.ids[:0]
        for expected in ids[mask]:
            every = torch.arange(len(tokenizer))
            every = every[~torch.isin(every, banned)][::5]
            with torch.no_grad():
                best, *others = (repeated_logps(model, prompt, torch.cat([written, c.view(1)]), banned)[-1]
                                 for c in [expected, *every])
            assert best >= max(others)
            written = torch.cat([written, expected.view(1)])


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


def test_completions_that_end_early_change_nothing_for_those_that_go_on(tokenizer, model, prompts, banned):
    # Few ids end a completion: some end at once, some never.
    arguments = dict(G=6, max_new_tokens=80, eos=torch.arange(40, 47), banned=banned)
    rollout = grpo.sample_group(model, prompts, generator=torch.Generator().manual_seed(1), **arguments)
    lengths = rollout.mask.sum(1)
    assert lengths.min() < 32 < 64 < lengths.max()
    logps, _ = grpo.group_logps(model, prompts, rollout.ids, rollout.mask, banned)
    assert (logps - rollout.logps).abs().max() < 1e-5


def test_a_decoding_step_is_one_graph_whatever_the_lengths(tokenizer, model, prompts, banned):
    # What CUDA compiles: a graph break or a compilation a prompt would cost more than it saves.
    prompts = [*prompts, make_prompt(tokenizer, model, 28, 28, 8, "a third", seed=2)]
    count = torch._dynamo.testing.CompileCounter()
    step = torch.compile(grpo.advance, backend=count, fullgraph=True, dynamic=True)
    model.eval()
    with torch.no_grad():
        for b, length in ((1, 20), (3, 30), (3, 41), (1, 53), (3, 64)):
            layout, positions, ends = grpo.pack(prompts[:b])
            row = grpo.embed(model, prompts[:b], grpo.visual_features(model, prompts[:b]), ends[:0])
            grpo.decode(model, row, positions, layout)
            own = [tuple(x.new_zeros(3 * b, x.shape[1], length, x.shape[3]) for x in pair) for pair in layout.kept]
            unseen = torch.zeros(3 * b, 1, 1, layout.shapes[0][1] + length, dtype=torch.bool)
            inputs = torch.arange(3 * b), torch.full((3, 3 * b, 1), 90), torch.ones(3 * b, len(tokenizer))
            cache = grpo.Decoding(layout.kept, own, torch.tensor(0), unseen)
            expected = grpo.advance(model, cache, 1.0, banned, *inputs)
            found = step(model, cache, 1.0, banned, *inputs)
            assert torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], atol=1e-5)
    assert count.frame_count == 2  # one prompt, several prompts: more where two sizes happen to be equal


def test_a_model_that_drops_features_while_it_trains_samples_with_all_of_them(tokenizer, model, prompts, banned):
    plain = sample(tokenizer, model, prompts, banned, temperature=0.0)
    norm = model.model.language_model.norm
    model.model.language_model.norm = torch.nn.Sequential(norm, torch.nn.Dropout(0.5))
    model.train()
    assert torch.equal(sample(tokenizer, model, prompts, banned, temperature=0.0).ids, plain.ids)


def test_sampling_restores_the_training_mode(tokenizer, model, prompts, banned):
    model.train()
    sample(tokenizer, model, prompts, banned)
    assert model.training


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
    loss, metrics = grpo.grpo_loss(logps, old, ref, advantages, mask, 0.2, kl_coef, reduction)
    assert loss.item() == pytest.approx(plain_loss(logps, old, ref, advantages, mask, 0.2, kl_coef, reduction), abs=1e-12)
    assert ("kl" in metrics) == (ref is not None)
    assert 0 < metrics["clip_low"] < 1 and 0 < metrics["clip_high"] < 1


def test_clipped_loss_by_hand():
    # One token each. Ratio 1.5, advantage +1: clipped to 1.2. Ratio 0.5, advantage -1: clipped to 0.8.
    # Ratio 1.5, advantage -1: the worse value stands, 1.5. Mean of -1.2, 0.8, 1.5.
    old = torch.zeros(3, 1)
    logps = torch.log(torch.tensor([[1.5], [0.5], [1.5]])).requires_grad_()
    loss, metrics = grpo.grpo_loss(logps, old, None, torch.tensor([1.0, -1.0, -1.0]), torch.ones(3, 1, dtype=torch.bool))
    assert loss.item() == pytest.approx((-1.2 + 0.8 + 1.5) / 3)
    loss.backward()
    assert logps.grad.flatten().tolist() == pytest.approx([0, 0, 1.5 / 3])  # clipped tokens pull no more
    assert metrics["clip_high"] == pytest.approx(1 / 3) and metrics["clip_low"] == pytest.approx(1 / 3)


def test_only_tokens_whose_gradient_the_clip_takes_are_counted():
    # Below the range a positive advantage still pulls up, and above it a negative one still pushes down.
    logps = torch.log(torch.tensor([[0.5, 0.5], [0.5, 1.5], [1.5, 1.5]])).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, -1.0])
    loss, metrics = grpo.grpo_loss(logps, torch.zeros(3, 2), None, advantages, torch.ones(3, 2, dtype=torch.bool))
    loss.backward()
    assert (logps.grad == 0).tolist() == [[False, False], [True, False], [False, False]]
    assert metrics["clip_low"] == pytest.approx(1 / 6)
    assert metrics["clip_high"] == 0


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
    pad = lambda x, value: torch.nn.functional.pad(x, (0, 5), value=value)  # noqa: E731
    for reduction in ("completion", "token"):
        plain, _ = grpo.grpo_loss(logps, old, ref, advantages, mask, reduction=reduction)
        padded, _ = grpo.grpo_loss(pad(logps, -3.0), pad(old, 2.0), pad(ref, 1.0), advantages, pad(mask, False),
                                   reduction=reduction)
        assert torch.allclose(plain, padded)


def test_a_collapsed_token_does_not_overflow_the_kl():
    loss, metrics = grpo.grpo_loss(torch.full((1, 1), -200.0), torch.full((1, 1), -200.0), torch.zeros(1, 1),
                                   torch.ones(1), torch.ones(1, 1))
    assert math.isfinite(loss.item()) and math.isfinite(metrics["kl"])
