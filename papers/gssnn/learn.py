"""The training loop of the paper's networks: any number of one kind together, or one at a time, to the same numbers.

Order of the data, dropout and first weights of a network are functions of its own seed, so that it does not matter
beside which others it is trained; only rounding differs. Adam is written out, for networks that are trained together
have learning rates of their own, each lowered by its own losses.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shared.files import write_json
from shared.training import Diverged
from shared.training.checkpoint import load_tensors, save_tensors
from shared.training.loop import MetricLog, Report

from .config import GraphModule, Network, Training
from .data import Puzzles
from .model import Ensemble, build_model, graph_tensors
from .symbolic.interpreter import Graph

Record = dict[str, Any]
EVALUATION_BATCH = 64
EPSILON = 1e-8


@dataclass(frozen=True)
class Task:
    """A network to be trained: its graph (none for the baseline), on which training set, from which seed."""

    label: str
    graph: Graph | None
    training_set: int
    seed: int


@dataclass(frozen=True)
class Recipe:
    """What networks that are trained together have in common; `epochs` are those that accuracies are measured at."""

    network: Network
    graph_module: GraphModule
    training: Training
    epochs: tuple[int, ...]

    def describe(self) -> dict[str, Any]:
        # How many are trained together and how often their state is kept changes nothing that is learned.
        how = {"networks_at_once", "checkpoint_every_epochs"}
        return {
            "network": self.network.model_dump(mode="json"),
            "graph_module": self.graph_module.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json", exclude=how),
            "epochs": list(self.epochs),
        }


def derived_seed(*parts: object) -> int:
    """A seed of 63 bits that is a function of the parts alone."""
    text = json.dumps(parts, default=str).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def learn(
    tasks: Sequence[Task],
    puzzles: Puzzles,
    recipe: Recipe,
    *,
    directory: Path,
    fingerprint: str = "",
    tracks: Sequence[MetricLog] = (),
    report: Report | None = None,
) -> list[Record]:
    """Train the networks of `tasks` together, all with a graph or all without, and return a record of each.

    A record has `train_accuracy` and `eval_accuracy` at each of the recipe's epochs, measured without dropout, and
    `loss` and `learning_rate` of every epoch. It is kept in `directory/finished.json`, and a finished training is not
    repeated. State is kept in `directory/last.safetensors` every so many epochs, from which an interrupted training
    continues to the same numbers; not if recipe, tasks, puzzles or `fingerprint` (the code) have changed. Raises
    `Diverged` where a loss is not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    identity = _identity(tasks, puzzles, recipe, fingerprint)
    finished = _finished(directory / "finished.json", identity)
    if finished is not None:
        return finished

    training = recipe.training
    images = torch.from_numpy(puzzles.images).to(device).float().div_(127.5).sub_(1)[:, None]
    labels = torch.from_numpy(puzzles.label).to(device).float()
    with_graphs = tasks[0].graph is not None
    module = recipe.graph_module if with_graphs else None
    graphs = [graph_tensors(task.graph, recipe.graph_module) for task in tasks if task.graph is not None]
    models = [build_model(recipe.network, module, derived_seed(task.seed, "weights")) for task in tasks]
    ensemble = Ensemble(models, graphs if with_graphs else None, device)
    optimizer = PlateauAdam(ensemble, training)
    records: list[Record] = [
        {"train_accuracy": [], "eval_accuracy": [], "loss": [], "learning_rate": []} for _ in tasks
    ]
    checkpoint = directory / "last.safetensors"
    epoch, seconds = _resume(checkpoint, identity, ensemble, optimizer, records)
    started = time.perf_counter() - seconds
    chosen = [puzzles.training_set(task.training_set) for task in tasks]
    own = torch.tensor([range(part.start, part.stop) for part in chosen], device=device)
    evaluation = torch.arange(puzzles.evaluation.start, puzzles.evaluation.stop, device=device)

    while epoch < recipe.epochs[-1]:
        losses = torch.stack(list(_epoch(ensemble, optimizer, images, labels, own, tasks, recipe, epoch))).mean(dim=0)
        rates = optimizer.rate.flatten().tolist()
        epoch += 1
        for task, record, loss, rate in zip(tasks, records, losses.tolist(), rates, strict=True):
            if not loss < float("inf"):
                raise Diverged(
                    f"{task.label}: the loss became {loss} in epoch {epoch}: lower training.learning_rate in "
                    "params.yaml"
                )
            record["loss"].append(loss)
            record["learning_rate"].append(rate)
        if epoch in recipe.epochs:
            for name, where in (("train_accuracy", own), ("eval_accuracy", evaluation)):
                for record, value in zip(records, accuracy(ensemble, images, labels, where), strict=True):
                    record[name].append(value)
        for track, record in zip(tracks, records, strict=False):
            track.log(_metrics(record, epoch, recipe), step=epoch)
        if report:
            report(epoch / recipe.epochs[-1], f"loss {losses.mean().item():.3f}")
        if epoch % training.checkpoint_every_epochs == 0 and epoch < recipe.epochs[-1]:
            _save(checkpoint, identity, ensemble, optimizer, records, epoch, time.perf_counter() - started)
    write_json(
        directory / "finished.json",
        {"identity": identity, "seconds": time.perf_counter() - started, "records": records},
    )
    checkpoint.unlink(missing_ok=True)
    return records


def _epoch(
    ensemble: Ensemble,
    optimizer: PlateauAdam,
    images: Tensor,
    labels: Tensor,
    own: Tensor,
    tasks: Sequence[Task],
    recipe: Recipe,
    epoch: int,
) -> Iterator[Tensor]:
    """Train for an epoch, each network on its own puzzles `own` [M, n] in its own order; yields losses [M] by step."""
    device, batch_size = images.device, recipe.training.batch_size
    orders = [
        torch.randperm(own.shape[1], generator=torch.Generator().manual_seed(derived_seed(task.seed, "order", epoch)))
        for task in tasks
    ]
    shuffled = own.gather(1, torch.stack(orders).to(device))
    generators = [torch.Generator(device).manual_seed(derived_seed(task.seed, "dropout", epoch)) for task in tasks]
    for batch in shuffled.split(batch_size, dim=1):
        dropout = ensemble.draw_dropout(recipe.graph_module, batch.shape[1], generators)
        logits = ensemble(images[batch], dropout)
        loss = functional.binary_cross_entropy_with_logits(logits, labels[batch], reduction="none").mean(dim=1)
        # Networks share no weights, so that the gradient of the sum holds those of all.
        gradients = torch.autograd.grad(loss.sum(), list(ensemble.weights.values()))
        optimizer.step(torch.cat([gradient.flatten(1) for gradient in gradients], dim=1), loss.detach())
        yield loss.detach()


@torch.no_grad()
def accuracy(ensemble: Ensemble, images: Tensor, labels: Tensor, where: Tensor) -> list[float]:
    """The share of right answers of each network, without dropout, to the puzzles `where`: [n], or [M, n] its own."""
    right = []
    for part in where.split(EVALUATION_BATCH, dim=-1):
        # A probability of exactly one half is rounded down, as in the published code.
        right.append((ensemble(images[part]) > 0) == (labels[part] > 0))
    return torch.cat(right, dim=1).double().mean(dim=1).tolist()


class PlateauAdam:
    """Adam, and a rate that is multiplied by `factor` when the loss has not fallen for `patience` steps; [M] networks.

    The rule is torch's ReduceLROnPlateau stepped on every batch loss: a loss below best (1 − threshold) is the new
    best; more than `patience` steps without one lower the rate, and then `cooldown` steps do not count.
    """

    def __init__(self, ensemble: Ensemble, settings: Training) -> None:
        self.settings, self.flat = settings, ensemble.flat
        self.first, self.second = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.rate = torch.full_like(self.flat[:, :1], settings.learning_rate)
        self.best = torch.full_like(self.rate[:, 0], torch.inf)
        self.stale, self.cooldown = torch.zeros_like(self.best), torch.zeros_like(self.best)
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Tensor, losses: Tensor) -> None:
        """Update the weights by gradients [M, weights], then the rates by losses [M]."""
        beta, beta_squares = self.settings.betas
        self.steps += 1
        self.first.lerp_(gradients, 1 - beta)
        self.second.mul_(beta_squares).addcmul_(gradients, gradients, value=1 - beta_squares)
        scale = (self.second / (1 - beta_squares**self.steps)).sqrt_().add_(EPSILON)
        self.flat.sub_(self.first / scale * (self.rate / (1 - beta**self.steps)))

        better = losses < self.best * (1 - self.settings.plateau_threshold)
        self.best = torch.where(better, losses, self.best)
        self.stale = torch.where(better, 0, self.stale + 1)
        self.stale = torch.where(self.cooldown > 0, 0, self.stale)
        self.cooldown = (self.cooldown - 1).clamp(min=0)
        due = self.stale > self.settings.plateau_patience
        # As torch has it, a rate that would change by less than this stays.
        lowered = self.rate * self.settings.plateau_factor
        lowered = torch.where(self.rate - lowered > EPSILON, lowered, self.rate)
        self.rate = torch.where(due[:, None], lowered, self.rate)
        self.cooldown = torch.where(due, float(self.settings.plateau_cooldown), self.cooldown)
        self.stale = torch.where(due, 0, self.stale)

    STATE = ("first", "second", "rate", "best", "stale", "cooldown")

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.STATE}

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        for name in self.STATE:
            setattr(self, name, state[name].to(self.flat.device))
        self.steps = steps


def _metrics(record: Record, epoch: int, recipe: Recipe) -> dict[str, float]:
    """What the last epoch came to, for tracking."""
    metrics = {"train/loss": record["loss"][-1], "train/learning_rate": record["learning_rate"][-1]}
    if epoch in recipe.epochs:
        metrics |= {"train/accuracy": record["train_accuracy"][-1], "eval/accuracy": record["eval_accuracy"][-1]}
    return metrics


def _identity(tasks: Sequence[Task], puzzles: Puzzles, recipe: Recipe, fingerprint: str) -> str:
    told = [(None if t.graph is None else t.graph.to_json(), t.training_set, t.seed) for t in tasks]
    parts = [recipe.describe(), told, puzzles.digest, puzzles.training_sets, puzzles.training_size, fingerprint]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _finished(path: Path, identity: str) -> list[Record] | None:
    try:
        finished = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return finished["records"] if finished.get("identity") == identity else None


def _save(
    path: Path,
    identity: str,
    ensemble: Ensemble,
    optimizer: PlateauAdam,
    records: list[Record],
    epoch: int,
    seconds: float,
) -> None:
    note = {"identity": identity, "records": records, "epoch": epoch, "steps": optimizer.steps, "seconds": seconds}
    save_tensors(path, {"flat": ensemble.flat, **optimizer.state()}, note)


def _resume(
    path: Path, identity: str, ensemble: Ensemble, optimizer: PlateauAdam, records: list[Record]
) -> tuple[int, float]:
    """Continue from a checkpoint of the same training, if there is one: epochs done and seconds taken."""
    if not path.exists():
        return 0, 0.0
    tensors, note = load_tensors(path)
    if note.get("identity") != identity:
        path.unlink()
        return 0, 0.0
    ensemble.flat.copy_(tensors["flat"])
    optimizer.restore(tensors, note["steps"])
    records[:] = note["records"]
    return note["epoch"], note["seconds"]
