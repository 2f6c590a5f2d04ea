"""A recognizer that does not know the domain: noisy phones of what was said, and a beam search for words that fit.

Each word said is heard as a noisy phone string. The search puts one word of the lexicon there, none, or one and a
short word behind it, and scores a sentence by

    -acoustic_weight · phone distance + language_weight · log P(words) + word_bonus · words,

P an add-k bigram of general text. Where domain words go wrong, they do so for want of domain knowledge, not by design:
no table says what is confused with what. All scores are whole numbers, so that any processor finds the same lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError
from shared.lm.ngram import AddK

from .config import RecognizerSettings
from .phonetics import PHONES, edit_distances, gap_costs, pad, pronounce, pronounce_by_espeak, substitution_costs

IntArray = NDArray[np.int64]
# Natural logarithms and phone distances are counted in thousandths.
UNIT = 1000
CHUNK = 256  # utterances searched at once
NONE = -1


@dataclass(frozen=True)
class Lists:
    """What the recognizer gave: up to N distinct strings an utterance, best first, and their scores a word."""

    nbest: list[list[str]]
    scores: list[list[float]]


class Recognizer:
    """Lexicon, pronunciations and bigram of a simulated recognizer."""

    def __init__(self, general: Sequence[str], domain_words: Sequence[str], settings: RecognizerSettings) -> None:
        """From sentences of general text, whose most frequent words are the lexicon together with the domain's."""
        self.settings = settings
        frequent = frequent_words(general, settings.lexicon_size)
        self.words = sorted({*frequent, *domain_words})
        self.number = {word: place for place, word in enumerate(self.words)}
        by_espeak = settings.pronunciations == "espeak"
        self.pronunciations = pronounce_by_espeak(self.words) if by_espeak else list(map(pronounce, self.words))
        self.phones = pad(self.pronunciations)  # [words, longest]
        self.log_bigram = self._log_bigram(general)
        short = [word for word in frequent if len(self.pronunciations[self.number[word]]) <= 2]
        self.inserted = np.array([self.number[word] for word in short[: settings.inserted_words]], np.int64)
        self._neighbors: dict[int, IntArray] = {}

    def _log_bigram(self, general: Sequence[str]) -> NDArray[np.int32]:
        """log P(word | previous) in thousandths, [words + 1, words + 1]: last row the begin, last column the end."""
        model = AddK(general, order=2, k=self.settings.add_k, vocabulary=self.words)
        column = {word: place for place, word in enumerate(model.words)}
        order = [column[word] for word in [*self.words, "</s>"]]
        table = np.empty((len(self.words) + 1, len(order)), np.int32)
        for start in range(0, len(table), 512):
            histories = [[word] for word in [*self.words, "<s>"][start : start + 512]]
            table[start : start + 512] = np.rint(UNIT * np.log(model.probabilities(histories)[:, order]))
        return table

    def neighbors(self, word: int) -> IntArray:
        """The words that sound most like a word, itself among them, [candidates]."""
        if word not in self._neighbors:
            distances = edit_distances(self.phones[word : word + 1], self.phones[None])[0]
            distances[word] = -1
            self._neighbors[word] = np.argsort(distances, kind="stable")[: self.settings.candidates]
        return self._neighbors[word]

    def recognize(self, sentences: Sequence[str], seed: int, *, num_hypotheses: int = 5) -> Lists:
        """Lists of all sentences; words that neither text nor domain have are a `UserError`."""
        lacking = {word for sentence in sentences for word in sentence.split() if word not in self.number}
        if lacking:
            raise UserError(f"the lexicon lacks {', '.join(sorted(lacking)[:10])}: give them as domain words")
        spoken = [[self.number[word] for word in sentence.split()] for sentence in sentences]
        heard = self._hear(spoken, np.random.default_rng([seed, 1]))
        candidates, costs, lost = self._candidates(spoken, heard)
        nbest: list[list[str]] = []
        scores: list[list[float]] = []
        # Sentences of like length together, so that few wait for others.
        order = np.argsort([len(words) for words in spoken], kind="stable")
        found: dict[int, tuple[list[str], list[float]]] = {}
        for start in range(0, len(order), CHUNK):
            rows = order[start : start + CHUNK]
            found |= dict(zip(rows.tolist(), self._search(candidates, costs, lost, rows, num_hypotheses), strict=True))
        for row in range(len(spoken)):
            texts, values = found[row]
            nbest.append(texts)
            scores.append(values)
        return Lists(nbest, scores)

    def _hear(self, spoken: list[list[int]], generator: np.random.Generator) -> list[list[tuple[int, ...]]]:
        """Noisy phone strings of all words: phones are replaced by like ones, lost or added, at an utterance's rate."""
        settings = self.settings
        closeness = -substitution_costs() / (UNIT * settings.noise_temperature)
        np.fill_diagonal(closeness, -np.inf)
        replaced = np.exp(closeness)
        replaced = np.cumsum(replaced / replaced.sum(axis=1, keepdims=True), axis=1)
        rates = generator.beta(*settings.noise_rate, size=len(spoken))
        lost, added = settings.lost_share, settings.lost_share + settings.added_share
        heard = []
        for words, rate in zip(spoken, rates, strict=True):
            phones = [phone for word in words for phone in self.pronunciations[word]]
            hit, kind, which = generator.random((3, len(phones)))
            sounds: list[tuple[int, ...]] = [(phone,) for phone in phones]
            for place in np.flatnonzero(hit < rate):
                other = min(int(np.searchsorted(replaced[phones[place]], which[place])), len(PHONES) - 1)
                if kind[place] < lost:
                    sounds[place] = ()
                else:
                    sounds[place] = (phones[place], other) if kind[place] < added else (other,)
            ends = np.cumsum([len(self.pronunciations[word]) for word in words]).tolist()
            begins = [0, *ends[:-1]]
            heard.append([sum(sounds[begin:end], ()) for begin, end in zip(begins, ends, strict=True)])
        return heard

    def _candidates(
        self, spoken: list[list[int]], heard: list[list[tuple[int, ...]]]
    ) -> tuple[list[IntArray], list[IntArray], list[IntArray]]:
        """Of each utterance the candidate words of its places [T, K], their distances, and that of silence [T]."""
        pairs = [pair for words, sounds in zip(spoken, heard, strict=True) for pair in zip(words, sounds, strict=True)]
        number = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}  # most are heard as they are
        words = np.array([self.neighbors(word) for word, _ in number])  # [P, K]
        strings = pad([sound for _, sound in number])
        distances = np.concatenate(
            [
                edit_distances(strings[start : start + 2048], self.phones[words[start : start + 2048]])
                for start in range(0, len(words), 2048)
            ]
        )
        gap = gap_costs()
        silence = np.array([int(gap[list(sound)].sum()) for _, sound in number])
        at = np.array([number[pair] for pair in pairs])
        cuts = np.cumsum([len(each) for each in spoken])[:-1]
        return tuple(np.split(table[at], cuts) for table in (words, distances, silence))

    def _search(
        self, candidates: list[IntArray], costs: list[IntArray], lost: list[IntArray], rows: IntArray, count: int
    ) -> list[tuple[list[str], list[float]]]:
        """Beam search over the places of some utterances at once."""
        settings = self.settings
        acoustic, language = round(settings.acoustic_weight * 100), round(settings.language_weight * 100)
        bonus = round(settings.word_bonus * 100) * UNIT
        lengths = np.array([len(candidates[row]) for row in rows])
        size, width, longest = len(rows), settings.beam_size, int(lengths.max())
        history = np.full((size, width, 2 * longest), NONE, np.int64)
        taken = np.zeros((size, width), np.int64)
        last = np.full((size, width), len(self.words), np.int64)
        worst = np.int64(-(2**50))
        score = np.full((size, width), worst)
        score[:, 0] = 0
        gap = gap_costs()
        said_falsely = np.array([int(gap[list(self.pronunciations[word])].sum()) for word in self.inserted], np.int64)
        bigram = self.log_bigram

        def keep(total: IntArray, words: IntArray, active: NDArray[np.bool_]) -> None:
            """Go on with the best of total [B, W, options], where option's word [B, options] is -1 for none."""
            nonlocal history, taken, last, score
            options = words.shape[1]
            best = np.argsort(-total.reshape(len(total), -1), axis=1, kind="stable")[:, :width]
            parent, option = best // options, best % options
            parent = np.where(active[:, None], parent, np.arange(width))
            index = np.arange(len(total))[:, None]
            word = np.where(active[:, None], np.take_along_axis(words, option, axis=1), NONE)
            kept = np.take_along_axis(total.reshape(len(total), -1), best, axis=1)
            score = np.where(active[:, None], kept, score)
            history, taken, last = history[index, parent], taken[index, parent], last[index, parent]
            added = word >= 0
            b, w = np.nonzero(added)
            history[b, w, taken[b, w]] = word[b, w]
            taken += added
            last = np.where(added, word, last)

        for place in range(longest):
            active = lengths > place
            at = np.minimum(place, lengths - 1)
            words = np.stack([candidates[row][t] for row, t in zip(rows, at, strict=True)])  # [B, K]
            distance = np.stack([costs[row][t] for row, t in zip(rows, at, strict=True)])
            silence = np.array([lost[row][t] for row, t in zip(rows, at, strict=True)])
            total = score[:, :, None] + bonus - acoustic * distance[:, None]
            total += language * bigram[last[:, :, None], words[:, None]]
            nothing = score - (acoustic * silence)[:, None]
            everything = np.concatenate([total, nothing[:, :, None]], axis=2)
            keep(everything, np.concatenate([words, np.full((size, 1), NONE)], axis=1), active)
            if len(self.inserted):
                more = np.broadcast_to(self.inserted, (size, len(self.inserted)))
                total = score[:, :, None] + bonus - acoustic * said_falsely
                total += language * bigram[last[:, :, None], more[:, None]]
                everything = np.concatenate([score[:, :, None], total], axis=2)
                keep(everything, np.concatenate([np.full((size, 1), NONE), more], axis=1), active)
        score = score + language * bigram[last, len(self.words)]
        order = np.argsort(-score, axis=1, kind="stable")
        results = []
        for row in range(size):
            texts: dict[str, float] = {}
            for beam in order[row]:
                if score[row, beam] <= worst // 2:
                    break
                text = " ".join(self.words[word] for word in history[row, beam, : taken[row, beam]])
                if text and text not in texts:
                    texts[text] = int(score[row, beam]) / (100 * UNIT * (int(taken[row, beam]) + 1))
                if len(texts) == count:
                    break
            results.append((list(texts), list(texts.values())))
        return results


def frequent_words(sentences: Sequence[str], size: int) -> list[str]:
    """The most frequent words of sentences, ties in alphabetical order."""
    counts: dict[str, int] = {}
    for sentence in sentences:
        for word in sentence.split():
            counts[word] = counts.get(word, 0) + 1
    if len(counts) < size:
        raise UserError(f"the general text has {len(counts)} words, fewer than lexicon_size ({size}): lower it")
    return sorted(counts, key=lambda word: (-counts[word], word))[:size]
