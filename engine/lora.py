"""How a run fits onto small cards: low-rank adapters (LoRA), and the settings of memory.

LoRA (Hu et al., 2021) leaves a weight W as it is and adds alpha / rank * B A, of which A (rank, in) and B (out, rank)
alone are trained. With its adapters switched off the model is the reference of the KL, so there is no second copy.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from engine.settings import flag

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class MemorySettings:
    """Settings by which a run needs less memory of a card."""

    offload_optimizer: bool = flag(False, "keep the optimiser's state in host memory, 12 bytes a trained parameter "
                                   "over all processes of a node; equal bit for bit, slower by two copies a step",
                                   free=True)
    lora_rank: int = flag(0, "train adapters of this rank instead of the language model's own weights (LoRA), with a "
                          "larger --lr; 0: the weights", least=0, unless="train_vision")
    lora_alpha: float = flag(32.0, "an adapter counts alpha / rank times", above=0, needs="lora_rank")
    lora_targets: tuple = flag(TARGETS, "layers that get an adapter", choices=TARGETS, needs="lora_rank")


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


def add_adapters(model, settings):
    """Give the language model's `lora_targets` adapters, which alone are trained from here on."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(settings.seed)
    for parent in list(model.model.language_model.modules()):
        for name, child in list(parent.named_children()):
            if name in settings.lora_targets:
                setattr(parent, name, Adapted(child, settings.lora_rank, settings.lora_alpha, generator))


class WithoutAdapters(nn.Module):
    """A policy whose adapters are switched off while it is called: the model as it was before training."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

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
