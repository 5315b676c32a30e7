"""Whether a machine can train: one command before the first run on new GPUs, in at most nine minutes.

    python -m benchmarks.accept                   # on all GPUs; downloads nothing
    python -m benchmarks.accept --device cpu      # the same code at tiny size, which proves nothing about a GPU

Eleven stages go from the machine itself to the whole program; `STAGES` lists them with their deadlines. Each runs in a
process of its own, and prints a line for each check as soon as it is made. Whole runs have one rank a card over NCCL;
with a single card two ranks share it and speak gloo. A stage that exceeds its deadline is killed, and its log says
where it stood. A failure in one of the early stages ends the run, because later ones would fail by it. --output
receives acceptance.json, table.md, which can be pasted as it is, and a log for each stage. The last line says which
command is safe to start on these cards.

A check with a bound passes or fails, and the table says where its bound comes from. A check without one is reported.
The goals for speed (GOAL) decide nothing: they are what a well-used GPU should reach.
"""

import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from transformers import Qwen2_5_VLForConditionalGeneration

import evaluate
import grpo
import invert4tvg
from benchmarks import cards, dry_run, memory, models
from benchmarks.meter import Meter, measured_iterations
from benchmarks.ranks import end, finish, start
from benchmarks.stages import VERDICTS, Check, Stage, at_most, cell_text, equal, run_stage, table
from demo import make_demo
from engine.model import decoding, loading
from engine.model.attention import attend_to_allowed, install_attention
from engine.model.optimizer import MasterAdamW, sharded_adamw
from engine.model.parallel import data_parallel
from engine.program.launch import launch, setup_distributed
from engine.program.ranks import gather
from engine.program.settings import command_line
from engine.run.predictions import read_predictions

BUDGET = 540  # seconds in all
GAP = {torch.bfloat16: 0.05, torch.float32: 1e-4}  # of a log-probability in sampling and in the packed pass
GAP_SOURCE = "five times the largest gap of a 5M model in bfloat16 on a CPU (0.0098); 1e-4 in float32"
GOAL = f"goal {cards.REACHED:.0%} on an H100"  # of the bandwidth, of the rate of matrix products


FREE = "GPU memory free, GiB"


class Place(NamedTuple):
    """Where a stage runs."""

    device: torch.device
    folder: Path
    cards: int = 0
    gib: float = 0.0  # free on the fullest card
    compiles: bool = True  # False where the stage that compiles failed

    @property
    def small(self):
        return self.device.type == "cpu"

    @property
    def ranks(self):
        """Of whole runs: one a card, but two where there is one card or none."""
        return max(2, self.cards)

    def checkpoint(self):
        """-> the folder of a random model of 5M parameters, made by the first stage that needs it."""
        folder = self.folder / "5m"
        if not (folder / "preprocessor_config.json").exists():  # written last
            folder.mkdir(exist_ok=True)
            models.make_checkpoint(folder, "5m", self.device)
        return folder

    def data(self):
        """-> the folder of the demo's data."""
        make_demo.main([str(self.folder / "demo"), "--videos", *(("8", "2", "2") if self.small else ("96", "8", "8"))])
        return self.folder / "demo"


# ------------------------------------------------------------------------------------------------ the machine


def environment(place):
    for package in ("torch", "transformers", "av", "numpy"):
        yield Check(package, version(package))
    yield Check("device", "CPU" if place.small else torch.cuda.get_device_name())
    if not place.small:
        yield from gpus(place)
    yield Check("cores", len(os.sched_getaffinity(0)))
    memory_free = Path("/proc/meminfo").read_text(encoding="utf-8").split("MemAvailable:")[1].split()[0]
    yield Check("host memory available, GiB", round(int(memory_free) / 2**20, 1))
    # Without these three sampling goes on uncompiled, with a warning (decoding.usable).
    yield Check("C compiler", shutil.which("gcc") or shutil.which("cc") or "missing: no compilation")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    yield Check("Python.h", "there" if header.exists() else "missing: no compilation")
    yield Check("Triton", "there" if find_spec("triton") else "missing: no compilation")
    if Path("/dev/shm").exists():
        shared = os.statvfs("/dev/shm")
        yield Check("/dev/shm free, MB", round(shared.f_bavail * shared.f_frsize / 1e6), source="NCCL's ranks of one "
                    "machine meet there; where it is small, start Docker with --ipc=host" if place.cards > 1 else "")


def gpus(place):
    """What torch and the driver say of the cards."""
    each = range(place.cards)
    yield Check("cards", "; ".join(sorted({torch.cuda.get_device_name(i) for i in each})), f"{place.cards} of one kind",
                len({torch.cuda.get_device_name(i) for i in each}) == 1, "ranks wait for the slowest")
    yield Check("CUDA of torch", torch.version.cuda)
    yield Check("driver", smi("--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0])
    free, total = zip(*(torch.cuda.mem_get_info(i) for i in each))
    yield Check(FREE, round(min(free) / 2**30, 1), source=f"of {min(total) / 2**30:.1f}; below 90% another program "
                "spoils every measurement")
    yield Check("bfloat16", torch.cuda.is_bf16_supported(), "True", torch.cuda.is_bf16_supported(),
                "models are loaded in bfloat16")
    yield Check("compute capability", ".".join(map(str, torch.cuda.get_device_capability())))
    yield Check("cuDNN", torch.backends.cudnn.version())
    links = [row.split()[1:1 + place.cards] for row in smi("topo", "-m").split("\n") if row.startswith("GPU")]
    yield Check("topology", ", ".join(sorted({link for row in links for link in row if link != "X"})) or "one card")


def smi(*words):
    """What nvidia-smi prints; "unknown" where it cannot be asked."""
    try:
        return subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def one_process(place):
    """NCCL (gloo on a CPU) with one rank: its store, collectives, DDP and the sharded optimiser."""
    device = setup_distributed()
    ones = torch.ones(3, device=device)
    dist.all_reduce(ones)
    dist.barrier()
    gathered = [None]
    dist.all_gather_object(gathered, "here")
    yield equal("all_reduce, all_gather_object", [ones.sum().item(), *gathered], [3.0, "here"], "one rank adds nothing")
    weights = []
    for offload in (False, True):
        torch.manual_seed(0)
        linear = torch.nn.Linear(64, 64).to(device, torch.float32 if place.small else torch.bfloat16)
        optimizer = sharded_adamw(linear, invert4tvg.Config(offload_optimizer=offload, lr=1e-2))
        parallel = data_parallel(linear)
        for _ in range(2):
            parallel(torch.ones(4, 64, device=device, dtype=linear.weight.dtype)).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        weights.append(linear.weight.detach().clone())
    yield equal("weights after two steps are finite", bool(weights[0].isfinite().all()), True, "nothing overflows")
    yield equal("optimiser in host memory gives the same bits", torch.equal(*weights), True, "the same arithmetic")
    dist.destroy_process_group()


def kernels(place):
    """The attention kernels that the shapes of a 3B model get, and their error."""
    dtype = torch.float32 if place.small else torch.bfloat16
    noise = partial(torch.randn, device=place.device, dtype=dtype)
    heads, kv_heads, D = 16, 2, 128
    P, C, N = (64, 8, 4) if place.small else (3704, 200, 8)
    query, key = noise(N, kv_heads, 8, D), noise(N, kv_heads, P, D)
    exact = query.double() @ key.double().mT
    error = (decoding.attention_scores(query, key).double() - exact).abs().max().item()
    yield at_most("decoding's scores, error", error, 1e-3,
                  "128 products summed in float32; in bfloat16 it would be above 0.1")
    allowed = torch.ones(C, P + C, dtype=torch.bool, device=place.device).tril(P)
    q, k, v = noise(N, heads, C, D), noise(N, kv_heads, P + C, D), noise(N, kv_heads, P + C, D)
    found = attend_to_allowed(q, k, v, allowed, D**-0.5).double()
    weights = (q.double() @ k.double().repeat_interleave(heads // kv_heads, 1).mT) * D**-0.5
    weights = weights.masked_fill(~allowed, -math.inf).softmax(-1)
    expected = weights @ v.double().repeat_interleave(heads // kv_heads, 1)
    yield at_most("packed attention, error", (found - expected).abs().max().item(), 0.02 if not place.small else 1e-5,
                  "values of up to 4 in bfloat16 have steps of 1/64; float32: rounding")
    install_attention(loading.load_model(place.checkpoint(), place.device)[0])  # switches cuDNN's attention off
    for name, (q, k, options) in {
        "tower, whole frames": (noise(8, 16, 448, 80), noise(8, 16, 448, 80), {}),
        "tower, windows": (noise(112, 16, 64, 80), noise(112, 16, 64, 80),
                           {"attn_mask": torch.ones(112, 1, 1, 64, dtype=torch.bool, device=place.device)}),
        "prefill": (noise(1, heads, P, D), noise(1, kv_heads, P, D), {"is_causal": True, "enable_gqa": True}),
        "completions": (noise(N, kv_heads, 8 * C, D), noise(N, kv_heads, P + C, D),
                        {"attn_mask": allowed.repeat(8, 1)}),
    }.items():
        choice = torch._fused_sdp_choice(q, k, k, **options)
        kernel = ("math", "flash", "memory-efficient", "cuDNN")[choice]
        yield Check(f"kernel, {name}", kernel, "" if place.small else "neither math nor cuDNN",
                    None if place.small else kernel in ("flash", "memory-efficient"),
                    "" if place.small else "math holds the whole (queries, keys) matrix; cuDNN plans each new shape")


# ------------------------------------------------------------------------------------------------ the tiny model


class Tiny(NamedTuple):
    """The 5M model with prompts of other lengths."""

    model: torch.nn.Module
    processor: loading.Processor
    prompts: list

    @classmethod
    def at(cls, place):
        model, processor = loading.load_model(place.checkpoint(), place.device)
        model.model.visual.requires_grad_(False)
        return cls(model, processor, [make_prompt(model, processor, tokens) for tokens in (200, 264)])

    def sample(self, B=2, temperature=1.0, tokens=24, seed=0):
        """-> Rollout of B prompts, four completions of each, none of which ends early."""
        generator = torch.Generator(self.model.device).manual_seed(seed)
        return grpo.sample_group(self.model, self.prompts[:B], 4, tokens, self.processor.eos[:0],
                                 self.processor.banned, temperature, generator)

    def logps(self, rollout, B=2):
        return grpo.group_logps(self.model, self.prompts[:B], rollout.ids, rollout.mask, self.processor.banned)[0]

    def kinds(self):
        """-> rollouts of one prompt, of two, and of two greedily."""
        return [self.sample(1), self.sample(2), self.sample(2, temperature=0.0)]

    def gap(self, rollouts):
        with torch.no_grad():
            return max((self.logps(r, len(r.ids) // 4) - r.logps).abs().max().item() for r in rollouts)


def make_prompt(model, processor, tokens):
    return models.make_prompt(model, processor, *models.make_video(processor.tokenizer, tokens))


@contextmanager
def uncompiled(graph):
    """Sampling on a GPU without compilation, with or without a recorded graph; on a CPU it has neither."""
    patches = [mock.patch.object(decoding, "compiled_layer", lambda: decoding.run_layer)]
    if not graph:
        patches.append(mock.patch.object(
            decoding, "record_graph", lambda forward, layer, inputs: partial(forward, layer)))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def gap_check(tiny, rollouts):
    return at_most("sampling against the packed pass, largest gap", tiny.gap(rollouts), GAP[tiny.model.dtype],
                   GAP_SOURCE)


def eager(place):
    """Tower, sampling, packed pass, backward pass and a step, with neither compilation nor graph."""
    tiny = Tiny.at(place)
    with uncompiled(graph=False):
        rollouts = tiny.kinds()
        yield gap_check(tiny, rollouts)
        decoder = decoding.Decoder(tiny.model, tiny.prompts, 4, 3)
        token = torch.zeros(8, dtype=torch.long, device=place.device)
        with torch.no_grad(), no_synchronisation(place):
            decoding.advance(tiny.model, decoder.caches, decoding.run_layer, token, decoder.last_position + 1)
        yield Check("a decoding step waits for nothing", True, "" if place.small else "True",
                    None if place.small else True, "" if place.small else "a graph cannot hold a synchronisation")
    optimizer = MasterAdamW([p for p in tiny.model.parameters() if p.requires_grad], lr=1e-3)
    before = tiny.model.lm_head.weight.detach().clone()
    (-tiny.logps(rollouts[1]).mean()).backward()
    gradients = [p.grad for p in tiny.model.parameters() if p.grad is not None]
    yield equal("gradients are finite", all(bool(g.isfinite().all()) for g in gradients), True, "nothing overflows")
    optimizer.step()
    moved = not torch.equal(before, tiny.model.lm_head.weight)
    yield equal("a step moves the weights", moved, True, "the gradient is not zero")


@contextmanager
def no_synchronisation(place):
    """On CUDA an operation that makes the host wait raises."""
    if not place.small:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if not place.small:
            torch.cuda.set_sync_debug_mode("default")


def graphs(place):
    """The same tokens from a recorded graph, and no memory that grows with recordings."""
    tiny = Tiny.at(place)
    with uncompiled(graph=False):
        expected = [r.ids.tolist() for r in tiny.kinds()]
    with uncompiled(graph=True):
        yield equal("the graph's tokens are those without it",
                    [r.ids.tolist() for r in tiny.kinds()] == expected, True, "the same kernels, the same noise")
        reserved = []
        for k in range(3 if place.small else 20):
            tiny.sample(tokens=10 + k)
            reserved.append(0 if place.small else torch.cuda.memory_reserved() / 2**20)
    yield at_most("memory that recordings keep, MiB", reserved[-1] - reserved[2], 64,
                  "one graph's pool; what grew at each of the last 17 recordings would be more")


def fresh_shapes(place):
    """What the first pass of a new shape costs beside the second, forward and backward."""
    tiny = Tiny.at(place)
    surplus = {False: [], True: []}
    for cudnn in (False,) if place.small else (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for k in range(2 if place.small else 10):
            fresh = tiny._replace(prompts=[make_prompt(tiny.model, tiny.processor, 300 + 8 * k + 4 * cudnn)])
            with uncompiled(graph=False):
                rollout = fresh.sample(1, tokens=3 + k)
            taken = []
            for _ in range(2):
                began = time.perf_counter()
                fresh.logps(rollout, 1).sum().backward()
                if not place.small:
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - began)
            surplus[cudnn].append(taken[0] - taken[1])
    median = 1e3 * statistics.median(surplus[False])
    if place.small:
        yield Check("first pass of a new shape, ms more than the second", median)
        return
    yield at_most("first pass of a new shape, ms more than the second", median, 50,
                  "cuDNN's planning takes 400 to 550 (FunASR issue 3704); without it kernels are chosen at once")
    yield Check("the same with cuDNN's attention", 1e3 * statistics.median(surplus[True]))


def compiled(place):
    """Sampling as runs do it; all six layers share what is compiled once."""
    tiny = Tiny.at(place)
    with mock.patch.object(decoding, "run_layer", on_a_cpu_too(place)):
        began = time.process_time()
        counts = [compilations(partial(tiny.sample, 1, tokens=8 + 5 * k)) for k in range(12)]
        seconds = time.process_time() - began
        yield at_most("compilations in 12 iterations of one prompt", sum(counts), 2, "one layer serves all; the first "
                      "version may be bound to tensors of the first layer")
        yield at_most("compilations in the last 10 of them", sum(counts[2:]), 0, "sizes are symbols")
        yield gap_check(tiny, tiny.kinds())
        yield Check("CPU seconds of sampling with its compilations", seconds)


def on_a_cpu_too(place):
    """-> what stands for `run_layer` on a CPU, which by itself compiles nothing."""
    plain = decoding.run_layer
    return torch.compile(plain, backend="eager", dynamic=True) if place.small else plain


def compilations(function):
    """-> how many graphs were compiled while function() ran"""
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    function()
    return stats["unique_graphs"] - before


# ------------------------------------------------------------------------------------------------ whole runs


def run(place, config, ranks=None):
    """A whole run of invert4tvg.py -> its log."""
    finish(start(ranks or place.ranks, place.cards, launch, invert4tvg.train, config))
    return log_of(config)


def toy(place, name, **options):
    """-> the Config of a run on the demo's data: supervised where no option says otherwise."""
    data = place.data()
    settings = {
        "model": str(data / "model"), "videos": str(data / "videos"), "output": str(place.folder / name),
        "min_frame_pixels": 784, "max_frame_pixels": 784, "max_new_tokens": 24, "workers": 2, "micro_batch": 1,
        "gradient_checkpointing": not place.small}
    if "annotations" not in options:
        settings |= {"demonstrations": str(data / "warmup-1.jsonl"), "lr": 1e-3}
    shutil.rmtree(place.folder / name, ignore_errors=True)
    return invert4tvg.Config(**settings | options)


def log_of(config):
    lines = Path(config.output, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def alike(what, ours, theirs, bound, source):
    """-> a Check of the largest relative difference between two logs, of their losses and gradients' norms"""
    pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) for name in ("nll", "grad_norm")]
    return at_most(f"{what}, relative difference", max(abs(a - b) / max(abs(b), 1e-8) for a, b in pairs), bound, source)


def resumed(place):
    """A run on all cards that is killed without warning and goes on, beside one that is left alone."""
    options = {"iterations": 4, "save_every": 2, "accumulation": 2, "keep": 9}
    whole = run(place, toy(place, "whole", **options))
    killed = toy(place, "killed", **options)
    begun = start(place.ranks, place.cards, launch, invert4tvg.train, killed)
    while begun[0][0].is_alive() and not Path(killed.output, "checkpoint-000002", "run.json").exists():
        time.sleep(0.01)
    end(begun)
    yield alike("a run that was killed on all ranks, and one that was not", run(place, killed), whole,
                1e-6 if place.small else 0.02, "a CPU repeats itself; on a GPU sums of bfloat16 come in any order")


def loop(place):
    """The demo through the program itself, on one card: a few supervised iterations, then GRPO."""
    warm = toy(place, "warm", iterations=3 if place.small else 40, micro_batch=4)
    run(place, warm, ranks=1)
    grounded = toy(place, "grpo", annotations=str(place.data() / "train.txt"), model=warm.output, lr=3e-4,
                   iterations=3 if place.small else 20, micro_batch=4)
    log = run(place, grounded, ranks=1)
    finite = all(math.isfinite(value) for row in log for value in row.values() if isinstance(value, float))
    yield equal("every logged number is finite", finite, True, "nothing overflows")
    yield at_most("KL of the first iteration", log[0]["kl"], 1e-3, "policy and reference are the same weights")
    yield at_most("gap of sampling and training, mean", max(row["sampler_gap_mean"] for row in log),
                  GAP[torch.float32 if place.small else torch.bfloat16], GAP_SOURCE)
    seconds = [row["seconds"] for row in log]
    typical = statistics.median(seconds[3:] or seconds)
    yield Check("seconds an iteration", typical)
    if not place.small:
        yield at_most("slowest iteration after the third, of the typical one", max(seconds[3:]) / typical, 3,
                      "late compilations or plans for new shapes would take longer")


def all_cards(place):
    """One rank a card: the same losses as in one process, the shared reference, both optimisers, an evaluation."""
    yield Check("ranks", place.ranks)
    bound = 1e-4 if place.small else 0.02
    ours = toy(place, "all", iterations=3, accumulation=2)
    log = run(place, ours)
    alone = run(place, toy(place, "alone", iterations=3, accumulation=2 * place.ranks), ranks=1)
    yield alike("supervised: all ranks beside one", log, alone, bound,
                "the same samples; sums in another order, on a GPU in bfloat16")
    yield alike("supervised: the optimiser in host memory beside the device's",
                run(place, toy(place, "offloaded", iterations=3, accumulation=2, offload_optimizer=True)), log, bound,
                "the same arithmetic; on a GPU sums of bfloat16 come in any order")
    grounded = toy(place, "shared", iterations=2, annotations=str(place.data() / "train.txt"), lr=3e-4)
    yield at_most("GRPO: first KL with the reference shared out", run(place, grounded)[0]["kl"], 1e-3,
                  "policy and reference are the same weights")
    rows = 2 * place.ranks + 1
    settings = evaluate.EvalSettings(model=ours.output, annotations=str(place.data() / "train.txt"), limit=rows,
                                     videos=ours.videos, output=str(place.folder / "evaluation"), tasks=("tvg",),
                                     max_new_tokens=24, min_frame_pixels=784, max_frame_pixels=784, workers=1)
    shutil.rmtree(settings.output, ignore_errors=True)
    finish(start(place.ranks, place.cards, launch, evaluate.main, settings))
    answered = [p["row"] for p in read_predictions(settings.output) if not p["error"]]
    yield equal("evaluation: rows answered, and answered once", (len(answered), len(set(answered))), (rows, rows),
                f"{rows} rows do not part evenly among {place.ranks} ranks")


# ------------------------------------------------------------------------------------------------ the real size


def real_size_plan(cards, gib):
    """The largest model, and the way to train it, whose worst case fits -> (size, options, memory.Settings).

    3B before the 60M model, which fits any card; the weights before adapters.
    """
    for size in ("3b", "60m"):
        for options, settings in memory.ways_that_fit(size, max(1, cards), gib):
            return size, options, settings
    raise RuntimeError(f"{gib:.1f} GiB of a card are free, too few for any model; end what runs there.")


def published(place):
    """Random weights of the real size on all cards: memory against the estimate, speed against what a card can do."""
    finish(start(1, place.cards, Place.checkpoint, place))  # a process that has begun with CUDA cannot be forked
    cell = models.Cell(256, 16) if place.small else models.Cell(3704, 200)
    if place.small:
        size, options, settings = "5M, in place of 3B", "", memory.Settings(model=str(place.checkpoint()), world_size=1)
    else:
        # In a process of its own: the plan runs a backward pass, after which ranks cannot be forked from this one.
        size, options, settings = finish(start(1, place.cards, real_size_plan, place.cards, place.gib))[0]
    settings = dataclasses.replace(settings, max_new_tokens=cell.completion, accumulation=1)
    yield Check("model", size)
    yield Check("options, chosen by the memory of these cards", options or "none")
    reports = finish(start(settings.world_size, place.cards, real_size, place, settings, cell))
    card, prompt_tokens, grid, _ = reports[0]
    work = dry_run.Work(grid, prompt_tokens - math.prod(grid) // dry_run.MERGE**2, [cell.completion] * cell.group,
                        cell.completion)
    attention = dry_run.cpu_attention if place.small else dry_run.gpu_attention
    dtype = torch.float32 if place.small else torch.bfloat16
    need = dry_run.estimate(dry_run.make_model(settings, dtype), settings, work, attention)
    for phase in dry_run.PHASES:
        measured = max(report[-1]["MiB"][phase] for report in reports)
        ratio = measured * 2**20 / sum(need.peaks[phase].values())
        bound = ("0.9 to 1.1", 0.9 < ratio < 1.1, "benchmarks/dry_run.py; within 1.1% of a real process on a CPU")
        # A process of 20 MB of weights holds more of everything else.
        yield Check(f"peak of the {phase} phase, of the estimate", ratio, *(() if place.small else bound))
    seconds = {phase: max(report[-1]["seconds"][phase] for report in reports) for phase in ("prefill", *dry_run.PHASES)}
    decoding = seconds["sampling"] - seconds["prefill"]
    policy = seconds["policy"] - seconds["optimiser"]  # which it holds
    reads = need.work["token"].bytes * (cell.completion - 1) / decoding
    computes = need.work["policy"].operations / policy
    yield Check("bandwidth read, GB/s", card.bandwidth / 1e9)
    yield Check("matrix products, TFLOP/s", card.bfloat16 / 1e12)
    yield Check("host link, GB/s", card.host_link / 1e9)
    yield Check("tower and prefill, s", seconds["prefill"])
    yield Check("decoding, ms a token", 1e3 * decoding / (cell.completion - 1))
    yield Check("decoding, GB/s read", reads / 1e9)
    yield Check("decoding, share of the bandwidth", reads / card.bandwidth, GOAL)
    yield Check("reference pass, s", seconds["reference"])
    yield Check("policy pass, s", policy)
    yield Check("policy pass, TFLOP/s", computes / 1e12)
    yield Check("policy pass, share of the arithmetic", computes / card.bfloat16, GOAL)
    yield Check("optimiser, s", seconds["optimiser"])


def real_size(place, settings, cell):
    """On one rank -> (cards.Card as measured, tokens of the prompt, its grid, what the meter measured)."""
    small_model, processor = loading.load_model(place.checkpoint(), torch.device("cpu"))
    device = setup_distributed()
    processor = processor._replace(eos=processor.eos.to(device), banned=processor.banned.to(device))
    card = cards.measure(device, torch.float32 if place.small else torch.bfloat16)

    def random_model(*_):
        torch.manual_seed(0)  # the reference is the same model
        config = models.model_config(settings.model)
        for field in ("video_token_id", "image_token_id", "vision_start_token_id", "vision_end_token_id"):
            setattr(config, field, getattr(small_model.config, field))
        with device:
            made = Qwen2_5_VLForConditionalGeneration._from_config(
                config, dtype=torch.float32 if place.small else torch.bfloat16)
        install_attention(made)
        return made, processor

    meter = Meter(device)
    with nullcontext() if place.compiles else uncompiled(graph=True):
        with mock.patch.object(loading, "load_model", random_model):
            meter.rest()
            prompt, measured = measured_iterations(settings, cell, meter, device)
    if not place.small:
        (place.folder / f"memory.{device.index}.txt").write_text(torch.cuda.memory_summary(), encoding="utf-8")
    gather(None)  # nobody leaves before all are done
    return card, len(prompt.ids), tuple(prompt.grid[0].tolist()), measured


# ------------------------------------------------------------------------------------------------ the program


STAGES = (
    Stage(environment, "environment", 60, early=True),  # the first start of CUDA on eight cards
    Stage(one_process, "one process", 20, early=True),
    Stage(kernels, "kernels", 20, early=True),
    Stage(eager, "tiny model, eager", 20, early=True),
    Stage(graphs, "tiny model, graphs", 20),
    Stage(fresh_shapes, "fresh shapes", 15),
    Stage(compiled, "tiny model, compiled", 75),
    Stage(resumed, "kill and resume", 55),
    Stage(published, "real size", 140),  # 3B on one card of 40 GB pins 34 GiB of host memory
    Stage(loop, "the demo's loop", 40),
    Stage(all_cards, "all cards", 75),
)


def accept(place, stages=STAGES, budget=BUDGET):
    """Run the stages, printing each check at once -> [(title, Check)]."""
    results = []
    slower = 4 if place.small else 1
    end = time.monotonic() + budget * slower
    for stage in stages:
        started = time.monotonic()
        checks = run_stage(stage, place, min(stage.seconds * slower, end - started))
        failed = False
        for check in checks:
            results.append((stage.title, check))
            failed |= check.passed is False
            if check.what == FREE:
                place = place._replace(gib=check.value)
            print(f"{VERDICTS[check.passed]:<5}{stage.title}: {check.what}: {cell_text(check.value)}"
                  f"{f' ({check.bound})' if check.bound else ''}", flush=True)
        results.append((stage.title, Check("seconds", time.monotonic() - started)))
        rows = [{"stage": title} | check._asdict() for title, check in results]
        (place.folder / "acceptance.json").write_text(json.dumps(rows, indent=1, default=str) + "\n", encoding="utf-8")
        (place.folder / "table.md").write_text(table(results) + "\n", encoding="utf-8")
        if failed and stage.run is compiled:
            place = place._replace(compiles=False)  # the rest is measured with graphs alone
        if failed and stage.early:
            print(f"{stage.title} failed, so what comes after it was left out.")
            break
    return results


def verdict(place, results) -> str:
    """The last line: whether the README's command is safe to start on these cards, and with which options."""
    failed = [f"{title}: {check.what}" for title, check in results if check.passed is False]
    if failed:
        return f"Not safe to start: {len(failed)} checks failed, the first of them \"{failed[0]}\"."
    if place.small:
        return "All checks passed at tiny size; a CPU says nothing about a GPU."
    gpus = max(n for n in (1, 2, 4, 8) if n <= place.cards)
    gib = dict((check.what, check.value) for _, check in results)[FREE]
    advice = []
    for model in ("3b", "7b"):
        options, _ = next(memory.ways_that_fit(model, gpus, gib), (None, None))
        if options is None:
            advice.append(f"{model.upper()} does not fit {gpus} x {gib:.1f} GiB")
        else:
            advice.append(f"`GPUS={gpus} bash train.sh charades-{model} {options}".rstrip() + "`")
    return f"Safe to start: {'; '.join(advice)}."


def main():
    parser = command_line("benchmarks.accept", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/acceptance"), help="folder for results and logs")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as train.sh
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks without starting CUDA, which no fork survives
        if not torch.cuda.is_available():
            parser.error("torch finds no GPU here; --device cpu runs the same code at tiny size.")
        if torch.cuda._device_count_nvml() < 0:  # torch would begin with CUDA to count them
            parser.error("the driver's NVML cannot be asked for the cards; CUDA_VISIBLE_DEVICES takes their numbers.")
    args.output.mkdir(parents=True, exist_ok=True)
    place = Place(torch.device(args.device), args.output.resolve(),
                  torch.cuda.device_count() if args.device == "cuda" else 0)
    results = accept(place)
    failed = sum(check.passed is False for _, check in results)
    print(f"\n{table(results)}\n\n{failed} failed; {args.output} holds acceptance.json, table.md and the logs.")
    last = verdict(place, results)
    print(last)
    with open(args.output / "table.md", "a", encoding="utf-8") as file:
        file.write(f"\n{last}\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
