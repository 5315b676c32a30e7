"""The size of a checkpoint of the 3B model, by a dry run, and its seconds, by the rate of a smaller one.

    python tests/long/checkpoint.py --gigabytes 2

The model's weights are on the meta device, in bfloat16, its vision tower frozen as by default. A file of random bytes
is written, flushed to the disk, and its SHA-256 taken, as engine/program/files.py does with a checkpoint's.
"""

import os
import time

import tiny
import torch

from benchmarks.models import meta_model, model_config
from engine.run.manifest import seal
from engine.run.opening import checkpoint_bytes


def campaign(folder, gigabytes, processes):
    folder.mkdir(parents=True, exist_ok=True)
    model = meta_model(model_config("3b"), torch.bfloat16)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    model.model.visual.requires_grad_(False)
    total = checkpoint_bytes(model)
    print(f"3B: {total / 1e9:.1f} GB, of which weights {weights / 1e9:.1f}, optimiser {(total - weights) / 1e9:.1f}")
    block = os.urandom(2**26)
    path = folder / "file"
    began = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(gigabytes * 10**9 // len(block)):
            file.write(block)
    written = time.perf_counter()
    os.sync()
    flushed = time.perf_counter()
    seal([path])
    hashed = time.perf_counter()
    size = path.stat().st_size / 1e9
    write_rate, hash_rate = size / (flushed - began), size / (hashed - flushed)
    print(f"{size:.1f} GB: written in {written - began:.1f} s, on the disk after {flushed - began:.1f} s "
          f"({write_rate:.2f} GB/s), SHA-256 in {hashed - flushed:.1f} s ({hash_rate:.2f} GB/s)")
    share = (total - weights) / processes
    seconds = total / 1e9 / write_rate + (weights + share) / 1e9 / hash_rate
    print(f"3B, {processes} processes on one such disk: {total / 1e9 / write_rate:.0f} s of writing, "
          f"{(weights + share) / 1e9 / hash_rate:.0f} s of SHA-256 (each process its share), {seconds:.0f} s in all")
    return []


if __name__ == "__main__":
    tiny.main(__doc__, campaign, gigabytes=2, processes=8)
