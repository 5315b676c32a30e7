"""From an annotation row to the model's input: settings, samples, prompts, and the task sampler.

    annotation row -> Sample -> task (TaskSampler, Eq. 13) -> Clip -> prompt ids, positions, patches

Times are seconds. engine/words/ reads the files, engine/video/ decodes, and engine/model/prompts.py turns words and
frames into what Qwen2.5-VL takes.
"""

import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rewards
from engine.model.prompts import MERGE, Prompt, encode_prompt, patchify, position_ids
from engine.program.ranks import say
from engine.program.settings import UserError, check_limits, flag
from engine.video.clips import Item
from engine.video.frames import MAX_FRAME_PIXELS, MAX_PIXELS, MIN_FRAME_PIXELS, Clip, VideoError
from engine.words.annotations import WINDOWS, load_annotations, load_demonstrations
from engine.words.english import count_coverage
from engine.words.finding import report_missing
from engine.words.samples import Sample, clamp_to_videos, rows_in_words

MAX_ATTEMPTS = 8  # draws for one slot before unreadable videos stop the run

# ------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class Settings:
    """What training and evaluation have in common. Each field is an option; invert4tvg.Config says how to read one."""

    model: str = flag("Qwen/Qwen2.5-VL-3B-Instruct", "hub id, checkpoint folder, or a run's --output (its newest "
                      "checkpoint); Section 3.1")
    annotations: str = flag("data/charades_sta_train.txt", "rows to use: Charades-STA txt; Charades, ActivityNet, "
                            "TACoS or TimeLens JSON; QVHighlights jsonl; Time-R1 or TVGBench list",
                            unless="demonstrations")
    videos: str = flag("data/videos", "folder of the video files")
    output: str = flag("runs/invert4tvg", "folder for everything this run writes", free=True)
    windows: str = flag("each", "QVHighlights alone, whose queries have one window or several. each: a window is a "
                        "row; best: a query is, and its best window counts; single: a query of one window is",
                        choices=WINDOWS)
    allow_missing_videos: bool = flag(False, "go on when video files are missing", free=True)
    fps: float = flag(2.0, "frames sampled a second; Section 3.1", above=0)
    max_pixels: int = flag(MAX_PIXELS, "most of a video: its visual tokens x 784, since one is 28 x 28 pixels of two "
                           "frames; released code (Appendix C: about 2.8 million)", above=0)
    min_frame_pixels: int = flag(MIN_FRAME_PIXELS, "least pixels of a frame; wins over --max-pixels; released code",
                                 above=0)
    max_frame_pixels: int = flag(MAX_FRAME_PIXELS, "most pixels of a frame; released code", above=0)
    max_new_tokens: int = flag(1024, "most tokens of a completion; released code", above=0)
    inversion_format: str = flag("think", "format of VC, AR and VD answers: think and answer (Eq. 9, 11), or answer "
                                 "alone (released code)", choices=tuple(rewards.FORMATS))
    tvg_format: str = flag("think", "format of grounding's answers: think and answer (Eq. 9), or answer alone",
                           choices=tuple(rewards.FORMATS))
    tvg_reward: str = flag("iou", "what grounding is asked for and rewarded with: IoU (Eq. 10), or MODULE.NAME of a "
                           "rewards.Grounding, another paper's or your own", find=rewards.grounding)
    vd_match: str = flag("all", "a VD answer must name all or any of the query's verbs (Eq. 7 leaves it open)",
                         choices=("all", "any"))
    workers: int = flag(4, "processes that decode videos ahead of the loop, on each rank", least=0, free=True)
    micro_batch: int = flag(1, "prompts in one forward pass on each rank", above=0, free=True)

    def clip_settings(self) -> dict:
        """How clips are sampled from a video: arguments of `read_video`."""
        return {"fps": self.fps, "max_pixels": self.max_pixels, "min_frame_pixels": self.min_frame_pixels,
                "max_frame_pixels": self.max_frame_pixels}

    def grounding(self) -> rewards.Grounding:
        """What grounding is asked for and rewarded with."""
        grounding = rewards.grounding(self.tvg_reward)
        if self.tvg_format == "think":
            return grounding
        return grounding._replace(format=rewards.FORMATS[self.tvg_format])

    def scoring(self) -> rewards.Scoring:
        """With what answers are measured."""
        return rewards.Scoring(self.grounding(), self.inversion_format, vd_match=self.vd_match)

    def check(self):
        """Raise UserError for a value that cannot be meant."""
        check_limits(self)
        if self.min_frame_pixels > self.max_frame_pixels:
            raise UserError(f"--min-frame-pixels {self.min_frame_pixels} is above --max-frame-pixels "
                            f"{self.max_frame_pixels}; lower the first or raise the second.")
        if self.tvg_format != "think" and rewards.grounding(self.tvg_reward).format != rewards.IOU.format:
            raise UserError(f"--tvg-format {self.tvg_format} does not go with --tvg-reward {self.tvg_reward}, which "
                            "has a format of its own; leave one of them out.")


# ------------------------------------------------------------------------------------------------ samples


def load_samples(settings: Settings, path: str = "", videos: str = "", option: str = "--annotations",
                 windows: str = "") -> list[Sample]:
    """Read an annotation file and see to it that its videos are there. `option` names the file in an error.

    Raises UserError.
    """
    path = path or settings.annotations
    try:
        samples = load_annotations(path, videos or settings.videos, windows or settings.windows)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror}); the README says what goes into data/ and "
                        "data/videos/ for Charades-STA; `bash train.sh demo` needs no data.") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    report_missing(samples, settings.allow_missing_videos)
    return samples


def load_training(settings) -> tuple[list[Sample], None, None]:
    """The samples to train on: on disk, ends clamped to the video's, none empty. Prints counts. Raises UserError.

    Unlike `load_imitated`, it returns no completions and no tasks.
    """
    on_disk = [sample for sample in load_samples(settings) if Path(sample.video).is_file()]
    samples, clamped, empty = clamp_to_videos(on_disk)
    say(f"{settings.annotations}: {len(samples)} samples; {clamped} ends clamped to the video's, {len(empty)} rows "
        f"dropped for start >= end{rows_in_words(empty)}")
    if settings.grounding().needs_duration:
        with_duration = [sample for sample in samples if sample.duration]
        say(f"{len(samples) - len(with_duration)} rows dropped whose video states no duration")
        samples = with_duration
    if not samples:
        raise UserError(f"{settings.annotations}: no row is left to train on.")
    if settings.p < 1:  # else all queries train grounding alone
        say(f"{settings.annotations}: {count_coverage(sample.query for sample in samples)}")
    return samples, None, None


def load_held_out(config) -> list[Sample]:
    """The samples that are measured while a run goes on, if any are. Raises UserError."""
    if not config.eval_every:
        return []
    return load_samples(config, config.eval_annotations, config.eval_videos, "--eval-annotations", "best")


def load_imitated(settings) -> tuple[list[Sample], list[str], list[str]]:
    """--demonstrations -> (samples, completions, tasks), without those whose video is missing. Raises UserError."""
    try:
        tasks = ("tvg", *settings.inversion_tasks)
        demonstrations = load_demonstrations(settings.demonstrations, settings.videos, tasks)
    except (OSError, ValueError) as error:
        raise UserError(f"--demonstrations {settings.demonstrations}: {error}") from error
    report_missing([d.sample for d in demonstrations], settings.allow_missing_videos)
    on_disk = [d for d in demonstrations if Path(d.sample.video).is_file()]
    if not on_disk:
        raise UserError(f"{settings.demonstrations}: no row is left to train on.")
    return [d.sample for d in on_disk], [d.completion for d in on_disk], [d.task for d in on_disk]


# ------------------------------------------------------------------------------------------------ prompts


def build_prompt(model, processor, sample: Sample, task: str, clip: Clip, settings: Settings) -> Prompt:
    """A sample, its task and its decoded clip -> the model's input, on the model's device."""
    frames = torch.as_tensor(clip.frames, device=model.device)  # (T, 3, H, W)
    # (n, 1176) and (1, 3): n patches of 3 channels x 2 frames x 14 x 14 pixels, and how many there are each way
    patches, grid = patchify(frames, processor.pixels["image_mean"], processor.pixels["image_std"])
    text = prompt_text(task, sample.query, settings.inversion_format, settings.grounding())
    ids = encode_prompt(processor.tokenizer, text, visual_tokens=len(patches) // MERGE**2)
    positions = position_ids(ids, grid[0].tolist(), clip.fps, model.config.video_token_id,  # the clip's true rate
                             model.config.vision_config.tokens_per_second)
    return Prompt(torch.tensor(ids, device=model.device), positions.to(model.device), patches, grid)


def prompt_text(task: str, query: str, inversion_format: str = "think",
                grounding: rewards.Grounding = rewards.IOU) -> str:
    """The user's words for a task. For "vc":

        Add a verb for the event 'person [] the door' based on the video.
        Output your thought process within the <think> </think> tags, then provide the completed sentence within the
        <answer> </answer> tags.
    """
    if task == "tvg":
        instruction = grounding.instruction
        layout = grounding.format
        question = rewards.TVG_QUESTION.format(query=query)
    else:
        inversion = rewards.inversion(task)
        instruction = inversion.instruction
        layout = rewards.FORMATS[inversion_format]
        masked_query = inversion.mask(query)[0] if "{masked_query}" in inversion.question else ""
        question = inversion.question.format(query=query, masked_query=masked_query)
    block = layout.blocks[-1]
    request = f"{layout.preamble}{instruction} within the <{block}> </{block}> tags."
    return question + "\n" + request[0].upper() + request[1:]  # without a preamble the instruction begins the sentence


# ------------------------------------------------------------------------------------------------ what to train on

ORDER, TASK, REDRAW, SAMPLING = range(4)  # streams of random numbers: each draw is seeded with (seed, stream, ...)


class TaskSampler:
    """Which samples and which task an iteration trains on (Eq. 13; Algorithm 1, lines 6-11).

    Task. With probability `p` it is "tvg", else one of the inversion tasks that `suits` names, uniformly.

    Samples. An iteration has `prompts` slots over all ranks; a slot is the place of one prompt. From iteration to
    iteration the slots walk through the `count` samples in a random order, a new one each epoch. suits[task] says of
    each sample whether the inversion suits it. Where it does not, the slot gets another sample that it suits, and the
    epoch goes on without the first.

    Every draw is a function of (seed, iteration, slot, attempt) alone. So a run can start at any iteration, and ranks
    need no communication. `slots` are those of `rank` of `world_size`.
    """

    def __init__(self, count: int, suits: dict[str, list[bool]], prompts: int, p: float = 0.8, seed: int = 0,
                 iterations: int = 1, rank: int = 0, world_size: int = 1):
        self.count = count
        self.suits = suits
        self.rows = {task: np.flatnonzero(of_sample) for task, of_sample in suits.items()}  # those that suit
        self.prompts = prompts
        self.p = p
        self.seed = seed
        self.iterations = iterations
        each = prompts // world_size
        self.slots = range(rank * each, (rank + 1) * each)
        for task, rows in self.rows.items():
            if p < 1 and not len(rows):
                raise ValueError(f"no query suits the task {task} (an inversion needs a verb, or what its `suits` "
                                 "asks for); use --p 1.")

    def task(self, iteration: int) -> str:
        rng = np.random.default_rng([self.seed, TASK, iteration])
        if rng.random() < self.p:  # Eq. 13; random() < 1, so p = 1 is grounding alone
            return "tvg"
        inversions = tuple(self.suits)
        return inversions[rng.integers(len(inversions))]

    def index(self, iteration: int, slot: int, attempt: int = 0) -> int:
        """The sample of a slot; `attempt` > 0 redraws it (unreadable video) for the same task."""
        task = self.task(iteration)
        if attempt == 0:  # the epoch's order
            epoch, place = divmod(iteration * self.prompts + slot, self.count)
            index = int(_permutation(self.seed, epoch, self.count)[place])
            if task == "tvg" or self.suits[task][index]:
                return index
        rng = np.random.default_rng([self.seed, REDRAW, iteration, slot, attempt])  # a random one that suits
        if task == "tvg":
            return int(rng.integers(self.count))
        return int(rng.choice(self.rows[task]))

    def candidates(self, iteration: int, slot: int, own_tasks: list[str] | None = None) -> list[tuple[int, str]]:
        """The (sample index, task) pairs of a slot to try one after the other, while videos cannot be read.

        `own_tasks` are the samples' own tasks (demonstrations); else the iteration's task holds.
        """
        task = self.task(iteration)
        indices = [self.index(iteration, slot, attempt) for attempt in range(MAX_ATTEMPTS)]
        return [(index, own_tasks[index] if own_tasks else task) for index in indices]


def make_sampler(config, samples: list[Sample], prompts: int, rank: int, world_size: int) -> TaskSampler:
    """The sampler of a run with `prompts` an iteration. Raises UserError where no query suits an inversion task."""
    iterations = config.iterations or math.ceil(config.epochs * len(samples) / prompts)
    p = 1.0 if config.demonstrations else config.p  # demonstrations have tasks: with p = 1 only their order is drawn
    queries = [sample.query for sample in samples]
    suits = {task: rewards.suitable(task, queries) for task in config.inversion_tasks} if p < 1 else {}
    try:
        return TaskSampler(len(samples), suits, prompts, p, config.seed, iterations, rank, world_size)
    except ValueError as error:
        raise UserError(str(error)) from error


@functools.lru_cache(maxsize=2)
def _permutation(seed, epoch, count):
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


def report_unreadable(items: list[Item]) -> int:
    """Name the videos that could not be read -> their number. Raises VideoError where a slot found none at all."""
    failures = [failure for item in items for failure in item.failures]
    for failure in dict.fromkeys(failures):
        tqdm.write(f"redrawn: {failure}", file=sys.stderr)
    if any(item.clip is None for item in items):
        raise VideoError(f"{MAX_ATTEMPTS} draws for one slot gave no readable video: {' '.join(failures)}")
    return len(failures)
