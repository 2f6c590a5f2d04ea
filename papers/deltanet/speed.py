"""How long the operator takes, chunkwise and step by step, and a training step of whole models; measured in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional

from kernels.bench import forward, forward_backward, rounds
from kernels.delta_rule import delta_rule, delta_rule_step
from shared.config import Strict
from shared.evaluation.language import token_loss

from .model import ModelNames, ModelSettings, build_model


class OperatorSpeed(Strict):
    """Shapes that the operator is timed at: a batch of one, `hidden_size / head_dim` heads."""

    lengths: tuple[PositiveInt, ...] = Field(min_length=3)
    head_dims: tuple[PositiveInt, ...] = Field(min_length=1)
    hidden_size: PositiveInt = 128
    rounds: int = Field(3, ge=3)

    @model_validator(mode="after")
    def _heads_divide(self) -> OperatorSpeed:
        for dim in self.head_dims:
            if self.hidden_size % dim:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) must be a multiple of every head dim; {dim} is none"
                )
        return self


class ModelSpeed(Strict):
    """Models whose training step is timed, at every length with `tokens` tokens in all."""

    models: ModelNames = Field(min_length=1)
    network: ModelSettings
    vocab_size: PositiveInt = 256
    tokens: PositiveInt
    lengths: tuple[PositiveInt, ...] = Field(min_length=1)
    rounds: int = Field(3, ge=3)

    @model_validator(mode="after")
    def _lengths_divide(self) -> ModelSpeed:
        for length in self.lengths:
            if self.tokens % length:
                raise ValueError(f"tokens ({self.tokens}) must be a multiple of every length; {length} is none")
        return self


class SpeedSettings(Strict):
    """What is timed."""

    operator: OperatorSpeed
    throughput: ModelSpeed


def recurrent(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The delta rule token by token (section 2); shapes as in `kernels.delta_rule`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    outputs = []
    for step in range(q.shape[1]):
        output, state = delta_rule_step(q[:, step], k[:, step], v[:, step], beta[:, step], state=state)
        outputs.append(output)
    return torch.stack(outputs, dim=1)


def chunk(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The delta rule by chunks (section 3.2)."""
    return delta_rule(q, k, v, beta)[0]


def attention(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """Causal softmax attention, whose cost is quadratic in the length, as a reference; beta is not used."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    # Keeps beta in the graph, so that all are asked for the same gradients.
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2) + 0 * beta[..., None]


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"recurrent": recurrent, "chunk": chunk, "attention": attention}


def operator_times(settings: OperatorSpeed, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of costs: milliseconds by implementation, head dimension and length, and the speed-up over the recurrence.

    The seed of a row is the number of the round.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for dim in settings.head_dims:
        for length in settings.lengths:
            inputs = _inputs(length, settings.hidden_size // dim, dim, device, dtype)
            cases: dict[str, dict[str, Callable[[], object]]] = {
                "forward": {name: forward(function, *inputs) for name, function in IMPLEMENTATIONS.items()},
                "forward+backward": {
                    name: forward_backward(function, *inputs) for name, function in IMPLEMENTATIONS.items()
                },
            }
            for direction, of_direction in cases.items():
                for seed, taken in enumerate(rounds(of_direction, settings.rounds)):
                    common = {"seed": seed, "length": length}
                    for name, duration in taken.items():
                        where = {"model": name, "dataset": f"speed/head_dim_{dim}/{direction}"}
                        yield common | where | {"metric": "milliseconds", "value": 1000 * duration}
                    where = {"model": f"head_dim_{dim}", "dataset": f"speed/{direction}"}
                    yield common | where | {"metric": "speedup", "value": taken["recurrent"] / taken["chunk"]}


def _inputs(length: int, heads: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, length, heads, dim, generator=generator)
    beta = torch.rand(1, length, heads, generator=generator)
    q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
    return tuple(tensor.to(device, dtype) for tensor in (q, k, v, beta))


def throughput(settings: ModelSpeed, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of costs: tokens a second of a training step without the optimizer (in bf16 on a GPU), models in turns."""
    models = {
        name: build_model(name, settings.network, settings.vocab_size).to(device).train() for name in settings.models
    }
    generator = torch.Generator().manual_seed(0)
    for length in settings.lengths:
        shape = (settings.tokens // length, length)
        tokens = torch.randint(settings.vocab_size, shape, generator=generator).to(device)
        cases = {name: _training_step(model, tokens) for name, model in models.items()}
        for seed, taken in enumerate(rounds(cases, settings.rounds)):
            for name, duration in taken.items():
                row = {"model": name, "dataset": "throughput", "metric": "tokens_per_second", "seed": seed}
                yield row | {"length": length, "value": settings.tokens / duration}


def _training_step(model: nn.Module, tokens: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            loss = token_loss(model(tokens), tokens)
        loss.backward()
        model.zero_grad()

    return run
