"""model/lora.py: adapters that begin at nothing, are switched off for the reference, and are merged when saved."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from shared import log_of, parse, timeless_log_of, tiny_model, train, weights_of
from torch import nn

import grpo
import invert4tvg
from engine.model.loading import load_model, newest_checkpoint
from engine.model.lora import TARGETS, Adapted, WithoutAdapters, add_adapters, merged_weights


def logps(model, prompts, banned):
    ids = torch.arange(12).view(2, 6) + 40
    mask = torch.ones(2, 6, dtype=torch.bool)
    with torch.no_grad():
        return grpo.Policy(model, banned, 1.0)(prompts, ids, mask, None)[0]


def moved(model, spread=0.3):
    """`model` with adapters that have learned something."""
    add_adapters(model, rank=4, seed=1)
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, Adapted):
            nn.init.normal_(layer.lora_b, std=spread)
    return model


def test_an_adapter_by_hand():
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    layer = Adapted(linear, rank=1, alpha=2.0, generator=torch.Generator())
    x = torch.tensor([3.0, 5.0])
    assert layer(x).tolist() == [3, 5]  # B is zero
    layer.lora_a.data = torch.tensor([[1.0, 1.0]])
    layer.lora_b.data = torch.tensor([[1.0], [0.0]])
    assert layer(x).tolist() == [3 + 2 * 8, 5]  # A x = 8, alpha / rank = 2, to the first output alone
    assert layer.merged().tolist() == [[3, 2], [0, 1]]
    layer.active = False
    assert layer(x).tolist() == [3, 5]


def test_adapters_alone_are_trained_and_lie_in_the_language_model(model):
    before = sum(p.numel() for p in model.parameters())
    add_adapters(model, rank=4, seed=1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name and "visual" not in name for name in trained)
    # Two layers, rank 4: queries and output 32 -> 32, keys and values 32 -> 16, gate and up 32 -> 64, down 64 -> 32.
    by_hand = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert sum(p.numel() for p in trained.values()) == by_hand
    assert sum(p.numel() for p in model.parameters()) == before + by_hand
    for name, p in trained.items():  # A is even between -1 and 1 over the root of its width, 32 or 64; B begins at 0
        most = p.abs().max() * p.shape[1]**0.5
        assert 0.9 < most <= 1 if name.endswith("lora_a") else most == 0, name


def test_adapters_begin_with_the_noise_of_the_seed(tokenizer):
    noises = []
    for seed in (1, 1, 2):
        model = tiny_model(tokenizer)
        add_adapters(model, rank=4, seed=seed)
        noises.append([layer.lora_a for layer in model.modules() if isinstance(layer, Adapted)])
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(*noises))
    assert not torch.equal(noises[0][0], noises[0][3])  # each layer has its own: queries and output of one shape


def test_adapters_do_not_go_with_a_trained_tower(capsys):
    with pytest.raises(SystemExit):
        parse(invert4tvg.Config, "--lora-rank", 4, "--train-vision")
    assert "--lora-rank has no meaning with --train-vision" in capsys.readouterr().err


def test_switched_off_the_model_is_the_base_bit_for_bit(tokenizer, prompts, banned):
    base = logps(tiny_model(tokenizer), prompts[:1], banned)
    model = moved(tiny_model(tokenizer)).train()
    policy = grpo.Policy(model, banned, 1.0).train()
    ids = torch.arange(12).view(2, 6) + 40
    with torch.no_grad():
        off, _ = WithoutAdapters(policy)(prompts[:1], ids, torch.ones(2, 6, dtype=torch.bool), None)
    assert torch.equal(off, base)
    assert policy.training and model.training
    assert (logps(model, prompts[:1], banned) - base).abs().max() > 0.1  # and on again


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2**-24), (torch.bfloat16, 2**-8)])
def test_merged_weights_are_the_sum_rounded_once(tokenizer, dtype, rounding):
    model = moved(tiny_model(tokenizer)).to(dtype)
    merged = merged_weights(model)
    assert merged.keys() == tiny_model(tokenizer).state_dict().keys()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Adapted)}
    assert len(layers) == 2 * len(TARGETS)
    for name, layer in layers.items():
        exact = layer.weight.double() + 8 * layer.lora_b.double() @ layer.lora_a.double()  # 32 / 4
        gap = (merged[f"{name}.weight"].double() - exact).abs()
        assert (gap <= rounding * exact.abs() + 2**-22).all(), name  # float32's own rounding of the product


def test_a_merged_model_does_what_the_adapters_do(tokenizer, prompts, banned):
    model = moved(tiny_model(tokenizer))
    plain = tiny_model(tokenizer, seed=5)
    plain.load_state_dict(merged_weights(model))
    gap = (logps(plain, prompts[:1], banned) - logps(model, prompts[:1], banned)).abs().max()
    assert gap < 1e-4  # float32: the product B A x is rounded otherwise than (B A) x


# ---- Whole runs


@pytest.fixture()
def adapted(lively):
    """A run whose adapters move."""
    return dict(config=lively, lora_rank=4, lr=2e-2, iterations=4)


def test_a_run_changes_the_targets_alone_and_saves_a_plain_model(adapted, babbler):
    output = train(**adapted)
    before, after = load_file(babbler / "model.safetensors"), weights_of(output)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    targets = tuple(f"{name}.weight" for name in TARGETS)
    assert changed == {name for name in before if "visual" not in name and name.endswith(targets)}
    log = log_of(output)
    assert log[0]["kl"] < 1e-9 and log[-1]["kl"] > 1e-4  # the reference stays where it was
    model, _ = load_model(output, torch.device("cpu"))
    assert not any(isinstance(layer, Adapted) for layer in model.modules())


def test_a_run_with_adapters_goes_on_bit_for_bit(adapted):
    output = train(**adapted, save_every=2)
    whole, log = weights_of(output), timeless_log_of(output)
    shutil.rmtree(newest_checkpoint(output))  # as if it had died after iteration 3
    train(**adapted, save_every=2)
    again = weights_of(output)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert timeless_log_of(output) == log


def test_a_run_with_adapters_needs_the_weights_that_it_began_with(adapted, tmp_path, babbler, capsys):
    base = tmp_path / "base"
    shutil.copytree(babbler, base)
    adapted |= {"model": str(base), "kl_coef": 0.0, "save_every": 2}
    train(**adapted)
    shutil.rmtree(newest_checkpoint(adapted["config"].output))
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-4] + b"abcd")
    with pytest.raises(SystemExit):
        train(**adapted)
    assert "the base of its adapters, are gone or changed" in capsys.readouterr().err
