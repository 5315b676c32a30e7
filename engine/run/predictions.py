"""The predictions of an evaluation, as they lie in its folder."""

import dataclasses
import json
import time
from pathlib import Path

import torch.distributed as dist

from engine.program.earlier import changed_options
from engine.program.files import write_text
from engine.program.settings import UserError

VISIBLE = 90  # seconds after which a network file system shows what another node has written: NFS lists anew after 60


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


def answers(prediction, samples) -> bool:
    """Whether a prediction is of its row as it is today: of the same video, query and times.

    Raises KeyError for a prediction of an earlier version, which noted less.
    """
    if prediction["row"] >= len(samples):
        return False
    s = samples[prediction["row"]]
    then = {name: prediction[name] for name in identity(s)}
    today = json.loads(json.dumps(identity(s)))  # tuples become lists
    return then | {"video": Path(then["video"]).name} == today | {"video": Path(today["video"]).name}


def late_rows(predictions) -> list[str]:
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
    """All predictions of an output folder, with `samples` only those that answer its rows as they are today.

    A line cut off by an interruption is left out.
    """
    predictions = {}
    for path in sorted(Path(output).glob("predictions*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                p = json.loads(line)
                if samples is not None and not answers(p, samples):
                    continue
                if key_of(p) not in predictions or not p["error"]:  # a success replaces an unreadable video's line
                    predictions[key_of(p)] = p
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    return [predictions[key] for key in sorted(predictions)]


def complete_predictions(output, samples, jobs, each) -> list[dict]:
    """The predictions of a set of (row, task), `each` completions of each.

    Raises UserError where some are missing: metrics of the others would pass for those of all. Those of other
    processes are waited for.
    """
    expected = len(jobs) * each
    for left in reversed(range(VISIBLE if dist.get_world_size() > 1 else 1)):
        found = [p for p in read_predictions(output, samples) if (p["row"], p["task"]) in jobs]
        if len(found) == expected:
            return found
        time.sleep(min(left, 1))
    raise UserError(f"{output}: {expected - len(found)} of {expected} predictions are not there; a video's file has "
                    "changed meanwhile, or the processes do not see each other's files; give the same command again.")


def claim_output(settings, model: str):
    """Raise UserError when --output holds predictions of another model (by fingerprint) or settings; else note it."""
    record = Path(settings.output) / "settings.json"
    held = any(record.parent.glob("predictions*.jsonl")) and record.exists()
    if held:
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
        noted = dataclasses.asdict(settings) | {"model": model}
        write_text(record, json.dumps(noted, indent=2) + "\n")


def format_metrics(metrics: dict) -> str:
    """Metrics -> a table of two lines for the screen."""
    shown = {name: f"{value:.1f}" for name, value in metrics.items() if isinstance(value, float)}
    widths = [max(len(name), len(value)) for name, value in shown.items()]
    lines = []
    for cells in (shown.keys(), shown.values()):
        lines.append("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
    return "\n".join(lines)


def format_comparison(table: dict) -> str:
    """What `evaluate.paired_bootstrap` returns -> a table, a line a metric."""
    width = max([10, *(len(name) + 1 for name in table)])
    lines = [f"\n{'metric':<{width}}{'this':>8}{'other':>8}{'difference':>12}   95% interval over videos"]
    for name, (a, b, low, high) in table.items():
        lines.append(f"{name:<{width}}{a:8.1f}{b:8.1f}{a - b:+12.1f}   [{low:+.1f}, {high:+.1f}]")
    return "\n".join(lines)
