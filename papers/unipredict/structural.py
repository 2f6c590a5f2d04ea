"""Generated tables whose labels follow a known rule, so that transfer can be told from fitting.

A table has named columns, numeric and categorical, and its label comes from a random shallow tree or a logistic model
over two to four of them, with some labels drawn at random. In the family `arbitrary` the rule is the table's own: what
a column is called says nothing. In the family `shared` every column name has one weight in all tables, and the label is
the sign of the sum over the table's columns: whoever has learned the weights needs no rows of a new table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .config import StructuralTables

Family = Literal["arbitrary", "shared"]
Array = NDArray[np.float64]

# Few, and ordinary words: a held-out table's columns have been met in others.
NUMERIC_NAMES = ("age", "income", "height", "weight", "distance", "price", "speed", "pressure", "temperature", "score")
VALUES = {
    "color": ("red", "green", "blue"),
    "region": ("north", "south", "east", "west"),
    "shape": ("round", "square", "flat"),
    "season": ("spring", "summer", "autumn", "winter"),
    "owner": ("public", "private"),
}
CATEGORICAL_NAMES = tuple(VALUES)
CLASS_NAMES = (("no", "yes"), ("low", "high"), ("reject", "accept"), ("healthy", "ill"), ("stay", "leave"))


@dataclass(frozen=True)
class Generated:
    """A table's name, its family, its columns by name, the last of which is the target, and words about it."""

    name: str
    family: Family
    pool: Literal["supervised", "few_shot"]
    columns: dict[str, list[Any]]
    target: str
    description: str


def generate(settings: StructuralTables, seed: int) -> Iterator[Generated]:
    """All tables, the same for a seed; both families in turns."""
    weights = shared_weights(seed)
    for pool, count, rows in zip(
        ("supervised", "few_shot"), (settings.supervised, settings.few_shot), settings.rows, strict=True
    ):
        for number in range(count):
            family: Family = ("arbitrary", "shared")[number % 2]
            rng = np.random.default_rng([seed, number, pool == "few_shot"])
            yield _table(f"structural__{pool}_{family}_{number:02d}", family, pool, rows, settings, weights, rng)


def shared_weights(seed: int) -> dict[str, float | Array]:
    """The rule of the family `shared`: a weight for each numeric name, and one for each value of a categorical one."""
    rng = np.random.default_rng([seed, 7])
    signs = rng.permutation(np.resize([-1.0, 1.0], len(NUMERIC_NAMES)))
    weights: dict[str, float | Array] = dict(zip(NUMERIC_NAMES, signs * rng.uniform(0.7, 1.3, len(signs)), strict=True))
    for name in CATEGORICAL_NAMES:
        weights[name] = rng.permutation(np.linspace(-1.2, 1.2, len(VALUES[name])))
    return weights


def _table(
    name: str,
    family: Family,
    pool: Any,
    rows: int,
    settings: StructuralTables,
    weights: dict[str, float | Array],
    rng: np.random.Generator,
) -> Generated:
    count = int(rng.integers(settings.features[0], settings.features[1] + 1))
    num_categorical = min(int(rng.binomial(count, 0.3)), len(CATEGORICAL_NAMES), count - 1)
    numeric = rng.choice(NUMERIC_NAMES, count - num_categorical, replace=False).tolist()
    categorical = rng.choice(CATEGORICAL_NAMES, num_categorical, replace=False).tolist()
    standard = {column: rng.standard_normal(rows) for column in numeric}
    codes = {column: rng.integers(len(VALUES[column]), size=rows) for column in categorical}
    if family == "shared":
        scores = sum((weights[column] * values for column, values in standard.items()), np.zeros(rows))
        scores += sum((np.asarray(weights[column])[code] for column, code in codes.items()), np.zeros(rows))
        positive = scores > 0
    else:
        positive = own_rule(standard, codes, rng)
    random = rng.random(rows) < rng.uniform(*settings.noise)
    positive = np.where(random, rng.random(rows) < 0.5, positive)

    classes = CLASS_NAMES[int(rng.integers(len(CLASS_NAMES)))]
    columns: dict[str, list[Any]] = {}
    for column in rng.permutation([*numeric, *categorical]).tolist():
        if column in standard:
            # One scale for all tables, as units are, in whole numbers: 50 ± 10.
            columns[column] = np.round(50 + 10 * standard[column]).astype(int).tolist()
        else:
            columns[column] = [VALUES[column][code] for code in codes[column]]
    columns["outcome"] = [classes[int(value)] for value in positive]
    shown = ", ".join(columns)
    return Generated(name, family, pool, columns, "outcome", f"Records with {shown}.")


def own_rule(standard: dict[str, Array], codes: dict[str, NDArray[np.int64]], rng: np.random.Generator) -> NDArray:
    """Labels bool [rows] of a random tree of depth two or a random logistic model, over two to four columns.

    Thresholds and offsets are medians, so that neither class is rare.
    """
    inputs = [*standard.values()]
    inputs += [rng.standard_normal(code.max() + 1)[code] for code in codes.values()]
    chosen = rng.choice(len(inputs), min(len(inputs), int(rng.integers(2, 5))), replace=False)
    if rng.random() < 0.5 and len(chosen) >= 3:
        first, left, right = (inputs[column] for column in chosen[:3])
        signs = rng.choice([-1.0, 1.0], 2)
        score = np.where(
            first > np.median(first), signs[0] * (left - np.median(left)), signs[1] * (right - np.median(right))
        )
        return score > 0
    score = sum(rng.choice([-1.0, 1.0]) * rng.uniform(0.7, 1.3) * inputs[column] for column in chosen)
    return score > np.median(score)
