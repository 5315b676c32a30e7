"""papers/protocols.py: which span each project reads, and what it counts."""

import json

import pytest
import tiny
from shared import reply

from papers.protocols import (
    PROTOCOLS,
    first_of_lmms_eval,
    first_of_timelens,
    last_to,
    last_two_numbers,
    rescore,
    table,
)


@pytest.mark.parametrize("text, last, timelens, lmms_eval, last_two", [
    (reply("2.5 to 6.6"), (2.5, 6.6), (2, 7), (2.5, 6.6), (2.5, 6.6)),  # half a second is rounded to the even one
    (reply("9 to 4"), (9, 4), (9, 4), (4, 9), (4, 9)),
    ("1 to 2, or 3 and 4", (3, 4), (1, 2), (1, 2), (3, 4)),
    ("<think>5 to 6</think><answer>never</answer>", (5, 6), (5, 6), (5, 6), (5, 6)),
    ("12.5s to 17s", None, None, (12.5, 17), (12.5, 17)),
    ("in 3 - 5", None, (3, 5), (3, 5), (3, 5)),
    ("from 00:01:05 to 1:10", (5, 1), (65, 70), (65, 70), (1, 10)),
    ("starts at 8,\nends at 9", None, (8, 9), (8, 9), (8, 9)),
    ("1 to 2\nit starts at 3\nand ends at 4", (1, 2), (1, 2), (3, 4), (3, 4)),  # a line that speaks of the start counts
    ("at 7 s", None, None, None, None), ("", None, None, None, None), ("9" * 400 + " to 5", None, None, None, None)])
def test_the_span_that_each_project_reads(text, last, timelens, lmms_eval, last_two):
    assert last_to(text) == last and first_of_timelens(text) == timelens
    assert first_of_lmms_eval(text) == lmms_eval and last_two_numbers(text) == last_two


def prediction(row, completion, span, truth=(2, 6), alternatives=(), query="q", error=None):
    return {"row": row, "task": "tvg", "sample": 0, "video": "v/a.mp4", "query": query, "truth": truth,
            "alternatives": alternatives, "completion": completion, "span": span, "error": error}


def scores(predictions, *columns):
    return {name: tuple(rescore(predictions, protocol)[c] for c in columns) for name, protocol in PROTOCOLS.items()}


def test_an_iou_at_the_threshold_is_above_it_for_all_but_time_r1():
    half = [prediction(0, reply("2 to 4"), (2, 4))]
    assert scores(half, "mIoU", "R1@0.5") == {name: (50, 100) for name in PROTOCOLS} | {"Time-R1": (50, 0)}


def test_the_best_window_counts_where_a_project_has_windows():
    second = [prediction(0, reply("8 to 9"), (8, 9), alternatives=[(8, 9)])]
    best = {name for name, (miou,) in scores(second, "mIoU").items() if miou == 100}
    assert best == {"ours", "TaRO", "moment_detr"}


def test_rows_that_cannot_be_read_or_are_told_twice():
    good = prediction(0, reply("2 to 6"), (2, 6))
    other = prediction(1, reply("2 to 4"), (2, 4))  # of the same row; where they are merged, the last one counts
    rows = [good, other, prediction(2, "", None, query="p", error="a.mp4: cannot be decoded")]
    counted = scores(rows, "rows", "mIoU", "no span")
    dropped, merged = (2, 75, 0), (2, 25, 1)
    assert counted == {name: (3, 50, 1) for name in PROTOCOLS} | {
        "Time-R1": dropped, "VideoChat-R1": dropped, "TaRO": dropped, "TimeLens": merged, "lmms-eval": merged}


def test_a_reversed_span_is_worth_something_only_where_it_is_swapped():
    swapped = {name for name, (miou,) in scores([prediction(0, reply("6 to 2"), (6, 2))], "mIoU").items() if miou}
    assert swapped == {"lmms-eval", "TaRO"}


def test_the_program_prints_a_line_for_each_protocol_and_refuses_what_is_no_evaluation(tmp_path):
    rows = [prediction(0, reply("2 to 6"), (2, 6)), prediction(0, "x", None) | {"task": "vc"}]
    (tmp_path / "predictions.0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, message = tiny.run_program("-m", "papers.protocols", tmp_path)
    assert status == 1 and "holds no finished evaluation" in message and message.count("\n") == 1
    (tmp_path / "metrics.json").write_text("{}")
    status, printed = tiny.run_program("-m", "papers.protocols", tmp_path)
    assert status == 0 and printed.rstrip("\n") == table(rows[:1])
    assert [line.split(" | ")[0] for line in printed.splitlines()[2:]] == [f"| {name}" for name in PROTOCOLS]
