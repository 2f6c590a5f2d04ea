"""The delta rule, step by step: the definition that every faster path is held against.

Yang, Wang, Zhang, Shen and Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"
(NeurIPS 2024), section 2.2. The state S `[K, V]` has the key channels as rows; the paper writes its transpose.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.common import accumulation_dtype


def step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One token: u = β (v − Sᵀk),  S ← S + k uᵀ,  o = scale · Sᵀq, all in the type of the state.

    q, k `[B, H, K]`, v `[B, H, V]`, beta `[B, H]`, state `[B, H, K, V]`; returns o `[B, H, V]` and the new state.
    """
    # Autocast would otherwise multiply with the state in half precision.
    with torch.autocast(state.device.type, enabled=False):
        q, k, v, beta = (x.to(state.dtype) for x in (q, k, v, beta))
        u = beta[..., None] * (v - (k[..., None, :] @ state)[..., 0, :])
        state = state + k[..., :, None] * u[..., None, :]
        return scale * (q[..., None, :] @ state)[..., 0, :], state


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule as a loop over `step`: as `kernels.delta_rule.delta_rule`, on any device, differentiable twice."""
    (_, _, num_heads, key_dim), value_dim = q.shape, v.shape[-1]
    scale = key_dim**-0.5 if scale is None else scale
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    num_states = q.shape[0] if cu_seqlens is None else len(bounds) - 1
    if initial_state is None:
        initial_state = q.new_zeros(num_states, num_heads, key_dim, value_dim, dtype=accumulation_dtype(q.dtype))
    tokens = list(zip(q.unbind(1), k.unbind(1), v.unbind(1), beta.unbind(1), strict=True))
    outputs, final_states = [], []
    for i, (start, end) in enumerate(pairwise(bounds)):
        state = initial_state if cu_seqlens is None else initial_state[i : i + 1]
        for token in tokens[start:end]:
            o, state = step(*token, state, scale)
            outputs.append(o)
        final_states.append(state)
    return torch.stack(outputs, dim=1).to(v.dtype), torch.cat(final_states) if output_final_state else None
