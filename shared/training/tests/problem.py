"""A small regression problem, also run as a program so that tests can kill it or start it twice."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from shared.training import FitResult, Moment, TrainingSettings, fit, make_fabric, save_weights

SETTINGS = TrainingSettings(epochs=4, batch_size=8, learning_rate=0.01, schedule="cosine", gradient_clip=1.0)


def make_data(size: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, 3, generator=generator)
    return TensorDataset(inputs, inputs @ torch.tensor([[1.0], [-2.0], [0.5]]))


class Augmented(Dataset):
    """Examples with random noise added, as an image data set would be augmented."""

    def __init__(self) -> None:
        self.data = make_data()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.data[index]
        return inputs + 0.1 * torch.randn(3), targets


def make_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 1))


def loss(model: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> dict[str, Tensor]:
    inputs, targets = batch
    return {"loss": (model(inputs) - targets).square().mean()}


def validate(model: nn.Module) -> dict[str, float]:
    inputs, targets = make_data().tensors
    return {"validation/loss": (model(inputs) - targets).square().mean().item()}


def train(directory: Path, kill_at: int | None = None, settings: TrainingSettings = SETTINGS) -> FitResult:
    def loss_or_die(model: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> dict[str, Tensor]:
        if moment.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(model, batch, moment)

    model = make_model()
    fabric = make_fabric(settings, accelerator="cpu")
    result = fit(
        model, make_data(), loss_or_die, settings, directory=directory, seed=3, validate=validate, fabric=fabric
    )
    if fabric.global_rank == 0:
        save_weights(directory / "final.safetensors", model)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--checkpoint-every-steps", type=int)
    parser.add_argument("--no-dropout", action="store_true")
    options = parser.parse_args()
    if options.no_dropout:
        nn.Dropout.forward = lambda self, x: x  # type: ignore[method-assign]
    changed = SETTINGS.model_copy(update={"checkpoint_every_steps": options.checkpoint_every_steps})
    train(options.directory, options.kill_at, changed)
