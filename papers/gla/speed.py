"""What operators and models cost: time over length, of one layer's operator and of a whole training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels.bench import forward_backward, measure, peak_memory_mib
from kernels.linear_attention import gla
from kernels.linear_attention.reference import gla_reference
from shared.evaluation.language import token_loss

from .config import Params, Speed
from .model import build_model

# A function and the tensors to call it with.
Case = tuple[Callable[..., Any], tuple[Tensor, ...]]
Row = dict[str, Any]


def measure_costs(params: Params, vocab_size: int, device: torch.device) -> list[Row]:
    """Rows of costs.csv; the seed of a row is the number of the measurement, in which all models take turns."""
    return [*operator_costs(params.speed, device), *training_costs(params, vocab_size, device)]


# --- Operators --------------------------------------------------------------------------------------------------------


def operator_costs(speed: Speed, device: torch.device) -> Iterator[Row]:
    """Milliseconds of the operators by length, forward and with the backward pass, and the exponent of their growth."""
    for name, timed in (("forward", _forward), ("forward+backward", forward_backward)):
        for repeat in range(speed.repeats):
            times: dict[str, dict[int, float]] = {}
            for length in speed.lengths:
                cases = operators(length, speed, device)
                timed_cases = {key: timed(function, *inputs) for key, (function, inputs) in cases.items()}
                for key, seconds in measure(timed_cases, repeats=1).items():
                    times.setdefault(key, {})[length] = 1e3 * seconds
            for key, by_length in times.items():
                row = {"model": key, "dataset": f"operator/{name}", "seed": repeat}
                for length, milliseconds in by_length.items():
                    yield row | {"metric": "milliseconds", "length": length, "value": milliseconds}
                if len(by_length) > 1:
                    yield row | {"metric": "exponent", "value": exponent(by_length)}


def operators(length: int, speed: Speed, device: torch.device) -> dict[str, Case]:
    """The operators that are timed at a length, with random inputs [B, T, H, K]."""
    shape = (speed.batch_size, length, speed.num_heads, speed.head_size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    # Gates as they are in a layer that has not been trained: sigmoids to the power of 1/16.
    g = functional.logsigmoid(torch.randn(shape, device=device, dtype=dtype)) / 16
    cases: dict[str, Case] = {
        "attention": (attention, (q, k, v)),
        "linear_attention": (gla, (q, k, v)),
        "gla": (gla, (q, k, v, g)),
    }
    if device.type == "cuda":
        cases["linear_attention_pytorch"] = (linear_attention_pytorch, (q, k, v))
    if length <= speed.recurrent_up_to:
        cases["gla_recurrent"] = (gla_reference, (q, k, v, g))
    return cases


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention by PyTorch's best kernel (FlashAttention-2 on GPUs), [B, T, H, K] in and out."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def linear_attention_pytorch(q: Tensor, k: Tensor, v: Tensor, chunk_size: int = 64) -> Tensor:
    """Chunkwise linear attention as one writes it in PyTorch (section 2.2), [B, T, H, K] in and out."""
    q, k, v = (x.transpose(1, 2).unflatten(2, (-1, chunk_size)) for x in (q * q.shape[-1] ** -0.5, k, v))
    of_chunks = k.mT @ v
    before = of_chunks.cumsum(2) - of_chunks
    return (q @ before + (q @ k.mT).tril() @ v).flatten(2, 3).transpose(1, 2)


def exponent(times: dict[int, float]) -> float:
    """The slope of log time over log length: 1 where time is proportional to length, 2 where to its square."""
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0])


def _forward(function: Callable[..., Any], *inputs: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(*inputs)

    return run


# --- Models -----------------------------------------------------------------------------------------------------------


def training_costs(params: Params, vocab_size: int, device: torch.device) -> Iterator[Row]:
    """Milliseconds (on GPUs also peak memory) of forward and backward pass of whole models, by length of context.

    Every step is on as many tokens: the longer the sequences, the fewer of them.
    """
    speed = params.speed
    models = {arm: build_model(arm, params.language.network, vocab_size).to(device) for arm in speed.models}
    for length in speed.training_lengths:
        tokens = torch.randint(vocab_size, (speed.training_tokens // length, length + 1), device=device)
        cases = {arm: partial(training_step, model, tokens) for arm, model in models.items()}
        common = {"dataset": "training_step", "length": length}
        for repeat in range(speed.repeats):
            for arm, seconds in measure(cases, repeats=1).items():
                yield common | {"model": arm, "metric": "milliseconds", "seed": repeat, "value": 1e3 * seconds}
        if device.type == "cuda":
            for arm, case in cases.items():
                yield common | {"model": arm, "metric": "peak_memory_mib", "seed": 0, "value": peak_memory_mib(case)}


def training_step(model: torch.nn.Module, tokens: Tensor) -> None:
    """Forward and backward pass of a language model on windows [B, T + 1]; on GPUs in bfloat16."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        loss = token_loss(model(tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    model.zero_grad(set_to_none=True)
