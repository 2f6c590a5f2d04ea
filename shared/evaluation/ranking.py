"""Metrics of rankings, one value a query, by trec_eval's own code (ir_measures), and a paired test over queries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.config import UserError

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_array

Gains = Literal["exponential", "linear"]

# With these, 2^grade − 1 stays a whole number that trec_eval's 32-bit grades hold.
LARGEST_GRADE = 30
# Places of rankings that are handed to trec_eval at once.
PLACES = 1_000_000
# Signs held at once, in numbers (16 MB).
CHUNK = 2_000_000
# Sets of signs up to 2^16 are enumerated.
MAX_ENUMERATED = 16
# Decimals of the sums of differences that are compared.
ROUNDED = 9


def ranking_metrics(
    documents: ArrayLike,
    grades: csr_array,
    metrics: Sequence[str] = ("ndcg@10", "mrr@10", "map", "recall@50", "precision@10"),
    *,
    gains: Gains = "exponential",
) -> pd.DataFrame:
    """The metrics of each query's ranking: a frame of Q rows, one column a metric, under the names given.

    `documents` int [Q, k] are document numbers, best first, −1 where a list is shorter; `grades` csr [Q, N] are whole
    numbers, 0 = not relevant or not judged, both the same to every metric. R documents have a grade above 0.

    - `ndcg@k`: Σ gain(grade at rank i) / log2(i + 1) over i ≤ k, divided by its greatest value over all N documents
      (Järvelin & Kekäläinen 2002). The gain is 2^grade − 1 (`exponential`: Burges et al. 2005, MS MARCO's and the web
      track's) or the grade (`linear`: trec_eval). They agree on grades 0 and 1.
    - `mrr@k`: 1 / rank of the first relevant document if that is at most k, else 0.
    - `map` or `map@k`: Σ precision at the ranks (≤ k) of relevant documents, divided by R.
    - `recall@k`: relevant ones among the first k, divided by R; `precision@k`: divided by k, however long the list.

    Without `@k` the whole list counts (not for precision and recall). Queries to which nothing is relevant have 0 in
    every metric, as in trec_eval. `UserError` for unknown metrics, documents out of range or listed twice, gaps in
    lists, and grades that are negative or above 30.
    """
    import ir_measures
    import pandas as pd

    measures = {name: _measure(name, gains) for name in metrics}
    documents = np.asarray(documents)
    relevant = _checked(documents, grades)
    values = {name: np.zeros(len(documents)) for name in measures}
    columns: dict[Any, list[str]] = {}
    for name, measure in measures.items():
        columns.setdefault(measure, []).append(name)
    names = [str(number) for number in range(max(grades.shape))]
    judged = np.flatnonzero(np.diff(relevant.indptr))
    step = max(1, PLACES // max(documents.shape[1], 1))
    for start in range(0, len(judged), step):
        judgments, run = _as_dictionaries(judged[start : start + step], documents, relevant, names)
        for result in ir_measures.pytrec_eval.evaluator(list(columns), judgments).iter_calc(run):
            for name in columns[result.measure]:
                values[name][int(result.query_id)] = result.value
    for name in measures:
        if name.startswith("mrr@"):
            # trec_eval knows no cutoff here.
            values[name][values[name] * int(name.removeprefix("mrr@")) < 1 - 1e-9] = 0
    return pd.DataFrame(values).rename_axis("query")


def paired_permutation_test(differences: ArrayLike, *, num_permutations: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference over queries, by changing signs (Fisher; Smucker et al. 2007).

    `differences` [Q] are those of two rankers on the same queries, or [seeds, Q], whose means over seeds are taken:
    what is permuted is the query. The p-value is the share of sign changes whose mean is as far from 0 as the one
    observed; all 2^Q of them up to Q = 16, else `num_permutations` drawn ones and the observed one.
    """
    from scipy.stats import permutation_test

    values = np.asarray(differences, dtype=np.float64)
    if values.ndim not in (1, 2) or values.shape[-1] < 2 or not np.isfinite(values).all():
        raise UserError(f"differences must be finite, [Q] or [seeds, Q], with at least two queries, not {values.shape}")
    values = values.mean(axis=0) if values.ndim == 2 else values
    size = len(values)
    result = permutation_test(
        (values,),
        # Rounded, so that sums which are equal but for rounding count as equal.
        lambda changed, axis: np.abs(changed.sum(axis=axis)).round(ROUNDED),
        permutation_type="samples",
        vectorized=True,
        alternative="greater",
        n_resamples=1 << size if size <= MAX_ENUMERATED else num_permutations,
        batch=max(1, CHUNK // size),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _measure(name: str, gains: Gains) -> Any:
    """The measure of ir_measures that a metric's name stands for."""
    import ir_measures

    found = re.fullmatch(r"(ndcg|mrr|map|recall|precision)(?:@([1-9]\d*))?", name)
    if found is None or (found[1] in ("recall", "precision") and found[2] is None):
        raise UserError(
            f"there is no metric {name!r}: write ndcg, mrr, map, ndcg@k, mrr@k, map@k, recall@k or precision@k"
        )
    if gains not in ("exponential", "linear"):
        raise UserError(f"gains must be exponential or linear, not {gains!r}")
    kind, cutoff = found[1], int(found[2]) if found[2] else None
    if kind == "mrr":
        return ir_measures.RR
    measure = {
        "ndcg": ir_measures.nDCG,
        "map": ir_measures.AP,
        "recall": ir_measures.R,
        "precision": ir_measures.P,
    }[kind]
    if kind == "ndcg" and gains == "exponential":
        measure = measure(gains={grade: 2**grade - 1 for grade in range(LARGEST_GRADE + 1)})
    return measure @ cutoff if cutoff else measure


def _as_dictionaries(
    rows: NDArray[np.integer], documents: NDArray[np.integer], relevant: csr_array, names: list[str]
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """Grades and rankings of some queries, as trec_eval takes them."""
    # It sorts by score, so every place has its own.
    scores = [float(-place) for place in range(documents.shape[1])]
    judgments, run = {}, {}
    for row in rows.tolist():
        stored = slice(relevant.indptr[row], relevant.indptr[row + 1])
        judged = zip(relevant.indices[stored].tolist(), relevant.data[stored].tolist(), strict=True)
        judgments[names[row]] = {names[document]: grade for document, grade in judged}
        ranked = (names[document] for document in documents[row].tolist() if document >= 0)
        run[names[row]] = dict(zip(ranked, scores, strict=False))
    return judgments, run


def _checked(documents: NDArray[Any], grades: csr_array) -> csr_array:
    """The grades above 0, after a look at whether rankings and grades fit."""
    if documents.ndim != 2 or documents.dtype.kind not in "iu":
        raise UserError(f"documents must be whole numbers [Q, k], not {documents.dtype} {documents.shape}")
    num_queries, num_documents = grades.shape
    if len(documents) != num_queries:
        raise UserError(f"there are rankings of {len(documents)} queries, but grades of {num_queries}")
    if documents.size and (documents.min() < -1 or documents.max() >= num_documents):
        raise UserError(f"document numbers must lie between 0 and {num_documents - 1}, or be −1 behind a list's end")
    gaps = (documents[:, 1:] >= 0) & (documents[:, :-1] < 0)
    ordered = np.sort(documents, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    for wrong, what in ((gaps, "has a gap: pads (−1) belong behind a list's end"), (twice, "lists a document twice")):
        if wrong.any():
            raise UserError(f"the ranking of query {int(np.argwhere(wrong)[0, 0])} {what}")
    if grades.dtype.kind not in "iub" or (grades.nnz and (grades.data.min() < 0 or grades.data.max() > LARGEST_GRADE)):
        raise UserError(f"grades must be whole numbers between 0 and {LARGEST_GRADE}")
    relevant = grades.astype(np.int64).tocsr(copy=True)
    relevant.sum_duplicates()
    relevant.eliminate_zeros()
    return relevant
