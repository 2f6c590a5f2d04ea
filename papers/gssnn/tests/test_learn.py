"""The training loop: its optimizer against PyTorch's, together as one at a time, interrupted as in one go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.config import UserError
from shared.training import Diverged

from .. import learn as loop
from ..config import GraphModule, Network, Training
from ..data import Puzzles
from ..learn import PlateauAdam, Recipe, Task, derived_seed, learn
from ..symbolic.interpreter import Graph
from .graphs import KITE, PAIR, PATH

NETWORK = Network(image_size=8, grid_size=2, width=8, conv_blocks=1, num_heads=2, head_dim=4, mlp_size=8)
RECIPE = Recipe(
    NETWORK,
    GraphModule(dim=24, layers=2),
    Training(plateau_patience=2, plateau_cooldown=1, checkpoint_every_epochs=1, learning_rate=3e-3),
    (1, 4),
)


def puzzles(seed: int = 0) -> Puzzles:
    """Two training sets of 16 and 20 puzzles for evaluation; the label is whether the picture is bright."""
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 2, size=52).astype(np.uint8)
    images = np.clip(generator.normal(100 + 60 * label[:, None, None], 30, size=(52, 8, 8)), 0, 255)
    return Puzzles(images.astype(np.float16), label, label, 2, 16, "generated", f"digest {seed}")


def tasks(*graphs: Graph | None) -> list[Task]:
    return [Task(f"network {i}", graph, i % 2, 100 + i) for i, graph in enumerate(graphs)]


class Weights:
    """What the optimizer needs of an ensemble."""

    def __init__(self, flat: torch.Tensor) -> None:
        self.flat = flat


def test_the_optimizer_is_adam_with_a_plateau_schedule_for_each_network() -> None:
    settings = Training(plateau_patience=3, plateau_cooldown=2, learning_rate=0.01)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 5, generator=generator)
    own = PlateauAdam(Weights(start.clone()), settings)  # type: ignore[arg-type]
    references = []
    for row in start:
        weights = row.clone().requires_grad_()
        optimizer = torch.optim.Adam([weights], lr=0.01)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=3, threshold=1e-4, cooldown=2
        )
        references.append((weights, optimizer, schedule))
    rates = []
    for step in range(60):
        gradients = torch.randn(2, 5, generator=generator)
        # One falls for a while and then stays, the other only jumps about.
        losses = torch.tensor([max(1 - step / 20, 0.4), 0.5 + 0.1 * (step % 7)])
        own.step(gradients, losses)
        for (weights, optimizer, schedule), gradient, loss in zip(references, gradients, losses, strict=True):
            weights.grad = gradient.clone()
            optimizer.step()
            schedule.step(loss)
        expected = [optimizer.param_groups[0]["lr"] for _, optimizer, _ in references]
        assert own.rate.flatten().tolist() == pytest.approx(expected)
        rates.append(expected)
    torch.testing.assert_close(own.flat, torch.stack([weights.detach() for weights, _, _ in references]))
    assert rates[-1][0] != rates[-1][1] < 0.01


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one["train_accuracy"] == other["train_accuracy"]
        assert one["eval_accuracy"] == other["eval_accuracy"]
        assert one["learning_rate"] == pytest.approx(other["learning_rate"])
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


@pytest.mark.parametrize("graphs", [(None, None, None), (PAIR, KITE, PATH)])
def test_together_as_one_at_a_time(tmp_path: Path, graphs: tuple[Graph | None, ...]) -> None:
    everyone = tasks(*graphs)
    together = learn(everyone, puzzles(), RECIPE, directory=tmp_path / "together")
    alone = [learn([task], puzzles(), RECIPE, directory=tmp_path / task.label)[0] for task in everyone]
    same(together, alone)
    assert [len(record["eval_accuracy"]) for record in together] == [2] * 3
    assert len({tuple(record["loss"]) for record in together}) == 3


def test_networks_learn(tmp_path: Path) -> None:
    recipe = Recipe(NETWORK, RECIPE.graph_module, Training(learning_rate=1e-2), (30,))
    baseline = learn(tasks(None), puzzles(), recipe, directory=tmp_path / "baseline")[0]
    graph = learn(tasks(KITE), puzzles(), recipe, directory=tmp_path / "graph")[0]
    assert min(baseline["eval_accuracy"][-1], graph["eval_accuracy"][-1]) >= 0.8
    assert baseline["loss"][-1] < baseline["loss"][0] / 2


def test_an_interrupted_training_ends_with_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = tasks(PAIR, KITE)
    whole = learn(everyone, puzzles(), RECIPE, directory=tmp_path / "whole")
    ran = []
    epochs = loop._epoch

    def interrupted(*arguments: Any) -> Any:
        ran.append(arguments[-1])
        if len(ran) == 3:
            raise KeyboardInterrupt
        return epochs(*arguments)

    monkeypatch.setattr(loop, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(everyone, puzzles(), RECIPE, directory=tmp_path / "parts")
    assert learn(everyone, puzzles(), RECIPE, directory=tmp_path / "parts") == whole
    assert ran == [0, 1, 2, 2, 3]
    # Finished: nothing is trained again, unless something that counts has changed.
    assert learn(everyone, puzzles(), RECIPE, directory=tmp_path / "parts") == whole
    assert len(ran) == 5
    learn(everyone, puzzles(seed=1), RECIPE, directory=tmp_path / "parts")
    assert len(ran) == 9


def test_a_checkpoint_of_another_training_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = learn(tasks(PAIR), puzzles(), RECIPE, directory=tmp_path / "own", fingerprint="new")
    epochs = loop._epoch
    stopped = iter([False, False, True] + [False] * 10)
    monkeypatch.setattr(
        loop, "_epoch", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt) if next(stopped) else epochs(*a)
    )
    with pytest.raises(KeyboardInterrupt):
        learn(tasks(PAIR), puzzles(), RECIPE, directory=tmp_path / "other", fingerprint="old")
    assert (tmp_path / "other" / "last.safetensors").exists()
    assert learn(tasks(PAIR), puzzles(), RECIPE, directory=tmp_path / "other", fingerprint="new") == expected


def test_a_training_that_diverges_says_which(tmp_path: Path) -> None:
    broken = puzzles()
    broken.images[0, 0, 0] = np.nan
    with pytest.raises(Diverged, match=r"network 0: the loss became nan in epoch 1: lower training.learning_rate"):
        learn(tasks(KITE), broken, RECIPE, directory=tmp_path)


def test_images_that_do_not_fit_the_network(tmp_path: Path) -> None:
    recipe = Recipe(NETWORK.model_copy(update={"image_size": 16}), RECIPE.graph_module, RECIPE.training, (1,))
    with pytest.raises(UserError, match=r"images \[batch, 1, 16, 16\] \(given: \[8, 1, 8, 8\]\)"):
        learn(tasks(None), puzzles(), recipe, directory=tmp_path)


def test_seeds_are_functions_of_what_they_are_made_of() -> None:
    assert derived_seed(0, "order", 1) == derived_seed(0, "order", 1)
    assert len({derived_seed(*parts) for parts in [(0, 1), (1, 0), (0, "1"), (1,), (0, 1, None)]}) == 5
    assert 0 <= derived_seed("x") < 2**63


def test_what_is_kept_of_a_finished_training(tmp_path: Path) -> None:
    records = learn(tasks(None), puzzles(), RECIPE, directory=tmp_path)
    kept = json.loads((tmp_path / "finished.json").read_text())
    assert kept["records"] == records
    assert [path.name for path in tmp_path.iterdir()] == ["finished.json"]
