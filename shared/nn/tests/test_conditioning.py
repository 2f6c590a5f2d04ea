from __future__ import annotations

import subprocess
import sys

import torch
from torch.nn import functional

from shared.nn import ChannelMask, FiLM, constant_channels, pointwise_conv


def test_channel_mask_gives_one_factor_a_channel() -> None:
    mask = ChannelMask(num_parameters=2, channels=6, hidden=4)
    assert mask(torch.randn(5, 2)).shape == (5, 6)


def test_film_begins_as_identity_and_then_scales_and_shifts() -> None:
    film = FiLM(num_parameters=1, channels=2, hidden=3)
    x, parameters = torch.randn(4, 2, 5, 6), torch.randn(4, 1)
    assert torch.equal(film(x, parameters), x)
    torch.nn.init.zeros_(film.embed[-1].weight)
    film.embed[-1].bias.data = torch.tensor([1.0, 0.0, 0.0, -3.0])
    expected = torch.stack([2 * x[:, 0], x[:, 1] - 3], dim=1)
    torch.testing.assert_close(film(x, parameters), expected)


def test_constant_channels_come_first() -> None:
    x = constant_channels(torch.tensor([[7.0, 8.0]]), torch.zeros(1, 1, 3))
    assert x.tolist() == [[[7.0] * 3, [8.0] * 3, [0.0] * 3]]


def test_pointwise_conv_is_a_convolution_with_one_weight_or_one_a_sample() -> None:
    x, weight, bias = torch.randn(3, 4, 5, 6), torch.randn(3, 2, 4), torch.randn(3, 2)
    shared = functional.conv2d(x, weight[0, :, :, None, None], bias[0])
    torch.testing.assert_close(pointwise_conv(x, weight[0], bias[0]), shared)
    own = torch.cat([functional.conv2d(x[[i]], weight[i, :, :, None, None], bias[i]) for i in range(3)])
    torch.testing.assert_close(pointwise_conv(x, weight, bias), own)


def test_import_stays_light() -> None:
    heavy = ("mlflow", "dvc", "datasets", "matplotlib", "pandas", "sklearn", "scipy")
    code = f"import sys, shared.nn; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
