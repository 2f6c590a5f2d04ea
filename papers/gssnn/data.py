"""Raven matrices with their labels, graphs of the official run, and a renderer of matrices of our own.

A puzzle is a completed 3 × 3 matrix, one grey image. Its label says whether any component's color follows the rule
CONSTANT. Recorded files lie in `$REPRISE_DATA/gssnn/`:

    rpm_constant_color.npz  images uint8 [2480, 128, 128], label uint8 [2480], n_components uint8 [2480]: ten training
                            sets of 128, one after the other, then 1,200 for evaluation
    graphs.jsonl            a graph a line, as `symbolic.interpreter.read_graphs` takes it, and id, set ("final" or
                            "discard"), and where known train_acc and eval_acc of the official run

The authors' own puzzles are not to be had; those in the file were drawn with the paper's generator (raven-gen 0.3.2) at
the settings of the official repository's raven.py: completed matrices without wrong ones, sizes constant, no oblique
rotations, the background drawn from {28, 56, …, 224}. Graphs are the repository's results/ssn_0_0.

`generate` draws matrices by the same process in outline, not in detail: layouts with the official weights, a rule for
number, shape and color of each component, polygons with 3 to 8 sides. As in the official puzzles, the outer of two
nested shapes is always white, so that puzzles with nested shapes always have the label 1.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.config import Stage, UserError
from shared.data.fetch import data_folder
from shared.files import atomic_path, write_text

from .config import (
    OFFICIAL_EVALUATION,
    OFFICIAL_IMAGE,
    OFFICIAL_SET_SIZE,
    OFFICIAL_SETS,
    DataSettings,
    Params,
)
from .symbolic.interpreter import Graph, read_graphs

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]

PUZZLES, GRAPHS = "rpm_constant_color.npz", "graphs.jsonl"
# What a puzzle's panels look like: one component, or two beside each other, below each other, or nested.
LAYOUTS = ("one", "beside", "below", "nested")
RULES = ("constant", "progression", "arithmetic", "distribute_three")

# --- What networks are given ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Puzzles:
    """Puzzles of one profile: the training sets one after the other, then those for evaluation.

    `images` [N, size, size] are grey levels 0 … 255 as float16, which holds the quarters of averaged pixels exactly;
    `label` [N] is 0 or 1; `layout` [N] is an index of `LAYOUTS`, which no network is told.
    """

    images: NDArray[np.float16]
    label: Bytes
    layout: Bytes
    training_sets: int
    training_size: int
    source: str
    digest: str

    def training_set(self, number: int) -> slice:
        return slice(number * self.training_size, (number + 1) * self.training_size)

    @property
    def evaluation(self) -> slice:
        return slice(self.training_sets * self.training_size, len(self.label))


def prepare(stage: Stage[Params]) -> None:
    """Write data/puzzles.npz, and data/graphs.jsonl where the profile takes the official graphs."""
    params = stage.params
    puzzles = read_official(params.data) if params.data.source == "official" else generate(params.data, params.seed)
    save(stage.data_dir / "puzzles.npz", puzzles)
    if params.graphs == "official":
        write_graphs(stage.data_dir / GRAPHS, official_graphs(params))


def save(path: Path, puzzles: Puzzles) -> None:
    with atomic_path(path) as temporary:
        np.savez_compressed(
            temporary,
            images=puzzles.images,
            label=puzzles.label,
            layout=puzzles.layout,
            about=json.dumps([puzzles.training_sets, puzzles.training_size, puzzles.source, puzzles.digest]),
        )


def load(folder: Path) -> Puzzles:
    """The prepared puzzles of a folder; `UserError` where there are none, or the file is damaged."""
    path = folder / "puzzles.npz"
    try:
        with np.load(path) as file:
            return Puzzles(file["images"], file["label"], file["layout"], *json.loads(str(file["about"])))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the stage prepare first (dvc repro)") from None
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run the stage prepare again") from None


def _puzzles(images: Bytes, label: Bytes, layout: Bytes, settings: DataSettings, source: str) -> Puzzles:
    images = average_pool(images, images.shape[1] // settings.image_size)
    digest = hashlib.sha256()
    for array in (images, label):
        digest.update(np.ascontiguousarray(array).tobytes())
    return Puzzles(images, label, layout, settings.training_sets, settings.training_size, source, digest.hexdigest())


def average_pool(images: Bytes, factor: int) -> NDArray[np.float16]:
    """Means over squares of `factor` pixels a side: [N, size, size] to [N, size / factor, size / factor]."""
    size = images.shape[1] // factor
    pooled = images.reshape(len(images), size, factor, size, factor).mean(axis=(2, 4), dtype=np.float32)
    return pooled.astype(np.float16)


# --- Recorded puzzles and graphs --------------------------------------------------------------------------------------


def read_official(settings: DataSettings) -> Puzzles:
    """The recorded puzzles: `training_sets` of the ten sets, and the first `evaluation_size` of the 1,200."""
    path = _locate(settings.folder, PUZZLES)
    count = OFFICIAL_SETS * OFFICIAL_SET_SIZE + OFFICIAL_EVALUATION
    shapes = {"images": (count, OFFICIAL_IMAGE, OFFICIAL_IMAGE), "label": (count,), "n_components": (count,)}
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in shapes}
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not the file that data.py describes ({error})") from None
    for name, shape in shapes.items():
        if arrays[name].shape != shape or arrays[name].dtype != np.uint8:
            raise UserError(
                f"{path}: {name} must be uint8 {list(shape)} (given: {arrays[name].dtype} {list(arrays[name].shape)})"
            )
    sets = np.arange(settings.training_sets)[:, None] * OFFICIAL_SET_SIZE + np.arange(settings.training_size)
    first = OFFICIAL_SETS * OFFICIAL_SET_SIZE
    chosen = np.concatenate([sets.ravel(), np.arange(first, first + settings.evaluation_size)])
    images, label = arrays["images"][chosen], arrays["label"][chosen]
    layout = layout_of(images, arrays["n_components"][chosen])
    return _puzzles(images, label, layout, settings, "real: Raven matrices drawn with the paper's generator")


def layout_of(images: Bytes, num_components: Bytes) -> Bytes:
    """Indices of `LAYOUTS`, from the black lines that part the panels of two components: 128 pixels a side."""
    middles = list(PANEL_MIDDLES)
    beside = (images[:, :, middles] == 0).all(axis=(1, 2))
    below = (images[:, middles] == 0).all(axis=(1, 2))
    nested = (num_components == 2) & ~beside & ~below
    return (1 * beside + 2 * below + 3 * nested).astype(np.uint8)


def official_graphs(params: Params) -> dict[str, Graph]:
    """Graphs of the official run by id, as many as the population `ssn` has: half discarded ones, half final ones.

    Ids are digests, so that the first ones by id are a random choice.
    """
    path = _locate(params.data.folder, GRAPHS)
    wanted = params.populations["ssn"].graphs or 0
    sets: dict[str, dict[str, Graph]] = {"discard": {}, "final": {}}
    seen: set[str] = set()
    for graph, record in sorted(read_graphs(path), key=lambda pair: (str(pair[1].get("id")), str(pair[1].get("set")))):
        if not isinstance(record.get("id"), str) or record.get("set") not in sets:
            raise UserError(f"{path}: every graph needs an id and a set, 'final' or 'discard' (given: {record!r:.80})")
        if record["id"] not in seen:
            seen.add(record["id"])
            sets[record["set"]][record["id"]] = graph
    return choose_graphs(sets["discard"], sets["final"], wanted)


def choose_graphs(discarded: Mapping[str, Graph], final: Mapping[str, Graph], wanted: int) -> dict[str, Graph]:
    """The first `wanted` graphs by id, half discarded and half final ones as far as there are so many; sorted by id."""
    if len(discarded) + len(final) < wanted:
        raise UserError(
            f"populations.ssn.graphs is {wanted}, but there are {len(discarded)} discarded and {len(final)} final "
            "graphs only: take fewer, or let the evolution look at more programs"
        )
    of_final = min(len(final), max(wanted // 2, wanted - len(discarded)))
    chosen = [*sorted(discarded.items())[: wanted - of_final], *sorted(final.items())[:of_final]]
    return dict(sorted(chosen))


def typical_graph(graphs: Mapping[str, Graph]) -> str:
    """The id of the graph of median size, the one that `one_graph` trains."""
    by_size = sorted(graphs, key=lambda name: (graphs[name].next_id, name))
    return by_size[len(by_size) // 2]


def write_graphs(path: Path, graphs: Mapping[str, Graph], notes: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write graphs a line each, with further fields from `notes`."""
    lines = [
        json.dumps({"id": name, **graph.to_json(), **(notes or {}).get(name, {})}) for name, graph in graphs.items()
    ]
    write_text(path, "".join(line + "\n" for line in lines))


def load_graphs(path: Path) -> dict[str, Graph]:
    """The graphs that `write_graphs` wrote, by id."""
    return {record["id"]: graph for graph, record in read_graphs(path)}


def _locate(folder: str, name: str) -> Path:
    path = data_folder(folder) / name
    if not path.exists():
        raise UserError(
            f"{path} is missing. There is nothing to download: data.py says what it holds and how it is drawn. Put it "
            "there, point REPRISE_DATA to the folder that holds your data sets, or take a profile whose data.source is "
            "'generated'"
        )
    return path


# --- The renderer -----------------------------------------------------------------------------------------------------

# Where panels begin, and where the line through a panel of two components lies: in the recorded puzzles, too.
PANEL_STARTS, PANEL_MIDDLES = (0, 42, 85), (21, 63, 105)
# Layouts to draw: weight, index in `LAYOUTS`, and of each component the centers and the radii that its shapes may have,
# in pixels of a panel. The first component of nested shapes is the outer one.
_GRID = ((10, 10), (10, 30), (30, 10), (30, 30))
_SHOWN: tuple[tuple[float, int, tuple[tuple[tuple[tuple[int, int], ...], tuple[int, ...]], ...]], ...] = (
    (0.15, 0, ((((20, 20),), (9, 12, 15)),)),
    (0.20, 0, ((_GRID, (5, 6, 8)),)),
    (0.20, 0, (((*_GRID, (20, 20)), (4, 5, 6)),)),
    (0.15, 1, ((((20, 10),), (5, 6, 8)), (((20, 30),), (5, 6, 8)))),
    (0.15, 2, ((((10, 20),), (5, 6, 8)), (((30, 20),), (5, 6, 8)))),
    (0.15, 3, ((((20, 20),), (17, 18, 19)), (((20, 20),), (4, 5, 6)))),
)
COLOR_LEVELS, SIDES, MAX_SHAPES = 10, (3, 4, 5, 6, 7, 8), 5
BACKGROUNDS = tuple(range(28, 225, 28))
QUARTER_TURNS = 4
_RADII = range(4, 20)


def generate(settings: DataSettings, seed: int) -> Puzzles:
    """Draw as many puzzles as the settings ask for; the same ones for the same seed."""
    count = settings.training_sets * settings.training_size + settings.evaluation_size
    images, label, layout = render(count, np.random.default_rng(seed))
    return _puzzles(images, label, layout, settings, "generated: matrices of polygons, rules drawn by row")


def render(count: int, generator: np.random.Generator) -> tuple[Bytes, Bytes, Bytes]:
    """Images `[count, 128, 128]`, labels and layouts `[count]`; all puzzles of a layout at once."""
    kinds = generator.choice(len(_SHOWN), size=count, p=[weight for weight, _, _ in _SHOWN])
    background = generator.choice(BACKGROUNDS, size=count).astype(np.uint8)
    images = np.broadcast_to(background[:, None, None], (count, OFFICIAL_IMAGE, OFFICIAL_IMAGE)).copy()
    label = np.zeros(count, np.uint8)
    layout = np.array([index for _, index, _ in _SHOWN], np.uint8)[kinds]
    for kind, (_, index, components) in enumerate(_SHOWN):
        of_kind = np.flatnonzero(kinds == kind)
        for number, (centers, radii) in enumerate(components):
            white = LAYOUTS[index] == "nested" and number == 0
            constant = _draw_component(images, of_kind, np.array(centers), np.array(radii), white, generator)
            label[of_kind] |= constant
    _draw_lines(images, layout)
    return images, label, layout


def rule_values(rules: Integers, low: int, high: int, generator: np.random.Generator) -> Integers:
    """Values `[n, 3, 3]` in low … high, rows by columns, that follow `rules` `[n]`, indices of `RULES`.

    constant: one value a row. progression: a common step of ±1 or ±2 along every row. arithmetic: the third is the sum
    of the first two, or their difference, the second of which is not 0. distribute_three: three distinct values, in
    another order in every row. Where the range is too narrow for a rule, the values are constant.
    """
    n, span = len(rules), high - low
    values = np.repeat(generator.integers(low, high + 1, size=(n, 3, 1)), 3, axis=2)
    largest = min(2, span // 2)
    if largest >= 1:
        step = generator.integers(1, largest + 1, size=(n, 1)) * generator.choice([-1, 1], size=(n, 1))
        lowest, highest = low + np.maximum(0, -2 * step), high - np.maximum(0, 2 * step)
        start = generator.integers(lowest, highest + 1, size=(n, 3))
        progression = start[:, :, None] + step[:, :, None] * np.arange(3)
        values = np.where((rules == 1)[:, None, None], progression, values)
    smallest = max(low, 1)
    if high >= low + smallest:
        first = generator.integers(low, high - smallest + 1, size=(n, 3))
        second = generator.integers(smallest, high - first + 1)
        total = np.stack([first, second, first + second], axis=2)
        # The sum's terms in another order are a difference.
        minus = np.stack([first + second, second, first], axis=2)
        arithmetic = np.where(generator.random((n, 1, 1)) < 0.5, total, minus)
        values = np.where((rules == 2)[:, None, None], arithmetic, values)
    if span >= 2:
        three = low + generator.permuted(np.tile(np.arange(span + 1), (n, 1)), axis=1)[:, :3]
        shift = generator.choice([1, 2], size=(n, 1, 1))
        square = (np.arange(3)[None, None, :] + shift * np.arange(3)[None, :, None]) % 3
        values = np.where((rules == 3)[:, None, None], np.take_along_axis(three[:, None], square, axis=2), values)
    return values


def _draw_component(
    images: Bytes,
    puzzles: Integers,
    centers: Integers,
    radii: Integers,
    white: bool,
    generator: np.random.Generator,
) -> NDArray[np.bool_]:
    """Draw one component of the given puzzles in place; returns which of them have a constant color."""
    n = len(puzzles)
    color_rule = generator.integers(len(RULES), size=n)
    if white:
        color_rule[:] = 0
    color = rule_values(color_rule, 0, COLOR_LEVELS - 1, generator)
    if white:
        color[:] = 0
    # Shapes are never added up, as in the official puzzles; sizes are constant along a row.
    shape = rule_values(generator.choice([0, 1, 3], size=n), 0, len(SIDES) - 1, generator)
    radius = radii[rule_values(np.zeros(n, np.int64), 0, len(radii) - 1, generator)]
    number = rule_values(generator.integers(len(RULES), size=n), 1, len(centers), generator)
    turn = generator.integers(QUARTER_TURNS, size=(n, 3, 3))
    # The places that are taken: the first ones of a random order, in every panel.
    order = generator.permuted(np.broadcast_to(np.arange(len(centers)), (n, 3, 3, len(centers))), axis=3)
    stamps = _stamps()
    reach = stamps.shape[-1] // 2
    grey = (255 - (255 * color) // (COLOR_LEVELS - 1)).astype(np.uint8)
    starts = np.array(PANEL_STARTS)
    for place in range(len(centers)):
        which, row, column = np.nonzero(number > place)
        center = centers[order[which, row, column, place]]
        chosen = which, row, column
        stamp = stamps[shape[chosen], radius[chosen] - _RADII[0], turn[chosen]]
        # Only what lies inside a shape is written: a stamp reaches into its neighbors' panels, and is empty there.
        drawn, y, x = np.nonzero(stamp)
        where = (
            puzzles[which[drawn]],
            (starts[row] + center[:, 0])[drawn] + y - reach,
            (starts[column] + center[:, 1])[drawn] + x - reach,
        )
        images[where] = np.where(stamp[drawn, y, x] == 1, grey[chosen][drawn], 0)
    return color_rule == 0


def _stamps() -> Bytes:
    """Every shape once, `[sides, radius, quarter turn, size, size]`: 0 outside, 1 inside, 2 on the outline.

    A point at radius r and angle θ lies inside a regular polygon of n sides and circumradius R where
    r cos((θ mod 2π/n) − π/n) ≤ R cos(π/n).
    """
    reach = _RADII[-1] + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    distance, angle = np.hypot(x, y), np.arctan2(y, x)
    sides = np.array(SIDES)[:, None, None, None, None]
    radius = np.array(_RADII)[:, None, None, None]
    turn = np.arange(QUARTER_TURNS)[:, None, None] * np.pi / 2
    depth = distance * np.cos((angle - turn) % (2 * np.pi / sides) - np.pi / sides)
    inside = radius * np.cos(np.pi / sides) - depth
    return np.where(inside < 0, 0, np.where(inside < 1, 2, 1)).astype(np.uint8)


def _draw_lines(images: Bytes, layout: Bytes) -> None:
    """Black lines between panels, and through those of two components that are side by side or one below the other."""
    for start in PANEL_STARTS[1:]:
        images[:, start - 1] = images[:, :, start - 1] = 0
    for middle in PANEL_MIDDLES:
        images[layout == 1, :, middle] = 0
        images[layout == 2, middle] = 0
