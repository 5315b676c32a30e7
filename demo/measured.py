"""What many runs measured: from their folders to rows of a csv, and the statistics of tables and pictures."""

import csv
import json
import statistics
from pathlib import Path

from demo.make_demo import RARE_VERBS
from engine.run.predictions import read_predictions

METRICS = ("R1@0.3", "R1@0.5", "R1@0.7", "mIoU", "VC", "AR", "VD")
RARE = ("mIoU, rare", "VC, rare", "AR, rare", "VD, rare")  # the queries whose verb is rare in the warm start
NAMED = "verb named"  # percent of VC, AR and VD completions that name the query's verb, in the thought or the answer
LISTS = ("VD lists", "VD verbs")  # percent of the descriptions that name several verbs, and verbs of a description
TRAINING = tuple(f"verbs in fifth {k} of training" for k in range(1, 6))  # of the descriptions that it sampled
MEASURED = METRICS + RARE + (NAMED,) + LISTS + TRAINING


def collect(runs, seeds):
    """Measurements of those of the runs that are finished -> rows {seed, run, metric: percent}."""
    rows = []
    for seed in seeds:
        for path in sorted(Path(f"runs/demo-{seed}").glob("*/metrics.json")):
            run = path.parent.name.removesuffix("-test")
            if run in runs:
                predictions = read_predictions(path.parent)
                metrics = json.loads(path.read_text(encoding="utf-8"))
                metrics |= rare_metrics(predictions) | list_metrics(predictions) | {NAMED: named(predictions)}
                metrics |= training_metrics(Path(f"runs/demo-{seed}/{run}/metrics.jsonl"))
                found = {name: round(metrics[name], 2) for name in MEASURED if name in metrics}
                rows.append({"seed": seed, "run": run} | found)
    return rows


def rare_metrics(predictions):
    """Predictions -> mIoU, VC, AR and VD, in percent, of the queries whose verb is rare in the warm start."""
    rare = [p for p in predictions if verb_of(p) in RARE_VERBS]
    found = {}
    for name, task, part in zip(RARE, ("tvg", "vc", "ar", "vd"), ("iou", "vc", "ar", "vd")):
        found[name] = 100 * statistics.mean(p["parts"][part] for p in rare if p["task"] == task)
    return found


def verb_of(prediction):
    """The verb of a toy query, its last word, as the toy's thoughts and answers write it."""
    return prediction["query"].rstrip(".").split()[-1]


def named(predictions):
    """Predictions -> percent of the VC, AR and VD completions in which the query's verb stands, wherever it does.

    VC, AR and VD count the answer alone. Where they fall and this does not, the verb is still known but not answered.
    """
    return 100 * statistics.mean(verb_of(p) in p["completion"].split() for p in predictions if p["task"] != "tvg")


def list_metrics(predictions):
    """Predictions -> percent of the descriptions that name several verbs, and the mean number that they name."""
    verbs = [p["parts"]["vd_verbs"] for p in predictions if p["task"] == "vd"]
    return {"VD lists": 100 * statistics.mean(n > 1 for n in verbs), "VD verbs": statistics.mean(verbs)}


def training_metrics(log):
    """A run's log -> the mean number of distinct verbs in the descriptions that each fifth of its iterations sampled.

    A fifth without descriptions is left out, and all of them where `log` does not exist: other videos, a second
    evaluation of the same run.
    """
    if not log.exists():
        return {}
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    length = max(row["iteration"] for row in rows) + 1
    fifths = [[] for _ in TRAINING]
    for row in rows:
        if "vd/vd_verbs" in row:
            fifths[row["iteration"] * len(TRAINING) // length].append(row["vd/vd_verbs"])
    return {name: statistics.mean(values) for name, values in zip(TRAINING, fifths) if values}


def read_rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def spread(values):
    """Mean and, of several, standard deviation in brackets."""
    deviation = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


# The 97.5% quantile of Student's t, for 1, 2, ... degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def bounds(gains):
    """Differences of two or more pairs -> their mean and the ends of its 95% interval by Student's t."""
    mean = statistics.mean(gains)
    half = T[len(gains) - 2] * statistics.stdev(gains) / len(gains) ** 0.5
    return mean, mean - half, mean + half


def interval(gains):
    """Differences of pairs -> their mean and, of several, its interval, as text."""
    if not gains:
        return ""
    if len(gains) == 1:
        return f"{gains[0]:+.1f}"
    mean, low, high = bounds(gains)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def differences(rows, run, base, metric):
    """`run` minus `base` for each seed that has both; none of a run with itself."""
    if run == base:
        return []
    of_run = {row["seed"]: float(row[metric]) for row in rows if row["run"] == run}
    of_base = {row["seed"]: float(row[metric]) for row in rows if row["run"] == base}
    return [of_run[seed] - of_base[seed] for seed in of_run if seed in of_base]
