"""Every kernel of the step goes through Triton and ptxas for an H100; ``check.py`` says how.

By default the mixing alone, at 33 rows, where a kernel of it was refused (triton issue 8257). ``GPU_CHECK=1`` makes all
parts at 8, 33 and 60 rows, some seven minutes on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="PyTorch for CPUs alone brings no Triton")


def check(*words: str) -> subprocess.CompletedProcess[str]:
    """The check in a process of its own, which then believes in a GPU."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.check", *words]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_no_kernel_of_the_mixing_is_refused() -> None:
    done = check("--rows", "33", "--parts", "mixing", "-c", "nest_small")
    assert done.returncode == 0 and done.stdout.endswith("0 refused\n"), done.stdout + done.stderr[-3000:]
    assert int(done.stdout.split(" kernels")[0]) > 5


@pytest.mark.slow
@pytest.mark.skipif("GPU_CHECK" not in os.environ, reason="some seven minutes; GPU_CHECK=1 asks for it")
def test_no_kernel_is_refused() -> None:
    done = check("--rows", "8,33,60")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert int(done.stdout.split(" kernels")[0]) > 300
