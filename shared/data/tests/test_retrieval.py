from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.config import UserError
from shared.data.retrieval import (
    COLLECTIONS,
    PAD,
    Candidates,
    Collection,
    Index,
    LatentSemanticIndex,
    Vocabulary,
    build_vocabulary,
    coordination_match,
    coordination_of,
    encode,
    load_collection,
    make_collection,
    mix,
    ppmi_embeddings,
    read_beir,
    read_candidates,
    read_msmarco,
    read_run,
    read_trec_qrels,
    read_triples,
    rm3,
    rm3_queries,
    top_candidates,
    write_candidates,
    write_run,
)
from shared.data.retrieval import formats as formats_module
from shared.data.retrieval import index as index_module

WORDS = ["wing", "flow", "shock", "wave", "heat", "plate", "layer", "jet", "body", "nose", "drag", "lift"]


def random_texts(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Texts of up to `longest` words, frequent and rare ones; some are empty."""
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, len(WORDS) + 1)
    lengths = generator.integers(0, longest + 1, count)
    return [" ".join(generator.choice(WORDS, length, p=share / share.sum())) for length in lengths]


def lists(candidates: Candidates) -> list[list[tuple[int, float]]]:
    """Documents and scores of each query, without pads."""
    return [
        [(int(d), float(s)) for d, s in zip(documents, scores, strict=True) if d != PAD]
        for documents, scores in zip(candidates.documents, candidates.scores, strict=True)
    ]


def bm25(texts: list[str], query: str, k1: float, b: float, variant: str) -> np.ndarray:
    """BM25 of one query, document by document, from the formula."""
    documents = [Counter(text.split()) for text in texts]
    mean = sum(map(Counter.total, documents)) / len(documents)
    scores = np.zeros(len(texts))
    for word in query.split():
        df = sum(word in document for document in documents)
        odds = (len(texts) - df + 0.5) / (df + 0.5)
        idf = {
            "lucene": math.log(1 + odds),
            "robertson": max(0.0, math.log(odds)),
            "atire": (k1 + 1) * math.log(len(texts) / max(df, 1)),
        }[variant]
        for row, document in enumerate(documents):
            norm = k1 * (1 - b + b * document.total() / mean)
            scores[row] += idf * document[word] / (document[word] + norm) if document[word] else 0
    return scores


# ------------------------------------------------------------------------------------------------------------ words


def test_text_becomes_lowercase_stems_without_stop_words_and_single_letters() -> None:
    vocabulary = build_vocabulary(["The FLOWS were flowing: a wing's wings, naïve Übung x_1 42."])
    assert vocabulary.words == ("", "42", "flow", "naïv", "were", "wing", "x_1", "übung")
    plain = build_vocabulary(["The flows of the wing"], stem=False, remove_stopwords=False)
    assert plain.words == ("", "flows", "of", "the", "wing")


def test_a_vocabulary_keeps_frequent_words_and_the_first_of_equals() -> None:
    texts = ["wave wave heat", "jet heat wave", "body"]
    assert build_vocabulary(texts, min_count=2).words == ("", "heat", "wave")
    assert build_vocabulary(texts, max_size=3).words == ("", "bodi", "heat", "wave")
    assert build_vocabulary(["", "the"]).words == ("",)


def test_encoding_pads_cuts_and_leaves_unknown_words_out() -> None:
    vocabulary = build_vocabulary(["heat jet wave"])
    encoded = encode(["the wave, unknown heat", "", "jets and jet and jet and waves"], vocabulary, 3)
    assert encoded.dtype == np.int32
    assert encoded.tolist() == [[3, 1, 0], [0, 0, 0], [2, 2, 2]]
    assert encode([], vocabulary, 4).shape == (0, 4)
    with pytest.raises(UserError, match=r"length, .* at least 1, not 0"):
        encode(["wave"], vocabulary, 0)
    with pytest.raises(UserError, match="a list of texts, not one text"):
        encode("wave", vocabulary, 3)
    with pytest.raises(UserError, match="start with ''"):
        Vocabulary(("wave",))


def test_embeddings_factor_the_ppmi_matrix() -> None:
    texts = random_texts(40)
    vocabulary = build_vocabulary(texts)
    encoded = encode(texts, vocabulary, 25)
    window, smoothing, size = 3, 0.75, len(vocabulary)
    counts = np.zeros((size, size))
    for row in encoded:
        numbers = row[row > 0]
        for place, number in enumerate(numbers):
            for other in numbers[max(0, place - window) : place]:
                counts[number, other] += 1
                counts[other, number] += 1
    context = counts.sum(axis=0) ** smoothing
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(counts / counts.sum(axis=1, keepdims=True) / (context / context.sum()))
    ppmi = np.maximum(np.nan_to_num(information, neginf=0), 0)
    strengths = np.linalg.svd(ppmi, compute_uv=False)

    dimensions = 6
    options: dict[str, Any] = {"window": window, "dimensions": dimensions, "smoothing": smoothing}
    embeddings = ppmi_embeddings(encoded, vocabulary, **options)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (size, dimensions)
    # U Σ^½ has the gram matrix Σ, in the space of the best rank-6 approximation of the matrix.
    np.testing.assert_allclose(embeddings.T @ embeddings, np.diag(strengths[:dimensions]), atol=1e-4)
    basis = embeddings / np.sqrt(strengths[:dimensions])
    assert np.linalg.norm(ppmi - basis @ basis.T @ ppmi) == pytest.approx(
        np.linalg.norm(strengths[dimensions:]), rel=1e-4
    )
    assert not embeddings[0].any()
    again = ppmi_embeddings(encoded, vocabulary, **options)
    np.testing.assert_array_equal(embeddings, again)


def test_words_do_not_cooccur_across_texts() -> None:
    texts = ["heat jet", "jet heat", "wave nose", "nose wave"] * 3
    vocabulary = build_vocabulary(texts)
    embeddings = ppmi_embeddings(texts, vocabulary, window=50, dimensions=4)
    encoded = encode(texts, vocabulary, 9)
    np.testing.assert_array_equal(embeddings, ppmi_embeddings(encoded, vocabulary, window=50, dimensions=4))
    heat, wave = (embeddings[vocabulary.numbers[word]] for word in ("heat", "wave"))
    assert abs(heat @ wave) < 1e-6 < heat @ heat
    alone = ppmi_embeddings(["heat", "jet", "wave"], build_vocabulary(["heat jet wave"]), dimensions=2)
    assert not alone.any()


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["heat jet"], {"dimensions": 3}, "between 1 and 2"),
        (["heat jet"], {"window": 0, "dimensions": 1}, "window must be at least 1"),
        (np.array([[9]]), {"dimensions": 1}, "word number 9 is not in the vocabulary of 3"),
        (np.array([1.0]), {"dimensions": 1}, "must be integers"),
    ],
)
def test_embeddings_refuse(texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ppmi_embeddings(texts, build_vocabulary(["heat jet"]), **options)


# ------------------------------------------------------------------------------------------------------- candidates


def test_ties_go_to_the_smaller_number_and_excluded_documents_stay_out() -> None:
    scores = np.array([[1, 3, 1, 3, 1], [-np.inf, 0, -np.inf, -1, -np.inf], [-np.inf] * 5], np.float32)
    best = top_candidates(scores, 3)
    assert lists(best) == [[(1, 3), (3, 3), (0, 1)], [(1, 0), (3, -1)], []]
    assert best.lengths.tolist() == [3, 2, 0]
    assert best.documents[1].tolist() == [1, 3, PAD]
    assert best.head(1).documents.tolist() == [[1], [1], [PAD]]


@pytest.mark.parametrize("k", [1, 7, 50, 60])
def test_the_best_are_those_of_a_full_sort(k: int) -> None:
    scores = np.random.default_rng(k).integers(0, 9, (20, 50)).astype(np.float32)
    best = top_candidates(scores, k)
    for row, documents in enumerate(best.documents):
        expected = sorted(range(50), key=lambda document: (-scores[row, document], document))[:k]
        assert documents[: len(expected)].tolist() == expected
        assert (documents[len(expected) :] == PAD).all()


@pytest.mark.parametrize(
    ("documents", "scores"),
    [
        ([[0, 1]], [[1.0, 2.0]]),
        ([[0, -1]], [[1.0, 0.5]]),
        ([[-1, 0]], [[-np.inf, 0.5]]),
        ([[0, -2]], [[1.0, -np.inf]]),
        ([[0, 1]], [[np.nan, 1.0]]),
        ([[0, 1]], [[1.0]]),
        ([0], [1.0]),
    ],
)
def test_candidates_that_are_no_ranking_are_refused(documents: Any, scores: Any) -> None:
    with pytest.raises(UserError):
        Candidates(np.array(documents, np.int64), np.array(scores, np.float32))


def test_candidates_come_back_from_their_file(tmp_path: Path) -> None:
    candidates = top_candidates(np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32), 12)
    for part in (candidates, Candidates(candidates.documents[:0], candidates.scores[:0])):
        write_candidates(tmp_path / "a" / "list.parquet", part)
        read = read_candidates(tmp_path / "a" / "list.parquet")
        np.testing.assert_array_equal(read.documents, part.documents)
        np.testing.assert_array_equal(read.scores, part.scores)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["list.parquet"]


def test_files_that_hold_no_candidates_are_told(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "list.parquet"
    with pytest.raises(UserError, match="is missing"):
        read_candidates(path)
    path.write_text("no parquet")
    with pytest.raises(UserError, match="not a Parquet file"):
        read_candidates(path)
    pq.write_table(pa.table({"documents": [1]}), path)
    with pytest.raises(UserError, match="holds no candidates"):
        read_candidates(path)


def test_a_mix_adds_scores_scaled_within_each_query() -> None:
    a = Candidates(np.array([[5, 2, 0], [1, PAD, PAD]]), np.array([[8, 6, 4], [7, -np.inf, -np.inf]], np.float32))
    b = Candidates(np.array([[0, 3], [PAD, PAD]]), np.array([[0.9, -0.1], [-np.inf, -np.inf]], np.float32))
    # Scaled: 5 → 1, 2 → ½, 0 → 0 in the first list; 0 → 1, 3 → 0 in the second.
    mixed = mix(a, b, 0.25)
    assert lists(mixed) == [[(5, 0.75), (2, 0.375), (0, 0.25)], [(1, 0.75)]]
    assert lists(mix(a, b, 0.25, k=4))[0][3] == (3, 0.0)
    assert mix(a, b, 0.0).documents[0].tolist() == [5, 2, 0]
    assert mix(a, b, 1.0, k=1).documents[0].tolist() == [0]
    with pytest.raises(UserError, match="between 0"):
        mix(a, b, 1.5)
    with pytest.raises(UserError, match="same queries, but there are 2 and 1"):
        mix(a, top_candidates(np.ones((1, 3)), 2))


# ------------------------------------------------------------------------------------------------------------ BM25


def test_bm25_by_hand() -> None:
    index = Index(["wing flow", "flow flow flow heat", "", "the jet"], k1=1.2, b=0.75)
    # Four documents of 2, 4, 0 and 1 words: mean 1.75. "flow" is in two of them, "wing" in one.
    flow, wing = math.log(1 + 2.5 / 2.5), math.log(1 + 3.5 / 1.5)
    norm = [1.2 * (0.25 + 0.75 * length / 1.75) for length in (2, 4)]
    expected = [flow / (1 + norm[0]) + wing / (1 + norm[0]), flow * 3 / (3 + norm[1]), 0, 0]
    np.testing.assert_allclose(index.scores(["wings flowing"])[0], expected, rtol=1e-6)
    assert index.search(["wings flowing"], 4).documents.tolist() == [[0, 1, PAD, PAD]]


@pytest.mark.parametrize("variant", ["lucene", "robertson", "atire"])
def test_bm25_is_the_formula_summed_pair_by_pair(variant: Any) -> None:
    texts, queries = random_texts(60), random_texts(15, seed=1, longest=6)
    index = Index(texts, k1=0.9, b=0.4, variant=variant, stem=False)
    scores = index.scores(queries)
    assert scores.dtype == np.float32
    for row, query in enumerate(queries):
        np.testing.assert_allclose(scores[row], bm25(texts, query, 0.9, 0.4, variant), rtol=1e-5, atol=1e-6)


def test_bm25_is_that_of_bm25s() -> None:
    import bm25s

    texts, query = random_texts(80), "wing nose nose lift"
    reference = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
    reference.index([text.split() for text in texts], show_progress=False)
    np.testing.assert_allclose(Index(texts, stem=False).scores([query])[0], reference.get_scores(query.split()), 1e-5)


def test_groups_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, queries = random_texts(50), random_texts(30, seed=1, longest=5)
    index, latent = Index(texts), LatentSemanticIndex(texts, dimensions=5)
    chosen = np.random.default_rng(0).integers(-1, 50, (30, 4))

    def everything() -> list[np.ndarray]:
        found = [
            index.search(queries, 9),
            coordination_match(index, queries, 9),
            coordination_match(index, queries, 9, seed=3),
            rm3(index, queries, 9),
            latent.search(queries, 9),
        ]
        scores = [index.scores_of(queries, chosen), coordination_of(index, queries, chosen)]
        return [*(part.documents for part in found), *(part.scores for part in found), *scores]

    whole = everything()
    monkeypatch.setattr(index_module, "CHUNK", 7 * 50)
    for one, other in zip(whole, everything(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_scores_of_chosen_documents_are_those_of_all() -> None:
    texts, queries = random_texts(40), random_texts(8, seed=1, longest=5)
    index = Index(texts)
    chosen = np.random.default_rng(0).integers(0, 40, (8, 6))
    scores = index.scores_of(queries, chosen)
    np.testing.assert_array_equal(scores, np.take_along_axis(index.scores(queries), chosen, axis=1))
    chosen[:, 2] = PAD
    assert not index.scores_of(queries, chosen)[:, 2].any()
    with pytest.raises(UserError, match="between 0 and 39"):
        index.scores_of(queries, chosen + 20)
    with pytest.raises(UserError, match="Q = 8"):
        index.scores_of(queries, chosen[1:])


def test_queries_without_a_known_word_find_nothing() -> None:
    texts = ["wing flow", "heat"]
    index = Index(texts)
    unknown = ["zeppelin", "the of", ""]
    for found in (
        index.search(unknown, 3),
        coordination_match(index, unknown, 3, seed=0),
        rm3(index, unknown, 3),
        LatentSemanticIndex(texts, dimensions=1).search(unknown, 3),
    ):
        assert (found.documents == PAD).all()
    assert index.search([], 3).documents.shape == (0, 3)
    assert rm3(index, [], 3).documents.shape == (0, 3)
    assert LatentSemanticIndex(texts, dimensions=1).search([], 3).documents.shape == (0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k1": -1}, "k1 ≥ 0"), ({"b": 2}, "b between 0 and 1"), ({"variant": "bm25l"}, "no BM25 variant 'bm25l'")],
)
def test_an_index_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Index(["wing"], **options)


def test_what_cannot_be_searched_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="none of the 2 documents has a word"):
        Index(["", "the"])
    index = Index(["wing"])
    with pytest.raises(UserError, match="at least 1, not 0"):
        index.search(["wing"], 0)
    with pytest.raises(UserError, match="not one text"):
        index.search("wing", 1)
    monkeypatch.setattr(index_module, "LARGEST", 1)
    with pytest.raises(UserError, match="2 queries and 1 documents at once"):
        index.scores(["wing", "wing"])


# ------------------------------------------------------------------------------------- coordination, feedback, latent


def test_coordination_counts_distinct_words() -> None:
    index = Index(["wing wing wing", "wing flow", "flow", "wing flow heat"])
    found = coordination_match(index, ["wing wing flows of heat"], 4)
    assert lists(found) == [[(3, 3), (1, 2), (0, 1), (2, 1)]]
    assert coordination_of(index, ["wing wing flows of heat"], np.array([[0, 3, PAD]])).tolist() == [[1, 3, 0]]


def test_ties_of_coordination_are_broken_at_random_by_a_seed() -> None:
    index = Index(["wing"] * 40 + ["wing flow"])
    first = coordination_match(index, ["wing flow"] * 50, 10, seed=1)
    assert (first.documents[:, 0] == 40).all()
    np.testing.assert_array_equal(first.scores, np.repeat([[2.0, *[1.0] * 9]], 50, axis=0))
    np.testing.assert_array_equal(first.documents, coordination_match(index, ["wing flow"] * 50, 10, seed=1).documents)
    assert len(np.unique(first.documents[:, 1])) > 15


def test_rm3_is_its_formula_word_by_word() -> None:
    texts, queries = random_texts(50), ["wing nose", "lift lift heat", "drag"]
    index = Index(texts, stem=False)
    num_documents, num_terms, weight = 4, 5, 0.3
    documents = [Counter(text.split()) for text in texts]
    expected = np.zeros((len(queries), len(index.vocabulary)))
    for row, query in enumerate(queries):
        scores = bm25(texts, query, 1.2, 0.75, "lucene")
        feedback = sorted(range(50), key=lambda d: (-scores[d], d))[:num_documents]
        model: Counter[str] = Counter()
        for d in feedback:
            for word, count in documents[d].items():
                model[word] += count / documents[d].total() * scores[d] / scores[feedback].sum()
        kept = dict(model.most_common(num_terms))
        for word, value in kept.items():
            expected[row, index.vocabulary.numbers[word]] += (1 - weight) * value / sum(kept.values())
        for word, count in Counter(query.split()).items():
            expected[row, index.vocabulary.numbers[word]] += weight * count / len(query.split())
    options = {"feedback_documents": num_documents, "feedback_terms": num_terms, "weight": weight}
    np.testing.assert_allclose(rm3_queries(index, queries, **options).toarray(), expected, atol=1e-6)
    ranked = rm3(index, queries, 10, **options)
    np.testing.assert_array_equal(
        ranked.documents, top_candidates(np.where((s := expected @ index.weights) > 0, s, -np.inf), 10).documents
    )


def test_rm3_with_all_weight_on_the_query_is_bm25() -> None:
    texts, queries = random_texts(50), random_texts(9, seed=1, longest=5)
    index = Index(texts)
    np.testing.assert_array_equal(rm3(index, queries, 8, weight=1).documents, index.search(queries, 8).documents)
    with pytest.raises(UserError, match="between 0"):
        rm3(index, queries, 8, weight=-0.1)
    with pytest.raises(UserError, match="feedback_terms"):
        rm3(index, queries, 8, feedback_terms=0)


def test_latent_cosines_are_those_of_the_whole_decomposition() -> None:
    texts, queries = random_texts(40), ["wing nose", "zeppelin", "lift lift heat"]
    latent = LatentSemanticIndex(texts, dimensions=4, stem=False)
    numbers = latent.vocabulary.numbers

    def frequencies(each: list[str]) -> np.ndarray:
        counts = np.zeros((len(each), len(numbers)))
        for row, text in enumerate(each):
            for word, count in Counter(text.split()).items():
                if word in numbers:
                    counts[row, numbers[word]] = 1 + math.log(count)
        return counts

    tf = frequencies(texts)
    idf = 1 + np.log((1 + len(texts)) / (1 + (tf > 0).sum(axis=0)))

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    weighted = unit(tf * idf)
    axes = np.linalg.svd(weighted, full_matrices=False)[2][:4]
    expected = unit(unit(frequencies(queries) * idf) @ axes.T) @ unit(weighted @ axes.T).T
    scores = latent.scores(queries)
    filled = np.array([bool(text) for text in texts])
    np.testing.assert_allclose(scores[::2][:, filled], expected[::2][:, filled], atol=1e-4)
    assert (scores[1] == -np.inf).all()
    assert (scores[:, ~filled] == -np.inf).all()
    assert not filled.all()
    best = latent.search(queries, 5)
    np.testing.assert_array_equal(best.documents, top_candidates(scores, 5).documents)


def test_latent_semantics_match_without_a_common_word() -> None:
    texts = ["car engine", "automobile engine", "flower garden", "garden rose"] * 3
    scores = LatentSemanticIndex(texts, dimensions=2).scores(["car"])[0]
    assert scores[1] > 0.9
    assert scores[2] < 0.1
    with pytest.raises(UserError, match="between 1 and 6 for 12 documents of 6 distinct words, not 7"):
        LatentSemanticIndex(texts, dimensions=7)


def everything_found() -> str:
    texts, queries = random_texts(60), random_texts(9, seed=1, longest=6)
    index = Index(texts)
    found = (index.search(queries, 9), rm3(index, queries, 9), coordination_match(index, queries, 9, seed=0))
    return repr([(each.documents.tolist(), each.scores.tolist()) for each in found])


def test_retrieval_is_the_same_in_every_process() -> None:
    # Sets of strings have another order there.
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    program = "from shared.data.tests.test_retrieval import everything_found; print(everything_found())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == everything_found()


# ------------------------------------------------------------------------------------------------------ collections


def tiny(**changes: Any) -> dict[str, Any]:
    """A collection of three documents and two queries, with some columns changed."""
    columns: dict[str, Any] = {
        "documents": {"id": ["d1", "d2", "d3"], "title": ["Wings", "", ""], "text": ["in flow", "", "heat"]},
        "queries": {"id": ["q1", "q2"], "text": ["wing", "heat"]},
        "qrels": {"query_id": ["q2", "q1", "q1"], "document_id": ["d3", "d1", "d2"], "grade": [1, 2, 0]},
    }
    for key, value in changes.items():
        part, column = key.split("__")
        columns[part] = {**columns[part], column: value}
    return columns


def test_a_collection_in_numbers() -> None:
    collection = make_collection("tiny", **tiny())
    assert collection.texts() == ["Wings in flow", "", "heat"]
    assert collection.query_texts() == ["wing", "heat"]
    assert collection.grades().toarray().tolist() == [[2, 0, 0], [0, 0, 1]]
    assert collection.relevant().toarray().tolist() == [[True, False, False], [False, False, True]]
    assert collection.relevant().nnz == 2
    # An empty document stays in its place.
    assert Index(collection.texts()).search(collection.query_texts(), 2).documents.tolist() == [[0, PAD], [2, PAD]]
    twin = make_collection("tiny", collection.documents, collection.queries, collection.qrels)
    assert twin.documents._fingerprint == collection.documents._fingerprint
    assert make_collection("other", **tiny(documents__text=["", "", "jet"])).documents._fingerprint not in (
        collection.documents._fingerprint,
    )


def test_negative_grades_are_junk_and_counted() -> None:
    collection = make_collection("tiny", **tiny(qrels__grade=[1, 3, -2]))
    assert collection.num_junk == 1
    assert collection.qrels["grade"][:] == [1, 3, 0]
    assert collection.grades().toarray().tolist() == [[3, 0, 0], [0, 0, 1]]


def test_queries_to_which_nothing_is_relevant() -> None:
    columns = tiny(qrels__grade=[-1, 2, 1])
    dropped = make_collection("tiny", **columns)
    assert dropped.dropped_queries == ("q2",)
    assert dropped.queries["id"][:] == ["q1"]
    assert dropped.grades().toarray().tolist() == [[2, 1, 0]]
    assert len(dropped.qrels) == 2
    kept = make_collection("tiny", **columns, queries_without_relevant="keep")
    assert kept.grades().toarray().tolist() == [[2, 1, 0], [0, 0, 0]]
    assert kept.dropped_queries == ()
    with pytest.raises(UserError, match="1 queries have no relevant document: 'q2'"):
        make_collection("tiny", **columns, queries_without_relevant="error")
    with pytest.raises(UserError, match="drop, keep or error, not 'dorp'"):
        make_collection("tiny", **columns, queries_without_relevant="dorp")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not one of the queries"):
        make_collection("tiny", **tiny(qrels__grade=[0, 0, 0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents__id": ["d1", "d2", "d1"]}, "1 documents have an id that others have too: 'd1'"),
        ({"queries__id": ["q1", "q1"]}, "queries have an id that others have too: 'q1'"),
        ({"qrels__document_id": ["d3", "x1", "x2"]}, "2 documents are judged that are not there: 'x1', 'x2'"),
        ({"qrels__query_id": ["q2", "q1", "q9"]}, "1 queries are judged that are not there: 'q9'"),
        ({"qrels__document_id": ["d3", "d1", "d1"]}, "judged twice: 'q1/d1'"),
        ({"queries__text": ["wing", " \t"]}, "1 queries have no text: 'q2'"),
        ({"qrels__grade": [1, None, 1]}, "grade of qrels is missing in 1 rows, first 1"),
        ({"qrels__grade": ["high", "1", "1"]}, "grade of qrels must be int32"),
        ({"documents__text": ["a", None, "b"]}, "text of documents is missing in 1 rows, first 1"),
    ],
)
def test_collections_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_collection("tiny", **tiny(**changes))


def test_a_column_that_lacks_is_named() -> None:
    columns = tiny()
    del columns["queries"]["text"]
    with pytest.raises(UserError, match="queries lack text; they have id"):
        make_collection("tiny", **columns)


def test_many_ids_are_cut_short() -> None:
    with pytest.raises(UserError, match=r"'x0', 'x1', 'x2', 'x3', 'x4' and 3 more; add them"):
        make_collection(
            "tiny",
            **{
                **tiny(),
                "qrels": {"query_id": ["q1"] * 8, "document_id": [f"x{i}" for i in range(8)], "grade": [1] * 8},
            },
        )


# ------------------------------------------------------------------------------------------------- the classic ones


def write_classic(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    documents = [
        {"id": 1, "title": "wing flow .", "text": "wing flow . of a jet", "author": "x"},
        {"id": 2, "title": "", "text": ""},
        {"id": 3, "title": "heat", "text": "shock"},
    ]
    with gzip.open(folder / f"{name}_docs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)
    (folder / f"{name}_queries.tsv").write_text('qid\ttext\n1\twing "flow\n2\theat\n7\t\n')
    (folder / f"{name}_qrels.tsv").write_text("qid\tdocid\tgrade\n1\t1\t4\n1\t3\t1\n2\t3\t1\n")


def test_cranfields_grades_are_turned_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    for name in ("cranfield", "npl"):
        write_classic(tmp_path / "cet", name)
    cranfield = load_collection("cranfield")
    assert cranfield.grades().toarray().tolist() == [[1, 0, 4], [0, 0, 4]]
    assert cranfield.texts() == ["wing flow . of a jet", "", "heat shock"]
    assert cranfield.query_texts() == ['wing "flow', "heat"]
    # An empty query does no harm where it is dropped.
    assert cranfield.dropped_queries == ("7",)
    npl = load_collection("npl")
    assert npl.grades().toarray().tolist() == [[4, 0, 1], [0, 0, 1]]
    with pytest.raises(UserError, match="'7'"):
        load_collection("npl", queries_without_relevant="error")


def test_a_collection_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"cisi_docs\.jsonl\.gz is missing.*REPRISE_DATA"):
        load_collection("cisi")
    with pytest.raises(UserError, match="no collection 'cranfeild'; choose one of cranfield, cisi, cacm, npl"):
        load_collection("cranfeild")


@pytest.fixture(scope="module")
def cranfield() -> Collection:
    try:
        return load_collection("cranfield")
    except UserError as error:
        pytest.skip(str(error))


def test_cranfield_is_what_its_source_says(cranfield: Collection) -> None:
    assert (len(cranfield.documents), len(cranfield.queries), len(cranfield.qrels)) == (1400, 225, 1837)
    assert np.bincount(cranfield.grades().data).tolist() == [0, 363, 734, 387, 353]
    assert [i for i, text in enumerate(cranfield.texts()) if not text] == [470, 994]
    assert cranfield.dropped_queries == ()


def test_a_better_retriever_finds_more_in_cranfield(cranfield: Collection) -> None:
    """P@10 in the order that is known: coordination level, BM25, BM25 with feedback."""
    index, queries = Index(cranfield.texts()), cranfield.query_texts()
    relevant = cranfield.relevant().toarray()
    weak, strong, feedback = (
        np.take_along_axis(relevant, found.documents, axis=1).mean()
        for found in (coordination_match(index, queries, 10), index.search(queries, 10), rm3(index, queries, 10))
    )
    assert 0.15 < weak < 0.20
    assert 0.28 < strong < 0.32
    assert strong < feedback < 0.36


@pytest.mark.parametrize(
    ("name", "sizes"),
    list(zip(COLLECTIONS, [(1400, 225, 1837), (1460, 76, 3114), (3204, 52, 796), (11426, 93, 2083)], strict=True)),
)
def test_the_four_collections(name: str, sizes: tuple[int, int, int]) -> None:
    try:
        collection = load_collection(name)
    except UserError as error:
        pytest.skip(str(error))
    assert (len(collection.documents), len(collection.queries), len(collection.qrels)) == sizes
    assert collection.relevant().nnz == sizes[2]


# ------------------------------------------------------------------------------------------------------------ files


def write_beir(folder: Path) -> None:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "Wings", "text": "in\\u2028 flow", "metadata": {"url": 1}}\n\n'
        '{"_id": "d2", "text": "heat"}\r\n{"_id": "d3", "title": null, "text": ""}'
    )
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "wing"}\n{"_id": "q2", "text": "heat"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t-1\n")


def test_beir(tmp_path: Path) -> None:
    write_beir(tmp_path / "scifact")
    collection = read_beir(tmp_path / "scifact")
    assert collection.name == "scifact/test"
    assert collection.texts() == ["Wings in\u2028 flow", "heat", ""]
    assert collection.grades().toarray().tolist() == [[2, 0, 0]]
    assert (collection.dropped_queries, collection.num_junk) == (("q2",), 1)
    with pytest.raises(UserError, match=r"dev\.tsv is missing"):
        read_beir(tmp_path / "scifact", "dev")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "corpus.jsonl",
            '{"_id": "d1", "text": "a"}\n\n{"_id": "d2" "text": "b"}\n',
            r"corpus\.jsonl, line 3 is not JSON",
        ),
        (
            "corpus.jsonl",
            '{"_id": "d1", "text": "a"}\n{"_id": 2, "text": "b"}\n',
            "line 2: '_id' must be text, but is 2",
        ),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d2"}\n', "line 2: 'text' must be text, but is missing"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n["d2"]\n', "line 2: expected an object with _id, text, title"),
        ("qrels/test.tsv", "h\th\th\nq1\td1\n", r"test\.tsv, line 2: expected 3 columns between tabs .*, not 2"),
        ("qrels/test.tsv", "h\th\th\nq1\td1\t1\n\nq1\td2\thigh\n", "line 4: grade must be a whole number, not 'high'"),
        ("qrels/test.tsv", "h\th\th\nq1\td1\t1.5\n", "line 2: grade must be a whole number, not '1.5'"),
        ("qrels/test.tsv", b"h\th\th\nq1\td1\t1\nq\xff\td1\t1\n", "line 3 is not UTF-8"),
    ],
)
def test_lines_that_are_wrong_are_named(tmp_path: Path, file: str, content: str | bytes, message: str) -> None:
    write_beir(tmp_path / "beir")
    (tmp_path / "beir" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_beir(tmp_path / "beir")


def write_msmarco(folder: Path, num_passages: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    passages = ['The "wing" of, a', "heat", "jet flow", *(f"passage {n} é" for n in range(3, num_passages))]
    with gzip.open(folder / "collection.tsv.gz", "wt", encoding="utf-8") as file:
        file.writelines(f"{number}\t{passage}\n" for number, passage in enumerate(passages))
    (folder / "queries.dev.small.tsv").write_text("1048585\twhat is paula\n2\twing's flow\n3\tunjudged\n")
    (folder / "qrels.dev.small.tsv").write_text("1048585\t0\t0\t1\n2\t0\t2\t1\n2\t0\t0\t1\n")


def test_msmarco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_msmarco(tmp_path / "msmarco", num_passages=40)
    whole = read_msmarco(tmp_path / "msmarco", "dev.small")
    assert whole.texts()[:3] == ['The "wing" of, a', "heat", "jet flow"]
    assert whole.dropped_queries == ("3",)
    assert whole.grades().toarray()[:, :4].tolist() == [[1, 0, 0, 0], [1, 0, 1, 0]]
    # Blocks that end within lines and within letters.
    for size in (1, 7, 64):
        monkeypatch.setattr(formats_module, "BLOCK_BYTES", size)
        assert read_msmarco(tmp_path / "msmarco", "dev.small").texts() == whole.texts()


def test_line_numbers_count_through_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    monkeypatch.setattr(formats_module, "BLOCK_BYTES", 10)
    path = tmp_path / "qrels"
    path.write_text("1 0 a 1\n" * 20 + "\n1 0 a\n")
    with pytest.raises(UserError, match=r"line 22: expected 4 columns between blanks .*, not 3"):
        read_trec_qrels(path)
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"_id": "a", "text": ""}\n' * 5 + "{}\n")
    with pytest.raises(UserError, match="line 6: '_id' must be text"):
        formats_module.read_json_lines(path, {"_id": pa.string(), "text": pa.string()})


def test_trec_judgments_between_blanks_or_tabs(tmp_path: Path) -> None:
    path = tmp_path / "qrels.txt"
    path.write_text("\ufeff19335 Q0  1017759 0\n  19335\t0\tD-2   3 \r\n\n47923 0 x -2")
    assert read_trec_qrels(path).to_dict() == {
        "query_id": ["19335", "19335", "47923"],
        "document_id": ["1017759", "D-2", "x"],
        "grade": [0, 3, -2],
    }
    path.write_text("")
    assert len(read_trec_qrels(path)) == 0


def test_triples_of_three_to_five_columns(tmp_path: Path) -> None:
    path = tmp_path / "qidpidtriples.train.small.tsv"
    path.write_text("1\t10\t11\n2\t20\t21\t0.5\n3\t30\t31\t0.5\t7\n")
    triples = read_triples(path)
    assert triples.column_names == ["query_id", "positive_id", "negative_id"]
    assert triples["negative_id"][:] == ["11", "21", "31"]
    for line, width in (("1\t2", 2), ("1\t2\t3\t4\t5\t6", 6)):
        path.write_text(f"1\t10\t11\n{line}\n")
        with pytest.raises(UserError, match=rf"line 2: expected 3 to 5 columns .*, not {width}"):
            read_triples(path)


@pytest.fixture
def marco(tmp_path: Path) -> Collection:
    write_msmarco(tmp_path / "msmarco")
    return read_msmarco(tmp_path / "msmarco", "dev.small")


def test_runs_of_three_kinds(tmp_path: Path, marco: Collection) -> None:
    path = tmp_path / "run"
    path.write_text("2 Q0 1 1 0.5 tag\n2 Q0 0 2 1.5e0 tag\n2 Q0 3 3 0.5 tag\n1048585 Q0 3 1 -2 tag\n")
    run = read_run(path, marco)
    assert lists(run) == [[(3, -2.0)], [(0, 1.5), (1, 0.5), (3, 0.5)]]
    assert read_run(path, marco, k=2).documents.tolist() == [[3, PAD], [0, 1]]
    path.write_text("2\t1\t2\n2\t0\t1\n")
    assert lists(read_run(path, marco)) == [[], [(0, -1.0), (1, -2.0)]]
    path.write_text("2\t3\twing flow\tsome passage\n2\t1\twing flow\tmore\n")
    assert lists(read_run(path, marco)) == [[], [(1, 0.0), (3, 0.0)]]


def test_a_run_comes_back_from_its_file(tmp_path: Path, marco: Collection) -> None:
    scores = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    scores[0, 1:] = -np.inf
    candidates = top_candidates(scores, 4)
    write_run(tmp_path / "run", marco, candidates)
    read = read_run(tmp_path / "run", marco)
    np.testing.assert_array_equal(read.documents, candidates.documents)
    np.testing.assert_array_equal(read.scores, candidates.scores)
    first = (tmp_path / "run").read_text().splitlines()[0].split()
    assert first[:4] == ["1048585", "Q0", "0", "1"]
    assert first[5] == "reprise"
    with pytest.raises(UserError, match="2 queries"):
        write_run(tmp_path / "run", marco, top_candidates(scores[:1], 4))
    with pytest.raises(UserError, match="'my tag' cannot be written"):
        write_run(tmp_path / "run", marco, candidates, tag="my tag")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("2 Q0 0 1 1 t\n5 Q0 1 1 0.5 t\n", "line 2: msmarco/dev.small has no query '5'"),
        ("2 Q0 9 1 0.5 t\n", "line 1: msmarco/dev.small has no document '9'"),
        ("2 Q0 0 1 1 t\n2 Q0 1 2 1 t\n\n2 Q0 0 3 1 t\n", "line 4: document '0' was listed for query '2' before"),
        ("2 Q0 0 1 nan t\n", "line 1: score must be a finite number, not 'nan'"),
        ("2 0 1\n", "is no run: expected TREC's 6 columns"),
        ("", "is no run"),
    ],
)
def test_runs_that_do_not_fit_are_refused(tmp_path: Path, marco: Collection, content: str, message: str) -> None:
    (tmp_path / "run").write_text(content)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path / "run", marco)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"triples\.tsv is missing"):
        read_triples(tmp_path / "triples.tsv")
    (tmp_path / "triples.tsv.gz").write_bytes(gzip.compress(b"1\t2\t3\n" * 9000)[:-20])
    with pytest.raises(UserError, match="cannot be read behind line"):
        read_triples(tmp_path / "triples.tsv.gz")
