"""DeltaNet: linear attention that overwrites the value bound to a key instead of adding to it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.delta_rule import delta_rule, delta_rule_step
from kernels.normalization import l2_norm
from shared.config import UserError
from shared.nn.attention import size_of_head, split_heads
from shared.nn.linear_attention import FEATURE_MAPS, HeadNorm, ShortConvolution, convolve_each, expanded

FeatureMap = Literal["silu", "relu", "elu"]
KeyNorm = Literal["l2", "l1"]


class DeltaNet(nn.Module):
    """The delta-rule layer, `[B, T, hidden_size]` to the same shape; a token mixer as in `shared.nn.attention`.

        q, k = norm(φ(conv(x W_q))), norm(φ(conv(x W_k)))      v = SiLU(conv(x W_v))      β = sigmoid(x W_β)
        S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ        o_t = K^(-1/2) S_tᵀ q_t    per head
        y = RMSNorm(o) W_o

    d_k = expand_key · hidden_size and d_v = expand_value · hidden_size, divided among the heads; one β a head. No
    biases, no positions. `short_convolution` is the width of the depthwise convolutions, None leaves them out.

    The arms of the paper's ablation: φ is `feature_map` "silu", "relu" or "elu" (1 + ELU); `norm` is "l2" or "l1",
    x / Σ|x|, which for a φ without negative values is the sum normalization of Schlag et al. (2021). Options beyond the
    paper's default: `output_gate` multiplies the normalized heads with Swish(x W_g), and `allow_negative_eigenvalues`
    doubles β, to (0, 2), so that the transition may also reflect along a key.

    Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (NeurIPS 2024), section
    3.3, with RMSNorm of the heads.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        expand_key: float = 1.0,
        expand_value: float = 1.0,
        short_convolution: int | None = 4,
        feature_map: FeatureMap = "silu",
        norm: KeyNorm = "l2",
        output_gate: bool = False,
        allow_negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if feature_map not in ("silu", "relu", "elu"):
            raise UserError(f"unknown feature map {feature_map!r} of DeltaNet; choose silu, relu or elu")
        if norm not in ("l2", "l1"):
            raise UserError(f"unknown norm {norm!r} of DeltaNet's keys; choose l2 or l1")
        key_size, value_size = expanded(hidden_size, expand_key), expanded(hidden_size, expand_value)
        size_of_head(key_size, num_heads, "expand_key · hidden_size")
        value_head_size = size_of_head(value_size, num_heads, "expand_value · hidden_size")
        self.num_heads = num_heads
        self.feature_map = feature_map
        self.key_norm = norm
        self.largest_beta = 2.0 if allow_negative_eigenvalues else 1.0
        self.query = nn.Linear(hidden_size, key_size, bias=False)
        self.key = nn.Linear(hidden_size, key_size, bias=False)
        self.value = nn.Linear(hidden_size, value_size, bias=False)
        self.beta = nn.Linear(hidden_size, num_heads, bias=False)
        self.convolution = None
        if short_convolution is not None:
            sizes = (key_size, key_size, value_size)
            self.convolution = nn.ModuleList(ShortConvolution(size, short_convolution) for size in sizes)
        self.output_gate = nn.Linear(hidden_size, value_size, bias=False) if output_gate else None
        self.norm = HeadNorm(value_head_size, norm_eps)
        self.output = nn.Linear(value_size, hidden_size, bias=False)

    def forward(
        self, x: Tensor, state: dict[str, Any] | None = None, keep_state: bool = False
    ) -> tuple[Tensor, dict[str, Any] | None]:
        projected = [self.query(x), self.key(x), self.value(x)]
        histories = None
        if self.convolution is not None:
            projected, histories = convolve_each(
                self.convolution, projected, None if state is None else state["convolution"], keep_state
            )
        q, k, v = (split_heads(t, self.num_heads) for t in projected)
        q, k, v = self._normalize(q), self._normalize(k), functional.silu(v)
        beta = self.largest_beta * torch.sigmoid(self.beta(x))  # [B, T, H]
        o, memory = _recur(q, k, v, beta, None if state is None else state["memory"], keep_state)
        y = self.output(self.norm(o, None if self.output_gate is None else self.output_gate(x)))
        return y, {"memory": memory, "convolution": histories} if keep_state else None

    def _normalize(self, x: Tensor) -> Tensor:
        features = FEATURE_MAPS[self.feature_map](x)
        if self.key_norm == "l2":
            return l2_norm(features)
        wide = features.to(torch.promote_types(x.dtype, torch.float32))
        return functional.normalize(wide, p=1.0, dim=-1).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, feature_map={self.feature_map!r}, norm={self.key_norm!r}, "
            f"largest_beta={self.largest_beta}"
        )


def _recur(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor | None, keep_state: bool
) -> tuple[Tensor, Tensor | None]:
    """`delta_rule` behind `memory`, by the operator for a single token where one is decoded."""
    if q.shape[1] == 1 and memory is not None:
        o, memory = delta_rule_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], state=memory)
        return o[:, None], memory
    return delta_rule(q, k, v, beta, initial_state=memory, output_final_state=keep_state)
