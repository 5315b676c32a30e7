"""The training loop from the sampled texts to the moved weights, by worked examples.

In most of these tests scripted texts stand in the sampler's place. So the rewards, the advantages and the loss of an
iteration are numbers that a reader can work out on paper; the tests below "by hand" do. Then the whole loop is written
a second time, as plainly as can be, and must give the same weights.
"""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shared import (
    banned_by,
    byte_tokenizer,
    log_of,
    losses,
    make_config,
    reply,
    rollouts_of,
    scripted,
    train,
    weights_of,
    write_lines,
    write_video,
)
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import data
import grpo
import invert4tvg
import rewards
from engine.model import optimizer
from engine.model.loading import newest_checkpoint
from engine.model.prompts import encode_prompt, patchify, position_ids
from engine.video.frames import read_video
from engine.words.annotations import load_demonstrations


def two_videos(folder, checkpoint, rows):
    """A configuration over `rows`; the videos AAA, 28 x 56, and BBB, 56 x 56, last five seconds."""
    config = make_config(folder, checkpoint)
    write_video(folder / "videos" / "BBB.mp4", [i / 5 for i in range(25)], size=(56, 56), g="5")
    (folder / "train.txt").write_text("".join(f"{row}.\n" for row in rows))
    return dataclasses.replace(config, p=1.0, min_frame_pixels=784, max_new_tokens=60, save_rollouts=1)


@pytest.fixture()
def quick(tmp_path, checkpoint):
    """Grounding on four rows, one iteration without a reference."""
    rows = ["AAA 0 2##person opens the door", "BBB 2 4##a person is sitting down", "AAA 1 3##a red lamp",
            "BBB 0 4##the man runs and laughs"]
    return dataclasses.replace(two_videos(tmp_path, checkpoint, rows), iterations=1, kl_coef=0.0, save_rollouts=0)


# ------------------------------------------------------------------------------------------------ by hand

# Two prompts, four answers each. Every answer ends at 4 s; the first begins at 0 s, the next at 0.5 s, and so on.
# The fourth has no tags: its format is 0, and so is its IoU, since an answer is read from its tags alone.
ANSWERS = [reply("0 to 4"), reply("0.5 to 4"), reply("1 to 4"), "1.5 to 4",
           reply("2 to 4"), reply("2.5 to 4"), reply("3 to 4"), reply("3.5 to 4")]
IOUS = [2 / 4, 1.5 / 4, 1 / 4, 0,  # the first prompt's event lasts from 0 to 2
        2 / 2, 1.5 / 2, 1 / 2, 0.5 / 2]  # the second's from 2 to 4
TOTALS = [1.5, 1.375, 1.25, 0, 2, 1.75, 1.5, 1.25]  # and 1 for the format
# First group: mean 1.03125, standard deviation 0.6950. Second: mean 1.625, standard deviation 0.3227.
ADVANTAGES = [0.6743, 0.4945, 0.3147, -1.4835, 1.1615, 0.3872, -0.3872, -1.1615]
LENGTHS = [40, 42, 40, 9, 40, 42, 40, 42]  # bytes, and the token that ends the turn


@pytest.fixture(scope="module")
def worked(tmp_path_factory, checkpoint):
    """Two iterations of it, one prompt in each of two micro-batches -> (output, the arguments of each loss)."""
    rows = ["AAA 0 2##person opens the door", "BBB 2 4##a person is sitting down"]
    config = two_videos(tmp_path_factory.mktemp("worked"), checkpoint, rows)
    with scripted(*ANSWERS), losses() as calls:
        output = train(config, group_size=4, iterations=2, temperature=0.7, kl_coef=0.5, loss_reduction="token",
                       lr=1e-2)
    return output, calls


def test_each_completion_is_scored_by_its_own_prompt(worked):
    lines = rollouts_of(worked[0])[:8]
    advantages = grpo.group_advantages(torch.tensor(TOTALS).view(2, 4)).flatten().tolist()
    assert [line["advantage"] for line in lines] == pytest.approx(advantages, abs=1e-5) and max(advantages) > 0
    assert [line["completion"] for line in lines] == ANSWERS
    assert [(line["start"], line["end"]) for line in lines] == [(0, 2)] * 4 + [(2, 4)] * 4
    assert [line["parts"]["iou"] for line in lines] == pytest.approx(IOUS)
    assert [line["parts"]["total"] for line in lines] == pytest.approx(TOTALS)


def test_kept_completions_say_what_was_cut_off_and_how_far_each_is_from_the_reference(worked):
    output, calls = worked
    lines = rollouts_of(output)
    assert len(lines) == 16 and not any(line["cut_off"] for line in lines)  # 60 tokens are enough
    assert [line["kl"] for line in lines[:8]] == [0] * 8  # before the first step the policy is the reference
    for n, line in enumerate(lines[8:]):  # k3 by hand, of the second iteration's two losses
        call = calls[2 + n // 4]
        ratio = torch.exp(call["ref_logps"] - call["logps"].detach())[n % 4][call["mask"][n % 4]]
        assert line["kl"] == pytest.approx(float((ratio - ratio.log() - 1).mean()), rel=1e-3) and line["kl"] > 0


def test_every_nth_iterations_completions_are_kept_as_demonstrations(quick):
    with scripted(*ANSWERS):
        output = train(quick, iterations=3, save_rollouts=2, max_new_tokens=20, group_size=2)
    lines = rollouts_of(output)
    assert [line["iteration"] for line in lines] == [0] * 4 + [2] * 4  # two prompts, two completions
    assert all(line["cut_off"] and line["kl"] is None for line in lines[:2])  # there is no reference
    back = load_demonstrations(Path(output) / "rollouts.0.jsonl", quick.videos, rewards.TASKS)
    assert [d.completion for d in back] == [line["completion"] for line in lines]


def test_advantages_compare_the_completions_of_one_prompt(worked):
    _, calls = worked
    assert len(calls) == 4  # two micro-batches in each of two iterations
    assert calls[0]["advantages"].tolist() + calls[1]["advantages"].tolist() == pytest.approx(ADVANTAGES, abs=1e-4)


def test_every_token_counts_up_to_the_one_that_ends_the_turn(worked):
    _, calls = worked
    assert calls[0]["mask"].sum(1).tolist() + calls[1]["mask"].sum(1).tolist() == LENGTHS
    for call in calls:
        assert ((call["logps"] != 0) == call["mask"]).all()


def test_the_logged_rewards_are_means_over_completions_and_spreads_within_groups(worked):
    row = log_of(worked[0])[0]
    assert row["tvg/iou"] == pytest.approx(sum(IOUS) / 8)
    assert row["tvg/format"] == 7 / 8
    assert row["tvg/total"] == pytest.approx(sum(TOTALS) / 8)
    assert row["tvg/total_std"] == pytest.approx((0.6950 + 0.3227) / 2, abs=1e-4)
    assert row["zero_spread"] == 0
    assert row["cut_off"] == 0
    assert row["length"] == sum(LENGTHS) / 8


def test_the_first_loss_over_tokens_is_minus_the_advantages_weighted_by_lengths(worked):
    # The ratio is 1 and the KL 0, so a token's loss is -A: a group's mean is -sum(A * length) / sum(length).
    first = -(0.6743 * 40 + 0.4945 * 42 + 0.3147 * 40 - 1.4835 * 9) / 131
    second = -(1.1615 * 40 + 0.3872 * 42 - 0.3872 * 40 - 1.1615 * 42) / 164
    assert log_of(worked[0])[0]["loss"] == pytest.approx((first + second) / 2, abs=1e-4)


def test_the_reference_has_the_temperature_of_the_policy_and_stays_behind(worked):
    first, second = log_of(worked[0])
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 0.01


def test_a_later_iteration_draws_both_prompts_again_and_scores_them_anew(worked):
    # Whatever the order: a completion's parts are those of its own query and times.
    for line in rollouts_of(worked[0]):
        sample = data.Sample(line["video"], line["query"], line["start"], line["end"])
        assert line["parts"] == rewards.score("tvg", line["completion"], sample)


def test_equal_answers_teach_nothing_and_a_long_one_is_cut_off(quick):
    # Eight times the same for the first prompt; of the second's, one goes on beyond the limit of 50 tokens.
    long = reply("0 to 1") + " and so on" * 2
    with scripted(*[reply("0 to 1")] * 8, *[reply("0 to 1")] * 7, long), losses() as calls:
        train(quick, group_size=8, max_new_tokens=50)
    row = log_of(quick.output)[0]
    assert row["zero_spread"] == 0.5
    assert row["cut_off"] == 1 / 16
    assert row["length"] == (15 * 40 + 50) / 16
    assert calls[0]["advantages"].abs().max() < 1e-6
    assert calls[1]["advantages"].tolist() == pytest.approx([0.3535] * 7 + [-2.4743], abs=1e-3)  # its format is 0


# ------------------------------------------------------------------------------------------------ written plainly


def plain_logps(model, config, tokenizer, line):
    """The library's own model on one prompt and its completion -> the log-probabilities of the completion's tokens."""
    clip = read_video(f"{config.videos}/{line['video']}", min_frame_pixels=784)
    pixels = json.loads((Path(config.model) / "preprocessor_config.json").read_text())
    patches, grid = patchify(clip.frames, pixels["image_mean"], pixels["image_std"])
    prompt = encode_prompt(tokenizer, data.prompt_text("tvg", line["query"]), len(patches) // 4)
    answer = tokenizer(line["completion"])["input_ids"] + [tokenizer.eos_token_id]
    answer = answer[:config.max_new_tokens]
    ids = torch.tensor([prompt + answer])
    positions = position_ids(ids[0], grid[0].tolist(), clip.fps, model.config.video_token_id, 2)
    logits = model(input_ids=ids, position_ids=positions.unsqueeze(1), pixel_values_videos=patches,
                   video_grid_thw=grid).logits[0] / config.temperature
    logits[:, banned_by(config.model)] = -torch.inf
    predicted = logits.log_softmax(-1)[-len(answer) - 1:-1]
    return predicted.gather(1, ids[0, -len(answer):].unsqueeze(1)).squeeze(1)


def plain_iteration(policy, optimizer, config, lines, logps_of, reference):
    """Eq. 3 and 4 on the completions of an iteration, one after the other -> (losses, KLs, gradient norms, clipped)."""
    totals = np.array([line["parts"]["total"] for line in lines]).reshape(-1, config.group_size)
    advantages = (totals - totals.mean(1, keepdims=True)) / (totals.std(1, ddof=1, keepdims=True) + 1e-4)
    with torch.no_grad():
        reference = [logps_of(reference, line) for line in lines]
        old = [logps_of(policy, line) for line in lines]
    history = []
    for _ in range(config.mu):
        loss, divergence, clipped = 0, 0, 0
        for line, A, was, there in zip(lines, advantages.flatten().tolist(), old, reference):
            now = logps_of(policy, line)
            ratio = (now - was).exp()
            surrogate = torch.minimum(ratio * A, ratio.clamp(1 - config.clip_epsilon, 1 + config.clip_epsilon) * A)
            kl = (there - now).exp() - (there - now) - 1
            loss += (config.kl_coef * kl - surrogate).mean() / len(lines)
            divergence += kl.mean().item() / len(lines)
            outside = ratio > 1 + config.clip_epsilon if A > 0 else ratio < 1 - config.clip_epsilon
            clipped += outside.float().mean().item() / len(lines)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), divergence, norm.item(), clipped))
    return np.mean(history, axis=0)


def test_the_loop_equals_grpo_written_plainly(tmp_path, checkpoint, monkeypatch):
    """Two iterations of two updates on four prompts: logged numbers, and the weights; no setting has its default."""
    monkeypatch.setattr(optimizer, "EPSILON", 1e-2)  # else a gradient of 1e-8 moves a weight as much as one of 1
    rows = ["AAA 0 2##person opens the door", "BBB 2 4##a person is sitting down", "AAA 1 3##a red lamp",
            "BBB 0 4##the man runs and laughs"]
    config = dataclasses.replace(
        two_videos(tmp_path, checkpoint, rows), group_size=2, micro_batch=2, accumulation=2, iterations=2, mu=2,
        temperature=0.7, clip_epsilon=0.01, kl_coef=0.3, lr=1e-2, weight_decay=0.1, max_new_tokens=41)
    texts = [reply("0 to 4"), "none", reply("1 to 3"), reply("3 to 4"),
             "", reply("2 to 4"), reply("10 to 14"), "2 to 4"]
    with scripted(*texts):
        train(config)

    tokenizer = AutoTokenizer.from_pretrained(config.model)
    policy, reference = (Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model) for _ in range(2))
    policy.model.visual.requires_grad_(False)
    trained = [p for p in policy.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), eps=1e-2, weight_decay=0.1)
    lines = rollouts_of(config.output)
    for row in log_of(config.output):
        adamw.param_groups[0]["lr"] = 1e-2 * (1 - row["iteration"] / 2)
        loss, kl, norm, clipped = plain_iteration(
            policy, adamw, config, [line for line in lines if line["iteration"] == row["iteration"]],
            lambda model, line: plain_logps(model, config, tokenizer, line), reference)
        assert row["loss"] == pytest.approx(loss, abs=1e-4)
        assert row["kl"] == pytest.approx(kl, abs=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert row["clip_low"] + row["clip_high"] == pytest.approx(clipped, abs=0.01)
        assert clipped > 0
    saved = Qwen2_5_VLForConditionalGeneration.from_pretrained(newest_checkpoint(config.output)).state_dict()
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model).state_dict()
    moved = max((weight - before[name]).abs().max().item() for name, weight in saved.items())
    assert moved > 1e-3
    for name, weight in policy.state_dict().items():
        assert torch.allclose(saved[name], weight, atol=1e-5), name


# ------------------------------------------------------------------------------------------------ updates


@pytest.fixture()
def four_demonstrations(quick, tmp_path):
    """Completions of 2, 9, 24 and 49 tokens, the end of the turn included; a step too small to move a weight."""
    rows = [{"video": "AB"[i % 2] * 3, "query": f"query {i}", "start": 0, "end": 2, "task": ("tvg", "vd")[i // 2],
             "completion": "x" * n} for i, n in enumerate((1, 8, 23, 48))]
    return dataclasses.replace(quick, demonstrations=write_lines(tmp_path / "demos.jsonl", rows), lr=1e-12)


@pytest.mark.parametrize("reduction", ["completion", "token"])
def test_a_gradient_does_not_depend_on_the_cut_into_micro_batches_nor_on_recomputing(
        four_demonstrations, reduction, tmp_path):
    norms = []
    for micro_batch, accumulation, recompute in ((4, 1, True), (2, 2, False), (1, 4, True)):
        output = train(four_demonstrations, micro_batch=micro_batch, accumulation=accumulation, output=str(
            tmp_path / f"{micro_batch}"), loss_reduction=reduction, gradient_checkpointing=recompute)
        norms.append(log_of(output)[0]["grad_norm"])
    assert norms[0] > 0.1
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_a_step_without_a_finite_gradient_is_left_out_and_forgotten(quick):
    weights = {}
    for iterations in (2, 3):
        factors = iter([1.0, 1.0, math.nan, 1.0, 1.0, 1.0])  # the first micro-batch of two in iteration 1
        with scripted(*ANSWERS), losses(lambda loss, factors=factors: loss * next(factors)):
            output = train(quick, group_size=4, iterations=iterations, save_every=1, lr=1e-3, lr_schedule="constant",
                           output=f"{quick.output}-{iterations}", keep=9)
        assert [row["skipped"] for row in log_of(output)] == [0, 1, 0][:iterations]
        weights[iterations] = weights_of(output)
    assert not (Path(output) / "checkpoint-000002").exists()  # nothing is saved while steps are left out
    stepped = load_file(Path(output) / "checkpoint-000001" / "model.safetensors")
    assert all(torch.equal(weights[2][name], weight) for name, weight in stepped.items())
    assert any(not torch.equal(weights[3][name], weight) for name, weight in stepped.items())


def test_a_trained_tower_moves_in_the_supervised_stage_too(four_demonstrations):
    output = train(four_demonstrations, train_vision=True, lr=1e-3)
    before, after = load_file(Path(four_demonstrations.model) / "model.safetensors"), weights_of(output)
    assert not [name for name in before if torch.equal(before[name], after[name])]


# ------------------------------------------------------------------------------------------------ around the updates


def test_an_iterations_seconds_are_those_of_waiting_of_sampling_rewards_and_reference_and_of_the_update(
        quick, four_demonstrations, monkeypatch, tmp_path):
    # By this clock a video takes 1000 s, sampling 10, a reward 1, the reference's passes 100, and the update 10,000.
    clock, asked = [0], []

    def takes(seconds, function):
        def timed(*args, **kwargs):
            clock[0] += seconds
            return function(*args, **kwargs)

        return timed

    def read_ahead(clips, batches, *rest):
        asked.append(rest)
        batches = plain(clips, batches, 0)
        while True:
            clock[0] += 1000
            yield next(batches)

    plain = invert4tvg.read_ahead
    monkeypatch.setattr(invert4tvg, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(invert4tvg, "read_ahead", read_ahead)
    for module, name, seconds in ((rewards, "score", 1), (invert4tvg, "micro_batches", 100),
                                  (invert4tvg, "update", 10_000)):
        monkeypatch.setattr(module, name, takes(seconds, getattr(module, name)))
    with scripted(*ANSWERS), monkeypatch.context() as patch:
        patch.setattr(grpo, "sample_group", takes(10, grpo.sample_group))
        (row,) = log_of(train(quick, kl_coef=0.1, workers=3))  # two prompts, three answers each
    assert asked == [(3,)]
    assert [row[f"{name}seconds"] for name in ("wait_", "rollout_", "")] == [1000, 10 + 6 + 100, 11_116]
    (row,) = log_of(train(four_demonstrations, output=str(tmp_path / "supervised")))
    assert [row[f"{name}seconds"] for name in ("wait_", "rollout_", "")] == [1000, 100, 11_100]


def test_the_samplers_own_texts_have_the_probabilities_of_the_training_pass_and_new_noise_each_time(quick, tmp_path):
    # One row, a step that moves nothing: only the noise differs between iterations, and between seeds.
    (tmp_path / "train.txt").write_text("AAA 0 2##person opens the door.\n")
    texts = []
    for seed in (0, 1):
        output = train(quick, seed=seed, accumulation=1, temperature=0.7, max_new_tokens=8, iterations=2, lr=1e-12,
                       save_rollouts=1, output=str(tmp_path / f"{seed}"))
        texts += [line["completion"] for line in rollouts_of(output)]
        assert max(row["sampler_gap_max"] for row in log_of(output)) < 1e-5
    assert len(set(texts)) == len(texts) == 2 * 2 * 3


def test_an_evaluation_of_an_earlier_run_is_not_taken_for_this_ones(quick):
    folder = Path(quick.output) / "eval-000000"
    folder.mkdir(parents=True)
    old = {"row": 0, "task": "tvg", "sample": 0, "video": "AAA.mp4", "query": "person opens the door",
           "completion": "old", "span": None, "parts": {"format": 0.0, "iou": 0.0, "total": 0.0}, "error": None}
    write_lines(folder / "predictions.0.jsonl", [old])
    with scripted(reply("0 to 1")):
        train(quick, eval_every=1, eval_annotations=quick.annotations)
    assert "old" not in (folder / "predictions.0.jsonl").read_text()


def test_as_many_checkpoints_are_kept_as_asked_and_the_last_iteration_is_one(quick):
    with scripted(*ANSWERS):
        train(quick, iterations=5, save_every=2, keep=3, accumulation=1)
    names = sorted(path.name for path in Path(quick.output).glob("checkpoint-*"))
    assert names == ["checkpoint-000002", "checkpoint-000004", "checkpoint-000005"]


def test_entropy_is_a_mean_over_tokens_alone(quick):
    # At a very high temperature every id but the banned ones is equally likely.
    with scripted(reply("0 to 4"), "x"):
        train(quick, temperature=1e6)
    allowed = len(byte_tokenizer()) - len(banned_by(quick.model))
    assert log_of(quick.output)[0]["entropy"] == pytest.approx(math.log(allowed), abs=1e-4)


def test_an_evaluation_in_training_answers_four_rows_at_a_time(quick):
    with scripted("a") as calls:
        train(quick, iterations=1, eval_every=1, eval_annotations=quick.annotations, micro_batch=1)
    rows = [len(call.prompts) for call in calls if call.temperature == 0]
    assert max(rows) == 4  # of thirteen: each of four in grounding, and three with a verb in each inversion
    assert sum(rows) == 2 * (4 + 3 * 3) and len(rows) == 2 * 4


def test_the_log_says_where_an_iterations_time_goes(quick):
    for row in log_of(train(quick, iterations=2)):
        shares = [row[f"{phase}_seconds_share"] for phase in ("wait", "rollout", "update")]
        assert sum(shares) == pytest.approx(1) and min(shares) >= 0
        assert row["rollout_seconds_share"] == pytest.approx(row["rollout_seconds"] / row["seconds"])
