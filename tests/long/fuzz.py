"""Mutated files and command lines: each must be read rightly, or refused in one sentence.

    python tests/long/fuzz.py --annotations 10000 --videos 1000 --completions 100000 --checkpoints 200 --commands 200

Each try counts as fine, refused in one sentence, crash (another error, or a dead process), hang, or wrong result. The
last three are mishandled: they are listed, and make the status 1. --seed draws other mutations.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import tiny
import torch
from shared import ROOT, TEN_HZ, byte_tokenizer, reply, write_video

import evaluate
import invert4tvg
import rewards
from engine.model.prompts import encode_prompt
from engine.program.files import strict_json
from engine.program.settings import option, parse_settings
from engine.run import manifest
from engine.run.start import from_run, from_start
from engine.video.frames import VideoError, read_video
from engine.words.annotations import MAX_QUERY, load_annotations

PATIENCE = {"videos": 60, "annotations": 20, "completions": 20, "checkpoints": 120, "commands": 120}  # seconds a try


class WrongResult(Exception):
    pass


def expect(condition, what):
    if not condition:
        raise WrongResult(what)


# ------------------------------------------------------------------------------------------------ judging


def judge(name, function, items):
    """Call function(item) for each, in a process that may die -> {verdict: number}, and [(verdict, item, why)]."""
    verdicts = collections.Counter()
    mishandled = []
    next_item = 0
    while next_item < len(items):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            for item in items[next_item:]:
                os.write(writer, (json.dumps(_try(function, item)) + "\n").encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as results:
            while next_item < len(items):
                previous = signal.signal(signal.SIGALRM, _too_long)
                signal.alarm(PATIENCE[name])
                try:
                    line = results.readline()
                    verdict, why = json.loads(line) if line else ("crash", "the process died")
                except TimeoutError:
                    verdict, why = "hang", f"after {PATIENCE[name]} s"
                finally:
                    signal.alarm(0)
                    signal.signal(signal.SIGALRM, previous)
                verdicts[verdict] += 1
                if verdict not in ("fine", "refused"):
                    mishandled.append((verdict, items[next_item], why))
                next_item += 1
                if next_item % max(1, len(items) // 10) == 0:
                    print(f"    {name}: {next_item} tried, {len(mishandled)} mishandled", flush=True)
                if why == "the process died" or verdict == "hang":
                    break
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(child, 0)
    print(f"{name}: {len(items)} tried, " + ", ".join(f"{n} {v}" for v, n in sorted(verdicts.items()))
          + f"; mishandled {len(mishandled)}", flush=True)
    for verdict, item, why in mishandled[:10]:
        print(f"    {verdict}: {str(item)[:300]}: {why}", flush=True)
    return mishandled


def _too_long(number, frame):
    raise TimeoutError


def _try(function, item):
    try:
        return function(item), ""
    except WrongResult as error:
        return "wrong result", str(error)[:500]
    except BaseException as error:
        return "crash", f"{error!r}"[:500]


def sentence(text, *names):
    """A refusal must be one line that ends with a full stop, and name what it is about."""
    expect("\n" not in text.strip() and text.strip().endswith("."), f"no sentence: {text[:200]!r}")
    expect(not names or any(name in text for name in names), f"names nothing: {text[:200]!r}")
    return "refused"


def last_line(text):
    """Of what a program printed, progress aside."""
    return [line for line in text.strip().split("\n") if not re.match(r"(\x1b\[A)*(training|evaluating): ", line)][-1]


# ------------------------------------------------------------------------------------------------ mutations

ODD_TEXTS = ["", " ", "\0", "\n", "\x1b[2J", "\u2028", "\ud800", "\ufeff", "é" * 9, "🙂", "%s", "{}", "[]",
             "<|im_end|>", "<think>", "</answer>", "../../etc/passwd", "/etc/passwd", "C:\\x.mp4", "##", "a" * 5000,
             "1e999", "NaN", "-1", "9" * 400, "0x10", "١٢", "1_000", "1,5", "null", "{", "\\", "\"", "'", "to",
             "[1, 2]", "1 to 2"]
ODD_VALUES = [None, True, -1, 0, 1e308, math.nan, math.inf, 10**400, [], {}, [[]], [1], [1, 2, 3], *ODD_TEXTS]


def mutate_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not data:
            break
        # The boxes of an mp4 and the heads of other files lie at the beginning and the end.
        near = rng.choice((64, 2048, len(data)))
        at = rng.randrange(min(near, len(data)))
        if rng.random() < 0.5:
            at = len(data) - 1 - at
        length = rng.choice((1, 4, 16, 256))
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at + length] = rng.randbytes(min(length, len(data) - at))
        elif kind == 2:
            data[at:at + length] = bytes(min(length, len(data) - at))
        elif kind == 3:
            del data[at:at + length]
        elif kind == 4:
            data[at:at] = rng.randbytes(length)
        elif kind == 5:
            data[at:at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\1"))
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def mutate_text(text, rng):
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(text) + 1)
        until = min(len(text), at + rng.choice((0, 1, 3, 10)))
        piece = rng.choice((rng.choice(ODD_TEXTS), chr(rng.choice((rng.randrange(128), rng.randrange(0xD800)))),
                            text[rng.randrange(len(text) + 1):][:rng.randrange(20)]))
        text = text[:at] + piece + text[until:]
    return text


def mutate_json(value, rng):
    """Another value somewhere in it, or a part left out."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {k: mutate_json(v, rng) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [mutate_json(v, rng) if i == at else v for i, v in enumerate(value)]
    return rng.choice(ODD_VALUES)


# ------------------------------------------------------------------------------------------------ videos


def make_videos(folder):
    noise = torch.randint(0, 255, (40, 56, 84, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    made = {"plain.mp4": {}, "b.mp4": {"bf": "2", "picture": noise, "size": (56, 84)},
            "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
            "mpeg4.mp4": {"codec": "mpeg4"}, "sound.mp4": {"audio_from": 0.0}, "x.mkv": {}, "y.webm": {"codec": "vp9"}}
    seeds = []
    for name, options in made.items():
        write_video(folder / name, TEN_HZ, **options)
        seeds.append((name, (folder / name).read_bytes()))
    return seeds


def try_video(folder, seeds, number):
    rng = random.Random(number)
    name, content = rng.choice(seeds)
    path = folder / f"{number}-{name}"
    path.write_bytes(mutate_bytes(content, rng))
    segment = rng.choice(({}, {"start": 1.0, "end": 2.5}))
    try:
        clip = read_video(str(path), **segment)
    except VideoError as error:
        return sentence(str(error), str(path))
    finally:
        path.unlink()
    T, channels, height, width = clip.frames.shape
    expect(channels == 3 and T % 2 == 0 and 2 <= T <= 768, f"{clip.frames.shape}")
    expect(height % 28 == 0 and width % 28 == 0, f"{height} x {width}")
    expect(len(clip.times) == T and 0 < clip.fps <= 2, f"{len(clip.times)} times of {T} frames at {clip.fps} Hz")
    times = clip.times.tolist()
    expect(all(map(math.isfinite, times)) and times == sorted(times), f"times {times[:20]}")
    return "fine"


# ------------------------------------------------------------------------------------------------ annotations

ROWS = ["AAA 0.0 12.5##person opens the door.",
        "BBB 1.5 3.0##2.2##a person is sitting down on the sofa.",
        {"v_x": {"duration": 82.73, "timestamps": [[0.83, 19.86], [17.37, 60.81]], "sentences": ["A man", "He sits."]}},
        {"s1": {"fps": 29.4, "num_frames": 9000, "timestamps": [[12, 300]], "sentences": ["The person cuts."]}},
        {"k": {"duration": 30, "spans": [[1, 4]], "queries": ["who sings?"]}},
        {"qid": 9, "query": "A dog runs", "duration": 150, "vid": "z_60.0_210.0",
         "relevant_windows": [[2, 14], [20, 30]]},
        [{"video": "a/b.mp4", "duration": 20.5, "timestamp": [1, 5.5], "sentence": "he eats", "qid": "q1"}],
        [{"path": "d/e.mp4", "question": "a person walks", "answer": "1.0-4.0", "duration": 9}],
        [["AAA", 31.2, [0.5, 6.0], "he laughs and leaves"]]]


def try_annotation(folder, number):
    rng = random.Random(number)
    row = rng.choice(ROWS)
    if isinstance(row, str) or rng.random() < 0.3:
        text = mutate_text(row if isinstance(row, str) else json.dumps(row), rng)
    else:
        text = json.dumps(mutate_json(row, rng), ensure_ascii=rng.random() < 0.5)
    path = folder / "rows"
    path.write_bytes(text.encode("utf-8", "surrogatepass" if rng.random() < 0.1 else "replace"))
    try:
        samples = load_annotations(path, folder / "videos")
    except ValueError as error:
        return sentence(str(error), str(path))
    control = set(byte_tokenizer().added_tokens_decoder)
    pads = encode_prompt(_tokenizer(), "", 2)
    for s in samples:
        expect(all(math.isfinite(x) and x >= 0 for x in (s.start, s.end, s.duration or 0)), f"{s}")
        expect(Path(os.path.abspath(s.video)).is_relative_to(folder / "videos"), f"{s.video} is outside")
        expect(s.query and len(s.query) <= MAX_QUERY, f"a query of {len(s.query)} characters")
        ids = encode_prompt(_tokenizer(), s.query, 2)
        expect(sum(i in control for i in ids) == sum(i in control for i in pads), f"control tokens from {s.query!r}")
        strict_json(dataclasses.asdict(s))
    return "fine"


@functools.cache
def _tokenizer():
    return byte_tokenizer()


# ------------------------------------------------------------------------------------------------ completions

ANSWERS = ["12.5 to 17.8", "[1, 2]", "person opens the door", "opening", "A person opens it and sits.", "1 and 2"]
REWARDS = ["iou", *(f"papers.rewards.{name}" for name in ("timestamp_iou", "anchors", "tvg_r1")
                    if (ROOT / "papers").is_dir())]
QUERIES = ["person opens the door", "the man runs and laughs", "a red lamp"]


def try_completion(number):
    rng = random.Random(number)
    text = mutate_text(reply(rng.choice(ANSWERS)), rng)
    task = "tvg" if rng.random() < 0.7 else rng.choice(list(rewards.INVERSIONS))
    name = rng.choice(REWARDS)
    sample = evaluate.data.Sample("a.mp4", rng.choice(QUERIES), 1.0, 2.0, 30.0)
    parts = rewards.score(task, text, sample, rewards.Scoring(grounding=rewards.grounding(name)))
    expect(all(math.isfinite(value) for value in parts.values()), f"{parts}")
    expect(parts["format"] in (0, 1), f"{parts}")
    if name == "iou" or task != "tvg":
        expect(0 <= parts["total"] <= 2, f"{parts}")
    span = rewards.parse_span(text)
    expect(span is None or all(map(math.isfinite, span)), f"the span {span}")
    json.dumps({"parts": parts, "span": span}, allow_nan=False)
    return "fine"


# ------------------------------------------------------------------------------------------------ checkpoints


def make_run(folder):
    """A supervised run of four iterations -> (its configuration, its result, its folder as after iteration 3)."""
    config = tiny.make(folder / "start", workers=0, iterations=4, save_every=1, keep=3, p=1.0, accumulation=1)
    stage = folder / "start" / "demos.jsonl"
    config = dataclasses.replace(config, demonstrations=str(stage), p=0.8, annotations=invert4tvg.Config.annotations,
                                 output=str(folder / "whole"))
    assert tiny.wait(tiny.start(config, folder / "whole.txt")) == [0], folder / "whole.txt"
    last = Path(config.output) / "checkpoint-000004"
    weights = (last / "model.safetensors").read_bytes(), (last / "optimizer.0.safetensors").read_bytes()
    shutil.rmtree(last)
    return config, weights


def damage(folder, rng):
    """Change something in a checkpoint's folder -> what, in words."""
    path = rng.choice(sorted(folder.iterdir()))
    if rng.random() < 0.4:
        path = folder / rng.choice(("model.safetensors", "optimizer.0.safetensors", "run.json", "manifest.json"))
    kind = rng.randrange(6)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size)])
    elif kind == 2:
        path.write_bytes(b"")
    elif kind == 3 and path.suffix == ".json":
        path.write_text(json.dumps(mutate_json(json.loads(path.read_text()), rng)))
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    return path.name


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def try_checkpoint(folder, config, weights, number):
    """A damaged checkpoint must be seen to be so; one in twenty is also given to a run that goes on."""
    rng = random.Random(number)
    output = folder / f"damaged-{number}"
    shutil.copytree(config.output, output)
    newest = output / "checkpoint-000003"
    before = contents(newest)
    names = [damage(newest, rng)]
    found = manifest.damage(newest)
    expect((found is None) == (contents(newest) == before), f"damage to {names}: {found}")
    if number % 20:
        shutil.rmtree(output)
        return "refused" if found else "fine"
    if rng.random() < 0.2:
        names.append(damage(output / "checkpoint-000002", rng))
    log = folder / f"damaged-{number}.txt"
    status = tiny.wait(tiny.start(dataclasses.replace(config, output=str(output)), log))
    said = log.read_text()
    try:
        if status == [0]:
            last = output / "checkpoint-000004"
            found = (last / "model.safetensors").read_bytes(), (last / "optimizer.0.safetensors").read_bytes()
            expect(found == weights, f"after damage to {names} the weights differ")
            return "fine"
        expect(status == [1] and "Traceback" not in said, f"after damage to {names} status {status}: {said[-300:]}")
        return sentence(last_line(said))
    finally:
        shutil.rmtree(output)
        log.unlink()


# ------------------------------------------------------------------------------------------------ command lines

COSTLY = {"workers", "group_size", "micro_batch", "accumulation", "max_new_tokens", "iterations", "epochs", "mu",
          "max_pixels", "min_frame_pixels", "max_frame_pixels", "fps", "samples"}  # large numbers are valid, and slow
ODD_WORDS = ["", "x", "nan", "inf", "-inf", "-1", "0", "1e30", "1e-30", "9" * 30, "é", "/proc/nothing", "/dev/null",
             "..", "a" * 5000, "1,5", "0x1", "None", "true"]


def make_command(config, settings, rng):
    cls = type(settings)
    given = {"model": config.model, "videos": config.videos, "annotations": config.annotations,
             "workers": 0, "max_new_tokens": 4, "output": settings.output}
    if cls is invert4tvg.Config:
        given |= {"iterations": 1, "group_size": 2}
    argv = [word for name, value in given.items() for word in (option(name), str(value))]
    fields = [f for f in dataclasses.fields(cls)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        f = rng.choice(fields)
        argv.append(option(f.name) if rng.random() < 0.95 else mutate_text(option(f.name), rng))
        if f.type is bool:
            continue
        words = ODD_WORDS if f.name not in COSTLY else [w for w in ODD_WORDS if w not in ("1e30", "9" * 30)]
        words = words + ["1", "2", "0.5"] * 3 + list(f.metadata["choices"] or ()) * 3
        argv += [rng.choice(words) for _ in range(rng.choice((0, 1, 1, 1, 1, 2)))]
    return argv


def try_command(folder, config, number):
    rng = random.Random(number)
    settings = rng.choice((config, evaluate.EvalSettings(output=config.output)))
    output = folder / f"command-{number}"
    argv = make_command(config, dataclasses.replace(settings, output=str(output)), rng)
    log = folder / f"command-{number}.txt"

    def run(settings):
        os.chdir(folder)
        if isinstance(settings, evaluate.EvalSettings):
            tiny.launch(evaluate.main, parse_settings(type(settings), "", argv, from_start))
        else:
            tiny.launch(invert4tvg.train, parse_settings(type(settings), "", argv, from_run))

    status = tiny.wait(tiny.start(settings, log, function=run), PATIENCE["commands"] - 20)
    said = log.read_text(errors="replace")
    shutil.rmtree(output, ignore_errors=True)
    log.unlink()
    if status == [None]:
        raise WrongResult(f"hang: {argv[12:]}")
    if status == [0]:
        return "fine"
    expect(status in ([1], [2]) and "Traceback" not in said, f"{argv[12:]}: status {status}: {said[-400:]}")
    return sentence(last_line(said))


# ------------------------------------------------------------------------------------------------ the campaign


def campaign(folder, annotations, videos, completions, checkpoints, commands, seed):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "videos").mkdir()
    began = time.monotonic()
    mishandled = []

    def count(name, function, tries):
        if tries:
            mishandled.extend(judge(name, function, list(range(seed * 10**7, seed * 10**7 + tries))))
            print(f"    {time.monotonic() - began:.0f} s", flush=True)

    count("annotations", functools.partial(try_annotation, folder), annotations)
    if videos:
        count("videos", functools.partial(try_video, folder, make_videos(folder)), videos)
    count("completions", try_completion, completions)
    if checkpoints:
        config, weights = make_run(folder / "run")
        count("checkpoints", functools.partial(try_checkpoint, folder, config, weights), checkpoints)
    if commands:
        config = tiny.make(folder / "commands", workers=0)
        count("commands", functools.partial(try_command, folder, config), commands)
    return mishandled


if __name__ == "__main__":
    tiny.main(__doc__, campaign, annotations=10_000, videos=1_000, completions=100_000, checkpoints=200, commands=200,
              seed=0)
