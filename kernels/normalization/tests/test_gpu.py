"""The Triton path: in the interpreter, through the compiler, and natively where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.normalization.tests.interpreted import TOLERANCE, assert_close, relative_errors
from kernels.tests.without_gpu import run_in_its_own_process

HERE = Path(__file__).parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(("file", "interpret"), [("interpreted.py", True), ("compiled.py", False)])
def test_checks_that_need_their_own_process(file: str, interpret: bool, tmp_path: Path) -> None:
    run_in_its_own_process(HERE / file, interpret=interpret, cache=tmp_path)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("channels", [60, 64, 2048, 10000, 20000])
def test_natively(channels: int, dtype: torch.dtype) -> None:
    for norm, companions in (("rms", True), ("l2", False)):
        errors = relative_errors(
            (3, 777, channels), dtype, norm=norm, gate=companions, weight=companions, device="cuda"
        )
        assert_close(errors, TOLERANCE[dtype])
