"""Annotation by a pool by hand, padded lists, and bad collections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array

from shared.config import UserError
from shared.data.retrieval import make_collection

from .. import data
from ..config import KernelRanker, Params, Pooling
from ..data import Prepared, annotate, build, join, load, one_of, padded, save, slot_mask, union

TEXTS = [
    "heat flow in a wing",
    "heat flow",
    "flow over a body with heat and shock",
    "",
    "boundary layer of a wing",
    "shock wave",
    "layer of heat",
    "body and wing",
]
QUERIES = ["heat flow", "shock wave body"]
GRADES = csr_array(np.array([[0, 2, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 3, 0, 1]], dtype=np.int32))


def params(**changes) -> Params:
    return Params.model_validate(
        {
            "seeds": [0],
            "corpus": {"kind": "collections"},
            "pooling": {"depth": 3, "negatives": 4, "reranked": 5, "lsa_dimensions": 3, "folds": 2} | changes,
            "ranker": {"kind": "kernel", "embedding_dimensions": 4},
            "training": {"epochs": 1, "learning_rate": 0.01},
            "experiments": {"weak_pool": {"models": {"plain": ["weak"]}}},
        }
    )


# --- lists ---


def test_padded_lists() -> None:
    assert padded(np.array([2, 0, 2]), np.array([5, 6, 7]), 3).tolist() == [[6, -1], [-1, -1], [5, 7]]
    assert padded(np.array([2, 0, 2]), np.array([5, 6, 7]), 3, width=1).tolist() == [[6], [-1], [5]]
    assert padded(np.array([], int), np.array([], int), 2).tolist() == [[-1], [-1]]


def test_union_of_lists() -> None:
    first, second = np.array([[3, 1], [4, -1]]), np.array([[1, 2, 3], [-1, -1, -1]])
    documents, slots = union([first, second])
    assert documents.tolist() == [[1, 2, 3], [4, -1, -1]]
    assert slots[0].tolist() == [[2, 0], [0, -1]]
    assert slots[1].tolist() == [[0, 1, 2], [-1, -1, -1]]


def test_masks_of_slots() -> None:
    assert slot_mask(np.array([[2, -1], [0, 1]]), 3).tolist() == [[False, False, True], [True, True, False]]


# --- annotation ---


def test_the_label_is_the_highest_ranked_relevant_document_of_the_pool() -> None:
    pool = np.array([[4, 2, 0], [1, 3, -1], [0, -1, -1]])
    relevant = np.array([[True, False, True, False, False], [False, False, True, False, False], [False] * 5])
    generator = np.random.default_rng(0)
    assert one_of(pool, relevant, "highest_ranked", generator).tolist() == [[2], [-1], [-1]]
    drawn = {one_of(pool, relevant, "uniform", generator)[0, 0] for _ in range(30)}
    assert drawn == {0, 2}


def test_a_document_without_a_query_word_is_in_no_pool() -> None:
    """The second query's list of the weak retriever ends early, and pads are no candidates."""
    prepared = build(TEXTS, QUERIES, GRADES, params())
    pooled = [set(prepared.documents[row, prepared.pooled[row]]) for row in range(2)]
    assert pooled[0] == {0, 1, 2}
    assert pooled[1] <= {2, 5, 7}
    for name in ("weak", "bm25", "strong", "dense"):
        assert 3 not in prepared.retrieved[name]  # it is empty


def annotated(label: str = "highest_ranked") -> Prepared:
    lists = {
        "weak": np.array([[0, 2, 1, 6], [7, 5, 2, -1]]),
        "bm25": np.array([[1, 0, 2, 6], [5, 2, 7, -1]]),
        "strong": np.array([[1, 2, 0, 6], [5, 7, 2, -1]]),
        "dense": np.array([[2, 1, 0, 4], [7, 5, 4, 2]]),
        "random": np.array([[4, 5, 6, 7], [0, 1, 3, 4]]),
    }
    pooling = Pooling(depth=2, negatives=3, reranked=4, folds=2, label=label)
    return annotate(lists, GRADES, pooling, np.random.default_rng(0))


def test_annotation_by_hand() -> None:
    prepared = annotated()

    def named(slots: np.ndarray, row: int) -> list[int]:
        return [int(prepared.documents[row, slot]) for slot in slots[row] if slot >= 0]

    assert named(prepared.labels["weak_pool"], 0) == [2]
    assert named(prepared.labels["strong_pool"], 0) == [1]
    assert named(prepared.labels["weak_pool"], 1) == [7]
    assert named(prepared.labels["strong_pool"], 1) == [5]
    assert named(prepared.labels["complete"], 0) == [1, 2]
    assert named(prepared.sources["bm25"], 0) == [1, 0, 2]
    assert named(prepared.reranked, 1) == [5, 2, 7]
    assert {int(d) for d in prepared.documents[0][prepared.pooled[0]]} == {0, 2}
    assert {int(d) for d in prepared.documents[0][prepared.relevant[0]]} == {1, 2}
    assert sorted(prepared.fold.tolist()) == [0, 1]


def test_collections_are_joined() -> None:
    part = annotated()
    features = np.arange(part.documents.size * 2, dtype=np.float32).reshape(*part.documents.shape, 2)
    one = data._with(part, features=features)
    wide = np.concatenate([part.documents, np.full((2, 3), -1)], axis=1)
    spare = np.zeros((2, 3), bool)
    other = data._with(
        one,
        documents=wide,
        relevant=np.concatenate([part.relevant, spare], axis=1),
        pooled=np.concatenate([part.pooled, spare], axis=1),
        features=np.concatenate([features, np.zeros((2, 3, 2), np.float32)], axis=1),
    )
    both = join({"first": one, "second": other})
    assert both.num_queries == 4
    assert both.groups == ("first", "second")
    assert both.group.tolist() == [0, 0, 1, 1]
    assert both.grades.shape == (4, 16)
    width = part.documents.shape[1]
    np.testing.assert_array_equal(both.documents[2:, :width], np.where(part.documents >= 0, part.documents + 8, -1))
    np.testing.assert_array_equal(both.documents[:2, width:], -1)
    np.testing.assert_array_equal(both.grades.toarray()[2:, 8:], GRADES.toarray())
    np.testing.assert_array_equal(both.retrieved["weak"][3], [15, 13, 10, -1])
    np.testing.assert_array_equal(both.relevant[2:, :width], part.relevant)


def test_the_same_collection_is_prepared_in_the_same_way() -> None:
    first, second = (build(TEXTS, QUERIES, GRADES, params()) for _ in range(2))
    np.testing.assert_array_equal(first.features, second.features)
    np.testing.assert_array_equal(first.documents, second.documents)
    assert np.isfinite(first.features).all()


def test_the_strong_retriever_can_be_feedback() -> None:
    prepared = build(TEXTS, QUERIES, GRADES, params(strong="rm3"))
    assert prepared.retrieved["strong"].shape == prepared.retrieved["bm25"].shape


# --- mistakes ---


def test_a_query_to_which_nothing_is_relevant() -> None:
    nothing = csr_array(np.array([[0] * 8, [0, 0, 0, 0, 0, 1, 0, 0]], dtype=np.int32))
    with pytest.raises(UserError, match=r"1 queries have no relevant document, the first is number 0"):
        build(TEXTS, QUERIES, nothing, params())


def test_bad_collections_are_refused_before() -> None:
    documents = {"id": ["a", "b"], "title": ["", ""], "text": ["heat flow", ""]}
    queries = {"id": ["1", "2"], "text": ["heat", "flow"]}

    def qrels(*rows: tuple[str, str, int]) -> dict[str, list]:
        return dict(zip(("query_id", "document_id", "grade"), map(list, zip(*rows, strict=True)), strict=True))

    good = make_collection("x", documents, queries, qrels(("1", "a", 1), ("1", "b", -2)))
    assert good.dropped_queries == ("2",)  # not judged
    assert good.num_junk == 1
    assert good.grades().toarray().tolist() == [[1, 0]]
    with pytest.raises(UserError, match="judged that are not there"):
        make_collection("x", documents, queries, qrels(("1", "c", 1)))
    with pytest.raises(UserError, match="ids must be distinct"):
        make_collection("x", documents | {"id": ["a", "a"]}, queries, qrels(("1", "a", 1)))


def test_files_come_back(tmp_path: Path) -> None:
    prepared = build(TEXTS, QUERIES, GRADES, params())
    prepared.attrs.update(groups=["one"], source="generated: here")
    save(tmp_path / "prepared", prepared)
    again = load(tmp_path)
    np.testing.assert_array_equal(again.features, prepared.features)
    np.testing.assert_array_equal(again.sources["strong"], prepared.sources["strong"])
    np.testing.assert_array_equal(again.grades.toarray(), GRADES.toarray())
    assert again.groups == ("one",)
    assert len(again.attrs["digest"]) == 64
    (tmp_path / "prepared" / "fold.npy").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"prepared is damaged .*: delete it"):
        load(tmp_path)
    with pytest.raises(UserError, match="is missing: run the stage prepare first"):
        load(tmp_path / "nowhere")


def test_several_collections_are_for_the_kernel_ranker() -> None:
    with pytest.raises(UserError, match="give the transformer one of them"):
        join({"a": annotated(), "b": annotated()})


def test_the_ranker_is_the_one_described() -> None:
    assert KernelRanker().embedding_dimensions == 100
    assert KernelRanker().hidden_size == 32
