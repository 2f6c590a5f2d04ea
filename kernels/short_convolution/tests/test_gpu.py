"""The Triton path: in the interpreter, through the compiler, and natively where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.short_convolution.tests.interpreted import TOLERANCE, assert_close, relative_errors
from kernels.tests.without_gpu import run_in_its_own_process

HERE = Path(__file__).parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(("file", "interpret"), [("interpreted.py", True), ("compiled.py", False)])
def test_checks_that_need_their_own_process(file: str, interpret: bool, tmp_path: Path) -> None:
    run_in_its_own_process(HERE / file, interpret=interpret, cache=tmp_path)


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
