"""A toy Charades-STA and a tiny Qwen2.5-VL, in the same file formats as the real ones.

    python -m demo.make_demo FOLDER [--seed 0] [--videos TRAIN VAL TEST]

writes videos/*.mp4 (one coloured shape performs three actions, with pauses), train.txt, val.txt and test.txt
(Charades-STA's "VID start end##sentence"), transfer.json (ActivityNet's format; other videos, of two actions),
demonstrations, and model/ (a random Hugging Face checkpoint of half a million parameters with tokenizer and chat
template). The demonstrations: warmup-1.jsonl and warmup-2.jsonl, for a warm start that is short on purpose and in which
four of the ten verbs are rare; lists.jsonl, in TVG-R1's field names and answer format, and cold-start.jsonl, half of it
with longer reasoning; anchors.jsonl, of which a fifth guesses before it answers, as a base for TAR-TVG.
"""

import argparse
import json
import math
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SIDE, FPS = 56, 4
COLOURS = {"red": (230, 60, 60), "green": (60, 200, 80), "blue": (70, 110, 250), "yellow": (240, 220, 60),
           "white": (240, 240, 240)}
SHAPES = ("box", "triangle", "arrow")
VERBS = ("jumping", "shaking", "blinking", "spinning", "rising", "falling", "sliding", "growing", "shrinking", "fading")
RARE_VERBS = ("sliding", "falling", "shrinking", "spinning")
RARE_SHARE = 0.05  # of their samples that the warm start shows
ANCHOR_SHARE = 0.2  # of anchors.jsonl: completions with anchors, which are guesses
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>")
CHAT_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

# ------------------------------------------------------------------------------------------------ videos


def script(rng, actions):
    """-> (colour, shape, [(start, end, verb)] * actions, seconds): different actions on a half-second grid."""
    halves = rng.integers(3, 8, size=actions)  # half seconds: 1.5 to 3.5 seconds each
    total = max(int(rng.integers(16, 25)), int(halves.sum()) + 2)  # 8 to 12 seconds
    gaps = rng.multinomial(total - halves.sum(), [1 / (actions + 1)] * (actions + 1))
    verbs = rng.choice(VERBS, size=actions, replace=False)
    events = []
    at = 0
    for gap, length, verb in zip(gaps, halves, verbs):
        events.append(((at + gap) / 2, (at + gap + length) / 2, str(verb)))
        at += gap + length
    return str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), events, total / 2


def pose(verb, done, half):
    """How an action moves its object -> (dx, dy, size, angle, opacity).

    `done` runs from 0 to 1 over the action, `half` counts half seconds since its start.
    """
    dx = dy = angle = 0.0
    size = opacity = 1.0
    beat = math.sin(math.pi * (half + 0.5) / 1.0)  # +1, -1, +1, ... on the half-second grid
    if verb == "jumping":
        dy = -7 * (1 + beat)
    elif verb == "shaking":
        dx = 8 * beat
    elif verb == "blinking":
        opacity = 0.0 if beat > 0 else 1.0
    elif verb == "spinning":
        angle = math.pi / 4 * (half + 1)
    elif verb == "rising":
        dy = 12 - 30 * done
    elif verb == "falling":
        dy = -12 + 30 * done
    elif verb == "sliding":
        dx = -16 + 32 * done
    elif verb == "growing":
        size = 0.7 + 1.3 * done
    elif verb == "shrinking":
        size = 1.4 - 1.1 * done
    elif verb == "fading":
        opacity = 0.8 - 0.7 * done
    return dx, dy, size, angle, opacity


def draw(colour, shape, dx, dy, size, angle, opacity):
    """-> (SIDE, SIDE, 3) uint8: the shape on a dark ground, its edge smoothed over a pixel."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + 0.5
    x, y = x - dx, y - dy
    c, s = math.cos(angle), math.sin(angle)
    x, y = (c * x + s * y) / size, (-s * x + c * y) / size
    if shape == "box":
        inside = np.minimum(11 - abs(x), 6 - abs(y))
    elif shape == "triangle":
        inside = np.minimum(8 - y, y / 2 + 6 - abs(x))
    else:  # arrow
        inside = np.maximum(np.minimum(9 - x, x + 0.5 - abs(y)), np.minimum(np.minimum(x + 11, 1 - x), 3 - abs(y)))
    cover = np.clip(inside * size + 0.5, 0, 1)[..., None] * opacity
    return (30 * (1 - cover) + np.array(COLOURS[colour]) * cover).astype(np.uint8)


def write_video(folder, seed, actions, name):
    """Render and encode one video -> its annotation rows [(name, start, end, sentence, seconds)]."""
    rng = np.random.default_rng([seed, *name.encode()])
    colour, shape, events, seconds = script(rng, actions)
    with av.open(str(folder / f"{name}.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "18", "g": "8"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for i in range(round(seconds * FPS)):
            t = i / FPS
            moves = [pose(verb, (t - start) / (end - start), (t - start) * 2)
                     for start, end, verb in events if start <= t < end]
            image = draw(colour, shape, *(moves[0] if moves else (0, 0, 1, 0, 1)))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return [(name, start, end, f"the {colour} {shape} is {verb}.", seconds) for start, end, verb in events]


def write_demonstrations(path, rows, tvg_copies, inversions, rng):
    """Demonstrations for `tvg_copies` TVG rows and `inversions` of the three inversion rows a sample."""
    lines = []
    for name, start, end, sentence, _ in rows:
        query = sentence.rstrip(".")
        verb = query.split()[-1]
        if verb in RARE_VERBS and rng.random() > RARE_SHARE:
            continue
        answers = {"tvg": f"{start} to {end}", "vc": query, "ar": verb, "vd": query}
        for task in ["tvg"] * tvg_copies + list(rng.permutation(["vc", "ar", "vd"])[:inversions]):
            completion = f"<think> {query} </think> <answer> {answers[task]} </answer>"
            lines.append({"video": name, "query": sentence, "start": start, "end": end, "task": str(task),
                          "completion": completion})
    write_lines(path, lines)


def write_cold_start(path, rows, long_share, rng):
    """TVG-R1's cold start: completions that think the query; a share of them goes on with the action and its times."""
    lines = []
    for name, start, end, sentence, seconds in rows:
        query = sentence.rstrip(".")
        thought = query + (f" {query.split()[-1]} {start} to {end}" if rng.random() < long_share else "")
        lines.append({"dataset": "demo", "problem": sentence, "choices": "", "video": f"{name}.mp4",
                      "video_length": seconds, "gt_frame": [start, end], "ground_truth": "",
                      "completion": f"<think> {thought} </think> <time> [ {start} , {end} ] </time>"})
    write_lines(path, lines)


def write_anchors(path, rows, rng):
    """Answers to the prompt that asks for anchors; ANCHOR_SHARE of them hold two or three, up to half a second off."""
    lines = []
    for name, start, end, sentence, seconds in rows:
        anchors = ""
        for _ in range(rng.integers(2, 4) if rng.random() < ANCHOR_SHARE else 0):
            a, b = (float(np.clip(t + rng.integers(-1, 2) / 2, 0, seconds)) for t in (start, end))
            anchors += f"<timestamp> {min(a, b)} to {max(a, b)} </timestamp> "
        completion = f"<think> {sentence.rstrip('.')} {anchors}</think> <answer> {start} to {end} </answer>"
        lines.append({"video": name, "query": sentence, "start": start, "end": end, "task": "tvg",
                      "completion": completion})
    write_lines(path, lines)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ------------------------------------------------------------------------------------------------ model


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


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m demo.make_demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--videos", type=int, nargs=3, default=(1200, 150, 150), metavar=("TRAIN", "VAL", "TEST"))
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32 or min(args.videos) < 1:
        parser.error("--seed lies between 0 and 4294967295, and there is at least one video of each kind.")
    made_with = {"seed": args.seed, "videos": list(args.videos)}
    record = args.folder / "demo.json"  # written last: the folder is complete
    if record.exists():
        before = json.loads(record.read_text())
        if before != made_with:
            sys.exit(f"{args.folder} was made with {before}, not with {made_with}; name another folder.")
        print(f"{args.folder} is there already")
        return
    splits = dict(zip(("train", "val", "test", "transfer"), (*args.videos, args.videos[2])))
    videos = args.folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    rows = {}
    with ProcessPoolExecutor() as pool:
        for split, count in splits.items():
            names = [f"{split.upper()}{i:04d}" for i in range(count)]
            actions = 2 if split == "transfer" else 3
            made = list(pool.map(partial(write_video, videos, args.seed, actions), names, chunksize=50))
            rows[split] = [row for group in made for row in group]
            if split == "transfer":
                (args.folder / "transfer.json").write_text(json.dumps({
                    group[0][0]: {"duration": group[0][4], "timestamps": [row[1:3] for row in group],
                                  "sentences": [row[3] for row in group]} for group in made}))
            else:
                (args.folder / f"{split}.txt").write_text("".join(
                    f"{name} {start} {end}##{sentence}\n" for name, start, end, sentence, _ in rows[split]))
    rng = np.random.default_rng(args.seed)
    write_demonstrations(args.folder / "warmup-1.jsonl", rows["train"], tvg_copies=1, inversions=3, rng=rng)
    write_demonstrations(args.folder / "warmup-2.jsonl", rows["train"], tvg_copies=4, inversions=1, rng=rng)
    write_cold_start(args.folder / "lists.jsonl", rows["train"], 0.0, rng)
    write_cold_start(args.folder / "cold-start.jsonl", rows["train"], 0.5, rng)
    write_anchors(args.folder / "anchors.jsonl", rows["train"], rng)
    parameters = make_model(args.folder / "model", args.seed)
    record.write_text(json.dumps(made_with) + "\n")
    counts = ", ".join(f"{len(rows[split])} {split} rows" for split in splits)
    print(f"{args.folder}: {sum(splits.values())} videos, {counts}, a model of {parameters:,} parameters")


if __name__ == "__main__":
    main()
