"""The profiles of params.yaml: that they load, what they build as published, and that claims fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shared.config import load_params
from shared.data.mad import TASKS
from shared.training.language import next_token_loss

from ..config import Experiment, Params
from ..model import MODELS, build_model

FOLDER = Path(__file__).parents[1]
SECTIONS: dict[str, Any] = yaml.safe_load((FOLDER / "params.yaml").read_text(encoding="utf-8"))
PROFILES = [name for name in SECTIONS if name != "profile"]
ON_CPU = ("small", "real", "long", "tiny")
CLAIMS: list[dict[str, Any]] = yaml.safe_load((FOLDER / "paper.yaml").read_text(encoding="utf-8"))["claims"]


TINY: dict[str, Any] = SECTIONS["tiny"]["experiments"]["mqar"]["network"]


def params_of(profile: str) -> Params:
    return load_params(FOLDER / "params.yaml", Params, profile)[1]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads_and_compares_over_three_seeds(profile: str) -> None:
    params = params_of(profile)
    assert len(params.seeds) >= 3
    assert params.mechanism is not None
    assert params.speed is not None
    assert set(params.experiments) == ({"language", "mqar", "overwrite", *TASKS} if profile in ON_CPU else {"language"})
    assert set(params.experiments["language"].models) == set(MODELS) - {"linear_attention", "hyena", "hyena_multi_head"}


def test_the_pipeline_trains_and_awaits_every_model() -> None:
    stages = yaml.safe_load((FOLDER / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert stages["train"]["foreach"] == [name for name in stages["train"]["foreach"] if name in MODELS]
    assert set(stages["train"]["foreach"]) == set(MODELS)
    assert {dep for dep in stages["evaluate"]["deps"] if dep.startswith("runs/")} == {f"runs/{m}" for m in MODELS}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ["deltanett"]}, "unknown model 'deltanett'; choose among transformer"),
        ({"models": ["gla", "gla"]}, "listed twice"),
        ({"models": []}, "at least 1 item"),
        ({"windw": 3}, "windw"),
        ({"models": ["hyena"], "network": TINY | {"max_length": 8}}, "max_length of at least 16; given: 8"),
    ],
)
def test_impossible_experiments(changes: dict[str, Any], words: str) -> None:
    valid = params_of("tiny").experiments["mqar"].model_dump()
    with pytest.raises(ValueError, match=words):
        Experiment.model_validate(valid | changes)


def test_impossible_params() -> None:
    valid = params_of("tiny").model_dump()
    experiments = valid["experiments"]
    with pytest.raises(ValueError, match="the data of compress must be of kind 'mad'; given: 'mqar'"):
        Params.model_validate(valid | {"experiments": experiments | {"compress": experiments["mqar"]}})
    with pytest.raises(ValueError, match="extrapolated: linear_attention must be among the models of language"):
        Params.model_validate(valid | {"extrapolated": ["linear_attention"]})


# --- Sizes as published -----------------------------------------------------------------------------------------------

# Counts as they are built here, so that a change of a model does not go unseen; the paper gives 340M and 1.3B.
PARAMETERS = {
    "paper": {
        "transformer": 341_099_520,
        "retnet": 337_959_936,
        "mamba": 352_797_696,
        "gla": 341_707_776,
        "deltanet": 341_594_112,
        "deltanet_swa": 341_346_816,
        "deltanet_global": 341_552_896,
    },
    "paper_1_3b": {"transformer": 1_364_297_728, "gla": 1_365_514_240, "deltanet": 1_365_677_056},
}
PUBLISHED = {"paper": 340e6, "paper_1_3b": 1.3e9}


@pytest.mark.parametrize("profile", PARAMETERS)
def test_sizes_as_published(profile: str) -> None:
    experiment = params_of(profile).experiments["language"]
    with torch.device("meta"):
        models = {
            name: build_model(name, experiment.network, experiment.data.vocab_size) for name in PARAMETERS[profile]
        }
    counts = {name: model.num_parameters() for name, model in models.items()}
    assert all(parameter.is_meta for model in models.values() for parameter in model.parameters())
    assert counts == PARAMETERS[profile]
    for name, count in counts.items():
        assert count == pytest.approx(PUBLISHED[profile], rel=0.06), name


def test_deltanet_340m_by_hand() -> None:
    """24 layers of 4 d² + three convolutions + β + norms + SwiGLU of 2,816, and 32,000 tied embeddings."""
    d, inner = 1024, 2816
    mixer = 4 * d**2 + 3 * 4 * d + 8 * d + 128
    expected = 24 * (mixer + 3 * d * inner + 2 * d) + 32000 * d + d
    assert PARAMETERS["paper"]["deltanet"] == expected


def test_training_as_published() -> None:
    for profile, tokens in (("paper", 15e9), ("paper_1_3b", 100e9)):
        experiment = params_of(profile).experiments["language"]
        training = experiment.training
        seen = training.steps * training.batch_size * experiment.data.length
        assert seen == pytest.approx(tokens, rel=0.01)
        assert (training.learning_rate, training.final_fraction * training.learning_rate) == (3e-4, pytest.approx(3e-5))


@pytest.mark.parametrize("name", params_of("gpu").experiments["language"].models)
def test_models_of_the_gpu_profile_take_a_training_step(name: str) -> None:
    """With their widths and heads, two of their layers and short sequences."""
    torch.manual_seed(0)
    network = params_of("gpu").experiments["language"].network.model_copy(update={"num_layers": 2, "window": 8})
    model = build_model(name, network, vocab_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    tokens = torch.randint(64, (2, 25))
    next_token_loss(model, tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    assert [key for key, parameter in model.named_parameters() if torch.equal(before[key], parameter)] == []


def test_the_gpu_profile_has_models_of_fifteen_million() -> None:
    experiment = params_of("gpu").experiments["language"]
    with torch.device("meta"):
        count = build_model("deltanet", experiment.network, experiment.data.vocab_size).num_parameters()
    assert 12e6 < count < 18e6


# --- Claims -----------------------------------------------------------------------------------------------------------


def checks_of(claim: dict[str, Any]) -> list[dict[str, Any]]:
    return claim.get("checks") or ([claim["check"]] if "check" in claim else [])


def named_models(check: dict[str, Any]) -> set[str]:
    names = {check.get("numerator"), check.get("denominator")}
    for key in ("model", "over"):
        value = check.get(key) or []
        names |= {value} if isinstance(value, str) else set(value)
    names |= {name for pair in check.get("pairs", ()) for name in pair.values()}
    return names - {None}


def scored(params: Params) -> dict[str, set[str]]:
    """The models that have scores, by data set."""
    rules = {"additive", "decay", "delta_rule", "delta_rule_half"}
    datasets = {f"mechanism/{which}": rules for which in ("bound", "overwritten", "other")}
    for name, experiment in params.experiments.items():
        places = [f"mad/{name}", "mad/average"] if name in TASKS else [name]
        places = [f"overwrite/{which}" for which in ("overwritten", "other")] if name == "overwrite" else places
        datasets |= {place: set(experiment.models) for place in places}
    datasets["language/long"] = set(params.extrapolated)
    datasets["language/ablation"] = {"norm", "feature_map"}
    datasets["throughput"] = set(params.speed.throughput.models)
    for direction in ("forward", "forward+backward"):
        datasets[f"speed/{direction}"] = {f"head_dim_{dim}" for dim in params.speed.operator.head_dims}
        for dim in params.speed.operator.head_dims:
            datasets[f"speed/head_dim_{dim}/{direction}"] = {"recurrent", "chunk", "attention"}
    return datasets


@pytest.mark.parametrize("profile", PROFILES)
def test_claims_name_what_the_profile_scores(profile: str) -> None:
    datasets = scored(params_of(profile))
    for claim in CLAIMS:
        if profile not in claim.get("profiles", PROFILES):
            continue
        for check in checks_of(claim):
            for dataset in check["datasets"]:
                assert dataset in datasets, (claim["id"], dataset)
                assert named_models(check) <= datasets[dataset], (claim["id"], dataset)
        if "gate" in claim:
            assert claim["gate"]["model"] in datasets[claim["gate"]["dataset"]]


def test_every_claim_of_the_paper_has_its_row() -> None:
    numbers = {claim["id"].split("-")[0] for claim in CLAIMS}
    assert {f"C{number}" for number in range(1, 12)} <= numbers
    assert all(claim.get("untested") or checks_of(claim) for claim in CLAIMS)
