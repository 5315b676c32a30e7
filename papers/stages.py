"""What stands between two stages: files in, files out. The training loop knows nothing of it.

    python -m papers.stages invert-sft --annotations FILE --output DEMOS.jsonl
    python -m papers.stages longest    --demonstrations FILE --share 0.5 --output DEMOS.jsonl
    python -m papers.stages anchors    --rollouts FOLDER --output DEMOS.jsonl
    python -m papers.stages difficulty --annotations FILE --predictions FOLDER --difficulty 0.1 0.7 --output ROWS.json

invert-sft  Invert4TVG, Appendix D: the ground-truth clip -> its query, for `invert4tvg.py --demonstrations DEMOS.jsonl
            --inversion-format answer`
longest     TVG-R1: of a cold start's completions, the longer ones, which its authors found better
anchors     TAR-TVG: of the completions that `invert4tvg.py --save-rollouts 1` wrote to FOLDER, those worth imitating
difficulty  TVG-R1 and Time-R1: of an annotation file's rows, those whose mean IoU in `evaluate.py --tasks tvg --output
            FOLDER` (greedy, or --samples k) lies in a band; writes Time-R1's format, which `--annotations` reads
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

import papers.rewards
import rewards
from engine.program.settings import UserError, command_line, print_any_name
from engine.run.predictions import read_predictions
from engine.words.annotations import load_annotations, load_demonstrations
from engine.words.samples import demonstration_row, excerpt_fields
from evaluate import evenly_spaced
from papers.rewards import ANCHORS_WANTED, parse_anchors


def invert_sft(samples):
    """Appendix D's pairs: the clip of every row with start < end, asked for as a VD prompt, and its query."""
    return [demonstration_row(s, "vd", f"<answer>{s.query}</answer>") for s in samples if s.start < s.end]


def from_tvg_r1(r):
    """A demonstration in TVG-R1's field names, where it has those -> in ours. All of them are of grounding.

    "problem" is the query, "gt_frame" [start, end] in seconds; "solution" is a guess, as its cold-start file is not
    public.
    """
    if "gt_frame" not in r:
        return r
    start, end = r["gt_frame"]
    renamed = {"query": r["problem"], "start": start, "end": end, "task": "tvg"}
    return renamed | ({"completion": r["solution"]} if "solution" in r else {}) | r


def longest(lines, share):
    """The `share` of demonstrations (0 to 1) with the most words, in the file's order."""
    words = [len(line["completion"].split()) for line in lines]
    kept = sorted(np.argsort(words, kind="stable")[len(lines) - math.ceil(share * len(lines)):])
    return [lines[i] for i in kept]


def select_anchors(rollouts, min_anchors=2, min_iou=0.5):
    """TAR-TVG's self-distillation: rollouts that pass every rule -> (demonstrations, [(rule, how many are left)]).

    The paper states "explicit anchor quality thresholds" and no numbers; these rules are this project's reading.
    Anchors that the reward would not count, more than four or unreadable, are no well-formed completion here.
    """
    left = [r for r in rollouts if r["task"] == "tvg"]
    counts = [("grounding completions", len(left))]

    def rule(name, holds):
        nonlocal left
        left = [r for r in left if holds(r)]
        counts.append((name, len(left)))

    def anchors(r):
        return parse_anchors(r["completion"])

    def is_well_formed(r):
        form = rewards.format_reward("tvg", r["completion"], rewards.Scoring(papers.rewards.anchors))
        return form == 1 and None not in anchors(r) and len(anchors(r)) <= ANCHORS_WANTED[-1]

    def ious(r):  # of the anchors, then of the answer; of several segments the one counts that the answer hits best
        spans = [*anchors(r), rewards.parse_span(r["completion"])]
        segments = [(r["start"], r["end"]), *r.get("alternatives", ())]
        found = [[rewards.temporal_iou(span, segment) for span in spans] for segment in segments]
        return max(found, key=lambda one: one[-1])

    rule("well-formed", is_well_formed)
    rule(f"at least {min_anchors} anchors", lambda r: len(anchors(r)) >= min_anchors)
    rule("IoU never falls from anchor to anchor and to the answer", lambda r: ious(r) == sorted(ious(r)))
    rule(f"IoU of the answer at least {min_iou:g}", lambda r: ious(r)[-1] >= min_iou)
    fields = ("video", "query", "start", "end", "task", "completion", "video_start", "video_end")
    unique = dict.fromkeys(tuple((field, r[field]) for field in fields if field in r) for r in left)
    counts.append(("not the same as another", len(unique)))
    return [dict(values) for values in unique], counts


def mean_ious(predictions, samples):
    """Predictions of all rows, one or k a row -> the mean IoU of each (rows,): the easier, the higher."""
    found = [[] for _ in samples]
    for p in predictions:
        if p["task"] == "tvg":
            s = samples[p["row"]] if p["row"] < len(samples) else None
            if s is None or (p["query"], *p["truth"]) != (s.query, s.start, s.end):
                raise UserError(f"the predictions are of another annotation file, or were made with another --windows: "
                                f"their row {p['row']} is {p['query']!r}.")
            found[p["row"]].append(p["parts"]["iou"])
    missing = sum(not ious for ious in found)
    if missing:
        raise UserError(f"{missing} of {len(samples)} rows have no prediction; run evaluate.py --tasks tvg on all of "
                        "them.")
    return np.array([np.mean(ious) for ious in found])


def choose_rows(difficulty, low, high, keep=0, choose="even", seed=0):
    """Indices, in order, of the rows with low < mean IoU <= high; of these at most `keep` (0: all).

    "even": evenly spaced along the sorted mean IoUs, as Time-R1 does before each epoch (0 to 0.7, 2,500 rows);
    "gaussian": drawn without replacement with weights exp(-(IoU - 0.3)^2 / (2 * 0.2^2)), as for its initial set.
    """
    rows = np.flatnonzero((difficulty > low) & (difficulty <= high))
    if 0 < keep < len(rows):
        if choose == "gaussian":
            weights = np.exp(-(difficulty[rows] - 0.3) ** 2 / (2 * 0.2**2))
            rows = np.random.default_rng(seed).choice(rows, keep, replace=False, p=weights / weights.sum())
        else:
            rows = rows[np.argsort(difficulty[rows], kind="stable")][evenly_spaced(len(rows), keep)]
    return sorted(int(row) for row in rows)


def histogram(difficulty, kept):
    """-> lines: how many rows, and how many of those kept, have a mean IoU in each tenth."""
    tenths = np.minimum((difficulty * 10).astype(int), 9)
    everywhere = np.bincount(tenths, minlength=10)
    chosen = np.bincount(tenths[kept], minlength=10)
    widest = max(everywhere.max(), 1)
    lines = ["mean IoU     rows   kept"]
    for i, (n, k) in enumerate(zip(everywhere, chosen)):
        bar = "#" * round(50 * k / widest)
        lines.append(f"{i / 10:.1f}-{(i + 1) / 10:.1f} {n:8,} {k:6,}  {bar}{'.' * (round(50 * n / widest) - len(bar))}")
    return lines


def read_rollouts(folder):
    """The lines of rollouts.*.jsonl; one that an interruption cut off is left out."""
    files = sorted(Path(folder).glob("rollouts.*.jsonl"))
    if not files:
        raise UserError(f"--rollouts {folder}: holds no rollouts.*.jsonl; train with --save-rollouts 1 first.")
    rows = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.endswith("}"):
                try:
                    row = json.loads(line)
                    row["video"], row["query"], row["task"], row["completion"].strip(), row["start"] < row["end"]
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    raise UserError(f"{path}, line {number}: is no rollout of --save-rollouts ({error!r}).") from error
                rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------ the program


def run_invert_sft(args):
    samples = load_annotations(args.annotations, "", args.windows)
    rows = invert_sft(samples)
    print(f"{len(samples)} rows, {len(rows)} with start < end")
    return rows


def run_longest(args):
    demonstrations = load_demonstrations(args.demonstrations, "", rewards.TASKS, from_tvg_r1)
    lines = [demonstration_row(d.sample, d.task, d.completion) for d in demonstrations]
    rows = longest(lines, args.share)
    print(f"{len(lines)} demonstrations of {mean_words(lines):.1f} words, {len(rows)} kept of {mean_words(rows):.1f}")
    return rows


def mean_words(lines):
    return np.mean([len(line["completion"].split()) for line in lines])


def run_anchors(args):
    rows, counts = select_anchors(read_rollouts(args.rollouts), args.min_anchors, args.min_iou)
    rows = [rows[i] for i in evenly_spaced(len(rows), args.keep)]
    for name, count in [*counts, ("kept, evenly over the training", len(rows))]:
        print(f"{count:9,}  {name}")
    return rows


def run_difficulty(args):
    samples = load_annotations(args.annotations, "", args.windows)
    if not Path(args.predictions).is_dir():
        raise UserError(f"--predictions {args.predictions}: is no folder; give the --output of evaluate.py.")
    difficulty = mean_ious(read_predictions(args.predictions), samples)
    low, high = args.difficulty
    kept = choose_rows(difficulty, low, high, args.keep, args.choose, args.seed)
    print("\n".join(histogram(difficulty, kept)))
    print(f"{len(kept)} of {len(samples)} rows kept, mean IoU {difficulty.mean():.3f}")
    rows = []
    for i in kept:
        s = samples[i]
        rows.append({"video": s.video_name(), "duration": s.duration, "timestamp": [s.start, s.end],
                     "sentence": s.query, "qid": s.qid, "difficulty": round(100 * difficulty[i], 2)}
                    | excerpt_fields(s))
    return rows


STAGES = {"invert-sft": run_invert_sft, "longest": run_longest, "anchors": run_anchors, "difficulty": run_difficulty}


def main(args):
    print_any_name()
    rows = STAGES[args.stage](args)
    if not rows:
        raise UserError(f"no row is left for {args.output}; look at the input, or widen the thresholds.")
    if args.stage == "difficulty":  # a list of annotations; the others are demonstrations, one a line
        text = json.dumps(rows, indent=0) + "\n"
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(output)


def number(kind, low, high):
    """-> an argparse type: a number of `kind` from `low` to `high`."""
    def parse_number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"it is {text}; it must lie between {low:g} and {high:g}")
        return value

    return parse_number


def parse(argv=None):
    parser = command_line("papers.stages", __doc__)
    subparsers = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    add = {name: subparsers.add_parser(name) for name in STAGES}
    for sub in (parser, *add.values()):
        sub.error = lambda message, sub=sub: sub.exit(2, f"{sub.prog}: {message}; --help lists every option.\n")
    count = number(int, 0, math.inf)
    iou = number(float, -1, 1)

    for name in ("invert-sft", "difficulty"):
        add[name].add_argument("--annotations", required=True, help="any file that training reads")
        add[name].add_argument("--windows", choices=("each", "single"), default="each",
                               help="QVHighlights: each window is a row, or each query with a single one [each]")
    add["longest"].add_argument("--demonstrations", required=True, help="jsonl, also in TVG-R1's field names")
    add["longest"].add_argument("--share", type=number(float, 1e-9, 1), default=0.5, help="kept, of all [0.5]")
    add["anchors"].add_argument("--rollouts", required=True, help="the --output of a run with --save-rollouts 1")
    add["anchors"].add_argument("--min-anchors", type=number(int, 2, 4), default=2, help="fewest anchors [2]")
    add["anchors"].add_argument("--min-iou", type=number(float, 0, 1), default=0.5,
                                help="least IoU of the answer [0.5]")
    add["difficulty"].add_argument("--predictions", required=True, help="evaluate.py's --output on --annotations")
    add["difficulty"].add_argument("--difficulty", type=iou, nargs=2, default=(0.1, 0.7), metavar=("LOW", "HIGH"),
                                   help="band of mean IoU kept: above LOW, up to HIGH [0.1 0.7]")
    add["difficulty"].add_argument("--choose", choices=("even", "gaussian"), default="even",
                                   help="which of them: evenly along the mean IoU, or around 0.3 at random [even]")
    add["difficulty"].add_argument("--seed", type=count, default=0, help="of the random choice [0]")
    for name in ("anchors", "difficulty"):
        add[name].add_argument("--keep", type=count, default=0, help="most rows kept; 0: all")
    for sub in add.values():
        sub.add_argument("--output", required=True, help="file to write")

    args = parser.parse_args(argv)
    if args.stage == "difficulty" and not args.difficulty[0] < args.difficulty[1]:
        low, high = args.difficulty
        add["difficulty"].error(f"--difficulty {low:g} {high:g} is no band; give LOW below HIGH, as IoU")
    return args


if __name__ == "__main__":
    try:
        main(parse())
    except (UserError, OSError, ValueError) as error:
        sys.exit(f"papers.stages: {error}")
