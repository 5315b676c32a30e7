"""What a model can do: R1@m and mIoU on grounding, accuracy on VC, AR and VD; its own command line.

    python evaluate.py --model CHECKPOINT --annotations FILE --videos FOLDER --output FOLDER [--against OTHER_OUTPUT]

Greedy decoding, every part of it explicit: nothing is inherited from a checkpoint's generation config. With --samples
k, k completions a row at temperature 1, whose mean IoU is the row's difficulty (stages.py). Each row's prediction is
appended to a jsonl file, so an interrupted evaluation goes on where it stopped; under torchrun each of W ranks takes
every W-th row. A video that cannot be read scores 0 and is listed; no row is ever dropped.
"""

import dataclasses
import json
import math
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import grpo
import rewards
import runtime
import video
from runtime import UserError, flag, option, say

THRESHOLDS = (0.3, 0.5, 0.7)
TASKS = rewards.TASKS


@dataclass(frozen=True)
class Settings:
    """What training and evaluation have in common."""

    model: str = flag("Qwen/Qwen2.5-VL-3B-Instruct", "hub id, checkpoint folder, or a run's --output (its newest "
                      "checkpoint); Section 3.1")
    annotations: str = flag("data/charades_sta_train.txt", "rows to use: Charades-STA txt, Charades or ActivityNet "
                            "JSON, QVHighlights jsonl, Time-R1 or TVGBench list")
    videos: str = flag("data/videos", "folder of the video files")
    output: str = flag("runs/invert4tvg", "folder for everything this run writes")
    single_window: bool = flag(False, "QVHighlights: keep only queries with one relevant window")
    allow_missing_videos: bool = flag(False, "go on when video files are missing")
    fps: float = flag(2.0, "frames sampled a second; Section 3.1")
    max_pixels: int = flag(video.MAX_PIXELS, "pixels a video over its two-frame grids, 784 a token; released code "
                           "(Appendix C: about 2.8 million)")
    min_frame_pixels: int = flag(video.MIN_FRAME_PIXELS, "least pixels a frame, stronger than --max-pixels; released "
                                 "code")
    max_frame_pixels: int = flag(video.MAX_FRAME_PIXELS, "most pixels a frame; released code")
    max_new_tokens: int = flag(1024, "most tokens a completion; released code")
    inversion_format: str = flag("think", "format of VC, AR and VD answers: think and answer (Eq. 9, 11), or answer "
                                 "alone (released code)", choices=("think", "answer"))
    tvg_reward: str = flag("iou", "what grounding is asked for and rewarded with: IoU (Eq. 10), Time-R1's IoU weighted "
                           "by both ends' errors, TAR-TVG's anchors, or TVG-R1's 0.9 IoU + 0.1 format",
                           choices=rewards.TVG_REWARDS)
    vd_match: str = flag("all", "a VD answer must name all or any of the query's verbs (Eq. 7 leaves it open)",
                         choices=("all", "any"))
    workers: int = flag(4, "processes that decode videos ahead of the loop, on each rank")
    micro_batch: int = flag(1, "prompts in one pass on a rank: packed (training), decoded (evaluation)")

    def clip_limits(self):
        return {k: getattr(self, k) for k in ("fps", "max_pixels", "min_frame_pixels", "max_frame_pixels")}

    def scoring(self):
        """The settings of `rewards.score`."""
        return {k: getattr(self, k) for k in ("inversion_format", "vd_match", "tvg_reward")}

    def check(self):
        """Raise UserError for a value that cannot be meant."""
        for name in ("fps", "max_pixels", "min_frame_pixels", "max_frame_pixels", "max_new_tokens", "micro_batch"):
            if getattr(self, name) <= 0:
                raise UserError(f"{option(name)} is {getattr(self, name)}; it must be above 0.")
        for f in dataclasses.fields(self):
            if f.type is float and not math.isfinite(getattr(self, f.name) or 0):
                raise UserError(f"{option(f.name)} is {getattr(self, f.name)}; it must be a finite number.")
        if self.workers < 0:
            raise UserError(f"--workers is {self.workers}; it cannot be negative.")
        if self.min_frame_pixels > self.max_frame_pixels:
            raise UserError(f"--min-frame-pixels {self.min_frame_pixels} is above --max-frame-pixels "
                            f"{self.max_frame_pixels}; lower the first or raise the second.")


@dataclass(frozen=True)
class EvalSettings(Settings):
    """Evaluation alone."""

    annotations: str = flag("data/charades_sta_test.txt", "held-out rows, in any of the formats training reads")
    output: str = flag("runs/evaluation", "folder for predictions and metrics.json; rows already predicted are kept")
    tasks: tuple = flag(TASKS, "what to measure", choices=TASKS)
    samples: int = flag(0, "completions a row, sampled at temperature 1; 0: one, greedy")
    limit: int = flag(0, "evaluate this many rows, evenly spaced over the file; 0: all")
    against: str = flag("", "another evaluation's --output to print beside this one, with the difference's 95%% "
                        "bootstrap interval over videos")

    def check(self):
        super().check()
        for name in ("samples", "limit"):
            if getattr(self, name) < 0:
                raise UserError(f"{option(name)} is {getattr(self, name)}; it cannot be negative.")


# ------------------------------------------------------------------------------------------------ prompts and samples


def build_prompt(model, processor, sample, item, settings):
    """A decoded clip and its sample -> grpo.Prompt on the model's device."""
    frames = item.clip.frames.to(model.device)
    patches, grid = data.patchify(frames, processor.pixels["image_mean"], processor.pixels["image_std"])
    frame, _ = rewards.mask_verbs(sample.query) if item.task == "vc" else ("", ())
    text = data.prompt_text(item.task, sample.query, frame, settings.inversion_format, settings.tvg_reward)
    ids = data.encode_prompt(processor.tokenizer, text, len(patches) // data.MERGE**2)
    vision = model.config.vision_config
    positions = data.position_ids(ids, grid[0].tolist(), item.clip.fps, model.config.video_token_id,
                                  vision.tokens_per_second)
    return grpo.Prompt(torch.tensor(ids, device=model.device), positions.to(model.device), patches, grid)


def completion_texts(processor, rollout):
    """Rollout -> N strings, without special tokens."""
    rows = [ids[mask].tolist() for ids, mask in zip(rollout.ids, rollout.mask)]
    return processor.tokenizer.batch_decode(rows, skip_special_tokens=True)


def load_samples(settings, path=None, videos=None, name="--annotations"):
    """Read an annotation file and see to it that its videos are there -> list of Sample."""
    path, videos = path or settings.annotations, videos or settings.videos
    try:
        samples = data.load_annotations(path, videos, settings.single_window)
    except OSError as error:
        raise UserError(
            f"{name} {path}: cannot be read ({error.strerror}); Charades-STA is charades_sta_train.txt and "
            "charades_sta_test.txt from github.com/jiyanggao/TALL in data/ and the videos of Charades_v1_480.zip from "
            "prior.allenai.org/projects/charades in data/videos/, and `bash train.sh demo` runs without any.") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    report_missing(samples, settings)
    return samples


def report_missing(samples, settings):
    """List the videos that are not there; raise UserError unless --allow-missing-videos."""
    missing = data.missing_videos(samples)
    if missing:
        say("missing: " + "\nmissing: ".join(missing))
        if not settings.allow_missing_videos:
            raise UserError(f"{len(missing)} of {len({s.video for s in samples})} videos are missing (listed above); see "
                            "--videos, or go on without them with --allow-missing-videos.")


# ------------------------------------------------------------------------------------------------ metrics


def grounding_metrics(ious):
    """IoUs in [0, 1], one a row, 0 for an answer that holds no span -> R1@m (IoU >= m) and mIoU, in percent."""
    ious = np.asarray(ious, dtype=float)
    if not ious.size:
        raise ValueError("no row to measure: the list of IoUs is empty.")
    metrics = {f"R1@{m}": 100 * float((ious >= m).mean()) for m in THRESHOLDS}
    return metrics | {"mIoU": 100 * float(ious.mean())}


def row_values(prediction):
    """One prediction -> its contribution, in percent, to each metric that is a mean over rows."""
    task, parts = prediction["task"], prediction["parts"]
    if task == "tvg":
        wanted = {"2-4 anchors": 100.0 * (parts["anchors"] in rewards.ANCHORS_WANTED)} if "anchors" in parts else {}
        return grounding_metrics([parts["iou"]]) | {"format": 100 * parts["format"]} | wanted
    return {task.upper(): 100 * parts[task]}


def summarize(predictions):
    """All predictions -> metrics: percent, except `VD verbs` (distinct verbs an answer) and the counts.

    `anchor gain` is the rise in IoU from the first anchor to the answer, a mean over the answers that have any.
    """
    values = {}
    for p in sorted(predictions, key=lambda p: TASKS.index(p["task"])):
        for name, value in row_values(p).items():
            values.setdefault(name, []).append(value)
    metrics = {name: float(np.mean(v)) for name, v in values.items()}
    listed = [p["parts"]["vd_verbs"] for p in predictions if p["task"] == "vd"]
    if listed:
        metrics["VD verbs"] = float(np.mean(listed))
    gains = [100 * p["parts"]["anchor_gain"] for p in predictions if p["parts"].get("anchors")]
    if gains:
        metrics["anchor gain"] = float(np.mean(gains))
    metrics["rows"] = {t: n for t in TASKS if (n := sum(p["task"] == t for p in predictions))}
    metrics["without a span"] = sum(p["task"] == "tvg" and p["span"] is None for p in predictions)
    metrics["reversed spans"] = sum(p["span"] is not None and p["span"][0] > p["span"][1] for p in predictions)
    metrics["unreadable"] = sorted({p["error"] for p in predictions if p["error"]})
    return metrics


def paired_bootstrap(ours, theirs, draws=10_000, seed=0):
    """Two lists of predictions of the same rows -> {metric: (ours, theirs, low, high)}, in percent.

    low, high: the 95% interval of the difference when videos, the independent units, are drawn with replacement.
    """
    key = lambda p: (p["row"], p["task"], p["sample"])  # noqa: E731
    other = {key(p): p for p in theirs}
    if {(*key(p), p["query"]) for p in ours} != {(*key(p), p["query"]) for p in theirs}:
        raise UserError("the two evaluations do not hold the same rows; evaluate both on the same file and tasks.")
    names = {video: i for i, video in enumerate(sorted({p["video"] for p in ours}))}
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)  # (draws, videos)
    sums = {}  # metric -> (videos, 3): rows, our sum, their sum
    for p in ours:
        for name, value in row_values(p).items():
            table = sums.setdefault(name, np.zeros((len(names), 3)))
            table[names[p["video"]]] += (1, value, row_values(other[key(p)]).get(name, np.nan))
    result = {}
    for name, table in sums.items():
        if np.isnan(table).any():  # measured by one of the two alone
            continue
        drawn = weights @ table
        difference = (drawn[:, 1] - drawn[:, 2]) / np.maximum(drawn[:, 0], 1)
        rows, a, b = table.sum(0)
        result[name] = (a / rows, b / rows, *np.quantile(difference, (0.025, 0.975)))
    return result


# ------------------------------------------------------------------------------------------------ evaluation


class EvaluationClips(Dataset):
    """The clips of (row, task) pairs; one that cannot be read comes as an Item without a clip."""

    def __init__(self, samples, jobs, limits):
        self.samples, self.jobs, self.limits = samples, jobs, limits

    def __len__(self):
        return len(self.jobs)

    def __getitem__(self, i):
        row, task = self.jobs[i]
        try:
            return data.Item(row, task, data.read_clip(self.samples[row], task, **self.limits))
        except video.VideoError as error:
            return data.Item(row, task, None, [str(error)])


def make_loader(dataset, workers, **kwargs):
    """A DataLoader of lists whose workers leave Ctrl-C to the main process."""
    ignore = lambda _: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    return DataLoader(dataset, num_workers=workers, collate_fn=list, worker_init_fn=ignore,
                      persistent_workers=workers > 0, prefetch_factor=2 if workers else None, **kwargs)


def read_predictions(output):
    """All predictions of an output folder; a line cut off by an interruption is left out."""
    predictions = {}
    for path in sorted(Path(output).glob("predictions*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                p = {"sample": 0} | json.loads(line)
                key = p["row"], p["task"], p["sample"]
                if key not in predictions or not p["error"]:  # a video that was mended since
                    predictions[key] = p
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    return [predictions[key] for key in sorted(predictions)]


def evaluate(load, samples, rows, tasks, settings, output, k=0):
    """Predict what `output` does not hold yet, on all ranks together -> metrics (on every rank).

    `load` is called only when a row is missing and returns (model, runtime.Processor); `rows` are indices into `samples`.
    Each row has one greedy completion, or `k` sampled ones.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    queries = [samples[row].query for row in rows]
    has_verb = [bool(gold) for _, gold in rewards.mask_queries(queries)] if set(tasks) != {"tvg"} else [False] * len(rows)
    scoring = settings.scoring()
    if settings.tvg_reward == "timestamp_iou":  # no metric, and in need of durations
        scoring["tvg_reward"] = "iou"
    jobs = [(row, task) for task in tasks for row, verb in zip(rows, has_verb) if verb or task == "tvg"]
    done = Counter((p["row"], p["task"]) for p in read_predictions(output) if not p["error"])
    dist.barrier()  # nobody writes before everybody has read
    jobs = [job for job in jobs[rank::world] if done[job] < max(1, k)]
    if jobs:
        model, processor = load()
        loader = make_loader(EvaluationClips(samples, jobs, settings.clip_limits()),
                             min(settings.workers, len(jobs)), batch_size=settings.micro_batch)
        with open(output / f"predictions.{rank}.jsonl", "a", encoding="utf-8") as file:
            file.write("\n" if file.tell() else "")  # ends a line that an interruption cut off
            for items in tqdm(loader, "evaluating", disable=rank > 0, leave=False):
                for n, completion in enumerate(answers(model, processor, samples, items, settings, k)):
                    at, number = divmod(n, max(1, k))
                    item, sample = items[at], samples[items[at].index]
                    file.write(json.dumps({
                        "row": item.index, "task": item.task, "sample": number, "video": sample.video,
                        "query": sample.query, "truth": [sample.start, sample.end], "completion": completion,
                        "span": rewards.parse_span(completion) if item.task == "tvg" else None,
                        "parts": rewards.score(item.task, completion, sample, **scoring),
                        "error": item.failures[0] if item.failures else None}) + "\n")
                file.flush()
    dist.barrier()
    predictions = read_predictions(output)
    metrics = summarize(predictions)
    if rank == 0:
        (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def answers(model, processor, samples, items, settings, k):
    """k sampled completions, or for 0 one greedy, of each of a batch of items; "" where its video could not be read."""
    readable = [item for item in items if item.clip]
    texts = iter(())
    if readable:
        prompts = [build_prompt(model, processor, samples[item.index], item, settings) for item in readable]
        generator = torch.Generator(model.device).manual_seed(items[0].index)
        texts = iter(completion_texts(processor, grpo.sample_group(
            model, prompts, max(1, k), settings.max_new_tokens, processor.eos, processor.banned,
            temperature=1.0 if k else 0.0, generator=generator)))
    return [next(texts) if item.clip else "" for item in items for _ in range(max(1, k))]


def evenly_spaced(n, limit):
    """Up to `limit` of the indices 0 .. n - 1 (all for 0), evenly spaced."""
    return list(range(n)) if not 0 < limit < n else [i * n // limit for i in range(limit)]


def format_metrics(metrics):
    """Metrics -> a table of two lines for the screen."""
    shown = [(name, f"{value:.1f}") for name, value in metrics.items() if isinstance(value, float)]
    return "\n".join("  ".join(f"{cell:>{max(map(len, pair))}}" for pair in shown for cell in [pair[i]]) for i in (0, 1))


def print_comparison(settings, other):
    table = paired_bootstrap(read_predictions(settings.output), read_predictions(other))
    say(f"\n{'metric':<10}{'this':>8}{'other':>8}{'difference':>12}   95% interval over videos\n" + "\n".join(
        f"{name:<10}{a:8.1f}{b:8.1f}{a - b:+12.1f}   [{low:+.1f}, {high:+.1f}]"
        for name, (a, b, low, high) in table.items()))


def same_run(settings, output):
    """Stop when `output` holds predictions made under other settings; else note these there."""
    record, now = Path(output) / "settings.json", dataclasses.asdict(settings)
    for name in ("against", "workers", "output", "allow_missing_videos", "micro_batch"):
        now.pop(name)
    model = runtime.newest_checkpoint(settings.model) or Path(settings.model)  # a run's folder moves on
    written = max((path.stat().st_mtime for path in model.glob("*.safetensors")), default=None)
    now["model"] = [str(model), written]  # and may be trained anew
    now = json.loads(json.dumps(now))  # tuples become lists
    held = any(Path(output).glob("predictions*.jsonl")) and record.exists()
    if held and (before := json.loads(record.read_text())) != now:
        changed = ", ".join(option(k) for k in now if before.get(k) != now[k])
        raise UserError(f"--output {output} holds predictions made with another {changed}; name another folder.")
    dist.barrier()
    if dist.get_rank() == 0:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(now, indent=2) + "\n")


def main(settings, device):
    samples = load_samples(settings)
    if settings.against and not read_predictions(settings.against):
        raise UserError(f"--against {settings.against}: holds no predictions; give the --output of another evaluation.")
    same_run(settings, settings.output)
    rows = evenly_spaced(len(samples), settings.limit)
    metrics = evaluate(lambda: runtime.load_model(settings.model, device), samples, rows, settings.tasks, settings,
                       settings.output, settings.samples)
    say(f"{settings.output}\n{format_metrics(metrics)}")
    for name in ("rows", "without a span", "reversed spans", "unreadable"):
        if metrics[name]:
            say(f"  {name}: {metrics[name]}")
    if settings.against:
        print_comparison(settings, settings.against)


if __name__ == "__main__":
    runtime.run(main, runtime.parse_settings(EvalSettings, __doc__))
