"""Annotation and demonstration files: every row becomes a `Sample`, whatever the format."""

import json
import math
from dataclasses import replace
from pathlib import Path

from engine.words.finding import name_parts, video_finder
from engine.words.formats import (
    READ,
    ROW_ERRORS,
    Row,
    RowError,
    contents_of,
    excerpt_of,
    lines_of,
    number,
    parse_json,
    parse_qvhighlights,
    parser_of,
    reason_of,
    records_of,
)
from engine.words.samples import Demonstration, Sample, refuse_frames, settle_excerpts
from engine.words.text import encodable, normalize_query

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|end|>", "<|eot_id|>", "<end_of_turn>", "<eos>", "</s>")

MAX_QUERY = 2000  # characters of a sentence that are read; the longest of the data sets above has 589


WINDOWS = ("each", "best", "single")


def load_annotations(path, video_dir, windows="each"):
    """Read every row of an annotation file, dropping none, as a list of `Sample` in the file's order.

    The content, not the name, tells the format; READ lists them. In QVHighlights, whose queries have one relevant
    window or several, `windows` says what becomes a sample: "each" window, as in the paper; each query, with all its
    windows, of which the "best" counts; or each query that has a "single" window. Videos are looked up in `video_dir`
    by name.

    Raises ValueError naming the file and the line (or key, or item) of a malformed row.
    """
    records, contents = records_of(path, _read(path))
    if records and not any(parser_of(record) for _, record in records):
        where, _ = records[0]
        raise ValueError(f"{path}, {where}: holds {contents}, which is no format that is read; read are {READ}.")
    find = video_finder(video_dir)
    samples = []
    for where, record in records:
        parse = parser_of(record)
        try:
            if parse is None:
                raise RowError(contents_of(record))
            row_samples = [_sample(find, row, where) for row in parse(record)]
        except ROW_ERRORS as error:
            raise ValueError(f"{path}, {where}: not a readable annotation row ({reason_of(error, record)}); the README "
                             "lists the formats that are read.") from error
        if parse is parse_qvhighlights and len(row_samples) > 1 and windows != "each":
            first, *others = row_samples
            row_samples = []
            if windows == "best":
                row_samples = [replace(first, alternatives=tuple((s.start, s.end) for s in others))]
        samples += row_samples
    if not samples:
        raise ValueError(f"{path}: holds no annotation row; the README lists the formats that are read.")
    refuse_frames(path, samples)
    return settle_excerpts(samples)


def load_demonstrations(path, video_dir, tasks, translate=dict):
    """Read a jsonl of {video, query, start, end, task, completion} as a list of `Demonstration`.

    `tasks` are the names that "task" may have; translate(record) may give other projects' fields these names. End
    tokens are cut off.

    Raises ValueError naming the file and the line of a malformed row.
    """
    find = video_finder(video_dir)
    demonstrations = []
    for where, line in lines_of(_read(path)):
        record = parse_json(path, where, line)
        try:
            r = translate(record)
            if r["task"] not in tasks:
                raise RowError(f"task {r['task']!r} is none of {', '.join(tasks)}")
            if not isinstance(r["completion"], str):
                raise RowError(f"completion {r['completion']!r} is no text")
            excerpt = excerpt_of(r, "video_start", "video_end")
            row = Row(r["video"], r["start"], r["end"], r.get("video_length"), r["query"], "", excerpt)
            completion = without_end_token(encodable(r["completion"]))
            demonstrations.append(Demonstration(_sample(find, row, where), r["task"], completion))
        except ROW_ERRORS as error:
            raise ValueError(f"{path}, {where}: not a readable demonstration ({reason_of(error, line)}).") from error
    if not demonstrations:
        raise ValueError(f"{path}: holds no demonstration.")
    samples = [d.sample for d in demonstrations]
    refuse_frames(path, samples)
    return [replace(d, sample=sample) for d, sample in zip(demonstrations, settle_excerpts(samples))]


def without_end_token(completion):
    """A completion without the end tokens that it may end in: training adds the model's own, once."""
    text = completion.rstrip()
    while text.endswith(END_TOKENS):
        token = next(token for token in END_TOKENS if text.endswith(token))
        text = completion = text.removesuffix(token).rstrip()
    return completion


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
    folder, _ = name_parts(row.video)
    if row.excerpt and duration is None:
        duration = row.excerpt[1] - row.excerpt[0]
    return Sample(find(row.video), query, start, end, duration, str(row.qid or where), folder, row.excerpt)
