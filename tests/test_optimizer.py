"""engine/model/optimizer.py: against torch's AdamW, and updates that bfloat16 would lose."""

import contextlib
import types

import pytest
import torch
from shared import byte_tokenizer, tiny_model

from engine.model import optimizer
from engine.model.optimizer import MasterAdamW, clip_gradients
from engine.program.settings import UserError


def test_float32_optimizer_equals_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    a = MasterAdamW([ours], lr=0.01, weight_decay=0.1)
    b = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
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
    adamw = MasterAdamW([p], lr=1e-6)
    for _ in range(1000):
        p.grad = torch.ones_like(p)
        adamw.step()
        lost -= 1e-6
    assert lost.item() == pytest.approx(0.02, rel=1e-2)
    assert adamw.state[p]["master"].item() == pytest.approx(0.02 - 0.001, abs=3e-5)
    assert p.item() == adamw.state[p]["master"].bfloat16().item() < 0.0195


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_offloaded_state_takes_the_same_steps_bit_for_bit(dtype, monkeypatch):
    monkeypatch.setattr(optimizer, "SLICE", 64)  # 5 slices of the first parameter, the last of 44 numbers
    torch.manual_seed(0)
    start = [torch.randn(20, 15), torch.randn(7)]
    runs = []
    for offload in (False, True):
        parameters = [torch.nn.Parameter(x.to(dtype, copy=True)) for x in start]
        runs.append((parameters, MasterAdamW(parameters, lr=1e-3, weight_decay=0.1, offload=offload)))
    for _ in range(20):
        gradients = [torch.randn(x.shape).to(dtype) for x in start]
        for parameters, adamw in runs:
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient.clone()
            adamw.step()
    (kept, on_device), (streamed, on_host) = runs
    for p, other, before in zip(kept, streamed, start):
        assert torch.equal(p, other) and not torch.equal(p, before.to(dtype))
        assert on_device.state[p].keys() == on_host.state[other].keys()
        for name, value in on_device.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(on_host.state[other][name])), name
    # One allocation: 307 numbers, of each both moments and, of bfloat16, the master; 4 bytes a number.
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for state in on_host.state.values() for x in state.values() if torch.is_tensor(x)}
    assert list(storages.values()) == [4 * 307 * (3 if dtype == torch.bfloat16 else 2)]


def test_slices_leave_the_results_as_they_are(monkeypatch):
    results = []
    for size in (64, 2**24):
        monkeypatch.setattr(optimizer, "SLICE", size)
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(50, 11))
        adamw = MasterAdamW([p], lr=1e-2, weight_decay=0.1)
        for _ in range(5):
            p.grad = torch.randn(50, 11)
            adamw.step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("offload", [False, True])
def test_a_step_holds_one_slice_of_temporaries_not_a_parameter(offload, monkeypatch):
    from benchmarks.dry_run import Storages  # here, for the method's tests run without benchmarks/

    monkeypatch.setattr(optimizer, "SLICE", 100)
    p = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16, device="meta"))
    p.grad = torch.zeros_like(p)
    adamw = MasterAdamW([p], lr=1e-3, offload=offload)
    adamw.step()
    with Storages(tiny_model(byte_tokenizer())) as storages:
        adamw.step()
    # Of 100 numbers, 4 bytes each: gradient and denominator; streamed, moments and master besides, and for a moment
    # those of the slice before.
    assert sum(storages.peak.values()) <= 400 * (8 if offload else 3)


@pytest.mark.parametrize("error", [0, 2])  # 2: cudaErrorMemoryAllocation
def test_host_memory_is_pinned_where_it_lies(error, monkeypatch):
    calls = []
    runtime = types.SimpleNamespace(cudaHostRegister=lambda *given: calls.append(given) or error)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    x = torch.empty(2**28)  # never touched
    with pytest.raises(UserError, match=r"1\.0 GiB .*CUDA error 2") if error else contextlib.nullcontext():
        optimizer.pin(x)
    assert calls == [(x.data_ptr(), 2**30, 0)]


def test_the_gradient_norm_of_bfloat16_gradients_is_that_of_their_exact_values():
    # The norm of (3, 4.0625) is 5.0502; of bfloat16's numbers 5.0313 and 5.0625 are the nearest.
    p, q = (torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)) for _ in range(2))
    p.grad, q.grad = torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([4.0625], dtype=torch.bfloat16)
    norm = clip_gradients([p, q, torch.nn.Parameter(torch.zeros(1))], 1.0)  # the third has no gradient
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx((9 + 4.0625**2) ** 0.5, rel=1e-6)
    assert p.grad.item() == pytest.approx(3 / norm.item(), rel=2**-8)
    before = q.grad.clone()
    assert clip_gradients([p, q], 2.0).item() < 1.01 and torch.equal(q.grad, before)  # below the limit nothing changes


def test_clipping_float32_gradients_is_torchs(tokenizer):
    models = [tiny_model(tokenizer) for _ in range(2)]
    for model in models:
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    norm = clip_gradients(models[0].parameters(), 1.0)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*(model.parameters() for model in models)))
