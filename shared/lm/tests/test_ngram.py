from __future__ import annotations

import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from shared.config import UserError
from shared.lm.ngram import DEFAULT_DISCOUNTS, AddK, KneserNey


class PlainKneserNey:
    """The definition with dictionaries, one n-gram at a time."""

    def __init__(self, sentences: Sequence[str], order: int, vocabulary: Sequence[str]) -> None:
        self.order, self.words = order, [*vocabulary, "</s>", "<unk>"]
        known = set(vocabulary)
        texts = [["<s>", *[w if w in known else "<unk>" for w in s.split()], "</s>"] for s in sentences]
        raw: list[Counter[tuple[str, ...]]] = [
            Counter(tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1))
            for n in range(order + 1)
        ]
        self.counts = [Counter()] + [Counter(level) for level in raw[1:]]
        for n in range(1, order):
            before = defaultdict(set)
            for gram in raw[n + 1]:
                before[gram[1:]].add(gram[0])
            self.counts[n] = Counter(
                {gram: count if gram[0] == "<s>" else len(before[gram]) for gram, count in raw[n].items()}
            )
        del self.counts[1]["<s>",]
        self.discounts = [None] + [self.discounts_of(level) for level in self.counts[1:]]

    @staticmethod
    def discounts_of(counts: Counter[tuple[str, ...]]) -> tuple[float, ...]:
        t = Counter(counts.values())
        if not all(t[r] for r in (1, 2, 3, 4)):
            return DEFAULT_DISCOUNTS
        y = t[1] / (t[1] + 2 * t[2])
        d = tuple(r - (r + 1) * y * t[r + 1] / t[r] for r in (1, 2, 3))
        return d if all(0 <= value <= r for r, value in enumerate(d, start=1)) else DEFAULT_DISCOUNTS

    def probability(self, history: tuple[str, ...], word: str, n: int | None = None) -> float:
        n = min(self.order, len(history) + 1) if n is None else n
        if n == 0:
            return 1 / len(self.words)
        history = history[len(history) - n + 1 :]
        continued = {gram[-1]: count for gram, count in self.counts[n].items() if gram[:-1] == history}
        lower = self.probability(history[1:], word, n - 1)
        if not continued:
            return lower
        discount = {w: self.discounts[n][min(count, 3) - 1] for w, count in continued.items()}
        total = sum(continued.values())
        own = (continued[word] - discount[word]) / total if word in continued else 0
        return own + sum(discount.values()) / total * lower


def random_sentences(count: int, seed: int, num_words: int = 30) -> list[str]:
    """Sentences of a chain in which each word has three likely successors."""
    draw = random.Random(seed)
    names = [f"w{number}" for number in range(num_words)]
    sentences = []
    for _ in range(count):
        place, text = draw.randrange(num_words), []
        for _ in range(draw.randint(0, 9)):
            text.append(names[place])
            place = (
                (3 * place + draw.choice([1, 1, 1, 2, 2, 7])) % num_words if draw.random() < 0.9 else draw.randrange(5)
            )
        sentences.append(" ".join(text))
    return sentences


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_is_the_definition(order: int) -> None:
    sentences = random_sentences(150, seed=0)
    vocabulary = [f"w{number}" for number in range(25)]
    model, plain = KneserNey(sentences, order, vocabulary=vocabulary), PlainKneserNey(sentences, order, vocabulary)
    np.testing.assert_allclose(model.discounts, np.array(plain.discounts[1:]), rtol=1e-12)
    asked = [*random_sentences(20, seed=1), "", "nowhere w1 w2", "w1 <s> </s>"]
    for sentence, log_probs in zip(asked, model.word_log_probs(asked), strict=True):
        words = [word if word in vocabulary else "<unk>" for word in sentence.split()]
        text = ("<s>", *words, "</s>")
        expected = [math.log(plain.probability(text[:place], text[place])) for place in range(1, len(text))]
        np.testing.assert_allclose(log_probs, expected, rtol=1e-10)
    np.testing.assert_allclose(model.score(asked), [values.sum() for values in model.word_log_probs(asked)])


def test_discounts_are_estimated_where_counts_allow() -> None:
    model = KneserNey(random_sentences(150, seed=0), 3)
    assert (model.discounts[1:] != DEFAULT_DISCOUNTS).all()
    # t = 4, 2, 2, 1 of n-grams that occur once, twice, …: Y = 4/8.
    text = ["a", "b", "c", "d", *2 * ["e", "f"], *3 * ["g", "h"], *4 * ["i"]]
    model = KneserNey([" ".join(text)], 1)
    # The end occurs once, too: t_1 = 5, Y = 5/9.
    y = 5 / 9
    assert model.discounts[0].tolist() == pytest.approx([1 - 2 * y * 2 / 5, 2 - 3 * y * 2 / 2, 3 - 4 * y * 1 / 2])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one(order: int) -> None:
    histories = [
        [],
        ["<s>"],
        ["<s>", "w3"],
        ["w1"],
        ["w1", "w4"],
        ["w4", "w1"],
        ["w29", "w29"],
        ["nowhere"],
        ["w1", "nowhere"],
        ["nowhere", "w1", "w4"],
        ["</s>"],
        ["w1", "w4", "w13", "w10"],
    ]
    for model in (
        KneserNey(random_sentences(200, seed=2), order),
        KneserNey(random_sentences(200, seed=2), order, min_count=40),
        AddK(random_sentences(200, seed=2), order, k=0.3),
    ):
        probabilities = model.probabilities(histories)
        assert probabilities.shape == (len(histories), len(model.words))
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
        assert (probabilities > 0).all()


def test_by_hand() -> None:
    """Two sentences, "a b" and "a c", with bigrams; too few for counts of counts, so D = 1/2, 1, 3/2."""
    model = KneserNey(["a b", "a c"], 2)
    assert model.words == ["a", "b", "c", "</s>", "<unk>"]
    f = Fraction
    # Different words before: a 1 (<s>), b 1, c 1, </s> 2 (b and c); 5 in all.
    # Discounts 1/2 for each of three words and 1 for the end leave 5/2 of 5 to the uniform 1/5.
    left = f(5, 2) / 5 / 5
    unigram = {"a": f(1, 2) / 5 + left, "b": f(1, 2) / 5 + left, "c": f(1, 2) / 5 + left}
    unigram |= {"</s>": f(1) / 5 + left, "<unk>": left}
    assert sum(unigram.values()) == 1
    # Behind <s> a twice: (2 - 1)/2 and 1/2 is left. Behind a: b and c once each, (1 - 1/2)/2 and 1/2 is left.
    expected = [
        [(f(1, 2) if word == "a" else 0) + f(1, 2) * unigram[word] for word in model.words],
        [(f(1, 4) if word in "bc" else 0) + f(1, 2) * unigram[word] for word in model.words],
        [(f(1, 2) if word == "</s>" else 0) + f(1, 2) * unigram[word] for word in model.words],
        [unigram[word] for word in model.words],
    ]
    found = model.probabilities([["<s>"], ["a"], ["b"], ["</s>"]])
    np.testing.assert_allclose(found, np.array(expected, dtype=float), rtol=1e-12)
    score = math.log(expected[0][0]) + math.log(expected[1][1]) + math.log(expected[2][3])
    assert model.score(["a b"]).tolist() == pytest.approx([score])
    assert model.perplexity(["a b"]) == pytest.approx(math.exp(-score / 3))


def test_add_k_by_hand() -> None:
    model = AddK(["a b", "a c", "b"], 2, k=0.5)
    # Behind <s>: a twice, b once, of 5 words. Behind a: b once, c once.
    first, second = (2 + 0.5) / (3 + 2.5), (1 + 0.5) / (2 + 2.5)
    np.testing.assert_allclose(model.probabilities([["<s>"], ["a"]])[[0, 1], [0, 1]], [first, second])
    assert model.probabilities([["d"]])[0].tolist() == pytest.approx([0.2] * 5)
    end = (2 + 0.5) / (2 + 2.5)
    assert model.score(["a b"])[0] == pytest.approx(math.log(first * second * end))


def test_beats_add_one_on_held_out_text() -> None:
    train, test = random_sentences(400, seed=3), random_sentences(100, seed=4)
    for order in (2, 3):
        smoothed = KneserNey(train, order).perplexity(test)
        assert smoothed < 0.9 * AddK(train, order, k=1.0).perplexity(test)
        assert smoothed < KneserNey(train, 1).perplexity(test)
    # With chance alone no model is better than another, and none worse than all words alike.
    draw = random.Random(0)
    noise = [" ".join(draw.choices("abcdefgh", k=8)) for _ in range(400)]
    assert KneserNey(noise, 1).perplexity(noise) < KneserNey(noise[:300], 3).perplexity(noise[300:]) < 10


def test_unknown_words() -> None:
    sentences = ["a b", "a c", "a b d"]
    model = KneserNey(sentences, 2, min_count=2)
    assert model.words == ["a", "b", "</s>", "<unk>"]
    assert model.score(["a x"]).tolist() == model.score(["a c"]).tolist()
    # Words that the vocabulary names have a probability without ever having occurred.
    wide = KneserNey(sentences, 2, vocabulary=["a", "b", "z", "<unk>", "</s>", "a"])
    assert wide.words == ["a", "b", "z", "</s>", "<unk>"]
    assert 0 < math.exp(wide.word_log_probs(["z"])[0][0]) < math.exp(wide.word_log_probs(["b"])[0][0])


def test_order_of_sentences_and_batches_do_not_matter() -> None:
    sentences = random_sentences(60, seed=5)
    model, reversed_model = KneserNey(sentences, 3), KneserNey(sentences[::-1], 3)
    asked = random_sentences(30, seed=6)
    scores = model.score(asked)
    np.testing.assert_allclose(reversed_model.score(asked), scores, rtol=1e-12)
    np.testing.assert_array_equal([model.score([sentence])[0] for sentence in asked], scores)
    assert model.score([]).shape == (0,)


def test_tens_of_thousands_of_sentences_take_seconds() -> None:
    generator = np.random.default_rng(0)
    share = 1 / np.arange(1, 5001)
    numbers = generator.choice(5000, (20_000, 15), p=share / share.sum())
    sentences = [" ".join(f"w{number}" for number in row) for row in numbers.tolist()]
    started = time.process_time()
    KneserNey(sentences, 3).score(sentences)
    assert time.process_time() - started < 10


def test_clear_errors() -> None:
    for order in (0, 9):
        with pytest.raises(UserError, match="between 1 and 8"):
            KneserNey(["a"], order)
    for sentences in ([], "a b"):
        with pytest.raises(UserError, match="at least one sentence"):
            KneserNey(sentences)
    with pytest.raises(UserError, match="k must be above 0"):
        AddK(["a"], k=0)
    model = KneserNey(["a"])
    with pytest.raises(UserError, match="list of sentences"):
        model.score("a b")
    with pytest.raises(UserError, match="split it"):
        model.probabilities(["a b"])
    with pytest.raises(UserError, match="at least one sentence"):
        model.perplexity([])
