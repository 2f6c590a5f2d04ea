"""The params of one profile: puzzles, networks, training, what is compared, and the evolution."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from shared.config import Strict

MAX_CONNECTIONS = 10
# The training sets that the recorded puzzles hold, and what is left for evaluation.
OFFICIAL_SETS, OFFICIAL_SET_SIZE, OFFICIAL_EVALUATION = 10, 128, 1200
OFFICIAL_IMAGE = 128


class DataSettings(Strict):
    """Which puzzles there are, how large their images, and which graphs populations are made of."""

    source: Literal["official", "generated"] = "official"
    folder: str = Field("gssnn", description="of the recorded files, under $REPRISE_DATA")
    training_sets: int = Field(ge=3, description="repetitions of the experiment, which intervals are over")
    training_size: PositiveInt = 128
    evaluation_size: PositiveInt = 1200
    # An image is drawn or recorded at 128 pixels a side and averaged down to this.
    image_size: Literal[16, 32, 64, 128] = 128

    @model_validator(mode="after")
    def _official_are_enough(self) -> DataSettings:
        if self.source == "official" and (
            self.training_sets > OFFICIAL_SETS
            or self.training_size > OFFICIAL_SET_SIZE
            or self.evaluation_size > OFFICIAL_EVALUATION
        ):
            raise ValueError(
                f"the recorded puzzles hold {OFFICIAL_SETS} training sets of {OFFICIAL_SET_SIZE} and "
                f"{OFFICIAL_EVALUATION} for evaluation; take no more than that, or source 'generated'"
            )
        return self


class Network(Strict):
    """Sizes of the encoder; the defaults are the paper's."""

    image_size: PositiveInt = 128
    grid_size: PositiveInt = 8
    width: int = Field(256, ge=8, multiple_of=4)
    conv_blocks: int = Field(3, ge=0)
    transformer_layers: PositiveInt = 2
    num_heads: PositiveInt = 4
    head_dim: PositiveInt = 128
    mlp_size: PositiveInt = 512

    @model_validator(mode="after")
    def _grid_divides(self) -> Network:
        if self.image_size % self.grid_size:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of grid_size ({self.grid_size})")
        return self


class GraphModule(Strict):
    """Sizes and variants of the graph module; the defaults are the paper's, or its code's where they differ."""

    dim: int = Field(512, ge=8, multiple_of=4, description="of the encoder's vector and of all features")
    layers: PositiveInt = 3
    dropout: float = Field(0.3, ge=0, lt=1)
    max_connections: PositiveInt = MAX_CONNECTIONS
    dedup_edges: bool = Field(False, description="list every edge once; the published code lists it twice")
    positions: Literal["as_computed", "as_intended"] = "as_computed"


class Training(Strict):
    """Adam, and a learning rate that is lowered when the losses of the batches stop to fall (as published)."""

    batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    plateau_factor: float = Field(0.5, gt=0, lt=1)
    plateau_patience: int = Field(50, ge=0, description="batches")
    plateau_threshold: float = Field(1e-4, ge=0, description="relative")
    plateau_cooldown: int = Field(15, ge=0, description="batches")
    networks_at_once: PositiveInt = Field(1, description="trained in one batched computation")
    checkpoint_every_epochs: PositiveInt = 16


# Populations of networks that are compared, by the stage that trains them. What they are stands at `Population`.
STAGES = {
    "baseline": ("baseline", "baseline_long"),
    "ssn": ("ssn",),
    "one_graph": ("one_graph",),
    "variants": ("ssn_dedup_edges", "ssn_intended_grid"),
}
POPULATIONS = tuple(name for members in STAGES.values() for name in members)
# Populations of one network a graph and replicate.
OF_GRAPHS = ("ssn", "ssn_dedup_edges", "ssn_intended_grid")


class Population(Strict):
    """How many networks there are of a population, on each of the training sets, and how long they are trained.

    `baseline` and `baseline_long` have no graph; `one_graph` has the same one in all replicates; the others have
    `graphs` of them, each in all replicates. Accuracies are measured at all `epochs`, and the last one ends training.
    """

    graphs: PositiveInt | None = None
    replicates: PositiveInt = Field(description="seeds on each training set")
    epochs: tuple[PositiveInt, ...] = Field(min_length=1)

    @field_validator("epochs")
    @classmethod
    def _rise(cls, epochs: tuple[int, ...]) -> tuple[int, ...]:
        if list(epochs) != sorted(set(epochs)):
            raise ValueError("epochs must rise")
        return epochs


class Evolution(Strict):
    """The evolution of a population of programs; the defaults are the paper's. One run a seed."""

    seeds: tuple[int, ...] = Field(min_length=3)
    iterations: PositiveInt = 5
    capacity: int = Field(50, ge=2, description="programs in the population")
    survivors: PositiveInt = Field(25, description="of an iteration, by training accuracy")
    budget: PositiveInt = Field(description="programs that an exploration looks at; the paper's ends after 15 s")
    abstractions: PositiveInt = Field(3, description="new primitives an iteration, at most")
    max_arity: int = Field(2, ge=0)
    epochs: PositiveInt = 16

    @model_validator(mode="after")
    def _some_are_dropped(self) -> Evolution:
        if self.survivors >= self.capacity:
            raise ValueError(f"survivors ({self.survivors}) must be fewer than the capacity ({self.capacity})")
        return self


class SpeedSettings(Strict):
    """How many networks at once a training step is timed with, beside one, and how many programs a search."""

    networks: tuple[PositiveInt, ...] = Field(min_length=1)
    programs: tuple[PositiveInt, ...] = (1_000, 10_000, 100_000, 1_000_000)
    programs_compared: PositiveInt = Field(100_000, description="up to which the plain version runs as well")
    rounds: int = Field(3, ge=3)


class Params(Strict):
    """A profile's section of params.yaml."""

    seed: int = Field(0, ge=0, description="of generated puzzles, and the first part of every network's own")
    workers: PositiveInt = 2
    threads: PositiveInt = 1
    data: DataSettings
    network: Network = Network()
    graph_module: GraphModule = GraphModule()
    training: Training = Training()
    graphs: Literal["official", "evolved"] = "official"
    populations: dict[str, Population]
    evolution: Evolution | None = None
    speed: SpeedSettings | None = None

    @field_validator("populations")
    @classmethod
    def _populations_are_known(cls, populations: dict[str, Population]) -> dict[str, Population]:
        for name, population in populations.items():
            if name not in POPULATIONS:
                raise ValueError(f"unknown population {name!r}; choose among {', '.join(POPULATIONS)}")
            if (name in OF_GRAPHS) != (population.graphs is not None):
                raise ValueError(f"{name}: graphs must be given for {', '.join(OF_GRAPHS)}, and for no other")
        for name in ("baseline", "ssn", "one_graph"):
            if name not in populations:
                raise ValueError(f"{name} is missing: baseline, ssn and one_graph are what is compared")
        most = populations["ssn"].graphs or 0
        for name in OF_GRAPHS:
            if name in populations and (populations[name].graphs or 0) > most:
                raise ValueError(f"{name} takes its graphs from those of ssn, which has {most}")
        return populations

    @model_validator(mode="after")
    def _agrees(self) -> Params:
        if self.network.image_size != self.data.image_size:
            raise ValueError(
                f"network.image_size ({self.network.image_size}) must be data.image_size ({self.data.image_size})"
            )
        if self.data.training_size % self.training.batch_size:
            raise ValueError(
                f"data.training_size ({self.data.training_size}) must be a multiple of training.batch_size "
                f"({self.training.batch_size})"
            )
        if self.graphs == "evolved" and self.evolution is None:
            raise ValueError("graphs 'evolved' needs an evolution")
        return self
