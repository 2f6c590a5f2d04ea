"""Ranked candidate lists: the best documents of every query, made from scores, mixed, and kept as Parquet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError
from shared.files import atomic_path

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]

PAD = -1


@dataclass(frozen=True)
class Candidates:
    """The candidates of each query, best first: `documents` int64 [Q, k], `scores` float32 [Q, k].

    Documents are row numbers of the collection. Lists shorter than k end in pads, document −1 with score −inf.
    """

    documents: Int64Array
    scores: Float32Array

    def __post_init__(self) -> None:
        documents, scores = self.documents, self.scores
        if documents.ndim != 2 or documents.shape != scores.shape:
            raise UserError(f"documents and scores must both be [Q, k], not {documents.shape} and {scores.shape}")
        if documents.dtype != np.int64 or scores.dtype != np.float32:
            raise UserError(f"documents must be int64 and scores float32, not {documents.dtype} and {scores.dtype}")
        wrong = ((documents == PAD) != (scores == -np.inf)) | (documents < PAD) | np.isnan(scores)
        wrong[:, 1:] |= scores[:, 1:] > scores[:, :-1]
        if wrong.any():
            row = int(np.argwhere(wrong)[0, 0])
            raise UserError(
                f"the candidates of query {row} are not a ranking: scores must not increase from left to right, and "
                "pads (document −1, score −inf) must stand at the end"
            )

    @property
    def lengths(self) -> Int64Array:
        """Number of candidates of each query, int64 [Q]."""
        return (self.documents != PAD).sum(axis=1)

    def head(self, k: int) -> Candidates:
        """The best k of each query; fewer where there are fewer."""
        return Candidates(self.documents[:, :k], self.scores[:, :k])


def top_candidates(scores: NDArray[np.floating], k: int) -> Candidates:
    """The k best-scored documents of each query, `scores` [Q, N]; −inf leaves a document out.

    Ties go to the document with the smaller number, so the result is the same on every machine.
    """
    check_depth(k)
    scores = np.asarray(scores, dtype=np.float32)
    if scores.ndim != 2 or np.isnan(scores).any():
        raise UserError(f"scores must be [Q, N] without NaN (given: shape {scores.shape})")
    kept = scores > -np.inf
    if k < scores.shape[1]:
        # All that tie with the k-th stay in, for the sort to choose among. Of −scores: where most documents are left
        # out, numpy takes thirty times as long for the upper end.
        kept &= scores >= -np.partition(-scores, k - 1, axis=1)[:, k - 1, None]
    rows, documents = np.nonzero(kept)
    return rank(rows, documents, scores[rows, documents], num_queries=len(scores), k=k)


def top_sparse(scores: csr_array, k: int) -> Candidates:
    """The k best of the documents that have a stored score, csr [Q, N]; ties as in `top_candidates`."""
    check_depth(k)
    lengths = np.diff(scores.indptr)
    bounds = np.full(len(lengths), -np.inf, np.float32)
    for row in np.flatnonzero(lengths > k):
        stored = scores.data[scores.indptr[row] : scores.indptr[row + 1]]
        bounds[row] = -np.partition(-stored, k - 1)[k - 1]
    kept = scores.data >= np.repeat(bounds, lengths)
    rows = np.repeat(np.arange(len(lengths)), lengths)[kept]
    return rank(rows, scores.indices[kept], scores.data[kept], num_queries=len(lengths), k=k)


def rank(
    rows: NDArray[np.integer],
    documents: NDArray[np.integer],
    scores: NDArray[np.floating],
    *,
    num_queries: int,
    k: int,
) -> Candidates:
    """The k best of scored pairs of a query (`rows`) and a document, each there at most once; all three are [P]."""
    scores = np.asarray(scores, dtype=np.float32)
    order = np.lexsort((documents, -scores, rows))
    rows, documents, scores = rows[order], documents[order], scores[order]
    places = np.arange(len(rows)) - np.searchsorted(rows, np.arange(num_queries))[rows]
    kept = places < k
    ranked = np.full((num_queries, k), PAD, np.int64), np.full((num_queries, k), -np.inf, np.float32)
    for array, values in zip(ranked, (documents, scores), strict=True):
        array[rows[kept], places[kept]] = values[kept]
    return Candidates(*ranked)


def concatenate(parts: list[Candidates], k: int) -> Candidates:
    """The candidates of several groups of queries, one below the other; all lists are k deep."""
    documents = [np.empty((0, k), np.int64), *(part.documents for part in parts)]
    scores = [np.empty((0, k), np.float32), *(part.scores for part in parts)]
    return Candidates(np.concatenate(documents), np.concatenate(scores))


def mix(a: Candidates, b: Candidates, weight: float = 0.5, k: int | None = None) -> Candidates:
    """The k best by (1 − weight)·a + weight·b, each list's scores first scaled to [0, 1] within its query.

    A document that a list does not hold has 0 there, as has the list's last; a list of equal scores has 1 throughout.
    `k` is by default the greater depth of the two.
    """
    if len(a.documents) != len(b.documents):
        raise UserError(f"both must rank the same queries, but there are {len(a.documents)} and {len(b.documents)}")
    if not 0 <= weight <= 1:
        raise UserError(f"weight must lie between 0 (only the first) and 1 (only the second), not {weight}")
    k = max(a.documents.shape[1], b.documents.shape[1]) if k is None else check_depth(k)
    num_queries = len(a.documents)
    columns = [(*np.nonzero(part.documents != PAD), part, share) for part, share in ((a, 1 - weight), (b, weight))]
    rows = np.concatenate([rows for rows, *_ in columns])
    documents = np.concatenate([part.documents[rows, places] for rows, places, part, _ in columns])
    scores = np.concatenate([share * _scaled(part)[rows, places] for rows, places, part, share in columns])
    width = int(documents.max(initial=0)) + 1
    pairs, inverse = np.unique(rows * width + documents, return_inverse=True)
    summed = np.bincount(inverse, weights=scores, minlength=len(pairs))
    return rank(pairs // width, pairs % width, summed, num_queries=num_queries, k=k)


def _scaled(candidates: Candidates) -> NDArray[np.float64]:
    """Scores scaled to [0, 1] within each query, float64 [Q, k]; what stands at the pads means nothing."""
    high = candidates.scores[:, :1].astype(np.float64)
    scores = np.where(candidates.documents == PAD, high, candidates.scores)
    low = scores.min(axis=1, keepdims=True)
    # An empty list has −inf as its greatest.
    spread = np.isfinite(high) & (high > low)
    high, low = np.where(spread, high, 1), np.where(spread, low, 0)
    return np.where(spread, (scores - low) / (high - low), 1.0)


def write_candidates(path: Path, candidates: Candidates) -> None:
    """Write candidates as Parquet, one row a query with the lists `documents` and `scores`; whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    depth = candidates.documents.shape[1]
    columns = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), depth)
        for name, array in (("documents", candidates.documents), ("scores", candidates.scores))
    }
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def read_candidates(path: Path) -> Candidates:
    """Read what `write_candidates` wrote; `UserError` where the file is missing or something else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: write it with write_candidates") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file ({error}): write it with write_candidates") from None
    expected = {"documents": pa.int64(), "scores": pa.float32()}
    if table.column_names != list(expected) or not all(
        pa.types.is_fixed_size_list(table[name].type) and table[name].type.value_type == kind
        for name, kind in expected.items()
    ):
        raise UserError(f"{path} holds no candidates but {table.schema.to_string()}: write it with write_candidates")
    depth = table["documents"].type.list_size
    documents, scores = (
        np.asarray(table[name].combine_chunks().flatten()).reshape(-1, depth) for name in ("documents", "scores")
    )
    return Candidates(documents, scores)


def check_depth(k: int) -> int:
    """`k` where it is a depth of a ranking, at least 1."""
    if k < 1:
        raise UserError(f"k, the number of documents a query, must be at least 1, not {k}")
    return k
