"""The models that are looked into, and how each is asked: house models for codes, others for the paper's needles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.config import Stage, UserError
from shared.data.house_lexicon import load_lexicon
from shared.lm.hooked import Generation, HookedLM, KeyValueCache
from shared.lm.hooks import Hook
from shared.lm.load import house_folder, load_lm

from . import data, needles
from .config import Checkpoint, HouseLM, Params
from .model import Needles, cut, token_recall

Part = Literal["detection", "masking"]
# So many tokens in a row, in an answer of words and in one of pieces of words, do not stand in the context by chance.
RUN_OF_WORDS, RUN_OF_PIECES = 2, 4


@dataclass(frozen=True)
class Subject:
    """A model with its tests.

    `tests(part)` gives batches of needle tests with the reference answer (None where it is the tokens of the answer
    themselves); `words` are tokens for random sequences; `run` is how many tokens of an answer in a row count as taken
    from elsewhere in the context.
    """

    name: str
    seed: int
    lm: HookedLM
    tests: Callable[[Part], Iterator[tuple[Needles, str | None]]]
    stop: Tensor
    max_new_tokens: int
    words: NDArray[np.int64]
    run: int

    @property
    def label(self) -> str:
        """Under which its results are kept."""
        return f"{self.name}-seed{self.seed}"

    def answer(
        self,
        tokens: Tensor,
        hooks: Sequence[Hook] = (),
        past: KeyValueCache | None = None,
        attention: Literal["argmax"] | None = None,
    ) -> Generation:
        """Greedy answers to prompts [B, T]; `hooks` hold from the last token of the prompt on, not before."""
        return self.lm.generate(
            tokens.to(self.lm.device),
            self.max_new_tokens,
            hooks=hooks,
            past=past,
            attention=attention,
            stop=self.stop.tolist(),
        )

    def recall(self, batch: Needles, made: Tensor, reference: str | None) -> NDArray[np.float64]:
        """ROUGE-1 recall in [0, 1] of answers [B, N]."""
        if reference is None:
            return token_recall(made.cpu(), batch.answer)
        return np.array([needles.rouge_recall(reference, self.lm.decode(row)) for row in cut(made, self.stop)])


def house_models(stage: Stage[Params]) -> list[tuple[HouseLM, int]]:
    """The house models of a profile, every seed of each, seeds side by side."""
    house = stage.params.house
    return [(model, seed) for seed in stage.params.seeds for model in house.models] if house else []


def model_folder(stage: Stage[Params], name: str, seed: int) -> Path:
    """Where a house model lies: in pipelines/house_lm, or in runs/ where the paper trains it."""
    house = stage.params.house
    if house is None:
        raise UserError(f"the profile {stage.profile} has no house models")
    if house.stand_in_steps or any(model.two_steps for model in house.models if model.name == name):
        return stage.runs_dir / "models" / name / house.size / f"seed{seed}"
    return house_folder(name, house.size, seed)


def house_subject(stage: Stage[Params], model: HouseLM, seed: int, device: torch.device) -> Subject:
    """A house model of a profile."""
    folder = model_folder(stage, model.name, seed)
    house = stage.params.house
    if not folder.is_dir() and house and house.stand_in_steps is None and model.two_steps is None:
        load_lm(f"house:{model.name}:{house.size}:{seed}")  # says what is missing, and how to get it
    lm, lexicon = load_lm(folder, device=device), load_lexicon("embedded")
    if lm.tokenizer is None or lm.tokenizer.vocabulary != list(lexicon.vocabulary):
        raise UserError(
            f"the model in {folder} has another vocabulary than the tests: train it on the embedded word lists"
        )

    def tests(part: Part) -> Iterator[tuple[Needles, str | None]]:
        for batch in data.load_needles(stage.data_dir, part, model.name, seed):
            yield batch, None

    return Subject(
        name=model.name,
        seed=seed,
        lm=lm,
        tests=tests,
        stop=torch.from_numpy(lexicon.encode(".")).long().to(device),
        # One more than the answer has and its full stop: enough to see that it ends.
        max_new_tokens=data.CODE_LENGTH + 2,
        words=lexicon.encode(lexicon.content).astype(np.int64),
        run=RUN_OF_WORDS,
    )


def checkpoint_subject(stage: Stage[Params], checkpoint: Checkpoint, device: torch.device) -> Subject:
    """A model from the Hugging Face hub or from a folder."""
    settings = stage.params.checkpoints
    if settings is None:
        raise UserError(f"the profile {stage.profile} has no checkpoints")
    dtype = getattr(torch, settings.dtype)
    lm = load_lm(checkpoint.source, device=device, dtype=dtype, local_files_only=settings.local_files_only)
    texts = json.loads((stage.data_dir / "texts.json").read_text(encoding="utf-8"))
    make = partial(needles.tests, lm, texts, chat=checkpoint.chat, buffer=settings.answer_buffer)
    special = set(lm.tokenizer.all_special_ids)
    return Subject(
        name=checkpoint.name,
        seed=0,
        lm=lm,
        tests=lambda part: make(settings.detection if part == "detection" else settings.masking),
        stop=needles.ends_of_line(lm),
        max_new_tokens=settings.max_new_tokens,
        words=np.array([token for token in range(len(lm.tokenizer)) if token not in special]),
        run=RUN_OF_PIECES,
    )
