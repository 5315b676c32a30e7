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

docs/departures.md lists the departures from the paper. The same command goes on with an interrupted run.
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
from engine.model import health, loading
from engine.model.attention import frozen_features
from engine.model.lora import WithoutAdapters
from engine.model.optimizer import clip_gradients, sharded_adamw
from engine.model.parallel import data_parallel, frozen_reference
from engine.model.prompts import completion_texts, encode_completions
from engine.program.launch import StopSignal, launch
from engine.program.ranks import current, on_rank_0, random_generator, say
from engine.program.settings import flag, parse_settings
from engine.run.checkpoints import resume, save_checkpoint
from engine.run.environment import note_end
from engine.run.log import Log, combine, group_metrics
from engine.run.opening import check_space, open_run
from engine.run.rollouts import append_rollouts
from engine.run.start import from_run
from engine.video.clips import Clips, Item, read_ahead


@dataclass(frozen=True)
class Config(data.Settings):
    """The settings of a training run: these, and those of data.Settings (files, videos, formats).

    A number is above `above`, at least `least`, at most `most`. needs="x": valid only together with --x. unless="x":
    not allowed together with --x. free: may change when a run goes on. find: looks a name up. All this is checked by
    engine/program/settings.py. "Released code" is the repository that the paper's authors published.
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
    group_size: int = flag(8, "completions sampled for a prompt, G of Eq. 3; released code", least=2,
                           unless="demonstrations")
    temperature: float = flag(1.0, "sampling temperature; released code", above=0, unless="demonstrations")
    clip_epsilon: float = flag(0.2, "clip the ratio to 1 - this ... 1 + this; released code", least=0)
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
    weight_decay: float = flag(0.0, "AdamW's; Section 3.1", least=0)
    epochs: float = flag(2.0, "passes over the samples; Appendix C", above=0)
    iterations: int = flag(0, "instead of --epochs; each has --mu optimiser steps; 0: by epochs", least=0)
    accumulation: int = flag(1, "micro-batches of an iteration on each rank. Prompts of an iteration: --micro-batch "
                             "x this x processes (the paper's batch of 4 is ambiguous); a run may go on with another "
                             "split of the same product", above=0, free=True)
    train_vision: bool = flag(False, "train the vision tower and merger too; released code")
    # the memory of a card
    gradient_checkpointing: bool = flag(True, "recompute activations in the backward pass; released code")
    offload_optimizer: bool = flag(False, "keep the optimiser's state in host memory, 12 bytes a trained parameter "
                                   "over all processes of a node; equal bit for bit, a little slower", free=True)
    lora_rank: int = flag(0, "train adapters of this rank instead of the language model's own weights (LoRA), with a "
                          "larger --lr; 0: the weights", least=0, unless="train_vision")
    # the run
    seed: int = flag(0, "of task draws, sample order and sampling", least=0, most=2**63 - 1)
    eval_every: int = flag(0, "iterations between evaluations on held-out samples (Figure 1, right); 0: none", least=0)
    eval_annotations: str = flag("data/charades_sta_test.txt", "held-out rows", needs="eval_every")
    eval_videos: str = flag("", "their videos; empty: --videos", needs="eval_every")
    eval_limit: int = flag(200, "held-out rows measured each time, evenly spaced; 0: all", least=0, needs="eval_every")
    save_every: int = flag(500, "iterations between checkpoints; one is written at the end in any case", above=0,
                           free=True)
    keep: int = flag(2, "checkpoints kept", above=0, free=True)
    save_rollouts: int = flag(50, "iterations between those whose completions are kept in rollouts.<rank>.jsonl; 0: "
                              "none", least=0, unless="demonstrations")
    log_to: tuple = flag((), "show the log there too; docs/metrics.md", choices=("tensorboard", "wandb"), free=True)

    def training_scoring(self) -> rewards.Scoring:
        """With what completions are rewarded.

        Evaluation calls `scoring`, without these two: how a model was trained must not change how it is measured.
        """
        return self.scoring()._replace(inversion_reward=self.inversion_reward, vd_verb_cap=self.vd_verb_cap)

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
    processor: loading.Processor  # tokenizer, pixel statistics, ids that end a completion or are banned
    optimizer: torch.optim.Optimizer  # AdamW with float32 master weights, sharded over the ranks


class Batch(NamedTuple):
    """A micro-batch of groups, ready for the update; N completions of at most C tokens."""

    prompts: list[grpo.Prompt]
    ids: torch.Tensor  # (N, C)
    mask: torch.Tensor  # (N, C)
    features: list[torch.Tensor] | None  # the frozen tower's, for policy and reference; None: a trained tower runs
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
    features = frozen_features(run.model, prompts)
    generator = random_generator(run.model.device, config.seed, data.SAMPLING, iteration, dist.get_rank())
    rollout = grpo.sample_group(  # line 12; all prompts together, since a decoding step costs the same for one or eight
        run.model, prompts, G, config.max_new_tokens, run.processor.eos, run.processor.banned, config.temperature,
        generator, features)

    texts = completion_texts(run.processor.tokenizer, rollout)  # prompt by prompt, G of each
    scoring = config.training_scoring()
    scores = [rewards.score(task, text, samples[n // G], scoring) for n, text in enumerate(texts)]  # lines 8, 13
    totals = torch.tensor([s["total"] for s in scores], device=run.model.device).view(-1, G)  # (prompts, G)
    advantages = grpo.group_advantages(totals).flatten()  # Eq. 3

    if config.train_vision:
        features = None  # the tower runs again, inside the policy's pass
    batches = micro_batches(run, prompts, rollout.ids, rollout.mask, features, advantages, rollout.logps)
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
    features = None if run.config.train_vision else frozen_features(run.model, prompts)
    batches = micro_batches(run, prompts, ids, mask, features, torch.ones(len(ids), device=device))
    return {"rollout_seconds": time.perf_counter() - began} | update(run, batches, lr)


def micro_batches(run, prompts, ids, mask, features, advantages, sampler_logps=None) -> list[Batch]:
    """Cut an iteration into batches of --micro-batch prompts, and ask the reference about each.

    A batch is only as wide as its longest completion.
    """
    G = len(ids) // len(prompts)
    batches = []
    for first in range(0, len(prompts), run.config.micro_batch):
        last = first + run.config.micro_batch
        rows = slice(first * G, last * G)  # of its completions
        width = int(mask[rows].sum(dim=1).max())
        inputs = (prompts[first:last], ids[rows, :width], mask[rows, :width], features and features[first:last])
        ref_logps = run.reference(*inputs)[0] if run.reference else None
        recorded = None if sampler_logps is None else sampler_logps[rows, :width]
        batches.append(Batch(*inputs, advantages=advantages[rows], sampler_logps=recorded, ref_logps=ref_logps))
    return batches


def update(run: Run, batches: list[Batch], lr: float) -> dict[str, float]:
    """Take --mu optimiser steps on the iteration's completions -> metrics, combined over updates and batches.

    The old policy is the one before the first step: the old log-probabilities are those of the first pass. With mu = 1
    the ratio is therefore 1, and only its gradient matters. The sampler's own log-probabilities are not taken for the
    old ones, since in bfloat16 they differ by rounding and the ratio would not begin at 1. Their gap is logged.
    """
    config = run.config
    all_tokens = torch.tensor(float(sum(batch.mask.sum() for batch in batches)), device=run.model.device)
    dist.all_reduce(all_tokens)  # of all batches on all ranks
    old_logps = [None] * len(batches)
    metrics = []
    run.policy.train()
    for step in range(config.mu):
        losses = []
        for i, batch in enumerate(batches):
            share = 1 / len(batches)  # of the iteration's loss
            if config.loss_reduction == "token":
                # The loss is a mean over this batch's tokens, and one over all tokens is wanted: a batch counts by its
                # share of them. DDP divides by the number of ranks, so it is multiplied by that first.
                share = float(batch.mask.sum() / all_tokens) * dist.get_world_size()
            is_last = i == len(batches) - 1
            with nullcontext() if is_last else run.policy.no_sync():  # ranks average once, in the last backward pass
                logps, entropy = run.policy(batch.prompts, batch.ids, batch.mask, batch.features)
                if step == 0:
                    old_logps[i] = logps.detach()
                loss, values = grpo.grpo_loss(logps, old_logps[i], batch.ref_logps, batch.advantages, batch.mask,
                                              config.clip_epsilon, config.kl_coef, config.loss_reduction)
                (loss * share).backward()  # lines 9, 14
            losses.append(loss.item())
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
        norm = clip_gradients(run.model.parameters(), max_norm=1.0)  # released code
        is_finite = health.finite_on_all_ranks([norm, *losses], norm.device)
        if is_finite:  # else every rank leaves the step out
            run.optimizer.param_groups[0]["lr"] = lr  # its only group
            run.optimizer.step()  # line 16
        run.optimizer.zero_grad(set_to_none=False)  # DDP has the gradients' memory, and would have to copy new ones
        metrics.append({"grad_norm": norm.item(), "skipped": float(not is_finite)})
    return combine(metrics)  # a mean over those of the dictionaries that have a name


# ------------------------------------------------------------------------------------------------ around it


def make_run(config, device, opening, sampler) -> Run:
    """Load the policy and its frozen reference, which is the policy as the run began, and make the optimiser."""
    model, processor = loading.load_for_training(config, opening.weights, opening.base, device)
    policy = grpo.Policy(model, processor.banned, config.temperature)
    reference = None
    if config.kl_coef and not config.demonstrations and config.lora_rank:
        reference = WithoutAdapters(policy)
    elif config.kl_coef and not config.demonstrations:
        base_model, _ = loading.load_model(opening.base, device)
        base_policy = grpo.Policy(base_model, processor.banned, config.temperature)
        reference = frozen_reference(base_policy, keep_tower=config.train_vision)
    optimizer = sharded_adamw(model, config)
    return Run(config, opening.samples, opening.completions, sampler, model, data_parallel(policy), reference,
               processor, optimizer)


def train(config: Config, device: torch.device):
    """A whole run: Algorithm 1 or a supervised stage, with checkpoints, evaluation and a log around it."""
    prompts_per_iteration = config.micro_batch * config.accumulation * dist.get_world_size()
    load = data.load_imitated if config.demonstrations else data.load_training
    opening = open_run(config, prompts_per_iteration, load, data.load_held_out)
    if opening is None:  # this run is finished
        return
    sampler = data.make_sampler(config, opening.samples, prompts_per_iteration, dist.get_rank(), dist.get_world_size())
    total = sampler.iterations
    run = make_run(config, device, opening, sampler)
    check_space(config.output, run.model)
    first = resume(opening.checkpoint, run.model, run.optimizer)  # 0 where there is nothing to go on with

    # For each iteration and each of this rank's prompts in it: the samples to try until a video can be read.
    wanted = ([sampler.candidates(k, slot, opening.tasks) for slot in sampler.slots] for k in range(first, total))
    arriving = read_ahead(Clips(opening.samples, config.clip_settings()), wanted, config.workers)
    log = Log(config, opening.origin["run"], first, total)
    stop = StopSignal()
    step = supervised_iteration if config.demonstrations else grpo_iteration
    skipped = 0  # iterations in a row whose step was left out
    save_is_due = False

    for iteration in range(first, total):
        current.iteration = iteration  # for the words of an error
        if config.eval_every and iteration % config.eval_every == 0:
            evaluate.measure(run.model, run.processor, opening.held_out, config, iteration, log)
        began = time.perf_counter()
        items = next(arriving)
        wait_seconds = time.perf_counter() - began
        redrawn = data.report_unreadable(items)

        lr = config.learning_rate(iteration, total)
        metrics = step(run, iteration, items, lr)
        health.check_first_kl(config, iteration, metrics)
        metrics |= {"lr": lr, "redrawn": redrawn, "wait_seconds": wait_seconds, "seconds": time.perf_counter() - began}
        log.write(iteration, "sft" if config.demonstrations else sampler.task(iteration), metrics)
        skipped = health.count_skipped(skipped, metrics)  # ends the run at the tenth in a row

        done = iteration + 1
        stopping = stop.on_any_rank(device)
        save_is_due |= done % config.save_every == 0
        if stopping or done == total or save_is_due and not skipped:  # after a step that was left out it waits
            progress = {"iteration": done, "iterations": total, "prompts": prompts_per_iteration} | opening.origin
            save_checkpoint(config, progress, run.model, run.processor, run.optimizer)
            save_is_due = False
        if stopping and done < total:
            say(f"stopped after iteration {done} of {total}; the same command goes on from {config.output}.")
            raise KeyboardInterrupt  # `launch` exits with status 130: a script must not take this for the end
    if config.eval_every:
        evaluate.measure(run.model, run.processor, opening.held_out, config, total, log)
    on_rank_0(note_end, config.output)
    say(f"done: the model is in {loading.newest_checkpoint(config.output)}; evaluate.py --model {config.output} "
        "measures it.")


if __name__ == "__main__":
    launch(train, parse_settings(Config, __doc__, inherit=from_run))
