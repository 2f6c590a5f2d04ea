"""Errors of transcripts: edits and their rates, oracles over N-best lists, and the normalization of texts before.

A text is a string of words between blanks; U utterances, lists of N hypotheses. An utterance with an empty reference
is kept in corpus rates, where the words of its hypothesis are insertions, and left out of macro rates, where it has
none.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError, load_optional
from shared.evaluation.statistics import Interval, bootstrap_interval

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Unit = Literal["word", "character"]

# What stands for an empty text in the released N-best lists.
UNKNOWN = "<UNK>"
EXTRA = "hyporadise"
# Longer numbers are read digit by digit: Python refuses to read those of thousands of digits, and nobody says them.
MAX_DIGITS = 15


@dataclass(frozen=True)
class Errors:
    """Edits that turn references into hypotheses, int64 [U] each, in words or characters.

    WER = (S + D + I) / reference words: over the whole corpus (`rate`), or averaged over utterances (`macro_rate`).
    """

    substitutions: Integers
    deletions: Integers
    insertions: Integers
    reference_lengths: Integers

    @property
    def edits(self) -> Integers:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Sum of edits over sum of reference lengths; `UserError` where all references are empty."""
        self._check_any_reference()
        return float(self.edits.sum() / self.reference_lengths.sum())

    @property
    def macro_rate(self) -> float:
        """Mean of the utterances' rates, without utterances whose reference is empty."""
        self._check_any_reference()
        counted = self.reference_lengths > 0
        return float((self.edits[counted] / self.reference_lengths[counted]).mean())

    @property
    def num_empty(self) -> int:
        """Utterances with an empty reference, which `macro_rate` leaves out."""
        return int((self.reference_lengths == 0).sum())

    def values(self) -> Floats:
        """The corpus rate R as a mean of one value an utterance, R + (edits − R · length) / mean length, [U].

        Their spread is that of the ratio to first order (delta method), so that intervals of means serve: differences
        of two systems on the same utterances, or rows of several seeds, go to `statistics.paired_bootstrap`.
        """
        rate = self.rate
        return rate + (self.edits - rate * self.reference_lengths) / self.reference_lengths.mean()

    def interval(self, num_resamples: int = 10_000, seed: int = 0) -> Interval:
        """Bootstrap interval of the corpus rate over utterances (Bisani & Ney 2004)."""
        return bootstrap_interval(self.values(), num_resamples=num_resamples, seed=seed)

    def _check_any_reference(self) -> None:
        if not self.reference_lengths.any():
            raise UserError("all references are empty: an error rate needs at least one reference word")


@dataclass(frozen=True)
class Changes:
    """What a correction did to the first hypotheses of its lists, in reference words, int64 [U] each.

    `out_of_list`: words that no hypothesis contains; `recovered`: those of them which the output has right. `repaired`:
    wrong in the first hypothesis, right in the output; `broken`: right in the first hypothesis, wrong in the output.
    """

    out_of_list: Integers
    recovered: Integers
    repaired: Integers
    broken: Integers


def count_errors(references: Sequence[str], hypotheses: Sequence[str], unit: Unit = "word") -> Errors:
    """Substitutions, deletions and insertions of each utterance, along jiwer's alignments; blanks are characters."""
    edits = np.zeros((4, len(references)), dtype=np.int64)
    for place, chunks in enumerate(_alignments(references, hypotheses, unit)):
        for chunk in chunks:
            in_reference = chunk.ref_end_idx - chunk.ref_start_idx
            edits[3, place] += in_reference
            if chunk.type == "insert":
                edits[2, place] += chunk.hyp_end_idx - chunk.hyp_start_idx
            elif chunk.type != "equal":
                edits[0 if chunk.type == "substitute" else 1, place] += in_reference
    return Errors(*edits)


def edit_distances(references: Sequence[str], nbest: Sequence[Sequence[str]], unit: Unit = "word") -> Integers:
    """Levenshtein distances of all hypotheses to their references, [U, N]; lists must be of equal length."""
    process, levenshtein = (
        load_optional("rapidfuzz.process", EXTRA),
        load_optional("rapidfuzz.distance.Levenshtein", EXTRA),
    )
    _check_lists(references, nbest)
    if len({len(hypotheses) for hypotheses in nbest}) > 1:
        raise UserError("lists must all hold as many hypotheses: pad the short ones (shared.data.nbest)")
    hypotheses = list(chain.from_iterable(nbest))
    if unit == "character":
        first, second = references, hypotheses
    else:
        # A word as one character: strings are what rapidfuzz compares without converting them.
        numbers: dict[str, str] = {}

        def encode(text: str) -> str:
            return "".join([numbers.setdefault(word, chr(len(numbers))) for word in text.split()])

        first, second = [encode(text) for text in references], [encode(text) for text in hypotheses]
    num_hypotheses = len(nbest[0])
    repeated = [text for text in first for _ in range(num_hypotheses)]
    distances = process.cpdist(repeated, second, scorer=levenshtein.distance, dtype=np.int64)
    return distances.reshape(len(references), num_hypotheses)


def nearest(references: Sequence[str], nbest: Sequence[Sequence[str]]) -> Integers:
    """The place of each list's hypothesis with the fewest word edits, [U]; the earlier one of equal ones."""
    return edit_distances(references, nbest).argmin(axis=1)


def nbest_oracle(references: Sequence[str], nbest: Sequence[Sequence[str]]) -> Errors:
    """Errors of the best hypothesis of each list, which no re-ranking can undercut (HyPoradise's o_nb)."""
    chosen = [hypotheses[place] for hypotheses, place in zip(nbest, nearest(references, nbest), strict=True)]
    return count_errors(references, chosen)


def compositional_oracle(references: Sequence[str], nbest: Sequence[Sequence[str]]) -> Errors:
    """Errors left when the words of all hypotheses of a list may be recombined (HyPoradise's o_cp).

    Each reference word that occurs in no hypothesis, wherever in it, counts as one deletion; there is no other error.
    """
    _check_lists(references, nbest)
    missing = _missing(references, nbest)
    utterances, lengths = _utterances(references)
    deletions = np.bincount(utterances[missing], minlength=len(references))
    none = np.zeros_like(lengths)
    return Errors(none, deletions, none, lengths)


def count_changes(references: Sequence[str], nbest: Sequence[Sequence[str]], outputs: Sequence[str]) -> Changes:
    """Reference words that `outputs` have right or wrong against the first hypotheses and against the whole lists.

    A word is right where the alignment with the fewest edits pairs it with itself.
    """
    _check_lists(references, nbest)
    utterances, _ = _utterances(references)
    missing = _missing(references, nbest)
    before = _right(references, [hypotheses[0] for hypotheses in nbest])
    after = _right(references, outputs)
    counted = (missing, missing & after, ~before & after, before & ~after)
    return Changes(*(np.bincount(utterances[words], minlength=len(references)) for words in counted))


def whisper_normalizer(spellings: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """The normalization of the released N-best lists: Whisper's for English, numbers in words, `<UNK>` for nothing.

    Whisper's own part is transformers'. It writes numbers in digits, which are then spelled out, and what it does not
    know about `%` becomes "percent". `spellings` maps British spellings to American ones: that table comes with
    Whisper's checkpoints (`normalizer.json`) and not with transformers, so without it spellings stay as they are.
    """
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    english = EnglishTextNormalizer(dict(spellings or {}))

    def normalize(text: str) -> str:
        spelled = spell_out_digits(english(text).replace("%", " percent "))
        return " ".join(spelled.split()) or UNKNOWN

    return normalize


def strip_punctuation(text: str, end_token: str = "</s>") -> str:
    """What the published evaluation makes of an output: its first line in lower case, without punctuation and digits.

    The end token goes first. What is neither letter, digit nor blank counts as punctuation. The result may be empty.
    """
    line = text.replace(end_token, "").strip().split("\n", 1)[0]
    return " ".join(re.sub(r"[^\w\s]|[\d_]", "", line.lower()).split())


def spell_out_digits(text: str) -> str:
    """Each number in digits spelled out; what follows it stays, as in the released lists ("25th": "twenty-fiveth").

    Commas between groups are left out: punctuation, which the normalization has removed before.
    """
    return re.sub(r"(\d+)(?:\.(\d+))?", _spelled, text, flags=re.ASCII)


def _spelled(found: re.Match[str]) -> str:
    in_words, (whole, decimals) = _engine().number_to_words, found.groups()
    words = in_words(int(whole)) if len(whole) <= MAX_DIGITS else _digit_by_digit(whole)
    words = words.replace(",", "")
    return f"{words} point {_digit_by_digit(decimals)}" if decimals else words


def _digit_by_digit(digits: str) -> str:
    in_words = _engine().number_to_words
    return " ".join(in_words(digit) for digit in digits)


@functools.cache
def _engine() -> Any:
    return load_optional("inflect", EXTRA).engine()


def _alignments(references: Sequence[str], hypotheses: Sequence[str], unit: Unit) -> list[list[Any]]:
    """jiwer's chunks of each utterance, a run of equal edits each."""
    jiwer = load_optional("jiwer", EXTRA)
    _check_texts("references", references)
    _check_texts("hypotheses", hypotheses)
    if len(references) != len(hypotheses):
        raise UserError(f"there are {len(references)} references, but {len(hypotheses)} hypotheses: give one for each")
    if unit not in ("word", "character"):
        raise UserError(f"unit must be word or character, not {unit!r}")
    if not references:
        return []

    def cut(texts: list[str]) -> list[list[str]]:
        return [text.split() if unit == "word" else list(text) for text in texts]

    return jiwer.process_words(list(references), list(hypotheses), cut, cut).alignments


def _utterances(references: Sequence[str]) -> tuple[Integers, Integers]:
    """The utterance of each of all W reference words, [W], and the number of words of each utterance, [U]."""
    lengths = np.array([len(reference.split()) for reference in references], dtype=np.int64)
    return np.repeat(np.arange(len(references)), lengths), lengths


def _missing(references: Sequence[str], nbest: Sequence[Sequence[str]]) -> NDArray[np.bool_]:
    """Whether each of all W reference words occurs in no hypothesis of its list, [W]."""
    missing: list[bool] = []
    for reference, hypotheses in zip(references, nbest, strict=True):
        listed = set(" ".join(hypotheses).split())
        missing += [word not in listed for word in reference.split()]
    return np.array(missing, dtype=bool)


def _right(references: Sequence[str], hypotheses: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each of all W reference words is paired with itself, [W]."""
    right: list[bool] = []
    for chunks in _alignments(references, hypotheses, "word"):
        for chunk in chunks:
            right += [chunk.type == "equal"] * (chunk.ref_end_idx - chunk.ref_start_idx)
    return np.array(right, dtype=bool)


def _check_texts(what: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{what} must be a list of texts, one an utterance")


def _check_lists(references: Sequence[str], nbest: Sequence[Sequence[str]]) -> None:
    _check_texts("references", references)
    if not references or len(references) != len(nbest):
        raise UserError(f"there are {len(references)} references and {len(nbest)} lists: give one list for each, not 0")
    for place, hypotheses in enumerate(nbest):
        if isinstance(hypotheses, str) or not hypotheses or not all(isinstance(text, str) for text in hypotheses):
            raise UserError(f"list {place} must hold at least one hypothesis, all of them texts")
