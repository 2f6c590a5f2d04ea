"""Files of retrieval collections: the layouts of BEIR, MS MARCO and TREC, and runs.

Files are read in blocks of whole lines straight into Arrow tables; a name may also be that of a gzipped file. Errors
name file and line.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError
from shared.data.retrieval.candidates import PAD, Candidates, check_depth, rank
from shared.data.retrieval.collection import (
    Collection,
    WithoutRelevant,
    arrow_table,
    as_dataset,
    make_collection,
    positions,
)
from shared.files import atomic_path

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

BLOCK_BYTES = 1 << 24
QRELS = ("query_id", "document_id", "grade")


def read_beir(folder: Path, split: str = "test", *, queries_without_relevant: WithoutRelevant = "drop") -> Collection:
    """A BEIR collection: `corpus.jsonl` (_id, title, text), `queries.jsonl` (_id, text), `qrels/<split>.tsv`.

    The judgments are a table with the header query-id, corpus-id, score. Queries of other splits have no judgments in
    it, and are dropped unless told otherwise (`make_collection`).
    """
    import pyarrow as pa

    folder = Path(folder)
    text = {"_id": pa.string(), "text": pa.string()}
    documents = read_json_lines(_find(folder, "corpus.jsonl"), {**text, "title": pa.string()}, optional=("title",))
    queries = read_json_lines(_find(folder, "queries.jsonl"), text)
    qrels = read_table(_find(folder, f"qrels/{split}.tsv"), QRELS, header=True)
    return make_collection(
        f"{folder.name}/{split}",
        documents.rename_columns({"_id": "id"}),
        queries.rename_columns({"_id": "id"}),
        qrels,
        queries_without_relevant=queries_without_relevant,
    )


def read_msmarco(folder: Path, split: str, *, queries_without_relevant: WithoutRelevant = "drop") -> Collection:
    """MS MARCO passages: `collection.tsv` (pid, passage), `queries.<split>.tsv` (qid, text), `qrels.<split>.tsv`.

    `split` is what stands in the official names, such as train, dev or dev.small. Judgments have four columns (qid, 0,
    pid, grade). Of the official training queries 40 % have no judgment, and are dropped unless told otherwise.
    """
    folder = Path(folder)
    return make_collection(
        f"{folder.name}/{split}",
        read_table(_find(folder, "collection.tsv"), ("id", "text")),
        read_table(_find(folder, f"queries.{split}.tsv"), ("id", "text")),
        _qrels_table(_find(folder, f"qrels.{split}.tsv")),
        queries_without_relevant=queries_without_relevant,
    )


def read_trec_qrels(path: Path) -> datasets.Dataset:
    """Judgments as TREC has them, four columns between blanks or tabs: query, an unused one, document, grade.

    Columns query_id, document_id, grade (int32, as in the file: negative ones too).
    """
    return as_dataset(_qrels_table(Path(path)))


def read_triples(path: Path) -> datasets.Dataset:
    """Training triples of ids, MS MARCO's `qidpidtriples.*.tsv`: query_id, positive_id, negative_id.

    Between tabs; a fourth and a fifth column, which some published files have, are left out.
    """
    names = ("query_id", "positive_id", "negative_id")
    return as_dataset(read_table(Path(path), names, more_columns=2))


def read_run(path: Path, collection: Collection, k: int | None = None) -> Candidates:
    """The candidates that a run file gives for each query of a collection; the k best, by default all.

    Six columns between blanks are TREC's (query, Q0, document, rank, score, tag), ordered by score. Three between tabs
    are MS MARCO's (qid, pid, rank), with −rank as score. Four are its `top1000` (qid, pid, query, passage), a set
    without order: all scores are 0. Ties go to the document with the smaller number.
    Queries of the collection that the run leaves out have pads only. `UserError` for queries and documents that the
    collection lacks, and for a document that is listed twice.
    """
    path = Path(path)
    names, whitespace = _run_layout(path)
    table = read_table(path, names, whitespace=whitespace, keep_lines=True)
    lines = table["line"].to_numpy()
    rows = positions(table["query_id"], arrow_table(collection.queries)["id"])
    documents = positions(table["document_id"], arrow_table(collection.documents)["id"])
    for what, places in (("query", rows), ("document", documents)):
        if (places < 0).any():
            wrong = int(np.argmax(places < 0))
            raise UserError(
                f"{path}, line {lines[wrong]}: {collection.name} has no {what} {table[f'{what}_id'][wrong].as_py()!r}"
            )
    pairs = rows * max(len(collection.documents), 1) + documents
    order = np.argsort(pairs, kind="stable")
    again = order[1:][pairs[order][1:] == pairs[order][:-1]]
    if len(again):
        first = int(again.min())
        raise UserError(
            f"{path}, line {lines[first]}: document {table['document_id'][first].as_py()!r} was listed for query "
            f"{table['query_id'][first].as_py()!r} before"
        )
    scores = np.zeros(len(rows))
    if "score" in table.column_names:
        scores = table["score"].to_numpy()
    elif "rank" in table.column_names:
        scores = -table["rank"].to_numpy()
    depth = int(np.bincount(rows, minlength=1).max()) if k is None else check_depth(k)
    return rank(rows, documents, scores, num_queries=len(collection.queries), k=depth)


def write_run(path: Path, collection: Collection, candidates: Candidates, tag: str = "reprise") -> None:
    """Write candidates as a TREC run: query, Q0, document, rank from 1, score, tag; whole or not at all."""
    import pandas as pd
    import pyarrow.compute as pc

    query_ids, document_ids = (arrow_table(part)["id"] for part in (collection.queries, collection.documents))
    num_lists = len(candidates.documents)
    if len(query_ids) != num_lists:
        raise UserError(
            f"{collection.name} has {len(query_ids)} queries, but there are {num_lists} lists of candidates"
        )
    rows, places = np.nonzero(candidates.documents != PAD)
    listed = {"query_id": query_ids.take(rows), "document_id": document_ids.take(candidates.documents[rows, places])}
    for ids in (*listed.values(), [tag]):
        broken = [each for each in pc.unique(ids).to_pylist() if not each or set(each) & set(" \t\n\r\v\f")]
        if broken:
            raise UserError(f"a TREC run has blanks between its columns, so {broken[0]!r} cannot be written in it")
    frame = pd.DataFrame(
        {
            "query": listed["query_id"].to_numpy(),
            "Q0": "Q0",
            "document": listed["document_id"].to_numpy(),
            "rank": places + 1,
            "score": candidates.scores[rows, places],
            "tag": tag,
        }
    )
    with atomic_path(path) as temporary:
        # Nine digits give back every float32.
        frame.to_csv(temporary, sep=" ", header=False, index=False, float_format="%.9g", lineterminator="\n")


# --- Tables and JSON lines --------------------------------------------------------------------------------------------


def read_table(
    path: Path,
    names: Sequence[str],
    *,
    header: bool = False,
    whitespace: bool = False,
    more_columns: int = 0,
    keep_lines: bool = False,
) -> pa.Table:
    """The columns `names` of a table between tabs, or between runs of blanks and tabs (`whitespace`).

    Columns are strings, apart from `grade` and `rank` (int32) and `score` (float64); '' as a name leaves a column out.
    A line may have up to `more_columns` further ones. `header` skips the first line; `keep_lines` adds the number of
    each row's line as `line`. Nothing is quoted. Lines of blanks only are skipped.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kinds = {name: _KINDS.get(name, "string") for name in names if name} | {"line": "int64"}
    tables = [pa.table({name: pa.array([], kind) for name, kind in kinds.items()})]
    for first, block in _blocks(path):
        lines = pc.list_flatten(pc.split_pattern(pa.array([block], pa.large_string()), "\n"))
        lines = pc.utf8_rtrim(lines, "\r")
        numbers = np.arange(first, first + len(lines))
        filled = pc.not_equal(pc.utf8_trim_whitespace(lines), "").to_numpy(zero_copy_only=False)
        if header and first == 1:
            filled[0] = False
        lines, numbers = lines.filter(pa.array(filled)), numbers[filled]
        if whitespace:
            fields = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(lines))
        else:
            fields = pc.split_pattern(lines, "\t")
        widths = pc.list_value_length(fields).to_numpy()
        wrong = (widths < len(names)) | (widths > len(names) + more_columns)
        if wrong.any():
            row = int(wrong.argmax())
            expected = _expected(names, more_columns, whitespace)
            raise UserError(f"{path}, line {numbers[row]}: expected {expected}, not {widths[row]}")
        columns = {name: pc.list_element(fields, place) for place, name in enumerate(names) if name}
        parsed = {name: _parsed(path, name, column, numbers) for name, column in columns.items()}
        tables.append(pa.table({**parsed, "line": pa.array(numbers)}))
    table = pa.concat_tables(tables)
    return table if keep_lines else table.drop_columns("line")


def read_json_lines(path: Path, schema: dict[str, pa.DataType], optional: Sequence[str] = ()) -> pa.Table:
    """The fields of `schema` of a file with one JSON object a line; of `optional` ones that are missing, ''."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.json

    parsing = pa.json.ParseOptions(explicit_schema=pa.schema(schema), unexpected_field_behavior="ignore")
    tables = [pa.schema(schema).empty_table()]
    for first, block in _blocks(path):
        content = block.encode()
        if not content.strip():
            continue
        reading = pa.json.ReadOptions(use_threads=False, block_size=len(content) + 1)
        try:
            table = pa.json.read_json(io.BytesIO(content), reading, parsing).select(list(schema))
        except pa.ArrowInvalid as error:
            _point_out(path, first, block, schema, optional)
            raise UserError(f"{path}, at or behind line {first}: {error}") from None
        for name in optional:
            table = table.set_column(table.column_names.index(name), name, pc.fill_null(table[name], ""))
        if any(column.null_count for column in table.columns):
            _point_out(path, first, block, schema, optional)
        tables.append(table)
    return pa.concat_tables(tables)


def _point_out(path: Path, first: int, block: str, schema: dict[str, pa.DataType], optional: Sequence[str]) -> None:
    """Find the line that Arrow's reader stumbled over, and say what is wrong with it."""
    import pyarrow as pa

    for number, line in enumerate(block.split("\n"), start=first):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: expected an object with {', '.join(schema)}, not {line[:60]!r}")
        for name, kind in schema.items():
            allowed, called = (str, "text") if kind == pa.string() else (int, "a whole number")
            value = record.get(name)
            if not isinstance(value, allowed) and not (value is None and name in optional):
                given = "missing" if value is None else repr(value)
                raise UserError(f"{path}, line {number}: {name!r} must be {called}, but is {given}")


_KINDS = {"grade": "int32", "rank": "int32", "score": "float64"}


def _parsed(path: Path, name: str, column: pa.Array, numbers: NDArray[np.int64]) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = _KINDS.get(name, "string")
    if kind == "string":
        return column.cast(pa.string())
    pattern = r"^-?\d{1,9}$" if kind == "int32" else r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
    wrong = pc.invert(pc.match_substring_regex(column, pattern)).to_numpy(zero_copy_only=False)
    if wrong.any():
        row = int(wrong.argmax())
        what = "a whole number" if kind == "int32" else "a finite number"
        raise UserError(f"{path}, line {numbers[row]}: {name} must be {what}, not {column[row].as_py()!r}")
    return column.cast(kind)


def _expected(names: Sequence[str], more_columns: int, whitespace: bool) -> str:
    columns = ", ".join(name or "(unused)" for name in names)
    up_to = f" to {len(names) + more_columns}" if more_columns else ""
    return f"{len(names)}{up_to} columns between {'blanks' if whitespace else 'tabs'} ({columns})"


def _blocks(path: Path) -> Iterator[tuple[int, str]]:
    """A plain or gzipped file's text in blocks of whole lines, each with the number of its first line."""
    import pyarrow as pa

    number, rest = 1, b""
    try:
        with pa.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else None) as file:
            while True:
                read = file.read(BLOCK_BYTES)
                content = rest + read
                cut = content.rfind(b"\n") + 1 if read else len(content)
                whole, rest = content[:cut], content[cut:]
                if whole:
                    yield number, _text(path, number, whole)
                    number += whole.count(b"\n")
                if not read:
                    return
    except FileNotFoundError:
        raise UserError(f"{path} is missing: put the file there, plain or gzipped") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read behind line {number - 1}: {error}") from None


def _text(path: Path, number: int, content: bytes) -> str:
    if number == 1:
        content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        # Without the last line's end, so that no empty line follows it.
        return content.removesuffix(b"\n").decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + content[: error.start].count(b"\n")
        raise UserError(f"{path}, line {line} is not UTF-8 text: {error.reason}") from None


def _find(folder: Path, name: str) -> Path:
    """A file of a folder, plain or else gzipped."""
    plain, packed = folder / name, folder / f"{name}.gz"
    return packed if packed.is_file() and not plain.is_file() else plain


def _qrels_table(path: Path) -> pa.Table:
    return read_table(path, ("query_id", "", "document_id", "grade"), whitespace=True)


def _run_layout(path: Path) -> tuple[tuple[str, ...], bool]:
    """The columns of a run file by its first line, and whether blanks separate them."""
    block = next((block for _, block in _blocks(path) if block.strip()), "")
    first = next((line for line in block.split("\n") if line.strip()), "")
    tabs = first.count("\t") + 1
    if tabs == 3:
        return ("query_id", "document_id", "rank"), False
    if tabs == 4:
        return ("query_id", "document_id", "", ""), False
    if len(first.split()) == 6:
        return ("query_id", "", "document_id", "", "score", ""), True
    raise UserError(
        f"{path} is no run: expected TREC's 6 columns between blanks, or MS MARCO's 3 (qid, pid, rank) or 4 "
        f"(qid, pid, query, passage) between tabs, not {first[:80]!r}"
    )
