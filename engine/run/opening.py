"""How a run begins: --output is empty, or holds this very run, which goes on from its newest whole checkpoint."""

import dataclasses
import hashlib
import json
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from engine.model.loading import find_model, fingerprint, newest_checkpoint
from engine.program.earlier import changed_options
from engine.program.files import iteration_of, write_text
from engine.program.ranks import gather, on_rank_0, say
from engine.program.settings import UserError
from engine.run.checkpoints import read_run
from engine.run.environment import identity_by_place, noted
from engine.run.log import cut_log
from engine.run.manifest import newest_whole, weights_damage
from engine.run.predictions import video_bytes


class Opening(NamedTuple):
    """What a run begins with, or goes on with."""

    samples: list
    completions: list | None  # of demonstrations
    tasks: list | None  # of demonstrations
    held_out: list  # samples that are measured while the run goes on
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


def open_run(config, prompts, load, load_held_out) -> Opening | None:
    """Begin a run in --output, or go on with the one in it; None where that one is finished.

    `prompts` are those of an iteration; load(config) gives (samples, completions, tasks), load_held_out(config) the
    samples that are measured meanwhile. Nothing is written before all is read and found to fit. Raises UserError for
    another run's folder, rather than mixing two runs.
    """
    if is_finished(config, prompts):
        gone = "its checkpoints are gone; name another folder to train again"
        say(f"{config.output} is finished: {newest_checkpoint(config.output) or gone}")
        return None
    checkpoint = newest_whole(config.output)  # damaged ones are put aside
    if checkpoint:
        check_same_run(config, read_run(checkpoint), prompts)
    samples, completions, tasks = load(config)
    held_out = load_held_out(config)
    origin = note_origin(config, checkpoint, samples, completions, tasks, held_out)
    dist.barrier()  # every rank has looked before rank 0 writes
    on_rank_0(prepare_output, config, checkpoint)
    if checkpoint:
        say(f"going on from {checkpoint}")
    opening = Opening(samples, completions, tasks, held_out, checkpoint, origin)
    say(f"model: {opening.weights}")
    return opening


# ------------------------------------------------------------------------------------------------ a finished run


def is_finished(config, prompts) -> bool:
    """Whether --output holds a run that has ended, whatever was deleted of it since.

    It has where its last checkpoint is there, and measured where it was to be; and where its end is noted and no
    checkpoint is left. (Who deletes the last one alone goes on from the one before.) Where the last checkpoint's
    weights are damaged, the run goes on from the one before. Raises UserError where it is another run.
    """
    output = Path(config.output)
    newest = newest_checkpoint(output)
    has_ended = "finished" in noted(output)
    if not newest:
        options = noted_options(output)
        if has_ended and options is not None:
            check_same_run(config, {"config": options}, prompts)
        return has_ended
    try:
        state = read_run(newest)
    except UserError:  # `newest_whole` puts it aside
        return False
    last = state["iterations"]
    if state["iteration"] < last or not (has_ended or not config.eval_every or is_measured(output, last)):
        return False
    check_same_run(config, state, prompts)
    return weights_damage(newest) is None


def is_measured(output, iteration):
    """Whether an evaluation in training has ended, which it has when its line is the log's last."""
    log = output / "metrics.jsonl"
    if not log.exists() or not (output / f"eval-{iteration:06d}" / "metrics.json").exists():
        return False
    lines = log.read_bytes().splitlines(keepends=True)
    return bool(lines) and lines[-1].endswith(b"}\n") and b'"task": "eval"' in lines[-1]


# ------------------------------------------------------------------------------------------------ the same run


def check_same_run(config, state, prompts):
    """Raise UserError where the run of a `state`, a checkpoint's run.json, has another configuration than `config`.

    Free options may differ, and so may the number of processes as long as an iteration has as many `prompts`.
    """
    changed = changed_options(state["config"] | {"model": config.model}, config)  # the model is compared apart:
    if config.model != state["config"]["model"] and not is_start(config.model, state):
        changed.append(f"--model ({state['config']['model']})")
    if state.get("prompts", prompts) != prompts:
        changed.append(f"number of prompts an iteration ({prompts}, not {state['prompts']}: --micro-batch times "
                       "--accumulation times processes)")
    if changed:
        raise UserError(f"--output {config.output} holds a run made with another {', '.join(changed)}; give the same "
                        "options to go on with it, or name another folder.")


def note_origin(config, checkpoint, samples, completions, tasks, held_out):
    """What a run is made of -> {"run", "start", "start_fingerprint", "rows", "held_out"}, for its checkpoints.

    "run" is its identity, made once; "start" is `Opening.base`; "rows" is a digest of all that the run learns from,
    "held_out" one of all that it is measured by. A run that goes on keeps its start, also where --model has a newer
    checkpoint by now. Raises UserError where one of these has changed, or where --output is a model's folder.
    """
    origin = {"rows": digest_of([[described(sample) for sample in samples], completions, tasks]),
              "held_out": digest_of([[*described(sample), video_bytes(sample)] for sample in held_out])}
    if not checkpoint:
        if any(Path(config.output).glob("*.safetensors")):
            raise UserError(f"--output {config.output}: is the folder of a model, whose config.json the run's would "
                            "replace; name another folder.")
        start = find_model(config.model)
        run = gather(new_identity(config))[0]
        return {"run": run, "start": str(start), "start_fingerprint": fingerprint(start)} | origin
    state = read_run(checkpoint)
    if state["rows"] != origin["rows"]:
        raise UserError(f"{config.demonstrations or config.annotations}: its rows, or the videos that are there, have "
                        f"changed since {checkpoint} was written; name another --output.")
    if state.get("held_out", origin["held_out"]) != origin["held_out"]:
        raise UserError(f"--eval-annotations {config.eval_annotations}: its rows, or their videos, have changed since "
                        f"{checkpoint} was written, so the curve would be of two measures; put them back, or name "
                        "another --output.")
    run = state.get("run") or identity_by_place(config.output)
    return {"run": run, "start": find_start(config, state), "start_fingerprint": state["start_fingerprint"]} | origin


def new_identity(config) -> str:
    """The identity of a run that begins: one that died before its first checkpoint is the same when it begins again."""
    before = noted_options(config.output)
    is_same = before is not None and not changed_options(before, config)
    return is_same and noted(config.output).get("run") or uuid.uuid4().hex[:16]


def noted_options(output) -> dict | None:
    """The options of the run in an output folder; None where its config.json cannot be read."""
    try:
        return dict(json.loads((Path(output) / "config.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return None


def described(sample):
    """What of a sample makes a row another one."""
    return [Path(sample.video).name, sample.query, sample.start, sample.end,
            *filter(None, (sample.excerpt, sample.alternatives))]


def digest_of(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def is_start(name, state) -> bool:
    """Whether --model's folder of that name holds the weights that a run began with: their fingerprint tells."""
    try:
        return fingerprint(find_model(name)) == state.get("start_fingerprint")
    except OSError:
        return False


def find_start(config, state) -> str:
    """The folder of the weights that a run began with: where they were, else where --model is by now.

    Raises UserError where they are needed and nowhere.
    """
    use = "the reference of its KL" if config.kl_coef and not config.demonstrations else ""
    use = "the base of its adapters" if config.lora_rank else use
    if not use or is_start(state["start"], state):
        return state["start"]
    if is_start(config.model, state):
        return str(find_model(config.model))
    raise UserError(f"{state['start']}: the weights that the run began with, {use}, are gone or changed; put them "
                    "back, say by --model where they are, or name another --output.")


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
