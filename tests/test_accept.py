"""benchmarks/accept.py: deadlines, early failures and the table. `.ci/run` runs its stages on the CPU."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import accept
from benchmarks.stages import CONTEXT, Check, Stage, at_most, equal, run_stage

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stages are forked")


def fine(place):
    yield at_most("a number", 2.0, 3, "chosen")
    yield Check("reported", "words")


def failing(place):
    yield equal("a thing", 1, 2, "chosen")


def broken(place):
    yield Check("before", 1)
    raise ValueError("it broke\nand more")


def hanging(place):
    child = CONTEXT.Process(target=time.sleep, args=(600,))
    child.start()
    yield Check("child", child.pid)
    time.sleep(600)


def runs(pid):
    """Whether a process is there and no zombie."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture()
def place(tmp_path):
    return accept.Place(torch.device("cpu"), tmp_path)


def test_checks_are_printed_and_written_with_their_bounds(place, capsys):
    accept.accept(place, [Stage(fine, "one", 60)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["pass one: a number: 2 (at most 3)", "-    one: reported: words"]
    first, second, seconds = json.loads((place.folder / "acceptance.json").read_text())
    assert first == {"stage": "one", "what": "a number", "value": 2.0, "bound": "at most 3", "passed": True,
                     "source": "chosen"}
    assert second["passed"] is None and seconds["what"] == "seconds"
    assert "| one | a number | 2 | at most 3 | pass | chosen |" in (place.folder / "table.md").read_text()


@pytest.mark.parametrize("early, stages", [(True, {"bad"}), (False, {"bad", "good"})])
def test_an_early_failure_ends_the_run(place, early, stages):
    results = accept.accept(place, [Stage(failing, "bad", 60, early=early), Stage(fine, "good", 60)])
    assert {title for title, _ in results} == stages
    assert results[0][1].passed is False


def test_an_exception_fails_its_stage_in_one_line_and_leaves_its_traceback_in_the_log(place):
    before, error = run_stage(Stage(broken, "x", 60), place, 60)
    assert before.value == 1
    assert (error.value, error.passed) == ("ValueError: it broke", False)
    assert "in broken" in (place.folder / "broken.log").read_text()


def test_a_stage_that_hangs_is_killed_with_all_that_it_started(place):
    child, late = run_stage(Stage(hanging, "x", 60), place, 3)
    assert (late.what, late.passed) == ("in time", False)
    assert "in hanging" in (place.folder / "hanging.log").read_text()  # where it stood
    for _ in range(50):  # killed, it may wait for its new parent
        if not runs(child.value):
            return
        time.sleep(0.1)
    raise AssertionError("what the stage had started lives on")


def test_numbers_that_are_no_numbers_fail():
    assert at_most("x", float("nan"), 1, "").passed is False
    assert at_most("x", 1.5, 1, "").passed is False


def test_the_deadlines_of_all_stages_fit_into_nine_minutes():
    assert sum(stage.seconds for stage in accept.STAGES) <= accept.BUDGET <= 540
