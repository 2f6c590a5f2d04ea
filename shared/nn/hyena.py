"""Hyena: long convolutions with implicit filters between elementwise gates, and its multi-head form.

`Hyena` is a token mixer, called as `mixer(x, state=None, keep_state=False)` (see `shared.nn.attention`). A convolution
as long as its input has no state of constant size: the one here is the inputs so far, as in attention.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.nn.attention import size_of_head
from shared.nn.linear_attention import ShortConvolution

# The windows of the filters fall to this share of their first value, the slowest after `SLOWEST` times the maximum
# length and the fastest after `FASTEST` times it: the published code's values.
WINDOW_TARGET, SLOWEST, FASTEST = 0.01, 1.5, 0.3
# Heads of width K multiply queries with keys up to so many times K² tokens, and convolve beyond: about where both take
# the same time, forward and backward (measured for K = 4, 8 and 16 at 64 to 1024 tokens, one thread).
PRODUCTS_UP_TO = 2


class Hyena(nn.Module):
    """Gated long convolutions, `[B, T, hidden_size]` to the same shape, for T up to `max_length`.

        x^1 … x^N, v = conv(x W_i + b_i)            a depthwise causal convolution of width 3 on N + 1 projections
        z^1 = x^1 ⊙ v      z^{n+1} = x^{n+1} ⊙ (h^n * z^n)      y = z^N W_o + b_o           N = `order`

    The filters h^n, one a channel, are as long as the sequence and come from an `ImplicitFilter` of the position
    normalized by `max_length`, with `filter_layers` linear maps, `filter_width` channels, `filter_bands` frequencies
    and sines of `sine_frequency`, by default as in the published language models. As in the published code there are
    N - 1 of them: the short convolution takes the place of the first.

    With `num_heads` M (and order 2), channels form M heads of width K with one filter each, and before W_o stands

        y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s       that is h * (k ⊗ v), `[K, K]` a token, contracted with q

    so that `num_heads=hidden_size`, heads of one channel, is the layer without heads.

    The state is the inputs of the long convolutions so far (and the last two of the short one): it grows by N - 1
    numbers a token and channel, by 2 with heads, and to decode a token takes a sum over all before it. Raises UserError
    beyond `max_length`.

    Poli et al., "Hyena Hierarchy: Towards Larger Convolutional Language Models" (ICML 2023), definition 3.1, section
    3.3 and algorithms 1 to 3; Massaroli et al., "Laughing Hyena Distillery" (NeurIPS 2023), section 4, for the heads.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        max_length: int,
        order: int = 2,
        num_heads: int | None = None,
        filter_width: int = 64,
        filter_layers: int = 4,
        filter_bands: int = 16,
        sine_frequency: float = 14.0,
    ) -> None:
        super().__init__()
        if order < 2:
            raise UserError(f"Hyena has an order of at least 2: one long convolution between gates (given: {order})")
        if num_heads is not None:
            size_of_head(hidden_size, num_heads, "Hyena's hidden_size")
            if order != 2:
                raise UserError(f"Hyena with heads is defined for order 2 (given: order {order}, {num_heads} heads)")
        self.order = order
        self.num_heads = num_heads
        self.input = nn.Linear(hidden_size, (order + 1) * hidden_size)
        self.convolution = ShortConvolution((order + 1) * hidden_size, 3, bias=True)
        self.filter = ImplicitFilter(
            (order - 1) * (num_heads or hidden_size),
            max_length,
            width=filter_width,
            num_layers=filter_layers,
            num_bands=filter_bands,
            sine_frequency=sine_frequency,
        )
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, x: Tensor, state: dict[str, Any] | None = None, keep_state: bool = False
    ) -> tuple[Tensor, dict[str, Any] | None]:
        history, past = (None, None) if state is None else (state["convolution"], state["inputs"])
        projected, history = self.convolution(self.input(x), history, keep_state)
        filters = self.filter(x.shape[1] + (0 if past is None else past[0].shape[1]))
        gates_and_value = projected.chunk(self.order + 1, dim=-1)
        mix = self._mix_channels if self.num_heads is None else self._mix_heads
        y, inputs = mix(gates_and_value, filters, past)
        return self.output(y), {"convolution": history, "inputs": inputs} if keep_state else None

    def _mix_channels(
        self, gates_and_value: tuple[Tensor, ...], filters: Tensor, past: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """z^N `[B, T, D]`, and the inputs z^1 … z^{N-1} of the convolutions so far."""
        last_gate, *gates, y = gates_and_value
        inputs = []
        # The order of the published code, whose projections begin with the last gate.
        for n, (gate, h) in enumerate(zip(reversed(gates), filters.chunk(self.order - 1), strict=True)):
            z = _behind(None if past is None else past[n], gate * y)
            inputs.append(z)
            y = causal_convolution(z.mT, h, gate.shape[1]).mT
        return last_gate * y, tuple(inputs)

    def _mix_heads(
        self, gates_and_value: tuple[Tensor, ...], filters: Tensor, past: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y `[B, T, D]` of all heads, and k and v so far."""
        q, k, v = gates_and_value
        k, v = (_behind(before, t) for before, t in zip(past or (None, None), (k, v), strict=True))
        heads = (rearrange(t, "b t (m k) -> b m k t", m=self.num_heads) for t in (q, k, v))
        return rearrange(multi_head_convolution(*heads, filters), "b m k t -> b t (m k)"), (k, v)

    def extra_repr(self) -> str:
        return f"order={self.order}, num_heads={self.num_heads}"


class ImplicitFilter(nn.Module):
    """Filters `[num_filters, length]`, called as `filter(length)`, as a function of the position t = 0 … length - 1.

        h(t) = MLP(features(t)) · exp(-α t/L) + D [t = 0]         L = `max_length` ≥ length
        features(t) = t/L, cos(2π f t/L), sin(2π f t/L)           f = 0 … num_bands - 1

    The MLP has `num_layers` linear maps with sin(ω ·) between them, ω learned, one a channel of `width` for all layers.
    The decays α are fixed and evenly spaced: the window falls to 1 % within 1.5 L for the first filter and 0.3 L for
    the last. D is the convolution's skip connection: it adds D times the input. Linear maps begin as PyTorch's do, ω as
    `sine_frequency`, D as N(0, 1). Computed in float32 at least. Poli et al. (2023), section 3.3 and its released code.
    """

    def __init__(
        self,
        num_filters: int,
        max_length: int,
        *,
        width: int = 64,
        num_layers: int = 4,
        num_bands: int = 16,
        sine_frequency: float = 14.0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("max_length", max_length, 1),
            ("width", width, 1),
            ("number of layers", num_layers, 2),
            ("number of bands", num_bands, 0),
        ):
            if value < least:
                raise UserError(f"an implicit filter needs a {name} of at least {least} (given: {value})")
        self.max_length = max_length
        self.num_bands = num_bands
        self.sine_frequency = sine_frequency
        sizes = [1 + 2 * num_bands] + [width] * (num_layers - 1)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.last = nn.Linear(width, num_filters, bias=False)
        self.frequency = nn.Parameter(torch.empty(width))
        self.skip = nn.Parameter(torch.empty(num_filters))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Also the linear maps: the small weights that a language model begins with would make filters of almost 0."""
        for layer in (*self.layers, self.last):
            layer.reset_parameters()
        nn.init.constant_(self.frequency, self.sine_frequency)
        nn.init.normal_(self.skip)

    def forward(self, length: int) -> Tensor:
        if length > self.max_length:
            raise UserError(
                f"Hyena's filters reach over max_length = {self.max_length} tokens (given: {length}); "
                "build the model with a larger max_length"
            )
        device, dtype = self.skip.device, torch.promote_types(self.skip.dtype, torch.float32)
        # Autocast would round the positions to three digits.
        with torch.autocast(device.type, enabled=False):
            t = torch.arange(length, device=device, dtype=dtype)[:, None] / self.max_length
            angle = 2 * math.pi * t * torch.arange(self.num_bands, device=device)
            h = torch.cat([t, angle.cos(), angle.sin()], dim=1)  # [length, 1 + 2·num_bands]
            for layer in self.layers:
                h = torch.sin(self.frequency * functional.linear(h, layer.weight.to(dtype), layer.bias.to(dtype)))
            h = functional.linear(h, self.last.weight.to(dtype)) * torch.exp(-t * self._decays(dtype))
        return torch.cat([h[:1] + self.skip, h[1:]]).mT

    def _decays(self, dtype: torch.dtype) -> Tensor:
        slow, fast = (-math.log(WINDOW_TARGET) / share for share in (SLOWEST, FASTEST))
        return torch.linspace(slow, fast, self.skip.shape[0], device=self.skip.device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.skip.shape[0]}, max_length={self.max_length}"


def causal_convolution(z: Tensor, h: Tensor, length: int | None = None) -> Tensor:
    """y_t = Σ_{s≤t} h_{t-s} z_s for the last `length` of the tokens, by default all.

    z `[…, L]` and h, whose shape broadcasts against it, give y `[…, length]` in the dtype of z. A single token is a
    sum; more come from a product of Fourier transforms, in float32 at least, of length 2L, so that nothing wraps
    around. Cost L log L. Poli et al. (2023), section 2.1.
    """
    length = z.shape[-1] if length is None else length
    dtype = torch.promote_types(torch.promote_types(z.dtype, h.dtype), torch.float32)
    if length == 1:
        y = (z.to(dtype) * h.to(dtype).flip(-1)).sum(-1, keepdim=True)
    else:
        y = _FourierConvolution.apply(z.to(dtype), h.to(dtype), length)
    return y.to(z.dtype)


class _FourierConvolution(torch.autograd.Function):
    """The backward pass by hand: three real transforms, where autograd takes complex ones of the whole length."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor, h: Tensor, length: int) -> Tensor:
        total = z.shape[-1]
        spectra = (torch.fft.rfft(z, n=2 * total), torch.fft.rfft(h, n=2 * total))
        ctx.save_for_backward(*spectra)
        ctx.filter_shape = h.shape
        return torch.fft.irfft(spectra[0] * spectra[1], n=2 * total)[..., total - length : total]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        total = ctx.filter_shape[-1]
        z, h = ctx.saved_tensors
        dy = torch.fft.rfft(functional.pad(dy, (total - dy.shape[-1], 0)), n=2 * total)
        # A correlation is a convolution with the mirrored signal, whose spectrum is the conjugate.
        dz = torch.fft.irfft(dy * h.conj(), n=2 * total)[..., :total]
        dh = (dy * z.conj()).sum_to_size(*ctx.filter_shape[:-1], total + 1)
        return dz, torch.fft.irfft(dh, n=2 * total)[..., :total], None


def multi_head_convolution(q: Tensor, k: Tensor, v: Tensor, h: Tensor) -> Tensor:
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s for the last tokens, those of q: y `[B, M, K, T]`.

    q `[B, M, K, T]`, k and v `[B, M, K, P+T]`, h `[M, P+T]`. Many tokens convolve k ⊗ v, as published, which takes K²
    transforms a head; for few the products q_t · k_s cost less. Massaroli et al. (2023), section 4.
    """
    length = q.shape[-1]
    if length <= PRODUCTS_UP_TO * q.shape[2] ** 2:
        return v @ (toeplitz(h, length).to(q.dtype) * (q.mT @ k)).mT
    memory = causal_convolution(k[:, :, :, None] * v[:, :, None], h[:, None, None], length)  # [B, M, K, K, T]
    return (q[:, :, :, None] * memory).sum(2)


def toeplitz(h: Tensor, length: int) -> Tensor:
    """The convolution with h `[…, L]` as matrices `[…, length, L]` to its last outputs: h_{t-s} for s ≤ t, else 0."""
    return functional.pad(h.flip(-1), (0, length - 1)).unfold(-1, h.shape[-1], 1).flip(-2)


def _behind(past: Tensor | None, x: Tensor) -> Tensor:
    """x `[B, T, D]` behind the past `[B, P, D]`."""
    return x if past is None else torch.cat([past, x], dim=1)
