"""The predictions of an evaluation, as they lie in its folder."""

import dataclasses
import json
from pathlib import Path

import torch.distributed as dist

from engine.program.earlier import changed_options
from engine.program.files import write_text
from engine.program.settings import UserError


def key_of(prediction):
    """Which prediction it is; "sample" is the number of the completion among those of its row."""
    return prediction["row"], prediction["task"], prediction["sample"]


def video_bytes(sample) -> int | None:
    """The size of the sample's video file; None where there is none."""
    path = Path(sample.video)
    return path.stat().st_size if path.is_file() else None


def identity(sample) -> dict:
    """What a prediction notes of its sample. Its IoU is that with the best of the truth and the alternatives."""
    return {"video": sample.video, "bytes": video_bytes(sample), "query": sample.query,
            "truth": [sample.start, sample.end], "alternatives": sample.alternatives, "excerpt": sample.excerpt}


def is_current(prediction, samples) -> bool:
    """Whether a prediction is of its row as it is today: of the same video, query and times.

    Raises KeyError for a prediction of an earlier version, which noted less.
    """
    if prediction["row"] >= len(samples):
        return False
    s = samples[prediction["row"]]
    then = {name: prediction[name] for name in identity(s)}
    today = json.loads(json.dumps(identity(s)))  # tuples become lists
    return then | {"video": Path(then["video"]).name} == today | {"video": Path(today["video"]).name}


def rows_after_the_end(predictions) -> list[str]:
    """Name the grounding rows that start after their video's last picture has ended, once each."""
    late = {}
    for p in predictions:
        end = p.get("video_end")
        if p["task"] == "tvg" and end is not None and p["truth"][0] > end:
            late[p["row"]] = f"{p['video']}: row {p['row']} starts at {p['truth'][0]:g} of {end:g} s"
    return list(late.values())


def inversion_values(task, parts) -> dict[str, float]:
    """The metrics of one answer to an inversion: {"VD": 100.0, "VD verbs": 2.0}, its accuracy in percent, what it logs.

    A task of one's own keeps its name, MODULE.NAME.
    """
    name = task if "." in task else task.upper()
    logged = {f"{name} {part.removeprefix(f'{task}_')}": value for part, value in parts.items()
              if part not in ("format", task, "total")}
    return {name: 100 * parts[task]} | logged


def read_predictions(output, samples=None) -> list[dict]:
    """All predictions of an output folder, with `samples` only those that are of its rows as they are today.

    A line cut off by an interruption is left out.
    """
    predictions = {}
    for path in sorted(Path(output).glob("predictions*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                p = json.loads(line)
                if samples is not None and not is_current(p, samples):
                    continue
                if key_of(p) not in predictions or not p["error"]:  # a success replaces an unreadable video's line
                    predictions[key_of(p)] = p
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    return [predictions[key] for key in sorted(predictions)]


def check_current(predictions, samples, output):
    """Raise UserError where a video was replaced while others were predicted: the metrics would be of both."""
    outdated = sorted({p["video"] for p in predictions if not is_current(p, samples)})
    if outdated:
        raise UserError(f"{output}: {len(outdated)} videos have changed since they were predicted, {outdated[0]} among "
                        "them; give the same command again.")


def check_output(settings, model: str):
    """Raise UserError when --output holds predictions of another model (by fingerprint) or settings; else note it."""
    record = Path(settings.output) / "settings.json"
    if any(record.parent.glob("predictions*.jsonl")) and record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = changed_options(before | {"model": settings.model}, settings)  # the model is compared apart:
        if before["model"] != model:
            changed.append("--model")
        if settings.samples and before.get("micro_batch") != settings.micro_batch:  # greedy answers do not depend on it
            changed.append("--micro-batch")
        if changed:
            raise UserError(f"--output {settings.output} holds predictions made with another {', '.join(changed)}; "
                            "name another folder.")
    dist.barrier()
    if dist.get_rank() == 0:
        record.parent.mkdir(parents=True, exist_ok=True)
        options = dataclasses.asdict(settings) | {"model": model}
        write_text(record, json.dumps(options, indent=2) + "\n")


def percentages(metrics: dict) -> dict[str, float]:
    """Of all that `evaluate.summarize` gives the metrics, which alone are floats: the rest are counts and names."""
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def format_metrics(metrics: dict) -> str:
    """Metrics -> a table of two lines for the screen."""
    cells_of = {name: f"{value:.1f}" for name, value in percentages(metrics).items()}
    widths = [max(len(name), len(value)) for name, value in cells_of.items()]
    lines = []
    for cells in (cells_of.keys(), cells_of.values()):
        lines.append("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
    return "\n".join(lines)
