"""Whether a machine can train: one command before the first run on a new kind of GPU, in at most nine minutes.

    python -m benchmarks.accept                   # on one GPU; downloads nothing
    python -m benchmarks.accept --device cpu      # the same code at tiny size, which proves nothing about a GPU

Eleven stages go from the machine itself to the whole program; `STAGES` lists them with their deadlines. Each runs in a
process of its own, and prints a line for each check as soon as it is made. A stage that exceeds its deadline is killed,
and its log says where it stood. A failure in one of the early stages ends the run, because later ones would fail by it.
--output receives acceptance.json, table.md and a log for each stage.

A check with a bound passes or fails, and the table says where its bound comes from. A check without one is reported.
The goals for speed (GOALS) decide nothing: they are what a well-used GPU should reach.
"""

import argparse
import faulthandler
import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from transformers import Qwen2_5_VLForConditionalGeneration

import grpo
import invert4tvg
from benchmarks import ceilings, memory, step
from demo import make_demo
from engine import checkpoints, decoding
from engine.attention import attend_to_allowed, install_attention
from engine.optimizer import sharded_adamw
from engine.parallel import data_parallel
from engine.runtime import launch, setup_distributed

BUDGET = 540  # seconds in all
GAP = {torch.bfloat16: 0.05, torch.float32: 1e-4}  # of a log-probability in sampling and in the packed pass
GAP_SOURCE = "five times the largest gap of a 5M model in bfloat16 on a CPU (0.0098); 1e-4 in float32"
SHM = 135e6  # eight clips of 3,584 visual tokens that a rank's workers hold ready: 3,584 x 784 x 2 x 3 bytes each
GOALS = {"sampling": 0.60, "policy": 0.45}  # of the bandwidth, of the rate of matrix products
CONTEXT = multiprocessing.get_context("fork")  # torch is imported once; CUDA starts in the stages alone


class Check(NamedTuple):
    what: str
    value: object
    bound: str = ""
    passed: bool | None = None  # None: reported
    source: str = ""  # of the bound


def at_most(what, value, bound, source):
    return Check(what, value, f"at most {bound:g}", math.isfinite(value) and value <= bound, source)


def equal(what, found, expected, source):
    return Check(what, found, f"equal to {expected}", found == expected, source)


class Place(NamedTuple):
    """Where a stage runs."""

    device: torch.device
    folder: Path
    compiles: bool = True  # False where the stage that compiles failed

    @property
    def small(self):
        return self.device.type == "cpu"

    def checkpoint(self):
        """-> the folder of a random model of 5M parameters, made by the first stage that needs it."""
        folder = self.folder / "5m"
        if not (folder / "preprocessor_config.json").exists():  # written last
            folder.mkdir(exist_ok=True)
            step.make_checkpoint(folder, "5m", self.device)
        return folder

    def data(self):
        """-> the folder of the demo's data."""
        make_demo.main([str(self.folder / "demo"), "--videos", *(("8", "2", "2") if self.small else ("96", "8", "8"))])
        return self.folder / "demo"


# ------------------------------------------------------------------------------------------------ the machine


def environment(place):
    yield Check("torch", torch.__version__)
    yield Check("device", "CPU" if place.small else torch.cuda.get_device_name())
    if not place.small:
        free, total = torch.cuda.mem_get_info()
        yield Check("GPU memory free, GiB", round(free / 2**30, 1), f"at least 90% of {total / 2**30:.1f}",
                    free > 0.9 * total, "another program on the card would spoil every measurement")
        yield Check("bfloat16", torch.cuda.is_bf16_supported(), "True", torch.cuda.is_bf16_supported(),
                    "models are loaded in bfloat16")
        yield Check("compute capability", ".".join(map(str, torch.cuda.get_device_capability())))
        yield Check("cuDNN", torch.backends.cudnn.version())
    yield Check("cores", len(os.sched_getaffinity(0)))
    # Without these three sampling goes on uncompiled, with a warning (decoding.working).
    yield Check("C compiler", shutil.which("gcc") or shutil.which("cc") or "missing: no compilation")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    yield Check("Python.h", "there" if header.exists() else "missing: no compilation")
    yield Check("Triton", "there" if find_spec("triton") else "missing: no compilation")
    if Path("/dev/shm").exists():
        shared = os.statvfs("/dev/shm")
        size = shared.f_bavail * shared.f_frsize
        yield Check("/dev/shm free, MB a process", round(size / 1e6), f"at least {SHM / 1e6:.0f}", size >= SHM,
                    "clips that a rank's workers hold ready (with Docker: --ipc=host)")


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
    error = (decoding.scores(query, key).double() - exact).abs().max().item()
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
    install_attention(checkpoints.load_model(place.checkpoint(), place.device)[0])  # switches cuDNN's attention off
    for name, (q, k, options) in {
        "tower, whole frames": (noise(8, 16, 448, 80), noise(8, 16, 448, 80), {}),
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
    processor: checkpoints.Processor
    prompts: list

    @classmethod
    def at(cls, place):
        model, processor = checkpoints.load_model(place.checkpoint(), place.device)
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
    return step.make_prompt(model, processor, *step.make_video(processor.tokenizer, tokens))


@contextmanager
def uncompiled(graph):
    """Sampling on a GPU without compilation, with or without a recorded graph; on a CPU it has neither."""
    patches = [mock.patch.object(decoding, "compiled_layer", lambda: decoding.run_layer)]
    if not graph:
        patches.append(mock.patch.object(decoding, "record", lambda forward, layer, inputs: partial(forward, layer)))
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
    optimizer = step.MasterAdamW([p for p in tiny.model.parameters() if p.requires_grad], lr=1e-3)
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


def run_in_process(config):
    """Start invert4tvg.py's run -> its process, whose exit code says how it ended."""
    process = CONTEXT.Process(target=launch, args=(invert4tvg.train, config))
    process.start()
    return process


def finish(process):
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a training process ended with status {process.exitcode}; see this stage's log.")


def toy(place, name, **options):
    """-> the Config of a run on the demo's data: supervised where no option says otherwise."""
    data = place.data()
    settings = {
        "model": str(data / "model"), "videos": str(data / "videos"), "output": str(place.folder / name),
        "min_frame_pixels": 784, "max_frame_pixels": 784, "max_new_tokens": 24, "workers": 2, "micro_batch": 2,
        "gradient_checkpointing": not place.small}
    if "annotations" not in options:
        settings |= {"demonstrations": str(data / "warmup-1.jsonl"), "lr": 1e-3}
    shutil.rmtree(place.folder / name, ignore_errors=True)
    return invert4tvg.Config(**settings | options)


def log_of(config):
    lines = Path(config.output, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def largest_difference(ours, theirs, name):
    """-> the largest relative difference of a metric between two logs"""
    return max(abs(a[name] - b[name]) / max(abs(b[name]), 1e-8) for a, b in zip(ours, theirs, strict=True))


def resumed(place):
    """A run that is killed without warning and goes on, beside one that is left alone."""
    options = {"iterations": 4, "save_every": 2, "accumulation": 2, "keep": 9}
    whole, killed = toy(place, "whole", **options), toy(place, "killed", **options)
    finish(run_in_process(whole))
    process = run_in_process(killed)
    while process.is_alive() and not Path(killed.output, "checkpoint-000002", "run.json").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    finish(run_in_process(killed))
    bound = 1e-6 if place.small else 0.02
    for name in ("nll", "grad_norm"):
        yield at_most(f"{name} of the run that was killed, relative difference",
                      largest_difference(log_of(killed), log_of(whole), name), bound,
                      "a CPU repeats itself; on a GPU sums of bfloat16 come in any order")


def loop(place):
    """The demo through the program itself: a few supervised iterations, then GRPO."""
    warm = toy(place, "warm", iterations=3 if place.small else 40, micro_batch=4)
    finish(run_in_process(warm))
    grounded = toy(place, "grpo", annotations=str(place.data() / "train.txt"), model=warm.output, lr=3e-4,
                   iterations=3 if place.small else 20, micro_batch=4)
    finish(run_in_process(grounded))
    log = log_of(grounded)
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


def two_processes(place):
    """Two ranks on one card. NCCL refuses that, so they speak gloo, which moves CUDA tensors, too."""
    for name, options in {
        "supervised": {"iterations": 3},
        "grpo": {"iterations": 2, "annotations": str(place.data() / "train.txt"), "lr": 3e-4},
    }.items():
        pair = toy(place, f"two-{name}", micro_batch=1, **options)
        port = free_port()
        ranks = [CONTEXT.Process(target=as_rank, args=(rank, port, pair)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            finish(process)
        if name == "supervised":
            alone = toy(place, "one-supervised", micro_batch=1, accumulation=2, **options)
            finish(run_in_process(alone))
            yield at_most("loss of two processes beside one, relative difference",
                          largest_difference(log_of(pair), log_of(alone), "nll"), 1e-4 if place.small else 0.02,
                          "the same samples; sums in another order, on a GPU in bfloat16")
        else:
            yield at_most("first KL with the reference shared out", log_of(pair)[0]["kl"], 1e-3,
                          "policy and reference are the same weights")


def as_rank(rank, port, config):
    """One of two ranks that torchrun would have started, on the first card."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    join = dist.init_process_group
    with mock.patch.object(dist, "init_process_group", lambda backend, **options: join("gloo", **options)):
        launch(invert4tvg.train, config)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# ------------------------------------------------------------------------------------------------ the real size


def published(place):
    """3B with random weights, made on the GPU: memory against the estimate, speed against what the machine can do."""
    cell = step.Cell(256, 16) if place.small else step.Cell(3704, 200)
    name = str(place.checkpoint()) if place.small else "3b"
    model, processor = checkpoints.load_model(place.checkpoint(), place.device)
    ids = model.config
    del model

    def random_model(*_):
        torch.manual_seed(0)  # the reference is the same model
        config = memory.model_config(name)
        for field in ("video_token_id", "image_token_id", "vision_start_token_id", "vision_end_token_id"):
            setattr(config, field, getattr(ids, field))
        with place.device:
            made = Qwen2_5_VLForConditionalGeneration._from_config(
                config, dtype=torch.float32 if place.small else torch.bfloat16)
        install_attention(made)
        return made, processor

    device = setup_distributed()
    meter = step.Meter(device)
    settings = memory.Settings(model=name, world_size=1, max_new_tokens=cell.completion)
    yield Check("model", name if not place.small else "5M, in place of 3B")
    sampling = nullcontext() if place.compiles else uncompiled(graph=True)
    with sampling, mock.patch.object(checkpoints, "load_model", random_model):
        meter.rest()
        prompt, measured = memory.measured_iterations(settings, cell, meter, device)
    P = len(prompt.ids)
    grid = tuple(prompt.grid[0].tolist())
    work = memory.Work(grid, P - math.prod(grid) // memory.MERGE**2, [cell.completion] * cell.group, cell.completion)
    attention = memory.cpu_attention if place.small else memory.gpu_attention
    dtype = torch.float32 if place.small else torch.bfloat16
    peaks = memory.estimate(memory.make_model(settings, dtype), settings, work, attention).peaks
    for phase in memory.PHASES:
        ratio = measured["MiB"][phase] * 2**20 / sum(peaks[phase].values())
        if place.small:  # a process of 20 MB of weights holds more of everything else
            yield Check(f"peak of the {phase} phase, of the estimate", ratio)
        else:
            yield Check(f"peak of the {phase} phase, of the estimate", ratio, "0.9 to 1.1", 0.9 < ratio < 1.1,
                        "benchmarks/memory.py; it was within 1.1% of a real process on a CPU")
    if not place.small:
        (place.folder / "memory.txt").write_text(torch.cuda.memory_summary(), encoding="utf-8")

    gc.collect()  # the run above holds itself in a circle
    model, processor = random_model()
    model.model.visual.requires_grad_(False)
    checkpoints.recompute_activations(model)
    with nullcontext() if place.compiles else uncompiled(graph=True):
        speed = ceilings.measure(model, processor, [prompt], cell.group, cell.completion, repeats=1)
    yield Check("bandwidth read, GB/s", speed.bandwidth / 1e9)
    yield Check("matrix products, TFLOP/s", speed.matmul / 1e12)
    yield Check("tower and prefill, s", speed.prefill)
    yield Check("decoding, ms a token", 1e3 * speed.decoding / (cell.completion - 1))
    yield Check("decoding, share of the bandwidth", speed.decoding_share, f"goal {GOALS['sampling']:.0%} on an H100")
    yield Check("policy pass, share of the arithmetic", speed.policy_share, f"goal {GOALS['policy']:.0%} on an H100")
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ running the stages


class Stage(NamedTuple):
    run: Callable
    title: str
    seconds: int  # CPUs get four times as many, since they may be busy
    early: bool = False  # a failure ends the run


STAGES = (
    Stage(environment, "environment", 10, early=True),
    Stage(one_process, "one process", 20, early=True),
    Stage(kernels, "kernels", 20, early=True),
    Stage(eager, "tiny model, eager", 25, early=True),
    Stage(graphs, "tiny model, graphs", 30),
    Stage(fresh_shapes, "fresh shapes", 25),
    Stage(compiled, "tiny model, compiled", 90),
    Stage(resumed, "kill and resume", 45),
    Stage(published, "real size", 150),
    Stage(loop, "the demo's loop", 80),
    Stage(two_processes, "two processes, gloo", 45),
)


def work(sender, stage, place, seconds):
    """A stage's process: its checks go to the parent, all that it prints to its log."""
    os.setpgid(0, 0)  # the parent ends it with all that it has started
    log = open(place.folder / f"{stage.run.__name__}.log", "w", encoding="utf-8")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    faulthandler.dump_traceback_later(max(1, seconds - 2), file=log)
    step.quieten()
    if place.small:
        torch.set_num_threads(1)
    try:
        for check in stage.run(place):
            sender.send(check)
    except BaseException as error:
        traceback.print_exc()
        log.flush()
        sender.send(Check("no error", f"{type(error).__name__}: {error}".split("\n")[0], "none", False,
                          f"see {log.name}"))
    os._exit(0)  # no clean-up may hang the run


def run_stage(stage, place, seconds):
    """Run a stage in a process of its own and yield its checks as they come; a failed one where its time is up."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=work, args=(sender, stage, place, seconds))
    process.start()
    sender.close()
    deadline = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            yield receiver.recv()
        yield Check("in time", "no", f"at most {seconds:.0f} s", False, f"see {stage.run.__name__}.log")
    except EOFError:
        if process.exitcode and process.exitcode < 0:
            yield Check("no error", f"killed by signal {-process.exitcode}", "none", False, "")
    finally:
        for end in (partial(os.killpg, process.pid), partial(os.kill, process.pid)):
            try:
                end(signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.join()


def cell(value):
    """A value for the table: numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


VERDICTS = {True: "pass", False: "FAIL", None: "-"}


def table(results):
    """[(title, Check)] -> Markdown"""
    lines = ["| stage | check | value | bound | result | where the bound comes from |", "|---|---|---|---|---|---|"]
    for title, check in results:
        row = [title, check.what, cell(check.value), check.bound, VERDICTS[check.passed], check.source]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


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
            print(f"{VERDICTS[check.passed]:<5}{stage.title}: {check.what}: {cell(check.value)}"
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/acceptance"), help="folder for results and logs")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks without starting CUDA, which no fork survives
        if not torch.cuda.is_available():
            parser.error("torch finds no GPU here; --device cpu runs the same code at tiny size.")
    args.output.mkdir(parents=True, exist_ok=True)
    results = accept(Place(torch.device(args.device), args.output.resolve()))
    failed = sum(check.passed is False for _, check in results)
    print(f"\n{table(results)}\n\n{failed} failed; {args.output} holds acceptance.json, table.md and the logs.")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
