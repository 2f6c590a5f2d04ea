"""Causal softmax attention with rotary positions, over the whole past or a sliding window.

Like every token mixer of a language model here, it is called as `mixer(x, state=None, keep_state=False)` on
`[batch, length, hidden_size]` and returns the mixed tokens and, with `keep_state`, what to pass as `state` in order to
continue behind them: for decoding token by token, and for truncated backpropagation through time.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError


class Attention(nn.Module):
    """Multi-head causal softmax attention, `[B, T, hidden_size]` to the same shape, without biases.

        o_t = Σ_s softmax_s(q_t · k_s / √K) v_s   over s ≤ t, with a window over t - window < s ≤ t

    Queries and keys are rotated by their position (see `rotary`). With a window, time and memory grow linearly with
    the length, and the state holds only the `window - 1` latest keys and values that a next token can see.

    Vaswani et al. (2017), section 3.2; as the "Transformer++" baseline of Yang et al. (2023), and in the
    sliding-window hybrid of Yang et al. (2024).
    """

    def __init__(
        self, hidden_size: int, num_heads: int, *, window: int | None = None, rotary_base: float = 10000.0
    ) -> None:
        super().__init__()
        head_size = size_of_head(hidden_size, num_heads, "attention's hidden_size")
        if head_size % 2:
            raise UserError(
                f"rotary positions turn pairs of channels: hidden_size/num_heads must be even "
                f"(given: {hidden_size}/{num_heads})"
            )
        if window is not None and window < 1:
            raise UserError(f"an attention window holds at least 1 token, the present one (given: {window})")
        self.num_heads = num_heads
        self.window = window
        self.rotary_base = rotary_base
        self.query, self.key, self.value, self.output = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )

    def forward(
        self, x: Tensor, state: dict[str, Any] | None = None, keep_state: bool = False
    ) -> tuple[Tensor, dict[str, Any] | None]:
        position = 0 if state is None else state["position"]
        q, k, v = (split_heads(layer(x), self.num_heads) for layer in (self.query, self.key, self.value))
        q, k = (rotary(t, position, self.rotary_base) for t in (q, k))
        q, k, v = (rearrange(t, "b t h k -> b h t k") for t in (q, k, v))
        if state is not None:
            k, v = torch.cat([state["keys"], k], dim=2), torch.cat([state["values"], v], dim=2)
        if self.window is not None and x.shape[1] > self.window:
            o = _windowed_attention(q, k, v, self.window)
        else:
            o = _masked_attention(q, k, v, self.window)
        y = self.output(rearrange(o, "b h t k -> b t (h k)"))
        if not keep_state:
            return y, None
        first = 0 if self.window is None else max(k.shape[2] - (self.window - 1), 0)
        return y, {"keys": k[:, :, first:], "values": v[:, :, first:], "position": position + x.shape[1]}

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window}, rotary_base={self.rotary_base}"


def rotary(x: Tensor, position: int = 0, base: float = 10000.0) -> Tensor:
    """Turn each pair of channels (i, i + K/2) of `[B, T, H, K]` by (position + t) · base^(-2i/K); same shape and dtype.

    The product of a rotated query and a rotated key then depends on their positions only through the distance.
    Su et al., "RoFormer" (2021), section 3.2.
    """
    length, half = x.shape[1], x.shape[3] // 2
    # In float64, where an angle of a million radians still has ten digits behind the point.
    positions = torch.arange(position, position + length, device=x.device, dtype=torch.float64)
    angle = positions[:, None] * base ** (torch.arange(half, device=x.device, dtype=torch.float64) / -half)
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(wide)[:, None, :] for t in (angle.cos(), angle.sin()))  # [T, 1, K/2]
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def size_of_head(size: int, num_heads: int, what: str) -> int:
    """Channels of one head; raises UserError, naming `what`, where the heads do not divide `size`."""
    if num_heads < 1 or size < 1 or size % num_heads:
        raise UserError(f"{what} must be a multiple of num_heads (given: {size} and {num_heads} heads)")
    return size // num_heads


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`[B, T, H·K]` to `[B, T, H, K]`."""
    return rearrange(x, "b t (h k) -> b t h k", h=num_heads)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """q `[B, H, T, K]` are the last of the P + T tokens of k and v `[B, H, P+T, K]`; cost T·(P + T)."""
    length, num_keys = q.shape[2], k.shape[2]
    past = num_keys - length
    everything_is_visible = window is None or num_keys <= window
    if everything_is_visible and past == 0:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    if everything_is_visible and length == 1:
        return functional.scaled_dot_product_attention(q, k, v)
    row = past + torch.arange(length, device=q.device)[:, None]
    column = torch.arange(num_keys, device=q.device)
    visible = column <= row
    if window is not None:
        visible &= column > row - window
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """As `_masked_attention`, in blocks of `window` queries that see their own and the previous block; cost T·2·window.

    The past is at most `window - 1` tokens.
    """
    batch_size, _, length, _ = q.shape
    past = k.shape[2] - length
    num_blocks = -(-length // window)
    tail = num_blocks * window - length
    q = functional.pad(q, (0, 0, 0, tail))
    k, v = (functional.pad(t, (0, 0, window - past, tail)) for t in (k, v))
    # Blocks come first and share their masks over sequences and heads: queries [n, B·H, w, K], keys [n, B·H, 2w, K].
    q, k, v = (rearrange(t, "b h (n w) k -> n (b h) w k", w=window) for t in (q, k, v))
    k, v = (torch.cat([t[:-1], t[1:]], dim=2) for t in (k, v))
    row = torch.arange(window, device=q.device)[:, None]
    column = torch.arange(2 * window, device=q.device)  # key `column` of a block is token `column - window` of it
    visible = ((column > row) & (column <= row + window)).repeat(num_blocks, 1, 1, 1)
    visible[0] &= column >= window - past  # before the first block there are padding and the past
    o = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return rearrange(o, "n (b h) w k -> b h (n w) k", b=batch_size)[:, :, :length]
