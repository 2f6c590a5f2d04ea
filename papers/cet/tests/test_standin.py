"""The stand-in: topics, styles and relevance as described, and that nothing depends on the size it is made at."""

from __future__ import annotations

import numpy as np
import pytest

from shared.config import UserError, validate
from shared.data.retrieval import Index, coordination_match

from ..config import Generated
from ..standin import generate, topics, write_texts, zipf

SETTINGS = Generated(documents=600, queries=80, topics=10, concentration=1.0, relevant_per_query=12)


def test_sizes_and_lengths() -> None:
    texts, queries, relevant = generate(SETTINGS, 0)
    assert len(texts) == 600
    assert relevant.shape == (80, 600)
    assert {len(query.split()) for query in queries} == {3, 4, 5}
    lengths = [len(text.split()) for text in texts]
    assert (min(lengths), max(lengths)) == (40, 80)
    assert relevant.nnz / 80 == pytest.approx(12, rel=0.05)


def test_the_seed_decides() -> None:
    first, same, other = (generate(SETTINGS, seed) for seed in (1, 1, 2))
    assert first[0] == same[0]
    assert first[1] == same[1]
    assert (first[2] != same[2]).nnz == 0
    assert first[0] != other[0]


def test_topics_are_shares() -> None:
    shares = topics(SETTINGS, 500, np.random.default_rng(0))
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    assert shares.data.min() >= 1e-3
    np.testing.assert_allclose(shares.sum(axis=0) / 500, 0.1, atol=0.03)


def test_words_follow_topics_and_styles() -> None:
    """Each text has one topic here: all its words are of that topic, of one style and of the common ones."""
    from scipy.sparse import csr_array

    shares = csr_array(np.eye(10, dtype=np.float32)[np.arange(200) % 10])
    texts = write_texts(SETTINGS, shares, (40, 80), np.random.default_rng(0))
    a_topic = 3 * SETTINGS.style_words + SETTINGS.common_words
    own = []
    for row, text in enumerate(texts):
        numbers = np.array([int(word[1:]) for word in text.split()])
        assert (numbers // a_topic == row % 10).all()
        within = numbers % a_topic
        styled = within[within < 3 * SETTINGS.style_words]
        assert len(set(styled // SETTINGS.style_words)) == 1
        own.append(len(styled) / len(numbers))
    assert np.mean(own) == pytest.approx(SETTINGS.style_share, abs=0.02)


def test_mixtures_give_words_of_each_topic() -> None:
    from scipy.sparse import csr_array

    shares = csr_array(np.array([[0.75, 0, 0.25] + [0] * 7], np.float32))
    (text,) = write_texts(SETTINGS, shares, (8000, 8000), np.random.default_rng(0))
    topic = np.array([int(word[1:]) for word in text.split()]) // (3 * SETTINGS.style_words + SETTINGS.common_words)
    assert set(topic) == {0, 2}
    assert (topic == 0).mean() == pytest.approx(0.75, abs=0.02)


def test_frequent_words_are_twice_as_frequent_as_the_next() -> None:
    counts = np.bincount(zipf(5, 20_000, np.random.default_rng(0)), minlength=5)
    np.testing.assert_allclose(counts / counts[0], 1 / np.arange(1, 6), atol=0.03)


def test_relevance_does_not_depend_on_style_but_the_pool_does() -> None:
    settings = SETTINGS.model_copy(update={"documents": 2000, "style_share": 0.9})
    texts, queries, relevant = generate(settings, 0)
    a_topic = 3 * settings.style_words + settings.common_words

    def style(text: str) -> int:
        within = np.array([int(word[1:]) for word in text.split()]) % a_topic // settings.style_words
        return int(np.bincount(within, minlength=4)[:3].argmax())

    of_documents, of_queries = np.array([style(t) for t in texts]), np.array([style(q) for q in queries])
    rows, documents = relevant.nonzero()
    assert (of_documents[documents] == of_queries[rows]).mean() == pytest.approx(1 / 3, abs=0.05)
    index = Index(texts, stem=False, remove_stopwords=False)
    pool = coordination_match(index, queries, 10, seed=0).documents
    assert (of_documents[pool] == of_queries[:, None]).mean() > 0.8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"relevant_per_query": 600}, "smaller than documents"),
        ({"query_words": (5, 3)}, "shortest and the longest length, not 5 and 3"),
        ({"style_share": 1.5}, "less than or equal to 1"),
    ],
)
def test_impossible_collections(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(Generated, SETTINGS.model_dump() | changes, "here")
