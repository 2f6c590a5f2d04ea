"""Gated linear attention on a CPU: chunks as batched matrix products, gradients in closed form.

Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (ICML 2024), sections 3.2 and 4.3.

Inside a chunk of C tokens, with G the running sum of the log gates from the chunk's start, S the state before the
chunk and D the gradient of the state after it (the scale is taken into q),

    A = tril(Σ_k q_tk k_sk exp(G_t - G_s))           scores
    o = A v + (q exp(G)) S                           S' = exp(G_C) S + (k exp(G_C - G))ᵀ v

    dv = Aᵀ do + (k exp(G_C - G)) D                  dA = tril(do vᵀ)
    dq_t = Σ_s dA_ts k_s exp(G_t - G_s) + exp(G_t) do_t Sᵀ
    dk_s = Σ_t dA_ts q_t exp(G_t - G_s) + exp(G_C - G_s) v_s Dᵀ
    dg: see `_gate_gradient`

**No exponent ever overflows, and no [C, C, K] tensor is formed.** exp(G_t - G_s) is split into a factor of t and a
factor of s. Between the two halves of a block both factors are decays to or from the border, at most one, for any
gates. On the diagonal the blocks that remain are anchored in the middle of their own range of G, which is short there:
the halving goes on until it is (see `_factor`). Gates as a model has them at initialization need no halving at all.

**Long sequences go through in segments** of a few chunks whose intermediate results stay in the processor's cache. The
forward pass keeps the state at the start of each segment, and the backward pass computes the rest again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from kernels.common import accumulation_dtype

_LARGEST_CHUNK = 64

# Elements of one intermediate tensor of a segment: large enough to hide the cost of a call, small enough for the cache.
_SEGMENT_ELEMENTS = 2**17

# The largest sum of log gates over a block that is anchored in its middle: exp(±half of it), times any sensible query
# or key, is far from overflow, and the rounding of the sum itself stays near the precision of the result.
_LARGEST_RANGE = {torch.float32: 80.0, torch.float64: 600.0}

# exp() of it is zero. Deeper gates (down to -inf) mean the same, and would only take digits from sums of gates.
_LOWEST_GATE = {torch.float32: -110.0, torch.float64: -760.0}

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def gla_cpu(
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
    """The CPU path of `gla`, arguments as there and checked there. `chunk_size` (a power of two) changes speed only."""
    if chunk_size is None:
        chunk_size = _chunk_size(q.shape[1], q.shape[-1], v.shape[-1])
    elif chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two (given: {chunk_size})")
    inputs = (q, k, v, g, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final_state, _ = _gla(q, k, v, g, scale, initial_state, cu_seqlens, chunk_size, keep)
    return o, final_state if output_final_state else None


def _chunk_size(length: int, key_dim: int, value_dim: int) -> int:
    """Near sqrt(K V), where a token costs as much in its chunk's scores as in the state, and no longer than T."""
    size = 16
    while size < _LARGEST_CHUNK and size < length and size * size < key_dim * value_dim:
        size *= 2
    return size


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and chunks


class _Layout:
    """How tokens `[B, T, H, D]` are cut into chunks `[n·B·H, C, D]`, and the chunks into segments.

    A chunk holds tokens of one sequence; what is missing at a sequence's end is filled with zeros, which neither add to
    a state nor decay it. `starts` and `ends` map the first and last chunk of a sequence to the sequence.
    """

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> None:
        self.batch, self.length, self.heads, key_dim = q.shape
        self.chunk_size = chunk_size
        self.dtype = accumulation_dtype(q.dtype)
        self.segment_chunks, self.segment_batch = _segment(self.batch, self.heads, key_dim, v.shape[-1], chunk_size)
        if cu_seqlens is None:
            self.chunks = -(-self.length // chunk_size)
            self.starts, self.ends = {0: 0}, {self.chunks - 1: 0}
            self.tokens = self.padding = None
            return
        bounds = cu_seqlens.to("cpu", torch.int64)
        lengths = bounds.diff()
        counts = (lengths + chunk_size - 1) // chunk_size
        ends = counts.cumsum(0)
        self.chunks = int(ends[-1])
        self.starts = {int(first): i for i, first in enumerate(ends - counts)}
        self.ends = {int(end) - 1: i for i, end in enumerate(ends)}
        sequence = torch.repeat_interleave(counts)
        chunk_in_sequence = torch.arange(self.chunks) - (ends - counts)[sequence]
        position = (chunk_in_sequence[:, None] * chunk_size + torch.arange(chunk_size)).flatten()
        sequence = sequence.repeat_interleave(chunk_size)
        self.padding = position >= lengths[sequence]
        self.tokens = (bounds[sequence] + position).masked_fill_(self.padding, 0)

    def batches(self) -> Iterator[slice]:
        for first in range(0, self.batch, self.segment_batch):
            yield slice(first, min(first + self.segment_batch, self.batch))

    def segments(self) -> list[range]:
        return [
            range(first, min(first + self.segment_chunks, self.chunks))
            for first in range(0, self.chunks, self.segment_chunks)
        ]

    def gather(self, x: Tensor, segment: range) -> Tensor:
        """Chunks `[n·B·H, C, D]` of tokens `[B, T, H, D]`, contiguous, in the precision of the computation."""
        start, stop = segment.start * self.chunk_size, segment.stop * self.chunk_size
        if self.tokens is not None:
            tokens = x[0].index_select(0, self.tokens[start:stop])
            tokens = tokens.masked_fill_(self.padding[start:stop, None, None], 0).unsqueeze(0)
        else:
            tokens = x[:, start:stop]
            if stop > self.length:
                tokens = functional.pad(tokens, (0, 0, 0, 0, 0, stop - self.length))
        chunks = tokens.unflatten(1, (len(segment), self.chunk_size)).permute(1, 0, 3, 2, 4)
        return torch.empty(chunks.shape, dtype=self.dtype).copy_(chunks).flatten(0, 2)

    def scatter(self, out: Tensor, chunks: Tensor, segment: range) -> None:
        """Write chunks `[n·B·H, C, D]` to their tokens in `out` `[B, T, H, D]`."""
        start, stop = segment.start * self.chunk_size, segment.stop * self.chunk_size
        tokens = chunks.view(len(segment), out.shape[0], self.heads, self.chunk_size, -1).permute(1, 0, 3, 2, 4)
        if self.tokens is not None:
            valid = ~self.padding[start:stop]
            out[0].index_copy_(0, self.tokens[start:stop][valid], tokens.flatten(1, 2)[0][valid].to(out.dtype))
        elif stop <= self.length:
            out[:, start:stop].unflatten(1, (len(segment), self.chunk_size)).copy_(tokens)
        else:
            out[:, start:].copy_(tokens.flatten(1, 2)[:, : self.length - start])


def _segment(batch: int, heads: int, key_dim: int, value_dim: int, chunk_size: int) -> tuple[int, int]:
    """The number of chunks in a segment, and of batch elements that are computed together."""
    elements = heads * chunk_size * max(key_dim, value_dim, chunk_size)
    segment_batch = max(1, min(batch, _SEGMENT_ELEMENTS // elements))
    return max(1, _SEGMENT_ELEMENTS // (elements * segment_batch)), segment_batch


def _num_checkpoints(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> int:
    """At least the number of segments, from shapes alone: each sequence adds at most one incomplete chunk."""
    chunks = -(-q.shape[1] // chunk_size)
    if cu_seqlens is not None:
        chunks = chunks + cu_seqlens.shape[0] - 1
    segment_chunks, _ = _segment(q.shape[0], q.shape[2], q.shape[3], v.shape[-1], chunk_size)
    return -(-chunks // segment_chunks)


# ---------------------------------------------------------------------------------------------------------------------
# Decays within a chunk


@dataclass(slots=True)
class _Blocks:
    """Equal blocks of the C × C scores, exp(G_t - G_s) in two factors: A_ts = (q_t · row_t)(k_s · column_s)ᵀ.

    The blocks lie on the diagonal, or, with `halves`, left below it: the rows are the second half of a block of twice
    the size, and the columns its first half. Tensors are `[X, blocks, size, K]`.
    """

    size: int
    halves: bool
    row: Tensor
    column: Tensor
    queries: Tensor
    keys: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """The rows `[X, blocks, size, D]` of x `[X, C, D]` that these blocks have: a view."""
        return x.unflatten(1, (-1, 2, self.size))[:, :, 1] if self.halves else x.unflatten(1, (-1, self.size))

    def columns(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2, self.size))[:, :, 0] if self.halves else x.unflatten(1, (-1, self.size))

    def of(self, scores: Tensor) -> Tensor:
        """These blocks `[X, blocks, size, size]` of scores `[X, C, C]`: a view."""
        if self.halves:
            grid = scores.unflatten(2, (-1, 2, self.size)).unflatten(1, (-1, 2, self.size))[:, :, 1, :, :, 0]
        else:
            grid = scores.unflatten(2, (-1, self.size)).unflatten(1, (-1, self.size))
        return grid.diagonal(dim1=1, dim2=3).movedim(-1, 1)


@dataclass(slots=True)
class _Chunks:
    """A segment's chunks `[X, C, D]`, X = n·B·H, and the decays of its gate.

    `enter` is exp(G), the decay from the chunk's start to a token, and `leave` is exp(G_C - G), from the token to the
    chunk's end: `[X, C, K]`, or `[X, C, 1]` for a gate per head. The scores come from `blocks` for a gate per channel,
    else from q kᵀ and the matrix exp(G_t - G_s) `[X or H, C, C]`; without a gate all of it is absent.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    enter: Tensor | None = None
    leave: Tensor | None = None
    matrix: Tensor | None = None
    blocks: list[_Blocks] | None = None

    @property
    def entering(self) -> Tensor:
        return self.q if self.enter is None else self.q * self.enter

    @property
    def leaving(self) -> Tensor:
        return self.k if self.leave is None else self.k * self.leave

    def decay(self, heads: int) -> Tensor | None:
        """exp(G_C) `[n, heads, K or 1, 1]`: what a chunk leaves of the state before it."""
        return None if self.enter is None else self.enter[:, -1].unflatten(0, (-1, heads)).unsqueeze(-1)


def _load(
    layout: _Layout,
    segment: range,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    matrix: Tensor | None,
) -> _Chunks:
    queries, keys, values = (layout.gather(x, segment) for x in (q, k, v))
    queries *= scale
    if g is None:
        return _Chunks(queries, keys, values)
    if g.shape[-1] != 1:
        gate = layout.gather(g, segment).clamp_(min=_LOWEST_GATE[layout.dtype])
        enter, leave, blocks = _factor(queries, keys, gate)
        return _Chunks(queries, keys, values, enter, leave, blocks=blocks)
    # A gate per head is a small tensor: float64 costs nothing, and its sums may be subtracted.
    total = layout.gather(g, segment).double().clamp_(min=_LOWEST_GATE[layout.dtype]).cumsum(1)
    enter, leave = total.exp().to(layout.dtype), (total[:, -1:] - total).exp().to(layout.dtype)
    return _Chunks(
        queries, keys, values, enter, leave, _decay_matrix(total, layout.dtype) if matrix is None else matrix
    )


def _decay_matrix(total: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(G_t - G_s) on and below the diagonal, 0 above, `[X, C, C]` from G `[X, C, 1]`."""
    # tril_ overwrites what overflowed above the diagonal; a product with a mask would give NaN.
    return (total - total.mT).to(dtype).exp_().tril_()


def _constant_matrix(g: Tensor, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """The decay matrix of a constant log gate `[H]`, the same in every chunk."""
    steps = torch.arange(1, chunk_size + 1, dtype=torch.float64)[:, None]
    return _decay_matrix(g.double().clamp(min=_LOWEST_GATE[dtype])[:, None, None] * steps, dtype)


def _factor(queries: Tensor, keys: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, list[_Blocks]]:
    """exp(G), exp(G_C - G) and the factored blocks of the scores, from the log gate `[X, C, K]`.

    Diagonal blocks as large as the gates allow, then the squares below them, between halves, at twice the size each
    time, until they fill the chunk. Every decay between halves is a product of decays that are known already.
    """
    chunk_size = gate.shape[1]
    size = _block_size(gate)
    total = gate.unflatten(1, (-1, size)).cumsum(2)
    last = total[:, :, -1:]
    anchor = (total[:, :, :1] + last) / 2
    row = (total - anchor).exp_()
    column = row.reciprocal()
    shape = row.shape
    scaled = (queries.view(shape) * row, keys.view(shape) * column)
    blocks = [_Blocks(size, False, row, column, *scaled)]
    enter, leave = row * anchor.exp(), column * (last - anchor).exp()
    while size < chunk_size:
        halves = (-1, 2)
        enter, leave = enter.unflatten(1, halves), leave.unflatten(1, halves)
        row, column = enter[:, :, 1], leave[:, :, 0]
        below = _Blocks(size, True, row, column, row, column)
        below.queries, below.keys = below.rows(queries) * row, below.columns(keys) * column
        blocks.append(below)
        first_half, second_half = enter[:, :, 0, -1:], enter[:, :, 1, -1:]
        enter = torch.stack([enter[:, :, 0], row * first_half], dim=2).flatten(2, 3)
        leave = torch.stack([column * second_half, leave[:, :, 1]], dim=2).flatten(2, 3)
        size *= 2
    return enter.flatten(1, 2), leave.flatten(1, 2), blocks


def _block_size(gate: Tensor) -> int:
    """The largest power of two such that log gates sum to a short range in every block of that many tokens."""
    size = gate.shape[1]
    while size > 1:
        if gate.unflatten(1, (-1, size)).sum(2).abs().amax().item() <= _LARGEST_RANGE[gate.dtype]:
            break
        size //= 2
    return size


def _scores(chunks: _Chunks) -> Tensor:
    """A `[X, C, C]`, zero above the diagonal."""
    if chunks.blocks is None:
        scores = torch.bmm(chunks.q, chunks.k.mT)
        if chunks.matrix is None:
            return scores.tril_()
        scores.unflatten(0, (-1, chunks.matrix.shape[0])).mul_(chunks.matrix)
        return scores
    first = chunks.blocks[0]
    size, (count, length) = first.size, chunks.q.shape[:2]
    if size == length:
        return torch.bmm(first.queries[:, 0], first.keys[:, 0].mT).tril_()
    scores = chunks.q.new_zeros(count, length, length)
    for block in chunks.blocks:
        block.of(scores).copy_(block.queries @ block.keys.mT)
    return scores.tril_()


def _scores_backward(
    chunks: _Chunks, scores: Tensor, dscores: Tensor, needs_gate: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of q, k `[X, C, K]` and, if needed, of G `[X, C, K or 1]` through the scores below the diagonal.

    `dscores` is zero elsewhere, and is overwritten.
    """
    if chunks.blocks is None:
        dtotal = None
        if needs_gate:
            # What cancels between rows and columns are the same numbers: exactly, if float64 adds them.
            products = (dscores * scores).double()
            dtotal = (products.sum(2) - products.sum(1)).unsqueeze(-1)
        if chunks.matrix is not None:
            dscores.unflatten(0, (-1, chunks.matrix.shape[0])).mul_(chunks.matrix)
        return torch.bmm(dscores, chunks.k), torch.bmm(dscores.mT, chunks.q), dtotal
    diagonal, *below = chunks.blocks
    part = diagonal.of(dscores)
    dq = (part @ diagonal.keys).mul_(diagonal.row).flatten(1, 2)
    dk = (part.mT @ diagonal.queries).mul_(diagonal.column).flatten(1, 2)
    for block in below:
        part = block.of(dscores)
        block.rows(dq).addcmul_(part @ block.keys, block.row)
        block.columns(dk).addcmul_(part.mT @ block.queries, block.column)
    return dq, dk, (chunks.q * dq).addcmul_(chunks.k, dk, value=-1) if needs_gate else None


# ---------------------------------------------------------------------------------------------------------------------
# States between chunks


def _scan(
    updates: Tensor,
    decay: Tensor | None,
    carry: Tensor,
    segment: range,
    enters: Mapping[int, int],
    leaves: Mapping[int, int],
    source: Tensor,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """carry = decay · carry + update over the chunks of a segment, in its order: (carry before each chunk, carry).

    Updates and the returned states are `[n, M, K, V]`, in the chunks' own order also when `segment` runs backward. At
    a chunk in `enters` the carry is taken from `source`; after one in `leaves` it is written to `sink`.
    """
    order = range(len(segment)) if segment.step > 0 else range(len(segment) - 1, -1, -1)
    states = [carry] * len(segment)
    updates, factors = updates.unbind(), None if decay is None else decay.unbind()
    for i, chunk in zip(order, segment, strict=True):
        if chunk in enters:
            carry = source[enters[chunk]]
        states[i] = carry
        carry = carry + updates[i] if factors is None else torch.addcmul(updates[i], carry, factors[i])
        if sink is not None and chunk in leaves:
            sink[leaves[chunk]].copy_(carry)
    return torch.stack(states), carry


def _by_sequence(state: Tensor, batch: slice, cu_seqlens: Tensor | None) -> Tensor:
    """A state `[B, H, K, V]` or `[sequences, H, K, V]` as `[sequences, M, K, V]`: a batch is one sequence, M = B·H."""
    return state if cu_seqlens is not None else state[batch].flatten(0, 1).unsqueeze(0)


# ---------------------------------------------------------------------------------------------------------------------
# The operator


def _without_autocast(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The precision is chosen here, by the inputs' types; autocast would put bfloat16 products in between."""

    @wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run


def _per_token(g: Tensor | None, q: Tensor) -> Tensor | None:
    """The gate as `[B, T, H, K or 1]`."""
    if g is None or g.ndim == 4:
        return g
    return g.expand(q.shape[:3]).unsqueeze(-1)


def _state(state: Tensor | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A state as it is used: contiguous, in the precision of the computation, zero where there is none."""
    if state is not None:
        return state.to(dtype).contiguous()
    return q.new_zeros(_state_shape(q, v, cu_seqlens), dtype=dtype)


def _state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, q.shape[2], q.shape[3], v.shape[-1]


@torch.library.custom_op("reprise::gla_cpu", mutates_args=())
@_without_autocast
def _gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state, and with `keep` the states at the segments' starts `[segments, B, H, K, V]`."""
    layout = _Layout(q, v, cu_seqlens, chunk_size)
    matrix = _constant_matrix(g, chunk_size, layout.dtype) if g is not None and g.ndim == 1 else None
    gates = _per_token(g, q)
    initial = _state(initial_state, q, v, cu_seqlens, layout.dtype)
    final = torch.empty_like(initial)
    o = torch.empty(v.shape, dtype=v.dtype)
    checkpoints = _empty_checkpoints(q, v, cu_seqlens, chunk_size, keep)
    for batch in layout.batches():
        q_, k_, v_ = q[batch], k[batch], v[batch]
        g_ = None if gates is None else gates[batch]
        first, last = (_by_sequence(state, batch, cu_seqlens) for state in (initial, final))
        carry = first[0]
        for i, segment in enumerate(layout.segments()):
            if keep:
                checkpoints[i, batch].copy_(carry.view_as(checkpoints[i, batch]))
            chunks = _load(layout, segment, q_, k_, v_, g_, scale, matrix)
            updates = torch.bmm(chunks.leaving.mT, chunks.v).unflatten(0, (len(segment), -1))
            states, carry = _scan(
                updates, chunks.decay(len(carry)), carry, segment, layout.starts, layout.ends, first, last
            )
            out = torch.bmm(_scores(chunks), chunks.v).baddbmm_(chunks.entering, states.flatten(0, 1))
            layout.scatter(o[batch], out, segment)
    return o, final, checkpoints


def _empty_checkpoints(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_size: int, keep: bool) -> Tensor:
    count = _num_checkpoints(q, v, cu_seqlens, chunk_size) if keep else 0
    dtype = accumulation_dtype(q.dtype)
    return q.new_empty((count, q.shape[0], q.shape[2], q.shape[3], v.shape[-1]), dtype=dtype)


@_gla.register_fake
def _(q, k, v, g, scale, initial_state, cu_seqlens, chunk_size, keep):  # noqa: ANN001, ANN202
    dtype = accumulation_dtype(q.dtype)
    final = q.new_empty(_state_shape(q, v, cu_seqlens), dtype=dtype)
    return v.new_empty(v.shape), final, _empty_checkpoints(q, v, cu_seqlens, chunk_size, keep)


@torch.library.custom_op("reprise::gla_cpu_backward", mutates_args=())
@_without_autocast
def _gla_backward(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    chunk_size: int,
    needs_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g (empty unless needed) and the initial state."""
    layout = _Layout(q, v, cu_seqlens, chunk_size)
    matrix = _constant_matrix(g, chunk_size, layout.dtype) if g is not None and g.ndim == 1 else None
    gates = _per_token(g, q)
    initial = _state(initial_state, q, v, cu_seqlens, layout.dtype)
    dfinal = _state(dfinal_state, q, v, cu_seqlens, layout.dtype)
    dinitial = torch.empty_like(initial)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    dg = torch.empty(gates.shape if needs_gate else 0, dtype=layout.dtype)
    for batch in layout.batches():
        q_, k_, v_, do_ = q[batch], k[batch], v[batch], do[batch]
        g_ = None if gates is None else gates[batch]
        first, dfirst, dlast = (_by_sequence(state, batch, cu_seqlens) for state in (initial, dinitial, dfinal))
        dcarry = dlast[-1]
        for i, segment in reversed(list(enumerate(layout.segments()))):
            chunks = _load(layout, segment, q_, k_, v_, g_, scale, matrix)
            dout = layout.gather(do_, segment)
            entering, leaving = chunks.entering, chunks.leaving
            decay = chunks.decay(len(dcarry))
            updates = torch.bmm(leaving.mT, chunks.v).unflatten(0, (len(segment), -1))
            carry = checkpoints[i, batch].flatten(0, 1)
            states, _ = _scan(updates, decay, carry, segment, layout.starts, layout.ends, first, None)
            updates = torch.bmm(entering.mT, dout).unflatten(0, (len(segment), -1))
            dstates, dcarry = _scan(updates, decay, dcarry, segment[::-1], layout.ends, layout.starts, dlast, dfirst)
            states, dstates = states.flatten(0, 1), dstates.flatten(0, 1)

            scores = _scores(chunks)
            layout.scatter(dv[batch], torch.bmm(scores.mT, dout).baddbmm_(leaving, dstates), segment)
            dscores = torch.bmm(dout, chunks.v.mT)
            # A token's score with itself knows no gate: left out of the gate's gradient rather than cancelled there.
            own = dscores.diagonal(dim1=1, dim2=2).unsqueeze(-1).clone()
            dqueries, dkeys, dtotal = _scores_backward(chunks, scores, dscores.tril_(-1), needs_gate)
            dentering, dleaving = torch.bmm(dout, states.mT), torch.bmm(chunks.v, dstates.mT)
            if chunks.enter is not None:
                dentering *= chunks.enter
                dleaving *= chunks.leave
            if needs_gate:
                gradient = _gate_gradient(chunks, dtotal, dentering, dleaving, states, dstates)
                layout.scatter(dg[batch], gradient, segment)
            dqueries.add_(dentering)
            dqueries.addcmul_(own, chunks.k).mul_(scale)
            dkeys.add_(dleaving).addcmul_(own, chunks.q)
            layout.scatter(dq[batch], dqueries, segment)
            layout.scatter(dk[batch], dkeys, segment)
    if needs_gate:
        dg = dg if g.ndim == 4 else dg.squeeze(-1) if g.ndim == 3 else dg.sum((0, 1, 3))
        dg = dg.to(g.dtype)
    return dq, dk, dv, dg, dinitial


def _gate_gradient(
    chunks: _Chunks, dtotal: Tensor, dentering: Tensor, dleaving: Tensor, states: Tensor, dstates: Tensor
) -> Tensor:
    """The gradient `[X, C, K or 1]` of the log gate, from that of its sum G through the scores.

    The gate at t acts on every pair of a query at or after t and a key before t. Both in the chunk: Σ_{s≥t} dG_s, where
    dG = q dq - k dk. The key in an earlier chunk: Σ_{s≥t} q dq. The query in a later one: Σ_{s<t} k dk. Neither in this
    chunk: exp(G_C) Σ_v S D. Kept apart, none of these sums has to cancel what another one holds.
    """
    before, after = chunks.q * dentering, chunks.k * dleaving
    across = (states * dstates).sum(-1).mul_(chunks.enter[:, -1])
    if dtotal.shape[-1] == 1:
        before, after, across = (x.sum(-1, keepdim=True) for x in (before, after, across))
    gradient = (before + dtotal).flip(1).cumsum_(1).flip(1).add_(across.unsqueeze(1))
    gradient[:, 1:] += after.cumsum_(1)[:, :-1]
    return gradient


@_gla_backward.register_fake
def _(do, dfinal_state, q, k, v, g, scale, initial_state, cu_seqlens, checkpoints, chunk_size, needs_gate):  # noqa: ANN001, ANN202
    dg = q.new_empty(g.shape, dtype=g.dtype) if needs_gate else q.new_empty(0, dtype=checkpoints.dtype)
    dinitial = q.new_empty(_state_shape(q, v, cu_seqlens), dtype=checkpoints.dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg, dinitial


def _keep(ctx, inputs, output) -> None:  # noqa: ANN001
    q, k, v, g, ctx.scale, initial_state, cu_seqlens, ctx.chunk_size, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, output[2])


def _differentiate(ctx, do, dfinal_state, _):  # noqa: ANN001, ANN202
    q, k, v, g, initial_state, cu_seqlens, checkpoints = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(v)
    needs_gate = ctx.needs_input_grad[3]
    dq, dk, dv, dg, dinitial = _gla_backward(
        do, dfinal_state, q, k, v, g, ctx.scale, initial_state, cu_seqlens, checkpoints, ctx.chunk_size, needs_gate
    )
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    return dq, dk, dv, dg if needs_gate else None, None, dinitial, None, None, None


def _refuse(ctx, *_: Tensor | None) -> None:  # noqa: ANN001
    raise RuntimeError(
        "gla has no second derivative: its gradient is a closed form that autograd does not see. "
        "Use kernels.linear_attention.reference.gla_reference where one is needed."
    )


_gla.register_autograd(_differentiate, setup_context=_keep)
_gla_backward.register_autograd(_refuse)
