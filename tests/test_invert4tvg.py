"""invert4tvg.py: supervised steps against a plain loop, and whole runs."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import QUERIES, banned_by, log_of, train, weights_of
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import data
import invert4tvg
import rewards
from engine.model.loading import newest_checkpoint
from engine.model.prompts import encode_prompt, patchify, position_ids
from engine.program.settings import option, parse_settings
from engine.video.frames import read_video

# ------------------------------------------------------------------------------------------------ supervised stage


def test_supervised_steps_equal_a_plain_cross_entropy_loop(config, tmp_path):
    """Logged likelihoods and the weights after five steps, against transformers' own forward pass and torch's AdamW."""
    line = {"video": "AAA", "start": 0, "end": 2}
    lines = [line | {"query": query, "task": task, "completion": f"<answer> {i} </answer>"}
             for i, (query, task) in enumerate(zip(QUERIES, rewards.TASKS))]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(config, demonstrations=str(tmp_path / "demos.jsonl"), micro_batch=2, accumulation=2, iterations=5, lr=1e-2)
    log = log_of(config.output)
    assert log[-1]["nll"] < 0.8 * log[0]["nll"] and log[0]["task"] == "sft"

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model)
    model.model.visual.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    mean, std = (json.loads((Path(config.model) / "preprocessor_config.json").read_text())[k]
                 for k in ("image_mean", "image_std"))
    inputs = []
    for line in lines:
        segment = {} if line["task"] == "tvg" else {"start": 0, "end": 2}
        clip = read_video(f"{config.videos}/AAA.mp4", **segment)
        patches, grid = patchify(clip.frames, mean, std)
        text = data.prompt_text(line["task"], line["query"])
        prompt = encode_prompt(tokenizer, text, len(patches) // 4)
        answer = tokenizer(line["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        positions = position_ids(prompt + answer, grid[0].tolist(), clip.fps, model.config.video_token_id, 2)
        inputs.append((answer, dict(input_ids=torch.tensor([prompt + answer]), position_ids=positions.unsqueeze(1),
                                    pixel_values_videos=patches, video_grid_thw=grid)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step, row in enumerate(log):
        losses = []
        for answer, arguments in inputs:
            logits = model(**arguments).logits[0, -len(answer) - 1:-1]
            logits[:, banned_by(config.model)] = -torch.inf
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
        batches = [torch.cat(losses[:2]), torch.cat(losses[2:])]  # means over tokens differ, but here lengths do not
        assert row["nll"] == pytest.approx(sum(b.mean().item() for b in batches) / 2, abs=1e-4)
        sum(loss.mean() / len(losses) for loss in losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 5)
        optimizer.step()
        optimizer.zero_grad()
    saved = Qwen2_5_VLForConditionalGeneration.from_pretrained(newest_checkpoint(config.output)).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.allclose(saved[name], weight, atol=2e-4), name


# ------------------------------------------------------------------------------------------------ whole runs


def test_five_iterations_from_mp4_files_through_the_command_line(lively):
    """Both kinds of tasks, evaluation, a checkpoint that from_pretrained loads, and every metric of docs/metrics.md."""
    argv = []
    for name in ("model", "annotations", "videos", "output", "max_new_tokens", "group_size", "accumulation", "lr", "p"):
        argv += [option(name), str(getattr(lively, name))]
    argv += ["--iterations", "5", "--workers", "2", "--mu", "2", "--eval-every", "5", "--eval-limit", "2",
             "--eval-annotations", lively.annotations, "--seed", "4"]
    train(parse_settings(invert4tvg.Config, invert4tvg.__doc__, argv))
    log = log_of(lively.output)
    steps = [row for row in log if row["task"] != "eval"]
    assert [row["iteration"] for row in steps] == [0, 1, 2, 3, 4]
    assert {row["task"] for row in steps} > {"tvg"}
    for row in steps:
        part = "iou" if row["task"] == "tvg" else row["task"]
        for name in (f"{row['task']}/{part}", f"{row['task']}/format_std", f"{row['task']}/total", "zero_spread", "kl",
                     "clip_low", "clip_high", "entropy", "length", "cut_off", "sampler_gap_max", "wait_seconds", "lr"):
            assert name in row
    assert max(row["sampler_gap_max"] for row in steps) < 1e-5
    assert [row["lr"] for row in steps] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    measured = [row for row in log if row["task"] == "eval"]
    assert [row["iteration"] for row in measured] == [0, 5] and {"mIoU", "R1@0.7", "VC", "AR", "VD"} <= set(measured[0])

    last = newest_checkpoint(lively.output)
    Qwen2_5_VLForConditionalGeneration.from_pretrained(last)
    before, after = load_file(Path(lively.model) / "model.safetensors"), load_file(last / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if "visual" in name} == set()  # the tower is frozen
    still = {name for name in before if name not in moved and "visual" not in name}
    assert not still


def test_trained_vision_moves_the_tower(lively):
    train(lively, train_vision=True, loss_reduction="token")
    before, after = load_file(Path(lively.model) / "model.safetensors"), weights_of(lively.output)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in still if "visual" in name]


def test_nothing_readable_stops_the_run_with_the_list(config, capsys):
    for name in ("AAA", "BBB"):
        (Path(config.videos) / f"{name}.mp4").write_bytes(b"not a video")
    with pytest.raises(SystemExit):
        train(config)
    message = capsys.readouterr().err.split("invert4tvg")[-1]
    assert "8 draws" in message and "AAA.mp4" in message and "BBB.mp4" in message


def test_learning_rates():
    for changes, rate in (({}, 1e-6), ({"demonstrations": "d"}, 1e-5), ({"demonstrations": "d", "lr": 3e-5}, 3e-5)):
        config = invert4tvg.Config(**changes)
        assert [config.learning_rate(k, 4) for k in range(4)] == pytest.approx([rate * s for s in (1, 0.75, 0.5, 0.25)])
        assert dataclasses.replace(config, lr_schedule="constant").learning_rate(3, 4) == rate
        assert config.lr == changes.get("lr")  # what is noted is what was said, not what followed from it


def test_without_data_it_says_what_it_wants(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train(invert4tvg.Config())
    message = capsys.readouterr().err
    assert "data/charades_sta_train.txt" in message and "train.sh demo" in message and message.count("\n") == 1
