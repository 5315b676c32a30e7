"""What the benchmarks run on: random Qwen2.5-VLs of several sizes, a byte tokenizer, and prompts of a chosen length."""

import json
import math
import warnings
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.utils import logging

from engine.model.attention import install_attention
from engine.model.loading import newest_checkpoint
from engine.model.prompts import MERGE, Prompt, encode_prompt, patchify, position_ids
from engine.program.settings import UserError
from engine.video.frames import SIDE

FPS = 2.0
PIXELS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
GRIDS = 8  # two-frame grid steps of every video: TRL's eight images are one of them each
MIN_TEXT = 24  # the query's tokens; TRL's eight images take 14 of them for their marks
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
            "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TOWER = dict(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420)  # the published one
PUBLISHED = ("3b", "7b")  # of the hub's Qwen2.5-VL-3B-Instruct and -7B-Instruct
SIZES = {  # language model, half of a head's width, tower
    "5m": (dict(hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
                num_key_value_heads=2, vocab_size=320), 16,
           dict(depth=2, hidden_size=128, num_heads=4, intermediate_size=256, fullatt_block_indexes=[1])),
    "60m": (dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
                 num_key_value_heads=2, vocab_size=32000), 32,
            dict(depth=4, hidden_size=256, num_heads=4, intermediate_size=512, fullatt_block_indexes=[3])),
    "3b": (dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
                num_key_value_heads=2, vocab_size=151936), 64, TOWER),
    "7b": (dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                num_key_value_heads=4, vocab_size=152064), 64, TOWER),
}


class Cell(NamedTuple):
    """One point of the table or of a curve: tokens of the prompt, of every completion, and their number G."""

    prompt: int
    completion: int
    group: int = 8


def sections(half):
    """-> how many of `half` a head's rotary frequencies time, height and width have: [16, 24, 24] of 64."""
    return [half // 4, half * 3 // 8, half * 3 // 8]


def make_checkpoint(folder, size, device):
    """Write a random Qwen2.5-VL with a byte tokenizer in the Hugging Face layout -> its number of parameters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        additional_special_tokens=SPECIALS)
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("im_end", "vision_start", "vision_end", "image_pad", "video_pad")}
    text, half, vision = SIZES[size]
    config = Qwen2_5_VLConfig(
        text_config=text | dict(
            bos_token_id=None, eos_token_id=ids["im_end"], pad_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections(half)}),
        vision_config=dict(out_hidden_size=text["hidden_size"], tokens_per_second=2) | vision,
        tie_word_embeddings=size == "3b", video_token_id=ids["video_pad"], image_token_id=ids["image_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"])
    torch.manual_seed(0)
    with device:
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return sum(p.numel() for p in model.parameters())


def make_video(tokenizer, tokens):
    """-> (frames (2 * GRIDS, 3, H, W) uint8, text): a random video and a query that make a prompt of `tokens`."""
    room = tokens - len(encode_prompt(tokenizer, "", 0))
    sides = [(h, w) for h in range(1, 80) for w in range(h, 2 * h + 1) if GRIDS * h * w <= room - MIN_TEXT]
    h, w = max(sides, key=math.prod)
    noise = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2 * GRIDS, 3, SIDE * h, SIDE * w), generator=noise, dtype=torch.uint8)
    text = "When does the person open the door? " * 10  # a byte is a token
    return frames, text[:room - GRIDS * h * w]


def make_prompt(model, processor, frames, text):
    """What data.build_prompt does, but with words of any length -> Prompt, on the model's device."""
    pixels = processor.pixels
    patches, grid = patchify(frames.to(model.device), pixels["image_mean"], pixels["image_std"])
    ids = encode_prompt(processor.tokenizer, text, len(patches) // MERGE**2)
    positions = position_ids(ids, grid[0].tolist(), FPS, model.config.video_token_id,
                             model.config.vision_config.tokens_per_second)
    return Prompt(torch.tensor(ids, device=model.device), positions.to(model.device), patches, grid)


def model_config(name):
    """3b, 7b, a hub id of theirs, a size of SIZES or a folder -> the model's config."""
    size = name.lower().removeprefix("qwen/qwen2.5-vl-").removesuffix("-instruct")
    if size not in SIZES:
        try:
            return AutoConfig.from_pretrained(newest_checkpoint(name) or name)
        except (OSError, ValueError) as error:
            raise UserError(f"--model {name}: no config was found there; give 3b, 7b or a checkpoint folder."
                            ) from error
    text, half, vision = SIZES[size]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections(half)}
    vision = dict(window_size=112, tokens_per_second=2, fullatt_block_indexes=[7, 15, 23, 31],
                  out_hidden_size=text["hidden_size"]) | vision
    return Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision,
                            tie_word_embeddings=size == "3b")


def meta_model(config, dtype):
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    install_attention(model)
    return model


def quieten():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # TRL sets options that transformers renames
