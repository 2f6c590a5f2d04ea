"""The Triton path: in the interpreter, through the compiler, and natively where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.short_convolution.tests.interpreted import TOLERANCE, assert_close, relative_errors

HERE = Path(__file__).parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(("file", "interpret"), [("interpreted.py", "1"), ("compiled.py", "0")])
def test_checks_that_need_their_own_process(file: str, interpret: str, tmp_path: Path) -> None:
    """Triton decides once a process whether it interprets, which another test may have brought about already."""
    pytest.importorskip("triton", reason="no Triton on this platform")
    # Without a GPU in sight the checks are the same on every machine.
    environment = os.environ | {
        "TRITON_INTERPRET": interpret,
        "TRITON_CACHE_DIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", str(HERE / file), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--show-capture=no"]
    run = subprocess.run(
        command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("activation", [None, "silu"])
def test_natively(activation: str | None, dtype: torch.dtype) -> None:
    for length, channels in ((1, 64), (63, 60), (1025, 512)):
        errors = relative_errors(2, length, channels, 4, dtype, activation=activation, device="cuda")
        assert_close(errors, TOLERANCE[dtype])


@pytest.mark.gpu
@needs_gpu
def test_sequences_laid_end_to_end_natively() -> None:
    errors = relative_errors(1, 300, 96, 4, torch.float32, bounds=[0, 1, 3, 64, 200, 300], device="cuda")
    assert_close(errors, TOLERANCE[torch.float32])
