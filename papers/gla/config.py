"""The params of one profile: data, models, training, and what is timed."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from shared.config import Strict, UserError
from shared.training.language import LanguageTraining

from .data import RecallSettings, TextSettings
from .model import ModelSettings, check_arm

TASKS = ("language", "mqar")


def _known(arms: tuple[str, ...]) -> tuple[str, ...]:
    for arm in arms:
        try:
            check_arm(arm)
        except UserError as error:
            raise ValueError(str(error)) from None
    if len(set(arms)) < len(arms):
        raise ValueError("a model is listed twice")
    return arms


Arms = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_known)]


class Experiment(Strict):
    """Which models are trained on a task, how large they are, and how they are trained."""

    models: Arms
    network: ModelSettings
    training: LanguageTraining
    learning_rates: tuple[PositiveFloat, ...] = Field(
        (), description="tried by every model and seed, of which the validation picks one; empty: that of `training`"
    )
    validation_batch_size: PositiveInt = 16

    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return self.learning_rates or (self.training.learning_rate,)


class Recall(Experiment):
    """Multi-query associative recall."""

    data: RecallSettings

    @model_validator(mode="after")
    def _filters_are_long_enough(self) -> Recall:
        if "hyena" in self.models and self.data.length > self.network.max_length:
            raise ValueError(
                f"Hyena needs network.max_length of at least {self.data.length}; given: {self.network.max_length}"
            )
        return self


class Language(Experiment):
    """Language modeling, all arms on as many tokens a step: those of `batch_size` sequences of length `context`."""

    data: TextSettings
    context: PositiveInt = Field(description="length of training sequences")
    long_context: PositiveInt = Field(description="length of training sequences of gla_long")
    truncated_context: PositiveInt = Field(description="and of gla_truncated, in segments of length `context`")
    test_length: PositiveInt = Field(description="of the test sequences in which loss is followed by position")

    @model_validator(mode="after")
    def _lengths_fit(self) -> Language:
        tokens = self.training.batch_size * self.context
        for name, key in (("gla_long", "long_context"), ("gla_truncated", "truncated_context")):
            if name in self.models and tokens % getattr(self, key):
                raise ValueError(f"{key} ({getattr(self, key)}) must divide the {tokens} tokens of a step")
        if self.truncated_context % self.context:
            raise ValueError(f"truncated_context ({self.truncated_context}) must be a multiple of {self.context}")
        if self.context % 2 or self.test_length % self.context or self.test_length < 2 * self.context:
            raise ValueError(
                f"test_length ({self.test_length}) must be a multiple of the context ({self.context}), which must be "
                "even, and at least twice as long"
            )
        return self

    def length_of(self, arm: str) -> int:
        """How long the sequences are that an arm is trained on."""
        return {"gla_long": self.long_context, "gla_truncated": self.truncated_context}.get(arm, self.context)

    def training_of(self, arm: str) -> LanguageTraining:
        """An arm's recipe: the same for all but for the number of sequences a step, which their length decides."""
        batch_size = self.training.batch_size * self.context // self.length_of(arm)
        return self.training.model_copy(update={"batch_size": batch_size})

    def segment_of(self, arm: str) -> int | None:
        """Length of the segments between which an arm's gradient is cut; None where it is not."""
        return self.context if arm == "gla_truncated" else None


class Speed(Strict):
    """What is timed, and at which sizes."""

    batch_size: PositiveInt = 1
    num_heads: PositiveInt = 4
    head_size: PositiveInt = 64
    lengths: tuple[PositiveInt, ...] = Field(min_length=3, description="of the operators' sequences")
    recurrent_up_to: PositiveInt = Field(4096, description="longest sequence that the step recurrence is timed on")
    models: Arms = ("transformer", "retnet", "mamba", "gla")
    training_lengths: tuple[PositiveInt, ...] = Field(min_length=1, description="of the sequences of a training step")
    training_tokens: PositiveInt = Field(description="of a training step, whatever the length")
    repeats: PositiveInt = Field(3, description="independent measurements, each of which is a median")

    @model_validator(mode="after")
    def _lengths_divide(self) -> Speed:
        odd = [length for length in self.training_lengths if self.training_tokens % length]
        if odd:
            raise ValueError(f"training_lengths must divide training_tokens ({self.training_tokens}); not so: {odd}")
        return self


class Params(Strict):
    """A profile's section of params.yaml."""

    seed: int = Field(0, ge=0, description="of the data")
    seeds: tuple[int, ...] = Field(min_length=1, description="of the trainings: weights and order of data")
    workers: PositiveInt = 2
    threads: PositiveInt = 1
    language: Language
    mqar: Recall
    speed: Speed

    def experiment(self, task: str) -> Language | Recall:
        """The experiment of a task, `language` or `mqar`."""
        return self.language if task == "language" else self.mqar

    def tasks_of(self, model: str) -> list[tuple[str, str]]:
        """Pairs of task and arm that `--model` stands for: the model itself and all its variants."""
        return [
            (task, arm)
            for task in TASKS
            for arm in self.experiment(task).models
            if arm == model or arm.startswith(f"{model}_")
        ]
