"""What CUDA refuses and a CPU lets pass."""

import tiny


def test_the_program_runs_on_a_gpu_that_is_pretended(tmp_path):
    """tests/pretend_gpu.py, in a process of its own: once there, the device would be met by all other tests."""
    command = ["-q", "-n0", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'pretend'}", "tests/pretend_gpu.py"]
    status, said = tiny.run_program("-m", "pytest", *command)
    assert status == 0, said[-3000:]
    assert "5 passed" in said
