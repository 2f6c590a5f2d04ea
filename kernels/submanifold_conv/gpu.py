"""Sparse convolution in Triton: products over gathered rows in one kernel, forward and backward.

    y[n] = bias + Σ_k x[table[n, k]] W_k            dW_k = Σ_n x[table[n, k]]ᵀ dy[n]

Each program owns a tile of y, or of a part of dW, and gathers what it needs through the table of neighbors: nothing is
scattered, no atomics, the same result in every run. dx is the first of the two with dy, the transposed weights and the
transposed neighbors. The passes are registered with `torch.library.custom_op`: `torch.compile` sees one operator each
and need not trace the launches.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Triton types what a kernel takes and returns)
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import accumulation_dtype

from .rulebook import Rulebook

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
# Rows of one program of the weight's gradient at least, and programs wanted in all.
SPLIT_ROWS = 512
PROGRAMS = 1024


def sparse_conv_gpu(
    features: Tensor, weight: Tensor, bias: Tensor | None, rulebook: Rulebook, transposed: bool
) -> Tensor:
    """As `kernels.submanifold_conv.sparse_conv`, whose checks it relies on; weight `[K, C_in, C_out]`."""
    table, mirrored = rulebook.table(transposed)
    back, back_mirrored = rulebook.table(not transposed)
    return convolve(features, weight.to(features.dtype), bias, table, back, mirrored, back_mirrored)


def _autotune(*tiles: tuple[int, int, int, int, int]):
    """Autotune over (BLOCK_N, BLOCK_I, BLOCK_O, num_warps, num_stages); the interpreter takes small tiles."""
    names = ("BLOCK_N", "BLOCK_I", "BLOCK_O")
    if INTERPRETED.value:
        return triton.autotune([triton.Config(dict(zip(names, (32, 16, 16), strict=True)))], key=["C_IN", "C_OUT"])
    configs = [triton.Config(dict(zip(names, tile[:3], strict=True)), *tile[3:]) for tile in tiles]
    return triton.autotune(configs, key=["C_IN", "C_OUT"])


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    """c + a b, in the type of c."""
    if INTERPRETED:  # It multiplies the bits of bf16; the products of rounded factors are the same in fp32.
        a = a.to(c.dtype)
        b = b.to(c.dtype)
    return tl.dot(a, b, c, input_precision=PRECISION, out_dtype=c.dtype)


@triton.jit
def _gather(
    x, table, rows, k, columns, num_rows, num_sources, K: tl.constexpr, C: tl.constexpr, MIRRORED: tl.constexpr
):
    """Tile `[rows, columns]` of x[table[rows, k]] for x `[num_sources, C]`; 0 where there is no neighbor."""
    column = K - 1 - k if MIRRORED else k
    source = tl.load(table + rows.to(tl.int64) * K + column, mask=rows < num_rows, other=num_sources)
    mask = (source < num_sources)[:, None] & (columns < C)[None, :]
    return tl.load(x + source.to(tl.int64)[:, None] * C + columns[None, :], mask=mask, other=0.0)


@_autotune(
    (128, 64, 128, 8, 3),
    (128, 32, 64, 4, 4),
    (64, 64, 64, 4, 3),
    (128, 32, 32, 4, 4),
    (64, 16, 32, 4, 4),
    (32, 16, 32, 4, 2),
)
@triton.jit(do_not_specialize=["num_rows", "num_sources"])
def convolution_kernel(
    x,
    weight,
    bias,
    table,
    y,
    num_rows,
    num_sources,
    K: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    MIRRORED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """y `[num_rows, C_OUT]` from x `[num_sources, C_IN]`, weight `[K, C_IN, C_OUT]` and the table `[num_rows, K]`.

    Grid: (tiles of num_rows, tiles of C_OUT).
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    outputs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    tiles: tl.constexpr = (C_IN + BLOCK_I - 1) // BLOCK_I
    total = tl.zeros([BLOCK_N, BLOCK_O], ACC)
    # Offsets and channels in one loop, without a branch around empty tiles, so that loads overlap with products.
    for step in range(K * tiles):
        k = step // tiles
        inputs = (step % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
        gathered = _gather(x, table, rows, k, inputs, num_rows, num_sources, K, C_IN, MIRRORED)
        mask = (inputs < C_IN)[:, None] & (outputs < C_OUT)[None, :]
        factor = tl.load(weight + (k * C_IN + inputs)[:, None] * C_OUT + outputs[None, :], mask=mask, other=0.0)
        total = _dot(gathered, factor, total, PRECISION)
    if bias is not None:
        total += tl.load(bias + outputs, mask=outputs < C_OUT, other=0.0).to(ACC)[None, :]
    target = y + rows.to(tl.int64)[:, None] * C_OUT + outputs[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=(rows < num_rows)[:, None] & (outputs < C_OUT)[None, :])


@_autotune((64, 64, 128, 8, 3), (64, 64, 64, 4, 3), (64, 32, 64, 4, 3), (64, 32, 32, 4, 3), (32, 16, 32, 4, 2))
@triton.jit(do_not_specialize=["num_rows", "num_sources"])
def weight_gradient_kernel(
    x,
    grad_y,
    table,
    parts,
    num_rows,
    num_sources,
    K: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    MIRRORED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """What the blocks of rows split, split + splits, … add to dW, `[splits, K, C_IN, C_OUT]`.

    Grid: (K · tiles of C_IN, tiles of C_OUT, splits).
    """
    tiles: tl.constexpr = (C_IN + BLOCK_I - 1) // BLOCK_I
    k = tl.program_id(0) // tiles
    inputs = (tl.program_id(0) % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    outputs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros([BLOCK_I, BLOCK_O], ACC)
    for block in range(tl.program_id(2), tl.cdiv(num_rows, BLOCK_N), tl.num_programs(2)):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        gathered = _gather(x, table, rows, k, inputs, num_rows, num_sources, K, C_IN, MIRRORED)
        mask = (rows < num_rows)[:, None] & (outputs < C_OUT)[None, :]
        gradient = tl.load(grad_y + rows.to(tl.int64)[:, None] * C_OUT + outputs[None, :], mask=mask, other=0.0)
        total = _dot(tl.trans(gathered), gradient, total, PRECISION)
    target = parts + (tl.program_id(2).to(tl.int64) * K + k) * C_IN * C_OUT + inputs[:, None] * C_OUT + outputs[None, :]
    tl.store(target, total, mask=(inputs < C_IN)[:, None] & (outputs < C_OUT)[None, :])


def _on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _options(x: Tensor, table: Tensor, c_out: int, mirrored: bool) -> dict[str, Any]:
    """The arguments that both kernels have in common."""
    exact = x.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    return {
        "num_rows": len(table),
        "num_sources": len(x),
        "K": table.shape[1],
        "C_IN": x.shape[1],
        "C_OUT": c_out,
        "MIRRORED": mirrored,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "PRECISION": "ieee" if exact else "tf32",
    }


@torch.library.custom_op("reprise::submanifold_conv", mutates_args=())
def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, back: Tensor, mirrored: bool, back_mirrored: bool
) -> Tensor:
    """y `[N, C_out]` from x `[M, C_in]`, weight `[K, C_in, C_out]` and the table `[N, K]`; `back` `[M, K]` leads back.

    A `mirrored` table has its columns from the last offset to the first.
    """
    y = _empty(x, weight, bias, table, back, mirrored, back_mirrored)
    c_out = weight.shape[2]
    if len(table):
        with _on_device(x):
            convolution_kernel[
                lambda tile: (triton.cdiv(len(table), tile["BLOCK_N"]), triton.cdiv(c_out, tile["BLOCK_O"]))
            ](
                x.contiguous(),
                weight.contiguous(),
                None if bias is None else bias.contiguous(),
                table,
                y,
                **_options(x, table, c_out, mirrored),
            )
    return y


@convolve.register_fake
def _empty(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, back: Tensor, mirrored: bool, back_mirrored: bool
) -> Tensor:
    return x.new_empty(table.shape[0], weight.shape[2])


@torch.library.custom_op("reprise::submanifold_conv_weight_gradient", mutates_args=())
def weight_gradient(x: Tensor, grad_y: Tensor, table: Tensor, mirrored: bool) -> Tensor:
    """dW `[K, C_in, C_out]` from x `[M, C_in]`, dy `[N, C_out]` and the table `[N, K]`, in the dtype of x."""
    offsets, c_in, c_out = table.shape[1], x.shape[1], grad_y.shape[1]
    tiles = offsets * triton.cdiv(c_in, 64) * triton.cdiv(c_out, 64)
    splits = min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(len(table), SPLIT_ROWS))
    parts = x.new_empty(splits, offsets, c_in, c_out, dtype=accumulation_dtype(x.dtype))
    if splits:
        with _on_device(x):
            weight_gradient_kernel[
                lambda tile: (
                    offsets * triton.cdiv(c_in, tile["BLOCK_I"]),
                    triton.cdiv(c_out, tile["BLOCK_O"]),
                    splits,
                )
            ](x.contiguous(), grad_y.contiguous(), table, parts, **_options(x, table, c_out, mirrored))
    return parts.sum(0).to(x.dtype)


@weight_gradient.register_fake
def _empty_weight(x: Tensor, grad_y: Tensor, table: Tensor, mirrored: bool) -> Tensor:
    return x.new_empty(table.shape[1], x.shape[1], grad_y.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.mirrored, ctx.back_mirrored = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, table, back = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
    grad_x = convolve(grad_y, weight.mT, None, back, table, ctx.back_mirrored, ctx.mirrored) if for_x else None
    grad_weight = weight_gradient(x, grad_y, table, ctx.mirrored) if for_weight else None
    grad_bias = grad_y.sum(0, dtype=accumulation_dtype(x.dtype)).to(bias.dtype) if for_bias else None
    return grad_x, grad_weight, grad_bias, None, None, None, None


convolve.register_autograd(_differentiate, setup_context=_setup_context)
