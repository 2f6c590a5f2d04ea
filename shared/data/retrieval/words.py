"""Texts as words: tokens, vocabularies, padded arrays of word numbers, and embeddings from co-occurrence.

A token is a run of two or more letters, digits or underscores, lowercased. Stop words are the 33 of Lucene's English
analyzer; stems are those of the Snowball (Porter2) stemmer.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]

WORD = re.compile(r"\b\w\w+\b")


class Tokens(NamedTuple):
    """The tokens of many texts one after the other: `ids` int32 [T], text i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: Int32Array
    offsets: Int64Array

    @property
    def rows(self) -> Int64Array:
        """The text of each token, int64 [T]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


@dataclass(frozen=True)
class Vocabulary:
    """Words by number. Number 0 is the pad, `words[0]` is empty; the other words stand in alphabetical order.

    `stem` and `remove_stopwords` say how texts become words before they are looked up.
    """

    words: tuple[str, ...]
    stem: bool = True
    remove_stopwords: bool = True

    def __post_init__(self) -> None:
        if not self.words or self.words[0] != "" or len(set(self.words)) != len(self.words):
            raise UserError("a vocabulary's words must start with '', the pad, and be distinct: use build_vocabulary")

    def __len__(self) -> int:
        """Number of words, the pad included: the rows of an embedding matrix."""
        return len(self.words)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each word."""
        return {word: number for number, word in enumerate(self.words)}


def build_vocabulary(
    texts: Iterable[str],
    *,
    min_count: int = 1,
    max_size: int | None = None,
    stem: bool = True,
    remove_stopwords: bool = True,
) -> Vocabulary:
    """The words that occur at least `min_count` times in the texts, at most the `max_size` most frequent of them.

    Of equally frequent words, those first in the alphabet are kept. `max_size` counts neither pad nor stop words.
    """
    words, tokens = tokenize(texts, stem=stem, remove_stopwords=remove_stopwords)
    counts = np.bincount(tokens.ids, minlength=len(words))
    kept = np.flatnonzero(counts >= min_count)
    if max_size is not None:
        kept = np.sort(kept[np.argsort(-counts[kept], kind="stable")[:max_size]])
    return Vocabulary(("", *(words[number] for number in kept)), stem, remove_stopwords)


def encode(texts: Iterable[str], vocabulary: Vocabulary, length: int) -> Int32Array:
    """Texts as the numbers of their first `length` known words, int32 [N, length], filled up with 0.

    Words that the vocabulary lacks are left out, and the words behind them move up.
    """
    if length < 1:
        raise UserError(f"length, the number of words a text, must be at least 1, not {length}")
    tokens = look_up(texts, vocabulary)
    rows = tokens.rows
    places = np.arange(len(rows)) - tokens.offsets[rows]
    kept = places < length
    encoded = np.zeros((len(tokens.offsets) - 1, length), np.int32)
    encoded[rows[kept], places[kept]] = tokens.ids[kept]
    return encoded


def tokenize(texts: Iterable[str], *, stem: bool = True, remove_stopwords: bool = True) -> tuple[list[str], Tokens]:
    """Distinct words in alphabetical order, and the texts as numbers into them (from 0, without a pad)."""
    spellings, tokens = _spellings(texts)
    words, numbers = np.unique(np.array(_stems(spellings, stem), dtype=object), return_inverse=True)
    if remove_stopwords:
        numbers = np.where(_stopwords(spellings), -1, numbers)
        used, numbers[numbers >= 0] = np.unique(numbers[numbers >= 0], return_inverse=True)
        words = words[used]
    return words.tolist(), _renumbered(tokens, numbers)


def look_up(texts: Iterable[str], vocabulary: Vocabulary) -> Tokens:
    """The texts as numbers of the vocabulary's words; words that it lacks are left out."""
    spellings, tokens = _spellings(texts)
    stems = _stems(spellings, vocabulary.stem)
    numbers = np.fromiter((vocabulary.numbers.get(word, -1) for word in stems), np.int64, len(stems))
    if vocabulary.remove_stopwords:
        numbers[_stopwords(spellings)] = -1
    return _renumbered(tokens, numbers)


def _spellings(texts: Iterable[str]) -> tuple[list[str], Tokens]:
    """Distinct words as they are spelled (lowercased), and the texts as numbers into them."""
    if isinstance(texts, str):
        raise UserError("texts must be a list of texts, not one text: write [text]")
    numbers: defaultdict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__
    ids, offsets = array("i"), array("q", [0])
    for text in texts:
        ids.extend(map(numbers.__getitem__, WORD.findall(text.lower())))
        offsets.append(len(ids))
    return list(numbers), Tokens(np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int64))


def _stems(words: list[str], stem: bool) -> list[str]:
    if not stem:
        return words
    import Stemmer

    return Stemmer.Stemmer("english").stemWords(words)


def _stopwords(words: list[str]) -> NDArray[np.bool_]:
    from bm25s.stopwords import STOPWORDS_EN

    stopwords = set(STOPWORDS_EN)
    return np.fromiter((word in stopwords for word in words), bool, len(words))


def _renumbered(tokens: Tokens, numbers: Int64Array) -> Tokens:
    """Tokens with `numbers[id]` for id; those whose number is negative are left out."""
    ids = numbers.astype(np.int32)[tokens.ids]
    kept = ids >= 0
    before = np.concatenate([[0], np.cumsum(kept)])
    return Tokens(ids[kept], before[tokens.offsets])


def ppmi_embeddings(
    texts: Sequence[str] | Int32Array,
    vocabulary: Vocabulary,
    *,
    window: int = 5,
    dimensions: int = 100,
    smoothing: float = 0.75,
    seed: int = 0,
) -> Float32Array:
    """Word embeddings [len(vocabulary), dimensions] from a truncated SVD of positive pointwise mutual information.

    `texts` are texts, or word numbers [N, L] as `encode` gives them. Two words co-occur when at most `window` − 1
    words stand between them. PPMI(w, c) = max(0, log P(w, c) / (P(w) P_α(c))), P_α(c) ∝ count(c)^α with the
    `smoothing` α; with PPMI ≈ U Σ Vᵀ the embeddings are U Σ^½ (Levy, Goldberg & Dagan 2015, sections 3.1 to 3.3).
    The pad and words without company have the zero vector. `UserError` where there are fewer words than dimensions.
    """
    from sklearn.utils.extmath import randomized_svd

    if window < 1:
        raise UserError(f"window must be at least 1, not {window}")
    size = len(vocabulary)
    if not 1 <= dimensions < size:
        raise UserError(f"dimensions must lie between 1 and {size - 1}, the number of words, not {dimensions}")
    tokens = _as_tokens(texts, vocabulary)
    counts = _cooccurrences(tokens, size, window)
    totals = np.asarray(counts.sum(axis=1)).ravel()
    context = totals**smoothing
    context /= max(context.sum(), 1)
    pairs = counts.tocoo()
    with np.errstate(divide="ignore"):
        information = np.log(pairs.data) - np.log(totals)[pairs.row] - np.log(context)[pairs.col]
    counts.data = np.maximum(information, 0)
    counts.eliminate_zeros()
    left, strengths, _ = randomized_svd(counts, dimensions, n_iter=5, random_state=seed)
    # Exactly zero, where the decomposition leaves a rounding error.
    left[totals == 0] = 0
    return (left * np.sqrt(strengths)).astype(np.float32)


def _as_tokens(texts: Sequence[str] | Int32Array, vocabulary: Vocabulary) -> Tokens:
    if not isinstance(texts, np.ndarray):
        return look_up(texts, vocabulary)
    if texts.ndim != 2 or texts.dtype.kind not in "iu" or texts.min(initial=0) < 0:
        raise UserError(f"word numbers must be integers [N, L], 0 for the pad, not {texts.dtype} {texts.shape}")
    if texts.max(initial=0) >= len(vocabulary):
        raise UserError(f"word number {texts.max()} is not in the vocabulary of {len(vocabulary)} words")
    present = texts != 0
    return Tokens(texts[present].astype(np.int32), np.concatenate([[0], np.cumsum(present.sum(axis=1))]))


def _cooccurrences(tokens: Tokens, size: int, window: int) -> csr_array:
    """How often each two words stand within a window, symmetric csr [size, size]."""
    from scipy.sparse import coo_array, csr_array

    rows = tokens.rows
    counts = csr_array((size, size), dtype=np.float64)
    for distance in range(1, min(window, len(rows) - 1) + 1):
        together = rows[distance:] == rows[:-distance]
        first, second = tokens.ids[:-distance][together], tokens.ids[distance:][together]
        counts += coo_array((np.ones(len(first)), (first, second)), shape=(size, size)).tocsr()
    return (counts + counts.T).tocsr()
