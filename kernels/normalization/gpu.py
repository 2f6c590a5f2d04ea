"""RMSNorm with a Swish gate and the L2 norm in Triton: each row is read once, forward and backward.

Both are y = x̂ w σ(z) z with x̂ = r x and r = (Σ x² / n + eps)^(-1/2); n is the number of channels for the root mean
square and 1 for the L2 norm, which has no weight w and no gate z. The backward pass keeps only the inputs. The passes
are registered with `torch.library.custom_op`: `torch.compile` sees one operator each and need not trace the launches.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (NeurIPS 2019), equation 4.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Triton types what a kernel takes and returns)
from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.normalization.cpu import l2_norm_cpu, rms_norm_gated_cpu

# A program holds whole rows in registers, which are enough for this many channels.
MAX_CHANNELS = 16384
# Elements of the rows that a program takes at a time, where rows are short.
TILE = 4096
# Programs of the backward pass: each leaves one row of partial sums for the weight's gradient.
MAX_PROGRAMS = 512


def rms_norm_gated_gpu(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """See `kernels.normalization.rms_norm_gated`."""
    if x.shape[-1] > MAX_CHANNELS:
        return rms_norm_gated_cpu(x, gate, weight, eps)
    return normalize_forward(x, gate, weight, x.shape[-1], eps)


def l2_norm_gpu(x: Tensor, eps: float) -> Tensor:
    """See `kernels.normalization.l2_norm`."""
    if x.shape[-1] > MAX_CHANNELS:
        return l2_norm_cpu(x, eps)
    return normalize_forward(x, None, None, 1, eps)


@triton.jit
def _rows(block, num_rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask `[ROWS, BLOCK]` of the rows of a block."""
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    return row * D + column, (row < num_rows) & (column < D)


@triton.jit(do_not_specialize=["num_rows"])
def normalize_kernel(
    x,
    gate,
    weight,
    y,
    eps,
    num_rows,
    D: tl.constexpr,
    DIVISOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """y = r x ⊙ w ⊙ σ(z) z with r = (Σ x² / DIVISOR + eps)^(-1/2), for x and z `[num_rows, D]`, w `[D]`."""
    offsets, mask = _rows(tl.program_id(0), num_rows, D, ROWS, BLOCK)
    inputs = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
    result = inputs / tl.sqrt(tl.sum(inputs * inputs, axis=1) / DIVISOR + eps)[:, None]
    if weight is not None:
        column = tl.arange(0, BLOCK)
        result *= tl.load(weight + column, mask=column < D, other=0.0).to(ACC)[None, :]
    if gate is not None:
        z = tl.load(gate + offsets, mask=mask, other=0.0).to(ACC)
        result *= z * tl.sigmoid(z)
    tl.store(y + offsets, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def normalize_gradient_kernel(
    x,
    gate,
    weight,
    grad_y,
    grad_x,
    grad_gate,
    grad_weight,
    eps,
    num_rows,
    D: tl.constexpr,
    DIVISOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of x and z `[num_rows, D]`, and each program's part of that of w, `[programs, D]`.

    With e = dy ⊙ w ⊙ σ(z) z:  dx = r (e - x̂ Σ(e ⊙ x̂) / DIVISOR),  dw = Σ_rows dy ⊙ x̂ ⊙ σ(z) z,
    dz = dy ⊙ x̂ ⊙ w ⊙ σ(z) (1 + z (1 - σ(z))).
    """
    column = tl.arange(0, BLOCK)
    partial = tl.zeros([BLOCK], ACC)
    if weight is not None:
        factor = tl.load(weight + column, mask=column < D, other=0.0).to(ACC)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        offsets, mask = _rows(tl.cast(block, tl.int64), num_rows, D, ROWS, BLOCK)
        inputs = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
        gradient = tl.load(grad_y + offsets, mask=mask, other=0.0).to(ACC)
        scale = 1 / tl.sqrt(tl.sum(inputs * inputs, axis=1) / DIVISOR + eps)[:, None]
        # Rows beyond the last are zero, and with eps = 0 their scale is not finite.
        normalized = tl.where(mask, inputs * scale, 0.0)
        if gate is not None:
            z = tl.load(gate + offsets, mask=mask, other=0.0).to(ACC)
            sigmoid = tl.sigmoid(z)
            through_gate = gradient * normalized * sigmoid * (1 + z * (1 - sigmoid))
            if weight is not None:
                through_gate *= factor
            tl.store(grad_gate + offsets, through_gate.to(grad_gate.dtype.element_ty), mask=mask)
            gradient *= z * sigmoid
        if weight is not None:
            partial += tl.sum(gradient * normalized, axis=0)
            gradient *= factor
        along = tl.sum(gradient * normalized, axis=1)[:, None] / DIVISOR
        result = scale * (gradient - normalized * along)
        tl.store(grad_x + offsets, result.to(grad_x.dtype.element_ty), mask=mask)
    if weight is not None:
        tl.store(grad_weight + tl.program_id(0) * D + column, partial, mask=column < D)


def _layout(x: Tensor, divisor: int) -> tuple[int, dict[str, Any]]:
    """Number of blocks of rows, and the arguments that both kernels have in common."""
    channels = x.shape[-1]
    num_rows = x.numel() // channels
    block = triton.next_power_of_2(channels)
    rows = min(max(TILE // block, 1), triton.next_power_of_2(max(num_rows, 1)))
    common = {
        "num_rows": num_rows,
        "D": channels,
        "DIVISOR": divisor,
        "ROWS": rows,
        "BLOCK": block,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": 4 if block <= 4096 else 16,
    }
    return triton.cdiv(num_rows, rows), common


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@torch.library.custom_op("reprise::normalize", mutates_args=())
def normalize_forward(x: Tensor, gate: Tensor | None, weight: Tensor | None, divisor: int, eps: float) -> Tensor:
    """y in the shape and dtype of x `[..., D]`."""
    y = _empty(x, gate, weight, divisor, eps)
    num_blocks, common = _layout(x, divisor)
    if num_blocks:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            normalize_kernel[(num_blocks,)](x.contiguous(), _contiguous(gate), _contiguous(weight), y, eps, **common)
    return y


@normalize_forward.register_fake
def _empty(x: Tensor, gate: Tensor | None, weight: Tensor | None, divisor: int, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("reprise::normalize_backward", mutates_args=())
def normalize_backward(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, grad_y: Tensor, divisor: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight; empty where there is no gate or weight."""
    grad_x, grad_gate, _ = _empty_gradients(x, gate, weight, grad_y, divisor, eps)
    num_blocks, common = _layout(x, divisor)
    num_programs = min(num_blocks, MAX_PROGRAMS)
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_weight = x.new_empty((0 if weight is None else num_programs, x.shape[-1]), dtype=wide)
    if num_programs:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            normalize_gradient_kernel[(num_programs,)](
                x.contiguous(),
                _contiguous(gate),
                _contiguous(weight),
                grad_y.contiguous(),
                grad_x,
                None if gate is None else grad_gate,
                None if weight is None else grad_weight,
                eps,
                **common,
            )
    return grad_x, grad_gate, x.new_empty(0) if weight is None else grad_weight.sum(0).to(weight.dtype)


@normalize_backward.register_fake
def _empty_gradients(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, grad_y: Tensor, divisor: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    companions = (x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in (gate, weight))
    return x.new_empty(x.shape), *companions


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, weight, ctx.divisor, ctx.eps = inputs
    ctx.save_for_backward(x, gate, weight)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, weight = ctx.saved_tensors
    grad_x, grad_gate, grad_weight = normalize_backward(x, gate, weight, grad_y, ctx.divisor, ctx.eps)
    return grad_x, None if gate is None else grad_gate, None if weight is None else grad_weight, None, None


normalize_forward.register_autograd(_differentiate, setup_context=_setup_context)
