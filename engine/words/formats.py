"""The formats of annotation files: the text of a file becomes records, and a record becomes rows.

A format is told by its content, never by the file's name. A new one is a parser and a line of ENTRIES or ITEMS.
"""

import collections
import json
import math
import re
from typing import NamedTuple

READ = ("Charades-STA txt (VID start end##sentence, also with a glance before the sentence), JSON of {video: "
        "{duration, timestamps, sentences}} (TACoS: fps and num_frames) or {video: {duration, spans, queries}}, "
        "QVHighlights jsonl, Time-R1 and TVGBench lists, and lists of [video, duration, [start, end], query]")


class Row(NamedTuple):
    """One query as its file states it."""

    video: str
    start: float
    end: float
    duration: float | None
    sentence: str
    qid: str
    excerpt: tuple | None = None  # start and end, in the file's seconds, of the part of the file that is the video


class RowError(ValueError):
    """What is wrong with a row, in words for its author; other errors hold Python's words and are not shown."""


def lines_of(text):
    """-> [("line 3", line)] of the lines that hold something.

    Not splitlines(), which also cuts at the U+2028 and U+0085 that JSON strings may hold.
    """
    return [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def parse_json(path, where, text):
    """The value of a JSON text that begins at `where`, or at the first line. Raises ValueError naming the place."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RowError as error:
        raise ValueError(f"{path}{where and ', '}{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        where = where or f"line {getattr(error, 'lineno', 1)}"
        reason = getattr(error, "msg", "nested too deeply, or a number too long")
        raise ValueError(f"{path}, {where}: not valid JSON ({reason}).") from error


def _without_repeats(pairs):
    """A JSON object, each of whose keys stands once: of two, json would keep the last and lose the other's rows."""
    value = dict(pairs)
    if len(value) < len(pairs):
        times = collections.Counter(key for key, _ in pairs)
        repeated = [key for key in times if times[key] > 1]
        raise RowError(f"the key {json.dumps(repeated[0])[:60]} stands {times[repeated[0]]} times in one object; join "
                       "what belongs to it, or give each its own")
    return value


def records_of(path, text):
    """-> ([(where, record)], what the file holds in words); a record is a line of text or a value of JSON.

    The entries of {video: entry} come as (video, entry).
    """
    lines = lines_of(text)
    if not lines:
        return [], "nothing"
    if text.lstrip()[:1] not in ("{", "["):
        return lines, _describe_text(lines[0][1])
    if len(lines) > 1 and _is_json(lines[0][1]):  # one value a line
        records = [(where, parse_json(path, where, line)) for where, line in lines]
        return records, f"JSON lines of {_describe(records[0][1])}"
    document = parse_json(path, "", text)
    if isinstance(document, list):
        records = [(f"item {i}", record) for i, record in enumerate(document)]
        return records, f"a JSON list of {_describe(document[0])}" if document else ""
    if parser_of(document):  # JSON lines of a single line
        return [(lines[0][0], document)], ""
    entries = list(document.values())
    if entries and all(isinstance(entry, dict) for entry in entries):
        contents = f"a JSON object of {_describe(entries[0])}"
    else:
        contents = f"a JSON object with the keys {_names_of(document)}"
    return [(f"key {video!r}", (video, entry)) for video, entry in document.items()], contents


def _is_json(line):
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _describe_text(line):
    start = " ".join(line.split())[:60]
    if re.search(r"[,;\t].*[,;\t]", line):
        return f'a CSV {"row" if re.search("[0-9]", line) else "header"} ("{start}")'
    return f'text that begins with "{start}"'


def _describe(value):
    """Values like this one, in words."""
    if isinstance(value, dict):
        return f"objects with the keys {_names_of(value)}"
    if isinstance(value, list):
        return "lists"
    return "texts" if isinstance(value, str) else "single values"


def _names_of(keys):
    names = [" ".join(key.split())[:30] for key in list(keys)[:8]]
    return ", ".join(names) + (", ..." if len(keys) > 8 else "")


# ------------------------------------------------------------------------------------------------ rows

ROW_ERRORS = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError)


def reason_of(error, record):
    """What is wrong with a record, in words for its author."""
    if isinstance(error, KeyError):
        return f"no field {error}"
    reason = str(error) if isinstance(error, RowError) else contents_of(record)
    return " ".join(reason.split())  # one line, whatever the record holds


def contents_of(record):
    return f"it holds {record if isinstance(record, str) else json.dumps(record)}"[:200]


def parser_of(record):
    """-> the function that turns a record into a list of `Row`, by the fields that tell its format; None for none."""
    if isinstance(record, str):
        return _parse_charades if "##" in record else None
    if isinstance(record, list):
        return _parse_list if len(record) == 4 and isinstance(record[2], list) else None
    fields = record[1] if isinstance(record, tuple) else record
    if not isinstance(fields, dict):
        return None
    for names, parse in (ENTRIES if isinstance(record, tuple) else ITEMS).items():
        if all(name in fields for name in names):
            return parse
    return None


def _parse_charades(line):
    head, sentence = line.split("##", 1)
    video, start, end = head.strip().rsplit(None, 2)  # a video's name may hold spaces
    sentence = re.sub(r"^\s*[0-9.]+\s*##", "", sentence)  # a glance, one moment of the segment
    if "##" in sentence:
        raise RowError(f'the sentence holds ##: "{sentence.strip()[:100]}"')
    return [Row(video, start, end, None, sentence, "")]


def _parse_captions(item):
    video, r = item
    if "duration" in r or "fps" not in r and "num_frames" not in r:
        return _entry_rows(video, r["timestamps"], r["sentences"], r.get("duration"))
    fps = number(r["fps"])  # TACoS counts frames, at the rate of each video
    if not 0 < fps < math.inf:
        raise RowError(f"{fps} frames a second")
    segments = [(number(start) / fps, number(end) / fps) for start, end in r["timestamps"]]
    return _entry_rows(video, segments, r["sentences"], number(r["num_frames"]) / fps)


def _parse_timelens(item):
    video, r = item
    return _entry_rows(video, r["spans"], r["queries"], r.get("duration"))


def _entry_rows(video, segments, sentences, duration):
    if len(segments) != len(sentences):
        raise RowError(f"{len(segments)} segments for {len(sentences)} sentences")
    rows = enumerate(zip(segments, sentences))
    return [Row(video, start, end, duration, sentence, f"{video}:{i}") for i, ((start, end), sentence) in rows]


def parse_qvhighlights(r):
    windows = enumerate(r["relevant_windows"])
    return [Row(r["vid"], start, end, r.get("duration"), r["query"], f"{r['qid']}:{i}") for i, (start, end) in windows]


def _parse_tvgbench(r):
    times = re.fullmatch(r"\s*([\d.]+)\s*-\s*([\d.]+)\s*", r["answer"])
    if not times:
        raise RowError(f"the answer \"{r['answer']}\" is not \"start-end\"")
    return [Row(r["path"], times[1], times[2], r.get("duration"), r["question"], "", excerpt_of(r, "start", "end"))]


def _parse_time_r1(r):
    start, end = r["timestamp"]
    excerpt = excerpt_of(r, "video_start", "video_end")
    return [Row(r["video"], start, end, r.get("duration"), r["sentence"], r.get("qid", ""), excerpt)]


def excerpt_of(r, start, end):
    """The excerpt that two fields of a record name; None where neither is given."""
    if r.get(start) is None and r.get(end) is None:
        return None
    excerpt = number(r.get(start)), number(r.get(end))
    if not 0 <= excerpt[0] < excerpt[1] < math.inf:
        raise RowError(f"{start} {excerpt[0]:g} and {end} {excerpt[1]:g} name no part of a video")
    return excerpt


def _parse_list(item):
    video, duration, (start, end), sentence = item
    return [Row(video, start, end, duration, sentence, "")]


ENTRIES = {("timestamps", "sentences"): _parse_captions, ("spans", "queries"): _parse_timelens}
ITEMS = {("relevant_windows",): parse_qvhighlights, ("question", "answer"): _parse_tvgbench,
         ("timestamp", "sentence"): _parse_time_r1}


def number(value):
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        raise RowError(f"{json.dumps(value)[:60]} is no number") from None
