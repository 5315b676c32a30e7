"""What cards can do by their data sheets, or yours as it was measured, and how long an iteration takes at the least."""

import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from engine.program.settings import UserError

REACHED = 0.6  # of bandwidth and arithmetic: the goal of benchmarks/accept.py, whose table says what a card reaches
PARTS = ("tower and prompt", "decoding", "reference", "policy", "optimiser")


class Card(NamedTuple):
    """Bytes and operations a second; `host_link` is one way of the connection to the host."""

    name: str
    gib: float
    bandwidth: float
    bfloat16: float  # without sparsity
    host_link: float
    source: str


CARDS = (
    Card("A100 40 GB", 40, 1555e9, 312e12, 32e9, "NVIDIA A100 data sheet, SXM4; PCIe Gen4"),
    Card("A100 80 GB", 80, 2039e9, 312e12, 32e9, "NVIDIA A100 data sheet, SXM4 80 GB; PCIe Gen4"),
    Card("H100", 80, 3350e9, 989.4e12, 64e9, "NVIDIA H100 data sheet, SXM5, half of 1,979 with sparsity; PCIe Gen5"),
    Card("H200", 141, 4800e9, 989.4e12, 64e9, "NVIDIA H200 data sheet, SXM, half of 1,979 with sparsity; PCIe Gen5"),
    Card("L40S", 48, 864e9, 362.05e12, 32e9, "NVIDIA L40S data sheet; PCIe Gen4 x16, 64 GB/s both ways"),
    Card("RTX 4090", 24, 1008e9, 165.2e12, 32e9, "NVIDIA Ada architecture paper, with float32 sums; PCIe Gen4 x16"),
)


def measured(path) -> Card:
    """The card of an acceptance, at the rates that decoding and the policy pass reached. Raises UserError."""
    try:
        rows = {row["what"]: row["value"] for row in json.loads(Path(path).read_text(encoding="utf-8"))}
        return Card(str(rows["device"]), 0, 1e9 * rows["decoding, GB/s read"], 1e12 * rows["policy pass, TFLOP/s"],
                    1e9 * rows["host link, GB/s"], str(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--seconds {path}: is no acceptance.json with the stage \"real size\" ({error}); run "
                        "`python -m benchmarks.accept` first.") from error


def seconds(need, work, card, settings) -> dict[str, float]:
    """A `dry_run.Need` and its Work -> the least seconds of an iteration's parts on a card.

    Left out: rewards, small operations, what ranks send each other, and waiting.
    """

    def least(counted):
        return max(counted.operations / card.bfloat16, counted.bytes / card.bandwidth)

    done = need.work
    parts = {"tower and prompt": least(done["sampling"])} if "sampling" in done else {}
    if "token" in done:
        parts["decoding"] = (max(work.lengths) - 1) * least(done["token"])
    parts |= {name: least(done[name]) for name in ("reference", "policy") if name in done}
    moved = settings.mu * need.host["optimiser, masters"]  # to the card, while the last slice comes back
    parts["optimiser"] = moved / card.host_link if moved else least(done["optimiser"])
    return parts


# ------------------------------------------------------------------------------------------------ measuring


def measure(device, dtype) -> Card:
    """The card as it is: reading a buffer that no cache holds, a large product, a copy from pinned host memory."""
    is_gpu = device.type == "cuda"
    buffer = torch.ones(2**28 if is_gpu else 2**24, device=device)
    bandwidth = buffer.nbytes / median_seconds(lambda: buffer.sum(), device)
    n = 8192 if is_gpu else 512
    # Not constant, which draws less power and runs faster; not random, which would shift the program's own draws.
    a = torch.linspace(-1, 1, n * n, device=device).view(n, n).to(dtype)
    products = 2 * n**3 / median_seconds(lambda: a @ a, device)
    host = torch.empty(2**26 if is_gpu else 2**22, pin_memory=is_gpu)
    copies = host.nbytes / median_seconds(lambda: buffer[:len(host)].copy_(host, non_blocking=True), device)
    name = torch.cuda.get_device_name(device) if is_gpu else "CPU"
    return Card(name, 0, bandwidth, products, copies, "measured")


def median_seconds(function, device, repeats=20):
    """-> the median time of `function()` after one uncounted call."""
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])
