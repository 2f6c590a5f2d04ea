from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared.config import UserError
from shared.nn import FNO1d, FNO2d, SpectralConv1d, SpectralConv2d


def spectral_conv_1d_by_definition(x: Tensor, weight: Tensor) -> Tensor:
    """Sum over modes of exp(2πikj/n), coefficient by coefficient."""
    n = x.shape[-1]
    j = torch.arange(n, dtype=torch.float64)
    out = torch.zeros(x.shape[0], weight.shape[-1], n, dtype=torch.float64)
    for k in range(weight.shape[1]):
        wave = torch.exp(2j * torch.pi * k * j / n)
        coefficient = (x * wave.conj()).sum(-1) @ torch.complex(weight[0, k], weight[1, k])
        mirrored = 1 if k == 0 or 2 * k == n else 2
        out += mirrored / n * (coefficient[..., None] * wave).real
    return out


@pytest.mark.parametrize("method", ["fft", "dft"])
@pytest.mark.parametrize(("n", "modes"), [(16, 5), (15, 8), (16, 9), (7, 1)])
def test_spectral_conv_1d_is_its_definition(method: str, n: int, modes: int) -> None:
    layer = SpectralConv1d(3, 2, modes, method).double()
    x = torch.randn(4, 3, n, dtype=torch.float64)
    torch.testing.assert_close(layer(x), spectral_conv_1d_by_definition(x, layer.weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(
    ("layer", "grid"),
    [
        (SpectralConv1d(3, 5, 6), (21,)),
        (SpectralConv1d(3, 5, 9), (16,)),
        (SpectralConv2d(3, 5, 4), (12, 9)),
        (SpectralConv2d(3, 5, 5), (10, 8)),
        (SpectralConv2d(3, 5, 7), (10, 12)),  # first and last rows overlap
    ],
)
def test_dft_and_fft_are_the_same_map(
    layer: torch.nn.Module, grid: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    layer = layer.to(dtype)
    x = torch.randn(2, 3, *grid, dtype=dtype)
    target = torch.randn(2, 5, *grid, dtype=dtype)
    results = []
    for method in ("fft", "dft"):
        layer.method = method
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        results.append([out, *torch.autograd.grad((out * target).sum(), [leaf, layer.weight])])
    for fft, dft in zip(*results, strict=True):
        assert (fft - dft).norm() <= tolerance * fft.norm()


def test_spectral_conv_2d_is_the_published_indexing() -> None:
    layer = SpectralConv2d(3, 2, 3).double()
    x = torch.randn(4, 3, 8, 10, dtype=torch.float64)
    weight = torch.complex(layer.weight[0], layer.weight[1])
    spectrum = torch.fft.rfft2(x)
    out = torch.zeros(4, 2, 8, 6, dtype=torch.complex128)
    out[:, :, :3, :3] = torch.einsum("bixy,xyio->boxy", spectrum[:, :, :3, :3], weight[:3])
    out[:, :, -3:, :3] = torch.einsum("bixy,xyio->boxy", spectrum[:, :, -3:, :3], weight[3:])
    torch.testing.assert_close(layer(x), torch.fft.irfft2(out, s=(8, 10)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["fft", "dft"])
@pytest.mark.parametrize(("layer", "grid"), [(SpectralConv1d, (17,)), (SpectralConv2d, (12, 10))])
def test_spectral_conv_commutes_with_translations(layer: type, grid: tuple[int, ...], method: str) -> None:
    conv = layer(2, 2, 4, method).double()
    x = torch.randn(3, 2, *grid, dtype=torch.float64)
    axes = tuple(range(2, x.ndim))
    shifts = (3, 5)[: len(axes)]
    torch.testing.assert_close(conv(x.roll(shifts, axes)), conv(x).roll(shifts, axes))


def test_spectral_conv_sees_the_function_not_the_grid() -> None:
    conv = SpectralConv1d(1, 1, 4).double()
    x = torch.arange(64, dtype=torch.float64) / 64
    fine = (torch.sin(2 * torch.pi * x) + torch.cos(4 * torch.pi * x))[None, None]
    torch.testing.assert_close(conv(fine)[..., ::4], conv(fine[..., ::4]))


def test_initial_weights_are_small_and_positive() -> None:
    weight = SpectralConv1d(4, 8, 16).weight
    assert weight.dtype == torch.float32
    assert weight.min() >= 0
    assert weight.max() < 1 / 32
    assert weight.mean().item() == pytest.approx(1 / 64, rel=0.1)


def test_transforms_stay_in_single_precision_under_autocast() -> None:
    conv = SpectralConv1d(2, 2, 4)
    x = torch.randn(3, 2, 16)
    expected = conv(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv(x), expected)
        assert conv(x.bfloat16()).dtype == torch.float32


def test_transform_matrices_made_in_inference_serve_training() -> None:
    conv = SpectralConv1d(1, 1, 3)
    with torch.inference_mode():
        conv(torch.randn(1, 1, 23))
    conv(torch.randn(1, 1, 23)).sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize(("network", "grid"), [(FNO1d, (24,)), (FNO2d, (16, 12))])
def test_fno_shapes_resolutions_and_gradients(network: type, grid: tuple[int, ...]) -> None:
    model = network(3, 2, width=6, modes=4, num_layers=2, projection_width=8)
    for shape in (grid, tuple(2 * size for size in grid)):
        assert model(torch.randn(5, 3, *shape)).shape == (5, 2, *shape)
    model(torch.randn(5, 3, *grid)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_fno_converges_under_refinement() -> None:
    model = FNO1d(1, 1, width=6, modes=4, num_layers=3, padding=0).double()

    def evaluate(n: int) -> Tensor:
        x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        return model(torch.sin(2 * torch.pi * x)[None, None])[0, 0]

    with torch.no_grad():
        # Means over fine cells stand for values at coarse cell centers, up to second order.
        coarse = (evaluate(64) - evaluate(512).view(64, 8).mean(1)).norm() / 8
        fine = (evaluate(128) - evaluate(1024).view(128, 8).mean(1)).norm() / 128**0.5
    assert fine < 0.5 * coarse


def test_fno_pads_at_the_end_of_the_domain() -> None:
    model = FNO1d(1, 1, width=3, modes=2, num_layers=1, padding=2).double()
    x = torch.randn(1, 1, 10, dtype=torch.float64)
    grid = ((torch.arange(10, dtype=torch.float64) + 0.5) / 10)[None, None]
    lifted = torch.nn.functional.pad(model.lift(torch.cat([x, grid], 1).mT).mT, (0, 2))
    expected = (model.spectral[0](lifted) + model.pointwise[0](lifted.mT).mT)[..., :10]
    torch.testing.assert_close(model(x), model.project(expected.mT).mT)


def test_too_many_modes_and_unknown_methods_are_named() -> None:
    with pytest.raises(UserError, match="9 Fourier modes on 14 points: at most 8"):
        SpectralConv1d(1, 1, 9)(torch.zeros(1, 1, 14))
    with pytest.raises(UserError, match="on 16×8 points: at most 5"):
        SpectralConv2d(1, 1, 6)(torch.zeros(1, 1, 16, 8))
    with pytest.raises(UserError, match="auto, fft or dft"):
        SpectralConv1d(1, 1, 2, "fast")
    with pytest.raises(UserError, match="modes must be at least 1"):
        SpectralConv2d(1, 1, 0)
