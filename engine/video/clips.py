"""Clips, decoded ahead of the loop by worker processes.

Where workers are spawned (macOS), each imports this module and what it names: no spaCy, no transformers.
"""

import collections
import contextlib
import math
import multiprocessing
import signal
import sys
import textwrap
from dataclasses import dataclass, field

from torch.utils.data import DataLoader, Dataset

from engine.program.ranks import current
from engine.program.settings import UserError
from engine.video.frames import Clip, VideoError, check_start, read_video
from engine.video.workers import begin_worker

PATIENCE = 600.0  # seconds after which a video that is still being decoded is an error


@dataclass
class Item:
    """What a worker hands to the loop: a decoded clip, and the videos that could not be read before it.

    The clip is None where every candidate failed. Its frames are a NumPy array: those travel through a pipe, while
    tensors need shared memory, of which a container has 64 MB, or a descriptor each.
    """

    index: int  # of the sample
    task: str
    clip: Clip | None
    failures: list[str] = field(default_factory=list)


def read_clip(sample, task: str, **clip_settings) -> Clip:
    """The whole video for TVG, the ground-truth segment alone for an inversion task (Eq. 2).

    Where the video is an excerpt of its file, nothing outside of that is read; the `end` of a clip for TVG then counts
    from its beginning, as the sample's own times do, and the frames' times count in the file.
    """
    start, end = sample.excerpt or (0.0, math.inf)
    if task == "tvg":
        clip = read_video(sample.video, start=start, end=end, **clip_settings)
        return clip._replace(end=min(end, clip.end or math.inf) - start)
    check_start(sample.video, sample.start, end - start)
    return read_video(sample.video, start=start + sample.start, end=start + sample.end, until=end, **clip_settings)


def frames_in_words(clip: Clip, path: str) -> str:
    """Size, rate and true times of a clip's frames, in lines for the screen."""
    height, width = clip.frames.shape[2:]
    times = textwrap.fill(", ".join(f"{t:.2f}" for t in clip.times), 118)
    size = f"{width} x {height} pixels"
    return f"{len(clip.times)} frames of {size}, {clip.fps:g} a second, from {path} at these seconds:\n{times}"


class Clips(Dataset):
    """Indexed by candidates, (sample index, task) pairs: decodes the first one whose video can be read.

    A segment that starts after its video ends is unreadable, too: always for an inversion, which shows it, and for
    grounding where `for_training`. Evaluation keeps every row.
    """

    def __init__(self, samples, clip_settings, for_training=True):
        self.samples = samples
        self.clip_settings = clip_settings
        self.for_training = for_training

    def __getitem__(self, candidates) -> Item:
        failures = []
        for index, task in candidates:
            sample = self.samples[index]
            try:
                clip = read_clip(sample, task, **self.clip_settings)
                if task == "tvg" and self.for_training:
                    check_start(sample.video, sample.start, clip.end)
                return Item(index, task, clip._replace(frames=clip.frames.numpy()), failures)
            except VideoError as error:
                failures.append(str(error))
        return Item(index, task, None, failures)


def read_ahead(clips: Clips, batches, workers: int):
    """For each of `batches`, a list of candidates, yield the list of its Items; `workers` processes decode ahead.

    Raises UserError, which names the videos, when a batch has not come after ten minutes or a worker has died.
    """
    asked_for = collections.deque()  # the batches that workers were asked for, oldest first

    def noting():
        for batch in batches:
            asked_for.append(batch)
            yield batch

    of_workers = {}
    if workers:
        of_workers = {"worker_init_fn": begin_worker, "prefetch_factor": 2, "timeout": PATIENCE,
                      "multiprocessing_context": _start_method()}
    loader = DataLoader(clips, batch_sampler=noting(), num_workers=workers, collate_fn=_unchanged, **of_workers)
    with _quiet_start():
        arriving = iter(loader)
    while True:
        try:
            items = next(arriving)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            first = [candidates[0] for candidates in asked_for[0]]
            current.videos = sorted({clips.samples[index].video for index, _ in first})
            raise UserError(f"{', '.join(current.videos)}: not decoded within {PATIENCE:g} seconds, or a worker was "
                            "killed (by a lack of memory, say); look at the files, or lower --workers.") from error
        asked_for.popleft()
        current.videos = [clips.samples[item.index].video for item in items]
        yield items


def _start_method():
    """Fork where that is safe, also with Python 3.14, whose default on Linux it is no longer."""
    return "fork" if sys.platform == "linux" else "spawn"


@contextlib.contextmanager
def _quiet_start():
    """Start workers without the main script, which a spawned one would import, and let Ctrl-C wait until they have."""
    main = sys.modules["__main__"].__dict__
    names = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.pop("__file__", None)
    main["__spec__"] = None
    interrupts = []
    multiprocessing.get_context(_start_method()).Lock()  # starts spawn's tracker, which would end the blocking below
    handler = signal.signal(signal.SIGINT, lambda *arguments: interrupts.append(arguments))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers inherit it until they have begun
    try:
        yield
    finally:
        main.update(names)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if interrupts:
        signal.raise_signal(signal.SIGINT)


def _unchanged(batch):
    return batch
