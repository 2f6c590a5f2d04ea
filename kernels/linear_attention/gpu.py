"""Gated linear attention on a GPU: chunkwise, by the Triton kernels of `gpu_kernels`.

Forward: sums of the gates in each chunk, states before each chunk (one pass over the sequence), scores inside each
chunk (vector gates only), outputs of all chunks in parallel. The states are not kept but formed again in the backward
pass, which saves the inputs and the scores alone: memory is linear in T, without a term in T·K·V/C beyond the call.

Two `torch.library` operators with registered gradient and shapes, rather than an `autograd.Function`: torch.compile
takes each as one node (no graph break, no tracing into autotuning), and activation checkpointing, DDP and FSDP see
ordinary operators. Launches go to the current stream, without a synchronization.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import accumulation_dtype

from . import gpu_kernels as kernels

# A chunk's own pairs cost C multiplications each, which without tensor cores (fp32 proper, fp64) wants a smaller C.
_CHUNK_SIZES = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32, torch.float64: 32}


def gla_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `kernels.linear_attention.gla`, whose checks it relies on.

    `chunk_size`, a power of two from 16, changes nothing but speed; by default 64 (32 in fp32 and fp64), or less where
    T is less.
    """
    if chunk_size is None:
        length = q.shape[1]
        chunk_size = 16 if length <= 16 else 32 if length <= 32 else _CHUNK_SIZES[q.dtype]
    if g is not None and g.ndim == 1:
        # A constant decay costs what a scalar gate costs; autograd sums its gradient, in fp32 at least.
        g = g.to(accumulation_dtype(q.dtype)).expand(q.shape[0], q.shape[1], q.shape[2])
    o, final_state, _ = gla_forward(q, k, v, g, initial_state, cu_seqlens, scale, output_final_state, chunk_size)
    return o, final_state if output_final_state else None


@torch.library.custom_op("reprise::gla_forward", mutates_args=())
def gla_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o `[B, T, H, V]`, final state `[num_sequences, H, K, V]` and scores `[B, T, H, C]`; empty where not needed."""
    q, k, v, g, initial_state = _contiguous(q, k, v, g, initial_state)
    plan = _Plan.of(q, v, g, cu_seqlens, chunk_size)
    o, final_state, scores = _empty_results(q, v, g, initial_state, cu_seqlens, output_final_state, chunk_size)
    with _device(q):
        prefix, suffix = _gate_sums(plan, g, accumulation_dtype(q.dtype))
        states = _states(plan, k, v, prefix, suffix, initial_state, final_state, dtype=v.dtype)
        if plan.gate == "vector":
            grid = (plan.num_chunks * (plan.chunk_size // kernels.SUB), plan.heads)
            kernels.scores_kernel[grid](
                q, k, g, scores, scale, plan.length, plan.spans, **plan.options("H", "K", "C", "SUB")
            )
        kernels.output_kernel[plan.grid("V")](
            q,
            k,
            v,
            prefix,
            scores,
            states,
            o,
            scale,
            plan.length,
            plan.spans,
            **plan.options("H", "K", "V", "C", "GATE"),
        )
    return o, final_state, scores


@gla_forward.register_fake
def _(q, k, v, g, initial_state, cu_seqlens, scale, output_final_state, chunk_size):  # noqa: ANN001, ANN202
    return _empty_results(q, v, g, initial_state, cu_seqlens, output_final_state, chunk_size)


@torch.library.custom_op("reprise::gla_backward", mutates_args=())
def gla_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scores: Tensor,
    do: Tensor,
    final_state_gradient: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and the initial state; empty where there is no such input."""
    dq, dk, dv, dg, initial_state_gradient = _empty_gradients(q, k, v, g, initial_state)
    q, k, v, g, initial_state, do, final_state_gradient = _contiguous(
        q, k, v, g, initial_state, do, final_state_gradient
    )
    plan = _Plan.of(q, v, g, cu_seqlens, chunk_size)
    accumulate = accumulation_dtype(q.dtype)
    # dA, and dq and dk from inside the chunks: for vector gates only.
    dscores = intra_dq = intra_dk = None
    with _device(q):
        prefix, suffix = _gate_sums(plan, g, accumulate)
        states = _states(plan, k, v, prefix, suffix, initial_state, None, dtype=accumulate)
        state_gradients = torch.empty_like(states)
        kernels.states_backward_kernel[plan.state_grid](
            q,
            do,
            prefix,
            final_state_gradient,
            state_gradients,
            initial_state_gradient if initial_state is not None else None,
            scale,
            plan.length,
            plan.cu_seqlens,
            plan.chunk_offsets,
            **plan.options("H", "K", "V", "C", "GATE"),
        )
        kernels.value_gradient_kernel[plan.grid("V")](
            q,
            k,
            prefix,
            suffix,
            scores,
            state_gradients,
            do,
            dv,
            scale,
            plan.length,
            plan.spans,
            **plan.options("H", "K", "V", "C", "GATE"),
        )
        if plan.gate == "vector":
            dscores = torch.empty_like(scores)
            intra_dq, intra_dk = (torch.empty_like(q, dtype=accumulate) for _ in range(2))
            kernels.score_gradients_kernel[(plan.num_chunks, plan.heads)](
                v, do, dscores, scale, plan.length, plan.spans, **plan.options("H", "V", "C")
            )
            kernels.intra_gradients_kernel[plan.grid("K", blocks=plan.chunk_size // kernels.SUB)](
                q,
                k,
                g,
                dscores,
                intra_dq,
                intra_dk,
                plan.length,
                plan.spans,
                **plan.options("H", "K", "C", "SUB"),
            )
        # Fixed rather than tuned: the parts of a scalar gate's gradient, one a tile, are laid out by it.
        key_tile = 32 if kernels.INTERPRETED.value else min(64, max(16, triton.next_power_of_2(plan.key_dim)))
        parts = dg
        if plan.gate == "scalar":
            parts = dg.new_empty(*g.shape, triton.cdiv(plan.key_dim, key_tile), dtype=accumulate)
        kernels.query_key_gradients_kernel[plan.grid("K")](
            q,
            k,
            v,
            prefix,
            suffix,
            states,
            state_gradients,
            do,
            dscores,
            intra_dq,
            intra_dk,
            dq,
            dk,
            parts,
            scale,
            plan.length,
            plan.spans,
            **plan.options("H", "K", "V", "C", "GATE"),
            BK=key_tile,
        )
    if plan.gate == "scalar":
        dg.copy_(parts.sum(-1))
    return dq, dk, dv, dg, initial_state_gradient


@gla_backward.register_fake
def _(q, k, v, g, initial_state, cu_seqlens, scores, do, final_state_gradient, scale, chunk_size):  # noqa: ANN001, ANN202
    return _empty_gradients(q, k, v, g, initial_state)


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    q, k, v, g, initial_state, cu_seqlens, scale, _, chunk_size = inputs
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, output[2])
    ctx.scale, ctx.chunk_size = scale, chunk_size
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do: Tensor | None, final_state_gradient: Tensor | None, _: Tensor | None):  # noqa: ANN001, ANN202
    q, k, v, g, initial_state, cu_seqlens, scores = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(v)
    dq, dk, dv, dg, initial_state_gradient = gla_backward(
        q, k, v, g, initial_state, cu_seqlens, scores, do, final_state_gradient, ctx.scale, ctx.chunk_size
    )
    optional = (None if g is None else dg, None if initial_state is None else initial_state_gradient)
    return dq, dk, dv, *optional, None, None, None, None


gla_forward.register_autograd(_differentiate, setup_context=_save)


class _Plan(NamedTuple):
    """Sizes of a call and where its chunks lie, as the kernels take them."""

    gate: str
    accumulate: tl.dtype
    precision: str
    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int
    chunk_size: int
    num_chunks: int
    num_sequences: int
    cu_seqlens: Tensor | None
    chunk_offsets: Tensor | None
    spans: Tensor | None

    @classmethod
    def of(cls, q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int) -> _Plan:
        batch, length, heads, key_dim = q.shape
        chunk_offsets = spans = None
        num_chunks, num_sequences = batch * triton.cdiv(length, chunk_size), batch
        if cu_seqlens is not None:
            cu_seqlens, chunk_offsets, spans = _chunk_tables(cu_seqlens.to(torch.int64), length, chunk_size)
            num_chunks, num_sequences = spans.shape[0], cu_seqlens.shape[0] - 1
        return cls(
            gate="none" if g is None else "vector" if g.ndim == 4 else "scalar",
            accumulate=tl.float64 if q.dtype == torch.float64 else tl.float32,
            precision="tf32" if q.dtype in (torch.float16, torch.bfloat16) else "ieee",
            batch=batch,
            length=length,
            heads=heads,
            key_dim=key_dim,
            value_dim=v.shape[-1],
            chunk_size=chunk_size,
            num_chunks=num_chunks,
            num_sequences=num_sequences,
            cu_seqlens=cu_seqlens,
            chunk_offsets=chunk_offsets,
            spans=spans,
        )

    def options(self, *names: str) -> dict[str, object]:
        """Compile-time arguments of a kernel: those named, and the types that all need."""
        values = {
            "H": self.heads,
            "K": self.key_dim,
            "V": self.value_dim,
            "C": self.chunk_size,
            "SUB": kernels.SUB,
            "GATE": self.gate,
        }
        return {name: values[name] for name in names} | {"ACC": self.accumulate, "PRECISION": self.precision}

    def grid(self, axis: str, *, blocks: int = 1) -> Callable[[dict[str, int]], tuple[int, int]]:
        """One program a chunk (or each of its `blocks`), head, and tile of the key ("K") or value ("V") dimension."""
        size = self.key_dim if axis == "K" else self.value_dim
        return lambda meta: (self.num_chunks * blocks * triton.cdiv(size, meta["B" + axis]), self.heads)

    def state_grid(self, meta: dict[str, int]) -> tuple[int, int, int]:
        """One program a sequence, head and tile of the state."""
        tiles = triton.cdiv(self.key_dim, meta["BK"]), triton.cdiv(self.value_dim, meta["BV"])
        return self.num_sequences * self.heads, *tiles


def _chunk_tables(cu_seqlens: Tensor, length: int, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`cu_seqlens`, the first chunk of each sequence, and the first row and number of rows of each chunk.

    There are as many chunks as `length` tokens in that many sequences can need at most, so that nothing waits for
    the device; those that are too many have no rows.
    """
    num_sequences = cu_seqlens.shape[0] - 1
    chunks = (cu_seqlens.diff() + chunk_size - 1) // chunk_size
    chunk_offsets = torch.nn.functional.pad(chunks.cumsum(0), (1, 0))
    index = torch.arange(length // chunk_size + num_sequences, device=cu_seqlens.device)
    sequence = (torch.searchsorted(chunk_offsets, index, right=True) - 1).clamp(max=num_sequences - 1)
    first = cu_seqlens[sequence] + (index - chunk_offsets[sequence]) * chunk_size
    count = (cu_seqlens[sequence + 1] - first).clamp(min=0, max=chunk_size)
    return cu_seqlens.contiguous(), chunk_offsets, torch.stack([first, count], dim=1)


def _gate_sums(plan: _Plan, g: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """G and R of a vector gate, in `dtype`; of a scalar gate G alone, in fp64 (see `gpu_kernels`)."""
    if g is None:
        return None, None
    if plan.gate == "vector":
        prefix, suffix = (torch.empty_like(g, dtype=dtype) for _ in range(2))
    else:
        prefix, suffix = torch.empty_like(g, dtype=torch.float64), None
    columns = g.shape[2:].numel()
    kernels.gate_sums_kernel[lambda meta: (plan.num_chunks * triton.cdiv(columns, meta["BD"]),)](
        g, prefix, suffix, plan.length, plan.spans, D=columns, C=plan.chunk_size
    )
    return prefix, suffix


def _states(
    plan: _Plan,
    k: Tensor,
    v: Tensor,
    prefix: Tensor | None,
    suffix: Tensor | None,
    initial_state: Tensor | None,
    final_state: Tensor | None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """States before each chunk `[num_chunks, H, K, V]`; writes the final ones into `final_state`."""
    states = torch.empty(plan.num_chunks, plan.heads, plan.key_dim, plan.value_dim, dtype=dtype, device=k.device)
    kernels.states_forward_kernel[plan.state_grid](
        k,
        v,
        prefix,
        suffix,
        initial_state,
        states,
        final_state if final_state is not None and final_state.numel() else None,
        plan.length,
        plan.cu_seqlens,
        plan.chunk_offsets,
        **plan.options("H", "K", "V", "C", "GATE"),
    )
    return states


def _empty_results(
    q: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, key_dim = q.shape
    dtype = accumulation_dtype(q.dtype)
    num_sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (num_sequences, heads, key_dim, v.shape[-1]) if output_final_state else (0,)
    scores_shape = (batch, length, heads, chunk_size) if g is not None and g.ndim == 4 else (0,)
    return (
        v.new_empty(v.shape),
        v.new_empty(state_shape, dtype=dtype),
        v.new_empty(scores_shape, dtype=dtype),
    )


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dg, initial_state_gradient = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (g, initial_state))
    return dq, dk, dv, dg, initial_state_gradient


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _device(q: Tensor) -> AbstractContextManager[object]:
    """The device to launch on: Triton takes the current one, which need not be the tensors' own."""
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()
