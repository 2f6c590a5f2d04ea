"""What a training run is made of, and its learning-rate schedules."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from shared.config import Strict


class TrainingSettings(Strict):
    """Optimizer, schedule and stopping rule of a training run; times in epochs."""

    epochs: PositiveInt
    batch_size: PositiveInt = Field(description="examples a step, over all processes together")
    learning_rate: PositiveFloat
    weight_decay: float = Field(0.0, ge=0)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clip: PositiveFloat | None = Field(None, description="largest norm of the gradient")
    schedule: Literal["constant", "step", "cosine"] = "constant"
    warmup_epochs: float = Field(0.0, ge=0, description="linear rise of the learning rate from zero")
    hold_epochs: float = Field(0.0, ge=0, description="epochs at the full rate before a step schedule starts counting")
    step_epochs: PositiveInt | None = Field(None, description="epochs between two drops of a step schedule")
    step_factor: float = Field(0.5, gt=0, lt=1)
    final_fraction: float = Field(0.0, ge=0, le=1, description="end of a cosine schedule, as a fraction of the rate")
    early_stopping_epochs: PositiveInt | None = Field(None, description="stop after so many epochs without a new best")
    validate_every_epochs: PositiveInt = 1
    checkpoint_every_epochs: PositiveInt = 1
    checkpoint_every_steps: PositiveInt | None = Field(None, description="additional checkpoints inside an epoch")
    log_every_steps: PositiveInt | None = Field(None, description="track losses inside epochs, by step")
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"

    @model_validator(mode="after")
    def _schedule_is_complete(self) -> TrainingSettings:
        if self.schedule == "step" and self.step_epochs is None:
            raise ValueError("schedule 'step' needs step_epochs (epochs between two drops)")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be smaller than epochs ({self.epochs})")
        return self

    def learning_rate_at(self, epoch: float) -> float:
        """Learning rate at a moment counted in epochs, fractions of an epoch included.

        A function of the moment alone, so that a resumed run needs no scheduler state.
        """
        if epoch < self.warmup_epochs:
            return self.learning_rate * epoch / self.warmup_epochs
        if self.schedule == "step" and self.step_epochs is not None:
            drops = max(0, math.floor((epoch - self.hold_epochs) / self.step_epochs))
            return self.learning_rate * self.step_factor**drops
        if self.schedule == "cosine":
            progress = min(1.0, (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs))
            floor = self.final_fraction
            return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
        return self.learning_rate
