"""What every program needs and no paper mentions: command line, processes, loading and saving a model, the log."""

import argparse
import dataclasses
import datetime
import json
import os
import pickle
import shutil
import signal
import sys
import time
import traceback
from dataclasses import field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.image_processing_base import ImageProcessingMixin

import grpo
from video import VideoError


class UserError(Exception):
    """Something the user can mend; its one sentence is all that `run` prints."""


# ------------------------------------------------------------------------------------------------ settings


def flag(default, help, choices=None):
    """A dataclass field that becomes the command-line option of its name."""
    return field(default=default, metadata={"help": help, "choices": choices})


def option(name):
    return "--" + name.replace("_", "-")


def parse_settings(cls, description, argv=None):
    """Build the command line from a dataclass of `flag`s and parse it; a mistake prints one sentence and exits 2."""
    parser = argparse.ArgumentParser(description=description, usage="%(prog)s [options]", allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help lists every option.\n")
    for f in dataclasses.fields(cls):
        shown = " ".join(map(str, f.default)) if f.type is tuple else "" if f.default is None else str(f.default)
        kind = {"help": f.metadata["help"] + (f" [{shown}]" if shown else ""), "default": f.default}
        if f.type is bool:
            kind["action"] = argparse.BooleanOptionalAction
        elif f.type is tuple:
            kind |= {"nargs": "+", "choices": f.metadata["choices"], "type": type(f.default[0])}
            kind["metavar"] = None if f.metadata["choices"] else type(f.default[0]).__name__.upper()
        else:
            kind |= {"type": f.type, "choices": f.metadata["choices"]}
            kind["metavar"] = None if f.metadata["choices"] else f.type.__name__.upper()
        parser.add_argument(option(f.name), **kind)
    values = vars(parser.parse_args(argv))
    settings = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    try:
        settings.check()
    except UserError as error:
        parser.error(str(error).rstrip("."))
    return settings


# ------------------------------------------------------------------------------------------------ processes


def setup_distributed():
    """Join the process group torchrun describes, or make one of a single process -> the device of this rank.

    One process, gloo on CPUs and NCCL on GPUs all run the same code; only the world size differs.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda and device.index >= torch.cuda.device_count():
        sys.exit(f"torchrun started more processes than there are GPUs ({torch.cuda.device_count()}); lower "
                 "--nproc_per_node.")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # Ranks wait for each other's videos and evaluations: longer than NCCL's ten minutes.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2), **alone)
    return device


def say(text):
    """Print once, from rank 0."""
    if dist.get_rank() == 0:
        tqdm.write(text, file=sys.stdout)


def run(program, settings):
    """Run `program(settings, device)` in the process group; a user's mistake ends it with one sentence, status 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are forked
    device = setup_distributed()
    try:
        program(settings, device)
    except KeyboardInterrupt:
        status = 130
    except (UserError, VideoError, ImportError, OSError) as error:
        # What every rank finds is said once; an unreadable video is found by the rank whose slot it was.
        if dist.get_rank() == 0 or isinstance(error, VideoError):
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(5)  # torchrun ends all ranks with the first: let rank 0 speak
        status = 1
    except BaseException:
        if dist.get_world_size() == 1:
            raise
        traceback.print_exc()
        status = 1
    else:
        dist.destroy_process_group()
        return
    if dist.get_world_size() > 1:
        os._exit(status)  # leaving the group in good order would wait for ranks that wait for this one
    dist.destroy_process_group()
    sys.exit(status)


# ------------------------------------------------------------------------------------------------ models and checkpoints


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
    grpo.speed_up(model)
    ends = model.generation_config.eos_token_id or []
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    as_ids = lambda ids: torch.tensor(sorted(ids), device=device)  # noqa: E731
    banned = {model.config.video_token_id, model.config.image_token_id}
    return model.to(device), Processor(tokenizer, pixels, as_ids(ends), as_ids(banned))


def save_checkpoint(config, iteration, model, processor, optimizer):
    """Write checkpoint-<iteration> in the Hugging Face layout, with each rank's share of the optimiser's state.

    It is written under another name and renamed when complete, so a crash never leaves a half checkpoint behind.
    """
    rank, final = dist.get_rank(), Path(config.output) / f"checkpoint-{iteration:06d}"
    partial = final.with_suffix(".partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        processor.tokenizer.save_pretrained(partial)
        (partial / "preprocessor_config.json").write_text(json.dumps(processor.pixels, indent=2))
        (partial / "run.json").write_text(json.dumps({"iteration": iteration, "config": dataclasses.asdict(config)}))
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
            raise UserError(f"{path}: cannot be read; remove {checkpoint} to resume from the one before.") from error
        for name, state in states.items():
            if name in mine:
                moved = {k: v.to(model.device, copy=True) if torch.is_tensor(v) else v for k, v in state.items()}
                optimizer.optim.state[mine.pop(name)] = moved


def open_output(config):
    """Prepare --output -> the checkpoint to resume from, or None. Raises UserError rather than mixing two runs."""
    output, newest = Path(config.output), newest_checkpoint(config.output)
    if newest and not config.resume:
        raise UserError(f"--output {output} already holds {newest.name}; add --resume to go on from it, or name another "
                        "folder.")
    if config.resume and not newest:
        raise UserError(f"--resume: no checkpoint in --output {output}; leave --resume out to start there.")
    dist.barrier()  # every rank has looked before rank 0 writes
    if dist.get_rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        start = int(newest.name.split("-")[1]) if newest else 0
        for log in (output / "metrics.jsonl", *output.glob("rollouts.*.jsonl")):
            lines = log.read_text(encoding="utf-8").split("\n") if newest and log.exists() else []
            lines = [line for line in lines if line.endswith("}")]  # a crash may have cut the last one off
            try:
                kept = "".join(line + "\n" for line in lines if json.loads(line)["iteration"] < start)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{log}: holds a line that is no log's ({error!r}); mend it, or move the file away.") from error
            log.write_text(kept, encoding="utf-8")
        (output / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    if newest:
        before = json.loads((newest / "run.json").read_text())["config"]
        now = json.loads(json.dumps(dataclasses.asdict(config)))
        changed = [option(k) for k in now if k != "resume" and before.get(k) != now[k]]
        say(f"resuming from {newest}" + (f"; changed since: {', '.join(changed)}" if changed else ""))
    return newest


# ------------------------------------------------------------------------------------------------ the log


def combine(rows):
    """Dictionaries of metrics with different keys -> one: the mean over those that have a key, for `_max` the most."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float((np.max if name.endswith("_max") else np.mean)([row[name] for row in rows if name in row]))
            for name in names}


class StopSignal:
    """Ctrl-C and SIGTERM let the iteration end and be saved; a second Ctrl-C stops at once."""

    def __init__(self):
        self.caught = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        self.caught = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_any_rank(self, device):
        caught = torch.tensor(float(self.caught), device=device)
        dist.all_reduce(caught)
        return bool(caught)


class Log:
    """One line an iteration, averaged over ranks: metrics.jsonl, a progress bar, TensorBoard where installed."""

    def __init__(self, config, start, total):
        self.rank, self.board = dist.get_rank(), None
        if self.rank == 0:
            self.file = open(Path(config.output) / "metrics.jsonl", "a", encoding="utf-8")
            self.bar = tqdm(total=total, initial=start, desc="training", dynamic_ncols=True)
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(config.output)
            except ImportError:
                pass  # optional: metrics.jsonl holds the same numbers

    def write(self, iteration, task, metrics):
        """Gather from all ranks (so every rank must call it) and write on rank 0."""
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, metrics)
        if self.rank:
            return
        metrics = combine(gathered)
        self.file.write(json.dumps({"iteration": iteration, "task": task} | metrics) + "\n")
        self.file.flush()
        if self.board:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, iteration)
        if task != "eval":
            shown = metrics.get(f"{task}/total", metrics.get("nll"))
            self.bar.set_postfix_str(f"{task} {'nll' if task == 'sft' else 'reward'} {shown:.3f}", refresh=False)
            self.bar.update()
