"""The Triton path: in the interpreter, through the compiler, and natively where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.delta_rule.tests.interpreted import TOLERANCE, assert_close, inputs, relative_errors

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
@pytest.mark.parametrize("head_dim", [60, 64, 128, 256])
@pytest.mark.parametrize("length", [63, 1024, 2048])
def test_natively(length: int, head_dim: int) -> None:
    tensors = inputs(length, head_dim, head_dim, heads=2)
    assert_close(relative_errors(tensors, torch.bfloat16, device="cuda"), TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("head_dim", [60, 256])
def test_other_types_natively(head_dim: int, dtype: torch.dtype) -> None:
    tensors = inputs(200, head_dim, 64, batch=2, heads=2)
    assert_close(relative_errors(tensors, dtype, device="cuda"), TOLERANCE[dtype])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_chunk_sizes_repeated_keys_and_several_sequences_natively(chunk_size: int) -> None:
    tensors = inputs(300, 64, 64, heads=2, repeats=5, num_sequences=4)
    errors = relative_errors(tensors, torch.float32, chunk_size=chunk_size, bounds=[0, 1, 70, 198, 300], device="cuda")
    assert_close(errors, TOLERANCE[torch.float32])
