"""What is trained, on what, and what a batch costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.config import Stage, UserError, load_params
from shared.training import Moment

from .. import data
from ..config import FAMILIES, NEURAL, Params, family_of
from ..train import Objective, Validation, make_model, train

FOLDER = Path(__file__).parents[1]
NOW = Moment(0, 0, 1, 1)


class Says(nn.Module):
    """Forecasts what it was made with, whatever it is given."""

    def __init__(self, forecast: Tensor) -> None:
        super().__init__()
        self.forecast = nn.Parameter(forecast)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.forecast[: len(inputs)]


def test_the_loss_leaves_out_what_was_not_observed() -> None:
    model = Says(torch.tensor([[[1.0, 5.0], [2.0, 0.0]]]))
    targets, observed = torch.zeros(1, 2, 2), torch.tensor([[[True, False], [True, True]]])
    loss = Objective()(model, (torch.zeros(1), targets, observed), NOW)["loss"]
    assert loss.item() == pytest.approx((1 + 4 + 0) / 3)
    loss.backward()
    assert model.forecast.grad[0, 0, 1] == 0
    assert Objective()(model, (torch.zeros(1), targets, torch.zeros_like(observed)), NOW)["loss"] == 0


def test_the_misaligned_loss_is_the_broadcast_of_the_published_code() -> None:
    generator = torch.Generator().manual_seed(0)
    forecast, targets = torch.rand(3, 4, 5, generator=generator), torch.rand(3, 4, 5, generator=generator)
    everything = torch.ones(3, 4, 5, dtype=torch.bool)
    loss = Objective(misaligned=True)(Says(forecast), (torch.zeros(3), targets, everything), NOW)["loss"]
    # One window a batch there: outputs [1, H, N, 1] minus targets [N, H].
    theirs = [((forecast[i][None, :, :, None] - targets[i].T) ** 2).mean() for i in range(3)]
    torch.testing.assert_close(loss, torch.stack(theirs).mean())
    one_step = Objective(misaligned=True)(
        Says(forecast[:, :1]), (torch.zeros(3), targets[:, :1], everything[:, :1]), NOW
    )
    torch.testing.assert_close(one_step["loss"], ((forecast - targets)[:, 0] ** 2).mean())


def test_validation_runs_over_all_windows_that_count() -> None:
    forecast, targets = torch.rand(300, 2, 3), torch.rand(300, 2, 3)
    observed = torch.rand(300, 2, 3) < 0.5

    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.weight * inputs

    value = Validation(torch.utils.data.TensorDataset(forecast, targets, observed))(Repeats())["validation/mse"]
    assert value == pytest.approx(((forecast - targets)[observed] ** 2).mean().item(), rel=1e-5)


def test_every_network_belongs_to_one_family() -> None:
    assert sorted(name for members in FAMILIES.values() for name in members) == sorted(NEURAL)
    assert family_of("stid_broadcast") == family_of("stid") == "no_graph"


def tiny() -> Params:
    return load_params(FOLDER / "params.yaml", Params, "tiny")[1]


def test_every_seed_of_rant_gcn_has_groups_of_its_own() -> None:
    experiment = tiny().experiments["clean"]
    graph = data.build(data.generate(experiment.data, 0), experiment.data).graph
    operators = [
        next(
            buffer
            for name, buffer in make_model(experiment, "rant_gcn", graph, 1, seed).named_buffers()
            if "initial" in name
        )
        for seed in (0, 1)
    ]
    assert not torch.equal(*operators)
    first, again = (make_model(experiment, "regt_gcn", graph, 1, 3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.fixture
def stage(tmp_path: Path) -> Stage[Params]:
    for name in ("params.yaml", "model.py", "baselines.py", "train.py"):
        (tmp_path / name).write_text((FOLDER / name).read_text(encoding="utf-8"), encoding="utf-8")
    params = tiny()
    clean = params.experiments["clean"].model_copy(update={"horizons": (3,)})
    params = params.model_copy(update={"experiments": {"clean": clean}, "seeds": (0, 1)})
    return Stage(folder=tmp_path, name="train", profile="tiny", params=params, model="t_gcn")


def test_a_model_is_trained_once_a_horizon_and_seed(stage: Stage[Params]) -> None:
    data.prepare(stage)
    train(stage)
    folders = sorted(
        path.parent.relative_to(stage.runs_dir).as_posix() for path in stage.runs_dir.rglob("best.safetensors")
    )
    assert folders == [f"graph/t_gcn/clean/horizon3/seed{seed}" for seed in (0, 1)]
    summary = json.loads((stage.runs_dir / "graph" / "summary.json").read_text())["best_validation_mse"]
    assert len(summary) == 2
    assert np.isfinite(list(summary.values())).all()


@pytest.mark.parametrize("model", [None, "lstm", "gat"])
def test_a_model_that_the_profile_does_not_have(stage: Stage[Params], model: str | None) -> None:
    with pytest.raises(UserError, match="choose one of regional, graph, no_graph, regt_gcn, rant_gcn, t_gcn, stid"):
        train(Stage(stage.folder, "train", "tiny", stage.params, model))
