"""Annotation files: every row becomes a `Sample`, whatever the format. Times are seconds."""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from engine.video import video_duration

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")


@dataclass(frozen=True)
class Sample:
    """A query and its segment: `start` and `end` in seconds, `duration` in seconds or None where not annotated.

    `qid` is the annotation's own id of the query, or the row's place in its file.
    """

    video: str
    query: str
    start: float
    end: float
    duration: float | None = None
    qid: str = ""


@dataclass(frozen=True)
class Demonstration:
    """A completion to imitate, for the supervised stages."""

    sample: Sample
    task: str
    completion: str


class Row(NamedTuple):
    """One query as its file states it."""

    video: str
    start: float
    end: float
    duration: float | None
    sentence: str
    qid: str


def normalize_query(text):
    """The one form of a query in training and evaluation: stripped, on one line, lower case, no final full stop."""
    return " ".join(text.split()).lower().rstrip(". ")


def load_annotations(path, video_dir, single_window=False):
    """Read every row of an annotation file, dropping none, as a list of `Sample` in the file's order.

    The content, not the name, tells the format: Charades-STA txt ("VID start end##sentence"); JSON of
    {video: {duration, timestamps, sentences}} (Charades, ActivityNet Captions); QVHighlights jsonl, where each relevant
    window becomes a sample, as in the paper, and `single_window` keeps only queries with exactly one; the Time-R1 and
    TVGBench lists. Videos are looked up in `video_dir` by name.

    Raises ValueError naming the file and the line (or key, or item) of a malformed row.
    """
    records, parse = _detect(path, _read(path))
    find = _video_finder(video_dir)
    samples = []
    for where, record in records:
        try:
            rows = parse(record)
            if single_window and parse is _parse_qvhighlights and len(rows) != 1:
                continue
            for row in rows:
                samples.append(_sample(find(row.video), row, where))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, {where}: not a readable annotation row ({reason}); the README lists the formats "
                             "that are read.") from error
    if not samples:
        raise ValueError(f"{path}: holds no annotation row; the README lists the formats that are read.")
    return samples


def load_demonstrations(path, video_dir, tasks):
    """Read a jsonl of {video, query, start, end, task, completion} as a list of `Demonstration`.

    `tasks` are the names that "task" may have. TVG-R1's field names are read too, and its rows are grounding: "problem"
    for the query, "gt_frame" [start, end] and "video_length" in seconds, and "completion" or "solution" for the
    completion ("solution" is a guess: its cold-start file is not public).

    Raises ValueError naming the file and the line of a malformed row.
    """
    find = _video_finder(video_dir)
    demonstrations = []
    for where, line in _lines(_read(path)):
        try:
            r = json.loads(line)
            if "gt_frame" in r:
                start, end = r["gt_frame"]
                r = {"query": r["problem"], "start": start, "end": end, "task": "tvg"} | r
            if r["task"] not in tasks:
                raise ValueError(f"task {r['task']!r} is none of {', '.join(tasks)}")
            completion = r["completion"] if "completion" in r else r["solution"]
            if not isinstance(completion, str):
                raise TypeError(f"completion {completion!r} is no text")
            row = Row(r["video"], r["start"], r["end"], r.get("video_length"), r["query"], "")
            demonstrations.append(Demonstration(_sample(find(row.video), row, where), r["task"], completion))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, {where}: not a readable demonstration ({reason}).") from error
    if not demonstrations:
        raise ValueError(f"{path}: holds no demonstration.")
    return demonstrations


def demonstration_row(sample, task, completion):
    """-> one line, a dictionary, of a file that `load_demonstrations` reads."""
    return {"video": Path(sample.video).name, "query": sample.query, "start": sample.start, "end": sample.end,
            "task": task, "completion": completion}


def append_rollouts(path, iteration, task, samples, texts, scores):
    """Append sampled completions and their rewards to a jsonl, in the fields of a demonstration.

    The completions come sample by sample, equally many of each. papers/stages.py selects among them.
    """
    per_sample = len(texts) // len(samples)
    with open(path, "a", encoding="utf-8") as file:
        for n, (text, parts) in enumerate(zip(texts, scores)):
            row = demonstration_row(samples[n // per_sample], task, text)
            file.write(json.dumps({"iteration": iteration} | row | {"parts": parts}) + "\n")


def missing_videos(samples):
    """-> the sorted paths of `samples` that are no files."""
    return sorted(video for video in {s.video for s in samples} if not Path(video).is_file())


def prepare_training(samples):
    """Clamp ends to the video's duration, note the duration in the sample, and drop rows with start >= end.

    The annotation's duration counts; where it states none, as in Charades-STA txt, each video is opened once for its
    own. Returns (samples, number clamped, number dropped). For training only: evaluation keeps every row as it stands.
    """
    kept = []
    clamped = 0
    for s in samples:
        duration = s.duration or video_duration(s.video)
        end = min(s.end, duration or math.inf)
        if s.start < end:
            kept.append(replace(s, end=end, duration=duration))
            clamped += end < s.end
    return kept, clamped, len(samples) - len(kept)


# ------------------------------------------------------------------------------------------------ formats


def _lines(text):
    """-> [("line 3", line)] of the lines that hold something.

    Not splitlines(), which also cuts at the U+2028 and U+0085 that JSON strings may hold.
    """
    return [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _read(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason}); convert it.") from error


def _detect(path, text):
    """-> ([(where, record)], the function that parses a record into a list of `Row`)."""
    lines = _lines(text)
    first = text.lstrip()[:1]
    if first not in ("{", "["):
        return lines, _parse_charades
    if first == "{" and len(lines) > 1 and _is_json(lines[0][1]):  # one JSON object a line
        return lines, _parse_qvhighlights
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    if first == "[":
        return [(f"item {i}", r) for i, r in enumerate(document)], _parse_list_item
    if "relevant_windows" in document:  # a jsonl of one line
        return lines, _parse_qvhighlights
    return [(f"key {video!r}", (video, r)) for video, r in document.items()], _parse_captions


def _is_json(line):
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _parse_charades(line):
    head, sentence = line.split("##", 1)
    video, start, end = head.split()
    return [Row(video, start, end, None, sentence, "")]


def _parse_captions(item):
    video, r = item
    rows = []
    for i, ((start, end), sentence) in enumerate(zip(r["timestamps"], r["sentences"], strict=True)):
        rows.append(Row(video, start, end, r.get("duration"), sentence, f"{video}:{i}"))
    return rows


def _parse_qvhighlights(line):
    r = json.loads(line)
    windows = enumerate(r["relevant_windows"])
    return [Row(r["vid"], start, end, r.get("duration"), r["query"], f"{r['qid']}:{i}") for i, (start, end) in windows]


def _parse_list_item(r):
    if "answer" in r:  # TVGBench
        start, end = re.fullmatch(r"\s*([\d.]+)\s*-\s*([\d.]+)\s*", r["answer"]).groups()
        return [Row(r["path"], start, end, r.get("duration"), r["question"], "")]
    start, end = r["timestamp"]  # Time-R1; its video_start is a note, the files are already cut
    return [Row(r["video"], start, end, r.get("duration"), r["sentence"], r.get("qid", ""))]


def _sample(video, row, where):
    start = float(row.start)
    end = float(row.end)
    duration = None if row.duration is None else float(row.duration)
    if not all(math.isfinite(x) and x >= 0 for x in (start, end, duration or 0.0)):
        raise ValueError(f"times {start} to {end} of {duration} are not finite seconds from 0")
    query = normalize_query(row.sentence)
    if not query:
        raise ValueError("the sentence is empty")
    return Sample(video, query, start, end, duration, str(row.qid or where))


def _video_finder(video_dir):
    """-> find(name): the path of an annotation's video id or path in `video_dir`, whatever the container's suffix."""
    folder = Path(video_dir)
    listed = {}
    if folder.is_dir():
        listed = {p.stem: str(p) for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES}

    def find(name):
        path = folder / name.replace("\\", "/").rsplit("/", 1)[-1]
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            path = folder / f"{path.name}.mp4"
        return listed.get(path.stem, str(path))

    return find
