"""Models and checkpoints: loading, saving, and going on with a run."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from engine.attention import install_attention
from engine.runtime import say
from engine.settings import UserError, changed_options

logging.disable_progress_bar()  # of files that load in seconds


class Processor(NamedTuple):
    """What stands between text, pixels and a checkpoint's tensors."""

    tokenizer: object
    pixels: dict  # the checkpoint's preprocessor_config.json: image_mean and image_std of a pixel in [0, 1]
    eos: torch.Tensor  # ids that end a completion
    banned: torch.Tensor  # ids never sampled: they would ask for video features


def newest_checkpoint(folder):
    """-> the newest complete checkpoint in a run's output folder, or None."""
    return max(Path(folder).glob("checkpoint-[0-9]*[0-9]"), default=None)


def load_model(name, device):
    """Load Qwen2.5-VL and what belongs to it -> (model, Processor); bfloat16 on GPUs, float32 on CPUs.

    Raises OSError, one sentence, when there is no such checkpoint.
    """
    path = newest_checkpoint(name) or name
    try:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(path)
        if not {"image_mean", "image_std"} <= pixels.keys():
            raise ValueError("its preprocessor_config.json states no image_mean and image_std")
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"--model {name}: no Qwen2.5-VL checkpoint could be loaded ({reason}); give a folder that holds "
                      "one or a hub id that this machine can reach.") from error
    if model.config.model_type != "qwen2_5_vl":
        raise OSError(f"--model {name}: is a {model.config.model_type}; only Qwen2.5-VL is supported.")
    install_attention(model)
    ends = model.generation_config.eos_token_id or []
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    banned = {model.config.video_token_id, model.config.image_token_id}
    eos_ids = torch.tensor(sorted(ends), device=device)
    banned_ids = torch.tensor(sorted(banned), device=device)
    return model.to(device), Processor(tokenizer, pixels, eos_ids, banned_ids)


def recompute_activations(model):
    """Gradient checkpointing, which transformers calls activation checkpointing since 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# ------------------------------------------------------------------------------------------------ checkpoints


def find_run(config, prompts):
    """Look for an earlier call's run in --output -> (its newest checkpoint or None, whether it is finished).

    The same configuration goes on with its run, also on another number of processes as long as an iteration has as many
    `prompts`. Raises UserError for another configuration, rather than mixing two runs.
    """
    newest = newest_checkpoint(config.output)
    if newest is None:
        return None, False
    state = read_run(newest)
    changed = changed_options(state["config"], config)
    if state["prompts"] != prompts:
        changed.append(f"number of prompts an iteration ({prompts}, not {state['prompts']}: --micro-batch times "
                       "--accumulation times processes)")
    if changed:
        raise UserError(f"--output {config.output} holds a run made with another {', '.join(changed)}; give the same "
                        "options to go on with it, or name another folder.")
    total = state["iterations"]
    measured = Path(config.output) / f"eval-{total:06d}" / "metrics.json"
    return newest, state["iteration"] == total and (not config.eval_every or measured.exists())


def start_output(config, resume_from):
    """Make --output ready: cut its logs back to the checkpoint that the run goes on from, note the configuration."""
    dist.barrier()  # every rank has looked before rank 0 writes
    if dist.get_rank() == 0:
        output = Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        start = int(resume_from.name.split("-")[1]) if resume_from else 0
        for log in (output / "metrics.jsonl", *output.glob("rollouts.*.jsonl")):
            _cut_log(log, start)
        (output / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    if resume_from:
        say(f"going on from {resume_from}")


def _cut_log(log, start):
    """Keep the lines of iterations before `start`."""
    lines = log.read_text(encoding="utf-8").split("\n") if start and log.exists() else []
    whole = [line for line in lines if line.endswith("}")]  # a crash may have cut the last one off
    try:
        kept = [line + "\n" for line in whole if json.loads(line)["iteration"] < start]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{log}: holds a line that is no log's ({error!r}); mend it, or move the file away.") from error
    log.write_text("".join(kept), encoding="utf-8")


def read_run(checkpoint):
    """-> what `save_checkpoint` noted: "iteration" and, of the whole run, "iterations", "prompts", "config"."""
    return json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))


def save_checkpoint(config, progress, model, processor, optimizer):
    """Write a checkpoint in the Hugging Face layout, with each rank's share of the optimiser's state.

    `progress` is {"iteration": optimiser steps taken, "iterations": of the whole run, "prompts": of an iteration}.

    It is written under another name and renamed when complete, so a crash never leaves a half checkpoint behind.
    """
    rank = dist.get_rank()
    final = Path(config.output) / f"checkpoint-{progress['iteration']:06d}"
    partial = final.with_suffix(".partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        processor.tokenizer.save_pretrained(partial)
        (partial / "preprocessor_config.json").write_text(json.dumps(processor.pixels, indent=2))
        (partial / "run.json").write_text(json.dumps(progress | {"config": dataclasses.asdict(config)}))
    dist.barrier()
    names = {p: name for name, p in model.named_parameters()}
    torch.save({names[p]: state for p, state in optimizer.optim.state.items()}, partial / f"optimizer.{rank}.pt")
    dist.barrier()
    if rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(Path(config.output).glob("checkpoint-[0-9]*[0-9]"))[:-config.keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_optimizer(checkpoint, model, optimizer):
    """Give every parameter of this rank's shard its saved state, whatever number of ranks wrote it."""
    names = {p: name for name, p in model.named_parameters()}
    mine = {names[p]: p for group in optimizer.optim.param_groups for p in group["params"]}
    for path in sorted(checkpoint.glob("optimizer.*.pt")):
        try:
            states = torch.load(path, map_location="cpu", mmap=True)
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"{path}: cannot be read; remove {checkpoint} to go on from the one before.") from error
        for name, state in states.items():
            if name in mine:
                moved = {k: v.to(model.device, copy=True) if torch.is_tensor(v) else v for k, v in state.items()}
                optimizer.optim.state[mine.pop(name)] = moved
