from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.normalization import l2_norm, rms_norm_gated
from kernels.normalization.reference import l2_norm_reference, rms_norm_gated_reference


def relative_error(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected).norm() / expected.norm()).item()


def test_rms_norm_by_hand() -> None:
    # mean(3², 4²) = 12.5
    out = rms_norm_gated(torch.tensor([3.0, 4.0], dtype=torch.float64), eps=0.0)
    torch.testing.assert_close(out, torch.tensor([3.0, 4.0], dtype=torch.float64) / 12.5**0.5)
    gate = torch.tensor([0.0, 100.0], dtype=torch.float64)
    out = rms_norm_gated(torch.ones(2, dtype=torch.float64), gate, torch.tensor([7.0, 0.5]).double(), eps=0.0)
    torch.testing.assert_close(out, torch.tensor([0.0, 50.0], dtype=torch.float64))


def test_l2_norm_by_hand_and_of_nothing() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    out = l2_norm(x)
    torch.testing.assert_close(out, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)],
)
@pytest.mark.parametrize("with_gate", [True, False])
@pytest.mark.parametrize("with_weight", [True, False])
def test_values_and_gradients_are_the_reference(
    dtype: torch.dtype, tolerance: float, with_gate: bool, with_weight: bool
) -> None:
    given = {"x": torch.randn(2, 5, 3, 7)}
    if with_gate:
        given["gate"] = torch.randn(2, 5, 3, 7)
    if with_weight:
        given["weight"] = torch.randn(7)
    rounded = [tensor.to(dtype).requires_grad_() for tensor in given.values()]
    wide = [tensor.detach().double().requires_grad_() for tensor in rounded]
    out = rms_norm_gated(**dict(zip(given, rounded, strict=True)), eps=1e-5)
    arguments = dict.fromkeys(("gate", "weight")) | dict(zip(given, wide, strict=True))
    expected = rms_norm_gated_reference(**arguments, eps=1e-5)
    assert out.dtype == dtype
    upstream = torch.randn(out.shape).to(dtype)
    gradients = torch.autograd.grad(out, rounded, upstream)
    expected_gradients = torch.autograd.grad(expected, wide, upstream.double())
    for result, reference in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert relative_error(result, reference) < tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_l2_norm_is_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.randn(3, 4, 9).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    out, expected = l2_norm(x), l2_norm_reference(wide, 1e-6)
    upstream = torch.randn(x.shape).to(dtype)
    assert out.dtype == dtype
    assert relative_error(out, expected) < tolerance
    (gradient,), (reference,) = (
        torch.autograd.grad(out, x, upstream),
        torch.autograd.grad(expected, wide, upstream.double()),
    )
    assert relative_error(gradient, reference) < tolerance


def test_gradcheck() -> None:
    x, gate = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm_gated, (x, gate, weight))
    assert torch.autograd.gradcheck(l2_norm, (x,))


def test_half_precision_does_not_overflow_in_the_square() -> None:
    x = torch.full((1, 4), 1000.0, dtype=torch.float16)
    torch.testing.assert_close(rms_norm_gated(x), torch.ones_like(x))
    torch.testing.assert_close(l2_norm(x), torch.full_like(x, 0.5))


def test_clear_errors() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(TypeError, match="int64"):
        l2_norm(torch.arange(4))
    with pytest.raises(ValueError, match="scalar"):
        l2_norm(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"gate of shape \[2, 4\]"):
        rms_norm_gated(x, torch.randn(4))
    with pytest.raises(ValueError, match=r"weight of shape \[4\]"):
        rms_norm_gated(x, weight=torch.randn(2, 4))
    with pytest.raises(TypeError, match="weight"):
        rms_norm_gated(x, weight=torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="eps"):
        rms_norm_gated(x, eps=-1.0)
    with pytest.raises(ValueError, match="one device"):
        rms_norm_gated(x, torch.randn(2, 4, device="meta"))
