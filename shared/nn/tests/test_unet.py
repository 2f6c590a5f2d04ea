from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from shared.config import UserError
from shared.nn import UNet1d, UNet2d


@pytest.mark.parametrize(("network", "grid"), [(UNet1d, (32,)), (UNet2d, (16, 32))])
@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_shapes_and_gradients(network: type, grid: tuple[int, ...], padding: str) -> None:
    model = network(3, 2, features=2, padding=padding)
    out = model(torch.randn(4, 3, *grid))
    assert out.shape == (4, 2, *grid)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_levels_are_those_of_pdebench() -> None:
    with torch.device("meta"):
        model = UNet1d(1, 1)
    assert [encoder[-2].num_features for encoder in model.encoders] == [32, 64, 128, 256, 512]
    assert [upsample.out_channels for upsample in model.upsamplers] == [256, 128, 64, 32]
    # Blocks of 3·a·b + 3·b² weights and 4·b for the norms, 2·2b·b + b upward, and 32 + 1 for the head.
    widths = [1, 32, 64, 128, 256, 512]
    down = sum(3 * a * b + 3 * b * b + 4 * b for a, b in pairwise(widths))
    up = sum((4 * b * b + b) + (3 * 2 * b * b + 3 * b * b + 4 * b) for b in widths[1:-1])
    assert sum(parameter.numel() for parameter in model.parameters()) == down + up + 33


def test_circular_padding_commutes_with_translations_by_the_coarsest_cell() -> None:
    model = UNet1d(1, 1, features=2, padding="circular").double().eval()
    x = torch.randn(2, 1, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x.roll(16, -1)), model(x).roll(16, -1))


def test_grid_that_cannot_be_halved_and_unknown_padding_are_named() -> None:
    with pytest.raises(UserError, match=r"multiple of 16 \(given: 40\)"):
        UNet1d(1, 1, features=1)(torch.zeros(1, 1, 40))
    with pytest.raises(UserError, match="zeros or circular"):
        UNet2d(1, 1, padding="reflect")
