"""The params of one profile: whose heads are looked at, on which needles, and which of them are masked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from shared.config import Strict
from shared.lm.model import SIZES
from shared.training import TrainingSettings

Mode = Literal["uniform", "zero", "mean"]
Form = Literal["plain", "chat"]


class Grid(Strict):
    """Needle tests: `documents` of each length and depth."""

    lengths: tuple[PositiveInt, ...] = Field(min_length=1, description="of the contexts, in tokens")
    depths: tuple[float, ...] = Field(min_length=1, description="of the needle, in per cent of the context")
    documents: PositiveInt = Field(1, description="of each length and depth; for checkpoints, the three needles")

    @model_validator(mode="after")
    def _depths_are_percentages(self) -> Grid:
        if not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError("depths are percentages of the context, from 0 to 100")
        return self


class TwoSteps(TrainingSettings):
    """Training and tests of the task of two steps (two_steps.py)."""

    steps_per_epoch: PositiveInt
    lengths: tuple[PositiveInt, ...] = Field(min_length=1, description="of the contexts, in tokens")
    documents: PositiveInt = Field(100, description="that either form is tested on, of each length")


class HouseLM(Strict):
    """A house model: which mixture it was trained on, how it is asked, and the needle tests that it gets."""

    name: str = Field(description="of the mixture")
    form: Form = "plain"
    grid: Grid
    two_steps: TwoSteps | None = Field(None, description="train it here, from the first model, on two steps as well")


class House(Strict):
    """House models, every seed of each; the first is the base, and the others were trained on from it."""

    size: str
    models: tuple[HouseLM, ...] = Field(min_length=1)
    distractors: int = Field(2, ge=0, le=3, description="facts about others among the filler sentences")
    filler_documents: PositiveInt = Field(200, description="that fluency is tested on")
    scene_documents: PositiveInt = Field(200, description="that questions about scenes are tested on")
    stand_in_steps: PositiveInt | None = Field(
        None, description="train models here, to see that all runs; null: use those of pipelines/house_lm"
    )

    @model_validator(mode="after")
    def _size_is_known(self) -> House:
        if self.size not in SIZES:
            raise ValueError(f"there is no house model of size {self.size!r}: choose one of {', '.join(SIZES)}")
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError("a model is listed twice")
        if self.models[0].two_steps:
            raise ValueError("the first model is trained elsewhere: two_steps is for one that goes on from it")
        return self


class Checkpoint(Strict):
    """A model on the Hugging Face hub, or in a folder in transformers' format."""

    name: str = Field(description="by which the ledger calls it")
    source: str
    chat: bool = Field(False, description="whether questions are put as a user's turn")


class Checkpoints(Strict):
    """Real language models, asked for the paper's needles in the paper's haystacks."""

    models: tuple[Checkpoint, ...] = Field(min_length=1)
    detection: Grid
    masking: Grid
    answer_buffer: NonNegativeInt = Field(200, description="tokens by which a context stays below its nominal length")
    max_new_tokens: PositiveInt = 50
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    local_files_only: bool = True


class Masking(Strict):
    """Which heads are masked while the answer is generated, and how."""

    models: tuple[str, ...] = Field(description="all their modes are tried; of the others the first only")
    modes: tuple[Mode, ...] = Field(("uniform", "zero", "mean"), min_length=1)
    counts: tuple[PositiveInt, ...] = Field(min_length=1, description="numbers of heads K")
    draws: PositiveInt = Field(description="of random heads")


class Params(Strict):
    """A profile's section of params.yaml."""

    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1, description="of house models, and of all that is drawn")
    workers: PositiveInt = 2
    threads: PositiveInt = 1
    published: bool = Field(False, description="whether the head scores that the authors published are judged")
    test_groups: int = Field(20, ge=3, description="groups of tests, of which the intervals leave out one at a time")
    house: House | None = None
    checkpoints: Checkpoints | None = None
    masking: Masking | None = None

    @model_validator(mode="after")
    def _has_models(self) -> Params:
        if not (self.published or self.house or self.checkpoints):
            raise ValueError("nothing to look at: give published: true, house or checkpoints")
        if self.masking:
            known = [model.name for part in (self.house, self.checkpoints) if part for model in part.models]
            if unknown := set(self.masking.models) - set(known):
                raise ValueError(f"masking names {', '.join(sorted(unknown))}; the models are {', '.join(known)}")
        return self
