"""The language models that are compared: DeltaNet, its ablations and hybrids, and the baselines.

All are stacks of the same block, a token mixer and then SwiGLU, and differ in the token mixer. Two of them come with
other feed-forwards, as published, by which all have about as many parameters: Mamba has more mixers instead (twice as
many at the paper's sizes), and RetNet, whose mixer is twice as large, has them half as wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, PositiveInt, model_validator
from torch import Tensor, nn

from shared.config import Strict, UserError
from shared.nn.attention import Attention
from shared.nn.delta_net import DeltaNet
from shared.nn.hyena import Hyena
from shared.nn.language_model import LanguageModel, default_feed_forward_size
from shared.nn.linear_attention import GatedLinearAttention, LinearAttention, Retention
from shared.nn.mamba import Mamba


class ModelSettings(Strict):
    """Sizes of the models, the same for all.

    `feed_forward_size`: hidden size of SwiGLU; None is the paper's 256 ⌈8/3 · hidden_size / 256⌉, and 0 leaves the
    feed-forward out. `gla_num_heads`: as `num_heads` where None. `window`: of the sliding-window attention, in tokens;
    the paper does not say how long it is. `max_length`: longest sequence of Hyena, whose filters span it.
    """

    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    gla_num_heads: PositiveInt | None = None
    feed_forward_size: int | None = Field(None, ge=0)
    convolution_size: PositiveInt = 4
    state_size: PositiveInt = 16
    window: PositiveInt = 64
    max_length: PositiveInt = 2048
    hyena_num_heads: PositiveInt = 8
    tie_embeddings: bool = True
    checkpoint_blocks: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelSettings:
        for heads in (self.num_heads, self.gla_num_heads or self.num_heads):
            # Rotary embeddings take channels in pairs, and GLA gives its keys half of them.
            if self.hidden_size % (4 * heads):
                raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of four times {heads} heads")
        return self


def _delta_net(**options: Any) -> Callable[[ModelSettings], nn.Module]:
    return lambda s: DeltaNet(s.hidden_size, s.num_heads, **{"short_convolution": s.convolution_size} | options)


def _gla(*, convolution: bool) -> Callable[[ModelSettings], nn.Module]:
    return lambda s: GatedLinearAttention(
        s.hidden_size,
        s.gla_num_heads or s.num_heads,
        short_convolution=s.convolution_size if convolution else None,
    )


MIXERS: dict[str, Callable[[ModelSettings], nn.Module]] = {
    "transformer": lambda s: Attention(s.hidden_size, s.num_heads),
    "linear_attention": lambda s: LinearAttention(s.hidden_size, s.num_heads),
    "retnet": lambda s: Retention(s.hidden_size, s.num_heads),
    "mamba": lambda s: Mamba(s.hidden_size, state_size=s.state_size, convolution_size=s.convolution_size),
    "hyena": lambda s: Hyena(s.hidden_size, max_length=s.max_length),
    "hyena_multi_head": lambda s: Hyena(s.hidden_size, max_length=s.max_length, num_heads=s.hyena_num_heads),
    "gla": _gla(convolution=False),
    "gla_conv": _gla(convolution=True),
    "deltanet": _delta_net(),
    "deltanet_no_conv": _delta_net(short_convolution=None),
    "deltanet_l1_elu": _delta_net(norm="l1", feature_map="elu"),
    "deltanet_l2_elu": _delta_net(feature_map="elu"),
    "deltanet_l2_relu": _delta_net(feature_map="relu"),
}
HYBRIDS = ("deltanet_swa", "deltanet_global")
MODELS = (*MIXERS, *HYBRIDS)


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ValueError(f"unknown model {unknown[0]!r}; choose among {', '.join(MODELS)}")
    if len(set(names)) < len(names):
        raise ValueError("a model is listed twice")
    return names


ModelNames = Annotated[tuple[str, ...], AfterValidator(_known)]


class Autoencoder(nn.Module):
    """Tokens [B, T] to the logits [B, T, vocab_size] of these tokens, all decoded from the output at the last of them.

    The decoder is a network of one hidden layer that reads that output and an embedding of the place asked for. It is
    what MAD's compression asks of a model (Poli et al. 2024, section 3); T is at most `length`.
    """

    def __init__(self, encoder: LanguageModel, vocab_size: int, length: int) -> None:
        super().__init__()
        self.encoder = encoder
        size = encoder.embedding.embedding_dim
        self.places = nn.Parameter(0.02 * torch.randn(length, size))
        self.decoder = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, vocab_size))

    def forward(self, tokens: Tensor, *, keep_state: bool = False) -> Tensor | tuple[Tensor, list[Any]]:
        features, state = self.encoder.features(tokens, keep_state=keep_state)
        logits = self.decoder(features[:, -1:] + self.places[: tokens.shape[1]])
        return (logits, state) if keep_state else logits

    def num_parameters(self) -> int:
        """Trained numbers of encoder and decoder."""
        return sum(parameter.numel() for parameter in self.parameters())


def build_model(
    name: str, settings: ModelSettings, vocab_size: int, *, reconstruct: bool = False
) -> LanguageModel | Autoencoder:
    """A model by name, one of `MODELS`; `UserError` for any other. With `reconstruct` it is an `Autoencoder`."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    num_layers, feed_forward_size = settings.num_layers, settings.feed_forward_size
    if feed_forward_size is None:
        feed_forward_size = default_feed_forward_size(settings.hidden_size)
    if name == "mamba":
        # The other mixers have 4 d² weights and a feed-forward 3 d f, Mamba's has 6 d²; to the nearest half of a layer.
        halves = round(2 * (4 * settings.hidden_size + 3 * feed_forward_size) / (6 * settings.hidden_size))
        num_layers, feed_forward_size = max(num_layers, halves * num_layers // 2), 0
    if name == "retnet":
        feed_forward_size //= 2
    model = LanguageModel(
        vocab_size,
        settings.hidden_size,
        num_layers,
        lambda layer: build_mixer(name, settings, layer),
        feed_forward_size=feed_forward_size,
        tie_embeddings=settings.tie_embeddings,
        checkpoint_blocks=settings.checkpoint_blocks,
    )
    return Autoencoder(model, vocab_size, settings.max_length) if reconstruct else model


def build_mixer(name: str, settings: ModelSettings, layer: int) -> nn.Module:
    """The token mixer of a layer, counted from 0."""
    if name not in HYBRIDS:
        return MIXERS[name](settings)
    if layer not in attention_layers(name, settings.num_layers):
        return MIXERS["deltanet"](settings)
    window = settings.window if name == "deltanet_swa" else None
    return Attention(settings.hidden_size, settings.num_heads, window=window)


def attention_layers(name: str, num_layers: int) -> tuple[int, ...]:
    """The layers, counted from 0, in which a hybrid has attention (section 3.4).

    Sliding windows: every other layer. Global: the second layer and, counted from 1, layer N/2 + 1.
    """
    if name == "deltanet_swa":
        return tuple(range(1, num_layers, 2))
    return tuple(sorted({1, num_layers // 2}))


def num_state_elements(state: object) -> int:
    """How many numbers a model keeps of one sequence from step to step: of its states, or of its keys and values."""
    return sum(tensor[0].numel() for tensor in _tensors(state))


def _tensors(state: object) -> Iterator[Tensor]:
    """The tensors of a state, which is opaque: they lie in lists, tuples and mappings."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        yield from (tensor for part in state.values() for tensor in _tensors(part))
    elif isinstance(state, list | tuple):
        yield from (tensor for part in state for tensor in _tensors(part))
