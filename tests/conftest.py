"""What the tests share: a tiny random Qwen2.5-VL with a byte tokenizer, small videos, and the programs themselves.

The tests reach the training loop and the evaluation only through the functions under "the programs": they start a run,
read what it wrote, put scripted texts in the sampler's place and listen to what reaches the loss.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact comparisons: float32 on the CPU, wherever the tests run
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is so small that threads only wait for each other
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import av  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import grpo  # noqa: E402
import invert4tvg  # noqa: E402
import runtime  # noqa: E402

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


# ------------------------------------------------------------------------------------------------ the programs

QUERIES = ("person opens the door", "a person is sitting down", "a red lamp", "the man runs and laughs")


def make_config(folder, model):
    """Four rows on two mp4 files, one without a verb; GRPO with two prompts an iteration, groups of three."""
    (folder / "videos").mkdir()
    for name in ("AAA", "BBB"):
        write_video(folder / "videos" / f"{name}.mp4", [i / 5 for i in range(25)], size=(28, 56))
    rows = [f"{'AB'[i % 2] * 3} {i / 2} {i / 2 + 2}##{query}.\n" for i, query in enumerate(QUERIES)]
    (folder / "train.txt").write_text("".join(rows))
    return invert4tvg.Config(
        model=str(model), annotations=str(folder / "train.txt"), videos=str(folder / "videos"),
        output=str(folder / "run"), workers=0, max_new_tokens=6, group_size=3, micro_batch=1, accumulation=2,
        iterations=4, lr=1e-3, p=0.5)


def write_lines(path, rows):
    """A jsonl file of `rows` -> its path, a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(config, **changes):
    """Run Algorithm 1 -> the output folder."""
    config = dataclasses.replace(config, **changes)
    runtime.run(invert4tvg.train, config)
    return config.output


def measure(settings, **changes):
    """Run evaluate.py -> its metrics."""
    settings = dataclasses.replace(settings, **changes)
    runtime.run(evaluate.main, settings)
    return json.loads((Path(settings.output) / "metrics.json").read_text())


def demonstrated(config):
    """What the supervised stage of `config` learns from -> a list of (query, completion, task)."""
    found = []
    runtime.run(lambda config, device: found.extend(zip(*invert4tvg.load_data(config))), config)
    return [(sample.query, completion, task) for sample, completion, task in found]


def parse(cls, *argv):
    """Settings from a command line."""
    return runtime.parse_settings(cls, "", [str(word) for word in argv])


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line]


def log_of(output):
    """One dictionary an iteration."""
    return lines_of(Path(output) / "metrics.jsonl")


def rollouts_of(output, rank=0):
    """One dictionary a completion, in the order of sampling."""
    return lines_of(Path(output) / f"rollouts.{rank}.jsonl")


def weights_of(output):
    return load_file(runtime.newest_checkpoint(output) / "model.safetensors")


class Call(NamedTuple):
    """What the sampler was asked for."""

    prompts: list
    group_size: int
    max_new_tokens: int
    temperature: float

    def questions(self):
        """The prompts as text, without the pads of the video."""
        tokenizer = byte_tokenizer()
        return [tokenizer.decode(prompt.ids).replace("<|video_pad|>", "") for prompt in self.prompts]


@contextlib.contextmanager
def scripted(*texts):
    """Put `texts` in the place of the sampler's -> the list of its calls.

    Completion n of a call, counted over all ranks, is text n; after the last text the first comes again. A text that is
    longer than the limit is cut off, as a sampled one is.
    """
    calls, tokenizer = [], byte_tokenizer()

    def write(model, prompts, G, max_new_tokens, eos, banned, temperature=1.0, generator=None, features=None):
        calls.append(Call(prompts, G, max_new_tokens, temperature))
        first = dist.get_rank() * len(prompts) * G
        written = [texts[(first + n) % len(texts)] for n in range(len(prompts) * G)]
        rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in written]
        ended = torch.tensor([len(row) <= max_new_tokens for row in rows])
        rows = [torch.tensor(row[:max_new_tokens]) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
        with torch.no_grad():
            logps, _ = grpo.group_logps(model, prompts, ids, mask, banned, temperature or 1.0)
        return grpo.Rollout(ids, logps, mask, ended)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "sample_group", write)
        yield calls


@contextlib.contextmanager
def losses(change=lambda loss: loss):
    """Listen to the loss -> a list that gets the arguments of each call by name; `change` alters what it returns."""
    calls, plain = [], grpo.grpo_loss

    def listening(*args, **kwargs):
        bound = inspect.signature(plain).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(bound.arguments)
        loss, metrics = plain(*args, **kwargs)
        return change(loss), metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "grpo_loss", listening)
        yield calls


def reply(answer):
    """A well-formed completion."""
    return f"<think>a</think><answer>{answer}</answer>"


@pytest.fixture()
def config(tmp_path, checkpoint):
    return make_config(tmp_path, checkpoint)


@pytest.fixture(scope="session")
def babbler(tmp_path_factory, checkpoint):
    """The tiny model after a short supervised stage: its answers are sometimes well-formed, so that rewards differ."""
    folder = tmp_path_factory.mktemp("babbler")
    config = make_config(folder, checkpoint)
    line = {"video": "AAA", "query": "person runs", "start": 0, "end": 2, "completion": reply("1 to 2")}
    demonstrations = write_lines(folder / "demos.jsonl", [line | {"task": task} for task in data.PROMPTS])
    train(config, demonstrations=demonstrations, micro_batch=4, accumulation=1, iterations=60, lr=1e-2)
    return runtime.newest_checkpoint(config.output)


@pytest.fixture()
def lively(config, babbler):
    """A run whose policy moves."""
    return dataclasses.replace(config, model=str(babbler), max_new_tokens=40)
