"""Triton kernels of the chunkwise delta rule: the UT transform, the pass over the states, and their gradients.

Yang, Wang, Zhang, Shen and Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (NeurIPS
2024), section 3. A sequence is cut into chunks of C tokens. For the chunk n, with rows K_n, Q_n `[C, K]`, V_n `[C, V]`
and β_n `[C]`, and the state S_n `[K, V]` that enters it:

    L = strict_tril(diag(β) K Kᵀ)            T = (I + L)⁻¹                               `[C, C]`
    W = T diag(β) K                          U = T diag(β) V                             `[C, K]`, `[C, V]`
    P = U - W S                              the pseudo-values, given the state          `[C, V]`
    O = scale (Q S + tril(Q Kᵀ) P)           S ← S + Kᵀ P                                `[C, V]`, `[K, V]`

The gradients are those of the linear system behind it, (I + L) P = diag(β) (V - K S): dR = Tᵀ dP is that of its
right-hand side, and dL = -strict_tril(dR Pᵀ). This equals the chain rule through U, W and T, where
dL = -strict_tril(Tᵀ dT Tᵀ), with fewer products, and dT and the gradients of W and U are never formed.

Tensors lie as `[B, T, H, ·]` (token by token) or `[chunks, H, K, V]` (a state for every chunk), row-major. The chunks
of all sequences are numbered through: batch by batch, or by tables where sequences of several lengths lie end to end.
A program takes one head of one chunk or of one sequence; the first grid axis is `chunk · H + head`, so that
neighbors share rows of memory. Rows beyond a sequence's end read as zero, which adds nothing anywhere. Sums are formed
in fp32; what goes into a product of matrices is rounded to the dtype of the inputs. Offsets between rows of a chunk
are 32-bit, which saves registers, all others 64-bit.

Common arguments: T, the tokens of a sequence (a runtime value: no recompilation); chunk_start and chunk_end `[chunks]`,
first token of each chunk and end of its sequence, and cu_seqlens and chunk_offsets `[sequences + 1]`, all None where
all sequences have T tokens; PRECISION of products of fp32 matrices.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Triton types what a kernel takes and returns)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _smallest_for_fp32(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """For fp32 inputs only the last config: the others want more registers and shared memory than there are."""
    return configs[-1:] if arguments["k"].dtype == torch.float32 else configs


def _autotune(*configs: triton.Config, interpreted: dict[str, int]) -> Any:
    """Pick the fastest config for each combination of sizes and dtypes; the interpreter gets one of its own.

    The last config is the smallest, and there for fp32 inputs.
    """
    if INTERPRETED.value:
        configs = (triton.Config(interpreted),)
    prune = {"early_config_prune": _smallest_for_fp32}
    return triton.autotune(list(configs), key=["K", "V", "C"], prune_configs_by=prune)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a b, summed up in fp32. PRECISION is for fp32 operands: "ieee", "tf32x3" or "tf32"."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter would multiply the bit patterns. A product of two bf16 numbers is exact in fp32.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _chunk_span(chunk, T, chunk_start, chunk_end, C: tl.constexpr):
    """First token of a chunk, among all tokens, and how many of its C rows its sequence fills."""
    if chunk_start is None:
        num_chunks = tl.cdiv(T, C)
        sequence = (chunk // num_chunks).to(tl.int64)
        start = sequence * T + (chunk % num_chunks) * C
        end = (sequence + 1) * T
    else:
        start = tl.load(chunk_start + chunk)
        end = tl.load(chunk_end + chunk)
    return start, tl.minimum(end - start, C).to(tl.int32)


@triton.jit
def _sequence_span(sequence, T, cu_seqlens, chunk_offsets, C: tl.constexpr):
    """First token of a sequence, its end, and its first chunk."""
    if cu_seqlens is None:
        start = sequence.to(tl.int64) * T
        end = start + T
        first_chunk = sequence.to(tl.int64) * tl.cdiv(T, C)
    else:
        start = tl.load(cu_seqlens + sequence)
        end = tl.load(cu_seqlens + sequence + 1)
        first_chunk = tl.load(chunk_offsets + sequence)
    return start, end, first_chunk


@triton.jit
def _tile(length, column, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of a chunk and BLOCK columns of a tensor `[tokens, H, D]`: offsets from its corner, and mask."""
    row = tl.arange(0, C)[:, None]
    columns = column + tl.arange(0, BLOCK)[None, :]
    return row * (H * D) + columns, (row < length) & (columns < D)


@triton.jit
def _load(tensor, start, length, head, column, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of a chunk and BLOCK columns from `column` on, of a tensor `[tokens, H, D]`: `[C, BLOCK]`."""
    offsets, mask = _tile(length, column, H, D, C, BLOCK)
    return tl.load(tensor + (start * H + head) * D + offsets, mask=mask, other=0.0)


@triton.jit
def _store(
    tensor, value, start, length, head, column, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Write what `_load` would read."""
    offsets, mask = _tile(length, column, H, D, C, BLOCK)
    tl.store(tensor + (start * H + head) * D + offsets, value.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def _load_scalars(tensor, start, length, head, H: tl.constexpr, C: tl.constexpr):
    """The rows of a chunk of a tensor `[tokens, H]`, in fp32: `[C]`."""
    row = tl.arange(0, C)
    return tl.load(tensor + (start * H + head) + row * H, mask=row < length, other=0.0).to(tl.float32)


@triton.jit
def _store_scalars(tensor, value, start, length, head, H: tl.constexpr, C: tl.constexpr):
    """Write what `_load_scalars` would read."""
    row = tl.arange(0, C)
    tl.store(tensor + (start * H + head) + row * H, value.to(tensor.dtype.element_ty), mask=row < length)


@triton.jit
def _state_tile(row, column, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Where a tile of a state `[K, V]` lies: offsets and mask `[BLOCK_K, BLOCK_V]`."""
    rows = row + tl.arange(0, BLOCK_K)[:, None]
    columns = column + tl.arange(0, BLOCK_V)[None, :]
    return rows * V + columns, (rows < K) & (columns < V)


@triton.jit
def _load_state(
    states, index, row, column, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr
):
    """A tile of the state number `index` of a tensor `[·, K, V]`."""
    offsets, mask = _state_tile(row, column, K, V, BLOCK_K, BLOCK_V)
    return tl.load(states + index * (K * V) + offsets, mask=mask, other=0.0)


@triton.jit
def _store_state(
    states, value, index, row, column, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Write what `_load_state` would read."""
    offsets, mask = _state_tile(row, column, K, V, BLOCK_K, BLOCK_V)
    tl.store(states + index * (K * V) + offsets, value.to(states.dtype.element_ty), mask=mask)


@triton.jit
def _invert_diagonal_blocks(lower, C: tl.constexpr):
    """Inverse of the 16x16 diagonal blocks of I + L by forward substitution: `[C, C]`, zero outside of these blocks.

    With X = -L, row by row from the second on:  X[i, :i] += X[i, :i] X[:i, :i];  at last X += I. All blocks advance
    together.
    """
    BLOCKS: tl.constexpr = C // 16
    block = tl.arange(0, BLOCKS)
    same_block = block[:, None, None, None] == block[None, None, :, None]
    x = -tl.sum(tl.where(same_block, tl.reshape(lower, [BLOCKS, 16, BLOCKS, 16]), 0.0), axis=2)
    within = tl.arange(0, 16)
    for i in range(1, 16):
        this_row = (within == i)[None, :, None]
        row = tl.sum(tl.where(this_row, x, 0.0), axis=1)
        row += tl.sum(row[:, :, None] * x, axis=1)
        x = tl.where(this_row, row[:, None, :], x)
    x += (within[:, None] == within[None, :])[None, :, :].to(tl.float32)
    return tl.reshape(tl.where(same_block, x[:, :, None, :], 0.0), [C, C])


@triton.jit
def _quadrants(x, HALF: tl.constexpr):
    """The blocks x11, x21, x22 `[HALF, HALF]` of a lower triangular x `[2 HALF, 2 HALF]`."""
    left, right = tl.split(tl.permute(tl.reshape(x, [2, HALF, 2, HALF]), (1, 3, 0, 2)))
    x11, x21 = tl.split(left)
    _x12, x22 = tl.split(right)
    return x11, x21, x22


@triton.jit
def _from_quadrants(x11, x21, x22, HALF: tl.constexpr):
    """The lower triangular matrix `[2 HALF, 2 HALF]` of the blocks x11, x21 and x22."""
    blocks = tl.join(tl.join(x11, x21), tl.join(tl.zeros_like(x11), x22))
    return tl.reshape(tl.permute(blocks, (2, 0, 3, 1)), [2 * HALF, 2 * HALF])


@triton.jit
def _merge(x, lower, HALF: tl.constexpr):
    """Inverse of I + L `[2 HALF, 2 HALF]` from that of its two diagonal blocks.

    [A11 0; A21 A22]⁻¹ = [A11⁻¹ 0; -A22⁻¹ A21 A11⁻¹  A22⁻¹]. In fp32 throughout: reduced precision hurts here.
    """
    x11, _x21, x22 = _quadrants(x, HALF)
    _l11, l21, _l22 = _quadrants(lower, HALF)
    x21 = -_dot(x22, _dot(l21, x11, "ieee"), "ieee")
    return _from_quadrants(x11, x21, x22, HALF)


@_autotune(
    triton.Config({"BLOCK_K": 64}, num_warps=2, num_stages=2),
    triton.Config({"BLOCK_K": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_K": 32}, num_warps=4, num_stages=2),
    interpreted={"BLOCK_K": 32},
)
@triton.jit(do_not_specialize=["T"])
def ut_transform_kernel(
    k,
    beta,
    inverse,
    chunk_start,
    chunk_end,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T = (I + L)⁻¹ with L = strict_tril(diag(β) K Kᵀ), from k `[B, T, H, K]`, β `[B, T, H]`, to `[B, T, H, C]`.

    L and its inverse are computed in fp32 and rounded to the dtype of k at the end. Grid: (chunks · H).
    """
    chunk = tl.program_id(0) // H
    head = tl.program_id(0) % H
    start, length = _chunk_span(chunk, T, chunk_start, chunk_end, C)
    gram = tl.zeros([C, C], tl.float32)
    for column in range(0, K, BLOCK_K):
        keys = _load(k, start, length, head, column, H, K, C, BLOCK_K)
        gram += _dot(keys, tl.trans(keys), "ieee")
    row = tl.arange(0, C)
    lower = tl.where(row[:, None] > row[None, :], gram * _load_scalars(beta, start, length, head, H, C)[:, None], 0.0)
    x = _invert_diagonal_blocks(lower, C)
    if C == 32:
        x = _merge(x, lower, 16)
    if C == 64:
        x11, _x21, x22 = _quadrants(x, 32)
        l11, l21, l22 = _quadrants(lower, 32)
        x11 = _merge(x11, l11, 16)
        x22 = _merge(x22, l22, 16)
        x21 = -_dot(x22, _dot(l21, x11, "ieee"), "ieee")
        x = _from_quadrants(x11, x21, x22, 32)
    _store(inverse, x, start, length, head, 0, H, C, C, C)


@_autotune(
    triton.Config({"BLOCK": 64}, num_warps=2, num_stages=2),
    triton.Config({"BLOCK": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK": 32}, num_warps=4, num_stages=1),
    interpreted={"BLOCK": 32},
)
@triton.jit(do_not_specialize=["T"])
def pseudo_key_value_kernel(
    k,
    v,
    beta,
    inverse,
    w,
    u,
    chunk_start,
    chunk_end,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W = T diag(β) K `[B, T, H, K]` and U = T diag(β) V `[B, T, H, V]`. Grid: (chunks · H)."""
    chunk = tl.program_id(0) // H
    head = tl.program_id(0) % H
    start, length = _chunk_span(chunk, T, chunk_start, chunk_end, C)
    transform = _load(inverse, start, length, head, 0, H, C, C, C)
    transform = (transform * _load_scalars(beta, start, length, head, H, C)[None, :]).to(k.dtype.element_ty)
    for column in range(0, K, BLOCK):
        keys = _load(k, start, length, head, column, H, K, C, BLOCK)
        _store(w, _dot(transform, keys, PRECISION), start, length, head, column, H, K, C, BLOCK)
    for column in range(0, V, BLOCK):
        values = _load(v, start, length, head, column, H, V, C, BLOCK)
        _store(u, _dot(transform, values, PRECISION), start, length, head, column, H, V, C, BLOCK)


# K cannot be split over programs, since W S sums over it: one program holds all K rows of its columns of the state.
_STATE_CONFIGS = (
    triton.Config({"BLOCK_V": 32}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_V": 32}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_V": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_V": 64}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_V": 16}, num_warps=4, num_stages=1),
)


@_autotune(*_STATE_CONFIGS, interpreted={"BLOCK_V": 32})
@triton.jit(do_not_specialize=["T"])
def state_kernel(
    k,
    w,
    u,
    initial_state,
    states,
    pseudo_values,
    final_state,
    cu_seqlens,
    chunk_offsets,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Chunk after chunk: store S, store P = U - W S, then S ← S + Kᵀ P.

    From k, w `[B, T, H, K]`, u `[B, T, H, V]` and the initial state `[sequences, H, K, V]` (or None: zero) to the
    states that enter the chunks `[chunks, H, K, V]`, the pseudo-values `[B, T, H, V]` and the final state (or None).
    S is kept in fp32. Grid: (sequences · H, tiles of V).
    """
    sequence = tl.program_id(0) // H
    head = tl.program_id(0) % H
    column = tl.program_id(1) * BLOCK_V
    first, end, chunk = _sequence_span(sequence, T, cu_seqlens, chunk_offsets, C)
    index = tl.program_id(0).to(tl.int64)
    if initial_state is None:
        state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    else:
        state = _load_state(initial_state, index, 0, column, K, V, BLOCK_K, BLOCK_V)
    for n in range(tl.cdiv(end - first, C).to(tl.int32)):
        start = first + n * C
        length = tl.minimum(end - start, C).to(tl.int32)
        _store_state(states, state, (chunk + n) * H + head, 0, column, K, V, BLOCK_K, BLOCK_V)
        pseudo_keys = _load(w, start, length, head, 0, H, K, C, BLOCK_K)
        values = _load(u, start, length, head, column, H, V, C, BLOCK_V).to(tl.float32)
        values = (values - _dot(pseudo_keys, state.to(w.dtype.element_ty), PRECISION)).to(u.dtype.element_ty)
        _store(pseudo_values, values, start, length, head, column, H, V, C, BLOCK_V)
        keys = _load(k, start, length, head, 0, H, K, C, BLOCK_K)
        state += _dot(tl.trans(keys), values, PRECISION)
    if final_state is not None:
        _store_state(final_state, state, index, 0, column, K, V, BLOCK_K, BLOCK_V)


@_autotune(
    triton.Config({"BLOCK_K": 64, "BLOCK_V": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_K": 64, "BLOCK_V": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_K": 64, "BLOCK_V": 128}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_K": 64, "BLOCK_V": 128}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_K": 32, "BLOCK_V": 32}, num_warps=4, num_stages=1),
    interpreted={"BLOCK_K": 32, "BLOCK_V": 32},
)
@triton.jit(do_not_specialize=["T"])
def output_kernel(
    q,
    k,
    pseudo_values,
    states,
    o,
    scale,
    chunk_start,
    chunk_end,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """O = scale (Q S + tril(Q Kᵀ) P) `[B, T, H, V]`, the diagonal included. Grid: (chunks · H, tiles of V)."""
    chunk = tl.program_id(0) // H
    head = tl.program_id(0) % H
    column = tl.program_id(1) * BLOCK_V
    start, length = _chunk_span(chunk, T, chunk_start, chunk_end, C)
    index = tl.program_id(0).to(tl.int64)
    output = tl.zeros([C, BLOCK_V], tl.float32)
    attention = tl.zeros([C, C], tl.float32)
    for row in range(0, K, BLOCK_K):
        queries = _load(q, start, length, head, row, H, K, C, BLOCK_K)
        keys = _load(k, start, length, head, row, H, K, C, BLOCK_K)
        state = _load_state(states, index, row, column, K, V, BLOCK_K, BLOCK_V)
        output += _dot(queries, state, PRECISION)
        attention += _dot(queries, tl.trans(keys), PRECISION)
    token = tl.arange(0, C)
    attention = tl.where(token[:, None] >= token[None, :], attention, 0.0).to(q.dtype.element_ty)
    values = _load(pseudo_values, start, length, head, column, H, V, C, BLOCK_V)
    output += _dot(attention, values, PRECISION)
    _store(o, output * scale, start, length, head, column, H, V, C, BLOCK_V)


@_autotune(
    triton.Config({"BLOCK_K": 64, "BLOCK_V": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_K": 64, "BLOCK_V": 128}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_K": 32, "BLOCK_V": 32}, num_warps=4, num_stages=1),
    interpreted={"BLOCK_K": 32, "BLOCK_V": 32},
)
@triton.jit(do_not_specialize=["T"])
def local_gradient_kernel(
    q,
    k,
    grad_o,
    grad_local,
    scale,
    chunk_start,
    chunk_end,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the outputs of a pseudo-value's own chunk want of it: scale tril(Q Kᵀ)ᵀ dO `[B, T, H, V]`.

    Grid: (chunks · H, tiles of V).
    """
    chunk = tl.program_id(0) // H
    head = tl.program_id(0) % H
    column = tl.program_id(1) * BLOCK_V
    start, length = _chunk_span(chunk, T, chunk_start, chunk_end, C)
    transposed = tl.zeros([C, C], tl.float32)
    for row in range(0, K, BLOCK_K):
        queries = _load(q, start, length, head, row, H, K, C, BLOCK_K)
        keys = _load(k, start, length, head, row, H, K, C, BLOCK_K)
        transposed += _dot(keys, tl.trans(queries), PRECISION)
    token = tl.arange(0, C)
    transposed = tl.where(token[:, None] <= token[None, :], transposed, 0.0).to(q.dtype.element_ty)
    gradient = _load(grad_o, start, length, head, column, H, V, C, BLOCK_V)
    _store(grad_local, _dot(transposed, gradient, PRECISION) * scale, start, length, head, column, H, V, C, BLOCK_V)


@_autotune(*_STATE_CONFIGS, interpreted={"BLOCK_V": 32})
@triton.jit(do_not_specialize=["T"])
def state_gradient_kernel(
    q,
    k,
    w,
    grad_o,
    grad_local,
    grad_final_state,
    grad_states,
    grad_values,
    grad_initial_state,
    scale,
    cu_seqlens,
    chunk_offsets,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the last chunk to the first: store dS, dP += K dS, then dS ← dS + scale Qᵀ dO - Wᵀ dP.

    From q, k, w `[B, T, H, K]`, dO and the local part of dP `[B, T, H, V]` and the final state's gradient (or None:
    zero) to dS for the state that leaves each chunk `[chunks, H, K, V]`, dP `[B, T, H, V]` (which is dU, too) and the
    gradient of the initial state (or None). Grid: (sequences · H, tiles of V).
    """
    sequence = tl.program_id(0) // H
    head = tl.program_id(0) % H
    column = tl.program_id(1) * BLOCK_V
    first, end, chunk = _sequence_span(sequence, T, cu_seqlens, chunk_offsets, C)
    index = tl.program_id(0).to(tl.int64)
    dtype = k.dtype.element_ty
    if grad_final_state is None:
        grad_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    else:
        grad_state = _load_state(grad_final_state, index, 0, column, K, V, BLOCK_K, BLOCK_V)
    num_chunks = tl.cdiv(end - first, C).to(tl.int32)
    for step in range(num_chunks):
        n = num_chunks - 1 - step
        start = first + n * C
        length = tl.minimum(end - start, C).to(tl.int32)
        _store_state(grad_states, grad_state, (chunk + n) * H + head, 0, column, K, V, BLOCK_K, BLOCK_V)
        keys = _load(k, start, length, head, 0, H, K, C, BLOCK_K)
        gradient = _load(grad_local, start, length, head, column, H, V, C, BLOCK_V).to(tl.float32)
        gradient += _dot(keys, grad_state.to(dtype), PRECISION)
        _store(grad_values, gradient, start, length, head, column, H, V, C, BLOCK_V)
        pseudo_keys = _load(w, start, length, head, 0, H, K, C, BLOCK_K)
        grad_state += _dot(tl.trans(pseudo_keys), (-gradient).to(dtype), PRECISION)
        queries = _load(q, start, length, head, 0, H, K, C, BLOCK_K)
        grad_output = _load(grad_o, start, length, head, column, H, V, C, BLOCK_V)
        grad_state += _dot(tl.trans(queries), grad_output, PRECISION) * scale
    if grad_initial_state is not None:
        _store_state(grad_initial_state, grad_state, index, 0, column, K, V, BLOCK_K, BLOCK_V)


@_autotune(
    triton.Config({"BLOCK_V": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_V": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_V": 64}, num_warps=2, num_stages=2),
    triton.Config({"BLOCK_V": 32}, num_warps=4, num_stages=1),
    interpreted={"BLOCK_V": 32},
)
@triton.jit(do_not_specialize=["T"])
def value_gradient_kernel(
    k,
    v,
    beta,
    inverse,
    grad_values,
    grad_residual,
    grad_v,
    grad_beta,
    chunk_start,
    chunk_end,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dR = Tᵀ dP and dV = diag(β) dR, both `[B, T, H, V]`, and of dβ `[B, T, H]` the part rowsum(dR ⊙ V).

    Grid: (chunks · H).
    """
    chunk = tl.program_id(0) // H
    head = tl.program_id(0) % H
    start, length = _chunk_span(chunk, T, chunk_start, chunk_end, C)
    strength = _load_scalars(beta, start, length, head, H, C)
    transform = tl.trans(_load(inverse, start, length, head, 0, H, C, C, C)).to(k.dtype.element_ty)
    grad_strength = tl.zeros([C], tl.float32)
    for column in range(0, V, BLOCK_V):
        values = _load(v, start, length, head, column, H, V, C, BLOCK_V)
        gradient = _load(grad_values, start, length, head, column, H, V, C, BLOCK_V)
        gradient = _dot(transform, gradient, PRECISION)
        grad_strength += tl.sum(gradient * values, axis=1)
        _store(grad_residual, gradient, start, length, head, column, H, V, C, BLOCK_V)
        _store(grad_v, gradient * strength[:, None], start, length, head, column, H, V, C, BLOCK_V)
    _store_scalars(grad_beta, grad_strength, start, length, head, H, C)


@_autotune(
    triton.Config({"BLOCK_V": 32}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_V": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_V": 64}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_V": 64}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_V": 32}, num_warps=4, num_stages=1),
    interpreted={"BLOCK_V": 32},
)
@triton.jit(do_not_specialize=["T", "tokens"])
def query_key_gradient_kernel(
    q,
    k,
    beta,
    pseudo_values,
    states,
    grad_o,
    grad_residual,
    grad_states,
    grad_q,
    grad_k,
    grad_beta,
    scale,
    tokens,
    chunk_start,
    chunk_end,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ and dK `[B, T, H, K]`, and what each tile of K adds to dβ, `[tiles, B, T, H]` for `tokens` = B T.

        A = tril(scale dO Pᵀ),   dL = -strict_tril(dR Pᵀ),   Y = dL K - dR Sᵀ
        dQ = scale dO Sᵀ + A K,   dK = P dSᵀ + Aᵀ Q + diag(β) Y + (diag(β) dL)ᵀ K,   dβ += rowsum(Y ⊙ K)

    Grid: (chunks · H, tiles of K).
    """
    chunk = tl.program_id(0) // H
    head = tl.program_id(0) % H
    row = tl.program_id(1) * BLOCK_K
    start, length = _chunk_span(chunk, T, chunk_start, chunk_end, C)
    index = tl.program_id(0).to(tl.int64)
    dtype = k.dtype.element_ty
    grad_attention = tl.zeros([C, C], tl.float32)
    grad_lower = tl.zeros([C, C], tl.float32)
    grad_query = tl.zeros([C, BLOCK_K], tl.float32)
    grad_key = tl.zeros([C, BLOCK_K], tl.float32)
    grad_recall = tl.zeros([C, BLOCK_K], tl.float32)
    for column in range(0, V, BLOCK_V):
        values = _load(pseudo_values, start, length, head, column, H, V, C, BLOCK_V)
        state = _load_state(states, index, row, column, K, V, BLOCK_K, BLOCK_V)
        grad_output = _load(grad_o, start, length, head, column, H, V, C, BLOCK_V)
        grad_attention += _dot(grad_output, tl.trans(values), PRECISION)
        grad_query += _dot(grad_output, tl.trans(state), PRECISION)
        residual = _load(grad_residual, start, length, head, column, H, V, C, BLOCK_V)
        grad_lower += _dot(residual, tl.trans(values), PRECISION)
        grad_recall += _dot(residual, tl.trans(state), PRECISION)
        grad_state = _load_state(grad_states, index, row, column, K, V, BLOCK_K, BLOCK_V)
        grad_key += _dot(values, tl.trans(grad_state), PRECISION)
    token = tl.arange(0, C)
    grad_attention = tl.where(token[:, None] >= token[None, :], grad_attention * scale, 0.0).to(dtype)
    grad_lower = tl.where(token[:, None] > token[None, :], -grad_lower, 0.0)
    queries = _load(q, start, length, head, row, H, K, C, BLOCK_K)
    keys = _load(k, start, length, head, row, H, K, C, BLOCK_K)
    grad_query = grad_query * scale + _dot(grad_attention, keys, PRECISION)
    _store(grad_q, grad_query, start, length, head, row, H, K, C, BLOCK_K)
    strength = _load_scalars(beta, start, length, head, H, C)[:, None]
    grad_key += _dot(tl.trans(grad_attention), queries, PRECISION)
    grad_key += _dot(tl.trans((grad_lower * strength).to(dtype)), keys, PRECISION)
    through_transform = _dot(grad_lower.to(dtype), keys, PRECISION) - grad_recall
    _store(grad_k, grad_key + through_transform * strength, start, length, head, row, H, K, C, BLOCK_K)
    grad_beta += tl.program_id(1).to(tl.int64) * tokens * H
    _store_scalars(grad_beta, tl.sum(through_transform * keys, axis=1), start, length, head, H, C)
