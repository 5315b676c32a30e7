"""Processes: how they are joined, how they end together, signals, and the log."""

import contextlib
import datetime
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.files import locked, strict_json
from engine.progress import progress
from engine.record import finishers, note_environment, open_boards
from engine.settings import UserError
from engine.video import VideoError

JOINING = datetime.timedelta(minutes=5)  # in which all processes must be there

now = SimpleNamespace(iteration=None, videos=())  # what this rank is at; its errors name it


def setup_distributed(clip_timeout=600.0):
    """Join the process group torchrun describes, or make one of a single process -> the device of this rank.

    One process, gloo on CPUs and NCCL on GPUs all run the same code; only the world size differs. Ranks wait for each
    other's videos and evaluations: half an hour longer than a video may take, and longer than NCCL's ten minutes.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)  # that srun has started; an allocation alone starts none
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        sys.exit(f"Slurm started {tasks} copies of this program, which know nothing of each other; start one torchrun "
                 "on each node, as in `srun --ntasks-per-node 1 torchrun ...`.")
    cuda = torch.cuda.is_available()
    if not cuda and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and has_gpu():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built for CPUs"
        sys.exit(f"this machine has a GPU that torch {torch.__version__} cannot use: it {built}; update the driver, or "
                 "install the torch that fits it, or set CUDA_VISIBLE_DEVICES= to run on the CPU.")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda and device.index >= torch.cuda.device_count():
        sys.exit(f"torchrun started more processes than there are GPUs ({torch.cuda.device_count()}); lower "
                 "--nproc_per_node.")
    if cuda:
        torch.cuda.set_device(device)
    patience = datetime.timedelta(seconds=clip_timeout + 1800)
    try:
        store, rank, world_size = dist.HashStore(), 0, 1
        if "RANK" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=JOINING))
            store.set_timeout(patience)
            # With --max-restarts torchrun's store may hold the addresses of processes that have ended.
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, store=store, rank=rank,
                                world_size=world_size, device_id=device if cuda else None)  # NCCL's errors come here
    except (ValueError, RuntimeError) as error:  # a variable is missing, a port is taken, MASTER_ADDR is nowhere
        reason = str(error).strip().split("\n")[0]
        sys.exit(f"the processes could not be joined ({reason}); start them with torchrun, which sets "
                 "MASTER_ADDR and its kin, or unset RANK for one.")
    return device


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is there, whatever torch says: with too old a driver torch finds none."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


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


def launch(program, settings):
    """Run `program(settings, device)` in the process group, alone in settings.output.

    A user's mistake ends it with one sentence, status 1; Ctrl-C and other signals with status 130. Whatever ends one
    rank ends all: an error names the rank, the iteration and the videos, and no worker is left behind.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are forked
    device = setup_distributed(settings.clip_timeout)
    now.iteration, now.videos = None, ()
    held = contextlib.ExitStack()
    try:
        with held:
            if not getattr(settings, "video", ""):  # to search one's own video writes nothing
                on_rank_0(lambda: held.enter_context(locked(settings.output)))
            program(settings, device)
    except KeyboardInterrupt:
        status = 130
    except (UserError, VideoError, ImportError, OSError) as error:
        _say_once(error)
        status = 1
    except BaseException as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):  # raised wherever this process is
            _say_once("a process that decodes videos was killed (by a lack of memory, say); lower --workers.")
        elif isinstance(error, torch.OutOfMemoryError):
            _say_once("the GPU's memory is full; lower --micro-batch or --max-pixels, or see README.md's options for "
                      "smaller cards.")
        elif _is_anothers_end(error):
            print(f"{_place()}: another process of this run has ended, so this one ends too.", file=sys.stderr)
        elif dist.get_world_size() == 1:
            error.add_note(f"{_place()}, {', '.join(now.videos) or 'no video'}")
            raise
        else:
            print(f"{_place()}, {', '.join(now.videos) or 'no video'}:\n{traceback.format_exc()}", file=sys.stderr)
        status = 1
    else:
        dist.destroy_process_group()
        return
    finally:
        for worker in multiprocessing.active_children():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the library raises an error where a worker is killed
            worker.kill()  # it hears nothing else
    if dist.get_world_size() > 1:
        for finish in finishers:
            finish(status)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # a clean shutdown would deadlock: other ranks are waiting for this one
    dist.destroy_process_group()
    sys.exit(status)


def _say_once(error):
    """Print a user's mistake; where every rank finds it, the first one does."""
    sentence = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        sentence = f"{error.filename}: {error.strerror}; look at the file and its folder."
    try:
        is_first = dist.distributed_c10d._get_default_store().add(sentence, 1) == 1
    except RuntimeError:  # the rank that held the store is gone
        is_first = True
    if is_first:
        place = "" if now.iteration is None else f"{_place()}: "
        print(f"{Path(sys.argv[0]).name}: {place}{sentence}", file=sys.stderr, flush=True)
    if is_first and dist.get_world_size() > 1:
        time.sleep(1)  # without torchrun rank 0 holds the store, in which the others look


def _place():
    iteration = "before the first iteration" if now.iteration is None else f"iteration {now.iteration}"
    return f"rank {dist.get_rank()}, {iteration}"


def _is_anothers_end(error):
    """Whether this is what a collective call raises when another rank is gone."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


def counted(start, total):
    """Iterate over the iterations, noting each for the errors in it."""
    for now.iteration in range(start, total):
        yield now.iteration


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
    """Ctrl-C, SIGTERM and a closed terminal let the iteration end and be saved; a second signal stops at once.

    So does the end of the torchrun that started this process.
    """

    def __init__(self):
        self.caught = False
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.terminals = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream.isatty()]
        self.numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means to go on
            self.numbers.append(signal.SIGHUP)
        for number in self.numbers:
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        self.caught = True
        for each in self.numbers:
            signal.signal(each, signal.SIG_DFL)  # the system ends a process also where Python would not get to it
        if number == signal.SIGHUP:  # to write to a closed terminal is an error, and would come before saving
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in self.terminals:
                os.dup2(nowhere, terminal)

    def on_any_rank(self, device):
        is_orphan = self.torchrun not in (None, os.getppid())
        stops = torch.tensor(float(self.caught or is_orphan), device=device)
        dist.all_reduce(stops)
        return bool(stops)


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
        gathered = gather(metrics)
        if self.rank:
            return
        metrics = combine(gathered)
        if "wait_seconds" in metrics:  # an iteration's: where its time went
            spent = {"wait": metrics["wait_seconds"], "rollout": metrics["rollout_seconds"]}
            spent["update"] = metrics["seconds"] - sum(spent.values())
            metrics |= {f"{phase}_seconds_share": value / metrics["seconds"] for phase, value in spent.items()}
        self.file.write(strict_json({"iteration": iteration, "task": task} | metrics) + "\n")
        self.file.flush()
        for show in self.boards:
            show(iteration, metrics)
        if task != "eval":
            shown = metrics.get(f"{task}/total", metrics.get("nll"))
            self.bar.set_postfix_str(f"{task} {'nll' if task == 'sft' else 'reward'} {shown:.3f}", refresh=False)
            self.bar.update()
