"""environment.json of a run: which run it is, what it is computed by and on, whether it has ended."""

import datetime
import hashlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from engine.program.files import write_text
from engine.program.lookup import ROOT

FILE = "environment.json"


def note_environment(output, run, iterations):
    """Write it: the run's identity and number of iterations, processes and device, commit and packages' versions."""
    environment = {"run": run, "iterations": iterations, "processes": dist.get_world_size(), "device": "CPU"}
    if torch.cuda.is_available():
        environment["device"] = torch.cuda.get_device_name()
    environment |= {"commit": commit(), "python": platform.python_version()}
    for package in ("torch", "transformers", "spacy", "av", "numpy"):
        try:
            environment[package] = version(package)
        except PackageNotFoundError:
            environment[package] = None
    write_text(Path(output) / FILE, json.dumps(environment, indent=2) + "\n")


def note_end(output):
    """Note that the run has ended: the same command does not begin it again, whatever is deleted of it."""
    environment = noted(output) | {"finished": datetime.datetime.now().isoformat(" ", "seconds")}
    write_text(Path(output) / FILE, json.dumps(environment, indent=2) + "\n")


def noted(output) -> dict:
    """What an output folder's environment.json holds; {} where there is none that can be read."""
    try:
        return dict(json.loads((Path(output) / FILE).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return {}


def identity_by_place(output) -> str:
    """The identity of a run that an earlier version began: that of its folder's path."""
    return hashlib.sha256(str(Path(output).resolve()).encode()).hexdigest()[:16]


def commit() -> str | None:
    """The commit of this program, with "+" where files have changed since; None outside a clone."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude", "*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
