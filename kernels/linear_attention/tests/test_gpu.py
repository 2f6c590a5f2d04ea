"""The Triton path: in the interpreter, through the compiler, and natively where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.linear_attention.tests.interpreted import GATES, TOLERANCE, Gate, assert_close, inputs, relative_errors
from kernels.tests.without_gpu import run_in_its_own_process

HERE = Path(__file__).parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(("file", "interpret"), [("interpreted.py", True), ("compiled.py", False)])
def test_checks_that_need_their_own_process(file: str, interpret: bool, tmp_path: Path) -> None:
    run_in_its_own_process(HERE / file, interpret=interpret, cache=tmp_path)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [60, 64, 128, 256, 320])
@pytest.mark.parametrize("length", [63, 1024, 2048])
def test_vector_gates_natively(length: int, head_dim: int) -> None:
    tensors = inputs("vector", length, head_dim, head_dim, heads=2)
    assert_close(relative_errors(tensors, torch.bfloat16, device="cuda"), TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [60, 256])
@pytest.mark.parametrize("gate", ["none", "constant", "scalar"])
def test_other_gates_natively(gate: Gate, head_dim: int) -> None:
    tensors = inputs(gate, 1024, head_dim, head_dim, heads=4)
    assert_close(relative_errors(tensors, torch.bfloat16, device="cuda"), TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("gate", GATES)
def test_other_types_natively(gate: Gate, dtype: torch.dtype) -> None:
    tensors = inputs(gate, 200, 60, 64, batch=2, heads=4)
    assert_close(relative_errors(tensors, dtype, device="cuda"), TOLERANCE[dtype])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("gate", ["constant", "scalar", "vector"])
def test_strong_gates_natively(gate: Gate) -> None:
    tensors = inputs(gate, 500, 64, 64, heads=4, depth=50.0)
    assert_close(relative_errors(tensors, torch.float32, device="cuda"), TOLERANCE[torch.float32])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("gate", GATES)
def test_sequences_laid_end_to_end_natively(gate: Gate) -> None:
    tensors = inputs(gate, 300, 64, 64, heads=4, num_sequences=3)
    errors = relative_errors(tensors, torch.float32, device="cuda", bounds=[0, 1, 130, 300])
    assert_close(errors, TOLERANCE[torch.float32])
