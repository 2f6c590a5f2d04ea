"""Checks of the Triton path in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1 pytest interpreted.py`.

Run by `test_gpu.py` in a process of its own, since the variable counts only before triton is first imported.
"""

from __future__ import annotations

import pytest
import torch

from kernels.submanifold_conv import build_rulebook, gpu
from kernels.submanifold_conv.tests.comparing import hold_against_definition, places
from kernels.tests.comparing import TOLERANCE


@pytest.mark.parametrize(
    ("kernel_size", "stride", "transposed"),
    [(1, 1, False), (3, 1, True), (2, 2, False), (3, 2, False), (2, 2, True), (3, 2, True)],
)
def test_values_and_gradients_are_those_of_the_definition(kernel_size: int, stride: int, transposed: bool) -> None:
    hold_against_definition(
        gpu.sparse_conv_gpu,
        places((3, 5, 4), share=0.3),
        (3, 5, 4),
        kernel_size=kernel_size,
        stride=stride,
        transposed=transposed,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_several_tiles_in_every_precision(dtype: torch.dtype) -> None:
    # The interpreter truncates to bfloat16 where a GPU rounds, which doubles the error.
    tolerance = TOLERANCE[dtype] * (2 if dtype == torch.bfloat16 else 1)
    coordinates = places((3, 5, 3), share=0.3)
    hold_against_definition(
        gpu.sparse_conv_gpu, coordinates, (3, 5, 3), channels=(5, 18), dtype=dtype, tolerance=tolerance
    )


def test_rows_of_the_weight_gradient_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SPLIT_ROWS", 20)
    hold_against_definition(gpu.sparse_conv_gpu, places((3, 4, 3)), (3, 4, 3), dtype=torch.float32)


@pytest.mark.parametrize("count", [0, 1])
def test_next_to_nothing_is_active(count: int) -> None:
    coordinates = torch.tensor([[1, 0, 2, 3]])[:count]
    hold_against_definition(gpu.sparse_conv_gpu, coordinates, (2, 3, 4), dtype=torch.float32)


def test_inputs_need_not_be_contiguous() -> None:
    coordinates = places((3, 4, 5))
    rulebook = build_rulebook(coordinates, (3, 4, 5))
    features, weight = torch.randn(4, len(coordinates)).T, torch.randn(27, 6, 4).mT
    expected = gpu.sparse_conv_gpu(features.contiguous(), weight.contiguous(), None, rulebook, False)
    assert torch.equal(gpu.sparse_conv_gpu(features, weight, None, rulebook, False), expected)


def test_torch_is_told_the_right_shapes() -> None:
    rulebook = build_rulebook(places((3, 4, 5)), (3, 4, 5), kernel_size=3, stride=2)
    table, back = rulebook.table(False)[0], rulebook.table(True)[0]
    x, weight, bias = torch.randn(len(back), 4), torch.randn(27, 4, 6), torch.randn(6)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for optional in (None, bias):
        torch.library.opcheck(gpu.convolve, (x, weight, optional, table, back, False, False), test_utils=checks)
    torch.library.opcheck(gpu.weight_gradient, (x, torch.randn(len(table), 6), table, True), test_utils=checks[:2])
