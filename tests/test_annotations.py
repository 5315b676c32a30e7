"""engine/annotations.py: rows copied from the real annotation files with their defects; demonstrations and rollouts."""

import json
import math
from pathlib import Path

import pytest
from conftest import write_video
from hypothesis import given
from hypothesis import strategies as st

from engine.annotations import (
    Demonstration,
    Sample,
    _video_finder,
    append_rollouts,
    demonstration_row,
    load_annotations,
    load_demonstrations,
    missing_videos,
    normalize_query,
    prepare_training,
)

ROWS = Path(__file__).parent / "data"
TASKS = ("tvg", "vc", "ar", "vd")


def brief(samples):
    return [(Path(s.video).name, s.query.split()[-1], s.start, s.end, s.duration) for s in samples]


CHARADES = [("AO8RW", "shelf", 0.0, 6.9, 33.75), ("Y6R7T", "phone", 20.8, 30.0, 29.46),
            ("Y6R7T", "phone", 20.8, 30.0, 29.46), ("LEOL6", "medicine", 8.0, 7.0, 6.27),
            ("AKKWU", "cabinet", 38.0, 13.0, 12.27), ("AKKWU", "cabinet", 38.0, 13.0, 12.27)]
FORMATS = {
    "charades.json": [(f"{v}.mp4", *row) for v, *row in CHARADES],
    "charades_sta.txt": [(f"{v}.mp4", *row[:3], None) for v, *row in CHARADES],
    "activitynet.json": [
        ("v_cTioh2vzxGE.mp4", "couch", 0.0, 14.59, 108.04), ("v_cTioh2vzxGE.mp4", "hand", 25.39, 79.95, 108.04),
        ("v_cTioh2vzxGE.mp4", "play", 80.49, 108.04, 108.04), ("v_173d8EtsIpE.mp4", "balance", 0.0, 29.01, 187.13),
        ("v_173d8EtsIpE.mp4", "session", 29.01, 38.36, 187.13), ("v_173d8EtsIpE.mp4", "scores", 38.36, 49.59, 187.13)],
    "qvhighlights.jsonl": [
        ("NUsG9BgSes0_660.0_810.0.mp4", "bottle", 36.0, 60.0, 150.0),
        ("nY42UppPhhg_60.0_210.0.mp4", "mask", 6.0, 20.0, 150.0),
        ("HkLfNhgP0TM_210.0_360.0.mp4", "seat", 8.0, 12.0, 150.0),
        ("HkLfNhgP0TM_210.0_360.0.mp4", "seat", 24.0, 34.0, 150.0),
        ("4IYQN95j6ok_510.0_660.0.mp4", "tunnel", 4.0, 8.0, 150.0),
        ("4IYQN95j6ok_510.0_660.0.mp4", "tunnel", 14.0, 24.0, 150.0)],
    "timer1.json": [
        ("QtWT8rxUuNk.mp4", "sweater", 1.0, 4.0, 93.2932),
        ("4jujhM5qhEc_00:00:39:000_00:01:24:700.mp4", "birds", 34.9, 41.9, 45.7),  # video_start 39 is not subtracted
        ("gw3ppXUO0B4.mp4", "collection", 120.0, 14220.0, 157.791),
        ("w5-jmxCrIKM.mp4", "(optional)", 124.68, 125.27, 445.0)],
    "tvgbench.json": [
        ("KWZSA.mp4", "table", 13.4, 28.1, 30.12), ("EXYY8.mp4", "them", 14.1, 20.0, 19.29),
        ("cQ0namNxwWA.mp4", "cinnamon", 108.0, 111.0, 152.37),
        ("99679e4d-1396-4248-97f4-97c9b0ed5336.mp4", "bolt?", 85.83, 85.83, 134.24)],
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_row_is_read_whatever_the_file_is_called(name, tmp_path):
    unnamed = tmp_path / "annotations"
    unnamed.write_bytes((ROWS / name).read_bytes())
    samples = load_annotations(unnamed, "videos")
    for got, expected in zip(brief(samples), FORMATS[name], strict=True):
        assert got[:4] == expected[:4]
        assert got[4] == (None if expected[4] is None else pytest.approx(expected[4], abs=1e-3))
    assert len({s.qid for s in samples}) == len(samples)


def test_both_forms_of_charades_hold_the_same_rows():
    txt, js = (load_annotations(ROWS / name, "videos") for name in ("charades_sta.txt", "charades.json"))
    assert [(s.video, s.query, s.start, s.end) for s in txt] == [(s.video, s.query, s.start, s.end) for s in js]


def test_each_window_is_a_sample_and_single_window_drops_the_queries_with_more():
    assert [s.qid for s in load_annotations(ROWS / "qvhighlights.jsonl", "v")] == [
        "8636:0", "781:0", "6228:0", "6228:1", "8994:0", "8994:1"]
    single = load_annotations(ROWS / "qvhighlights.jsonl", "v", single_window=True)
    assert [s.qid for s in single] == ["8636:0", "781:0"]
    assert len(load_annotations(ROWS / "charades.json", "v", single_window=True)) == 6  # an option of QVHighlights only


def test_a_jsonl_of_one_line_is_still_qvhighlights(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text((ROWS / "qvhighlights.jsonl").read_text().splitlines()[0])
    assert [s.qid for s in load_annotations(path, "v")] == ["8636:0"]


def test_a_unicode_line_separator_inside_a_sentence_ends_no_line(tmp_path):
    row = json.loads((ROWS / "qvhighlights.jsonl").read_text().splitlines()[0]) | {"query": "one\u2028two\x85three"}
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row, ensure_ascii=False)}\r\n\n" * 2, encoding="utf-8")
    assert [s.query for s in load_annotations(path, "v")] == ["one two three"] * 2


def captions(**changes):
    return json.dumps({"GOOD1": {"duration": 9, "timestamps": [[0, 1]], "sentences": ["a door."]},
                       "BAD01": {"duration": 9, "timestamps": [[0, 1]], "sentences": ["a door."]} | changes})


GOOD_LINE = '{"qid": 1, "query": "a", "vid": "b", "relevant_windows": [[0, 2]]}'
MALFORMED = {
    "AO8RW 0.0 6.9##a door.\nAO8RW 0.0##a door.": "line 2",
    "AO8RW 0.0 6.9##a door.\n\nAO8RW 0.0 6.9 a door.": "line 3",
    "AO8RW 0.0 six##a door.": "line 1",
    "AO8RW 0.0 nan##a door.": "line 1",
    "AO8RW -1.0 6.9##a door.": "line 1",
    "AO8RW 0.0 6.9## . ": "line 1",
    captions(timestamps=[[0, 1], [2, 3]]): "key 'BAD01'",
    captions(timestamps=[[0, 1, 2]]): "key 'BAD01'",
    captions(timestamps=[[0, None]]): "key 'BAD01'",
    captions(sentences=[None]): "key 'BAD01'",
    captions(duration=math.inf): "key 'BAD01'",
    '{"BAD01": [1, 2]}': "key 'BAD01'",
    '{"a": 1,\n "b" 2}': "line 2",
    f"{GOOD_LINE}\n" + '{"qid": 2, "query": "a", "vid": "b"}': "line 2",
    f"{GOOD_LINE}\n{GOOD_LINE[:-9]}": "line 2",
    f"{GOOD_LINE}\n[]": "line 2",
    '[{"path": "a.mp4", "question": "a", "answer": "1.0-2.0"},'
    ' {"path": "a.mp4", "question": "a", "answer": "soon"}]': "item 1",
    '[{"video": "a.mp4", "sentence": "a"}]': "item 0",
    "[5]": "item 0",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_row_is_refused_by_file_and_place(text, tmp_path):
    path = tmp_path / "rows"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"rows, {MALFORMED[text]}:"):
        load_annotations(path, "v")


@pytest.mark.parametrize("text", ["", " \n", "[]", "{}"])
def test_a_file_without_rows_is_refused(text, tmp_path):
    path = tmp_path / "rows"
    path.write_text(text)
    with pytest.raises(ValueError, match="rows: holds no"):
        load_annotations(path, "v")


def test_queries_have_one_form():
    assert normalize_query(" Another  man walks\nby. ") == "another man walks by"
    assert normalize_query("He scores .") == "he scores"
    assert normalize_query("And then...") == "and then"
    assert normalize_query("Mr. Smith sits, where?") == "mr. smith sits, where?"


@given(st.text(max_size=20) | st.text(alphabet="aB. \n\t", max_size=12))
def test_a_normal_query_is_one_line_without_a_full_stop_and_stays_as_it_is(text):
    query = normalize_query(text)
    assert query == normalize_query(query)
    assert query == query.strip() and len(query.splitlines()) <= 1 and not query.endswith(".")


def test_videos_are_found_by_name_whatever_their_suffix(tmp_path):
    for name in ("AO8RW.mkv", "x_60.0_210.0.webm", "v_1.mp4", "notes.txt"):
        (tmp_path / name).touch()
    find = _video_finder(tmp_path)
    for name, file in [("AO8RW", "AO8RW.mkv"), ("AO8RW.mp4", "AO8RW.mkv"), ("x_60.0_210.0", "x_60.0_210.0.webm"),
                       ("x_60.0_210.0.avi", "x_60.0_210.0.webm"), ("./dataset/any/v_1.mp4", "v_1.mp4"),
                       ("C:\\clips\\v_1.mp4", "v_1.mp4"), ("x_60.0", "x_60.0.mp4"), ("gone.webm", "gone.webm")]:
        assert find(name) == str(tmp_path / file)


def test_missing_videos_are_named_once(tmp_path):
    (tmp_path / "here.mp4").touch()
    samples = [Sample(str(tmp_path / name), "q", 0, 1) for name in ("z.mp4", "here.mp4", "a.mp4", "z.mp4")]
    assert [Path(v).name for v in missing_videos(samples)] == ["a.mp4", "z.mp4"]


def test_training_clamps_ends_and_drops_empty_segments_with_counts():
    kept, clamped, dropped = prepare_training(load_annotations(ROWS / "charades.json", "v"))
    assert [(s.start, s.end) for s in kept] == [(0.0, 6.9), (20.8, 29.46), (20.8, 29.46)]
    assert (clamped, dropped) == (2, 3)  # Y6R7T ends at 30.0 of 29.46 s; LEOL6 and AKKWU run backwards
    kept, clamped, dropped = prepare_training(load_annotations(ROWS / "tvgbench.json", "v"))
    assert ([s.end for s in kept], clamped, dropped) == ([28.1, 19.29, 111.0], 1, 1)


def test_without_an_annotated_duration_the_videos_own_clamps(tmp_path):
    video = str(write_video(tmp_path / "a.mp4", [k / 10 for k in range(40)]))  # 4 s
    rows = [Sample(v, "q", start, 9.0) for v, start in [(video, 1.0), (video, 5.0), (str(tmp_path / "none.mp4"), 1.0)]]
    kept, clamped, dropped = prepare_training(rows)
    assert [s.end for s in kept] == [pytest.approx(4.0, abs=0.1), 9.0] and (clamped, dropped) == (1, 1)
    assert [s.duration for s in kept] == [kept[0].end, None]  # noted, for Time-R1's reward


# ---- Demonstrations and rollouts

DEMONSTRATION = dict(video="AO8RW.mp4", query="A door.", start=1, end=2.5, task="vc", completion="<answer>..</answer>")


def test_demonstrations_are_read(tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps(DEMONSTRATION) + "\n")
    sample = Sample(str(Path("v/AO8RW.mp4")), "a door", 1.0, 2.5, None, "line 1")
    assert load_demonstrations(path, "v", TASKS) == [Demonstration(sample, "vc", "<answer>..</answer>")]


@pytest.mark.parametrize("name", ["completion", "solution"])
def test_demonstrations_with_the_field_names_of_tvg_r1_are_read(name, tmp_path):
    row = {"dataset": "charades", "problem": "A door.", "choices": "", "video": "x/AO8RW.mp4", "video_length": 30.5,
           "gt_frame": [1, 2.5], "ground_truth": "", name: "<think>a</think> <time>[1, 2.5]</time>"}
    (tmp_path / "cold.jsonl").write_text(json.dumps(row) + "\n")
    sample = Sample(str(Path("v/AO8RW.mp4")), "a door", 1.0, 2.5, 30.5, "line 1")
    assert load_demonstrations(tmp_path / "cold.jsonl", "v", TASKS) == [Demonstration(sample, "tvg", row[name])]


@pytest.mark.parametrize("change", [{"task": "dance"}, {"task": []}, {"completion": None}, {"completion": 3},
                                    {"query": ""}, {"start": "x"}, {"end": -1}])
def test_a_malformed_demonstration_is_refused_by_file_and_line(change, tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps(DEMONSTRATION) + "\n" + json.dumps(DEMONSTRATION | change))
    with pytest.raises(ValueError, match="sft.jsonl, line 2:"):
        load_demonstrations(path, "v", TASKS)


def test_a_demonstration_without_a_field_or_a_file_without_any_is_refused(tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text('{"video": "a.mp4"}')
    with pytest.raises(ValueError, match="line 1: .*no field"):
        load_demonstrations(path, "v", TASKS)
    path.write_text("")
    with pytest.raises(ValueError, match="sft.jsonl: holds no"):
        load_demonstrations(path, "v", TASKS)


def test_a_demonstration_that_is_written_is_read_back():
    sample = Sample("videos/AO8RW.mp4", "a door", 1.0, 2.5, None, "line 1")
    row = demonstration_row(sample, "vc", "<answer>..</answer>")
    assert row == DEMONSTRATION | {"query": "a door"}


def test_rollouts_are_demonstrations_with_their_iteration_and_parts(tmp_path):
    path = tmp_path / "rollouts.0.jsonl"
    samples = [Sample(str(tmp_path / f"{name}.mp4"), name, 1.0, 2.5) for name in ("a", "b")]
    append_rollouts(path, 0, "vd", samples[:1], ["x", "y"], [{"total": 1.0}, {"total": 2.0}])
    append_rollouts(path, 1, "vc", samples, list("xyzxyz"), [{"total": float(n)} for n in range(6)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0] * 2 + [1] * 6
    assert [line["parts"]["total"] for line in lines] == [1, 2, 0, 1, 2, 3, 4, 5]
    back = load_demonstrations(path, tmp_path, TASKS)
    assert [(d.sample.query, d.task, d.completion) for d in back] == (
        [("a", "vd", text) for text in "xy"] + [("a", "vc", text) for text in "xyz"]
        + [("b", "vc", text) for text in "xyz"])
    assert all(Path(d.sample.video).parent == tmp_path for d in back)
