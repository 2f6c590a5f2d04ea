"""Measure the vectorized Burgers and Navier–Stokes solvers: `python benchmarks/solver.py`, about a minute.

Against a plain step-by-step version (one sample, a Python loop over time, the scheme written down directly), against
the same solver fed one sample at a time, and at resolutions that double. Writes `results/solver.csv` and `.png`.
"""

from __future__ import annotations

import csv
import io
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

# Before NumPy is loaded: a solver uses one thread, and so should what it is compared with.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib as mpl
import numpy as np

from papers.cape.solvers import (
    ADIABATIC_INDEX,
    cell_centers,
    initial_condition_1d,
    initial_condition_2d,
    solve_burgers,
    solve_navier_stokes,
)
from shared.files import atomic_path, write_text

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
VISCOSITY = 0.01
BURGERS_TIMES = np.linspace(0, 0.5, 6)
NAVIER_STOKES_TIMES = np.linspace(0, 0.1, 3)
REPEATS = 3

Solver = Callable[[np.ndarray], np.ndarray]


# --- The plain versions -----------------------------------------------------------------------------------------------


def plain_slope(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Van Leer's slopes along `axis`, as the definition reads."""
    backward = values - np.roll(values, 1, axis)
    forward = np.roll(values, -1, axis) - values
    central = (backward + forward) / 2
    limit = np.minimum(2 * np.minimum(np.abs(backward), np.abs(forward)), np.abs(central))
    return np.where(backward * forward > 0, np.sign(central) * limit, 0)


def plain_burgers(initial: np.ndarray) -> np.ndarray:
    """Burgers' equation for samples one after another: [samples, cells] → [samples, frames, cells]."""
    num_cells = initial.shape[1]
    rate = VISCOSITY / np.pi * (2 * np.pi * np.arange(num_cells // 2 + 1)) ** 2

    def change(u: np.ndarray, ratio: float) -> np.ndarray:
        slope = plain_slope(u)
        left, right = u + slope / 2, np.roll(u - slope / 2, -1)
        flux = (left**2 / 2 + right**2 / 2) / 2 - np.abs(left + right) / 4 * (right - left)
        return -ratio * (flux - np.roll(flux, 1))

    def diffuse(u: np.ndarray, duration: float) -> np.ndarray:
        return np.fft.irfft(np.fft.rfft(u) * np.exp(-rate * duration), n=num_cells)

    solutions = []
    for u in initial:
        clock, frames = 0.0, [u]
        for target in BURGERS_TIMES[1:]:
            while clock < target:
                step = min(0.25 / num_cells / np.abs(u).max(), target - clock)
                u = diffuse(u, step / 2)
                u = u + change(u + change(u, step * num_cells / 2), step * num_cells)
                u = diffuse(u, step / 2)
                clock = target if step == target - clock else clock + step
            frames.append(u)
        solutions.append(frames)
    return np.array(solutions)


def plain_navier_stokes(initial: np.ndarray) -> np.ndarray:
    """Inviscid flow for samples one after another: [samples, 4, x, y] → [samples, frames, 4, x, y]."""
    gamma, num_cells = ADIABATIC_INDEX, initial.shape[2]

    def conserved(w: np.ndarray) -> np.ndarray:
        density, pressure, u, v = w
        return np.stack([density, pressure / (gamma - 1) + density * (u**2 + v**2) / 2, density * u, density * v])

    def primitive(q: np.ndarray) -> np.ndarray:
        density, energy, momentum_x, momentum_y = q
        pressure = (gamma - 1) * (energy - (momentum_x**2 + momentum_y**2) / density / 2)
        return np.stack(
            [density, np.where(pressure <= 1e-8, 1e-4, pressure), momentum_x / density, momentum_y / density]
        )

    def physical_flux(w: np.ndarray, normal: int) -> np.ndarray:
        flux = conserved(w) * w[normal]
        flux[1] += w[1] * w[normal]
        flux[normal] += w[1]
        return flux

    def star(w: np.ndarray, wave: np.ndarray, contact: np.ndarray, normal: int) -> np.ndarray:
        velocity = w[normal]
        density = w[0] * (wave - velocity) / (wave - contact)
        result = density * w
        result[0], result[normal] = density, density * contact
        energy = conserved(w)[1] / w[0]
        result[1] = density * (energy + (contact - velocity) * (contact + w[1] / (w[0] * (wave - velocity))))
        return result

    def hllc(w: np.ndarray, axis: int) -> np.ndarray:
        normal = 1 + axis
        slope = plain_slope(w, axis)
        left, right = w + slope / 2, np.roll(w - slope / 2, -1, axis)
        sound = np.maximum(np.sqrt(gamma * left[1] / left[0]), np.sqrt(gamma * right[1] / right[0]))
        slow, fast = np.minimum(left[normal], right[normal]) - sound, np.maximum(left[normal], right[normal]) + sound
        mass_left, mass_right = left[0] * (slow - left[normal]), right[0] * (fast - right[normal])
        contact = right[1] - left[1] + mass_left * left[normal] - mass_right * right[normal]
        contact = contact / (mass_left - mass_right)
        flux_left, flux_right = physical_flux(left, normal), physical_flux(right, normal)
        star_left = flux_left + slow * (star(left, slow, contact, normal) - conserved(left))
        star_right = flux_right + fast * (star(right, fast, contact, normal) - conserved(right))
        return np.where(
            slow > 0, flux_left, np.where(contact >= 0, star_left, np.where(fast >= 0, star_right, flux_right))
        )

    def change(w: np.ndarray, ratio: float) -> np.ndarray:
        total = np.zeros_like(w)
        for axis in (1, 2):
            flux = hllc(w, axis)
            total -= ratio * (flux - np.roll(flux, 1, axis))
        return total

    solutions = []
    for w in initial:
        clock, frames = 0.0, [w]
        for target in NAVIER_STOKES_TIMES[1:]:
            while clock < target:
                speed = (np.sqrt(gamma * w[1] / w[0]) + np.abs(w[2:])).max()
                step = min(0.3 / num_cells / speed, target - clock)
                q = conserved(w)
                middle = primitive(q + change(w, step * num_cells / 2))
                w = primitive(q + change(middle, step * num_cells))
                clock = target if step == target - clock else clock + step
            frames.append(w)
        solutions.append(frames)
    return np.array(solutions)


# --- What is measured -------------------------------------------------------------------------------------------------


def burgers(initial: np.ndarray) -> np.ndarray:
    return solve_burgers(initial, VISCOSITY, BURGERS_TIMES)


def navier_stokes(initial: np.ndarray) -> np.ndarray:
    return solve_navier_stokes(initial, 0.0, 0.0, NAVIER_STOKES_TIMES)


def one_at_a_time(solver: Solver) -> Solver:
    return lambda initial: np.concatenate([solver(sample[None]) for sample in initial])


def burgers_start(num_samples: int, num_points: int) -> np.ndarray:
    return initial_condition_1d(np.random.default_rng(0), num_samples)(cell_centers(num_points))


def navier_stokes_start(num_samples: int, num_points: int) -> np.ndarray:
    return initial_condition_2d(np.random.default_rng(0), num_samples, num_points, 0.1)


def samples_per_second(solvers: dict[str, Solver], initial: np.ndarray) -> dict[str, float]:
    """The best of several turns of each solver, taken alternately so that a busy machine hits all of them alike."""
    best = dict.fromkeys(solvers, np.inf)
    for _ in range(REPEATS):
        for name, solver in solvers.items():
            start = time.perf_counter()
            solver(initial)
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: len(initial) / seconds for name, seconds in best.items()}


def machine() -> str:
    """The processor's name and what it runs."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return f"{model}, 1 thread, Python {platform.python_version()}, NumPy {np.__version__}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def main() -> None:
    cases = {
        "Burgers, 128 cells": (burgers, plain_burgers, burgers_start(64, 128)),
        "Navier–Stokes, 32² cells": (navier_stokes, plain_navier_stokes, navier_stokes_start(8, 32)),
    }
    rows: list[dict[str, object]] = []
    for case, (vectorized, plain, initial) in cases.items():
        difference = np.abs(vectorized(initial) - plain(initial)).mean() / np.abs(initial).mean()
        if difference > 0.01:
            raise SystemExit(f"{case}: the plain and the vectorized solver differ by {difference:.2%}")
        solvers = {
            "vectorized": vectorized,
            "vectorized, one sample at a time": one_at_a_time(vectorized),
            "plain, one sample at a time": plain,
        }
        speeds = samples_per_second(solvers, initial)
        for name, speed in speeds.items():
            rows.append(_row("versions", case, name, len(initial), initial.shape[-1], speed))
            rows[-1]["ratio_to_plain"] = f"{speed / speeds['plain, one sample at a time']:.2f}"
    for num_points in (64, 128, 256, 512):
        initial = burgers_start(16, num_points)
        speed = samples_per_second({"vectorized": burgers}, initial)["vectorized"]
        rows.append(_row("resolution", "Burgers", "vectorized", len(initial), num_points, speed))
    for num_points in (16, 32, 64, 128):
        initial = navier_stokes_start(2, num_points)
        speed = samples_per_second({"vectorized": navier_stokes}, initial)["vectorized"]
        rows.append(_row("resolution", "Navier–Stokes", "vectorized", len(initial), num_points, speed))
    for row in rows:
        row["machine"] = machine()
        print(*row.values(), sep="  ")
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(RESULTS / "solver.csv", table.getvalue())
    draw(rows, RESULTS / "solver.png")


def _row(comparison: str, case: str, solver: str, num_samples: int, num_points: int, speed: float) -> dict[str, object]:
    return {
        "comparison": comparison,
        "case": case,
        "solver": solver,
        "samples": num_samples,
        "cells_per_dimension": num_points,
        "samples_per_second": f"{speed:.4g}",
        "ratio_to_plain": "",
    }


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Bars of the speed relative to the plain version, and the cost of a sample over the resolution."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    versions = [row for row in rows if row["comparison"] == "versions"]
    labels = [f"{row['case']}\n{row['solver']} ({row['samples']} samples)" for row in versions]
    colors = ["C0" if str(row["case"]).startswith("Burgers") else "C1" for row in versions]
    bars = left.barh(labels, [float(str(row["ratio_to_plain"])) for row in versions], color=colors)
    left.bar_label(bars, [f"{row['ratio_to_plain']}×  ({row['samples_per_second']}/s)" for row in versions], padding=3)
    left.set_xlim(right=1.5 * max(bar.get_width() for bar in bars))
    left.invert_yaxis()
    left.set_xlabel("samples per second, relative to the plain version")
    for equation, exponent, color in (("Burgers", 2, "C0"), ("Navier–Stokes", 3, "C1")):
        measured = [row for row in rows if row["comparison"] == "resolution" and row["case"] == equation]
        points = np.array([float(str(row["cells_per_dimension"])) for row in measured])
        seconds = np.array([1 / float(str(row["samples_per_second"])) for row in measured])
        right.loglog(points, seconds, "o-", color=color, label=equation)
        reference = seconds[-1] * (points / points[-1]) ** exponent
        right.loglog(points, reference, "--", color=color, alpha=0.5, label=f"cells to the power {exponent}")
    right.set_xscale("log", base=2)
    right.set_xlabel("cells per dimension")
    right.set_ylabel("seconds per sample")
    right.legend(loc="upper left")
    right.set_ylim(top=10 * right.get_ylim()[1])
    figure.suptitle(machine(), fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
