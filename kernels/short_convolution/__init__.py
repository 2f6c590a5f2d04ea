"""Short depthwise causal convolution over the tokens of a sequence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.short_convolution.cpu import short_convolution_cpu

__all__ = ["short_convolution"]


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise causal convolution of width W along the sequence, optionally followed by SiLU.

        y[b, t, d] = activation(bias[d] + Σ_{j<W} weight[d, j] · x[b, t - W + 1 + j, d])

    x `[B, T, D]`, weight `[D, W]`, bias `[D]`. Inputs before the first come from `initial_state` `[B, D, W-1]`, the
    last W-1 inputs of what went before, oldest first, and are zero without one. Returns y `[B, T, D]` in the dtype of
    x and, with `output_final_state`, the state to go on from, else None. Differentiable in x, weight, bias and state.

    `cu_seqlens` `[num_sequences + 1]`, integer, packs sequences of several lengths into one row (B = 1): sequence i is
    x[:, cu_seqlens[i]:cu_seqlens[i+1]], none sees another, and states are `[num_sequences, D, W-1]`.

    Raises ValueError for wrong shapes and devices, TypeError for wrong dtypes.
    Gu and Dao, "Mamba" (2023), section 3.4; Yang et al., "… the Delta Rule over Sequence Length" (2024), section 3.3.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"unknown activation {activation!r} of a short convolution; choose None or 'silu'")
    if x.ndim != 3:
        raise ValueError(f"short_convolution needs x [batch, length, channels] (given: {list(x.shape)})")
    if weight.ndim != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(f"short_convolution needs weight [{x.shape[2]}, width] (given: {list(weight.shape)})")
    num_sequences = x.shape[0] if cu_seqlens is None else _checked_num_sequences(cu_seqlens, x)
    expected = {"bias": (bias, [x.shape[2]]), "initial_state": (initial_state, _state_shape(num_sequences, weight))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"short_convolution needs {name} {shape} (given: {list(tensor.shape)})")
    tensors = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"short_convolution needs a floating-point {name} (given: {tensor.dtype})")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"short_convolution needs all on {x.device}, where x is ({name}: {tensor.device})")
    if x.is_cuda:
        from kernels.short_convolution.gpu import short_convolution_gpu

        y = short_convolution_gpu(x, weight, bias, activation, initial_state, cu_seqlens)
    else:
        y = short_convolution_cpu(x, weight, bias, activation, initial_state, cu_seqlens)
    if not output_final_state:
        return y, None
    return y, _final_state(x, weight.shape[1] - 1, initial_state, cu_seqlens)


def _state_shape(num_sequences: int, weight: Tensor) -> list[int]:
    return [num_sequences, weight.shape[0], weight.shape[1] - 1]


def _checked_num_sequences(cu_seqlens: Tensor, x: Tensor) -> int:
    if cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool:
        raise TypeError(f"cu_seqlens are positions and must be integers (given: {cu_seqlens.dtype})")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be [num_sequences + 1] (given: {list(cu_seqlens.shape)})")
    if x.shape[0] != 1:
        raise ValueError(f"with cu_seqlens all sequences lie in one row: x must have batch 1 (given: {x.shape[0]})")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != x.shape[1] or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the length {x.shape[1]} of x (given: {bounds})")
    return len(bounds) - 1


def _final_state(x: Tensor, width: int, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last `width` inputs of each sequence, oldest first, `[num_sequences, D, width]`."""
    if cu_seqlens is None:
        sequences = [x]
    else:
        sequences = list(x.split(cu_seqlens.diff().tolist(), dim=1))
    states = []
    for index, sequence in enumerate(sequences):
        recent = sequence[:, max(sequence.shape[1] - width, 0) :].mT
        missing = width - recent.shape[2]
        if missing == 0:
            states.append(recent)
            continue
        if initial_state is None:
            before = x.new_zeros(recent.shape[0], x.shape[2], width)
        else:
            before = initial_state if cu_seqlens is None else initial_state[index : index + 1]
        states.append(torch.cat([before[:, :, width - missing :].to(x.dtype), recent], dim=2))
    return torch.cat(states)
