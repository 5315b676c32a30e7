"""The memory and the time that a training run will need, from the model's config alone.

    python -m benchmarks.memory                                             # 3B on 8 GPUs of 40 GB
    python -m benchmarks.memory --model 7b --gpu-gb 80 [any option of invert4tvg.py]
    python -m benchmarks.memory --model 7b --offload-optimizer              # the paper's model on the paper's cards
    python -m benchmarks.memory --model 3b --world-size 1 --accumulation 8 --lora-rank 64 --gpu-gb 24
    python -m benchmarks.memory --seconds runs/acceptance/acceptance.json   # time by what was measured on your cards
    python -m benchmarks.memory --table                                     # 3B and 7B, ways to train them, cards
    python -m benchmarks.memory --validate                                  # the estimate against a real process

benchmarks/dry_run.py counts, by running the program's own functions on tensors without memory. A column shows a phase
at its highest point, "ever" each row at its own highest: the cache or the logits may be gone by then. LEFT_OUT names
what is not counted. GiB are 2**30 bytes of tensors.

"typical" has completions of --typical-tokens on average, from half to one and a half times that; "worst" has all of
them cut off at --max-new-tokens. The cache has room for --max-new-tokens in both. The prompt is the pixel budget's
visual tokens and --text-tokens. The rare video of more than 224 s exceeds that budget, and this estimate
(engine.video.frames.fit_size).

Seconds are a lower bound: of each part the operations over the card's rate of bfloat16 products, or the bytes that they
read over its bandwidth, whichever takes longer (benchmarks/cards.py).
"""

import ctypes
import dataclasses
import functools
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import invert4tvg
from benchmarks import cards, models
from benchmarks.dry_run import OUTSIDE, PHASES, ROWS, GiB, Work, cpu_attention, estimate, make_model, plan
from benchmarks.meter import Meter, measured_iterations
from engine.model.prompts import MERGE
from engine.program.launch import setup_distributed
from engine.program.settings import UserError, flag, parse_settings
from engine.words.annotations import load_annotations
from engine.words.samples import clamp_to_videos

LEFT_OUT = """Left out of the GPU: what the caching allocator reserves but cannot use, workspaces of recorded graphs,
and a prefix sum that masked_scatter makes early in a pass, 8 bytes a number of the embeddings. Left out of the host:
Python and its libraries (some GiB a process), clips on their way from the workers, and a model's files while read or
written; all processes of a node share what they read."""
WAYS = {"full": {}, "`--offload-optimizer`": {"offload_optimizer": True}, "`--lora-rank 64`": {"lora_rank": 64}}


@dataclass(frozen=True)
class Settings(invert4tvg.Config):
    """A training run's settings and what is to be known of the machine and the data."""

    model: str = flag("3b", "3b, 7b (or their hub ids): the published shapes; else a checkpoint folder")
    world_size: int = flag(8, "GPUs", above=0)
    gpu_gb: float = flag(40.0, "a card's memory, GiB", above=0)
    typical_tokens: int = flag(200, "mean length of a typical group's completions", above=0)
    text_tokens: int = flag(120, "a prompt's tokens that are not the video's", above=0)
    rows: int = flag(12404, "training samples, where --annotations does not exist; Charades-STA's", above=0)
    seconds: str = flag("", "acceptance.json of benchmarks.accept: the rates of your cards, in place of data sheets")
    table: bool = flag(False, "print the tables of benchmarks/README.md")
    validate: bool = flag(False, "run a small model on this CPU, in float32, and compare")


# ------------------------------------------------------------------------------------------------ the report


@functools.cache
def need_of(settings, worst):
    """-> dry_run.Need of a run whose iterations are typical, or the worst; each is counted once."""
    return estimate(make_model(settings), settings, plan(settings, worst))


def print_budget(title, need, settings):
    """Print a table, GiB, a column a phase -> whether the largest fits."""
    peaks = need.peaks
    totals = {name: sum(rows.values()) + OUTSIDE for name, rows in peaks.items()}
    print(f"\n{title}\n{'GiB of the GPU':<28}" + "".join(f"{name:>12}" for name in peaks) + f"{'ever':>12}")
    for row in ROWS:
        if need.highest[row]:
            sizes = [rows[row] for rows in peaks.values()] + [need.highest[row]]
            print(f"{row:<28}" + "".join(f"{size / GiB:12.2f}" for size in sizes))
    print(f"{'PyTorch tensors together':<28}" + "".join(f"{(x - OUTSIDE) / GiB:12.2f}" for x in totals.values()))
    print(f"{'CUDA, NCCL, hidden':<28}" + f"{OUTSIDE / GiB:12.2f}" * len(peaks))
    print(f"{'total':<28}" + "".join(f"{x / GiB:12.2f}" for x in totals.values()))
    phase, total = need.most()
    left = settings.gpu_gb - total / GiB
    verdict = f"it fits, with {left:.1f} to spare." if left >= 0 else f"IT DOES NOT FIT, {-left:.1f} are missing."
    print(f"The {phase} phase needs most, {total / GiB:.1f} of {settings.gpu_gb:g} GiB: {verdict}")
    print(f"{'GiB of the host, pinned':<28}{'a process':>12}{f'all {settings.world_size}':>12}")
    for what, size in (*need.host.items(), ("together", sum(need.host.values()))):
        print(f"{what:<28}{size / GiB:12.2f}{settings.world_size * size / GiB:12.2f}")
    return left >= 0


def print_measures(settings, worst):
    """Print what each change of settings would leave of the peak."""
    changes = [{"kl_coef": 0.0}, {"max_new_tokens": settings.max_new_tokens // 2}, {"micro_batch": 1},
               {"max_pixels": settings.max_pixels // 2}, {"train_vision": False}, {"gradient_checkpointing": True},
               {"world_size": 2 * settings.world_size}, {"offload_optimizer": True}]
    if not settings.lora_rank and not settings.train_vision:
        changes.append({"lora_rank": 64})
    needs = []
    for change in changes:
        changed = dataclasses.replace(settings, **change)
        if changed != settings:
            needs.append((need_of(changed, worst).most()[1], *change.popitem()))
    for need, name, value in sorted(needs):
        print(f"  with {name} = {value}: {need / GiB:.1f} GiB" + (", fits" if need <= settings.gpu_gb * GiB else ""))


def print_run(settings):
    """Print iterations and tokens of the whole run."""
    rows = settings.rows
    source = "--rows"
    if Path(settings.annotations).exists():
        samples = load_annotations(settings.annotations, settings.videos, settings.windows)
        rows = len(clamp_to_videos(samples)[0])
        source = settings.annotations
    prompts = settings.micro_batch * settings.accumulation * settings.world_size
    iterations = settings.iterations or math.ceil(settings.epochs * rows / prompts)
    million = iterations * prompts / 1e6
    print(f"\n{rows:,} samples ({source}), {prompts} prompts an iteration: {iterations:,} iterations")
    for title, worst in (("typical", False), ("worst", True)):
        work = plan(settings, worst)
        read = work.prompt_tokens  # tokens of a prompt and of its completions
        written = sum(work.lengths) // settings.micro_batch
        print(f"  {title}: {prompts * read:,} prompt and {prompts * written:,} completion tokens an iteration; "
              f"{million * read:,.0f} and {million * written:,.0f} million in all")
    print_time(settings, iterations)


def ways_that_fit(model, world_size, gib, **options):
    """Yield (the options as a user writes them, Settings) of those WAYS whose worst case fits cards of `gib` GiB."""
    for title, change in WAYS.items():
        one = Settings(model=model, world_size=world_size, accumulation=max(1, 8 // world_size), **options, **change)
        if need_of(one, worst=True).most()[1] < gib * GiB:
            yield "" if title == "full" else title.strip("`"), one


def print_time(settings, iterations):
    """Print how long an iteration and a run take at least, on each card that is known or on the measured one."""
    work = plan(settings, worst=False)
    need = need_of(settings, worst=False)
    known = [cards.measured(settings.seconds)] if settings.seconds else cards.CARDS
    print("\nSeconds of a typical iteration at the least, and hours of the run; in brackets at "
          f"{cards.REACHED:.0%} of what a card can do, which is a goal and not measured"
          if not settings.seconds else f"\nSeconds of a typical iteration by the rates in {settings.seconds}")
    for card in known:
        parts = cards.seconds(need, work, card, settings)
        total = sum(parts.values())
        hours = total * iterations / 3600
        brackets = "" if settings.seconds else f" ({total / cards.REACHED:.1f} s, {hours / cards.REACHED:.1f} h)"
        print(f"  {card.name:<12}" + ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
              + f": {total:.2f} s, {hours:.1f} h{brackets}")


def report(settings):
    if settings.seconds:
        cards.measured(settings.seconds)  # a mistake should not wait
    model = make_model(settings)
    everything = sum(p.numel() for p in model.parameters())
    vision = sum(p.numel() for p in model.model.visual.parameters())
    work = plan(settings, worst=False)
    print(f"{settings.model}: {everything:,} parameters, {vision:,} of them vision tower and merger, "
          f"{'trained' if settings.train_vision else 'frozen'}; bfloat16"
          f"{f'; adapters of rank {settings.lora_rank}' if settings.lora_rank else ''}\n"
          f"{settings.world_size} x {settings.gpu_gb:g} GiB; prompts of {work.prompt_tokens:,} tokens: a GPU samples "
          f"{settings.micro_batch * settings.accumulation} together and trains on {settings.micro_batch} at a time, "
          f"{len(work.lengths) // settings.micro_batch} completions each")
    for name, worst in (("typical", False), ("worst", True)):
        work = plan(settings, worst)
        mean = sum(work.lengths) / len(work.lengths)
        title = f"{name}: {mean:,.0f} tokens a completion, {max(work.lengths):,} the longest"
        if not print_budget(title, need_of(settings, worst), settings):
            print_measures(settings, worst)
    print(f"\n{LEFT_OUT}")
    print_run(settings)


def print_table(settings):
    """Print both published models, with eight prompts an iteration on eight cards or on one, trained in WAYS.

    Then the hours of the run on eight of each card, in the first way that fits it.
    """
    print("| model | GPUs | training | typical | worst | host | fits a card of |\n|---|---|---|---|---|---|---|")
    for model in ("3b", "7b"):
        for world_size in (8, 1):
            for title, change in WAYS.items():
                one = dataclasses.replace(settings, model=model, world_size=world_size, accumulation=8 // world_size,
                                          **change)
                typical, worst = (need_of(one, worst) for worst in (False, True))
                sizes = [need.most()[1] / GiB for need in (typical, worst)]
                host = max(sum(need.host.values()) for need in (typical, worst)) * world_size / GiB
                fits = ", ".join(f"{gb} GB" for gb in (24, 40, 80) if max(sizes) < gb) or "none of these"
                print(f"| {model.upper()} | {world_size} | {title} | {sizes[0]:.1f} | {sizes[1]:.1f} | {host:.0f} | "
                      f"{fits} |", flush=True)
    print("\n| model | eight cards | way | " + " | ".join(cards.PARTS) + " | s an iteration | hours | hours at "
          f"{cards.REACHED:.0%} |\n|---|---|---|" + "---|" * (len(cards.PARTS) + 3))
    for model in ("3b", "7b"):
        for card in cards.CARDS:
            title, one = next(ways_that_fit(model, 8, card.gib), ("none fits", None))
            if one is None:
                print(f"| {model.upper()} | {card.name} | {title} |" + " |" * (len(cards.PARTS) + 3))
                continue
            work = plan(one, worst=False)
            parts = cards.seconds(need_of(one, worst=False), work, card, one)
            hours = sum(parts.values()) * math.ceil(one.epochs * one.rows / 8) / 3600
            print(f"| {model.upper()} | {card.name} | {title and f'`{title}`' or 'full'} | "
                  + " | ".join(f"{parts.get(part, 0):.2f}" for part in cards.PARTS)
                  + f" | {sum(parts.values()):.1f} | {hours:.1f} | {hours / cards.REACHED:.1f} |", flush=True)


# ------------------------------------------------------------------------------------------------ a real process


def validate():
    """Take three iterations with a real model on the CPU and compare the last one's peaks with the estimate's.

    A peak is resident memory above the process before the models. The 5m model goes first: its surplus of some 30 MiB
    is the code that it loads.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on the CPU, whatever else this machine has
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    device = setup_distributed()
    meter = Meter(device)
    print(f"{'MiB':<14}{'estimated':>12}{'measured':>12}{'ratio':>12}")
    for size, cell in (("5m", models.Cell(256, 24)), ("60m", models.Cell(128, 16)), ("60m", models.Cell(2048, 64)),
                       ("60m", models.Cell(1024, 256))):
        with tempfile.TemporaryDirectory() as folder:
            models.make_checkpoint(Path(folder), size, device)
            settings = Settings(model=folder, max_new_tokens=cell.completion)
            meter.rest()
            prompt, measured = measured_iterations(settings, cell, meter, device)
            peak = measured["MiB"]
            grid = tuple(prompt.grid[0].tolist())
            text = len(prompt.ids) - math.prod(grid) // MERGE**2
            work = Work(grid, text, [cell.completion] * cell.group, cell.completion)
            settings = dataclasses.replace(settings, world_size=1)
            peaks = estimate(make_model(settings, torch.float32), settings, work, cpu_attention).peaks
        print(f"{size} {cell.prompt:,} / {cell.completion}")
        for name in PHASES:
            estimated = sum(peaks[name].values()) / 2**20
            print(f"  {name:<12}{estimated:12.0f}{peak[name]:12.0f}{estimated / peak[name]:12.3f}")


if __name__ == "__main__":
    given = parse_settings(Settings, __doc__)
    try:
        if given.validate:
            validate()
        elif given.table:
            print_table(given)
        else:
            report(given)
    except (UserError, ValueError) as error:
        sys.exit(f"memory.py: {error}")
