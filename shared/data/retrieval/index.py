"""Retrieval from an index of words: BM25, coordination level, BM25 with relevance feedback (RM3), and latent semantics.

Queries are handled in groups as products of matrices, so that memory does not grow with their number. Sparse products
run on one thread, the dense ones of the latent index on as many as BLAS is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError
from shared.data.retrieval.candidates import (
    PAD,
    Candidates,
    Float32Array,
    Int64Array,
    check_depth,
    concatenate,
    rank,
    top_candidates,
    top_sparse,
)
from shared.data.retrieval.words import Tokens, Vocabulary, look_up, tokenize

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Variant = Literal["lucene", "robertson", "atire"]

CHUNK = 4_000_000  # scores held at once, in numbers (16 MB)
LARGEST = 1 << 29  # what `scores` gives at most, in numbers (2 GiB)


class Index:
    """BM25 over texts, with the weights of bm25s (Lù 2024, "BM25S"), scored as products of sparse matrices.

    The score of a document is the sum over the query's words, repeated ones counted each time, of
    idf(t) · tf / (tf + k1 · (1 − b + b · length / mean length)). The `variant` says what idf is (Kamphuis et al. 2020):
    `lucene` ln(1 + (N − df + ½) / (df + ½)), never negative; `robertson` the same without 1 +, negative ones set to 0;
    `atire` ln(N / df), with the score times k1 + 1.

    `vocabulary` gives the words (number 0, the pad, occurs nowhere), `counts` csr [N, V] how often they occur in each
    document, `weights` csr [V, N] their parts of a document's score. Documents without a word match nothing.
    """

    def __init__(
        self,
        texts: Sequence[str],
        *,
        k1: float = 1.2,
        b: float = 0.75,
        variant: Variant = "lucene",
        stem: bool = True,
        remove_stopwords: bool = True,
    ) -> None:
        if k1 < 0 or not 0 <= b <= 1:
            raise UserError(f"BM25 needs k1 ≥ 0 and b between 0 and 1, not k1={k1}, b={b}")
        if variant not in ("lucene", "robertson", "atire"):
            raise UserError(f"there is no BM25 variant {variant!r}; choose one of lucene, robertson, atire")
        self.vocabulary, self.counts, tokens = count_words(texts, stem=stem, remove_stopwords=remove_stopwords)
        self.weights = _bm25_weights(tokens, len(self.vocabulary), k1, b, variant)

    @property
    def num_documents(self) -> int:
        return self.counts.shape[0]

    def query_matrix(self, queries: Sequence[str]) -> csr_array:
        """How often each word of the vocabulary is in each query, csr [Q, V]."""
        return _counted(look_up(queries, self.vocabulary), len(self.vocabulary))

    def search(self, queries: Sequence[str], k: int) -> Candidates:
        """The k best documents of each query; only documents that score above 0 are candidates."""
        return search_sparse(self.query_matrix(queries), self.weights, k)

    def scores(self, queries: Sequence[str]) -> Float32Array:
        """The score of every document, float32 [Q, N]; `UserError` where that would be more than 2 GiB."""
        _check_size(len(queries), self.num_documents)
        return (self.query_matrix(queries) @ self.weights).toarray().astype(np.float32, copy=False)

    def scores_of(self, queries: Sequence[str], documents: Int64Array) -> Float32Array:
        """The scores of chosen documents, `documents` [Q, k] -> float32 [Q, k]; pads (−1) score 0."""
        return _scores_of(self.query_matrix(queries), self.weights, documents)


def coordination_match(index: Index, queries: Sequence[str], k: int, *, seed: int | None = None) -> Candidates:
    """The k documents that hold most of a query's distinct words; the score is their number.

    Ties, of which there are many, go to the document with the smaller number, or at random with a `seed`: the order of
    documents in a collection tells something of their subjects.
    """
    return search_sparse(_binary(index.query_matrix(queries)), _binary(index.weights), k, tie_seed=seed)


def coordination_of(index: Index, queries: Sequence[str], documents: Int64Array) -> Float32Array:
    """How many of the query's distinct words chosen documents hold, `documents` [Q, k] -> float32 [Q, k]."""
    return _scores_of(_binary(index.query_matrix(queries)), _binary(index.weights), documents)


def rm3(
    index: Index,
    queries: Sequence[str],
    k: int,
    *,
    feedback_documents: int = 10,
    feedback_terms: int = 20,
    weight: float = 0.5,
) -> Candidates:
    """BM25 with queries expanded by words of their best documents: relevance model 3 (Abdul-Jaleel et al. 2004).

    The relevance model (Lavrenko & Croft 2001, RM1) of the F best documents is
    P(w | R) ∝ Σ_d P(w | d) P(d | q), with P(w | d) = tf / length and P(d | q) ∝ the BM25 score of d. Its
    `feedback_terms` most probable words, renormalized, are mixed with the query's own,
    P'(w) = weight · tf(w, q) / |q| + (1 − weight) · P(w | R), and score(d) = Σ_w P'(w) · BM25(w, d).
    `weight` 1 ranks as BM25 does.
    """
    expanded = rm3_queries(index, queries, feedback_documents, feedback_terms, weight)
    return search_sparse(expanded, index.weights, k)


def rm3_queries(
    index: Index, queries: Sequence[str], feedback_documents: int = 10, feedback_terms: int = 20, weight: float = 0.5
) -> csr_array:
    """The word weights P'(w) of `rm3`, csr [Q, V]; rows sum to 1, and are 0 where no word of the query is known."""
    from scipy.sparse import csr_array, vstack

    if not 0 <= weight <= 1:
        raise UserError(f"weight must lie between 0 (only feedback) and 1 (only the query), not {weight}")
    if feedback_terms < 1:
        raise UserError(f"feedback_terms must be at least 1, not {feedback_terms}")
    original = index.query_matrix(queries)
    lengths = np.maximum(index.counts.sum(axis=1), 1)
    models = [csr_array(original[:0])]
    for part in _parts(original, index.num_documents):
        feedback = search_sparse(part, index.weights, feedback_documents)
        rows, places = np.nonzero(feedback.documents != PAD)
        documents = feedback.documents[rows, places]
        # P(d | q) / length, whose product with the counts is Σ_d P(w | d) P(d | q) up to a constant.
        shares = csr_array(
            (feedback.scores[rows, places] / lengths[documents], (rows, documents)),
            shape=(part.shape[0], index.num_documents),
        )
        words = (shares @ index.counts).tocoo()
        best = rank(words.row, words.col, words.data, num_queries=part.shape[0], k=feedback_terms)
        rows, places = np.nonzero(best.documents != PAD)
        model = csr_array((best.scores[rows, places], (rows, best.documents[rows, places])), shape=part.shape)
        # Without feedback the query stays what it is.
        share = np.where(np.diff(model.indptr) > 0, weight, 1.0)
        models.append(_scaled_rows(_rows_to_one(part), share) + _scaled_rows(_rows_to_one(model), 1 - share))
    return csr_array(vstack(models, format="csr"))


class LatentSemanticIndex:
    """Cosine in the space of a truncated SVD of tf-idf (Deerwester et al. 1990): matches without a word in common.

    tf-idf is (1 + ln tf) · (1 + ln((1 + N) / (1 + df))), documents scaled to length 1. With tf-idf ≈ U Σ Vᵀ, documents
    are rows of U Σ and queries q V, both of length 1. Documents and queries without a (known) word match nothing.
    """

    def __init__(
        self,
        texts: Sequence[str],
        dimensions: int = 200,
        seed: int = 0,
        *,
        stem: bool = True,
        remove_stopwords: bool = True,
    ) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfTransformer
        from sklearn.preprocessing import normalize

        self.vocabulary, counts, _ = count_words(texts, stem=stem, remove_stopwords=remove_stopwords)
        limit = min(counts.shape[0], len(self.vocabulary) - 1)
        if not 1 <= dimensions <= limit:
            raise UserError(
                f"dimensions must lie between 1 and {limit} for {counts.shape[0]} documents of "
                f"{len(self.vocabulary) - 1} distinct words, not {dimensions}"
            )
        self._weighting = TfidfTransformer(sublinear_tf=True).fit(counts)
        self._projection = TruncatedSVD(dimensions, n_iter=5, random_state=seed)
        vectors = normalize(self._projection.fit_transform(self._weighting.transform(counts)))
        self.vectors: Float32Array = vectors.astype(np.float32, copy=False)
        self._empty = np.diff(counts.indptr) == 0

    @property
    def num_documents(self) -> int:
        return len(self.vectors)

    def embed(self, queries: Sequence[str]) -> Float32Array:
        """Queries as vectors of length 1 (or 0, where no word is known), float32 [Q, dimensions]."""
        from sklearn.preprocessing import normalize

        counts = _counted(look_up(queries, self.vocabulary), len(self.vocabulary))
        if counts.shape[0] == 0:
            return np.empty((0, self.vectors.shape[1]), np.float32)
        return normalize(self._projection.transform(self._weighting.transform(counts))).astype(np.float32)

    def search(self, queries: Sequence[str], k: int) -> Candidates:
        """The k documents of greatest cosine with each query, a negative one if need be."""
        check_depth(k)
        vectors = self.embed(queries)
        step = _step(self.num_documents)
        parts = [vectors[start : start + step] for start in range(0, len(vectors), step)]
        return concatenate([top_candidates(self._cosines(part), k) for part in parts], k)

    def scores(self, queries: Sequence[str]) -> Float32Array:
        """The cosine of every document, float32 [Q, N], −inf where either has no word; at most 2 GiB."""
        _check_size(len(queries), self.num_documents)
        return self._cosines(self.embed(queries))

    def _cosines(self, vectors: Float32Array) -> Float32Array:
        cosines = vectors @ self.vectors.T
        cosines[:, self._empty] = -np.inf
        cosines[~vectors.any(axis=1)] = -np.inf
        return cosines


# --- Words and matrices -----------------------------------------------------------------------------------------------


def count_words(
    texts: Sequence[str], *, stem: bool = True, remove_stopwords: bool = True
) -> tuple[Vocabulary, csr_array, Tokens]:
    """The vocabulary of texts, how often each word is in each text (float32 csr [N, V]), and the texts as tokens."""
    words, tokens = tokenize(texts, stem=stem, remove_stopwords=remove_stopwords)
    if not words:
        raise UserError(f"none of the {len(tokens.offsets) - 1} documents has a word: there is nothing to search in")
    tokens = Tokens(tokens.ids + np.int32(1), tokens.offsets)
    vocabulary = Vocabulary(("", *words), stem, remove_stopwords)
    return vocabulary, _counted(tokens, len(vocabulary)), tokens


def search_sparse(queries: csr_array, documents: csr_array, k: int, *, tie_seed: int | None = None) -> Candidates:
    """The k best documents by the product of `queries` [Q, V] and `documents` [V, N], both without negative numbers.

    Documents whose score is 0 are left out. `tie_seed` breaks ties at random, for scores that are whole numbers.
    """
    check_depth(k)
    generator = None if tie_seed is None else np.random.default_rng(tie_seed)

    def best(part: csr_array) -> Candidates:
        scores = part @ documents
        scores.eliminate_zeros()
        if generator is None:
            return top_sparse(scores, k)
        scores.sort_indices()
        scores.data += generator.random(scores.nnz, dtype=np.float32) / 2
        found = top_sparse(scores, k)
        return Candidates(found.documents, np.floor(found.scores))

    return concatenate([best(part) for part in _parts(queries, documents.shape[1])], k)


def _bm25_weights(tokens: Tokens, size: int, k1: float, b: float, variant: Variant) -> csr_array:
    import bm25s
    from scipy.sparse import csr_array

    texts = _Texts(tokens)
    model = bm25s.BM25(k1=k1, b=b, method=variant)
    parts = model.build_index_from_ids(range(size), texts, show_progress=False)
    # By columns of [N, V], which are the rows of [V, N].
    weights = csr_array((parts["data"], parts["indices"], parts["indptr"]), shape=(size, len(texts)))
    weights.sort_indices()
    return weights


class _Texts:
    """Tokens as bm25s walks over them, text by text; a list of lists would take ten times the memory."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens.offsets) - 1

    def __iter__(self) -> Iterator[list[int]]:
        ids, offsets = self.tokens
        return (ids[start:end].tolist() for start, end in pairwise(offsets.tolist()))


def _counted(tokens: Tokens, size: int) -> csr_array:
    from scipy.sparse import csr_array

    shape = (len(tokens.offsets) - 1, size)
    # A copy, since summing puts the tokens of a text into another order.
    counts = csr_array((np.ones(len(tokens.ids), np.float32), tokens.ids, tokens.offsets), shape=shape, copy=True)
    counts.sum_duplicates()
    return counts


def _binary(matrix: csr_array) -> csr_array:
    from scipy.sparse import csr_array

    return csr_array((np.ones_like(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape)


def _scaled_rows(matrix: csr_array, factors: NDArray[np.floating]) -> csr_array:
    scaled = matrix.copy()
    scaled.data = (matrix.data * np.repeat(factors, np.diff(matrix.indptr))).astype(np.float32)
    return scaled


def _rows_to_one(matrix: csr_array) -> csr_array:
    sums = matrix.sum(axis=1)
    return _scaled_rows(matrix, 1 / np.where(sums > 0, sums, 1))


def _scores_of(queries: csr_array, documents: csr_array, chosen: Int64Array) -> Float32Array:
    chosen = np.asarray(chosen)
    num_queries, num_documents = queries.shape[0], documents.shape[1]
    if chosen.ndim != 2 or len(chosen) != num_queries:
        raise UserError(f"chosen documents must be [Q, k] with Q = {num_queries}, not {chosen.shape}")
    if chosen.size and (chosen.min() < PAD or chosen.max() >= num_documents):
        raise UserError(f"document numbers must lie between 0 and {num_documents - 1}, or be −1 for a pad")
    scores = np.zeros(chosen.shape, np.float32)
    step = _step(num_documents)
    for start in range(0, num_queries, step):
        part = slice(start, start + step)
        dense = (queries[part] @ documents).toarray()
        scores[part] = np.take_along_axis(dense, np.maximum(chosen[part], 0), axis=1)
    scores[chosen == PAD] = 0
    return scores


def _check_size(num_queries: int, num_documents: int) -> None:
    if num_queries * num_documents > LARGEST:
        raise UserError(
            f"the scores of {num_queries} queries and {num_documents} documents at once would take more than "
            f"{LARGEST >> 28} GiB: take fewer queries at a time, or search for the best documents only"
        )


def _step(num_documents: int) -> int:
    return max(1, CHUNK // max(num_documents, 1))


def _parts(queries: csr_array, num_documents: int) -> Iterator[csr_array]:
    step = _step(num_documents)
    return (queries[start : start + step] for start in range(0, queries.shape[0], step))
