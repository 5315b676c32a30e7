"""Invert4TVG: reinforcement learning for temporal video grounding with inversion tasks (Algorithm 1).

    torchrun --nproc_per_node 8 invert4tvg.py --annotations FILE --videos FOLDER --output FOLDER

Each iteration is one optimiser step on one task, drawn for all ranks together: with probability p grounding (TVG:
video and query -> start and end, reward IoU + format), else an inversion (the ground-truth clip -> the query's verbs;
reward verb match + format): Verb Completion, Action Recognition or Video Description. A group of G completions is
sampled for each prompt, its rewards are normalised within the group, and the policy takes a clipped step with a KL
penalty towards the model it started from (grpo.py). The same loop does the supervised stages: --demonstrations gives
the completions, each a group of one with advantage 1 and no KL.

The README lists where this departs from the paper and which flag goes back.
"""

import json
import math
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import evaluate
import grpo
import rewards
import runtime
from runtime import UserError, flag, option, say
from video import VideoError


@dataclass(frozen=True)
class Config(evaluate.Settings):
    """Every setting of a training run: default, explanation and source; `--help` prints it."""

    # the method
    p: float = flag(0.8, "probability that an iteration trains grounding; Eq. 13")
    inversion_tasks: tuple = flag(data.INVERSION_TASKS, "inversion tasks, drawn uniformly; Table 2 ablates them",
                                  choices=data.INVERSION_TASKS)
    inversion_reward: str = flag("binary", "verb match or similarity; Table 3", choices=("binary", "cosine"))
    anchor_weight: float = flag(1.0, "of the anchors in TAR-TVG's reward; this project's reading")
    progress_weight: float = flag(0.5, "of a rise from anchor to anchor, within that; this project's reading")
    vd_verb_cap: int = flag(0, "a VD answer with more distinct verbs scores 0; 0: no cap (Eq. 7 has none)")
    demonstrations: str = flag("", "jsonl of {video, query, start, end, task, completion} to imitate instead of "
                               "sampling: a supervised stage (Appendix D)")
    # GRPO
    group_size: int = flag(8, "completions sampled for a prompt, G of Eq. 3; released code")
    temperature: float = flag(1.0, "sampling temperature; released code")
    clip_epsilon: float = flag(0.2, "the ratio counts within 1 +- this; released code")
    kl_coef: float = flag(0.04, "beta of Eq. 4; 0 needs no reference model; released code")
    mu: int = flag(1, "updates on each iteration's completions; released code")
    loss_reduction: str = flag("completion", "mean over each completion's tokens, then completions, or over all tokens "
                               "(released code)", choices=("completion", "token"))
    # the optimiser
    lr: float = flag(None, "learning rate; default 1e-6 (released log; the paper prints 5e-5), with --demonstrations "
                     "1e-5")
    lr_schedule: str = flag("linear", "decay to 0 over the run (released code), or none",
                            choices=("linear", "constant"))
    betas: tuple = flag((0.9, 0.999), "AdamW's; Section 3.1")
    adam_eps: float = flag(1e-8, "AdamW's; Section 3.1")
    weight_decay: float = flag(0.0, "AdamW's; Section 3.1")
    max_grad_norm: float = flag(1.0, "gradient clipping; released code")
    epochs: float = flag(2.0, "passes over the samples; Appendix C")
    iterations: int = flag(0, "optimiser steps instead of --epochs; 0: by epochs")
    accumulation: int = flag(1, "micro-batches an iteration on each rank, all sampled together (8 ranks x 1 = 8 "
                             "prompts; the paper's batch of 4 is ambiguous)")
    train_vision: bool = flag(False, "train the vision tower and merger too; released code")
    gradient_checkpointing: bool = flag(True, "recompute activations in the backward pass; released code")
    # the run
    seed: int = flag(0, "of task draws, sample order and sampling")
    resume: bool = flag(False, "go on from the newest checkpoint in --output")
    save_every: int = flag(500, "iterations between checkpoints; one is written at the end in any case")
    keep: int = flag(2, "checkpoints kept")
    save_rollouts: bool = flag(False, "append every completion and its rewards to rollouts.<rank>.jsonl (TAR-TVG)")
    eval_every: int = flag(0, "iterations between evaluations on held-out samples (Figure 1, right); 0: none")
    eval_annotations: str = flag("data/charades_sta_test.txt", "held-out rows, for --eval-every")
    eval_videos: str = flag("", "their videos; empty: --videos")
    eval_limit: int = flag(200, "held-out rows measured each time, evenly spaced; 0: all")

    def __post_init__(self):
        if self.lr is None:
            object.__setattr__(self, "lr", 1e-5 if self.demonstrations else 1e-6)

    def scoring(self):
        own = {k: getattr(self, k) for k in ("inversion_reward", "anchor_weight", "progress_weight")}
        return super().scoring() | own | {"vd_verb_cap": self.vd_verb_cap or None}

    def check(self):
        super().check()
        for name in ("group_size", "temperature", "mu", "lr", "epochs", "accumulation", "save_every", "keep",
                     "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise UserError(f"{option(name)} is {getattr(self, name)}; it must be above 0.")
        for name in ("anchor_weight", "progress_weight", "kl_coef", "clip_epsilon", "vd_verb_cap", "iterations",
                     "eval_every", "eval_limit", "weight_decay", "adam_eps", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{option(name)} is {getattr(self, name)}; it cannot be negative.")
        if self.seed >= 2**63:
            raise UserError(f"--seed is {self.seed}; it must be below 2^63.")
        if not 0 <= self.p <= 1:
            raise UserError(f"--p is {self.p}; a probability lies between 0 and 1.")
        if self.group_size < 2 and not self.demonstrations:
            raise UserError("--group-size 1 leaves nothing to compare; use 2 or more.")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"--betas is {' '.join(map(str, self.betas))}; give two numbers from 0 to below 1.")
        for name in ("annotations", "p", "inversion_tasks", "inversion_reward", "anchor_weight", "progress_weight",
                     "vd_verb_cap", "group_size", "temperature", "kl_coef", "save_rollouts"):
            if self.demonstrations and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"{option(name)} has no meaning with --demonstrations; leave one of them out.")
        for name in ("eval_annotations", "eval_videos", "eval_limit"):
            if not self.eval_every and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"{option(name)} has no meaning without --eval-every; say how often to evaluate.")
        for name in ("anchor_weight", "progress_weight"):
            if self.tvg_reward != "anchors" and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"{option(name)} has no meaning without --tvg-reward anchors; leave it out.")


# ------------------------------------------------------------------------------------------------ Algorithm 1


class Batch(NamedTuple):
    """A micro-batch of B groups, ready for the update; N = B * G rows."""

    prompts: list
    ids: torch.Tensor  # (N, C)
    mask: torch.Tensor  # (N, C)
    features: list | None  # None where the policy runs its own, trained tower
    advantages: torch.Tensor  # (N,)
    sampler_logps: torch.Tensor | None  # (N, C), only to measure their gap to the training pass
    ref_logps: torch.Tensor | None  # (N, C)


class Run(NamedTuple):
    """What lasts through a run."""

    config: Config
    model: object  # the policy's Qwen2.5-VL
    policy: object  # DistributedDataParallel(grpo.Policy(model))
    reference: object  # grpo.Policy, frozen, or None
    processor: runtime.Processor
    optimizer: object
    samples: list
    completions: list | None  # of the demonstrations


def rollout(run, iteration, items, generator):
    """Lines 12 and 13 of Algorithm 1 for this rank's prompts: completions, rewards, advantages -> (Batches, metrics).

    All prompts are sampled together: a decoding step costs about the same for one as for eight.
    """
    config, processor, G = run.config, run.processor, 1 if run.completions else run.config.group_size
    prompts = [evaluate.build_prompt(run.model, processor, run.samples[item.index], item, config)
               for item in items]
    features = None  # a trained tower runs inside the policy's pass instead
    if not (config.train_vision and run.completions):
        with torch.no_grad():
            features = grpo.visual_features(run.model, prompts)
    if run.completions:
        texts = [run.completions[item.index] for item in items]
        end = processor.tokenizer.eos_token_id
        rows = [torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"] + [end],
                             device=run.model.device) for text in texts]
        ids, logps = pad_sequence(rows, batch_first=True), None
        mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
        advantages, metrics = torch.ones(len(rows), device=run.model.device), {}
    else:
        ids, logps, mask, ended = sampled = grpo.sample_group(
            run.model, prompts, G, config.max_new_tokens, processor.eos, processor.banned, config.temperature, generator,
            features)
        texts = evaluate.completion_texts(processor, sampled)
        scoring = config.scoring()
        scores = [rewards.score(items[n // G].task, text, run.samples[items[n // G].index], **scoring)
                  for n, text in enumerate(texts)]  # Eq. 10 and 11
        if config.save_rollouts:
            save_rollouts(run, iteration, items, texts, scores)
        parts = {part: np.reshape([s[part] for s in scores], (-1, G)) for part in scores[0]}  # (prompts, G)
        total = torch.tensor(parts["total"], dtype=torch.float32, device=run.model.device)
        advantages = grpo.group_advantages(total).flatten()
        task = items[0].task  # the same for all ranks and slots of an iteration
        metrics = {f"{task}/{part}": float(values.mean()) for part, values in parts.items()}
        metrics |= {f"{task}/{part}_std": float(values.std(1, ddof=1).mean()) for part, values in parts.items()}
        metrics |= {"zero_spread": float((np.ptp(parts["total"], axis=1) == 0).mean()),
                    "cut_off": (~ended).float().mean().item()}
        if config.train_vision:
            features = None
    metrics["length"] = mask.sum(1).float().mean().item()

    batches = []
    for first in range(0, len(items), config.micro_batch):
        some = slice(first, first + config.micro_batch)
        own = slice(some.start * G, some.stop * G), slice(int(mask[some.start * G:some.stop * G].sum(1).max()))
        inputs = prompts[some], ids[own], mask[own], features and features[some]
        ref_logps = None
        if run.reference:
            with torch.no_grad():
                ref_logps, _ = run.reference(*inputs)
        batches.append(Batch(*inputs, advantages[own[0]], None if logps is None else logps[own], ref_logps))
    return batches, metrics


def save_rollouts(run, iteration, items, texts, scores):
    """Append completions to this rank's file, in the fields of a demonstration: stages.py selects among them."""
    with open(Path(run.config.output) / f"rollouts.{dist.get_rank()}.jsonl", "a", encoding="utf-8") as file:
        for n, (text, parts) in enumerate(zip(texts, scores)):
            item = items[n // run.config.group_size]
            row = data.demonstration_row(run.samples[item.index], item.task, text)
            file.write(json.dumps({"iteration": iteration} | row | {"parts": parts}) + "\n")


def update(run, batches, lr):
    """Line 16: --mu optimiser steps on the iteration's completions -> metrics, averaged over updates and batches.

    With mu = 1 the old policy is the current one, so the ratio is 1 and only its gradient matters; with more, the
    first pass's log-probabilities are the old ones. The sampler's serve to measure its gap to this pass.
    """
    config = run.config
    tokens = torch.tensor(float(sum(b.mask.sum() for b in batches)), device=run.model.device)
    dist.all_reduce(tokens)
    metrics, old = [], [None] * len(batches)
    run.policy.train()
    for step in range(config.mu):
        for i, batch in enumerate(batches):
            share = 1 / len(batches)
            if config.loss_reduction == "token":  # one mean over all tokens of all ranks, whatever their lengths
                share = float(batch.mask.sum() / tokens) * dist.get_world_size()
            # Gradients are averaged over ranks once, in the last micro-batch's backward pass.
            with nullcontext() if i == len(batches) - 1 else run.policy.no_sync():
                logps, entropy = run.policy(batch.prompts, batch.ids, batch.mask, batch.features)
                if step == 0:
                    old[i] = logps.detach()
                loss, values = grpo.grpo_loss(logps, old[i], batch.ref_logps, batch.advantages, batch.mask,
                                              config.clip_epsilon, config.kl_coef, config.loss_reduction)
                (loss * share).backward()
            values |= {"loss": loss.item(), "entropy": entropy[batch.mask].mean().item()}
            if run.completions:
                values["nll"] = -logps[batch.mask].mean().item()
            elif step == 0:
                gap = (logps.detach() - batch.sampler_logps)[batch.mask].abs()
                values |= {"sampler_gap_mean": gap.mean().item(), "sampler_gap_max": gap.max().item()}
            metrics.append(values)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.max_grad_norm)
        metrics[-1] |= {"grad_norm": norm.item(), "skipped": float(not norm.isfinite())}
        if norm.isfinite():  # the same on all ranks; else the step is left out and counted
            run.optimizer.param_groups[0]["lr"] = lr
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=False)  # None would take the gradients out of DDP's buckets: a copy more
    return runtime.combine(metrics)


def load_data(config):
    """-> (samples, demonstrated completions or None, their tasks or None), ready for training."""
    if config.demonstrations:
        try:
            rows = data.load_demonstrations(config.demonstrations, config.videos)
        except (OSError, ValueError) as error:
            raise UserError(f"--demonstrations {config.demonstrations}: {error}") from error
        evaluate.report_missing([d.sample for d in rows], config)
        rows = [d for d in rows if Path(d.sample.video).is_file()]
        samples, completions, tasks = [d.sample for d in rows], [d.completion for d in rows], [d.task for d in rows]
    else:
        samples = [s for s in evaluate.load_samples(config) if Path(s.video).is_file()]
        samples, clamped, dropped = data.prepare_training(samples)
        if config.tvg_reward == "timestamp_iou":
            timed = [s for s in samples if s.duration]
            say(f"{len(samples) - len(timed)} rows dropped whose video states no duration")
            samples = timed
        completions = tasks = None
        say(f"{config.annotations}: {len(samples)} samples; {clamped} ends clamped to the video's, {dropped} rows "
            "dropped for start >= end")
    if not samples:
        raise UserError(f"{config.demonstrations or config.annotations}: no row is left to train on.")
    return samples, completions, tasks


def make_run(config, device, samples, completions, resume_from):
    """Load the policy, its frozen reference and the optimiser -> Run."""
    torch.manual_seed(config.seed)
    model, processor = runtime.load_model(resume_from or config.model, device)
    model.model.visual.requires_grad_(config.train_vision)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    reference = None
    if config.kl_coef and not completions:
        reference, _ = runtime.load_model(config.model, device)
        reference = grpo.Policy(reference.requires_grad_(False).eval(), processor.banned, config.temperature)
    temperature = 1.0 if completions else config.temperature
    # gradient_as_bucket_view: else the buckets are a second copy of the gradients. bucket_cap_mb_list: else the second
    # iteration regroups them, and holds both for a while.
    policy = DistributedDataParallel(grpo.Policy(model, processor.banned, temperature), gradient_as_bucket_view=True,
                                     bucket_cap_mb_list=[25])
    optimizer = ZeroRedundancyOptimizer(
        [p for p in model.parameters() if p.requires_grad], optimizer_class=grpo.MasterAdamW, lr=config.lr,
        betas=config.betas, eps=config.adam_eps, weight_decay=config.weight_decay)
    if resume_from:
        runtime.load_optimizer(resume_from, model, optimizer)
    return Run(config, model, policy, reference, processor, optimizer, samples, completions)


def train(config, device):
    """Algorithm 1, with checkpoints, evaluation and a log around it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    samples, completions, tasks = load_data(config)
    held_out = []
    if config.eval_every:
        held_out = evaluate.load_samples(config, config.eval_annotations, config.eval_videos, "--eval-annotations")
    resume_from = runtime.open_output(config)
    run = make_run(config, device, samples, completions, resume_from)

    prompts = config.micro_batch * config.accumulation * world  # an iteration's, over all ranks
    total = config.iterations or math.ceil(config.epochs * len(samples) / prompts)
    start = json.loads((resume_from / "run.json").read_text())["iteration"] if resume_from else 0
    p = 1.0 if completions else config.p
    queries = [s.query for s in samples]
    has_verb = [bool(gold) for _, gold in rewards.mask_queries(queries)] if p < 1 else [False] * len(queries)
    try:
        sampler = data.TaskSampler(has_verb, prompts, p, config.inversion_tasks, config.seed, total, rank, world)
    except ValueError as error:
        raise UserError(str(error)) from error
    clips = data.TrainingClips(samples, sampler, tasks, **config.clip_limits())
    loader = iter(evaluate.make_loader(clips, config.workers, batch_sampler=[
        [(k, slot) for slot in sampler.slots] for k in range(start, total)]))
    log = runtime.Log(config, start, total)
    stop = runtime.StopSignal()

    for iteration in range(start, total):
        if config.eval_every and iteration % config.eval_every == 0:
            measure(run, held_out, iteration, log)
        began = time.perf_counter()
        items = next(loader)  # lines 6-12: the iteration's task, this rank's samples, their clips
        waited = time.perf_counter() - began
        failures = [failure for item in items for failure in item.failures]
        for failure in dict.fromkeys(failures):
            tqdm.write(f"redrawn: {failure}", file=sys.stderr)
        if any(item.clip is None for item in items):
            raise VideoError(f"{data.MAX_ATTEMPTS} draws for one slot gave no readable video: {' '.join(failures)}")

        seed = np.random.SeedSequence([config.seed, 3, iteration, rank]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(seed))
        batches, metrics = rollout(run, iteration, items, generator)  # lines 12-13: completions and their rewards
        sampled = time.perf_counter() - began - waited
        lr = config.lr * (1 - iteration / total if config.lr_schedule == "linear" else 1)
        metrics |= update(run, batches, lr)  # lines 14-16: the policy's step
        metrics |= {"lr": lr, "redrawn": len(failures), "wait_seconds": waited, "rollout_seconds": sampled,
                    "seconds": time.perf_counter() - began}

        log.write(iteration, "sft" if completions else items[0].task, metrics)
        stopping = stop.on_any_rank(device)
        done = iteration + 1
        if done % config.save_every == 0 or done == total or stopping:
            runtime.save_checkpoint(config, done, run.model, run.processor, run.optimizer)
        if stopping and done < total:
            say(f"stopped after iteration {done} of {total}; --resume goes on from {config.output}.")
            raise KeyboardInterrupt  # a script that called this must not take it for the end
    if config.eval_every:
        measure(run, held_out, total, log)
    say(f"done: {runtime.newest_checkpoint(config.output)}")


def measure(run, held_out, iteration, log):
    """Evaluate on held-out rows, all four tasks (Figure 1, right), and log it."""
    output = Path(run.config.output) / f"eval-{iteration:06d}"
    if dist.get_rank() == 0:
        shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted: its weights were others
    dist.barrier()
    rows = evaluate.evenly_spaced(len(held_out), run.config.eval_limit)
    metrics = evaluate.evaluate(lambda: (run.model, run.processor), held_out, rows, evaluate.TASKS, run.config, output)
    log.write(iteration, "eval", {k: v for k, v in metrics.items() if isinstance(v, float)})
    say(f"iteration {iteration}\n{evaluate.format_metrics(metrics)}")


if __name__ == "__main__":
    runtime.run(train, runtime.parse_settings(Config, __doc__))
