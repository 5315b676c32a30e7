"""engine/video/clips.py: what workers decode, under every way of starting them, and what happens when one is lost."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shared import ROOT, TEN_HZ, measure, shown, train, weights_of, write_video

from data import Sample, TaskSampler
from engine.program.settings import UserError
from engine.run.predictions import read_predictions
from engine.video import clips
from engine.video.clips import Clips, read_ahead, read_clip
from engine.video.frames import VideoError
from evaluate import EvalSettings
from rewards import INVERSIONS

multiprocessing.set_forkserver_preload(["av", "torch.utils.data"])  # loaded once for all workers of the tests here

# ---- One clip


def test_tvg_sees_the_whole_video_and_inversions_the_segment_alone(tmp_path):
    sample = Sample(str(write_video(tmp_path / "a.mp4")), "q", 1.0, 2.0)
    assert shown(read_clip(sample, "tvg")) == [0, 5, 10, 15, 20, 25, 30, 35]
    for task in INVERSIONS:
        assert shown(read_clip(sample, task)) == [10, 15]


def test_of_an_excerpt_nothing_outside_is_read_and_times_count_from_its_beginning(tmp_path):
    video = str(write_video(tmp_path / "a.mp4"))  # frame i at i / 10 s, to 3.9 s
    sample = Sample(video, "q", 0.5, 1.5, excerpt=(1.0, 3.0))
    assert shown(read_clip(sample, "tvg")) == [10, 15, 20, 25]
    beyond = Sample(video, "q", 1.0, 3.0, excerpt=(1.0, 3.0))  # its segment ends after the excerpt
    for task in INVERSIONS:
        assert shown(read_clip(sample, task)) == [15, 20]
        assert shown(read_clip(beyond, task)) == [20, 25]
    at_its_end = Sample(video, "q", 2.0, 2.5, excerpt=(1.0, 3.0))
    after_its_end = Sample(video, "q", 2.1, 2.5, excerpt=(1.0, 3.0))
    for task in INVERSIONS:
        assert shown(read_clip(at_its_end, task)) == [25, 30]  # widened to the left, as at a file's end
        with pytest.raises(VideoError, match="the segment starts at 2.1 s, after the video's end at 2 s"):
            read_clip(after_its_end, task)
    assert read_clip(sample, "tvg").end == 2
    over = Sample(video, "q", 1.0, 1.5, excerpt=(3.0, 9.0))  # the file ends at 4 s, its excerpt's first second
    assert read_clip(over, "tvg").end == pytest.approx(1, abs=0.11)
    late = Sample(video, "q", 1.5, 2.0, excerpt=(3.0, 9.0))
    assert Clips([over], {})[[(0, "tvg")]].clip and Clips([late], {})[[(0, "tvg")]].clip is None
    assert Clips([sample], {})[[(0, "tvg")]].clip


@pytest.fixture
def mixed(tmp_path):
    """Eight samples, of which the even ones have no readable video."""
    good = write_video(tmp_path / "good.mp4", TEN_HZ[:10])
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(bytes(range(256)) * 40)
    return [Sample(str(good if i % 2 else bad), "q", 0.0, 0.5) for i in range(8)]


def test_the_first_candidate_that_can_be_read_counts_and_the_failures_before_it_are_noted(mixed):
    item = Clips(mixed, {"min_frame_pixels": 1})[[(2, "vc"), (4, "vc"), (5, "vc"), (7, "vc")]]
    assert (item.index, item.task) == (5, "vc")
    assert len(item.failures) == 2 and all("bad.mp4" in failure for failure in item.failures)
    assert item.clip.frames.shape == (2, 3, 56, 56)  # and the settings arrive
    assert isinstance(item.clip.frames, np.ndarray)  # no shared memory is needed


def test_without_a_readable_candidate_there_is_no_clip_but_the_list(mixed):
    item = Clips(mixed, {})[[(0, "ar"), (2, "ar"), (4, "ar")]]
    assert item.clip is None and len(item.failures) == 3


def test_grounding_a_segment_after_the_videos_end_is_nothing_to_train_on_but_a_row_to_evaluate(mixed):
    late = Sample(mixed[1].video, "q", 20.0, 25.0, duration=28.8)  # the video has one second
    item = Clips([late, mixed[1]], {})[[(0, "tvg"), (1, "tvg")]]
    assert item.index == 1
    assert item.failures == [f"{late.video}: the segment starts at 20 s, after the video's end at 1 s."]
    kept = Clips([late], {}, for_training=False)
    assert kept[[(0, "tvg")]].clip.end == pytest.approx(1)
    assert kept[[(0, "vc")]].failures == item.failures  # there is nothing to show


# ---- Workers


@pytest.mark.parametrize("workers, method", [(0, None), (2, "fork"), (1, "spawn"), (1, "forkserver")])
def test_clips_come_in_order_and_the_same_however_workers_are_started(mixed, monkeypatch, workers, method):
    monkeypatch.setattr(clips, "_start_method", lambda: method)
    draw = TaskSampler(8, {"vc": [True] * 8}, prompts=2, p=0.5)
    batches = [[draw.candidates(k, slot) for slot in draw.slots] for k in range(4)]
    found = list(read_ahead(Clips(mixed, {}), iter(batches), workers))
    expected = [[Clips(mixed, {})[candidates] for candidates in batch] for batch in batches]
    for items, others in zip(found, expected, strict=True):
        for item, other in zip(items, others, strict=True):
            assert (item.index, item.task, item.failures) == (other.index, other.task, other.failures)
            assert np.array_equal(item.clip.frames, other.clip.frames)


METHODS = ("fork", "spawn", "forkserver")


def test_training_and_evaluation_are_the_same_bit_for_bit_however_workers_are_started(lively, monkeypatch, tmp_path):
    found = []
    for method in METHODS:
        monkeypatch.setattr(clips, "_start_method", lambda method=method: method)
        output = train(lively, workers=1, iterations=2, output=str(tmp_path / method))
        settings = EvalSettings(model=output, annotations=lively.annotations, videos=lively.videos, workers=1,
                                micro_batch=2, max_new_tokens=20, output=str(tmp_path / f"{method}-test"))
        found.append((weights_of(output), measure(settings), read_predictions(settings.output)))
    weights, *results = found[0]
    start = load_file(f"{lively.model}/model.safetensors")
    assert any(not torch.equal(weights[name], weight) for name, weight in start.items())  # it has learned
    for other_weights, *other_results in found[1:]:
        assert other_results == results
        assert all(torch.equal(other_weights[name], weight) for name, weight in weights.items())


def test_the_demos_data_is_the_same_however_its_workers_are_started(monkeypatch, tmp_path):
    make_demo = pytest.importorskip("demo.make_demo")
    made = []
    for method in METHODS:
        pool = functools.partial(ProcessPoolExecutor, 2, multiprocessing.get_context(method))
        monkeypatch.setattr(make_demo, "ProcessPoolExecutor", pool)
        make_demo.main([str(tmp_path / method), "--videos", "2", "1", "1"])
        files = sorted(path for path in (tmp_path / method).rglob("*") if path.is_file())
        made.append({path.relative_to(tmp_path / method): path.read_bytes() for path in files})
    assert made[0] == made[1] == made[2]
    assert sum(path.suffix == ".mp4" for path in made[0]) == 5  # and one for transfer


def test_what_a_spawned_worker_imports_is_small_and_not_the_main_script(tmp_path):
    # The script says so whenever it is imported; its worker imports engine.video.clips alone.
    write_video(tmp_path / "a.mp4", TEN_HZ[:10])
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
        print("imported")
        import sys
        from engine.video import clips
        from engine.words.samples import Sample
        print(*{{"spacy", "transformers", "rewards", "data", "grpo"}} & sys.modules.keys())
        clips._start_method = lambda: "spawn"
        samples = [Sample({str(tmp_path / "a.mp4")!r}, "q", 0.0, 0.5)]
        for items in clips.read_ahead(clips.Clips(samples, {{}}), [[[(0, "tvg")]]] * 3, 1):
            print(items[0].index)
    """))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == ["imported", "0", "0", "0"], done.stderr


def test_a_video_that_never_ends_is_an_error_that_names_it_not_a_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # how long a worker may take to end
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it waits for a writer that never comes
    good = Sample(str(write_video(tmp_path / "a.mp4", TEN_HZ[:10])), "q", 0.0, 0.5)
    samples = [good, Sample(str(tmp_path / "pipe.mp4"), "q", 0.0, 0.5)]
    patience = 3 if clips._start_method() == "fork" else 30  # the first wait includes the worker's imports
    monkeypatch.setattr(clips, "PATIENCE", float(patience))
    arriving = read_ahead(Clips(samples, {}), [[[(0, "tvg")]], [[(1, "tvg")]]], 1)
    assert next(arriving)[0].index == 0
    with pytest.raises(UserError, match=f"pipe.mp4: not decoded within {patience} seconds"):
        next(arriving)


def test_a_worker_that_is_killed_is_an_error_that_names_its_video(tmp_path, monkeypatch):
    def kill():
        while not multiprocessing.active_children():
            time.sleep(0.01)
        multiprocessing.active_children()[0].kill()

    os.mkfifo(tmp_path / "a.mp4")  # the worker waits
    samples = [Sample(str(tmp_path / "a.mp4"), "q", 0.0, 0.5)]
    threading.Thread(target=kill).start()
    patience = 30 if clips._start_method() == "forkserver" else 600  # its workers are not our children: no signal comes
    monkeypatch.setattr(clips, "PATIENCE", float(patience))
    with pytest.raises(UserError, match="a.mp4: not decoded .* or a worker was killed"):
        next(read_ahead(Clips(samples, {}), [[[(0, "tvg")]]], 1))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_ctrl_c_while_workers_start_waits_until_they_have_and_does_not_reach_them(monkeypatch, method):
    monkeypatch.setattr(clips, "_start_method", lambda: method)
    with pytest.raises(KeyboardInterrupt):
        with clips._quiet_start():
            signal.raise_signal(signal.SIGINT)
            worker = multiprocessing.get_context(method).Process(target=time.sleep, args=(1,))
            worker.start()
            os.kill(worker.pid, signal.SIGINT)
    worker.join()
    assert worker.exitcode == 0
