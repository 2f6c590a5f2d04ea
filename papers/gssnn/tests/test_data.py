"""The renderer's rules, recorded files, and the choice of graphs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shared.config import UserError, load_params

from .. import data
from ..config import DataSettings, Params
from .graphs import KITE, PAIR, PATH

SETTINGS = DataSettings(source="generated", training_sets=3, training_size=8, evaluation_size=16, image_size=32)
FOLDER = Path(__file__).parents[1]


# --- Rules ------------------------------------------------------------------------------------------------------------


def test_values_follow_their_rules() -> None:
    rules = np.repeat(np.arange(4), 200)
    values = data.rule_values(rules, 0, 9, np.random.default_rng(0))
    assert values.min() == 0
    assert values.max() == 9
    constant, progression, arithmetic, three = (values[rules == rule] for rule in range(4))
    assert (np.ptp(constant, axis=2) == 0).all()
    steps = np.diff(progression, axis=2)
    assert (steps == steps[:, :1, :1]).all()
    assert set(np.unique(steps)) == {-2, -1, 1, 2}
    first, second, third = np.moveaxis(arithmetic, 2, 0)
    plus, minus = (third == first + second).all(axis=1), (third == first - second).all(axis=1)
    assert (plus | minus).all()
    assert plus.any()
    assert minus.any()
    assert (second >= 1).all()
    assert (np.sort(three, axis=2) == np.sort(three[:, :1], axis=2)).all()
    assert (np.sort(three, axis=1) == np.sort(three[:, :, :1], axis=1)).all()
    # Nothing but the rule constant looks constant.
    assert not (np.ptp(values[rules > 0], axis=2) == 0).all(axis=1).any()


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 4), (0, 1)])
def test_values_stay_in_their_range(low: int, high: int) -> None:
    values = data.rule_values(np.arange(400) % 4, low, high, np.random.default_rng(0))
    assert values.min() >= low
    assert values.max() <= high


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_are_those_of_their_layouts() -> None:
    images, label, layout = data.render(400, np.random.default_rng(0))
    assert images.shape == (400, 128, 128)
    assert 0.35 < label.mean() < 0.5
    components = np.where(layout == 0, 1, 2).astype(np.uint8)
    assert (data.layout_of(images, components) == layout).all()
    assert (np.bincount(layout, minlength=4) > 30).all()
    # As in the official puzzles: the outer of two nested shapes is white, and that color is constant.
    nested = images[layout == data.LAYOUTS.index("nested")]
    assert (label[layout == data.LAYOUTS.index("nested")] == 1).all()
    assert ((nested == 255).mean(axis=(1, 2)) > 0.15).all()
    assert 0.15 < label[layout == 0].mean() < 0.35


def test_a_constant_color_can_be_seen() -> None:
    """Single shapes: along a row all panels have the same grey levels, up to the background, where the label is 1."""
    images, label, layout = data.render(300, np.random.default_rng(1))
    levels = [
        [set(np.unique(images[i, a : a + 41, b : b + 41])) - {0} for b in data.PANEL_STARTS]
        for i in range(300)
        for a in data.PANEL_STARTS
    ]
    same = np.array([row[0] == row[1] == row[2] for row in levels]).reshape(300, 3).all(axis=1)
    single = layout == 0
    assert same[single & (label == 1)].all()
    assert same[single & (label == 0)].mean() < 0.05


def test_the_same_seed_draws_the_same_puzzles() -> None:
    first, again, other = data.generate(SETTINGS, 0), data.generate(SETTINGS, 0), data.generate(SETTINGS, 1)
    assert np.array_equal(first.images, again.images)
    assert first.digest == again.digest != other.digest
    assert first.images.shape == (40, 32, 32)
    assert first.training_set(2) == slice(16, 24)
    assert first.evaluation == slice(24, 40)


def test_pooling_is_exact() -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(3, 8, 8)).astype(np.uint8)
    pooled = data.average_pool(images, 2)
    assert pooled.dtype == np.float16
    assert (pooled == images.reshape(3, 4, 2, 4, 2).astype(float).mean(axis=(2, 4))).all()
    assert (data.average_pool(images, 1) == images).all()


def test_prepared_puzzles_are_read_back(tmp_path: Path) -> None:
    puzzles = data.generate(SETTINGS, 0)
    data.save(tmp_path / "puzzles.npz", puzzles)
    again = data.load(tmp_path)
    assert np.array_equal(again.images, puzzles.images)
    assert (again.source, again.digest, again.training_size) == (puzzles.source, puzzles.digest, 8)
    (tmp_path / "puzzles.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=r"puzzles.npz is damaged .* run the stage prepare again"):
        data.load(tmp_path)
    with pytest.raises(UserError, match="run the stage prepare first"):
        data.load(tmp_path / "nowhere")


# --- Recorded files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in the layout of the recorded ones: every picture has the grey level of its number, modulo 250."""
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    folder = tmp_path / "gssnn"
    folder.mkdir()
    number = np.arange(2480)
    np.savez(
        folder / data.PUZZLES,
        images=np.broadcast_to((number % 250).astype(np.uint8)[:, None, None], (2480, 128, 128)),
        label=(number % 2).astype(np.uint8),
        n_components=np.ones(2480, np.uint8),
    )
    lines = [
        json.dumps({"id": name * 32, "set": kind, **graph.to_json()})
        for name, kind, graph in (("c", "discard", KITE), ("a", "discard", PAIR), ("b", "final", PATH))
    ]
    (folder / data.GRAPHS).write_text("\n".join(lines) + "\n")
    return folder


def test_recorded_puzzles_keep_their_sets(recorded: Path) -> None:
    settings = DataSettings(training_sets=3, training_size=8, evaluation_size=4, image_size=16)
    puzzles = data.read_official(settings)
    numbers = [*range(8), *range(128, 136), *range(256, 264), *range(1280, 1284)]
    assert puzzles.images[:, 0, 0].tolist() == [number % 250 for number in numbers]
    assert puzzles.label.tolist() == [number % 2 for number in numbers]
    assert puzzles.source.startswith("real")


def test_recorded_puzzles_of_another_shape(recorded: Path) -> None:
    np.savez(
        recorded / data.PUZZLES, images=np.zeros((5, 128, 128), np.uint8), label=np.zeros(5), n_components=np.zeros(5)
    )
    with pytest.raises(UserError, match=r"images must be uint8 \[2480, 128, 128\] \(given: uint8 \[5, 128, 128\]\)"):
        data.read_official(DataSettings(training_sets=3))
    (recorded / data.PUZZLES).unlink()
    with pytest.raises(UserError, match=r"is missing. There is nothing to download: data.py says .* 'generated'"):
        data.read_official(DataSettings(training_sets=3))


def params(graphs: int) -> Params:
    real = load_params(FOLDER / "params.yaml", Params, "real")[1]
    population = real.populations["ssn"].model_copy(update={"graphs": graphs})
    return real.model_copy(update={"populations": {**real.populations, "ssn": population}})


def test_official_graphs_are_half_discarded_half_final(recorded: Path) -> None:
    assert list(data.official_graphs(params(2))) == ["a" * 32, "b" * 32]
    # There is one final graph only.
    assert data.official_graphs(params(3)) == {"a" * 32: PAIR, "b" * 32: PATH, "c" * 32: KITE}
    with pytest.raises(UserError, match="graphs is 4, but there are 2 discarded and 1 final graphs only"):
        data.official_graphs(params(4))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": "d", "set": "final", "nodes": [0, 1]', r"graphs.jsonl, line 4, column \d+: not valid JSON"),
        ('{"id": "d", "set": "final", "nodes": [0, 1]}', "line 4: the graph lacks the field 'edges'"),
        (json.dumps({"id": "d", "set": "final", **PAIR.to_json(), "edges": [[0, 7, 2, 0]]}), "line 4: edge"),
        (json.dumps({"set": "final", **PAIR.to_json()}), "every graph needs an id and a set, 'final' or 'discard'"),
    ],
)
def test_a_line_that_is_no_graph(recorded: Path, line: str, words: str) -> None:
    with open(recorded / data.GRAPHS, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=words):
        data.official_graphs(params(2))


def test_graphs_are_read_back(tmp_path: Path) -> None:
    graphs = {"x": PAIR, "y": KITE}
    data.write_graphs(tmp_path / "graphs.jsonl", graphs, {"x": {"set": "final"}})
    assert data.load_graphs(tmp_path / "graphs.jsonl") == graphs


def test_the_typical_graph_has_the_median_size() -> None:
    assert data.typical_graph({"x": KITE, "y": PAIR, "z": PATH}) == "z"
