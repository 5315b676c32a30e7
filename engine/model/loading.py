"""Models: which folder --model means, and what is loaded from it, or refused because it would go wrong silently."""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from engine.model.attention import install_attention
from engine.model.health import broken_weights
from engine.model.lora import add_adapters
from engine.model.prompts import check_template
from engine.program.files import iteration_of


class Processor(NamedTuple):
    """What stands between text, pixels and a checkpoint's tensors."""

    tokenizer: object
    pixels: dict  # the checkpoint's preprocessor_config.json: image_mean and image_std of a pixel in [0, 1]
    eos: torch.Tensor  # ids that end a completion
    banned: torch.Tensor  # ids never sampled: those that the tokenizer cannot write, and control tokens
    files: dict = {}  # name -> contents of all that is no weights: the folder may be gone when they are saved again


ADAPTER = "adapter_config.json"  # of a LoRA adapter, as PEFT writes it
PUBLISHED = ("*.json", "*.jinja", "*.txt", "*.safetensors", "LICENSE*")  # what is taken from a hub's model


def newest_checkpoint(folder):
    """-> the newest complete checkpoint of this program in a run's output folder, or None."""
    complete = [path for path in Path(folder).glob("checkpoint-*")
                if iteration_of(path) is not None and (path / "run.json").is_file()]
    return max(complete, key=iteration_of, default=None)


def find_model(name):
    """Which folder `--model` means, by its contents: a folder that holds weights is the model itself, else its newest
    checkpoint is. A hub id gives the folder of its download. Raises OSError, one sentence, where there is none, or
    where a folder holds two sets of weights.
    """
    folder = Path(name)
    if not folder.is_dir():
        if isinstance(name, Path):  # that was a folder
            raise OSError(f"--model {name}: the folder has gone meanwhile; put it back, or name another.")
        from huggingface_hub import snapshot_download  # not above: a mistyped option should not wait for it

        try:
            return Path(snapshot_download(name, allow_patterns=PUBLISHED))
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise OSError(f"--model {name}: there is no such folder, and no such model could be had ({reason}); give a "
                          "folder that holds one or a hub id that this machine can reach.") from error
    kinds = sets_of_weights(folder)
    if len(kinds) > 1:
        raise OSError(f"--model {name}: holds two sets of weights, {' and '.join(kinds[:2])}; move away the one that "
                      "is not meant.")
    if kinds and kinds != [ADAPTER]:
        return folder
    newest = newest_checkpoint(folder)
    if newest:
        return newest
    if kinds:
        raise OSError(f"--model {name}: holds a LoRA adapter alone; merge it into its base model first.")
    raise OSError(f"--model {name}: holds neither *.safetensors nor a checkpoint of this program; give a folder with a "
                  "Qwen2.5-VL model.")


def weight_files(folder):
    """-> the sorted paths of a folder's weights; the optimiser's state is none."""
    return sorted(set(Path(folder).glob("*.safetensors")) - set(Path(folder).glob("optimizer.*")))


def sets_of_weights(folder):
    """-> the names of the sets in a folder: a file, the shards of one division ("model-*-of-2"), an adapter."""
    names = {re.sub(r"-\d+-of-0*(\d+)\.", r"-*-of-\1.", path.name) for path in weight_files(folder)}
    if (folder / ADAPTER).exists():
        names = {name for name in names if not name.startswith("adapter")} | {ADAPTER}
    return sorted(names)


def fingerprint(folder):
    """A digest of a checkpoint's weights: their files' names, sizes, and sixteen places of a megabyte in each."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
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
            use_safetensors=True, local_files_only=True, ignore_mismatched_sizes=True)  # check_weights refuses those
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(folder, local_files_only=True)
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and not is_weight(path)}
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
    return model, Processor(tokenizer, pixels, eos_ids, banned_ids, files)


def is_weight(path):
    """Whether a file holds weights, in any program's format, or says where they are."""
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".gguf", ".onnx", ".index.json")
    return path.name.endswith(suffixes)


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
    for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "has no place for"),
                      ("mismatched_keys", "has another shape of")):
        keys = sorted(map(str, loading[kind]))
        if keys:
            raise OSError(f"--model {name}: {what} {len(keys)} weights, {keys[0]} among them; the files are damaged "
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
        add_adapters(model, config.lora_rank, config.seed)
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
