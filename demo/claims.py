"""The paper's claims, each beside what the toy shows, and the pictures of both.

    python -m demo.claims    print the tables of docs/results.md and draw docs/results.svg, from demo/*.csv
"""

import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from demo.measured import NAMED, TRAINING, bounds, differences, interval, read_rows
from engine.program.settings import command_line

matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "claims"})  # the same file each time
ROOT = Path(__file__).parents[1]
SEEDS = ("10", "11", "12", "13", "14")
ACTIONS = ("VC", "AR", "VD")


class Pair(NamedTuple):
    """One measurement of a claim: the run A minus the run B of the same seed, in one or several metrics."""

    label: str
    a: str
    b: str
    metrics: tuple = ("R1@0.7", "mIoU")
    sign: int = 1  # the claimed sign of the difference; 0: the claim is that there is none
    paper: float | None = None  # the paper's difference in the first metric, where it prints any


CLAIMS = {
    "Inversion raises grounding: p = 0.8 minus p = 1 (Table 1, abstract)": [
        Pair("as many iterations, 1,000", "grpo", "tvg-only", paper=7.1),
        Pair("as many grounding iterations, 800", "grpo", "tvg-only-800"),
        Pair("as many seconds, 1,000 and 1,080 iterations", "grpo", "tvg-only-1080"),
        Pair("1,000 iterations without KL", "grpo-no-kl", "tvg-only-no-kl"),
        Pair("200 iterations", "grpo-200", "tvg-only-200"),
        Pair("2,000 iterations", "grpo-2000", "tvg-only-2000"),
        Pair("other videos, another format (Figure 4)", "grpo-transfer", "tvg-only-transfer")],
    "Grounding alone costs action understanding (Figure 1)": [
        Pair("p = 1 minus warm start", "tvg-only", "warm", ("actions",), -1),
        Pair("the same, in thought or answer", "tvg-only", "warm", (NAMED,), -1),
        Pair("p = 1 without KL minus warm start", "tvg-only-no-kl", "warm", ("actions",), -1),
        Pair("the same, in thought or answer", "tvg-only-no-kl", "warm", (NAMED,), -1),
        Pair("p = 1, 2,000 iterations, minus warm start", "tvg-only-2000", "warm", ("actions",), -1),
        Pair("the same, in thought or answer", "tvg-only-2000", "warm", (NAMED,), -1)],
    "Inversion preserves it (Figure 1)": [
        Pair("p = 0.8 minus p = 1", "grpo", "tvg-only", ("actions",)),
        Pair("the same, in thought or answer", "grpo", "tvg-only", (NAMED,)),
        Pair("p = 0.8 minus p = 1, both without KL", "grpo-no-kl", "tvg-only-no-kl", ("actions",)),
        Pair("the same, in thought or answer", "grpo-no-kl", "tvg-only-no-kl", (NAMED,)),
        Pair("p = 0.8 minus p = 1, both 2,000 iterations", "grpo-2000", "tvg-only-2000", ("actions",)),
        Pair("the same, in thought or answer", "grpo-2000", "tvg-only-2000", (NAMED,)),
        Pair("p = 0.8 minus p = 1, other videos (Figure 4)", "grpo-transfer", "tvg-only-transfer", ("actions",)),
        Pair("p = 0.8 minus warm start: learned, not only kept", "grpo", "warm", ("actions",))],
    "One inversion task raises grounding, all three do best (Table 2)": [
        Pair("VD alone minus TVG only", "vd", "tvg-only", paper=2.5),
        Pair("AR alone minus TVG only", "ar", "tvg-only", paper=6.9),
        Pair("VC alone minus TVG only", "vc", "tvg-only", paper=5.1),
        Pair("all three minus VD alone", "grpo", "vd", paper=4.6),
        Pair("all three minus AR alone", "grpo", "ar", paper=0.2),
        Pair("all three minus VC alone", "grpo", "vc", paper=2.0)],
    "A fifth of inversions is the best share, and too many cost grounding (Figure 5)": [
        Pair("a share of 0.2 minus none", "grpo", "tvg-only", paper=7.1),
        Pair("a share of 0.2 minus 0.4", "grpo", "p-0.6"),
        Pair("a share of 0.6 minus none", "p-0.4", "tvg-only", sign=-1),
        Pair("a share of 0.8 minus none", "p-0.2", "tvg-only", sign=-1),
        Pair("a share of 1 minus none", "p-0.0", "tvg-only", sign=-1)],
    "The binary reward is better than the cosine (Table 3)": [
        Pair("binary minus cosine", "grpo", "cosine", paper=4.2)],
    "Invert-SFT changes nothing in the end (Figure 6)": [
        Pair("after Invert-SFT minus before", "invert-sft", "warm", ("mIoU",), 0, -0.2),
        Pair("GRPO after Invert-SFT minus without", "invert-sft-grpo", "grpo", ("mIoU",), 0, 0.0)],
}


def read_measured(*sweeps):
    """The rows of these sweeps over the five seeds; "actions" is the mean of VC, AR and VD."""
    rows = {}
    for name in sweeps:
        measured = read_rows(ROOT / "demo" / f"{name}.csv")
        rows |= {(row["seed"], row["run"]): row for row in measured if row["seed"] in SEEDS}
    for row in rows.values():
        row["actions"] = statistics.mean(float(row[name]) for name in ACTIONS)
    return list(rows.values())


def verdict(intervals, sign):
    """The ends of one or more 95% intervals and the claimed sign -> what they say of the claim.

    An interval decides where it does not hold 0. For a claim of no difference, those that hold 0 agree.
    """
    signs = {(low > 0) - (high < 0) for low, high in intervals}
    if sign == 0:
        return "no difference seen" if signs == {0} else "contradicted"
    if {1, -1} <= signs:
        return "undecided"
    if sign in signs:
        return "reproduced"
    return "contradicted" if -sign in signs else "not reproduced"


def table(rows):
    """A table for each claim, without the lines of runs that were not made."""
    lines = []
    for claim, pairs in CLAIMS.items():
        section = [line(rows, pair) for pair in pairs if is_made(rows, pair)]
        if section:
            lines += [f"| {claim} | the paper | difference, mean [95% interval] | on the toy |", "|---|---|---|---|"]
            lines += [*section, ""]
    return "\n".join(lines)


def is_made(rows, pair):
    return bool(differences(rows, pair.a, pair.b, pair.metrics[0]))


def line(rows, pair):
    gains = {metric: differences(rows, pair.a, pair.b, metric) for metric in pair.metrics}
    measured = ", ".join(f"{metric} {interval(values)}" for metric, values in gains.items())
    paper = "" if pair.paper is None else f"{pair.metrics[0]} {pair.paper:+.1f}"
    said = verdict([bounds(values)[1:] for values in gains.values()], pair.sign)
    return f"| {pair.label} | {paper} | {measured} | {said} |"


# ------------------------------------------------------------------------------------------------ the picture

COLOURS = {"R1@0.7": "#2a6f97", "mIoU": "#2e8b57", "actions": "#b5651d", NAMED: "#8a4f7d"}
SHADES = tuple(COLOURS.values())
ABOVE = dict(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)  # a legend's place


def forest(axes, rows, metrics):
    """The differences in these metrics, claim by claim from the top, with their intervals; diamonds: the paper's."""
    labels = []
    for claim, pairs in CLAIMS.items():
        shown = [pair for pair in pairs if set(pair.metrics) & set(metrics) and is_made(rows, pair)]
        if shown:
            labels.append(claim)
        for pair in shown:
            labels.append(pair.label)
            for metric in [name for name in pair.metrics if name in metrics]:
                mean, low, high = bounds(differences(rows, pair.a, pair.b, metric))
                y = len(labels) - 1 + (0.15 if metric == "mIoU" else -0.15) * (len(pair.metrics) > 1)
                axes.plot([low, high], [y, y], color=COLOURS[metric], linewidth=1.4)
                axes.plot(mean, y, "o", color=COLOURS[metric], markersize=4)
            if pair.paper is not None and pair.metrics[0] in metrics:
                axes.plot(pair.paper, len(labels) - 1.15, "D", mfc="none", color=COLOURS[pair.metrics[0]], markersize=5)
    axes.axvline(0, color="#888888", linewidth=0.8)
    for y, label in enumerate(labels):
        if label in CLAIMS:
            axes.text(0.01, y, label, transform=axes.get_yaxis_transform(), va="center", fontsize=8, weight="bold",
                      backgroundcolor="white")
    axes.set_yticks(range(len(labels)), ["" if label in CLAIMS else label for label in labels], fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(True, axis="x", linewidth=0.4)
    axes.tick_params(labelsize=8)
    for metric in metrics:
        axes.plot([], [], "o-", color=COLOURS[metric], markersize=4, label=metric)
    axes.legend(**ABOVE, ncols=len(metrics))


def columns(rows, run, names):
    """A run's rows -> (seeds, names), leaving out the seeds that lack one of them."""
    found = [[float(row[name]) for name in names] for row in rows if row["run"] == run and all(row[n] for n in names)]
    return np.array(found).reshape(-1, len(names))


def curves(axes, x, series, title):
    """Mean and standard deviation over seeds of each {label: (seeds, points)}, at the places x, {name: place}.

    The series stand a little apart, so that no bar hides another.
    """
    places = list(x.values())
    apart = (places[-1] - places[0]) / 60
    for k, (label, values) in enumerate(series.items()):
        if len(values):
            moved = [place + k * apart for place in places]
            axes.errorbar(moved, values.mean(0), values.std(0, ddof=1), color=SHADES[k], marker="o", markersize=4,
                          capsize=2, linewidth=1.4, label=label)
    axes.set_xticks(places, x)
    axes.set_title(title, fontsize=9, loc="left", pad=20)
    axes.grid(True, axis="y", linewidth=0.4)
    axes.tick_params(labelsize=8)
    axes.legend(**ABOVE, ncols=len(series))


def draw(rows, hacking, path):
    """All differences on the left; on the right Figures 1 and 5, and how descriptions come to list verbs."""
    made = [pair for pairs in CLAIMS.values() for pair in pairs if is_made(rows, pair)]
    actions = sum("mIoU" not in pair.metrics for pair in made)
    figure = Figure(figsize=(13, 3 + 0.35 * len(made)), layout="constrained", facecolor="white")
    left, right = figure.subfigures(1, 2, width_ratios=(1.6, 1))
    upper, lower = left.subplots(2, 1, height_ratios=(len(made) - actions + 3, actions + 3))
    forest(upper, rows, ("R1@0.7", "mIoU"))
    forest(lower, rows, ("actions", NAMED))
    upper.set_title("A minus B of the same seed, in points, with 95% intervals; diamonds: the paper's", fontsize=9,
                    loc="left", pad=20)
    share = {0: "tvg-only", 0.2: "grpo", 0.4: "p-0.6", 0.6: "p-0.4", 0.8: "p-0.2", 1: "p-0.0"}
    share = {x: run for x, run in share.items() if any(row["run"] == run for row in rows)}
    figure_1 = {"warm start": "warm", "p = 1": "tvg-only", "p = 1, no KL": "tvg-only-no-kl", "p = 0.8": "grpo"}
    lists = {"binary": "lists", "binary, cap of 2": "lists-cap", "cosine": "lists-cosine"}
    panels = [("Figure 1: right answers to VC, AR and VD, percent", {"VC": 0, "AR": 1, "VD": 2},
               {label: columns(rows, run, ACTIONS) for label, run in figure_1.items()})]
    if len(share) > 2:
        panels.append(("Figure 5: grounding against the share of inversions, percent", {str(x): x for x in share},
                       {metric: np.stack([columns(rows, run, [metric])[:, 0] for run in share.values()], 1)
                        for metric in ("R1@0.3", "R1@0.5", "R1@0.7")}))
    if hacking:
        fifths = {str(k): k for k in range(1, 6)}
        panels.append(("Reward hacking: verbs in a sampled description, by fifths of training", fifths,
                       {label: columns(hacking, run, TRAINING) for label, run in lists.items()}))
    for axes, (title, x, series) in zip(right.subplots(len(panels), 1, squeeze=False).flat, panels):
        curves(axes, x, series, title)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    command_line("demo.claims", __doc__).parse_args()
    found = read_measured("claim", "ablations")
    print(table(found))
    draw(found, read_measured("hacking"), ROOT / "docs" / "results.svg")
