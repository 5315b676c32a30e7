"""engine/roofline.py: bytes and operations by hand, and what a run prints and logs of its time."""

import shutil

import pytest
import torch
from shared import log_of, tiny_model, train

from engine import roofline
from engine.checkpoints import newest_checkpoint


@pytest.fixture()
def small(tokenizer):
    """Hidden 32, two layers, four heads of 8, two of keys and values, MLP of 64, 264 words."""
    return tiny_model(tokenizer, vocab_size=264)


# A layer: q and o 32 x 32, k and v 32 x 16, three MLP matrices 32 x 64; biases of q, k, v; two norms.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + (32 + 16 + 16) + 2 * 32
HEAD = 264 * 32


def test_weights_by_hand(small):
    assert roofline.language_weights(small) == (2 * LAYER, HEAD)


def test_bytes_of_decoding_by_hand(small):
    # A token's keys and values: 2 layers x 2 heads x 8 x 2 = 64 numbers. Three tokens: two steps. Prompts of 10 and 20
    # tokens, four completions of each, which hold one token in the first step and two in the second.
    numbers = 2 * (2 * LAYER + HEAD) + 64 * ((30 + 8) + (30 + 16))
    assert roofline.decoding_floor(small, [10, 20], 4, 3, rate=1.0) == 4 * numbers


def test_operations_by_hand(small):
    # One prompt of 10 tokens, four completions of 3: 22 tokens through the layers, 12 through the head; 10 x 10 / 2
    # pairs in the prompt, and 12 tokens that see the prompt and half of their completion; 2 layers x 32 x 4 a pair.
    expected = 2 * (2 * LAYER) * 22 + 2 * HEAD * 12 + 4 * 2 * 32 * (50 + 12 * 11.5)
    assert roofline.forward_operations(small, [10], 4, 3) == expected


def test_speeds_are_those_of_the_device():
    cpu = torch.device("cpu")
    assert 1e8 < roofline.bandwidth(cpu) < 1e13
    assert 1e8 < roofline.matmul_rate(cpu, torch.float32) < 1e14


def test_a_run_prints_its_floor_once_and_logs_where_its_time_goes(config, capsys):
    output = train(config, iterations=2)
    printed = capsys.readouterr().out
    assert printed.count("takes at least") == 1
    for words in ("CPU: ", "video ", "prefill ", "decoding ", "reference ", "policy ", "6 tokens a completion",
                  "2 take"):
        assert words in printed, words
    for row in log_of(output):
        shares = [row[f"{phase}_seconds_share"] for phase in ("wait", "rollout", "update")]
        assert sum(shares) == pytest.approx(1) and min(shares) >= 0
        assert row["rollout_seconds_share"] == pytest.approx(row["rollout_seconds"] / row["seconds"])


def test_what_a_run_leaves_out_is_not_announced(config, capsys):
    train(config, iterations=2, kl_coef=0.0, save_every=1)
    printed = capsys.readouterr().out
    assert "reference" not in printed.split("takes at least")[1].split(")")[0]
    shutil.rmtree(newest_checkpoint(config.output))
    train(config, iterations=2, kl_coef=0.0)
    assert "; 1 take " in capsys.readouterr().out  # of two, one is left
    train(config, iterations=2, kl_coef=0.0)  # finished: nothing is announced
    assert "takes at least" not in capsys.readouterr().out
