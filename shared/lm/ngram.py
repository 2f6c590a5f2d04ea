"""N-gram language models of words: modified Kneser–Ney, and add-k. Counting and scoring go over arrays of words.

A sentence is a string of words between blanks; it is read as `<s> w_1 … w_n </s>`, and log-probabilities, in nats, are
those of w_1 to `</s>`. Words outside of the vocabulary are `<unk>`, also when training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
MAX_ORDER = 8
# Where counts of counts are too few to estimate discounts from, as in texts of a few sentences.
DEFAULT_DISCOUNTS = (0.5, 1.0, 1.5)
# N-grams looked up at once when whole distributions are asked for.
CHUNK = 1_000_000

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Level:
    """The n-grams of one length, sorted by `keys` [G]: number of all words but the last · base + last word.

    An n-gram's number is its place among those of its length. `counts` [G] say how often it occurs, `adjusted` [G] are
    the counts that Kneser–Ney uses (see there), and `contexts` [G] the numbers of the n-grams one word shorter.
    """

    keys: Integers
    counts: Integers
    adjusted: Integers
    contexts: Integers


class _NGrams:
    """What both models share: the vocabulary, counts of all lengths up to `order`, and scoring."""

    def __init__(
        self, sentences: Sequence[str], order: int, *, vocabulary: Sequence[str] | None = None, min_count: int = 1
    ) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise UserError(f"the order of an n-gram model lies between 1 and {MAX_ORDER}, not {order}")
        if isinstance(sentences, str) or not sentences:
            raise UserError("an n-gram model is estimated from a list of at least one sentence")
        if vocabulary is None:
            counts = Counter(word for sentence in sentences for word in sentence.split())
            vocabulary = sorted(word for word, count in counts.items() if count >= min_count)
        known = dict.fromkeys(vocabulary)
        for special in (BEGIN, END, UNKNOWN):
            known.pop(special, None)
        self.order = order
        # The words that can come next; BEGIN, which cannot, has the number behind them.
        self.words = [*known, END, UNKNOWN]
        self._numbers = {word: number for number, word in enumerate(self.words)} | {BEGIN: len(self.words)}
        self._base = len(self.words) + 1
        self._levels = self._count(sentences)

    def score(self, sentences: Sequence[str]) -> Floats:
        """Log-probability of each sentence, its end included, [U]."""
        log_probs, lengths = self._scored(sentences)
        return np.add.reduceat(log_probs, np.cumsum(lengths) - lengths) if len(lengths) else log_probs

    def word_log_probs(self, sentences: Sequence[str]) -> list[Floats]:
        """Log-probabilities of the words of each sentence and of its end, [words + 1] each."""
        log_probs, lengths = self._scored(sentences)
        return np.split(log_probs, np.cumsum(lengths)[:-1])

    def perplexity(self, sentences: Sequence[str]) -> float:
        """exp(-mean log-probability) of words and sentence ends."""
        if not sentences:
            raise UserError("perplexity needs at least one sentence")
        return float(np.exp(-self._scored(sentences)[0].mean()))

    def probabilities(self, histories: Sequence[Sequence[str]]) -> Floats:
        """The next word's distribution over `words` behind each history, [H, V], which sums to one.

        A history is a list of words, of which the last `order` - 1 count; one from the beginning starts with `<s>`.
        """
        if any(isinstance(history, str) for history in histories):
            raise UserError("a history is a list of words, not a text: split it")
        size, width = len(self.words), self.order - 1
        contexts = np.full((len(histories), width), -1, dtype=np.int64)
        for row, history in enumerate(histories):
            numbers = [self._numbers.get(word, size - 1) for word in history[max(len(history) - width, 0) :]]
            contexts[row, width - len(numbers) :] = numbers
        result = np.empty((len(histories), size))
        step = max(1, CHUNK // size)
        for start in range(0, len(histories), step):
            some = contexts[start : start + step]
            words = np.tile(np.arange(size), len(some))
            log_probs = self._log_probs(np.repeat(some, size, axis=0), words)
            result[start : start + step] = np.exp(log_probs).reshape(len(some), size)
        return result

    def _log_probs(self, contexts: Integers, words: Integers) -> Floats:
        """Log-probabilities of words [M] behind contexts [M, order - 1], -1 where nothing stands before."""
        raise NotImplementedError

    def _tokens(self, sentences: Sequence[str]) -> tuple[Integers, Integers]:
        """All sentences in one row, each with its begin and end, and the number of each one's tokens."""
        known, unknown = self._numbers, len(self.words) - 1
        # A begin or end within a sentence is no such thing.
        known = {word: number for word, number in known.items() if word not in (BEGIN, END)}
        split = [sentence.split() for sentence in sentences]
        begin, end = self._numbers[BEGIN], self._numbers[END]
        rows = ([begin, *[known.get(word, unknown) for word in words], end] for words in split)
        return np.fromiter(chain.from_iterable(rows), dtype=np.int64), np.array([len(words) + 2 for words in split])

    def _windows(self, sentences: Sequence[str], width: int) -> tuple[Integers, Integers]:
        """Behind each word and sentence end, the `width` tokens before it and itself, [M, width + 1], and lengths."""
        tokens, lengths = self._tokens(sentences)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = np.arange(len(tokens))
        predicted = places[places > starts]
        sources = predicted[:, None] + np.arange(-width, 1)
        windows = np.where(sources >= starts[predicted, None], tokens[np.maximum(sources, 0)], -1)
        return windows, lengths - 1

    def _scored(self, sentences: Sequence[str]) -> tuple[Floats, Integers]:
        if isinstance(sentences, str):
            raise UserError("give a list of sentences, not one text")
        if not len(sentences):
            return np.zeros(0), np.zeros(0, dtype=np.int64)
        windows, lengths = self._windows(sentences, self.order - 1)
        # The same n-gram is looked up once, however often it occurs.
        distinct, inverse = np.unique(windows, axis=0, return_inverse=True)
        return self._log_probs(distinct[:, :-1], distinct[:, -1])[inverse.ravel()], lengths

    def _count(self, sentences: Sequence[str]) -> list[_Level]:
        """The n-grams of 1 to `order` words."""
        tokens, lengths = self._tokens(sentences)
        # How many tokens there are from each place to the end of its sentence.
        rest = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens))
        begins = tokens == self._numbers[BEGIN]
        levels: list[_Level] = []
        # The number of the n-gram that starts at each place, one word longer in every round.
        numbers = np.zeros(len(tokens), dtype=np.int64)
        for length in range(1, self.order + 1):
            places = np.flatnonzero(rest >= length)
            keys, first, inverse, counts = np.unique(
                numbers[places] * self._base + tokens[places + length - 1],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            if length == 1:
                # A begin is a context, but never comes next.
                counts[keys == self._numbers[BEGIN]] = 0
            else:
                shorter = levels[-1]
                # What follows the first word of each n-gram is an n-gram one shorter that has one more word before it.
                before = np.bincount(numbers[places[first] + 1], minlength=len(shorter.keys))
                # There is never a word before a begin: what starts there keeps its count.
                kept = np.unique(numbers[begins & (rest >= length - 1)])
                before[kept] = shorter.counts[kept]
                shorter.adjusted[:] = before
            numbers[places] = inverse
            levels.append(_Level(keys, counts, counts.copy(), keys // self._base))
        return levels

    def _find(self, level: int, numbers: Integers, words: Integers) -> Integers:
        """The numbers of n-grams of `level` words from those of their beginnings and their last words; -1 for none."""
        keys = self._levels[level - 1].keys
        wanted = numbers * self._base + words
        places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where((numbers >= 0) & (words >= 0) & (keys[places] == wanted), places, -1)

    def _find_context(self, context: Integers) -> Integers:
        """The numbers of n-grams [M, n]; -1 for those that do not occur."""
        numbers = np.zeros(len(context), dtype=np.int64)
        for place in range(context.shape[1]):
            numbers = self._find(place + 1, numbers, context[:, place])
        return numbers


class KneserNey(_NGrams):
    """Interpolated modified Kneser–Ney smoothing (Chen & Goodman 1999, section 3).

        P(w | h) = max(c(h w) − D(c(h w)), 0) / Σ_v c(h v) + γ(h) P(w | h'),    h' = h without its first word,

    down to the uniform distribution over `words`; γ(h) makes the sum one. D is D_1, D_2 or D_3+ of this length, by
    counts of counts: D_r = r − (r + 1) Y t_{r+1} / t_r with Y = t_1 / (t_1 + 2 t_2); see `discounts`. c is the count
    for the longest n-grams, and for shorter ones the number of different words before them, unless they start with
    `<s>`, before which there are none (Heafield et al. 2013). A history that does not occur is shortened.

    `vocabulary` is by default that of all words of the sentences that occur `min_count` times. `discounts` [order, 3]
    are those of each length; lengths with too few n-grams to estimate them (a t_r of 0, or a D_r outside of 0 to r)
    take `DEFAULT_DISCOUNTS`.
    """

    def __init__(
        self, sentences: Sequence[str], order: int = 3, *, vocabulary: Sequence[str] | None = None, min_count: int = 1
    ) -> None:
        super().__init__(sentences, order, vocabulary=vocabulary, min_count=min_count)
        self.discounts = np.array([_discounts(level.adjusted) for level in self._levels])
        # Of each level: the discounted share of each n-gram, and the weight that each context leaves to shorter ones.
        self._shares: list[tuple[Floats, Floats]] = []
        num_contexts = 1
        for level, discounts in zip(self._levels, self.discounts, strict=True):
            total = np.bincount(level.contexts, level.adjusted, num_contexts)
            taken = np.array([0.0, *discounts])[np.minimum(level.adjusted, 3)]
            left = np.bincount(level.contexts, taken, num_contexts)
            share = (level.adjusted - taken) / np.maximum(total[level.contexts], 1)
            self._shares.append((share, np.where(total > 0, left / np.maximum(total, 1), 1.0)))
            num_contexts = len(level.keys)

    def _log_probs(self, contexts: Integers, words: Integers) -> Floats:
        probability = np.full(len(words), 1 / len(self.words))
        for length, (share, left) in enumerate(self._shares, start=1):
            numbers = self._find_context(contexts[:, self.order - length :])
            found = self._find(length, numbers, words)
            seen = np.where(found >= 0, share[found], 0.0) + left[numbers] * probability
            probability = np.where(numbers >= 0, seen, probability)
        return np.log(probability)


class AddK(_NGrams):
    """P(w | h) = (c(h w) + k) / (Σ_v c(h v) + k V), with V words that can come next (Lidstone; Laplace for k = 1).

    h are the `order` - 1 words before w, or those that there are since the sentence's begin, `<s>` included.
    """

    def __init__(
        self,
        sentences: Sequence[str],
        order: int = 2,
        *,
        k: float = 1.0,
        vocabulary: Sequence[str] | None = None,
        min_count: int = 1,
    ) -> None:
        if not k > 0:
            raise UserError(f"k must be above 0, not {k}: else words that did not occur have no probability")
        super().__init__(sentences, order, vocabulary=vocabulary, min_count=min_count)
        self.k = k
        sizes = [1, *(len(level.keys) for level in self._levels)]
        self._totals = [
            np.bincount(level.contexts, level.counts, size)
            for level, size in zip(self._levels, sizes[:-1], strict=True)
        ]

    def _log_probs(self, contexts: Integers, words: Integers) -> Floats:
        log_probs = np.zeros(len(words))
        for length, (level, total) in enumerate(zip(self._levels, self._totals, strict=True), start=1):
            context = contexts[:, self.order - length :]
            numbers = self._find_context(context)
            found = self._find(length, numbers, words)
            count = np.where(found >= 0, level.counts[found], 0) + self.k
            summed = np.where(numbers >= 0, total[numbers], 0) + self.k * len(self.words)
            log_probs = np.where((context >= 0).all(axis=1), np.log(count / summed), log_probs)
        return log_probs


def _discounts(counts: Integers) -> tuple[float, float, float]:
    """D_1, D_2, D_3+ by how many n-grams have a count of 1, 2, 3 and 4."""
    one, two, three, four = (int((counts == value).sum()) for value in (1, 2, 3, 4))
    if not min(one, two, three, four):
        return DEFAULT_DISCOUNTS
    y = one / (one + 2 * two)
    discounts = (1 - 2 * y * two / one, 2 - 3 * y * three / two, 3 - 4 * y * four / three)
    if not all(0 <= discount <= value for value, discount in enumerate(discounts, start=1)):
        return DEFAULT_DISCOUNTS
    return discounts
