from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import brentq

from shared.config import UserError

from .. import solvers
from ..solvers import (
    ADIABATIC_INDEX,
    InitialCondition1d,
    burgers_refinement,
    cell_centers,
    initial_condition_1d,
    initial_condition_2d,
    solve_advection,
    solve_burgers,
    solve_navier_stokes,
)


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def observed_order(errors: list[float]) -> float:
    """Mean order of convergence when the resolution doubles from one error to the next."""
    return float(np.log2(errors[0] / errors[-1]) / (len(errors) - 1))


# --- Initial conditions -----------------------------------------------------------------------------------------------


def waves(**changes: object) -> InitialCondition1d:
    """One sample: sin(2πx) + 0.5 sin(4πx + 1) plus the constant of two modes that were not chosen."""
    sample = InitialCondition1d(
        amplitude=np.array([[1.0, 0.5, 0.3, 0.2]]),
        wavenumber=np.array([[1, 2, 0, 0]]),
        phase=np.array([[0.0, 1.0, 2.0, 3.0]]),
        absolute=np.array([False]),
        sign=np.array([1.0]),
        windowed=np.array([False]),
        window=np.array([[0.3, 0.7]]),
    )
    return dataclasses.replace(sample, **changes)


def by_hand(x: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * x) + 0.5 * np.sin(4 * np.pi * x + 1) + 0.3 * np.sin(2) + 0.2 * np.sin(3)


def test_formula_of_the_1d_initial_condition() -> None:
    x = cell_centers(50)
    np.testing.assert_allclose(waves()(x)[0], by_hand(x), atol=1e-14)
    np.testing.assert_allclose(waves()(x + 3), waves()(x), atol=1e-12)
    changed = waves(absolute=np.array([True]), sign=np.array([-1.0]))
    np.testing.assert_allclose(changed(x)[0], -np.abs(by_hand(x)), atol=1e-14)
    windowed = waves(windowed=np.array([True]))(x)[0]
    np.testing.assert_allclose(windowed[np.abs(x - 0.5) < 0.1], by_hand(x)[np.abs(x - 0.5) < 0.1], rtol=1e-6)
    assert np.abs(windowed[np.abs(x - 0.5) > 0.3]).max() < 1e-6


def test_statistics_of_the_1d_initial_condition() -> None:
    drawn = initial_condition_1d(generator(), 20_000)
    times_chosen = drawn.wavenumber / np.arange(1, 5)
    assert set(np.unique(times_chosen)) == {0, 1, 2}
    assert (times_chosen.sum(axis=1) == 2).all()
    np.testing.assert_allclose(times_chosen.mean(axis=0), 0.5, atol=0.02)
    assert abs((times_chosen == 2).any(axis=1).mean() - 1 / 4) < 0.02
    assert abs(drawn.absolute.mean() - 0.1) < 0.01
    assert abs(drawn.windowed.mean() - 0.1) < 0.01
    assert abs(drawn.sign.mean()) < 0.02
    assert drawn.amplitude.min() >= 0
    assert drawn.amplitude.max() <= 1
    assert abs(drawn.amplitude.mean() - 0.5) < 0.01
    assert abs(drawn.phase.mean() - np.pi) < 0.03
    left, right = drawn.window.T
    assert 0.1 <= left.min() < 0.11
    assert 0.44 < left.max() <= 0.45
    assert 0.55 <= right.min() < 0.56
    assert 0.89 < right.max() <= 0.9


def test_more_samples_extend_the_same_sequence() -> None:
    x = cell_centers(32)
    few, many = initial_condition_1d(generator(), 3), initial_condition_1d(generator(), 7)
    np.testing.assert_array_equal(few(x), many(x)[:3])
    np.testing.assert_array_equal(
        initial_condition_2d(generator(), 3, 16, 0.1), initial_condition_2d(generator(), 5, 16, 0.1)[:3]
    )


def test_2d_initial_condition() -> None:
    mach_number = 0.4
    state = initial_condition_2d(generator(), 200, 32, mach_number)
    density, pressure, velocity_x, velocity_y = np.moveaxis(state, 1, 0)
    assert state[:, :2].min() > 0
    # A windowed sample is at rest in its corner.
    windowed = np.abs(velocity_x[:, 0, 0]) + np.abs(velocity_y[:, 0, 0]) < 1e-3
    assert abs(windowed.mean() - 0.5) < 0.15
    # Elsewhere the mean of a perturbation is zero, so that the means are the background's.
    full = ~windowed
    temperature = pressure.mean(axis=(1, 2)) / density.mean(axis=(1, 2))
    speed = np.hypot(velocity_x, velocity_y).mean(axis=(1, 2))
    np.testing.assert_allclose(speed[full], mach_number * np.sqrt(ADIABATIC_INDEX * temperature)[full], rtol=1e-10)
    spectrum = np.abs(np.fft.fft2(density[full]))
    assert spectrum[:, 5:-4].max() < 1e-9 * spectrum.max()
    assert spectrum[:, 0, 1:].max() < 1e-9 * spectrum.max()
    assert spectrum[:, 4, 4].min() > 1e-6 * spectrum.max()
    relative = np.abs(density / density.mean(axis=(1, 2), keepdims=True) - 1).mean(axis=(1, 2))[full]
    assert 0.01 <= relative.min() < 0.03
    assert 0.18 < relative.max() <= 0.2


# --- Advection --------------------------------------------------------------------------------------------------------


def test_advection_shifts_the_formula() -> None:
    x = cell_centers(40)
    solution = solve_advection(waves(), 0.7, x, [0.0, 0.3, 1.0], dtype=np.float64)
    assert solution.shape == (1, 3, 40)
    np.testing.assert_allclose(solution[0, 1], by_hand(x - 0.21), atol=1e-13)
    assert solve_advection(waves(), 0.7, x, [0.0]).dtype == np.float32


def test_advection_by_whole_cells_permutes_them_whatever_the_initial_condition() -> None:
    drawn = initial_condition_1d(generator(), 100)
    assert drawn.windowed.any()
    assert drawn.absolute.any()
    solution = solve_advection(drawn, -0.5, cell_centers(64), [0.0, 5 / 32, 2.0], dtype=np.float64)
    np.testing.assert_allclose(solution[:, 1], np.roll(solution[:, 0], -5, axis=1), atol=1e-11)
    np.testing.assert_allclose(solution[:, 2], solution[:, 0], atol=1e-11)


# --- Burgers ----------------------------------------------------------------------------------------------------------


def test_burgers_converges_to_the_characteristics_before_the_shock() -> None:
    time, errors = 0.3, []
    for num_cells in (64, 128, 256):
        x = cell_centers(num_cells)
        exact = 0.5 + 0 * x
        for _ in range(200):
            exact = 0.5 + 0.25 * np.sin(2 * np.pi * (x - exact * time))
        solution = solve_burgers(0.5 + 0.25 * np.sin(2 * np.pi * x)[None], 0.0, [0, time], dtype=np.float64)
        errors.append(np.abs(solution[0, -1] - exact).mean())
    assert observed_order(errors) > 1.8
    assert errors[-1] < 2e-5


def test_burgers_with_viscosity_converges_to_the_cole_hopf_solution() -> None:
    viscosity, time, errors = 0.1, 0.4, []
    diffusivity = viscosity / np.pi
    for num_cells in (64, 128, 256):
        x = cell_centers(num_cells)
        # u = −2D φ_x/φ turns Burgers' equation into the heat equation for φ, solved mode by mode.
        wavenumber = 2 * np.pi * np.arange(num_cells // 2 + 1)
        potential = np.fft.rfft(np.exp(np.cos(2 * np.pi * x) / (4 * np.pi * diffusivity)))
        potential *= np.exp(-diffusivity * wavenumber**2 * time)
        exact = -2 * diffusivity * np.fft.irfft(1j * wavenumber * potential) / np.fft.irfft(potential)
        solution = solve_burgers(np.sin(2 * np.pi * x)[None], viscosity, [0, 0.1, time], dtype=np.float64)
        errors.append(np.abs(solution[0, -1] - exact).mean())
    assert observed_order(errors) > 1.8
    assert errors[-1] < 1e-3


def test_burgers_of_tiny_amplitude_is_the_heat_equation() -> None:
    x, times, viscosity = cell_centers(32), np.array([0.0, 0.1, 0.25]), 0.5
    solution = solve_burgers(1e-7 * np.sin(4 * np.pi * x)[None], viscosity, times, dtype=np.float64)
    decay = np.exp(-viscosity / np.pi * (4 * np.pi) ** 2 * times)
    np.testing.assert_allclose(solution[0] * 1e7, decay[:, None] * np.sin(4 * np.pi * x), atol=1e-6)


def test_burgers_shock_and_rarefaction() -> None:
    num_cells, time = 400, 0.2
    x = cell_centers(num_cells)
    box = ((x > 0.25) & (x < 0.5)).astype(float)
    solution = solve_burgers(box[None], 0.0, [0, time], dtype=np.float64)[0, -1]
    # The shock runs at (1 + 0)/2, the rarefaction opens from 0.25 to 0.25 + t.
    exact = np.where(x < 0.5 + time / 2, np.clip((x - 0.25) / time, 0, 1), 0)
    assert np.abs(solution - exact).mean() < 2 / num_cells
    shock = x[np.flatnonzero(solution > 0.5)[-1]]
    assert abs(shock - (0.5 + time / 2)) < 2 / num_cells


def test_burgers_conserves_mass_and_never_exceeds_its_initial_extremes() -> None:
    initial = initial_condition_1d(generator(), 24)(cell_centers(64))
    for viscosity in (0.0, 0.01, 4.0):
        solution = solve_burgers(initial, viscosity, np.linspace(0, 2, 5), dtype=np.float64)
        np.testing.assert_allclose(solution.mean(axis=2), np.repeat(initial.mean(axis=1)[:, None], 5, 1), atol=1e-13)
        tolerance = 1e-2 if viscosity == 0.01 else 1e-12
        assert (solution.max(axis=2) <= initial.max(axis=1)[:, None] + tolerance).all()
        energy = (solution**2).mean(axis=2)
        assert (np.diff(energy, axis=1) <= 1e-12).all()


def test_burgers_averages_refined_cells() -> None:
    initial = initial_condition_1d(generator(), 3)(cell_centers(96))
    fine = solve_burgers(initial, 0.02, [0, 0.5], dtype=np.float64)
    coarse = solve_burgers(initial, 0.02, [0, 0.5], refinement=3, dtype=np.float64)
    np.testing.assert_allclose(coarse, fine.reshape(3, 2, 32, 3).mean(axis=3), atol=1e-14)
    assert burgers_refinement(0.004, 128) == 4
    assert burgers_refinement(0.001, 100) == 6
    assert burgers_refinement(0.01, 64) == 1
    assert burgers_refinement(0.001, 1024) == 1


def test_burgers_at_rest_stays_at_rest() -> None:
    assert not solve_burgers(np.zeros((2, 16)), 0.1, [0, 1]).any()


# --- Compressible Navier–Stokes ---------------------------------------------------------------------------------------


def gas(shape: tuple[int, int], density: object, pressure: object, x: object = 0.0, y: object = 0.0) -> np.ndarray:
    """One sample [1, 4, x, y] from values that broadcast to the grid."""
    return np.stack([np.broadcast_to(value, shape).astype(float) for value in (density, pressure, x, y)])[None]


def test_uniform_flow_stays() -> None:
    initial = gas((8, 8), 1.3, 0.7, 0.4, -0.9)
    solution = solve_navier_stokes(initial, 0.01, 0.02, [0, 0.2], dtype=np.float64)
    np.testing.assert_allclose(solution[:, 1], initial, atol=1e-13)


@pytest.mark.parametrize("direction", ["x", "y"])
def test_density_wave_is_carried_along_with_second_order(direction: str) -> None:
    errors = []
    for num_cells in (16, 32, 64):
        x = cell_centers(num_cells)[:, None]
        initial = gas((num_cells, 4), 1 + 0.2 * np.sin(2 * np.pi * x), 1.0, x=1.0)
        exact = np.broadcast_to(1 + 0.2 * np.sin(2 * np.pi * (x - 0.25)), (num_cells, 4))
        if direction == "y":
            # A square grid, since cells are squares of a side set by the x axis.
            initial = np.tile(initial.swapaxes(2, 3)[:, [0, 1, 3, 2]], (1, 1, num_cells // 4, 1))
            exact = np.tile(exact.T, (num_cells // 4, 1))
        solution = solve_navier_stokes(initial, 0.0, 0.0, [0, 0.25], dtype=np.float64)[0, -1]
        errors.append(np.abs(solution[0] - exact).mean())
        np.testing.assert_allclose(solution[1], 1.0, atol=1e-12)
    assert observed_order(errors) > 1.8


def exact_star_state(left: tuple[float, float], right: tuple[float, float]) -> tuple[float, float, float, float]:
    """Pressure, velocity and the densities on either side of the contact of a shock tube at rest (Toro, chapter 4)."""
    gamma = ADIABATIC_INDEX

    def velocity(pressure: float, state: tuple[float, float]) -> float:
        density0, pressure0 = state
        if pressure > pressure0:
            a, b = 2 / ((gamma + 1) * density0), (gamma - 1) / (gamma + 1) * pressure0
            return (pressure - pressure0) * np.sqrt(a / (pressure + b))
        sound = np.sqrt(gamma * pressure0 / density0)
        return 2 * sound / (gamma - 1) * ((pressure / pressure0) ** ((gamma - 1) / (2 * gamma)) - 1)

    pressure = brentq(lambda p: velocity(p, left) + velocity(p, right), 1e-6, 10)
    ratio, k = pressure / right[1], (gamma - 1) / (gamma + 1)
    return (
        pressure,
        velocity(pressure, right),
        left[0] * (pressure / left[1]) ** (1 / gamma),
        right[0] * (ratio + k) / (k * ratio + 1),
    )


def test_sod_shock_tube_reaches_the_exact_star_state() -> None:
    x, time = cell_centers(256)[:, None], 0.08
    inside = np.abs(x - 0.5) < 0.25
    initial = gas((256, 4), np.where(inside, 1.0, 0.125), np.where(inside, 1.0, 0.1))
    solution = solve_navier_stokes(initial, 0.0, 0.0, [0, time], dtype=np.float64)[0, -1, :, :, 0]
    pressure, velocity, density_left, density_right = exact_star_state((1.0, 1.0), (0.125, 0.1))
    contact = 0.75 + velocity * time
    shock = 0.75 + velocity * density_right / (density_right - 0.125) * time
    before = np.argmin(np.abs(x[:, 0] - (contact - 0.025)))
    behind = np.argmin(np.abs(x[:, 0] - (0.5 * contact + 0.5 * shock)))
    np.testing.assert_allclose(solution[:3, before], [density_left, pressure, velocity], rtol=0.01)
    np.testing.assert_allclose(solution[:3, behind], [density_right, pressure, velocity], rtol=0.01)
    # The other end of the tube mirrors it.
    np.testing.assert_allclose(solution[:2], solution[:2, ::-1], atol=1e-11)
    np.testing.assert_allclose(solution[2], -solution[2, ::-1], atol=1e-11)


@pytest.mark.parametrize("viscosity", [0.0, 0.05])
def test_mass_momentum_and_energy_are_conserved(viscosity: float) -> None:
    initial = initial_condition_2d(generator(), 4, 16, 1.0)
    solution = solve_navier_stokes(initial, viscosity, viscosity, [0, 0.1, 0.2], dtype=np.float64)
    assert np.abs(solution[:, 2] - solution[:, 0]).max() > 0.1
    density, pressure, velocity_x, velocity_y = np.moveaxis(solution, 2, 0)
    energy = pressure / (ADIABATIC_INDEX - 1) + density * (velocity_x**2 + velocity_y**2) / 2
    for conserved in (density, density * velocity_x, density * velocity_y, energy):
        total, size = conserved.mean(axis=(2, 3)), np.abs(conserved).mean(axis=(2, 3))
        np.testing.assert_allclose(total / size, total[:, :1] / size, atol=1e-11)


def test_axes_are_alike() -> None:
    initial = initial_condition_2d(generator(), 3, 16, 0.5)
    swapped = initial.swapaxes(2, 3)[:, [0, 1, 3, 2]]
    for viscosity, tolerance in ((0.0, 1e-10), (0.02, 2e-2)):
        solution = solve_navier_stokes(initial, viscosity, viscosity, [0, 0.1], dtype=np.float64)
        other = solve_navier_stokes(swapped, viscosity, viscosity, [0, 0.1], dtype=np.float64)
        np.testing.assert_allclose(other.swapaxes(3, 4)[:, :, [0, 1, 3, 2]], solution, atol=tolerance)


@pytest.mark.parametrize(("component", "rate"), [("along", 4 / 3 * 0.1 + 0.05), ("across", 0.1)])
def test_viscosity_damps_velocity_at_its_rate(component: str, rate: float) -> None:
    x, time_step = cell_centers(64)[:, None], 0.05
    wave = 1e-3 * np.sin(2 * np.pi * x)
    state = gas((64, 4), 2.0, 1.0, **{"x" if component == "along" else "y": wave})
    conserved = solvers._to_conserved(np.moveaxis(state, 0, -1))
    after = solvers._viscous_step(conserved, np.array([time_step]), 1 / 64, 0.1, 0.05, 0.3)
    velocity = solvers._to_primitive(after)[2 if component == "along" else 3, :, :, 0]
    expected = np.exp(-rate * (2 * np.pi) ** 2 * time_step) * np.broadcast_to(wave, velocity.shape)
    np.testing.assert_allclose(velocity, expected, atol=2e-3 * 1e-3)
    # Density is untouched, and what kinetic energy is lost heats the gas.
    np.testing.assert_array_equal(after[0], conserved[0])
    assert abs(after[1].sum() / conserved[1].sum() - 1) < 1e-14


def test_hllc_flux_of_a_uniform_flow_is_the_physical_flux() -> None:
    for speed in (-3.0, -0.2, 0.4, 5.0):
        density, pressure, across = 1.7, 0.9, 0.6
        energy = pressure / (ADIABATIC_INDEX - 1) + density * (speed**2 + across**2) / 2
        flux = solvers._hllc_flux(gas((5, 5), density, pressure, speed, across)[0][..., None], axis=1)
        expected = [
            density * speed,
            (energy + pressure) * speed,
            density * speed**2 + pressure,
            density * speed * across,
        ]
        np.testing.assert_allclose(flux[:, 2, 2, 0], expected, rtol=1e-12)


def test_pressure_floor() -> None:
    conserved = solvers._to_conserved(gas((2, 2), 1.0, 1.0, x=3.0)[0])
    conserved[1, 0, 0] = 4.5
    pressure = solvers._to_primitive(conserved)[1]
    assert pressure[0, 0] == solvers.PRESSURE_FLOOR
    np.testing.assert_allclose(pressure[1], 1.0)


def test_navier_stokes_averages_conserved_variables() -> None:
    initial = initial_condition_2d(generator(), 2, 16, 0.5)
    fine = solve_navier_stokes(initial, 0.01, 0.01, [0, 0.05], dtype=np.float64)
    coarse = solve_navier_stokes(initial, 0.01, 0.01, [0, 0.05], refinement=2, dtype=np.float64)
    assert coarse.shape == (2, 2, 4, 8, 8)

    def average(values: np.ndarray) -> np.ndarray:
        return values.reshape(2, 2, 8, 2, 8, 2).mean(axis=(3, 5))

    np.testing.assert_allclose(coarse[:, :, 0], average(fine[:, :, 0]), rtol=1e-12)
    np.testing.assert_allclose(
        coarse[:, :, 0] * coarse[:, :, 2], average(fine[:, :, 0] * fine[:, :, 2]), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("viscosity", "order"), [(0.0, 1.9), (0.05, 1.0)])
def test_order_of_a_smooth_two_dimensional_flow(viscosity: float, order: float) -> None:
    """Second order without viscosity; the splitting of the viscous step is of first order in time."""
    solutions = []
    for num_cells in (16, 32, 64, 128):
        x = 2 * np.pi * cell_centers(num_cells)[:, None]
        y = x.T
        initial = gas(
            (num_cells, num_cells),
            1 + 0.2 * np.sin(x + y),
            1 + 0.1 * np.cos(x) * np.sin(y),
            0.3 * np.sin(x) * np.cos(y),
            0.2 * np.sin(y),
        )
        solutions.append(
            solve_navier_stokes(initial, viscosity, viscosity, [0, 0.05], refinement=num_cells // 16, dtype=np.float64)[
                0, -1
            ]
        )
    assert observed_order([np.abs(coarse - fine).mean() for coarse, fine in pairwise(solutions)]) > order


# --- All solvers ------------------------------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [0, 0.05, 0.1]
    waves_1d = initial_condition_1d(generator(), 9)(cell_centers(64))
    flows = initial_condition_2d(generator(), 5, 12, 0.7)
    burgers = solve_burgers(waves_1d, 0.02, times)
    navier_stokes = solve_navier_stokes(flows, 0.03, 0.01, times)
    order = np.array([4, 0, 2])
    np.testing.assert_array_equal(solve_burgers(waves_1d[order], 0.02, times), burgers[order])
    np.testing.assert_array_equal(solve_navier_stokes(flows[order], 0.03, 0.01, times), navier_stokes[order])
    monkeypatch.setattr(solvers, "CELLS_PER_BLOCK", 300)
    np.testing.assert_array_equal(solve_burgers(waves_1d, 0.02, times), burgers)
    np.testing.assert_array_equal(solve_navier_stokes(flows, 0.03, 0.01, times), navier_stokes)


def test_frames_do_not_depend_on_how_many_are_saved() -> None:
    initial = initial_condition_1d(generator(), 4)(cell_centers(128))
    many = solve_burgers(initial, 0.05, np.linspace(0, 1, 21), dtype=np.float64)
    few = solve_burgers(initial, 0.05, [0, 0.5, 1], dtype=np.float64)
    assert np.abs(many[:, ::10] - few).max() < 5e-3


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="start at zero and increase"):
        solve_burgers(np.zeros((1, 8)), 0.1, [0.5, 1.0])
    with pytest.raises(ValueError, match="start at zero and increase"):
        solve_navier_stokes(gas((4, 4), 1, 1), 0, 0, [0, 1, 1])
    with pytest.raises(ValueError, match="groups of 3"):
        solve_burgers(np.zeros((1, 8)), 0.1, [0, 1], refinement=3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_that_blew_up_stops_with_advice() -> None:
    with pytest.raises(UserError, match="unstable near t = 0"):
        solve_burgers(np.full((1, 8), np.nan), 0.1, [0, 1])
    with pytest.raises(UserError, match="raise num_points"):
        solve_navier_stokes(gas((4, 4), np.nan, 1), 0, 0, [0, 1])
