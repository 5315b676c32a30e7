"""engine/optimizer.py: against torch's AdamW, and updates that bfloat16 would lose."""

import pytest
import torch

from engine.optimizer import MasterAdamW


def test_float32_optimizer_equals_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    arguments = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    a, b = MasterAdamW([ours], **arguments), torch.optim.AdamW([theirs], **arguments)
    for _ in range(20):
        ours.grad = torch.randn(7)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_master_weights_keep_updates_that_bfloat16_loses():
    # Near 0.02 bfloat16 numbers lie 0.00012 apart: steps of 1e-6 vanish one by one and count a thousandfold.
    p = torch.nn.Parameter(torch.full((1,), 0.02, dtype=torch.bfloat16))
    lost = p.detach().clone()
    optimizer = MasterAdamW([p], lr=1e-6)
    for _ in range(1000):
        p.grad = torch.ones_like(p)
        optimizer.step()
        lost -= 1e-6
    assert lost.item() == pytest.approx(0.02, rel=1e-2)
    assert optimizer.state[p]["master"].item() == pytest.approx(0.02 - 0.001, abs=3e-5)
    assert p.item() == optimizer.state[p]["master"].bfloat16().item() < 0.0195
