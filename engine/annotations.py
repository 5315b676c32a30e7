"""Annotation files: every row becomes a `Sample`, whatever the format. Times are seconds."""

import functools
import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.formats import (
    READ,
    ROW_ERRORS,
    Row,
    RowError,
    excerpt_of,
    lines_of,
    number,
    parse_json,
    parse_qvhighlights,
    parser_of,
    reason_of,
    records_of,
    shown,
)
from engine.runtime import say
from engine.settings import UserError
from engine.text import encodable, normalize_query
from engine.video import video_duration

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".3gp", ".mpg", ".mpeg", ".wmv", ".flv", ".ts",
                  ".gif")  # where two files share a name, the first of these is taken
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|end|>", "<|eot_id|>", "<end_of_turn>", "<eos>", "</s>")

MAX_QUERY = 2000  # characters of a sentence that are read; the longest of the data sets above has 589


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


WINDOWS = ("each", "best", "single")


def load_annotations(path, video_dir, windows="each"):
    """Read every row of an annotation file, dropping none, as a list of `Sample` in the file's order.

    The content, not the name, tells the format; READ lists them. In QVHighlights, whose queries have one relevant
    window or several, `windows` says what becomes a sample: "each" window, as in the paper; each query, with all its
    windows, of which the "best" counts; or each query that has a "single" window. Videos are looked up in `video_dir`
    by name.

    Raises ValueError naming the file and the line (or key, or item) of a malformed row.
    """
    records, found = records_of(path, _read(path))
    if records and not any(parser_of(record) for _, record in records):
        raise ValueError(f"{path}, {records[0][0]}: holds {found}, which is no format that is read; read are {READ}.")
    find = _video_finder(video_dir)
    samples = []
    for where, record in records:
        parse = parser_of(record)
        try:
            if parse is None:
                raise RowError(shown(record))
            made = [_sample(find, row, where) for row in parse(record)]
        except ROW_ERRORS as error:
            raise ValueError(f"{path}, {where}: not a readable annotation row ({reason_of(error, record)}); the README "
                             "lists the formats that are read.") from error
        if parse is parse_qvhighlights and len(made) > 1 and windows != "each":
            first, *others = made
            made = []
            if windows == "best":
                made = [replace(first, alternatives=tuple((s.start, s.end) for s in others))]
        samples += made
    if not samples:
        raise ValueError(f"{path}: holds no annotation row; the README lists the formats that are read.")
    _refuse_frames(path, samples)
    return settle_excerpts(samples)


def load_demonstrations(path, video_dir, tasks):
    """Read a jsonl of {video, query, start, end, task, completion} as a list of `Demonstration`.

    `tasks` are the names that "task" may have. TVG-R1's field names are read too, and its rows are grounding: "problem"
    for the query, "gt_frame" [start, end] and "video_length" in seconds, and "completion" or "solution" for the
    completion ("solution" is a guess: its cold-start file is not public). End tokens are cut off.

    Raises ValueError naming the file and the line of a malformed row.
    """
    find = _video_finder(video_dir)
    demonstrations = []
    for where, line in lines_of(_read(path)):
        r = parse_json(path, where, line)
        try:
            if "gt_frame" in r:
                start, end = r["gt_frame"]
                r = {"query": r["problem"], "start": start, "end": end, "task": "tvg"} | r
            if r["task"] not in tasks:
                raise RowError(f"task {r['task']!r} is none of {', '.join(tasks)}")
            completion = r["completion"] if "completion" in r else r["solution"]
            if not isinstance(completion, str):
                raise RowError(f"completion {completion!r} is no text")
            excerpt = excerpt_of(r, "video_start", "video_end")
            row = Row(r["video"], r["start"], r["end"], r.get("video_length"), r["query"], "", excerpt)
            completion = without_end_token(encodable(completion))
            demonstrations.append(Demonstration(_sample(find, row, where), r["task"], completion))
        except ROW_ERRORS as error:
            raise ValueError(f"{path}, {where}: not a readable demonstration ({reason_of(error, line)}).") from error
    if not demonstrations:
        raise ValueError(f"{path}: holds no demonstration.")
    samples = [d.sample for d in demonstrations]
    _refuse_frames(path, samples)
    return [replace(d, sample=sample) for d, sample in zip(demonstrations, settle_excerpts(samples))]


def without_end_token(completion):
    """A completion without the end tokens that it may end in: training adds the model's own, once."""
    text = completion.rstrip()
    while text.endswith(END_TOKENS):
        token = next(token for token in END_TOKENS if text.endswith(token))
        text = completion = text.removesuffix(token).rstrip()
    return completion


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


def missing_videos(samples):
    """-> the sorted paths of `samples` that are no files."""
    return sorted(video for video in {s.video for s in samples} if not os.path.isfile(video))


def report_missing(samples, allowed):
    """List the videos that are not there; raise UserError unless that is `allowed`."""
    missing = missing_videos(samples)
    if missing:
        folder = Path(missing[0]).parent
        if not folder.is_dir():
            raise UserError(f"--videos {folder}: there is no such folder; name the one that holds the video files.")
        shown = missing[:20] + ([f"and {len(missing) - 20} more"] if len(missing) > 20 else [])
        say("missing: " + "\nmissing: ".join(shown))
        if not allowed:
            raise UserError(f"{len(missing)} of {len({s.video for s in samples})} videos are missing (named above); "
                            "see --videos, or go on without them with --allow-missing-videos.")


def prepare_training(samples):
    """Clamp ends to the video's duration, note the duration in the sample, and drop rows with start >= end.

    Of a sample with several segments those with start < end are kept. The annotation's duration counts; where it states
    none, as in Charades-STA txt, each video is opened once for its own. Returns (samples, number clamped, those
    dropped, with their clamped ends). For training only: evaluation keeps every row as it stands.
    """
    kept = []
    clamped = 0
    dropped = []
    for s in samples:
        duration = s.duration or video_duration(s.video)
        segments = ((s.start, s.end), *s.alternatives)
        ended = [(start, min(end, duration or math.inf)) for start, end in segments]
        left = [(start, end) for start, end in ended if start < end]
        if left:
            (start, end), *others = left
            kept.append(replace(s, start=start, end=end, alternatives=tuple(others), duration=duration))
            clamped += any(segment not in segments for segment in left)
        else:
            dropped.append(replace(s, end=ended[0][1], duration=duration))
    return kept, clamped, dropped


def named(samples, most=20):
    """Rows in words, for the end of a sentence: ": a.mp4 from 20 to 9.5 s, ... and 3 more"; "" where there is none."""
    shown = [f"{s.video_name()} from {s.start:g} to {s.end:g} s" for s in samples[:most]]
    more = [f"and {len(samples) - most} more"] if len(samples) > most else []
    return ": " + ", ".join(shown + more) if samples else ""


# ------------------------------------------------------------------------------------------------ rows


def _read(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason}); convert it.") from error


def _sample(find, row, where):
    start = number(row.start)
    end = number(row.end)
    duration = None if row.duration is None else number(row.duration)
    if not all(math.isfinite(x) and x >= 0 for x in (start, end, duration or 0.0)):
        raise RowError(f"times {start} to {end} of {duration} are not finite seconds from 0")
    if not isinstance(row.sentence, str):
        raise RowError(f"the sentence {json.dumps(row.sentence)[:60]} is no text")
    query = normalize_query(row.sentence[:MAX_QUERY])
    if not query:
        raise RowError("the sentence is empty")
    folder, _ = _name_parts(row.video)
    if row.excerpt and duration is None:
        duration = row.excerpt[1] - row.excerpt[0]
    return Sample(find(row.video), query, start, end, duration, str(row.qid or where), folder, row.excerpt)


def settle_excerpts(samples):
    """Drop the excerpts of files that have been cut to them already -> the samples.

    A file of which the rows name different parts is whole. Any other has been cut if it is as long as its excerpt, to a
    second, or if it ends before the segment that its row would find in a whole file.
    """
    parts = defaultdict(set)
    for s in samples:
        parts[s.video].add(s.excerpt)
    settled = []
    for s in samples:
        if s.excerpt and len(parts[s.video]) == 1:
            start, end = s.excerpt
            length = video_duration(s.video) or math.inf
            if abs(length - (end - start)) <= 1 or length < start + s.end - 1:
                s = replace(s, excerpt=None)
        settled.append(s)
    return settled


def _refuse_frames(path, samples):
    """Raise ValueError where most segments end after their videos: their times are hardly seconds."""
    timed = [s for s in samples if s.duration]
    late = [s for s in timed if s.end > s.duration + 1]
    if len(late) >= 3 and len(late) > len(timed) / 2:
        raise ValueError(f"{path}: {len(late)} of {len(timed)} rows end more than a second after their video, the "
                         f"first at {late[0].end:g} of {late[0].duration:g} s; these look like frames, not seconds.")


# ------------------------------------------------------------------------------------------------ videos


def _name_parts(name):
    """An annotation's name of a video -> (the folders that it names, the name of the file).

    Folders count only inside the video folder: "charades/x.mp4" has one, "/data/x.mp4" and "../x.mp4" have none.
    """
    if not isinstance(name, str):
        raise RowError(f"the video {json.dumps(name)[:60]} is no name")
    *folders, file = name.replace("\\", "/").split("/")
    if file in ("", ".", ".."):
        raise RowError(f'the video "{name}" is no name')
    outside = folders and (not folders[0] or folders[0].endswith(":"))  # from the root, or from a drive
    if outside or ".." in folders:
        return "", file
    return "/".join(folder for folder in folders if folder not in ("", ".")), file


def _video_finder(video_dir):
    """-> find(name): the path of an annotation's video id or path in `video_dir`, whatever the container's suffix.

    A name that exists as it stands is taken. One that names a folder is looked up there and then in `video_dir`.
    """
    @functools.cache
    def listed(folder):
        """The files of a folder, by name and by name without suffix."""
        try:
            files = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
        except (OSError, ValueError):  # there is none of that name, or the name can be none
            return {}, {}
        videos = [Path(file) for file in files if Path(file).suffix.lower() in VIDEO_SUFFIXES]
        videos.sort(key=lambda video: VIDEO_SUFFIXES.index(video.suffix.lower()), reverse=True)
        return {file: folder / file for file in files}, {video.stem: folder / video for video in videos}

    def find(name):
        folders, file = _name_parts(name)
        stem = file.removesuffix(Path(file).suffix) if Path(file).suffix.lower() in VIDEO_SUFFIXES else file
        for folder in (Path(video_dir, folders), Path(video_dir)):
            files, stems = listed(folder)
            if file in files or stem in stems:
                return str(files.get(file) or stems[stem])
        return str(Path(video_dir, file if stem != file else f"{file}.mp4"))

    return find
