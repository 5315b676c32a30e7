"""What a run is computed by and on: environment.json."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from engine.program.files import write_text
from engine.program.lookup import ROOT


def note_environment(output, iterations):
    """Write it: how many iterations the run has, its processes and device, the commit and the packages' versions."""
    environment = {"iterations": iterations, "processes": dist.get_world_size(), "device": "CPU"}
    if torch.cuda.is_available():
        environment["device"] = torch.cuda.get_device_name()
    environment |= {"commit": commit(), "python": platform.python_version()}
    for package in ("torch", "transformers", "spacy", "av", "numpy"):
        try:
            environment[package] = version(package)
        except PackageNotFoundError:
            environment[package] = None
    write_text(Path(output) / "environment.json", json.dumps(environment, indent=2) + "\n")


def commit() -> str | None:
    """The commit of this program, with "+" where files have changed since; None outside a clone."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude", "*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
