"""How a program begins and ends: its processes are joined, its errors are one sentence, a signal lets it save first."""

import contextlib
import datetime
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from engine.program.files import locked
from engine.program.ranks import current, on_rank_0
from engine.program.settings import UserError

JOINING = datetime.timedelta(minutes=5)  # in which all processes must be there
WAITING = datetime.timedelta(minutes=40)  # for another rank; its video alone may take ten (engine/video/clips.py)

at_exit = []  # functions (exit status) to call where an error skips Python's own exit hooks


def setup_distributed():
    """Join the process group torchrun describes, or make one of a single process -> the device of this rank.

    One process, gloo on CPUs and NCCL on GPUs all run the same code; only the world size differs. Ranks wait for each
    other's videos and evaluations, longer than NCCL's ten minutes.
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
    try:
        store, rank, world_size = dist.HashStore(), 0, 1
        if "RANK" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=JOINING))
            store.set_timeout(WAITING)
            # With --max-restarts torchrun's store may hold the addresses of processes that have ended.
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=WAITING, store=store, rank=rank,
                                world_size=world_size, device_id=device if cuda else None)  # NCCL's errors come here
    except (ValueError, RuntimeError) as error:  # a variable is missing, a port is taken, MASTER_ADDR is nowhere
        reason = str(error).strip().split("\n")[0]
        sys.exit(f"the processes could not be joined ({reason}); start them with torchrun, which sets "
                 "MASTER_ADDR and its kin, or unset RANK for one.")
    return device


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is there, whatever torch says: with too old a driver torch finds none."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


def launch(program, settings):
    """Run `program(settings, device)` in the process group, alone in settings.output.

    A user's mistake ends it with one sentence, status 1; Ctrl-C and other signals with status 130. Whatever ends one
    rank ends all: an error names the rank, the iteration and the videos, and no worker is left behind.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are forked
    device = setup_distributed()
    current.iteration, current.videos = None, ()
    locks = contextlib.ExitStack()
    try:
        with locks:
            if not getattr(settings, "video", ""):  # to search one's own video writes nothing
                on_rank_0(lambda: locks.enter_context(locked(settings.output)))
            program(settings, device)
    except KeyboardInterrupt:
        status = 130
    except (UserError, ImportError, OSError) as error:
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
            error.add_note(f"{_place()}, {', '.join(current.videos) or 'no video'}")
            raise
        else:
            print(f"{_place()}, {', '.join(current.videos) or 'no video'}:\n{traceback.format_exc()}", file=sys.stderr)
        status = 1
    else:
        dist.destroy_process_group()
        return
    finally:
        for worker in multiprocessing.active_children():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the library raises an error where a worker is killed
            worker.kill()  # it hears nothing else
    if dist.get_world_size() > 1:
        for finish in at_exit:
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
        place = "" if current.iteration is None else f"{_place()}: "
        print(f"{Path(sys.argv[0]).name}: {place}{sentence}", file=sys.stderr, flush=True)
    if is_first and dist.get_world_size() > 1:
        time.sleep(1)  # without torchrun rank 0 holds the store, in which the others look


def _place():
    iteration = "before the first iteration" if current.iteration is None else f"iteration {current.iteration}"
    return f"rank {dist.get_rank()}, {iteration}"


def _is_anothers_end(error):
    """Whether this is what a collective call raises when another rank is gone."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


class StopSignal:
    """Ctrl-C, SIGTERM and a closed terminal let the iteration end and be saved; a second signal stops at once.

    So does the end of the torchrun that started this process.
    """

    def __init__(self):
        self.is_stopping = False
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.terminals = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream.isatty()]
        self.numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means to go on
            self.numbers.append(signal.SIGHUP)
        for number in self.numbers:
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        self.is_stopping = True
        for each in self.numbers:
            signal.signal(each, signal.SIG_DFL)  # the system ends a process also where Python would not get to it
        if number == signal.SIGHUP:  # to write to a closed terminal is an error, and would come before saving
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in self.terminals:
                os.dup2(nowhere, terminal)

    def on_any_rank(self, device):
        is_orphan = self.torchrun not in (None, os.getppid())
        stops = torch.tensor(float(self.is_stopping or is_orphan), device=device)
        dist.all_reduce(stops)
        return bool(stops)
