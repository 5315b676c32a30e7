"""engine/words/: rows copied from the real annotation files with their defects; demonstrations and rollouts."""

import json
import math
import os
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import write_lines, write_video

from engine.program.settings import UserError
from engine.video.stream import video_duration
from engine.words.annotations import load_annotations, load_demonstrations
from engine.words.finding import VIDEO_SUFFIXES, missing_videos, name_parts, report_missing, video_finder
from engine.words.samples import Demonstration, Sample, clamp_to_videos, demonstration_row, rows_in_words
from engine.words.text import normalize_query

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


def test_a_window_a_query_or_a_query_with_one_window_is_a_sample():
    def segments(windows):
        samples = load_annotations(ROWS / "qvhighlights.jsonl", "v", windows)
        return [[(int(one.start), int(one.end)) for one in sample.by_segment()] for sample in samples]

    assert segments("each") == [[(36, 60)], [(6, 20)], [(8, 12)], [(24, 34)], [(4, 8)], [(14, 24)]]
    assert segments("best") == [[(36, 60)], [(6, 20)], [(8, 12), (24, 34)], [(4, 8), (14, 24)]]
    assert segments("single") == [[(36, 60)], [(6, 20)]]


@pytest.mark.parametrize("name", [name for name in FORMATS if "qvhighlights" not in name])
def test_windows_change_no_other_format(name):
    rows = [load_annotations(ROWS / name, "v", windows) for windows in ("each", "best", "single")]
    assert rows[0] == rows[1] == rows[2]


# ---- Excerpts: rows whose video is a part of its file


def tvgbench(*rows):
    """(path, start, end, answer) -> the text of a TVGBench file."""
    return json.dumps([{"path": path, "question": "a door", "answer": answer, "start": start, "end": end,
                        "duration": None if start is None else end - start} for path, start, end, answer in rows])


def excerpts(tmp_path, *rows):
    (tmp_path / "rows.json").write_text(tvgbench(*rows))
    return [sample.excerpt for sample in load_annotations(tmp_path / "rows.json", tmp_path)]


def test_a_row_of_tvgbench_or_time_r1_names_the_part_of_the_file_that_its_times_count_in(tmp_path):
    write_video(tmp_path / "a.mp4")  # 4 s
    assert excerpts(tmp_path, ("x/a.mp4", 1.5, 4.0, "0.5-1.5")) == [(1.5, 4.0)]
    row = {"video": "x/a.mp4", "timestamp": [0.5, 1.5], "sentence": "a door", "video_start": 1.5, "video_end": 4.0}
    for name, sample in {"rows.json": row, "null.json": row | {"video_start": None, "video_end": None}}.items():
        (tmp_path / name).write_text(json.dumps([sample]))
    (sample,) = load_annotations(tmp_path / "rows.json", tmp_path)
    assert (sample.start, sample.end, sample.duration, sample.excerpt) == (0.5, 1.5, 2.5, (1.5, 4.0))
    assert load_annotations(tmp_path / "null.json", tmp_path)[0].excerpt is None


@pytest.mark.parametrize("seconds, answer, cut", [
    (40, "0.5-1.5", False),  # the whole file, of which 8 to 12 s are the video
    (4, "0.5-1.5", True),  # as long as the excerpt
    (11, "0.5-1.5", False),  # whole, though it ends before the excerpt does
    (7, "0.5-1.5", True),  # ends before 8.5 to 9.5 s, where a whole file would have the segment
])
def test_a_file_that_has_been_cut_to_its_excerpt_is_known_by_its_length(tmp_path, seconds, answer, cut):
    write_video(tmp_path / "a.mp4", [i / 2 for i in range(2 * seconds)])
    video_duration.cache_clear()
    assert excerpts(tmp_path, ("a.mp4", 8.0, 12.0, answer)) == [None if cut else (8.0, 12.0)]


def test_a_file_with_two_excerpts_is_whole_however_long(tmp_path):
    write_video(tmp_path / "a.mp4")  # 4 s, as long as each excerpt; the first one runs over its end
    rows = [("a.mp4", 2.0, 6.0, "0.5-1.5"), ("a.mp4", None, None, "2.5-3.5")]
    assert excerpts(tmp_path, *rows) == [(2.0, 6.0), None]
    assert excerpts(tmp_path, ("none.mp4", 2.0, 6.0, "0.5-1.5")) == [(2.0, 6.0)]  # a video that is missing


@pytest.mark.parametrize("start, end", [(3.0, 2.0), (2.0, 2.0), (-1.0, 2.0), (1.0, None), (None, 2.0), (1.0, math.inf)])
def test_an_excerpt_that_is_none_is_refused(tmp_path, start, end):
    row = {"path": "a.mp4", "question": "a door", "answer": "0-1", "start": start, "end": end}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="rows.json, item 0: not a readable annotation row"):
        load_annotations(tmp_path / "rows.json", tmp_path)


def test_an_excerpt_goes_from_stage_to_stage(tmp_path):
    sample = Sample("v/a.mp4", "a door", 0.5, 1.5, 4.0, excerpt=(8.0, 12.0))
    path = tmp_path / "demos.jsonl"
    path.write_text(json.dumps(demonstration_row(sample, "tvg", "x")) + "\n")
    (demonstration,) = load_demonstrations(path, "v", ("tvg",))
    assert demonstration.sample.excerpt == (8.0, 12.0)


@pytest.mark.parametrize("seconds, cut", [(12, False), (4, True)])
def test_a_demonstration_knows_whether_its_file_has_been_cut_to_the_excerpt(tmp_path, seconds, cut):
    write_video(tmp_path / "a.mp4", [i / 2 for i in range(2 * seconds)])
    video_duration.cache_clear()
    row = {"video": "a.mp4", "query": "a door", "start": 0.5, "end": 1.5, "task": "vd", "completion": "x",
           "video_start": 8.0, "video_end": 12.0}
    path = write_lines(tmp_path / "demos.jsonl", [row])
    (demonstration,) = load_demonstrations(path, tmp_path, ("vd",))
    assert demonstration.sample.excerpt == (None if cut else (8.0, 12.0))


def test_a_completion_that_is_kept_has_every_segment_that_could_answer(tmp_path):
    sample = Sample("v/a.mp4", "a door", 0, 10, 90.0, alternatives=((60, 80),))
    assert demonstration_row(sample, "tvg", "x")["alternatives"] == ((60, 80),)
    assert "alternatives" not in demonstration_row(replace(sample, alternatives=()), "tvg", "x")


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
    '[["a", 9, [0, 1], "a"], ["a", 9, [0, 1], "a", 1]]': "item 1",
    '{"BAD01": {"timestamps": [[0, 1]], "sentences": ["a"], "fps": 0, "num_frames": 9}}': "key 'BAD01'",
    '{"BAD01": {"timestamps": [[0, 1]], "sentences": ["a"], "fps": 25}}': "key 'BAD01'",
    '{"BAD01": {"timestamps": [[0, 1]], "sentences": ["a"], "fps": Infinity, "num_frames": 9}}': "key 'BAD01'",
    '{"BAD01": {"duration": 9, "spans": [[0, 1]], "queries": ["a", "b"]}}': "key 'BAD01'",
    '{"BAD01": {"duration": 1%s, "timestamps": [[0, 1]], "sentences": ["a"]}}' % ("0" * 400): "key 'BAD01'",
    "AO8RW 0.0 6.9##3.4##a door##a window.": "line 1",
    "[" * 100_000: "line 1",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_row_is_refused_by_file_and_place(text, tmp_path):
    path = tmp_path / "rows"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"rows, {MALFORMED[text]}:") as error:
        load_annotations(path, "v")
    assert not PYTHONS_WORDS.search(str(error.value))


PYTHONS_WORDS = re.compile("object has no|unpack|not subscriptable|NoneType|convert string|argument|indices|Error")


@pytest.mark.parametrize("text, holds", [
    ('[{"id": 1, "clip": "a", "caption": "b"}]', "objects .* id, clip, caption"), ("[[1, 2], [3, 4]]", "lists"),
    ('{"info": {}, "images": []}', "info, images"), ('{"a": {"subset": "val"}}', "object of objects .* subset"),
    ('{"id": 1}\n{"id": 2}', "lines"), ("video,start,end\na,0,1", "CSV header"), ("a\t0.0\t1.5", "CSV row"),
    ("WEBVTT\n\n00:01.000 --> 00:04.000\nA door.", "text"), ("[5]", "single values")])
def test_a_file_in_another_format_is_refused_by_what_it_holds(text, holds, tmp_path):
    (tmp_path / "rows").write_text(text)
    with pytest.raises(ValueError, match=f"rows.*holds .*{holds}.*, which is no format") as error:
        load_annotations(tmp_path / "rows", "v")
    assert "\n" not in str(error.value) and not PYTHONS_WORDS.search(str(error.value))




OTHERS = {
    "tacos": ({"s30-d52.avi": {"timestamps": [[141, 354], [0, 588]], "sentences": ["He takes a knife.", "He cuts."],
                               "fps": 29.4, "num_frames": 1470}},
              [("s30-d52.avi", "knife", 141 / 29.4, 354 / 29.4, 50), ("s30-d52.avi", "cuts", 0, 20, 50)]),
    "timelens": ({"AO8RW": {"duration": 33.75, "spans": [[0.0, 6.9]], "queries": ["a door."]}},
                 [("AO8RW.mp4", "door", 0, 6.9, 33.75)]),
    "lists": ([["AO8RW", 33.75, [0.0, 6.9], "a door."], ["Y6R7T", 29.46, [1, 2], "a phone."]],
              [("AO8RW.mp4", "door", 0, 6.9, 33.75), ("Y6R7T.mp4", "phone", 1, 2, 29.46)]),
    "captions with frames noted": ({"a": {"duration": 9, "timestamps": [[0, 1]], "sentences": ["a"], "fps": 25,
                                          "num_frames": 225}}, [("a.mp4", "a", 0, 1, 9)]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_benchmarks_are_read_in_seconds(name, tmp_path):
    document, expected = OTHERS[name]
    (tmp_path / "rows").write_text(json.dumps(document))
    for got, wanted in zip(brief(load_annotations(tmp_path / "rows", "v")), expected, strict=True):
        assert got[:2] == wanted[:2] and got[2:] == pytest.approx(wanted[2:])


ENTRY = '{"duration": 9, "timestamps": [[0, 1]], "sentences": ["a door"]}'
REPEATED = {
    f'{{"b": {ENTRY}, "a": {ENTRY}, "a": {ENTRY}}}': r'rows: the key "a" stands 2 times',
    f'{{"b": {ENTRY},\n "a": {ENTRY[:-1]}, "duration": 8}}}}': r'rows: the key "duration" stands 2 times',
    '{"video": "a", "timestamp": [0, 1], "sentence": "a"}\n{"video": "a", "timestamp": [0, 1], "sentence": "a", '
    '"timestamp": [2, 3], "timestamp": [4, 5]}': r'rows, line 2: the key "timestamp" stands 3 times',
}


@pytest.mark.parametrize("text", REPEATED)
def test_a_repeated_key_is_refused_since_json_would_keep_the_last_alone(text, tmp_path):
    (tmp_path / "rows").write_text(text)
    with pytest.raises(ValueError, match=REPEATED[text]):
        load_annotations(tmp_path / "rows", "v")


def test_a_glance_is_no_part_of_the_sentence(tmp_path):
    (tmp_path / "rows").write_text("3MSZA 24.3 30.4##25.4##person turn a light on.\n3MSZA 0 1##5 men run.\n")
    assert [s.query for s in load_annotations(tmp_path / "rows", "v")] == ["person turn a light on", "5 men run"]


def test_json_lines_hold_any_kind_of_row(tmp_path):
    rows = [["a", 9, [0, 1], "a door"], {"video": "b", "timestamp": [0, 1], "sentence": "a lamp"}]
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)))
    assert [s.query for s in load_annotations(tmp_path / "rows", "v")] == ["a door", "a lamp"]


@pytest.mark.parametrize("late, rows, refused", [(3, 5, True), (2, 3, False), (3, 6, False), (4, 6, True)])
def test_times_that_most_videos_do_not_have_are_taken_for_frames(late, rows, refused, tmp_path):
    document = [[f"v{n}", 30, [0, 31.1 if n < late else 31.0], "a door"] for n in range(rows)]
    document += [["v", None, [0, 90], "a door"]] * 4  # of rows without a duration nothing is known
    (tmp_path / "rows").write_text(json.dumps(document))
    if refused:
        with pytest.raises(ValueError, match=f"rows: {late} of {rows} rows .*look like frames, not seconds"):
            load_annotations(tmp_path / "rows", "v")
    else:
        assert len(load_annotations(tmp_path / "rows", "v")) == rows + 4


def test_a_lone_surrogate_is_replaced_at_loading(tmp_path):
    (tmp_path / "rows").write_text('[["a", 9, [0, 1], "a \\ud83d door"]]')
    assert load_annotations(tmp_path / "rows", "v")[0].query == "a ? door"
    (tmp_path / "sft").write_text(json.dumps(DEMONSTRATION | {"completion": "\ud83d", "query": "\ude00"}))
    [demonstration] = load_demonstrations(tmp_path / "sft", "v", TASKS)
    assert (demonstration.sample.query, demonstration.completion) == ("?", "?")


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
    find = video_finder(tmp_path)
    for name, file in [("AO8RW", "AO8RW.mkv"), ("AO8RW.mp4", "AO8RW.mkv"), ("x_60.0_210.0", "x_60.0_210.0.webm"),
                       ("x_60.0_210.0.avi", "x_60.0_210.0.webm"), ("./dataset/any/v_1.mp4", "v_1.mp4"),
                       ("C:\\clips\\v_1.mp4", "v_1.mp4"), ("x_60.0", "x_60.0.mp4"), ("gone.webm", "gone.webm")]:
        assert find(name) == str(tmp_path / file)


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_every_suffix_is_known_in_small_and_capital_letters(suffix, tmp_path):
    for file in (f"a{suffix}", f"b{suffix.upper()}"):
        (tmp_path / file).touch()
        find = video_finder(tmp_path)
        for name in (file[0], f"{file[0]}.mp4", f"{file[0]}.MKV", file, file[0] + suffix.upper()):
            assert find(name) == str(tmp_path / file)


def test_a_name_that_exists_as_it_stands_is_taken(tmp_path):
    for file in ("a.mp4", "a.mkv", "a.ogv", "b", "b.mp4"):
        (tmp_path / file).touch()
    (tmp_path / "c.mp4").mkdir()
    (tmp_path / "c.webm").touch()
    find = video_finder(tmp_path)
    for name, file in [("a.mkv", "a.mkv"), ("a.ogv", "a.ogv"), ("a", "a.mp4"), ("a.gif", "a.mp4"), ("b", "b"),
                       ("c.mp4", "c.webm")]:
        assert find(name) == str(tmp_path / file)


def test_folders_in_a_name_count_inside_the_video_folder_alone(tmp_path):
    folder = tmp_path / "videos"
    for file in ("charades/x.mp4", "charades/y.MOV", "x.mp4", "z.mp4", "z2.mkv", "../secret.mp4", "../other/x.mp4"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    find = video_finder(folder)
    for name, file in [("charades/x.mp4", "charades/x.mp4"), ("charades\\x", "charades/x.mp4"),
                       ("./charades//y.mp4", "charades/y.MOV"), ("charades/z2.mp4", "z2.mkv"), ("other/x.mp4", "x.mp4"),
                       ("../secret.mp4", "secret.mp4"), ("../other/x.mp4", "x.mp4"), ("a/../../other/x", "x.mp4"),
                       (str(tmp_path / "secret.mp4"), "secret.mp4"), ("C:\\other\\x.mp4", "x.mp4"),
                       ("n" * 300, "n" * 300 + ".mp4"), ("a/\0/x.mp4", "x.mp4")]:
        assert find(name) == str(folder / file), name
    assert missing_videos([Sample(find("n" * 300), "q", 0, 1)]) == [find("n" * 300)]
    for name in ("C:\\other\\x.mp4", "/other/x.mp4"):  # of another system too, where "C:" leaves the folder
        assert name_parts(name) == ("", "x.mp4")
    for name in ("", "..", "charades/", "/"):
        with pytest.raises(ValueError, match="is no name"):
            find(name)


def test_videos_in_folders_of_the_folder_are_found_as_charades_zip_brings_them(tmp_path):
    for file in ("Charades_v1_480/AO8RW.mp4", "Charades_v1_480/deep/B.MKV", "notes/AO8RW.txt", "c/x.mp4", "d/c/y.mp4",
                 "C2/only", "e/only.mp4"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "d" / "round").symlink_to(tmp_path)  # a circle
    (tmp_path / "again").symlink_to(tmp_path / "Charades_v1_480")  # the same folder twice
    find = video_finder(tmp_path)
    for name, file in [("AO8RW", "Charades_v1_480/AO8RW.mp4"), ("B.mp4", "Charades_v1_480/deep/B.MKV"),
                       ("c/y", "d/c/y.mp4"), ("else/x.mp4", "c/x.mp4"), ("only.mp4", "e/only.mp4")]:
        assert os.path.samefile(find(name), tmp_path / file), name
    assert find("none") == str(tmp_path / "none.mp4")


def test_a_video_that_is_found_twice_is_refused_with_both_places(tmp_path):
    for file in ("a/x.mp4", "b/x.webm", "b/c/z.mp4", "d/z.mp4", "y.mp4", "a/y.mp4"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    find = video_finder(tmp_path)
    with pytest.raises(UserError, match=r"holds x.mp4 twice, as .*/a/x.mp4 and .*/b/x.webm; move one of them away"):
        find("x.mp4")
    assert find("b/x.mp4") == str(tmp_path / "b" / "x.webm")  # the folder is named
    assert find("c/z") == str(tmp_path / "b" / "c" / "z.mp4")
    assert find("y") == str(tmp_path / "y.mp4")  # as it stands


@pytest.mark.parametrize("there, named", [("NFD", "NFC"), ("NFC", "NFD")])
@pytest.mark.parametrize("word", ["café", "Ångström", "가나"])
def test_a_name_is_found_in_either_form_of_unicode(tmp_path, there, named, word):
    (tmp_path / "in").mkdir()
    for folder in (tmp_path, tmp_path / "in"):
        path = folder / (unicodedata.normalize(there, word + folder.name[:2]) + ".mp4")
        path.touch()
        for suffix in ("", ".mp4", ".avi"):
            assert video_finder(tmp_path)(unicodedata.normalize(named, path.stem) + suffix) == str(path)


def test_a_name_with_spaces_is_read_in_a_charades_file(tmp_path):
    (tmp_path / "rows.txt").write_text("my video 2 0.5 6.9##person sits\n AO8RW  1 2 ##person runs\n")
    first, second = load_annotations(tmp_path / "rows.txt", tmp_path)
    assert (Path(first.video).name, first.start, first.end) == ("my video 2.mp4", 0.5, 6.9)
    assert (Path(second.video).name, second.start, second.end) == ("AO8RW.mp4", 1, 2)


@pytest.mark.parametrize("files, words", [
    ([], "2 of 2 videos are missing, and the folder is empty;"),
    (["Charades_v1_480.zip", "a.txt"], "the folder holds no video but 2 other files, Charades_v1_480.zip among them;"),
    (["in/q.mp4", "p.webm", "p.txt"], "the folder holds 2 others, p.webm among them;"),
    (["a.mp4"], "1 of 2 videos are missing, and these are named above;")])
def test_where_videos_are_missing_the_folder_is_described(alone, tmp_path, files, words):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    samples = [Sample(str(tmp_path / name), "q", 0, 1) for name in ("a.mp4", "b.mp4")]
    with pytest.raises(UserError) as error:
        report_missing(samples, allowed=False)
    assert words in str(error.value)


def test_the_folder_of_a_video_survives_a_round_trip(tmp_path):
    (tmp_path / "charades").mkdir()
    (tmp_path / "charades" / "x.mp4").touch()
    (tmp_path / "rows").write_text('[["charades/x", 9, [0, 1], "a door"]]')
    for videos in ("", tmp_path):
        row = demonstration_row(load_annotations(tmp_path / "rows", videos)[0], "vc", "b")
        (tmp_path / "sft").write_text(json.dumps(row))
        [demonstration] = load_demonstrations(tmp_path / "sft", tmp_path, TASKS)
        assert demonstration.sample.video == str(tmp_path / "charades" / "x.mp4")


def test_missing_videos_are_named_once(tmp_path):
    (tmp_path / "here.mp4").touch()
    samples = [Sample(str(tmp_path / name), "q", 0, 1) for name in ("z.mp4", "here.mp4", "a.mp4", "z.mp4")]
    assert [Path(v).name for v in missing_videos(samples)] == ["a.mp4", "z.mp4"]


def test_training_clamps_ends_and_drops_empty_segments_with_counts():
    kept, clamped, dropped = clamp_to_videos(load_annotations(ROWS / "charades.json", "v"))
    assert [(s.start, s.end) for s in kept] == [(0.0, 6.9), (20.8, 29.46), (20.8, 29.46)]
    assert (clamped, len(dropped)) == (2, 3)  # Y6R7T ends at 30.0 of 29.46 s; LEOL6 and AKKWU run backwards
    kept, clamped, dropped = clamp_to_videos(load_annotations(ROWS / "tvgbench.json", "v"))
    assert ([s.end for s in kept], clamped, len(dropped)) == ([28.1, 19.29, 111.0], 1, 1)


def test_without_an_annotated_duration_the_videos_own_clamps(tmp_path):
    video = str(write_video(tmp_path / "a.mp4", [k / 10 for k in range(40)]))  # 4 s
    rows = [Sample(v, "q", start, 9.0) for v, start in [(video, 1.0), (video, 5.0), (str(tmp_path / "none.mp4"), 1.0)]]
    kept, clamped, dropped = clamp_to_videos(rows)
    assert [s.end for s in kept] == [pytest.approx(4.0, abs=0.1), 9.0] and clamped == 1
    assert rows_in_words(dropped) == f": a.mp4 from 5 to {kept[0].end:g} s"
    assert rows_in_words(dropped * 21).endswith(" s, and 1 more") and rows_in_words([]) == ""
    assert [s.duration for s in kept] == [kept[0].end, None]  # noted, for Time-R1's reward


def test_of_several_segments_training_keeps_those_that_lie_in_the_video():
    late = Sample("a.mp4", "q", 12.0, 14.0, duration=10.0, alternatives=((1.0, 5.0), (8.0, 20.0)))
    kept, clamped, dropped = clamp_to_videos([late, replace(late, alternatives=((11.0, 12.0),))])
    assert [(s.start, s.end, s.alternatives) for s in kept] == [(1.0, 5.0, ((8.0, 10.0),))]
    assert (clamped, rows_in_words(dropped)) == (1, ": a.mp4 from 12 to 10 s")
    backwards = replace(late, start=1.0, end=5.0, alternatives=((5.0, 3.0),))  # goes, but no end is clamped
    twice = replace(late, start=1.0, end=12.0)  # both ends are, of one row
    assert clamp_to_videos([backwards, twice])[1:] == (1, [])


# ---- Demonstrations and rollouts

DEMONSTRATION = dict(video="AO8RW.mp4", query="A door.", start=1, end=2.5, task="vc", completion="<answer>..</answer>")


def test_demonstrations_are_read(tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps(DEMONSTRATION) + "\n")
    sample = Sample(str(Path("v/AO8RW.mp4")), "a door", 1.0, 2.5, None, "line 1")
    assert load_demonstrations(path, "v", TASKS) == [Demonstration(sample, "vc", "<answer>..</answer>")]


@pytest.mark.parametrize("ending, kept", [
    ("<|im_end|>", ""), ("<|im_end|>\n", ""), ("\n<|im_end|>\n<|endoftext|>", ""), ("</s>", ""), (" \n", " \n"),
    ("<|im_end|> b", "<|im_end|> b")])
def test_an_end_token_is_cut_off(ending, kept, tmp_path):
    (tmp_path / "sft").write_text(json.dumps(DEMONSTRATION | {"completion": "<answer>a</answer>" + ending}))
    assert load_demonstrations(tmp_path / "sft", "v", TASKS)[0].completion == "<answer>a</answer>" + kept


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
