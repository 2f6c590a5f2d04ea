"""N-best lists of speech recognizers with their references: files, splits, and words as numbers.

The layouts are those of HyPoradise's files: a JSON array of entries, or one JSON object a line, plain or gzipped.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError
from shared.evaluation.transcription import UNKNOWN

if TYPE_CHECKING:
    import datasets

LISTS, REFERENCES, SCORES = ("nbest", "input"), ("reference", "ref", "output"), ("scores", "score", "am_score")

PAD, UNK, START, END, SEP = range(5)
SPECIAL_WORDS = ("<pad>", "<unk>", "<start>", "<end>", "<sep>")


@dataclass(frozen=True)
class _Entry:
    where: str
    nbest: list[str]
    reference: str
    scores: list[float] | None


def read_nbest(
    path: Path,
    *,
    num_hypotheses: int = 5,
    seed: int = 0,
    missing_reference: Literal["error", "drop"] = "error",
    max_bytes: int = 1 << 20,
) -> datasets.Dataset:
    """Lists of `num_hypotheses` texts, best first, and their references: columns nbest, reference and, if any, scores.

    An entry has `nbest` or `input`, a list of texts, or `input1`, the best one, and `input2`, the others one behind
    the other, each ended by a period; `reference`, `ref` or `output`; and perhaps `scores`, `score` or `am_score`, one
    number a hypothesis. Other fields are passed over.

    Lists of that length stay as they are published. From others, the first distinct texts that are not empty are kept,
    and repeated at random (from `seed`, in the file's order) to fill the list up. Empty texts become `<UNK>`. Entries
    without a reference are an error, or left out with a warning that counts them (`missing_reference="drop"`).

    `UserError` naming file and line for text that is not UTF-8 or not JSON, entries above `max_bytes`, fields that are
    missing or of a wrong type, and scores that some entries have and others lack.
    """
    path = Path(path)
    if missing_reference not in ("error", "drop"):
        raise UserError(f"missing_reference must be error or drop, not {missing_reference!r}")
    entries, dropped = [], []
    for line, value in _values(path, max_bytes):
        where = f"{path}, line {line}"
        entry = _entry(value, where)
        if entry is not None:
            entries.append(entry)
        elif missing_reference == "drop":
            dropped.append(line)
        else:
            raise UserError(
                f"{where}: there is no reference ({', '.join(REFERENCES)}): add it, or leave such entries out "
                'with missing_reference="drop"'
            )
    if dropped:
        warnings.warn(
            f"{path}: {len(dropped)} entries without a reference left out, the first in line {dropped[0]}", stacklevel=2
        )
    if not entries:
        raise UserError(f"{path} holds no list with a reference")
    return _dataset(entries, num_hypotheses, seed)


def make_nbest(
    nbest: Sequence[Sequence[str]],
    references: Sequence[str],
    scores: Sequence[Sequence[float]] | None = None,
    *,
    num_hypotheses: int = 5,
    seed: int = 0,
) -> datasets.Dataset:
    """The same data set, by the same rules, from lists [U][N], best first, references [U] and scores [U][N]."""
    if not nbest or not len(nbest) == len(references) == len(nbest if scores is None else scores):
        raise UserError(
            f"there must be as many lists ({len(nbest)}) as references ({len(references)}) and scores, and at least one"
        )
    entries = []
    for number, (hypotheses, reference) in enumerate(zip(nbest, references, strict=True)):
        where = f"list {number}"
        values = None if scores is None else _numbers(list(scores[number]), len(hypotheses), f"{where}: scores")
        texts = _texts(hypotheses if isinstance(hypotheses, str) else list(hypotheses), f"{where}: hypotheses")
        entries.append(_Entry(where, texts, _text(reference, f"{where}: reference"), values))
    return _dataset(entries, num_hypotheses, seed)


def distinct(hypotheses: Iterable[str]) -> list[str]:
    """The hypotheses without repeats, which are padding; in their order."""
    return list(dict.fromkeys(hypotheses))


def split_nbest(
    dataset: datasets.Dataset, fractions: tuple[float, float, float] = (0.7, 0.1, 0.2), seed: int = 0
) -> datasets.DatasetDict:
    """A random split into train, validation and test, rounded, the rest to the test; the same for the same seed."""
    import datasets

    if len(fractions) != 3 or min(fractions) <= 0 or not math.isclose(sum(fractions), 1):
        raise UserError(f"fractions must be three positive numbers that add up to 1, not {fractions}")
    size = len(dataset)
    first, second = round(size * fractions[0]), round(size * (fractions[0] + fractions[1]))
    order = np.random.default_rng(seed).permutation(size)
    parts = dict(zip(("train", "validation", "test"), np.split(order, [first, second]), strict=True))
    for name, rows in parts.items():
        if not len(rows):
            raise UserError(f"{size} lists are too few to split by {fractions}: nothing is left for {name}")
    return datasets.DatasetDict({name: dataset.select(rows) for name, rows in parts.items()})


# --- Words as numbers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedNBest:
    """Lists as rows of numbers, padded behind with `PAD`.

    `source` int64 [U, S]: the words of all hypotheses with `SEP` between; a word outside of the vocabulary V is number
    V + j for word j of `extra`, which belongs to this utterance alone. `ranks` [U, S]: 1 for tokens of the first
    hypothesis, and so on; 0 for pads. `positions` [U, S]: the place inside its hypothesis. `target` int64 [U, T]:
    `START`, the reference's words numbered in the same way (`UNK` where they are in neither), `END`.
    """

    source: NDArray[np.int64]
    ranks: NDArray[np.int64]
    positions: NDArray[np.int64]
    target: NDArray[np.int64] | None
    extra: list[list[str]]


class WordVocabulary:
    """Numbers of words, behind those of pad, unknown, start, end and separator (0 to 4)."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [*SPECIAL_WORDS, *words]
        self.numbers = {word: number for number, word in enumerate(self.words)}
        if len(self.numbers) < len(self.words):
            again = next(word for word, count in Counter(self.words).items() if count > 1)
            raise UserError(f"the vocabulary holds {again!r} twice: words must differ, also from {SPECIAL_WORDS}")

    @classmethod
    def build(cls, texts: Iterable[str], max_size: int | None = None, min_count: int = 1) -> WordVocabulary:
        """The words that occur at least `min_count` times, most frequent first, ties by alphabet.

        At most `max_size` of them, not counting the special ones.
        """
        counts = Counter(word for text in texts for word in text.split())
        for special in SPECIAL_WORDS:
            counts.pop(special, None)
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([word for word in words if counts[word] >= min_count][:max_size])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Numbers of a text's words, `UNK` for those outside of the vocabulary."""
        return [self.numbers.get(word, UNK) for word in text.split()]

    def encode_nbest(
        self,
        nbest: Iterable[Sequence[str]],
        references: Sequence[str] | None = None,
        *,
        max_source: int = 100,
        max_target: int = 64,
        num_hypotheses: int | None = None,
    ) -> EncodedNBest:
        """Lists, and references if given, as numbers.

        Of each list the first `num_hypotheses` (default: all), of those the first `max_source` tokens; references are
        cut behind `max_target` words, and then without `END`.
        """
        sources, ranks, positions, extra = [], [], [], []
        for hypotheses in nbest:
            unlisted: dict[str, int] = {}
            tokens = []
            for rank, text in enumerate(hypotheses[:num_hypotheses], start=1):
                words = text.split()
                for position, word in enumerate(words):
                    number = self.numbers.get(word)
                    if number is None and len(tokens) < max_source:
                        number = unlisted.setdefault(word, len(self) + len(unlisted))
                    tokens.append((UNK if number is None else number, rank, position))
                tokens.append((SEP, rank, len(words)))
            # Without the last separator, since they stand between hypotheses.
            columns = list(zip(*tokens[:-1][:max_source], strict=True)) or [(), (), ()]
            for rows, column in zip((sources, ranks, positions), columns, strict=True):
                rows.append(column)
            extra.append(list(unlisted))
        target = None
        if references is not None:
            if len(references) != len(extra):
                raise UserError(f"there are {len(extra)} lists, but {len(references)} references")
            target = _padded([self._target(*pair)[: max_target + 1] for pair in zip(references, extra, strict=True)])
        return EncodedNBest(_padded(sources), _padded(ranks), _padded(positions), target, extra)

    def decode(self, numbers: Sequence[int], extra: Sequence[str] = ()) -> str:
        """The text up to the first `END`; pads, starts and separators are left out."""
        words = []
        for number in numbers:
            if number == END:
                break
            if number >= len(self) + len(extra):
                raise UserError(f"number {number} is neither of the {len(self)} words nor of {len(extra)} further ones")
            if number not in (PAD, START, SEP):
                words.append(self.words[number] if number < len(self) else extra[number - len(self)])
        return " ".join(words)

    def _target(self, reference: str, extra: list[str]) -> list[int]:
        copied = {word: len(self) + place for place, word in enumerate(extra)}
        words = [self.numbers.get(word, copied.get(word, UNK)) for word in reference.split()]
        return [START, *words, END]


def _padded(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    # At least one column, so that an empty list is still a row.
    array = np.full((len(rows), max([1, *map(len, rows)])), PAD, dtype=np.int64)
    for place, row in enumerate(rows):
        array[place, : len(row)] = row
    return array


# --- Entries ----------------------------------------------------------------------------------------------------------


def _dataset(entries: Sequence[_Entry], num_hypotheses: int, seed: int) -> datasets.Dataset:
    import datasets

    if num_hypotheses < 1:
        raise UserError(f"a list holds at least 1 hypothesis, so num_hypotheses cannot be {num_hypotheses}")
    scored = [entry.scores is not None for entry in entries]
    if any(scored) and not all(scored):
        have, lack = entries[scored.index(True)].where, entries[scored.index(False)].where
        raise UserError(f"{lack}: there are no scores, but {have} has some: give scores for all lists, or for none")
    generator = np.random.default_rng(seed)
    rows = [_kept(entry.nbest, num_hypotheses, generator) for entry in entries]
    text = datasets.Value("string")
    columns: dict[str, Any] = {
        "nbest": [
            [entry.nbest[place] or UNKNOWN for place in row] or [UNKNOWN] * num_hypotheses
            for entry, row in zip(entries, rows, strict=True)
        ],
        "reference": [entry.reference or UNKNOWN for entry in entries],
    }
    features = {"nbest": datasets.List(text), "reference": text}
    if all(scored):
        columns["scores"] = [
            [(entry.scores or [])[place] for place in row] for entry, row in zip(entries, rows, strict=True)
        ]
        features["scores"] = datasets.List(datasets.Value("float64"))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _kept(hypotheses: Sequence[str], num_hypotheses: int, generator: np.random.Generator) -> list[int]:
    """The places of the hypotheses that make up a list of the right length; none where all are empty."""
    if len(hypotheses) == num_hypotheses:
        return list(range(num_hypotheses))
    first: dict[str, int] = {}
    for place, text in enumerate(hypotheses):
        if text:
            first.setdefault(text, place)
    # A list of empty texts only is one text: that which stands for nothing.
    kept = (list(first.values()) or [0])[:num_hypotheses]
    repeats = generator.integers(len(kept), size=num_hypotheses - len(kept))
    return kept + [kept[place] for place in repeats]


def _entry(value: Any, where: str) -> _Entry | None:
    """A checked entry, or None where it has no reference."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object with {LISTS[0]} and {REFERENCES[0]}, not {_short(value)}")
    name, hypotheses = _field(value, LISTS)
    if name is None:
        if not isinstance(value.get("input1"), str) or not isinstance(value.get("input2", ""), str):
            raise UserError(
                f"{where}: there must be a list of hypotheses ({', '.join(LISTS)}), or the texts input1 and input2"
            )
        name, hypotheses = "input1", _from_sentences(value["input1"], value.get("input2", ""))
    texts = _texts(hypotheses, f"{where}: {name}")
    name, scores = _field(value, SCORES)
    if scores is not None:
        scores = _numbers(scores, len(texts), f"{where}: {name}")
    name, reference = _field(value, REFERENCES)
    if reference is None:
        return None
    return _Entry(where, texts, _text(reference, f"{where}: {name}"), scores)


def _field(value: dict[str, Any], names: Sequence[str]) -> tuple[str | None, Any]:
    return next(((name, value[name]) for name in names if value.get(name) is not None), (None, None))


def _from_sentences(best: str, others: str) -> list[str]:
    sentences = re.split(r"\.(?:\s+|$)", others)
    return [best.strip().removesuffix("."), *(sentence for sentence in sentences if sentence.strip())]


def _texts(value: Any, what: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{what} must be a list of at least one text, not {_short(value)}")
    return [_text(each, what) for each in value]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} must be text, not {_short(value)}")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise UserError(f"{what} holds half of a surrogate pair, which is no text: {_short(value)}")
    return value.strip()


def _numbers(value: Any, size: int, what: str) -> list[float]:
    fitting = isinstance(value, list) and len(value) == size
    if not fitting or not all(_is_number(each) for each in value):
        raise UserError(f"{what} must be {size} finite numbers, one a hypothesis, not {_short(value)}")
    return [float(each) for each in value]


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float | np.number) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )


def _short(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


# --- Files ------------------------------------------------------------------------------------------------------------


def _values(path: Path, max_bytes: int) -> Iterator[tuple[int, Any]]:
    """The entries of a file, each with the number of the line where it begins."""
    line = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            while True:
                content = _line(file, path, line + 1, max_bytes)
                if not content:
                    return
                line += 1
                if line == 1:
                    content = content.removeprefix(b"\xef\xbb\xbf")
                if content.lstrip().startswith(b"["):
                    yield from _array(path, line, content + file.read(), max_bytes)
                    return
                if content.strip():
                    break
            while content:
                text = _decoded(path, line, content)
                if text.strip():
                    yield line, _parsed(path, line, text.strip(), 0)[0]
                content, line = _line(file, path, line + 1, max_bytes), line + 1
    except FileNotFoundError:
        raise UserError(f"{path} is missing: put the file there, plain or gzipped") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read behind line {line}: {error}") from None


def _line(file: BinaryIO, path: Path, number: int, max_bytes: int) -> bytes:
    content = file.readline(max_bytes + 1)
    # An array may well stand in one line; the limit is then that of its entries.
    if len(content) > max_bytes and not (number == 1 and content.lstrip(b"\xef\xbb\xbf \t").startswith(b"[")):
        raise UserError(_too_long(path, number, max_bytes))
    return content


def _array(path: Path, first: int, content: bytes, max_bytes: int) -> Iterator[tuple[int, Any]]:
    text = _decoded(path, first, content)
    blanks = re.compile(r"\s*")

    def skip(place: int) -> int:
        return blanks.match(text, place).end()  # type: ignore[union-attr]

    place, line, counted, may_end = skip(text.index("[") + 1), first, 0, True
    while True:
        line, counted = line + text.count("\n", counted, place), place
        if place == len(text):
            raise UserError(f"{path}, line {line}: the array has no end: the file is cut off")
        if text[place] == "]" and may_end:
            if text[place + 1 :].strip():
                raise UserError(f"{path}, line {line}: there is more behind the array: {_short(text[place + 1 :])}")
            return
        value, end = _parsed(path, line, text, place)
        if end - place > max_bytes:
            raise UserError(_too_long(path, line, max_bytes))
        yield line, value
        place = skip(end)
        may_end = not text.startswith(",", place)
        if not may_end:
            place = skip(place + 1)
        elif place < len(text) and text[place] != "]":
            raise UserError(f"{path}, line {line}: there is no comma behind an entry, but {_short(text[place:])}")


def _parsed(path: Path, line: int, text: str, place: int) -> tuple[Any, int]:
    try:
        value, end = json.JSONDecoder().raw_decode(text, place)
    except json.JSONDecodeError as error:
        line += text.count("\n", place, error.pos)
        raise UserError(f"{path}, line {line} is not JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}, line {line} is not JSON of hypotheses: {error}") from None
    if place == 0 and text[end:].strip():
        raise UserError(f"{path}, line {line} is not JSON: there is more behind its end, {_short(text[end:])}")
    return value, end


def _decoded(path: Path, first: int, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first + content[: error.start].count(b"\n")
        raise UserError(f"{path}, line {line} is not UTF-8 text: {error.reason}") from None


def _too_long(path: Path, line: int, max_bytes: int) -> str:
    return f"{path}, line {line} is longer than {max_bytes:,} bytes, which no list is: mend it, or raise max_bytes"
