"""The completions of a run that are kept to be read: rollouts.<rank>.jsonl."""

from pathlib import Path

import torch.distributed as dist

from engine.program.files import strict_json
from engine.words.samples import demonstration_row


def append_rollouts(output, iteration, task, samples, texts, scores, ended, batches):
    """Append the completions of an iteration to this rank's file, in the fields of a demonstration and these.

    "parts" are the rewards, "advantage" is the one of the update, "cut_off" says whether the limit ended the
    completion, and "kl" is the mean k3 of its tokens, None without a reference. The completions come sample by
    sample, equally many of each.
    """
    per_sample = len(texts) // len(samples)
    advantages = [advantage for batch in batches for advantage in batch.advantages.tolist()]
    with open(Path(output) / f"rollouts.{dist.get_rank()}.jsonl", "a", encoding="utf-8") as file:
        for n, (text, parts, advantage, kl) in enumerate(zip(texts, scores, advantages, completion_kl(batches))):
            row = demonstration_row(samples[n // per_sample], task, text)
            notes = {"parts": parts, "advantage": advantage, "cut_off": not ended[n], "kl": kl}
            file.write(strict_json({"iteration": iteration} | row | notes) + "\n")


def completion_kl(batches):
    """The k3 estimate of each completion's KL from the reference (Eq. 4), mean over its tokens, before the update."""
    kls = []
    for batch in batches:
        if batch.ref_logps is None:
            kls += [None] * len(batch.mask)
            continue
        gap = (batch.ref_logps - batch.sampler_logps) * batch.mask  # 0 at padding, where k3 is 0 too
        k3 = gap.exp() - gap - 1
        kls += (k3.sum(dim=1) / batch.mask.sum(dim=1)).tolist()
    return kls
