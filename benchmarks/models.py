"""Time and memory of a training step: what CAPE costs its base, and what the truncated transform saves.

    python benchmarks/models.py

A step is one batch of the small profile's advection experiment: 25 trajectories rolled out for 20 frames on the
network's own output, the gradient through all of it, and Adam's update, on one CPU thread. The models take turns, so
that all see the same load, and the median counts. Memory is what is kept for the backward pass, in exact bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor, nn

from papers.cape.baselines import ModelSettings, build_model, num_weights
from papers.cape.losses import rollout_loss
from shared.files import atomic_path
from shared.nn import SpectralConv1d

RESULTS = Path(__file__).parent / "results"
BATCH, NUM_FRAMES, NUM_POINTS = 25, 21, 64
ROUNDS = 7
SETTINGS = ModelSettings(width=16, modes=8, unet_features=8, cape_width=32, cape_modes=8)


def make(name: str, method: str = "auto") -> nn.Module:
    """A model of the benchmark, its Fourier layers computed by `method`."""
    model = build_model(name, SETTINGS, channels=1, num_parameters=1, grid_shape=(NUM_POINTS,))
    for module in model.modules():
        if isinstance(module, SpectralConv1d):
            module.method = method
    return model


def training_step(model: nn.Module, frames: Tensor, parameters: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        rollout_loss(model, frames, parameters, autoregressive_steps=NUM_FRAMES, guess_weight=5.7e-5)["loss"].backward()
        optimizer.step()

    return step


def kept_for_backward(step: Callable[[], None]) -> int:
    """Bytes of the distinct storages that a step keeps for its backward pass."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def measure() -> pd.DataFrame:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    frames, parameters = torch.randn(BATCH, NUM_FRAMES, 1, NUM_POINTS), torch.rand(BATCH, 1)
    models = {
        "FNO, FFT": make("fno", "fft"),
        "FNO": make("fno"),
        "FNO + CAPE, FFT": make("fno_cape", "fft"),
        "FNO + CAPE": make("fno_cape"),
        "U-Net": make("unet"),
        "U-Net + CAPE": make("unet_cape"),
    }
    steps = {name: training_step(model, frames, parameters) for name, model in models.items()}
    memory = {name: kept_for_backward(step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    table = pd.DataFrame(
        {
            "model": name,
            "parameters": num_weights(model),
            "milliseconds_per_step": round(1000 * statistics.median(seconds[name]), 1),
            "mebibytes_for_backward": round(memory[name] / 2**20, 1),
        }
        for name, model in models.items()
    ).set_index("model")
    base = ["FNO", "FNO", "FNO", "FNO", "U-Net", "U-Net"]
    for quantity in ("milliseconds_per_step", "mebibytes_for_backward"):
        table[f"{quantity.split('_')[0]}_over_base"] = (table[quantity] / table[quantity].loc[base].values).round(2)
    return table.reset_index()


def draw(table: pd.DataFrame, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    quantities = {"milliseconds_per_step": "ms per training step", "mebibytes_for_backward": "MiB kept for backward"}
    for axis, (quantity, label) in zip(axes, quantities.items(), strict=True):
        colors = ["tab:orange" if "CAPE" in name else "tab:blue" for name in table.model]
        bars = axis.barh(table.model, table[quantity], color=colors)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    axes[0].invert_yaxis()
    figure.suptitle(f"Training step: batch {BATCH}, {NUM_FRAMES - 1} frames, {NUM_POINTS} points, one CPU thread")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    table = measure()
    print(table.to_string(index=False))
    with atomic_path(RESULTS / "models.csv") as path:
        table.to_csv(path, index=False)
    with atomic_path(RESULTS / "models.png") as path:
        draw(table, path)


if __name__ == "__main__":
    main()
