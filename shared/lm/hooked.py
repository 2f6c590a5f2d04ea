"""A language model that shows and lets replace what it computes inside, at the same points for every family.

Why a loop of our own. nnsight 0.8 is cheap (0.7 ms a call on a 4-layer model, next to nothing a hook), but reaches what
goes in and out of modules under each family's own names, and queries, scores and pattern by the line of transformers'
source that computes them. TransformerLens 4.3 has common names, but always computes attention explicitly (660 ms
against 69 ms for 2,048 tokens) and takes 1.5 to 2 times the model's own time without any hook. Neither executes layers
along a path, with a place in the cache for each call of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.lm import weights
from shared.lm.decoder import Layer, Rotation, adapt, norm_eps, subtracts_mean
from shared.lm.hooks import Activations, Hook, Index, Taps
from shared.lm.model import check_length, rotate


class Output(NamedTuple):
    """Logits `[B, T, V]` (None if not wanted) and the activations that were asked for."""

    logits: Tensor | None
    kept: Activations


@dataclass
class Generation:
    """Continuations `[B, N]`; what they looked at, by step.

    `attention_argmax` `[B, N, L, H]` is the position that each head attends to most from the token that produced each
    new one; `attention_rows` holds, a step, the whole rows `[B, L, H, context so far]`.
    """

    tokens: Tensor
    attention_argmax: Tensor | None = None
    attention_rows: list[Tensor] | None = None


class KeyValueCache:
    """Keys and values `[B, heads, capacity, K]` of each executed layer, filled up to `length`.

    `rewind` forgets the tokens behind a position, so that one prompt serves many continuations. No gradients flow
    through it.
    """

    def __init__(self, path: Sequence[int]) -> None:
        self.path = tuple(path)
        self.length = 0
        self._store: list[tuple[Tensor, Tensor] | None] = [None] * len(self.path)

    def append(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values `[B, heads, T, K]` behind those of layer call `index`; returns all of them."""
        end = self.length + k.shape[2]
        old = self._store[index]
        if old is None or old[0].shape[2] < end:
            # Room for a short answer behind a prompt, then half as much again: decoding seldom copies what is there.
            room = 64 if old is None else max(64, end // 2)
            new = tuple(t.new_empty(*t.shape[:2], end + room, t.shape[3]) for t in (k, v))
            if old is not None:
                for source, target in zip(old, new, strict=True):
                    target[:, :, : self.length] = source[:, :, : self.length]
            self._store[index] = old = (new[0], new[1])
        for target, latest in zip(old, (k, v), strict=True):
            target[:, :, self.length : end] = latest
        return old[0][:, :, :end], old[1][:, :, :end]

    def rewind(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise UserError(f"the cache holds {self.length} tokens and can't be rewound to {length}")
        self.length = length


class HookedLM:
    """A causal language model under one interface: house models and Hugging Face's GPT-2, GPT-NeoX, OPT, Llama,
    Mistral, Qwen2, Mixtral and OLMoE.

    It calls the model's own modules (norms, projections, rotary tables, experts) in its own loop over layers. Attention
    runs in PyTorch's fused kernel wherever nobody looks at scores or pattern; "attn.result" is computed only where it
    is asked for. What the points of `shared.lm.hooks.POINTS` hold, for sequences `[B, T]`:

        resid_pre, resid_mid, resid_post   residual stream before attention, between, after the feed-forward layer
                                           (layers that run both side by side have no resid_mid)
        attn.in, mlp.in                    the normalized streams that the two read
        attn.q, attn.k, attn.v             by head, before rotary positions; k and v by group where queries share them
        attn.scores, attn.pattern          scaled q·k of the visible positions (-inf elsewhere), and their softmax
        attn.z, attn.result, attn.out      by head before W_O, by head after W_O, and the sum with the bias
        mlp.pre, mlp.up, mlp.act           input of the nonlinearity; linear branch of a gated layer; what W_down reads
        mlp.out, final_norm.scale          what is added to the stream; by what the final norm divides
        logits

    Gradients flow as the caller's grad mode says; `load_lm` freezes the weights. Sequences of unequal length can be
    padded on the right, where a causal model does not see it.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, name: str = "") -> None:
        self.model = model.eval()
        self.decoder = adapt(self.model)
        self.tokenizer = tokenizer
        self.name = name
        self.num_layers = len(self.decoder.layers)
        self.num_heads = self.decoder.num_heads
        self.num_key_value_heads = self.decoder.num_key_value_heads
        self.max_length = self.decoder.max_length
        self.vocab_size = self.decoder.head.weight.shape[0]
        self.hidden_size = self.decoder.head.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.decoder.head.weight.device

    def encode(self, text: str, allow_unknown: bool = False) -> Tensor:
        """Token ids `[T]` of a text; a word that the tokenizer lacks is a `UserError`, unless it may be unknown."""
        if self.tokenizer is None:
            raise UserError(f"{self.name or 'this model'} has no tokenizer: pass token ids")
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        words = () if allow_unknown else dict.fromkeys(text.split())
        pieces = {word: self.tokenizer.encode(word, add_special_tokens=False) for word in words}
        if lacking := [word for word, ids in pieces.items() if not ids or unknown in ids]:
            raise UserError(
                f"the tokenizer of {self.name or 'this model'} does not know {', '.join(map(repr, lacking[:10]))}: "
                "use words of its vocabulary, or a model with another tokenizer"
            )
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        return torch.tensor(encoded, device=self.device)

    def decode(self, tokens: Tensor) -> str:
        """The text of token ids `[T]`."""
        if self.tokenizer is None:
            raise UserError(f"{self.name or 'this model'} has no tokenizer: it can't turn token ids into text")
        return self.tokenizer.decode(tokens.tolist())

    def forward(
        self,
        tokens: Tensor,
        hooks: Sequence[Hook] = (),
        cache: Sequence[str | tuple[str, int]] = (),
        path: Sequence[int] | None = None,
        *,
        cache_positions: Index | None = None,
        logits: Literal["all", "last", "none"] = "all",
        past: KeyValueCache | None = None,
    ) -> Output:
        """Run tokens `[B, T]` (or `[T]`) under hooks, keeping the activations named in `cache`.

        `cache` names points, of all layers ("attn.z") or of one (("attn.z", 3)); `cache_positions` keeps only those
        positions. `path` lists the layers to execute, in any order, left out or repeated; hooks and kept activations
        then count the executed layers. `past` (see `prefill`) holds the tokens before these, and takes these up too.
        """
        tokens = self._tokens(tokens)
        path = self._path(path, past)
        taps = Taps(len(path), hooks, cache, cache_positions)
        return Output(self._run(tokens, taps, path, past, logits), taps.kept)

    __call__ = forward

    @torch.no_grad()
    def prefill(self, tokens: Tensor, hooks: Sequence[Hook] = (), path: Sequence[int] | None = None) -> KeyValueCache:
        """Keys and values of `[B, T]` tokens, to continue from; no logits are computed."""
        tokens, layers = self._tokens(tokens), self._path(path, None)
        past = KeyValueCache(layers)
        self._run(tokens, Taps(len(layers), hooks), layers, past, "none")
        return past

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        hooks: Sequence[Hook] = (),
        prefill_hooks: Sequence[Hook] = (),
        path: Sequence[int] | None = None,
        past: KeyValueCache | None = None,
        attention: Literal["argmax", "rows"] | None = None,
        stop: Iterable[int] = (),
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Generation:
        """Continue the prompts `[B, T]`, all of one length: greedily, or by sampling at a temperature above 0.

        The prompt except its last token is read in one go under `prefill_hooks`; from its last token on, one token is
        processed a step, under `hooks`. `attention` looks at the attention rows of these steps: "argmax" keeps of each
        row only its maximum's position. `past` is the prefill of `tokens[:, :-1]` if it is there already; it is left
        as it was. A sequence that meets a token of `stop` repeats it to its end; when all have, generation ends.
        """
        tokens = self._tokens(tokens)
        if max_new_tokens < 1 or temperature < 0:
            raise UserError(f"nothing to generate: max_new_tokens {max_new_tokens}, temperature {temperature}")
        check_length(tokens.shape[1] + max_new_tokens - 1, self.max_length)
        if past is None:
            alone = tokens.shape[1] == 1
            past = KeyValueCache(self._path(path, None)) if alone else self.prefill(tokens[:, :-1], prefill_hooks, path)
        elif past.length != tokens.shape[1] - 1:
            raise UserError(f"`past` must hold the {tokens.shape[1] - 1} tokens before the last (held: {past.length})")
        layers, begin = self._path(path, past), past.length
        taps = Taps(len(layers), [*hooks, *self._watchers(attention, len(layers), watched := [])])
        ends = torch.tensor(sorted(set(stop)), dtype=torch.long, device=tokens.device)
        latest, made, seen = tokens[:, -1:], [], []
        finished = torch.zeros_like(latest, dtype=torch.bool)
        for _ in range(max_new_tokens):
            watched.clear()
            logits = self._run(latest, taps, layers, past, "last")
            latest = torch.where(finished, latest, _choose(logits[:, -1], temperature, generator))
            made.append(latest)
            seen.append(torch.stack(watched, dim=1) if watched else None)
            finished |= torch.isin(latest, ends)
            if len(ends) and finished.all():
                break
        past.rewind(begin)
        return Generation(
            torch.cat(made, dim=1),
            torch.stack(seen, dim=1) if attention == "argmax" else None,
            seen if attention == "rows" else None,
        )

    def weight(self, role: str, layer: int | None = None, head: int | None = None) -> Tensor:
        """A weight by its role, laid out to be multiplied from the right (x @ W), as a view of the model's own.

            W_E [V, d]   W_pos [positions, d]   W_U [d, V], b_U [V]   g_final, b_final [d]
            W_Q, W_K, W_V [H, d, K], b_Q, b_K, b_V [H, K]   W_O [H, K, d], b_O [d]   g_attn, b_attn [d] (norm before)
            W_pre, W_up [d, N], b_pre, b_up [N]   W_down [N, d], b_down [d]          g_mlp, b_mlp [d] (norm before)

        Without a layer, all layers stacked (a copy); with `head`, that head's. A bias that the model does not have is
        0. OPT's W_pos begins with two rows for padding. Names of hook points and weights agree: W_pre makes "mlp.pre".
        """
        return weights.weight(self.decoder, role, layer, head)

    def fold_norm(self) -> HookedLM:
        """Move gain and bias of each norm into the weights that read it, in place; logits stay as they are.

        What the norms give is then only normalized, so that W_U and the input weights read the residual stream itself.
        An embedding shared with the head is copied first. As `fold_ln` of TransformerLens.
        """
        weights.fold_norm(self.decoder)
        return self

    def center(self) -> HookedLM:
        """Subtract from W_U its mean over tokens and, where every norm subtracts the stream's mean (LayerNorm), from
        all that writes into the residual stream its mean over channels, in place; log-probabilities stay as they are.

        As `center_unembed` and `center_writing_weights` of TransformerLens.
        """
        weights.center(self.decoder)
        return self

    def _run(
        self, tokens: Tensor, taps: Taps, path: Sequence[int], past: KeyValueCache | None, logits: str
    ) -> Tensor | None:
        start = 0 if past is None else past.length
        end = start + tokens.shape[1]
        check_length(end, self.max_length)
        x, rotation = self.decoder.embed(tokens, torch.arange(start, end, device=tokens.device))
        for index, number in enumerate(path):
            x = self._layer(self.decoder.layers[number], index, x, rotation, taps, past)
        if past is not None:
            past.length = end
        if logits == "none":
            return None
        x = self._final_norm(x[:, -1:] if logits == "last" else x, taps)
        return taps("logits", None, self.decoder.head(x))

    def _layer(
        self, layer: Layer, index: int, x: Tensor, rotation: Rotation, taps: Taps, past: KeyValueCache | None
    ) -> Tensor:
        x = taps("resid_pre", index, x)
        attended = self._attention(layer, index, layer.attention_norm(x), rotation, taps, past)
        if layer.parallel:
            if taps.touches("resid_mid", index):
                raise UserError("this model runs attention and feed-forward layer side by side: it has no resid_mid")
            x = x + attended + self._feed_forward(layer, index, layer.feed_forward_norm(x), taps)
        else:
            x = taps("resid_mid", index, x + attended)
            x = x + self._feed_forward(layer, index, layer.feed_forward_norm(x), taps)
        return taps("resid_post", index, x)

    def _attention(
        self, layer: Layer, index: int, x: Tensor, rotation: Rotation, taps: Taps, past: KeyValueCache | None
    ) -> Tensor:
        q, k, v = layer.heads(taps("attn.in", index, x))
        q, k, v = taps("attn.q", index, q), taps("attn.k", index, k), taps("attn.v", index, v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, T, K]
        if rotation is not None:
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        if past is not None:
            k, v = past.append(index, k, v)
        if taps.touches("attn.scores", index) or taps.touches("attn.pattern", index):
            z = _explicit_attention(layer, index, q, k, v, taps)
        else:
            z = _fused_attention(layer, q, k, v)
        z = taps("attn.z", index, z.transpose(1, 2))  # [B, T, H, K]
        if taps.touches("attn.result", index):
            result = torch.einsum("bthk,hkd->bthd", z, weights.output_heads(self.decoder, layer))
            result = taps("attn.result", index, result)
            if taps.hooked("attn.result", index):
                bias = layer.output.bias
                out = result.sum(dim=2) if bias is None else result.sum(dim=2) + bias
                return taps("attn.out", index, out)
        return taps("attn.out", index, layer.output(z.flatten(2)))

    def _feed_forward(self, layer: Layer, index: int, x: Tensor, taps: Taps) -> Tensor:
        x = taps("mlp.in", index, x)
        if layer.pre is None or layer.act is None or layer.down is None:
            for point in ("mlp.pre", "mlp.up", "mlp.act"):
                if taps.touches(point, index):
                    raise UserError(f"this model's feed-forward layer is one node of experts: it has no {point}")
            return taps("mlp.out", index, layer.feed_forward(x))
        act = layer.act(taps("mlp.pre", index, layer.pre(x)))
        if layer.up is not None:
            act = act * taps("mlp.up", index, layer.up(x))
        elif taps.touches("mlp.up", index):
            raise UserError("this model's feed-forward layer has no gate, hence no mlp.up: use mlp.pre")
        return taps("mlp.out", index, layer.down(taps("mlp.act", index, act)))

    def _final_norm(self, x: Tensor, taps: Taps) -> Tensor:
        norm = self.decoder.final_norm
        if not taps.touches("final_norm.scale", None):
            return norm(x)
        if subtracts_mean(norm):
            x = x - x.mean(dim=-1, keepdim=True)
        scale = (x.float().pow(2).mean(dim=-1, keepdim=True) + norm_eps(norm)).sqrt().to(x.dtype)
        x = x / taps("final_norm.scale", None, scale) * norm.weight
        bias = getattr(norm, "bias", None)
        return x if bias is None else x + bias

    def _tokens(self, tokens: Tensor) -> Tensor:
        tokens = torch.as_tensor(tokens, device=self.device)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
            raise UserError(f"a language model reads token ids [B, T] (given: {list(tokens.shape)}, {tokens.dtype})")
        low, high = (int(t) for t in torch.aminmax(tokens))
        if low < 0 or high >= self.vocab_size:
            raise UserError(f"token ids run from 0 to {self.vocab_size - 1} here (given: {low} to {high})")
        return tokens

    def _path(self, path: Sequence[int] | None, past: KeyValueCache | None) -> tuple[int, ...]:
        if path is None:
            chosen = tuple(range(self.num_layers)) if past is None else past.path
        else:
            chosen = tuple(path)
        if missing := [number for number in chosen if not 0 <= number < self.num_layers]:
            raise UserError(f"the model has the layers 0 to {self.num_layers - 1}; the path names {missing}")
        if past is not None and past.path != chosen:
            raise UserError("`past` was made along another path of layers: prefill along this one")
        return chosen

    def _watchers(self, attention: str | None, num_layers: int, watched: list[Tensor]) -> list[Hook]:
        """Hooks that put each layer's attention, `[B, H]` or `[B, H, S]`, into `watched`."""
        if attention not in (None, "argmax", "rows"):
            raise UserError(f"attention can be 'argmax', 'rows' or None (given: {attention!r})")

        def keep(row: Tensor) -> None:
            watched.append(row[:, :, -1].argmax(dim=-1) if attention == "argmax" else row[:, :, -1])

        # The largest score is the largest of the row: no softmax needed.
        point = "attn.scores" if attention == "argmax" else "attn.pattern"
        return [Hook(point, layer, keep) for layer in range(num_layers)] if attention else []


@torch.no_grad()
def mean_head_output(lm: HookedLM, batches: Iterable[Tensor]) -> Tensor:
    """Mean of "attn.z" over all positions of token batches `[B, T]`: `[L, H, K]`, for mean ablation."""
    total: Tensor | float = 0.0
    count = 0
    for tokens in batches:
        kept = lm.forward(tokens, cache=["attn.z"], logits="none").kept
        total = total + kept.stack("attn.z").float().sum(dim=(1, 2))
        count += tokens.numel()
    if not isinstance(total, Tensor):
        raise UserError("mean_head_output needs at least one batch of tokens")
    return total / count


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`rotate` on the first channels, as many as the tables have; GPT-NeoX leaves the others as they are."""
    size = cosine.shape[-1]
    if size == x.shape[-1]:
        return rotate(x, cosine, sine)
    return torch.cat([rotate(x[..., :size], cosine, sine), x[..., size:]], dim=-1)


def _visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys each query sees, `[T, S]`; None if all of them. The queries are the last of the keys' tokens."""
    if num_queries == 1 and (window is None or num_keys <= window):
        return None
    row = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    column = torch.arange(num_keys, device=device)
    visible = column <= row
    return visible if window is None else visible & (column > row - window)


def _fused_attention(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries `[B, H, T, K]`, keys and values `[B, H_kv, S, K]` to `[B, H, T, K]`."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    whole = num_queries == num_keys and (layer.window is None or num_keys <= layer.window)
    mask = None if whole else _visible(num_queries, num_keys, layer.window, q.device)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None:  # a mask and shared heads together would leave the fused kernels
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        groups = 1
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=whole and num_queries > 1, scale=layer.scale, enable_gqa=groups > 1
    )


def _explicit_attention(layer: Layer, index: int, q: Tensor, k: Tensor, v: Tensor, taps: Taps) -> Tensor:
    batch_size, num_heads, num_queries, head_size = q.shape
    shared, num_keys = k.shape[1], k.shape[2]
    # Queries that share keys are stacked under one another, so that keys are not copied.
    stacked = (batch_size, shared, num_heads // shared * num_queries, -1)
    scores = q.reshape(*stacked[:3], head_size) @ k.transpose(2, 3) * layer.scale
    scores = scores.reshape(batch_size, num_heads, num_queries, num_keys)
    visible = _visible(num_queries, num_keys, layer.window, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    scores = taps("attn.scores", index, scores)
    if visible is not None and taps.hooked("attn.scores", index):
        scores = scores.masked_fill(~visible, -torch.inf)  # the future stays hidden, whatever a hook wrote
    pattern = taps("attn.pattern", index, scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype))
    return (pattern.reshape(*stacked[:3], num_keys) @ v).reshape(batch_size, num_heads, num_queries, -1)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next tokens `[B, 1]`."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(dim=-1), 1, generator=generator)
