"""The params of one profile: lists, the recognizer that generates them, correctors, their training, and decoding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from shared.config import Strict
from shared.training.language import LanguageTraining
from shared.training.settings import TrainingSettings

# One training stage each, and what it trains; checkpoints of others are named in the profile.
FAMILIES: dict[str, tuple[str, ...]] = {
    "encoder_decoder": ("pointer_generator", "pointer_generator_1best", "pointer_generator_no_copy"),
    "decoder_only": ("lm_full", "lm_lora", "lm_lora_1best"),
    "reranker": ("lm_rank_transformer",),
    "checkpoints": (),
}
Model = Literal[
    "pointer_generator",
    "pointer_generator_1best",
    "pointer_generator_no_copy",
    "lm_full",
    "lm_lora",
    "lm_lora_1best",
    "lm_rank_transformer",
]


class RecognizerSettings(Strict):
    """The simulated recognizer, see `simulator.py`; tuned once, on training sentences alone."""

    lexicon_size: PositiveInt = Field(3000, description="most frequent words of the general text")
    pronunciations: Literal["rules", "espeak"] = "rules"
    add_k: PositiveFloat = 0.2
    noise_rate: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.3, 8.5), description="of the Beta that an utterance's share of misheard phones is drawn from"
    )
    noise_temperature: PositiveFloat = Field(0.25, description="the lower, the more alike is what is misheard")
    lost_share: float = Field(0.15, ge=0, le=1, description="of misheard phones that are not heard at all")
    added_share: float = Field(0.1, ge=0, le=1, description="of misheard phones that are heard beside another")
    acoustic_weight: PositiveFloat = 5.0
    language_weight: PositiveFloat = 0.5
    word_bonus: float = Field(2.5, ge=0, description="lest short sentences win")
    candidates: PositiveInt = 24
    beam_size: PositiveInt = 16
    inserted_words: int = Field(12, ge=0, description="short words that may be heard though nobody said them")

    @model_validator(mode="after")
    def _shares_fit(self) -> RecognizerSettings:
        if self.lost_share + self.added_share > 1:
            raise ValueError(
                f"lost_share ({self.lost_share}) and added_share ({self.added_share}) add up to more than 1"
            )
        return self


class Simulated(Strict):
    """The generated domain: sentences of `grammar.py`, heard by the simulated recognizer."""

    train: PositiveInt
    validation: PositiveInt
    test: PositiveInt
    recognizer: RecognizerSettings = RecognizerSettings()


class Recorded(Strict):
    """A real domain: one file that is split here, or files of lists to train and to test on, in $REPRISE_DATA/<folder>.

    Of training lists that come without validation lists, `held_out` are held out by `seed`.
    """

    folder: str = "hyporadise"
    lists: str | None = Field(None, description="a file to split by 70/10/20")
    train: str | None = None
    test: str | None = None
    held_out: PositiveInt = 512

    @model_validator(mode="after")
    def _is_one_or_two_files(self) -> Recorded:
        if (self.lists is None) == (self.train is None) or (self.train is None) != (self.test is None):
            raise ValueError("give either 'lists', a file to split, or both 'train' and 'test'")
        return self


class CorrectorTraining(Strict):
    """AdamW on pairs of a list and its transcript, grouped by length; rises linearly, then falls linearly to zero."""

    epochs: PositiveInt
    batch_size: PositiveInt = Field(64, description="pairs a step")
    micro_batch_size: PositiveInt | None = Field(None, description="pairs held in memory at once; by default all")
    learning_rate: PositiveFloat
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    gradient_clip: PositiveFloat | None = 1.0
    loss_on_prompt: bool = Field(False, description="as the published code has it, which never masks the prompt")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"

    def loop_settings(self, steps_per_epoch: int) -> LinearTraining:
        """The same for the training loop, to which a group of pairs is one example."""
        return LinearTraining(
            epochs=self.epochs,
            batch_size=1,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            optimizer="adamw",
            gradient_clip=self.gradient_clip,
            warmup_epochs=min(self.warmup_steps / steps_per_epoch, 0.5 * self.epochs),
            precision=self.precision,
        )


class LinearTraining(TrainingSettings):
    """Settings of the loop whose learning rate falls linearly to zero, as published."""

    def learning_rate_at(self, epoch: float) -> float:
        """Learning rate at a moment counted in epochs."""
        rising = self.warmup_epochs
        if epoch < rising:
            return self.learning_rate * epoch / rising
        return self.learning_rate * max(0.0, (self.epochs - epoch) / (self.epochs - rising))


class EncoderDecoder(Strict):
    """The pointer-generator: a Transformer encoder-decoder over words."""

    hidden_size: PositiveInt = 128
    num_heads: PositiveInt = 4
    num_layers: PositiveInt = Field(2, description="of the encoder, and as many of the decoder")
    feed_forward_size: PositiveInt = 256
    dropout: float = Field(0.1, ge=0, lt=1)
    vocabulary_size: PositiveInt = Field(3500, description="most frequent words; others can only be copied")
    max_source: PositiveInt = Field(100, description="words of a list, behind which it is cut")
    max_target: PositiveInt = 64
    training: CorrectorTraining


class LowRank(Strict):
    """Low-rank adaptation of the projections of attention: W' = W + (alpha/rank)·B·A."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 16
    dropout: float = Field(0.05, ge=0, lt=1)


class DecoderOnly(Strict):
    """A language model over byte pairs, pretrained on general text, then tuned on lists."""

    hidden_size: PositiveInt = 192
    num_heads: PositiveInt = 4
    num_layers: PositiveInt = 4
    feed_forward_size: PositiveInt | None = Field(None, description="by default about 8/3 of hidden_size")
    convolution_width: int = Field(
        0, ge=0, description="of a short convolution before attention, by which few layers learn to copy; 0 for none"
    )
    vocabulary_size: int = Field(2000, ge=300, description="byte pairs, learned on general text and training lists")
    max_tokens: PositiveInt = Field(256, description="of list and transcript; longer ones lose hypotheses from the end")
    context: PositiveInt = Field(64, description="of the pretraining")
    repeats: PositiveInt = Field(
        1, description="times that the pretraining text says each sentence: large models learn to copy, small ones must"
    )
    pretraining: LanguageTraining
    training: CorrectorTraining
    low_rank: LowRank = LowRank()
    low_rank_learning_rate: PositiveFloat = Field(description="of the low-rank tuning; all else is `training`")


class Reranker(Strict):
    """A Transformer language model of the training transcripts, over the same byte pairs."""

    hidden_size: PositiveInt = 96
    num_heads: PositiveInt = 4
    num_layers: PositiveInt = 2
    feed_forward_size: PositiveInt | None = None
    convolution_width: int = Field(0, ge=0)
    training: CorrectorTraining


class Decoding(Strict):
    """How transcripts are generated. As published: 4 beams, of which the settings of sampling change nothing."""

    beam_size: PositiveInt = 4
    length_penalty: float = Field(1.0, description="power of the length that log-probabilities are divided by")
    sample: bool = Field(False, description="draw instead of searching, by the settings below")
    temperature: PositiveFloat = 0.1
    top_k: PositiveInt | None = 40
    top_p: float | None = Field(0.75, gt=0, le=1)
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64


class Checkpoint(Strict):
    """A published T5 or LLaMA (a folder or a name on the Hugging Face hub), and how it is made to correct.

    With `demonstrations` it is not trained, but prompted with so many pairs of the training set, each number in turn.
    `architecture` are the published sizes, by which the number of parameters is checked without the weights.
    """

    pretrained: str
    tuning: Literal["full", "low_rank", "prompted"]
    demonstrations: tuple[int, ...] = ()
    explain_task: bool = Field(False, description="describe recognition and re-scoring first (task-activating)")
    low_rank: LowRank = LowRank()
    eight_bit: bool = Field(False, description="frozen weights in 8 bit where a GPU and bitsandbytes are there")
    first_only: bool = Field(False, description="the prompt without its block of other hypotheses")
    max_tokens: PositiveInt = 512
    training: CorrectorTraining | None = None
    architecture: dict[str, int | str | bool] | None = None
    published_parameters: PositiveFloat | None = Field(None, description="in billions")

    @model_validator(mode="after")
    def _is_trained_or_prompted(self) -> Checkpoint:
        if (self.tuning == "prompted") == (self.training is not None):
            raise ValueError("give 'training' for tuning 'full' or 'low_rank', and none for 'prompted'")
        if (self.tuning == "prompted") != bool(self.demonstrations) or any(
            not 0 <= n <= 10 for n in self.demonstrations
        ):
            raise ValueError("demonstrations (from 0 to 10) are for tuning 'prompted', which needs them")
        return self


class Reranking(Strict):
    """Of score + λ · log P(words)/words, λ chosen on validation lists."""

    weights: tuple[float, ...] = Field(
        (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20), description="values of λ that are tried"
    )
    order: PositiveInt = Field(3, description="of the Kneser-Ney model")


Domain = Annotated[Simulated | Recorded, Field(union_mode="smart")]


class Params(Strict):
    """A profile's section of params.yaml; models are trained on the lists of all of its domains together."""

    seed: int = Field(0, ge=0, description="of generated lists, splits and padding")
    seeds: tuple[int, ...] = Field(min_length=1, description="of the trainings")
    workers: PositiveInt = 2
    threads: PositiveInt = 1
    num_hypotheses: PositiveInt = 5
    domains: dict[str, Domain] = Field(min_length=1)
    general_text: Literal["documentation", "references", "books"] = Field(
        "documentation", description="what the recognizer's lexicon and bigram are made of"
    )
    pretraining_text: Literal["documentation", "books"] = "documentation"
    max_sentences: PositiveInt | None = Field(None, description="of either text, from its beginning; by default all")
    models: tuple[Model, ...] = ()
    checkpoints: dict[str, Checkpoint] = Field(default_factory=dict)
    encoder_decoder: EncoderDecoder | None = None
    decoder_only: DecoderOnly | None = None
    reranker: Reranker | None = None
    reranking: Reranking = Reranking()
    decoding: Decoding = Decoding()

    @field_validator("models")
    @classmethod
    def _each_once(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(models)) < len(models):
            raise ValueError(f"a model is named twice: {', '.join(models)}")
        return models

    @model_validator(mode="after")
    def _is_complete(self) -> Params:
        for family in ("encoder_decoder", "decoder_only", "reranker"):
            named = [model for model in self.models if model in FAMILIES[family]]
            if named and getattr(self, family) is None:
                raise ValueError(f"{named[0]} needs the settings {family!r}")
        if self.reranker is not None and self.decoder_only is None:
            raise ValueError("the re-ranker reads the byte pairs of decoder_only: give both")
        if self.general_text == "references" and not any(isinstance(d, Recorded) for d in self.domains.values()):
            raise ValueError(
                "general_text 'references' are those of real domains, of which there are none: choose another"
            )
        return self

    def models_of(self, family: str) -> tuple[str, ...]:
        """What the profile trains of a family."""
        if family == "checkpoints":
            return tuple(self.checkpoints)
        return tuple(model for model in self.models if model in FAMILIES[family])


def family_of(model: str) -> str:
    """The training stage that a model belongs to."""
    return next((family for family, members in FAMILIES.items() if model in members), "checkpoints")
