"""Every system and every ablation on the demo's data, a few iterations each, through the programs' command lines."""

import json
import re
from pathlib import Path

import pytest
from shared import made_once

import evaluate
import invert4tvg
from demo import ablations, make_demo
from engine.program.launch import launch
from engine.program.settings import parse_settings
from engine.run.start import from_run, from_start
from papers import stages

CLIPS = ["--min-frame-pixels", "784", "--max-frame-pixels", "784", "--max-new-tokens", "24", "--workers", "0"]
RUNS = [options for runs in ablations.RUNS.values() for options in runs.values()]


def trained(options):
    """The options that are tried for these: short, and one p between 0 and 1, or one choice of tasks, for all."""
    options = re.sub(r" --iterations \d+$", "", options)
    options = re.sub(r"--p 0\.\d+", "--p 0.8", options)
    return re.sub(r"--inversion-tasks( \w+)+", "--inversion-tasks vd", options)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's files with eight training videos, and a model that has seen the answers' format."""
    def make(folder):
        make_demo.main([str(folder), "--videos", "8", "2", "2"])
        train(folder, "warm", "--model", folder / "model", "--demonstrations", folder / "warmup-1.jsonl",
              "--train-vision", "--iterations", 60, "--lr", 4e-3)

    return made_once(tmp_path_factory, "demo", make)


def train(folder, name, *argv):
    """Run invert4tvg.py -> its log."""
    argv = [*CLIPS, "--videos", folder / "videos", "--micro-batch", 4, "--output", folder / name, *argv]
    launch(invert4tvg.train, parse_settings(invert4tvg.Config, "", list(map(str, argv)), inherit=from_run))
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def measure(folder, name, *argv):
    """Run evaluate.py, which reads most of its options from the checkpoint's run.json -> its metrics."""
    argv = ["--workers", 0, "--videos", folder / "videos", "--micro-batch", 32, "--output", folder / name, *argv]
    settings = parse_settings(evaluate.EvalSettings, "", list(map(str, argv)), inherit=from_start)
    launch(evaluate.main, settings)
    return json.loads((folder / name / "metrics.json").read_text())


def test_the_demonstrations_without_thinking_are_the_same_rows(demo):
    for number in (1, 2):
        thinks, answers = ([json.loads(line) for line in (demo / f"{name}-{number}.jsonl").read_text().splitlines()]
                           for name in ("warmup", "answer"))
        assert len(thinks) == len(answers) > 0
        for a, b in zip(thinks, answers):
            assert a | {"completion": ""} == b | {"completion": ""}
            thought, answer = a["completion"].split(" <answer>")
            assert thought.startswith("<think>")
            assert b["completion"] == (f"<answer>{answer}" if a["task"] == "tvg" else a["completion"])



def stage(*argv):
    stages.main(stages.parse(list(map(str, argv))))


def test_invert_sft(demo):
    stage("invert-sft", "--annotations", demo / "train.txt", "--output", demo / "invert-sft.jsonl")
    log = train(demo, "invert-sft", "--model", demo / "warm", "--demonstrations", demo / "invert-sft.jsonl",
                "--inversion-format", "answer", "--iterations", 3)
    assert log[0]["lr"] == 1e-5 and log[0]["task"] == "sft"


def test_time_r1(demo):
    measure(demo, "rows", "--model", demo / "warm", "--annotations", demo / "train.txt", "--tasks", "tvg")
    stage("difficulty", "--annotations", demo / "train.txt", "--predictions", demo / "rows", "--difficulty", -1, 0.7,
          "--keep", 5, "--choose", "gaussian", "--output", demo / "rows.json")
    log = train(demo, "time-r1", "--model", demo / "warm", "--annotations", demo / "rows.json", "--tvg-reward",
                "papers.rewards.timestamp_iou", "--p", 1, "--epochs", 1)
    assert len(log) == 2  # five rows, four prompts an iteration
    assert sum(row["tvg/iou"] for row in log) > 0
    for row in log:
        assert 0 <= row["tvg/timestamp_iou"] <= row["tvg/iou"]
        assert row["tvg/total"] == pytest.approx(row["tvg/format"] + row["tvg/timestamp_iou"])


def test_tar_tvg(demo):
    anchors = "--tvg-reward", "papers.rewards.anchors", "--max-new-tokens", 48
    train(demo, "tar-0", "--model", demo / "warm", "--demonstrations", demo / "anchors.jsonl", *anchors,
          "--iterations", 30, "--lr", 4e-3)
    log = train(demo, "tar-1", "--model", demo / "tar-0", "--annotations", demo / "train.txt", *anchors, "--p", 1,
                "--iterations", 2, "--save-rollouts", 1)
    for row in log:
        assert row["tvg/total"] == pytest.approx(row["tvg/format"] + row["tvg/soft_iou"] + row["tvg/anchor_reward"])
    rollouts = [json.loads(line) for line in (demo / "tar-1" / "rollouts.0.jsonl").read_text().splitlines()]
    assert len(rollouts) == 2 * 4 * 8 and sum(r["parts"]["anchors"] for r in rollouts) == pytest.approx(
        32 * sum(row["tvg/anchors"] for row in log))

    text = ("<think> the <timestamp> 0.0 to 12.0 </timestamp> <timestamp> {start} to 12.0 </timestamp> </think> "
            "<answer> {start} to {end} </answer>")
    good = rollouts[0] | {"completion": text.format(**rollouts[0])}
    with open(demo / "tar-1" / "rollouts.1.jsonl", "w", encoding="utf-8") as file:  # another rank's
        file.write(json.dumps(good) + "\n")
    stage("anchors", "--rollouts", demo / "tar-1", "--output", demo / "tar-2.jsonl")
    assert good["completion"] in (demo / "tar-2.jsonl").read_text().replace("\\n", "")
    log = train(demo, "tar-2", "--model", demo / "tar-0", "--demonstrations", demo / "tar-2.jsonl", *anchors,
                "--iterations", 25, "--lr", 4e-3)
    assert log[-1]["nll"] < 0.5 * log[0]["nll"]
    train(demo, "tar-3", "--model", demo / "tar-2", "--annotations", demo / "train.txt", *anchors, "--p", 1,
          "--iterations", 1)
    metrics = measure(demo, "tar-test", "--model", demo / "tar-3", "--annotations", demo / "test.txt", "--tasks", "tvg")
    assert 0 <= metrics["2-4 anchors"] <= 100 and metrics["rows"] == {"tvg": 6}


def test_tvg_r1(demo):
    r1 = "--tvg-reward", "papers.rewards.tvg_r1", "--p", 1
    stage("longest", "--demonstrations", demo / "cold-start.jsonl", "--share", 0.5, "--output", demo / "cold.jsonl")
    train(demo, "cold", "--model", demo / "warm", "--demonstrations", demo / "cold.jsonl", *r1[:2], "--iterations", 40,
          "--lr", 4e-3)
    measure(demo, "k", "--model", demo / "cold", "--annotations", demo / "train.txt", *r1[:2], "--tasks", "tvg",
            "--samples", 2)
    stage("difficulty", "--annotations", demo / "train.txt", "--predictions", demo / "k", "--difficulty", -1, 0.99,
          "--output", demo / "band.json")
    log = train(demo, "r1", "--model", demo / "cold", "--annotations", demo / "band.json", *r1, "--iterations", 2)
    for row in log:
        assert row["tvg/format"] > 0.05  # it has begun to learn <time>[a, b]</time>, of which its base knows nothing
        assert row["tvg/total"] == pytest.approx(0.1 * row["tvg/format"] + 0.9 * row["tvg/iou"])


def test_the_options_of_all_ablations_are_understood():
    for options in RUNS:
        config = parse_settings(invert4tvg.Config, "", options.split())
        assert (config.iterations > 0) == ("--iterations" in options)


@pytest.mark.parametrize("options", sorted({trained(options) for options in RUNS}))
def test_ablations(demo, options):
    log = train(demo, f"ablation{options.replace(' ', '-')}", "--model", demo / "warm", "--annotations",
                demo / "train.txt", "--seed", 3, *options.split(), "--iterations", 2)
    assert [row["iteration"] for row in log] == [0, 1]
    assert all(("kl" in row) == ("--kl-coef" not in options) for row in log)


def test_zero_shot_transfer_is_one_command(demo):
    log = train(demo, "transfer", "--model", demo / "warm", "--annotations", demo / "train.txt", "--iterations", 1,
                "--eval-every", 1, "--eval-annotations", demo / "transfer.json", "--eval-limit", 0)
    assert [row["iteration"] for row in log if row["task"] == "eval"] == [0, 1]
    rows = evaluate.read_predictions(demo / "transfer" / "eval-000001")
    assert {Path(row["video"]).name for row in rows} == {"TRANSFER0000.mp4", "TRANSFER0001.mp4"}
