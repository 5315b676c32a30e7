"""Numbers that are broken: in weights that are loaded, in a step, in what would be saved."""

import torch
import torch.distributed as dist

from engine.program.ranks import current
from engine.program.settings import UserError

PATIENCE = 10  # iterations in a row without a step, after which a run stops


def finite_on_all_ranks(numbers, device) -> bool:
    """Whether all numbers are finite on all ranks: the ranks take a step together, or none does."""
    numbers = torch.tensor([float(x) for x in numbers], device=device)
    broken = (~numbers.isfinite()).any().float()
    dist.all_reduce(broken)
    return not broken


def broken_weights(model) -> list[str]:
    """The names of the weights that are not finite."""
    return [name for name, p in model.named_parameters() if not is_finite(p)]


def is_finite(x) -> bool:
    """Whether all numbers of a tensor are finite.

    `isfinite` would write a tensor first: on one thread, as torchrun has it, 10 s for 10^9 numbers in host memory.
    """
    lowest, highest = x.detach().aminmax()  # both are NaN where one number is
    return bool(lowest.isfinite() & highest.isfinite())


def check_finite(model, optimizer):
    """Raise UserError where a weight, or a number of the optimiser's state, is not finite."""
    names = {p: name for name, p in model.named_parameters()}
    broken = broken_weights(model)
    broken += [names[p] for p, state in optimizer.optim.state.items()
               if not all(is_finite(x) for x in state.values() if torch.is_tensor(x))]
    if broken:
        raise UserError(f"{len(broken)} weights are no longer finite, {broken[0]} among them; nothing is saved, and "
                        "the checkpoints before are whole; lower --lr, and name another --output.")


def check_first_kl(config, iteration, metrics):
    """Policy and reference begin with the same weights: raise UserError where their first passes differ anyway."""
    if iteration == 0 and config.mu == 1 and metrics.get("kl", 0.0) > 1e-3:
        raise UserError(f"the first iteration's KL is {metrics['kl']:.3g}, though policy and reference have the same "
                        "weights: a pass of one of them is wrong; please report this with your versions.")


def count_skipped(skipped, metrics) -> int:
    """The iterations in a row that took no step, of which there were `skipped` before this one's `metrics`.

    Raises UserError at the tenth: the checkpoints are then from before them, for meanwhile none is written.
    """
    skipped = skipped + 1 if metrics["skipped"] == 1 else 0
    if skipped == PATIENCE:
        raise UserError(f"{PATIENCE} iterations in a row had a loss or a gradient that is not finite, the last one on "
                        f"{', '.join(current.videos)}; lower --lr and name another --output; the checkpoints are from "
                        "before.")
    return skipped
