"""The params of one profile: data, networks, training and what is compared."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from shared.config import Strict
from shared.training import TrainingSettings

# The networks of `model.py`. `t_gcn` is what the published code calls T-GCN, an A3T-GCN with one Chebyshev convolution.
NEURAL = (
    "regt_gcn",
    "regt_gcn_recurrent",
    "rant_gcn",
    "t_gcn",
    "graph_sage",
    "gat",
    "stacked_gcn",
    "gconv_lstm",
    "stacked_gru",
    "stid",
    "st_norm",
)
# One training stage each.
FAMILIES = {
    "regional": ("regt_gcn", "regt_gcn_recurrent", "rant_gcn"),
    "graph": ("t_gcn", "graph_sage", "gat", "stacked_gcn", "gconv_lstm"),
    "no_graph": ("stacked_gru", "stid", "st_norm"),
}
# Networks whose output the published code subtracts from targets of another shape; as `<name>_broadcast` they are
# trained on the mean over all pairs of steps that this comes to.
MISALIGNED = ("stid", "st_norm")
BROADCAST = "_broadcast"
# The controls of `baselines.py`, which have no seed.
CONTROLS = ("persistence", "time_of_day", "time_of_day_ar1", "xgboost")

STEP_MINUTES = 10
# Of the scores' blocks of test windows: 12 hours, twice the longest horizon.
BLOCK_STEPS = 72
INPUT_STEPS = 6


def family_of(model: str) -> str:
    """The training stage that a model belongs to."""
    return next(name for name, members in FAMILIES.items() if model.removesuffix(BROADCAST) in members)


class DataSettings(Strict):
    """Which data an experiment runs on, in which units, and how it is split."""

    source: Literal["official", "generated"] = "official"
    folder: str = Field("regt_gcn", description="of the official files, under $REPRISE_DATA")
    units: Literal["clean", "paper"] = Field("clean", description="see `data.py`")
    sites: Literal["regional", "all"] = Field("regional", description="'all' has those outside of the five regions too")
    days: PositiveInt | None = Field(None, description="the first days only")
    fractions: tuple[float, float, float] = Field((0.7, 0.1, 0.2), description="train, validation, test")
    regional_correlation: float = Field(0.5, ge=0, le=1, description="generated: of two sites' shocks in a region")
    sites_per_region: tuple[PositiveInt, ...] = Field((44, 16, 13, 14, 11), min_length=5, max_length=5)

    @field_validator("fractions")
    @classmethod
    def _fractions_add_up(cls, fractions: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
            raise ValueError("the fractions of train, validation and test must be positive and add up to 1")
        return fractions

    @model_validator(mode="after")
    def _generated_has_days(self) -> DataSettings:
        if self.source == "generated" and self.days is None:
            raise ValueError("source 'generated' needs days")
        if self.source == "generated" and self.sites == "all":
            raise ValueError("generated sites all lie in a region: leave sites 'regional'")
        return self


class Network(Strict):
    """Sizes of the networks; the defaults not named `*_size` are the published code's."""

    hidden_size: PositiveInt = Field(64, description="the paper's is 256")
    decoder_size: PositiveInt | None = Field(None, description="inside the decoder; by default half of hidden")
    decomposition_seed: int = Field(42, ge=0, description="of RanT-GCN's groups")
    stacked_gcn_size: PositiveInt = Field(64, description="between the stacked GCN's two convolutions")
    stacked_gcn_dropout: float = Field(0.5, ge=0, lt=1)
    gat_heads: PositiveInt = 1
    stid_embedding_size: PositiveInt = 32
    stid_layers: PositiveInt = 3
    stid_dropout: float = Field(0.15, ge=0, lt=1)
    st_norm_channels: PositiveInt = 16
    st_norm_blocks: PositiveInt = 4
    st_norm_layers: PositiveInt = 2
    st_norm_kernel_size: PositiveInt = 2


class Experiment(Strict):
    """Models that are compared on the same data with the same budget, one training a horizon and seed."""

    data: DataSettings
    horizons: tuple[PositiveInt, ...] = Field(min_length=1, description="in steps of 10 minutes")
    models: tuple[str, ...] = Field(min_length=1)
    controls: tuple[str, ...] = ()
    network: Network = Network()
    training: TrainingSettings
    train_stride: PositiveInt = Field(1, description="every so many windows are trained and validated on")
    test_stride: PositiveInt = Field(1, le=6, description="every so many windows are tested on")

    @field_validator("models", "controls")
    @classmethod
    def _listed_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("a model is listed twice")
        return names

    @model_validator(mode="after")
    def _known(self) -> Experiment:
        variants = tuple(name + BROADCAST for name in MISALIGNED)
        for given, known in ((self.models, NEURAL + variants), (self.controls, CONTROLS)):
            for name in given:
                if name not in known:
                    raise ValueError(f"unknown model {name!r}; choose among {', '.join(known)}")
        if len(set(self.horizons)) < len(self.horizons):
            raise ValueError("a horizon is listed twice")
        return self


class Params(Strict):
    """A profile's section of params.yaml; an experiment's name begins the names of its data sets in scores.csv."""

    seed: int = Field(0, ge=0, description="of generated data")
    seeds: tuple[int, ...] = Field(min_length=1, description="of the trainings: weights, order of data, dropout")
    workers: PositiveInt = 2
    threads: PositiveInt = 1
    experiments: dict[str, Experiment] = Field(min_length=1)

    @field_validator("experiments")
    @classmethod
    def _names_are_folders(cls, experiments: dict[str, Experiment]) -> dict[str, Experiment]:
        for name in experiments:
            if not name.replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"{name!r} is no name for an experiment: use letters, digits, '_' and '.'")
        return experiments
