"""What stands between two stages: files in, files out. The training loop knows nothing of it.

    python stages.py invert-sft --annotations FILE --output DEMOS.jsonl
    python stages.py longest    --demonstrations FILE --share 0.5 --output DEMOS.jsonl
    python stages.py anchors    --rollouts FOLDER --output DEMOS.jsonl
    python stages.py difficulty --annotations FILE --predictions FOLDER --difficulty 0.1 0.7 --output ROWS.json

invert-sft  Invert4TVG, Appendix D: the ground-truth clip -> its query, for `invert4tvg.py --demonstrations DEMOS.jsonl
            --inversion-format answer`
longest     TVG-R1: of a cold start's completions, the longer ones, which its authors found better
anchors     TAR-TVG: of the completions that `invert4tvg.py --save-rollouts` wrote to FOLDER, those worth imitating
difficulty  TVG-R1 and Time-R1: of an annotation file's rows, those whose mean IoU in `evaluate.py --tasks tvg --output
            FOLDER` (greedy, or --samples k) lies in a band; writes Time-R1's format, which `--annotations` reads
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

import data
import evaluate
import rewards
from runtime import UserError, option


def invert_sft(samples):
    """Appendix D's pairs: the clip of every row with start < end, asked for as a VD prompt, and its query."""
    return [data.demonstration_row(s, "vd", f"<answer>{s.query}</answer>") for s in samples if s.start < s.end]


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

    def ious(r):  # of the anchors, then of the answer
        spans = [*rewards.parse_anchors(r["completion"]), rewards.parse_span(r["completion"])]
        return [rewards.temporal_iou(span, (r["start"], r["end"])) for span in spans]

    def anchors(r):
        return rewards.parse_anchors(r["completion"])

    rule("well-formed", lambda r: rewards.format_reward("tvg", r["completion"], tvg_reward="anchors") == 1
         and None not in anchors(r) and len(anchors(r)) <= rewards.ANCHORS_WANTED[-1])
    rule(f"at least {min_anchors} anchors", lambda r: len(anchors(r)) >= min_anchors)
    rule("IoU never falls from anchor to anchor and to the answer", lambda r: ious(r) == sorted(ious(r)))
    rule(f"IoU of the answer at least {min_iou:g}", lambda r: ious(r)[-1] >= min_iou)
    fields = ("video", "query", "start", "end", "task", "completion")
    unique = dict.fromkeys(tuple(r[field] for field in fields) for r in left)
    counts.append(("not the same as another", len(unique)))
    return [dict(zip(fields, values)) for values in unique], counts


def mean_ious(predictions, samples):
    """Predictions of all rows, one or k a row -> the mean IoU of each (rows,): the easier, the higher."""
    found = [[] for _ in samples]
    for p in predictions:
        if p["task"] == "tvg":
            s = samples[p["row"]] if p["row"] < len(samples) else None
            if s is None or (p["query"], *p["truth"]) != (s.query, s.start, s.end):
                raise UserError(f"the predictions are of another annotation file: their row {p['row']} is {p['query']!r}.")
            found[p["row"]].append(p["parts"]["iou"])
    missing = sum(not ious for ious in found)
    if missing:
        raise UserError(f"{missing} of {len(samples)} rows have no prediction; run evaluate.py --tasks tvg on all rows.")
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
            rows = rows[np.argsort(difficulty[rows], kind="stable")][evaluate.evenly_spaced(len(rows), keep)]
    return sorted(int(row) for row in rows)


def histogram(difficulty, kept):
    """-> lines: how many rows, and how many of those kept, have a mean IoU in each tenth."""
    tenths = np.minimum((difficulty * 10).astype(int), 9)
    everywhere, chosen = np.bincount(tenths, minlength=10), np.bincount(tenths[kept], minlength=10)
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
        raise UserError(f"--rollouts {folder}: holds no rollouts.*.jsonl; train with --save-rollouts first.")
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


def main(args):
    if args.stage in ("invert-sft", "difficulty"):
        samples = data.load_annotations(args.annotations, "", args.single_window)
    if args.stage == "invert-sft":
        rows = invert_sft(samples)
        print(f"{len(samples)} rows, {len(rows)} with start < end")
    elif args.stage == "longest":
        demonstrations = data.load_demonstrations(args.demonstrations, "")
        lines = [data.demonstration_row(d.sample, d.task, d.completion) for d in demonstrations]
        rows = longest(lines, args.share)
        mean = lambda part: np.mean([len(line["completion"].split()) for line in part])  # noqa: E731
        print(f"{len(lines)} demonstrations of {mean(lines):.1f} words, {len(rows)} kept of {mean(rows):.1f}")
    elif args.stage == "anchors":
        rows, counts = select_anchors(read_rollouts(args.rollouts), args.min_anchors, args.min_iou)
        rows = [rows[i] for i in evaluate.evenly_spaced(len(rows), args.keep)]
        print("\n".join(f"{count:9,}  {name}" for name, count in [*counts, ("kept, evenly over the training", len(rows))]))
    else:
        low, high = args.difficulty
        if not Path(args.predictions).is_dir():
            raise UserError(f"--predictions {args.predictions}: is no folder; give the --output of evaluate.py.")
        difficulty = mean_ious(evaluate.read_predictions(args.predictions), samples)
        kept = choose_rows(difficulty, low, high, args.keep, args.choose, args.seed)
        rows = [{"video": Path(s.video).name, "duration": s.duration, "timestamp": [s.start, s.end], "sentence": s.query,
                 "qid": s.qid, "difficulty": round(100 * d, 2)} for s, d in ((samples[i], difficulty[i]) for i in kept)]
        print("\n".join(histogram(difficulty, kept)))
        print(f"{len(rows)} of {len(samples)} rows kept, mean IoU {difficulty.mean():.3f}")
    if not rows:
        raise UserError(f"no row is left for {args.output}; look at the input, or widen the thresholds.")
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=0) + "\n" if args.stage == "difficulty"
                      else "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(output)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    add = {name: stages.add_parser(name) for name in ("invert-sft", "longest", "anchors", "difficulty")}
    for name in ("invert-sft", "difficulty"):
        add[name].add_argument("--annotations", required=True, help="any file that training reads")
        add[name].add_argument("--single-window", action="store_true",
                               help="QVHighlights: only queries with one relevant window")
    add["longest"].add_argument("--demonstrations", required=True, help="jsonl, also in TVG-R1's field names")
    add["longest"].add_argument("--share", type=float, default=0.5, help="kept, of all [0.5]")
    add["anchors"].add_argument("--rollouts", required=True, help="the --output of a run with --save-rollouts")
    add["anchors"].add_argument("--min-anchors", type=int, default=2, help="fewest anchors [2]")
    add["anchors"].add_argument("--min-iou", type=float, default=0.5, help="least IoU of the answer [0.5]")
    add["difficulty"].add_argument("--predictions", required=True, help="evaluate.py's --output on --annotations")
    add["difficulty"].add_argument("--difficulty", type=float, nargs=2, default=(0.1, 0.7), metavar=("LOW", "HIGH"),
                                   help="band of mean IoU kept: above LOW, up to HIGH [0.1 0.7]")
    for name in ("anchors", "difficulty"):
        add[name].add_argument("--keep", type=int, default=0, help="most rows kept; 0: all")
    add["difficulty"].add_argument("--choose", choices=("even", "gaussian"), default="even",
                                   help="which of them: evenly along the mean IoU, or around 0.3 at random [even]")
    add["difficulty"].add_argument("--seed", type=int, default=0, help="of the random choice [0]")
    for sub in (parser, *add.values()):
        sub.error = lambda message, sub=sub: sub.exit(2, f"{sub.prog}: {message}; --help lists every option.\n")
    for sub in add.values():
        sub.add_argument("--output", required=True, help="file to write")
    args = parser.parse_args(argv)
    given = vars(args)
    for name, low, high in (("share", 1e-9, 1), ("min_iou", 0, 1), ("min_anchors", 2, 4), ("keep", 0, math.inf),
                            ("seed", 0, math.inf)):
        if name in given and not low <= given[name] <= high:
            add[args.stage].error(f"{option(name)} is {given[name]:g}; it lies between {round(low):g} and {high:g}")
    if args.stage == "difficulty" and not -1 <= args.difficulty[0] < args.difficulty[1] <= 1:
        add["difficulty"].error("--difficulty {:g} {:g} is no band; give LOW below HIGH, as IoU".format(*args.difficulty))
    return args


if __name__ == "__main__":
    try:
        main(parse())
    except (UserError, OSError, ValueError) as error:
        sys.exit(f"stages.py: {error}")
