from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.nn.graph import GATConv, GraphConv, chebyshev_operators

from ..baselines import (
    STID,
    SpatialNorm,
    StackedGRU,
    StatelessGraphLSTM,
    StatelessTGCNCell,
    STNorm,
    TemporalNorm,
    fit_predict,
    lag_features,
    lead_coefficients,
    time_of_day,
    time_of_day_means,
)
from ..config import CONTROLS
from ..data import Graph, Prepared

STEPS_PER_DAY = 144


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def prepared_from(target: np.ndarray, observed: np.ndarray | None = None) -> Prepared:
    """A data set of a target `[T, N]` from midnight on, split 70/10/20; the inputs hold the target, halved."""
    num_steps, num_sites = target.shape
    features = np.zeros((num_steps, num_sites, 8), np.float32)
    features[..., -1] = target / 2
    empty = np.zeros((num_sites, num_sites), np.float32)
    return Prepared(
        graph=Graph(empty, (empty,) * 5, np.zeros(num_sites, np.int64)),
        features=features,
        target=target.astype(np.float32),
        observed=np.ones(target.shape, bool) if observed is None else observed,
        times=np.datetime64("2022-03-01T00:00") + np.arange(num_steps) * np.timedelta64(10, "m"),
        sites=tuple(f"site{i}" for i in range(num_sites)),
        positions=np.zeros((num_sites, 2)),
        snapshots=np.zeros((0, 2)),
        fractions=(0.7, 0.1, 0.2),
        target_offset=0.0,
        target_scale=2.0,
    )


def daily_profile(num_days: int, num_sites: int) -> np.ndarray:
    hours = np.arange(num_days * STEPS_PER_DAY)[:, None] * 2 * np.pi / STEPS_PER_DAY
    return 0.5 + 0.3 * np.sin(hours + np.arange(num_sites))


# --- Controls ---------------------------------------------------------------------------------------------------------


def test_persistence_repeats_the_last_value() -> None:
    target = np.arange(600.0)[:, None] + np.array([0.0, 0.5])
    prepared = prepared_from(target)
    forecast, windows = fit_predict("persistence", prepared, 3), prepared.windows("test", 3)
    assert forecast.shape == windows.targets.shape == (118, 3, 2)
    # The value grows by 1 a step.
    np.testing.assert_array_equal(windows.targets - forecast, np.broadcast_to([[[1], [2], [3]]], forecast.shape))


def test_time_of_day_slots_by_hand() -> None:
    times = np.array(["2022-03-01T00:00", "2022-03-01T00:09", "2022-03-01T00:10", "2022-03-31T23:50"], "datetime64[m]")
    assert time_of_day(times).tolist() == [0, 0, 1, 143]


def test_time_of_day_means_by_hand() -> None:
    values = np.array([[1, 10], [3, 20], [5, 30], [100, 40]], np.float32)
    observed = np.array([[True, False], [True, False], [True, False], [False, False]])
    means = time_of_day_means(values, observed, np.array([0, 0, 1, 2]))
    assert means[:2, 0].tolist() == [2, 5]
    # Slots in which a site was not observed have its mean, sites that never were that of all.
    assert means[2, 0] == means[143, 0] == pytest.approx(3)
    assert means[:, 1] == pytest.approx(3)


def test_time_of_day_recovers_a_periodic_series() -> None:
    prepared = prepared_from(daily_profile(10, 3))
    forecast = fit_predict("time_of_day", prepared, 36)
    np.testing.assert_allclose(forecast, prepared.windows("test", 36).targets, atol=1e-5)


def test_lead_coefficients_by_hand() -> None:
    residuals = np.array([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [3.0, 0.0]])
    coefficients = lead_coefficients(residuals, np.ones((4, 2), bool), 4)
    # Lead 1: (1·2 − 2·1 − 1·3)/(1 + 4 + 1); lead 2: (−1 + 2·3)/(1 + 4); lead 3: 3/1; no pair at lead 4.
    assert coefficients[:, 0] == pytest.approx([-3 / 6, 5 / 5, 3, 0])
    # A site that never departs from its mean has nothing to remember.
    assert not coefficients[:, 1].any()
    observed = np.ones((4, 2), bool)
    observed[2] = False
    assert lead_coefficients(residuals, observed, 2)[:, 0] == pytest.approx([(2 - 3) / (1 + 1), 6 / 4])


def test_residuals_that_halve_are_forecast_by_powers_of_a_half() -> None:
    residuals = 0.5 ** np.arange(30.0)[:, None]
    coefficients = lead_coefficients(residuals, np.ones((30, 1), bool), 5)
    assert coefficients[:, 0] == pytest.approx(0.5 ** np.arange(1, 6))


def test_autoregression_by_hand() -> None:
    """Mean of the target's time of day, plus the coefficient of the lead times the last residual."""
    generator = np.random.default_rng(0)
    prepared = prepared_from(daily_profile(6, 2) + 0.1 * generator.standard_normal((6 * STEPS_PER_DAY, 2)))
    train = prepared.splits.train.stop
    slots = np.arange(len(prepared.times)) % STEPS_PER_DAY
    forecast, first = fit_predict("time_of_day_ar1", prepared, 3), prepared.windows("test", 3).first_targets
    assert first[0] == prepared.splits.test.start
    for window, lead, site in ((0, 1, 0), (7, 3, 1)):
        mean = [prepared.target[:train][slots[:train] == slot, site].mean(dtype=float) for slot in range(STEPS_PER_DAY)]
        residual = prepared.target[:, site] - np.array(mean)[slots]
        past, future = residual[: train - lead], residual[lead:train]
        at = first[window] - 1
        expected = mean[slots[at + lead]] + (past @ future) / (past @ past) * residual[at]
        assert forecast[window, lead - 1, site] == pytest.approx(expected, rel=1e-5)


def test_controls_neither_fit_to_the_test_part_nor_to_readings_that_were_filled_in() -> None:
    generator = np.random.default_rng(0)
    target = generator.random((3 * STEPS_PER_DAY, 2))
    observed = generator.random(target.shape) < 0.8
    prepared = prepared_from(target, observed)
    last_input = prepared.splits.test.start
    changed = prepared.target.copy()
    changed[last_input + 1 :] = 9
    changed_features = prepared.features.copy()
    changed_features[last_input + 1 :] = 9
    other = dataclasses.replace(prepared, target=changed, features=changed_features)
    for name in CONTROLS:
        # The first two windows begin before the change.
        np.testing.assert_array_equal(fit_predict(name, other, 2)[:2], fit_predict(name, prepared, 2)[:2])
    filled = prepared.target.copy()
    filled[: prepared.splits.train.stop][~observed[: prepared.splits.train.stop]] = 5
    np.testing.assert_array_equal(
        fit_predict("time_of_day", dataclasses.replace(prepared, target=filled), 2),
        fit_predict("time_of_day", prepared, 2),
    )


def test_gradient_boosting_learns_from_lags_and_is_deterministic() -> None:
    """x_t = −x_(t−1) + noise, of which persistence knows nothing; the result is in the target's units."""
    generator = np.random.default_rng(0)
    target = np.zeros((800, 3))
    for t in range(1, 800):
        target[t] = -0.95 * target[t - 1] + 0.1 * generator.standard_normal(3)
    prepared = prepared_from(target)
    truth = prepared.windows("test", 2).targets
    forecast = fit_predict("xgboost", prepared, 2)
    np.testing.assert_array_equal(fit_predict("xgboost", prepared, 2), forecast)
    assert np.abs(forecast - truth).mean() < 0.5 * np.abs(fit_predict("persistence", prepared, 2) - truth).mean()
    assert fit_predict("xgboost", prepared, 2, split="validation", train_stride=4).shape == (79, 2, 3)


def test_lag_features_by_hand() -> None:
    inputs = np.arange(2 * 3 * 2 * 4, dtype=np.float32).reshape(2, 3, 2, 4)
    rows = lag_features(inputs)
    assert rows.shape == (4, 3 + 3 + 1)
    # Window 0, site 1: the last feature at three steps, the others at the last step, and the site.
    assert rows[1].tolist() == [7, 15, 23, 20, 21, 22, 1]


def test_unknown_control() -> None:
    with pytest.raises(UserError, match=r"unknown control 'arima'; choose one of persistence, .*xgboost"):
        fit_predict("arima", prepared_from(np.zeros((100, 2))), 1)


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_cell_without_state_is_the_t_gcn_cell_from_zero() -> None:
    adjacency = (torch.rand(7, 7) < 0.5).double()
    cell = StatelessTGCNCell(GATConv(3, 4), GATConv(3, 4), 4).double()
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    update, new = (conv(x, adjacency) for conv in (cell.update[0], cell.new[0]))
    # The general cell: [conv ‖ h] with h = 0, whatever W is where h enters.
    of_state = torch.randn(4, 4, dtype=torch.float64)
    zero = torch.zeros(2, 7, 4, dtype=torch.float64)
    z = torch.sigmoid(cell.update[1](update) + zero @ of_state)
    h = torch.tanh(cell.new[1](new) + zero @ of_state)
    cell.update[0], cell.new[0] = _Constant(update), _Constant(new)
    torch.testing.assert_close(cell(x), z * zero + (1 - z) * h)


class _Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: Tensor) -> Tensor:
        return self.value


def test_graph_lstm_is_the_full_one_from_zero() -> None:
    operators = chebyshev_operators((torch.rand(7, 7) < 0.5).double(), 2)
    cell = StatelessGraphLSTM(3, 4, operators).double()
    x, zero = torch.randn(2, 7, 3, dtype=torch.float64), torch.zeros(2, 7, 4, dtype=torch.float64)
    of_hidden = [GraphConv(4, 4, 2).double() for _ in range(4)]  # zero bias
    to_input, to_cell, to_output = (convolution(x, operators) for convolution in cell.convolutions)
    old_input, old_forget, old_cell, old_output = (convolution(zero, operators) for convolution in of_hidden)
    peephole = torch.randn(4, dtype=torch.float64)
    i = torch.sigmoid(to_input + old_input + peephole * zero)
    f = torch.sigmoid(old_forget + peephole * zero)
    c = f * zero + i * torch.tanh(to_cell + old_cell)
    o = torch.sigmoid(to_output + old_output + cell.peephole * c)
    torch.testing.assert_close(cell(x), o * torch.tanh(c))


def test_gru_is_recurrent_in_time_and_sees_each_site_alone() -> None:
    model, x = StackedGRU(8, 5, 3), torch.randn(2, 6, 4, 8)
    changed = x.clone()
    changed[:, 0, 2] += 1
    difference = (model(changed) - model(x)).abs().amax(dim=(0, 1))
    assert difference[2] > 0
    assert not difference[[0, 1, 3]].any()
    alone = model.decoder(model.gru(x[:, :, 1])[0][:, -1])
    torch.testing.assert_close(model(x)[..., 1], alone)


def test_stid_is_its_equations() -> None:
    model = STID(4, 6, 3, embedding_size=5, num_layers=2, dropout=0.5).eval()
    x = torch.randn(2, 6, 4, 8)
    for site in range(4):
        history = torch.stack([x[:, p, site, feature] for p in range(6) for feature in (1, 2, 7)], dim=-1)
        h = torch.cat([model.embed(history), model.site[site].expand(2, -1)], dim=-1)
        for first, _, _, second in model.layers:
            h = h + second(functional.relu(first(h)))
        torch.testing.assert_close(model(x)[..., site], model.decoder(h))


def test_stid_compares_every_step_with_its_own_target() -> None:
    """The published evaluation broadcasts [1, H, N, 1] against [N, H]; a wrong axis would show here."""
    model = STID(4, 6, 3, embedding_size=5, num_layers=1, dropout=0.0)
    nn.init.zeros_(model.decoder.weight)
    model.decoder.bias.data = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(model(torch.randn(2, 6, 4, 8)), torch.tensor([1.0, 2.0, 3.0])[:, None].expand(2, 3, 4))


def test_norms_normalize() -> None:
    x = 3 + 5 * torch.randn(7, 6, 9, 4)
    over_time = TemporalNorm(9, 4)(x)
    torch.testing.assert_close(over_time.mean(dim=(0, 1)), torch.zeros(9, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(over_time.var(dim=(0, 1), correction=0), torch.ones(9, 4), atol=1e-4, rtol=0)
    over_sites = SpatialNorm(4)(x)
    torch.testing.assert_close(over_sites.mean(dim=2), torch.zeros(7, 6, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(over_sites.var(dim=2), torch.ones(7, 6, 4), atol=1e-4, rtol=0)


def test_st_norm_is_convolutions_along_time() -> None:
    """Against convolutions of [batch, channels, sites, time], as the method is usually written."""
    model = STNorm(5, 8, 3, channels=4, num_blocks=2, num_layers=2, kernel_size=2).double().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("scale" in name or "norm.weight" in name), std=0.1)
    x = torch.randn(3, 6, 5, 8, dtype=torch.float64)
    assert model.receptive_field == 7
    u = functional.pad(x.permute(0, 3, 2, 1), (1, 0))
    u = torch.einsum("oc,bcnt->bont", model.start.weight, u) + model.start.bias[:, None, None]
    skip = 0
    for layer, dilation in enumerate((1, 2, 1, 2)):
        by_time = u.permute(3, 0, 2, 1)
        norms = [model.temporal_norms[layer](by_time), model.spatial_norms[layer](by_time)]
        seen = torch.cat([u, *(norm.permute(1, 3, 2, 0) for norm in norms)], dim=1)
        convolution = model.convolutions[layer]
        kernel = convolution.weight.unflatten(1, (2, 12)).permute(0, 2, 1)[:, :, None]
        filtered, gate = functional.conv2d(seen, kernel, convolution.bias, dilation=(1, dilation)).chunk(2, dim=1)
        change = torch.tanh(filtered) * torch.sigmoid(gate)
        skip = skip + model.skips[layer](change[..., -1].mT)
        if layer < 3:
            residual = model.residuals[layer](change.movedim(1, -1)).movedim(-1, 1)
            u = residual + u[..., -residual.shape[-1] :]
    assert change.shape[-1] == 1
    torch.testing.assert_close(model(x), model.decoder(skip).mT)
