"""Test collections: documents, queries and relevance judgments, checked, and four classic ones by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError
from shared.data.fetch import locate

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from scipy.sparse import csr_array

WithoutRelevant = Literal["drop", "keep", "error"]

COLLECTIONS = ("cranfield", "cisi", "cacm", "npl")


@dataclass(frozen=True)
class Collection:
    """Documents, queries and judgments: `make_collection` makes and checks one.

    `documents` has the columns id, title, text; `queries` id, text; `qrels` query_id, document_id (all of them strings)
    and grade (int32, greater is more relevant, 0 judged not relevant). N documents and Q queries keep their order.
    `dropped_queries` are ids of queries left out since nothing is relevant to them, `num_junk` the judgments that had
    a negative grade.
    """

    name: str
    documents: datasets.Dataset
    queries: datasets.Dataset
    qrels: datasets.Dataset
    dropped_queries: tuple[str, ...] = ()
    num_junk: int = 0

    def texts(self) -> list[str]:
        """The documents' titles and texts, separated by a space; '' where both are empty."""
        import pyarrow.compute as pc

        table = arrow_table(self.documents)
        return pc.utf8_trim(pc.binary_join_element_wise(table["title"], table["text"], " "), " ").to_pylist()

    def query_texts(self) -> list[str]:
        """The queries' texts."""
        return arrow_table(self.queries)["text"].to_pylist()

    def grades(self) -> csr_array:
        """Grades, int32 csr [Q, N]; pairs that are not judged, or judged not relevant, are not stored."""
        from scipy.sparse import coo_array

        table = arrow_table(self.qrels)
        grades = table["grade"].to_numpy()
        rows = positions(table["query_id"], arrow_table(self.queries)["id"])
        columns = positions(table["document_id"], arrow_table(self.documents)["id"])
        kept = grades > 0
        shape = (len(self.queries), len(self.documents))
        return coo_array((grades[kept], (rows[kept], columns[kept])), shape=shape).tocsr()

    def relevant(self) -> csr_array:
        """Which documents are relevant, of any grade above 0: bool csr [Q, N]."""
        return self.grades().astype(bool)


def make_collection(
    name: str,
    documents: datasets.Dataset | pa.Table | Mapping[str, Sequence[Any]],
    queries: datasets.Dataset | pa.Table | Mapping[str, Sequence[Any]],
    qrels: datasets.Dataset | pa.Table | Mapping[str, Sequence[Any]],
    *,
    queries_without_relevant: WithoutRelevant = "drop",
) -> Collection:
    """A collection of these columns (see `Collection`; a title may be missing), after checking that they fit together.

    - Ids that are there twice, judgments of unknown documents or queries, pairs that are judged twice, missing values
      and empty queries are a `UserError` that names the ids.
    - Negative grades (TREC's mark for junk) become 0, not relevant, and are counted in `num_junk`.
    - Empty documents stay: they match nothing, and every other document keeps its number.
    - Queries to which nothing is relevant are dropped with their judgments (`dropped_queries` names them; they may be
      empty), kept, or an error. Every metric of a ranking is 0 for them, whatever the ranking.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if queries_without_relevant not in ("drop", "keep", "error"):
        raise UserError(f"queries_without_relevant must be drop, keep or error, not {queries_without_relevant!r}")
    strings = pa.string()
    documents = _columns(name, "documents", documents, {"id": strings, "title": strings, "text": strings})
    queries = _columns(name, "queries", queries, {"id": strings, "text": strings})
    qrels = _columns(name, "qrels", qrels, {"query_id": strings, "document_id": strings, "grade": pa.int32()})
    for what, table in (("documents", documents), ("queries", queries)):
        counts = pc.value_counts(table["id"].combine_chunks())
        twice = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))
        _refuse(name, twice, f"{what} have an id that others have too", "ids must be distinct")
    for key, table, what in (("document_id", documents, "documents"), ("query_id", queries, "queries")):
        unknown = pc.filter(qrels[key], pc.invert(pc.is_in(qrels[key], value_set=table["id"].combine_chunks())))
        _refuse(
            name, unknown, f"{what} are judged that are not there", f"add them to the {what}, or drop the judgments"
        )
    pairs = positions(qrels["query_id"], queries["id"]) * max(len(documents), 1)
    pairs += positions(qrels["document_id"], documents["id"])
    distinct, first = np.unique(pairs, return_index=True)
    if len(distinct) < len(pairs):
        repeated = qrels.take(np.setdiff1d(np.arange(len(pairs)), first))
        pair_names = pc.binary_join_element_wise(repeated["query_id"], repeated["document_id"], "/")
        _refuse(name, pair_names, "pairs of query and document are judged twice", "keep one judgment of each")
    junk = pc.less(qrels["grade"], 0)
    num_junk = pc.sum(junk).as_py() or 0
    qrels = qrels.set_column(2, "grade", pc.if_else(junk, pa.scalar(0, pa.int32()), qrels["grade"]))

    judged = pc.filter(qrels["query_id"], pc.greater(qrels["grade"], 0)).combine_chunks()
    useful = pc.is_in(queries["id"], value_set=judged)
    without = pc.filter(queries["id"], pc.invert(useful))
    if queries_without_relevant == "error":
        _refuse(name, without, "queries have no relevant document", "judge or drop them, or pass 'drop' or 'keep'")
    if queries_without_relevant == "drop":
        queries = queries.filter(useful)
        qrels = qrels.filter(pc.is_in(qrels["query_id"], value_set=queries["id"].combine_chunks()))
    dropped = tuple(without.to_pylist()) if queries_without_relevant == "drop" else ()
    if not len(queries):
        raise UserError(f"{name}: not one of the queries has a relevant document; look at ids and grades of the qrels")
    empty = pc.filter(queries["id"], pc.equal(pc.utf8_trim_whitespace(queries["text"]), ""))
    _refuse(name, empty, "queries have no text", "drop them and their judgments")
    return Collection(name, as_dataset(documents), as_dataset(queries), as_dataset(qrels), dropped, num_junk)


def load_collection(name: str, *, queries_without_relevant: WithoutRelevant = "drop") -> Collection:
    """Cranfield, CISI, CACM or NPL (Vaswani) from `$REPRISE_DATA/cet`, all documents and all judgments.

    Three files each: `<name>_docs.jsonl.gz` (id, title, text), `<name>_queries.tsv` (qid, text) and `<name>_qrels.tsv`
    (qid, docid, grade), tables with a header. Cranfield codes its grades from 1, a complete answer, to 4, of minimum
    interest; here they are 5 minus the code, so that a greater grade is more relevant. The others' are all 1.
    Cranfield's texts repeat their title: it is cut off there, so that no word counts twice.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from shared.data.retrieval.formats import read_json_lines, read_table

    if name not in COLLECTIONS:
        raise UserError(f"there is no collection {name!r}; choose one of {', '.join(COLLECTIONS)}")
    documents = read_json_lines(
        locate("cet", f"{name}_docs.jsonl.gz"), {"id": pa.int64(), "title": pa.string(), "text": pa.string()}
    )
    queries = read_table(locate("cet", f"{name}_queries.tsv"), ("id", "text"), header=True)
    qrels = read_table(locate("cet", f"{name}_qrels.tsv"), ("query_id", "document_id", "grade"), header=True)
    if name == "cranfield":
        texts = [
            text.removeprefix(title).strip()
            for title, text in zip(documents["title"].to_pylist(), documents["text"].to_pylist(), strict=True)
        ]
        documents = documents.set_column(2, "text", pa.array(texts))
        qrels = qrels.set_column(2, "grade", pc.subtract(5, qrels["grade"]))
    return make_collection(name, documents, queries, qrels, queries_without_relevant=queries_without_relevant)


def as_dataset(table: pa.Table) -> datasets.Dataset:
    """A table as a `datasets.Dataset`, with a fingerprint of its content."""
    import datasets

    digest = hashlib.blake2b(str(table.schema).encode(), digest_size=8)
    for column in table.columns:
        for chunk in column.chunks:
            for buffer in filter(None, chunk.buffers()):
                digest.update(buffer)
    # The default fingerprint pickles the table, which takes its size in memory once more.
    return datasets.Dataset(table, fingerprint=digest.hexdigest())


def arrow_table(dataset: datasets.Dataset) -> pa.Table:
    """The rows of a data set as an Arrow table, also where it is a selection of another's."""
    return dataset.with_format("arrow")[:]


def positions(ids: pa.ChunkedArray, among: pa.ChunkedArray) -> NDArray[np.int64]:
    """The place of each id in `among`, int64; −1 where it is not there."""
    import pyarrow.compute as pc

    found = pc.index_in(ids, value_set=among.combine_chunks())
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def _columns(name: str, what: str, given: Any, schema: dict[str, pa.DataType]) -> pa.Table:
    """The columns of `schema`, in its types and without missing values; a missing title is empty."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(given, Mapping):
        table = pa.table({key: pa.array(values) for key, values in given.items()})
    else:
        table = given if isinstance(given, pa.Table) else arrow_table(given)
    if "title" in schema and "title" not in table.column_names:
        table = table.append_column("title", pa.array([""] * len(table), pa.string()))
    missing = [column for column in schema if column not in table.column_names]
    if missing:
        raise UserError(f"{name}: {what} lack {', '.join(missing)}; they have {', '.join(table.column_names)}")
    columns = {}
    for column, kind in schema.items():
        try:
            columns[column] = table[column].cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(f"{name}: {column} of {what} must be {kind}: {error}") from None
        if column == "title":
            columns[column] = pc.fill_null(columns[column], "")
        if columns[column].null_count:
            row = pc.index(columns[column].is_null(), True).as_py()
            raise UserError(f"{name}: {column} of {what} is missing in {columns[column].null_count} rows, first {row}")
    return pa.table(columns)


def _refuse(name: str, ids: pa.ChunkedArray | pa.Array, what: str, remedy: str) -> None:
    """An error that names the first of the ids, where there are any."""
    if not len(ids):
        return
    distinct = list(dict.fromkeys(ids.to_pylist()))
    shown = ", ".join(map(repr, distinct[:5])) + (f" and {len(distinct) - 5} more" if len(distinct) > 5 else "")
    raise UserError(f"{name}: {len(distinct)} {what}: {shown}; {remedy}")
