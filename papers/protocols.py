"""How other projects would score the completions of a finished evaluation, beside this project's own numbers.

    python -m papers.protocols FOLDER

FOLDER is the --output of evaluate.py. Nothing is decoded or generated again: a protocol reads a span out of each stored
completion in its own way, takes the IoU with the annotated segment, and counts. Each is written after its project's own
script, which its line of PROTOCOLS names by repository, file and commit.

Where a project divides by zero, as where two empty segments are compared, the IoU counts 0 here. Patterns match what
the projects' own do, written so that a long run of digits takes no long time.
"""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.program.settings import UserError, command_line
from engine.run.predictions import read_predictions
from evaluate import THRESHOLDS
from rewards import Span, temporal_iou

# ------------------------------------------------------------------------------------------------ reading a span


NUMBER = r"(\d+(?:\.\d*)?)"


def last_to(text: str) -> Span | None:
    """The last "a to b" or "a and b" anywhere, also in the thought, with single spaces."""
    found = re.findall(rf"{NUMBER} (?:to|and) {NUMBER}", text)
    return _span(found[-1:])


def first_of_timelens(text: str) -> Span | None:
    """The first of the kind of span that comes first in this list, rounded to whole seconds.

    Two clock times (1:05, 00:01:05); "a - b"; "a to b"; two numbers. All are looked for in the whole text.
    """
    text = text.lower()
    clocks = re.findall(r"\b(\d{1,2}:\d{2}:\d{2}(?:\.\d+)?|\d{1,2}:\d{2}(?:\.\d+)?)\b", text)
    dashes = re.findall(rf"{NUMBER}\s*-\s*{NUMBER}", text)
    words = re.findall(rf"{NUMBER}\s+to\s+{NUMBER}", text)
    numbers = re.findall(r"\b(\d+\.\d+|\d+)\b", text)
    span = _span(_paired(clocks) or dashes or words or _paired(numbers))
    return (float(round(span[0])), float(round(span[1]))) if span else None


def first_of_lmms_eval(text: str) -> Span | None:
    """The first of the kind of span that comes first in this list, swapped where it is reversed.

    A range of clock times; "a - b" or "a to b"; two clock times; the first numbers of two lines; "a s - b s". All are
    looked for in lines that hold "start", "end" or "happen", or in all where there are none. "!" and "?" end a line.
    """
    text = text.lower().replace("a specific example is : 20.8 - 30.0 seconds", "").replace("to", "-")
    lines = re.split(r"[!?\n]", text)
    lines = [line for line in lines if re.search("start|end|happen", line)] or lines

    def found(pattern):
        return [match for line in lines for match in re.findall(pattern, line)]

    number, clock = r"(\d+(?:\.\d+)?)", r"(\d{1,2}:\d{2}(?::\d{2})?)"
    numbers = [match[0] for line in lines if (match := re.search(rf"\b{number}\b", line))]
    return _in_order(_span(
        found(rf"\b{clock}\s*[–-]\s*{clock}\b") or found(rf"{number}\s*[–-]\s*{number}")
        or _paired(found(rf"\b{clock}\b")) or _paired(numbers)
        or found(rf"{number}\s*s?\s*[–-]\s*{number}\s*s?")))


def last_two_numbers(text: str) -> Span | None:
    """The last two numbers anywhere, swapped where they are reversed."""
    numbers = re.findall(r"\d+(?:\.\d+)?", text)
    return _in_order(_span(_paired(numbers[-2:])))


def _paired(times):
    """The first two of a list of texts, as a list of one pair; [] where there are not two."""
    return [times[:2]] if len(times) > 1 else []


def _span(pairs):
    """The first of some pairs of texts, such as "12.5" or "1:05", in seconds; None where there is none."""
    if not pairs:
        return None
    span = []
    for text in pairs[0]:
        seconds = 0.0
        for part in text.split(":"):
            seconds = 60 * seconds + float(part)
        span.append(seconds)
    return tuple(span) if max(span) < math.inf else None


def _in_order(span):
    return tuple(sorted(span)) if span else None


# ------------------------------------------------------------------------------------------------ the table


class Protocol(NamedTuple):
    """How a project scores."""

    read: Callable | None  # finds the span in a completion; None: the span that evaluate.py found
    says: str  # what is special about it
    source: str
    above: bool = False  # R1@m counts IoU > m, not IoU >= m
    best: bool = False  # of several segments that answer a query the best counts, not the first
    drops: bool = False  # rows whose video cannot be read do not count, instead of counting 0
    merges: bool = False  # rows of equal video, query and segment count once


PROTOCOLS = {
    "ours": Protocol(
        None, "last span in the last answer; best window; every row", "rewards.py, evaluate.py", best=True),
    "Time-R1": Protocol(
        last_to, "last 'a to b' anywhere; IoU > m; unreadable rows dropped",
        "xiaomi-research/time-r1 7f2b594: evaluate.py, src/vllm_inference/eval_all.py", above=True, drops=True),
    "VideoChat-R1": Protocol(  # the released Invert4TVG's is the same
        last_to, "last 'a to b' anywhere; unreadable rows dropped",
        "OpenGVLab/VideoChat-R1 73b2ea9: src_eval/evaluate_grounding.py; "
        "nian1125/Invert4TVG 3597015: qwen-vl-finetune/qwenvl/inference/evaluate.py", drops=True),
    "TimeLens": Protocol(
        first_of_timelens, "first clock times, 'a - b', 'a to b' or two numbers, in whole seconds",
        "TencentARC/TimeLens 5d90c06: timelens/utils.py, evaluation/eval_dataloader.py, evaluation/compute_metrics.py",
        merges=True),
    "lmms-eval": Protocol(
        first_of_lmms_eval, "first 'a - b' or 'a to b' where a line speaks of start or end, or anywhere; swapped",
        "EvolvingLMMs-Lab/lmms-eval 75571cf: lmms_eval/tasks/charades_sta/utils.py", merges=True),
    "TaRO": Protocol(
        last_two_numbers, "last two numbers anywhere, swapped if reversed; best window; unreadable rows dropped",
        "oceanflowlab/TaRO 143a234: standalone_eval/evaluate_vtg.py", best=True, drops=True),
    "moment_detr": Protocol(  # its submissions hold windows, not texts
        None, "our parser, since it reads no text; best window, one row a query",
        "jayleicn/moment_detr b7e553a: standalone_eval/eval.py", best=True),
}


def rescore(predictions: list[dict], protocol: Protocol) -> dict[str, float]:
    """Grounding predictions -> R1@m and mIoU in percent, the number of rows that count, and of these without a span."""
    ious = {}
    without = 0
    for number, p in enumerate(predictions):
        if protocol.drops and p["error"]:
            continue
        span = protocol.read(p["completion"]) if protocol.read else p["span"]
        truths = [p["truth"], *p["alternatives"]] if protocol.best else [p["truth"]]
        key = (Path(p["video"]).name, p["query"], *p["truth"]) if protocol.merges else number
        without += span is None and key not in ious
        ious[key] = max(temporal_iou(span, truth) for truth in truths) if span else 0.0
    values = np.array(list(ious.values()))
    if not values.size:
        raise UserError("no row counts: no video of the evaluation could be read.")
    reached = np.greater if protocol.above else np.greater_equal
    metrics = {f"R1@{m}": 100 * float(reached(values, m).mean()) for m in THRESHOLDS}
    return metrics | {"mIoU": 100 * float(values.mean()), "rows": values.size, "no span": without}


def table(predictions: list[dict]) -> str:
    """Grounding predictions -> a Markdown table, a line a protocol."""
    lines = []
    for name, protocol in PROTOCOLS.items():
        metrics = rescore(predictions, protocol)
        cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in metrics.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {protocol.says} |")
    head = f"| scored as | {' | '.join(metrics)} | how |"
    return "\n".join([head, "|---" * (len(metrics) + 2) + "|", *lines])


def main():
    parser = command_line("papers.protocols", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the --output of evaluate.py")
    folder = parser.parse_args().folder
    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder}: holds no finished evaluation (no metrics.json); give the --output of evaluate.py.")
    predictions = [p for p in read_predictions(folder) if p["task"] == "tvg"]
    if not predictions:
        raise UserError(f"{folder}: holds no predictions of grounding; evaluate with --tasks tvg.")
    if any("alternatives" not in p for p in predictions):
        raise UserError(f"{folder}: was made by an earlier version, which did not note all windows; evaluate again.")
    print(table(predictions))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"papers.protocols: {error}")
