"""Losses and metrics of models that predict tokens.

A model is anything that maps int64 tokens [batch, length] to logits [batch, length, vocabulary]. Losses are in nats.
Evaluation takes tokens of any integer type, runs without gradients, in batches, on the model's device, and leaves the
model in the mode it was in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.config import UserError

Model = Callable[[Tensor], Tensor]
TokenArray = NDArray[np.integer] | Tensor

IGNORED = -100


def token_loss(logits: Tensor, labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Mean cross-entropy over the labeled tokens, in nats: logits [..., vocabulary], labels [...]; a scalar.

    Computed in single precision at least. Zero where no token is labeled.
    """
    losses = _losses(logits, labels, ignore_index)
    return losses.sum() / (labels != ignore_index).sum().clamp(min=1)


def labeled_objective(model: Model, batch: tuple[Tensor, ...], moment: object) -> dict[str, Tensor]:
    """Loss for `shared.training.fit` on (inputs, labels), [batch, length] each, `IGNORED` where nothing is asked."""
    inputs, labels = batch
    logits, asked = model(inputs), labels != IGNORED
    # Where few tokens are labeled and the vocabulary is large, the softmax over the others would cost the most.
    return {"loss": token_loss(logits[asked], labels[asked])}


def answer_accuracy(
    model: Model, inputs: TokenArray, labels: TokenArray, batch_size: int = 32, ignore_index: int = IGNORED
) -> float:
    """Fraction of the labeled tokens that get the largest logit; inputs and labels [num_examples, length].

    `UserError` if no token is labeled.
    """
    inputs, labels = torch.as_tensor(inputs), torch.as_tensor(labels)
    if inputs.shape != labels.shape:
        raise UserError(f"inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)} must have the same shape")
    asked = labels != ignore_index
    if not asked.any():
        raise UserError("no token is labeled, so there is no accuracy: check the labels")
    correct = 0
    with _evaluating(model) as device:
        for batch, answers, mask in _batches(batch_size, device, inputs, labels, asked):
            correct += int((model(batch.long())[mask].argmax(dim=-1) == answers[mask]).sum())
    return correct / int(asked.sum())


def loss_by_position(model: Model, windows: TokenArray, batch_size: int = 32) -> NDArray[np.float64]:
    """Mean loss at every position of windows [num_windows, length + 1], in nats: [length].

    Its mean is the loss over all windows.
    """
    windows = torch.as_tensor(windows)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UserError(f"windows are [at least 1, at least 2] tokens, not {tuple(windows.shape)}")
    total = np.zeros(windows.shape[1] - 1)
    with _evaluating(model) as device:
        for (batch,) in _batches(batch_size, device, windows):
            batch = batch.long()
            losses = _losses(model(batch[:, :-1]), batch[:, 1:], IGNORED)
            total += losses.sum(dim=0, dtype=torch.float64).cpu().numpy()
    return total / len(windows)


def bits(nats: float) -> float:
    """Nats to bits: bits a token, which are bits a character where tokens are characters. Arrays go too."""
    return nats / math.log(2)


def _losses(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy of every token, in the shape of the labels; zero where it is ignored."""
    if logits.shape[:-1] != labels.shape:
        raise UserError(
            f"logits {tuple(logits.shape)} must be those of labels {tuple(labels.shape)}, the vocabulary as last axis"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    flat = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none")
    return flat.view(labels.shape)


def _batches(batch_size: int, device: torch.device | None, *arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but must be at least 1")
    for parts in zip(*(array.split(batch_size) for array in arrays), strict=True):
        yield tuple(part.to(device) for part in parts)


@contextmanager
def _evaluating(model: Model) -> Iterator[torch.device | None]:
    """Evaluation mode without gradients; yields the model's device. Every module gets its own mode back."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    # One by one, since a part of a model may be kept in evaluation mode on purpose.
    modes = [module.training for module in modules]
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    try:
        if isinstance(model, nn.Module):
            model.eval()
        with torch.no_grad():
            yield None if parameter is None else parameter.device
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
