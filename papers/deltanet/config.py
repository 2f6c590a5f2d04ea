"""The params of one profile: data, models, training and what is compared."""

from __future__ import annotations

from pydantic import Field, PositiveInt, model_validator

from shared.config import Strict
from shared.training.language import LanguageTraining

from .data import KINDS, DataSettings, ExperimentName, TextData
from .mechanism import MechanismSettings
from .model import ModelNames, ModelSettings
from .speed import SpeedSettings


class Experiment(Strict):
    """Which models are trained on which data, how large they are, and how all of them are trained."""

    data: DataSettings
    models: ModelNames = Field(min_length=1)
    network: ModelSettings
    training: LanguageTraining

    @model_validator(mode="after")
    def _filters_are_long_enough(self) -> Experiment:
        longest = self.data.long_length if isinstance(self.data, TextData) else self.data.length
        if any(name.startswith("hyena") for name in self.models) and longest > self.network.max_length:
            raise ValueError(f"Hyena needs network.max_length of at least {longest}; given: {self.network.max_length}")
        return self


class Params(Strict):
    """A profile's section of params.yaml."""

    seed: int = Field(0, ge=0, description="of the data")
    seeds: tuple[int, ...] = Field(min_length=1, description="of the trainings: weights and order of the data")
    workers: PositiveInt = 2
    threads: PositiveInt = 1
    experiments: dict[ExperimentName, Experiment] = Field(min_length=1)
    extrapolated: ModelNames = Field((), description="language models that are tested on longer sequences, too")
    mechanism: MechanismSettings | None = None
    speed: SpeedSettings | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        for name, experiment in self.experiments.items():
            if experiment.data.kind != KINDS[name]:
                raise ValueError(f"the data of {name} must be of kind {KINDS[name]!r}; given: {experiment.data.kind!r}")
        trained = self.experiments["language"].models if "language" in self.experiments else ()
        missing = [name for name in self.extrapolated if name not in trained]
        if missing:
            raise ValueError(f"extrapolated: {', '.join(missing)} must be among the models of language")
        return self

    def trained_on(self, model: str) -> list[ExperimentName]:
        """The experiments that list a model."""
        return [name for name, experiment in self.experiments.items() if model in experiment.models]
