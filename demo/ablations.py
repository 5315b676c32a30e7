"""Tables of many runs: mean and spread over seeds on the toy, beside the paper's numbers.

    python demo/ablations.py runs/SWEEP.csv SEED ...   collect runs/demo-SEED into the file, and print its table
    python demo/ablations.py demo/SWEEP.csv            print the table of a file collected before

SWEEP is ablations or few; `bash train.sh SWEEP` makes the runs, and calls the first.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

METRICS = ("R1@0.3", "R1@0.5", "R1@0.7", "mIoU", "VC", "AR", "VD")
# (section, [(run, label, the paper's R1@0.3 / 0.5 / 0.7 or mIoU, where it prints any)])
START = ("start", [("warm", "warm start, supervised", "")])
SWEEPS = {"ablations": (
    START,
    ("Table 2: inversion tasks", [
        ("tvg-only", "TVG only", "78.7 / 64.1 / 36.9"), ("vd", "VD", "79.1 / 64.3 / 39.4"),
        ("ar", "AR", "78.2 / 65.2 / 43.8"), ("vc", "VC", "78.8 / 68.0 / 42.0"),
        ("ar-vd", "AR + VD", "79.6 / 67.9 / 43.6"), ("vc-ar", "VC + AR", "78.8 / 68.1 / 43.8"),
        ("vc-vd", "VC + VD", "80.0 / 68.5 / 42.1"), ("grpo", "all three", "80.8 / 69.0 / 44.0")]),
    ("Figure 5: share of inversion, 1 - p", [
        ("tvg-only", "0", "78.7 / 64.1 / 36.9"), ("grpo", "0.2", "80.8 / 69.0 / 44.0, the best"), ("p-0.6", "0.4", "curve"),
        ("p-0.4", "0.6", "curve, below 0"), ("p-0.2", "0.8", "curve, below 0"), ("p-0.0", "1", "curve, the worst")]),
    ("Table 3: reward of inversion", [
        ("grpo", "binary", "80.8 / 69.0 / 44.0"), ("cosine", "cosine", "76.2 / 62.2 / 39.8")]),
    ("Figure 1: action understanding", [
        ("warm", "before", "bars"), ("tvg-only", "TVG only", "bars, VC, AR, VD lower"),
        ("grpo", "with inversion", "bars, VC, AR, VD kept"), ("tvg-only-no-kl", "TVG only, no KL", ""),
        ("grpo-no-kl", "with inversion, no KL", "")]),
    ("Figure 6: Invert-SFT", [
        ("warm", "before", "mIoU 18.0"), ("invert-sft", "after Invert-SFT", "mIoU 17.8"),
        ("grpo", "trained without it", "mIoU 57.9"), ("invert-sft-grpo", "trained after it", "mIoU 57.9")]),
    ("Figure 4: other videos, other format", [
        ("tvg-only-transfer", "TVG only", "bars"), ("grpo-transfer", "with inversion", "bars, higher")]),
), "few": (
    START,
    ("sixty annotations", [
        ("few-tvg-only", "TVG only", ""), ("few-tvg-only-280", "TVG only, 280 iterations", ""),
        ("few", "with inversion", "")]),
)}


def collect(sweep, seeds):
    """Metrics of a sweep's finished runs -> rows {seed, run, metric: percent}."""
    rows, known = [], {run for _, lines in SWEEPS[sweep] for run, _, _ in lines}
    for seed in seeds:
        for path in sorted(Path(f"runs/demo-{seed}").glob("*/metrics.json")):
            metrics, run = json.loads(path.read_text()), path.parent.name.removesuffix("-test")
            if run in known:
                rows.append({"seed": seed, "run": run} | {m: round(metrics[m], 2) for m in METRICS})
    return rows


def spread(values, sign=""):
    return "" if not values else f"{statistics.mean(values):{sign}.1f}" + (
        f" ({statistics.stdev(values):.1f})" if len(values) > 1 else "")


def gains(rows, run, metric="R1@0.7"):
    """What `run` has over grounding alone, seed by seed: seeds differ more than runs do, so only pairs compare."""
    base = "tvg-only-transfer" if run.endswith("-transfer") else "few-tvg-only" if run.startswith("few") else "tvg-only"
    value = {(row["run"], row["seed"]): float(row[metric]) for row in rows}
    return [value[name, seed] - value[base, seed] for name, seed in value if name == run != base and (base, seed) in value]


def table(sweep, rows):
    seeds = sorted({row["seed"] for row in rows})
    lines = [f"Mean (standard deviation) over seeds {', '.join(map(str, seeds))}; percent.", ""]
    for section, runs in SWEEPS[sweep]:
        lines += [f"| {section} | " + " | ".join(METRICS) + " | R1@0.7 over TVG only | the paper's |",
                  "|---" * (len(METRICS) + 3) + "|"]
        for run, label, paper in runs:
            found = [row for row in rows if row["run"] == run]
            cells = [spread([float(row[m]) for row in found]) for m in METRICS]
            cells.append(spread(gains(rows, run), "+"))
            lines.append(f"| {label} | " + " | ".join(cells) + f" | {paper} |")
        lines.append("")
    return "\n".join(lines)


def main(path, seeds):
    if path.stem not in SWEEPS:
        sys.exit(f"ablations.py: {path}: is no ablations.csv and no few.csv.")
    if seeds:
        rows = collect(path.stem, seeds)
        if not rows:
            sys.exit(f"ablations.py: no finished run of seeds {', '.join(seeds)} in runs/; "
                     f"`bash train.sh {path.stem}` makes them.")
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ("seed", "run", *METRICS))
            writer.writeheader()
            writer.writerows(rows)
    with open(path, newline="") as file:
        print(table(path.stem, list(csv.DictReader(file))))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except OSError as error:
        sys.exit(f"ablations.py: {error}")
    except IndexError:
        sys.exit(__doc__)
