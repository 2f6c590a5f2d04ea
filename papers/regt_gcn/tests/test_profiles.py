"""The profiles of params.yaml and the ledger: that they load, agree, and build what is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from shared.config import UserError, load_params, validate

from ..config import FAMILIES, STEP_MINUTES, DataSettings, Experiment, Params
from ..data import Graph
from ..evaluate import is_swept
from ..train import Objective, make_model

FOLDER = Path(__file__).parents[1]
SECTIONS: dict[str, Any] = yaml.safe_load((FOLDER / "params.yaml").read_text(encoding="utf-8"))
PROFILES = [name for name in SECTIONS if name != "profile"]
LEDGER: list[dict[str, Any]] = yaml.safe_load((FOLDER / "paper.yaml").read_text(encoding="utf-8"))["claims"]


def params_of(profile: str) -> Params:
    return load_params(FOLDER / "params.yaml", Params, profile)[1]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads_and_compares_over_seeds(profile: str) -> None:
    assert len(params_of(profile).seeds) >= (3 if profile in ("small", "tiny") else 5)


@pytest.mark.parametrize("profile", ["real", "long", "gpu", "paper"])
def test_official_profiles_have_both_units_and_all_horizons(profile: str) -> None:
    experiments = params_of(profile).experiments
    for name, units in (("clean", "clean"), ("paper_units", "paper")):
        assert experiments[name].horizons == (1, 3, 12, 36)
        assert experiments[name].data.units == units
        assert "persistence" in experiments[name].controls
    assert experiments["paper_units"].data.fractions[2] == 0.8


@pytest.mark.parametrize("profile", ["small", "real", "long", "gpu", "paper"])
def test_checks_name_what_the_profile_measures(profile: str) -> None:
    known: dict[str, set[str]] = {}
    for name, each in params_of(profile).experiments.items():
        for horizon in each.horizons:
            minutes = f"{horizon * STEP_MINUTES}min"
            derived = {"stid_scored_broadcast"} | {f"{model}_last_scale" for model in each.models}
            known[f"{name}/{minutes}"] = {*each.models, *each.controls, *derived}
            if is_swept(name):
                known[f"correlation/{minutes}"] = {"regt_gcn", "rant_gcn"}
    judged = [claim for claim in LEDGER if profile in claim.get("profiles", [profile])]
    assert len(judged) >= 4
    for claim in judged:
        check = claim["check"]
        names = [check.get(key, []) for key in ("model", "over", "numerator", "denominator", "seedless")]
        named = {name for each in names for name in ([each] if isinstance(each, str) else each)}
        for dataset in check["datasets"]:
            assert named <= known[dataset], f"{claim['id']} names {named - known[dataset]} in {dataset}"


def test_every_claim_of_the_paper_has_a_row() -> None:
    assert {claim["id"].partition("-")[0] for claim in LEDGER} >= {f"C{number}" for number in range(1, 8)}


def test_stages_are_the_families() -> None:
    stages = yaml.safe_load((FOLDER / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert stages["train"]["foreach"] == list(FAMILIES)
    assert {f"runs/{family}" for family in FAMILIES} <= set(stages["evaluate"]["deps"])


def ring(num_nodes: int) -> Graph:
    """A cycle whose sites belong to the five regions in turn."""
    adjacency = np.roll(np.eye(num_nodes, dtype=np.float32), 1, axis=0)
    region = np.arange(num_nodes) % 5
    regions = tuple(adjacency * (region == index)[:, None].astype(np.float32) for index in range(5))
    return Graph(adjacency, regions, region)


def test_the_paper_profile_has_the_published_size() -> None:
    """By hand from the published layers, at F = 8 features, hidden size d = 256 and horizon 12: 0.76 M published."""
    experiment = params_of("paper").experiments["clean"]
    with torch.device("meta"):
        model = make_model(experiment, "regt_gcn", ring(98), 12, 0)
    d, f = 256, 8
    regional = 2 * f * d + d + 5 * d * d + d
    cell = 3 * (f * d + d + 2 * d * d + d)
    decoder = d * d // 2 + d // 2 + d // 2 * 12 + 12
    assert sum(weight.numel() for weight in model.parameters()) == regional + cell + 6 + decoder
    assert regional + cell + 6 + decoder == pytest.approx(0.76e6, rel=0.02)


@pytest.mark.parametrize("model", params_of("gpu").experiments["paper_units"].models)
def test_models_of_the_gpu_profile_take_a_training_step(model: str) -> None:
    """A few sites and windows; widths as they are."""
    experiment = params_of("gpu").experiments["paper_units"]
    network = make_model(experiment, model, ring(10), 3, 0)
    optimizer = torch.optim.Adam(network.parameters(), lr=experiment.training.learning_rate)
    generator = torch.Generator().manual_seed(0)
    batch = (torch.rand(4, 6, 10, 8, generator=generator), torch.rand(4, 3, 10, generator=generator))
    losses = []
    for _ in range(5):
        loss = Objective(model.endswith("_broadcast"))(network, (*batch, torch.ones(4, 3, 10, dtype=torch.bool)), None)
        loss["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss["loss"].item())
    assert np.isfinite(losses).all()
    assert min(losses[1:]) < losses[0]


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ["regt_gcn", "lstm"]}, "unknown model 'lstm'; choose among regt_gcn"),
        ({"controls": ["mean"]}, "unknown model 'mean'; choose among persistence"),
        ({"models": ["stid", "stid"]}, "listed twice"),
        ({"horizons": [3, 3]}, "a horizon is listed twice"),
        ({"horizons": [0]}, "greater than 0"),
        ({"stride": 2}, "unknown key"),
    ],
)
def test_impossible_experiments(changes: dict[str, Any], words: str) -> None:
    valid = params_of("tiny").experiments["clean"].model_dump(mode="json")
    with pytest.raises(UserError, match=words):
        validate(Experiment, valid | changes, "here")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fractions": [0.7, 0.2, 0.2]}, "add up to 1"),
        ({"fractions": [0.8, 0.0, 0.2]}, "must be positive"),
        ({"source": "generated"}, "'generated' needs days"),
        ({"source": "generated", "days": 3, "sites": "all"}, "leave sites 'regional'"),
        ({"sites_per_region": [3, 3]}, "at least 5"),
        ({"regional_correlation": 1.5}, "less than or equal to 1"),
        ({"units": "official"}, "'clean' or 'paper'"),
    ],
)
def test_impossible_data(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(DataSettings, settings, "here")


def test_names_of_experiments() -> None:
    section = SECTIONS["tiny"]
    with pytest.raises(UserError, match="no name for an experiment"):
        validate(Params, section | {"experiments": {"a/b": section["experiments"]["clean"]}}, "here")
