"""What sharing the prompt is worth: seconds and memory of a GRPO step on random weights, nothing downloaded.

    python -m benchmarks.step                                # the table: four cells, one CPU thread
    python -m benchmarks.step --curves                       # and two plots (pip install matplotlib)
    python -m benchmarks.step --device cuda --size 3b        # the published shapes in bfloat16
    python -m benchmarks.step --cells 2048/64 --systems ours repeated

Three systems take whole GRPO steps on the same weights and the same number of tokens, each in a process of its own and
by turns, after one uncounted step each:

    ours      sampling and log-probabilities of grpo.py: tower and prompt once for the group
    repeated  prompt and video repeated G times in sampling, reference and policy pass (baseline.py)
    trl       TRL's GRPOTrainer on eight images with the video's visual tokens, since its video path drops the video in
              training (baseline.py); wants `pip install trl`, else its columns stay empty

A step goes from decoded frames to updated weights: patches, sampling (tower, prefill, decoding), reference pass, policy
forward and backward, clipping, optimiser. Rewards are free, and the tower is frozen. Cells are PROMPT/COMPLETION in
tokens; no completion ends early. Numbers are medians. Memory is the peak above the process with its models loaded and
nothing run. Before timing, ours and repeated score the same completions. A difference above 1e-4 (float32) ends the
run.
"""

import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoTokenizer

import grpo
from benchmarks import baseline, models
from benchmarks.meter import Meter
from benchmarks.models import PUBLISHED, SIZES, Cell
from engine.model.attention import visual_features
from engine.model.loading import load_model, recompute_activations
from engine.model.optimizer import MasterAdamW
from engine.program.settings import command_line

PHASES = {"sampling": "sampling", "reference": "reference pass", "policy": "policy, forward + backward",
          "step": "whole step"}
LABELS = {"ours": "ours", "repeated": "repeated", "trl": "TRL"}
CURVE_GROUPS = (2, 4, 8, 16)
CURVE_PROMPTS = (256, 512, 1024, 2048, 3600)

# ------------------------------------------------------------------------------------------------ the systems


class Shared:
    """The program's passes: tower and prompt once for the group."""

    def __init__(self, folder, cell, device):
        self.cell = cell
        self.features = None
        self.model, self.processor = load_model(folder, device)
        self.reference, _ = load_model(folder, device)

    def sample(self, prompt):
        """-> (G, C) ids"""
        with torch.no_grad():
            self.features = visual_features(self.model, [prompt])
        never = self.processor.eos[:0]
        return grpo.sample_group(self.model, [prompt], self.cell.group, self.cell.completion, never,
                                 self.processor.banned, 1.0, None, self.features).ids

    def logps(self, model, prompt, ids):
        """-> (G, C) log-probabilities of `ids`, float32"""
        mask = torch.ones_like(ids, dtype=torch.bool)
        return grpo.group_logps(model, [prompt], ids, mask, self.processor.banned, 1.0, self.features)[0]


def take_steps(system, frames, text, meter, turn, args):
    """GRPO steps of `Shared` or of `baseline.Repeated`, the uncounted one and --repeats, each inside `turn()`."""
    cell = system.cell
    model = system.model
    model.model.visual.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # 7b on one card: AdamW's 92 GB are sharded over ranks in training and have no room here.
    optimizer = (torch.optim.SGD if args.size == "7b" else MasterAdamW)(parameters, lr=1e-6)
    advantages = grpo.group_advantages(torch.linspace(0, 1, cell.group, device=model.device).unsqueeze(0)).flatten()
    mask = torch.ones(cell.group, cell.completion, dtype=torch.bool, device=model.device)
    model.train()
    if args.gradient_checkpointing:
        recompute_activations(model)
    for _ in range(args.repeats + 1):
        with turn():
            prompt = models.make_prompt(model, system.processor, frames, text)
            with meter("sampling"):
                ids = system.sample(prompt)
            with meter("reference"), torch.no_grad():
                ref_logps = system.logps(system.reference, prompt, ids)
            with meter("policy"):
                logps = system.logps(model, prompt, ids)
                loss, _ = grpo.grpo_loss(logps, logps.detach(), ref_logps, advantages, mask)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            del logps, loss  # else the graph's ends would live into the next step's sampling


# ------------------------------------------------------------------------------------------------ a worker's process


def probe(system, frames, text):
    """-> (G, C) log-probabilities of completions that are the same for every system, a list."""
    prompt = models.make_prompt(system.model, system.processor, frames, text)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(256, (system.cell.group, system.cell.completion), generator=generator)
    with torch.no_grad():
        return system.logps(system.model, prompt, ids.to(system.model.device)).tolist()


def work(connection, name, folder, cell, args):
    """A worker's process: build one system, report, then take one step whenever told to."""
    os.dup2(2, 1)  # the table has standard output to itself
    models.quieten()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    meter = Meter(device)

    @contextmanager
    def turn():
        connection.recv()
        with meter("step"):
            yield
        connection.send(meter.take())

    try:
        frames, text = models.make_video(AutoTokenizer.from_pretrained(folder), cell.prompt)
        if name == "trl":
            trainer = baseline.make_trl_trainer(folder, cell, frames, text, meter, turn, args)
            meter.rest()
            connection.send({"idle": meter.idle})
            trainer.train()
        else:
            system = {"ours": Shared, "repeated": baseline.Repeated}[name](folder, cell, device)
            meter.rest()
            connection.send({"idle": meter.idle, "logps": probe(system, frames, text)})
            take_steps(system, frames, text, meter, turn, args)
    except ImportError as error:
        connection.send({"missing": f"not installed ({error})"})
    except torch.OutOfMemoryError:
        connection.send({"missing": "out of memory"})
    except Exception:
        connection.send({"failed": traceback.format_exc()})


# ------------------------------------------------------------------------------------------------ the parent's process


def receive(pipe, name):
    """-> a worker's next report. Raises SystemExit where there will be none."""
    try:
        report = pipe.recv()
    except EOFError:
        report = {"failed": "its process was killed, probably for want of memory."}
    if "failed" in report:
        raise SystemExit(f"{name}: {report['failed']}")
    return report


def measure(names, results, folder, cell, args):
    """Let systems step by turns, the first time uncounted.

    Fills `results` with {name: {idle, steps: [{quantity: {phase: value}}]} or {missing: why}}.
    """
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=work, args=(theirs, name, folder, cell, args), daemon=True).start()
        theirs.close()
        results[name] = receive(pipes[name], name) | {"steps": []}
    check_logps(results, cell, args.device)
    for step in range(args.repeats + 1):
        for name in [name for name in names if "missing" not in results[name]]:
            pipes[name].send("go")
            report = receive(pipes[name], name)
            if "missing" in report:
                results[name] = report
            elif step:
                results[name]["steps"].append(report)
    for worker in multiprocessing.active_children():
        worker.join()


def check_logps(results, cell, device):
    """Raises SystemExit where ours and the repeated prompt do not score the same completions alike."""
    if not all("logps" in results.get(name, ()) for name in ("ours", "repeated")):
        return
    ours = torch.tensor(results["ours"].pop("logps"))
    repeated = torch.tensor(results["repeated"].pop("logps"))
    gap = (ours - repeated).abs().max().item()
    print(f"{name_of(cell)}: log-probabilities of ours and repeated differ by {gap:.1e} at most", file=sys.stderr)
    if gap > 1e-4 and device == "cpu":  # bfloat16 differs by more
        raise SystemExit(f"{name_of(cell)}: a difference above 1e-4 leaves nothing to compare.")


# ------------------------------------------------------------------------------------------------ table and plots


def name_of(cell):
    return f"{cell.prompt:,} / {cell.completion}" + (f", G = {cell.group}" if cell.group != 8 else "")


def median(result, quantity, phase):
    """-> the median of a system's `quantity` in a phase; None where it was not measured."""
    return statistics.median(step[quantity][phase] for step in result["steps"]) if "missing" not in result else None


def table(systems, results, clock):
    """-> Markdown: medians by `clock` ("seconds", "cpu_seconds"), and in brackets how many times ours they are."""
    heads = [f"{LABELS[s]}, {unit}" for unit in ("s", "MiB") for s in systems]
    lines = ["| prompt / completion | phase | " + " | ".join(heads) + " |"]
    lines.append("|" + "---|" * (2 + len(heads)))
    for cell, result in results:
        for phase, label in PHASES.items():
            row = []
            for quantity, digits in ((clock, 2), ("MiB", 0)):
                ours = median(result["ours"], quantity, phase) if "ours" in result else None
                for name in systems:
                    value = median(result[name], quantity, phase)
                    text = "" if value is None else f"{value:,.{digits}f}"
                    if value and ours and name != "ours":
                        text += f" ({value / ours:.1f}x)"
                    row.append(text)
            lines.append(f"| {name_of(cell)} | {label} | " + " | ".join(row) + " |")
    notes = {f"{LABELS[name]}, {name_of(cell)}: {result[name]['missing']}."
             for cell, result in results for name in systems if "missing" in result[name]}
    if notes:
        lines += ["", *sorted(notes)]
    return "\n".join(lines)


def core_share(results):
    """-> the smallest part of a core that a system's steps had: below 1 where other programs were running."""
    return min(median(r, "cpu_seconds", "step") / median(r, "seconds", "step")
               for _, result in results for r in result.values() if "missing" not in r)


def plot(path, results, axis, xlabel):
    """Seconds and memory against `axis` ("group" or "prompt"), ours and repeated."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
    for name, colour in (("repeated", "#c44e52"), ("ours", "#2f6db3")):
        measured = [(getattr(cell, axis), r[name]) for cell, r in results if "missing" not in r[name]]
        sizes = [x for x, _ in measured]
        for phase, style, label in (("step", "o-", "whole step"), ("policy", "s--", "policy pass")):
            seconds = [median(r, "seconds", phase) for _, r in measured]
            panels[0].plot(sizes, seconds, style, color=colour, markersize=4, label=f"{LABELS[name]}, {label}")
        peaks = [median(r, "MiB", "step") / 1024 for _, r in measured]
        panels[1].plot(sizes, peaks, "o-", color=colour, markersize=4, label=LABELS[name])
    ticks = [getattr(cell, axis) for cell, _ in results]
    for panel, ylabel in zip(panels, ("seconds", "peak memory of the step, GiB")):
        panel.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45 if axis == "prompt" else 0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def parse_arguments():
    parser = command_line("benchmarks.step", __doc__)
    parser.add_argument("--cells", nargs="*", default=["1024/64", "1024/200", "2048/64", "2048/200"],
                        metavar="PROMPT/COMPLETION", help="in tokens")
    parser.add_argument("--systems", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--repeats", type=int, default=5, help="counted steps of each system in a cell")
    parser.add_argument("--threads", type=int, default=1, help="of each process on a CPU; only one works at a time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default="5m", help="3b and 7b run their systems one after the other: "
                        "two do not fit on a card; 7b steps with SGD, AdamW's state has no room beside it")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in the policy pass of every system")
    parser.add_argument("--curves", action="store_true", help="ours and repeated, 64 tokens a completion: against G at "
                        "1,024 tokens of prompt, and against the prompt at G = 8")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder for results.json and plots")
    args = parser.parse_args()
    try:
        args.cells = [Cell(*map(int, cell.split("/"))) for cell in args.cells]
    except (TypeError, ValueError):
        parser.error("--cells takes PROMPT/COMPLETION in tokens, as in 2048/64.")
    if any(c.prompt < 128 or c.completion < 1 for c in args.cells):
        parser.error("--cells: a prompt has at least 128 tokens, a completion one.")
    if args.repeats < 1 or args.threads < 1:
        parser.error("--repeats and --threads start at 1.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here.")
    if args.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        parser.error("--device cpu: memory is read from /proc, which Linux alone has.")
    if args.device == "cpu" and args.size in PUBLISHED:
        parser.error(f"--size {args.size} wants --device cuda.")
    if args.curves and not importlib.util.find_spec("matplotlib"):
        parser.error("--curves draws with matplotlib, which is not installed.")
    return args


def main():
    args = parse_arguments()
    models.quieten()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read by the workers as they start
    curves = {"group": [Cell(1024, 64, G) for G in CURVE_GROUPS], "prompt": [Cell(P, 64) for P in CURVE_PROMPTS]}
    cells = {cell: args.systems for cell in args.cells}
    if args.curves:
        cells |= {cell: list(dict.fromkeys([*cells.get(cell, ()), "ours", "repeated"]))
                  for cell in curves["group"] + curves["prompt"]}
    on = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} thread(s)"
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "trl")
                if importlib.util.find_spec(name)]
    args.output.mkdir(parents=True, exist_ok=True)
    results = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        count = models.make_checkpoint(Path(folder), args.size, torch.device(args.device))
        repeats = f"medians of {args.repeats} steps"
        title = ", ".join([f"{count / 1e6:,.1f}M parameters", "G = 8", on, repeats, *versions])
        for cell, systems in cells.items():
            results[cell] = {}
            alone = args.size in PUBLISHED  # two systems do not fit on a card
            for names in [[name] for name in systems] if alone else [systems]:
                measure(names, results[cell], folder, cell, args)
            measured = [[*cell, result] for cell, result in results.items()]
            state = {"title": title, "arguments": sys.argv[1:], "cells": measured}
            (args.output / "results.json").write_text(json.dumps(state))
            print(f"{name_of(cell)}: done after {(time.perf_counter() - began) / 60:.1f} minutes", file=sys.stderr)

    if args.cells:
        rows = [(cell, results[cell]) for cell in args.cells]
        print(f"{title}\n\n{table(args.systems, rows, 'seconds')}")
        if args.device == "cpu" and core_share(rows) < 0.9:
            print(f"\nOther programs left the steps {core_share(rows):.2f} of a core. In CPU seconds:\n\n"
                  + table(args.systems, rows, "cpu_seconds"))
    if args.curves:
        for axis, xlabel in (("group", "completions of the prompt, G"), ("prompt", "prompt, tokens")):
            plot(args.output / f"against-{axis}.png", [(cell, results[cell]) for cell in curves[axis]], axis, xlabel)


if __name__ == "__main__":
    main()
