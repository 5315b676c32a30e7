"""Checks in stages: each stage in a process of its own with a deadline, its checks shown as they come."""

import faulthandler
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import models

CONTEXT = multiprocessing.get_context("fork")  # torch is imported once; CUDA starts in the stages alone


class Check(NamedTuple):
    what: str
    value: object
    bound: str = ""
    passed: bool | None = None  # None: reported
    source: str = ""  # of the bound


def at_most(what, value, bound, source):
    return Check(what, value, f"at most {bound:g}", math.isfinite(value) and value <= bound, source)


def equal(what, found, expected, source):
    return Check(what, found, f"equal to {expected}", found == expected, source)


class Stage(NamedTuple):
    run: Callable
    title: str
    seconds: int  # CPUs get four times as many, since they may be busy
    early: bool = False  # a failure ends the run


def work(sender, stage, place, seconds):
    """A stage's process: its checks go to the parent, all that it prints to its log."""
    os.setpgid(0, 0)  # the parent ends it with all that it has started
    log = open(place.folder / f"{stage.run.__name__}.log", "w", encoding="utf-8")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    faulthandler.dump_traceback_later(max(1, seconds - 2), file=log)
    models.quieten()
    if place.small:
        torch.set_num_threads(1)
    try:
        for check in stage.run(place):
            sender.send(check)
    except BaseException as error:
        traceback.print_exc()
        log.flush()
        sender.send(Check("no error", f"{type(error).__name__}: {error}".split("\n")[0], "none", False,
                          f"see {log.name}"))
    os._exit(0)  # no clean-up may hang the run


def run_stage(stage, place, seconds):
    """Run a stage in a process of its own and yield its checks as they come; a failed one where its time is up."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=work, args=(sender, stage, place, seconds))
    process.start()
    sender.close()
    deadline = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            yield receiver.recv()
        yield Check("in time", "no", f"at most {seconds:.0f} s", False, f"see {stage.run.__name__}.log")
    except EOFError:
        if process.exitcode and process.exitcode < 0:
            yield Check("no error", f"killed by signal {-process.exitcode}", "none", False, "")
    finally:
        for end in (partial(os.killpg, process.pid), partial(os.kill, process.pid)):
            try:
                end(signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.join()


def cell_text(value):
    """A value for the table: numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


VERDICTS = {True: "pass", False: "FAIL", None: "-"}


def table(results):
    """[(title, Check)] -> Markdown"""
    lines = ["| stage | check | value | bound | result | where the bound comes from |", "|---|---|---|---|---|---|"]
    for title, check in results:
        row = [title, check.what, cell_text(check.value), check.bound, VERDICTS[check.passed], check.source]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
