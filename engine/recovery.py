"""When a run is saved, which checkpoint it goes on from, and when it stops because its numbers are broken."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from engine.files import MANIFEST, damage, iteration_of
from engine.runtime import gather, now, on_rank_0, say
from engine.settings import UserError, flag

PATIENCE = 10  # iterations in a row without a step, after which a run stops


@dataclass(frozen=True)
class Saving:
    """The settings of saving."""

    save_every: int = flag(500, "iterations between checkpoints; one is written at the end in any case", above=0,
                           free=True)
    save_minutes: float = flag(0.0, "minutes after which a checkpoint is written all the same; 0: only by "
                               "--save-every", least=0, free=True)
    keep: int = flag(2, "checkpoints kept", above=0, free=True)
    save_rollouts: int = flag(50, "iterations between those whose completions are kept in rollouts.<rank>.jsonl, for "
                              "`python -m report`; 0: none; papers/stages.py needs 1", least=0,
                              unless="demonstrations")
    log_to: tuple = flag((), "show the log there too; docs/metrics.md", choices=("tensorboard", "wandb"), free=True)


class Saves:
    """When to save, asked once after every iteration."""

    def __init__(self, config, total, device):
        self.config = config
        self.total = total
        self.device = device
        self.saved_at = time.monotonic()
        self.skipped = 0  # iterations in a row without a step
        self.is_owed = False  # a checkpoint that was due while steps were left out

    def are_due(self, done, metrics, stopping) -> bool:
        """Whether to save after `done` iterations, the same on every rank.

        While steps are left out nothing is saved, so that the newest checkpoint is one that steps were taken from: what
        is due then comes after the next step. But a stop saves in any case, or all since the newest checkpoint would
        be lost. Raises UserError after ten iterations in a row without a step.
        """
        self.skipped = self.skipped + 1 if metrics["skipped"] == 1 else 0
        if self.skipped == PATIENCE:
            raise UserError(
                f"{PATIENCE} iterations in a row had a loss or a gradient that is not finite, the first of them "
                f"iteration {done - PATIENCE}; the last one's batch is in {self.config.output}/skipped/<rank>."
                "safetensors; look at it, or lower --lr and name another --output; the checkpoints are from before.")
        if done == self.total:
            if self.skipped:
                say(f"the last {self.skipped} iterations took no step: their gradients were not finite.")
            return True
        minutes = torch.tensor((time.monotonic() - self.saved_at) / 60, device=self.device)
        dist.broadcast(minutes, 0)
        is_late = bool(self.config.save_minutes) and minutes.item() >= self.config.save_minutes
        self.is_owed |= is_late or done % self.config.save_every == 0
        due = stopping or self.is_owed and not self.skipped
        if due:
            self.is_owed = False
            self.saved_at = time.monotonic()
        return due


# ------------------------------------------------------------------------------------------------ broken numbers


def finite_everywhere(numbers, device) -> bool:
    """Whether all numbers are finite on all ranks: the ranks take a step together, or none does."""
    numbers = torch.tensor([float(x) for x in numbers], device=device)
    broken = (~numbers.isfinite()).any().float()
    dist.all_reduce(broken)
    return not broken


def keep_batch(output, batches):
    """Write the micro-batches of a step that was left out to skipped/<rank>.safetensors, over those before.

    Names are like "0.ids" and "0.prompt1.patches": a field of micro-batch 0, one of its second prompt. The metadata
    names the iteration and the videos. Raises UserError where the file cannot be written.
    """
    tensors = {}
    for number, batch in enumerate(batches):
        for name in ("ids", "mask", "advantages", "sampler_logps", "ref_logps"):
            tensors[f"{number}.{name}"] = getattr(batch, name)
        for place, prompt in enumerate(batch.prompts):
            for name, value in prompt._asdict().items():
                tensors[f"{number}.prompt{place}.{name}"] = value
    tensors = {name: value.detach().cpu().clone() for name, value in tensors.items() if torch.is_tensor(value)}
    path = Path(output) / "skipped" / f"{dist.get_rank()}.safetensors"
    path.parent.mkdir(exist_ok=True)
    try:
        save_file(tensors, path, {"iteration": str(now.iteration), "videos": json.dumps(list(now.videos))})
    except SafetensorError as error:  # what the library makes of a full disk
        raise UserError(f"{path}: could not be written ({error}); make room, and give the same command again."
                        ) from error


# ------------------------------------------------------------------------------------------------ checkpoints


def newest_whole(output):
    """-> the newest checkpoint whose files are as they were written, or None; damaged ones are named and put aside.

    Every rank reads a share of the files. Raises UserError where checkpoints are there and none is whole.
    """
    ours = [path for path in Path(output).glob("checkpoint-*")
            if iteration_of(path) is not None and ((path / MANIFEST).exists() or (path / "run.json").exists())]
    damaged = []
    for checkpoint in gather(sorted(ours, key=iteration_of, reverse=True))[0]:
        reasons = gather(damage(checkpoint, dist.get_rank(), dist.get_world_size()))
        reason = next(filter(None, reasons), None)
        if reason is None:
            on_rank_0(_put_aside, damaged)
            return checkpoint
        say(f"{checkpoint} is damaged: {reason}.")
        damaged.append(checkpoint)
    if damaged:
        raise UserError(f"--output {output}: no checkpoint there is whole ({reason} in {damaged[-1].name}); name "
                        "another folder to begin anew.")
    return None


def _put_aside(checkpoints):
    """Rename damaged checkpoints, which would else be taken for newer ones."""
    for checkpoint in checkpoints:
        aside = checkpoint.with_suffix(".damaged")
        if aside.exists():
            shutil.rmtree(aside)
        checkpoint.rename(aside)


def check_space(output, model):
    """Raise UserError where the disk of --output has no room for the next checkpoint of `model`."""
    needed = checkpoint_bytes(model)

    def check():
        free = shutil.disk_usage(output).free
        if free < needed:
            raise UserError(f"--output {output}: a checkpoint takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are "
                            "free on its disk; make room, or name a folder on another disk.")

    on_rank_0(check)


def checkpoint_bytes(model) -> int:
    """The bytes of a checkpoint: weights, two moments, a master where bfloat16 is trained, and 16 MB of other files."""
    total = 16 * 10**6  # the tokenizer of Qwen2.5-VL has 11 MB
    for p in model.parameters():
        total += p.numel() * p.element_size()
        if p.requires_grad:
            total += p.numel() * (8 if p.dtype == torch.float32 else 12)
    return total


def broken_weights(model) -> list[str]:
    """The names of the weights that are not finite."""
    return [name for name, p in model.named_parameters() if not is_finite(p)]


def is_finite(x) -> bool:
    """Whether all numbers of a tensor are finite.

    `isfinite` would write a tensor first: on one thread, as torchrun has it, 10 s for 10^9 numbers in host memory.
    """
    lowest, highest = x.detach().aminmax()  # both are NaN where one number is
    return bool(lowest.isfinite() & highest.isfinite())


def check_finite(model, optimizer):
    """Raise UserError where a weight, or a number of the optimiser's state, is not finite."""
    names = {p: name for name, p in model.named_parameters()}
    broken = broken_weights(model)
    broken += [names[p] for p, state in optimizer.optim.state.items()
               if not all(is_finite(x) for x in state.values() if torch.is_tensor(x))]
    if broken:
        raise UserError(f"{len(broken)} weights are no longer finite, {broken[0]} among them; nothing is saved, and "
                        "the checkpoints before are whole; lower --lr, and name another --output.")
