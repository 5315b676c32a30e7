"""A toy Charades-STA and a tiny Qwen2.5-VL, in the same file formats as the real ones.

    python -m demo.make_demo FOLDER [--seed 0] [--videos TRAIN VAL TEST]

writes videos/*.mp4 (one coloured shape performs three actions, with pauses), train.txt, val.txt and test.txt
(Charades-STA's "VID start end##sentence"), transfer.json (ActivityNet's format; other videos, of two actions),
demonstrations, and model/ (a random Hugging Face checkpoint of half a million parameters with tokenizer and chat
template). The demonstrations: warmup-1.jsonl and warmup-2.jsonl, for a warm start that is short on purpose and in which
four of the ten verbs are rare, and the same without thinking in grounding as answer-1.jsonl and answer-2.jsonl (for
--tvg-format answer); lists.jsonl, in TVG-R1's field names and answer format, and cold-start.jsonl, half of it
with longer reasoning; anchors.jsonl, of which a fifth guesses before it answers, as a base for TAR-TVG.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from demo.videos import write_video
from engine.program.progress import progress
from engine.program.settings import command_line, print_any_name
from engine.video.workers import begin_worker

RARE_VERBS = ("sliding", "falling", "shrinking", "spinning")
RARE_SHARE = 0.05  # of their samples that the warm start shows
ANCHOR_SHARE = 0.2  # of anchors.jsonl: completions with anchors, which are guesses


def write_demonstrations(folder, number, rows, tvg_copies, inversions, rng):
    """Demonstrations for `tvg_copies` TVG rows and `inversions` of the three inversion rows a sample.

    warmup-<number>.jsonl thinks in all tasks, answer-<number>.jsonl only in inversions.
    """
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
    write_lines(folder / f"warmup-{number}.jsonl", lines)
    for line in lines:
        if line["task"] == "tvg":
            line["completion"] = line["completion"][line["completion"].index("<answer>"):]
    write_lines(folder / f"answer-{number}.jsonl", lines)


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


def main(argv=None):
    parser = command_line("demo.make_demo", __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--videos", type=int, nargs=3, default=(1200, 150, 150), metavar=("TRAIN", "VAL", "TEST"))
    args = parser.parse_args(argv)
    print_any_name()
    if not 0 <= args.seed < 2**32 or min(args.videos) < 1:
        parser.error("--seed lies between 0 and 4294967295, and there is at least one video of each kind.")
    made_with = {"seed": args.seed, "videos": list(args.videos)}
    record = args.folder / "demo.json"  # written last: the folder is complete
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        if before != made_with:
            sys.exit(f"{args.folder} was made with {before}, not with {made_with}; name another folder.")
        print(f"{args.folder} is there already")
        return
    splits = dict(zip(("train", "val", "test", "transfer"), (*args.videos, args.videos[2])))
    videos = args.folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    rows = {}
    with ProcessPoolExecutor(initializer=begin_worker) as pool:
        for split, count in splits.items():
            names = [f"{split.upper()}{i:04d}" for i in range(count)]
            actions = 2 if split == "transfer" else 3
            arriving = pool.map(partial(write_video, videos, args.seed, actions), names, chunksize=50)
            made = list(progress(arriving, desc=f"{split} videos", total=len(names)))
            rows[split] = [row for group in made for row in group]
            if split == "transfer":
                (args.folder / "transfer.json").write_text(json.dumps({
                    group[0][0]: {"duration": group[0][4], "timestamps": [row[1:3] for row in group],
                                  "sentences": [row[3] for row in group]} for group in made}))
            else:
                (args.folder / f"{split}.txt").write_text("".join(
                    f"{name} {start} {end}##{sentence}\n" for name, start, end, sentence, _ in rows[split]))
    rng = np.random.default_rng(args.seed)
    write_demonstrations(args.folder, 1, rows["train"], tvg_copies=1, inversions=3, rng=rng)
    write_demonstrations(args.folder, 2, rows["train"], tvg_copies=4, inversions=1, rng=rng)
    write_cold_start(args.folder / "lists.jsonl", rows["train"], 0.0, rng)
    write_cold_start(args.folder / "cold-start.jsonl", rows["train"], 0.5, rng)
    write_anchors(args.folder / "anchors.jsonl", rows["train"], rng)
    from demo.model import make_model  # not above: a worker that is spawned imports this file, and needs no model

    parameters = make_model(args.folder / "model", args.seed)
    record.write_text(json.dumps(made_with) + "\n")
    counts = ", ".join(f"{len(rows[split])} {split} rows" for split in splits)
    print(f"{args.folder}: {sum(splits.values())} videos, {counts}, a model of {parameters:,} parameters")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"demo.make_demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
