"""The delta rule on a CPU: chunkwise, forward and backward, in batched matrix products.

Yang, Wang, Zhang, Shen and Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"
(NeurIPS 2024), section 3: the WY representation and the UT transform. For a chunk of C tokens with rows Q, K `[C, K]`,
V `[C, V]`, β `[C]`, and the state S `[K, V]` that enters it:

    L = strict_tril(diag(β) K Kᵀ),   T = (I + L)⁻¹
    W = T diag(β) K,   U = T diag(β) V
    N = U − W S                                     the chunk's pseudo-values: what it writes under its keys
    O = scale · (Q S + tril(Q Kᵀ) N)
    S ← S + Kᵀ N

Only N and S depend on earlier chunks: two small products a chunk, and all else is done for many chunks at once. The
gradients are those of this linear system; its shortest form, (I + L) N = diag(β) (V − K S), gives those of L, V and β:

    with dP = tril(dO Nᵀ), the scale being part of dO, and dS the gradient of the state that leaves the chunk
    dN = tril(Q Kᵀ)ᵀ dO + K dS;   dS ← dS + Qᵀ dO − Wᵀ dN
    dR = Tᵀ dN,   Z = dR Sᵀ,   dL = −strict_tril(dR Nᵀ),   E = diag(β) dL
    dQ = dO Sᵀ + dP K;   dK = N dSᵀ + dPᵀ Q − diag(β) Z + (E + Eᵀ) K
    dV = diag(β) dR;   dβ = rowsum(dR ⊙ V) − rowsum(Z ⊙ K) + rowsum(dL ⊙ K Kᵀ)

The sequence is worked off in segments of some chunks, whose intermediate results stay in the cache and are forgotten:
what the backward pass keeps of a segment is the state that enters it, beside the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.common import accumulation_dtype

# The elements of one intermediate tensor of a segment. Larger ones leave the cache, and the C library returns their
# memory to the system after every use.
SEGMENT_ELEMENTS = 2**17
# The fewest chunks of a segment: they bound the memory of the states that are kept, one a segment.
SEGMENT_CHUNKS = 8


def delta_rule_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule as `kernels.delta_rule.delta_rule`, whose checks it leaves out; any chunk size gives the same."""
    if chunk_size is None:
        # Smaller chunks need less arithmetic, larger ones give the matrix products a shape that they are faster at.
        chunk_size = 16 if max(k.shape[-1], v.shape[-1]) <= 32 else 32
    chunk_size = min(chunk_size, q.shape[1])
    o, final_state, _ = _forward(q, k, v, beta, initial_state, cu_seqlens, scale, chunk_size)
    return o, final_state if output_final_state else None


@dataclass(frozen=True)
class _Segment:
    """Some chunks in a row, of some sequences of a batch.

    `slots` holds the places of the tokens among the `num_chunks · chunk_size` places, None where every place is taken.
    `starts` and `ends` map the chunks of this segment at which sequences start and end to the rows of these sequences
    in a tensor of states.
    """

    index: int
    batch: slice
    tokens: slice
    num_chunks: int
    chunk_size: int
    slots: Tensor | None
    starts: dict[int, slice]
    ends: dict[int, slice]

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Arrange this part of x `[B, T, H, D]` in chunks `[chunks · B · H, C, D]`, zero where there is no token."""
        x = x[self.batch, self.tokens]
        if self.slots is not None:
            padded = x.new_zeros(x.shape[0], self.num_chunks * self.chunk_size, *x.shape[2:])
            x = padded.index_copy_(1, self.slots, x)
        x = x.unflatten(1, (self.num_chunks, self.chunk_size)).permute(1, 0, 3, 2, 4)
        return x.to(dtype, memory_format=torch.contiguous_format).flatten(0, 2)

    def store(self, chunks: Tensor, x: Tensor) -> None:
        """Write chunks `[chunks · B · H, C, D]` to their place in x `[B, T, H, D]`."""
        x = x[self.batch, self.tokens]
        chunks = chunks.unflatten(0, (self.num_chunks, x.shape[0], x.shape[2])).permute(1, 0, 3, 2, 4)
        if self.slots is None:
            x.unflatten(1, (self.num_chunks, self.chunk_size)).copy_(chunks)
        else:
            x.copy_(chunks.flatten(1, 2)[:, self.slots])

    def steps(self, chunks: Tensor) -> tuple[Tensor, ...]:
        """Chunk after chunk, each `[B · H, C, D]`, of all chunks `[chunks · B · H, C, D]`."""
        return chunks.unflatten(0, (self.num_chunks, -1)).unbind()


def _segment_chunks(q: Tensor, v: Tensor, chunk_size: int) -> int:
    """Number of chunks in a segment."""
    batch_size, _, num_heads, key_dim = q.shape
    elements = batch_size * num_heads * chunk_size * max(key_dim, v.shape[-1])
    return max(SEGMENT_CHUNKS, SEGMENT_ELEMENTS // elements)


def _num_segments(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> int:
    """Number of segments, at most: it must not depend on the values in cu_seqlens, which a compiler does not see."""
    num_sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    num_chunks = (q.shape[1] + num_sequences * (chunk_size - 1)) // chunk_size
    segment_chunks = _segment_chunks(q, v, chunk_size)
    return (num_chunks + segment_chunks - 1) // segment_chunks


def _segments(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Iterator[_Segment]:
    """All segments: those of a sequence in the order of time."""
    batch_size, length, num_heads, key_dim = q.shape
    slots = torch.arange(length)
    if cu_seqlens is None:
        first_chunks = [0, -(-length // chunk_size)]
    else:
        lengths = cu_seqlens.diff()
        chunks = (lengths + chunk_size - 1) // chunk_size
        first_chunks = [0, *chunks.cumsum(0).tolist()]
        padding = (chunks * chunk_size - lengths).cumsum(0) - (chunks * chunk_size - lengths)
        slots = slots + padding.repeat_interleave(lengths)
    num_chunks, num_sequences = first_chunks[-1], len(first_chunks) - 1
    segment_chunks = min(_segment_chunks(q, v, chunk_size), num_chunks)
    elements = segment_chunks * num_heads * chunk_size * max(key_dim, v.shape[-1])
    group = max(1, SEGMENT_ELEMENTS // elements)
    for first in range(0, batch_size, group):
        batch = slice(first, min(first + group, batch_size))
        rows = [batch] if cu_seqlens is None else [slice(i, i + 1) for i in range(num_sequences)]
        starts = dict(zip(first_chunks[:-1], rows, strict=True))
        ends = {chunk - 1: row for chunk, row in zip(first_chunks[1:], rows, strict=True)}
        for index, chunk in enumerate(range(0, num_chunks, segment_chunks)):
            next_chunk = min(chunk + segment_chunks, num_chunks)
            bounds = torch.tensor([chunk * chunk_size, next_chunk * chunk_size])
            start, end = torch.searchsorted(slots, bounds).tolist()
            full = end - start == (next_chunk - chunk) * chunk_size
            yield _Segment(
                index,
                batch,
                slice(start, end),
                next_chunk - chunk,
                chunk_size,
                None if full else slots[start:end] - chunk * chunk_size,
                {i - chunk: starts[i] for i in range(chunk, next_chunk) if i in starts},
                {i - chunk: ends[i] for i in range(chunk, next_chunk) if i in ends},
            )


@dataclass(frozen=True)
class _Written:
    """What the chunks of a segment write, and the states `[num_chunks + 1, B · H, K, V]` before and after them."""

    gram: Tensor  # K Kᵀ
    inverse: Tensor  # T
    w: Tensor  # W
    pseudo_values: Tensor  # N
    states: Tensor

    @property
    def entering(self) -> Tensor:
        """The state before every chunk `[chunks · B · H, K, V]`."""
        return self.states[:-1].flatten(0, 1)


def _write(
    segment: _Segment,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    initial_state: Tensor | None,
    final_state: Tensor | None = None,
) -> _Written:
    """Run the state through the chunks of a segment; `state` enters it. Final states are written to `final_state`."""
    gram = k @ k.mT
    lower = beta * gram
    # Only the part below the diagonal is read. As accurate as substitution in blocks, and as fast.
    identity = torch.eye(segment.chunk_size, dtype=k.dtype).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False, left=False, unitriangular=True)
    scaled_inverse = inverse * beta.mT
    w, pseudo_values = scaled_inverse @ k, scaled_inverse @ v
    states = k.new_empty(segment.num_chunks + 1, *state.shape)
    states[0] = state
    before = states.unbind()
    chunks = zip(segment.steps(w), segment.steps(k.mT), segment.steps(pseudo_values), strict=True)
    for i, (w_i, k_i, values_i) in enumerate(chunks):
        if i in segment.starts:
            _set_rows(before[i], initial_state, segment.starts[i])
        values_i.baddbmm_(w_i, before[i], alpha=-1)
        torch.baddbmm(before[i], k_i, values_i, out=before[i + 1])
        if final_state is not None and i in segment.ends:
            final_state[segment.ends[i]] = before[i + 1].unflatten(0, (-1, final_state.shape[1]))
    return _Written(gram, inverse, w, pseudo_values, states)


def _read(q: Tensor, k: Tensor, written: _Written, scale: float) -> Tensor:
    """The outputs O of all chunks of a segment."""
    attention = (q @ k.mT).tril_()
    return (q @ written.entering).baddbmm_(attention, written.pseudo_values, beta=scale, alpha=scale)


def _state_gradients(
    segment: _Segment,
    q: Tensor,
    k: Tensor,
    grad_o: Tensor,
    written: _Written,
    leaving: Tensor,
    grad_final_state: Tensor | None,
    grad_initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """dS before and after the chunks `[num_chunks + 1, B · H, K, V]` and dN; `leaving` is dS after the last chunk.

    Gradients of initial states are written to `grad_initial_state`.
    """
    dvalues = (q @ k.mT).tril_().mT @ grad_o
    dstates = torch.empty_like(written.states)
    torch.bmm(q.mT, grad_o, out=dstates[:-1].flatten(0, 1))
    dstates[-1] = leaving
    after = dstates.unbind()
    chunks = zip(segment.steps(k), segment.steps(written.w.mT), segment.steps(dvalues), strict=True)
    for i, (k_i, w_i, dvalues_i) in reversed(list(enumerate(chunks))):
        if i in segment.ends:
            _set_rows(after[i + 1], grad_final_state, segment.ends[i])
        dvalues_i.baddbmm_(k_i, after[i + 1])
        after[i].add_(after[i + 1]).baddbmm_(w_i, dvalues_i, alpha=-1)
        if i in segment.starts:
            grad_initial_state[segment.starts[i]] = after[i].unflatten(0, (-1, grad_initial_state.shape[1]))
    return dstates, dvalues


def _chunk_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    grad_o: Tensor,
    written: _Written,
    dstates: Tensor,
    dvalues: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV and dβ of all chunks of a segment."""
    dp = (grad_o @ written.pseudo_values.mT).tril_()
    dq = (grad_o @ written.entering.mT).baddbmm_(dp, k)
    dr = written.inverse.mT @ dvalues
    z = dr @ written.entering.mT
    dlower = (dr @ written.pseudo_values.mT).tril_(-1).neg_()
    dbeta = (dr * v).sum(-1) - (z * k).sum(-1) + (dlower * written.gram).sum(-1)
    dlower.mul_(beta)
    dk = (written.pseudo_values @ dstates[1:].flatten(0, 1).mT).baddbmm_(dp.mT, q)
    dk.addcmul_(beta, z, value=-1).baddbmm_(dlower + dlower.mT, k)
    return dq, dk, dr.mul_(beta), dbeta[..., None]


def _set_rows(state: Tensor, states: Tensor | None, rows: slice) -> None:
    """Set state `[B · H, K, V]` to rows of states `[num_sequences, H, K, V]`, or to zero without any."""
    if states is None:
        state.zero_()
    else:
        state.copy_(states[rows].flatten(0, 1))


@torch.library.custom_op("reprise::delta_rule_cpu", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs `[B, T, H, V]`, final states and the states that enter the segments `[num_segments, B, H, K, V]`."""
    o, final_state, entering = _empty_outputs(q, k, v, beta, initial_state, cu_seqlens, scale, chunk_size)
    # Autocast would multiply in half precision.
    with torch.autocast("cpu", enabled=False):
        for segment in _segments(q, v, cu_seqlens, chunk_size):
            queries, *others = (segment.load(x, entering.dtype) for x in (q, k, v, beta[..., None]))
            state = entering[segment.index, segment.batch].flatten(0, 1)
            written = _write(segment, *others, state, initial_state, final_state)
            if segment.index + 1 < len(entering):
                entering[segment.index + 1, segment.batch].flatten(0, 1).copy_(written.states[-1])
            segment.store(_read(queries, others[0], written, scale), o)
    return o, final_state, entering


@_forward.register_fake
def _empty_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch_size, _, num_heads, key_dim), value_dim = q.shape, v.shape[-1]
    state_shape = (num_heads, key_dim, value_dim)
    num_sequences = batch_size if cu_seqlens is None else cu_seqlens.shape[0] - 1
    num_segments = _num_segments(q, v, cu_seqlens, chunk_size)
    dtype = accumulation_dtype(q.dtype)
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        v.new_empty(num_sequences, *state_shape, dtype=dtype),
        v.new_zeros(num_segments, batch_size, *state_shape, dtype=dtype),
    )


@torch.library.custom_op("reprise::delta_rule_cpu_backward", mutates_args=())
def _backward(
    grad_o: Tensor,
    grad_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    entering: Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta and the initial states."""
    saved = (q, k, v, beta, initial_state, cu_seqlens, entering)
    *grads, grad_initial_state = _empty_gradients(grad_o, grad_final_state, *saved, scale, chunk_size)
    leaving = entering.new_zeros(())
    with torch.autocast("cpu", enabled=False):
        for segment in reversed(list(_segments(q, v, cu_seqlens, chunk_size))):
            inputs = [segment.load(x, entering.dtype) for x in (q, k, v, beta[..., None])]
            do = segment.load(grad_o, entering.dtype) * scale
            state = entering[segment.index, segment.batch].flatten(0, 1)
            written = _write(segment, *inputs[1:], state, initial_state)
            dstates, dvalues = _state_gradients(
                segment, *inputs[:2], do, written, leaving, grad_final_state, grad_initial_state
            )
            leaving = dstates[0]
            chunks = _chunk_gradients(*inputs, do, written, dstates, dvalues)
            for gradient, chunk in zip((*grads[:3], grads[3][..., None]), chunks, strict=True):
                segment.store(chunk, gradient)
    return (*grads, grad_initial_state)


@_backward.register_fake
def _empty_gradients(
    grad_o: Tensor,
    grad_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    entering: Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta))
    return (*grads, entering.new_empty(num_sequences, *entering.shape[2:]))


def _save(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, beta, initial_state, cu_seqlens, ctx.scale, ctx.chunk_size = inputs
    entering = output[2]
    ctx.mark_non_differentiable(entering)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, beta, initial_state, cu_seqlens, entering)


def _gradients(
    ctx: FunctionCtx, grad_o: Tensor | None, grad_final_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, beta, initial_state, cu_seqlens, entering = ctx.saved_tensors
    grad_o = torch.zeros_like(v) if grad_o is None else grad_o
    saved = (q, k, v, beta, initial_state, cu_seqlens, entering)
    *grads, grad_initial_state = _backward(grad_o, grad_final_state, *saved, ctx.scale, ctx.chunk_size)
    return (*grads, None if initial_state is None else grad_initial_state, None, None, None)


def _no_second_derivative(*_: object) -> None:
    raise RuntimeError(
        "delta_rule on a CPU has first derivatives only: differentiate "
        "kernels.delta_rule.reference.delta_rule_reference where second derivatives are needed"
    )


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_no_second_derivative)
