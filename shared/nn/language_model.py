"""A language model around any token mixer: embedding, pre-norm residual blocks, head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from shared.config import UserError


class SwiGLU(nn.Module):
    """Feed-forward layer (Swish(x W_1) ⊙ x W_2) W_3 of `inner_size` channels inside, without biases.

    `[…, hidden_size]` to the same shape. Shazeer, "GLU Variants Improve Transformer" (2020), equation 6.
    """

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, inner_size, bias=False)
        self.input = nn.Linear(hidden_size, inner_size, bias=False)
        self.output = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(functional.silu(self.gate(x)) * self.input(x))


class Block(nn.Module):
    """Pre-norm residual block: x + mixer(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)) unless `feed_forward_size` is 0.

    Called as its mixer is. Yang et al. (2023), section 4.4.
    """

    def __init__(self, hidden_size: int, mixer: nn.Module, feed_forward_size: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(hidden_size, norm_eps)
        self.mixer = mixer
        self.feed_forward_norm = nn.RMSNorm(hidden_size, norm_eps) if feed_forward_size else None
        self.feed_forward = SwiGLU(hidden_size, feed_forward_size) if feed_forward_size else None

    def forward(self, x: Tensor, state: Any = None, keep_state: bool = False) -> tuple[Tensor, Any]:
        mixed, state = self.mixer(self.mixer_norm(x), state, keep_state)
        x = x + mixed
        if self.feed_forward is not None:
            x = x + self.feed_forward(self.feed_forward_norm(x))
        return x, state


class LanguageModel(nn.Module):
    """Tokens `[B, T]` int64 to the logits of the next tokens `[B, T, vocab_size]`.

    `mixer(i)` builds the token mixer of block i = 0 … num_layers - 1 on `hidden_size` channels, so one function makes
    pure models and hybrids:

        LanguageModel(256, 128, 4, lambda i: Attention(128, 4) if i == 1 else DeltaNet(128, 4))

    `feed_forward_size` is the SwiGLU's inner size, by default 256·⌈(8/3 · hidden_size)/256⌉, and 0 leaves the
    feed-forward layers out. `tie_embeddings` makes the embedding the head too. `checkpoint_blocks` recomputes each
    block in the backward pass instead of keeping what happens inside it.

    With `keep_state=True` it returns (logits, state), and a later call with that state goes on behind those tokens: one
    token at a time to decode, a segment at a time for truncated backpropagation (see `detach_state`).

    Weights of linear maps and the embedding begin as N(0, 0.02²), biases at 0, all else as its own module says.
    Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2023), section 4.4 and its
    released code.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        mixer: Callable[[int], nn.Module],
        *,
        feed_forward_size: int | None = None,
        tie_embeddings: bool = True,
        norm_eps: float = 1e-6,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if value < 1:
                raise UserError(f"a language model needs {name} of at least 1 (given: {value})")
        if feed_forward_size is None:
            feed_forward_size = default_feed_forward_size(hidden_size)
        if feed_forward_size < 0:
            raise UserError(f"feed_forward_size must be positive, or 0 for none (given: {feed_forward_size})")
        self.checkpoint_blocks = checkpoint_blocks
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, mixer(index), feed_forward_size, norm_eps) for index in range(num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, norm_eps)
        self.head = None if tie_embeddings else nn.Linear(hidden_size, vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin anew, also after `to_empty` of a model built on the meta device."""
        # Parts before the whole, so that a mixer has the last word on its own linear maps.
        for module in reversed([module for module in self.modules() if module is not self]):
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(
        self, tokens: Tensor, state: Sequence[Any] | None = None, keep_state: bool = False
    ) -> Tensor | tuple[Tensor, list[Any]]:
        features, states = self.features(tokens, state, keep_state)
        head = self.embedding if self.head is None else self.head
        logits = functional.linear(features, head.weight)
        return (logits, states) if keep_state else logits

    def features(
        self, tokens: Tensor, state: Sequence[Any] | None = None, keep_state: bool = False
    ) -> tuple[Tensor, list[Any]]:
        """What the head reads, `[B, T, hidden_size]`, and the state of each block."""
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise UserError(
                f"a language model reads tokens [batch, length] of int64 (given: {list(tokens.shape)}, {tokens.dtype})"
            )
        if state is not None and len(state) != len(self.blocks):
            raise UserError(
                f"this model has {len(self.blocks)} layers and the state {len(state)}: pass what a call of this model "
                "with keep_state=True returned"
            )
        x = self.embedding(tokens)  # [B, T, hidden_size]
        states = []
        for block, before in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x, after = checkpoint(block, x, before, keep_state, use_reentrant=False)
            else:
                x, after = block(x, before, keep_state)
            states.append(after)
        return self.norm(x), states

    def num_parameters(self) -> int:
        """Trained numbers; the tied embedding and head count once."""
        return sum(parameter.numel() for parameter in self.parameters())


def default_feed_forward_size(hidden_size: int) -> int:
    """256·⌈(8/3 · hidden_size)/256⌉: as many parameters as a plain feed-forward layer of four times the width."""
    return 256 * math.ceil(hidden_size / 96)


def detach_state(state: Any) -> Any:
    """The state of a mixer or model cut off from the graph that made it: nested dicts, lists and tuples of tensors.

    Truncated backpropagation through time passes it on to the next segment.
    """
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, dict):
        return {name: detach_state(part) for name, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(detach_state(part) for part in state)
    return state
