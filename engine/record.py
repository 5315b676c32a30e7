"""What is noted of a run beside its log: its environment, other places that show the log, and the model's card."""

import dataclasses
import hashlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from engine.files import iteration_of, write_text
from engine.settings import UserError

ROOT = Path(__file__).parents[1]


def note_environment(output, iterations):
    """Write environment.json: how many iterations the run has, the versions that compute it, and on what."""
    found = {"iterations": iterations, "processes": dist.get_world_size(), "device": "CPU"}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    found |= {"commit": commit(), "python": platform.python_version()}
    for package in ("torch", "transformers", "spacy", "av", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    write_text(Path(output) / "environment.json", json.dumps(found, indent=2) + "\n")


def commit() -> str | None:
    """The commit of this program, with "+" where files have changed since; None outside a clone."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude", "*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------------------------------------ other boards

finishers = []  # functions (exit status) of the open boards, for an end without Python's own exit hooks


def open_boards(config, start) -> list:
    """Functions (iteration, {name: number}) that show the log elsewhere too, for each of --log-to.

    Raises UserError where a package is not installed, or where Weights & Biases lets nobody in.
    """
    return [BOARDS[name](config, start) for name in config.log_to]


def tensorboard(config, start):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--log-to tensorboard: the package is not installed; pip install tensorboard.") from error
    board = SummaryWriter(config.output, purge_step=start)

    def write(iteration, metrics):
        for name, value in metrics.items():
            board.add_scalar(name, value, iteration)
        board.flush()  # else the last two minutes are lost, also at a normal end

    return write


def wandb(config, start):
    """Weights & Biases; a run that goes on keeps its curves. WANDB_PROJECT, WANDB_MODE and the like are heeded."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("--log-to wandb: the package is not installed; pip install wandb, then wandb login.") from error
    output = Path(config.output).resolve()
    try:
        run = wandb.init(dir=output, name=output.name, id=hashlib.sha256(str(output).encode()).hexdigest()[:16],
                         resume="allow", config=dataclasses.asdict(config))
    except wandb.Error as error:  # no key, no network
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(f"--log-to wandb: {reason}; see to that, or set WANDB_MODE=offline.") from error
    finishers.append(lambda status: run.finish(exit_code=status))
    return lambda iteration, metrics: run.log(metrics, step=iteration)


BOARDS = {"tensorboard": tensorboard, "wandb": wandb}

# ------------------------------------------------------------------------------------------------ the model's card


def model_card(config, progress) -> str:
    """README.md of a checkpoint, which the Hugging Face hub shows: what it is, how it was trained, how to use it.

    `progress` is what `engine.checkpoints.save_checkpoint` gets. The numbers are those of the run's last measurement.
    """
    stage = "supervised" if config.demonstrations else "GRPO"
    how = [("stage", f"{stage}, iteration {progress['iteration']} of {progress['iterations']}"),
           ("start", progress.get("start", config.model)), ("prompts an iteration", progress["prompts"]),
           ("learning rate", config.peak_lr()), ("seed", config.seed)]
    if config.demonstrations:
        how.append(("demonstrations", config.demonstrations))
    else:
        how += [("annotations", config.annotations), ("group size", config.group_size), ("p", config.p),
                ("inversion tasks", ", ".join(config.inversion_tasks)), ("KL coefficient", config.kl_coef)]
    files = {iteration_of(path.parent): path for path in Path(config.output).glob("eval-*/metrics.json")}
    # A folder of another name is not the run's own; one of a later iteration is left over from an interrupted run.
    measured = [k for k in files if k is not None and k <= progress["iteration"]]
    numbers = "Nothing was measured while it was trained."
    if measured:
        metrics = json.loads(files[max(measured)].read_text(encoding="utf-8"))
        shown = {name: value for name, value in metrics.items() if isinstance(value, float)}
        numbers = (f"Measured at iteration {max(measured)} on {Path(config.eval_annotations).name}, percent:\n\n"
                   + table(shown.items(), "{:.1f}"))
    return f"""---
library_name: transformers
pipeline_tag: video-text-to-text
tags:
- temporal-video-grounding
- grpo
---
# {Path(config.output).resolve().name}

A Qwen2.5-VL for temporal video grounding, trained by Invert4TVG's reference implementation.

{table(how)}

{numbers}

`python evaluate.py --model CHECKPOINT` measures it, with the sampling of videos and the format that run.json notes.
"""


def table(rows, form="{}") -> str:
    """Pairs -> a table in Markdown."""
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {form.format(value)} |" for name, value in rows)
