"""The method without the folders that only use it."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import BESIDE
from shared import ROOT, make_config


@pytest.fixture()
def house(tmp_path):
    """The repository's tracked files, but for these folders."""
    if not (ROOT / ".git").exists():
        pytest.skip("which files are tracked, git alone knows")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if name.split("/")[0] not in BESIDE and (ROOT / name).is_file():
            (tmp_path / "house" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "house" / name)
    return tmp_path / "house"


def be_alone(arguments):
    """A program of the copy, in a process that sees nothing of this repository."""
    house, program, *argv = map(str, arguments)
    os.chdir(house)
    sys.path[:] = [house, *(place for place in sys.path if not Path(place).resolve().is_relative_to(ROOT))]
    tiny.forget_project("engine", *BESIDE)
    sys.argv = [program, *argv]
    runpy.run_path(program, run_name="__main__")


def test_the_method_runs_alone(house, tmp_path, checkpoint):
    config = make_config(tmp_path, checkpoint)
    rows = ("--annotations", config.annotations, "--videos", config.videos, "--workers", 0, "--max-new-tokens", 4)
    for argv in (["invert4tvg.py", "--help"],
                 ["invert4tvg.py", "--model", checkpoint, *rows, "--iterations", 3, "--output", tmp_path / "run"],
                 ["evaluate.py", "--model", tmp_path / "run", *rows, "--output", tmp_path / "test"]):
        log = tmp_path / "output.txt"
        status = tiny.wait(tiny.start([house, *argv], log, function=be_alone))
        assert status == [0], log.read_text(encoding="utf-8")
    assert (tmp_path / "test" / "metrics.json").is_file()


def test_the_tests_of_the_method_are_collected_alone(house):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=house, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-2000:]
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {"tests/test_rewards.py", "tests/test_grpo.py", "tests/test_loop.py", "tests/test_evaluate.py"} <= collected
    assert not {"tests/test_papers.py", "tests/test_report.py", "tests/test_reading.py"} & collected
