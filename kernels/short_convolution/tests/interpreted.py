"""Checks of the Triton path in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1 pytest interpreted.py`.

Run by `test_gpu.py` in a process of its own, since the variable counts only before triton is first imported.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.short_convolution.reference import short_convolution_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def relative_errors(
    batch: int,
    length: int,
    channels: int,
    width: int,
    dtype: torch.dtype,
    *,
    activation: str | None = "silu",
    bias: bool = True,
    state: bool = True,
    bounds: list[int] | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """‖x - reference‖ / ‖reference‖ of y and of all gradients, against the definition in float64."""
    from kernels.short_convolution.gpu import short_convolution_gpu

    generator = torch.Generator().manual_seed(length)
    bounds = bounds or [0, length]
    packed = len(bounds) > 2
    shapes = {"x": (batch, length, channels), "weight": (channels, width)}
    if bias:
        shapes["bias"] = (channels,)
    if state:
        shapes["initial_state"] = (len(bounds) - 1 if packed else batch, channels, width - 1)
    tensors = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
    grad_y = torch.randn(batch, length, channels, generator=generator).to(device, dtype)

    def fast(x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_state: Tensor | None = None) -> Tensor:
        cu_seqlens = torch.tensor(bounds, device=device) if packed else None
        return short_convolution_gpu(x, weight, bias, activation, initial_state, cu_seqlens)

    def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_state: Tensor | None = None) -> Tensor:
        pieces = []
        for i, (start, end) in enumerate(pairwise(bounds)):
            before = initial_state[i : i + 1] if packed and state else initial_state
            pieces.append(short_convolution_reference(x[:, start:end], weight, bias, activation, before)[0])
        return torch.cat(pieces, dim=1)

    results, expected = [], []
    for values, run, exponent in ((results, fast, dtype), (expected, exact, torch.float64)):
        leaves = {name: x.to(exponent).clone().requires_grad_() for name, x in tensors.items()}
        y = run(**leaves)
        values.extend([y, *torch.autograd.grad(y, list(leaves.values()), grad_y.to(exponent))])
    assert [x.dtype for x in results] == [dtype] * len(results)
    pairs = zip(("y", *tensors), results, expected, strict=True)
    return {name: float((x.double() - y).norm() / y.norm()) for name, x, y in pairs if y.numel()}


def assert_close(errors: dict[str, float], tolerance: float) -> None:
    """All errors within the tolerance (NaN is not)."""
    assert not {name: error for name, error in errors.items() if not error <= tolerance}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("bias", "state"), [(False, False), (True, True)])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "width", "dtype"),
    [
        (2, 1, 5, 4, torch.float32),
        (1, 130, 70, 4, torch.float32),
        (2, 9, 12, 3, torch.float64),
        (1, 7, 3, 1, torch.float32),
        (1, 20, 8, 4, torch.float16),
    ],
)
def test_values_and_gradients_are_those_of_the_definition(
    batch: int,
    length: int,
    channels: int,
    width: int,
    dtype: torch.dtype,
    bias: bool,
    state: bool,
    activation: str | None,
) -> None:
    errors = relative_errors(batch, length, channels, width, dtype, activation=activation, bias=bias, state=state)
    assert_close(errors, TOLERANCE[dtype])


def test_bfloat16_is_summed_up_in_float32() -> None:
    # The interpreter truncates to bfloat16 where a GPU rounds, which doubles the error.
    assert_close(relative_errors(1, 40, 8, 4, torch.bfloat16), 2 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("state", [False, True])
def test_sequences_laid_end_to_end_do_not_see_each_other(state: bool) -> None:
    errors = relative_errors(1, 100, 6, 4, torch.float32, state=state, bounds=[0, 1, 3, 64, 70, 100])
    assert_close(errors, 1e-5)


def test_inputs_need_not_be_contiguous() -> None:
    from kernels.short_convolution.gpu import short_convolution_gpu

    x = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0)).mT
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).T
    expected, _ = short_convolution_reference(x, weight, None, "silu", None)
    torch.testing.assert_close(short_convolution_gpu(x, weight, None, "silu", None), expected)


def test_torch_is_told_the_right_shapes() -> None:
    from kernels.short_convolution.gpu import convolve_backward, convolve_forward

    x, weight, bias, state = torch.randn(2, 5, 6), torch.randn(6, 4), torch.randn(6), torch.randn(2, 6, 3)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for optional in ((None, None), (bias, state)):
        torch.library.opcheck(convolve_forward, (x, weight, *optional, None, True), test_utils=checks)
        arguments = (x, weight, *optional, None, x.clone(), True)
        torch.library.opcheck(convolve_backward, arguments, test_utils=checks[:2])
