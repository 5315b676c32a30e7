"""The logs that the repository ships, and the picture of healthy and unhealthy curves in docs/reading.md.

    python -m demo.curves FOLDER    copy the logs of FOLDER/<run>/metrics.jsonl to demo/logs/<run>.csv
    python -m demo.curves           draw docs/curves.svg from demo/logs/

FOLDER is what demo/demo.sh and, for the unhealthy runs, demo/unhealthy.sh fill.
"""

import csv
import json
import sys
from pathlib import Path

from engine.program.settings import command_line

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "demo" / "logs"
RUNS = ("grpo", "tvg-only", "runaway", "collapse", "no-spread", "hacked")
LEFT_OUT = ("sampler_gap_mean", "sampler_gap_max", "clip_low", "clip_high", "redrawn", "skipped")
PANELS = (  # metric, of which task, title, and the runs that show it, the healthy one first
    ("kl", "tvg", "runaway: the policy leaves its reference", ("tvg-only", "runaway")),
    ("tvg/iou", "tvg", "runaway: and its reward", ("tvg-only", "runaway")),
    ("entropy", "tvg", "no-spread: completions are alike", ("tvg-only", "no-spread")),
    ("zero_spread", "tvg", "no-spread: groups that teach nothing", ("tvg-only", "no-spread")),
    ("zero_spread", "ar", "collapse: no group teaches any more", ("grpo", "collapse")),
    ("ar/ar", "ar", "collapse: and the reward is not reached", ("grpo", "collapse")),
    ("vd/vd", "vd", "hacked: the reward rises", ("grpo", "hacked")),
    ("vd/vd_verbs", "vd", "hacked: as descriptions list verbs", ("grpo", "hacked")),
)


def write_csv(folder):
    """Every iteration is a row; numbers have four digits, and what a task does not have is empty."""
    LOGS.mkdir(exist_ok=True)
    for run in RUNS:
        rows = map(json.loads, (folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        rows = [{name: f"{value:.4g}" if isinstance(value, float) else value
                 for name, value in row.items() if name not in LEFT_OUT} for row in rows]
        names = list(dict.fromkeys(name for row in rows for name in row))
        with open(LOGS / f"{run}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def read_csv(run, name, task):
    """-> (iterations, values) of one metric in the iterations of one task."""
    with open(LOGS / f"{run}.csv", encoding="utf-8", newline="") as file:
        found = [(int(row["iteration"]), float(row[name])) for row in csv.DictReader(file) if row["task"] == task]
    return zip(*found)


def draw():
    import numpy as np
    from matplotlib.figure import Figure

    from report.curves import smooth, thin

    figure = Figure(figsize=(12, 5.6), layout="constrained", facecolor="white")
    for axes, (name, task, title, runs) in zip(figure.subplots(2, 4).flat, PANELS):
        for run, colour in zip(runs, ("#2e8b57", "#c83c32")):
            x, y = map(np.array, read_csv(run, name, task))
            axes.plot(*thin(x, y), color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(x, smooth(y, 5), color=colour, linewidth=1.8, label=run)
        axes.set_title(f"{title}\n{name}, {task} iterations", fontsize=9, loc="left")
        axes.set_xlim(0, 80)  # the unhealthy runs end there
        axes.set_xlabel("iteration", fontsize=8)
        if name == "kl":
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_ylim(bottom=0)
        axes.grid(True, linewidth=0.4)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(ROOT / "docs" / "curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    parser = command_line("demo.curves", __doc__)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER",
                        help="whose runs are written to demo/logs/ first")
    given = parser.parse_args()
    try:
        if given.folder:
            write_csv(given.folder)
        draw()
    except OSError as error:
        sys.exit(f"demo.curves: {error}")
