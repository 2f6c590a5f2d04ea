"""The params of one profile: data, networks, training and what is compared."""

from __future__ import annotations

from typing import get_args

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from shared.config import Strict, UserError
from shared.training import TrainingSettings

from .baselines import ModelSettings, parse_name
from .data import EquationName, Equations
from .losses import Schedule

SCHEDULES = get_args(Schedule)


def split_name(name: str) -> tuple[str, Schedule]:
    """Split the name of an experiment's model into the network's name and the schedule it is trained with.

    `fno_cape_autoregressive` is the network `fno_cape` without teacher forcing; a name without suffix has the paper's
    schedule, tanh.
    """
    for schedule in SCHEDULES:
        if name.endswith(f"_{schedule}"):
            return name.removesuffix(f"_{schedule}"), schedule
    return name, "tanh"


class Experiment(Strict):
    """Which models are trained on an equation, how large they are, and how they are trained."""

    models: tuple[str, ...] = Field(min_length=1)
    network: ModelSettings
    training: TrainingSettings
    warmup_epochs: int = Field(3, ge=0, description="only CAPE is trained; every step starts from the truth")
    noise: NonNegativeFloat = Field(0.001, description="standard deviation, added to every input in training")
    guess_weight: NonNegativeFloat = Field(5.7e-5, description="α, weight of CAPE's own loss")
    gradient_penalty: NonNegativeFloat = Field(0.0, description="weight; the paper's is 5.16e-4, in 1D only")
    physics_weight: NonNegativeFloat = Field(1.0, description="weight of the equation's residual in *_pino")

    @field_validator("models")
    @classmethod
    def _known(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        for name in models:
            try:
                parse_name(split_name(name)[0])
            except UserError as error:
                raise ValueError(
                    f"{error}, or one of these followed by {', '.join('_' + s for s in SCHEDULES)}"
                ) from None
        if len(set(models)) < len(models):
            raise ValueError("a model is listed twice")
        return models

    @model_validator(mode="after")
    def _warmup_is_part(self) -> Experiment:
        if self.warmup_epochs >= self.training.epochs:
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs}) must be smaller than training.epochs ({self.training.epochs})"
            )
        return self


class Params(Strict):
    """A profile's section of params.yaml."""

    seed: int = Field(0, ge=0, description="of the data")
    seeds: tuple[int, ...] = Field(min_length=1, description="of the trainings: weights, order of data, noise")
    workers: PositiveInt = 2
    threads: PositiveInt = 1
    equations: Equations
    experiments: dict[EquationName, Experiment]

    @model_validator(mode="after")
    def _experiments_have_data(self) -> Params:
        missing = sorted(set(self.experiments) - set(self.equations))
        if missing:
            raise ValueError(f"experiments need data: add {', '.join(missing)} to equations")
        return self
