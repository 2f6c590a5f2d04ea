"""The params of one profile: tables, prompts, targets, the language model, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from shared.config import Strict
from shared.training import TrainingSettings

Targets = Literal["in_sample", "out_of_fold", "one_hot"]


@dataclass(frozen=True)
class Variant:
    """What a language model reads and writes.

    `heavy` prompts have the metadata. `targets` are the probabilities to write: of an XGBoost on the rows that it was
    fitted on (published), on rows that it was not (ours), or 1.0 and 0.0. `per_table` is TabLLM's way: a model a table,
    which writes `class k`.
    """

    heavy: bool = False
    targets: Targets = "in_sample"
    per_table: bool = False


VARIANTS: dict[str, Variant] = {
    "heavy": Variant(heavy=True),
    "heavy_noaug": Variant(heavy=True, targets="one_hot"),
    "heavy_oof": Variant(heavy=True, targets="out_of_fold"),
    "light": Variant(),
    "light_noaug": Variant(targets="one_hot"),
    "light_oof": Variant(targets="out_of_fold"),
    "tabllm": Variant(heavy=True, targets="one_hot", per_table=True),
}
BASELINES = (
    "majority",
    "logistic_regression",
    "xgboost",
    "mlp",
    "tabnet",
    "tabnet_defaults",
    "ft_transformer",
)
# These come out the same whatever the seed: they are fitted once, as seed 0.
SEEDLESS = ("majority", "logistic_regression", "xgboost")
# One training stage each.
FAMILIES: dict[str, tuple[str, ...]] = {
    "heavy": ("heavy", "heavy_noaug", "heavy_oof"),
    "light": ("light", "light_noaug", "light_oof"),
    "tabllm": ("tabllm",),
    "classical": ("majority", "logistic_regression", "xgboost", "mlp"),
    "networks": ("tabnet", "tabnet_defaults", "ft_transformer"),
}
# The seven of the paper's ranks, of which a profile may lack some.
RANKED = ("heavy", "light", "xgboost", "ft_transformer", "tabllm", "mlp", "tabnet")


def family_of(model: str) -> str:
    """The training stage that a model belongs to."""
    return next(name for name, members in FAMILIES.items() if model in members)


class StructuralTables(Strict):
    """How many tables are generated, half of them of either family, and their shape; see `structural.py`."""

    supervised: int = Field(12, ge=2, multiple_of=2)
    few_shot: int = Field(8, ge=2, multiple_of=2)
    rows: tuple[PositiveInt, PositiveInt] = Field((600, 200), description="of a supervised and of a few-shot table")
    features: tuple[PositiveInt, PositiveInt] = Field((4, 8), description="the fewest and the most of a table")
    noise: tuple[float, float] = Field((0.1, 0.2), description="share of labels drawn at random, smallest and largest")

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> StructuralTables:
        for name in ("features", "noise"):
            lowest, highest = getattr(self, name)
            if lowest > highest:
                raise ValueError(f"{name} must be the lowest and the highest number, not {lowest} and {highest}")
        if self.features[0] < 2 or not 0 <= self.noise[0] <= self.noise[1] < 1:
            raise ValueError("a rule needs two features, and noise lies between 0 and 1")
        return self


class DataSettings(Strict):
    """Which tables, and how many rows of them."""

    source: Literal["described", "embedded"] = Field("described", description="see `data.py`")
    folder: str = Field("unipredict", description="of the described tables, under $REPRISE_DATA")
    structural: StructuralTables | None = Field(None, description="generated tables beside scikit-learn's")
    supervised_tables: PositiveInt | None = Field(None, description="so many, evenly spaced in the list; default: all")
    few_shot_tables: PositiveInt | None = Field(None, description="so many, evenly spaced in the list; default: all")
    train_fraction: float = Field(0.9, gt=0, lt=1, description="of a supervised table's rows")
    train_rows: PositiveInt = Field(7500, description="largest training part of a table, for all models the same")
    test_rows: PositiveInt = Field(20000, description="largest test part of a table")
    max_prompt_characters: PositiveInt = Field(4000, description="tables whose first prompt is longer are left out")


class PromptSettings(Strict):
    """How a row is written out.

    `compact` says the same as `published` in fewer words. `classes_first` puts the list of classes before the row, so
    that rows of a table can share it; in the paper it comes after. `overlong` rows lose features (`trim`), or their end
    and with it the answer (`cut`, published).
    """

    wording: Literal["published", "compact"] = "published"
    classes_first: bool = False
    decimals: int = Field(4, ge=0, le=9, description="that numbers are rounded to")
    significant_digits: PositiveInt | None = Field(None, description="instead of decimals, for short prompts")
    max_columns: PositiveInt | None = Field(None, description="further features are not written out")
    max_metadata_characters: PositiveInt | None = Field(None, description="longer metadata are cut at a word")
    overlong: Literal["trim", "cut"] = "trim"


class Augmentation(Strict):
    """The calibrated XGBoost whose probabilities are the targets."""

    trees: PositiveInt = 100
    folds: int = Field(5, ge=2, description="of the isotonic calibration")


class LanguageModel(Strict):
    """GPT-2 from a config, or with `pretrained` from there (a name or a folder)."""

    pretrained: str | None = None
    num_layers: PositiveInt = 12
    hidden_size: PositiveInt = 768
    num_heads: PositiveInt = 12
    context: PositiveInt = 1024
    vocab_size: int = Field(2000, ge=300, description="of the tokenizer trained here; of no effect with `pretrained`")
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> LanguageModel:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        return self


class Packing(Strict):
    """How rows share a sequence; with 1 row a prefix and packs as long as the context, rows do not."""

    length: PositiveInt | None = Field(None, description="of a pack, in tokens; default: the context")
    rows_per_prefix: PositiveInt = Field(8, description="rows of a table behind one copy of what they share")


class FewShot(Strict):
    """Fine-tuning on a held-out table, from the universal weights."""

    ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    models: tuple[str, ...] = Field(min_length=1)
    train_rows: PositiveInt = Field(10000, description="largest training part, for all models the same")
    test_rows: PositiveInt = Field(10000)
    training: TrainingSettings

    @field_validator("models")
    @classmethod
    def _known(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        return _known_names(models, (*VARIANTS, *BASELINES))

    @field_validator("ratios")
    @classmethod
    def _ascending(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if not ratios or list(ratios) != sorted(set(ratios)):
            raise ValueError("ratios must ascend, each once")
        return ratios


class Decoding(Strict):
    """Published: top-k 50, nucleus .95, at temperature 1."""

    top_k: PositiveInt = 50
    top_p: float = Field(0.95, gt=0, le=1)
    batch_size: PositiveInt = 64
    scored: bool = Field(True, description="also by the likelihood of each class's answer")


class BaselineSettings(Strict):
    """The random search that all tuned baselines get, the library's defaults being its first trial, and budgets."""

    trials: PositiveInt = Field(4, description="on supervised tables; few-shot tables are too small to hold rows out")
    validation_fraction: float = Field(0.2, gt=0, lt=1)
    min_rows_to_tune: PositiveInt = 40
    tabnet_epochs: PositiveInt = 100
    ft_transformer_epochs: PositiveInt = 100
    mlp_iterations: PositiveInt = 300


class SpeedSettings(Strict):
    """What is timed; see `speed.py`."""

    rows: PositiveInt = 32
    rounds: int = Field(3, ge=2)


class Params(Strict):
    """A profile's section of params.yaml."""

    seed: int = Field(0, ge=0, description="of splits, generated tables and the baselines' search")
    seeds: tuple[int, ...] = Field(min_length=1, description="of trainings: weights, order of data, dropout, sampling")
    workers: PositiveInt = 2
    threads: PositiveInt = 1
    data: DataSettings
    prompt: PromptSettings = PromptSettings()
    augmentation: Augmentation = Augmentation()
    language: LanguageModel
    packing: Packing = Packing()
    training: TrainingSettings = Field(description="of the universal model; batch_size counts packs")
    per_table_training: TrainingSettings = Field(description="of TabLLM's models, on a supervised table each")
    models: tuple[str, ...] = Field(min_length=1)
    few_shot: FewShot
    decoding: Decoding = Decoding()
    baselines: BaselineSettings = BaselineSettings()
    speed: SpeedSettings | None = None

    @field_validator("models")
    @classmethod
    def _known(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        return _known_names(models, (*VARIANTS, *BASELINES))

    @model_validator(mode="after")
    def _agree(self) -> Params:
        missing = [model for model in self.few_shot.models if model not in self.models]
        if missing:
            raise ValueError(f"few_shot.models names {', '.join(missing)}, which models lacks: they start from there")
        if self.pack_length > self.language.context:
            raise ValueError(f"packing.length ({self.pack_length}) exceeds the context, {self.language.context}")
        if self.data.source == "embedded" and self.data.structural is None:
            raise ValueError("source 'embedded' needs structural, the generated tables beside scikit-learn's few")
        return self

    @property
    def pack_length(self) -> int:
        return self.packing.length or self.language.context

    def language_models(self) -> tuple[str, ...]:
        """The variants that the profile trains."""
        return tuple(model for model in self.models if model in VARIANTS)

    def seeds_of(self, model: str) -> tuple[int, ...]:
        """One seed for what has none."""
        return (0,) if model in SEEDLESS else self.seeds


def _known_names(names: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown model {name!r}; choose among {', '.join(known)}")
    if len(set(names)) < len(names):
        raise ValueError("a model is listed twice")
    return names
