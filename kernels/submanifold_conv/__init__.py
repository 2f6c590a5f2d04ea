"""Convolution of a sparse volume: at active places only, over active neighbors only."""

from __future__ import annotations

from torch import Tensor

from kernels.common import DTYPES
from kernels.submanifold_conv.cpu import sparse_conv_cpu
from kernels.submanifold_conv.rulebook import Rulebook, build_rulebook

__all__ = ["Rulebook", "build_rulebook", "sparse_conv"]


def sparse_conv(
    features: Tensor,
    weight: Tensor,
    rulebook: Rulebook,
    *,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Sparse convolution of the features of active places, by the pairs of places in a rulebook.

        out[o] = bias + Σ_k in[input_k(o)] W_k          over the offsets k at which o sees an active input

    features `[N_in, C_in]`, weight `[K, C_in, C_out]` or `[kz, ky, kx, C_in, C_out]` (that of conv3d, permuted by
    `(2, 3, 4, 1, 0)`), bias `[C_out]`. Returns `[N_out, C_out]` in the dtype of the features; sums are in float32, for
    float64 in float64. Equals conv3d of the volume that is zero at inactive places (padding 1 for kernel 3), read at
    the active ones. Differentiable once in features, weight and bias.

    `transposed` goes from the outputs of the rulebook back to its inputs, `[N_out, C_in]` → `[N_in, C_out]`: with the
    rulebook of a strided convolution the way back to the finer places, as conv_transpose3d read at these.

    Raises ValueError for wrong shapes and devices, TypeError for wrong dtypes.
    Graham, Engelcke and van der Maaten, "3D Semantic Segmentation with Submanifold Sparse Convolutional Networks"
    (CVPR 2018), section 3.
    """
    rows, side = (rulebook.num_outputs, "outputs") if transposed else (rulebook.num_inputs, "inputs")
    if features.ndim != 2 or len(features) != rows:
        raise ValueError(
            f"features must be [{rows}, C], a row for each of the rulebook's {side} (given: {_shape(features)})"
        )
    kernel = list(rulebook.kernel_size)
    if weight.ndim == 5 and list(weight.shape[:3]) == kernel:
        weight = weight.flatten(0, 2)
    expected = [rulebook.num_offsets, features.shape[1]]
    if weight.ndim != 3 or list(weight.shape[:2]) != expected or 0 in weight.shape:
        raise ValueError(
            f"weight must be {[*expected, 'C_out']} or {[*kernel, features.shape[1], 'C_out']} for these features and "
            f"this rulebook, without empty axes (given: {_shape(weight)})"
        )
    if bias is not None and list(bias.shape) != [weight.shape[2]]:
        raise ValueError(f"bias must be [{weight.shape[2]}] (given: {_shape(bias)})")
    for name, tensor in {"features": features, "weight": weight, "bias": bias}.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64 (given: {tensor.dtype})")
        if tensor.device != rulebook.neighbors.device:
            raise ValueError(f"{name} is on {tensor.device} and the rulebook on {rulebook.neighbors.device}: move one")
    if features.is_cuda:
        from kernels.submanifold_conv.gpu import sparse_conv_gpu

        return sparse_conv_gpu(features, weight, bias, rulebook, transposed)
    return sparse_conv_cpu(features, weight, bias, rulebook, transposed)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
