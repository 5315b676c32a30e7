"""How a worker process ends. This imports little, because workers that are spawned import it."""

import multiprocessing
import os
import signal
import threading
import time


def begin_worker(number=None):
    """End with the program, or when it says so, and not at a signal to the whole group: the program saves first.

    For a worker to call first; `number` is what PyTorch's loader hands over.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # _end_with sees who sent it
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(program):
    """End this process when the program is gone, or at a SIGTERM of its own, also in a blocked system call."""
    while program.is_alive():
        if hasattr(signal, "sigtimedwait"):
            sent = signal.sigtimedwait({signal.SIGTERM}, 1)
            if sent and sent.si_pid == program.pid:
                break
        else:
            time.sleep(1)
    os._exit(0)
