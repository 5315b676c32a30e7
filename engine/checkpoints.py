"""Models and checkpoints: loading, saving, and going on with a run."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.attention import install_attention
from engine.files import MANIFEST, cut_log, flush, iteration_of, seal, write_text
from engine.lora import add_adapters, merged_weights
from engine.prompts import check_template
from engine.record import model_card
from engine.recovery import broken_weights, check_finite, newest_whole
from engine.runtime import gather, on_rank_0, say, together
from engine.settings import UserError, changed_options


class Processor(NamedTuple):
    """What stands between text, pixels and a checkpoint's tensors."""

    tokenizer: object
    pixels: dict  # the checkpoint's preprocessor_config.json: image_mean and image_std of a pixel in [0, 1]
    eos: torch.Tensor  # ids that end a completion
    banned: torch.Tensor  # ids never sampled: those that the tokenizer cannot write, and control tokens
    folder: Path | None = None  # where the checkpoint's files are


PUBLISHED = ("*.json", "*.jinja", "*.txt", "*.safetensors", "LICENSE*")  # what is taken from a hub's model


def newest_checkpoint(folder):
    """-> the newest complete checkpoint of this program in a run's output folder, or None."""
    complete = [path for path in Path(folder).glob("checkpoint-*")
                if iteration_of(path) is not None and (path / "run.json").is_file()]
    return max(complete, key=iteration_of, default=None)


def find_model(name):
    """Which folder `--model` means, by its contents: a folder that holds weights is the model itself, else its newest
    checkpoint is. A hub id gives the folder of its download. Raises OSError, one sentence, where there is none.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download  # not above: a mistyped option should not wait for it

        try:
            return Path(snapshot_download(name, allow_patterns=PUBLISHED))
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise OSError(f"--model {name}: there is no such folder, and no such model could be had ({reason}); give a "
                          "folder that holds one or a hub id that this machine can reach.") from error
    if any(folder.glob("*.safetensors")) and not (folder / "adapter_config.json").exists():
        return folder
    newest = newest_checkpoint(folder)
    if newest:
        return newest
    if (folder / "adapter_config.json").exists():
        raise OSError(f"--model {name}: holds a LoRA adapter alone; merge it into its base model first.")
    raise OSError(f"--model {name}: holds neither *.safetensors nor a checkpoint of this program; give a folder with a "
                  "Qwen2.5-VL model.")


def fingerprint(folder):
    """A digest of a checkpoint's weights: their files' names, sizes, and sixteen places of a megabyte in each."""
    digest = hashlib.sha256()
    for path in sorted(set(Path(folder).glob("*.safetensors")) - set(Path(folder).glob("optimizer.*"))):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for place in range(16):
                file.seek(place * size // 16)
                digest.update(file.read(2**20))
    return digest.hexdigest()


def load_model(name, device):
    """Load Qwen2.5-VL and what belongs to it -> (model, Processor); bfloat16 on GPUs, float32 on CPUs.

    Raises OSError, one sentence, where there is no such model, or one that this program would silently get wrong.
    """
    from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.utils import logging

    logging.disable_progress_bar()  # of files that load in seconds
    folder = find_model(name)
    try:
        # Nothing is unpickled or run that a folder holds, and no hub is asked.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        check_config(name, config)
        model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, output_loading_info=True,
            use_safetensors=True, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if str(error).startswith("--model"):
            raise
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"--model {name}: no Qwen2.5-VL model could be loaded from {folder} ({reason}).") from error
    model = model.to(device)
    check_weights(name, model, loading)
    check_tokenizer(name, tokenizer, config)
    try:
        check_template(tokenizer)
    except ValueError as error:
        raise OSError(f"--model {name}: its chat template {error}; copy that of the model it was made from.") from error
    if not {"image_mean", "image_std"} <= pixels.keys():
        raise OSError(f"--model {name}: its preprocessor_config.json states no image_mean and image_std.")
    install_attention(model)
    ends = model.generation_config.eos_token_id or []
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    unwritable = range(len(tokenizer), model.config.text_config.vocab_size)
    banned = ({model.config.video_token_id, model.config.image_token_id} | control | set(unwritable)) - ends
    eos_ids = torch.tensor(sorted(ends), device=device)
    banned_ids = torch.tensor(sorted(banned), device=device)
    return model, Processor(tokenizer, pixels, eos_ids, banned_ids, folder)


def check_config(name, config):
    """Raise OSError for a model of another kind, or one that runs but not as it was meant."""
    if config.model_type != "qwen2_5_vl":
        raise OSError(f"--model {name}: is a {config.model_type}; only Qwen2.5-VL is supported.")
    if getattr(config, "quantization_config", None):
        raise OSError(f"--model {name}: holds quantised weights, which cannot be trained; give the model in bfloat16.")
    if getattr(config.text_config, "use_sliding_window", False):
        raise OSError(f"--model {name}: its language model attends within a window (use_sliding_window), which this "
                      "program does not; set it to false in config.json, if that is meant.")


def check_weights(name, model, loading):
    """Raise OSError where weights are missing (they would be random), left over, of another shape, or not finite."""
    for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "has no place for"),
                      ("mismatched_keys", "has another shape of")):
        found = sorted(str(key) for key in loading[key])
        if found:
            raise OSError(f"--model {name}: {what} {len(found)} weights, {found[0]} among them; the files are damaged "
                          "or of another model.")
    broken = broken_weights(model)
    if broken:
        raise OSError(f"--model {name}: {len(broken)} weights are not finite, {broken[0]} among them; take another "
                      "checkpoint.")


def check_tokenizer(name, tokenizer, config):
    """Raise OSError where the tokenizer is not the model's: without its files, transformers makes an empty one."""
    if not tokenizer.chat_template:
        raise OSError(f"--model {name}: its tokenizer has no chat template; copy chat_template.jinja of the model that "
                      "it was made from.")
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    if pad != config.video_token_id or len(tokenizer) > config.text_config.vocab_size:
        raise OSError(f"--model {name}: its tokenizer has {len(tokenizer)} ids with <|video_pad|> at {pad}, the model "
                      f"{config.text_config.vocab_size} with it at {config.video_token_id}; copy tokenizer.json and "
                      "tokenizer_config.json of the model that it was made from.")


def load_for_training(config, folder, start, device):
    """The policy as it is in `folder` -> (model, Processor), with gradients for what the configuration trains.

    Adapters begin on the weights that the run began with, in `start`; `load_optimizer` brings them to where they were.
    """
    model, processor = load_model(start if config.lora_rank else folder, device)
    if config.lora_rank:
        add_adapters(model, config)
    else:
        model.model.visual.requires_grad_(config.train_vision)
    if config.gradient_checkpointing:
        recompute_activations(model)
    return model, processor


def recompute_activations(model):
    """Gradient checkpointing, which transformers calls activation checkpointing since 5.23.

    On a GPU the layers' inputs wait for the backward pass in host memory.
    """
    if not hasattr(model, "activation_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_enable({"use_reentrant": False}, offload=model.device.type != "cpu")


# ------------------------------------------------------------------------------------------------ checkpoints


def find_run(config, prompts):
    """Look for an earlier call's run in --output -> (its newest whole checkpoint or None, whether it is finished).

    The same configuration goes on with its run, also on another number of processes as long as an iteration has as many
    `prompts`. Raises UserError for another configuration, rather than mixing two runs.
    """
    newest = newest_whole(config.output)
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
    return newest, state["iteration"] == total and (not config.eval_every or is_measured(config.output, total))


def is_measured(output, iteration):
    """Whether an evaluation in training has ended, which it has when its line is the log's last."""
    log = Path(output) / "metrics.jsonl"
    if not log.exists() or not (Path(output) / f"eval-{iteration:06d}" / "metrics.json").exists():
        return False
    lines = log.read_bytes().splitlines(keepends=True)
    return bool(lines) and lines[-1].endswith(b"}\n") and b'"task": "eval"' in lines[-1]


def note_origin(config, resume_from, samples, completions, tasks):
    """What a run is made of -> {"start", "start_fingerprint", "rows"}, to be noted in its checkpoints.

    "start" is the folder of the weights that the run began with, which are also the reference of the KL; "rows" is a
    digest of all that it learns from. A run that goes on keeps its start, also where --model has a newer checkpoint by
    now. Raises UserError where the rows or the start's weights have changed, or where --output is a model's folder.
    """
    rows = [[Path(s.video).name, s.query, s.start, s.end, *filter(None, (s.excerpt, s.alternatives))] for s in samples]
    digest = hashlib.sha256(json.dumps([rows, completions, tasks]).encode()).hexdigest()
    if not resume_from:
        if any(Path(config.output).glob("*.safetensors")):
            raise UserError(f"--output {config.output}: is the folder of a model, whose config.json the run's would "
                            "replace; name another folder.")
        start = find_model(config.model)
        return {"start": str(start), "start_fingerprint": fingerprint(start), "rows": digest}
    state = read_run(resume_from)
    if state["rows"] != digest:
        raise UserError(f"{config.demonstrations or config.annotations}: its rows, or the videos that are there, have "
                        f"changed since {resume_from} was written; name another --output.")
    use = "the reference of its KL" if config.kl_coef and not config.demonstrations else ""
    use = "the base of its adapters" if config.lora_rank else use
    if use and fingerprint(state["start"]) != state["start_fingerprint"]:
        raise UserError(f"{state['start']}: the weights that the run began with, {use}, are gone or changed; put them "
                        "back, or name another --output.")
    return {name: state[name] for name in ("start", "start_fingerprint", "rows")}


def check_first_kl(config, iteration, metrics):
    """Policy and reference begin with the same weights: raise UserError where their first passes differ anyway."""
    if iteration == 0 and config.mu == 1 and metrics.get("kl", 0.0) > 1e-3:
        raise UserError(f"the first iteration's KL is {metrics['kl']:.3g}, though policy and reference have the same "
                        "weights: a pass of one of them is wrong; please report this with your versions.")


def start_output(config, resume_from):
    """Make --output ready: cut its logs back to the checkpoint that the run goes on from, note the configuration."""
    def prepare():
        output = Path(config.output)
        start = iteration_of(resume_from) if resume_from else 0
        for log in (output / "metrics.jsonl", *output.glob("rollouts.*.jsonl")):
            if log.exists():
                cut_log(log, start)
        for partial in output.glob("checkpoint-*.partial"):
            shutil.rmtree(partial)
        write_text(output / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")

    dist.barrier()  # every rank has looked before rank 0 writes
    on_rank_0(prepare)
    if resume_from:
        say(f"going on from {resume_from}")


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
        keep_files(newest_checkpoint(output) or processor.folder, partial)  # the latter may be deleted by now
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


def keep_files(folder, partial):
    """Copy a checkpoint's files, weights and what is this program's apart, over those that the library has written.

    The library rewrites config and tokenizer so that its own older releases, and other programs, cannot read them.
    """
    for path in folder.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth") or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in ("run.json", MANIFEST):
            shutil.copyfile(path, partial / path.name)


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
    found = set()
    for path in sorted(checkpoint.glob("optimizer.*.safetensors")):
        try:
            with safe_open(path, "pt") as share:
                for key in share.keys():
                    name, _, kind = key.rpartition(".")
                    if kind == "weight":
                        parameters[name].data.copy_(share.get_tensor(key))
                    elif name in mine:
                        found.add(name)
                        own = optimizer.optim.state_of(parameters[name])
                        if kind == "step":
                            own["step"] = share.get_tensor(key).item()
                        else:
                            own[kind].copy_(share.get_tensor(key))
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove {checkpoint} to go on from the one before."
                            ) from error
    if found and found != mine:
        raise UserError(f"{checkpoint}: the optimiser's state of {len(mine - found)} weights is missing; remove the "
                        "folder to go on from the one before.")
