"""Tables with named, described columns and a class to predict: reading, targets, splits, and inputs of baselines.

The steps, each of which can be used alone:

    table = read_table(path, target="income", column_descriptions={"age": "Age in years."})
    classes = target_classes(table)                     # labels and names; numeric targets in four bins
    train, test = split_rows(table, classes.labels)     # row numbers, the same however the file is ordered
    encoder = baseline_encoder(table).fit(feature_frame(table, train))
    inputs = encoder.transform(feature_frame(table, test))

What a loader mends instead of refusing, it counts in `table.notes`.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ConfigDict

from shared.config import Strict, UserError, validate

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from datasets import Dataset
    from sklearn.compose import ColumnTransformer

Kind = Literal["numeric", "categorical", "text", "date"]
Rows = NDArray[np.int64]

KINDS: tuple[str, ...] = get_args(Kind)
# Cells that count as missing, spaces around them aside. "None" is not among them: it is often a category.
MISSING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "?")
# The first of them that every cell of a column fits is taken.
DATE_FORMATS = (
    "%Y-%m-%d",
    "%Y-%m-%dT%H:%M:%SZ",
    "%Y-%m-%dT%H:%M:%S",
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%d %H:%M",
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%d.%m.%Y",
)
# Strings are free text where they have more distinct values than this, and more than half of the rows differ.
MAX_REPEATED = 20
FEW_SHOT_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Column:
    """A column's name, what kind of values it holds, and what they mean in words (may be empty)."""

    name: str
    kind: Kind
    description: str = ""


@dataclass(frozen=True)
class Table:
    """A table to classify the rows of.

    `data` holds int64 or float64 for numeric columns, strings for categorical and text, timestamps (UTC) for dates, and
    None where a value is missing; the target never is. `ids` [rows] are digests of the rows' contents, by which splits
    stay the same when rows or columns are reordered. `notes` counts what the loader did, by name: `ragged_rows` and
    `rows_without_target` were left out, `empty_columns` (nothing in them but missing cells) too, `infinite_values`
    became missing, `unnamed_columns` were named, `ambiguous_dates` columns were read with the day first.
    """

    name: str
    description: str
    columns: tuple[Column, ...]
    target: str
    data: Dataset
    ids: NDArray[np.uint64]
    notes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        if self.data.column_names != names or self.target not in names or len(self.ids) != len(self.data):
            raise UserError(
                f"table {self.name!r}: columns {names}, target {self.target!r} and {len(self.ids)} ids do not fit the "
                f"data, {len(self.data)} rows of {self.data.column_names}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def features(self) -> tuple[Column, ...]:
        """All columns but the target, in order."""
        return tuple(column for column in self.columns if column.name != self.target)

    def column(self, name: str) -> Column:
        """The column of that name; `UserError` if there is none."""
        found = [column for column in self.columns if column.name == name]
        if not found:
            raise _unknown_column(f"table {self.name!r}", name, [column.name for column in self.columns])
        return found[0]

    def select(self, rows: ArrayLike) -> Table:
        """The table of these rows, in the order given."""
        rows = np.asarray(rows)
        ids = self.ids[rows]
        return replace(self, data=_dataset(_arrow(self).take(rows), ids), ids=ids)

    def with_features(self, names: Iterable[str]) -> Table:
        """The table with these features only, in the order given, and the target last. Splits stay what they were."""
        kept = [*(name for name in names if name != self.target), self.target]
        columns = tuple(self.column(name) for name in kept)
        return replace(self, columns=columns, data=_dataset(_arrow(self).select(kept), self.ids))


class TablePools(NamedTuple):
    """Tables for the joint training, and small ones that are held out for transfer."""

    supervised: tuple[Table, ...]
    few_shot: tuple[Table, ...]


@dataclass(frozen=True)
class Classes:
    """Labels [rows], whole numbers from 0, and the classes' `names`; for a numeric target the `edges` of its bins.

    Bin i holds values v with edges[i-1] < v ≤ edges[i]; below the first and above the last edge it is open.
    """

    labels: NDArray[np.int64]
    names: tuple[str, ...]
    edges: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)


class Split(NamedTuple):
    """Row numbers of the two sides, ascending."""

    train: Rows
    test: Rows


# ------------------------------------------------------------------------------------------------------------- reading


def read_table(
    path: Path,
    target: str,
    *,
    name: str | None = None,
    description: str = "",
    column_descriptions: Mapping[str, str] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    missing: Sequence[str] = MISSING,
    delimiter: str | None = None,
    ragged: Literal["error", "drop"] = "error",
) -> Table:
    """Read `.csv`, `.tsv` (both also `.gz`, in UTF-8, with a header) or `.parquet`; see `make_table`.

    `ragged="drop"` leaves out rows with too few or too many cells and counts them. `UserError` for files that are
    missing, empty, damaged or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing: give the path of a .csv, .tsv, .csv.gz or .parquet file")
    suffixes = path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]
    notes: Counter[str] = Counter()
    if suffixes == [".parquet"]:
        data = _read_parquet(path)
    elif suffixes and suffixes[0] in (".csv", ".tsv"):
        data = _read_csv(path, delimiter or ("\t" if suffixes[0] == ".tsv" else ","), ragged, notes)
    else:
        raise UserError(f"{path} is of no known format: give a .csv, .tsv, .csv.gz or .parquet file")
    return make_table(
        data,
        target,
        name=name or path.name.removesuffix("".join(suffixes)),
        description=description,
        column_descriptions=column_descriptions,
        kinds=kinds,
        missing=missing,
        notes=notes,
    )


def make_table(
    data: pa.Table | pd.DataFrame,
    target: str,
    *,
    name: str,
    description: str = "",
    column_descriptions: Mapping[str, str] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    missing: Sequence[str] = MISSING,
    notes: Mapping[str, int] | None = None,
) -> Table:
    """Give every column of an Arrow table or data frame its kind and type.

    Strings are numeric where every cell is a number, else dates where every cell fits one of `DATE_FORMATS`, else text
    where most rows differ, else categorical; numbers, dates, truth values and dictionaries are what their types say.
    `kinds` overrides this for the columns it names. Rows without target and columns without any value are left out and
    counted in `notes`.

    `UserError` for a target that is not there or has no value, names that are there twice, no rows, types without a
    place in a table (lists, structs), and a column that cannot be of the kind asked for.
    """
    import pyarrow as pa

    where = f"table {name!r}"
    if not isinstance(data, pa.Table):
        data = _from_frame(data, where)
    counts = Counter(notes or {})
    data = data.rename_columns(_column_names(data.column_names, where, counts))
    for wanted in (target, *(kinds or {})):
        if wanted not in data.column_names:
            raise _unknown_column(where, wanted, data.column_names)
    if not len(data):
        raise UserError(f"{where} has no rows: there must be a header and at least one row below it")

    arrays: dict[str, pa.Array] = {}
    columns: list[Column] = []
    for column_name, chunks in zip(data.column_names, data.columns, strict=True):
        kind = (kinds or {}).get(column_name)
        if kind is not None and kind not in KINDS:
            raise UserError(f"{where}: {column_name!r} cannot be {kind!r}; kinds are {', '.join(KINDS)}")
        array, kind = _typed(_combined(chunks), kind, missing, f"{where}, column {column_name!r}", counts)
        arrays[column_name] = array
        columns.append(Column(column_name, kind, (column_descriptions or {}).get(column_name, "")))

    has_target = arrays[target].is_valid()
    if not has_target.true_count:
        raise UserError(f"{where}: the target {target!r} has no value in any row; choose another target")
    counts["rows_without_target"] += len(data) - has_target.true_count
    typed = pa.table(arrays).filter(has_target)
    columns = [column for column in columns if typed[column.name].null_count < len(typed)]
    counts["empty_columns"] += typed.num_columns - len(columns)
    typed = typed.select([column.name for column in columns])
    kept_notes = {note: count for note, count in counts.items() if count}
    ids = _row_ids(typed)
    return Table(name, description, tuple(columns), target, _dataset(typed, ids), ids, kept_notes)


class TableEntry(Strict):
    """What `load_tables` needs of an entry of metadata.json; further keys are allowed."""

    model_config = ConfigDict(extra="ignore")

    name: str
    file: str
    title: str
    target: str
    target_kind: Literal["categorical", "numeric_to_4_bins"]
    description: str
    column_explanations: dict[str, str]
    role: Literal["supervised", "few_shot"]


def load_tables(folder: Path) -> TablePools:
    """Read a folder of described tables, such as `$REPRISE_DATA/unipredict`, in the order of its metadata.json.

    The description is the title and the written description. Nothing is cached on disk: the 118 tables take about a
    second.
    """
    folder = Path(folder)
    path = folder / "metadata.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: point REPRISE_DATA to the folder that holds your data sets; this one needs "
            "metadata.json and tables/"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(entries, list):
        raise UserError(f"{path} must be a list with one entry a table")
    pools: dict[str, list[Table]] = {"supervised": [], "few_shot": []}
    for number, content in enumerate(entries):
        entry = validate(TableEntry, content, f"{path}, entry {number}")
        table = read_table(
            folder / entry.file,
            entry.target,
            name=entry.name,
            description=_sentences(entry.title, entry.description),
            column_descriptions=entry.column_explanations,
            kinds={entry.target: "categorical" if entry.target_kind == "categorical" else "numeric"},
            missing=("",),
        )
        pools[entry.role].append(table)
    return TablePools(tuple(pools["supervised"]), tuple(pools["few_shot"]))


def _sentences(title: str, description: str) -> str:
    title, description = title.strip(), description.strip()
    if not title or not description or description.startswith(title):
        return description or title
    return f"{title.rstrip('.')}. {description}"


def _read_parquet(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}. It must be whole") from None


def _read_csv(path: Path, delimiter: str, ragged: str, notes: Counter[str]) -> pa.Table:
    """Every cell as a string, so that types can be told from whole columns and not from the first rows."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        text = io.StringIO(content.decode("utf-8-sig"), newline="")
        header = next((row for row in csv.reader(text, delimiter=delimiter) if row), None)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}. It must be UTF-8 text, whole, with a header") from None
    if header is None:
        raise UserError(f"{path} is empty: there must be a header and at least one row below it")

    wrong: list[arrow_csv.InvalidRow] = []

    def skip(row: arrow_csv.InvalidRow) -> str:
        wrong.append(row)
        return "skip"

    try:
        cells = arrow_csv.read_csv(
            pa.BufferReader(content),
            arrow_csv.ReadOptions(use_threads=False, autogenerate_column_names=True),
            arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip),
            arrow_csv.ConvertOptions(
                column_types={f"f{index}": pa.string() for index in range(len(header))}, strings_can_be_null=False
            ),
        )
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}. It must be UTF-8 text, whole, with a header") from None
    if "\n" in cells.columns[-1][-1].as_py() and not content.rstrip().endswith(b'"'):
        raise UserError(f"{path} ends inside a quoted cell: a quote is never closed, and takes in the rows behind it")
    if wrong and ragged == "error":
        first = wrong[0]
        raise UserError(
            f"{path}: {len(wrong)} rows do not have the header's {first.expected_columns} cells, the first being row "
            f"{first.number} with {first.actual_columns}. Mend the file (a quote that is missing?), check the "
            "delimiter, or pass ragged='drop' to leave such rows out"
        )
    notes["ragged_rows"] += len(wrong)
    return cells.slice(1).rename_columns(header)


def _from_frame(frame: pd.DataFrame, where: str) -> pa.Table:
    import pyarrow as pa

    names = [str(name) for name in frame.columns]
    # Arrow's own message on names that are there twice names none of them.
    _column_names(names, where, Counter())
    try:
        return pa.Table.from_pandas(frame.set_axis(names, axis=1), preserve_index=False)
    except (pa.ArrowException, TypeError) as error:
        raise UserError(f"{where}: a column mixes types: {error}. Convert it to strings or to numbers first") from None


def _column_names(names: Sequence[str], where: str, notes: Counter[str]) -> list[str]:
    stripped = [name.strip() for name in names]
    repeated = [name for name, count in Counter(filter(None, stripped)).items() if count > 1]
    if repeated:
        raise UserError(
            f"{where}: columns are there twice: {', '.join(map(repr, repeated))}. Rename or drop one of them"
        )
    notes["unnamed_columns"] += stripped.count("")
    return [name or f"column_{number}" for number, name in enumerate(stripped, start=1)]


def _unknown_column(where: str, name: str, names: Sequence[str]) -> UserError:
    close = difflib.get_close_matches(name, names, n=1)
    hint = f": did you mean {close[0]!r}?" if close else "."
    shown = ", ".join(map(repr, names[:30])) + (" …" if len(names) > 30 else "")
    return UserError(f"{where} has no column {name!r}{hint} There are {shown}")


# --------------------------------------------------------------------------------------------------------------- types


def _combined(chunks: pa.ChunkedArray) -> pa.Array:
    combined = chunks.combine_chunks()
    return combined if not hasattr(combined, "chunks") else combined.chunk(0)


def _typed(
    array: pa.Array, kind: Kind | None, missing: Sequence[str], where: str, notes: Counter[str]
) -> tuple[pa.Array, Kind]:
    """The array in the type of its kind, and the kind; told from the values if it is None."""
    import pyarrow as pa
    import pyarrow.compute as pc

    types = pa.types
    if types.is_dictionary(array.type):
        array, kind = array.dictionary_decode(), kind or "categorical"
    if types.is_boolean(array.type):
        array, kind = pc.if_else(array, "True", "False"), kind or "categorical"
    if types.is_string(array.type) or types.is_large_string(array.type) or types.is_string_view(array.type):
        return _typed_strings(_trimmed(array.cast(pa.string()), missing), kind, where, notes)
    if types.is_null(array.type):
        return array.cast(pa.string()), kind or "categorical"
    if types.is_integer(array.type) or types.is_floating(array.type) or types.is_decimal(array.type):
        whole = types.is_integer(array.type) and not types.is_uint64(array.type)
        numbers = _finite(array.cast(pa.int64() if whole else pa.float64(), safe=False), notes)
        if kind in ("categorical", "text"):
            return _as_names(numbers), kind
        found: Kind = "numeric"
    elif types.is_date(array.type) or types.is_timestamp(array.type):
        numbers, found = array.cast(pa.timestamp("s"), safe=False), "date"
    else:
        raise UserError(f"{where} is of type {array.type}, which has no place in a table: flatten or drop it")
    if kind not in (None, found):
        raise UserError(f"{where} holds {array.type} and cannot be {kind!r}: it is {found!r}")
    return numbers, found


def _typed_strings(array: pa.Array, kind: Kind | None, where: str, notes: Counter[str]) -> tuple[pa.Array, Kind]:
    import pyarrow.compute as pc

    if kind in ("categorical", "text", "numeric", None):
        numbers = _numbers(array)
        if numbers is not None and numbers.null_count < len(numbers) and kind != "text":
            numbers = _finite(numbers, notes)
            return (_as_names(numbers), kind) if kind == "categorical" else (numbers, "numeric")
        if kind == "numeric" and array.null_count < len(array):
            raise UserError(f"{where} cannot be numeric: {_first_unreadable(array)!r} is not a number")
    if kind in ("date", None) and array.null_count < len(array):
        dates = _dates(array, notes)
        if dates is not None:
            return dates, "date"
        if kind == "date":
            raise UserError(f"{where} cannot be a date: its cells fit none of the formats {', '.join(DATE_FORMATS)}")
    if kind is None:
        distinct = pc.count_distinct(array).as_py()
        differs = distinct > MAX_REPEATED and distinct > (len(array) - array.null_count) / 2
        kind = "text" if differs else "categorical"
    return array, kind


def _trimmed(array: pa.Array, missing: Sequence[str]) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    trimmed = pc.utf8_trim_whitespace(array)
    is_missing = pc.is_in(trimmed, value_set=pa.array(sorted({"", *missing})))
    return pc.if_else(is_missing, pa.scalar(None, pa.string()), trimmed)


def _numbers(array: pa.Array) -> pa.Array | None:
    """Integers if all are, else floating point, or None where a string is no number."""
    import pyarrow as pa

    for kind in (pa.int64(), pa.float64()):
        try:
            return array.cast(kind)
        except pa.ArrowInvalid:
            continue
    return None


def _first_unreadable(array: pa.Array) -> str:
    import pyarrow as pa

    return next(value for value in array.drop_null().to_pylist() if _numbers(pa.array([value])) is None)


def _finite(numbers: pa.Array, notes: Counter[str]) -> pa.Array:
    """Not-a-number and infinity as missing; infinite values are counted."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_floating(numbers.type):
        return numbers
    notes["infinite_values"] += pc.sum(pc.is_inf(numbers)).as_py() or 0
    return pc.if_else(pc.is_finite(numbers), numbers, pa.scalar(None, numbers.type))


def _as_names(numbers: pa.Array) -> pa.Array:
    """Numbers as the names of classes: 1.0 and 1 are both "1"."""
    import pyarrow as pa

    return numbers.cast(pa.string())


def _dates(array: pa.Array, notes: Counter[str]) -> pa.Array | None:
    """Timestamps in seconds by the first format that every cell fits, or None."""
    import pyarrow.compute as pc

    def parsed(cells: pa.Array, date_format: str) -> pa.Array:
        return pc.strptime(cells, format=date_format, unit="s", error_is_null=True)

    # One cell tells most columns that hold no dates.
    sample = array.drop_null()[:1]
    formats = [date_format for date_format in DATE_FORMATS if not parsed(sample, date_format).null_count]
    fitting = [dates for dates in (parsed(array, one) for one in formats) if dates.null_count == array.null_count]
    notes["ambiguous_dates"] += len(fitting) > 1
    return fitting[0] if fitting else None


def _row_ids(data: pa.Table) -> NDArray[np.uint64]:
    """A digest of each row's content whatever the order of rows and columns; equal rows are told apart by counting."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def as_strings(array: pa.ChunkedArray) -> pa.ChunkedArray:
        # Files of one content may say 1 or 1.0.
        return (array.cast(pa.float64(), safe=False) if pa.types.is_integer(array.type) else array).cast(pa.string())

    columns = [as_strings(data[name]) for name in sorted(data.column_names)]
    rows = pc.binary_join_element_wise(*columns, "\x1f", null_handling="replace", null_replacement="\x00").to_pylist()
    seen: Counter[str] = Counter()
    ids = np.empty(len(rows), dtype=np.uint64)
    for number, row in enumerate(rows):
        ids[number] = _digest(f"{seen[row]}\x1f{row}")
        seen[row] += 1
    return ids


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _dataset(data: pa.Table, ids: NDArray[np.uint64]) -> Dataset:
    from datasets import Dataset

    # Without a fingerprint the data set makes one by pickling itself, which takes longer than reading the file.
    digest = hashlib.blake2b(str(data.schema.remove_metadata()).encode(), digest_size=8)
    digest.update(ids.tobytes())
    return Dataset(data, fingerprint=digest.hexdigest())


def _arrow(table: Table) -> pa.Table:
    return table.data.with_format("arrow")[:]


# ------------------------------------------------------------------------------------------------------------- targets


def target_classes(
    table: Table,
    *,
    num_bins: int = 4,
    bin_rows: ArrayLike | None = None,
    max_distinct: int = 10,
    max_classes: int = 100,
) -> Classes:
    """The classes of a table's target: its values, or bins at the quantiles where it is numeric or a date.

    A numeric target of at most `max_distinct` values is taken for classes. Bins lie at the quantiles of `bin_rows`, by
    default of all rows (as UniPredict has it, which lets test rows place the edges); where values tie at an edge, bins
    that would be empty are joined, so there may be fewer than `num_bins`. Names are sorted, as numbers where all are.

    `UserError` where only one class comes out, or more than `max_classes`.
    """
    values = _arrow(table)[table.target]
    where = f"table {table.name!r}: the target {table.target!r}"
    kind = table.column(table.target).kind
    if kind == "date" or (kind == "numeric" and len(values.unique()) > max_distinct):
        numbers = _as_floats(values)
        fitted = numbers if bin_rows is None else numbers[np.asarray(bin_rows)]
        edges = quantile_edges(fitted, num_bins)
        if not len(edges):
            raise UserError(f"{where} is all but constant: no quantile divides it; choose another target")
        return Classes(np.searchsorted(edges, numbers, side="left"), _bin_names(edges), tuple(edges.tolist()))
    strings = (_as_names(values) if kind == "numeric" else values).to_numpy()
    names, labels = np.unique(strings.astype(str), return_inverse=True)
    if len(names) == 1:
        raise UserError(
            f"{where} has one class only, {str(names[0])!r}: there is nothing to predict; choose another target"
        )
    if len(names) > max_classes:
        raise UserError(
            f"{where} has {len(names)} classes, and {max_classes} are allowed: choose another target, raise "
            "max_classes, or read a column of numbers with the kind 'numeric', which bins it"
        )
    order = np.argsort(_sort_keys(names), kind="stable")
    return Classes(np.argsort(order)[labels], tuple(names[order].tolist()))


def quantile_edges(values: ArrayLike, num_bins: int = 4) -> NDArray[np.float64]:
    """Ascending edges [at most num_bins - 1] between bins of about equal size; each bin (edge, next edge] has a value.

    They lie at the quantiles i / num_bins, interpolated linearly. Constant values have no edges.
    """
    values = np.asarray(values, dtype=np.float64)
    if num_bins < 2 or not values.size or not np.isfinite(values).all():
        raise UserError(
            f"bins need finite values, and there must be two bins at least (given: {values.size} values, of which "
            f"{int(np.isfinite(values).sum())} are finite, for {num_bins} bins)"
        )
    edges = np.unique(np.quantile(values, np.arange(1, num_bins) / num_bins))
    occupied = np.unique(np.searchsorted(edges, values, side="left"))
    return edges[occupied[:-1]]


def _bin_names(edges: NDArray[np.float64]) -> tuple[str, ...]:
    """Names such as "<= 2.74", "2.74 - 3.15" and "> 3.15": three significant digits, or as many as tell edges apart."""
    digits = next(n for n in range(3, 18) if n == 17 or len({f"{edge:.{n}g}" for edge in edges}) == len(edges))
    shown = [f"{float(f'{edge:.{digits}g}'):.15g}" if digits < 15 else repr(float(edge)) for edge in edges]
    between = [f"{low} - {high}" for low, high in pairwise(shown)]
    return (f"<= {shown[0]}", *between, f"> {shown[-1]}")


def _sort_keys(names: NDArray[np.str_]) -> NDArray[np.float64] | NDArray[np.str_]:
    try:
        return names.astype(np.float64)
    except ValueError:
        return names


def _as_floats(values: pa.ChunkedArray) -> NDArray[np.float64]:
    """Numbers, or days since 1970, with NaN for what is missing."""
    import pyarrow as pa

    if pa.types.is_timestamp(values.type):
        return values.cast(pa.int64()).to_pandas().to_numpy(np.float64, na_value=np.nan) / 86_400
    return values.cast(pa.float64(), safe=False).to_pandas().to_numpy(np.float64, na_value=np.nan)


# -------------------------------------------------------------------------------------------------------------- splits


def split_order(table: Table, labels: ArrayLike | None = None, *, seed: int = 0) -> Rows:
    """Row numbers in a random order of which every beginning is a training part.

    The order is a function of the table's name, the seed and the rows' contents, not of the order they lie in. With
    `labels` it is stratified: row r of n in its class stands at (r + 1/2) / n, so each beginning holds the classes in
    their proportions (Sainte-Laguë's rule), and larger training parts contain the smaller ones.
    """
    keys = np.array([_digest(f"{table.name}\x1f{seed}\x1f{row}") for row in table.ids.tolist()], dtype=np.uint64)
    order = np.argsort(keys)
    if labels is None:
        return order
    labels = np.asarray(labels)
    if labels.shape != (len(table),):
        raise UserError(f"table {table.name!r} has {len(table)} rows, but labels are of shape {labels.shape}")
    _, classes, sizes = np.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = np.argsort(classes, kind="stable")
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    position = np.empty(len(order))
    position[by_class] = (np.arange(len(order)) - starts + 0.5) / sizes[classes[by_class]]
    return order[np.argsort(position, kind="stable")]


def split_rows(table: Table, labels: ArrayLike | None = None, *, train_fraction: float = 0.9, seed: int = 0) -> Split:
    """Divide the rows in two, stratified by `labels` if given; see `split_order`.

    The training part has round(train_fraction · rows) rows, at least one and not all. A class too small for its share
    to reach half a row is absent from it. `UserError` for a fraction outside (0, 1) and for fewer than two rows.
    """
    return _divided(table, split_order(table, labels, seed=seed), train_fraction)


def few_shot_splits(
    table: Table, labels: ArrayLike | None = None, *, ratios: Sequence[float] = FEW_SHOT_RATIOS, seed: int = 0
) -> dict[float, Split]:
    """One split for each ratio of training rows; the training part of a ratio contains those of the smaller ones."""
    order = split_order(table, labels, seed=seed)
    return {ratio: _divided(table, order, ratio) for ratio in ratios}


def _divided(table: Table, order: Rows, fraction: float) -> Split:
    if not 0 < fraction < 1:
        raise UserError(f"the training part must be between 0 and 1 of the rows, both excluded (given: {fraction})")
    if len(order) < 2:
        raise UserError(f"table {table.name!r} has {len(order)} rows: two are needed to split it")
    size = min(max(1, round(fraction * len(order))), len(order) - 1)
    return Split(np.sort(order[:size]), np.sort(order[size:]))


# ----------------------------------------------------------------------------------------------- inputs of baselines


def feature_frame(table: Table, rows: ArrayLike | None = None) -> pd.DataFrame:
    """The features of all rows or of these, as `baseline_encoder` reads them.

    Numbers and dates (in days since 1970) are float64 with NaN where missing; categories and text are strings, ""
    where missing, which is a category of its own.
    """
    import pandas as pd
    import pyarrow.compute as pc

    data = _arrow(table)
    if rows is not None:
        data = data.take(np.asarray(rows))
    return pd.DataFrame(
        {
            column.name: _as_floats(data[column.name])
            if column.kind in ("numeric", "date")
            else pc.fill_null(data[column.name], "").to_numpy().astype(object)
            for column in table.features
        }
    )


def baseline_encoder(
    table: Table,
    *,
    categories: Literal["one_hot", "ordinal"] = "one_hot",
    numbers: Literal["standardized", "raw"] = "standardized",
    max_categories: int = 100,
) -> ColumnTransformer:
    """An unfitted scikit-learn transformer from `feature_frame`s to float64 [rows, inputs], for baselines.

    Its block "numbers" comes first: missing values become the median and an indicator, and all is standardized; or they
    stay NaN and nothing is changed (`raw`, for trees that know missing values). Block "categories", text included:
    one input a category, or one whole number a column, in which 0 is any category that the fitted rows do not have.
    The most frequent `max_categories` of a column count, the rest is one more; a category not seen in fitting is that
    one too where there is one. Fit it on training rows only. `UserError` for a table without features.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler

    if not table.features:
        raise UserError(f"table {table.name!r} has no features beside its target")
    numeric = [column.name for column in table.features if column.kind in ("numeric", "date")]
    others = [column.name for column in table.features if column.kind not in ("numeric", "date")]
    impute = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
    if categories == "one_hot":
        encode = OneHotEncoder(handle_unknown="infrequent_if_exist", max_categories=max_categories, sparse_output=False)
    else:
        codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, max_categories=max_categories)
        encode = make_pipeline(codes, FunctionTransformer(_from_one, feature_names_out="one-to-one"))
    return ColumnTransformer(
        [
            (
                "numbers",
                make_pipeline(impute, StandardScaler()) if numbers == "standardized" else "passthrough",
                numeric,
            ),
            ("categories", encode, others),
        ],
        sparse_threshold=0,
    )


def category_sizes(encoder: ColumnTransformer) -> list[int]:
    """How many values each column of a fitted ordinal encoder's block "categories" has, 0 for unseen included.

    Embeddings need them: `encoder.output_indices_` gives the block's columns, which hold 0 … size - 1.
    """
    fitted = encoder.named_transformers_["categories"]
    if not hasattr(fitted, "named_steps"):
        raise UserError("category_sizes needs baseline_encoder(…, categories='ordinal'), fitted")
    codes = fitted.named_steps["ordinalencoder"]
    rare = codes.infrequent_categories_ if codes.max_categories else [None] * len(codes.categories_)
    return [
        1 + len(known) - (len(few) - 1 if few is not None else 0)
        for known, few in zip(codes.categories_, rare, strict=True)
    ]


def _from_one(codes: NDArray[np.float64]) -> NDArray[np.float64]:
    return codes + 1
