"""What CUDA refuses and a CPU lets pass."""

import subprocess
import sys

from conftest import ROOT


def test_the_program_runs_on_a_gpu_that_is_pretended():
    """tests/pretend_gpu.py, in a process of its own: once there, the device would be met by all other tests."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/pretend_gpu.py"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "5 passed" in done.stdout
