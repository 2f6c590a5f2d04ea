"""Indexing and searching four collections, against BM25 summed pair by pair; growth with documents and with queries.

    python benchmarks/retrieval.py

The collections are those of `shared.data.retrieval`, read from `$REPRISE_DATA/cet`. The loop over pairs is plain Python
over dictionaries of word counts that were made before, for a sample of the queries. What is compared takes turns, and
the least time counts. Texts of the growth are random words, of which the i-th is drawn in proportion to 1/i. Memory is
the peak of what a search allocates. One CPU thread.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import math
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from common import machine, save_figure, take_turns, write_table

from shared.data.retrieval import COLLECTIONS, Index, LatentSemanticIndex, coordination_match, load_collection, rm3

Row = dict[str, Any]

DEPTH = 50
SAMPLE = 3  # queries of the loop over pairs
REPEATS = 3
VOCABULARY = 20_000
WORDS_PER_DOCUMENT, WORDS_PER_QUERY = 60, 5
DOCUMENTS = (2_000, 8_000, 32_000)
QUERIES = (250, 1_000, 4_000)


def seconds_of(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def least_seconds(cases: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
    timed = {name: lambda run=run: seconds_of(run) for name, run in cases.items()}
    return {name: min(seconds) for name, seconds in take_turns(timed, REPEATS).items()}


def pair_by_pair(index: Index) -> Callable[[list[str]], list[list[tuple[float, int]]]]:
    """BM25 as one would write it without arrays: for every query and document, a sum over the query's words."""
    documents: list[dict[int, float]] = []
    for row in range(index.num_documents):
        stored = slice(index.counts.indptr[row], index.counts.indptr[row + 1])
        words, counts = index.counts.indices[stored].tolist(), index.counts.data[stored].tolist()
        documents.append(dict(zip(words, counts, strict=True)))
    lengths = [sum(document.values()) for document in documents]
    mean = sum(lengths) / len(lengths)
    frequency = Counter(word for document in documents for word in document)

    def score(words: list[int], document: dict[int, float], length: float) -> float:
        total = 0.0
        for word in words:
            if word in document:
                inverse = math.log(1 + (len(documents) - frequency[word] + 0.5) / (frequency[word] + 0.5))
                total += inverse * document[word] / (document[word] + 1.2 * (0.25 + 0.75 * length / mean))
        return total

    def search(queries: list[str]) -> list[list[tuple[float, int]]]:
        found = []
        matrix = index.query_matrix(queries)
        for row in range(len(queries)):
            stored = slice(matrix.indptr[row], matrix.indptr[row + 1])
            words = np.repeat(matrix.indices[stored], matrix.data[stored].astype(int)).tolist()
            scores = [score(words, *pair) for pair in zip(documents, lengths, strict=True)]
            found.append(sorted(((-score, number) for number, score in enumerate(scores)))[:DEPTH])
        return found

    return search


def on_collection(name: str) -> list[Row]:
    collection = load_collection(name)
    texts, queries = collection.texts(), collection.query_texts()
    index, latent = Index(texts), LatentSemanticIndex(texts)
    loop, sample = pair_by_pair(index), queries[:: len(queries) // SAMPLE][:SAMPLE]
    whole = index.search(sample, DEPTH)
    for row, ranked in enumerate(loop(sample)):
        np.testing.assert_allclose([-score for score, _ in ranked], np.maximum(whole.scores[row], 0), rtol=1e-4)
    seconds = least_seconds(
        {
            "read": lambda: load_collection(name),
            "index": lambda: Index(texts),
            "BM25": lambda: index.search(queries, DEPTH),
            "coordination": lambda: coordination_match(index, queries, DEPTH),
            "RM3": lambda: rm3(index, queries, DEPTH),
            "latent index": lambda: LatentSemanticIndex(texts),
            "latent search": lambda: latent.search(queries, DEPTH),
            "BM25, pair by pair": lambda: loop(sample),
        }
    )
    seconds["BM25, pair by pair"] *= len(queries) / len(sample)
    return [
        row_of(name, what, len(texts), len(queries), value, ratio=value / seconds["BM25"])
        for what, value in seconds.items()
    ]


def random_texts(count: int, length: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, VOCABULARY + 1)
    numbers = generator.choice(VOCABULARY, (count, length), p=share / share.sum())
    return [" ".join(f"w{number}" for number in row) for row in numbers.tolist()]


def peak_mebibytes(run: Callable[[], Any]) -> float:
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def growth(num_documents: int, asked: tuple[int, ...]) -> list[Row]:
    texts = random_texts(num_documents, WORDS_PER_DOCUMENT, seed=0)
    queries = random_texts(max(asked), WORDS_PER_QUERY, seed=1)
    index = Index(texts)
    searches = {count: lambda count=count: index.search(queries[:count], DEPTH) for count in asked}
    seconds = least_seconds({"index": lambda: Index(texts), **searches})
    return [
        row_of("random words", "index", num_documents, 0, seconds["index"]),
        *(
            row_of("random words", "BM25", num_documents, count, seconds[count], mebibytes=peak_mebibytes(search))
            for count, search in searches.items()
        ),
    ]


def row_of(
    collection: str, what: str, documents: int, queries: int, seconds: float, *, ratio: float = 0, mebibytes: float = 0
) -> Row:
    return {
        "collection": collection,
        "what": what,
        "documents": documents,
        "queries": queries,
        "seconds": f"{seconds:.4g}",
        "ratio_to_bm25_search": f"{ratio:.3g}" if ratio else "",
        "peak_mebibytes": f"{mebibytes:.1f}" if mebibytes else "",
        "machine": machine(),
    }


def draw(rows: list[Row]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    steps = dict.fromkeys(row["what"] for row in rows if row["collection"] in COLLECTIONS)
    for place, what in enumerate(steps):
        values = [float(row["seconds"]) for row in rows if row["what"] == what and row["collection"] in COLLECTIONS]
        axes[0].plot(values, [place] * len(values), "o", alpha=0.6)
    axes[0].set(xscale="log", xlabel="seconds, each of four collections", yticks=range(len(steps)), yticklabels=steps)
    axes[0].invert_yaxis()
    grown = [row for row in rows if row["collection"] not in COLLECTIONS]
    lines = {
        "index": ("documents", lambda row: row["what"] == "index"),
        f"BM25, {QUERIES[0]} queries": ("documents", lambda row: row["queries"] == QUERIES[0]),
        f"BM25, {DOCUMENTS[-1]:,} documents": (
            "queries",
            lambda row: row["what"] == "BM25" and row["documents"] == DOCUMENTS[-1],
        ),
    }
    for label, (across, chosen) in lines.items():
        some = [row for row in grown if chosen(row)]
        axes[1].plot([row[across] for row in some], [float(row["seconds"]) for row in some], "o-", label=label)
    axes[1].set(xscale="log", yscale="log", xlabel="documents, or queries", ylabel="seconds")
    axes[1].legend(
        frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize="small", ncols=3, columnspacing=1
    )
    searches = [row for row in grown if row["what"] == "BM25" and row["documents"] == DOCUMENTS[-1]]
    axes[2].plot([row["queries"] for row in searches], [float(row["peak_mebibytes"]) for row in searches], "o-")
    axes[2].set(xscale="log", xlabel="queries", ylabel=f"MiB at most, {DOCUMENTS[-1]:,} documents")
    axes[2].set_xticks(QUERIES, [f"{count:,}" for count in QUERIES])
    axes[2].minorticks_off()
    axes[2].set_ylim(0, 100)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    save_figure("retrieval", figure)
    plt.close(figure)


def main() -> None:
    rows = [row for name in COLLECTIONS for row in on_collection(name)]
    for num_documents in DOCUMENTS:
        rows += growth(num_documents, QUERIES if num_documents == DOCUMENTS[-1] else QUERIES[:1])
    for row in rows:
        print(
            f"{row['collection']:13} {row['what']:19} {row['documents']:6} documents {row['queries']:5} queries "
            f"{row['seconds']:>9} s  {row['ratio_to_bm25_search']:>6}  {row['peak_mebibytes']:>6}"
        )
    write_table("retrieval", rows)
    draw(rows)


if __name__ == "__main__":
    main()
