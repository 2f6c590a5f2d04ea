"""The Triton path: in the interpreter, through the compiler, and natively where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.delta_rule.tests.interpreted import TOLERANCE, assert_close, inputs, relative_errors
from kernels.tests.without_gpu import run_in_its_own_process

HERE = Path(__file__).parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(("file", "interpret"), [("interpreted.py", True), ("compiled.py", False)])
def test_checks_that_need_their_own_process(file: str, interpret: bool, tmp_path: Path) -> None:
    run_in_its_own_process(HERE / file, interpret=interpret, cache=tmp_path)


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
