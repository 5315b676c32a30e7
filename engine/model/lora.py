"""Low-rank adapters (LoRA), with which a run fits onto smaller cards.

Hu et al. (2021): it leaves a weight W as it is and adds alpha / rank * B A, of which A (rank, in) and B (out, rank)
alone are trained. With its adapters switched off the model is the reference of the KL, so there is no second copy.
"""

from contextlib import contextmanager

import torch
from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # layers that get an adapter
ALPHA = 32.0  # an adapter counts ALPHA / rank times; what it does to a step, --lr does too


class Adapted(nn.Linear):
    """A linear layer with an adapter."""

    def __init__(self, linear, rank, alpha, generator):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        weight = linear.weight
        self.weight = weight
        self.bias = linear.bias
        noise = torch.rand(rank, self.in_features, generator=generator) * 2 - 1
        self.lora_a = nn.Parameter((noise * self.in_features**-0.5).to(weight))  # as in the paper's released code
        self.lora_b = nn.Parameter(weight.new_zeros(self.out_features, rank))  # zero: training begins at the base
        self.scale = alpha / rank
        self.active = True

    def forward(self, x):
        out = super().forward(x)
        if not self.active:
            return out
        return out + nn.functional.linear(nn.functional.linear(x, self.lora_a), self.lora_b) * self.scale

    def merged(self):
        """-> the weight of a plain layer that does the same, in host memory."""
        adapter = self.lora_b.float() @ self.lora_a.float()
        return (self.weight.float() + self.scale * adapter).to(self.weight.dtype).cpu()


def add_adapters(model, rank, seed):
    """Give the language model's TARGETS adapters of a rank, which alone are trained from here on."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent in list(model.model.language_model.modules()):
        for name, child in list(parent.named_children()):
            if name in TARGETS:
                setattr(parent, name, Adapted(child, rank, ALPHA, generator))


class WithoutAdapters(nn.Module):
    """A policy whose adapters are switched off while it is called: the model as it was before training."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    @torch.no_grad()
    def forward(self, *inputs):
        with switched_off(self.policy):
            return self.policy(*inputs)


@contextmanager
def switched_off(module):
    """Inside, `module` runs without its adapters, in evaluation mode."""
    was_training = module.training
    adapted = [layer for layer in module.modules() if isinstance(layer, Adapted)]
    module.eval()
    for layer in adapted:
        layer.active = False
    try:
        yield
    finally:
        for layer in adapted:
            layer.active = True
        module.train(was_training)


@torch.no_grad()
def merged_weights(model):
    """-> the state dict of a plain model that does the same, by the names that the model had without adapters."""
    weights = {name: x for name, x in model.state_dict().items() if name.split(".")[-1] not in ("lora_a", "lora_b")}
    for name, layer in model.named_modules():
        if isinstance(layer, Adapted):
            weights[f"{name}.weight"] = layer.merged()
    return weights
