"""The whole loop in bfloat16, as on a GPU: dtypes that meet, rounding, float32 masters."""

import math
import sys
from pathlib import Path

import pytest
import torch
from shared import log_of, states_of, train
from transformers import Qwen2_5_VLForConditionalGeneration

from engine.model.loading import load_model, newest_checkpoint


@pytest.fixture()
def bfloat16(monkeypatch):
    """Models are loaded in bfloat16, and a product with float32 output, which the CPU lacks, is computed in float32."""
    load, bmm = Qwen2_5_VLForConditionalGeneration.from_pretrained, torch.bmm
    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "from_pretrained",
                        lambda folder, dtype, **kwargs: load(folder, dtype=torch.bfloat16, **kwargs))
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype: bmm(a.to(out_dtype), b.to(out_dtype)))


def mapped_files():
    """What the process has mapped into its memory -> a list of (first address, address after the last, file)."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    return [(*(int(end, 16) for end in line[0].split("-")), line[5]) for line in lines if len(line) == 6]


@pytest.mark.parametrize("options", [{}, {"train_vision": True}, {"lora_rank": 4, "offload_optimizer": True}],
                         ids=lambda options: " ".join(options) or "plain")
def test_the_loop_runs_in_bfloat16(lively, bfloat16, options):
    output = train(lively, iterations=2, lr=2e-3, **options)
    log = log_of(output)
    assert all(math.isfinite(value) for row in log for name, value in row.items() if name != "task")
    assert max(row["grad_norm"] for row in log) > 0
    assert log[0]["kl"] == 0  # two equal passes, rounding included
    # 8 bits: logits of about 10 are off by some 1/32, and so are the log-probabilities.
    assert 0 < max(row["sampler_gap_mean"] for row in log) < 0.05
    model, _ = load_model(output, torch.device("cpu"))
    weights = dict(model.named_parameters())
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    for name, state in states_of(newest_checkpoint(output)).items():
        assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq", "master")} == {torch.float32}
        weight = state["weight"] if "lora_rank" in options else weights[name]
        assert torch.equal(state["master"].bfloat16(), weight), name
    if sys.platform == "linux":  # eight processes that load at the same time hold one copy between them
        mapped = mapped_files()
        for name, weight in weights.items():
            files = [file for first, end, file in mapped if first <= weight.data_ptr() < end]
            assert files and files[0].endswith("model.safetensors"), name
