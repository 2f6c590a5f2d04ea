"""The short causal depthwise convolution in Triton, with SiLU in the same pass, forward and backward.

    z[t] = bias + Σ_{j<W} weight[j] x[t - W + 1 + j],   y = z or y = z σ(z)          for each channel

Before a sequence's first input comes its initial state, the last W-1 inputs of what went before, or zero. The backward
pass keeps only the inputs. The passes are registered with `torch.library.custom_op`: `torch.compile` sees one operator
each and need not trace the launches.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3.4.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Triton types what a kernel takes and returns)
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens and channels of a program.
BLOCK_T = 64
BLOCK_D = 64


def short_convolution_gpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """y of `kernels.short_convolution.short_convolution`."""
    return convolve_forward(x, weight, bias, initial_state, cu_seqlens, activation == "silu")


@triton.jit
def _tile(num_tiles, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Batch, tokens `[BLOCK_T, 1]` and channels `[1, BLOCK_D]` of a program; grid: (batch · tiles of T, tiles of D)."""
    batch = (tl.program_id(0) // num_tiles).to(tl.int64)
    token = (tl.program_id(0) % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return batch, token, channel


@triton.jit
def _sequence_bounds(batch, token, T, cu_seqlens, sequences):
    """Of each token the number of its sequence, the sequence's first token and its end, `[BLOCK_T, 1]` each."""
    if cu_seqlens is None:
        first = tl.zeros_like(token).to(tl.int64)
        sequence = first + batch
        end = first + T
    else:
        sequence = tl.load(sequences + token, mask=token < T, other=0)
        first = tl.load(cu_seqlens + sequence)
        end = tl.load(cu_seqlens + sequence + 1)
    return sequence, first, end


@triton.jit
def _load_input(
    x,
    initial_state,
    batch,
    token,
    channel,
    sequence,
    first,
    inside,
    T,
    D: tl.constexpr,
    W: tl.constexpr,
    ACC: tl.constexpr,
):
    """x at `token`, and before a sequence's first token its initial state `[sequences, D, W-1]` or zero."""
    value = tl.load(x + (batch * T + token) * D + channel, mask=inside & (token >= first), other=0.0).to(ACC)
    if initial_state is not None:
        state = initial_state + (sequence * D + channel) * (W - 1) + (token - first + (W - 1))
        value += tl.load(state, mask=inside & (token < first), other=0.0).to(ACC)
    return value


@triton.jit
def _convolve(
    x,
    weight,
    bias,
    initial_state,
    batch,
    token,
    channel,
    sequence,
    first,
    inside,
    T,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """z `[BLOCK_T, BLOCK_D]`."""
    z = tl.zeros([BLOCK_T, BLOCK_D], ACC)
    if bias is not None:
        z += tl.load(bias + channel, mask=channel < D, other=0.0).to(ACC)
    for j in tl.static_range(W):
        value = _load_input(
            x, initial_state, batch, token - (W - 1) + j, channel, sequence, first, inside, T, D, W, ACC
        )
        z += value * tl.load(weight + channel * W + j, mask=channel < D, other=0.0).to(ACC)
    return z


@triton.jit(do_not_specialize=["T", "num_tiles"])
def convolution_kernel(
    x,
    weight,
    bias,
    initial_state,
    y,
    cu_seqlens,
    sequences,
    T,
    num_tiles,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """y `[B, T, D]` from x `[B, T, D]`, weight `[D, W]`, bias `[D]` and the states `[sequences, D, W-1]`."""
    batch, token, channel = _tile(num_tiles, BLOCK_T, BLOCK_D)
    sequence, first, _end = _sequence_bounds(batch, token, T, cu_seqlens, sequences)
    inside = (token < T) & (channel < D)
    z = _convolve(
        x, weight, bias, initial_state, batch, token, channel, sequence, first, inside, T, D, W, BLOCK_T, BLOCK_D, ACC
    )
    if SILU:
        z *= tl.sigmoid(z)
    tl.store(y + (batch * T + token) * D + channel, z.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "num_tiles"])
def parameter_gradient_kernel(
    x,
    weight,
    bias,
    initial_state,
    grad_y,
    grad_z,
    grad_parameters,
    cu_seqlens,
    sequences,
    T,
    num_tiles,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """dz `[B, T, D]`, and what each tile of tokens adds to dweight and dbias, `[tiles, W + 1, D]`.

    dz = dy, or dy σ(z) (1 + z (1 - σ(z)));  dweight[j] = Σ_t dz[t] x[t - W + 1 + j],  dbias = Σ_t dz[t].
    """
    batch, token, channel = _tile(num_tiles, BLOCK_T, BLOCK_D)
    sequence, first, _end = _sequence_bounds(batch, token, T, cu_seqlens, sequences)
    inside = (token < T) & (channel < D)
    gradient = tl.load(grad_y + (batch * T + token) * D + channel, mask=inside, other=0.0).to(ACC)
    if SILU:
        z = _convolve(
            x,
            weight,
            bias,
            initial_state,
            batch,
            token,
            channel,
            sequence,
            first,
            inside,
            T,
            D,
            W,
            BLOCK_T,
            BLOCK_D,
            ACC,
        )
        sigmoid = tl.sigmoid(z)
        gradient *= sigmoid * (1 + z * (1 - sigmoid))
        tl.store(grad_z + (batch * T + token) * D + channel, gradient.to(grad_z.dtype.element_ty), mask=inside)
    partial = grad_parameters + tl.program_id(0).to(tl.int64) * (W + 1) * D
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for j in tl.static_range(W):
        value = _load_input(
            x, initial_state, batch, token - (W - 1) + j, channel, sequence, first, inside, T, D, W, ACC
        )
        tl.store(partial + j * D + columns, tl.sum(gradient * value, axis=0), mask=columns < D)
    tl.store(partial + W * D + columns, tl.sum(gradient, axis=0), mask=columns < D)


@triton.jit(do_not_specialize=["T", "num_tiles"])
def input_gradient_kernel(
    weight,
    grad_z,
    grad_x,
    cu_seqlens,
    sequences,
    T,
    num_tiles,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """dx[t] = Σ_j weight[j] dz[t + W - 1 - j], as far as the sequence goes, `[B, T, D]`."""
    batch, token, channel = _tile(num_tiles, BLOCK_T, BLOCK_D)
    _sequence, _first, end = _sequence_bounds(batch, token, T, cu_seqlens, sequences)
    inside = (token < T) & (channel < D)
    gradient = tl.zeros([BLOCK_T, BLOCK_D], ACC)
    for j in tl.static_range(W):
        later = token + (W - 1 - j)
        value = tl.load(grad_z + (batch * T + later) * D + channel, mask=inside & (later < end), other=0.0)
        gradient += value.to(ACC) * tl.load(weight + channel * W + j, mask=channel < D, other=0.0).to(ACC)
    tl.store(grad_x + (batch * T + token) * D + channel, gradient.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def state_gradient_kernel(
    weight,
    grad_z,
    grad_state,
    cu_seqlens,
    T,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """dstate[s] = Σ_{j ≤ s} weight[j] dz[first + s - j], as far as the sequence goes, `[sequences, D, W-1]`.

    Grid: (sequences, tiles of D).
    """
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if cu_seqlens is None:
        first = sequence * T
        end = first + T
    else:
        first = tl.load(cu_seqlens + sequence)
        end = tl.load(cu_seqlens + sequence + 1)
    for s in tl.static_range(W - 1):
        gradient = tl.zeros([BLOCK_D], ACC)
        for j in tl.static_range(s + 1):
            token = first + s - j
            value = tl.load(grad_z + token * D + channel, mask=(channel < D) & (token < end), other=0.0)
            gradient += value.to(ACC) * tl.load(weight + channel * W + j, mask=channel < D, other=0.0).to(ACC)
        target = grad_state + (sequence * D + channel) * (W - 1) + s
        tl.store(target, gradient.to(grad_state.dtype.element_ty), mask=channel < D)


def _on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _layout(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid over tokens and channels, and the arguments that the kernels on it have in common."""
    batch, length, channels = x.shape
    num_tiles = triton.cdiv(length, BLOCK_T)
    sequences = None
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(x.device, torch.int64)
        sequences = torch.searchsorted(cu_seqlens[1:], torch.arange(length, device=x.device), right=True)
    common = {
        "cu_seqlens": cu_seqlens,
        "sequences": sequences,
        "T": length,
        "num_tiles": num_tiles,
        "D": channels,
        "W": weight.shape[1],
        "BLOCK_T": BLOCK_T,
        "BLOCK_D": BLOCK_D,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }
    return (batch * num_tiles, triton.cdiv(channels, BLOCK_D)), common


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@torch.library.custom_op("reprise::short_convolution", mutates_args=())
def convolve_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> Tensor:
    """y in the shape and dtype of x `[B, T, D]`."""
    y = _empty(x, weight, bias, initial_state, cu_seqlens, silu)
    grid, common = _layout(x, weight, cu_seqlens)
    with _on_device(x):
        convolution_kernel[grid](
            x.contiguous(),
            weight.contiguous(),
            _contiguous(bias),
            _contiguous(initial_state),
            y,
            **common,
            SILU=silu,
        )
    return y


@convolve_forward.register_fake
def _empty(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("reprise::short_convolution_backward", mutates_args=())
def convolve_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    grad_y: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the initial state; empty where there is no bias or state."""
    grad_x, _, grad_bias, grad_state = _empty_gradients(x, weight, bias, initial_state, cu_seqlens, grad_y, silu)
    x, weight, grad_y = x.contiguous(), weight.contiguous(), grad_y.contiguous()
    width, channels = weight.shape[1], x.shape[2]
    grid, common = _layout(x, weight, cu_seqlens)
    grad_z = torch.empty_like(x) if silu else grad_y
    grad_parameters = x.new_empty((grid[0], width + 1, channels), dtype=torch.promote_types(x.dtype, torch.float32))
    with _on_device(x):
        parameter_gradient_kernel[grid](
            x,
            weight,
            _contiguous(bias),
            _contiguous(initial_state),
            grad_y,
            grad_z,
            grad_parameters,
            **common,
            SILU=silu,
        )
        input_gradient_kernel[grid](weight, grad_z, grad_x, **common)
        if initial_state is not None and width > 1:
            state_arguments = {name: common[name] for name in ("cu_seqlens", "T", "D", "W", "BLOCK_D", "ACC")}
            state_gradient_kernel[(len(initial_state), grid[1])](weight, grad_z, grad_state, **state_arguments)
        grad_parameters = grad_parameters.sum(0)
    if bias is not None:
        grad_bias = grad_parameters[width].to(bias.dtype, copy=True)
    return grad_x, grad_parameters[:width].T.to(weight.dtype, copy=True).contiguous(), grad_bias, grad_state


@convolve_backward.register_fake
def _empty_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    grad_y: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    optional = (
        x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in (bias, initial_state)
    )
    return x.new_empty(x.shape), weight.new_empty(weight.shape), *optional


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_state = convolve_backward(
        x, weight, bias, initial_state, cu_seqlens, grad_y, ctx.silu
    )
    grad_bias = None if bias is None else grad_bias
    grad_state = None if initial_state is None else grad_state
    return grad_x, grad_weight, grad_bias, grad_state, None, None


convolve_forward.register_autograd(_differentiate, setup_context=_setup_context)
