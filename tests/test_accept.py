"""benchmarks/accept.py: deadlines, early failures and the table. `.ci/run` runs its stages on the CPU."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks import accept, ranks
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


# ---- Several ranks


@pytest.mark.parametrize("cards, ranks", [(0, 2), (1, 2), (2, 2), (8, 8)])
def test_whole_runs_have_a_rank_a_card_but_never_fewer_than_two(tmp_path, cards, ranks):
    assert accept.Place(torch.device("cpu"), tmp_path, cards=cards).ranks == ranks


def where():
    """What a rank is told of its place, and whether it may speak NCCL."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return [os.environ.get(name) for name in names] + [dist.init_process_group is JOIN]


JOIN = dist.init_process_group


@pytest.mark.parametrize("number, cards, expected", [
    (2, 2, [["0", "2", "0", True], ["1", "2", "1", True]]),  # a card each
    (2, 1, [["0", "2", "0", False], ["1", "2", "0", False]]),  # both on the first one, over gloo
    (1, 1, [[None, "1", "0", True]])])  # as without torchrun
def test_ranks_have_a_card_each_where_there_are_enough(number, cards, expected):
    assert ranks.finish(ranks.start(number, cards, where)) == expected


def test_a_rank_that_fails_ends_the_others():
    with pytest.raises(RuntimeError, match="rank 1 ended with status 3"):
        ranks.finish(ranks.start(2, 0, fail_on_rank_1))


def fail_on_rank_1():
    if os.environ["RANK"] == "1":
        sys.exit(3)
    time.sleep(600)


# ---- What decides, and what is only reported


def test_little_shared_memory_is_reported_and_ends_nothing(place, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1000, f_frsize=1000))
    checks = {check.what: check for check in accept.environment(place._replace(cards=8))}
    shared = checks["/dev/shm free, MB"]
    assert (shared.value, shared.passed) == (1, None) and "NCCL" in shared.source


def test_the_towers_windows_are_among_the_kernels(place):
    chosen = {}
    choose = torch._fused_sdp_choice

    def listening(q, k, v, **options):
        chosen[tuple(q.shape)] = options.get("attn_mask")
        return choose(q, k, v, **options)

    with mock.patch.object(torch, "_fused_sdp_choice", listening):
        list(accept.kernels(place))
    assert chosen[112, 16, 64, 80].shape == (112, 1, 1, 64)


def test_stages_never_exceed_the_budget_and_go_on_uncompiled_after_a_failed_compilation(place, monkeypatch):
    given = []

    def run_stage(stage, place, seconds):
        given.append((seconds, place.compiles))
        yield from stage.run(place)

    monkeypatch.setattr(accept, "run_stage", run_stage)
    monkeypatch.setattr(accept, "compiled", failing)
    accept.accept(place, [Stage(failing, "compiled", 3), Stage(fine, "next", 60)], budget=10)
    (first, compiles), (second, later) = given
    assert (first, compiles, later) == (12, True, False)  # a CPU gets four times as many seconds
    assert second <= 40


@pytest.mark.parametrize("stage, status, last", [(fine, 0, "All checks passed"), (failing, 1, "Not safe to start: 1 ")])
def test_the_exit_status_and_the_last_line_say_how_it_went(tmp_path, monkeypatch, capsys, stage, status, last):
    run = accept.accept
    monkeypatch.setattr(accept, "accept", lambda place: run(place, [Stage(stage, "one", 60)]))
    monkeypatch.setattr(sys, "argv", ["accept", "--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        accept.main()
    assert end.value.code == status
    assert capsys.readouterr().out.splitlines()[-1].startswith(last)
    assert last in (tmp_path / "table.md").read_text()
