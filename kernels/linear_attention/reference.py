"""Gated linear attention by its definition: the recurrence, one token after the other."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.common import accumulation_dtype


def gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_tᵀ v_t and o_t = scale · q_t S_t; arguments and results as those of `gla`.

    Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (ICML 2024), equation 3.
    Differentiable by autograd to any order; every other path is held against it in float64.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        results = []
        for i, (start, end) in enumerate(pairwise(bounds)):
            gate = g if g is None or g.ndim == 1 else g[:, start:end]
            state = None if initial_state is None else initial_state[i : i + 1]
            tokens = (x[:, start:end] for x in (q, k, v))
            results.append(gla_reference(*tokens, gate, scale=scale, initial_state=state, output_final_state=True))
        outputs, states = zip(*results, strict=True)
        return torch.cat(outputs, dim=1), torch.cat(states) if output_final_state else None

    batch, length, heads, key_dim = q.shape
    scale = key_dim**-0.5 if scale is None else scale
    dtype = accumulation_dtype(q.dtype)
    state = torch.zeros(batch, heads, key_dim, v.shape[-1], dtype=dtype, device=q.device)
    if initial_state is not None:
        state = initial_state.to(dtype)
    gates = torch.zeros(heads, dtype=dtype, device=q.device) if g is None else g.to(dtype)
    # [H] and [B, T, H] are one gate for all key channels of a head.
    decay = gates.exp() if gates.ndim == 4 else gates.exp().expand(batch, length, heads).unsqueeze(-1)
    queries, keys, values = (x.to(dtype) for x in (q, k, v))
    outputs = []
    for t in range(length):
        state = decay[:, t, :, :, None] * state + keys[:, t, :, :, None] * values[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", queries[:, t], state))
    return torch.stack(outputs, dim=1).to(v.dtype), state if output_final_state else None
