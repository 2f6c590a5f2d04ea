from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError

from ..model import CAPE, CAPEModel, condition


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small_cape(dimensions: int, num_parameters: int = 2, channels: int = 2) -> CAPE:
    grid = (16,) if dimensions == 1 else (12, 8)
    return CAPE(channels, num_parameters, grid, width=4, modes=2, kernel_size=3, pool=4).double()


def random_input(cape: CAPE, batch: int = 3) -> tuple[Tensor, Tensor]:
    channels, num_parameters = cape.embed.in_channels, cape.masks[0][0].in_features
    u = torch.randn(batch, channels, *cape.grid_shape, dtype=torch.float64)
    return u, torch.rand(batch, num_parameters, dtype=torch.float64) + 0.5


def by_the_equations(cape: CAPE, u: Tensor, parameters: Tensor) -> Tensor:
    """The module written out with the library's convolutions, one sample and one branch after the other."""
    one = len(cape.grid_shape) == 1
    conv = functional.conv1d if one else functional.conv2d
    pool = functional.avg_pool1d if one else functional.avg_pool2d
    seen = parameters if one else torch.sigmoid(parameters.log())
    results = []
    for sample, value in zip(u, seen, strict=True):
        masks = [mask(value).view(-1, *[1] * len(cape.grid_shape)) for mask in cape.masks]

        def pointwise(x: Tensor, linear: nn.Linear) -> Tensor:
            return torch.einsum("oc,bc...->bo...", linear.weight, x) + linear.bias.view(-1, *[1] * (x.ndim - 2))

        y = functional.gelu(conv(sample[None], cape.embed.weight, padding=1))
        spectral = cape.spectral(pool(y, 4))
        for axis in range(2, y.ndim):
            spectral = spectral.repeat_interleave(4, dim=axis)
        z = masks[0] * spectral
        z = z + masks[1] * pointwise(y, cape.pointwise)
        z = z + masks[2] * conv(y, cape.depthwise.weight, padding=1, groups=y.shape[1])
        z = z + pointwise(y, cape.skip)
        z = pointwise(functional.gelu(z), cape.project)
        axes = tuple(range(2, z.ndim))
        z = (z - z.mean(axes, keepdim=True)) / (z.var(axes, keepdim=True, correction=0) + 1e-5).sqrt()
        z = cape.norm.weight * z + cape.norm.bias
        results.append(sample + z[0] if one else sample * (1 + z[0]))
    return torch.stack(results)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_cape_is_its_equations(dimensions: int) -> None:
    cape = small_cape(dimensions)
    for parameter in cape.norm.parameters():
        nn.init.normal_(parameter)
    u, parameters = random_input(cape)
    torch.testing.assert_close(cape(u, parameters), by_the_equations(cape, u, parameters), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_masks_of_zero_leave_only_the_skip(dimensions: int) -> None:
    cape = small_cape(dimensions)
    for mask in cape.masks:
        nn.init.zeros_(mask[-1].weight)
        nn.init.zeros_(mask[-1].bias)
    u, parameters = random_input(cape)
    before = cape(u, parameters)
    for branch in (cape.spectral, cape.pointwise, cape.depthwise):
        for parameter in branch.parameters():
            nn.init.normal_(parameter)
    assert torch.equal(cape(u, parameters), before)
    assert torch.equal(cape(u, parameters + 1), before)
    nn.init.normal_(cape.skip.weight)
    assert not torch.equal(cape(u, parameters), before)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_branch_has_its_own_mask(index: int) -> None:
    cape = small_cape(1)
    u, parameters = random_input(cape)
    before = cape(u, parameters)
    nn.init.zeros_(cape.masks[index][-1].weight)
    assert not torch.allclose(cape(u, parameters), before)


def test_layer_norm_takes_the_spatial_mean_of_the_correction_away() -> None:
    cape = small_cape(1)
    u, parameters = random_input(cape)
    torch.testing.assert_close(cape(u, parameters).mean(-1), u.mean(-1))


def test_guess_is_additive_on_a_line_and_multiplicative_on_a_square() -> None:
    line, square = small_cape(1), small_cape(2)
    u, parameters = random_input(line)
    assert line(torch.zeros_like(u), parameters).shape == u.shape
    nn.init.ones_(line.norm.bias)
    torch.testing.assert_close(line(torch.zeros_like(u), parameters).mean(-1), torch.ones(3, 2).double())
    u, parameters = random_input(square)
    u[:, 1] = 0
    guess = square(u, parameters)
    assert not guess[:, 1].any()
    assert (guess[:, 0] != u[:, 0]).any()


def test_parameters_are_seen_raw_on_a_line_and_squashed_on_a_square() -> None:
    parameters = torch.tensor([[3.0, 0.0, 1.0]])
    assert condition(parameters, 1).tolist() == [[3.0, 0.0, 1.0]]
    assert condition(parameters, 2).tolist() == [[0.75, 0.0, 0.5]]


def test_samples_do_not_see_each_other() -> None:
    cape = small_cape(1)
    u, parameters = random_input(cape)
    torch.testing.assert_close(cape(u, parameters)[1:2], cape(u[1:2], parameters[1:2]))


def test_gradients_reach_every_weight_and_can_be_differentiated() -> None:
    cape = small_cape(1)
    u, parameters = random_input(cape)
    parameters.requires_grad_()
    (gradient,) = torch.autograd.grad(cape(u, parameters).square().sum(), parameters, create_graph=True)
    gradient.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in cape.masks.parameters() if p is not cape.masks[0][-1].bias)


class _Concatenation(nn.Module):
    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        return x


def test_cape_model_mixes_what_the_base_makes_of_state_and_guess() -> None:
    cape = small_cape(1)
    model = CAPEModel(_Concatenation(), cape, channels=2).double()
    u, parameters = random_input(cape)
    prediction, guess = model(u, parameters)
    assert torch.equal(guess, cape(u, parameters))
    weight, bias = model.mix.weight, model.mix.bias
    expected = torch.einsum("oc,bcn->bon", weight[:, :2], u) + torch.einsum("oc,bcn->bon", weight[:, 2:], guess)
    torch.testing.assert_close(prediction, expected + bias[:, None])


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(UserError, match="do not divide the grid"):
        CAPE(1, 1, (30,))
    with pytest.raises(UserError, match="keeps 16 modes, but its averaged grid has 9"):
        CAPE(1, 1, (64,))
    with pytest.raises(UserError, match="even width and an odd kernel"):
        CAPE(1, 1, (64,), width=5, modes=4)
    with pytest.raises(UserError, match="1 or 2 dimensions"):
        CAPE(1, 1, (8, 8, 8))
    with pytest.raises(UserError, match=r"tied to the grid \(64,\)"):
        CAPE(1, 1, (64,), modes=8)(torch.zeros(1, 1, 128), torch.zeros(1, 1))


def test_paper_sizes() -> None:
    with torch.device("meta"):
        line, square = CAPE(1, 1, (128,)), CAPE(4, 3, (64, 64), modes=9)
    masks = 3 * ((32 + 32) + (64 * 32 + 64))
    assert sum(p.numel() for p in line.parameters()) == sum(
        [5 * 32, masks, 2 * 16 * 32 * 64, 2 * (32 * 64 + 64), 64 * 5, 64 + 1, 2 * 128]
    )
    assert square.spectral.weight.numel() == 2 * 18 * 9 * 32 * 64
    assert square.norm.weight.shape == (64, 64)
    assert math.prod(square.depthwise.weight.shape) == 64 * 25
