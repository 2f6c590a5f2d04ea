"""Linear attention with and without forgetting: GLA, RetNet's retention, and the plain kind.

All are token mixers, called as `mixer(x, state=None, keep_state=False)` (see `shared.nn.attention`); their state is a
matrix `[B, H, K, V]` a layer, however long the past is.

The parts that other recurrent mixers use too are here as well: feature maps, the normalization of heads, and the short
convolution as a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from kernels.linear_attention import gla, gla_step
from kernels.normalization import rms_norm_gated
from kernels.short_convolution import short_convolution
from shared.config import UserError
from shared.nn.attention import rotary, size_of_head, split_heads

Gate = Literal["vector", "scalar", "constant", "none"]

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu": lambda x: functional.elu(x) + 1,
    "relu": functional.relu,
    "silu": functional.silu,
}


class GatedLinearAttention(nn.Module):
    """Linear attention with a data-dependent forget gate, `[B, T, hidden_size]` to the same shape.

        q, k = x W_q, x W_k       v = x W_v       α = sigmoid(x W_1 W_2 + b)^(1/τ)
        S_t = diag(α_t) S_{t-1} + k_tᵀ v_t        o_t = K^(-1/2) q_t S_t                 per head
        y = (RMSNorm(o) ⊙ Swish(x W_r)) W_o

    d_k = expand_key · hidden_size and d_v = expand_value · hidden_size, divided among the heads; W_1 W_2 has rank
    `gate_low_rank`, and `gate_normalizer` τ makes forgetting slow. No positions, no feature map.

    `gate` is the paper's ablation of table 4: "vector" (GLA, a gate per key channel), "scalar" (x W + b, one per head),
    "constant" (RetNet's γ_h = 1 - 2^(-5-h), h from 0) or "none". `short_convolution` is the width of an optional
    depthwise convolution with SiLU behind W_q, W_k and W_v; `output_gate=False` leaves Swish(x W_r) out.

    Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (ICML 2024), section 4.4. The
    heads are normalized by RMSNorm and W_r has no bias, as in the published code.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        *,
        expand_key: float = 0.5,
        expand_value: float = 1.0,
        gate: Gate = "vector",
        gate_low_rank: int = 16,
        gate_normalizer: float = 16.0,
        short_convolution: int | None = None,
        output_gate: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        key_size, value_size = expanded(hidden_size, expand_key), expanded(hidden_size, expand_value)
        size_of_head(key_size, num_heads, "expand_key · hidden_size")
        value_head_size = size_of_head(value_size, num_heads, "expand_value · hidden_size")
        self.num_heads = num_heads
        self.gate_kind = gate
        self.gate_normalizer = gate_normalizer
        self.query = nn.Linear(hidden_size, key_size, bias=False)
        self.key = nn.Linear(hidden_size, key_size, bias=False)
        self.value = nn.Linear(hidden_size, value_size, bias=False)
        self.convolution = None
        if short_convolution is not None:
            sizes = (key_size, key_size, value_size)
            self.convolution = nn.ModuleList(ShortConvolution(size, short_convolution, "silu") for size in sizes)
        match gate:
            case "vector":
                self.gate = nn.Sequential(
                    nn.Linear(hidden_size, gate_low_rank, bias=False), nn.Linear(gate_low_rank, key_size)
                )
            case "scalar":
                self.gate = nn.Linear(hidden_size, num_heads)
            case "constant" | "none":
                self.gate = None
            case _:
                raise UserError(f"unknown gate {gate!r} of linear attention; choose vector, scalar, constant or none")
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
        o, memory = recur(q, k, v, self.log_gate(x), None if state is None else state["memory"], keep_state)
        y = self.output(self.norm(o, None if self.output_gate is None else self.output_gate(x)))
        return y, {"memory": memory, "convolution": histories} if keep_state else None

    def log_gate(self, x: Tensor) -> Tensor | None:
        """log α: `[B, T, H, K]` (vector), `[B, T, H]` (scalar), `[H]` (constant) or None."""
        if self.gate_kind == "none":
            return None
        if self.gate is None:
            return retention_log_decay(self.num_heads, x)
        logits = self.gate(x)
        # In float32: a small log gate is added up over many tokens.
        g = functional.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / self.gate_normalizer
        return g if self.gate_kind == "scalar" else split_heads(g, self.num_heads)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, gate={self.gate_kind!r}, gate_normalizer={self.gate_normalizer}"


class Retention(nn.Module):
    """RetNet's multi-scale retention, `[B, T, hidden_size]` to the same shape.

        S_t = γ_h S_{t-1} + rotate(k_t)ᵀ v_t,   γ_h = 1 - 2^(-5-h), h from 0        o_t = K^(-1/2) rotate(q_t) S_t
        y = (RMSNorm(o) ⊙ Swish(x W_g)) W_o

    Keys and queries turn with their position (`rotary`); d_v = 2 d by default, as published.
    Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models" (2023), equations 5 to 8.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, expand_key: float = 1.0, expand_value: float = 2.0) -> None:
        super().__init__()
        key_size, value_size = expanded(hidden_size, expand_key), expanded(hidden_size, expand_value)
        if size_of_head(key_size, num_heads, "expand_key · hidden_size") % 2:
            raise UserError(f"rotary positions turn pairs of channels: {key_size} keys in {num_heads} heads are odd")
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, key_size, bias=False)
        self.key = nn.Linear(hidden_size, key_size, bias=False)
        self.value = nn.Linear(hidden_size, value_size, bias=False)
        self.output_gate = nn.Linear(hidden_size, value_size, bias=False)
        self.norm = HeadNorm(size_of_head(value_size, num_heads, "expand_value · hidden_size"))
        self.output = nn.Linear(value_size, hidden_size, bias=False)

    def forward(
        self, x: Tensor, state: dict[str, Any] | None = None, keep_state: bool = False
    ) -> tuple[Tensor, dict[str, Any] | None]:
        position, memory = (0, None) if state is None else (state["position"], state["memory"])
        q, k, v = (split_heads(layer(x), self.num_heads) for layer in (self.query, self.key, self.value))
        q, k = rotary(q, position), rotary(k, position)
        o, memory = recur(q, k, v, retention_log_decay(self.num_heads, x), memory, keep_state)
        y = self.output(self.norm(o, self.output_gate(x)))
        return y, {"memory": memory, "position": position + x.shape[1]} if keep_state else None

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class LinearAttention(nn.Module):
    """Plain linear attention, `[B, T, hidden_size]` to the same shape: nothing is ever forgotten.

        S_t = S_{t-1} + φ(k_t)ᵀ v_t        o_t = K^(-1/2) φ(q_t) S_t        y = o W_o

    φ is "identity", "elu" (1 + ELU) or "relu". `normalize` divides o_t by K^(-1/2) φ(q_t) · Σ_{s≤t} φ(k_s), so that the
    weights of the values sum to one; it needs a φ without negative values.
    Katharopoulos et al., "Transformers are RNNs" (ICML 2020), equations 9 and 16 to 20.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        feature_map: Literal["identity", "elu", "relu"] = "identity",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        size_of_head(hidden_size, num_heads, "linear attention's hidden_size")
        if feature_map not in ("identity", "elu", "relu"):
            raise UserError(f"unknown feature map {feature_map!r} of linear attention; choose identity, elu or relu")
        if normalize and feature_map == "identity":
            raise UserError("normalized linear attention divides by a sum of φ(k): choose feature_map elu or relu")
        self.num_heads = num_heads
        self.feature_map = feature_map
        self.normalize = normalize
        self.query, self.key, self.value, self.output = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )

    def forward(
        self, x: Tensor, state: dict[str, Any] | None = None, keep_state: bool = False
    ) -> tuple[Tensor, dict[str, Any] | None]:
        q, k, v = (split_heads(layer(x), self.num_heads) for layer in (self.query, self.key, self.value))
        q, k = (FEATURE_MAPS[self.feature_map](t) for t in (q, k))
        if self.normalize:
            # A channel of ones among the values collects the normalizer in the same recurrence: [B, T, H, V + 1].
            v = functional.pad(v, (0, 1), value=1.0)
        o, memory = recur(q, k, v, None, None if state is None else state["memory"], keep_state)
        if self.normalize:
            o, total = o[..., :-1], o[..., -1:]
            o = o / total.clamp_min(1e-6)
        y = self.output(rearrange(o, "b t h v -> b t (h v)"))
        return y, {"memory": memory} if keep_state else None

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, feature_map={self.feature_map!r}, normalize={self.normalize}"


class HeadNorm(nn.Module):
    """RMSNorm of each head with one weight a channel, gated: o `[B, T, H, V]`, gate `[B, T, H·V]`, to `[B, T, H·V]`."""

    def __init__(self, head_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(head_size))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        gate = None if gate is None else split_heads(gate, o.shape[2])
        return rearrange(rms_norm_gated(o, gate, self.weight, eps=self.eps), "b t h v -> b t (h v)")


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over the tokens of `[B, T, channels]`; see `kernels.short_convolution`.

    Called as a token mixer is, with the last `width - 1` inputs as its state. Begins as PyTorch's convolutions do,
    uniform in ±width^(-1/2).
    """

    def __init__(
        self, channels: int, width: int, activation: Literal["silu"] | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"a short convolution has a width of at least 1 (given: {width})")
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, state: Tensor | None = None, keep_state: bool = False) -> tuple[Tensor, Tensor | None]:
        return short_convolution(
            x,
            self.weight,
            bias=self.bias,
            activation=self.activation,
            initial_state=state,
            output_final_state=keep_state,
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.weight.shape[1]}, activation={self.activation!r}"


def convolve_each(
    convolutions: nn.ModuleList, inputs: list[Tensor], states: tuple[Tensor, ...] | None, keep_state: bool
) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    """Each input through its own convolution: the outputs, and the states to continue from."""
    before = states or [None] * len(inputs)
    pairs = [conv(x, state, keep_state) for conv, x, state in zip(convolutions, inputs, before, strict=True)]
    return [y for y, _ in pairs], tuple(state for _, state in pairs)


def recur(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, memory: Tensor | None, keep_state: bool
) -> tuple[Tensor, Tensor | None]:
    """`gla` behind `memory`, by the operator for a single token where one is decoded."""
    if q.shape[1] == 1 and memory is not None:
        gate = g if g is None or g.ndim == 1 else g[:, 0]
        o, memory = gla_step(q[:, 0], k[:, 0], v[:, 0], gate, state=memory)
        return o[:, None], memory
    return gla(q, k, v, g, initial_state=memory, output_final_state=keep_state)


def retention_log_decay(num_heads: int, like: Tensor) -> Tensor:
    """log γ_h = log(1 - 2^(-5-h)), h = 0 … num_heads - 1, `[num_heads]` where `like` is. Sun et al. (2023), eq. 8."""
    # Computed anew in every call: a buffer would be lost where a model is built on the meta device and filled later.
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.log1p(-torch.exp2(-5 - torch.arange(num_heads, device=like.device, dtype=dtype)))


def expanded(size: int, factor: float) -> int:
    """`factor · size` as a whole number; raises UserError where it is none."""
    result = factor * size
    if result != int(result):
        raise UserError(f"{factor} times hidden_size {size} is no whole number; choose sizes that fit")
    return int(result)
