"""Where a model errs: grounding by kinds of rows, with intervals, and the rows that one run wins over another.

All times are seconds, all metrics percent. Intervals are 95% and draw videos, as in evaluate.compare_models.
"""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

import rewards
from engine.program.settings import UserError
from engine.video.stream import video_duration
from engine.words.annotations import load_annotations
from evaluate import THRESHOLDS, compare_models
from report.runs import row_of

METRICS = (*(f"R1@{m}" for m in THRESHOLDS), "mIoU")
DRAWS = 2000
ORDER_WORDS = ("again", "then", "before", "after")  # the paper's failure case (Figure 14): which of several events
NAMED_VERBS = 8


class Bin(NamedTuple):
    """Rows of one kind: the places of `rows` in a list of grounding predictions."""

    title: str
    name: str
    rows: list[int]


def grounding(predictions) -> list[dict]:
    """The first completion of every annotated grounding row."""
    return [p for p in predictions if p["task"] == "tvg" and p["sample"] == 0 and p.get("truth")]


# ------------------------------------------------------------------------------------------------ kinds of rows


def thirds(title, numbers, unit) -> list[Bin]:
    """Three bins of about equally many rows by a number of each; None: in no bin. Equal numbers stay together."""
    known = [n for n in numbers if n is not None]
    if not known:
        return []
    low, high = np.quantile(known, (1 / 3, 2 / 3))
    limits = [(f"up to {low:.1f} {unit}", -np.inf, low), (f"up to {high:.1f} {unit}", low, high),
              (f"above {high:.1f} {unit}", high, np.inf)]
    return [Bin(title, name, [i for i, n in enumerate(numbers) if n is not None and least < n <= most])
            for name, least, most in limits]


def verb_counts(queries) -> Counter:
    """How many queries hold each root."""
    return Counter(verb for _, found in rewards.mask_queries(queries) for verb in set(found))


def frequent(counts) -> set[str]:
    """The most frequent verbs, as many as are needed to make half of all."""
    chosen, covered = set(), 0
    for verb, count in counts.most_common():
        if 2 * covered >= counts.total():
            break
        chosen.add(verb)
        covered += count
    return chosen


def bins(predictions, training_queries=()) -> list[Bin]:
    """Kinds of rows. A verb is frequent or rare in the training queries, or where there are none in these."""
    queries = [p["query"] for p in predictions]
    lengths = [p["truth"][1] - p["truth"][0] for p in predictions]
    durations = [p["excerpt"][1] - p["excerpt"][0] if p.get("excerpt") else video_duration(p["video"])
                 for p in predictions]
    middles = [sum(p["truth"]) / 2 / d if d else None for p, d in zip(predictions, durations)]
    verbs = [found for _, found in rewards.mask_queries(queries)]
    usual = frequent(verb_counts(training_queries or queries))
    words = [set(re.findall(r"\w+", query.lower())) for query in queries]

    def where(title, name, holds):
        return Bin(title, name, [i for i in range(len(predictions)) if holds(i)])

    found = [where("all", "all rows", lambda i: True)]
    found += thirds("segment", lengths, "s")
    for name, low, high in (("first third", -1, 1 / 3), ("middle third", 1 / 3, 2 / 3), ("last third", 2 / 3, 9)):
        found.append(where("middle of the segment in", name,
                           lambda i, low=low, high=high: middles[i] is not None and low < middles[i] <= high))
    found += thirds("video", durations, "s")
    found.append(where("verbs", "all frequent", lambda i: verbs[i] and usual.issuperset(verbs[i])))
    found.append(where("verbs", "one rare", lambda i: not usual.issuperset(verbs[i])))
    found.append(where("verbs", "none", lambda i: not verbs[i]))
    for verb, _ in verb_counts(queries).most_common(NAMED_VERBS):
        found.append(where("verb", verb, lambda i, verb=verb: verb in verbs[i]))
    for word in ORDER_WORDS:
        found.append(where("query with", f'"{word}"', lambda i, word=word: word in words[i]))
    found.append(where("query with", "none of these words", lambda i: not words[i] & set(ORDER_WORDS)))
    return [b for b in found if b.rows]


def training_queries(run) -> list[str]:
    """The queries that a run was trained on; none where its annotations are not there."""
    try:
        return [s.query for s in load_annotations(run.config["annotations"], run.videos())]
    except (KeyError, OSError, ValueError):
        return []


# ------------------------------------------------------------------------------------------------ numbers


def compare(ours, theirs=None) -> dict[str, tuple]:
    """Grounding rows of one or two models -> {metric: (ours, theirs, low, high)} of compare_models.

    Alone, the rows are compared with answers that are all wrong: the difference is then the metric itself.
    """
    nothing = {"format": 0.0, "iou": 0.0, "total": 0.0}
    if theirs is None:
        theirs = [p | {"parts": nothing} for p in ours]
    plain = [[p | {"parts": nothing | {"iou": p["parts"]["iou"]}} for p in rows] for rows in (ours, theirs)]
    return {name: found for name, found in compare_models(*plain, draws=DRAWS).items() if name in METRICS}


def error_table(entries, queries=()) -> list[dict]:
    """Evaluations of the same rows, [(label, predictions)] -> for each bin its counts, metrics, and differences.

    {"title", "name", "rows", "metrics": [{metric: (value, low, high)} of each], "differences": [(low, gain in mIoU,
    high) of the first over each other]}.
    """
    columns = aligned([grounding(predictions) for _, predictions in entries])
    table = []
    for kind in bins(columns[0], queries):
        chosen = [[column[i] for i in kind.rows] for column in columns]
        alone = [compare(rows) for rows in chosen]
        pairs = [compare(chosen[0], rows)["mIoU"] for rows in chosen[1:]]
        table.append({"title": kind.title, "name": kind.name, "rows": len(kind.rows),
                      "metrics": [{m: (found[m][0], *found[m][2:]) for m in METRICS} for found in alone],
                      "differences": [(low, a - b, high) for a, b, low, high in pairs]})
    return table


def aligned(columns) -> list[list[dict]]:
    """Several lists of predictions of the same rows, in the order of the first, with its numbers of rows."""
    first = columns[0]
    found = []
    for column in columns:
        by_row = {row_of(p): p for p in column}
        found.append([by_row[row_of(p)] | {key: p[key] for key in ("row", "video")} for p in first])
    return found


def differences(ours, theirs) -> dict[str, tuple] | str:
    """All metrics of two evaluations of the same rows, with intervals; why not, where they cannot be compared."""
    shared = [{(p["task"], *row_of(p)): p for p in rows if p["sample"] == 0 and p.get("truth")}
              for rows in (ours, theirs)]
    keys = [key for key in shared[0] if key in shared[1]]
    if not keys:
        return "they have no row in common"
    number = {key: i for i, key in enumerate(keys)}
    paired = [[rows[key] | {"row": number[key], "video": key[1]} for key in keys] for rows in shared]
    try:
        found = compare_models(*paired, draws=DRAWS)
    except UserError as error:
        return str(error)
    first = [name for name in ("mIoU", *METRICS) if name in found]
    return {name: found[name] for name in dict.fromkeys((*first, *found))}


def changed_rows(ours, theirs, most=20) -> tuple[list, list]:
    """Grounding rows whose IoU rose and fell most, [(gain, our prediction, theirs)] each, the largest first."""
    ours, theirs = aligned([grounding(ours), grounding(theirs)])
    pairs = [(a["parts"]["iou"] - b["parts"]["iou"], a, b) for a, b in zip(ours, theirs)]
    pairs.sort(key=lambda pair: pair[0])
    lost = [pair for pair in pairs if pair[0] < 0]
    won = [pair for pair in reversed(pairs) if pair[0] > 0]
    return won[:most], lost[:most]


def video_of(prediction, folders) -> str:
    """Where a prediction's video is now: where it was, or in one of the folders, by name."""
    path = Path(prediction["video"])
    places = [path, *(Path(folder) / path.name for folder in folders if folder)]
    return str(next((place for place in places if place.is_file()), path))
