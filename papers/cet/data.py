"""Collections, their annotation by a pool, and the candidates of every query.

The four collections lie in `$REPRISE_DATA/cet/` as `shared.data.retrieval.load_collection` documents; their judgments
are nearly complete, so that an annotation can be imposed on them and the truth is known:

* an annotator sees the top 20 of a weak retriever, which counts the query's distinct words in a document, ties at
  random. Its highest-ranked relevant document becomes the query's one label (`weak_pool`); queries without any are not
  trained on. With `strong_pool` the strong retriever makes the pool; with `complete` all relevant documents are labels;
* negatives are drawn from the top 50 of the weak retriever, of BM25, of the strong one (BM25 mixed with the cosine of a
  latent semantic index, or BM25 with feedback), of the dense one (that cosine alone), or from 50 random documents;
* models re-rank the top 100 of BM25 for queries of other folds, and are held against all judgments.

The stand-in of `standin.py` is annotated in the same way.

MS MARCO lies in `$REPRISE_DATA/msmarco/` in the official layout: `collection.tsv` (pid, passage), `queries.*.tsv` (qid,
query), `qrels.*` (qid, 0, pid, grade), triples (qid, positive pid, negative pid, two further columns allowed), and runs
(TREC's six columns, or qid, pid, rank). Labels and negatives are those of the triples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shared.config import Stage, UserError
from shared.data.fetch import locate
from shared.data.retrieval import (
    PAD,
    Collection,
    Index,
    LatentSemanticIndex,
    build_vocabulary,
    coordination_match,
    encode,
    load_collection,
    make_collection,
    mix,
    ppmi_embeddings,
    read_run,
    read_trec_qrels,
    read_triples,
    rm3,
)
from shared.data.retrieval.collection import arrow_table, positions
from shared.data.retrieval.formats import read_table
from shared.files import atomic_path, write_json
from shared.training import Job, run_jobs
from shared.training.parallel import Report

from .config import SOURCES, Generated, KernelRanker, MSMarco, Params, Pooling, TransformerRanker
from .features import pair_features
from .standin import generate

if TYPE_CHECKING:
    import pyarrow as pa
    from scipy.sparse import csr_array

Int64Array = NDArray[np.int64]
POOLS = ("weak_pool", "strong_pool")
RETRIEVERS = ("weak", "bm25", "strong", "dense")
# Of both lists that the strong retriever mixes.
MIX_DEPTH = 200
# The tokens in front of the words where there is no pretrained tokenizer; 0 is the pad.
CLS, SEP, NUM_SPECIAL = 1, 2, 2


@dataclass(frozen=True)
class Prepared:
    """Queries with their candidates; Q queries, C slots for the candidates of each, N documents. Pads are -1.

    `documents` int64 [Q, C] numbers documents; everything below names a candidate by its slot. `relevant` and `pooled`
    bool [Q, C] say whether it is, and whether the weak pool has it. `sources` are the candidates for negatives [Q, 50]
    by retriever, `labels` the labeled documents [Q, P] by who annotated, `reranked` [Q, 100] what is re-ranked, in the
    first retriever's order. `retrieved` are the retrievers' own top documents [Q, 100], by document number. `grades`
    csr [Q, N] are all judgments. `group` [Q] is the query's collection (`attrs["groups"]`), `fold` [Q] its fold.
    Rankers get `features` [Q, C, F], or `query_tokens` [Q, Lq] and `document_tokens` [N, Ld].
    """

    documents: Int64Array
    relevant: NDArray[np.bool_]
    pooled: NDArray[np.bool_]
    sources: dict[str, Int64Array]
    labels: dict[str, Int64Array]
    reranked: Int64Array
    retrieved: dict[str, Int64Array]
    grades: csr_array
    group: Int64Array
    fold: Int64Array
    features: NDArray[np.float32] | None = None
    query_tokens: NDArray[np.int32] | None = None
    document_tokens: NDArray[np.int32] | None = None
    attrs: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def num_queries(self) -> int:
        return len(self.documents)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self.attrs["groups"])

    def label_mask(self, labels: str) -> NDArray[np.bool_]:
        """Which candidates are labeled, bool [Q, C]."""
        return slot_mask(self.labels[labels], self.documents.shape[1])


def prepare(stage: Stage[Params]) -> None:
    """Retrieve, annotate and write what rankers are given to `data/prepared/`."""
    params = stage.params
    if isinstance(params.corpus, MSMarco):
        prepared = read_msmarco(params.corpus, params)
    elif isinstance(params.corpus, Generated):
        texts, queries, relevant = generate(params.corpus, params.seed)
        prepared = build(texts, queries, relevant.astype(np.int32), params, stem=False)
        prepared.attrs.update(groups=["generated"], source="generated: topics and styles")
    else:
        jobs = [Job(name, _build_collection, (name, params)) for name in params.corpus.names]
        parts = run_jobs(jobs, workers=params.workers, threads=params.threads)
        prepared = join(dict(zip(params.corpus.names, parts, strict=True)))
        names = ", ".join(params.corpus.names)
        prepared.attrs["source"] = f"real: {names}, annotated by an imposed pool"
    save(stage.data_dir / "prepared", prepared)


def _build_collection(name: str, params: Params, report: Report) -> Prepared:
    collection = load_collection(name)
    prepared = build(collection.texts(), collection.query_texts(), collection.grades(), params)
    report(1.0, "")
    return prepared


# --- One collection ---------------------------------------------------------------------------------------------------


def build(
    texts: Sequence[str], queries: Sequence[str], grades: csr_array, params: Params, *, stem: bool = True
) -> Prepared:
    """Index one collection, retrieve, annotate, and take what the ranker is given.

    `UserError` for a query to which nothing is relevant. Words are stemmed and stop words left out with `stem`.
    """
    without = np.flatnonzero(np.diff(grades.indptr) == 0)
    if len(without) and stem:
        raise UserError(
            f"{len(without)} queries have no relevant document, the first is number {without[0]}: drop them"
        )
    if len(without):
        # Of generated queries some are of a mixture of topics that no document has.
        kept = np.flatnonzero(np.diff(grades.indptr) > 0)
        queries, grades = [queries[row] for row in kept], grades[kept]
    index = Index(texts, stem=stem, remove_stopwords=stem)
    retrieved = retrieve(index, texts, queries, params.pooling, params.seed, stem=stem)
    generator = np.random.default_rng(params.seed)
    annotated = annotate(retrieved, grades, params.pooling, generator)
    ranker = params.ranker
    if isinstance(ranker, KernelRanker):
        dimensions = min(ranker.embedding_dimensions, len(index.vocabulary) - 1)
        embeddings = ppmi_embeddings(texts, index.vocabulary, dimensions=dimensions, seed=params.seed)
        shown = {"features": pair_features(index, queries, annotated.documents, embeddings)}
        return _with(annotated, **shown)
    if ranker.pretrained is not None:
        return tokenized(annotated, queries, texts, ranker)
    vocabulary = build_vocabulary(texts, stem=stem, remove_stopwords=stem)
    words = {
        name: np.where(numbers > 0, numbers + NUM_SPECIAL, 0).astype(np.int32)
        for name, numbers in (
            ("query_tokens", encode(queries, vocabulary, ranker.query_tokens)),
            ("document_tokens", encode(texts, vocabulary, ranker.document_tokens)),
        )
    }
    special = {"cls": CLS, "sep": SEP, "vocab_size": len(vocabulary) + NUM_SPECIAL}
    return _with(annotated, **words, attrs=annotated.attrs | special)


def retrieve(
    index: Index, texts: Sequence[str], queries: Sequence[str], pooling: Pooling, seed: int, *, stem: bool
) -> dict[str, Int64Array]:
    """The top documents of every retriever, int64 [Q, k], and random ones."""
    depth = max(pooling.reranked, pooling.negatives, pooling.depth)
    dimensions = min(pooling.lsa_dimensions, index.num_documents, len(index.vocabulary) - 1)
    latent = LatentSemanticIndex(texts, dimensions, seed, stem=stem, remove_stopwords=stem)
    wide = max(depth, MIX_DEPTH)
    bm25, dense = index.search(queries, wide), latent.search(queries, wide)
    strong = rm3(index, queries, depth) if pooling.strong == "rm3" else mix(bm25, dense, pooling.mix_weight, depth)
    weak = coordination_match(index, queries, depth, seed=seed)
    lists = {"weak": weak, "bm25": bm25, "strong": strong, "dense": dense}
    retrieved = {name: each.documents[:, :depth] for name, each in lists.items()}
    generator = np.random.default_rng([seed, 1])
    size = min(pooling.negatives, index.num_documents)
    random = [generator.choice(index.num_documents, size, replace=False) for _ in queries]
    return retrieved | {"random": np.stack(random)}


def annotate(
    retrieved: Mapping[str, Int64Array], grades: csr_array, pooling: Pooling, generator: np.random.Generator
) -> Prepared:
    """Candidates of every query, and what annotators label, from retrieved documents and all judgments."""
    relevant = padded(*grades.nonzero(), len(retrieved["bm25"]))
    negatives = {name: retrieved[name][:, : pooling.negatives] for name in SOURCES}
    reranked = retrieved["bm25"][:, : pooling.reranked]
    pools = {pool: retrieved[pool.removesuffix("_pool")][:, : pooling.depth] for pool in POOLS}
    documents, slots = union([*negatives.values(), reranked, *pools.values(), relevant])
    *of_negatives, of_reranked, of_weak_pool, of_strong_pool, of_relevant = slots
    is_relevant = slot_mask(of_relevant, documents.shape[1])
    labels = {"complete": of_relevant}
    for pool, slots_of_pool in zip(POOLS, (of_weak_pool, of_strong_pool), strict=True):
        labels[pool] = one_of(slots_of_pool, is_relevant, pooling.label, generator)
    fold = np.empty(len(documents), np.int64)
    fold[generator.permutation(len(documents))] = np.arange(len(documents)) % pooling.folds
    return Prepared(
        documents=documents,
        relevant=is_relevant,
        pooled=slot_mask(of_weak_pool, documents.shape[1]),
        sources=dict(zip(negatives, of_negatives, strict=True)),
        labels=labels,
        reranked=of_reranked,
        retrieved={name: retrieved[name][:, : pooling.reranked] for name in RETRIEVERS},
        grades=grades,
        group=np.zeros(len(documents), np.int64),
        fold=fold,
    )


def one_of(pool: Int64Array, relevant: NDArray[np.bool_], label: str, generator: np.random.Generator) -> Int64Array:
    """One relevant document of each pool [Q, depth], its first or any: slots [Q, 1], -1 where there is none."""
    hits = np.take_along_axis(relevant, np.maximum(pool, 0), axis=1) & (pool >= 0)
    order = generator.random(hits.shape) if label == "uniform" else -np.arange(hits.shape[1], dtype=float)
    best = np.argmax(np.where(hits, order, -np.inf), axis=1)
    rows = np.arange(len(pool))
    return np.where(hits[rows, best], pool[rows, best], PAD)[:, None]


# --- Padded lists -----------------------------------------------------------------------------------------------------


def padded(rows: Int64Array, values: Int64Array, num_rows: int, width: int | None = None) -> Int64Array:
    """Values of each row side by side in the order given, [num_rows, most a row], -1 behind; at most `width` a row."""
    order = np.argsort(rows, kind="stable")
    rows, values = np.asarray(rows)[order], np.asarray(values)[order]
    places = np.arange(len(rows)) - np.searchsorted(rows, np.arange(num_rows))[rows]
    widest = int(places.max(initial=0)) + 1
    table = np.full((num_rows, widest if width is None else min(widest, width)), PAD, np.int64)
    kept = places < table.shape[1]
    table[rows[kept], places[kept]] = values[kept]
    return table


def union(lists: Sequence[Int64Array]) -> tuple[Int64Array, list[Int64Array]]:
    """The distinct documents of lists [Q, k], each -1 padded, as [Q, C], and the lists again as slots of these."""
    everything = np.concatenate(lists, axis=1)
    present = everything >= 0
    width = int(everything.max(initial=0)) + 1
    rows = np.nonzero(present)[0]
    pairs, inverse = np.unique(rows * width + everything[present], return_inverse=True)
    documents = padded(pairs // width, pairs % width, len(everything))
    first = np.searchsorted(pairs // width, np.arange(len(everything)))
    slots = np.full(everything.shape, PAD, np.int64)
    slots[present] = inverse - first[rows]
    return documents, np.split(slots, np.cumsum([each.shape[1] for each in lists])[:-1], axis=1)


def slot_mask(slots: Int64Array, num_slots: int) -> NDArray[np.bool_]:
    """Which slots are named in lists [Q, k], bool [Q, num_slots]."""
    mask = np.zeros((len(slots), num_slots + 1), bool)
    np.put_along_axis(mask, slots, True, axis=1)  # pads go to the last column
    return mask[:, :-1]


def stack(arrays: Sequence[NDArray[Any]], fill: Any = PAD) -> NDArray[Any]:
    """Arrays [Q, k, ...] below each other, the shorter rows filled up."""
    width = max(array.shape[1] for array in arrays)
    spare = [[(0, 0), (0, width - array.shape[1])] + [(0, 0)] * (array.ndim - 2) for array in arrays]
    return np.concatenate([np.pad(a, s, constant_values=fill) for a, s in zip(arrays, spare, strict=True)])


def join(parts: Mapping[str, Prepared]) -> Prepared:
    """Several collections as one: queries below each other, documents renumbered; groups are named by the keys."""
    from scipy.sparse import block_diag, csr_array

    each = list(parts.values())
    offsets = np.cumsum([0, *(part.grades.shape[1] for part in each)])

    def shifted(arrays: Sequence[Int64Array]) -> Int64Array:
        return stack([np.where(a >= 0, a + offset, PAD) for a, offset in zip(arrays, offsets, strict=False)])

    if each[0].features is None:
        raise UserError("several collections are for the kernel ranker; give the transformer one of them")
    return Prepared(
        documents=shifted([part.documents for part in each]),
        relevant=stack([part.relevant for part in each], False),
        pooled=stack([part.pooled for part in each], False),
        sources={name: stack([part.sources[name] for part in each]) for name in each[0].sources},
        labels={name: stack([part.labels[name] for part in each]) for name in each[0].labels},
        reranked=stack([part.reranked for part in each]),
        retrieved={name: shifted([part.retrieved[name] for part in each]) for name in each[0].retrieved},
        grades=csr_array(block_diag([part.grades for part in each], format="csr")),
        group=np.repeat(np.arange(len(each)), [part.num_queries for part in each]),
        fold=np.concatenate([part.fold for part in each]),
        features=stack([part.features for part in each], 0),
        attrs={"groups": list(parts)},
    )


def _with(prepared: Prepared, **changes: Any) -> Prepared:
    return Prepared(**{each.name: getattr(prepared, each.name) for each in fields(prepared)} | changes)


# --- MS MARCO and pretrained tokenizers -------------------------------------------------------------------------------


def read_msmarco(corpus: MSMarco, params: Params) -> Prepared:
    """Training triples and test runs in the official layout; only passages that these name are kept.

    Test queries are of fold 0, in one group a test set, and training queries of fold 1. `UserError` for ids that the
    collection or the queries lack.
    """
    from scipy.sparse import csr_array, vstack

    pooling, ranker = params.pooling, params.ranker
    passages = read_table(locate(corpus.folder, corpus.collection), ("id", "text"))
    queries, labels, negatives = _read_triples(corpus, passages, pooling.negatives)
    generator = np.random.default_rng([params.seed, 1])
    negatives["random"] = generator.integers(len(passages), size=(len(queries), pooling.negatives))
    tests = {name: _read_test(corpus, name, passages, pooling.reranked) for name in corpus.tests}
    runs = stack([run for _, run, _ in tests.values()])

    def behind_tests(of_train: Int64Array) -> Int64Array:
        return np.concatenate([np.full((len(runs), of_train.shape[1]), PAD, np.int64), of_train])

    rows, places = np.nonzero(labels >= 0)
    shape = (len(queries), len(passages))
    of_train = csr_array((np.ones(len(rows), np.int32), (rows, labels[rows, places])), shape=shape)
    grades = csr_array(vstack([*(judged for _, _, judged in tests.values()), of_train], format="csr"))
    reranked = np.concatenate([runs, np.full((len(queries), runs.shape[1]), PAD, np.int64)])
    documents, slots = union([behind_tests(labels), *map(behind_tests, negatives.values()), reranked])
    of_labels, *of_negatives, of_reranked = slots

    # Those that are only judged stand behind those that a ranker is asked about, which alone need their tokens.
    kept = np.unique(documents[documents >= 0])
    order = np.concatenate([kept, np.setdiff1d(grades.indices, kept)])
    number = np.full(len(passages) + 1, PAD, np.int64)  # the last stays a pad
    number[kept] = np.arange(len(kept))
    texts = [text for texts, _, _ in tests.values() for text in texts] + queries
    prepared = Prepared(
        documents=number[documents],
        relevant=slot_mask(of_labels, documents.shape[1]),
        pooled=np.zeros(documents.shape, bool),
        sources=dict(zip(negatives, of_negatives, strict=True)),
        labels={"given": of_labels},
        reranked=of_reranked,
        retrieved={"first_stage": number[reranked]},
        grades=csr_array(grades[:, order]),
        group=np.repeat(np.arange(len(tests) + 1), [*(len(run) for _, run, _ in tests.values()), len(queries)]),
        fold=np.repeat([0, 1], [len(runs), len(queries)]),
        attrs={"groups": [*tests, "train"], "source": "real: MS MARCO passages"},
    )
    return tokenized(prepared, texts, passages["text"].take(kept).to_pylist(), ranker)


def _read_triples(
    corpus: MSMarco, passages: pa.Table, most: int
) -> tuple[list[str], Int64Array, dict[str, Int64Array]]:
    """Texts of the queries that triples name, their positives [Q, P], and by source at most so many negatives."""
    queries = read_table(locate(corpus.folder, corpus.queries), ("id", "text"))
    rows, positives, negatives = {}, {}, {}
    for source, name in corpus.triples.items():
        path = locate(corpus.folder, name)
        triples = arrow_table(read_triples(path))
        rows[source] = _numbers(triples["query_id"], queries["id"], f"{path}: queries")
        positives[source] = _numbers(triples["positive_id"], passages["id"], f"{path}: passages")
        negatives[source] = _numbers(triples["negative_id"], passages["id"], f"{path}: passages")
    used, flat = np.unique(np.concatenate(list(rows.values())), return_inverse=True)
    labeled = np.unique(np.stack([flat, np.concatenate(list(positives.values()))]), axis=1)
    at = {source: np.searchsorted(used, numbers) for source, numbers in rows.items()}
    lists = {source: padded(at[source], negatives[source], len(used), most) for source in rows}
    return queries["text"].take(used).to_pylist(), padded(*labeled, len(used)), lists


def _read_test(corpus: MSMarco, name: str, passages: pa.Table, depth: int) -> tuple[list[str], Int64Array, csr_array]:
    """Texts, candidates [Q, depth] and judgments of the judged queries of a test set."""
    settings = corpus.tests[name]
    queries = read_table(locate(corpus.folder, settings.queries), ("id", "text"))
    qrels = read_trec_qrels(locate(corpus.folder, settings.qrels))
    collection: Collection = make_collection(name, passages, queries, qrels, queries_without_relevant="keep")
    run = read_run(locate(corpus.folder, settings.candidates), collection, depth)
    grades = collection.grades()
    judged = np.flatnonzero(np.diff(grades.indptr))
    texts = collection.query_texts()
    return [texts[row] for row in judged], run.documents[judged], grades[judged]


def _numbers(ids: pa.ChunkedArray, among: pa.ChunkedArray, what: str) -> Int64Array:
    """Rows of ids `among` all there are."""
    numbers = positions(ids, among)
    unknown = np.flatnonzero(numbers < 0)
    if len(unknown):
        raise UserError(f"{what} are named that are not there, {len(unknown)} times, first {ids[int(unknown[0])]}")
    return numbers


def tokenized(prepared: Prepared, queries: Sequence[str], texts: Sequence[str], ranker: TransformerRanker) -> Prepared:
    """With the tokens of a pretrained model's own tokenizer, cut to the ranker's lengths, without special tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(ranker.pretrained)
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no tokenizer at {ranker.pretrained!r} ({str(error).splitlines()[0]}): 'pretrained' must be a "
            "name on the Hugging Face hub, or a folder that holds a tokenizer beside the model"
        ) from None
    if tokenizer.pad_token_id != 0:
        raise UserError(f"the pad of the tokenizer at {ranker.pretrained!r} is {tokenizer.pad_token_id}: BERT's is 0")

    def encoded(lines: Sequence[str], length: int) -> NDArray[np.int32]:
        table = np.zeros((len(lines), length), np.int32)
        for start in range(0, len(lines), 10_000):
            ids = tokenizer(
                list(lines[start : start + 10_000]), add_special_tokens=False, truncation=True, max_length=length
            )["input_ids"]
            for row, numbers in enumerate(ids, start):
                table[row, : len(numbers)] = numbers
        return table

    return _with(
        prepared,
        query_tokens=encoded(queries, ranker.query_tokens),
        document_tokens=encoded(texts, ranker.document_tokens),
        attrs=prepared.attrs
        | {"cls": tokenizer.cls_token_id, "sep": tokenizer.sep_token_id, "vocab_size": len(tokenizer)},
    )


# --- Files ------------------------------------------------------------------------------------------------------------


def save(folder: Path, prepared: Prepared) -> None:
    """Write the arrays, one .npy each, so that they can be mapped into memory, and attrs.json with their digest."""
    digest = hashlib.sha256()
    arrays: dict[str, NDArray[Any]] = {}
    for each in fields(prepared):
        value = getattr(prepared, each.name)
        if isinstance(value, np.ndarray):
            arrays[each.name] = value
        elif isinstance(value, dict) and each.name != "attrs":
            arrays |= {f"{each.name}.{key}": array for key, array in value.items()}
    for part in ("data", "indices", "indptr"):
        arrays[f"grades.{part}"] = getattr(prepared.grades, part)
    for old in folder.glob("*.npy"):
        old.unlink()
    for name, array in sorted(arrays.items()):
        array = np.ascontiguousarray(array)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data if array.size else b"")
        with atomic_path(folder / f"{name}.npy") as temporary:
            np.save(temporary, array, allow_pickle=False)
    shape = [int(size) for size in prepared.grades.shape]
    write_json(folder / "attrs.json", prepared.attrs | {"shape": shape, "digest": digest.hexdigest()})


def load(folder: Path) -> Prepared:
    """Read what `save` wrote, mapped into memory; `UserError` where it is missing or damaged."""
    from scipy.sparse import csr_array

    path = folder / "prepared"
    try:
        attrs = json.loads((path / "attrs.json").read_text(encoding="utf-8"))
        arrays = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in sorted(path.glob("*.npy"))}
        nested: dict[str, dict[str, NDArray[Any]]] = {}
        for name in [name for name in arrays if "." in name]:
            outer, _, inner = name.partition(".")
            nested.setdefault(outer, {})[inner] = arrays.pop(name)
        parts = nested.pop("grades")
        grades = csr_array((parts["data"], parts["indices"], parts["indptr"]), shape=tuple(attrs["shape"]))
        return Prepared(**arrays, **nested, grades=grades, attrs=attrs)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the stage prepare first (dvc repro, or reprise run prepare)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run the stage prepare again") from None
