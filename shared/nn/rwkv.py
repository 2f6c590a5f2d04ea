"""RWKV-4: the WKV operator, which is linear in the length, the time mix around it, and the channel mix.

Both mixes are token mixers, called as `mixer(x, state=None, keep_state=False)` (see `shared.nn.attention`). The
published model alternates them, each in a pre-norm residual block of its own:

    LanguageModel(
        vocab_size, 64, 2 * n, feed_forward_size=0,
        mixer=lambda i: (RWKV4ChannelMix if i % 2 else RWKV4TimeMix)(64, layer=i // 2, num_layers=n),
    )

It has LayerNorm where the blocks here have RMSNorm. The time mix alone, with the model's SwiGLU behind it, is the same
token mixer with another feed-forward layer.

Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (EMNLP Findings 2023).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from shared.config import UserError

# What the backward pass computes at a time, 128 KiB a tensor in float32, stays in a core's cache.
CHUNK_ELEMENTS = 2**15


class RWKV4TimeMix(nn.Module):
    """RWKV-4's token mixer, `[B, T, hidden_size]` to the same shape, without biases.

        r, k, v = (μ ⊙ x_t + (1 - μ) ⊙ x_{t-1}) W    each with its own μ and W, x_0 = 0
        y_t = (sigmoid(r_t) ⊙ wkv_t) W_o             `wkv` of k and v, decay rates w > 0 and bonus u a channel

    The state is the last input and two numbers a channel. μ, w and u begin as published, which depends on the depth:
    this is layer `layer` = 0 … num_layers - 1 of them. The linear maps begin as those of other mixers do, where the
    published code begins W_r, W_k and W_o at 0.

    Peng et al. (2023), section 3.1, and the appendix on parameter initialization.
    """

    def __init__(self, hidden_size: int, *, layer: int = 0, num_layers: int = 1) -> None:
        super().__init__()
        self.depth = depth_of_layer(layer, num_layers)
        self.mix = nn.Parameter(torch.empty(3, hidden_size))  # μ of r, k and v
        self.log_decay_rate = nn.Parameter(torch.empty(hidden_size))
        self.bonus = nn.Parameter(torch.empty(hidden_size))
        self.receptance, self.key, self.value, self.output = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """μ, w and u; the linear maps reset themselves."""
        from_input, from_end = self.depth
        size = self.bonus.shape[0]
        channel = torch.arange(size, device=self.bonus.device)
        with torch.no_grad():
            self.mix.copy_((channel / size) ** torch.tensor([from_end / 2, from_end, from_end])[:, None].to(self.mix))
            self.mix[2] += 0.3 * from_input
            self.log_decay_rate.copy_(-5 + 8 * (channel / max(size - 1, 1)) ** (0.7 + 1.3 * from_input))
            self.bonus.copy_(math.log(0.3) + ((channel + 1) % 3 - 1) / 2)

    def forward(
        self, x: Tensor, state: dict[str, Any] | None = None, keep_state: bool = False
    ) -> tuple[Tensor, dict[str, Any] | None]:
        previous, memory = (None, None) if state is None else (state["previous"], state["memory"])
        r, k, v = shifted(x, previous, self.mix)
        w = torch.exp(self.log_decay_rate)
        o, memory = wkv(self.key(k), self.value(v), w, self.bonus, initial_state=memory)
        y = self.output(torch.sigmoid(self.receptance(r)) * o)
        return y, {"previous": x[:, -1], "memory": memory} if keep_state else None


class RWKV4ChannelMix(nn.Module):
    """RWKV-4's feed-forward layer, which sees the token before too: `[B, T, hidden_size]` to the same shape, no biases.

        r, k = (μ ⊙ x_t + (1 - μ) ⊙ x_{t-1}) W       each with its own μ and W; k has 4 · hidden_size channels
        y_t = sigmoid(r_t) ⊙ (max(k_t, 0)² W_v)

    The state is the last input. μ begins as in `RWKV4TimeMix`.
    Peng et al. (2023), section 3.1.
    """

    def __init__(self, hidden_size: int, *, layer: int = 0, num_layers: int = 1) -> None:
        super().__init__()
        self.depth = depth_of_layer(layer, num_layers)
        self.mix = nn.Parameter(torch.empty(2, hidden_size))  # μ of r and k
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.value = nn.Linear(4 * hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """μ; the linear maps reset themselves."""
        size = self.mix.shape[1]
        with torch.no_grad():
            self.mix.copy_((torch.arange(size, device=self.mix.device) / size) ** self.depth[1])

    def forward(
        self, x: Tensor, state: dict[str, Any] | None = None, keep_state: bool = False
    ) -> tuple[Tensor, dict[str, Any] | None]:
        r, k = shifted(x, None if state is None else state["previous"], self.mix)
        y = torch.sigmoid(self.receptance(r)) * self.value(torch.relu(self.key(k)).square())
        return y, {"previous": x[:, -1]} if keep_state else None


def wkv(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, *, initial_state: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Average of the values so far, each weighted by e^key, fading at the rate w, the present one by the bonus u too.

        wkv_t = (Σ_{i<t} e^(-(t-1-i)w + k_i) v_i + e^(u + k_t) v_t) / (Σ_{i<t} e^(-(t-1-i)w + k_i) + e^(u + k_t))

    k, v `[B, T, D]`; w ≥ 0 and u `[D]`. Returns wkv `[B, T, D]` in the dtype of v, and the state to go on from: the
    average s and the logarithm ℓ of the sum of the weights behind the last token, both `[B, D]` and at least float32;
    before any token s = 0 and ℓ = -∞. Both follow recurrences in which nothing overflows, however large the keys:

        ℓ_t = log(e^(ℓ_{t-1} - w) + e^(k_t))
        s_t = s_{t-1} + sigmoid(k_t - ℓ_{t-1} + w) (v_t - s_{t-1})
        wkv_t = s_{t-1} + sigmoid(k_t - ℓ_{t-1} + u) (v_t - s_{t-1})

    Differentiable in everything. Peng et al. (2023), section 3.1 (the WKV operator); with the scaled numerator a and
    denominator b and the running maximum p of its appendix (the RNN cell), s = a/b and ℓ = p + log b.
    """
    dtype = torch.promote_types(torch.promote_types(k.dtype, v.dtype), torch.float32)
    if initial_state is None:
        average = torch.zeros_like(k[:, 0], dtype=dtype)
        log_weight = torch.full_like(average, -math.inf)
    else:
        average, log_weight = initial_state
    y, average, log_weight, _, _ = _wkv(*(t.to(dtype) for t in (k, v, w, u, average, log_weight)))
    return y.to(v.dtype), (average, log_weight)


# One operator to autograd and the compiler: a graph of its steps would cost many times their arithmetic.
@torch.library.custom_op("reprise::wkv", mutates_args=())
def _wkv(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, average: Tensor, log_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """wkv `[B, T, D]`, the final s and ℓ `[B, D]`, and all of them from the initial ones on, `[B, T+1, D]`."""
    averages, log_weights = (k.new_empty(k.shape[0], k.shape[1] + 1, k.shape[2]) for _ in range(2))
    averages[:, 0], log_weights[:, 0] = average, log_weight
    for before, now, key in zip(*_steps(log_weights), k.unbind(1), strict=True):
        torch.logaddexp(before - w, key, out=now)
    logits = k - log_weights[:, :-1]
    shares = torch.sigmoid(logits + w).unbind(1)
    for before, now, value, share in zip(*_steps(averages), v.unbind(1), shares, strict=True):
        torch.lerp(before, value, share, out=now)
    y = torch.lerp(averages[:, :-1], v, torch.sigmoid_(logits.add_(u)))
    return y, averages[:, -1].clone(), log_weights[:, -1].clone(), averages, log_weights


@_wkv.register_fake
def _(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, average: Tensor, log_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch_size, length, size = k.shape
    shapes = (k.shape, average.shape, average.shape, *[(batch_size, length + 1, size)] * 2)
    return tuple(k.new_empty(shape) for shape in shapes)


@torch.library.custom_op("reprise::wkv_backward", mutates_args=())
def _wkv_backward(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    averages: Tensor,
    log_weights: Tensor,
    dy: Tensor,
    daverage: Tensor,
    dlog_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and the initial s and ℓ, by the adjoint recurrences of s and ℓ, a chunk at a time."""
    dk, dv = torch.empty_like(dy), torch.empty_like(dy)
    dw, du = torch.zeros_like(w), torch.zeros_like(u)
    ds_last, dl_last = daverage, dlog_weight
    for chunk in reversed(_chunks(k)):
        logits = k[:, chunk] - log_weights[:, chunk]
        logits_w, logits_u = logits + w, logits + u
        share, present = torch.sigmoid(logits_w), torch.sigmoid(logits_u)
        # 1 - sigmoid(x), which would lose its digits where the share is almost 1.
        kept, absent = torch.sigmoid_(logits_w.neg_()), torch.sigmoid_(logits_u.neg_())
        novelty = v[:, chunk] - averages[:, chunk]

        ds_first, ds = _adjoint(absent * dy[:, chunk], kept, ds_last)
        from_present = present * dy[:, chunk]
        dv[:, chunk] = torch.addcmul(from_present, share, ds)
        dlogits_u = from_present.mul_(absent).mul_(novelty)
        dlogits_w = novelty.mul_(share).mul_(kept).mul_(ds)
        dlogits = dlogits_u + dlogits_w

        dl_first, dl = _adjoint(-dlogits, kept, dl_last)
        dk[:, chunk] = torch.addcmul(dlogits, share, dl)
        dw += dlogits_w.addcmul_(kept, dl, value=-1).sum((0, 1))
        du += dlogits_u.sum((0, 1))
        ds_last, dl_last = ds_first, dl_first
    return dk, dv, dw, du, ds_last, dl_last


@_wkv_backward.register_fake
def _(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    averages: Tensor,
    log_weights: Tensor,
    dy: Tensor,
    daverage: Tensor,
    dlog_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t) for t in (dy, dy, w, u, daverage, dlog_weight))


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output[3:])


def _backward(
    ctx: torch.autograd.function.FunctionCtx,
    dy: Tensor | None,
    daverage: Tensor | None,
    dlog_weight: Tensor | None,
    *_unused: None,
) -> tuple[Tensor, ...]:
    # Read once: under activation checkpointing, every look at them would compute them anew.
    saved = ctx.saved_tensors
    k, first = saved[0], saved[0][:, 0]
    likes = ((dy, k), (daverage, first), (dlog_weight, first))
    gradients = (torch.zeros_like(like) if gradient is None else gradient for gradient, like in likes)
    return _wkv_backward(*saved, *(gradient.contiguous() for gradient in gradients))


_wkv.register_autograd(_backward, setup_context=_save_for_backward)


def _adjoint(direct: Tensor, kept: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states of a chunk: of the one before it `[B, D]`, and of those behind its tokens `[B, t, D]`.

    The state before token t has the gradient direct_t + kept_t · (that of the state behind it); `last` is that of the
    chunk's last state. `direct` `[B, t, D]` is overwritten.
    """
    steps, after = direct.unbind(1), last
    for step, factor in zip(reversed(steps), reversed(kept.unbind(1)), strict=True):
        after = torch.addcmul(step, factor, after, out=step)
    return after.clone(), torch.cat([direct[:, 1:], last[:, None]], dim=1)


def _steps(states: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """For every token the state before it and behind it, as views of `[B, T+1, D]`."""
    views = states.unbind(1)
    return views[:-1], views[1:]


def _chunks(k: Tensor) -> list[slice]:
    """Slices of the length of k."""
    size = max(CHUNK_ELEMENTS // max(k.shape[0] * k.shape[2], 1), 1)
    return [slice(start, min(start + size, k.shape[1])) for start in range(0, k.shape[1], size)]


def shifted(x: Tensor, previous: Tensor | None, mix: Tensor) -> tuple[Tensor, ...]:
    """Token shift μ ⊙ x_t + (1 - μ) ⊙ x_{t-1}, `[B, T, D]`, for each row μ of `mix` `[n, D]`.

    `previous` `[B, D]` is the token before the first, 0 by default. Peng et al. (2023), section 3.1 (token shift).
    """
    previous = torch.zeros_like(x[:, 0]) if previous is None else previous
    before = torch.cat([previous[:, None], x[:, :-1]], dim=1)
    change = x - before
    return tuple(torch.addcmul(before, change, row) for row in mix)


def depth_of_layer(layer: int, num_layers: int) -> tuple[float, float]:
    """From 0 in the first layer to 1 in the last, and from 1 to 1/num_layers; raises UserError outside of them."""
    if not 0 <= layer < num_layers:
        raise UserError(f"layers are counted from 0 to num_layers - 1 (given: layer {layer} of {num_layers})")
    return layer / max(num_layers - 1, 1), 1 - layer / num_layers
