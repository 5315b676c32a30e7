"""Annotations, prompts and the task sampler: everything between files on disk and the model's inputs.

    annotation row -> Sample -> task (TaskSampler, Eq. 13) -> Clip (video.py) -> prompt ids, positions, patches

T frames of H x W pixels; two frames make one grid step, and 28 x 28 pixels of it one visual token. Times are seconds.
"""

import functools
import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from video import Clip, VideoError, read_video, video_duration

PATCH, MERGE, TEMPORAL = 14, 2, 2  # Qwen2.5-VL: patches of 14 x 14 pixels x 2 frames, 2 x 2 of them are one token
INVERSION_TASKS = ("vc", "ar", "vd")
MAX_ATTEMPTS = 8  # draws for one slot before unreadable videos stop the run
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")

# ------------------------------------------------------------------------------------------------ annotations


@dataclass(frozen=True)
class Sample:
    """A query and its segment: `start` and `end` in seconds, `duration` in seconds or None where not annotated."""

    video: str
    query: str
    start: float
    end: float
    duration: float | None = None
    qid: str = ""


@dataclass(frozen=True)
class Demonstration:
    """A completion to imitate, for the supervised stages."""

    sample: Sample
    task: str
    completion: str


def normalize_query(text):
    """The one form of a query in training and evaluation: stripped, on one line, lower case, no final full stop."""
    return " ".join(text.split()).lower().rstrip(". ")


def load_annotations(path, video_dir, single_window=False):
    """Read every row of an annotation file, dropping none, as a list of `Sample` in the file's order.

    The content, not the name, tells the format: Charades-STA txt ("VID start end##sentence"); JSON of
    {video: {duration, timestamps, sentences}} (Charades, ActivityNet Captions); QVHighlights jsonl (each relevant
    window its own sample, as in the paper; `single_window` keeps only queries that have one); the Time-R1 and
    TVGBench lists. Videos are looked up in `video_dir` by name.

    Raises ValueError naming the file and the line (or key, or item) of a malformed row.
    """
    records, parse = _detect(path, _read(path))
    find = _video_finder(video_dir)
    samples = []
    for where, record in records:
        try:
            rows = parse(record)
            if single_window and len(rows) != 1 and parse is _parse_qvhighlights:
                continue
            samples += [_sample(find(video), *row, qid or where) for video, *row, qid in rows]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, {where}: not a readable annotation row ({reason}); the README lists the formats "
                             "that are read.") from error
    if not samples:
        raise ValueError(f"{path}: holds no annotation row; the README lists the formats that are read.")
    return samples


def load_demonstrations(path, video_dir):
    """Read a jsonl of {video, query, start, end, task, completion} as a list of `Demonstration`.

    TVG-R1's names are read too: "problem" for the query, "gt_frame" [start, end] and "video_length" in seconds, as in its
    RL rows, and "solution" for the completion (of its cold-start rows' names this one is a guess); they are grounding.
    Raises ValueError naming the file and the line of a malformed row.
    """
    find, rows = _video_finder(video_dir), []
    for where, line in _lines(_read(path)):
        try:
            r = json.loads(line)
            if "gt_frame" in r:
                start, end = r["gt_frame"]
                r = {"query": r["problem"], "start": start, "end": end, "task": "tvg"} | r
            sample = _sample(find(r["video"]), r["start"], r["end"], r.get("video_length"), r["query"], where)
            if r["task"] not in PROMPTS:
                raise ValueError(f"task {r['task']!r} is none of {', '.join(PROMPTS)}")
            completion = r["completion"] if "completion" in r else r["solution"]
            if not isinstance(completion, str):
                raise TypeError(f"completion {completion!r} is no text")
            rows.append(Demonstration(sample, r["task"], completion))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, {where}: not a readable demonstration ({reason}).") from error
    if not rows:
        raise ValueError(f"{path}: holds no demonstration.")
    return rows


def demonstration_row(sample, task, completion):
    """-> one line, a dictionary, of a file that `load_demonstrations` reads."""
    return {"video": Path(sample.video).name, "query": sample.query, "start": sample.start, "end": sample.end,
            "task": task, "completion": completion}


def _lines(text):  # not splitlines(), which also cuts at the U+2028 and U+0085 that JSON strings may hold
    return [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _read(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason}); convert it.") from error


def _detect(path, text):
    """-> ([(where, record)], parser of one record into rows of (video, start, end, duration, sentence, qid))."""
    lines, first = _lines(text), text.lstrip()[:1]
    if first not in ("{", "["):
        return lines, _parse_charades
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if first == "{" and error.msg == "Extra data":  # one JSON object a line
            return lines, _parse_qvhighlights
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    if first == "[":
        return [(f"item {i}", r) for i, r in enumerate(document)], _parse_list_item
    if "relevant_windows" in document:  # a jsonl of one line
        return lines, _parse_qvhighlights
    return [(f"key {key!r}", item) for item in document.items() for key in item[:1]], _parse_captions


def _parse_charades(line):
    head, sentence = line.split("##", 1)
    video, start, end = head.split()
    return [(video, start, end, None, sentence, "")]


def _parse_captions(item):
    video, r = item
    pairs = enumerate(zip(r["timestamps"], r["sentences"], strict=True))
    return [(video, start, end, r.get("duration"), sentence, f"{video}:{i}") for i, ((start, end), sentence) in pairs]


def _parse_qvhighlights(line):
    r = json.loads(line)
    windows = enumerate(r["relevant_windows"])
    return [(r["vid"], start, end, r.get("duration"), r["query"], f"{r['qid']}:{i}") for i, (start, end) in windows]


def _parse_list_item(r):
    if "answer" in r:  # TVGBench
        start, end = re.fullmatch(r"\s*([\d.]+)\s*-\s*([\d.]+)\s*", r["answer"]).groups()
        return [(r["path"], start, end, r.get("duration"), r["question"], "")]
    start, end = r["timestamp"]  # Time-R1; its video_start is a note, the files are already cut
    return [(r["video"], start, end, r.get("duration"), r["sentence"], r.get("qid", ""))]


def _sample(video, start, end, duration, sentence, qid):
    start, end = float(start), float(end)
    duration = None if duration is None else float(duration)
    if not all(math.isfinite(x) and x >= 0 for x in (start, end, duration or 0.0)):
        raise ValueError(f"times {start} to {end} of {duration} are not finite seconds from 0")
    query = normalize_query(sentence)
    if not query:
        raise ValueError("the sentence is empty")
    return Sample(video, query, start, end, duration, str(qid))


def _video_finder(video_dir):
    """-> name -> path: an annotation's id or path, found in `video_dir` whatever the container's suffix."""
    folder = Path(video_dir)
    listed = {p.stem: str(p) for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES} if folder.is_dir() else {}

    def find(name):
        path = folder / name.replace("\\", "/").rsplit("/", 1)[-1]
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            path = folder / f"{path.name}.mp4"
        return listed.get(path.stem, str(path))

    return find


def missing_videos(samples):
    """-> the sorted paths of `samples` that are no files."""
    return sorted(video for video in {s.video for s in samples} if not Path(video).is_file())


def prepare_training(samples):
    """Clamp ends to the duration (the annotation's, else the video's), note it, and drop rows with start >= end.

    Returns (samples, number clamped, number dropped). For training only: evaluation keeps every row as it stands.
    """
    kept, clamped = [], 0
    for s in samples:
        duration = s.duration or video_duration(s.video)
        end = min(s.end, duration or math.inf)
        if s.start < end:
            kept.append(replace(s, end=end, duration=duration))
            clamped += end < s.end
    return kept, clamped, len(samples) - len(kept)


# ------------------------------------------------------------------------------------------------ model inputs

THINK = "Output your thought process within the <think> </think> tags, then "
ANCHORS = ("Output your thought process within the <think> </think> tags, and in it two to four estimates of the time "
           "period, each better than the one before, as <timestamp>12.54 to 17.83</timestamp>, then ")
PROMPTS = {  # the paper's sentences; it prints none for TVG, whose wording is Time-R1's, the paper's baseline
    "tvg": ('To accurately pinpoint the event "{query}" in the video, determine the precise time period of the event.',
            'provide the start and end times in seconds, in the format "12.54 to 17.83",'),
    "vc": ("Add a verb for the event '{frame}' based on the video.", "provide the completed sentence"),
    "ar": ("Use a verb to describe the event based on the video.", "provide the verb, a single word,"),
    "vd": ("Describe what people have done based on the video.", "provide the description in one sentence"),
}


def prompt_text(task, query, frame, inversion_format="think", tvg_reward="iou"):
    """The user's words for a task. `frame` is the query with `[]` for each verb; only VC shows it.

    `tvg_reward` "anchors" asks grounding for TAR-TVG's anchors, "tvg_r1" for TVG-R1's list of times (our words: neither
    prompt is public).
    """
    question, answer = PROMPTS[task]
    think, tag = "" if task != "tvg" and inversion_format == "answer" else THINK, "answer"
    if task == "tvg" and tvg_reward == "anchors":
        think = ANCHORS
    if task == "tvg" and tvg_reward == "tvg_r1":
        answer, tag = "provide the start and end times in seconds as a list, [12.54, 17.83],", "time"
    request = think + answer + f" within the <{tag}> </{tag}> tags."
    return question.format(query=query, frame=frame) + "\n" + request[0].upper() + request[1:]


def encode_prompt(tokenizer, text, visual_tokens):
    """-> prompt ids, a list: chat template, `visual_tokens` video pads, `text`, the assistant's opening.

    The text is tokenised apart from the template with special tokens switched off, so that a query which spells
    "<|im_end|>" stays text.
    """
    head, tail, at = _template(tokenizer)
    body = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return head[:at] + [head[at]] * visual_tokens + head[at + 1:] + body + tail


@functools.lru_cache(maxsize=1)
def _template(tokenizer):
    """-> (ids before the user's words, ids after them, index of the video pad in the former)."""
    slot = "\ue000"
    messages = [{"role": "system", "content": "You are a helpful assistant."},  # what Qwen2.5-VL's template defaults to
                {"role": "user", "content": "<|vision_start|><|video_pad|><|vision_end|>" + slot}]
    template = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in template.split(slot))
    return head, tail, head.index(tokenizer.convert_tokens_to_ids("<|video_pad|>"))


def patchify(frames, mean, std):
    """(T, 3, H, W) uint8 -> ((T/2 * H/14 * W/14, 1176) float32 patches in Qwen2.5-VL's order, (1, 3) grid in patches)

    `mean` and `std` are the checkpoint's, per channel, for pixels in [0, 1].
    """
    T, C, H, W = frames.shape
    grid = (T // TEMPORAL, H // PATCH, W // PATCH)
    mean, std = (torch.tensor(x, device=frames.device).view(1, C, 1, 1) for x in (mean, std))
    pixels = (frames.float() / 255 - mean) / std
    pixels = pixels.view(grid[0], TEMPORAL, C, grid[1] // MERGE, MERGE, PATCH, grid[2] // MERGE, MERGE, PATCH)
    # Order: grid step, 2 x 2 blocks row by row, the 4 patches inside a block; each patch is (C, frame, row, column).
    patches = pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), C * TEMPORAL * PATCH * PATCH)
    return patches, torch.tensor([grid], device=frames.device)


def position_ids(ids, grid, fps, video_token_id, tokens_per_second):
    """-> (3, P) time, height and width positions of a prompt holding one video, by the rule the checkpoints learned.

    Text counts up in all three rows. Visual token (g, h, w) stands at floor(g * tokens_per_second * 2 / fps), h, w
    past the text before it, and the text after starts behind the largest of the three. transformers computed this
    until 5.2 and something else since (README, "Positions"), so the model never infers it.
    """
    ids = torch.as_tensor(ids)
    t, h, w = grid[0], grid[1] // MERGE, grid[2] // MERGE
    first = int((ids == video_token_id).nonzero()[0])
    seconds_per_grid = TEMPORAL / fps  # the TRUE sampling rate: the only way in which seconds reach the model
    steps = (torch.arange(t, dtype=torch.float64) * tokens_per_second * seconds_per_grid).long()
    visual = torch.stack(torch.meshgrid(steps, torch.arange(h), torch.arange(w), indexing="ij")).view(3, -1) + first
    after = torch.arange(len(ids) - first - t * h * w) + int(visual.max()) + 1
    return torch.cat([torch.arange(first).expand(3, -1), visual, after.expand(3, -1)], dim=1)


# ------------------------------------------------------------------------------------------------ what to train on


class TaskSampler:
    """Which samples and which task an iteration trains on (Eq. 13; Algorithm 1, lines 6-11).

    Every draw is a function of (seed, iteration, slot) alone, so a resumed run replays nothing, and ranks agree
    without talking. Iteration k has `prompts` slots over all ranks and walks through a new permutation of the samples
    each epoch. With probability `p` its task is "tvg", else one of `tasks` uniformly; in an inversion iteration a
    slot whose sample has no verb is redrawn among those that have.

    Iterating yields, for `rank` of `world_size`, each iteration's list of (sample index, task).
    """

    def __init__(self, has_verb, prompts, p=0.8, tasks=INVERSION_TASKS, seed=0, iterations=1, rank=0, world_size=1):
        self.has_verb, self.with_verb = has_verb, np.flatnonzero(has_verb)
        self.prompts, self.p, self.tasks, self.seed, self.iterations = prompts, p, tuple(tasks), seed, iterations
        self.slots = range(rank * prompts // world_size, (rank + 1) * prompts // world_size)
        if p < 1 and not len(self.with_verb):
            raise ValueError("no query has a verb, and inversion tasks need one; use --p 1.")

    def task(self, iteration):
        rng = np.random.default_rng([self.seed, 1, iteration])
        if rng.random() < self.p:  # Eq. 13; random() < 1, so p = 1 is TVG alone
            return "tvg"
        return self.tasks[rng.integers(len(self.tasks))]

    def index(self, iteration, slot, attempt=0):
        """The sample of a slot; `attempt` > 0 redraws it (unreadable video) with the same task."""
        inversion = self.task(iteration) != "tvg"
        if attempt == 0:
            epoch, place = divmod(iteration * self.prompts + slot, len(self.has_verb))
            index = _permutation(self.seed, epoch, len(self.has_verb))[place]
            if self.has_verb[index] or not inversion:
                return int(index)
        rng = np.random.default_rng([self.seed, 2, iteration, slot, attempt])
        return int(rng.choice(self.with_verb) if inversion else rng.integers(len(self.has_verb)))

    def __iter__(self):
        for k in range(self.iterations):
            yield [(self.index(k, slot), self.task(k)) for slot in self.slots]


@functools.lru_cache(maxsize=2)
def _permutation(seed, epoch, n):
    return np.random.default_rng([seed, 0, epoch]).permutation(n)


@dataclass
class Item:
    """What a worker hands to the loop: a decoded clip, or None with the failures that exhausted the slot."""

    index: int
    task: str
    clip: Clip | None
    failures: list = field(default_factory=list)


def read_clip(sample, task, **limits):
    """The whole video for TVG, the ground-truth segment alone for an inversion task (Eq. 2)."""
    segment = {} if task == "tvg" else {"start": sample.start, "end": sample.end}
    return read_video(sample.video, **segment, **limits)


class TrainingClips(Dataset):
    """Decodes the clip of (iteration, slot), redrawing the slot when a video cannot be read. Runs in the workers.

    `tasks` gives each sample's own task (demonstrations); else the sampler's task of the iteration holds.
    """

    def __init__(self, samples, sampler, tasks=None, **limits):
        self.samples, self.sampler, self.tasks, self.limits = samples, sampler, tasks, limits

    def __getitem__(self, key):
        iteration, slot = key
        failures = []
        for attempt in range(MAX_ATTEMPTS):
            index = self.sampler.index(iteration, slot, attempt)
            task = self.tasks[index] if self.tasks else self.sampler.task(iteration)
            try:
                return Item(index, task, read_clip(self.samples[index], task, **self.limits), failures)
            except VideoError as error:
                failures.append(str(error))
        return Item(index, task, None, failures)
