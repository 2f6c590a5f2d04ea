from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shared.evaluation import metrics

SHAPES = [(3, 4, 2, 16), (2, 3, 4, 8, 10), (1, 2, 1, 7), (1, 1, 1, 5, 9)]


def fields(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def by_loops(prediction: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric one field at a time, from its definition."""
    lead = prediction.shape[:3]
    names = ["rmse", "nrmse", "conserved_rmse", "max_error", "boundary_rmse"]
    names += [f"fourier_rmse_{band}" for band in metrics.FOURIER_BANDS]
    out = {name: np.zeros(lead) for name in names}
    for place in np.ndindex(*lead):
        a, b = prediction[place], target[place]
        shape = a.shape
        out["rmse"][place] = math.sqrt(np.mean((a - b) ** 2))
        out["nrmse"][place] = math.sqrt(np.mean((a - b) ** 2)) / math.sqrt(np.mean(b**2))
        out["conserved_rmse"][place] = abs(a.mean() - b.mean())
        out["max_error"][place] = max(abs(a[cell] - b[cell]) for cell in np.ndindex(*shape))
        edge = [cell for cell in np.ndindex(*shape) if any(i in (0, n - 1) for i, n in zip(cell, shape, strict=True))]
        out["boundary_rmse"][place] = math.sqrt(sum((a[cell] - b[cell]) ** 2 for cell in edge) / len(edge))
        for band, (low, high) in metrics.FOURIER_BANDS.items():
            out[f"fourier_rmse_{band}"][place] = math.sqrt(
                sum(power for k, power in spectrum(a - b) if low <= k < high)
            )
    return out


def spectrum(field: np.ndarray) -> list[tuple[float, float]]:
    """|k| and power of every mode, by summing the discrete Fourier transform directly."""
    cells = np.array(list(np.ndindex(*field.shape)))
    modes = []
    for index in cells:
        phase = 2 * np.pi * (cells * index / np.array(field.shape)).sum(axis=1)
        coefficient = (field.reshape(-1) * np.exp(-1j * phase)).mean()
        folded = [i if i <= (n - 1) // 2 else i - n for i, n in zip(index, field.shape, strict=True)]
        modes.append((math.hypot(*folded), abs(coefficient) ** 2))
    return modes


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_loops(shape: tuple[int, ...]) -> None:
    prediction, target = fields(shape)
    expected = by_loops(prediction.numpy(), target.numpy())
    computed = metrics.field_metrics(prediction, target)
    assert set(computed) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(computed[name].numpy(), values, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_bands_add_up_to_the_rmse(shape: tuple[int, ...]) -> None:
    prediction, target = fields(shape)
    bands = [metrics.fourier_rmse(prediction, target, low, high) for low, high in metrics.FOURIER_BANDS.values()]
    total = sum(band.square() for band in bands).sqrt()
    torch.testing.assert_close(total, metrics.rmse(prediction, target))


@pytest.mark.parametrize(("wavenumber", "band"), [(3, "low"), (4, "middle"), (11, "middle"), (12, "high")])
def test_a_wave_falls_in_its_band(wavenumber: int, band: str) -> None:
    x = torch.arange(64, dtype=torch.float64) / 64
    error = torch.sin(2 * math.pi * wavenumber * x).expand(1, 1, 1, 64)
    for name, (low, high) in metrics.FOURIER_BANDS.items():
        value = metrics.fourier_rmse(error, torch.zeros_like(error), low, high).item()
        assert value == pytest.approx(math.sqrt(0.5) if name == band else 0.0, abs=1e-12)


def test_diagonal_wave_counts_by_its_radius() -> None:
    x = torch.arange(32, dtype=torch.float64) / 32
    # |k| = sqrt(9 + 9) = 4.24: beyond 4 although neither component is.
    wave = torch.cos(2 * math.pi * 3 * (x[:, None] + x[None, :])).expand(1, 1, 1, 32, 32)
    assert metrics.fourier_rmse(wave, torch.zeros_like(wave), 0, 4).item() == pytest.approx(0, abs=1e-12)
    assert metrics.fourier_rmse(wave, torch.zeros_like(wave), 4, 12).item() == pytest.approx(math.sqrt(0.5))


def test_nrmse_of_doubled_and_of_zero_fields_is_one() -> None:
    _, target = fields((2, 3, 1, 8))
    torch.testing.assert_close(metrics.nrmse(2 * target, target), torch.ones(2, 3, 1, dtype=torch.float64))
    torch.testing.assert_close(metrics.nrmse(0 * target, target), torch.ones(2, 3, 1, dtype=torch.float64))
    assert not metrics.nrmse(target, 0 * target).isfinite().any()


@pytest.mark.parametrize("shapes", [((2, 3, 8), (2, 3, 8)), ((1, 1, 1, 8), (1, 1, 1, 9)), ((1,) * 6, (1,) * 6)])
def test_refuses_other_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="must both be"):
        metrics.nrmse(torch.ones(shapes[0]), torch.ones(shapes[1]))
