"""The params of one profile: data and how it was annotated, the ranker, its training, and what is compared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from shared.config import Strict

# Where negatives come from. `strong` is BM25 with feedback or with latent semantics, see `DataSettings.strong`.
SOURCES = ("random", "weak", "bm25", "strong", "dense")
Source = Literal["random", "weak", "bm25", "strong", "dense"]
# What is labelled: one relevant document of the weak or of the strong retriever's pool, all relevant ones, or what the
# files give.
Labels = Literal["weak_pool", "strong_pool", "complete", "given"]


class Variant(Strict):
    """How the pairs of one model are weighted, and which negatives they are made of."""

    weights: Literal["none", "coupled", "fixed_selection", "fixed_relevance"] = "none"
    tau: PositiveFloat = Field(10.0, description="temperature of the weights, `debias_ratio` of the published code")
    weigh_positives: bool = Field(False, description="by 1/sigmoid(f/tau) of the positive as well")
    normalize: bool = Field(False, description="weights of a batch to mean 1")
    drop: Literal["none", "scored_high", "relevant"] = Field(
        "none", description="negatives that a first-round model scores high, or (with all judgments) relevant ones"
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="of sigmoid(f(negative) - f(positive)), for 'scored_high'")
    refresh: bool = Field(True, description="draw other negatives in every epoch")
    objective: Literal["pairwise", "nnpu"] = "pairwise"
    prior: float = Field(0.1, gt=0, lt=1, description="share of relevant unlabelled documents, for 'nnpu'")

    @property
    def has_first_round(self) -> bool:
        """Whether an unweighted model is trained first, to give fixed weights or to choose negatives."""
        return self.weights in ("fixed_selection", "fixed_relevance") or self.drop == "scored_high"

    @property
    def has_selection(self) -> bool:
        """Whether a selection model is trained or used."""
        return self.weights != "none"


# One training stage each.
FAMILIES = {
    "plain": ("plain", "plain_fixed_negatives"),
    "coupled": (
        "cet",
        "cet_tau1",
        "cet_tau2",
        "cet_tau5",
        "cet_tau20",
        "cet_normalized",
        "cet_tau1_normalized",
        "cet_positives",
        "cet_tau1_positives",
        "cet_fixed_negatives",
    ),
    "fixed": ("fixed_selection", "fixed_selection_tau1", "fixed_relevance", "fixed_relevance_tau1"),
    "baselines": ("denoised", "pu", "oracle"),
}

# By name; a model is `<variant>_<source of its negatives>`.
VARIANTS: dict[str, Variant] = {
    "plain": Variant(),
    "cet": Variant(weights="coupled"),
    "cet_tau1": Variant(weights="coupled", tau=1),
    "cet_tau2": Variant(weights="coupled", tau=2),
    "cet_tau5": Variant(weights="coupled", tau=5),
    "cet_tau20": Variant(weights="coupled", tau=20),
    "cet_normalized": Variant(weights="coupled", normalize=True),
    "cet_tau1_normalized": Variant(weights="coupled", tau=1, normalize=True),
    "cet_positives": Variant(weights="coupled", weigh_positives=True),
    "cet_tau1_positives": Variant(weights="coupled", tau=1, weigh_positives=True),
    "cet_fixed_negatives": Variant(weights="coupled", refresh=False),
    "plain_fixed_negatives": Variant(refresh=False),
    "fixed_selection": Variant(weights="fixed_selection"),
    "fixed_selection_tau1": Variant(weights="fixed_selection", tau=1),
    "fixed_relevance": Variant(weights="fixed_relevance"),
    "fixed_relevance_tau1": Variant(weights="fixed_relevance", tau=1),
    "denoised": Variant(drop="scored_high"),
    "pu": Variant(objective="nnpu"),
    "oracle": Variant(drop="relevant"),
}


def family_of(variant: str) -> str:
    """The training stage that a variant belongs to."""
    return next(name for name, members in FAMILIES.items() if variant in members)


class Collections(Strict):
    """Test collections with nearly complete judgments, whose queries are pooled."""

    kind: Literal["collections"] = "collections"
    names: tuple[Literal["cranfield", "cisi", "cacm", "npl"], ...] = Field(
        ("cranfield", "cisi", "cacm", "npl"), min_length=1
    )


class Generated(Strict):
    """Size and shape of the stand-in, see `standin.py`."""

    kind: Literal["generated"] = "generated"
    documents: PositiveInt
    queries: PositiveInt
    topics: PositiveInt = 50
    concentration: PositiveFloat = Field(2.5, description="of the Dirichlet of topics, summed over them: 50 times .05")
    styles: PositiveInt = 3
    style_words: PositiveInt = Field(40, description="words of a topic that only one style has")
    common_words: PositiveInt = Field(40, description="words of a topic that all styles have")
    style_share: float = Field(0.7, ge=0, le=1, description="of a text's words that are its style's own")
    document_words: tuple[PositiveInt, PositiveInt] = (40, 80)
    query_words: tuple[PositiveInt, PositiveInt] = (3, 5)
    relevant_per_query: PositiveFloat = Field(20, description="on average; sets the threshold of the cosine")

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Generated:
        for name in ("document_words", "query_words"):
            shortest, longest = getattr(self, name)
            if shortest > longest:
                raise ValueError(f"{name} must be the shortest and the longest length, not {shortest} and {longest}")
        if self.relevant_per_query >= self.documents:
            raise ValueError("relevant_per_query must be smaller than documents")
        return self


class QuerySet(Strict):
    """Queries that models are tested on, their judgments and the candidates that are re-ranked."""

    queries: str
    qrels: str
    candidates: str = Field(description="a TREC run, or lines of query, document and rank")


class MSMarco(Strict):
    """MS MARCO passages in the official layout, under $REPRISE_DATA/<folder>; triples by source of negatives."""

    kind: Literal["msmarco"] = "msmarco"
    folder: str = "msmarco"
    collection: str = "collection.tsv"
    queries: str = "queries.train.tsv"
    triples: dict[Source, str] = Field(min_length=1)
    tests: dict[str, QuerySet] = Field(min_length=1)


Corpus = Annotated[Collections | Generated | MSMarco, Field(discriminator="kind")]


class Pooling(Strict):
    """What is retrieved, and who annotates what."""

    depth: PositiveInt = Field(20, description="of the annotator's pool")
    label: Literal["highest_ranked", "uniform"] = Field("highest_ranked", description="which relevant one of the pool")
    negatives: PositiveInt = Field(50, description="candidates for negatives: the top of each retriever")
    reranked: PositiveInt = Field(100, description="the top of BM25 that models re-rank")
    strong: Literal["rm3", "lsa_mix"] = "lsa_mix"
    lsa_dimensions: PositiveInt = 200
    mix_weight: float = Field(0.5, ge=0, le=1, description="of the latent semantic score in 'lsa_mix'")
    folds: int = Field(5, ge=2, description="of queries; every fold but one is trained on")
    tested_folds: PositiveInt | None = Field(None, description="by default all")

    @model_validator(mode="after")
    def _folds_exist(self) -> Pooling:
        if self.tested_folds is not None and self.tested_folds > self.folds:
            raise ValueError(f"tested_folds ({self.tested_folds}) must not be more than folds ({self.folds})")
        return self


class KernelRanker(Strict):
    """KNRM: kernels of the cosines of frozen embeddings, exact-match features, and a small network on them."""

    kind: Literal["kernel"] = "kernel"
    embedding_dimensions: PositiveInt = 100
    hidden_size: PositiveInt = 32
    dropout: float = Field(0.0, ge=0, lt=1)


class TransformerRanker(Strict):
    """A cross-encoder over [CLS] query [SEP] document [SEP]; with `pretrained`, from there (a name or a folder)."""

    kind: Literal["transformer"] = "transformer"
    pretrained: str | None = None
    hidden_size: PositiveInt = 384
    num_layers: PositiveInt = 6
    num_heads: PositiveInt = 6
    dropout: float = Field(0.2, ge=0, lt=1)
    query_tokens: PositiveInt = 32
    document_tokens: PositiveInt = 256

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerRanker:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        return self


Ranker = Annotated[KernelRanker | TransformerRanker, Field(discriminator="kind")]


class CoupledTraining(Strict):
    """AdamW on pairs of a labelled positive and a sampled negative; the same for both models."""

    epochs: PositiveInt
    batch_size: PositiveInt = Field(32, description="pairs a step, of each fold and seed")
    negatives_per_query: PositiveInt = 8
    learning_rate: PositiveFloat
    weight_decay: float = Field(0.01, ge=0, description="not on biases and layer norms")
    epsilon: PositiveFloat = 1e-8
    gradient_clip: PositiveFloat = 1.0
    schedule: Literal["constant", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0, description="linear rise of the learning rate")
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    checkpoint_every_steps: PositiveInt | None = Field(None, description="beside the one at the end")
    diagnosed_queries: PositiveInt | None = Field(None, description="training queries in the diagnoses; default: all")

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (num_steps - step) / max(1, num_steps - self.warmup_steps)


class Experiment(Strict):
    """Models trained on the same labels: of each variant the sources of negatives that it is trained with."""

    labels: Labels = "weak_pool"
    models: dict[str, tuple[Source, ...]] = Field(min_length=1)
    by_query: bool = Field(True, description="keep every query's scores, not their means alone; claims need them")

    @field_validator("models")
    @classmethod
    def _known(cls, models: dict[str, tuple[Source, ...]]) -> dict[str, tuple[Source, ...]]:
        for variant, sources in models.items():
            if variant not in VARIANTS:
                raise ValueError(f"unknown variant {variant!r}; choose among {', '.join(VARIANTS)}")
            if len(set(sources)) < len(sources) or not sources:
                raise ValueError(f"{variant} needs sources of negatives, each once (given: {', '.join(sources)})")
        return models

    def trained(self) -> dict[str, tuple[Variant, Source]]:
        """Variant and source of negatives of every model."""
        return {
            f"{name}_{source}": (VARIANTS[name], source) for name, sources in self.models.items() for source in sources
        }


class SpeedSettings(Strict):
    """What is timed: `pairs` a step of `members` models, together and one pair of one model at a time."""

    pairs: PositiveInt = 32
    members: PositiveInt = 25
    features: PositiveInt = 13
    rounds: int = Field(3, ge=3)


class Params(Strict):
    """A profile's section of params.yaml; an experiment's name is that of its data set in scores.csv."""

    seed: int = Field(0, ge=0, description="of generated data, folds and random negatives")
    seeds: tuple[int, ...] = Field(min_length=1, description="of the trainings: weights, negatives, order, dropout")
    workers: PositiveInt = 2
    threads: PositiveInt = 1
    corpus: Corpus
    pooling: Pooling = Pooling()
    ranker: Ranker
    training: CoupledTraining
    experiments: dict[str, Experiment] = Field(min_length=1)
    speed: SpeedSettings | None = None

    @field_validator("experiments")
    @classmethod
    def _names_are_folders(cls, experiments: dict[str, Experiment]) -> dict[str, Experiment]:
        for name in experiments:
            if not name.isidentifier():
                raise ValueError(f"{name!r} is no name for an experiment: use letters, digits and '_'")
        return experiments

    @model_validator(mode="after")
    def _corpus_and_labels_agree(self) -> Params:
        given = isinstance(self.corpus, MSMarco)
        for name, experiment in self.experiments.items():
            if (experiment.labels == "given") != given:
                allowed = "'given' with MS MARCO, and the other labels with the other corpora"
                raise ValueError(f"labels of {name} are {experiment.labels!r}: use {allowed}")
            if given:
                missing = {source for _, source in experiment.trained().values()} - {*self.corpus.triples, "random"}
                if missing:
                    raise ValueError(f"{name} needs triples with negatives of {', '.join(sorted(missing))}")
        if given and isinstance(self.ranker, KernelRanker):
            raise ValueError("on MS MARCO the ranker must be a transformer")
        return self
