"""Training of language models on arrays of tokens, counted in optimizer steps: running text and recall tasks alike."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning_fabric import Fabric
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shared.config import Strict, UserError
from shared.evaluation.language import IGNORED, labeled_objective, token_loss
from shared.nn.language_model import detach_state
from shared.training.loop import FitResult, Loss, MetricLog, Moment, Report, Validation, fit
from shared.training.settings import TrainingSettings

# Larger sets of examples, such as memory-mapped files, stay where they are and send their batches over.
MAX_BYTES_ON_DEVICE = 2**30


class LanguageTraining(Strict):
    """The recipe that language models are trained by: AdamW, linear warm-up, cosine, clipped gradients."""

    steps: PositiveInt
    batch_size: PositiveInt = Field(description="sequences a step, over all processes together")
    learning_rate: PositiveFloat
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = Field(0, ge=0)
    final_fraction: float = Field(0.1, ge=0, le=1, description="last learning rate, as a fraction of the highest")
    gradient_clip: PositiveFloat | None = 1.0
    validations: PositiveInt = Field(1, description="equally spaced, the last at the end; the best one is kept")
    checkpoint_every_steps: PositiveInt | None = Field(None, description="in addition to one at every validation")
    log_every_steps: PositiveInt | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"

    @model_validator(mode="after")
    def _steps_divide(self) -> LanguageTraining:
        if self.steps % self.validations:
            raise ValueError(f"steps ({self.steps}) must be a multiple of validations ({self.validations})")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be fewer than steps ({self.steps})")
        return self

    @property
    def steps_between_validations(self) -> int:
        return self.steps // self.validations

    def loop_settings(self) -> TrainingSettings:
        """The same for the training loop, whose epochs reach from one validation to the next."""
        return TrainingSettings(
            epochs=self.validations,
            warmup_epochs=self.warmup_steps / self.steps_between_validations,
            optimizer="adamw",
            schedule="cosine",
            **self.model_dump(exclude={"steps", "warmup_steps", "validations"}),
        )


def train_language_model(
    model: nn.Module,
    examples: Tensor | tuple[Tensor, Tensor],
    validate: Validation | None,
    settings: LanguageTraining,
    *,
    directory: Path,
    seed: int,
    fingerprint: str = "",
    segment_length: int | None = None,
    track: MetricLog | None = None,
    report: Report | None = None,
    fabric: Fabric | None = None,
) -> FitResult:
    """Train `model(tokens [batch, length]) -> logits [batch, length, vocab]` by next-token or label cross-entropy.

    `examples` are windows of text [N, length + 1], each of which predicts its own continuation, or (inputs, labels),
    both [N, length], where labels of -100 do not count; any integer type, memory-mapped ones too. They are gone through
    in an order of `seed` alone, so that all models of a seed see the same batches, as often as `settings.steps` takes.

    With `segment_length` by truncated backpropagation through time: a sequence is read in segments, with the state
    carried over and the gradient cut between them. Everything else is as in `shared.training.fit`, in whose
    `directory` the run is kept; the validation that picks the weights is `validation/loss`.
    """
    inputs, labels = inputs_and_labels(examples)
    if inputs.shape != labels.shape or inputs.ndim != 2:
        raise UserError(f"inputs and labels must be [N, length]; given: {list(inputs.shape)} and {list(labels.shape)}")
    if not len(inputs):
        raise UserError("there is no example to train on: the text is shorter than one window")
    if segment_length is not None and isinstance(examples, tuple):
        raise UserError("segment_length is for windows of text only")
    if segment_length is not None and inputs.shape[1] % segment_length:
        raise UserError(f"segments of {segment_length} tokens do not divide sequences of {inputs.shape[1]}")
    per_epoch = settings.steps_between_validations * settings.batch_size
    order = _order(len(inputs), per_epoch * settings.validations, seed)
    if isinstance(examples, tuple):
        objective: Loss = labeled_objective
    else:
        objective = partial(_next_token_objective, segment_length=segment_length)
    return fit(
        model,
        TensorDataset(torch.arange(per_epoch)),
        _InOrder(inputs, labels, order, objective),
        settings.loop_settings(),
        directory=directory,
        seed=seed,
        fingerprint=f"{fingerprint}/{segment_length}",
        validate=validate,
        track=track,
        report=report,
        fabric=fabric,
    )


def next_token_loss(model: nn.Module, inputs: Tensor, labels: Tensor, segment_length: int | None = None) -> Tensor:
    """Mean cross-entropy in nats of labels [batch, length]; with `segment_length` the gradient is cut between segments.

    The labels of all segments weigh the same, wherever they lie.
    """
    if segment_length is None:
        return token_loss(model(inputs), labels)
    state, total = None, torch.zeros((), device=inputs.device)
    for segment, targets in zip(inputs.split(segment_length, 1), labels.split(segment_length, 1), strict=True):
        logits, state = model(segment, state=detach_state(state), keep_state=True)
        total = total + token_loss(logits, targets) * (targets != IGNORED).sum()
    return total / (labels != IGNORED).sum()


def inputs_and_labels(examples: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Windows [N, length + 1] as inputs and labels, [N, length] each; a pair of these as it is."""
    return examples if isinstance(examples, tuple) else (examples[:, :-1], examples[:, 1:])


class TokenValidation:
    """Mean loss in nats and accuracy over the labels [N, length] that count, `validation/loss` and `…/accuracy`."""

    def __init__(self, examples: Tensor | tuple[Tensor, Tensor], batch_size: int) -> None:
        self.examples = inputs_and_labels(examples)
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        loss = torch.zeros((), dtype=torch.float64, device=device)
        correct, count = torch.zeros_like(loss), torch.zeros_like(loss)
        for inputs, labels in zip(*(part.split(self.batch_size) for part in self.examples), strict=True):
            logits, labels = model(inputs.to(device).long()), labels.to(device).long()
            counted = labels != IGNORED
            loss += token_loss(logits, labels) * counted.sum()
            correct += ((logits.argmax(-1) == labels) & counted).sum()
            count += counted.sum()
        return {"validation/loss": (loss / count).item(), "validation/accuracy": (correct / count).item()}


class _InOrder:
    """An objective on the examples of a batch, which is given as places in the `order` of the whole training."""

    def __init__(self, inputs: Tensor, labels: Tensor, order: Tensor, objective: Loss) -> None:
        self.inputs, self.labels, self.order, self.objective = inputs, labels, order, objective

    def __call__(self, model: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> Mapping[str, Tensor]:
        (places,) = batch
        self._move(places.device)
        first = moment.epoch * (len(self.order) // moment.epochs)
        rows = self.order[(first + places).to(self.order.device)]
        inputs, labels = (part[rows].to(places.device).long() for part in (self.inputs, self.labels))
        return self.objective(model, (inputs, labels), moment)

    def _move(self, device: torch.device) -> None:
        size = 8 * self.inputs.numel()
        if self.inputs.device != device and size <= MAX_BYTES_ON_DEVICE:
            # GPUs index signed integers only.
            self.inputs, self.labels = (part.to(device, torch.int32) for part in (self.inputs, self.labels))
            self.order = self.order.to(device)


def _next_token_objective(
    model: nn.Module, batch: tuple[Tensor, ...], moment: Moment, segment_length: int | None
) -> dict[str, Tensor]:
    return {"loss": next_token_loss(model, *batch, segment_length)}


def _order(size: int, count: int, seed: int) -> Tensor:
    """`count` indices of `size` examples: all of them in a random order, then in another one, and so on."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(size, generator=generator) for _ in range(-(-count // size))]
    return torch.cat(passes)[:count]
