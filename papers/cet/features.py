"""What rankers are given: KNRM's kernels and exact matches of chosen documents, or tokens of query and document.

Embeddings are frozen, so the kernels of a pair never change: they are taken once for all pairs that training and
evaluation will ever ask for, and training runs on [pairs, features].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.data.retrieval import Index, coordination_of

Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]

# Xiong et al. (2017), section 4.4: one kernel for exact matches, ten from 0.9 down to -0.9.
KERNEL_MEANS = np.array([1.0, *np.linspace(0.9, -0.9, 10)])
KERNEL_WIDTHS = np.array([1e-3, *[0.1] * 10])
SMALLEST = 1e-10
EXACT = ("bm25", "overlap")
NUM_FEATURES = len(KERNEL_MEANS) + len(EXACT)
PAD = 0


def kernel_features(
    index: Index, queries: Sequence[str], documents: Int64Array, embeddings: Float32Array
) -> Float32Array:
    """Soft term frequencies of documents [Q, C] (-1 pads), one a kernel: float32 [Q, C, 11], 0 for pads.

        φ_k = Σ_i log Σ_j exp(-(cos(q_i, d_j) - μ_k)² / 2σ_k²)

    over the words i of the query and j of the document; a document's distinct words are weighted by their counts, which
    comes to the same. Xiong et al. (2017), equations 4 to 6.
    """
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    directions = embeddings / np.where(lengths > 0, lengths, 1)
    words_of_queries = index.query_matrix(queries)
    features = np.zeros((*documents.shape, len(KERNEL_MEANS)), np.float32)
    for row, chosen in enumerate(documents):
        places = np.flatnonzero(chosen >= 0)
        of_query = slice(*words_of_queries.indptr[row : row + 2])
        words, repeats = words_of_queries.indices[of_query], words_of_queries.data[of_query]
        counts = index.counts[chosen[places]]
        columns = np.unique(counts.indices)
        cosines = directions[columns] @ directions[words].T
        near = np.exp(-((cosines[..., None] - KERNEL_MEANS) ** 2) / (2 * KERNEL_WIDTHS**2))
        pooled = counts[:, columns] @ near.reshape(len(columns), -1)
        pooled = pooled.reshape(len(places), len(words), len(KERNEL_MEANS))
        features[row, places] = np.einsum("t,ctk->ck", repeats, np.log(np.maximum(pooled, SMALLEST)))
    return features


def pair_features(
    index: Index, queries: Sequence[str], documents: Int64Array, embeddings: Float32Array
) -> Float32Array:
    """KNRM's features of documents [Q, C]: kernels, BM25 score, share of the query's words; float32 [Q, C, 13].

    Standardized over all pairs, which needs no labels; 0 for pads.
    """
    present = documents >= 0
    distinct = np.maximum(np.diff(index.query_matrix(queries).indptr), 1)
    exact = np.stack(
        [
            index.scores_of(queries, documents),
            coordination_of(index, queries, documents) / distinct[:, None].astype(np.float32),
        ],
        axis=-1,
    )
    features = np.concatenate([kernel_features(index, queries, documents, embeddings), exact], axis=-1)
    pairs = features[present].astype(np.float64)
    spread = pairs.std(axis=0)
    features = (features - pairs.mean(axis=0)) / np.where(spread > 1e-6, spread, 1)
    return np.where(present[..., None], features, 0).astype(np.float32)


@dataclass(frozen=True)
class FeatureInputs:
    """Features [Q, C, F] of the pairs that a ranker is asked about, by query and slot of its candidate."""

    features: Tensor

    def __call__(self, queries: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        return (self.features[queries, slots],)


@dataclass(frozen=True)
class TokenInputs:
    """[CLS] query [SEP] document [SEP] of the pairs that a ranker is asked about.

    `query_tokens` [Q, Lq] and `document_tokens` [N, Ld] end in pads (0); `documents` [Q, C] are rows of the latter.
    Gives tokens, token types (0 up to the first [SEP], 1 behind it) and mask, [..., length]; length is that of the
    longest pair.
    """

    query_tokens: Tensor
    document_tokens: Tensor
    documents: Tensor
    cls: int
    sep: int

    def __call__(self, queries: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        query = self.query_tokens[queries].long()
        document = self.document_tokens[self.documents[queries, slots]].long()
        query_end = (query != PAD).sum(dim=-1, keepdim=True) + 1
        end = query_end + (document != PAD).sum(dim=-1, keepdim=True) + 1
        place = torch.arange(int(end.max()) + 1, device=query.device).expand(*end.shape[:-1], -1)
        of_query = query.gather(-1, (place - 1).clamp(0, query.shape[-1] - 1))
        of_document = document.gather(-1, (place - query_end - 1).clamp(0, document.shape[-1] - 1))
        tokens = torch.where(place < query_end, of_query, of_document)
        tokens = torch.where(place == 0, self.cls, tokens)
        tokens = torch.where((place == query_end) | (place == end), self.sep, tokens)
        mask = place <= end
        types = (place > query_end) & mask
        return torch.where(mask, tokens, PAD), types.long(), mask.long()
