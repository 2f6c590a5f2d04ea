"""Which pairs are drawn, of which queries, and that all variants of a source see the same ones."""

from __future__ import annotations

import numpy as np
import pytest

from shared.config import UserError

from ..config import CoupledTraining, Variant
from ..data import Prepared
from ..model import Pairs
from ..sampling import Member, Sampler, relevance_of, seed_of, usable

SETTINGS = CoupledTraining(epochs=2, batch_size=4, negatives_per_query=3, learning_rate=0.1)
MEMBERS = (Member(0, 0), Member(2, 0), Member(0, 1))
NUM_QUERIES, NUM_SLOTS = 12, 9


def prepared(seed: int = 0) -> Prepared:
    """Slot 0 is each query's label in the weak pool, apart from query 5; 0 and 1 are relevant."""
    from scipy.sparse import csr_array

    generator = np.random.default_rng(seed)
    shape = (NUM_QUERIES, NUM_SLOTS)
    relevant = np.zeros(shape, bool)
    relevant[:, :2] = True
    label = np.zeros((NUM_QUERIES, 1), np.int64)
    label[5] = -1
    negatives = np.stack([generator.permutation(NUM_SLOTS)[:6] for _ in range(NUM_QUERIES)])
    few = np.full_like(negatives, -1)
    few[:, :2] = [0, 3]
    return Prepared(
        documents=np.arange(NUM_QUERIES * NUM_SLOTS).reshape(shape),
        relevant=relevant,
        pooled=relevant,
        sources={"bm25": negatives, "weak": few, "strong": np.zeros_like(negatives)},
        labels={"weak_pool": label, "complete": np.tile([0, 1], (NUM_QUERIES, 1))},
        reranked=negatives,
        retrieved={},
        grades=csr_array((NUM_QUERIES, NUM_QUERIES * NUM_SLOTS), dtype=np.int32),
        group=np.zeros(NUM_QUERIES, np.int64),
        fold=np.arange(NUM_QUERIES) % 3,
    )


def sampler(
    source: str = "bm25",
    labels: str = "weak_pool",
    variant: Variant | None = None,
    dropped: np.ndarray | None = None,
) -> Sampler:
    return Sampler(prepared(), labels, source, variant or Variant(), SETTINGS, MEMBERS, dropped)


def flat(pairs: Pairs, member: int) -> np.ndarray:
    return np.stack([part[member].reshape(-1).numpy() for part in (pairs.queries, pairs.positives, pairs.negatives)])


def test_pairs_are_of_labeled_queries_outside_of_the_fold() -> None:
    data, pairs = prepared(), sampler().epoch(0)
    for number, member in enumerate(MEMBERS):
        queries, positives, negatives = flat(pairs, number)
        trained = {q for q in range(NUM_QUERIES) if data.fold[q] != member.fold and q != 5}
        assert set(queries) == trained
        assert not positives.any()
        assert negatives.min() > 0
        assert all(negative in data.sources["bm25"][query] for query, negative in zip(queries, negatives, strict=True))


def test_negatives_of_a_query_do_not_repeat_within_an_epoch() -> None:
    queries, _, negatives = flat(sampler().epoch(0), 0)
    size = len(set(queries)) * 3
    drawn = {(query, negative) for query, negative in zip(queries[:size], negatives[:size], strict=True)}
    assert len(drawn) == size


def test_members_take_the_same_number_of_steps() -> None:
    """Fold 0 leaves 7 labeled queries, fold 2 leaves 8: the former see some pairs once more."""
    each = sampler()
    assert [len(queries) for queries in each.queries] == [7, 8, 7]
    pairs = each.epoch(0)
    assert pairs.queries.shape == (3, 6, 4)
    whole, twice = flat(pairs, 0)[:, :21], flat(pairs, 0)[:, 21:]
    np.testing.assert_array_equal(twice, whole[:, :3])


def test_epochs_differ_unless_negatives_are_fixed() -> None:
    def drawn(variant: Variant, epoch: int) -> set[tuple[int, ...]]:
        return {tuple(pair) for pair in flat(sampler(variant=variant).epoch(epoch), 0).T}

    assert drawn(Variant(), 0) != drawn(Variant(), 1)
    fixed = Variant(refresh=False)
    assert drawn(fixed, 0) == drawn(fixed, 1) == drawn(Variant(), 0)
    first, second = (flat(sampler(variant=fixed).epoch(epoch), 0) for epoch in (0, 1))
    assert not np.array_equal(first, second)  # the order differs


def test_variants_of_a_source_see_the_same_pairs_and_seeds_do_not() -> None:
    plain, coupled = (sampler(variant=variant).epoch(1) for variant in (Variant(), Variant(weights="coupled")))
    np.testing.assert_array_equal(flat(plain, 0), flat(coupled, 0))
    assert not np.array_equal(flat(plain, 0), flat(plain, 2))


def test_the_oracle_draws_no_relevant_document() -> None:
    _, _, negatives = flat(sampler(variant=Variant(drop="relevant")).epoch(0), 0)
    assert negatives.min() > 1
    assert flat(sampler().epoch(0), 0)[2].min() == 1


def test_complete_labels_are_all_positives_and_no_negatives() -> None:
    _, positives, negatives = flat(sampler(labels="complete").epoch(0), 1)
    assert set(positives) == {0, 1}
    assert negatives.min() > 1


def test_what_is_dropped_is_not_drawn() -> None:
    dropped = np.zeros((3, NUM_QUERIES, 6), bool)
    dropped[1, :, 1:] = True
    left = prepared().sources["bm25"][:, 0]
    pairs = sampler(dropped=dropped).epoch(0)
    queries, _, negatives = flat(pairs, 1)
    np.testing.assert_array_equal(negatives, left[queries])
    # A query whose only candidate is its label has no pair.
    assert 0 not in left[queries]
    assert len(set(flat(pairs, 0)[2])) > 3


def test_few_candidates_are_drawn_again() -> None:
    queries, _, negatives = flat(sampler("weak").epoch(0), 0)
    assert set(negatives) == {3}
    assert len(queries) >= 21


def test_candidates_that_are_only_labels() -> None:
    with pytest.raises(UserError, match=r"no query with a label \(weak_pool\) and a negative \(strong\)"):
        Sampler(
            Prepared(**vars(prepared()) | {"labels": {"weak_pool": np.zeros((NUM_QUERIES, 1), np.int64)}}),
            "weak_pool",
            "strong",
            Variant(),
            SETTINGS,
            MEMBERS,
        )


def test_what_can_be_a_negative() -> None:
    data = prepared()
    assert usable(data, "weak_pool", "weak")[:, :3].tolist()[0] == [False, True, False]
    assert usable(data, "weak_pool", "weak")[5, 0]  # not labeled
    np.testing.assert_array_equal(relevance_of(data, "bm25"), data.sources["bm25"] < 2)


def test_seeds_are_functions_of_their_parts() -> None:
    assert seed_of("a", 1) == seed_of("a", 1) != seed_of("a", 2)
    assert 0 <= seed_of("a", 1) < 2**63
