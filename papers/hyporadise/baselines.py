"""What generation is compared with: the first hypothesis, word voting, and re-ranking by language models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shared.data.nbest import distinct
from shared.evaluation.rover import rover_all
from shared.evaluation.transcription import edit_distances
from shared.lm.ngram import KneserNey

from .data import Lists

FloatArray = NDArray[np.float64]
LogProbs = Callable[[Sequence[str]], FloatArray]


def first(lists: Lists) -> list[str]:
    """The hypothesis that the recognizer likes best."""
    return [nbest[0] for nbest in lists.nbest]


def voted(lists: Lists) -> list[str]:
    """Word voting over the aligned hypotheses (ROVER), each distinct one once, since repeats are padding."""
    return rover_all(lists.nbest)


def trigram(train: Sequence[str], order: int) -> LogProbs:
    """Log-probabilities under a modified Kneser–Ney model of the training transcripts."""
    return KneserNey(train, order=order).score


def rerank_scores(lists: Lists, log_probs: LogProbs) -> tuple[FloatArray, FloatArray]:
    """Of every hypothesis the recognizer's score and log P(words) a word, [U, N] each.

    Lists without scores have −log of the rank in their place, of which all that counts is the order and that it falls
    ever more slowly.
    """
    texts = distinct(text for nbest in lists.nbest for text in nbest)
    number = {text: place for place, text in enumerate(texts)}
    values = log_probs(texts) / np.array([1 + len(text.split()) for text in texts])
    language = np.array([[values[number[text]] for text in nbest] for nbest in lists.nbest])
    acoustic = np.array(lists.scores, dtype=float)
    unscored = (acoustic == 0).all(axis=1)
    acoustic[unscored] = -np.log(np.arange(1, acoustic.shape[1] + 1))
    return acoustic, language


def choose_weight(lists: Lists, scores: tuple[FloatArray, FloatArray], weights: Sequence[float]) -> float:
    """The λ whose choices make the fewest word errors in all; of equals the first."""
    errors = edit_distances(lists.references, lists.nbest)
    rows = np.arange(len(lists))
    totals = [int(errors[rows, best_of(scores, weight)].sum()) for weight in weights]
    return float(weights[int(np.argmin(totals))])


def best_of(scores: tuple[FloatArray, FloatArray], weight: float) -> NDArray[np.int64]:
    """Places of the hypotheses with the highest score + λ · log P(words)/words, the earlier of equals, [U]."""
    acoustic, language = scores
    return np.argmax(acoustic + weight * language, axis=1)


def rerank(
    validation: Lists, test: Lists, log_probs: LogProbs, weights: Sequence[float]
) -> tuple[list[str], dict[str, float]]:
    """Chosen hypotheses of test lists, λ being tuned on validation lists of the same domain; and λ by domain."""
    out = [""] * len(test)
    tuned = {}
    scores = {split: rerank_scores(lists, log_probs) for split, lists in (("validation", validation), ("test", test))}
    for domain in dict.fromkeys(test.domains):
        rows = validation.rows_of(domain)
        part = Lists(
            *(
                [each[row] for row in rows]
                for each in (validation.nbest, validation.references, validation.scores, validation.domains)
            )
        )
        chosen = tuple(each[rows] for each in scores["validation"])
        tuned[domain] = choose_weight(part, chosen, weights)
        rows = test.rows_of(domain)
        for row, best in zip(rows, best_of(tuple(each[rows] for each in scores["test"]), tuned[domain]), strict=True):
            out[row] = test.nbest[row][best]
    return out, tuned
