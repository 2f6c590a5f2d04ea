"""Tables to classify, their splits, and the targets that a language model is to write.

`described` tables lie in `$REPRISE_DATA/unipredict/` as `shared.data.tabular.load_tables` documents: metadata.json and
tables/*.csv.gz, 118 real tables of which 76 (500 rows and more) are for the joint training and 42 are held out.
`embedded` ones are scikit-learn's (one for the joint training, three held out) and those of `structural.py`.

For every table: classes (quartiles of a numeric target), splits, and the probabilities of a calibrated XGBoost on the
training part of each split. `reference` is what the published evaluation takes for the truth: the same trees, fitted on
all rows, test rows and their labels included. A table that cannot be used (one class only, no features, a prompt longer
than allowed) is left out, and the index says why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.config import Stage, UserError
from shared.data.fetch import locate
from shared.data.tabular import Classes, Split, Table, load_tables, make_table, split_order, split_rows, target_classes
from shared.files import atomic_path, write_json
from shared.training import Job, run_jobs
from shared.training.parallel import Report

from .augment import augmented_targets
from .config import Params
from .prompts import candidate_answers, write_answers, write_prompts
from .structural import generate
from .tokens import train_tokenizer

Array = NDArray[np.float64]
Pool = Literal["supervised", "few_shot"]
SUPERVISED = "supervised"
# Of each table in the training of the tokenizer.
TOKENIZER_ROWS = 100


@dataclass(frozen=True)
class Part:
    """A split of a table, and the targets [train rows, K] of its training part, by kind."""

    split: Split
    targets: dict[str, Array]


@dataclass(frozen=True)
class Task:
    """A table with its classes and its parts: one called `supervised`, or one for each ratio, such as `0.1`.

    `reference` [rows, K] are the probabilities that the published evaluation compares with, nan for rows in no part.
    """

    table: Table
    classes: Classes
    pool: Pool
    family: str
    parts: dict[str, Part]
    reference: Array

    @property
    def name(self) -> str:
        return self.table.name


@dataclass(frozen=True)
class Prepared:
    """All tasks, and about them: `source`, `digest`, and why tables were left out, by name."""

    tasks: tuple[Task, ...]
    source: str
    digest: str
    left_out: dict[str, str] = field(default_factory=dict)

    def pool(self, pool: Pool) -> list[Task]:
        return [task for task in self.tasks if task.pool == pool]


def prepare(stage: Stage[Params]) -> None:
    """Write `data/tables/`, `data/index.json` and the tokenizer."""
    params = stage.params
    sources = list(read_sources(params))
    # Several small jobs a process: tables differ in size.
    groups = [sources[start :: 4 * params.workers] for start in range(4 * params.workers)]
    jobs = [
        Job(f"{len(group)} tables from {group[0][0].name}", _make_tasks, (group, params)) for group in groups if group
    ]
    made = [each for part in run_jobs(jobs, workers=params.workers, threads=params.threads) for each in part]
    order = {table.name: place for place, (table, _, _) in enumerate(sources)}
    made.sort(key=lambda each: order[each[0]])
    tasks = [task for _, task in made if isinstance(task, Task)]
    left_out = {name: reason for name, reason in made if isinstance(reason, str)}
    if not any(task.pool == "supervised" for task in tasks):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
        raise UserError(f"no table is left for the joint training ({reasons})")
    save(stage.data_dir, tasks, source_of(params), left_out)
    if params.language.pretrained is None:
        bpe = train_tokenizer(list(tokenizer_texts(tasks, params)), params.language.vocab_size)
        with atomic_path(stage.data_dir / "tokenizer.json") as temporary:
            bpe.save(str(temporary))


def read_sources(params: Params) -> Iterator[tuple[Table, Pool, str]]:
    """Tables, each with its pool and family, as many as the profile asks for."""
    import pyarrow as pa

    settings = params.data
    if settings.source == "described":
        pools = load_tables(locate(settings.folder, "metadata.json").parent)
        by_pool = {"supervised": pools.supervised, "few_shot": pools.few_shot}
        every = [(table, pool, "real") for pool, tables in by_pool.items() for table in tables]
    else:
        every = [*embedded_tables()]
        for each in generate(settings.structural, params.seed):
            table = make_table(pa.table(each.columns), each.target, name=each.name, description=each.description)
            every.append((table, each.pool, each.family))
    for pool, limit in (("supervised", settings.supervised_tables), ("few_shot", settings.few_shot_tables)):
        chosen = [entry for entry in every if entry[1] == pool]
        if limit is not None and limit < len(chosen):
            chosen = [chosen[place] for place in np.linspace(0, len(chosen) - 1, limit).round().astype(int)]
        yield from chosen


def source_of(params: Params) -> str:
    if params.data.source == "described":
        return "real: tables of Rdatasets"
    return "generated: structural-model tables, and scikit-learn's"


def embedded_tables() -> Iterator[tuple[Table, Pool, str]]:
    """The classification tables that ship with scikit-learn, and its diabetes table in four bins."""
    from sklearn import datasets

    about = {
        "breast_cancer": ("supervised", "Measurements of cell nuclei in images of breast masses."),
        "iris": ("few_shot", "Measurements of flowers of three species of iris."),
        "wine": ("few_shot", "Chemical analysis of wines of three cultivars from one region of Italy."),
        "diabetes": (
            "few_shot",
            "Patients with diabetes, and its progression a year later. Features are scaled.",
        ),
    }
    for name, (pool, description) in about.items():
        loaded = getattr(datasets, f"load_{name}")(as_frame=True)
        frame = loaded.data.copy()
        names = getattr(loaded, "target_names", None)
        frame["target"] = loaded.target if names is None else np.asarray(names)[loaded.target]
        kinds = {"target": "numeric" if name == "diabetes" else "categorical"}
        yield make_table(frame, "target", name=f"sklearn__{name}", description=description, kinds=kinds), pool, "real"


# --- One table --------------------------------------------------------------------------------------------------------


def _make_tasks(
    sources: Sequence[tuple[Table, Pool, str]], params: Params, report: Report
) -> list[tuple[str, Task | str]]:
    made: list[tuple[str, Task | str]] = []
    for number, (table, pool, family) in enumerate(sources):
        try:
            made.append((table.name, make_task(table, pool, family, params)))
        except UserError as problem:
            made.append((table.name, str(problem)))
        report((number + 1) / len(sources), table.name)
    return made


def make_task(table: Table, pool: Pool, family: str, params: Params) -> Task:
    """Classes, splits and targets of a table; `UserError` says why it cannot be used."""
    classes = target_classes(table)
    first = write_prompts(table, classes.names, params.prompt, heavy=True, rows=[0]).whole(0)
    if len(first) > params.data.max_prompt_characters:
        raise UserError(
            f"table {table.name!r}: its first prompt has {len(first):,} characters, of which "
            f"max_prompt_characters ({params.data.max_prompt_characters:,}) are allowed"
        )
    splits = supervised_splits(table, params) if pool == "supervised" else few_shot_splits(table, params)
    parts = {}
    for key, split in splits.items():
        labels = classes.labels[split.train]
        augmented = augmented_targets(table, split.train, labels, len(classes), params.augmentation)
        one_hot = np.eye(len(classes))[labels]
        parts[key] = Part(split, {**augmented._asdict(), "one_hot": one_hot})
    used = np.unique(np.concatenate([side for part in parts.values() for side in part.split]))
    reference = np.full((len(table), len(classes)), np.nan)
    whole = augmented_targets(table, used, classes.labels[used], len(classes), params.augmentation)
    reference[used] = whole.in_sample
    return Task(table, classes, pool, family, parts, reference)


def supervised_splits(table: Table, params: Params) -> dict[str, Split]:
    """The one split of a table in the joint training, 90/10 at random as in the paper, cut to the profile's rows."""
    split = split_rows(table, train_fraction=params.data.train_fraction, seed=params.seed)
    return {SUPERVISED: _cut(table, split, params.data.train_rows, params.data.test_rows, params.seed)}


def few_shot_splits(table: Table, params: Params) -> dict[str, Split]:
    """A split for each ratio, at random and not by class as in the paper: classes may be absent from training parts."""
    settings = params.few_shot
    return {
        f"{ratio:g}": _cut(
            table,
            split_rows(table, train_fraction=ratio, seed=params.seed),
            settings.train_rows,
            settings.test_rows,
            params.seed,
        )
        for ratio in settings.ratios
    }


def _cut(table: Table, split: Split, train_rows: int, test_rows: int, seed: int) -> Split:
    """The first rows of the training part and the last of the test part, in the order that the split was drawn in."""
    order = split_order(table, seed=seed)
    size = len(split.train)
    return Split(np.sort(order[:size][:train_rows]), np.sort(order[size:][-test_rows:]))


def tokenizer_texts(tasks: Sequence[Task], params: Params) -> Iterator[str]:
    """Heavy prompts and answers of the joint training's training parts; held-out tables are not looked at."""
    for task in tasks:
        if task.pool != "supervised":
            continue
        part = task.parts[SUPERVISED]
        rows = part.split.train[:TOKENIZER_ROWS]
        parts = write_prompts(task.table, task.classes.names, params.prompt, heavy=True, rows=rows)
        yield from (parts.prefix, *parts.rows, parts.suffix)
        yield from write_answers(part.targets["in_sample"][:TOKENIZER_ROWS])
        yield from candidate_answers(len(task.classes), per_table=True)


# --- On disk ----------------------------------------------------------------------------------------------------------


def save(folder: Path, tasks: Sequence[Task], source: str, left_out: dict[str, str]) -> None:
    """Write each task's table (Parquet) and arrays (npz), and the index of all, which holds their digests."""
    import pyarrow.parquet as pq

    entries = []
    for task in tasks:
        arrays: dict[str, NDArray] = {"labels": task.classes.labels, "reference": task.reference}
        for key, part in task.parts.items():
            arrays |= {f"{key}/train": part.split.train, f"{key}/test": part.split.test}
            arrays |= {f"{key}/{kind}": values for kind, values in part.targets.items()}
        digest = hashlib.blake2b(task.table.ids.tobytes(), digest_size=16)
        for array in arrays.values():
            digest.update(array.tobytes())
        with atomic_path(folder / "tables" / f"{task.name}.parquet") as temporary:
            pq.write_table(task.table.data.with_format("arrow")[:], temporary)
        with atomic_path(folder / "tables" / f"{task.name}.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
        entries.append(
            {
                "name": task.name,
                "pool": task.pool,
                "family": task.family,
                "description": task.table.description,
                "target": task.table.target,
                "columns": {column.name: [column.kind, column.description] for column in task.table.columns},
                "classes": list(task.classes.names),
                "edges": None if task.classes.edges is None else list(task.classes.edges),
                "parts": list(task.parts),
                "notes": dict(task.table.notes),
                "digest": digest.hexdigest(),
            }
        )
    write_json(folder / "index.json", {"source": source, "tables": entries, "left_out": left_out})


def load(folder: Path, pool: Pool | None = None) -> Prepared:
    """Read what `save` wrote, of one pool or of both; `UserError` where it is missing or damaged."""
    path = folder / "index.json"
    try:
        text = path.read_text(encoding="utf-8")
        index = json.loads(text)
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): run the stage prepare again") from None
    tasks = tuple(_load_task(folder, entry) for entry in index["tables"] if pool in (None, entry["pool"]))
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Prepared(tasks, index["source"], digest, index["left_out"])


def _load_task(folder: Path, entry: dict[str, Any]) -> Task:
    import pyarrow.parquet as pq

    path = folder / "tables" / f"{entry['name']}.parquet"
    columns = entry["columns"]
    try:
        # One row group, read without threads: there is one process a core already.
        data = pq.ParquetFile(path).read(use_threads=False)
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): run the stage prepare again") from None
    table = make_table(
        data.replace_schema_metadata(None),
        entry["target"],
        name=entry["name"],
        description=entry["description"],
        column_descriptions={name: about for name, (_, about) in columns.items()},
        kinds={name: kind for name, (kind, _) in columns.items()},
        missing=("",),
        notes=entry["notes"],
    )
    parts = {}
    for key in entry["parts"]:
        split = Split(arrays[f"{key}/train"], arrays[f"{key}/test"])
        kinds = ("in_sample", "out_of_fold", "one_hot")
        parts[key] = Part(split, {kind: arrays[f"{key}/{kind}"] for kind in kinds})
    edges = None if entry["edges"] is None else tuple(entry["edges"])
    classes = Classes(arrays["labels"], tuple(entry["classes"]), edges)
    return Task(table, classes, entry["pool"], entry["family"], parts, arrays["reference"])
