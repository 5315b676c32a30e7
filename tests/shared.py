"""What the tests share: a tiny random Qwen2.5-VL with a byte tokenizer, prompts, small videos, whole small runs."""

import contextlib
import dataclasses
import fcntl
import functools
import inspect
import json
import os
import shutil
import signal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from engine.program.settings import parse_settings  # before transformers: engine says which versions work

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact comparisons: float32 on the CPU, wherever the tests run
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start, too: waiting threads make a busy machine crawl
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import av
import hypothesis
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import engine.words.verbs
import evaluate
import grpo
import invert4tvg
import rewards
from engine.model.attention import install_attention
from engine.model.loading import load_model, newest_checkpoint
from engine.model.prompts import Prompt, encode_prompt, patchify, position_ids
from engine.program.launch import StopSignal, launch, setup_distributed
from engine.run.manifest import seal

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def reset_signals():
    """Each test begins as a program does: background jobs have signals ignored, and runs leave handlers behind."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# ---- A model and its tokenizer

hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is no defect
hypothesis.settings.load_profile("no deadline")

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


def token_ids(tokenizer, *names):
    return torch.tensor([tokenizer.convert_tokens_to_ids(name) for name in names])


def tiny_model(tokenizer, vocab_size=None, seed=0, **text):
    """A random float32 Qwen2.5-VL of two layers whose initial range makes its outputs differ clearly."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("im_end", "vision_start", "vision_end", "image_pad", "video_pad")}
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=vocab_size or len(tokenizer), initializer_range=0.1,
                bos_token_id=None, eos_token_id=ids["im_end"], pad_token_id=None,
                rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]}) | text
    vision = dict(depth=2, hidden_size=16, num_heads=2, intermediate_size=32, out_hidden_size=text["hidden_size"],
                  fullatt_block_indexes=[1], tokens_per_second=2, initializer_range=0.1)
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, video_token_id=ids["video_pad"],
        image_token_id=ids["image_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"])
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config)
    install_attention(model)
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


# ---- Prompts


def make_prompt(tokenizer, model, height, width, frames, text, fps=0.4, seed=0):
    """A prompt over random frames; fps 0.4 makes the video's time positions run past the prompt's length."""
    noise = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 255, (frames, 3, height, width), dtype=torch.uint8, generator=noise)
    patches, grid = patchify(images, [0.5] * 3, [0.3] * 3)
    ids = encode_prompt(tokenizer, text, len(patches) // 4)
    positions = position_ids(ids, grid[0].tolist(), fps, model.config.video_token_id, 2)
    return Prompt(torch.tensor(ids), positions, patches, grid)


@pytest.fixture()
def prompts(tokenizer, model):
    """Two prompts of different length and frame size."""
    return [make_prompt(tokenizer, model, 56, 84, 24, "when is the door opened"),
            make_prompt(tokenizer, model, 28, 56, 12, "add a verb", seed=1)]


@pytest.fixture()
def banned(tokenizer):
    return token_ids(tokenizer, "<|video_pad|>", "<|image_pad|>")


# ---- Texts


@pytest.fixture
def tagged(monkeypatch):
    """The texts that reach spaCy's pipeline during a test."""
    seen = []
    tag_words = engine.words.verbs.tag_words

    def spy(texts):
        seen.extend(texts)
        return tag_words(texts)

    monkeypatch.setattr(engine.words.verbs, "tag_words", spy)
    rewards.described_verbs.cache_clear()
    return seen


# ---- Videos. Frame i is a grey of level 8 + 6 i, so a clip tells which frames it holds.

TEN_HZ = [k / 10 for k in range(40)]  # 4 seconds


def write_video(path, times=TEN_HZ, size=(56, 56), codec="libx264", pixels="yuv420p", unit=1000, picture=None,
                audio_from=None, container=None, container_options=None, **options):
    """A video with frames at `times` in seconds, counted in 1 / `unit` s; `audio_from` adds four seconds of silence.

    `picture` (H, W, 3) is all its frames, or (N, H, W, 3) each of them.
    """
    options = {"g": "12", "bf": "0"} | ({"crf": "4", "preset": "ultrafast"} if codec == "libx264" else {}) | options
    with av.open(str(path), "w", format=container, options=container_options or {}) as file:
        stream = file.add_stream(codec, rate=unit if unit < 100 else 30, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *size, pixels, 4_000_000
        stream.codec_context.time_base = stream.time_base = Fraction(1, unit)
        if audio_from is not None:
            audio = file.add_stream("aac", rate=16000, layout="mono")
            for k in range(4 * 16000 // 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 16000, int(audio_from * 16000) + 1024 * k
                file.mux(audio.encode(silence))
            file.mux(audio.encode())
        for i, t in enumerate(times):
            if picture is None:
                image = np.full((*size, 3), 8 + 6 * i % 246, np.uint8)
            else:
                image = picture if picture.ndim == 3 else picture[i]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(t * unit), Fraction(1, unit)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def shown(clip):
    """Which frame each picture of a clip is, read from its grey level."""
    return ((clip.frames.float().mean((1, 2, 3)) - 8) / 6).round().int().tolist()


# ---- Whole runs


@pytest.fixture()
def alone():
    """A process group of one -> its device."""
    yield setup_distributed()
    dist.destroy_process_group()


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


@pytest.fixture()
def config(tmp_path, checkpoint):
    return make_config(tmp_path, checkpoint)


def made_once(tmp_path_factory, name, make):
    """A folder that `make(folder)` has filled, once for all processes of a test run."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with open(root / f"{name}.lock", "w", encoding="utf-8") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if not (root / f"{name}.made").exists():
            shutil.rmtree(root / name, ignore_errors=True)  # another process failed at it
            (root / name).mkdir()
            make(root / name)
            (root / f"{name}.made").touch()
    return root / name


@pytest.fixture(scope="session")
def babbler(tmp_path_factory, checkpoint):
    """The tiny model after a short supervised stage: its answers are sometimes well-formed, so that rewards differ."""
    folder = made_once(tmp_path_factory, "babbler", lambda folder: imitate(make_config(folder, checkpoint), folder))
    return newest_checkpoint(folder / "run")


def imitate(config, folder):
    """The babbler's supervised stage."""
    completion = "<think>a</think><answer>1 to 2</answer>"
    line = {"video": "AAA", "query": "person runs", "start": 0, "end": 2, "completion": completion}
    demonstrations = "".join(json.dumps(line | {"task": task}) + "\n" for task in rewards.TASKS)
    (folder / "demos.jsonl").write_text(demonstrations)
    train(config, demonstrations=str(folder / "demos.jsonl"), micro_batch=4, accumulation=1, iterations=40, lr=1.5e-2,
          gradient_checkpointing=False)


@pytest.fixture()
def lively(config, babbler):
    """A run whose policy moves."""
    return dataclasses.replace(config, model=str(babbler), max_new_tokens=40)


def train(config, **changes):
    """Run invert4tvg.py, but for the handlers of signals that it leaves behind -> the output folder."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        config = dataclasses.replace(config, **changes)
        launch(invert4tvg.train, config)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return config.output


def train_once(config, **changes):
    """Train one iteration and be stopped, as by Ctrl-C -> the output folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignal, "on_any_rank", lambda self, device: True)
        with pytest.raises(SystemExit) as stop:
            train(config, **changes)
    assert stop.value.code == 130
    return Path(config.output)


def refusal(capsys, config, **changes):
    """The one sentence with which a run ends, status 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(config, **changes)
    assert stop.value.code == 1
    lines = capsys.readouterr().err.strip().split("\n")  # below what loading a model prints
    message = [line for line in lines if not line.startswith("training: ")][-1]
    assert message.endswith(".")
    return message


def measure(settings, **changes):
    """Run evaluate.py -> its metrics."""
    settings = dataclasses.replace(settings, **changes)
    launch(evaluate.main, settings)
    return json.loads((Path(settings.output) / "metrics.json").read_text())


def parse(cls, *argv):
    """Settings from a command line."""
    return parse_settings(cls, "", [str(word) for word in argv])


def write_lines(path, rows):
    """A jsonl file of `rows` -> its path, a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def walk(draw):
    """A TaskSampler -> each iteration's list of (sample index, task) on its rank."""
    return [[(draw.index(k, slot), draw.task(k)) for slot in draw.slots] for k in range(draw.iterations)]


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]


def log_of(output):
    """One dictionary an iteration."""
    return lines_of(Path(output) / "metrics.jsonl")


def timeless_log_of(output):
    """The same, without what was measured by a clock."""
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in log_of(output)]


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def change_sealed(path, **changes):
    """The same in a checkpoint, with its entry of the manifest."""
    change_json(path, **changes)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"] |= seal([path])
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def rollouts_of(output, rank=0):
    """One dictionary a completion, in the order of sampling."""
    return lines_of(Path(output) / f"rollouts.{rank}.jsonl")


def write_share(folder, rank, states):
    """One rank's share of an optimiser's state, {weight: {kind: value}}, as a checkpoint holds it."""
    share = {f"{name}.{kind}": torch.as_tensor(value) for name, state in states.items()
             for kind, value in state.items()}
    save_file(share, folder / f"optimizer.{rank}.safetensors")


def states_of(checkpoint, rank=0):
    """The same, read: {weight: {kind: value}}."""
    states = {}
    for key, value in load_file(Path(checkpoint) / f"optimizer.{rank}.safetensors").items():
        name, _, kind = key.rpartition(".")
        states.setdefault(name, {})[kind] = value
    return states


def weights_of(output):
    return load_file(newest_checkpoint(output) / "model.safetensors")


# ---- Scripted answers


@functools.cache
def banned_by(folder):
    """The ids that are never sampled from a model."""
    return load_model(folder, torch.device("cpu"))[1].banned


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
    calls = []
    tokenizer = byte_tokenizer()

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
    calls = []
    plain = grpo.grpo_loss

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
