from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array

from shared.config import UserError
from shared.evaluation import ranking
from shared.evaluation.ranking import paired_permutation_test, ranking_metrics

EVERYTHING = ("ndcg", "ndcg@3", "ndcg@10", "mrr", "mrr@3", "mrr@10", "map", "map@5", "recall@5", "precision@5")


def naive(ranked: list[int], grades: list[int], metric: str, gains: str) -> float:
    """One metric of one query, document by document, from the definition."""
    name, _, cutoff = metric.partition("@")
    relevant = sum(grade > 0 for grade in grades)
    if not relevant:
        return 0.0
    first = ranked[: int(cutoff)] if cutoff else ranked
    hits = [grades[document] > 0 for document in first]

    def gain(grade: int) -> float:
        return 2**grade - 1 if gains == "exponential" else grade

    if name == "ndcg":
        ideal = sorted(grades, reverse=True)[: int(cutoff) if cutoff else len(grades)]
        found = sum(gain(grades[document]) / math.log2(place + 2) for place, document in enumerate(first))
        return found / sum(gain(grade) / math.log2(place + 2) for place, grade in enumerate(ideal))
    if name == "mrr":
        return 1 / (hits.index(True) + 1) if any(hits) else 0.0
    if name == "map":
        return sum(sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit) / relevant
    return sum(hits) / (relevant if name == "recall" else int(cutoff))


def test_a_worked_example() -> None:
    # Documents 0 to 5 have the grades 3, 0, 1, 2, 0, 1; four of them are relevant. The ranking is 4, 3, 0, 1, 2.
    grades = csr_array([[3, 0, 1, 2, 0, 1]])
    values = ranking_metrics([[4, 3, 0, 1, 2]], grades, ("ndcg@3", "mrr@10", "map", "recall@3", "precision@3")).loc[0]
    # Gains 0, 3, 7 at ranks 1, 2, 3; best 7, 3, 1.
    dcg, ideal = 3 / math.log2(3) + 7 / 2, 7 + 3 / math.log2(3) + 1 / 2
    assert values["ndcg@3"] == pytest.approx(dcg / ideal)
    assert values["mrr@10"] == pytest.approx(1 / 2)
    assert values["map"] == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 4)
    assert values["recall@3"] == pytest.approx(2 / 4)
    assert values["precision@3"] == pytest.approx(2 / 3)
    linear = ranking_metrics([[4, 3, 0, 1, 2]], grades, ("ndcg@3",), gains="linear").loc[0, "ndcg@3"]
    assert linear == pytest.approx((2 / math.log2(3) + 3 / 2) / (3 + 2 / math.log2(3) + 1 / 2))


@pytest.mark.parametrize("gains", ["exponential", "linear"])
@pytest.mark.parametrize("depth", [1, 4, 30])
def test_metrics_are_their_definitions_on_random_rankings(gains: Any, depth: int, monkeypatch: Any) -> None:
    generator = np.random.default_rng(depth)
    grades = generator.integers(1, 5, (40, 30)) * (generator.random((40, 30)) < 0.15)
    grades[3] = 0
    documents = np.argsort(generator.random((40, 30)), axis=1)[:, :depth]
    for row, length in enumerate(generator.integers(0, depth + 1, 40)):
        documents[row, length:] = -1
    # Groups of a few queries.
    monkeypatch.setattr(ranking, "PLACES", 7 * depth)
    frame = ranking_metrics(documents, csr_array(grades), EVERYTHING, gains=gains)
    assert list(frame.columns) == list(EVERYTHING)
    assert frame.index.tolist() == list(range(40))
    for row, metric in itertools.product(range(40), EVERYTHING):
        ranked = [document for document in documents[row].tolist() if document >= 0]
        assert frame.loc[row, metric] == pytest.approx(naive(ranked, grades[row].tolist(), metric, gains)), metric
    assert frame.loc[3].tolist() == [0.0] * len(EVERYTHING)


def test_a_cutoff_of_the_reciprocal_rank_takes_its_own_rank_in() -> None:
    documents = np.tile(np.arange(12), (12, 1))
    values = ranking_metrics(documents, csr_array(np.eye(12, dtype=int)), ("mrr@10", "mrr"))
    np.testing.assert_allclose(values["mrr@10"], [*(1 / np.arange(1, 11)), 0, 0])
    np.testing.assert_allclose(values["mrr"], 1 / np.arange(1, 13))


def test_order_among_ten_thousand_places_is_kept() -> None:
    documents = np.random.default_rng(0).permutation(20_000)[None]
    grades = np.zeros((1, 20_000), dtype=int)
    grades[0, documents[0, 12_345]] = 1
    assert ranking_metrics(documents, csr_array(grades), ("mrr",)).loc[0, "mrr"] == pytest.approx(1 / 12_346)


def test_edges() -> None:
    grades = csr_array([[1, 0], [0, 0], [0, 1]])
    none = ranking_metrics(np.full((3, 2), -1), grades, EVERYTHING)
    assert not none.to_numpy().any()
    assert ranking_metrics(np.empty((3, 0), int), grades, ("map",))["map"].tolist() == [0, 0, 0]
    assert ranking_metrics(np.empty((0, 2), int), csr_array((0, 5), dtype=int), ("map",)).shape == (0, 1)
    # Judged not relevant, but stored, is as not judged; bool counts as grade 1.
    stored = csr_array((np.array([1, 0, 1]), (np.array([0, 1, 2]), np.array([0, 0, 1]))), shape=(3, 2))
    first = ranking_metrics([[0, 1]] * 3, stored, EVERYTHING)
    assert first.equals(ranking_metrics([[0, 1]] * 3, grades.astype(bool), EVERYTHING))
    assert first["precision@5"].tolist() == [0.2, 0, 0.2]
    assert stored.nnz == 3


@pytest.mark.parametrize(
    ("documents", "grades", "options", "message"),
    [
        ([[0, 0]], [[1, 0]], {}, "query 0 lists a document twice"),
        ([[-1, 0]], [[1, 0]], {}, "query 0 has a gap"),
        ([[2]], [[1, 0]], {}, "between 0 and 1"),
        ([[-2]], [[1, 0]], {}, "between 0 and 1"),
        ([[0.5]], [[1, 0]], {}, r"whole numbers \[Q, k\]"),
        ([[0], [1]], [[1, 0]], {}, "rankings of 2 queries, but grades of 1"),
        ([[0]], [[-1, 0]], {}, "between 0 and 30"),
        ([[0]], [[31, 0]], {}, "between 0 and 30"),
        ([[0]], [[0.5, 0]], {}, "between 0 and 30"),
        ([[0]], [[1, 0]], {"metrics": ("ndgc@10",)}, "no metric 'ndgc@10'"),
        ([[0]], [[1, 0]], {"metrics": ("recall",)}, "no metric 'recall'"),
        ([[0]], [[1, 0]], {"metrics": ("mrr@0",)}, "no metric 'mrr@0'"),
        ([[0]], [[1, 0]], {"gains": "squared"}, "exponential or linear, not 'squared'"),
    ],
)
def test_what_is_no_ranking_is_refused(documents: Any, grades: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ranking_metrics(documents, csr_array(grades), **options)


def test_sign_changes_of_few_queries_are_enumerated() -> None:
    differences = [0.3, 0.1, -0.2, 0.4, 0.0]
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=5)]
    expected = np.mean([total >= 0.6 - 1e-12 for total in sums])
    assert paired_permutation_test(differences) == pytest.approx(expected)
    # All of one sign: only the two extreme sets of signs are as far from 0.
    assert paired_permutation_test([0.1] * 8) == pytest.approx(2 / 256)
    assert paired_permutation_test([0.0, 0.0]) == 1.0


def test_sign_changes_of_many_queries_are_drawn(monkeypatch: Any) -> None:
    generator = np.random.default_rng(0)
    differences = generator.normal(0.15, 1, 200)
    p_value = paired_permutation_test(differences, num_permutations=4000)
    # Many queries: the mean of signed differences is normal.
    z = abs(differences.sum()) / math.sqrt((differences**2).sum())
    assert p_value == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)
    monkeypatch.setattr(ranking, "CHUNK", 200 * 300)
    assert paired_permutation_test(differences, num_permutations=4000) == p_value
    assert paired_permutation_test(differences + 3, num_permutations=99) == 0.01
    assert paired_permutation_test(differences, seed=1, num_permutations=4000) != p_value


def test_false_alarms_are_as_many_as_promised() -> None:
    generator = np.random.default_rng(1)
    p_values = [paired_permutation_test(generator.normal(size=10)) for _ in range(400)]
    assert 0.02 < np.mean(np.array(p_values) <= 0.05) < 0.09


def test_seeds_are_averaged_before_queries_are_permuted() -> None:
    differences = np.random.default_rng(0).normal(size=(3, 12))
    assert paired_permutation_test(differences) == paired_permutation_test(differences.mean(axis=0))
    # Five times the same evidence is no more than once.
    assert paired_permutation_test(np.repeat(differences[:1], 5, axis=0)) == paired_permutation_test(differences[0])


@pytest.mark.parametrize("differences", [[0.1], [np.nan, 0.1], np.zeros((2, 2, 2))])
def test_a_test_of_nothing_is_refused(differences: Any) -> None:
    with pytest.raises(UserError, match="at least two queries"):
        paired_permutation_test(differences)
