"""What CUDA refuses and a CPU lets pass."""

import subprocess
import sys

from shared import ROOT


def test_the_program_runs_on_a_gpu_that_is_pretended(tmp_path):
    """tests/pretend_gpu.py, which also runs stages of benchmarks.accept.

    It has a process of its own that is not forked: PyTorch's backward pass counts devices once.
    """
    command = ["-q", "-n0", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'pretend'}", "tests/pretend_gpu.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "11 passed" in done.stdout
