"""Which places meet: against a dictionary of the active places, at borders, and what is refused."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from kernels.submanifold_conv import build_rulebook, rulebook
from kernels.submanifold_conv.tests.comparing import places

SHAPE = (5, 3, 4)
Lookup = pytest.mark.parametrize("largest_grid", [0, 128], ids=["sorted keys", "grid"])


def expected_neighbors(coordinates: Tensor, outputs: Tensor, kernel: tuple[int, ...], stride: int) -> list[list[int]]:
    rows = {tuple(place): row for row, place in enumerate(coordinates.tolist())}
    axes = [range(-1, 2) if size == 3 else range(size) for size in kernel]
    return [
        [
            rows.get((b, stride * z + dz, stride * y + dy, stride * x + dx), len(coordinates))
            for dz, dy, dx in product(*axes)
        ]
        for b, z, y, x in outputs.tolist()
    ]


@Lookup
@pytest.mark.parametrize(
    ("kernel", "stride"), [((1, 1, 1), 1), ((3, 3, 3), 1), ((1, 3, 3), 1), ((2, 2, 2), 2), ((3, 2, 3), 2)]
)
def test_neighbors_are_those_of_a_dictionary(
    kernel: tuple[int, int, int], stride: int, largest_grid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rulebook, "_LARGEST_GRID", largest_grid)
    coordinates = places(SHAPE)
    rules = build_rulebook(coordinates, SHAPE, kernel_size=kernel, stride=stride)
    assert rules.neighbors.tolist() == expected_neighbors(coordinates, rules.coordinates, kernel, stride)
    outputs = {(b, z // stride, y // stride, x // stride) for b, z, y, x in coordinates.tolist()}
    given = [tuple(place) for place in rules.coordinates.tolist()]
    assert given == (sorted(outputs) if stride > 1 else [tuple(place) for place in coordinates.tolist()])
    assert rules.spatial_shape == tuple(-(-size // stride) for size in SHAPE)
    assert rules.batch_size == 2


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (1, 1), (2, 2), (3, 2)])
def test_pairs_are_the_neighbors_by_offset(kernel_size: int, stride: int) -> None:
    rules = build_rulebook(places(SHAPE), SHAPE, kernel_size=kernel_size, stride=stride)
    for k, (inputs, outputs) in enumerate(rules.pairs):
        listed = [(int(row), o) for o, row in enumerate(rules.neighbors[:, k]) if row < rules.num_inputs]
        assert sorted(zip(inputs.tolist(), outputs.tolist(), strict=True)) == sorted(listed)
    assert rules.num_pairs == sum(len(inputs) for inputs, _ in rules.pairs)
    assert len(rules.pairs) == rules.num_offsets == kernel_size**3
    for transposed in (False, True):
        table, mirrored = rules.table(transposed)
        rows = {(int(source), target, k) for target, row in enumerate(table) for k, source in enumerate(row)}
        for k, pair in enumerate(rules.pairs):
            sources, targets = reversed(pair) if transposed else pair
            column = rules.num_offsets - 1 - k if mirrored else k
            assert {(int(s), int(t), column) for s, t in zip(sources, targets, strict=True)} <= rows
        assert int((table < (rules.num_outputs if transposed else rules.num_inputs)).sum()) == rules.num_pairs


@Lookup
def test_borders_do_not_wrap_around(largest_grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last place of a row, slice and sample, and the first of the next: side by side in memory, not in space."""
    monkeypatch.setattr(rulebook, "_LARGEST_GRID", largest_grid)
    coordinates = torch.tensor([[0, 4, 0, 3], [0, 4, 1, 0], [0, 0, 2, 3], [0, 1, 0, 0], [0, 4, 2, 3], [1, 0, 0, 0]])
    rules = build_rulebook(coordinates, SHAPE)
    assert rules.num_pairs == len(coordinates)


def test_a_full_grid_of_odd_size_by_hand() -> None:
    """Three places in a line, cells of two: the second cell holds the third place only."""
    line = torch.tensor([[0, 0, 0, x] for x in range(3)])
    rules = build_rulebook(line, (1, 1, 3), kernel_size=2, stride=2)
    assert rules.coordinates.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]
    assert rules.neighbors[:, :2].tolist() == [[0, 1], [2, 3]]
    assert rules.neighbors[:, 2:].eq(3).all()
    wide = build_rulebook(line, (1, 1, 3), kernel_size=(1, 1, 3), stride=(1, 1, 2))
    assert wide.spatial_shape == (1, 1, 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integers_will_do(dtype: torch.dtype) -> None:
    coordinates = places(SHAPE)
    given = build_rulebook(coordinates.to(dtype), SHAPE)
    assert torch.equal(given.neighbors, build_rulebook(coordinates, SHAPE).neighbors)
    assert given.coordinates.dtype == torch.int64


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (1, 1), (2, 2), (3, 2)])
def test_nothing_is_active(kernel_size: int, stride: int) -> None:
    rules = build_rulebook(torch.empty(0, 4, dtype=torch.long), SHAPE, kernel_size=kernel_size, stride=stride)
    assert rules.neighbors.shape == (0, kernel_size**3)
    assert rules.coordinates.shape == (0, 4)
    assert rules.num_pairs == 0
    assert all(len(inputs) == len(outputs) == 0 for inputs, outputs in rules.pairs)
    assert rules.table(True)[0].shape == (0, kernel_size**3)


@Lookup
def test_clear_errors(largest_grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rulebook, "_LARGEST_GRID", largest_grid)
    coordinates = places(SHAPE)
    with pytest.raises(TypeError, match=r"integers \(given: torch.float32\)"):
        build_rulebook(coordinates.float(), SHAPE)
    with pytest.raises(TypeError, match="integers"):
        build_rulebook(coordinates.bool(), SHAPE)
    for wrong in (coordinates[:, 1:], coordinates[0]):
        with pytest.raises(ValueError, match=r"\[N, 4\]"):
            build_rulebook(wrong, SHAPE)
    for place in ([0, 5, 0, 0], [0, 0, 0, 4], [0, 0, -1, 0], [-1, 0, 0, 0]):
        with pytest.raises(ValueError, match="from 0 to below"):
            build_rulebook(torch.tensor([[0, 0, 0, 0], place]), SHAPE)
    with pytest.raises(ValueError, match=r"below \[1, 5, 3, 4\]"):
        build_rulebook(coordinates, SHAPE, batch_size=1)
    with pytest.raises(ValueError, match=r"1 of the coordinates .* \[1, 4, 2, 3\]"):
        build_rulebook(torch.tensor([[1, 4, 2, 3], [0, 0, 0, 0], [1, 4, 2, 3]]), SHAPE)
    with pytest.raises(ValueError, match="three integers"):
        build_rulebook(coordinates, (5, 3))
    with pytest.raises(ValueError, match="positive"):
        build_rulebook(coordinates, (5, 3, 0))
    for kernel_size, stride in ((2, 1), (5, 1), (1, 2), (3, 3)):
        with pytest.raises(ValueError, match="stride 1 with kernel size 1 or 3, stride 2"):
            build_rulebook(coordinates, SHAPE, kernel_size=kernel_size, stride=stride)
    with pytest.raises(ValueError, match="too large"):
        build_rulebook(coordinates, (2**31, 2**31, 2**31))
