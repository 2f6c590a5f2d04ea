"""Text to train language models on: where it comes from, how it becomes tokens, how tokens become windows."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.config import UserError, data_root
from shared.files import write_json, write_text

if TYPE_CHECKING:
    import tokenizers

Tokens = NDArray[np.int64]

# ------------------------------------------------------------------------------------------------ text that is at hand


def python_text() -> str:
    """The language reference that ships with Python for `help()`: about 460,000 characters, topics in sorted order.

    The text is another in every release of Python, so results on it are comparable within one version only.
    `UserError` where the installation leaves it out.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    if not topics:
        raise UserError(
            "this Python comes without pydoc_data.topics, the text that help() shows: use a complete installation "
            "(python.org, uv, conda, or the full python3 package of your system), or a profile that reads a corpus"
        )
    return "\n\n".join(topics[name] for name in sorted(topics))


# ------------------------------------------------------------------------------------------------------------- corpora


@dataclass(frozen=True)
class Corpus:
    """A corpus as it lies in `$REPRISE_DATA/_corpora/<folder>`, every file plain or gzipped.

    `files` gives the SHA-256 of each file's uncompressed content, or None where it has no official form.
    `divide` turns the contents of the files into the texts of the splits, in the order of `splits`.
    """

    folder: str
    files: dict[str, str | None]
    origin: str
    splits: tuple[str, ...]
    divide: Callable[[list[str]], list[str]]
    joint: str = "\n\n"


def corpus(name: str, split: str | None = None, *, folder: str | None = None) -> str:
    """A corpus as one text, or one split of it; names and splits are those of `CORPORA`.

    A corpus of one file is looked for in `$REPRISE_DATA/<folder>/<name>.txt` first where a `folder` is given: there
    `reprise data fetch <folder>` puts it for a paper that lists it.

    - `tinyshakespeare` (1.1 M characters): the first 90 % are `train`, the next 5 % `validation`, the rest `test`.
    - `wikitext2` (2.4 M characters): the official `validation` and `test`. The official training text is not part of
      it; who trains on `validation` cannot compare with published perplexities.
    - `gutenberg_books` (16 M characters): 22 books to `train`, three of the kind to `test`, and *Ulysses*,
      `out_of_domain`.
    - `python_source` (3.6 M characters): files divided by a digest of their path, 90 % to `train`.

    `UserError` says where missing files belong and where they come from.
    """
    if name not in CORPORA:
        raise UserError(f"there is no corpus {name!r}; choose one of {', '.join(CORPORA)}")
    chosen = CORPORA[name]
    if split is not None and split not in chosen.splits:
        raise UserError(f"{name} has no split {split!r}; choose one of {', '.join(chosen.splits)}, or none for all")
    fetched = data_root() / folder / f"{name}.txt" if folder and len(chosen.files) == 1 else None
    parts = chosen.divide([_read(chosen, file, digest, fetched) for file, digest in chosen.files.items()])
    return chosen.joint.join(parts) if split is None else parts[chosen.splits.index(split)]


def _read(source: Corpus, file: str, digest: str | None, fetched: Path | None) -> str:
    path = data_root() / "_corpora" / source.folder / file
    places = [place for place in (fetched, path) if place]
    found = next((p for place in places for p in (_packed(place), place) if p.is_file()), None)
    if found is None:
        checksum = f" (sha256 {digest})" if digest else ""
        command = f"run 'reprise data fetch {fetched.parent.name}', or " if fetched else ""
        raise UserError(
            f"{path} is missing: {command}put the file there, plain{checksum} or gzipped as {_packed(path).name}, or "
            f"point REPRISE_DATA to the folder that holds your data sets. It comes from {source.origin}"
        )
    try:
        content = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{found} cannot be read ({error}): fetch it again from {source.origin}") from None
    actual = hashlib.sha256(content).hexdigest()
    if digest not in (None, actual):
        raise UserError(
            f"{found} is not the text it should be: sha256 of the content is {actual}, expected {digest}. "
            f"Fetch it again from {source.origin}"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{found} is not UTF-8 text ({error}): fetch it again from {source.origin}") from None


def _packed(path: Path) -> Path:
    return path.with_name(path.name + ".gz")


def _shakespeare(contents: list[str]) -> list[str]:
    text = contents[0]
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    return [text[:first], text[first:second], text[second:]]


def _books(contents: list[str]) -> list[str]:
    # The Time Machine, A Tale of Two Cities and The Jungle Book are held out; 4300 is Ulysses.
    place = {35: 1, 98: 1, 236: 1, 4300: 2}
    return _by_document(contents[0], 3, lambda book: place.get(book["id"], 0))


def _source_files(contents: list[str]) -> list[str]:
    def place(file: dict[str, Any]) -> int:
        bucket = int(hashlib.sha256(file["path"].encode()).hexdigest(), 16) % 20
        return {0: 2, 1: 1}.get(bucket, 0)

    return _by_document(contents[0], 3, place)


def _by_document(lines: str, num_parts: int, place: Callable[[dict[str, Any]], int]) -> list[str]:
    """Documents in JSON lines, each put whole into the part that `place` says."""
    parts: list[list[str]] = [[] for _ in range(num_parts)]
    # Not splitlines, which cuts at separators that JSON allows inside of a text.
    for document in map(json.loads, filter(None, lines.split("\n"))):
        parts[place(document)].append(document["text"])
    return ["\n\n".join(texts) for texts in parts]


CORPORA: dict[str, Corpus] = {
    "tinyshakespeare": Corpus(
        folder="tinyshakespeare",
        files={"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
        origin="https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/"
        "data/tinyshakespeare/input.txt",
        splits=("train", "validation", "test"),
        divide=_shakespeare,
        joint="",
    ),
    "wikitext2": Corpus(
        folder="wikitext2_valid_test",
        files={
            "valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            "test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        },
        origin="https://github.com/pytorch/examples/tree/77f55b912142e11fcfdf5b530231fb9c52f181e8/"
        "word_language_model/data/wikitext-2",
        splits=("validation", "test"),
        divide=list,
        joint="",
    ),
    "gutenberg_books": Corpus(
        folder="gutenberg_books",
        files={"books.jsonl": None},
        origin="the public-domain books at https://github.com/GITenberg, as JSON lines with the keys id (the number at "
        "Project Gutenberg) and text (without its header and footer)",
        splits=("train", "test", "out_of_domain"),
        divide=_books,
    ),
    "python_source": Corpus(
        folder="python_source",
        files={"files.jsonl": None},
        origin="https://github.com/TheAlgorithms/Python at commit f5988cc09713315817df6a7e327e258013a94440, as JSON "
        "lines with the keys path and text",
        splits=("train", "validation", "test"),
        divide=_source_files,
    ),
}

# -------------------------------------------------------------------------------------------------------------- tokens


class CharacterTokenizer:
    """Text as its characters, numbered in the order of their code points."""

    def __init__(self, characters: str) -> None:
        """A tokenizer of the distinct characters of a text."""
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise UserError("a tokenizer cannot be made from an empty text")
        self._code_points = _code_points(self.characters)

    @classmethod
    def train(cls, text: str) -> Self:
        """A tokenizer of the characters that occur in `text`."""
        return cls(text)

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tokens:
        """Text to token numbers, one a character; `UserError` names characters that the tokenizer does not have."""
        given = _code_points(text)
        tokens = np.searchsorted(self._code_points, given).clip(max=self.vocab_size - 1)
        unknown = self._code_points[tokens] != given
        if unknown.any():
            examples = sorted({chr(code) for code in given[unknown]})
            raise UserError(
                f"the text has characters that are not in the vocabulary: {', '.join(map(repr, examples[:10]))}"
                f"{' …' if len(examples) > 10 else ''}; make the tokenizer from all text that it will see"
            )
        return tokens

    def decode(self, tokens: ArrayLike) -> str:
        """Token numbers to text."""
        return "".join(map(self.characters.__getitem__, _checked_tokens(tokens, self.vocab_size).tolist()))

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        write_json(path, {"characters": self.characters})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; `UserError` for a missing or other file."""
        try:
            return cls(json.loads(_read_saved(path))["characters"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                f"{path} does not hold a character tokenizer: save it again, or load another file"
            ) from None


class BytePairTokenizer:
    """Text as byte pairs merged by frequency (byte-level BPE, as of GPT-2), by the library `tokenizers`.

    Any text can be encoded, and decodes to itself.
    """

    NUM_BYTES = 256

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, text: str, vocab_size: int) -> Self:
        """Merge the most frequent pairs of `text` until there are `vocab_size` tokens, or no pair occurs twice.

        The same text gives the same vocabulary. `UserError` for fewer than 256 tokens, the bytes themselves.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if vocab_size < cls.NUM_BYTES:
            raise UserError(f"vocab_size is {vocab_size}, but the bytes alone are {cls.NUM_BYTES} tokens: give more")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(_pieces(text), trainer)
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> Tokens:
        """Text to token numbers."""
        # A piece at a time, since the library keeps spellings and offsets of every token until a text is done.
        parts = [np.array(self.tokenizer.encode(piece).ids, dtype=np.int64) for piece in _pieces(text)]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def decode(self, tokens: ArrayLike) -> str:
        """Token numbers to text; bytes that are not UTF-8 together become replacement characters."""
        return self.tokenizer.decode(_checked_tokens(tokens, self.vocab_size).tolist(), skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON, in the format of `tokenizers`."""
        write_text(path, self.tokenizer.to_str(pretty=True) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; `UserError` for a missing or other file."""
        from tokenizers import Tokenizer

        content = _read_saved(path)
        try:
            return cls(Tokenizer.from_str(content))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} does not hold a byte-pair tokenizer ({error}): save it again") from None


def windows(tokens: ArrayLike, length: int, stride: int | None = None) -> Tokens:
    """Windows of length + 1 tokens, [num_windows, length + 1]: inputs are all but the last, labels all but the first.

    Windows start every `stride` tokens, by default every `length`, which asks for every token but the first once. What
    does not fill a window at the end is left out; `UserError` if not even one is filled.
    """
    stream = np.asarray(tokens, dtype=np.int64)
    stride = length if stride is None else stride
    if stream.ndim != 1:
        raise UserError(f"windows are cut from one row of tokens, not from an array of shape {stream.shape}")
    if length < 1 or stride < 1:
        raise UserError(f"length ({length}) and stride ({stride}) must be at least 1")
    if len(stream) < length + 1:
        raise UserError(
            f"{len(stream)} tokens do not fill a window of {length} and the token after it: give at least "
            f"{length + 1} tokens, or a shorter length"
        )
    return np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::stride].copy()


# Where text may be cut without changing its tokens: before a blank that ends a word, which no byte-pair merge crosses.
_BOUNDARY = re.compile(r"(?<=\S)(?=[ \n])")


def _pieces(text: str, size: int = 1 << 16) -> Iterator[str]:
    """The text in pieces of `size` characters or a little more."""
    start = 0
    while start < len(text):
        cut = _BOUNDARY.search(text, start + size)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _checked_tokens(tokens: ArrayLike, vocab_size: int) -> Tokens:
    array = np.asarray(tokens, dtype=np.int64).ravel()
    if array.size and not 0 <= array.min() <= array.max() < vocab_size:
        raise UserError(f"tokens lie between 0 and {vocab_size - 1}, these between {array.min()} and {array.max()}")
    return array


def _read_saved(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: train and save the tokenizer first") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a tokenizer, but a binary file") from None
