"""Data of the experiments: text for the language models, and generated tasks of recall.

`prepare` writes `data/<experiment>/<split>.npy`, int32, beside an `index.json` with the vocabulary's size, the source
and a digest. Text is [windows, length + 1], each window predicting its own continuation; a task is
[2, examples, length], inputs and labels, of which those of -100 do not count. Splits are `train`, `validation` and
`test`; text has also `long`, the test text in longer windows.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from shared.config import Stage, Strict, UserError, data_root
from shared.data.mad import TASKS, mad
from shared.data.recall import mqar, overwrite_mqar
from shared.data.text import BytePairTokenizer, CharacterTokenizer, corpus, python_text, windows
from shared.files import atomic_path, write_json

if TYPE_CHECKING:
    from .config import Params

ExperimentName = Literal[
    "language",
    "mqar",
    "overwrite",
    "compress",
    "fuzzy_recall",
    "in_context_recall",
    "memorize",
    "noisy_recall",
    "selective_copy",
]
EXPERIMENTS: tuple[ExperimentName, ...] = get_args(ExperimentName)
KINDS = {"language": "text", "mqar": "mqar", "overwrite": "mqar"} | dict.fromkeys(TASKS, "mad")
Split = Literal["train", "validation", "test", "long"]
# Windows of text [N, length + 1], or inputs and labels [N, length] of a task.
Examples = Tensor | tuple[Tensor, Tensor]
PYTHON_TEXT = "python"
# Share of the characters, in the order of the text.
TRAIN_SHARE, VALIDATION_SHARE = 0.9, 0.05


# --- Settings ---------------------------------------------------------------------------------------------------------


class TextData(Strict):
    """Text cut into windows of `length` tokens, and the test text once more into windows of `long_length`.

    `corpus` is `python` (the documentation that comes with Python) or one of those in `shared.data.text`, or a split of
    one, such as `gutenberg_books/train`. With `data_folder` the text is read from `$REPRISE_DATA/<data_folder>`
    instead, from all `*.jsonl` and `*.jsonl.gz` there in the order of their names, a document a line, in its field
    `text`. Of the text the first `max_characters` are taken, or all.
    Tokens are characters, or byte pairs learnt from the training text where `vocab_size` is given.
    """

    kind: Literal["text"]
    corpus: str = PYTHON_TEXT
    data_folder: str | None = None
    max_characters: PositiveInt | None = None
    vocab_size: int | None = Field(None, ge=256)
    length: int = Field(ge=2)
    long_length: int = Field(ge=4)

    @model_validator(mode="after")
    def _long_is_longer(self) -> TextData:
        if self.long_length % self.length or self.long_length < 2 * self.length:
            raise ValueError(
                f"long_length ({self.long_length}) must be a multiple of length ({self.length}), not itself"
            )
        return self


class _Generated(Strict):
    """What generated tasks have in common: sizes of an example, and numbers of examples."""

    length: int = Field(ge=4)
    vocab_size: int = Field(ge=4)
    num_train: PositiveInt
    num_validation: PositiveInt
    num_test: PositiveInt

    @property
    def num_examples(self) -> int:
        return self.num_train + self.num_validation + self.num_test


class MQARData(_Generated):
    """Multi-query associative recall: `num_pairs` keys with their values, then queries.

    With `num_overwritten` as many keys are bound a second time to another value, and the latest one is asked for.
    """

    kind: Literal["mqar"]
    num_pairs: PositiveInt
    num_overwritten: int = Field(0, ge=0)


class MADData(_Generated):
    """One of the six tasks of MAD; `options` are those of its function in `shared.data.mad`."""

    kind: Literal["mad"]
    options: dict[str, int | float] = Field(default_factory=dict)


DataSettings = Annotated[TextData | MQARData | MADData, Field(discriminator="kind")]


# --- Preparation ------------------------------------------------------------------------------------------------------


def prepare(stage: Stage[Params]) -> None:
    """Write the data of every experiment of the profile under `stage.data_dir`."""
    for name, experiment in stage.params.experiments.items():
        settings = experiment.data
        if isinstance(settings, TextData):
            arrays, about = text_data(settings, stage.slug)
        else:
            arrays, about = task_data(name, settings, stage.params.seed)
        digest = hashlib.sha256()
        for split, array in arrays.items():
            with atomic_path(stage.data_dir / name / f"{split}.npy") as temporary:
                np.save(temporary, array.astype(np.int32), allow_pickle=False)
            digest.update(f"{split} {array.shape}".encode() + array.astype(np.int32).tobytes())
        write_json(stage.data_dir / name / "index.json", {**about, "digest": digest.hexdigest()})
        print(f"{name}: {', '.join(f'{split} {list(array.shape)}' for split, array in arrays.items())}", flush=True)


def text_data(settings: TextData, slug: str) -> tuple[dict[Split, NDArray], dict[str, Any]]:
    """Windows of each split of a text, and what is to be known of them."""
    text = read_text(settings, slug)[: settings.max_characters]
    parts = split_text(text)
    if settings.vocab_size is None:
        tokenizer = CharacterTokenizer.train(text)
    else:
        tokenizer = BytePairTokenizer.train(parts["train"], settings.vocab_size)
    tokens = {split: tokenizer.encode(part) for split, part in parts.items()}
    arrays: dict[Split, NDArray] = {split: windows(tokens[split], settings.length) for split in parts}
    arrays["long"] = windows(tokens["test"], settings.long_length)
    return arrays, {
        "source": "Python's documentation" if settings.corpus == PYTHON_TEXT else settings.corpus,
        "vocab_size": tokenizer.vocab_size,
        "characters_per_token": len(parts["test"]) / len(tokens["test"]),
    }


def read_text(settings: TextData, slug: str) -> str:
    """The whole text of a corpus (fetched for the paper `slug`, or any), or of the documents in the data folder."""
    if settings.data_folder is None:
        name, _, part = settings.corpus.partition("/")
        return python_text() if name == PYTHON_TEXT else corpus(name, part or None, folder=slug)
    folder = data_root() / settings.data_folder
    paths = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])
    if not paths:
        raise UserError(
            f"{folder} holds no *.jsonl or *.jsonl.gz: put {settings.corpus} there (a document a line, in its field "
            "'text'), or set REPRISE_DATA to where it lies"
        )
    documents = []
    for path in paths:
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                documents += [json.loads(line)["text"] for line in file if line.strip()]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not JSON lines with a field 'text' in each ({error!r}): get it again") from None
    return "\n\n".join(documents)


def split_text(text: str) -> dict[Split, str]:
    """The first 90 % of a text's characters to train on, 5 % to validate, the last 5 % to test."""
    first, second = (round(share * len(text)) for share in (TRAIN_SHARE, TRAIN_SHARE + VALIDATION_SHARE))
    return {"train": text[:first], "validation": text[first:second], "test": text[second:]}


def task_data(name: str, settings: MQARData | MADData, seed: int) -> tuple[dict[Split, NDArray], dict[str, Any]]:
    """Inputs and labels of each split of a generated task, [2, examples, length]."""
    sizes = {"length": settings.length, "vocab_size": settings.vocab_size, "seed": seed}
    if isinstance(settings, MADData):
        inputs, labels = mad(name, settings.num_examples, **sizes, **settings.options)
    elif settings.num_overwritten:
        inputs, labels = overwrite_mqar(
            settings.num_examples, num_pairs=settings.num_pairs, num_overwritten=settings.num_overwritten, **sizes
        )
    else:
        inputs, labels = mqar(settings.num_examples, num_pairs=settings.num_pairs, **sizes)
    both = np.stack([inputs, labels])
    borders = [settings.num_train, settings.num_train + settings.num_validation]
    splits = dict(zip(("train", "validation", "test"), np.split(both, borders, axis=1), strict=True))
    return splits, {"source": "generated", "vocab_size": settings.vocab_size}


# --- Loading ----------------------------------------------------------------------------------------------------------


def load(data_dir: Path, experiment: str, split: Split) -> Examples:
    """A prepared split, memory-mapped; `UserError` where it is missing or damaged."""
    path = data_dir / experiment / f"{split}.npy"
    try:
        # Copied on write: torch wants arrays that could be written to.
        array = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the stage: reprise run prepare") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); run the stage: reprise run prepare") from None
    return (array[0], array[1]) if array.ndim == 3 else array


def about(data_dir: Path, experiment: str) -> dict[str, Any]:
    """Source, vocabulary size and digest of an experiment's data; of text also the characters per token."""
    path = data_dir / experiment / "index.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{experiment} has not been prepared ({path} is missing); run: reprise run prepare") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run: reprise run prepare") from None
