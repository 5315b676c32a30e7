"""How a run begins: --output is empty, or holds this very run, which goes on from its newest whole checkpoint."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from engine.model.loading import find_model, fingerprint
from engine.program.earlier import changed_options
from engine.program.files import iteration_of, write_text
from engine.program.ranks import on_rank_0, say
from engine.program.settings import UserError
from engine.run.checkpoints import read_run
from engine.run.log import cut_log
from engine.run.manifest import newest_whole


class Opening(NamedTuple):
    """What a run begins with, or goes on with."""

    samples: list
    completions: list | None  # of demonstrations
    tasks: list | None  # of demonstrations
    checkpoint: Path | None  # to go on from
    origin: dict  # what `note_origin` gives, for each of the run's checkpoints

    @property
    def base(self):
        """The folder of the weights that the run began with, which are also the reference of the KL."""
        return self.origin["start"]

    @property
    def weights(self):
        """The folder of the policy's weights as they are now."""
        return self.checkpoint or self.base


def open_run(config, prompts, load) -> Opening | None:
    """Begin a run in --output, or go on with the one in it; None where that one is finished.

    `prompts` are those of an iteration; load(config) gives (samples, completions, tasks). Nothing is written before all
    is read and found to fit. Raises UserError for another run's folder, rather than mixing two runs.
    """
    checkpoint = newest_whole(config.output)  # damaged ones are put aside
    if checkpoint:
        check_same_run(config, checkpoint, prompts)
        if is_finished(config, checkpoint):
            say(f"{config.output} is finished: {checkpoint}")
            return None
    samples, completions, tasks = load(config)
    origin = note_origin(config, checkpoint, samples, completions, tasks)
    dist.barrier()  # every rank has looked before rank 0 writes
    on_rank_0(prepare_output, config, checkpoint)
    if checkpoint:
        say(f"going on from {checkpoint}")
    opening = Opening(samples, completions, tasks, checkpoint, origin)
    say(f"model: {opening.weights}")
    return opening


def check_same_run(config, checkpoint, prompts):
    """Raise UserError where a checkpoint is of a run with another configuration, free options apart.

    The number of processes may be another as long as an iteration has as many `prompts`.
    """
    state = read_run(checkpoint)
    changed = changed_options(state["config"], config)
    if state["prompts"] != prompts:
        changed.append(f"number of prompts an iteration ({prompts}, not {state['prompts']}: --micro-batch times "
                       "--accumulation times processes)")
    if changed:
        raise UserError(f"--output {config.output} holds a run made with another {', '.join(changed)}; give the same "
                        "options to go on with it, or name another folder.")


def is_finished(config, checkpoint) -> bool:
    """Whether the last iteration is saved, and measured where it is to be."""
    state = read_run(checkpoint)
    last = state["iterations"]
    return state["iteration"] == last and (not config.eval_every or is_measured(config.output, last))


def is_measured(output, iteration):
    """Whether an evaluation in training has ended, which it has when its line is the log's last."""
    log = Path(output) / "metrics.jsonl"
    if not log.exists() or not (Path(output) / f"eval-{iteration:06d}" / "metrics.json").exists():
        return False
    lines = log.read_bytes().splitlines(keepends=True)
    return bool(lines) and lines[-1].endswith(b"}\n") and b'"task": "eval"' in lines[-1]


def note_origin(config, checkpoint, samples, completions, tasks):
    """What a run is made of -> {"start", "start_fingerprint", "rows"}, to be noted in its checkpoints.

    "start" is `Opening.base`; "rows" is a digest of all that the run learns from. A run that goes on keeps its start,
    also where --model has a newer checkpoint by now. Raises UserError where the rows or the start's weights have
    changed, or where --output is a model's folder.
    """
    rows = [[Path(s.video).name, s.query, s.start, s.end, *filter(None, (s.excerpt, s.alternatives))] for s in samples]
    digest = hashlib.sha256(json.dumps([rows, completions, tasks]).encode()).hexdigest()
    if not checkpoint:
        if any(Path(config.output).glob("*.safetensors")):
            raise UserError(f"--output {config.output}: is the folder of a model, whose config.json the run's would "
                            "replace; name another folder.")
        start = find_model(config.model)
        return {"start": str(start), "start_fingerprint": fingerprint(start), "rows": digest}
    state = read_run(checkpoint)
    if state["rows"] != digest:
        raise UserError(f"{config.demonstrations or config.annotations}: its rows, or the videos that are there, have "
                        f"changed since {checkpoint} was written; name another --output.")
    use = "the reference of its KL" if config.kl_coef and not config.demonstrations else ""
    use = "the base of its adapters" if config.lora_rank else use
    if use and fingerprint(state["start"]) != state["start_fingerprint"]:
        raise UserError(f"{state['start']}: the weights that the run began with, {use}, are gone or changed; put them "
                        "back, or name another --output.")
    return {name: state[name] for name in ("start", "start_fingerprint", "rows")}


def prepare_output(config, checkpoint):
    """Cut the logs in --output back to the checkpoint, remove what is unfinished, note the configuration."""
    output = Path(config.output)
    first = iteration_of(checkpoint) if checkpoint else 0
    for log in (output / "metrics.jsonl", *output.glob("rollouts.*.jsonl")):
        if log.exists():
            cut_log(log, first)
    for partial in output.glob("checkpoint-*.partial"):
        shutil.rmtree(partial)
    write_text(output / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")


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
