"""Functions called in several processes, as torchrun would start them."""

import os
import socket
import time
from contextlib import nullcontext
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.stages import CONTEXT


def start(ranks, cards, function, *args):
    """Call a function in `ranks` processes -> [(process, where its result will be)].

    Each has a card of its own where there are as many `cards`; else all have the first one, or the CPU.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = []
    for rank in range(ranks):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=as_rank, args=(sender, rank, ranks, cards, port, function, args))
        process.start()
        sender.close()
        begun.append((process, receiver))
    return begun


def as_rank(sender, rank, ranks, cards, port, function, args):
    torch.set_num_threads(1)  # as torchrun does; and threads of the forked process are gone, for which one would wait
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks),
                   "LOCAL_RANK": str(rank if cards >= ranks else 0)}
    if ranks == 1:
        del os.environ["RANK"]
    join = dist.init_process_group

    def with_gloo(backend, device_id=None, **options):  # NCCL refuses two ranks on a card; gloo moves CUDA tensors, too
        join("gloo", **options)

    shared = cards < ranks
    with mock.patch.object(dist, "init_process_group", with_gloo) if shared else nullcontext():
        sender.send(function(*args))


def finish(begun):
    """-> what each rank returned. Raises RuntimeError where one failed; the others are ended."""
    while any(process.is_alive() for process, _ in begun) and not any(process.exitcode for process, _ in begun):
        time.sleep(0.01)
    failed = [f"rank {rank} ended with status {process.exitcode}" for rank, (process, _) in enumerate(begun)
              if process.exitcode]
    if failed:
        end(begun)
        raise RuntimeError(f"{failed[0]}; see this stage's log.")
    return [receiver.recv() for _, receiver in begun]


def end(begun):
    for process, _ in begun:
        process.kill()
        process.join()
