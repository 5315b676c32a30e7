"""The memory budget: what it counts, against sums by hand."""

import dataclasses
import json
import math
import types

import pytest
import torch

from benchmarks import cards, dry_run, memory, models
from engine.program.settings import UserError, parse_settings

GiB = 2**30


def test_parameters_by_hand(checkpoint):
    model = models.meta_model(models.model_config(str(checkpoint)), torch.bfloat16)
    V = model.config.text_config.vocab_size
    # Two layers: queries and output 32 x 32, keys and values 32 x 16, biases, three matrices 32 x 64, two norms; then
    # embedding, head (not tied) and the last norm.
    language = 2 * (2 * 32 * 32 + 32 + 2 * (32 * 16 + 16) + 3 * 32 * 64 + 2 * 32) + 2 * V * 32 + 32
    # Two blocks: qkv, output, three matrices 16 x 32, biases, two norms; then patches of 1,176 numbers, and the merger.
    vision = 2 * (3 * (16 * 16 + 16) + 16 * 16 + 16 + 3 * 16 * 32 + 2 * 32 + 16 + 2 * 16) + 1176 * 16
    vision += 16 + 64 * 64 + 64 + 64 * 32 + 32
    assert sum(p.numel() for p in model.model.visual.parameters()) == vision
    assert sum(p.numel() for p in model.parameters()) == language + vision


@pytest.mark.parametrize("name, parameters", [("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
                                              ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656)])
def test_published_models_have_the_published_number_of_parameters(name, parameters):
    model = models.meta_model(models.model_config(name), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_storages_that_live_together_are_added_up(model):
    with dry_run.Storages(model) as storages:
        x = torch.empty(100, device="meta")  # 400 bytes
        y = x + 1
        view = y[:50]
        del x, y
        z = view * 2  # 400 for the whole of y, 200 for z
    assert sum(storages.peak.values()) == 800
    assert sum(storages.now.values()) == 600
    del view, z
    assert sum(storages.now.values()) == 0


def test_shares_go_to_the_least_loaded_rank_the_largest_first():
    parameters = [torch.empty(n) for n in (3, 5, 3, 4, 3)]
    assert [[p.numel() for p in share] for share in dry_run.shares(parameters, 2)] == [[5, 3], [4, 3, 3]]


def test_what_lasts_and_the_cache_by_hand(checkpoint):
    settings = memory.Settings(model=str(checkpoint), world_size=1, max_pixels=64 * 784, max_new_tokens=16,
                               group_size=4, micro_batch=2, text_tokens=10)
    model = models.meta_model(models.model_config(settings.model), torch.bfloat16)
    peaks, highest, host, _ = dry_run.estimate(model, settings, dry_run.plan(settings, worst=True))
    trained = sum(p.numel() for n, p in model.named_parameters() if "visual" not in n)
    everything = sum(p.numel() for p in model.parameters())
    assert tuple(peaks) == dry_run.PHASES
    for rows in peaks.values():  # the reference has no tower
        assert (rows["weights"], rows["reference"], rows["gradients"]) == (2 * everything, 2 * trained, 2 * trained)
        assert rows["optimiser, masters"] == 12 * trained
    # Two layers' inputs: 2 x 74 prompt and 8 x 16 completion tokens of 32 numbers, 2 bytes: 17,664, pinned 32,768.
    assert host == {"optimiser, masters": 0, "layers' inputs": 2 * 32768}
    # 2 layers, keys and values, 2 heads of 8 numbers, 2 bytes: 2 prompts of 74 tokens, 8 completions of 16.
    assert highest["KV cache"] == 2 * 2 * 2 * 8 * 2 * (2 * 74 + 8 * 16)
    # Completions that end earlier leave the cache as large: its room is there from the start.
    shorter = dataclasses.replace(settings, typical_tokens=8)
    again = dry_run.estimate(model, shorter, dry_run.plan(shorter, worst=False))
    assert again.highest["KV cache"] == highest["KV cache"]
    # A float32 gradient and the denominator, of the largest parameter.
    largest = max(p.numel() for n, p in model.named_parameters() if "visual" not in n)
    assert peaks["optimiser"]["the step's temporaries"] == 2 * 4 * largest
    without = dataclasses.replace(settings, kl_coef=0.0)
    peaks = dry_run.estimate(model, without, dry_run.plan(without, worst=True)).peaks
    assert "reference" not in peaks
    assert peaks["policy"]["reference"] == 0


def test_a_shared_reference_by_hand(checkpoint):
    settings = memory.Settings(model=str(checkpoint), world_size=4)
    model = dry_run.make_model(settings)
    V = model.config.text_config.vocab_size
    layer = 2 * 32 * 32 + 32 + 2 * (32 * 16 + 16) + 3 * 32 * 64 + 2 * 32
    share, gathered = dry_run.reference_memory(model, settings)
    assert share == 2 * (2 * layer + 2 * V * 32 + 32) / 4
    assert gathered == 2 * (3 * layer + V * 32 + 32)  # head and last norm; the embeddings are gathered on their own
    assert dry_run.reference_memory(model, dataclasses.replace(settings, world_size=1)) == (4 * share, 0)
    assert dry_run.reference_memory(model, dataclasses.replace(settings, kl_coef=0.0)) == (0, 0)


def test_an_offloaded_optimiser_leaves_the_gpu_for_the_host(checkpoint):
    settings = memory.Settings(model=str(checkpoint), max_pixels=64 * 784, max_new_tokens=16, world_size=1)
    work = dry_run.plan(settings, worst=True)
    plain = dry_run.estimate(dry_run.make_model(settings), settings, work)
    offloaded = dataclasses.replace(settings, offload_optimizer=True)
    moved = dry_run.estimate(dry_run.make_model(offloaded), offloaded, work)
    state = plain.peaks["policy"]["optimiser, masters"]
    assert moved.host["optimiser, masters"] == state > 0 == moved.peaks["policy"]["optimiser, masters"]
    assert moved.host["layers' inputs"] == plain.host["layers' inputs"]
    assert plain.most()[1] - moved.most()[1] == state


def test_adapters_by_hand(checkpoint):
    settings = memory.Settings(model=str(checkpoint), max_pixels=64 * 784, max_new_tokens=16, world_size=1, lora_rank=4)
    peaks = dry_run.estimate(dry_run.make_model(settings), settings, dry_run.plan(settings, worst=True)).peaks
    base = sum(p.numel() for p in models.meta_model(models.model_config(settings.model), torch.bfloat16).parameters())
    adapters = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))  # as in test_lora.py
    for rows in peaks.values():
        assert rows["weights"] == 2 * (base + adapters) and rows["reference"] == 0
        assert rows["gradients"] == 2 * adapters and rows["optimiser, masters"] == 12 * adapters
    assert "reference" in peaks  # its pass runs, without a copy


def test_an_estimate_does_not_change_the_next_one(checkpoint):
    settings = memory.Settings(model=str(checkpoint), max_pixels=64 * 784, max_new_tokens=16,
                               gradient_checkpointing=False)
    model = models.meta_model(models.model_config(settings.model), torch.bfloat16)
    work = dry_run.plan(settings, worst=True)
    first = dry_run.estimate(model, settings, work)
    recomputing = dataclasses.replace(settings, gradient_checkpointing=True, train_vision=True, kl_coef=0.0)
    dry_run.estimate(model, recomputing, work)
    assert dry_run.estimate(model, settings, work) == first


def test_7b_fits_the_papers_cards_at_worst():
    settings = memory.Settings(model="7b", offload_optimizer=True)
    need = dry_run.estimate(dry_run.make_model(settings), settings, dry_run.plan(settings, worst=True))
    assert need.most()[1] < 38 * GiB


def test_the_command_line_prints_budget_measures_iterations_and_tokens(checkpoint, capsys):
    settings = parse_settings(memory.Settings, "", [
        "--model", str(checkpoint), "--max-pixels", str(64 * 784), "--max-new-tokens", "40", "--typical-tokens", "20",
        "--gpu-gb", "0.5", "--annotations", "none", "--rows", "100"])
    memory.report(settings)
    printed = capsys.readouterr().out
    assert "IT DOES NOT FIT" in printed and "with kl_coef = 0.0" in printed
    assert f"8 prompts an iteration: {math.ceil(2 * 100 / 8)} iterations" in printed
    assert f"worst: {8 * (64 + 120):,} prompt and {8 * 8 * 40:,} completion tokens an iteration" in printed


SEVEN_WORDS = types.SimpleNamespace(text_config=types.SimpleNamespace(vocab_size=7))


def test_a_mask_costs_the_bias_that_the_efficient_kernel_reads():
    model = types.SimpleNamespace(config=SEVEN_WORDS, parameters=lambda: [])
    q, k, v = (torch.empty(2, 4, n, 8, dtype=torch.bfloat16, device="meta") for n in (5, 13, 13))
    mask = torch.empty(5, 13, dtype=torch.bool, device="meta")
    with dry_run.Storages(model) as storages:
        dry_run.gpu_attention(q, k, v, attn_mask=mask)
        # While the kernel runs: the bias of 5 rows, padded to 16 columns, and the output of 2 x 4 x 5 x 8 numbers.
        assert 2 * 5 * 16 + 2 * 320 <= sum(storages.peak.values()) < 2 * 5 * 16 + 2 * 320 + 100


def test_the_optimiser_of_the_rank_that_needs_most_counts():
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.empty(n, device="meta")) for n in (3, 5)])
    model.config = SEVEN_WORDS
    for p in model:
        p.grad = torch.empty_like(p)
    state, _ = dry_run.optimiser_memory(model, memory.Settings(world_size=2))
    assert state == 5 * 8  # both moments of the larger one, which the first rank has; the second has 3


def test_the_hosts_memory_is_that_of_all_processes(capsys):
    zeros = dict.fromkeys(dry_run.ROWS, 0)
    need = dry_run.Need({"policy": zeros}, zeros, {"optimiser, masters": 3 * GiB}, {})
    memory.print_budget("a run", need, memory.Settings(world_size=4))
    assert "optimiser, masters          " + f"{3:12.2f}{12:12.2f}" in capsys.readouterr().out


def test_a_run_says_its_seconds_by_data_sheets_or_by_an_acceptance(checkpoint, tmp_path, capsys):
    options = ["--model", str(checkpoint), "--max-pixels", str(64 * 784), "--max-new-tokens", "40", "--annotations",
               "none", "--rows", "100", "--typical-tokens", "20"]
    memory.report(parse_settings(memory.Settings, "", options))
    printed = capsys.readouterr().out
    assert all(f"  {card.name:<12}" in printed for card in cards.CARDS) and "a goal and not measured" in printed
    values = {"device": "Mine", "decoding, GB/s read": 2.0, "policy pass, TFLOP/s": 3.0, "host link, GB/s": 4.0}
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps([{"what": name, "value": value} for name, value in values.items()]))
    assert cards.measured(path)[:5] == ("Mine", 0, 2e9, 3e12, 4e9)
    memory.report(parse_settings(memory.Settings, "", [*options, "--seconds", str(path)]))
    printed = capsys.readouterr().out
    assert "  Mine " in printed and "H100" not in printed
    path.write_text("[]")
    with pytest.raises(UserError, match="is no acceptance.json .*run `python -m benchmarks.accept` first"):
        cards.measured(path)
