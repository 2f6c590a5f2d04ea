"""Normalization over the last axis: RMSNorm with a Swish gate, and the L2 norm. Statistics in float32."""

from __future__ import annotations

from torch import Tensor

from kernels.normalization.cpu import l2_norm_cpu, rms_norm_gated_cpu

__all__ = ["l2_norm", "rms_norm_gated"]


def rms_norm_gated(x: Tensor, gate: Tensor | None = None, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """RMSNorm over the last axis, times a weight and the Swish of a gate.

        y = x / sqrt(mean(x²) + eps) · weight · gate · sigmoid(gate)

    x and gate `[..., D]`, weight `[D]`; without gate or weight that factor is left out. The result has the shape and
    dtype of x; the arithmetic is in float32, or float64 for float64 x. Differentiable in x, gate and weight.
    Raises ValueError for wrong shapes and devices, TypeError for dtypes that are not floating point.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); with the gate as the output of a gated linear
    attention layer, Yang et al. (2023), section 4.4.
    """
    _check_input("rms_norm_gated", x, eps)
    _check_companion("gate", gate, x.shape, x)
    _check_companion("weight", weight, x.shape[-1:], x)
    if x.is_cuda:
        from kernels.normalization.gpu import rms_norm_gated_gpu

        return rms_norm_gated_gpu(x, gate, weight, eps)
    return rms_norm_gated_cpu(x, gate, weight, eps)


def l2_norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x scaled to length one along the last axis, y = x / sqrt(Σ x² + eps).

    x `[..., D]` to the same shape and dtype; the arithmetic is in float32, or float64 for float64 x. A vector of
    zeros stays zero. Raises ValueError for a scalar x or a negative eps, TypeError for an x that is not floating point.

    The keys and queries of a delta-rule layer, Yang et al., "Parallelizing Linear Transformers with the Delta Rule
    over Sequence Length" (2024), section 3.3.
    """
    _check_input("l2_norm", x, eps)
    if x.is_cuda:
        from kernels.normalization.gpu import l2_norm_gpu

        return l2_norm_gpu(x, eps)
    return l2_norm_cpu(x, eps)


def _check_input(function: str, x: Tensor, eps: float) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{function} needs floating-point x (given: {x.dtype}); convert it first")
    if x.ndim == 0:
        raise ValueError(f"{function} normalizes the last axis, but x is a scalar; give it at least one axis")
    if eps < 0:
        raise ValueError(f"{function} needs eps of at least 0 (given: {eps})")


def _check_companion(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor is None:
        return
    if not tensor.is_floating_point():
        raise TypeError(f"rms_norm_gated needs a floating-point {name} (given: {tensor.dtype}); convert it first")
    if tensor.shape != shape:
        raise ValueError(
            f"rms_norm_gated needs {name} of shape {list(shape)} for x {list(x.shape)} (given: {list(tensor.shape)})"
        )
    if tensor.device != x.device:
        raise ValueError(
            f"rms_norm_gated needs x and {name} on one device (given: {x.device}, {tensor.device}); move one of them"
        )
