"""What CUDA refuses and a CPU lets pass."""

import subprocess
import sys
import textwrap

import pytest
from shared import ROOT


def test_the_program_runs_on_a_gpu_that_is_pretended(tmp_path):
    """tests/pretend_gpu.py, which also runs stages of benchmarks.accept.

    It has a process of its own that is not forked: PyTorch's backward pass counts devices once.
    """
    command = ["-q", "-n0", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'pretend'}", "tests/pretend_gpu.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "11 passed" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="stages are forked")
def test_the_acceptance_forks_its_ranks_before_anything_has_begun_that_no_fork_survives(tmp_path):
    """With a GPU there, a process that has run a backward pass, or parallel work, has threads that its forks lack.

    benchmarks.accept plans with one, and each rank runs one. PyTorch is told of a device, in a process of its own.
    """
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        import torch
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
        from benchmarks import accept, memory

        def backward(*_):
            torch.empty(2**22).zero_()  # on all cores, if it may
            torch.ones(2, requires_grad=True).sum().backward()

        def plan(cards, gib):
            backward()
            return "60m", "", memory.Settings(model="60m", world_size=2)

        def real_size(place, settings, cell):
            backward()
            sys.exit(7)  # so far, so good

        _setup_privateuseone_for_python_backend("gpu")
        torch.set_num_threads(2)
        torch.empty(2**22).zero_()
        accept.real_size_plan, accept.real_size = plan, real_size
        accept.Place.checkpoint = backward
        try:
            list(accept.published(accept.Place(torch.device("gpu:0"), Path(sys.argv[1]), cards=2)))
        except RuntimeError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert "ended with status 7" in done.stdout, done.stdout + done.stderr
