from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.submanifold_conv import build_rulebook, cpu, sparse_conv
from kernels.submanifold_conv.reference import gather, scatter
from kernels.submanifold_conv.tests.comparing import hold_against_definition, places
from kernels.tests.comparing import TOLERANCE

KINDS = pytest.mark.parametrize(
    ("kernel_size", "stride", "transposed"),
    [
        (1, 1, False),
        (3, 1, False),
        (3, 1, True),
        ((1, 3, 3), 1, False),
        (2, 2, False),
        (3, 2, False),
        (2, 2, True),
        (3, 2, True),
        ((1, 2, 3), (1, 2, 2), False),
        ((1, 2, 3), (1, 2, 2), True),
    ],
)


@pytest.fixture(params=[0.0, 2.0], ids=["many neighbors", "few neighbors"])
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two algorithms whatever the share of neighbors, and the first of them in several pieces."""
    monkeypatch.setattr(cpu, "_MANY_NEIGHBORS", request.param)
    monkeypatch.setattr(cpu, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(cpu, "_GATHERED", 7)


def path(features: Tensor, weight: Tensor, bias: Tensor | None, rulebook: object, transposed: bool) -> Tensor:
    return sparse_conv(features, weight, rulebook, bias=bias, transposed=transposed)


@pytest.mark.usefixtures("algorithm")
@KINDS
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(4, 4, 4), (5, 2, 7)])
def test_values_and_gradients_are_those_of_the_definition(
    kernel_size: int, stride: int, transposed: bool, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    options = {"kernel_size": kernel_size, "stride": stride, "transposed": transposed}
    hold_against_definition(path, places(shape), shape, dtype=dtype, **options)


@pytest.mark.usefixtures("algorithm")
@KINDS
@pytest.mark.parametrize("count", [0, 1])
def test_next_to_nothing_is_active(count: int, kernel_size: int, stride: int, transposed: bool) -> None:
    coordinates = torch.tensor([[1, 4, 0, 2]])[:count]
    options = {"kernel_size": kernel_size, "stride": stride, "transposed": transposed}
    hold_against_definition(path, coordinates, (5, 3, 3), **options)


def test_by_hand() -> None:
    """Two places side by side along x: each sees itself through the center, the other through its side."""
    coordinates = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 2]])
    weight = torch.zeros(3, 3, 3, 1, 1)
    weight[1, 1, :, 0, 0] = torch.tensor([2.0, 3.0, 5.0])  # left, center, right
    weight[0] = 100.0  # sees no active place
    y = sparse_conv(torch.tensor([[1.0], [10.0]]), weight, build_rulebook(coordinates, (3, 3, 3)))
    assert y.flatten().tolist() == [3 * 1 + 5 * 10, 2 * 1 + 3 * 10]


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (2, 2)])
def test_where_all_is_active_it_is_a_plain_convolution(kernel_size: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(2, 3, 4, 6, 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 3, *(kernel_size,) * 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    coordinates = torch.ones(2, 4, 6, 2).nonzero()
    rulebook = build_rulebook(coordinates, (4, 6, 2), kernel_size=kernel_size, stride=stride)
    y = sparse_conv(gather(volume, coordinates), weight.permute(2, 3, 4, 1, 0), rulebook, bias=bias)
    expected = functional.conv3d(volume, weight, bias, stride, padding=kernel_size // 2 if kernel_size == 3 else 0)
    torch.testing.assert_close(scatter(y, rulebook.coordinates, rulebook.spatial_shape, 2)[0], expected)


@pytest.mark.usefixtures("algorithm")
@KINDS
def test_gradcheck(kernel_size: int, stride: int, transposed: bool) -> None:
    rulebook = build_rulebook(places((3, 2, 3)), (3, 2, 3), kernel_size=kernel_size, stride=stride)
    rows = rulebook.num_outputs if transposed else rulebook.num_inputs
    shapes = ((rows, 2), (rulebook.num_offsets, 2, 3), (3,))
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return sparse_conv(features, weight, rulebook, bias=bias, transposed=transposed)

    assert torch.autograd.gradcheck(run, given, fast_mode=True)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_that_are_not_asked_for_change_nothing(stride: int) -> None:
    rulebook = build_rulebook(places((4, 3, 5)), (4, 3, 5), stride=stride)
    shapes = ((rulebook.num_inputs, 3), (27, 3, 4), (4,))
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(rulebook.num_outputs, 4, dtype=torch.float64)
    features, weight, bias = given
    together = torch.autograd.grad(sparse_conv(features, weight, rulebook, bias=bias), given, upstream)
    for index in range(3):
        alone = [x if i == index else x.detach() for i, x in enumerate(given)]
        y = sparse_conv(alone[0], alone[1], rulebook, bias=alone[2])
        torch.testing.assert_close(torch.autograd.grad(y, given[index], upstream)[0], together[index])


@pytest.mark.usefixtures("algorithm")
def test_the_order_of_rows_is_the_callers() -> None:
    coordinates = places((4, 5, 3))
    features, weight = torch.randn(len(coordinates), 4).double(), torch.randn(27, 4, 4).double()
    order = torch.randperm(len(coordinates), generator=torch.Generator().manual_seed(3))
    y = sparse_conv(features, weight, build_rulebook(coordinates, (4, 5, 3)))
    permuted = sparse_conv(features[order], weight, build_rulebook(coordinates[order], (4, 5, 3)))
    torch.testing.assert_close(permuted, y[order])
    strided = [build_rulebook(c, (4, 5, 3), kernel_size=2, stride=2) for c in (coordinates, coordinates[order])]
    assert torch.equal(strided[0].coordinates, strided[1].coordinates)
    coarse, same = (sparse_conv(x, weight[:8], r) for x, r in zip((features, features[order]), strided, strict=True))
    torch.testing.assert_close(coarse, same)


def test_samples_do_not_see_each_other() -> None:
    coordinates = places((3, 4, 3), batch_size=3)
    features, weight = torch.randn(len(coordinates), 2).double(), torch.randn(27, 2, 5).double()
    y = sparse_conv(features, weight, build_rulebook(coordinates, (3, 4, 3)))
    for sample in range(3):
        rows = coordinates[:, 0] == sample
        alone = sparse_conv(features[rows], weight, build_rulebook(coordinates[rows], (3, 4, 3)))
        torch.testing.assert_close(y[rows], alone)


def test_a_rulebook_serves_several_layers_down_and_up() -> None:
    """A small U: the way back ends at the places it came from, and inactive places never come to life."""
    coordinates = places((6, 5, 7))
    same = build_rulebook(coordinates, (6, 5, 7))
    down = build_rulebook(same.coordinates, same.spatial_shape, kernel_size=2, stride=2)
    x = torch.randn(len(coordinates), 4)
    for weight in torch.randn(3, 27, 4, 4):
        x = sparse_conv(x, weight, same)
    coarse = sparse_conv(x, torch.randn(8, 4, 6), down)
    assert coarse.shape == (down.num_outputs, 6)
    assert sparse_conv(coarse, torch.randn(8, 6, 4), down, transposed=True).shape == x.shape


def test_inputs_need_not_be_contiguous_nor_of_one_type() -> None:
    coordinates = places((3, 4, 5))
    rulebook = build_rulebook(coordinates, (3, 4, 5))
    features, weight = torch.randn(4, len(coordinates)).T, torch.randn(27, 6, 4).mT
    expected = sparse_conv(features.contiguous(), weight.contiguous(), rulebook)
    torch.testing.assert_close(sparse_conv(features, weight, rulebook), expected)
    mixed = sparse_conv(features.bfloat16(), weight, rulebook)
    assert mixed.dtype == torch.bfloat16
    assert (mixed - expected).norm() < 1e-2 * expected.norm()


def test_clear_errors() -> None:
    coordinates = places((3, 4, 5))
    rulebook = build_rulebook(coordinates, (3, 4, 5))
    count = len(coordinates)
    features, weight = torch.randn(count, 4), torch.randn(27, 4, 6)
    with pytest.raises(ValueError, match=rf"\[{count}, C\], a row for each of the rulebook's inputs"):
        sparse_conv(features[1:], weight, rulebook)
    with pytest.raises(ValueError, match=r"must be \[27, 4, 'C_out'\] or \[3, 3, 3, 4, 'C_out'\]"):
        sparse_conv(features, weight.mT, rulebook)
    for wrong in (weight[:8], torch.randn(2, 2, 2, 4, 6), weight[:, :, :0]):
        with pytest.raises(ValueError, match="weight must be"):
            sparse_conv(features, wrong, rulebook)
    with pytest.raises(ValueError, match=r"bias must be \[6\]"):
        sparse_conv(features, weight, rulebook, bias=torch.zeros(4))
    with pytest.raises(TypeError, match=r"features .* \(given: torch.int64\)"):
        sparse_conv(features.long(), weight, rulebook)
    with pytest.raises(ValueError, match="weight is on meta and the rulebook on cpu"):
        sparse_conv(features, weight.to("meta"), rulebook)
    coarse = build_rulebook(coordinates, (3, 4, 5), kernel_size=2, stride=2)
    with pytest.raises(ValueError, match="rulebook's outputs"):
        sparse_conv(features, weight[:8], coarse, transposed=True)
