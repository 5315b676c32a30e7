"""train.sh with stand-ins for python and torchrun that note how they are called: order, failures, resumption."""

import os
import shutil
import subprocess

import pytest

from conftest import ROOT

STAND_IN = r"""#!/usr/bin/env bash
# Notes its start and end, makes the output that the real program would, and fails where $FAIL is part of the call.
echo "start $*" >> "$CALLS"
output=; last=
for word in "$@"; do if [ "$last" = --output ]; then output=$word; fi; last=$word; done
case "$*" in
    *demo/make_demo.py*) mkdir -p "$2/model"; seq 200 > "$2/train.txt" ;;
    *"demo/table.py"*iterations*) echo 10 ;;
    *invert4tvg.py* | *evaluate.py*) sleep 0.1; mkdir -p "$output" ;;
    *stages.py*) mkdir -p "$(dirname "$output")"; touch "$output" ;;
esac
if [ -n "${FAIL:-}" ]; then case "$*" in *"$FAIL"*) echo "it failed"; exit 1 ;; esac; fi
case "$*" in *evaluate.py*) touch "$output/metrics.json" ;; esac
echo "end $*" >> "$CALLS"
"""


@pytest.fixture()
def run(tmp_path):
    """-> run(arguments, **environment): (status, standard error, the new lines of calls)."""
    shutil.copy(ROOT / "train.sh", tmp_path)
    for name in ("python", "torchrun"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STAND_IN)
        path.chmod(0o755)
    calls = tmp_path / "calls.txt"

    def run(*arguments, **environment):
        calls.write_text("")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(["bash", str(tmp_path / "train.sh"), *arguments], capture_output=True, text=True,
                              env=os.environ | {"PATH": path, "CALLS": str(calls)} | environment)
        return done.returncode, done.stderr, calls.read_text().splitlines()

    return run


def trained(calls):
    return [call.split("--output ")[1].split()[0].split("/")[-1] for call in calls
            if call.startswith("start") and "invert4tvg.py" in call]


def test_a_finished_demo_is_not_run_again_and_not_mixed_with_other_options(run):
    status, _, calls = run("demo", "3")
    assert status == 0 and sorted(trained(calls)) == ["grpo", "supervised", "tvg-only", "warm", "warm-1.1"]
    status, _, calls = run("demo", "3")
    assert status == 0 and trained(calls) == [] and any("table.py" in call for call in calls)
    status, message, calls = run("demo", "3", "--lr", "9")
    assert status == 1 and "made with other options" in message and trained(calls) == []


def test_what_is_trained_anew_is_measured_anew(run, tmp_path):
    run("demo", "3")
    folder = tmp_path / "runs" / "demo-3"
    shutil.rmtree(folder / "grpo")
    (folder / "grpo-test" / "old").touch()
    status, _, calls = run("demo", "3")
    assert status == 0 and trained(calls) == ["grpo"]
    assert [call for call in calls if "start" in call and "--output runs/demo-3/grpo-test" in call]
    assert not (folder / "grpo-test" / "old").exists()
    shutil.rmtree(folder / "grpo")  # nothing was made, so nothing is in the way of other options
    status, message, calls = run("demo", "3", "--lr", "9")
    assert "tvg-only was made with other options" in message


def test_a_seed_that_never_learns_to_see_is_refused(run):
    status, message, calls = run("demo", "1", FAIL=" sees ")
    assert status == 1 and "still guesses actions" in message and "another seed" in message
    assert trained(calls) == ["warm-1.1", "warm-1.2", "warm-1.3", "warm-1.4"]


@pytest.mark.parametrize("arguments, failing", [(["demo", "0"], "tvg-only"), (["ablations", "0"], "runs/demo-0/vd ")])
def test_what_failed_is_said_and_run_again(run, tmp_path, arguments, failing):
    status, message, _ = run(*arguments, FAIL=failing)
    assert status == 1 and "it failed" in message and "see runs/demo-0/" in message
    assert not (tmp_path / "runs" / "demo-0" / failing.strip().split("/")[-1] / "complete").exists()
    status, _, calls = run(*arguments)
    assert status == 0 and failing.strip().split("/")[-1] in trained(calls) and "warm" not in trained(calls)


def test_an_evaluation_that_failed_is_repeated(run):
    assert run("ablations", "0", FAIL="runs/demo-0/ar-test")[0] == 1
    status, _, calls = run("ablations", "0")
    assert status == 0 and "ar" not in trained(calls) and any("runs/demo-0/ar-test" in call for call in calls)


def test_few_trains_on_sixty_rows(run, tmp_path):
    status, message, calls = run("few", "4")
    assert status == 0, message
    assert sorted(trained(calls)[2:]) == ["few", "few-tvg-only", "few-tvg-only-280"]
    assert (tmp_path / "runs/demo-4/few.txt").read_text().split() == [str(row) for row in range(61, 121)]
    assert any("--annotations runs/demo-4/few.txt --train-vision --kl-coef 0 --p 0.8" in call for call in calls)
    assert any("demo/ablations.py runs/few.csv 4" in call for call in calls)


@pytest.mark.parametrize("system, stages", [
    ("tar-tvg", ["tar-plain", "tar-none", "tar-1", "tar-2", "tar-3"]), ("tvg-r1", ["r1-cold", "r1-only", "r1-both"]),
    ("time-r1", [f"time-r1-{epoch}" for epoch in range(1, 6)])])
def test_on_gpus_one_job_runs_after_the_other(run, tmp_path, system, stages):
    (tmp_path / "cold.jsonl").touch()
    status, message, calls = run(system, "charades-3b", COLD_START=str(tmp_path / "cold.jsonl"), GPUS="4")
    assert status == 0, message
    assert trained(calls) == stages
    jobs = [call for call in calls if "invert4tvg.py" in call or "evaluate.py" in call]
    assert all("--nproc_per_node 4" in job for job in jobs)
    assert all("--accumulation 2" in job for job in jobs if "invert4tvg.py" in job)
    for start, end in zip(jobs[::2], jobs[1::2]):
        assert start.removeprefix("start") == end.removeprefix("end")


@pytest.mark.parametrize("arguments, environment, words", [
    (["tar-tvg", "--lr"], {}, "--lr is no seed"), (["ablations", "0", "x"], {}, "x is no seed"),
    (["few", "12345678901"], {}, "12345678901 is no seed"), (["tar-tvg", "0", "--lr", "1"], {}, "take no options"),
    (["tvg-r1", "charades-3b"], {}, "COLD_START"), (["charades-3b"], {"GPUS": "3"}, "GPUS=3"),
    (["x"], {}, "bash train.sh demo")])
def test_a_mistake_is_said_before_anything_runs(run, arguments, environment, words):
    status, message, calls = run(*arguments, **environment)
    assert status != 0 and words in message and calls == []
