"""The language models that are compared. All are built of the same blocks and differ in the token mixer alone.

| arm | token mixer |
|---|---|
| `transformer` | softmax attention with rotary embeddings |
| `retnet` | retention, in RetNet's own layer: rotary embeddings, values twice as wide |
| `mamba` | Mamba's selective scan, two layers in the place of a mixer and a feed-forward |
| `hyena` | Hyena's long convolutions with implicit filters |
| `rwkv4` | RWKV-4's time mix and, in the place of the feed-forward, its channel mix |
| `gla` | gated linear attention with a gate for every key channel |
| `gla_scalar`, `gla_constant`, `gla_no_gate` | the same layer with one gate a head and token, RetNet's decay, or none |
| `gla_8_heads`, `gla_1_head` | `gla` with so many heads |
| `gla_long`, `gla_truncated` | `gla`, trained on longer sequences: directly, or by truncated backpropagation |
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt
from torch import nn

from shared.config import Strict, UserError
from shared.nn.attention import Attention
from shared.nn.hyena import Hyena
from shared.nn.language_model import LanguageModel, default_feed_forward_size
from shared.nn.linear_attention import GatedLinearAttention, Retention
from shared.nn.mamba import Mamba
from shared.nn.rwkv import RWKV4ChannelMix, RWKV4TimeMix

GLA_VARIANTS: dict[str, dict[str, Any]] = {
    "gla": {},
    "gla_scalar": {"gate": "scalar"},
    "gla_constant": {"gate": "constant"},
    "gla_no_gate": {"gate": "none"},
    "gla_8_heads": {"num_heads": 8},
    "gla_1_head": {"num_heads": 1},
    "gla_long": {},
    "gla_truncated": {},
}
ARMS = ("transformer", "retnet", "mamba", "hyena", "rwkv4", *GLA_VARIANTS)


class ModelSettings(Strict):
    """Sizes of the models. All arms get them, the number of parameters as equal as the mixers allow."""

    hidden_size: PositiveInt = Field(description="d")
    num_layers: PositiveInt
    num_heads: PositiveInt = 4
    state_size: PositiveInt = Field(16, description="of Mamba, for each channel")
    max_length: PositiveInt = Field(2048, description="of the sequences that Hyena's filters span")
    gate_normalizer: float = Field(16.0, gt=0, description="τ: gates are sigmoids to the power of 1/τ")
    tie_embeddings: bool = True
    checkpoint_blocks: bool = Field(False, description="recompute activations in the backward pass, to save memory")


def build_model(arm: str, settings: ModelSettings, vocab_size: int) -> LanguageModel:
    """A language model by the name of its arm; `UserError` for a name that is not in `ARMS`."""
    check_arm(arm)
    d, heads = settings.hidden_size, settings.num_heads
    num_layers, feed_forward_size = settings.num_layers, default_feed_forward_size(d)

    def mixer(layer: int) -> nn.Module:
        if arm == "transformer":
            return Attention(d, heads)
        if arm == "retnet":
            return Retention(d, heads)
        if arm == "mamba":
            return Mamba(d, state_size=settings.state_size)
        if arm == "hyena":
            return Hyena(d, max_length=settings.max_length)
        if arm == "rwkv4":
            mix = RWKV4ChannelMix if layer % 2 else RWKV4TimeMix
            return mix(d, layer=layer // 2, num_layers=settings.num_layers)
        return GatedLinearAttention(
            d, **({"num_heads": heads, "gate_normalizer": settings.gate_normalizer} | GLA_VARIANTS[arm])
        )

    if arm in ("mamba", "rwkv4"):
        num_layers, feed_forward_size = 2 * num_layers, 0
    if arm == "retnet":
        # Its mixer has 8 d² parameters instead of 4 d²: SwiGLU, with 3 d for each hidden unit, makes up for them.
        feed_forward_size = 8 * round((feed_forward_size - 4 * d / 3) / 8)
    return LanguageModel(
        vocab_size,
        d,
        num_layers,
        mixer,
        feed_forward_size=feed_forward_size,
        tie_embeddings=settings.tie_embeddings,
        checkpoint_blocks=settings.checkpoint_blocks,
    )


def check_arm(arm: str) -> None:
    """Refuse a name that is none of `ARMS`."""
    if arm not in ARMS:
        raise UserError(f"unknown model {arm!r}; choose one of {', '.join(ARMS)}")
