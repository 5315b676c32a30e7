"""engine/video/frames.py: videos made to be odd, in every container; frame sizes by hand."""

import itertools
import math
import struct

import av
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from shared import TEN_HZ, shown, write_video

from engine.video import frames, stream
from engine.video.frames import MAX_PIXELS, VideoError, fit_size, read_video
from engine.video.packets import Packet, end_of_pictures
from engine.words.samples import Sample, clamp_to_videos


@pytest.fixture
def looked_at(monkeypatch):
    """The times of the frames decoded during a test."""
    times, time_of = [], stream.Stream.time_of

    def spy(self, x):
        t = time_of(self, x)
        if isinstance(x, av.VideoFrame):
            times.append(t)
        return t

    monkeypatch.setattr(stream.Stream, "time_of", spy)
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
    path = write_video(tmp_path / name, **KINDS[name])
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
    "transport stream.mp4": B_FRAMES | {"g": "40", "container": "mpegts", "unit": 90000},  # seek(0) passes a group
    "open groups.ts": OPEN | {"unit": 90000},
    "intra refresh.ts": {"preset": "medium", "x264-params": "intra-refresh=1:keyint=20", "unit": 90000},
    "intra refresh.mp4": {"preset": "medium", "x264-params": "intra-refresh=1:keyint=40"},
    "b-frames.avi": B_FRAMES | {"unit": 10},  # states no presentation times
    "b-frames.asf": B_FRAMES,
    "late.mkv": B_FRAMES | {"g": "40"},
}


def moving(frames, side):
    """(frames, side, side, 3): a window that slides over noise, so that frames are predicted and no two are alike."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8).repeat(12, 0).repeat(12, 1)
    return np.stack([noise[k:k + side, 2 * k:2 * k + side] for k in range(frames)])


@pytest.mark.parametrize("name", SKIPPED)
def test_clips_are_those_of_decoding_every_frame(name, tmp_path):
    late = 10 if name == "late.mkv" else 0
    path = write_video(tmp_path / name, [late + k / 10 for k in range(120)], picture=moving(120, 56), **SKIPPED[name])
    with av.open(str(path)) as file:
        stream, zero = file.streams.video[0], (file.start_time or 0) / av.time_base
        stream.codec_context.thread_count = 1
        frames = [(f.dts if f.pts is None else f.pts, f.to_ndarray(format="rgb24", interpolation="BICUBIC"))
                  for f in file.decode(stream)]
        if name in ("b-frames.avi", "b-frames.asf"):
            truth = {k / 10: frame for k, (_, frame) in enumerate(frames)}
        else:
            truth = {stamp * float(stream.time_base) - zero: frame for stamp, frame in frames}
    assert len(truth) == 120
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
    path = write_video(tmp_path / "a.mp4", [k / 10 for k in range(120)], picture=moving(120, 56), **options)
    assert len(read_video(path, **segment).times) == (6 if segment else 24)
    assert len(looked_at) <= most


def test_a_wanted_frame_that_does_not_come_gives_way_to_the_next_nearest(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", bf="3", preset="medium")
    frames = stream.Stream.frames
    monkeypatch.setattr(stream.Stream, "frames", lambda *args: (f for f in frames(*args) if not 0.95 < f.time < 1.05))
    assert shown(read_video(path)) == [0, 5, 9, 15, 20, 25, 30, 35]


def test_threads_change_no_pixel(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", picture=moving(40, 400), size=(400, 400), **B_FRAMES)
    clips = []
    for threads in 1, 4:  # 400 x 400 is enough for two
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        clips += [read_video(path), read_video(path, start=1.0, end=2.0)]
    for one, many in zip(clips[:2], clips[2:], strict=True):
        assert torch.equal(one.frames, many.frames) and np.array_equal(one.times, many.times)


def test_variable_frame_rate_uses_true_times(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0, 0.1, 0.2, 1.3, 1.6, 1.9, 3.0])
    clip = read_video(path)  # seven frames in 3 s: the last one lasts 0.5 s, too
    #                           targets: 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5
    assert shown(clip) == [0, 2, 3, 4, 5, 6, 6, 6]
    assert clip.times.tolist() == pytest.approx([0, 0.2, 1.3, 1.6, 1.9, 3, 3, 3])


@settings(max_examples=12, deadline=None)
@given(gaps=st.lists(st.integers(20, 900), min_size=1, max_size=30), bf=st.sampled_from("03"),
       start=st.integers(0, 2000), length=st.integers(0, 4000))
@example(gaps=[20] * 7, bf="0", start=140, length=0)  # from the last key frame on there is one frame alone
@example(gaps=[200] * 7 + [20] * 4, bf="0", start=1400, length=0)  # the gaps from there on are not the file's
def test_frames_are_the_nearest_to_their_targets(tmp_path_factory, gaps, bf, start, length):
    stamps = list(itertools.accumulate(gaps, initial=0))  # milliseconds
    path = tmp_path_factory.mktemp("v") / "a.mp4"
    write_video(path, [s / 1000 for s in stamps], bf=bf, preset="veryfast", g="7")
    try:
        clip = read_video(path, start=start / 1000, end=(start + length) / 1000, min_frame_pixels=1)
    except VideoError as error:
        assert "after the video's end" in str(error) and start >= stamps[-1] + min(gaps)
        return
    frames = shown(clip)
    assert len(frames) % 2 == 0 and clip.times.tolist() == pytest.approx([stamps[i] / 1000 for i in frames], abs=1e-6)

    def are_nearest(last_frame_lasts):
        first = min(start, max(0, stamps[-1] + last_frame_lasts - 500))  # a segment at the end is widened to the left
        for k, i in enumerate(frames[:-1]):
            distances = [abs(s - first - 500 * k) for s in stamps]
            if distances[i] > min(distances) + 2:  # ties, and half milliseconds of the end
                return False
        return True

    # How long the last frame is shown no file tells for certain: as long as another one.
    assert any(are_nearest(lasts) for lasts in range(min(gaps), max(gaps) + 1))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_time_zero_is_the_players_even_if_only_sound_starts_there(name, tmp_path):
    path = write_video(tmp_path / name, [0.8 + t for t in TEN_HZ], audio_from=0)
    clip = read_video(path)  # frame k at k / 2 s, as `fps` promises; the first picture stands until there is another
    assert shown(clip)[:4] == [0, 0, 2, 7] and clip.times[:4].tolist() == pytest.approx([0.8, 0.8, 1.0, 1.5])
    part = read_video(path, start=2.0, end=3.0)
    assert shown(part) == [12, 17] and part.times.tolist() == pytest.approx([2.0, 2.5])


def set_rotation(path, clockwise, mirrored=False):
    """Write a turn, after it a change of left and right, into an mp4's display matrix, as telephones do."""
    a, b = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[clockwise]
    c, d = -b, a
    if mirrored:
        a, c = -a, -c
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0: 40 bytes of flags, times, id and duration, then the matrix
    struct.pack_into(">9i", content, at, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_a_turned_or_mirrored_video_is_seen_upright(clockwise, mirrored, tmp_path):
    picture = np.zeros((56, 84, 3), np.uint8)
    picture[:28, :42] = 60  # four quarters, each of its own
    picture[:28, 42:] = 120
    picture[28:, :42] = 180
    picture[28:, 42:] = 240
    path = write_video(tmp_path / "a.mp4", picture=picture, size=(56, 84))
    set_rotation(path, clockwise, mirrored)
    seen = np.rot90(picture, -clockwise // 90)
    if mirrored:
        seen = seen[:, ::-1]
    frames = read_video(path, min_frame_pixels=1).frames
    assert frames.shape[2:] == seen.shape[:2]
    assert abs(frames[3].permute(1, 2, 0).float().numpy() - seen).mean() < 8


def test_odd_sizes_are_read_and_colours_stay_in_place(tmp_path):
    picture = np.zeros((75, 101, 3), np.uint8)
    picture[:] = 200, 100, 50
    clip = read_video(write_video(tmp_path / "a.mp4", picture=picture, size=(75, 101), pixels="yuv444p"))
    assert clip.frames.shape == (8, 3, 112, 140)  # both sides scaled up to 16 tokens at least: 4 x 5
    assert clip.frames.float().mean((0, 2, 3)).tolist() == pytest.approx([200, 100, 50], abs=6)


def test_a_stated_duration_is_not_needed(tmp_path):
    path = write_video(tmp_path / "a.webm", codec="libvpx", container_options={"live": "1"})
    assert stream.video_duration(str(path)) is None
    assert clamp_to_videos([Sample(str(path), "q", 1.0, 9.0)])[1:] == (0, [])
    assert shown(read_video(path, start=3.0, end=9.0)) == [30, 35]


def test_one_frame_a_second_repeats_frames(tmp_path):
    clip = read_video(write_video(tmp_path / "a.mp4", range(4)))
    assert clip.times.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and shown(clip) == clip.times.tolist()


def test_a_single_frame_makes_a_clip_of_two(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0])
    assert read_video(path).times.tolist() == [0, 0]
    assert read_video(path, start=0.0, end=4.0).times.tolist() == [0, 0]


@pytest.mark.parametrize("start, end, frames", [
    (1.0, 1.2, [10, 15]), (1.0, 1.0, [10, 15]), (2.0, 1.0, [20, 25]),  # widened to half a second
    (3.85, 3.88, [35, 39]), (3.5, 9.0, [35, 39]),  # to the left where the video ends; 4.0 -> the last
    (4.0, 8.0, [35, 39]), (0.0, 0.1, [0, 5])])
def test_short_segments_have_two_frames_at_the_true_rate(start, end, frames, tmp_path):
    clip = read_video(write_video(tmp_path / "a.mp4"), start=start, end=end)
    assert shown(clip) == frames and clip.fps == 2.0


def test_a_segment_decodes_only_from_the_key_frame_before_it(tmp_path, looked_at):
    path = write_video(tmp_path / "a.mp4", [k / 10 for k in range(300)], g="10")  # a key frame a second
    clip = read_video(path, start=20.4, end=21.4)
    assert clip.times.tolist() == pytest.approx([20.4, 20.9])
    assert min(looked_at) == pytest.approx(20.0) and len(looked_at) <= 11  # 20.0 to 21.0 of 30 seconds


def test_beyond_768_frames_the_rate_falls_and_is_stated(tmp_path):
    path = write_video(tmp_path / "a.mp4", range(480), size=(28, 28))
    clip = read_video(path, min_frame_pixels=1)  # 960 frames at 2 Hz
    assert clip.frames.shape == (768, 3, 28, 28) and clip.fps == pytest.approx(1.6)
    assert abs(clip.times - np.arange(768) / 1.6).max() <= 0.5 + 1e-6 and clip.times[-1] == 479


@given(st.floats(0, 1000), st.floats(0.5, 2000), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_targets_are_even_in_number_and_one_period_apart(start, length, fps):
    targets, rate = frames._targets(start, start + max(length, 1 / fps), fps)
    assert 2 <= len(targets) <= 768 and len(targets) % 2 == 0 and rate <= fps
    assert np.allclose(np.diff(targets)[:-1], 1 / rate) and 0 <= targets[-1] - targets[-2] <= 1 / rate + 1e-9
    assert targets[0] == pytest.approx(start) and targets[-1] <= start + max(length, 1 / fps) + 1e-9
    assert start + length - targets[-1] <= 1 / rate + 1e-5  # up to the end


def test_of_two_frames_that_are_equally_near_the_earlier_is_taken():
    known, targets = np.array([0.0, 1.0, 2.0]), np.array([-1.0, 0.5, 1.5, 1.75, 9.0])
    assert frames._nearest_times(known, targets).tolist() == [0, 0, 1, 2, 2]


def test_when_the_last_picture_ends_by_hand():
    def ends(last, stated=0.0, times=(0.0, 4.0, 1.0)):  # in the file's order: 1 s, then 3 s apart, on the mean 2
        packets = [Packet(-9.0, 0, is_shown=False)]  # before an mp4's edit list begins
        packets += [Packet(t, 1, duration=last if t == max(times) else 1.0) for t in times]
        return end_of_pictures(packets, stated, default=0.5)

    assert ends(1.5) == 5.5  # what it states; it lasts longer than another one
    assert ends(0.04) == ends(0.0) == 6  # a nominal rate's, or nothing
    assert ends(9.0, stated=5.0) == 6 and ends(2.5, stated=5.0) == 6.5  # a file may end a picture later than it states
    assert ends(0.0, times=(4.0,)) == 4.5 and ends(3.0, times=(4.0,)) == 7


def test_a_segment_behind_the_last_key_frame_lasts_as_long_as_the_pictures_before_it_tell(tmp_path):
    path = write_video(tmp_path / "a.mkv", range(0, 10, 2), g="1")  # key frames alone, two seconds each, to 10 s
    assert shown(read_video(path, start=9.5, end=9.9)) == [4, 4]


def garbage(path):
    path.write_bytes(bytes(range(256)) * 40)


def empty(path):
    path.touch()


def absent(path):
    pass


def truncated(path):
    write_video(path)
    path.write_bytes(path.read_bytes()[:-400])  # the index stands at the end of an mp4


def sound_only(path):
    with av.open(str(path), "w") as file:
        audio = file.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 16000, 0
        file.mux(audio.encode(silence))
        file.mux(audio.encode())


def spoiled(path):
    write_video(path, container_options={"movflags": "faststart"})
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
    path = write_video(tmp_path / "a.mkv")
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    frames = shown(read_video(path))
    assert frames[:3] == [0, 5, 10] and 2 <= len(frames) < 8  # its header still promises four seconds


def remux(path, new, change=lambda packet: None, metadata=None, thumbnail=False):
    """Copy a video's packets, each `change`d, into the file `new`; a `thumbnail` is a first stream of one picture."""
    with av.open(str(path)) as source, av.open(str(new), "w") as file:
        file.metadata.update(metadata or {})
        if thumbnail:
            small = file.add_stream("mjpeg", rate=1)
            small.width, small.height, small.pix_fmt = 28, 28, "yuvj420p"
        stream = file.add_stream_from_template(source.streams.video[0])
        if thumbnail:
            picture = av.VideoFrame.from_ndarray(np.zeros((28, 28, 3), np.uint8), format="rgb24")
            picture.pts = 0
            file.mux(small.encode(picture))
            file.mux(small.encode())
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                change(packet)
                packet.stream = stream
                file.mux(packet)
    return new


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_the_last_packets_stated_duration_counts(name, tmp_path):
    def stay(packet):  # a slide that is shown to the end
        packet.duration = round((52 if packet.pts * packet.time_base > 7 else 2) / packet.time_base)

    path = remux(write_video(tmp_path / "short.mp4", range(0, 10, 2)), tmp_path / name, stay)
    clip = read_video(path, fps=0.5)  # 60 seconds
    assert shown(clip) == [0, 1, 2, 3] + 26 * [4]
    assert shown(read_video(path, start=50, end=70)) == 20 * [4]  # up to 60 s


def test_a_gifs_last_picture_lasts_as_long_as_it_says(tmp_path):
    def stay(packet):
        packet.duration = 1000 if packet.pts >= 100 else 100  # hundredths of a second

    path = write_video(tmp_path / "short.gif", [0, 1], codec="gif", pixels="rgb8", unit=100)
    clip = read_video(remux(path, tmp_path / "a.gif", stay))
    assert len(clip.times) == 22 and clip.times.tolist() == [0, 0] + [1] * 20  # 11 seconds


def test_titles_need_not_be_utf_8(tmp_path):
    path = remux(write_video(tmp_path / "a.mp4"), tmp_path / "b.mp4", metadata={"title": "a title"})
    path.write_bytes(path.read_bytes().replace(b"a title", b"caf\xe9 \xfc\xdf"))
    assert shown(read_video(path)) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert stream.video_duration(str(path)) == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.mp4"])
def test_a_thumbnail_beside_the_video_is_not_the_video(name, tmp_path):
    path = write_video(tmp_path / "without.avi", codec="mpeg4", unit=10)
    clip = read_video(remux(path, tmp_path / name, thumbnail=True))
    assert shown(clip) == [0, 5, 10, 15, 20, 25, 30, 35]


def joined(path, times, sizes):
    """MPEG-TS recordings, one after the other in one file."""
    parts = []
    for part_times, size in zip(times, sizes):
        parts.append(write_video(path.with_name("part.ts"), part_times, size=size, unit=90000).read_bytes())
    path.write_bytes(b"".join(parts))
    return path


def test_where_the_size_changes_frames_take_that_of_the_first_wanted_one(tmp_path):
    path = joined(tmp_path / "a.ts", [TEN_HZ, [4 + t for t in TEN_HZ]], [(112, 112), (168, 224)])
    clip = read_video(path)
    assert clip.frames.shape == (16, 3, 112, 112) and shown(clip) == 2 * [0, 5, 10, 15, 20, 25, 30, 35]
    assert read_video(path, start=5, end=7).frames.shape == (4, 3, 168, 224)


def test_joined_parts_whose_times_start_again_are_said_not_guessed(tmp_path):
    path = joined(tmp_path / "a.ts", [TEN_HZ, TEN_HZ], [(56, 56), (56, 56)])
    with pytest.raises(VideoError, match="a.ts: .*its times go back from 3.9 to 0 s"):
        read_video(path)


def test_a_recording_that_begins_within_a_group_stands_at_its_first_whole_picture(tmp_path):
    path = write_video(tmp_path / "a.ts", picture=moving(40, 56), unit=90000, g="12")
    content = path.read_bytes()
    at = content.index(b"\x47", 188 * (len(content) // 188 // 5))
    path.write_bytes(content[:188 * 3] + content[at - at % 188:])  # the tables, then from the first group's middle on
    clip = read_video(path)
    assert len(clip.times) in (6, 8) and (abs(np.diff(clip.times)) <= 0.61).all()


def test_mpeg_ps_is_read_whole_and_cut(tmp_path):
    times = [k / 25 for k in range(100)]
    path = write_video(tmp_path / "a.mpg", times, codec="mpeg2video", container="mpeg", unit=25, bf="2")
    greys = np.array([0, 12, 25, 37, 50, 62, 75, 87]) % 41  # as `write_video` paints them
    assert abs(shown(read_video(path)) - greys).max() <= 2
    assert read_video(path).times.tolist() == pytest.approx(np.arange(8) / 2, abs=0.021)
    assert read_video(path, start=1.0, end=3.0).times.tolist() == pytest.approx([1, 1.5, 2, 2.5], abs=0.021)


def test_times_that_only_some_packets_state_are_spaced_evenly_between(tmp_path):
    path = write_video(tmp_path / "a.vob", [k / 10 for k in range(60)], unit=90000, picture=moving(60, 56), **B_FRAMES)
    assert read_video(path).times.tolist() == pytest.approx(np.arange(12) / 2, abs=0.11)
    assert read_video(path, start=2.0, end=4.0).times.tolist() == pytest.approx([2, 2.5, 3, 3.5], abs=0.11)


def test_segments_of_an_intra_refresh_video_are_whole_pictures(tmp_path):
    options = {"preset": "medium", "x264-params": "intra-refresh=1:keyint=20", "unit": 90000}
    path = write_video(tmp_path / "a.ts", [k / 10 for k in range(80)], picture=moving(80, 56), **options)
    whole = read_video(path, min_frame_pixels=1)
    for k in range(1, 14):
        part = read_video(path, start=k / 2, end=k / 2 + 1, min_frame_pixels=1)
        assert torch.equal(part.frames, whole.frames[k:k + 2])


def test_a_frame_that_does_not_come_is_an_error_not_another_frame(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", bf="3", preset="medium")
    frames = stream.Stream.frames
    monkeypatch.setattr(stream.Stream, "frames", lambda *args: (f for f in frames(*args) if not 0.6 < f.time < 1.8))
    with pytest.raises(VideoError, match="a.mp4: .*for the frame at 1 s none nearer than that at 0.6 s decodes"):
        read_video(path)


def test_a_segment_after_the_videos_end_is_an_error_that_says_so(tmp_path):
    path = write_video(tmp_path / "a.mp4", [k / 10 for k in range(95)])
    with pytest.raises(VideoError, match=r"a.mp4: the segment starts at 20 s, after the video's end at 9.5 s\."):
        read_video(path, start=20.0, end=25.0)
    assert read_video(path, start=9.0, end=25.0).times.tolist() == pytest.approx([9.0, 9.4], abs=0.11)
    assert read_video(path).end == pytest.approx(9.5) and read_video(path, start=1, end=2).end is None


# ---- Frame sizes

@pytest.mark.parametrize("height, width, frames, expected, tokens", [
    (270, 480, 60, (224, 392), 3360),    # 30 s: 30 grids of 8 x 14
    (270, 480, 240, (112, 196), 3360),   # 120 s: 120 grids of 4 x 7
    (360, 640, 300, (84, 168), 2700),
    (360, 640, 768, (84, 140), 5760),    # beyond 448 frames 16 tokens a grid may exceed the budget
    (675, 1792, 300, (84, 196), 3150),   # 18,732.37 pixels a frame: the fraction is not cut off
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
    path = write_video(tmp_path / "a.mp4", size=(112, 168))
    assert read_video(path).frames.shape[2:] == (112, 168)
    assert read_video(path, max_pixels=4 * 6 * 784, min_frame_pixels=1).frames.shape[2:] == (56, 84)  # 4 grids of 2 x 3
    assert read_video(path, max_pixels=4 * 6 * 784).frames.shape[2:] == (84, 112)  # 16 tokens a grid are always granted
    assert read_video(path, max_frame_pixels=2 * 3 * 784, min_frame_pixels=1).frames.shape[2:] == (56, 84)
