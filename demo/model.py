"""The toy's model: a random Qwen2.5-VL of half a million parameters, with a word-level tokenizer."""

import json
import re

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from demo.videos import COLOURS, SHAPES, VERBS

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>")
CHAT_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_tokenizer():
    """A word-level tokenizer that drops every word it does not know, so the paper's prompts come out short."""
    tags = ["<think>", "</think>", "<answer>", "</answer>", "<timestamp>", "</timestamp>", "<time>", "</time>"]
    words = ["[]", "[", ",", "]", "to", "the", "is", "pinpoint", "Add", "Use", "Describe", *COLOURS, *SHAPES, *VERBS,
             *(f"{i / 2}" for i in range(25))]
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *tags, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    known = rf"{'|'.join(tags)}|(?<![\w.])(?:{'|'.join(map(re.escape, words))})(?![\w])(?!\.\d)"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(known), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        additional_special_tokens=list(SPECIALS))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(folder, seed):
    """Write a random Qwen2.5-VL of about half a million parameters in the Hugging Face layout."""
    tokenizer = make_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("im_end", "vision_start", "vision_end", "image_pad", "video_pad")}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, intermediate_size=288,
            vocab_size=len(tokenizer), initializer_range=0.06, bos_token_id=None, eos_token_id=ids["im_end"],
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 3, 3]}),
        vision_config=dict(
            depth=1, hidden_size=64, num_heads=2, intermediate_size=128, out_hidden_size=96,
            fullatt_block_indexes=[0], tokens_per_second=2, initializer_range=0.06),
        video_token_id=ids["video_pad"], image_token_id=ids["image_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], tie_word_embeddings=False)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return sum(p.numel() for p in model.parameters())
