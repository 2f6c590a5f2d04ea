"""Triton kernels of chunkwise gated linear attention, forward and backward.

Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (ICML 2024), section 4 and
appendix A; the scalar and constant gates follow RetNet (Sun et al., 2023) and Mamba-2 (Dao and Gu, 2024).

Symbols. A sequence is cut into chunks of C tokens, a chunk into sub-chunks of SUB = 16. Within a chunk
    G_t = Σ_{r ≤ t} g_r    log decay from the chunk's start through token t
    R_t = Σ_{r > t} g_r    log decay from after token t to the chunk's end;  G_last = G_t + R_t is the chunk's total
    S, dS                  state before a chunk `[K, V]` and the gradient of the state after it
    A_ts                   score of the key at s for the query at t within a chunk, with scale and decay, 0 for s > t
Logarithms are to the base 2 inside the kernels. Every decay is exp2 of a sum of gates that is formed without ever
subtracting large numbers in fp32, so strong gates neither overflow nor cost digits:
    scalar gates   G is kept in fp64 (one number a head and token), differences are taken there;
    vector gates   G and R are both kept (fp32); inside a chunk, sums start at the sub-chunk that they need.

Shapes. q, k and their gradients `[B·T, H, K]`, v, o and their gradients `[B·T, H, V]`, G and R as the gate, A and dA
`[B·T, H, C]`, states before each chunk `[num_chunks, H, K, V]`, initial and final states `[num_sequences, H, K, V]`.

Common arguments.
    T                 tokens of a sequence, where all have the same number (a runtime value: no recompilation)
    spans             `[num_chunks, 2]` first row and number of rows of each chunk, or None (sequences of T tokens)
    cu_seqlens, chunk_offsets   `[num_sequences + 1]` first row and first chunk of each sequence, or None
    GATE              "none", "scalar" or "vector"
    ACC               type of sums and states: fp32, or fp64 for fp64 inputs
    PRECISION         of matrix products whose factors are fp32: "ieee" for fp32 inputs, else "tf32"
    BK, BV            tile of the key and of the value dimension
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Triton types what a kernel takes and returns)
from __future__ import annotations

import triton
import triton.language as tl

SUB = 16  # tokens of a sub-chunk, c in the paper; also the smallest side of a tensor-core product
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# exp2 of less is 0 in fp32 and fp64; a floor keeps gates of -inf out of differences.
SMALLEST_LOG: tl.constexpr = tl.constexpr(-10000.0)


def _autotune(configs: list[tuple[dict[str, int], int, int]], key: list[str]):
    """Autotune over (tile sizes, num_warps, num_stages); the interpreter takes small tiles, to see several of them."""
    if INTERPRETED.value:
        return triton.autotune([triton.Config(dict.fromkeys(configs[0][0], 32))], key=key)
    return triton.autotune([triton.Config(tiles, num_warps=w, num_stages=s) for tiles, w, s in configs], key=key)


# ---------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _chunk_span(chunk, T, spans, C: tl.constexpr):
    """First row, of all B·T, and number of rows of a chunk."""
    if spans is None:
        chunks = tl.cdiv(T, C)
        local = chunk % chunks
        first = (chunk // chunks).to(tl.int64) * T + local * C
        count = tl.minimum(T - local * C, C)
    else:
        first = tl.load(spans + 2 * chunk)
        count = tl.load(spans + 2 * chunk + 1).to(tl.int32)
    return first, count


@triton.jit
def _sequence_span(sequence, T, cu_seqlens, chunk_offsets, C: tl.constexpr):
    """First row, number of rows and first chunk of a sequence."""
    if cu_seqlens is None:
        first = sequence.to(tl.int64) * T
        length = T
        chunk = sequence * tl.cdiv(T, C)
    else:
        first = tl.load(cu_seqlens + sequence)
        length = (tl.load(cu_seqlens + sequence + 1) - first).to(tl.int32)
        chunk = tl.load(chunk_offsets + sequence).to(tl.int32)
    return first, length, chunk


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    """c + a b, in the type of c."""
    if INTERPRETED:  # It multiplies the bits of bf16; the products of rounded factors are the same in fp32.
        a = a.to(c.dtype)
        b = b.to(c.dtype)
    return tl.dot(a, b, c, input_precision=PRECISION, out_dtype=c.dtype)


@triton.jit
def _load_rows(x, first, head, rows, valid, columns, H: tl.constexpr, D: tl.constexpr):
    """Tile `[rows, columns]` of x `[B·T, H, D]`, rows counted from `first`; 0 where not `valid` and beyond D."""
    base = x + (first * H + head) * D
    mask = valid[:, None] & (columns < D)[None, :]
    return tl.load(base + rows[:, None] * (H * D) + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(x, tile, first, head, rows, valid, columns, H: tl.constexpr, D: tl.constexpr):
    """The inverse of `_load_rows`; rounds to the type of x."""
    base = x + (first * H + head) * D
    mask = valid[:, None] & (columns < D)[None, :]
    tl.store(base + rows[:, None] * (H * D) + columns[None, :], tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _load_row(x, row, head, valid, columns, H: tl.constexpr, D: tl.constexpr):
    """Row `[columns]` of x `[B·T, H, D]`; 0 if not `valid` and beyond D."""
    return tl.load(x + (row * H + head) * D + columns, mask=valid & (columns < D), other=0.0)


@triton.jit
def _load_state(x, index, keys, values, K: tl.constexpr, V: tl.constexpr):
    """Tile `[keys, values]` of the state `index` of x `[..., K, V]`; 0 beyond K and V."""
    mask = (keys < K)[:, None] & (values < V)[None, :]
    return tl.load(x + index.to(tl.int64) * (K * V) + keys[:, None] * V + values[None, :], mask=mask, other=0.0)


@triton.jit
def _store_state(x, tile, index, keys, values, K: tl.constexpr, V: tl.constexpr):
    """The inverse of `_load_state`; rounds to the type of x."""
    mask = (keys < K)[:, None] & (values < V)[None, :]
    pointers = x + index.to(tl.int64) * (K * V) + keys[:, None] * V + values[None, :]
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _load_scalar_gate(prefix, first, count, head, rows, H: tl.constexpr):
    """G `[C]` and G_last of a chunk and head, fp64, of a scalar gate's G `[B·T, H]`."""
    inside = tl.load(prefix + (first + rows) * H + head, mask=rows < count, other=0.0)
    return inside, tl.load(prefix + (first + count - 1) * H + head)


@triton.jit
def _scalar_decay(inside, rows, count, ACC: tl.constexpr):
    """exp(G_t − G_s) `[C, C]` for s ≤ t, else 0. Masked before exp: the other half would overflow."""
    causal = (rows[:, None] >= rows[None, :]) & (rows < count)[:, None]
    return tl.exp2(tl.where(causal, inside[:, None] - inside[None, :], float("-inf")).to(ACC))


@triton.jit
def _gate_row(g, row, head, valid, columns, ACC: tl.constexpr, H: tl.constexpr, K: tl.constexpr):
    return _load_row(g, row, head, valid, columns, H, K).to(ACC) * LOG2_E


@triton.jit
def _gate_rows(g, first, head, rows, valid, columns, ACC: tl.constexpr, H: tl.constexpr, K: tl.constexpr):
    return _load_rows(g, first, head, rows, valid, columns, H, K).to(ACC) * LOG2_E


# ------------------------------------------------------------------------------------------------------------ gates


@_autotune([({"BD": 32}, 2, 2), ({"BD": 64}, 4, 2)], key=["D", "C"])
@triton.jit(do_not_specialize=["T"])
def gate_sums_kernel(g, prefix, suffix, T, spans, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """G and R of every chunk, base 2, from g `[B·T, D]` (D = H·K or H); summed in fp64. `suffix` may be None."""
    tiles: tl.constexpr = tl.cdiv(D, BD)
    chunk = tl.program_id(0) // tiles
    columns = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    rows = tl.arange(0, C)
    first, count = _chunk_span(chunk, T, spans, C)
    gates = _load_rows(g, first, 0, rows, rows < count, columns, 1, D).to(tl.float64) * LOG2_E
    gates = tl.maximum(gates, SMALLEST_LOG)
    sums = tl.cumsum(gates, axis=0)
    _store_rows(prefix, sums, first, 0, rows, rows < count, columns, 1, D)
    if suffix is not None:
        _store_rows(suffix, tl.sum(gates, axis=0)[None, :] - sums, first, 0, rows, rows < count, columns, 1, D)


# ----------------------------------------------------------------------------------------------------------- states

_STATE_TILES = [({"BK": 32, "BV": 32}, 2, 3), ({"BK": 32, "BV": 64}, 4, 3), ({"BK": 64, "BV": 64}, 4, 2)]


@_autotune(_STATE_TILES, key=["K", "V", "C", "GATE"])
@triton.jit(do_not_specialize=["T"])
def states_forward_kernel(
    k,
    v,
    prefix,
    suffix,
    initial_state,
    states,
    final_state,
    T,
    cu_seqlens,
    chunk_offsets,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """State before each chunk, and after the last: S ← diag(exp(G_last)) S + (K_n · exp(R))ᵀ V_n (paper, eq. 3).

    Sequential over the chunks of a sequence; tiles of the state are independent, since the gate is diagonal.
    """
    sequence = tl.program_id(0) // H
    head = tl.program_id(0) % H
    keys = tl.program_id(1) * BK + tl.arange(0, BK)
    values = tl.program_id(2) * BV + tl.arange(0, BV)
    rows = tl.arange(0, C)
    first, length, chunk = _sequence_span(sequence, T, cu_seqlens, chunk_offsets, C)
    state = tl.zeros([BK, BV], dtype=ACC)
    if initial_state is not None:
        state += _load_state(initial_state, sequence * H + head, keys, values, K, V).to(ACC)
    for n in range(0, tl.cdiv(length, C)):
        start = first + n * C
        count = tl.minimum(length - n * C, C)
        _store_state(states, state, (chunk + n) * H + head, keys, values, K, V)
        key = _load_rows(k, start, head, rows, rows < count, keys, H, K)
        value = _load_rows(v, start, head, rows, rows < count, values, H, V)
        if GATE == "vector":
            key = (key * tl.exp2(_load_rows(suffix, start, head, rows, rows < count, keys, H, K))).to(value.dtype)
            state *= tl.exp2(_load_row(prefix, start + count - 1, head, True, keys, H, K))[:, None]
        elif GATE == "scalar":
            inside, last = _load_scalar_gate(prefix, start, count, head, rows, H)
            key = (key * tl.exp2((last - inside).to(ACC))[:, None]).to(value.dtype)
            state *= tl.exp2(last.to(ACC))
        state = _dot(tl.trans(key), value, state, PRECISION)
    if final_state is not None:
        _store_state(final_state, state, sequence * H + head, keys, values, K, V)


@_autotune(_STATE_TILES, key=["K", "V", "C", "GATE"])
@triton.jit(do_not_specialize=["T"])
def states_backward_kernel(
    q,
    do,
    prefix,
    final_state_gradient,
    state_gradients,
    initial_state_gradient,
    scale: tl.float64,
    T,
    cu_seqlens,
    chunk_offsets,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Gradient of the state after each chunk, last chunk first: dS ← diag(exp(G_last)) dS + scale (Q_n · exp(G))ᵀ dO_n.

    What is left before the first chunk is the gradient of the initial state.
    """
    sequence = tl.program_id(0) // H
    head = tl.program_id(0) % H
    keys = tl.program_id(1) * BK + tl.arange(0, BK)
    values = tl.program_id(2) * BV + tl.arange(0, BV)
    rows = tl.arange(0, C)
    first, length, chunk = _sequence_span(sequence, T, cu_seqlens, chunk_offsets, C)
    factor = tl.full([1, 1], scale, ACC)
    gradient = tl.zeros([BK, BV], dtype=ACC)
    if final_state_gradient is not None:
        gradient += _load_state(final_state_gradient, sequence * H + head, keys, values, K, V).to(ACC)
    chunks = tl.cdiv(length, C)
    for i in range(0, chunks):
        n = chunks - 1 - i
        start = first + n * C
        count = tl.minimum(length - n * C, C)
        _store_state(state_gradients, gradient, (chunk + n) * H + head, keys, values, K, V)
        query = _load_rows(q, start, head, rows, rows < count, keys, H, K) * factor
        output_gradient = _load_rows(do, start, head, rows, rows < count, values, H, V)
        if GATE == "vector":
            query *= tl.exp2(_load_rows(prefix, start, head, rows, rows < count, keys, H, K))
            gradient *= tl.exp2(_load_row(prefix, start + count - 1, head, True, keys, H, K))[:, None]
        elif GATE == "scalar":
            inside, last = _load_scalar_gate(prefix, start, count, head, rows, H)
            query *= tl.exp2(inside.to(ACC))[:, None]
            gradient *= tl.exp2(last.to(ACC))
        query = tl.trans(query.to(output_gradient.dtype))
        gradient = _dot(query, output_gradient, gradient, PRECISION)
    if initial_state_gradient is not None:
        _store_state(initial_state_gradient, gradient, sequence * H + head, keys, values, K, V)


# ---------------------------------------------------------------------------------- forward: scores and the output

_SUB_CHUNK_TILES = [({"BK": 32}, 1, 2), ({"BK": 32}, 2, 2), ({"BK": 64}, 4, 2)]


@_autotune(_SUB_CHUNK_TILES, key=["K", "C"])
@triton.jit(do_not_specialize=["T"])
def scores_kernel(
    q,
    k,
    g,
    scores,
    scale: tl.float64,
    T,
    spans,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    SUB: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """Scores of vector gates, A_ts = scale Σ_k q_tk k_sk exp(G_tk − G_sk), of one sub-chunk's rows (paper, eq. 4).

    Secondary chunking: against the keys of earlier sub-chunks a matrix product of the queries decayed from the
    sub-chunk's start and the keys decayed up to it (both exponents ≤ 0); against the keys of the same sub-chunk
    elementwise, one key at a time from the last to the first, the exponent growing by one gate a step.
    """
    subs: tl.constexpr = C // SUB
    chunk = tl.program_id(0) // subs
    start = (tl.program_id(0) % subs) * SUB
    head = tl.program_id(1)
    first, count = _chunk_span(chunk, T, spans, C)
    if start >= count:
        return
    rows = tl.arange(0, C)
    own = tl.arange(0, SUB)
    earlier = tl.zeros([SUB, C], dtype=ACC)
    same = tl.zeros([SUB, SUB], dtype=ACC)
    for tile in range(0, tl.cdiv(K, BK)):
        keys = tile * BK + tl.arange(0, BK)
        query = _load_rows(q, first + start, head, own, start + own < count, keys, H, K).to(ACC)
        if start > 0:
            gates = _gate_rows(g, first + start, head, own, start + own < count, keys, ACC, H, K)
            query_decayed = query * tl.exp2(tl.cumsum(gates, axis=0))
            gates = _gate_rows(g, first + 1, head, rows, rows + 1 < start, keys, ACC, H, K)
            key = _load_rows(k, first, head, rows, rows < start, keys, H, K).to(ACC)
            key *= tl.exp2(tl.cumsum(gates, axis=0, reverse=True))
            earlier = _dot(query_decayed, tl.trans(key), earlier, PRECISION)
        exponent = tl.zeros([SUB, BK], dtype=ACC)
        for i in range(0, SUB):
            s = SUB - 1 - i
            valid = start + s < count
            key_row = _load_row(k, first + start + s, head, valid, keys, H, K).to(ACC)
            column = tl.sum(query * key_row[None, :] * tl.exp2(exponent), axis=1)
            same += tl.where((own[:, None] >= s) & (own[None, :] == s), column[:, None], 0.0)
            gate_row = _gate_row(g, first + start + s, head, valid, keys, ACC, H, K)
            exponent += tl.where(own[:, None] >= s, gate_row[None, :], 0.0)
    factor = tl.full([1, 1], scale, ACC)
    base = scores + ((first + start) * H + head) * C + own[:, None] * (H * C)
    inside = (start + own < count)[:, None]
    others = (rows < start) | (rows >= start + SUB)
    tl.store(base + rows[None, :], earlier * factor, mask=inside & others[None, :])
    tl.store(base + start + own[None, :], same * factor, mask=inside)


_TILES = [({"BK": 32, "BV": 64}, 4, 3), ({"BK": 64, "BV": 64}, 4, 2), ({"BK": 64, "BV": 128}, 8, 2)]


@_autotune(_TILES, key=["K", "V", "C", "GATE"])
@triton.jit(do_not_specialize=["T"])
def output_kernel(
    q,
    k,
    v,
    prefix,
    scores,
    states,
    o,
    scale: tl.float64,
    T,
    spans,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """O_n = scale (Q_n · exp(G)) S_n + A V_n (paper, eq. 3 with section 4.3).

    Unless the gates are vectors, A_ts = scale (Q_n K_nᵀ)_ts exp(G_t − G_s) is a plain product, formed here.
    """
    tiles: tl.constexpr = tl.cdiv(V, BV)
    chunk = tl.program_id(0) // tiles
    values = (tl.program_id(0) % tiles) * BV + tl.arange(0, BV)
    head = tl.program_id(1)
    first, count = _chunk_span(chunk, T, spans, C)
    if count <= 0:
        return
    rows = tl.arange(0, C)
    factor = tl.full([1, 1], scale, ACC)
    value = _load_rows(v, first, head, rows, rows < count, values, H, V)
    output = tl.zeros([C, BV], dtype=ACC)
    score = tl.zeros([C, C], dtype=ACC)
    for tile in range(0, tl.cdiv(K, BK)):
        keys = tile * BK + tl.arange(0, BK)
        query = _load_rows(q, first, head, rows, rows < count, keys, H, K)
        if GATE == "vector":
            query = query * tl.exp2(_load_rows(prefix, first, head, rows, rows < count, keys, H, K))
        else:
            key = _load_rows(k, first, head, rows, rows < count, keys, H, K)
            score = _dot(query, tl.trans(key), score, PRECISION)
        state = _load_state(states, chunk * H + head, keys, values, K, V).to(value.dtype)
        output = _dot(query.to(value.dtype), state, output, PRECISION)
    if GATE == "vector":
        score += _load_rows(scores, first, head, rows, rows < count, rows, H, C)
    elif GATE == "scalar":
        inside, _ = _load_scalar_gate(prefix, first, count, head, rows, H)
        score *= factor * _scalar_decay(inside, rows, count, ACC)
        output *= tl.exp2(inside.to(ACC))[:, None]
    else:
        score = tl.where(rows[:, None] >= rows[None, :], score * factor, 0.0)
    output *= factor
    output = _dot(score.to(value.dtype), value, output, PRECISION)
    _store_rows(o, output, first, head, rows, rows < count, values, H, V)


# --------------------------------------------------------------------------------------------------------- backward


@_autotune(_TILES, key=["K", "V", "C", "GATE"])
@triton.jit(do_not_specialize=["T"])
def value_gradient_kernel(
    q,
    k,
    prefix,
    suffix,
    scores,
    state_gradients,
    do,
    dv,
    scale: tl.float64,
    T,
    spans,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """dV_n = Aᵀ dO_n + (K_n · exp(R)) dS_n. The A of vector gates is not rounded for it, not even to TF32."""
    tiles: tl.constexpr = tl.cdiv(V, BV)
    chunk = tl.program_id(0) // tiles
    values = (tl.program_id(0) % tiles) * BV + tl.arange(0, BV)
    head = tl.program_id(1)
    first, count = _chunk_span(chunk, T, spans, C)
    if count <= 0:
        return
    rows = tl.arange(0, C)
    output_gradient = _load_rows(do, first, head, rows, rows < count, values, H, V)
    gradient = tl.zeros([C, BV], dtype=ACC)
    score = tl.zeros([C, C], dtype=ACC)
    for tile in range(0, tl.cdiv(K, BK)):
        keys = tile * BK + tl.arange(0, BK)
        key = _load_rows(k, first, head, rows, rows < count, keys, H, K)
        if GATE == "vector":
            key = key * tl.exp2(_load_rows(suffix, first, head, rows, rows < count, keys, H, K))
        else:
            query = _load_rows(q, first, head, rows, rows < count, keys, H, K)
            score = _dot(query, tl.trans(key), score, PRECISION)
        state = _load_state(state_gradients, chunk * H + head, keys, values, K, V).to(output_gradient.dtype)
        gradient = _dot(key.to(output_gradient.dtype), state, gradient, PRECISION)
    if GATE == "vector":
        score += _load_rows(scores, first, head, rows, rows < count, rows, H, C)
        if PRECISION == "ieee":
            gradient = _dot(tl.trans(score), output_gradient, gradient, PRECISION)
        else:  # Two parts of A hold twice the bits of one, and dO is exact: what fp32 would give, on tensor cores.
            high = score.to(output_gradient.dtype)
            low = (score - high).to(output_gradient.dtype)
            gradient = _dot(tl.trans(high), output_gradient, gradient, PRECISION)
            gradient = _dot(tl.trans(low), output_gradient, gradient, PRECISION)
    else:
        score *= tl.full([1, 1], scale, ACC)
        if GATE == "scalar":
            inside, last = _load_scalar_gate(prefix, first, count, head, rows, H)
            score *= _scalar_decay(inside, rows, count, ACC)
            gradient *= tl.exp2((last - inside).to(ACC))[:, None]
        else:
            score = tl.where(rows[:, None] >= rows[None, :], score, 0.0)
        score = tl.trans(score.to(output_gradient.dtype))
        gradient = _dot(score, output_gradient, gradient, PRECISION)
    _store_rows(dv, gradient, first, head, rows, rows < count, values, H, V)


@_autotune([({"BV": 64}, 2, 3), ({"BV": 64}, 4, 3)], key=["V", "C"])
@triton.jit(do_not_specialize=["T"])
def score_gradients_kernel(
    v,
    do,
    dscores,
    scale: tl.float64,
    T,
    spans,
    H: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BV: tl.constexpr,
):
    """dA = tril(scale · dO_n V_nᵀ), kept in fp32, for vector gates."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    first, count = _chunk_span(chunk, T, spans, C)
    if count <= 0:
        return
    rows = tl.arange(0, C)
    gradient = tl.zeros([C, C], dtype=ACC)
    for tile in range(0, tl.cdiv(V, BV)):
        values = tile * BV + tl.arange(0, BV)
        value = _load_rows(v, first, head, rows, rows < count, values, H, V)
        output_gradient = _load_rows(do, first, head, rows, rows < count, values, H, V)
        gradient = _dot(output_gradient, tl.trans(value), gradient, PRECISION)
    gradient = tl.where(rows[:, None] >= rows[None, :], gradient * tl.full([1, 1], scale, ACC), 0.0)
    _store_rows(dscores, gradient, first, head, rows, rows < count, rows, H, C)


@_autotune(_SUB_CHUNK_TILES, key=["K", "C"])
@triton.jit(do_not_specialize=["T"])
def intra_gradients_kernel(
    q,
    k,
    g,
    dscores,
    dq,
    dk,
    T,
    spans,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    SUB: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """dQ and dK through the scores of vector gates, for the rows of one sub-chunk, pairs s = t left out; fp32.

        dq_t = Σ_{s < t} dA_ts k_s exp(G_t − G_s)        dk_s = Σ_{t > s} dA_ts q_t exp(G_t − G_s)

    Products with other sub-chunks are anchored at the start of this one (dQ) and at its end (dK), the sub-chunk's own
    pairs are elementwise, as in `scores_kernel`. The pairs s = t know no gate: `query_key_gradients_kernel` adds them
    after the gate's gradient is taken, where they would only cancel.
    """
    tiles: tl.constexpr = tl.cdiv(K, BK)
    subs: tl.constexpr = C // SUB
    keys = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    block = tl.program_id(0) // tiles
    start = (block % subs) * SUB
    end = start + SUB
    head = tl.program_id(1)
    first, count = _chunk_span(block // subs, T, spans, C)
    if start >= count:
        return
    rows = tl.arange(0, C)
    own = tl.arange(0, SUB)
    valid_own = start + own < count
    gradients = dscores + (first * H + head) * C  # dA_ts lies at t·H·C + s

    query_gradient = tl.zeros([SUB, BK], dtype=ACC)
    if start > 0:
        gates = _gate_rows(g, first + 1, head, rows, rows + 1 < start, keys, ACC, H, K)
        key = _load_rows(k, first, head, rows, rows < start, keys, H, K).to(ACC)
        key *= tl.exp2(tl.cumsum(gates, axis=0, reverse=True))
        pairs = tl.load(
            gradients + (start + own)[:, None] * (H * C) + rows[None, :],
            mask=valid_own[:, None] & (rows < start)[None, :],
            other=0.0,
        )
        query_gradient = _dot(pairs, key, query_gradient, PRECISION)
        gates = _gate_rows(g, first + start, head, own, valid_own, keys, ACC, H, K)
        query_gradient *= tl.exp2(tl.cumsum(gates, axis=0))
    exponent = tl.zeros([SUB, BK], dtype=ACC)
    for i in range(0, SUB):
        s = SUB - 1 - i
        valid = start + s < count
        pairs = tl.load(gradients + (start + own) * (H * C) + start + s, mask=valid_own & (own > s), other=0.0)
        key_row = _load_row(k, first + start + s, head, valid, keys, H, K).to(ACC)
        query_gradient += pairs[:, None] * key_row[None, :] * tl.exp2(exponent)
        gate_row = _gate_row(g, first + start + s, head, valid, keys, ACC, H, K)
        exponent += tl.where(own[:, None] >= s, gate_row[None, :], 0.0)
    _store_rows(dq, query_gradient, first + start, head, own, valid_own, keys, H, K)

    key_gradient = tl.zeros([SUB, BK], dtype=ACC)
    if end < count:
        later = (rows >= end) & (rows < count)
        gates = _gate_rows(g, first, head, rows, later, keys, ACC, H, K)
        query = _load_rows(q, first, head, rows, later, keys, H, K).to(ACC)
        query *= tl.exp2(tl.cumsum(gates, axis=0))
        pairs = tl.load(gradients + rows[None, :] * (H * C) + (start + own)[:, None], mask=later[None, :], other=0.0)
        key_gradient = _dot(pairs, query, key_gradient, PRECISION)
        gates = _gate_rows(g, first + start + 1, head, own, own + 1 < SUB, keys, ACC, H, K)
        key_gradient *= tl.exp2(tl.cumsum(gates, axis=0, reverse=True))
    exponent = tl.zeros([SUB, BK], dtype=ACC)
    for t in range(0, SUB):
        valid = start + t < count
        gate_row = _gate_row(g, first + start + t, head, valid, keys, ACC, H, K)
        exponent += tl.where(own[:, None] < t, gate_row[None, :], 0.0)
        pairs = tl.load(gradients + (start + t) * (H * C) + start + own, mask=valid & (own < t), other=0.0)
        query_row = _load_row(q, first + start + t, head, valid, keys, H, K).to(ACC)
        key_gradient += pairs[:, None] * query_row[None, :] * tl.exp2(exponent)
    _store_rows(dk, key_gradient, first + start, head, own, valid_own, keys, H, K)


@_autotune([({"BV": 32}, 4, 2), ({"BV": 64}, 4, 2), ({"BV": 64}, 8, 2)], key=["K", "V", "C", "GATE"])
@triton.jit(do_not_specialize=["T"])
def query_key_gradients_kernel(
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
    dg,
    scale: tl.float64,
    T,
    spans,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """dQ, dK in total, and the gradient of the gate in closed form, without any state per token.

        dQ = scale (dO_n S_nᵀ) · exp(G) + dQ_intra       dK = dK_inter + dK_intra,   dK_inter = (V_n dS_nᵀ) · exp(R)
        dg_t = Σ_{s ≥ t} (q_s dq_s − k_s dk_intra_s) + Σ_{s < t} k_s dk_inter_s + exp(G_last) Σ_V S_n · dS_n

    The second line is the paper's dg = reverse cumsum of q·dq − k·dk (appendix A, eq. for d log α) within a chunk
    plus the constant of the chunk, e = exp(G_last) Σ_V S_n · dS_n + Σ_s k_s dk_inter_s, put together so that the inter
    terms do not cancel; q·dq and k·dk leave out the pairs s = t, which cancel exactly.
    dg is `[B·T, H, K]` for vector gates; for scalar gates `[B·T, H, cdiv(K, BK)]`, to be summed over the last axis.
    """
    tiles: tl.constexpr = tl.cdiv(K, BK)
    chunk = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    keys = tile * BK + tl.arange(0, BK)
    head = tl.program_id(1)
    first, count = _chunk_span(chunk, T, spans, C)
    if count <= 0:
        return
    rows = tl.arange(0, C)
    valid = rows < count
    factor = tl.full([1, 1], scale, ACC)
    query_gradient = tl.zeros([C, BK], dtype=ACC)
    key_gradient = tl.zeros([C, BK], dtype=ACC)
    score_gradient = tl.zeros([C, C], dtype=ACC)
    carried = tl.zeros([BK], dtype=ACC)
    for value_tile in range(0, tl.cdiv(V, BV)):
        values = value_tile * BV + tl.arange(0, BV)
        value = _load_rows(v, first, head, rows, valid, values, H, V)
        output_gradient = _load_rows(do, first, head, rows, valid, values, H, V)
        state = _load_state(states, chunk * H + head, keys, values, K, V)
        state_gradient = _load_state(state_gradients, chunk * H + head, keys, values, K, V)
        if GATE != "none":
            carried += tl.sum(state * state_gradient, axis=1)
        if GATE != "vector":
            score_gradient = _dot(output_gradient, tl.trans(value), score_gradient, PRECISION)
        state = tl.trans(state.to(value.dtype))
        query_gradient = _dot(output_gradient, state, query_gradient, PRECISION)
        state_gradient = tl.trans(state_gradient.to(value.dtype))
        key_gradient = _dot(value, state_gradient, key_gradient, PRECISION)
    query = _load_rows(q, first, head, rows, valid, keys, H, K)
    key = _load_rows(k, first, head, rows, valid, keys, H, K)
    query_gradient *= factor
    if GATE == "vector":
        query_gradient *= tl.exp2(_load_rows(prefix, first, head, rows, valid, keys, H, K))
        key_gradient *= tl.exp2(_load_rows(suffix, first, head, rows, valid, keys, H, K))
        carried *= tl.exp2(_load_row(prefix, first + count - 1, head, True, keys, H, K))
        diagonal = tl.load(dscores + ((first + rows) * H + head) * C + rows, mask=valid, other=0.0)
        query_gradient += _load_rows(intra_dq, first, head, rows, valid, keys, H, K)
        intra = _load_rows(intra_dk, first, head, rows, valid, keys, H, K)
    else:
        score_gradient *= factor
        diagonal = tl.sum(tl.where(rows[:, None] == rows[None, :], score_gradient, 0.0), axis=1)
        if GATE == "scalar":
            inside, last = _load_scalar_gate(prefix, first, count, head, rows, H)
            query_gradient *= tl.exp2(inside.to(ACC))[:, None]
            key_gradient *= tl.exp2((last - inside).to(ACC))[:, None]
            carried *= tl.exp2(last.to(ACC))
            score_gradient *= _scalar_decay(inside, rows, count, ACC)
        pairs = tl.where(rows[:, None] > rows[None, :], score_gradient, 0.0).to(query.dtype)
        query_gradient = _dot(pairs, key, query_gradient, PRECISION)
        intra = _dot(tl.trans(pairs), query, tl.zeros([C, BK], dtype=ACC), PRECISION)
    if GATE != "none":
        later = query * query_gradient - key * intra
        earlier = key * key_gradient
        if GATE == "vector":
            before = tl.gather(earlier, tl.broadcast_to(tl.maximum(rows - 1, 0)[:, None], [C, BK]), axis=0)
            before = tl.where(rows[:, None] > 0, before, 0.0)
            gate_gradient = tl.cumsum(later, axis=0, reverse=True) + tl.cumsum(before, axis=0) + carried[None, :]
            _store_rows(dg, gate_gradient, first, head, rows, valid, keys, H, K)
        else:
            past = tl.where(rows[:, None] > rows[None, :], tl.sum(earlier, axis=1)[None, :], 0.0)
            gate_gradient = tl.cumsum(tl.sum(later, axis=1), axis=0, reverse=True) + tl.sum(past, axis=1)
            gate_gradient += tl.sum(carried, axis=0)
            pointers = dg + ((first + rows) * H + head) * tiles + tile
            tl.store(pointers, gate_gradient.to(dg.dtype.element_ty), mask=valid)
    query_gradient += diagonal[:, None] * key
    key_gradient += intra + diagonal[:, None] * query
    _store_rows(dq, query_gradient, first, head, rows, valid, keys, H, K)
    _store_rows(dk, key_gradient, first, head, rows, valid, keys, H, K)
