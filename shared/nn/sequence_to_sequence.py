"""A Transformer encoder–decoder that can copy words of its source, also those outside of its vocabulary.

Numbers of words below V are the vocabulary's; V + j is word j of those that only this source holds. B sources of S
tokens, targets of T tokens, R rows to decode: R = B, or K rows a source, one behind the other, in a beam search.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.nn.attention import size_of_head

State = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Memory:
    """What the decoder reads of B sources: `states` [B, S, d], their tokens [B, S], and where these are no pads [B, S].

    `keys_and_values` are each layer's of cross-attention, [B, H, S, K], computed once; `extended_size` is the number
    of words that can come out, X ≥ V.
    """

    states: Tensor
    tokens: Tensor
    visible: Tensor
    keys_and_values: list[tuple[Tensor, Tensor]]
    extended_size: int


class SequenceToSequence(nn.Module):
    """Tokens source `[B, S]` and target `[B, T]` int64 to log-probabilities of the next tokens `[B, T, X]`.

    Pre-norm Transformer with sinusoidal positions (Vaswani et al. 2017, section 3; Xiong et al. 2020) and GELU, and
    with dropout behind each sublayer and on the embeddings (Vaswani et al., section 5.4). With `num_ranks` a second
    embedding of the source's tokens is added, of `ranks` `[B, S]` from 0 to num_ranks, such as the rank of the
    hypothesis that a token comes from; `positions` `[B, S]` are by default 0 … S - 1.

    With `copy` the output is a pointer-generator's (See et al. 2017, equations 8 and 9),

        P(w) = g · P_vocabulary(w) + (1 - g) · Σ_{i: source_i = w} a_i,    g = σ(w_c·c + w_s·s + w_x·x + b),

    where a is the attention of the decoder's state s over the source, c the mean of the encoder's states under a, and
    x the embedding of the last token. X is `extended_size`, by default one more than the largest number in the source,
    and V at least; without `copy` it is V. `tie_embeddings` makes the embedding the head too.

    `pad_token` is never seen in a source. In targets pads stand behind the end, where causality hides them. Numbers
    from V on are read as `unknown_token`.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_heads: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        feed_forward_size: int,
        *,
        num_ranks: int = 0,
        copy: bool = True,
        dropout: float = 0.1,
        pad_token: int = 0,
        unknown_token: int = 1,
        tie_embeddings: bool = True,
    ) -> None:
        super().__init__()
        size_of_head(hidden_size, num_heads, "the encoder–decoder's hidden_size")
        if hidden_size % 2:
            raise UserError(f"sinusoidal positions come in pairs of channels: hidden_size {hidden_size} must be even")
        if min(num_encoder_layers, num_decoder_layers, feed_forward_size) < 1 or num_ranks < 0:
            raise UserError(
                "an encoder–decoder needs at least 1 layer on either side, feed_forward_size ≥ 1, ranks ≥ 0"
            )
        if not 0 <= max(pad_token, unknown_token) < vocab_size:
            raise UserError(f"pad_token and unknown_token must be below vocab_size {vocab_size}")
        self.vocab_size, self.num_ranks = vocab_size, num_ranks
        self.pad_token, self.unknown_token = pad_token, unknown_token
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.rank_embedding = nn.Embedding(num_ranks + 1, hidden_size) if num_ranks else None
        shape = (hidden_size, num_heads, feed_forward_size, dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*shape) for _ in range(num_encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*shape) for _ in range(num_decoder_layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.head = None if tie_embeddings else nn.Linear(hidden_size, vocab_size, bias=False)
        self.copy_head = CopyHead(hidden_size) if copy else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin anew: linear maps by Xavier, embeddings as N(0, 1/d), biases at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        ranks: Tensor | None = None,
        positions: Tensor | None = None,
        extended_size: int | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """With a bool `mask` [B, T] the probabilities behind those M tokens only, [M, X]: the rest is not computed."""
        memory = self.encode(source, ranks, positions, extended_size)
        features, embedded, _ = self._features(target, memory, None)
        return self._log_probs(features, embedded, memory, mask)

    def encode(
        self,
        source: Tensor,
        ranks: Tensor | None = None,
        positions: Tensor | None = None,
        extended_size: int | None = None,
    ) -> Memory:
        """What `decode` needs of the sources; the arguments are those of a call of the model."""
        self._check_tokens("source", source)
        if (ranks is None) != (self.rank_embedding is None):
            raise UserError("give ranks to a model with num_ranks, and to no other")
        if positions is None:
            positions = torch.arange(source.shape[1], device=source.device).expand_as(source)
        for name, given in (("ranks", ranks), ("positions", positions)):
            if given is not None and given.shape != source.shape:
                raise UserError(f"{name} must have the source's shape {list(source.shape)}, not {list(given.shape)}")
        # Looked at on the CPU only, since a GPU would have to be waited for.
        if ranks is not None and not ranks.is_cuda and not 0 <= int(ranks.min()) <= int(ranks.max()) <= self.num_ranks:
            raise UserError(f"ranks must lie between 0 and {self.num_ranks}")
        if extended_size is None:
            extended_size = max(self.vocab_size, int(source.max()) + 1)
        elif not source.is_cuda and int(source.max()) >= max(extended_size, self.vocab_size):
            raise UserError(f"the source holds number {int(source.max())}: extended_size {extended_size} is too small")
        extended_size = self.vocab_size if self.copy_head is None else max(extended_size, self.vocab_size)
        x = self._embed(source, positions)
        if ranks is not None and self.rank_embedding is not None:
            x = x + self.rank_embedding(ranks)
        x = self.dropout(x)
        visible = source != self.pad_token
        # A source of pads only keeps its first, since a softmax over nothing is not a number.
        visible[:, 0] |= ~visible.any(dim=1)
        for layer in self.encoder:
            x = layer(x, visible)
        states = self.encoder_norm(x)
        keys_and_values = [layer.cross_attention.keys_and_values(states) for layer in self.decoder]
        return Memory(states, source, visible, keys_and_values, extended_size)

    def decode(self, target: Tensor, memory: Memory, state: State | None = None) -> tuple[Tensor, State]:
        """Log-probabilities `[R, T, X]` behind the tokens `[R, T]`, which continue those of `state`; and the state.

        Rows bK to bK + K - 1 belong to source b. A state holds each layer's keys and values, first axis R.
        """
        features, embedded, state = self._features(target, memory, state)
        return self._log_probs(features, embedded, memory), state

    def step_function(self, memory: Memory) -> Callable[[Tensor, State | None], tuple[Tensor, State]]:
        """The step of `shared.nn.beam_search`: last tokens [R] and a state to log-probabilities [R, X] and a state."""

        def step(tokens: Tensor, state: State | None) -> tuple[Tensor, State]:
            log_probs, state = self.decode(tokens[:, None], memory, state)
            return log_probs[:, 0], state

        return step

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def _features(self, target: Tensor, memory: Memory, state: State | None) -> tuple[Tensor, Tensor, State]:
        self._check_tokens("target", target)
        if len(target) % len(memory.states):
            raise UserError(f"{len(target)} rows to decode are no multiple of {len(memory.states)} sources")
        past = 0 if state is None else state[0]["keys"].shape[2]
        positions = torch.arange(past, past + target.shape[1], device=target.device)
        embedded = self._embed(target, positions)
        x, states = self.dropout(embedded), []
        before: list[Any] = [None] * len(self.decoder) if state is None else state
        for layer, read, kept in zip(self.decoder, memory.keys_and_values, before, strict=True):
            x, kept = layer(x, read, memory.visible, kept)
            states.append(kept)
        return self.decoder_norm(x), embedded, states

    def _log_probs(self, features: Tensor, embedded: Tensor, memory: Memory, mask: Tensor | None = None) -> Tensor:
        head = (self.embedding if self.head is None else self.head).weight
        if self.copy_head is None:
            chosen = features if mask is None else features[mask]
            return functional.linear(chosen, head).log_softmax(-1)
        read = self.copy_head.attend(features, embedded, memory)
        chosen, copied, tokens, generate = read if mask is None else (part[mask] for part in read)
        logits = functional.linear(chosen, head)
        return mixed_log_probs(logits, generate, copied, tokens, memory.extended_size)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        size = self.embedding.embedding_dim
        known = tokens.masked_fill(tokens >= self.vocab_size, self.unknown_token)
        place = sinusoidal_positions(positions, size).to(self.embedding.weight.dtype)
        return self.embedding(known) * math.sqrt(size) + place

    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
            raise UserError(
                f"{name} must be tokens [batch, length] of int64, at least one (given: {list(tokens.shape)}, "
                f"{tokens.dtype})"
            )


class CopyHead(nn.Module):
    """The copy distribution a and the switch g of a pointer-generator (See et al. 2017, equations 1 to 3 and 8)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.switch = nn.Linear(3 * hidden_size, 1)

    def attend(self, features: Tensor, embedded: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features as given `[R, T, d]`, a `[R, T, S]`, the tokens that it is over `[R, T, S]`, and g `[R, T, 1]`."""
        rows, length, size = features.shape
        num_sources = len(memory.states)
        queries = rearrange(self.query(features), "(b k) t d -> b (k t) d", b=num_sources)
        scores = queries @ self.key(memory.states).mT / math.sqrt(size)
        copied = scores.masked_fill(~memory.visible[:, None], -torch.inf).softmax(-1)
        context = (copied @ memory.states).reshape(features.shape)
        generate = self.switch(torch.cat([context, features, embedded], dim=-1)).sigmoid()
        tokens = memory.tokens.repeat_interleave(rows // num_sources, dim=0)[:, None].expand(-1, length, -1)
        return features, copied.reshape(tokens.shape), tokens, generate


def mixed_log_probs(logits: Tensor, generate: Tensor, copied: Tensor, tokens: Tensor, extended_size: int) -> Tensor:
    """log(g · softmax(logits) + (1 - g) · copies of source tokens) (See et al. 2017, equation 9).

    Logits `[…, V]`, g `[…, 1]`, the copy distribution and its tokens `[…, S]`, to `[…, X]`, in single precision at
    least. Words of other sources only have −∞; those of the vocabulary stay finite, so that their mean is a loss.
    """
    vocab_size = logits.shape[-1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    generate, copied = generate.to(wide), copied.to(wide)
    mixture = functional.pad(generate * logits.to(wide).softmax(-1), (0, extended_size - vocab_size))
    mixture = mixture.scatter_add(-1, tokens, (1 - generate) * copied)
    log_probs = mixture.clamp_min(torch.finfo(wide).tiny).log()
    log_probs[..., vocab_size:].masked_fill_(mixture[..., vocab_size:] == 0, -torch.inf)
    return log_probs


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), over tokens `[B, S, d]` that are `visible` [B, S]."""

    def __init__(self, hidden_size: int, num_heads: int, feed_forward_size: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.attention = HeadsAttention(hidden_size, num_heads)
        self.feed_forward = feed_forward(hidden_size, feed_forward_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        mixed = self.attention(normed, *self.attention.keys_and_values(normed), visible[:, None, None])
        x = x + self.dropout(mixed)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderLayer(nn.Module):
    """As the encoder's, causal, with attention to the source between: tokens `[R, T, d]` behind those of a state."""

    def __init__(self, hidden_size: int, num_heads: int, feed_forward_size: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.cross_norm, self.feed_forward_norm = (nn.LayerNorm(hidden_size) for _ in range(3))
        self.attention = HeadsAttention(hidden_size, num_heads)
        self.cross_attention = HeadsAttention(hidden_size, num_heads)
        self.feed_forward = feed_forward(hidden_size, feed_forward_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, read: tuple[Tensor, Tensor], visible: Tensor, state: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        normed = self.attention_norm(x)
        keys, values = self.attention.keys_and_values(normed)
        if state is not None:
            keys, values = torch.cat([state["keys"], keys], dim=2), torch.cat([state["values"], values], dim=2)
        length, past = x.shape[1], keys.shape[2] - x.shape[1]
        causal = torch.ones(length, past + length, dtype=torch.bool, device=x.device).tril(past)
        x = x + self.dropout(self.attention(normed, keys, values, causal))
        # All rows of a source are queries to one copy of its keys and values.
        queries = rearrange(self.cross_norm(x), "(b k) t d -> b (k t) d", b=len(visible))
        mixed = self.cross_attention(queries, *read, visible[:, None, None])
        x = x + self.dropout(mixed.reshape(x.shape))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x, {"keys": keys, "values": values}


class HeadsAttention(nn.Module):
    """Multi-head attention of queries `[B, T, d]` to given keys and values `[B, H, S, K]` (Vaswani et al., 3.2.2)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.output = (nn.Linear(hidden_size, hidden_size) for _ in range(4))

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (rearrange(f(x), "b s (h k) -> b h s k", h=self.num_heads) for f in (self.key, self.value))
        return key, value

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """`visible` is bool and fits `[B, H, T, S]` by broadcasting."""
        queries = rearrange(self.query(x), "b t (h k) -> b h t k", h=self.num_heads)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, visible)
        return self.output(rearrange(mixed, "b h t k -> b t (h k)"))


def feed_forward(hidden_size: int, inner_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden_size, inner_size), nn.GELU(), nn.Linear(inner_size, hidden_size))


def sinusoidal_positions(positions: Tensor, size: int) -> Tensor:
    """Sines and cosines of positions `[…]` in alternating channels, `[…, size]` (Vaswani et al. 2017, section 3.5)."""
    half = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None] * 10000.0 ** (-half / size)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def sequence_loss(
    model: nn.Module,
    source: Tensor,
    target: Tensor,
    *,
    ranks: Tensor | None = None,
    positions: Tensor | None = None,
    label_smoothing: float = 0.1,
    extended_size: int | None = None,
    vocab_size: int | None = None,
    pad_token: int = 0,
) -> Tensor:
    """Mean loss of the tokens of targets `[B, T]`, start … end and pads behind, each from those before it.

    `vocab_size` is by default the model's own, which a wrapped model may hide.
    """
    asked = target[:, 1:] != pad_token
    log_probs = model(source, target[:, :-1], ranks, positions, extended_size, asked)
    return smoothed_loss(log_probs, target[:, 1:][asked], vocab_size or model.vocab_size, label_smoothing)


def smoothed_loss(log_probs: Tensor, targets: Tensor, vocab_size: int, label_smoothing: float) -> Tensor:
    """(1 - ε) · mean -log P(target) + ε · mean -log P(w) over the words w of the vocabulary, in nats: a scalar.

    `log_probs` [M, X] are those of the mixture, targets [M] may be numbers from V to X - 1; the smoothing (Szegedy et
    al. 2016, section 7) is spread over the V words that every source shares.
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing must lie between 0 and 1, not {label_smoothing}")
    hit = log_probs.gather(-1, targets[:, None]).mean()
    if not label_smoothing:
        return -hit
    return -(1 - label_smoothing) * hit - label_smoothing * log_probs[:, :vocab_size].mean()
