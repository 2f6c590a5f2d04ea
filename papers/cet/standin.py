"""A generated collection where selection depends on style and relevance on topic.

Documents and queries have topics ~ Dirichlet and a style. Each word is of one of the text's topics; it is one of the
words that only the text's style has for that topic, with probability `style_share`, else one that all styles share.
A document is relevant to a query if the cosine of their topics is above a threshold, whatever their styles: retrieval
by words favors documents of the query's style. Nothing here says that weighting must help.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .config import Generated

if TYPE_CHECKING:
    from scipy.sparse import csr_array

SMALLEST_SHARE = 1e-3
ROWS = 10_000
SAMPLED_QUERIES = 200
CHUNK_PAIRS = 100_000_000


def generate(settings: Generated, seed: int) -> tuple[list[str], list[str], csr_array]:
    """Texts of documents and queries, and their relevance, bool csr [Q, N]."""
    generator = np.random.default_rng(seed)
    documents = topics(settings, settings.documents, generator)
    queries = topics(settings, settings.queries, generator)
    texts = write_texts(settings, documents, settings.document_words, generator)
    query_texts = write_texts(settings, queries, settings.query_words, generator)
    return texts, query_texts, relevance(queries, documents, settings.relevant_per_query)


def topics(settings: Generated, size: int, generator: np.random.Generator) -> csr_array:
    """Shares of topics ~ symmetric Dirichlet, csr [size, topics]; shares below 0.1 % are left out."""
    from scipy.sparse import csr_array, vstack

    parts = []
    for start in range(0, size, ROWS):
        rows = min(ROWS, size - start)
        shares = generator.standard_gamma(settings.concentration / settings.topics, size=(rows, settings.topics))
        # All shares of a row can be too small for floating point.
        empty = np.flatnonzero(shares.sum(axis=1) == 0)
        shares[empty, generator.integers(settings.topics, size=len(empty))] = 1
        shares /= shares.sum(axis=1, keepdims=True)
        shares[shares < SMALLEST_SHARE] = 0
        parts.append(csr_array((shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)))
    return csr_array(vstack(parts, format="csr"))


def write_texts(
    settings: Generated, shares: csr_array, lengths: tuple[int, int], generator: np.random.Generator
) -> list[str]:
    """Texts with topics of these shares [size, topics], each in a style of its own choice."""
    size = shares.shape[0]
    style = generator.integers(settings.styles, size=size)
    length = generator.integers(lengths[0], lengths[1] + 1, size=size)
    row = np.repeat(np.arange(size), length)
    # Every row's cumulative shares lie between its number and the next: one search draws the topics of all words.
    totals = np.cumsum(shares.data, dtype=np.float64)
    before = np.concatenate([[0.0], totals])[shares.indptr]
    rows_of_shares = np.repeat(np.arange(size), np.diff(shares.indptr))
    within = (totals - before[rows_of_shares]) / np.diff(before)[rows_of_shares]
    drawn = np.searchsorted(rows_of_shares + within, row + generator.random(len(row)), side="right")
    topic = shares.indices[np.minimum(drawn, shares.indptr[row + 1] - 1)]

    own = generator.random(len(row)) < settings.style_share
    word_of_style = zipf(settings.style_words, len(row), generator)
    common = zipf(settings.common_words, len(row), generator)
    styled = settings.styles * settings.style_words
    number = np.where(own, style[row] * settings.style_words + word_of_style, styled + common)
    number = topic * (styled + settings.common_words) + number
    names = np.array([f"w{i:06d}" for i in range(settings.topics * (styled + settings.common_words))], dtype=object)
    words = names[number]
    ends = np.cumsum(length)
    return [" ".join(words[end - count : end]) for end, count in zip(ends, length, strict=True)]


def zipf(size: int, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Numbers below `size`, r with a probability in proportion to 1/(r + 1)."""
    cumulative = np.cumsum(1 / np.arange(1, size + 1))
    return np.searchsorted(cumulative, generator.random(count) * cumulative[-1], side="right")


def relevance(queries: csr_array, documents: csr_array, relevant_per_query: float) -> csr_array:
    """Pairs whose topics have a cosine above a threshold, which the mean count a query sets; bool csr [Q, N]."""
    from scipy.sparse import csr_array, vstack

    queries, documents = _unit(queries), csr_array(_unit(documents).T)
    sample = (queries[:SAMPLED_QUERIES] @ documents).data
    place = round(relevant_per_query * min(SAMPLED_QUERIES, queries.shape[0]))
    threshold = np.partition(sample, -place)[-place] if place < len(sample) else 0.0
    step = max(1, CHUNK_PAIRS // documents.shape[1])
    parts = []
    for start in range(0, queries.shape[0], step):
        cosines = queries[start : start + step] @ documents
        cosines.data = cosines.data >= threshold
        cosines.eliminate_zeros()
        parts.append(cosines.astype(bool))
    return csr_array(vstack(parts, format="csr"))


def _unit(matrix: csr_array) -> csr_array:
    scaled = matrix.copy()
    lengths = np.sqrt(matrix.multiply(matrix).sum(axis=1))
    scaled.data = matrix.data / np.repeat(lengths, np.diff(matrix.indptr))
    return scaled
