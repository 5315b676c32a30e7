"""Checkpoints: what is written, in an order that a crash cannot spoil, and what is read back of it."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.model.health import check_finite
from engine.model.lora import merged_weights
from engine.program.files import flush, iteration_of, write_text
from engine.program.ranks import gather, on_rank_0, say, together
from engine.program.settings import UserError
from engine.run.card import model_card
from engine.run.manifest import MANIFEST, seal


def read_run(checkpoint):
    """-> what `save_checkpoint` noted: "iteration" and, of the whole run, "iterations", "prompts", "config".

    Raises UserError where the file is damaged.
    """
    path = checkpoint / "run.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(state["config"], dict):
            return state
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(f"{path}: is damaged; give another checkpoint.")


def save_checkpoint(config, progress, model, processor, optimizer):
    """Write a checkpoint in the Hugging Face layout, with each rank's share of the optimiser's state.

    `progress` is {"iteration": optimiser steps taken, "iterations": of the whole run, "prompts": of an iteration} and
    what `note_origin` gave. Every file of the checkpoint that the run began with is kept as it is; only the card,
    README.md, and the weights are ours, adapters merged into them. The adapters themselves are saved beside their
    optimiser's state.

    A crash at any moment leaves the checkpoints before it whole: a new one is written under another name, flushed to
    the disk with a manifest of its files, and renamed; only then are old ones deleted. The logs are flushed first.
    Raises UserError where it cannot be written, or where a weight is not finite.
    """
    rank = dist.get_rank()
    output = Path(config.output)
    final = output / f"checkpoint-{progress['iteration']:06d}"
    partial = final.with_suffix(".partial")
    share = f"optimizer.{rank}.safetensors"
    entries = {}

    def begin():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        model.save_pretrained(partial, state_dict=merged_weights(model))
        keep_files(processor.files, partial)
        record = progress | {"config": dataclasses.asdict(config)}
        (partial / "run.json").write_text(json.dumps(record), encoding="utf-8")
        (partial / "README.md").write_text(model_card(config, progress), encoding="utf-8")
        entries.update(seal(sorted(partial.iterdir())))
        flush(output / "metrics.jsonl")

    def add_share():
        save_file(optimizer_tensors(model, optimizer), partial / share)
        entries.update(seal([partial / share]))
        completions = output / f"rollouts.{rank}.jsonl"
        if completions.exists():
            flush(completions)

    def publish(files):
        write_text(partial / MANIFEST, json.dumps({"files": files}, indent=1))
        umask = os.umask(0)
        os.umask(umask)
        for path in partial.iterdir():
            path.chmod(0o666 & ~umask)  # the library's weights are readable by their owner alone
        partial.rename(final)
        flush(output)
        delete_old(output, config.keep)

    try:
        together(lambda: check_finite(model, optimizer))
        on_rank_0(begin)
        together(add_share)
        files = {name: entry for entries in gather(entries) for name, entry in entries.items()}
        on_rank_0(publish, files)
    except (OSError, SafetensorError) as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{final}: could not be written ({reason}); the checkpoints before it are whole; make room, or "
                        "mend the disk, and give the same command again.") from error


undeletable = set()  # checkpoints of which this was said


def delete_old(output, keep):
    """Delete all checkpoints but the newest `keep`; what cannot be deleted is said once, and tried at the next save."""
    complete = [path for path in output.glob("checkpoint-*") if iteration_of(path) is not None]
    for old in sorted(complete, key=iteration_of)[:-keep]:
        try:
            shutil.rmtree(old)
        except OSError as error:
            if old not in undeletable:
                say(f"{old}: could not be deleted ({error.strerror}); the run goes on, and tries again when it saves.")
            undeletable.add(old)


def optimizer_tensors(model, optimizer):
    """This rank's share of the optimiser's state as {"NAME.KIND": tensor}; the count of steps is a tensor too.

    Of adapters, which are merged in the model's own file, the weights come along.
    """
    names = {p: name for name, p in model.named_parameters()}
    tensors = {}
    for p, state in optimizer.optim.state.items():
        if "lora_" in names[p]:
            tensors[f"{names[p]}.weight"] = p.detach()
        tensors |= {f"{names[p]}.{kind}": torch.as_tensor(value) for kind, value in state.items()}
    return {name: value.contiguous() for name, value in tensors.items()}


def keep_files(files, partial):
    """Write the files of the checkpoint that the run began with over those that the library has written.

    The library rewrites config and tokenizer so that its own older releases, and other programs, cannot read them.
    """
    for name, contents in files.items():
        if name not in ("run.json", MANIFEST):
            (partial / name).write_bytes(contents)


def resume(checkpoint, model, optimizer):
    """Go on from a checkpoint, where there is one -> optimiser steps taken until then."""
    if not checkpoint:
        return 0
    load_optimizer(checkpoint, model, optimizer)
    return read_run(checkpoint)["iteration"]


def load_optimizer(checkpoint, model, optimizer):
    """Give every parameter of this rank's shard its saved state, whatever number of ranks wrote it; adapters' weights
    too, to every rank.

    Raises UserError where a share cannot be read or a parameter's state is missing (before the first step all are).
    """
    names = {p: name for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    mine = {names[p] for group in optimizer.optim.param_groups for p in group["params"]}
    loaded = set()
    for path in sorted(checkpoint.glob("optimizer.*.safetensors")):
        try:
            with safe_open(path, "pt") as share:
                for key in share.keys():
                    name, _, kind = key.rpartition(".")
                    if kind == "weight":
                        parameters[name].data.copy_(share.get_tensor(key))
                    elif name in mine:
                        loaded.add(name)
                        own = optimizer.optim.state_of(parameters[name])
                        if kind == "step":
                            own["step"] = share.get_tensor(key).item()
                        else:
                            own[kind].copy_(share.get_tensor(key))
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove {checkpoint} to go on from the one before."
                            ) from error
    if loaded and loaded != mine:
        raise UserError(f"{checkpoint}: the optimiser's state of {len(mine - loaded)} weights is missing; remove the "
                        "folder to go on from the one before.")
