"""What an iteration costs at the least on this device: bytes over its bandwidth, operations over its speed.

Decoding is bound by memory: a step reads every weight of the language model once, each prompt's keys and values once
and the completions' own, as far as they are written. All other phases are bound by arithmetic. Causal attention counts
without its masked half.
"""

import functools
import statistics
import time

import torch

from engine.runtime import say
from engine.video import SIDE

TYPICAL = 200  # tokens of a completion, where the limit allows them


def announced(arriving, model, config, iterations):
    """Pass an iteration's items on, one after the other; when the first have come, `announce` what they will cost."""
    for k, items in enumerate(arriving):
        if k == 0:
            announce(model, config, items, iterations)
        yield items


def announce(model, config, items, iterations):
    """Print the roofline of an iteration with these clips on this rank, and the hours of `iterations` like it.

    A lower bound: rewards, the optimiser and all small operations are left out. Every rank measures its device, so that
    they go on together, and rank 0 prints.
    """
    clips = [item.clip for item in items if item.clip]
    if not clips:
        return
    G = 1 if config.demonstrations else config.group_size
    tokens = min(TYPICAL, config.max_new_tokens)
    visual = [len(c.frames) * c.frames.shape[2] * c.frames.shape[3] // (2 * SIDE**2) for c in clips]
    lengths = [n + TYPICAL // 2 for n in visual]  # a question has some hundred tokens
    device = model.device
    rate = bandwidth(device)
    speed = matmul_rate(device, model.dtype)
    group = forward_operations(model, lengths, G, tokens)
    layers, _ = language_weights(model)
    tower = sum(p.numel() for p in model.model.visual.parameters())
    floors = {"video": 2 * tower * 4 * sum(visual) / speed}
    if not config.demonstrations:
        floors["prefill"] = 2 * layers * sum(lengths) / speed
        floors["decoding"] = decoding_floor(model, lengths, G, tokens, rate)
        if config.kl_coef:
            floors["reference"] = group / speed
    # A backward pass costs two forward passes: one for the inputs' gradients, one for the weights' (LoRA has few).
    passes = 1 + (1 if config.lora_rank else 2) + config.gradient_checkpointing
    floors["policy"] = config.mu * passes * group / speed
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
    parts = ", ".join(f"{phase} {seconds:.2g}" for phase, seconds in floors.items())
    total = sum(floors.values())
    say(f"{name}: {rate / 1e9:,.0f} GB/s, {speed / 1e12:,.2g} TFLOP/s. An iteration like the first, with {tokens} "
        f"tokens a completion, takes at least {total:.2g} s ({parts}); {iterations:,} take "
        f"{total * iterations / 3600:.2g} hours or more, and the log says where they go (docs/metrics.md).")


# ------------------------------------------------------------------------------------------------ the device


def seconds(run, device, repeats):
    """-> the median time of `run()` after one uncounted call."""
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


@functools.cache
def bandwidth(device, repeats=3):
    """-> bytes a second of reading memory: the sum of a buffer that no cache holds. Measured once a process."""
    buffer = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    return buffer.nbytes / seconds(lambda: buffer.sum(), device, repeats)


@functools.cache
def matmul_rate(device, dtype, repeats=3):
    """-> operations a second of a square matrix product, two for every multiplication. Measured once a process."""
    n = 8192 if device.type == "cuda" else 512
    # Not constant, which draws less power and runs faster; not random, which would shift a run's own draws.
    a = torch.linspace(-1, 1, n * n, device=device).view(n, n).to(dtype)
    return 2 * n**3 / seconds(lambda: a @ a, device, repeats)


# ------------------------------------------------------------------------------------------------ the model


def language_weights(model):
    """-> parameters of the decoder layers and of the output layer; a token's embedding is one row of its matrix."""
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    return layers, model.lm_head.weight.numel()


def decoding_floor(model, lengths, G, tokens, rate):
    """-> seconds for `tokens` - 1 steps (the first token comes from the prefill), at `rate` bytes a second."""
    text = model.config.text_config
    head = text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head  # keys and values of one token
    weights = sum(language_weights(model))
    each = [weights + cached * (sum(lengths) + len(lengths) * G * k) for k in range(1, tokens)]
    return model.dtype.itemsize * sum(each) / rate


def forward_operations(model, lengths, G, tokens):
    """-> operations of a forward pass over groups that no packing can avoid; a backward pass has twice as many."""
    text = model.config.text_config
    layers, head = language_weights(model)
    linear = 2 * layers * (sum(lengths) + len(lengths) * G * tokens) + 2 * head * len(lengths) * G * tokens
    pairs = sum(P * P / 2 + G * tokens * (P + tokens / 2) for P in lengths)  # of a query and a key
    return linear + 4 * text.num_hidden_layers * text.hidden_size * pairs
