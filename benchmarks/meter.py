"""Seconds and peak memory of the parts of a program, on a GPU or on Linux."""

import ctypes
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch

import grpo
import invert4tvg
from benchmarks import models
from engine.model.attention import visual_features
from engine.run.opening import Opening


class Meter:
    """Seconds, CPU seconds and peak memory above idle, MiB, of named phases, which may nest and come in parts."""

    def __init__(self, device):
        self.device = device
        self.open = []
        self.idle = 0.0
        self.measured = nothing_measured()

    def rest(self):
        """What is resident now is the idle process."""
        self.idle = 0.0
        self.read_peak()
        self.idle = self.read_peak()

    def read_peak(self):
        """-> MiB above idle at the highest point since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak / 2**20 - self.idle
        peak = int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])  # KiB
        # glibc keeps freed blocks: without trimming, a phase would be charged for its predecessor's.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM falls to what is resident now
        return peak / 1024 - self.idle

    def settle(self):
        """Credit the peak so far to the phases that are open."""
        peak = self.read_peak()
        for name in self.open:
            self.measured["MiB"][name] = max(self.measured["MiB"][name], peak)

    @contextmanager
    def __call__(self, name):
        self.settle()
        self.open.append(name)
        began = time.perf_counter()
        cpu_began = time.process_time()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.measured["seconds"][name] += time.perf_counter() - began
        self.measured["cpu_seconds"][name] += time.process_time() - cpu_began
        self.settle()
        self.open.remove(name)

    def take(self):
        """-> what was measured since the last call, {quantity: {phase: value}}."""
        taken = self.measured
        self.measured = nothing_measured()
        return taken


def nothing_measured():
    return {quantity: defaultdict(float) for quantity in ("seconds", "cpu_seconds", "MiB")}


def measured_iterations(settings, cell, meter, device):
    """-> (the prompt, {quantity: {phase: value}} of the last of three iterations)"""
    opening = Opening(samples=[], completions=None, tasks=None, held_out=[], checkpoint=None,
                      origin={"start": settings.model})
    run = invert4tvg.make_run(settings, device, opening, sampler=None)
    optimizer_step = run.optimizer.step

    def measured_step():  # the update's last part is a phase of its own
        meter.settle()
        meter.open.remove("policy")
        with meter("optimiser"):
            optimizer_step()
        meter.open.append("policy")

    run.optimizer.step = measured_step
    prompt = models.make_prompt(run.model, run.processor, *models.make_video(run.processor.tokenizer, cell.prompt))
    advantages = grpo.group_advantages(torch.linspace(0, 1, cell.group, device=device).unsqueeze(0)).flatten()
    for _ in range(3):
        meter.take()
        with meter("prefill"), torch.no_grad():  # with the tower and a first token; the sampling repeats it
            features = visual_features(run.model, [prompt])
            grpo.sample_group(run.model, [prompt], cell.group, 1, run.processor.eos[:0], run.processor.banned,
                              features=features)
        with meter("sampling"), torch.no_grad():
            features = visual_features(run.model, [prompt])
            sampled = grpo.sample_group(run.model, [prompt], cell.group, cell.completion, run.processor.eos[:0],
                                        run.processor.banned, features=features)
        with meter("reference"):
            batches = invert4tvg.micro_batches(run, [prompt], sampled.ids, sampled.mask, features, advantages,
                                               sampled.logps)
        with meter("policy"):
            invert4tvg.update(run, batches, 1e-6)
    return prompt, meter.take()
