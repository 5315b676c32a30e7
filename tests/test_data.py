"""data.py: rows copied from the real annotation files with their defects, videos made to be odd, draws counted."""

import functools
import itertools
import json
import math
import struct
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import SPECIALS, write_video
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import evaluate
import runtime
import video
from data import (Demonstration, Sample, TaskSampler, TrainingClips, encode_prompt, load_annotations, load_demonstrations,
                  missing_videos, normalize_query, patchify, position_ids, prepare_training, prompt_text, read_clip)
from video import MAX_PIXELS, VideoError, fit_size, read_video

ROWS = Path(__file__).parent / "data"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


# ---- Annotations

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
    find = data._video_finder(tmp_path)
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


DEMONSTRATION = dict(video="AO8RW.mp4", query="A door.", start=1, end=2.5, task="vc", completion="<answer>..</answer>")


def test_demonstrations_are_read(tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps(DEMONSTRATION) + "\n")
    sample = Sample(str(Path("v/AO8RW.mp4")), "a door", 1.0, 2.5, None, "line 1")
    assert load_demonstrations(path, "v") == [Demonstration(sample, "vc", "<answer>..</answer>")]


@pytest.mark.parametrize("name", ["completion", "solution"])
def test_demonstrations_with_the_field_names_of_tvg_r1_are_read(name, tmp_path):
    row = {"dataset": "charades", "problem": "A door.", "choices": "", "video": "x/AO8RW.mp4", "video_length": 30.5,
           "gt_frame": [1, 2.5], "ground_truth": "", name: "<think>a</think> <time>[1, 2.5]</time>"}
    (tmp_path / "cold.jsonl").write_text(json.dumps(row) + "\n")
    sample = Sample(str(Path("v/AO8RW.mp4")), "a door", 1.0, 2.5, 30.5, "line 1")
    assert load_demonstrations(tmp_path / "cold.jsonl", "v") == [Demonstration(sample, "tvg", row[name])]


@pytest.mark.parametrize("change", [{"task": "dance"}, {"task": []}, {"completion": None}, {"completion": 3},
                                    {"query": ""}, {"start": "x"}, {"end": -1}])
def test_a_malformed_demonstration_is_refused_by_file_and_line(change, tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps(DEMONSTRATION) + "\n" + json.dumps(DEMONSTRATION | change))
    with pytest.raises(ValueError, match="sft.jsonl, line 2:"):
        load_demonstrations(path, "v")


def test_a_demonstration_without_a_field_or_a_file_without_any_is_refused(tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text('{"video": "a.mp4"}')
    with pytest.raises(ValueError, match="line 1: .*no field"):
        load_demonstrations(path, "v")
    path.write_text("")
    with pytest.raises(ValueError, match="sft.jsonl: holds no"):
        load_demonstrations(path, "v")


# ---- Videos. Frame i is a grey of level 8 + 6 i, so a clip tells which frames it holds.

TEN_HZ = [k / 10 for k in range(40)]  # 4 seconds


def make_video(path, times=TEN_HZ, size=(56, 56), codec="libx264", pixels="yuv420p", unit=1000, picture=None,
               audio_from=None, container=None, container_options=None, **options):
    """A video with frames at `times` in seconds, counted in 1 / `unit` s; `audio_from` adds four seconds of silence.

    `picture` (H, W, 3) is all its frames, or (N, H, W, 3) each of them.
    """
    options = {"g": "12", "bf": "0"} | ({"crf": "4", "preset": "ultrafast"} if codec == "libx264" else {}) | options
    with av.open(str(path), "w", format=container, options=container_options or {}) as file:
        stream = file.add_stream(codec, rate=unit if unit < 100 else 30, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *size, pixels, 4_000_000
        stream.codec_context.time_base = stream.time_base = Fraction(1, unit)
        if audio_from is not None:
            audio = file.add_stream("aac", rate=16000, layout="mono")
            for k in range(4 * 16000 // 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 16000, int(audio_from * 16000) + 1024 * k
                file.mux(audio.encode(silence))
            file.mux(audio.encode())
        for i, t in enumerate(times):
            image = np.full((*size, 3), 8 + 6 * i % 246, np.uint8) if picture is None else (
                picture if picture.ndim == 3 else picture[i])
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(t * unit), Fraction(1, unit)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def shown(clip):
    """Which frame each picture of a clip is, read from its grey level."""
    return ((clip.frames.float().mean((1, 2, 3)) - 8) / 6).round().int().tolist()


@pytest.fixture
def looked_at(monkeypatch):
    """The times of the frames decoded during a test."""
    times, time_of = [], video._Timed.time_of

    def spy(self, x):
        t = time_of(self, x)
        if isinstance(x, av.VideoFrame):
            times.append(t)
        return t

    monkeypatch.setattr(video._Timed, "time_of", spy)
    return times


KINDS = {
    "a.mp4": {},
    "many key frames.mp4": {"g": "3"},
    "one key frame.mp4": {"g": "250"},
    "b-frames.mp4": {"bf": "3", "preset": "medium"},
    "b-frames.mkv": {"bf": "3", "preset": "medium"},
    "a.mov": {},
    "a.webm": {"codec": "libvpx"},
    "no index.webm": {"codec": "libvpx", "container_options": {"live": "1"}},
    "a.avi": {"codec": "mpeg4", "unit": 10},
    "transport stream.mp4": {"container": "mpegts", "unit": 90000},
    "late.mp4": {"times": [100 + t for t in TEN_HZ]},
    "late.mkv": {"times": [100 + t for t in TEN_HZ]},
    "late stream.mp4": {"times": [100 + t for t in TEN_HZ], "container": "mpegts", "unit": 90000},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_container_gives_the_same_frames_whole_and_cut(name, tmp_path):
    path = make_video(tmp_path / name, **KINDS[name])
    whole = read_video(path)
    assert shown(whole) == [0, 5, 10, 15, 20, 25, 30, 35] and whole.fps == 2.0
    assert whole.times.tolist() == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5], abs=2e-3)
    assert whole.frames.dtype == torch.uint8 and whole.frames.shape == (8, 3, 112, 112)  # 16 tokens at the least
    part = read_video(path, start=1.3, end=2.7)  # three targets, and `end` to make them even; key frames at 1.2 and 2.4
    assert shown(part) == [13, 18, 23, 27] and part.fps == 2.0
    assert part.times.tolist() == pytest.approx([1.3, 1.8, 2.3, 2.7], abs=2e-3)


B_FRAMES = {"bf": "5", "preset": "medium"}
OPEN = B_FRAMES | {"x264-params": "open-gop=1:keyint=12:min-keyint=12"}  # some frames refer across a key frame
SKIPPED = {
    "b-frames.mp4": B_FRAMES | {"g": "40"},
    "one key frame.mkv": B_FRAMES | {"g": "250"},
    "short groups.mp4": {"bf": "2", "preset": "medium", "g": "4"},
    "key frames alone.mp4": {"g": "1"},
    "open groups.mp4": OPEN,
    "open groups.mkv": OPEN,
    "mpeg4.avi": {"codec": "mpeg4", "bf": "2", "unit": 10},
    "vp9.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"},
}


def moving(frames, side):
    """(frames, side, side, 3): a window that slides over noise, so that frames are predicted and no two are alike."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8).repeat(12, 0).repeat(12, 1)
    return np.stack([noise[k:k + side, 2 * k:2 * k + side] for k in range(frames)])


@pytest.mark.parametrize("name", SKIPPED)
def test_clips_are_those_of_decoding_every_frame(name, tmp_path):
    path = make_video(tmp_path / name, [k / 10 for k in range(120)], picture=moving(120, 56), **SKIPPED[name])
    with av.open(str(path)) as file:
        stream, zero = file.streams.video[0], (file.start_time or 0) / av.time_base
        stream.codec_context.thread_count = 1
        frames = [(f.dts if f.pts is None else f.pts, f.to_ndarray(format="rgb24", interpolation="BICUBIC"))
                  for f in file.decode(stream)]
        truth = {stamp * float(stream.time_base) - zero: frame for stamp, frame in frames}
    times = np.array(list(truth))
    segments = [(None, None), (0, 2), (1.13, 1.2), (4.97, 9.4), (8, 12)]
    for fps, (start, end) in itertools.product([0.5, 2, 3, 7], segments):
        clip = read_video(path, fps=fps, start=start, end=end, min_frame_pixels=1)
        targets = np.minimum((start or 0) + np.arange(len(clip.times)) / clip.fps, end or 12)
        targets[-1] = targets[-1] if start != 1.13 else clip.times[-1]  # widened
        nearest = [times[abs(times - t).argmin()] for t in targets]
        assert abs(abs(clip.times - targets) - abs(nearest - targets)).max() < 2e-6
        for t, frame in zip(clip.times, clip.frames):
            assert np.array_equal(truth[times[abs(times - t).argmin()]], frame.permute(1, 2, 0))


@pytest.mark.parametrize("options, segment, most", [
    (B_FRAMES | {"g": "250", "x264-params": "b-adapt=0:b-pyramid=none"}, {}, 50),  # a P, five B: P and wanted B alone
    ({"g": "10"}, {}, 72),  # the first and the sixth frame of a group are wanted, the last four not needed
    (OPEN, {}, 80),  # about as many as of closed groups; taken for closed ones, they would all be decoded once more
    ({"g": "1"}, {}, 24), ({"g": "1"}, {"start": 5.0, "end": 8.0}, 6)])
def test_only_what_wanted_frames_need_is_decoded(options, segment, most, tmp_path, looked_at):
    path = make_video(tmp_path / "a.mp4", [k / 10 for k in range(120)], picture=moving(120, 56), **options)
    assert len(read_video(path, **segment).times) == (6 if segment else 24)
    assert len(looked_at) <= most


def test_a_wanted_frame_that_does_not_come_gives_way_to_the_next_nearest(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4", bf="3", preset="medium")
    frames = video._Timed.frames
    monkeypatch.setattr(video._Timed, "frames", lambda *args: (f for f in frames(*args) if not 0.95 < f.time < 1.05))
    assert shown(read_video(path)) == [0, 5, 9, 15, 20, 25, 30, 35]


def test_threads_change_no_pixel(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4", picture=moving(40, 400), size=(400, 400), **B_FRAMES)
    clips = []
    for threads in 1, 4:  # 400 x 400 is enough for two
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        clips += [read_video(path), read_video(path, start=1.0, end=2.0)]
    for one, many in zip(clips[:2], clips[2:], strict=True):
        assert torch.equal(one.frames, many.frames) and np.array_equal(one.times, many.times)


def test_variable_frame_rate_uses_true_times(tmp_path):
    path = make_video(tmp_path / "a.mp4", [0, 0.1, 0.2, 1.3, 1.6, 1.9, 3.0])
    clip = read_video(path)  # seven frames in 3 s: the last one lasts 0.5 s, too
    #                           targets: 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5
    assert shown(clip) == [0, 2, 3, 4, 5, 6, 6, 6]
    assert clip.times.tolist() == pytest.approx([0, 0.2, 1.3, 1.6, 1.9, 3, 3, 3])


@settings(max_examples=12, deadline=None)
@given(gaps=st.lists(st.integers(20, 900), min_size=1, max_size=30), bf=st.sampled_from("03"),
       start=st.integers(0, 3000), length=st.integers(0, 4000))
def test_frames_are_the_nearest_to_their_targets(tmp_path_factory, gaps, bf, start, length):
    stamps = list(itertools.accumulate(gaps, initial=0))  # milliseconds
    path = tmp_path_factory.mktemp("v") / "a.mp4"
    make_video(path, [s / 1000 for s in stamps], bf=bf, preset="veryfast", g="7")
    clip = read_video(path, start=start / 1000, end=(start + length) / 1000, min_frame_pixels=1)
    first = min(start, max(0, round(stamps[-1] + stamps[-1] / len(gaps) - 500)))
    frames = shown(clip)
    assert len(frames) % 2 == 0 and clip.times.tolist() == pytest.approx([stamps[i] / 1000 for i in frames], abs=1e-6)
    for k, i in list(enumerate(frames))[:-1]:
        nearest = min(abs(s - first - 500 * k) for s in stamps)
        assert abs(abs(stamps[i] - first - 500 * k) - nearest) <= 2  # ties, and half milliseconds of the end


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_time_zero_is_the_players_even_if_only_sound_starts_there(name, tmp_path):
    path = make_video(tmp_path / name, [0.8 + t for t in TEN_HZ], audio_from=0)
    clip = read_video(path)  # frame k at k / 2 s, as `fps` promises; the first picture stands until there is another
    assert shown(clip)[:4] == [0, 0, 2, 7] and clip.times[:4].tolist() == pytest.approx([0.8, 0.8, 1.0, 1.5])
    part = read_video(path, start=2.0, end=3.0)
    assert shown(part) == [12, 17] and part.times.tolist() == pytest.approx([2.0, 2.5])


def set_rotation(path, clockwise):
    """Write a turn into the display matrix of an mp4's track header, as telephones do."""
    a, b = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[clockwise]
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0: 40 bytes of flags, times, id and duration, then the matrix
    struct.pack_into(">9i", content, at, a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("clockwise, size, dark", [(0, (56, 84), "left"), (90, (84, 56), "top"),
                                                   (180, (56, 84), "right"), (270, (84, 56), "bottom")])
def test_a_turned_video_is_seen_upright(clockwise, size, dark, tmp_path):
    picture = np.zeros((56, 84, 3), np.uint8)
    picture[:, 42:] = 255  # its left half is dark
    path = make_video(tmp_path / "a.mp4", picture=picture, size=(56, 84))
    set_rotation(path, clockwise)
    frames = read_video(path, min_frame_pixels=1).frames.float()
    h, w = size
    assert frames.shape[2:] == size
    halves = {"left": frames[..., :w // 2], "right": frames[..., w // 2:],
              "top": frames[..., :h // 2, :], "bottom": frames[..., h // 2:, :]}
    assert min(halves, key=lambda side: halves[side].mean()) == dark and halves[dark].mean() < 20


def test_odd_sizes_are_read_and_colours_stay_in_place(tmp_path):
    picture = np.zeros((75, 101, 3), np.uint8)
    picture[:] = 200, 100, 50
    clip = read_video(make_video(tmp_path / "a.mp4", picture=picture, size=(75, 101), pixels="yuv444p"))
    assert clip.frames.shape == (8, 3, 112, 140)  # both sides scaled up to 16 tokens at least: 4 x 5
    assert clip.frames.float().mean((0, 2, 3)).tolist() == pytest.approx([200, 100, 50], abs=6)


def test_a_stated_duration_is_not_needed(tmp_path):
    path = make_video(tmp_path / "a.webm", codec="libvpx", container_options={"live": "1"})
    assert data.video_duration(str(path)) is None
    assert prepare_training([Sample(str(path), "q", 1.0, 9.0)])[1:] == (0, 0)
    assert shown(read_video(path, start=3.0, end=9.0)) == [30, 35]


def test_one_frame_a_second_repeats_frames(tmp_path):
    clip = read_video(make_video(tmp_path / "a.mp4", range(4)))
    assert clip.times.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and shown(clip) == clip.times.tolist()


def test_a_single_frame_makes_a_clip_of_two(tmp_path):
    path = make_video(tmp_path / "a.mp4", [0])
    assert read_video(path).times.tolist() == [0, 0]
    assert read_video(path, start=3.0, end=4.0).times.tolist() == [0, 0]


@pytest.mark.parametrize("start, end, frames", [
    (1.0, 1.2, [10, 15]), (1.0, 1.0, [10, 15]), (2.0, 1.0, [20, 25]),  # widened to half a second
    (3.85, 3.88, [35, 39]), (3.5, 9.0, [35, 39]),  # to the left where the video ends; 4.0 -> the last
    (7.0, 8.0, [35, 39]), (0.0, 0.1, [0, 5])])
def test_short_segments_have_two_frames_at_the_true_rate(start, end, frames, tmp_path):
    clip = read_video(make_video(tmp_path / "a.mp4"), start=start, end=end)
    assert shown(clip) == frames and clip.fps == 2.0


def test_a_segment_decodes_only_from_the_key_frame_before_it(tmp_path, looked_at):
    path = make_video(tmp_path / "a.mp4", [k / 10 for k in range(300)], g="10")  # a key frame a second
    clip = read_video(path, start=20.4, end=21.4)
    assert clip.times.tolist() == pytest.approx([20.4, 20.9])
    assert min(looked_at) == pytest.approx(20.0) and len(looked_at) <= 11  # 20.0 to 21.0 of 30 seconds


def test_beyond_768_frames_the_rate_falls_and_is_stated(tmp_path):
    path = make_video(tmp_path / "a.mp4", range(480), size=(28, 28))
    clip = read_video(path, min_frame_pixels=1)  # 960 frames at 2 Hz
    assert clip.frames.shape == (768, 3, 28, 28) and clip.fps == pytest.approx(1.6)
    assert abs(clip.times - np.arange(768) / 1.6).max() <= 0.5 + 1e-6 and clip.times[-1] == 479


@given(st.floats(0, 1000), st.floats(0.5, 2000), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_targets_are_even_in_number_and_one_period_apart(start, length, fps):
    targets, rate = video._targets(start, start + max(length, 1 / fps), fps)
    assert 2 <= len(targets) <= 768 and len(targets) % 2 == 0 and rate <= fps
    assert np.allclose(np.diff(targets)[:-1], 1 / rate) and 0 <= targets[-1] - targets[-2] <= 1 / rate + 1e-9
    assert targets[0] == pytest.approx(start) and targets[-1] <= start + max(length, 1 / fps) + 1e-9
    assert start + length - targets[-1] <= 1 / rate + 1e-5  # up to the end


def garbage(path):
    path.write_bytes(bytes(range(256)) * 40)


def empty(path):
    path.touch()


def absent(path):
    pass


def truncated(path):
    make_video(path)
    path.write_bytes(path.read_bytes()[:-400])  # the index stands at the end of an mp4


def sound_only(path):
    with av.open(str(path), "w") as file:
        audio = file.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 16000, 0
        file.mux(audio.encode(silence))
        file.mux(audio.encode())


def spoiled(path):
    make_video(path, container_options={"movflags": "faststart"})
    content = path.read_bytes()
    at = content.index(b"mdat") + 4
    path.write_bytes(content[:at] + b"\xff" * (len(content) - at))


@pytest.mark.parametrize("damage", [garbage, empty, absent, truncated, sound_only, spoiled], ids=lambda f: f.__name__)
def test_an_undecodable_file_is_named(damage, tmp_path):
    damage(tmp_path / "broken.mp4")
    for segment in {}, {"start": 1.0, "end": 2.0}:
        with pytest.raises(VideoError, match="broken.mp4: cannot be decoded"):
            read_video(tmp_path / "broken.mp4", **segment)


def test_a_file_cut_short_is_read_up_to_the_cut(tmp_path):
    path = make_video(tmp_path / "a.mkv")
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    frames = shown(read_video(path))
    assert frames[:3] == [0, 5, 10] and 2 <= len(frames) < 8  # its header still promises four seconds


# ---- Frame sizes

@pytest.mark.parametrize("height, width, frames, expected, tokens", [
    (270, 480, 60, (224, 392), 3360),    # 30 s: 30 grids of 8 x 14
    (270, 480, 240, (112, 196), 3360),   # 120 s: 120 grids of 4 x 7
    (360, 640, 300, (84, 168), 2700),
    (360, 640, 768, (84, 140), 5760),    # beyond 448 frames 16 tokens a grid may exceed the budget
    (1080, 1920, 2, (560, 1008), 720),   # one frame never holds more than 768 tokens
    (40, 60, 2, (112, 140), 20),         # and a small one is enlarged to 16
    (90, 120, 400, (84, 112), 2400),     # unless the budget forbids
])
def test_frame_sizes_by_hand(height, width, frames, expected, tokens):
    assert fit_size(height, width, frames) == expected
    assert fit_size(width, height, frames) == expected[::-1]
    assert frames // 2 * math.prod(expected) // 28**2 == tokens


@given(st.integers(28, 2200), st.integers(28, 2200), st.integers(1, 384))
def test_sizes_are_multiples_of_28_near_the_aspect_within_the_budget(height, width, grids):
    assume(max(height, width) <= 16 * min(height, width))
    h, w = fit_size(height, width, 2 * grids)
    assert h % 28 == w % 28 == 0 and min(h, w) >= 28
    assert h * w <= 768 * 784 and grids * h * w <= max(MAX_PIXELS, grids * 16 * 784)
    # Some one scale brings both sides within a step of what they are.
    assert max((h - 28) / height, (w - 28) / width) < min((h + 28) / height, (w + 28) / width)


def test_the_callers_budget_holds(tmp_path):
    path = make_video(tmp_path / "a.mp4", size=(112, 168))
    assert read_video(path).frames.shape[2:] == (112, 168)
    assert read_video(path, max_pixels=4 * 6 * 784, min_frame_pixels=1).frames.shape[2:] == (56, 84)  # 4 grids of 2 x 3
    assert read_video(path, max_pixels=4 * 6 * 784).frames.shape[2:] == (84, 112)  # 16 tokens a grid are always granted
    assert read_video(path, max_frame_pixels=2 * 3 * 784, min_frame_pixels=1).frames.shape[2:] == (56, 84)


# ---- Prompts

def test_prompt_ids_are_the_template_with_one_pad_a_token(tokenizer):
    text = tokenizer.decode(encode_prompt(tokenizer, "Where?", 3))
    assert text == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
                    + "<|video_pad|>" * 3 + "<|vision_end|>Where?<|im_end|>\n<|im_start|>assistant\n")


@given(st.lists(st.sampled_from([*SPECIALS, "a door ", "\ue000", "{query}", "</answer>"]), max_size=6))
def test_a_query_never_becomes_a_control_token(tokenizer, parts):
    specials = set(tokenizer.convert_tokens_to_ids(SPECIALS))
    plain, hostile = (encode_prompt(tokenizer, text, 2) for text in ("", "".join(parts)))
    assert [i for i in hostile if i in specials] == [i for i in plain if i in specials]
    assert "".join(parts) in tokenizer.decode(hostile)


def test_prompts_show_the_query_to_tvg_and_the_blanked_query_to_vc_alone():
    ask = functools.partial(prompt_text, query="person QUERY {x}", frame="person [] {x}")
    assert 'event "person QUERY {x}" in the video' in ask("tvg") and "'person [] {x}'" in ask("vc")
    assert "12.54 to 17.83" in ask("tvg")
    assert "QUERY" not in ask("vc") + ask("ar") + ask("vd") and "[]" not in ask("tvg") + ask("ar") + ask("vd")


@pytest.mark.parametrize("task, words", [
    ("tvg", "To accurately pinpoint the event"), ("vc", "Add a verb for the event"),
    ("ar", "Use a verb to describe the event"), ("vd", "Describe what people have done")])
def test_each_question_begins_with_the_papers_words(task, words):
    assert prompt_text(task, "q", "f").startswith(words)


def test_inversions_may_answer_without_thinking_but_tvg_may_not():
    for task in data.PROMPTS:
        asks = prompt_text(task, "q", "f", "answer")
        assert ("<think>" in asks) == (task == "tvg") and asks.endswith("within the <answer> </answer> tags.")
        assert "<think>" in prompt_text(task, "q", "f")


def test_anchors_and_lists_of_times_are_asked_of_grounding_alone():
    for reward in ("iou", "timestamp_iou", "anchors", "tvg_r1"):
        asks = prompt_text("tvg", "q", "f", tvg_reward=reward)
        assert ("<timestamp>" in asks) == (reward == "anchors") and ("<time>" in asks) == (reward == "tvg_r1")
        assert ("<answer>" in asks) == (reward != "tvg_r1") and "<think>" in asks
        assert prompt_text("vd", "q", "f", tvg_reward=reward) == prompt_text("vd", "q", "f")


# ---- Patches and positions

def test_patches_are_those_of_transformers():
    image = torch.randint(0, 256, (1, 3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = Qwen2VLImageProcessorPil(min_pixels=28**2, max_pixels=10**7, image_mean=MEAN, image_std=STD)
    theirs = processor(images=[Image.fromarray(image[0].permute(1, 2, 0).numpy())], return_tensors="pt")
    ours, grid = patchify(image.expand(2, -1, -1, -1), MEAN, STD)
    torch.testing.assert_close(ours, theirs["pixel_values"], rtol=0, atol=1e-6)
    assert grid.tolist() == theirs["image_grid_thw"].tolist() == [[1, 4, 6]]


def test_patches_match_a_plain_loop():
    frames = torch.randint(0, 256, (4, 3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    patches, grid = patchify(frames, MEAN, STD)
    assert grid.tolist() == [[2, 4, 6]] and patches.shape == (48, 1176)
    x, expected = frames.double() / 255, []
    for g, block_row, block_column, row, column in itertools.product(range(2), range(2), range(3), range(2), range(2)):
        top, left = 28 * block_row + 14 * row, 28 * block_column + 14 * column
        expected.append(torch.cat([(x[2 * g + f, c, top:top + 14, left:left + 14].flatten() - MEAN[c]) / STD[c]
                                   for c in range(3) for f in range(2)]))
    torch.testing.assert_close(patches.double(), torch.stack(expected), rtol=0, atol=1e-5)


PAD = 7


def test_positions_by_hand():
    ids = [1, 1, 1] + [PAD] * 4 + [1, 1]  # two grids of 1 x 2 tokens, 2 s each at 1 frame a second
    assert position_ids(ids, (2, 2, 4), 1.0, PAD, 2).tolist() == [
        [0, 1, 2, 3, 3, 7, 7, 8, 9],   # 3 + floor(1 * 2 positions a second * 2 s)
        [0, 1, 2, 3, 3, 3, 3, 8, 9],
        [0, 1, 2, 3, 4, 3, 4, 8, 9]]   # the text goes on behind the largest, 7
    ids = [1] + [PAD] * 6 + [1]  # one grid, 2 x 3 tokens: now the width is the largest
    assert position_ids(ids, (1, 4, 6), 2.0, PAD, 2).tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(0, 9),
       st.sampled_from([0.8, 1.0, 1.92, 2.0, 3.0, 4.0]), st.sampled_from([2, 25]))
def test_positions_match_a_plain_loop(t, h, w, before, after, fps, tokens_per_second):
    expected = [(k, k, k) for k in range(before)]
    for g, y, x in itertools.product(range(t), range(h), range(w)):
        time = int(Fraction(g * tokens_per_second * 2) / Fraction(str(fps)))
        expected.append((before + time, before + y, before + x))
    top = 1 + max(max(p) for p in expected)
    expected += [(top + k,) * 3 for k in range(after)]
    ids = [1] * before + [PAD] * (t * h * w) + [1] * after
    assert position_ids(ids, (t, 2 * h, 2 * w), fps, PAD, tokens_per_second).T.tolist() == [list(p) for p in expected]


def test_time_is_counted_at_the_clips_true_rate_whatever_was_asked_for(model, tokenizer):
    # One frame a second: each step of two frames is 2 s, and the model counts two positions a second.
    clip = video.Clip(torch.zeros(4, 3, 28, 56, dtype=torch.uint8), np.arange(4.0), 1.0)
    processor = runtime.Processor(tokenizer, {"image_mean": MEAN, "image_std": STD}, None, None)
    settings = evaluate.EvalSettings(fps=2.0)
    item = data.Item(0, "tvg", clip)
    prompt = evaluate.build_prompt(model, processor, Sample("a.mp4", "q", 0.0, 1.0), item, settings)
    time = prompt.positions[0][prompt.ids == model.config.video_token_id]
    assert (time - time[0]).tolist() == [0, 0, 4, 4]


def test_visual_positions_agree_with_transformers_where_it_is_right(model, tokenizer):
    ids = torch.tensor([encode_prompt(tokenizer, "Where?", 3 * 2 * 4)])
    grid, pad = torch.tensor([[3, 4, 8]]), model.config.video_token_id
    types = (ids == pad).int() * 2
    last = int(types.nonzero()[-1, 1])
    for fps in (1.0, 2.0):  # whole seconds per grid: it truncates others; the text behind the video it places otherwise
        seconds = torch.tensor([2 / fps])
        theirs, _ = model.model.get_rope_index(ids, types, video_grid_thw=grid, second_per_grid_ts=seconds)
        ours = position_ids(ids[0], grid[0].tolist(), fps, pad, 2)
        assert ours[:, :last + 1].tolist() == theirs[:, 0, :last + 1].tolist()


# ---- The task sampler (Eq. 13)

def sampler(n=50, prompts=4, verbless=(), **options):
    return TaskSampler([i not in verbless for i in range(n)], prompts, **options)


def test_a_draw_depends_on_seed_and_iteration_alone():
    one, two, other = sampler(iterations=40), sampler(iterations=40), sampler(iterations=40, seed=1)
    assert two.index(33, 2, 1) == one.index(33, 2, 1)  # asked first, before any other draw
    np.random.seed(5)
    assert list(one) == list(two)
    for draw in (lambda s: [s.task(k) for k in range(40)], lambda s: [s.index(0, k) for k in range(4)],
                 lambda s: [s.index(0, 0, attempt) for attempt in range(1, 5)]):
        assert draw(one) != draw(other)
    assert [[(two.index(k, s), two.task(k)) for s in range(4)] for k in (30, 7)] == [list(one)[30], list(one)[7]]


def test_a_resumed_run_draws_what_the_uninterrupted_one_would():
    whole, shorter = list(sampler(verbless=range(20), iterations=30)), sampler(verbless=range(20), iterations=12)
    assert whole[:12] == list(shorter)
    resumed = sampler(verbless=range(20), iterations=30)
    assert [[(resumed.index(k, s), resumed.task(k)) for s in resumed.slots] for k in range(12, 30)] == whole[12:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_one_task_and_one_global_draw(world_size):
    options = dict(prompts=8, verbless=range(0, 50, 3), p=0.5, iterations=60, seed=3)
    single = list(sampler(**options))
    ranks = [list(sampler(**options, rank=r, world_size=world_size)) for r in range(world_size)]
    for iteration, parts in zip(single, zip(*ranks), strict=True):
        assert all(len(part) == 8 // world_size for part in parts)
        assert iteration == [slot for part in parts for slot in part]
        assert len({task for _, task in iteration}) == 1


def test_every_sample_comes_once_an_epoch():
    drawn = [index for slots in sampler(n=24, prompts=4, p=1, iterations=18) for index, _ in slots]  # 72 = 3 epochs
    epochs = [drawn[:24], drawn[24:48], drawn[48:]]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_an_epoch_may_end_inside_an_iteration():
    drawn = [index for slots in sampler(n=7, prompts=4, p=1, iterations=7) for index, _ in slots]  # 28 = 4 epochs
    assert Counter(drawn) == {i: 4 for i in range(7)}
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == list(range(7))


def test_tasks_come_as_often_as_equation_13_says():
    n, draw = 20_000, sampler(p=0.8)
    counts = Counter(draw.task(k) for k in range(n))
    for task, share in {"tvg": 0.8, "vc": 0.2 / 3, "ar": 0.2 / 3, "vd": 0.2 / 3}.items():
        assert abs(counts[task] - n * share) < 4 * math.sqrt(n * share * (1 - share)), task
    assert sum(counts.values()) == n and len(counts) == 4


def test_p_one_is_tvg_alone_p_zero_never_and_tasks_may_be_fewer():
    assert {sampler(p=1).task(k) for k in range(500)} == {"tvg"}
    assert {sampler(p=0).task(k) for k in range(500)} == {"vc", "ar", "vd"}
    assert {sampler(p=0.5, tasks=("ar",)).task(k) for k in range(500)} == {"tvg", "ar"}


def test_inversions_never_draw_a_query_without_a_verb():
    verbless = set(range(0, 50, 2))
    inversions, tvg = [], []
    for slots in sampler(verbless=verbless, p=0.5, iterations=400):
        (tvg if slots[0][1] == "tvg" else inversions).extend(index for index, _ in slots)
    assert not verbless & set(inversions) and verbless < set(tvg)
    assert set(inversions) == set(range(1, 50, 2))  # the redraws reach every sample that has one


def test_redraws_after_unreadable_videos_avoid_verbless_queries_too():
    draw = sampler(verbless=range(40), p=0)
    assert {draw.index(k, 0, attempt) for k in range(100) for attempt in range(8)} == set(range(40, 50))


def test_grounding_redraws_reach_every_row_though_no_query_has_a_verb():
    draw = sampler(n=10, verbless=range(10), p=1)
    assert {draw.index(0, 0, attempt) for attempt in range(1, 100)} == set(range(10))


def test_without_any_verb_only_tvg_is_possible():
    with pytest.raises(ValueError, match="--p 1"):
        sampler(verbless=range(50))
    assert len(list(sampler(verbless=range(50), p=1, iterations=3))) == 3


# ---- Training clips

def test_tvg_sees_the_whole_video_and_inversions_the_segment_alone(tmp_path):
    sample = Sample(str(make_video(tmp_path / "a.mp4")), "q", 1.0, 2.0)
    assert shown(read_clip(sample, "tvg")) == [0, 5, 10, 15, 20, 25, 30, 35]
    for task in data.INVERSION_TASKS:
        assert shown(read_clip(sample, task)) == [10, 15]


@pytest.fixture
def mixed(tmp_path):
    """Eight samples, of which the even ones have no readable video."""
    good, bad = make_video(tmp_path / "good.mp4", TEN_HZ[:10]), tmp_path / "bad.mp4"
    garbage(bad)
    return [Sample(str(good if i % 2 else bad), "q", 0.0, 0.5) for i in range(8)]


def test_an_unreadable_video_is_redrawn_with_the_same_task(mixed):
    draw = sampler(n=8, prompts=2, p=0.5)
    clips = TrainingClips(mixed, draw)
    items = [clips[k, s] for k in range(12) for s in range(2)]
    assert all(item.index % 2 and item.clip.frames.shape[0] == 2 for item in items)
    assert [item.task for item in items] == [draw.task(k) for k in range(12) for _ in range(2)]
    failed = [len(item.failures) for item in items]
    assert max(failed) > 1 and min(failed) == 0 and all("bad.mp4" in f for item in items for f in item.failures)
    again = [TrainingClips(mixed, draw)[k, s] for k in range(12) for s in range(2)]
    assert [(item.index, item.task, item.failures) for item in again] == [(i.index, i.task, i.failures) for i in items]


def test_eight_failures_hand_back_no_clip_and_the_list(mixed):
    item = TrainingClips(mixed[::2], sampler(n=4, prompts=2))[0, 1]
    assert item.clip is None and len(item.failures) == 8 and all("bad.mp4" in f for f in item.failures)


def test_demonstrations_keep_their_own_task(mixed):
    tasks = ["tvg", "vc", "ar", "vd"] * 2
    clips = TrainingClips(mixed, sampler(n=8, prompts=2, p=1), tasks, min_frame_pixels=1)
    for item in (clips[k, 0] for k in range(8)):
        assert item.task == tasks[item.index] and item.clip.frames.shape[2:] == (56, 56)  # and the limits arrive
