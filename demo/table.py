"""The demo's table: held-out results of each checkpoint beside the constant guess, and what inversion changes.

    python -m demo.table FOLDER             print the table, from FOLDER/<run>-test/ and FOLDER/<run>/metrics.jsonl
    python -m demo.table FOLDER iterations  print how many supervised iterations fill the time that GRPO took
    python -m demo.table FOLDER rows "LABEL=EVALUATION[:RUN,RUN...]" ...
                                            print a table of evaluations, with the minutes that their RUNs took

FOLDER is what demo/demo.sh and papers/*.sh fill.
"""

import json
import statistics
import sys
from collections import Counter
from pathlib import Path

from engine.program.settings import command_line

ROWS = {
    "warm": "warm start (supervised, short on purpose)",
    "grpo": "+ GRPO with inversion, p = 0.8",
    "tvg-only": "+ GRPO, grounding only, p = 1",
    "supervised": "warm start + about as many minutes of supervised training",
}
COLUMNS = ("mIoU", "R1@0.3", "R1@0.5", "R1@0.7", "VC", "AR", "VD")
PAPERS_COLUMNS = (*COLUMNS[:4], "format", "2-4 anchors", "anchor gain")


def logged(folder, run, name):
    """One metric of all iterations of a run."""
    rows = map(json.loads, (folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row[name] for row in rows if row["task"] != "eval"]


def minutes(folder, runs):
    return sum(sum(logged(folder, run, "seconds")) for run in runs) / 60


def heading(columns):
    return f"| held-out test videos | minutes | {' | '.join(columns)} |\n|---|---|" + "---|" * len(columns)


def line(label, spent, metrics, columns):
    """One row of the table; what was not measured stays empty."""
    cells = [spent, *(metrics.get(name) for name in columns)]
    return f"| {label} | " + " | ".join("" if cell is None else f"{cell:.1f}" for cell in cells) + " |"


def constant_guess(folder):
    """The one segment, on a half-second grid, and the one verb that do best on the training rows -> test metrics."""
    import data  # not above: to count iterations takes seconds less without these
    import evaluate
    import rewards

    train = data.load_annotations(folder / "train.txt", folder)
    test = data.load_annotations(folder / "test.txt", folder)
    grid = [i / 2 for i in range(25)]
    spans = [(start, end) for start in grid for end in grid if start < end]
    best = max(spans, key=lambda span: sum(rewards.temporal_iou(span, (s.start, s.end)) for s in train))
    verb, _ = Counter(verb for s in train for verb in rewards.mask_verbs(s.query)[1]).most_common(1)[0]
    metrics = evaluate.grounding_metrics([rewards.temporal_iou(best, (s.start, s.end)) for s in test])
    share = 100 * sum(verb in rewards.mask_verbs(s.query)[1] for s in test) / len(test)
    label = f'best constant guess (always {best[0]} to {best[1]} s, always "{verb}")'
    return label, metrics | dict.fromkeys(("VC", "AR", "VD"), share)


def print_demo(folder):
    print(heading(COLUMNS))
    label, metrics = constant_guess(folder)
    print(line(label, None, metrics, COLUMNS))
    found = {}
    for run, label in ROWS.items():
        found[run] = json.loads((folder / f"{run}-test" / "metrics.json").read_text(encoding="utf-8"))
        spent = minutes(folder, ["sees", "warm"] if run == "warm" else [run])
        print(line(label, spent, found[run], COLUMNS))
    actions = statistics.mean(found["grpo"][c] - found["tvg-only"][c] for c in ("VC", "AR", "VD"))
    print(f"\nGRPO over its warm start: {found['grpo']['mIoU'] - found['warm']['mIoU']:+.1f} mIoU. "
          f"Inversion against grounding only: {actions:+.1f} points of VC, AR and VD on average.")


def print_rows(folder, rows):
    print(heading(PAPERS_COLUMNS))
    for row in rows:
        label, _, found = row.partition("=")
        evaluation, _, runs = found.partition(":")
        metrics = json.loads((folder / evaluation / "metrics.json").read_text(encoding="utf-8"))
        print(line(label, minutes(folder, runs.split(",")) if runs else None, metrics, PAPERS_COLUMNS))


def main():
    parser = command_line("demo.table", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("what", nargs="?", choices=("iterations", "rows"), help="in place of the demo's table")
    parser.add_argument("rows", nargs="*", metavar="LABEL=EVALUATION[:RUN,RUN...]")
    given = parser.parse_args()
    folder = given.folder
    if given.what == "iterations":
        print(round(60 * minutes(folder, ["grpo"]) / statistics.median(logged(folder, "warm", "seconds"))))
    elif given.what == "rows":
        print_rows(folder, given.rows)
    else:
        print_demo(folder)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"demo.table: {error}")
