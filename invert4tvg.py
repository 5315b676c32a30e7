"""Invert4TVG: reinforcement learning for temporal video grounding with inversion tasks (Algorithm 1).

    torchrun --nproc_per_node 8 invert4tvg.py --annotations FILE --videos FOLDER --output FOLDER

Each iteration trains one task, drawn for all ranks together: with probability p grounding (TVG: video and query ->
start and end, reward IoU + format), else an inversion (the ground-truth clip -> the query's verbs, reward verb match +
format): Verb Completion, Action Recognition or Video Description. In short, Algorithm 1 is

    lines 6-11      draw the task: grounding with probability p, else one of the inversions    Eq. 13
    line 12         sample a group of G completions for each prompt
    lines 8, 13     reward each completion                                                     Eq. 10, 11
                    compare within the group                                                   Eq. 3
    lines 9, 14-16  take the gradient, with a KL penalty, and step the policy                  Eq. 3, 4

`grpo_iteration` is these lines, `update` the last of them. --demonstrations runs a supervised stage in the same loop:
each given completion is a group of one with advantage 1 and no KL, whose gradient is that of cross-entropy.

docs/departures.md lists where this departs from the paper, and the option that restores the paper's choice. The same
command goes on with an interrupted run.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

import data
import evaluate
import grpo
import rewards
from engine import checkpoints
from engine.clips import Clips, Item, read_ahead
from engine.lora import MemorySettings, WithoutAdapters
from engine.optimizer import clip_gradients, sharded_adamw
from engine.parallel import data_parallel, frozen_reference
from engine.prompts import completion_texts, encode_completions
from engine.recovery import Saves, Saving, check_space, finite_everywhere, keep_batch
from engine.rollouts import append_rollouts
from engine.runtime import Log, StopSignal, combine, counted, group_metrics, launch, random_generator, say
from engine.settings import UserError, flag, parse_settings


@dataclass(frozen=True)
class Config(MemorySettings, Saving, data.Settings):
    """The settings of a training run: those of data.Settings (files, videos, formats), of memory, of saving, and these.

    A number is above `above`, at least `least`, at most `most`. needs="x": valid only together with --x. unless="x":
    not allowed together with --x. free: may change when a run goes on. find: looks a name up. engine/settings.py checks
    all of this. "Released code" is the repository that the paper's authors published.
    """

    # the method
    p: float = flag(0.8, "probability that an iteration trains grounding; Eq. 13", least=0, most=1,
                    unless="demonstrations")
    inversion_tasks: tuple = flag(rewards.TASKS[1:], "vc, ar, vd (Table 2) or MODULE.NAME, drawn uniformly; those that "
                                  "demonstrations may hold, too", find=rewards.inversion)
    inversion_reward: str = flag("binary", "verb match or similarity; Table 3", choices=tuple(rewards.SIMILARITIES),
                                 unless="demonstrations")
    vd_verb_cap: int = flag(0, "a VD answer with more distinct verbs scores 0; 0: no cap (Eq. 7 has none)", least=0,
                            unless="demonstrations")
    demonstrations: str = flag("", "jsonl of {video, query, start, end, task, completion} to imitate instead of "
                               "sampling: a supervised stage (Appendix D)")
    # GRPO
    group_size: int = flag(8, "completions sampled for a prompt, G of Eq. 3; released code", above=0,
                           unless="demonstrations")
    temperature: float = flag(1.0, "sampling temperature; released code", above=0, unless="demonstrations")
    clip_epsilon: float = flag(0.2, "the ratio counts within 1 +- this; released code", least=0)
    kl_coef: float = flag(0.04, "beta of Eq. 4; 0 needs no reference model; released code", least=0,
                          unless="demonstrations")
    mu: int = flag(1, "updates on each iteration's completions; released code", above=0)
    loss_reduction: str = flag("completion", "completion: mean over each completion's tokens, then over completions; "
                               "token: one mean over all tokens (released code)", choices=("completion", "token"))
    # the optimiser
    lr: float = flag(None, "learning rate; default 1e-6 (released log; the paper prints 5e-5), with --demonstrations "
                     "1e-5", above=0)
    lr_schedule: str = flag("linear", "decay to 0 over the run (released code), or none",
                            choices=("linear", "constant"))
    betas: tuple = flag((0.9, 0.999), "AdamW's; Section 3.1")
    adam_eps: float = flag(1e-8, "AdamW's; Section 3.1", least=0)
    weight_decay: float = flag(0.0, "AdamW's; Section 3.1", least=0)
    max_grad_norm: float = flag(1.0, "gradient clipping; released code", above=0)
    epochs: float = flag(2.0, "passes over the samples; Appendix C", above=0)
    iterations: int = flag(0, "instead of --epochs; each has --mu optimiser steps; 0: by epochs", least=0)
    accumulation: int = flag(1, "micro-batches of an iteration on each rank. Prompts of an iteration: --micro-batch "
                             "x this x processes (the paper's batch of 4 is ambiguous)", above=0, free=True)
    train_vision: bool = flag(False, "train the vision tower and merger too; released code")
    gradient_checkpointing: bool = flag(True, "recompute activations in the backward pass; released code")
    # the run
    seed: int = flag(0, "of task draws, sample order and sampling", least=0, most=2**63 - 1)
    eval_every: int = flag(0, "iterations between evaluations on held-out samples (Figure 1, right); 0: none", least=0)
    eval_annotations: str = flag("data/charades_sta_test.txt", "held-out rows", needs="eval_every")
    eval_videos: str = flag("", "their videos; empty: --videos", needs="eval_every")
    eval_limit: int = flag(200, "held-out rows measured each time, evenly spaced; 0: all", least=0, needs="eval_every")

    def check(self):
        super().check()
        if self.group_size < 2:
            raise UserError("--group-size 1 leaves nothing to compare; use 2 or more.")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"--betas is {' '.join(map(str, self.betas))}; give two numbers from 0 to below 1.")
        if self.demonstrations and self.annotations != Config.annotations:
            raise UserError("--annotations has no meaning with --demonstrations; leave one of them out.")

    def reward_settings(self) -> dict:
        """The settings of `rewards.score` with which completions are rewarded.

        Evaluation leaves these two out, so that every model is measured by equal verbs.
        """
        return self.scoring() | {"inversion_reward": self.inversion_reward, "vd_verb_cap": self.vd_verb_cap}

    def peak_lr(self) -> float:
        return self.lr or (1e-5 if self.demonstrations else 1e-6)

    def learning_rate(self, iteration: int, total: int) -> float:
        left = 1 - iteration / total if self.lr_schedule == "linear" else 1
        return self.peak_lr() * left


class Run(NamedTuple):
    """What lasts through a run."""

    config: Config
    samples: list[data.Sample]
    completions: list[str] | None  # of the demonstrations
    sampler: data.TaskSampler
    model: torch.nn.Module  # the policy's Qwen2.5-VL
    policy: torch.nn.Module  # grpo.Policy(model), averaging gradients over the ranks
    reference: torch.nn.Module | None  # grpo.Policy, frozen
    processor: checkpoints.Processor  # tokenizer, pixel statistics, ids that end a completion or are banned
    optimizer: torch.optim.Optimizer  # AdamW with float32 master weights, sharded over the ranks


class Batch(NamedTuple):
    """A micro-batch of groups, ready for the update; N completions of at most C tokens."""

    prompts: list[grpo.Prompt]
    ids: torch.Tensor  # (N, C)
    mask: torch.Tensor  # (N, C)
    features: list[torch.Tensor] | None  # the frozen tower's, shared by policy and reference; None where it is trained
    advantages: torch.Tensor  # (N,)
    sampler_logps: torch.Tensor | None  # (N, C), only to measure their gap to the training pass
    ref_logps: torch.Tensor | None  # (N, C)


# ------------------------------------------------------------------------------------------------ Algorithm 1


def grpo_iteration(run: Run, iteration: int, items: list[Item], lr: float) -> dict[str, float]:
    """One iteration on this rank -> metrics. `items` are its samples with their clips, decoded in the workers.

    The clip is the whole video for grounding, the ground-truth segment for an inversion.
    """
    began = time.perf_counter()
    config = run.config
    G = config.group_size
    task = run.sampler.task(iteration)  # lines 6-11, Eq. 13; the same on every rank, and the `task` of every item

    samples = [run.samples[item.index] for item in items]
    prompts = [data.build_prompt(run.model, run.processor, sample, task, item.clip, config)
               for sample, item in zip(samples, items)]
    with torch.no_grad():
        features = grpo.visual_features(run.model, prompts)
    generator = random_generator(run.model.device, config.seed, data.SAMPLING, iteration, dist.get_rank())
    rollout = grpo.sample_group(  # line 12; all prompts together, since a decoding step costs the same for one or eight
        run.model, prompts, G, config.max_new_tokens, run.processor.eos, run.processor.banned, config.temperature,
        generator, features)

    texts = completion_texts(run.processor.tokenizer, rollout)  # prompt by prompt, G of each
    settings = config.reward_settings()
    scores = [rewards.score(task, text, samples[n // G], **settings) for n, text in enumerate(texts)]  # lines 8, 13
    totals = torch.tensor([s["total"] for s in scores], device=run.model.device).view(-1, G)  # (prompts, G)
    advantages = grpo.group_advantages(totals).flatten()  # Eq. 3

    frozen_features = None if config.train_vision else features  # a trained tower runs inside the policy's pass
    batches = micro_batches(run, prompts, rollout.ids, rollout.mask, frozen_features, advantages, rollout.logps)
    if config.save_rollouts and iteration % config.save_rollouts == 0:
        append_rollouts(config.output, iteration, task, samples, texts, scores, rollout.ended.tolist(), batches)
    metrics = group_metrics(task, scores, G)
    metrics["cut_off"] = (~rollout.ended).float().mean().item()
    metrics["rollout_seconds"] = time.perf_counter() - began
    return metrics | update(run, batches, lr)  # lines 9, 14-16, Eq. 3 and 4


def supervised_iteration(run: Run, iteration: int, items: list[Item], lr: float) -> dict[str, float]:
    """One iteration of imitation: every demonstration is a group of one with advantage 1."""
    began = time.perf_counter()
    device = run.model.device
    prompts = [data.build_prompt(run.model, run.processor, run.samples[item.index], item.task, item.clip, run.config)
               for item in items]
    texts = [run.completions[item.index] for item in items]
    ids, mask = encode_completions(run.processor.tokenizer, texts, device)
    features = None
    if not run.config.train_vision:
        with torch.no_grad():
            features = grpo.visual_features(run.model, prompts)
    batches = micro_batches(run, prompts, ids, mask, features, torch.ones(len(ids), device=device))
    rollout_seconds = time.perf_counter() - began
    return update(run, batches, lr) | {"rollout_seconds": rollout_seconds}


def micro_batches(run, prompts, ids, mask, features, advantages, sampler_logps=None) -> list[Batch]:
    """Cut an iteration into batches of --micro-batch prompts, each as wide as its longest completion."""
    G = len(ids) // len(prompts)
    batches = []
    for first in range(0, len(prompts), run.config.micro_batch):
        chosen = slice(first, first + run.config.micro_batch)
        rows = slice(chosen.start * G, chosen.stop * G)
        width = int(mask[rows].sum(dim=1).max())
        inputs = (prompts[chosen], ids[rows, :width], mask[rows, :width], features[chosen] if features else None)
        ref_logps = None
        if run.reference:
            with torch.no_grad():
                ref_logps, _ = run.reference(*inputs)
        recorded = None if sampler_logps is None else sampler_logps[rows, :width]
        batches.append(Batch(*inputs, advantages[rows], recorded, ref_logps))
    return batches


def update(run: Run, batches: list[Batch], lr: float) -> dict[str, float]:
    """Take --mu optimiser steps on the iteration's completions -> metrics, combined over updates and batches.

    The old policy is the one before the first step: the old log-probabilities are those of the first pass. With mu = 1
    the ratio is therefore 1, and only its gradient matters. The sampler's own log-probabilities are not taken for the
    old ones, since in bfloat16 they differ by rounding and the ratio would not begin at 1. Their gap is logged.
    """
    config = run.config
    all_tokens = torch.tensor(float(sum(batch.mask.sum() for batch in batches)), device=run.model.device)
    dist.all_reduce(all_tokens)
    old_logps = [None] * len(batches)
    metrics = []
    run.policy.train()
    for step in range(config.mu):
        for i, batch in enumerate(batches):
            share = 1 / len(batches)
            if config.loss_reduction == "token":
                # Of all batches b on all W ranks, with sum S_b over T_b tokens, sum(S_b) / all_tokens is wanted. The
                # loss is S_b / T_b, and DDP divides by W.
                share = float(batch.mask.sum() / all_tokens) * dist.get_world_size()
            is_last = i == len(batches) - 1
            with nullcontext() if is_last else run.policy.no_sync():  # ranks average once, in the last backward pass
                logps, entropy = run.policy(batch.prompts, batch.ids, batch.mask, batch.features)
                if step == 0:
                    old_logps[i] = logps.detach()
                loss, values = grpo.grpo_loss(logps, old_logps[i], batch.ref_logps, batch.advantages, batch.mask,
                                              config.clip_epsilon, config.kl_coef, config.loss_reduction)
                (loss * share).backward()  # lines 9, 14
            values["loss"] = loss.item()
            values["entropy"] = entropy[batch.mask].mean().item()
            values["length"] = batch.mask.sum(dim=1).float().mean().item()
            if run.completions:
                values["nll"] = -logps[batch.mask].mean().item()
            if batch.sampler_logps is not None and step == 0:
                gap = (logps.detach() - batch.sampler_logps)[batch.mask].abs()
                values["sampler_gap_mean"] = gap.mean().item()
                values["sampler_gap_max"] = gap.max().item()
            metrics.append(values)
        norm = clip_gradients(run.model.parameters(), config.max_grad_norm)
        losses = [values["loss"] for values in metrics[-len(batches):]]
        finite = finite_everywhere([norm, *losses], norm.device)  # else all ranks leave the step out and count it
        if finite:
            run.optimizer.param_groups[0]["lr"] = lr
            run.optimizer.step()  # line 16
        else:
            keep_batch(config.output, batches)
        run.optimizer.zero_grad(set_to_none=False)  # the gradients are views of DDP's buckets; None would force a copy
        metrics.append({"grad_norm": norm.item(), "skipped": float(not finite)})
    return combine(metrics)


# ------------------------------------------------------------------------------------------------ around it


def make_run(config, device, samples, completions, sampler, folder, start) -> Run:
    """Load the policy from one folder, its frozen reference from another, and make the optimiser."""
    model, processor = checkpoints.load_for_training(config, folder, start, device)
    policy = grpo.Policy(model, processor.banned, config.temperature)
    reference = None
    if config.kl_coef and not completions and config.lora_rank:
        reference = WithoutAdapters(policy)
    elif config.kl_coef and not completions:
        original, _ = checkpoints.load_model(start, device)
        reference = frozen_reference(grpo.Policy(original, processor.banned, config.temperature), config.train_vision)
    optimizer = sharded_adamw(model, config)
    return Run(config, samples, completions, sampler, model, data_parallel(policy), reference, processor, optimizer)


def train(config: Config, device: torch.device):
    """A whole run: Algorithm 1 or a supervised stage, with checkpoints, evaluation and a log around it."""
    prompts_per_iteration = config.micro_batch * config.accumulation * dist.get_world_size()
    resume_from, finished = checkpoints.find_run(config, prompts_per_iteration)  # refuses another run's folder
    if finished:
        say(f"{config.output} is finished: {resume_from}")
        return
    samples, completions, tasks = data.load_imitated(config) if config.demonstrations else data.load_training(config)
    held_out = []
    if config.eval_every:
        held_out = data.load_samples(config, config.eval_annotations, config.eval_videos, "--eval-annotations", "best")
    origin = checkpoints.note_origin(config, resume_from, samples, completions, tasks)
    sampler = data.make_sampler(config, samples, prompts_per_iteration, dist.get_rank(), dist.get_world_size())
    total = sampler.iterations
    checkpoints.start_output(config, resume_from)
    say(f"model: {resume_from or origin['start']}")
    run = make_run(config, device, samples, completions, sampler, resume_from or origin["start"], origin["start"])
    check_space(config.output, run.model)
    start = checkpoints.resume(resume_from, run.model, run.optimizer)

    # What each iteration needs on this rank: for every slot, a prompt's place in it, the samples to try until a video
    # can be read.
    wanted = ([sampler.candidates(k, slot, tasks) for slot in sampler.slots] for k in range(start, total))
    arriving = read_ahead(Clips(samples, config.clip_settings()), wanted, config.workers, config.clip_timeout)
    log = Log(config, start, total)
    stop = StopSignal()
    saves = Saves(config, total, device)
    step = supervised_iteration if completions else grpo_iteration

    for iteration in counted(start, total):
        if config.eval_every and iteration % config.eval_every == 0:
            evaluate.measure(run.model, run.processor, held_out, config, iteration, log)
        began = time.perf_counter()
        items = next(arriving)
        wait_seconds = time.perf_counter() - began
        redrawn = data.report_unreadable(items)

        lr = config.learning_rate(iteration, total)
        metrics = step(run, iteration, items, lr)
        checkpoints.check_first_kl(config, iteration, metrics)
        metrics |= {"lr": lr, "redrawn": redrawn, "wait_seconds": wait_seconds, "seconds": time.perf_counter() - began}
        log.write(iteration, "sft" if completions else sampler.task(iteration), metrics)

        stopping = stop.on_any_rank(device)
        done = iteration + 1
        if saves.are_due(done, metrics, stopping):
            progress = {"iteration": done, "iterations": total, "prompts": prompts_per_iteration} | origin
            checkpoints.save_checkpoint(config, progress, run.model, run.processor, run.optimizer)
        if stopping and done < total:
            say(f"stopped after iteration {done} of {total}; the same command goes on from {config.output}.")
            raise KeyboardInterrupt  # `launch` exits with status 130: a script must not take this for the end
    if config.eval_every:
        evaluate.measure(run.model, run.processor, held_out, config, total, log)
    say(f"done: the model is in {checkpoints.newest_checkpoint(config.output)}; evaluate.py --model {config.output} "
        "measures it.")


if __name__ == "__main__":
    launch(train, parse_settings(Config, __doc__))
