"""Learning curves as SVG that takes its colours from the page."""

import io
import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from report.runs import values
from rewards import TASKS

matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9,
                            "axes.spines.top": False, "axes.spines.right": False})
INK, LINE, SERIES = "#a0a0a0", "#b0b0b0", "#c0c0c{}"  # stand-ins for colours of the page, replaced in the SVG
POINTS = 300  # of a raw curve; beyond, the least and the largest of each stretch are drawn

MEANING = {  # what a curve says, under its picture
    "total": "the whole reward, mean over completions",
    "iou": "overlap of the predicted and the annotated segment",
    "format": "share of well-formed completions",
    "vc": "share of completed sentences with the right verbs",
    "ar": "share of right verbs",
    "vd": "share of descriptions that name the verbs",
    "vd_verbs": "distinct verbs in a description; rising means lists of verbs",
    "total_std": "spread of the rewards within a group",
    "kl": "distance from the reference, per token",
    "entropy": "of the policy, in nats per token",
    "length": "tokens of a completion",
    "cut_off": "share of completions that the limit ended",
    "zero_spread": "share of groups with equal rewards; they teach nothing",
    "grad_norm": "before clipping",
    "clip_low": "share of tokens held at 1 - epsilon",
    "clip_high": "share of tokens held at 1 + epsilon",
    "loss": "about 0 at mu = 1: docs/reading.md",
    "nll": "negative log-likelihood per token",
    "lr": "learning rate",
    "wait_seconds": "waiting for decoded videos",
    "rollout_seconds": "sampling, rewards, reference",
    "update_seconds": "the policy's pass, backward pass and step",
    "seconds": "the whole iteration",
}
SECTIONS = {  # beside "Held-out", all that was measured in training, and "Rewards", all parts of rewards
    "Policy": ("nll", "kl", "entropy", "length", "zero_spread"),  # grounding and inversions apart
    "Seconds": ("seconds", "rollout_seconds", "update_seconds", "wait_seconds"),
    "More": ("cut_off", "grad_norm", "loss", "lr", "clip_low", "clip_high", "skipped", "redrawn", "sampler_gap_mean",
             "sampler_gap_max"),
}


def smooth(y, window):
    """(n,) -> (n,): the mean over `window` neighbours around each value, fewer at the ends."""
    kernel = np.ones(window)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same") if len(y) > window else (
        np.full(len(y), np.mean(y)))


def thin(x, y, most=POINTS):
    """At most `most` points of a curve, its peaks among them: the least and the largest of each stretch."""
    if len(x) <= most:
        return x, y
    keep = set()
    for stretch in np.array_split(np.arange(len(x)), most // 2):
        keep |= {stretch[y[stretch].argmin()], stretch[y[stretch].argmax()]}
    keep = sorted(keep)
    return x[keep], y[keep]


def svg(figure) -> str:
    """A figure as an <svg> for inside a page: without ids, sized by the page, in the page's colours and font."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)  # the page's family
    text = text.replace(INK, "currentColor").replace(LINE, "var(--line)")
    text = re.sub(r"#c0c0c(\d)", r"var(--s\1)", text)
    return re.sub(r"\s*\n\s*", " ", text)


def chart(series, markers=False, end=None) -> str:
    """Curves [(x, y) of each run] -> an SVG: every value faint, and in front of it their moving mean.

    The mean is over a twentieth of the run's values, at least five. `markers` draws values as they are, on an axis up
    to `end` at least.
    """
    figure = Figure(figsize=(3.6, 2.1), layout="constrained")
    axes = figure.add_subplot()
    for n, (x, y) in enumerate(series):
        if not len(x):
            continue
        colour = SERIES.format(n)
        if markers or len(x) < 8:
            axes.plot(x, y, color=colour, marker="o", markersize=3.5, linewidth=1.6)
        else:
            axes.plot(*thin(x, y), color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(*thin(x, smooth(y, max(5, len(y) // 20))), color=colour, linewidth=1.8)
    axes.grid(True, color=LINE, linewidth=0.5)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.spines[:].set_color(LINE)
    axes.margins(x=0.02)
    if markers:
        last = max(x.max() for x, _ in series if len(x))
        axes.set_xlim(-0.02 * max(end or 1, last), 1.02 * max(end or 1, last))
    return svg(figure)


def with_update_seconds(rows) -> list[dict]:
    """Rows with what is left of an iteration's seconds after waiting and rollout."""
    spent = ("seconds", "wait_seconds", "rollout_seconds")
    return [row | {"update_seconds": row["seconds"] - row["wait_seconds"] - row["rollout_seconds"]}
            if all(row.get(name) is not None for name in spent) else row for row in rows]


def sections(runs) -> dict[str, list[dict]]:
    """All curves by section -> {title: [{"name", "meaning", "svg"}]}; "Rewards" has those of each task's parts."""
    logs = [with_update_seconds(run.log) for run in runs]
    end = max((run.total() or 0 for run in runs), default=0)
    named = {name for rows in logs for row in rows for name in row}
    parts = sorted((name for name in named if "/" in name), key=part_order)
    first = [name for name in parts if name.split("/")[1] not in ("format", "total") and not name.endswith("_std")]
    found = {"Held-out": curves([run.held_out for run in runs], measured(runs), markers=True, end=end)}
    found["Rewards"] = curves(logs, [*first, *(name for name in parts if name.endswith("/format"))])
    found["Policy"] = by_task(logs, SECTIONS["Policy"])
    found["Seconds"] = curves(logs, SECTIONS["Seconds"])
    found["More"] = curves(logs, [*SECTIONS["More"], *(name for name in parts if name.endswith(("/total", "_std")))])
    return {title: charts for title, charts in found.items() if charts}


def measured(runs) -> list[str]:
    """The metrics of the runs' evaluations in training, mIoU first, without what a row says of itself."""
    names = dict.fromkeys(name for run in runs for row in run.held_out for name in row)
    return sorted((name for name in names if name not in ("iteration", "task")), key=lambda name: name != "mIoU")


def by_task(logs, names) -> list[dict]:
    """Two charts for each name where runs train on grounding and on inversions: their iterations apart."""
    grounding = [[row for row in rows if row["task"] in ("tvg", "sft")] for rows in logs]
    inversions = [[row for row in rows if row["task"] not in ("tvg", "sft")] for rows in logs]
    if not any(inversions) or not any(grounding):
        return curves(logs, names)
    charts = []
    for name in names:
        for kind, rows in (("grounding", grounding), ("inversions", inversions)):
            charts += [chart | {"name": f"{name}, {kind}"} for chart in curves(rows, [name])]
    return charts


def part_order(name):
    """tvg before the inversions; of a task's parts the total, the task's own, the format, then the others."""
    task, part = name.split("/")
    order = ("total", "iou", task, "format", "total_std")
    return TASKS.index(task) if task in TASKS else len(TASKS), task, order.index(part) if part in order else 9, part


def curves(logs, names, markers=False, end=None) -> list[dict]:
    """A chart for each name that any log holds."""
    charts = []
    for name in names:
        series = [values(rows, name) for rows in logs]
        if any(len(x) for x, _ in series):
            charts.append({"name": name, "meaning": MEANING.get(name.split("/")[-1], ""),
                           "svg": chart(series, markers, end)})
    return charts
