"""The log: one line an iteration, averaged over ranks, in a file, on the screen and on the boards of --log-to."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import torch.distributed as dist

from engine.program.files import strict_json
from engine.program.launch import at_exit
from engine.program.progress import progress
from engine.program.ranks import gather
from engine.program.settings import UserError
from engine.run.environment import note_environment


def group_metrics(task, scores, G):
    """The reward parts of G completions of each prompt -> their means, and their spread within groups."""
    metrics = {}
    for part in scores[0]:  # one task an iteration, so all scores have the same parts
        values = np.reshape([s[part] for s in scores], (-1, G))
        metrics[f"{task}/{part}"] = float(values.mean())
        metrics[f"{task}/{part}_std"] = float(values.std(axis=1, ddof=1).mean())
    totals = np.reshape([s["total"] for s in scores], (-1, G))
    metrics["zero_spread"] = float((np.ptp(totals, axis=1) == 0).mean())
    return metrics


def combine(rows):
    """Dictionaries of metrics with different keys -> one: the mean over those that have a key, for `_max` the most."""
    combined = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        combined[name] = float(np.max(values) if name.endswith("_max") else np.mean(values))
    return combined


class Log:
    """One line an iteration, averaged over ranks: metrics.jsonl, a progress bar, and where --log-to says."""

    def __init__(self, config, run, start, total):
        self.rank = dist.get_rank()
        if self.rank == 0:
            note_environment(config.output, run, total)
            self.boards = open_boards(config, run, start)
            self.file = open(Path(config.output) / "metrics.jsonl", "a", encoding="utf-8")
            self.bar = progress(total=total, initial=start, desc="training")

    def write(self, iteration, task, metrics):
        """Gather from all ranks (so every rank must call it) and write on rank 0."""
        of_ranks = gather(metrics)
        if self.rank:
            return
        metrics = combine(of_ranks)
        if "wait_seconds" in metrics:  # an iteration's: where its time went
            seconds = {"wait": metrics["wait_seconds"], "rollout": metrics["rollout_seconds"]}
            seconds["update"] = metrics["seconds"] - sum(seconds.values())
            metrics |= {f"{phase}_seconds_share": value / metrics["seconds"] for phase, value in seconds.items()}
        self.file.write(strict_json({"iteration": iteration, "task": task} | metrics) + "\n")
        self.file.flush()
        for show in self.boards:
            show(iteration, metrics)
        if task != "eval":
            number = metrics.get(f"{task}/total", metrics.get("nll"))
            self.bar.set_postfix_str(f"{task} {'nll' if task == 'sft' else 'reward'} {number:.3f}", refresh=False)
            self.bar.update()


def cut_log(path, start):
    """Cut a jsonl where the lines of iteration `start` begin, or where a crash has cut a line off.

    Raises UserError where a line before that place is no line of a log.
    """
    end = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"}\n"):
                break
            try:
                if json.loads(line)["iteration"] >= start:
                    break
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}: holds a line that is no log's ({error!r}); mend it, or move the file away."
                                ) from error
            end += len(line)
    os.truncate(path, end)


def open_boards(config, run, start) -> list:
    """Functions (iteration, {name: number}) that show the log elsewhere too, for each of --log-to.

    `run` is the run's identity, `start` the iteration with which it goes on.

    Raises UserError where a package is not installed, or where Weights & Biases lets nobody in.
    """
    return [BOARDS[name](config, run, start) for name in config.log_to]


def tensorboard(config, run, start):
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


def wandb(config, run, start):
    """Weights & Biases; a run that goes on keeps its curves. WANDB_PROJECT, WANDB_MODE and the like are heeded."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("--log-to wandb: the package is not installed; pip install wandb, then wandb login.") from error
    output = Path(config.output).resolve()
    try:
        board = wandb.init(dir=output, name=output.name, id=run, resume="allow", config=dataclasses.asdict(config))
    except wandb.Error as error:  # no key, no network
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(f"--log-to wandb: {reason}; see to that, or set WANDB_MODE=offline.") from error
    at_exit.append(lambda status: board.finish(exit_code=status))
    return lambda iteration, metrics: board.log(metrics, step=iteration)


BOARDS = {"tensorboard": tensorboard, "wandb": wandb}
