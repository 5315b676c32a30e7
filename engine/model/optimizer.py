"""AdamW for bfloat16 weights, sharded over the ranks, with its state on the device or in host memory."""

import mmap

import torch

from engine.program.settings import UserError

BETAS = (0.9, 0.999)  # Section 3.1
EPSILON = 1e-8  # Section 3.1
SLICE = 2**24  # numbers that are updated at a time: 64 MiB in float32


def sharded_adamw(model, config):
    """AdamW over the model's trained parameters, with each rank holding a share of the state."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # not above: a mistyped option should not wait for it

    trained = [p for p in model.parameters() if p.requires_grad]
    return ZeroRedundancyOptimizer(trained, optimizer_class=MasterAdamW, lr=config.peak_lr(),
                                   weight_decay=config.weight_decay, offload=config.offload_optimizer)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW whose state holds a float32 master copy of every parameter that is not float32 itself.

    A bfloat16 weight has 8 bits: an update of 1e-6 to a weight of 0.02 is lost in rounding. In the master it adds up.
    The masters live in the optimiser's state so that ZeroRedundancyOptimizer shards them over ranks with the moments.

    With `offload` the state lives in host memory, and a step moves it through the device slice by slice. Every number
    is computed as without, so the results are equal bit for bit.
    """

    def __init__(self, params, lr, weight_decay=0.0, offload=False):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, offload=offload))
        self.room = None  # with `offload`: {p: tensors for its state}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group)
        if self.room and p.is_cuda:
            torch.cuda.synchronize()  # the state is on its way back, and a checkpoint may read it next

    def _step_one(self, p, group):
        offload = self.defaults["offload"]
        state = self.state_of(p)
        state["step"] += 1
        tensors_of_p = [state[name] for name in state_tensors(p)]
        for grad, weight, *host in zip(*(x.view(-1).split(SLICE) for x in (p.grad, p, *tensors_of_p))):
            on_device = [x.to(p.device, non_blocking=True, copy=True) for x in host] if offload else host
            update(weight, grad.float(), *on_device, step=state["step"], group=group)
            if offload:
                for x, new in zip(host, on_device):
                    x.copy_(new, non_blocking=True)

    @torch.no_grad()
    def state_of(self, p):
        """The state of a parameter, made where there is none yet -> {"step", and the tensors of `state_tensors`}."""
        state = self.state[p]
        if not state:
            names = state_tensors(p)
            if self.defaults["offload"]:
                self.room = self.room or host_room([p for group in self.param_groups for p in group["params"]])
                tensors = self.room[p]
            else:
                tensors = [torch.zeros_like(p, dtype=torch.float32) for _ in names]
            state.update(zip(names, tensors))
            state["step"] = 0
            if "master" in state:
                for master, weight in zip(state["master"].view(-1).split(SLICE), p.view(-1).split(SLICE)):
                    master.copy_(weight)  # on its way to the host a slice is float32 on the device
        return state


def state_tensors(p):
    """Names of the float32 tensors in a parameter's state."""
    return ("exp_avg", "exp_avg_sq") if p.dtype == torch.float32 else ("exp_avg", "exp_avg_sq", "master")


def update(weight, grad, exp_avg, exp_avg_sq, master=None, *, step, group):
    """One AdamW step in place; all but a bfloat16 `weight` are float32."""
    lr = group["lr"]
    beta1, beta2 = BETAS
    full = weight if master is None else master
    full.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    deviation = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(EPSILON)
    full.addcdiv_(exp_avg, deviation, value=-lr / (1 - beta1**step))
    if master is not None:
        weight.copy_(master)


@torch.no_grad()
def clip_gradients(parameters, max_norm):
    """Scale all gradients by one factor where their norm exceeds `max_norm` -> the norm before, float32.

    torch.nn.utils.clip_grad_norm_ takes the norm of bfloat16 gradients in bfloat16, whose 8 bits would be the factor's.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norms = torch._foreach_norm([p.grad for p in parameters], 2, dtype=torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def host_room(parameters):
    """-> {p: float32 zeros of its shape, one for each name of its state}, slices of one allocation in host memory.

    For GPUs it is pinned, or copies would take twice as long. It is one allocation because PyTorch's own pinned memory
    rounds each up to a power of two. On the meta device it takes no memory either.
    """
    device = parameters[0].device
    shapes = [(p, p.shape) for p in parameters for _ in state_tensors(p)]
    count = sum(shape.numel() for _, shape in shapes)
    everything = torch.empty(count, device=device) if device.type == "meta" else host_memory(count)
    if device.type == "cuda":
        pin(everything)
    room = {p: [] for p in parameters}
    for (p, shape), part in zip(shapes, everything.split([shape.numel() for _, shape in shapes])):
        room[p].append(part.view(shape))
    return room


def host_memory(count):
    """-> (count,) float32 zeros in host memory that a process forked from this one does not have.

    Linux copies pinned pages into a forked process at once, since the device goes on reading the old ones: every worker
    that decodes videos would take as much memory as the optimiser.
    """
    pages = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_DONTFORK"):  # on Linux; elsewhere workers are spawned
        pages.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(pages, dtype=torch.float32)


def pin(x):
    """Pin the host memory of a tensor where it lies. Raises UserError where it cannot be."""
    error = int(torch.cuda.cudart().cudaHostRegister(x.data_ptr(), x.nbytes, 0))
    if error:
        raise UserError(f"--offload-optimizer: {x.nbytes / 2**30:.1f} GiB of host memory could not be pinned for this "
                        f"process (CUDA error {error}); `python -m benchmarks.memory` prints what a run needs.")
