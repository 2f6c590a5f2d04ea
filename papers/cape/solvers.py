"""Reference solvers for the paper's three equations, and the random initial conditions that they start from.

Everything is vectorized over samples and computed in float64; solutions are returned in float32 unless told otherwise.
The domain is the unit interval or square, periodic, and values belong to cell centers. Every sample keeps its own clock
and its own time step, so that its solution does not depend on which samples share its batch: any subset can be computed
alone.

Sources: Takamoto et al., "Learning Neural PDE Solvers with Parameter-Guided Channel Attention" (2023), and the
benchmark that it takes its data from, Takamoto et al., "PDEBench" (2022), appendix D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from shared.config import UserError

Array = NDArray[np.float64]

ADIABATIC_INDEX = 5 / 3
NUM_MODES_1D = 4
MAX_MODE_2D = 4
WINDOW_WIDTH = 0.01
# Below this pressure a cell is reset to the floor, as in PDEBench.
VACUUM_PRESSURE, PRESSURE_FLOOR = 1e-8, 1e-4
# Samples are solved in blocks of about this many cells: larger temporaries fall out of the L2 cache, and the allocator
# returns them to the system each time, which was measured to cost up to twice the time.
CELLS_PER_BLOCK = 8192
# Below this shear viscosity PDEBench solves the inviscid Euler equations.
INVISCID_BELOW = 1e-7


def cell_centers(num_points: int) -> Array:
    """Centers [num_points] of equal cells on the unit interval."""
    return (np.arange(num_points) + 0.5) / num_points


# --- Initial conditions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InitialCondition1d:
    """Superposed sine waves as a formula that can be evaluated anywhere on the periodic unit interval (PDEBench, D.1).

    u0(x) = sign · window(x) · maybe-absolute(Σ_i amplitude_i sin(2π wavenumber_i x + phase_i)); one row a sample.
    """

    amplitude: Array  # [samples, modes]
    wavenumber: NDArray[np.int64]  # [samples, modes]
    phase: Array  # [samples, modes]
    absolute: NDArray[np.bool_]  # [samples]
    sign: Array  # [samples]
    windowed: NDArray[np.bool_]  # [samples]
    window: Array  # [samples, 2], left and right edge

    def __call__(self, points: Array) -> Array:
        """Values [samples, points] at `points`, which are [points] (the same for all) or [samples, points]."""
        position = np.mod(np.atleast_2d(points), 1.0)
        values = np.zeros((len(self.sign), position.shape[1]))
        for mode in range(self.amplitude.shape[1]):
            angle = 2 * np.pi * self.wavenumber[:, mode, None] * position + self.phase[:, mode, None]
            values += self.amplitude[:, mode, None] * np.sin(angle)
        values = np.where(self.absolute[:, None], np.abs(values), values) * self.sign[:, None]
        return np.where(self.windowed[:, None], values * _window(position, self.window), values)


def initial_condition_1d(generator: np.random.Generator, num_samples: int) -> InitialCondition1d:
    """Draw initial conditions for advection and Burgers (PDEBench, D.1).

    Two of four modes are chosen with replacement. A mode that was not chosen keeps its amplitude and phase but has
    wavenumber zero, hence adds a constant; mode i chosen twice has wavenumber 2i. Both follow from PDEBench's code.
    Each sample uses its own row of uniform draws, so that asking for more samples extends the same sequence.
    """
    draws = generator.random((num_samples, 7 + 2 * NUM_MODES_1D))
    chosen, amplitude, phase = draws[:, 5:7], draws[:, 7 : 7 + NUM_MODES_1D], draws[:, 7 + NUM_MODES_1D :]
    absolute, sign, windowed, left, right = draws[:, :5].T
    modes = np.arange(NUM_MODES_1D)
    times_chosen = (np.floor(NUM_MODES_1D * chosen)[:, :, None] == modes).sum(axis=1)
    return InitialCondition1d(
        amplitude=amplitude,
        wavenumber=times_chosen * (modes + 1),
        phase=2 * np.pi * phase,
        absolute=absolute < 0.1,
        sign=np.where(sign < 0.5, -1.0, 1.0),
        windowed=windowed < 0.1,
        window=_window_edges(left, right),
    )


def initial_condition_2d(
    generator: np.random.Generator, num_samples: int, num_points: int, mach_number: float
) -> Array:
    """Draw density, pressure and velocities [samples, 4, num_points, num_points] in random motion (PDEBench, D.5).

    Background density and temperature, relative perturbations and four random fields of the modes up to 4; the mean
    speed is `mach_number` times the background's √(γT). Half of the samples move inside a smooth rectangle only.
    Density and pressure are kept above 1 % of their background, which the perturbations almost never reach.
    """
    num_modes = 2 * MAX_MODE_2D + 1
    draws = generator.random((num_samples, 9 + 4 * num_modes**2))
    density0, temperature0, density_spread, pressure_spread, windowed, *edges = draws[:, :9].T
    density0, temperature0 = 0.1 + 9.9 * density0, 0.1 + 9.9 * temperature0
    density_spread, pressure_spread = 0.01 + 0.19 * density_spread, 0.01 + 0.19 * pressure_spread
    pressure0 = density0 * temperature0
    speed0 = mach_number * np.sqrt(ADIABATIC_INDEX * temperature0)

    modes = np.arange(-MAX_MODE_2D, MAX_MODE_2D + 1)
    product = modes[:, None] * modes[None, :]
    weight = np.where(product != 0, np.maximum(np.hypot(modes[:, None], modes[None, :]), 1) ** -0.5, 0)
    phase = 2 * np.pi * draws[:, 9:].reshape(num_samples, 4, num_modes, num_modes)
    position = cell_centers(num_points)
    wave = np.exp(2j * np.pi * modes[:, None] * position)
    fields = (wave.T @ (weight * np.exp(1j * phase)) @ wave).imag
    velocity_x, velocity_y, pressure, density = np.moveaxis(fields, 1, 0)

    def column(values: Array) -> Array:
        return values[:, None, None]

    def mean(values: Array) -> Array:
        return values.mean(axis=(1, 2), keepdims=True)

    scale = column(speed0) / mean(np.hypot(velocity_x, velocity_y))
    velocity_x, velocity_y = velocity_x * scale, velocity_y * scale
    density = np.maximum(1 + column(density_spread) * density / mean(np.abs(density)), 0.01)
    pressure = np.maximum(1 + column(pressure_spread) * pressure / mean(np.abs(pressure)), 0.01)

    window_x, window_y = (_window(position[None], _window_edges(*pair)) for pair in (edges[:2], edges[2:]))
    mask = np.where(column(windowed < 0.5), window_x[:, :, None] * window_y[:, None, :], 1.0)
    density = column(density0) * (density * mask + 1 - mask)
    pressure = column(pressure0) * (pressure * mask + 1 - mask)
    return np.stack([density, pressure, velocity_x * mask, velocity_y * mask], axis=1)


def _window_edges(left: Array, right: Array) -> Array:
    """Turn two uniform draws a sample into the window's edges [samples, 2]."""
    return np.stack([0.1 + 0.35 * left, 0.55 + 0.35 * right], axis=-1)


def _window(position: Array, edges: Array) -> Array:
    """A smooth box [samples, points]: one between the edges [samples, 2], zero outside."""
    left, right = edges[:, :1], edges[:, 1:]
    return 0.5 * (np.tanh((position - left) / WINDOW_WIDTH) - np.tanh((position - right) / WINDOW_WIDTH))


# --- Advection --------------------------------------------------------------------------------------------------------


def solve_advection(
    initial: InitialCondition1d,
    speed: float,
    points: Array,
    times: Sequence[float] | Array,
    *,
    dtype: DTypeLike = np.float32,
) -> NDArray[np.floating]:
    """Solve u_t + β u_x = 0 exactly, u(x, t) = u0(x − βt), at `points` and `times`; [samples, frames, points]."""
    frames = [initial(np.asarray(points) - speed * time).astype(dtype) for time in times]
    return np.stack(frames, axis=1)


# --- Burgers ----------------------------------------------------------------------------------------------------------


def solve_burgers(
    initial: Array,
    viscosity: float,
    times: Sequence[float] | Array,
    *,
    refinement: int = 1,
    cfl: float = 0.25,
    dtype: DTypeLike = np.float32,
) -> NDArray[np.floating]:
    """Solve u_t + (u²/2)_x = (ν/π) u_xx from `initial` [samples, cells] at t = 0; [samples, frames, cells/refinement].

    Second-order finite volumes (van Leer slopes, midpoint rule), and Strang splitting with the exact propagator of the
    diffusion in Fourier space, so that a large viscosity costs no time steps. `refinement` neighboring cells are
    averaged into one of the output. The time step of a sample follows its largest |u| at the last saved frame, which
    suffices because neither part of the equation lets the maximum grow.
    """
    initial = np.asarray(initial, dtype=np.float64)
    times = _checked_times(times)
    num_samples, num_cells = initial.shape
    _check_divides(num_cells, refinement)
    solution = np.empty((num_samples, len(times), num_cells // refinement), dtype=dtype)
    for block in _blocks(num_samples, num_cells):
        _solve_burgers_block(initial[block], viscosity, times, refinement, cfl, solution[block])
    return solution


def _solve_burgers_block(
    state: Array, viscosity: float, times: Array, refinement: int, cfl: float, solution: NDArray[np.floating]
) -> None:
    """Fill `solution` [samples, frames, cells/refinement] from the initial `state` [samples, cells]."""
    num_samples, num_cells = state.shape
    wavenumber = 2 * np.pi * np.arange(num_cells // 2 + 1)
    decay_rate = viscosity / np.pi * wavenumber**2

    # One row a sample that is still on its way; the two half steps of diffusion between neighboring advective steps
    # meet in Fourier space, where they cost two products.
    sample = np.arange(num_samples)
    frame = np.zeros(num_samples, dtype=int)
    steps_left = np.zeros(num_samples, dtype=int)
    time_step = np.zeros((num_samples, 1))
    half_step_decay = np.empty((num_samples, len(wavenumber)))
    spectrum = np.fft.rfft(state)
    arrived = sample
    while True:
        if arrived.size:
            state = np.fft.irfft(spectrum[arrived], n=num_cells)
            solution[sample[arrived], frame[arrived]] = state.reshape(len(state), -1, refinement).mean(axis=2)
            largest = np.abs(state).max(axis=1)
            _check_finite(largest, times[frame[arrived]])
            under_way = frame[arrived] < len(times) - 1
            largest, going = largest[under_way], arrived[under_way]
            interval = times[frame[going] + 1] - times[frame[going]]
            frame[going] += 1
            steps_left[going] = np.maximum(np.ceil(interval * largest * num_cells / cfl), 1)
            time_step[going, 0] = interval / steps_left[going]
            half_step_decay[going] = np.exp(-0.5 * time_step[going] * decay_rate)
            if not under_way.all():
                kept = np.delete(np.arange(len(sample)), arrived[~under_way])
                sample, frame, steps_left, time_step = sample[kept], frame[kept], steps_left[kept], time_step[kept]
                half_step_decay, spectrum = half_step_decay[kept], spectrum[kept]
            if not sample.size:
                return
        spectrum *= half_step_decay
        state = _burgers_advective_step(np.fft.irfft(spectrum, n=num_cells), time_step * num_cells)
        spectrum = np.fft.rfft(state)
        spectrum *= half_step_decay
        steps_left -= 1
        arrived = np.flatnonzero(steps_left == 0)


def burgers_refinement(viscosity: float, num_points: int) -> int:
    """How many cells to solve on per output cell: at least 512 in all where shocks are thin (ν ≤ 0.004), else one."""
    return -(-512 // num_points) if viscosity <= 0.004 else 1


def _burgers_advective_step(state: Array, ratio: Array) -> Array:
    """One midpoint step of u_t + (u²/2)_x = 0; `ratio` is dt/dx [samples, 1]."""
    midpoint = state - 0.5 * ratio * np.diff(_burgers_flux(state))
    return state - ratio * np.diff(_burgers_flux(midpoint))


def _burgers_flux(state: Array) -> Array:
    """Fluxes [samples, cells + 1] through the faces; the first and the last are the same face.

    The scheme's flux ½(½u_L² + ½u_R²) − ¼|u_L + u_R|(u_R − u_L) equals ⅛(|u_L + u_R| − (u_R − u_L))².
    """
    padded = np.concatenate([state[:, -2:], state, state[:, :2]], axis=1)
    difference = padded[:, 1:] - padded[:, :-1]
    half_slope = _limited_half_slope(difference[:, :-1], difference[:, 1:])
    left = padded[:, 1:-2] + half_slope[:, :-1]
    right = padded[:, 2:-1] - half_slope[:, 1:]
    upwind = np.abs(left + right)
    right -= left
    upwind -= right
    upwind *= upwind
    upwind *= 0.125
    return upwind


def _limited_half_slope(backward: Array, forward: Array) -> Array:
    """Half of van Leer's slope sign(c)·[ab > 0]·min(2 min(|a|, |b|), |c|), c = (a + b)/2, from differences a and b.

    A face value, the cell's value plus or minus this, lies between the cell's and its neighbor's value.
    """
    upper = np.minimum(backward, forward)
    np.maximum(upper, 0, out=upper)
    lower = np.maximum(backward, forward)
    np.minimum(lower, 0, out=lower)
    central = backward + forward
    central *= 0.25
    return np.clip(central, lower, upper, out=central)


# --- Compressible Navier–Stokes ---------------------------------------------------------------------------------------
#
# Inside the solver arrays are [variables, x, y, samples]: with the samples last, slices along x and along y both
# consist of long contiguous runs. Primitive variables are density, pressure and the two velocities; the conserved ones
# in the same order are density, energy and the two momenta.


def solve_navier_stokes(
    initial: Array,
    shear_viscosity: float,
    bulk_viscosity: float,
    times: Sequence[float] | Array,
    *,
    refinement: int = 1,
    cfl: float = 0.3,
    dtype: DTypeLike = np.float32,
) -> NDArray[np.floating]:
    """Solve the two-dimensional compressible Navier–Stokes equations of an ideal gas with γ = 5/3.

    `initial` is [samples, 4, x, y] at t = 0: density, pressure, velocity along x and along y. Cells are squares,
    and the domain has unit length along x (hence along y too, where there are as many cells). The result is
    [samples, frames, 4, x/refinement, y/refinement], the conserved variables averaged over `refinement`² cells.

    Finite volumes: van Leer slopes of the primitive variables, HLLC fluxes, midpoint rule; after each step PDEBench's
    density-weighted viscosity, sub-cycled, a splitting of first order in time. The viscosity is skipped below a shear
    viscosity of 1e-7.
    """
    initial = np.asarray(initial, dtype=np.float64)
    times = _checked_times(times)
    num_samples, _, size_x, size_y = initial.shape
    _check_divides(size_x, refinement)
    _check_divides(size_y, refinement)
    coarse = (size_x // refinement, size_y // refinement)
    solution = np.empty((num_samples, len(times), 4, *coarse), dtype=dtype)
    for block in _blocks(num_samples, size_x * size_y):
        _solve_navier_stokes_block(
            initial[block], shear_viscosity, bulk_viscosity, times, refinement, cfl, solution[block]
        )
    return solution


def _solve_navier_stokes_block(
    initial: Array,
    shear_viscosity: float,
    bulk_viscosity: float,
    times: Array,
    refinement: int,
    cfl: float,
    solution: NDArray[np.floating],
) -> None:
    """Fill `solution` [samples, frames, 4, x/refinement, y/refinement] from `initial` [samples, 4, x, y]."""
    spacing = 1.0 / initial.shape[2]
    size_x, size_y = solution.shape[3:]

    def save(rows: NDArray[np.int64]) -> None:
        blocks = _to_conserved(primitive[..., rows]).reshape(4, size_x, refinement, size_y, refinement, -1)
        solution[sample[rows], frame[rows]] = np.moveaxis(_to_primitive(blocks.mean(axis=(2, 4))), -1, 0)

    sample = np.arange(len(initial))
    frame = np.zeros(len(initial), dtype=int)
    clock = np.zeros(len(initial))
    primitive = np.ascontiguousarray(np.moveaxis(initial, 0, -1))
    save(sample)
    while sample.size:
        remaining = times[frame + 1] - clock
        fastest = _fastest_signal(primitive)
        _check_finite(fastest, clock)
        num_steps = np.ceil(remaining * fastest / (cfl * spacing))
        time_step = remaining / num_steps
        primitive = _navier_stokes_step(primitive, time_step, spacing, shear_viscosity, bulk_viscosity, cfl)
        clock += time_step
        arrived = np.flatnonzero(num_steps == 1)
        if arrived.size:
            frame[arrived] += 1
            clock[arrived] = times[frame[arrived]]
            save(arrived)
            kept = frame < len(times) - 1
            if not kept.all():
                sample, frame, clock, primitive = sample[kept], frame[kept], clock[kept], primitive[..., kept]


def _navier_stokes_step(
    primitive: Array, time_step: Array, spacing: float, shear_viscosity: float, bulk_viscosity: float, cfl: float
) -> Array:
    """Advance primitive variables [4, x, y, samples] by `time_step` [samples]."""
    ratio = time_step / spacing
    conserved = _to_conserved(primitive)
    midpoint = _to_primitive(conserved + _inflow(primitive, 0.5 * ratio))
    conserved += _inflow(midpoint, ratio)
    if shear_viscosity >= INVISCID_BELOW:
        conserved = _viscous_step(conserved, time_step, spacing, shear_viscosity, bulk_viscosity, cfl)
    return _to_primitive(conserved)


def _to_conserved(primitive: Array) -> Array:
    density, pressure, velocity_x, velocity_y = primitive
    conserved = primitive * density
    conserved[0] = density
    conserved[1] = pressure / (ADIABATIC_INDEX - 1) + 0.5 * (conserved[2] * velocity_x + conserved[3] * velocity_y)
    return conserved


def _to_primitive(conserved: Array) -> Array:
    density, energy, momentum_x, momentum_y = conserved
    primitive = conserved / density
    primitive[0] = density
    kinetic = 0.5 * (momentum_x * primitive[2] + momentum_y * primitive[3])
    pressure = (ADIABATIC_INDEX - 1) * (energy - kinetic)
    primitive[1] = np.where(pressure <= VACUUM_PRESSURE, PRESSURE_FLOOR, pressure)
    return primitive


def _fastest_signal(primitive: Array) -> Array:
    """The largest speed of sound plus |velocity| along an axis, for each sample."""
    density, pressure, velocity_x, velocity_y = primitive
    speed = np.sqrt(ADIABATIC_INDEX * pressure / density)
    speed += np.maximum(np.abs(velocity_x), np.abs(velocity_y))
    return speed.max(axis=(0, 1))


def _inflow(primitive: Array, ratio: Array) -> Array:
    """What flows into each cell, −ratio·(ΔF_x + ΔF_y), in conserved variables; `ratio` is dt/dx [samples]."""
    flux_x = _hllc_flux(primitive, axis=1)
    flux_y = _hllc_flux(primitive, axis=2)
    inflow = flux_x[:, :-1] - flux_x[:, 1:]
    inflow += flux_y[:, :, :-1]
    inflow -= flux_y[:, :, 1:]
    inflow *= ratio
    return inflow


def _hllc_flux(primitive: Array, axis: int) -> Array:
    """Fluxes of the conserved variables through the faces across `axis` (1 or 2), one more than there are cells.

    The contact's speed S* says which side of it the face is on; with K that side, the flux is F_K + S(U*_K − U_K),
    where S is the outer wave's speed, or zero if that wave too was carried past the face (Toro 2009, section 10.4).
    Face values lie between positive cell values, so that density and pressure stay positive.
    """
    normal, tangential = (2, 3) if axis == 1 else (3, 2)
    left, right = _face_values(primitive, axis)
    sound = np.maximum(np.sqrt(ADIABATIC_INDEX * left[1] / left[0]), np.sqrt(ADIABATIC_INDEX * right[1] / right[0]))
    wave_left = np.minimum(left[normal], right[normal]) - sound
    wave_right = np.maximum(left[normal], right[normal]) + sound
    mass_left = left[0] * (wave_left - left[normal])
    mass_right = right[0] * (wave_right - right[normal])
    contact = right[1] - left[1] + mass_left * left[normal] - mass_right * right[normal]
    contact /= mass_left - mass_right

    from_left = contact >= 0
    density, pressure, velocity_x, velocity_y = np.where(from_left, left, right)
    velocity, transverse = (velocity_x, velocity_y) if axis == 1 else (velocity_y, velocity_x)
    mass = np.where(from_left, mass_left, mass_right)
    wave = np.where(from_left, wave_left, wave_right)
    kept_wave = np.where(from_left, np.minimum(wave_left, 0), np.maximum(wave_right, 0))

    star_density = mass / (wave - contact)
    energy = pressure / (ADIABATIC_INDEX - 1) + 0.5 * density * (velocity * velocity + transverse * transverse)
    star_energy = star_density * (energy / density + (contact - velocity) * (contact + pressure / mass))
    flux = np.empty_like(left)
    flux[0] = density * velocity + kept_wave * (star_density - density)
    flux[1] = (energy + pressure) * velocity + kept_wave * (star_energy - energy)
    flux[normal] = density * velocity * velocity + pressure + kept_wave * (star_density * contact - density * velocity)
    flux[tangential] = flux[0] * transverse
    return flux


def _face_values(primitive: Array, axis: int) -> tuple[Array, Array]:
    """Primitive variables on the left and on the right of every face across `axis`."""
    padded = _periodic(primitive, axis, before=2, after=2)
    difference = np.diff(padded, axis=axis)
    half_slope = _limited_half_slope(_along(difference, axis, 0, -1), _along(difference, axis, 1, None))
    left = _along(padded, axis, 1, -2) + _along(half_slope, axis, 0, -1)
    right = _along(padded, axis, 2, -1) - _along(half_slope, axis, 1, None)
    return left, right


def _viscous_step(
    conserved: Array, time_step: Array, spacing: float, shear_viscosity: float, bulk_viscosity: float, cfl: float
) -> Array:
    """PDEBench's viscosity: along x, then along y, in sub-steps of at most CFL·½dx²/(4η/3 + ζ).

    Through a face flow the momentum μ D ∂v and the energy μ D v ∂v of each velocity component, D the mean density of
    the two cells, μ = 4η/3 + ζ for the component along the face's normal and η for the other. Momentum and energy are
    conserved; the density does not change, so that velocities can be advanced in place of momenta.
    """
    longitudinal = 4 / 3 * shear_viscosity + bulk_viscosity
    num_substeps = np.ceil(time_step * longitudinal / (0.5 * cfl * spacing**2))
    density, velocity, energy = conserved[0], conserved[2:] / conserved[0], conserved[1].copy()
    face_viscosity = []
    for axis in (0, 1):
        padded = _periodic(density, axis, before=1, after=1)
        face_density = 0.5 * (_along(padded, axis, 0, -1) + _along(padded, axis, 1, None))
        components = (longitudinal, shear_viscosity) if axis == 0 else (shear_viscosity, longitudinal)
        face_viscosity.append(np.stack([component * face_density for component in components]))

    for substep in range(int(num_substeps.max())):
        # A sample with fewer sub-steps than others takes steps of length zero once it has arrived.
        ratio = np.where(substep < num_substeps, time_step / num_substeps, 0) / spacing**2
        velocity_ratio = ratio / density
        for axis in (1, 2):
            padded = _periodic(velocity, axis, before=1, after=1)
            before, after = _along(padded, axis, 0, -1), _along(padded, axis, 1, None)
            momentum_flux = (after - before) * face_viscosity[axis - 1]
            before = before + after
            before *= momentum_flux
            energy_flux = 0.5 * (before[0] + before[1])
            velocity = velocity + np.diff(momentum_flux, axis=axis) * velocity_ratio
            energy += np.diff(energy_flux, axis=axis - 1) * ratio
    return np.concatenate([density[None], energy[None], velocity * density])


def _periodic(values: Array, axis: int, before: int, after: int) -> Array:
    """Values with ghost cells copied from the other end of `axis`."""
    return np.concatenate([_along(values, axis, -before, None), values, _along(values, axis, 0, after)], axis=axis)


def _along(values: Array, axis: int, start: int, stop: int | None) -> Array:
    """The view values[start:stop] along `axis`."""
    return values[(slice(None),) * axis + (slice(start, stop),)]


# --- Blocks and checks ------------------------------------------------------------------------------------------------


def _blocks(num_samples: int, cells_per_sample: int) -> Iterator[slice]:
    size = max(CELLS_PER_BLOCK // cells_per_sample, 1)
    return (slice(start, start + size) for start in range(0, num_samples, size))


def _checked_times(times: Sequence[float] | Array) -> Array:
    times = np.asarray(times, dtype=np.float64)
    if times.ndim != 1 or len(times) < 1 or times[0] != 0 or (np.diff(times) <= 0).any():
        raise ValueError(f"times must start at zero and increase, got {times}")
    return times


def _check_divides(num_cells: int, refinement: int) -> None:
    if refinement < 1 or num_cells % refinement:
        raise ValueError(f"{num_cells} cells cannot be averaged in groups of {refinement}")


def _check_finite(speed: Array, time: Array) -> None:
    """Stop a run that has blown up, whose time step would be meaningless."""
    bad = ~np.isfinite(speed)
    if bad.any():
        raise UserError(
            f"the solver became unstable near t = {time[bad].min():.3g}; "
            "raise num_points or refinement, or take milder parameters"
        )
