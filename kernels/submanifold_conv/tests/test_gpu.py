"""The Triton path: in the interpreter, through the compiler, and natively where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.submanifold_conv import build_rulebook, sparse_conv
from kernels.submanifold_conv.tests.comparing import hold_against_definition, places
from kernels.tests.comparing import TOLERANCE
from kernels.tests.without_gpu import run_in_its_own_process

HERE = Path(__file__).parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(("file", "interpret"), [("interpreted.py", True), ("compiled.py", False)])
def test_checks_that_need_their_own_process(file: str, interpret: bool, tmp_path: Path) -> None:
    run_in_its_own_process(HERE / file, interpret=interpret, cache=tmp_path)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("kernel_size", "stride", "transposed"),
    [(1, 1, False), (3, 1, False), (3, 1, True), (2, 2, False), (3, 2, False), (2, 2, True), (3, 2, True)],
)
def test_natively(kernel_size: int, stride: int, transposed: bool, dtype: torch.dtype) -> None:
    from kernels.submanifold_conv.gpu import sparse_conv_gpu

    hold_against_definition(
        sparse_conv_gpu,
        places((12, 15, 13)),
        (12, 15, 13),
        kernel_size=kernel_size,
        stride=stride,
        transposed=transposed,
        channels=(33, 70),
        dtype=dtype,
        device="cuda",
    )


@pytest.mark.gpu
@needs_gpu
def test_two_runs_give_the_same_bits_natively() -> None:
    coordinates = places((16, 16, 16)).cuda()
    rulebook = build_rulebook(coordinates, (16, 16, 16))
    features = torch.randn(len(coordinates), 64, device="cuda", requires_grad=True)
    weight = torch.randn(27, 64, 64, device="cuda", requires_grad=True)

    def run() -> tuple[torch.Tensor, ...]:
        y = sparse_conv(features, weight, rulebook)
        return y, *torch.autograd.grad(y.square().sum(), (features, weight))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
