"""Text for the language models, and examples of multi-query associative recall (MQAR).

`prepare` writes

    data/language/{train,validation,test}.npy    tokens of the text, one after another, uint16
    data/mqar/{train,validation,test}.npy        [2, examples, length] inputs and labels (-100: does not count), int16

each beside an `index.json` with its source, size of vocabulary and digest.

Texts: `python` ships with Python; `tinyshakespeare` lies in `$REPRISE_DATA/<data_folder>/tinyshakespeare.txt` (plain or
gzipped, as fetched) or in `$REPRISE_DATA/_corpora`; `gutenberg_books` in the latter. The first 90 % of the characters
are for training, the next 5 % for validation, the rest for testing. `slimpajama` is read as published:

    $REPRISE_DATA/<data_folder>/slimpajama/{train,validation,test}/**/*.jsonl.zst      field `text`, also plain .jsonl
    $REPRISE_DATA/<data_folder>/tokenizer.json      a Hugging Face tokenizer of at most 65,536 tokens (paper: Mistral's)

as many tokens of it as the params ask for, every document followed by the token `</s>`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from shared.config import Stage, Strict, UserError, data_root
from shared.data.recall import mqar
from shared.data.text import BytePairTokenizer, CharacterTokenizer, corpus, python_text
from shared.files import atomic_path, write_json

if TYPE_CHECKING:
    from .config import Params

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# Ends of the splits, as shares of the characters.
ENDS = (0.9, 0.95, 1.0)
END_OF_DOCUMENT = "</s>"
DOCUMENTS_AT_ONCE = 1000


# --- Settings ---------------------------------------------------------------------------------------------------------


class TextSettings(Strict):
    """Which text, and what its tokens are: characters, or byte pairs where `vocab_size` is given."""

    source: Literal["python", "tinyshakespeare", "gutenberg_books", "slimpajama"] = "python"
    data_folder: str = Field("gla", description="under $REPRISE_DATA")
    vocab_size: int | None = Field(None, ge=256, le=2**16)
    num_tokens: PositiveInt | None = Field(None, description="of SlimPajama, for training")
    num_held_out_tokens: PositiveInt | None = Field(None, description="at most, for validation and test each")

    @model_validator(mode="after")
    def _streams_have_an_end(self) -> TextSettings:
        streamed = self.source == "slimpajama"
        if streamed != bool(self.num_tokens):
            raise ValueError("num_tokens goes with source 'slimpajama', and it with num_tokens")
        if streamed and not self.num_held_out_tokens:
            raise ValueError("source 'slimpajama' needs num_held_out_tokens")
        if streamed and self.vocab_size is not None:
            raise ValueError("source 'slimpajama' brings its own tokenizer: leave vocab_size out")
        return self


class RecallSettings(Strict):
    """Sizes of MQAR: `num_pairs` keys with their values in a sequence, each of which is asked for once."""

    length: PositiveInt = Field(description="L")
    num_pairs: PositiveInt = Field(description="D")
    vocab_size: int = Field(ge=4, le=2**15)
    num_train: PositiveInt
    num_validation: PositiveInt
    num_test: PositiveInt

    @property
    def chance(self) -> float:
        """Accuracy of guessing among all values, which are half of the vocabulary."""
        return 1 / (self.vocab_size // 2)


# --- Preparation ------------------------------------------------------------------------------------------------------


def prepare(stage: Stage[Params]) -> None:
    """Write the data of the profile under `stage.data_dir`."""
    prepare_text(stage.data_dir / "language", stage.params.language.data)
    prepare_recall(stage.data_dir / "mqar", stage.params.mqar.data, stage.params.seed)


def prepare_text(folder: Path, settings: TextSettings) -> None:
    """Write the tokens of a text, split by split."""
    if settings.source == "slimpajama":
        characters, vocab_size = _write_slimpajama(folder, settings)
    else:
        text = read_text(settings)
        parts = split_text(text)
        if settings.vocab_size is None:
            tokenizer: Any = CharacterTokenizer.train(text)
        else:
            tokenizer = BytePairTokenizer.train(parts["train"], settings.vocab_size)
        characters = {}
        for split, part in parts.items():
            tokens = tokenizer.encode(part)[: None if split == "train" else settings.num_held_out_tokens]
            characters[split] = len(tokenizer.decode(tokens))
            _write(folder / f"{split}.npy", tokens.astype(np.uint16))
        vocab_size = tokenizer.vocab_size
    _write_index(folder, {"source": settings.source, "vocab_size": vocab_size, "characters": characters})


def read_text(settings: TextSettings) -> str:
    """The whole text of a source that is not streamed."""
    if settings.source == "python":
        return python_text()
    path = data_root() / settings.data_folder / f"{settings.source}.txt"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    packed = path.with_name(f"{path.name}.gz")
    if packed.is_file():
        return gzip.decompress(packed.read_bytes()).decode("utf-8")
    return corpus(settings.source, None if settings.source == "tinyshakespeare" else "train")


def split_text(text: str) -> dict[Split, str]:
    """The splits of a text, in its own order, so that none is continued in another."""
    ends = [int(share * len(text)) for share in ENDS]
    return {split: text[start:end] for split, start, end in zip(SPLITS, [0, *ends], ends, strict=False)}


def prepare_recall(folder: Path, settings: RecallSettings, seed: int) -> None:
    """Generate the examples of all splits at once, so that none is in two of them but by chance."""
    counts = (settings.num_train, settings.num_validation, settings.num_test)
    examples = np.stack(
        mqar(
            sum(counts),
            length=settings.length,
            num_pairs=settings.num_pairs,
            vocab_size=settings.vocab_size,
            seed=seed,
        )
    ).astype(np.int16)
    for split, part in zip(SPLITS, np.split(examples, np.cumsum(counts)[:-1], axis=1), strict=True):
        _write(folder / f"{split}.npy", part)
    _write_index(folder, {"source": "generated", "vocab_size": settings.vocab_size})


def _write(path: Path, array: NDArray) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


def _write_index(folder: Path, about: dict[str, Any]) -> None:
    digest = hashlib.sha256()
    for split in SPLITS:
        with open(folder / f"{split}.npy", "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    write_json(folder / "index.json", {**about, "digest": digest.hexdigest()})


# --- SlimPajama -------------------------------------------------------------------------------------------------------


def _write_slimpajama(folder: Path, settings: TextSettings) -> tuple[dict[Split, int], int]:
    """Tokenize as many tokens as are asked for; characters by split, and the size of the vocabulary."""
    from tokenizers import Tokenizer

    root = data_root() / settings.data_folder
    path = root / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: put the tokenizer of Mistral-7B-v0.1 there, a Hugging Face tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    end, vocab_size = tokenizer.token_to_id(END_OF_DOCUMENT), tokenizer.get_vocab_size()
    if end is None or vocab_size > 2**16:
        raise UserError(f"{path} needs the token {END_OF_DOCUMENT!r} and at most 65,536 tokens; it has {vocab_size}")
    characters: dict[Split, int] = {}
    for split in SPLITS:
        wanted = int((settings.num_tokens if split == "train" else settings.num_held_out_tokens) or 0)
        stream = read_documents(root / "slimpajama" / split)
        with atomic_path(folder / f"{split}.npy") as temporary:
            tokens = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint16, shape=(wanted,))
            filled = characters[split] = 0
            while filled < wanted and (documents := list(islice(stream, DOCUMENTS_AT_ONCE))):
                for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
                    ids = [*encoding.ids, end][: wanted - filled]
                    tokens[filled : filled + len(ids)] = ids
                    filled += len(ids)
                    characters[split] += max((stop for _, stop in encoding.offsets[: len(ids)]), default=0)
            if filled < wanted:
                raise UserError(
                    f"{root / 'slimpajama' / split} holds {filled:,} tokens, {wanted:,} were asked for: put more of "
                    "its files there, or lower num_tokens (num_held_out_tokens) in params.yaml"
                )
            tokens.flush()
    return characters, vocab_size


def read_documents(folder: Path) -> Iterator[str]:
    """The texts of all `.jsonl` and `.jsonl.zst` files under a folder, in the order of their names."""
    import pyarrow

    paths = sorted(path for path in folder.rglob("*") if path.name.endswith((".jsonl", ".jsonl.zst")))
    if not paths:
        raise UserError(
            f"{folder} holds no .jsonl or .jsonl.zst files: download them from "
            "https://huggingface.co/datasets/cerebras/SlimPajama-627B (no gate, 895 GB in all; a part will do)"
        )
    for path in paths:
        try:
            with pyarrow.input_stream(str(path), compression="zstd" if path.suffix == ".zst" else None) as stream:
                for line in _lines(stream):
                    yield json.loads(line)["text"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged or not a file of SlimPajama ({error!r}): download it again") from None


def _lines(stream: Any) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(2**20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


# --- Loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A tokenized text; `tokens` [N] by split, and how many characters a token of the test split stands for."""

    tokens: dict[Split, Tensor]
    vocab_size: int
    characters_per_token: float
    source: str
    digest: str

    def windows(self, split: Split, length: int, stride: int | None = None) -> Tensor:
        """Windows [N, length + 1] of a split, a view of it, so many tokens apart (by default their length)."""
        tokens = self.tokens[split]
        if len(tokens) <= length:
            raise UserError(
                f"the {split} part of {self.source!r} has {len(tokens)} tokens, too few for a window of {length}: "
                "shorten the contexts in params.yaml"
            )
        return tokens.unfold(0, length + 1, stride or length)


@dataclass(frozen=True)
class Recall:
    """Examples of MQAR: (inputs, labels), [N, length] each, by split."""

    examples: dict[Split, tuple[Tensor, Tensor]]
    vocab_size: int
    source: str
    digest: str


def load_text(data_dir: Path) -> Text:
    """Load the prepared text, memory-mapped."""
    index, arrays = _load(data_dir / "language")
    per_token = index["characters"]["test"] / len(arrays["test"])
    return Text(arrays, index["vocab_size"], per_token, index["source"], index["digest"])


def load_recall(data_dir: Path) -> Recall:
    """Load the prepared examples of MQAR."""
    index, arrays = _load(data_dir / "mqar")
    examples = {split: (array[0], array[1]) for split, array in arrays.items()}
    return Recall(examples, index["vocab_size"], index["source"], index["digest"])


def _load(folder: Path) -> tuple[dict[str, Any], dict[Split, Tensor]]:
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        # Copy on write: torch wants memory that it may write to.
        arrays = {s: torch.from_numpy(np.load(folder / f"{s}.npy", mmap_mode="c", allow_pickle=False)) for s in SPLITS}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: run the stage prepare (reprise run prepare)") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{folder} is damaged ({error}): run the stage prepare again") from None
    return index, arrays
