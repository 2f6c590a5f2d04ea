"""The params of one profile: what each mixture is made of, and how it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from shared.config import Strict, UserError, load_params
from shared.data.house_corpora import check_weights
from shared.data.house_lexicon import LexiconName
from shared.data.house_text import TextName
from shared.evaluation.abilities import ABILITIES, TOGETHER
from shared.lm.model import SIZES


class DocumentSettings(Strict):
    """Synthetic documents, their kinds weighted by number."""

    kind: Literal["documents"]
    lexicon: LexiconName = "embedded"
    weights: dict[str, float]

    @model_validator(mode="after")
    def _kinds_are_known(self) -> DocumentSettings:
        try:
            check_weights(self.weights)
        except UserError as error:
            raise ValueError(str(error)) from None
        return self


class TextSettings(Strict):
    """Running text."""

    kind: Literal["text"]
    corpus: TextName
    vocab_size: int = Field(ge=3)


class Until(Strict):
    """An ability, or several together, that training waits for, tested on documents of its own every 50 steps."""

    ability: str
    accuracy: float = Field(0.9, gt=0, le=1)


class Mixture(Strict):
    """What a model is trained on, and the recipe.

    `parent` is the mixture that it goes on from, with that one's network. `network` are fields of HouseConfig beside
    the size's. `rotary_factor` multiplies the base of the rotary positions, for contexts longer than the parent's.

    The learning rate falls by a cosine over all steps. With `until` it stays where it is until the model has that
    ability, which comes suddenly and with each seed at another time, and falls over `decay_steps` more; `steps` then is
    the most there can be.
    """

    data: Annotated[DocumentSettings | TextSettings, Field(discriminator="kind")]
    parent: str | None = None
    network: dict[str, Any] = Field(default_factory=dict)
    rotary_factor: PositiveFloat = 1.0
    steps: PositiveInt
    until: Until | None = None
    decay_steps: int = Field(0, ge=0)
    length: PositiveInt = Field(description="tokens a sequence")
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3
    final_fraction: float = Field(0.1, gt=0, le=1, description="end of the cosine")
    warmup_steps: int = Field(100, ge=0)
    weight_decay: float = Field(0.1, ge=0, description="of matrices")
    gradient_clip: PositiveFloat = 1.0
    checkpoints: tuple[int, ...] = Field((), description="steps at which the model is kept, beside the final one")
    abilities: tuple[str, ...] = Field((), description="what is tested when the model is trained")

    @model_validator(mode="after")
    def _consistent(self) -> Mixture:
        unknown = [name for name in self.abilities if name not in ABILITIES and name != "language"]
        if unknown:
            raise ValueError(f"unknown abilities {', '.join(unknown)}; there are {', '.join(ABILITIES)}, language")
        if self.warmup_steps + self.decay_steps >= self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) and decay_steps ({self.decay_steps}) must be fewer than steps "
                f"({self.steps}) together"
            )
        if self.decay_steps and not self.until:
            raise ValueError("decay_steps is for mixtures with 'until'; without it the rate falls over all steps")
        if self.until and self.until.ability not in (*ABILITIES, *TOGETHER):
            there = ", ".join((*TOGETHER, *ABILITIES))
            raise ValueError(f"until: unknown ability {self.until.ability!r}; there are {there}")
        if self.parent and self.network:
            raise ValueError("a mixture with a parent has the parent's network: leave network out")
        if not set(self.network).isdisjoint(("vocab_size", *next(iter(SIZES.values())))):
            raise ValueError("network: the size and the vocabulary are not chosen here")
        if self.data.kind == "text" and (self.until or set(self.abilities) - {"language"}):
            raise ValueError("a model of running text is tested on 'language' only")
        if self.data.kind == "documents" and "language" in self.abilities:
            raise ValueError("'language' is for models of running text")
        return self


class Params(Strict):
    """A profile's section of params.yaml."""

    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    threads: PositiveInt = 1
    max_steps: PositiveInt | None = Field(None, description="cuts every training short, to see that it runs")
    test_documents: PositiveInt = Field(500, description="a test of an ability")
    save_every_steps: PositiveInt = Field(200, description="checkpoints from which a killed training goes on")
    mixtures: dict[str, Mixture] = Field(min_length=1)
    sizes: dict[str, dict[str, dict[str, Any]]] = Field(
        default_factory=dict, description="by size and mixture, fields of the recipe that are others there"
    )

    @model_validator(mode="after")
    def _parents_are_there(self) -> Params:
        for name, mixture in self.mixtures.items():
            parent = self.mixtures.get(mixture.parent) if mixture.parent else None
            if mixture.parent and (parent is None or mixture.parent == name):
                raise ValueError(f"{name}: its parent {mixture.parent!r} is not among the mixtures")
            if parent and _vocabulary(parent) != _vocabulary(mixture):
                raise ValueError(f"{name} has other tokens than its parent {mixture.parent}: same lexicon, same corpus")
        return self

    @model_validator(mode="after")
    def _sizes_are_known(self) -> Params:
        for size, changes in self.sizes.items():
            if size not in SIZES:
                raise ValueError(f"sizes: there is no size {size!r}; choose among {', '.join(SIZES)}")
            if unknown := set(changes) - set(self.mixtures):
                raise ValueError(f"sizes: {size} changes {', '.join(unknown)}, which is not among the mixtures")
            self.of_size(size)
        return self

    def of_size(self, size: str) -> Params:
        """The params with the recipes of a size."""
        changes = self.sizes.get(size, {})
        mixtures = {name: mixture.model_dump() | changes.get(name, {}) for name, mixture in self.mixtures.items()}
        return Params.model_validate(self.model_dump() | {"mixtures": mixtures, "sizes": {}})

    def mixture(self, name: str) -> Mixture:
        """A mixture by name; `UserError` lists those there are."""
        if name not in self.mixtures:
            raise UserError(f"there is no mixture {name!r}; choose one of {', '.join(self.mixtures)}")
        mixture = self.mixtures[name]
        if self.max_steps is None or self.max_steps >= mixture.steps:
            return mixture
        return mixture.model_copy(update={"steps": self.max_steps, "decay_steps": 0})


def load(folder: Path, profile: str | None = None) -> tuple[str, Params]:
    """The chosen profile of the params.yaml in `folder`."""
    return load_params(folder / "params.yaml", Params, profile)


def check_size(size: str) -> None:
    if size not in SIZES:
        raise UserError(f"there is no size {size!r}; choose one of {', '.join(SIZES)}")


def _vocabulary(mixture: Mixture) -> tuple[Any, ...]:
    if mixture.data.kind == "documents":
        return ("documents", mixture.data.lexicon)
    return ("text", mixture.data.corpus, mixture.data.vocab_size)
