"""Data parallelism, and AdamW for bfloat16 weights, sharded over the ranks."""

import torch
from torch.nn.parallel import DistributedDataParallel


def data_parallel(policy):
    """Average the policy's gradients over the ranks in each backward pass.

    With gradient_as_bucket_view gradients live in DDP's buckets, not in a second copy. DDP rebuilds its buckets after
    the first backward pass, and briefly holds both, unless their sizes (here 25 MB each) are given as a list.
    """
    return DistributedDataParallel(policy, gradient_as_bucket_view=True, bucket_cap_mb_list=[25])


def sharded_adamw(model, **settings):
    """AdamW over the model's trained parameters, with each rank holding a share of the state."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # not above: a mistyped option should not wait for it

    trained = [p for p in model.parameters() if p.requires_grad]
    return ZeroRedundancyOptimizer(trained, optimizer_class=MasterAdamW, **settings)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW whose state holds a float32 master copy of every parameter that is not float32 itself.

    A bfloat16 weight has 8 bits: an update of 1e-6 to a weight of 0.02 is lost in rounding. In the master it adds up.
    The masters live in the optimiser's state so that ZeroRedundancyOptimizer shards them over ranks with the moments.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group)

    def _step_one(self, p, group):
        lr = group["lr"]
        beta1, beta2 = group["betas"]
        grad = p.grad.float()
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(grad)
            state["exp_avg_sq"] = torch.zeros_like(grad)
            if p.dtype != torch.float32:
                state["master"] = p.float()
        master = state.get("master", p)

        state["step"] += 1
        master.mul_(1 - lr * group["weight_decay"])
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        variance = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
        deviation = variance.sqrt_().add_(group["eps"])
        master.addcdiv_(state["exp_avg"], deviation, value=-lr / (1 - beta1 ** state["step"]))
        if master is not p:
            p.copy_(master)
