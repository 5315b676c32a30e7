"""The shell scripts, with stand-ins for python and torchrun that write down how they are called."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from shared import ROOT

STAND_IN = r"""#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
    *demo.make_demo*) mkdir -p "$3"; touch "$3"/{anchors,lists,cold-start}.jsonl ;;
    *"demo.table"*iterations*) echo 10 ;;
    *"--p 0.8 --output runs/demo-3/grpo") for _ in 1 2 3 4 5 6 7 8 9; do grep -q watch "$CALLS" || sleep 1; done ;;
esac
if [ -n "${FAIL:-}" ]; then case "$*" in *"$FAIL"*) echo "it failed" >&2; exit 1 ;; esac; fi
"""


@pytest.fixture()
def run(tmp_path):
    """-> run(script, arguments, **environment): (status, standard error, the calls)."""
    for name in ("train.sh", "demo", "papers"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / "engine").mkdir()
    shutil.copy(ROOT / "engine" / "jobs.sh", tmp_path / "engine")
    for name in ("python", "torchrun"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STAND_IN)
        path.chmod(0o755)
    calls = tmp_path / "calls.txt"

    def run(script, *arguments, **environment):
        calls.write_text("")
        stand_ins = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls)}
        done = subprocess.run(["bash", str(tmp_path / script), *arguments], capture_output=True, text=True,
                              env=os.environ | stand_ins | environment, cwd=tmp_path)
        return done.returncode, done.stderr, calls.read_text().splitlines()

    return run


def outputs(calls, program):
    """The last part of every --output that `program` was given, in order."""
    return [call.split("--output ")[1].split()[0].split("/")[-1] for call in calls
            if f"{program} " in call and "--output" in call]


def test_the_demo_trains_four_times_and_evaluates_each_result(run):
    status, message, calls = run("train.sh", "demo", "3")
    assert status == 0, message
    trained = outputs(calls, "invert4tvg.py")
    assert trained[:2] == ["sees", "warm"]
    assert sorted(trained[2:]) == ["grpo", "supervised", "tvg-only"]
    assert sorted(outputs(calls, "evaluate.py")) == ["grpo-test", "supervised-test", "tvg-only-test", "warm-test"]
    assert calls[-2:] == ["python -m demo.table runs/demo-3",
                          "python -m report runs/demo-3/grpo --against runs/demo-3/tvg-only runs/demo-3/warm-test"]
    assert any("-m report runs/demo-3/grpo" in call and call.endswith("--watch") for call in calls)  # while it trains
    assert any("--iterations 10 --output runs/demo-3/supervised" in call for call in calls)


def test_the_demos_options_go_to_both_grpo_runs_and_are_checked_before_the_first_stage(run):
    _, _, calls = run("train.sh", "demo", "--lr", "9")
    assert calls[0].startswith("python -c") and calls[0].endswith("--lr 9")
    given = [call for call in calls if "--lr 9" in call and "invert4tvg.py" in call and "--output" in call]
    assert sorted(outputs(given, "invert4tvg.py")) == ["grpo", "tvg-only"]
    status, _, calls = run("train.sh", "demo", "--lrr", "9", FAIL="--lrr")
    assert status != 0 and len(calls) == 1


def test_thinking_is_compared_from_two_warm_starts_of_matching_demonstrations(run):
    status, message, calls = run("demo/thinking.sh", "3")
    assert status == 0, message
    trained = [call for call in calls if "invert4tvg.py" in call]
    assert outputs(calls, "invert4tvg.py") == ["sees", "warm", "sees-answer", "warm-answer", "grpo", "grpo-answer"]
    for call in trained:
        answers = "--tvg-format answer" in call
        assert call.endswith("-answer") == answers
        if "--demonstrations" in call:
            assert ("/answer-" in call.split("--demonstrations ")[1].split()[0]) == answers
    measured = [call for call in calls if "evaluate.py" in call]
    assert len(measured) == 4 and not any("--tvg-format" in call for call in measured)  # the checkpoints tell it


@pytest.mark.parametrize("failing", ["runs/demo-0/warm", "runs/demo-0/tvg-only", "runs/demo-0/grpo-test"])
def test_a_stage_that_fails_ends_the_demo(run, failing):
    status, message, calls = run("train.sh", "demo", FAIL=f"--output {failing}")
    assert status == 1
    assert "python -m demo.table runs/demo-0" not in calls


def test_the_demo_needs_no_page(run):
    status, message, calls = run("train.sh", "demo", FAIL="-m report")
    assert status == 0 and "python -m demo.table runs/demo-0" in calls, message


@pytest.mark.parametrize("gpus, accumulation", [("8", 1), ("4", 2), ("1", 8)])
def test_charades_takes_eight_prompts_an_iteration_on_any_number_of_gpus(run, gpus, accumulation):
    status, message, calls = run("train.sh", "charades-7b", "--lr", "5e-6", GPUS=gpus)
    assert status == 0, message
    train, evaluate = calls
    assert f"--nproc_per_node {gpus} " in train and f"--accumulation {accumulation} " in train
    assert "Qwen2.5-VL-7B" in train and train.endswith("--output runs/charades-7b --lr 5e-6")
    assert "--model runs/charades-7b " in evaluate
    assert evaluate.endswith("--output runs/charades-7b-test --videos data/videos")


@pytest.mark.parametrize("given, used", [({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "a:1"}, "a:1"),
                                         ({"PYTORCH_CUDA_ALLOC_CONF": "b:2"}, "b:2")])
def test_memory_is_kept_in_one_piece_unless_the_user_says_otherwise(run, tmp_path, given, used):
    (tmp_path / "bin" / "torchrun").write_text('#!/bin/sh\necho "$PYTORCH_ALLOC_CONF" >> "$CALLS"\n')
    assert run("train.sh", "charades-3b", **given)[2] == [used, used]


@pytest.mark.parametrize("given", [["--videos", "else where"], ["--videos=else where"]])
def test_charades_is_evaluated_where_its_videos_are(run, given):
    _, _, (train, evaluate) = run("train.sh", "charades-3b", *given, "--lr", "5e-6")
    assert train.endswith(" ".join(given) + " --lr 5e-6") and evaluate.endswith(" " + " ".join(given))


@pytest.mark.parametrize("script, stages", [
    ("papers/tar-tvg.sh", ["tar-base", "tar-1", "tar-2", "tar-3", "tar-plain", "tar-none"]),
    ("papers/tvg-r1.sh", ["r1-base", "r1-cold", "r1-only", "r1-both"]),
    ("papers/time-r1.sh", [f"time-r1-{epoch}" for epoch in range(1, 6)])])
def test_other_papers_systems_run_their_stages_on_the_toy_and_on_charades(run, tmp_path, script, stages):
    status, message, calls = run(script, "4")
    assert status == 0, message
    assert outputs(calls, "invert4tvg.py") == ["sees", "warm", *stages]
    (tmp_path / "cold.jsonl").touch()
    status, message, calls = run(script, "charades-3b", COLD_START=str(tmp_path / "cold.jsonl"), GPUS="4")
    assert status == 0, message
    assert outputs(calls, "invert4tvg.py") == [stage for stage in stages if not stage.endswith("-base")]
    launched = [call for call in calls if "invert4tvg.py" in call or "evaluate.py" in call]
    assert all(call.startswith("torchrun --nproc_per_node 4 ") for call in launched)


@pytest.mark.parametrize("script, arguments, environment, words", [
    ("train.sh", ["x"], {}, "bash train.sh demo"),
    ("train.sh", [], {}, "bash train.sh demo"),
    ("train.sh", ["charades-3b"], {"GPUS": "3"}, "GPUS=3"),
    ("train.sh", ["charades-3b", "--output", "elsewhere"], {}, "the output is runs/charades-3b"),
    *(("train.sh", ["demo", "3", *words], {}, f"{words[0]} is set by the demo itself") for words in (
        ["--p", "0.5"], ["--p=0.5"], ["--model", "x"], ["--output", "x"], ["--seed", "1"], ["--videos", "x"],
        ["--annotations", "x"], ["--demonstrations", "x"])),
    ("papers/tar-tvg.sh", ["--lr"], {}, "--lr is no seed"),
    ("papers/tar-tvg.sh", ["0", "--lr", "1"], {}, "nothing but a seed"),
    ("papers/tvg-r1.sh", ["charades-3b"], {}, "COLD_START")])
def test_a_mistake_is_said_before_anything_runs(run, script, arguments, environment, words):
    status, message, calls = run(script, *arguments, **environment)
    assert status != 0 and words in message and calls == []


@pytest.mark.parametrize("path", ["train.sh", *(f"{p.parent.name}/{p.name}" for p in sorted(ROOT.glob("*/*.sh")))])
def test_scripts_are_written_for_the_bash_of_every_mac(path):
    """Bash 3.2 knows none of these: case conversion, associative arrays, mapfile, |&, &>>, wait -n, index -1."""
    text = (ROOT / path).read_text(encoding="utf-8")
    newer = r"\$\{\w+(\^|,,|@[QEPAa])|declare -[Agn]|mapfile|readarray|\|&|&>>|wait -n|\[-[0-9]+\]|coproc|globstar"
    assert not re.findall(newer, text)
    assert subprocess.run(["bash", "-n", str(ROOT / path)]).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_script_reaches_what_runs_and_nothing_stays_behind(tmp_path, number):
    """A program that saves when it is told to stop, under the demo's way of running programs."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys, time\n"
        "def stop(*_):\n"
        "    os.write(1, b'saved\\n')\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "os.write(1, b'begun\\n')\n"
        "time.sleep(60)\n")
    script = tmp_path / "script.sh"
    script.write_text(f"set -eu\nsource {ROOT / 'engine' / 'jobs.sh'}\n"
                      f"{sys.executable} {program} &\nrun {sys.executable} {program}\necho not reached\n")
    process = subprocess.Popen(["bash", str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # also where nohup ignores it
    assert [process.stdout.readline(), process.stdout.readline()] == ["begun\n"] * 2
    os.kill(process.pid, number)
    rest, _ = process.communicate(timeout=30)  # ends when the last program has closed its output
    assert rest == "saved\n" * 2
    assert process.returncode == 128 + number


SLURM = r"""#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $*" in
    "scontrol show"*) echo node7; echo node8 ;;
    srun*)
        trap 'exit 130' TERM
        echo $$ > "$CALLS.pid"
        for _ in $(seq $TENTHS); do sleep 0.1; done
        exit $STATUS ;;
    scancel*) kill -TERM "$(cat "$CALLS.pid")" ;;
esac
"""


@pytest.mark.parametrize("signalled, status, ends", [
    (True, "0", 0), (False, "0", 0), (False, "3", 3)], ids=["its time is up", "finished", "failed"])
def test_a_job_that_runs_out_of_time_is_queued_again(tmp_path, signalled, status, ends):
    calls = tmp_path / "calls"
    for name in ("srun", "scontrol", "scancel"):
        (tmp_path / name).write_text(SLURM)
        (tmp_path / name).chmod(0o755)
    process = subprocess.Popen(["bash", str(ROOT / "docs" / "slurm.sh"), "--lr", "5e-6"], env=os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "STATUS": status, "SLURM_JOB_ID": "42",
        "TENTHS": "300" if signalled else "1", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"})
    if signalled:
        while not (tmp_path / "calls.pid").exists() or not (tmp_path / "calls.pid").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == ends
    lines = calls.read_text().splitlines()
    assert "--rdzv-endpoint node7:29500" in lines[1] and lines[1].endswith("--lr 5e-6")
    assert lines[2:] == (["scancel --signal=TERM 42", "scontrol requeue 42"] if signalled else [])
