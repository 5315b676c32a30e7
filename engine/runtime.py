"""Processes, the workers that decode videos, signals, and the log."""

import datetime
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.progress import progress
from engine.record import note_environment, open_boards
from engine.settings import UserError
from engine.video import VideoError

JOINING = datetime.timedelta(minutes=5)  # in which all processes must be there


def setup_distributed():
    """Join the process group torchrun describes, or make one of a single process -> the device of this rank.

    One process, gloo on CPUs and NCCL on GPUs all run the same code; only the world size differs.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)  # that srun has started; an allocation alone starts none
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        sys.exit(f"Slurm started {tasks} copies of this program, which know nothing of each other; start one torchrun "
                 "on each node, as in `srun --ntasks-per-node 1 torchrun ...`.")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda and device.index >= torch.cuda.device_count():
        sys.exit(f"torchrun started more processes than there are GPUs ({torch.cuda.device_count()}); lower "
                 "--nproc_per_node.")
    if cuda:
        torch.cuda.set_device(device)
    # Ranks wait for each other's videos and evaluations: longer than NCCL's ten minutes.
    patience = datetime.timedelta(hours=2)
    try:
        store, rank, world_size = dist.HashStore(), 0, 1
        if "RANK" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=JOINING))
            store.set_timeout(patience)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, store=store, rank=rank,
                                world_size=world_size)
    except (ValueError, RuntimeError) as error:  # a variable is missing, a port is taken, MASTER_ADDR is nowhere
        reason = str(error).strip().split("\n")[0]
        sys.exit(f"the processes could not be joined ({reason}); start them with torchrun, which sets "
                 "MASTER_ADDR and its kin, or unset RANK for one.")
    return device


def say(text):
    """Print once, from rank 0."""
    if dist.get_rank() == 0:
        tqdm.write(text, file=sys.stdout)


def launch(program, settings):
    """Run `program(settings, device)` in the process group; a user's mistake ends it with one sentence, status 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are forked
    device = setup_distributed()
    try:
        program(settings, device)
    except KeyboardInterrupt:
        status = 130
    except (UserError, VideoError, ImportError, OSError) as error:
        # What every rank finds is said once; an unreadable video is found by the rank whose slot it was.
        if dist.get_rank() == 0 or isinstance(error, VideoError):
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(5)  # torchrun ends all ranks with the first: let rank 0 speak
        status = 1
    except BaseException:
        if dist.get_world_size() == 1:
            raise
        traceback.print_exc()
        status = 1
    else:
        dist.destroy_process_group()
        return
    if dist.get_world_size() > 1:
        os._exit(status)  # a clean shutdown would deadlock: other ranks are waiting for this one
    dist.destroy_process_group()
    sys.exit(status)


def random_generator(device, *stream):
    """Random numbers that depend on the numbers of `stream` alone, so they are the same after a restart."""
    seed = np.random.SeedSequence(stream).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed))


# ------------------------------------------------------------------------------------------------ the log


def group_metrics(task, scores, G):
    """The reward parts of G completions of each prompt -> their means, and their spread within groups."""
    metrics = {}
    for part in scores[0]:  # one task an iteration, so all scores have the same parts
        values = np.reshape([s[part] for s in scores], (-1, G))
        metrics[f"{task}/{part}"] = float(values.mean())
        metrics[f"{task}/{part}_std"] = float(values.std(axis=1, ddof=1).mean())
    totals = np.reshape([s["total"] for s in scores], (-1, G))
    metrics["zero_spread"] = float((np.ptp(totals, axis=1) == 0).mean())
    return metrics


def combine(rows):
    """Dictionaries of metrics with different keys -> one: the mean over those that have a key, for `_max` the most."""
    combined = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        combined[name] = float(np.max(values) if name.endswith("_max") else np.mean(values))
    return combined


class StopSignal:
    """Ctrl-C, SIGTERM and a closed terminal let the iteration end and be saved; a second Ctrl-C stops at once."""

    def __init__(self):
        self.caught = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup means to go on
                signal.signal(number, self.catch)

    def catch(self, number, frame):
        self.caught = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_any_rank(self, device):
        caught = torch.tensor(float(self.caught), device=device)
        dist.all_reduce(caught)
        return bool(caught)


class Log:
    """One line an iteration, averaged over ranks: metrics.jsonl, a progress bar, and where --log-to says."""

    def __init__(self, config, start, total):
        self.rank = dist.get_rank()
        if self.rank == 0:
            note_environment(config.output, total)
            self.boards = open_boards(config, start)
            self.file = open(Path(config.output) / "metrics.jsonl", "a", encoding="utf-8")
            self.bar = progress(total=total, initial=start, desc="training")

    def write(self, iteration, task, metrics):
        """Gather from all ranks (so every rank must call it) and write on rank 0."""
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, metrics)
        if self.rank:
            return
        metrics = combine(gathered)
        self.file.write(json.dumps({"iteration": iteration, "task": task} | metrics) + "\n")
        self.file.flush()
        for show in self.boards:
            show(iteration, metrics)
        if task != "eval":
            shown = metrics.get(f"{task}/total", metrics.get("nll"))
            self.bar.set_postfix_str(f"{task} {'nll' if task == 'sft' else 'reward'} {shown:.3f}", refresh=False)
            self.bar.update()
