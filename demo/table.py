"""The demo's table: held-out results of each checkpoint beside the constant guess, and what inversion changes.

    python demo/table.py FOLDER             print the table, from FOLDER/<run>-test/ and FOLDER/<run>/metrics.jsonl
    python demo/table.py FOLDER iterations  print how many supervised iterations fill the time that GRPO took
    python demo/table.py FOLDER sees RUN    succeed when supervised RUN ended below SEES nats a token
    python demo/table.py FOLDER rows "LABEL=EVALUATION[:RUN,RUN...]" ...
                                            print a table of evaluations, with the minutes that their RUNs took

FOLDER is what `bash train.sh` fills.
"""

import json
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import evaluate  # noqa: E402
import rewards  # noqa: E402

ROWS = {"warm": "warm start (supervised, short on purpose)", "grpo": "+ GRPO with inversion, p = 0.8",
        "tvg-only": "+ GRPO, grounding only, p = 1", "supervised": "+ supervised instead, about as long"}
COLUMNS = ("mIoU", "R1@0.3", "R1@0.5", "R1@0.7", "VC", "AR", "VD")
MORE_COLUMNS = (*COLUMNS[:4], "format", "2-4 anchors", "anchor gain")

SEES = 0.2  # 0.29 and above as long as the model only guesses the verb of a clip, about 0.15 once it has learned to see


def logged(folder, run, name):
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


def constant_guess(folder):
    """The one segment, on a half-second grid, and the one verb that do best on the training rows -> test metrics."""
    train, test = (data.load_annotations(folder / f"{split}.txt", folder) for split in ("train", "test"))
    grid = [i / 2 for i in range(25)]
    best = max(((a, b) for a in grid for b in grid if a < b),
               key=lambda span: sum(rewards.temporal_iou(span, (s.start, s.end)) for s in train))
    verb = Counter(verb for s in train for verb in rewards.mask_verbs(s.query)[1]).most_common(1)[0][0]
    metrics = evaluate.grounding_metrics([rewards.temporal_iou(best, (s.start, s.end)) for s in test])
    share = 100 * sum(verb in rewards.mask_verbs(s.query)[1] for s in test) / len(test)
    return metrics | dict.fromkeys(("VC", "AR", "VD"), share), f"constant guess ({best[0]} to {best[1]} s; \"{verb}\")"


def main(folder):
    metrics, label = constant_guess(folder)
    print("| held-out test videos | minutes | " + " | ".join(COLUMNS) + " |\n|---|---|" + "---|" * len(COLUMNS))
    print(f"| {label} | | " + " | ".join(f"{metrics[c]:.1f}" for c in COLUMNS) + " |")
    found = {}
    for run, label in ROWS.items():
        found[run] = json.loads((folder / f"{run}-test" / "metrics.json").read_text())
        parts = [run, *(p.name for p in folder.glob("warm-1.?") if run == "warm")]
        spent = sum(sum(logged(folder, part, "seconds")) for part in parts)
        print(f"| {label} | {spent / 60:.1f} | " + " | ".join(f"{found[run][c]:.1f}" for c in COLUMNS) + " |")
    actions = statistics.mean(found["grpo"][c] - found["tvg-only"][c] for c in ("VC", "AR", "VD"))
    print(f"\nGRPO over its warm start: {found['grpo']['mIoU'] - found['warm']['mIoU']:+.1f} mIoU. "
          f"Inversion against grounding only: {actions:+.1f} points of VC, AR and VD on average.")


def print_rows(folder, rows):
    print("| held-out test videos | minutes | " + " | ".join(MORE_COLUMNS) + " |\n|---|---|" + "---|" * len(MORE_COLUMNS))
    for row in rows:
        label, _, found = row.partition("=")
        evaluation, _, runs = found.partition(":")
        metrics = json.loads((folder / evaluation / "metrics.json").read_text())
        spent = sum(sum(logged(folder, run, "seconds")) for run in runs.split(",")) / 60 if runs else None
        cells = [metrics.get(name) for name in MORE_COLUMNS]
        print(f"| {label} | " + " | ".join("" if cell is None else f"{cell:.1f}" for cell in (spent, *cells)) + " |")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else sys.exit(__doc__)
    if sys.argv[2:] == ["iterations"]:
        print(round(sum(logged(folder, "grpo", "seconds")) / statistics.median(logged(folder, "warm", "seconds"))))
    elif sys.argv[2:3] == ["sees"]:
        sys.exit(statistics.mean(logged(folder, sys.argv[3], "nll")[-100:]) > SEES)
    elif sys.argv[2:3] == ["rows"]:
        print_rows(folder, sys.argv[3:])
    else:
        main(folder)
