"""What the processes of a run do together: print once, gather, fail as one. A rank is the number of a process."""

import functools
import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

current = SimpleNamespace(iteration=None, videos=())  # what this rank works on, for the words of an error


def say(text):
    """Print once, from rank 0."""
    if dist.get_rank() == 0:
        tqdm.write(text, file=sys.stdout)


def gather(value):
    """-> the list of every rank's value."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(function):
    """Call a function on every rank; where it fails on one, all raise the first error."""
    error = None
    try:
        function()
    except Exception as caught:
        error = caught
    first = next(filter(None, gather(error)), None)
    if first:
        raise first


def on_rank_0(function, *arguments):
    """Call a function on rank 0 while the others wait; its error is raised on all."""
    together(functools.partial(function, *arguments) if dist.get_rank() == 0 else lambda: None)


def random_generator(device, *stream):
    """Random numbers that depend on the numbers of `stream` alone, so they are the same after a restart."""
    seed = np.random.SeedSequence(stream).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed))
