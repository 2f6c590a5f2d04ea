"""Rows of tables as text, and what a language model answers, back as numbers.

A prompt has the parts of the paper's template:

    <task>
    Dataset description: <metadata>                            (heavy prompts only)
    Object description: age is 23; job title is admin.
    You should return the probability of each class by: class 0: xxx; class 1: xxx; where class 0 stands for "no"; …
    Answer:

and the answer is `class 0: 0.83; class 1: 0.17.`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.config import UserError
from shared.data.tabular import Column, Table
from shared.evaluation.tabular import NO_ANSWER

from .config import PromptSettings

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

# What stands for a cell without a value.
MISSING = "unknown"
NUMBER = re.compile(r"\d+\.\d+")
CLASS_NUMBER = re.compile(r"class (\d+)")


@dataclass(frozen=True)
class Wording:
    """The fixed words of a prompt."""

    task: str
    metadata: str
    row: str
    classes: str
    class_name: str


WORDINGS = {
    "published": Wording(
        task="Below is the description of a dataset and of an object profile from it. Predict the target of the object "
        "from the information given.\n",
        metadata="Dataset description: {}\n",
        row="Object description: ",
        classes="You should return the probability of each class by: {}; where {}.\n",
        class_name='class {} stands for "{}"',
    ),
    "compact": Wording(task="", metadata="Dataset: {}\n", row="Row: ", classes="Classes: {1}.\n", class_name="{} {}"),
}


@dataclass(frozen=True)
class PromptParts:
    """The prompts of some rows of one table, cut where rows begin to differ.

    A row's prompt is `prefix` + row + `suffix`; `prefix` and `suffix` are the same for all rows of the table.
    """

    prefix: str
    rows: list[str]
    suffix: str

    def whole(self, row: int) -> str:
        """The prompt of one row."""
        return self.prefix + self.rows[row] + self.suffix


def write_prompts(
    table: Table, class_names: Sequence[str], settings: PromptSettings, *, heavy: bool, rows: ArrayLike | None = None
) -> PromptParts:
    """The prompts of all rows of a table, or of these; `heavy` with the metadata. `UserError` without features."""
    wording = WORDINGS[settings.wording]
    classes = class_list(class_names, wording)
    prefix = wording.task + (wording.metadata.format(metadata_text(table, settings)) if heavy else "")
    suffix = ".\nAnswer:"
    if settings.classes_first:
        prefix += classes
    else:
        suffix = f".\n{classes}Answer:"
    return PromptParts(prefix + wording.row, serialize_rows(table, settings, rows), suffix)


def class_list(class_names: Sequence[str], wording: Wording) -> str:
    """The clause that says in which form to answer, and which class has which number."""
    form = "; ".join(f"class {number}: xxx" for number in range(len(class_names)))
    names = "; ".join(wording.class_name.format(number, name) for number, name in enumerate(class_names))
    return wording.classes.format(form, names)


def metadata_text(table: Table, settings: PromptSettings) -> str:
    """Description, target and explanations of the columns, in the paper's words; section "table preparation".

    Longer text than `max_metadata_characters` is cut at a word.
    """
    explanations = "; ".join(
        f"{plain(column.name)}: {column.description}" if column.description else plain(column.name)
        for column in table.features[: settings.max_columns]
    )
    text = f"{table.description} The target of the dataset is {plain(table.target)}. "
    text = f"{text}Features and their explanations: {explanations}.".replace("\n", " ").strip()
    limit = settings.max_metadata_characters
    if limit is not None and len(text) > limit:
        text = text[:limit].rsplit(" ", 1)[0]
    return text


def serialize_rows(table: Table, settings: PromptSettings, rows: ArrayLike | None = None) -> list[str]:
    """`age is 23; job title is admin` for every row, or for these, a column at a time in Arrow."""
    import pyarrow.compute as pc

    features = table.features[: settings.max_columns]
    if not features:
        raise UserError(f"table {table.name!r} has no features beside its target: there is nothing to write out")
    data = table.data.with_format("arrow")[:]
    if rows is not None:
        data = data.take(np.asarray(rows))
    parts = [
        pc.binary_join_element_wise(f"{plain(column.name)} is ", _as_text(data[column.name], column, settings), "")
        for column in features
    ]
    return pc.binary_join_element_wise(*parts, "; ").to_pylist()


def _as_text(values: object, column: Column, settings: PromptSettings) -> object:
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.kind == "date":
        values = pc.strftime(values, format="%Y-%m-%d")
    elif pa.types.is_floating(values.type):
        if settings.significant_digits is None:
            values = pc.round(values, ndigits=settings.decimals)
        else:
            magnitude = pc.floor(pc.log10(pc.abs(pc.if_else(pc.equal(values, 0), 1.0, values))))
            scale = pc.power(10.0, pc.subtract(float(settings.significant_digits - 1), magnitude))
            values = pc.divide(pc.round(pc.multiply(values, scale)), scale)
        # Whole numbers without a decimal point, the others as short as they read back.
        whole = pc.cast(pc.if_else(pc.less(pc.abs(values), 1e15), values, None), pa.int64(), safe=False)
        is_whole = pc.fill_null(pc.equal(pc.cast(whole, pa.float64()), values), False)
        values = pc.if_else(is_whole, pc.cast(whole, pa.string()), pc.cast(values, pa.string()))
    else:
        values = pc.cast(values, pa.string())
    return pc.fill_null(values, MISSING)


def plain(name: str) -> str:
    """A column's name as words: hyphens and underscores become blanks."""
    return name.replace("_", " ").replace("-", " ")


# --- Answers ----------------------------------------------------------------------------------------------------------


def write_answers(probabilities: Array) -> list[str]:
    """` class 0: 0.83; class 1: 0.17.` for each row [rows, K]: two decimals as numpy prints them, 0.1, 0.0, 1.0."""
    rounded = np.round(np.asarray(probabilities, dtype=np.float64), 2)
    return [
        " " + "; ".join(f"class {number}: {value}" for number, value in enumerate(row)) + "."
        for row in rounded.tolist()
    ]


def write_class_answers(labels: Labels) -> list[str]:
    """` class 1.`, the answers of TabLLM's way."""
    return [f" class {label}." for label in labels.tolist()]


def candidate_answers(num_classes: int, *, per_table: bool) -> list[str]:
    """The answer that says each class for certain, whose likelihoods are the constrained scores."""
    return write_class_answers(np.arange(num_classes)) if per_table else write_answers(np.eye(num_classes))


def read_answers(texts: Sequence[str], num_classes: int) -> tuple[Array, Labels]:
    """The probabilities [rows, K] that were written, and the classes they say [rows]; see `read_answer`."""
    found = [read_answer(text, num_classes) for text in texts]
    probabilities = np.array([written for written, _ in found]).reshape(len(found), num_classes)
    return probabilities, np.array([label for _, label in found], dtype=np.int64)


def read_answer(text: str, num_classes: int) -> tuple[Array, int]:
    """All decimals of the last line; the class is the one with the largest, as strings (which is the published rule).

    An answer that has not one decimal for each class cannot be read: zeros, and `NO_ANSWER`.
    """
    lines = text.strip().splitlines()
    numbers = NUMBER.findall(lines[-1]) if lines else []
    if len(numbers) != num_classes:
        return np.zeros(num_classes), NO_ANSWER
    return np.array(numbers, dtype=np.float64), max(range(num_classes), key=numbers.__getitem__)


def read_class_answers(texts: Sequence[str], num_classes: int) -> tuple[Array, Labels]:
    """Of TabLLM's way: the class that each text names, with probability 1, or `NO_ANSWER`."""
    labels = np.full(len(texts), NO_ANSWER)
    for row, text in enumerate(texts):
        found = CLASS_NUMBER.search(text)
        if found and int(found.group(1)) < num_classes:
            labels[row] = int(found.group(1))
    return np.eye(num_classes + 1)[labels][:, :num_classes], labels
