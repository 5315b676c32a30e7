"""What a model can do: R1@m and mIoU on grounding, accuracy on VC, AR and VD; its own command line.

    python evaluate.py --model CHECKPOINT --annotations FILE --videos FOLDER --output FOLDER [--against OTHER_OUTPUT]
    python evaluate.py --model CHECKPOINT --video FILE --query SENTENCE [SENTENCE ...]

Greedy decoding, every part of it explicit: nothing is inherited from a checkpoint's generation config. How the videos
are sampled and how answers are laid out is read from the checkpoint's run.json, unless an option says otherwise.

Each row's prediction is appended to a jsonl file, so an interrupted evaluation goes on where it stopped. Under torchrun
each of W ranks takes every W-th (row, task). A row whose video cannot be read scores 0 and is named. Grounding is asked
about every row, an inversion about those rows that it suits.
"""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import grpo
import rewards
from engine.model.loading import find_model, fingerprint, load_model
from engine.model.prompts import completion_texts
from engine.program.files import strict_json, write_text
from engine.program.launch import launch
from engine.program.progress import progress
from engine.program.ranks import gather, say
from engine.program.settings import UserError, flag, parse_settings
from engine.run.comparison import format_comparison, paired_bootstrap
from engine.run.predictions import (
    check_current,
    check_output,
    format_metrics,
    identity,
    inversion_values,
    key_of,
    percentages,
    read_predictions,
    rows_after_the_end,
)
from engine.run.start import from_start
from engine.video import read_video
from engine.video.clips import Clips, Item, frames_in_words, read_ahead
from engine.words.annotations import WINDOWS
from engine.words.text import normalize_query

THRESHOLDS = (0.3, 0.5, 0.7)

# ------------------------------------------------------------------------------------------------ metrics


def grounding_metrics(ious) -> dict[str, float]:
    """IoUs in [0, 1], one a row, 0 for an answer that holds no span -> R1@m (IoU >= m) and mIoU, in percent."""
    ious = np.asarray(ious, dtype=float)
    if not ious.size:
        raise ValueError("no row to measure: the list of IoUs is empty.")
    metrics = {f"R1@{m}": 100 * float((ious >= m).mean()) for m in THRESHOLDS}
    return metrics | {"mIoU": 100 * float(ious.mean())}


def row_values(prediction: dict, grounding: rewards.Grounding = rewards.IOU) -> dict[str, float]:
    """One prediction -> its contribution to each metric that is a mean over rows; in percent, but for logged counts."""
    task, parts = prediction["task"], prediction["parts"]
    if task != "tvg":
        return inversion_values(task, parts)
    return grounding_metrics([parts["iou"]]) | {"format": 100 * parts["format"]} | grounding.metrics(parts)


def summarize(predictions: list[dict], grounding: rewards.Grounding = rewards.IOU) -> dict:
    """All predictions -> metrics in percent, "VD verbs" (distinct verbs of an answer), and counts of rows."""
    counts = Counter(p["task"] for p in predictions)
    tasks = [task for task in dict.fromkeys((*rewards.TASKS, *sorted(counts))) if counts[task]]
    values = {}
    for p in sorted(predictions, key=lambda p: tasks.index(p["task"])):  # fixes the order of the columns
        for name, value in row_values(p, grounding).items():
            values.setdefault(name, []).append(value)
    metrics = {name: float(np.mean(of_rows)) for name, of_rows in values.items()}
    metrics["rows"] = {task: counts[task] for task in tasks}
    metrics["without a span"] = sum(p["task"] == "tvg" and p["span"] is None for p in predictions)
    metrics["reversed spans"] = sum(p["span"] is not None and p["span"][0] > p["span"][1] for p in predictions)
    metrics["unreadable"] = sorted({p["error"] for p in predictions if p["error"]})
    metrics["start after their video"] = rows_after_the_end(predictions)
    return metrics


def compare_models(ours: list[dict], theirs: list[dict], grounding: rewards.Grounding = rewards.IOU,
                   draws: int = 10_000) -> dict[str, tuple]:
    """Predictions of the same rows by two models -> {metric: (ours, theirs, low, high)}; see `paired_bootstrap`."""
    return paired_bootstrap(ours, theirs, lambda prediction: row_values(prediction, grounding), draws)


# ------------------------------------------------------------------------------------------------ evaluation


@dataclass(frozen=True)
class EvalSettings(data.Settings):
    """The settings of an evaluation: those of data.Settings and these."""

    annotations: str = flag("data/charades_sta_test.txt", "held-out rows, in any of the formats training reads",
                            unless="video")
    videos: str = flag("data/videos", "folder of the video files", unless="video")
    windows: str = flag("best", "QVHighlights alone: each query is a row, whose best window counts; or each window; or "
                        "each query with a single one", choices=WINDOWS, unless="video")
    output: str = flag("runs/evaluation", "folder for predictions and metrics.json; rows already predicted are kept",
                       free=True, unless="video")
    tasks: tuple = flag(rewards.TASKS, "tvg, vc, ar, vd, MODULE.NAME", find=rewards.any_task, unless="video")
    samples: int = flag(0, "sample this many completions of each row at temperature 1 (their mean IoU is the row's "
                        "difficulty); 0: one, greedy", least=0, unless="video")
    limit: int = flag(0, "evaluate this many rows, evenly spaced over the file; 0: all", least=0, unless="video")
    against: str = flag("", "another evaluation's --output to print beside this one, with the difference's 95%% "
                        "bootstrap interval over videos", free=True, unless="video")
    video: str = flag("", "measure nothing, but look for each --query in this file", needs="query")
    query: tuple = flag((), "sentences to look for", needs="video")

    def check(self):
        super().check()
        for query in self.query:
            if not normalize_query(query):
                raise UserError(f"--query {query!r} says nothing; give a sentence.")


def evaluate(load, samples: list[data.Sample], rows: list[int], tasks: tuple, settings: data.Settings, output,
             completions: int = 0) -> dict:
    """Predict what the folder `output` does not hold yet, on all ranks together -> metrics (on every rank).

    `load()` gives (model, Processor) and is called only when a prediction is missing; `rows` are indices into
    `samples`. Each row has one greedy completion, or `completions` sampled ones. A row whose video could not be read is
    tried again.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    queries = [samples[row].query for row in rows]
    jobs = []
    for task in tasks:
        jobs += [(row, task) for row, suits in zip(rows, rewards.suitable(task, queries)) if suits]
    if not jobs:
        raise UserError(f"{settings.annotations}: none of its {len(rows)} queries suits --tasks {' '.join(tasks)} (an "
                        "inversion needs an English query with a verb, or what its `suits` asks for); add tvg.")
    own_jobs = set(jobs[rank::world])
    predictions = {key_of(p): p for p in read_predictions(output, samples)
                   if (p["row"], p["task"]) in own_jobs and not p["error"]}
    dist.barrier()  # nobody writes before everybody has read
    done = Counter((row, task) for row, task, _ in predictions)
    missing = [job for job in jobs[rank::world] if done[job] < max(1, completions)]
    if missing:
        model, processor = load()
        with open(output / f"predictions.{rank}.jsonl", "a", encoding="utf-8") as file:
            file.write("\n" if file.tell() else "")  # ends a line that an interruption cut off
            for prediction in predict(model, processor, samples, missing, settings, completions):
                line = strict_json(prediction)
                file.write(line + "\n")
                file.flush()
                predictions[key_of(prediction)] = json.loads(line)
    predictions = {key: p for of_rank in gather(predictions) for key, p in of_rank.items()}
    check_current(predictions.values(), samples, output)
    metrics = summarize([predictions[key] for key in sorted(predictions)], settings.grounding())
    if rank == 0:
        write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def predict(model, processor, samples, jobs, settings, completions):
    """For each of `jobs`, (row, task), yield its predictions: `completions` of them, or for 0 a greedy one."""
    size = settings.micro_batch
    batches = [[[job] for job in jobs[i:i + size]] for i in range(0, len(jobs), size)]  # a list of one candidate a job
    clips = Clips(samples, settings.clip_settings(), for_training=False)
    arriving = read_ahead(clips, batches, min(settings.workers, len(batches)))
    scoring = settings.scoring()
    block = scoring.grounding.format.blocks[-1]
    for items in progress(arriving, desc="evaluating", total=len(batches), disable=dist.get_rank() > 0, leave=False):
        for item, texts in zip(items, answer(model, processor, samples, items, settings, completions)):
            sample = samples[item.index]
            for number, text in enumerate(texts):
                yield {"row": item.index, "task": item.task, "sample": number, **identity(sample),
                       "video_end": item.clip and item.clip.end, "completion": text,
                       "span": rewards.parse_span(text, block) if item.task == "tvg" else None,
                       "parts": rewards.score(item.task, text, sample, scoring),
                       "error": item.failures[0] if item.failures else None}


def answer(model, processor, samples, items, settings, completions) -> list[list[str]]:
    """For each item its sampled completions, or for 0 one greedy one; "" where its video could not be read.

    Sampling is seeded by the batch's first row. So it is repeated exactly only with the same --micro-batch and number
    of processes, and without interruption.
    """
    G = max(1, completions)
    texts = [[""] * G for _ in items]
    readable = [n for n, item in enumerate(items) if item.clip]
    if readable:
        prompts = [data.build_prompt(model, processor, samples[items[n].index], items[n].task, items[n].clip, settings)
                   for n in readable]
        generator = torch.Generator(model.device).manual_seed(items[0].index)
        rollout = grpo.sample_group(model, prompts, G, settings.max_new_tokens, processor.eos, processor.banned,
                                    temperature=1.0 if completions else 0.0, generator=generator)
        of_prompts = completion_texts(processor.tokenizer, rollout)  # prompt by prompt, G of each
        for place, n in enumerate(readable):
            texts[n] = of_prompts[place * G:(place + 1) * G]
    return texts


def evenly_spaced(n: int, limit: int) -> list[int]:
    """Up to `limit` of the indices 0 .. n - 1 (all for 0), evenly spaced."""
    if limit == 0 or limit >= n:
        return list(range(n))
    return [i * n // limit for i in range(limit)]


def measure(model, processor, held_out, config, iteration, log):
    """Evaluate a model in training on held-out rows, the paper's tasks and its own (Figure 1, right), and log it."""
    output = Path(config.output) / f"eval-{iteration:06d}"
    if dist.get_rank() == 0:
        shutil.rmtree(output, ignore_errors=True)  # left over from an interrupted run, made with other weights
    dist.barrier()
    rows = evenly_spaced(len(held_out), config.eval_limit)
    settings = replace(config, micro_batch=max(4, config.micro_batch))  # eight would take more memory than training
    tasks = tuple(dict.fromkeys((*rewards.TASKS, *config.inversion_tasks)))
    metrics = evaluate(lambda: (model, processor), held_out, rows, tasks, settings, output)
    log.write(iteration, "eval", percentages(metrics))
    say(f"iteration {iteration}\n{format_metrics(metrics)}")


# ------------------------------------------------------------------------------------------------ the program


def search_video(settings: EvalSettings, device):
    """Print when each --query happens in --video, with the completion that says so, and the frames it rests on."""
    clip = read_video(settings.video, **settings.clip_settings())
    say(frames_in_words(clip, settings.video))
    model, processor = load_model(settings.model, device)
    block = settings.grounding().format.blocks[-1]
    for query in settings.query:
        sample = data.Sample(settings.video, normalize_query(query), 0.0, 0.0)
        [[text]] = answer(model, processor, [sample], [Item(0, "tvg", clip)], settings, completions=0)
        span = rewards.parse_span(text, block)
        when = f"{span[0]:g} to {span[1]:g} s" if span else "no span"
        say(f"\n{sample.query}: {when}\n{text}")


def main(settings: EvalSettings, device):
    if settings.video:
        return search_video(settings, device)
    samples = data.load_samples(settings)
    if settings.against and not read_predictions(settings.against):
        raise UserError(f"--against {settings.against}: holds no predictions; give the --output of another evaluation.")
    folder = find_model(settings.model)
    check_output(settings, fingerprint(folder))  # a run's --output may hold a newer checkpoint by now
    say(f"model: {folder}")
    rows = evenly_spaced(len(samples), settings.limit)
    metrics = evaluate(lambda: load_model(folder, device), samples, rows, settings.tasks, settings, settings.output,
                       settings.samples)
    say(f"done: predictions are in {settings.output}, which --against compares.\n{format_metrics(metrics)}")
    for name in ("rows", "without a span", "reversed spans", "unreadable", "start after their video"):
        if metrics[name]:
            say(f"  {name}: {metrics[name]}")
    if settings.against:
        ours = read_predictions(settings.output, samples)
        theirs = read_predictions(settings.against, samples)
        say(format_comparison(compare_models(ours, theirs, settings.grounding())))


if __name__ == "__main__":
    launch(main, parse_settings(EvalSettings, __doc__, inherit=from_start))
