"""What lies in the folder of a run, read as it is: also while the run is going, and after an interruption."""

import itertools
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.model.loading import fingerprint, newest_checkpoint
from engine.program.files import iteration_of
from engine.program.settings import UserError
from engine.run.predictions import read_predictions

MAX_ITERATIONS = 60  # whose completions are read, evenly spaced over those that the run kept


class Evaluation(NamedTuple):
    """The predictions of one checkpoint."""

    label: str
    predictions: list[dict]
    settings: dict  # of evaluate.py; {} where it was made while training


class Group(NamedTuple):
    """One prompt and its G completions, of rollouts.<rank>.jsonl; earlier versions wrote no "advantage"."""

    iteration: int
    task: str
    rows: list[dict]

    def flags(self) -> set[str]:
        """What a reader may look for."""
        found = set()
        if len({row["parts"]["total"] for row in self.rows}) == 1:
            found.add("no-spread")
        if any(row.get("cut_off") for row in self.rows):
            found.add("cut-off")
        if any(row["parts"]["format"] == 0 for row in self.rows):
            found.add("malformed")
        return found

    def kl(self) -> float:
        """The highest KL of a completion; 0 without a reference."""
        return max(0.0, *(row.get("kl") or 0.0 for row in self.rows))

    def distinct(self) -> list[tuple[str, dict]]:
        """Its completions, equal ones once: [("o1, o4", row)] in the order of sampling."""
        found = {}
        for n, row in enumerate(self.rows, 1):
            found.setdefault(row["completion"], (row, []))[1].append(f"o{n}")
        return [(", ".join(names), row) for row, names in found.values()]


@dataclass
class Run:
    """One folder: a training run with its log, completions and evaluations, or an evaluation alone."""

    folder: Path
    name: str
    log: list[dict] = field(default_factory=list)  # a row for each iteration
    held_out: list[dict] = field(default_factory=list)  # rows of the task "eval"
    config: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    def total(self) -> int | None:
        """Iterations of the whole run; None where the run does not say."""
        return self.environment.get("iterations") or self.config.get("iterations") or None

    def videos(self) -> str:
        """The folder of its training videos: as it was given, or from a folder above the run's, where that is there."""
        given = self.config.get("videos", "")
        places = [Path(given), *(parent / given for parent in self.folder.resolve().parents)]
        return str(next((place for place in places if given and place.is_dir()), given))


def read_run_folder(folder, name="") -> Run:
    """Everything in a folder that the page shows. Raises UserError where there is nothing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the --output of a run or of an evaluation.")
    run = Run(folder, name or folder.name)
    rows = list(read_jsonl(folder / "metrics.jsonl"))
    run.log = [row for row in rows if row["task"] != "eval"]
    run.held_out = [row for row in rows if row["task"] == "eval"]
    run.config = read_json(folder / "config.json")
    run.environment = read_json(folder / "environment.json")
    run.groups = read_groups(folder, run.config.get("group_size", 8))
    run.evaluations = list(evaluations_of(run))
    if not run.log and not run.evaluations:
        raise UserError(f"{folder}: holds neither metrics.jsonl nor predictions; give the --output of a run or of an "
                        "evaluation.")
    return run


def read_json(path) -> dict:
    """The object in a file; {} where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_jsonl(path):
    """The rows of a log, without the last one where it is still being written. Raises UserError for a broken one."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: is no JSON ({error.msg}); mend or remove the line.") from error


def values(rows, name) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, values) of one metric, of the rows that hold a finite number for it."""
    found = [(row["iteration"], row[name]) for row in rows if row.get(name) is not None and math.isfinite(row[name])]
    x, y = zip(*found) if found else ((), ())
    return np.array(x), np.array(y, dtype=float)


# ------------------------------------------------------------------------------------------------ completions


def read_groups(folder, G) -> list[Group]:
    """The groups of MAX_ITERATIONS iterations, evenly spaced over all whose completions were kept; the newest first."""
    files = sorted(folder.glob("rollouts.*.jsonl"))
    kept = sorted({iteration_of_line(line) for file in files for line in open_lines(file)})
    places = np.linspace(0, len(kept) - 1, min(MAX_ITERATIONS, len(kept))).round().astype(int)
    chosen = {kept[place] for place in places}
    groups = []
    for file in files:
        wanted = (json.loads(line) for line in open_lines(file) if iteration_of_line(line) in chosen)
        for iteration, rows in itertools.groupby(wanted, key=lambda row: row["iteration"]):
            rows = list(rows)
            for first in range(0, len(rows) - G + 1, G):
                groups.append(Group(iteration, rows[first]["task"], rows[first:first + G]))
    return sorted(groups, key=lambda group: -group.iteration)


def open_lines(path):
    """The complete lines of a file; it may be long."""
    with open(path, encoding="utf-8") as file:
        yield from (line for line in file if line.endswith("}\n"))


def iteration_of_line(line) -> int:
    """Of a line as append_rollouts writes it, '{"iteration": 12, ...', without reading the rest."""
    return int(line[line.index(":") + 1:line.index(",")])


def choose_groups(groups, most=72) -> list[Group]:
    """At most `most` groups to show: the ten of highest KL, ten of each flag, the rest evenly spaced."""
    chosen = {id(group) for group in sorted(groups, key=Group.kl, reverse=True)[:10] if group.kl()}
    for flag in ("no-spread", "cut-off", "malformed"):
        flagged = [group for group in groups if flag in group.flags()]
        chosen |= {id(flagged[i]) for i in np.linspace(0, len(flagged) - 1, min(10, len(flagged))).astype(int)}
    for i in np.linspace(0, len(groups) - 1, min(most - len(chosen), len(groups))).astype(int):
        chosen.add(id(groups[i]))
    return [group for group in groups if id(group) in chosen]


# ------------------------------------------------------------------------------------------------ evaluations


def evaluations_of(run):
    """The evaluations in a run's folder, one for each measured iteration, and those beside it of its newest weights."""
    if is_evaluation(run.folder):
        yield Evaluation(run.name, read_predictions(run.folder), read_json(run.folder / "settings.json"))
    for folder in sorted(run.folder.glob("eval-*")):
        iteration = iteration_of(folder)
        predictions = [] if iteration is None else read_predictions(folder)
        if predictions:
            yield Evaluation(f"{run.name}, iteration {iteration}", predictions, {})
    newest = newest_checkpoint(run.folder)
    if not newest:
        return
    weights = fingerprint(newest)
    for folder in sorted(run.folder.resolve().parent.iterdir()):
        settings = read_json(folder / "settings.json") if is_evaluation(folder) else {}
        if settings.get("model") == weights:
            yield Evaluation(folder.name, read_predictions(folder), settings)


def is_evaluation(folder) -> bool:
    """Whether a folder is one that evaluate.py writes: others may hold a settings.json, too."""
    return any(Path(folder).glob("predictions*.jsonl"))


def comparable(runs) -> list[list[tuple[Run, Evaluation]]]:
    """The evaluations of all runs, those of the same rows together; the set with most rows first."""
    sets = {}
    for run in runs:
        for evaluation in run.evaluations:
            rows = frozenset((p["task"], *row_of(p)) for p in evaluation.predictions)
            sets.setdefault(rows, []).append((run, evaluation))
    return [sets[rows] for rows in sorted(sets, key=len, reverse=True) if rows]


def row_of(prediction) -> tuple:
    """What makes two predictions of different evaluations ones of the same row: video, query and times."""
    return Path(prediction["video"]).name, prediction["query"], *(prediction.get("truth") or ())


# ------------------------------------------------------------------------------------------------ state


def state(run, now=None) -> dict:
    """How far a run is -> {"done", "total", "status", "seconds_left"}.

    "status" is "finished", "running", or "stopped" where nothing was logged for ten minutes and ten iterations.
    "seconds_left" is the median of the last fifty iterations times those that are left; None where it is unknown.
    """
    done = run.log[-1]["iteration"] + 1 if run.log else 0
    total = run.total()
    _, seconds = values(run.log[-50:], "seconds")
    step = float(np.median(seconds)) if len(seconds) else None
    if total and done >= total:
        return {"done": done, "total": total, "status": "finished", "seconds_left": 0.0}
    silent = (now or time.time()) - (run.folder / "metrics.jsonl").stat().st_mtime if run.log else 0.0
    status = "stopped" if silent > max(600, 10 * (step or 0)) else "running"
    left = step * (total - done) if step and total else None
    return {"done": done, "total": total, "status": status, "seconds_left": left}


def differences(runs, what="config") -> dict[str, list]:
    """The options (or, for "environment", the versions) in which runs differ -> {name: the value in each run}."""
    found = {}
    for name in dict.fromkeys(name for run in runs for name in getattr(run, what)):
        each = [getattr(run, what).get(name) for run in runs]
        if any(value != each[0] for value in each):
            found[name] = each
    return found
