"""A sample: a query, its segment, and where both lie in a video. Times are seconds."""

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.video.stream import video_duration


@dataclass(frozen=True)
class Sample:
    """A query and its segment: `start` and `end` in seconds, `duration` in seconds or None where not annotated.

    `qid` is the annotation's own id of the query, or the row's place in its file. `folder` is the video's place inside
    the video folder, for annotations that name one. `excerpt` is the part of the file that is the sample's video, from
    and to these of the file's seconds; all times of the sample count from its beginning. None: the whole file.
    `alternatives` are further segments that answer the query; a measurement counts the best one.
    """

    video: str
    query: str
    start: float
    end: float
    duration: float | None = None
    qid: str = ""
    folder: str = field(default="", compare=False)
    excerpt: tuple[float, float] | None = None
    alternatives: tuple[tuple[float, float], ...] = ()

    def video_name(self):
        """The video as an annotation names it: its path inside the video folder."""
        return "/".join(filter(None, (self.folder, Path(self.video).name)))

    def by_segment(self):
        """-> the sample with each of the segments that answer its query, one at a time."""
        return [self, *(replace(self, start=start, end=end) for start, end in self.alternatives)]


@dataclass(frozen=True)
class Demonstration:
    """A completion to imitate, for the supervised stages."""

    sample: Sample
    task: str
    completion: str


def demonstration_row(sample, task, completion):
    """-> one line, a dictionary, of a file that `load_demonstrations` reads.

    Further segments that answer the query go into "alternatives", which only who scores a completion again needs.
    """
    row = {"video": sample.video_name(), "query": sample.query, "start": sample.start, "end": sample.end,
           "task": task, "completion": completion}
    return row | excerpt_fields(sample) | ({"alternatives": sample.alternatives} if sample.alternatives else {})


def excerpt_fields(sample):
    """Where a sample's video lies in its file, in the field names of Time-R1; {} where it is the whole file."""
    return dict(zip(("video_start", "video_end"), sample.excerpt or ()))


def clamp_to_videos(samples):
    """Clamp ends to the video's duration, note the duration in the sample, and take out rows with start >= end.

    Of several segments those with start < end stay. The annotation's duration counts; where it states
    none, as in Charades-STA txt, each video is opened once for its own. Returns (samples, number clamped, those
    taken out, with their clamped ends). For training only: evaluation keeps every row as it stands.
    """
    trainable = []
    clamped = 0
    empty = []
    for s in samples:
        duration = s.duration or video_duration(s.video)
        segments = ((s.start, s.end), *s.alternatives)
        within = [(start, min(end, duration or math.inf)) for start, end in segments]
        segments_left = [(start, end) for start, end in within if start < end]
        if segments_left:
            (start, end), *others = segments_left
            trainable.append(replace(s, start=start, end=end, alternatives=tuple(others), duration=duration))
            clamped += any(segment not in segments for segment in segments_left)
        else:
            empty.append(replace(s, end=within[0][1], duration=duration))
    return trainable, clamped, empty


def rows_in_words(samples, most=20):
    """For the end of a sentence: ": a.mp4 from 20 to 9.5 s, ... and 3 more"; "" where there is none."""
    names = [f"{s.video_name()} from {s.start:g} to {s.end:g} s" for s in samples[:most]]
    more = [f"and {len(samples) - most} more"] if len(samples) > most else []
    return ": " + ", ".join(names + more) if samples else ""


def settle_excerpts(samples):
    """Drop the excerpts of files that have been cut to them already -> the samples.

    A file of which the rows name different parts is whole. Any other has been cut if it is as long as its excerpt, to a
    second, or if it ends before the segment that its row would find in a whole file.
    """
    parts = defaultdict(set)
    for s in samples:
        parts[s.video].add(s.excerpt)
    result = []
    for s in samples:
        if s.excerpt and len(parts[s.video]) == 1:
            start, end = s.excerpt
            length = video_duration(s.video) or math.inf
            if abs(length - (end - start)) <= 1 or length < start + s.end - 1:
                s = replace(s, excerpt=None)
        result.append(s)
    return result


def refuse_frames(path, samples):
    """Raise ValueError where most segments end after their videos: their times are hardly seconds."""
    with_duration = [s for s in samples if s.duration]
    late = [s for s in with_duration if s.end > s.duration + 1]
    if len(late) >= 3 and len(late) > len(with_duration) / 2:
        raise ValueError(f"{path}: {len(late)} of {len(with_duration)} rows end over a second after their video, the "
                         f"first at {late[0].end:g} of {late[0].duration:g} s; these look like frames, not seconds.")
