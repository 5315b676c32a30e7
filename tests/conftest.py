"""What the tests share: the repository on the path, a tiny random Qwen2.5-VL with a byte tokenizer, small videos."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact comparisons: float32 on the CPU, wherever the tests run
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import av  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402

import grpo  # noqa: E402

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
            "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def byte_tokenizer():
    """A tokenizer of 256 bytes and Qwen's special tokens, with Qwen's chat layout."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        additional_special_tokens=SPECIALS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(tokenizer, vocab_size=None, seed=0, **text):
    """A random float32 Qwen2.5-VL of two layers whose initial range makes its outputs differ clearly."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("im_end", "vision_start", "vision_end", "image_pad", "video_pad")}
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=vocab_size or len(tokenizer), initializer_range=0.1,
                bos_token_id=None, eos_token_id=ids["im_end"], pad_token_id=None,
                rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]}) | text
    config = Qwen2_5_VLConfig(
        text_config=text, tie_word_embeddings=False, video_token_id=ids["video_pad"],
        image_token_id=ids["image_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        vision_config=dict(depth=2, hidden_size=16, num_heads=2, intermediate_size=32, out_hidden_size=text["hidden_size"],
                           fullatt_block_indexes=[1], tokens_per_second=2, initializer_range=0.1))
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config)
    grpo.speed_up(model)
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture()
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """The tiny model as a Hugging Face folder, as the hub would deliver it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}')
    return folder


def write_video(path, times, size=(56, 56), time_base=1000, gop=12):
    """An H.264 file whose frame at time t (seconds) is grey level 20 * i for the i-th frame; times may be irregular."""
    from fractions import Fraction
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"g": str(gop), "crf": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, time_base)
        for i, t in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 20 * i % 240, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(t * time_base), Fraction(1, time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
