"""The house language model: one small decoder that papers train once and look into many times."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from shared.config import Strict, UserError, validate
from shared.files import write_json
from shared.nn.attention import split_heads
from shared.nn.language_model import SwiGLU

SIZES: dict[str, dict[str, int]] = {
    "S": {"num_layers": 4, "num_heads": 4, "hidden_size": 64},  # 277,056 parameters with 640 tokens
    "M": {"num_layers": 6, "num_heads": 4, "hidden_size": 96},
    "T": {"num_layers": 4, "num_heads": 4, "hidden_size": 96},
    "D": {"num_layers": 8, "num_heads": 4, "hidden_size": 64},
}
ACTIVATIONS = {"silu": functional.silu, "relu": functional.relu, "gelu": functional.gelu}


class HouseConfig(Strict):
    """Shape of a house model; the defaults are the Llama family's.

    `act="silu"` makes a gated feed-forward layer (SwiGLU) of ⌊8d/3⌋ channels, rounded down to a multiple of 8; "relu"
    and "gelu" a plain one of 4d. `num_key_value_heads` below `num_heads` shares each key and value among a group of
    queries. `max_length` is the longest context the model accepts: the number of positions where they are learned, and
    a limit to move (`model_copy(update=…)`) where they are rotary.
    """

    vocab_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    act: Literal["silu", "relu", "gelu"] = "silu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(default=1e-6, gt=0)
    pos: Literal["rotary", "learned"] = "rotary"
    rotary_base: float = Field(default=10000.0, gt=1)
    max_length: int = Field(default=2048, ge=1)

    @model_validator(mode="after")
    def _heads_must_fit(self) -> HouseConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.pos == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions turn pairs of channels: head size {self.head_size} must be even")
        if self.num_heads % self.key_value_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_key_value_heads")
        return self

    @classmethod
    def of_size(cls, size: str, vocab_size: int, **options: Any) -> HouseConfig:
        """The configuration named `size` (a key of SIZES), with further fields in `options`."""
        if size not in SIZES:
            raise UserError(f"there is no house model size {size!r}: choose one of {', '.join(SIZES)}")
        return validate(cls, {"vocab_size": vocab_size, **SIZES[size], **options}, f"house model of size {size}")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_heads

    @property
    def feed_forward_size(self) -> int:
        return 8 * self.hidden_size // 3 // 8 * 8 if self.act == "silu" else 4 * self.hidden_size


class Attention(nn.Module):
    """Causal attention, `[B, T, d]` to the same; queries and keys turned by `rotation` (see `rotation_table`)."""

    def __init__(self, config: HouseConfig) -> None:
        super().__init__()
        self.num_heads, self.key_value_heads = config.num_heads, config.key_value_heads
        size, shared_size = config.hidden_size, config.key_value_heads * config.head_size
        self.query = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, shared_size, bias=False)
        self.value = nn.Linear(size, shared_size, bias=False)
        self.output = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self.heads(x, rotation)
        grouped = self.key_value_heads != self.num_heads
        z = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.output(z.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H, T, K]`, keys and values `[B, H_kv, T, K]`, turned."""
        q = split_heads(self.query(x), self.num_heads).transpose(1, 2)
        k, v = (split_heads(f(x), self.key_value_heads).transpose(1, 2) for f in (self.key, self.value))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v


class FeedForward(nn.Module):
    """Plain feed-forward layer act(x W_1) W_2, without biases."""

    def __init__(self, hidden_size: int, inner_size: int, act: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.input = nn.Linear(hidden_size, inner_size, bias=False)
        self.output = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.act(self.input(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: HouseConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = make_norm(config)
        if config.act == "silu":
            self.feed_forward = SwiGLU(config.hidden_size, config.feed_forward_size)
        else:
            self.feed_forward = FeedForward(config.hidden_size, config.feed_forward_size, config.act)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.feed_forward(self.feed_forward_norm(x))


class HouseModel(nn.Module):
    """Tokens `[B, T]` int64 to the logits of the next tokens `[B, T, vocab_size]`.

    Pre-norm decoder with untied embedding and head. Weights begin as N(0, 0.02²); those that write into the residual
    stream, W_O and W_down, as N(0, 0.02²/2L) (Radford et al., GPT-2 (2019), section 2.3).
    """

    def __init__(self, config: HouseConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_length, config.hidden_size) if config.pos == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin anew with the current random state."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = name.startswith("blocks.") and ".output." in name
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.num_layers) if writes else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x, rotation = self.embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Tokens `[B, T]` at `positions` `[T]` as the first residual stream `[B, T, d]`, and their rotation."""
        check_length(tokens.shape[1], self.config.max_length)
        x = self.embedding(tokens)
        if self.positions is not None:
            return x + self.positions(positions), None
        return x, rotation_table(positions, self.config.head_size, self.config.rotary_base, x.dtype)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def save(self, folder: Path, vocabulary: Sequence[str]) -> None:
        """Write `config.json`, `vocab.json` (the tokens in the order of their ids) and `model.safetensors`."""
        from shared.training.checkpoint import save_weights

        if len(vocabulary) != self.config.vocab_size or len(set(vocabulary)) != len(vocabulary):
            raise UserError(
                f"the vocabulary must be {self.config.vocab_size} different tokens, one an embedding "
                f"(given: {len(vocabulary)}, {len(set(vocabulary))} different)"
            )
        folder = Path(folder)
        write_json(folder / "config.json", {"model_type": "house", **self.config.model_dump()})
        write_json(folder / "vocab.json", list(vocabulary))
        save_weights(folder / "model.safetensors", self)

    @classmethod
    def load(cls, folder: Path) -> HouseModel:
        """The model that `save` wrote, in evaluation mode on the CPU."""
        from shared.training.checkpoint import load_weights

        folder = Path(folder)
        config = dict(read_json(folder / "config.json"))
        if config.pop("model_type", None) != "house":
            raise UserError(f"{folder / 'config.json'} does not describe a house model (model_type is not 'house')")
        with torch.random.fork_rng(devices=[]):  # loading must not move the caller's random numbers
            model = cls(validate(HouseConfig, config, str(folder / "config.json")))
        load_weights(folder / "model.safetensors", model)
        return model.eval()


def make_norm(config: HouseConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


def rotation_table(positions: Tensor, head_size: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, K]` by which `rotate` turns the channel pairs (i, i + K/2).

    Su et al., "RoFormer" (2021), section 3.2.
    """
    # In float64, where an angle of a million radians still has ten digits behind the point.
    half = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float64)
    angle = (positions[:, None] * base ** (-half / head_size)).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the channel pairs of `[B, H, T, K]` by their positions' angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def check_length(length: int, max_length: int) -> None:
    if length > max_length:
        raise UserError(
            f"the context is {length} tokens long and the model has {max_length} positions: shorten the context, or "
            "take a model of longer context"
        )


def read_json(path: Path) -> Any:
    """A JSON file of a model folder; missing or damaged is a `UserError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not the folder of a trained model") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): train the model again") from None
