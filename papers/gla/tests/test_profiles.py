"""The profiles of params.yaml: that they load, what they build as published, and that the GPU's models train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shared.config import load_params
from shared.training.language import next_token_loss

from ..config import TASKS, Language, Params, Speed
from ..model import build_model

FOLDER = Path(__file__).parents[1]
SECTIONS: dict[str, Any] = yaml.safe_load((FOLDER / "params.yaml").read_text(encoding="utf-8"))
PROFILES = [name for name in SECTIONS if name != "profile"]
LEDGER: list[dict[str, Any]] = yaml.safe_load((FOLDER / "paper.yaml").read_text(encoding="utf-8"))["claims"]
CLAIMS = [f"C{number}" for number in range(1, 10)]


def params_of(profile: str) -> Params:
    return load_params(FOLDER / "params.yaml", Params, profile)[1]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads_and_compares_over_three_seeds(profile: str) -> None:
    params = params_of(profile)
    assert len(params.seeds) >= 3
    assert {"transformer", "retnet", "gla", "gla_no_gate"} <= set(params.mqar.models)


@pytest.mark.parametrize("profile", ["small", "real", "long", "gpu"])
def test_all_arms_get_as_many_tokens(profile: str) -> None:
    language = params_of(profile).language
    tokens = {language.training_of(arm).batch_size * language.length_of(arm) for arm in language.models}
    recipes = {language.training_of(arm).model_copy(update={"batch_size": 1}) for arm in language.models}
    assert tokens == {language.training.batch_size * language.context}
    assert len(recipes) == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_every_model_is_trained_by_one_stage(profile: str) -> None:
    params = params_of(profile)
    stages = yaml.safe_load((FOLDER / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["train"]["foreach"]
    trained = [pair for model in stages for pair in params.tasks_of(model)]
    assert sorted(trained) == sorted((task, arm) for task in TASKS for arm in params.experiment(task).models)


def test_a_variant_can_be_trained_alone() -> None:
    assert params_of("small").tasks_of("gla_scalar") == [("language", "gla_scalar")]
    assert params_of("paper").tasks_of("gla")[0] == ("language", "gla")


# --- The ledger -------------------------------------------------------------------------------------------------------


def test_every_claim_of_the_paper_has_a_row() -> None:
    assert {claim["id"].partition("-")[0] for claim in LEDGER} == set(CLAIMS)


OPERATORS = {"attention", "linear_attention", "linear_attention_pytorch", "gla", "gla_recurrent"}


@pytest.mark.parametrize("profile", [name for name in PROFILES if name != "tiny"])
def test_checks_name_what_the_profile_measures(profile: str) -> None:
    params = params_of(profile)
    known = {
        "language": set(params.language.models),
        "language/long": set(params.language.models),
        "mqar": set(params.mqar.models),
        "operator/forward": OPERATORS,
        "operator/forward+backward": OPERATORS,
        "training_step": set(params.speed.models),
    }
    lengths = {"training_step": params.speed.training_lengths}
    for claim in LEDGER:
        if "untested" in claim or profile not in claim.get("profiles", [profile]):
            continue
        for check in claim.get("checks", [claim.get("check")]):
            pairs = [(pair["model"], pair["over"]) for pair in check.get("pairs", [])]
            named = {name for pair in pairs for name in pair}
            named |= {check[key] for key in ("model", "numerator", "denominator") if key in check}
            for dataset in check["datasets"]:
                assert named <= known[dataset], f"{claim['id']} names {named - known[dataset]} in {dataset}"
                for length in check.get("where", {}).get("length", []):
                    assert length in lengths.get(dataset, params.speed.lengths), claim["id"]
                    assert "gla_recurrent" not in named or length <= params.speed.recurrent_up_to


# --- Sizes ------------------------------------------------------------------------------------------------------------

# Each with the 32,000 tokens of Mistral's tokenizer. The paper says 340M and 1.3B; the counts are those of its
# configuration as it is built here, so that a change of a model does not go unseen.
PARAMETERS = {
    ("paper", "transformer"): 341_099_520,
    ("paper", "retnet"): 340_915_200,
    ("paper", "mamba"): 352_797_696,
    ("paper", "gla"): 341_707_776,
    ("paper_1b", "transformer"): 1_364_297_728,
    ("paper_1b", "retnet"): 1_364_715_520,
    ("paper_1b", "mamba"): 1_400_276_992,
    ("paper_1b", "gla"): 1_365_514_240,
}


def by_hand(hidden_size: int, num_layers: int, feed_forward_size: int, vocabularies: int) -> int:
    """Parameters of a GLA model: 4 d² for the projections of a layer, 16 (d + d/2) for its gate."""
    d = hidden_size
    layer = 4 * d * d + 16 * (d + d // 2) + d // 2 + d // 4
    return num_layers * (layer + 3 * d * feed_forward_size + 2 * d) + d + vocabularies * 32000 * d


@pytest.mark.parametrize(("profile", "arm"), PARAMETERS)
def test_sizes_as_published(profile: str, arm: str) -> None:
    with torch.device("meta"):
        model = build_model(arm, params_of(profile).language.network, 32000)
    assert all(parameter.is_meta for parameter in model.parameters())
    published = {"paper": 340e6, "paper_1b": 1.3e9}[profile]
    assert model.num_parameters() == PARAMETERS[profile, arm]
    assert model.num_parameters() == pytest.approx(published, rel=0.12)


def test_the_count_of_gla_by_hand() -> None:
    assert PARAMETERS["paper", "gla"] == by_hand(1024, 24, 2816, 1)
    assert PARAMETERS["paper_1b", "gla"] == by_hand(2048, 24, 5632, 2)


def test_the_gpu_profile_has_fifteen_million_parameters() -> None:
    params = params_of("gpu")
    with torch.device("meta"):
        counts = {
            arm: build_model(arm, params.language.network, 4096).num_parameters() for arm in params.language.models
        }
    assert all(15e6 < count < 17.5e6 for count in counts.values()), counts


@pytest.mark.parametrize("arm", params_of("gpu").language.models)
def test_models_of_the_gpu_profile_take_a_training_step(arm: str) -> None:
    """One layer of two, a short sequence; width and heads as they are."""
    torch.manual_seed(0)
    language = params_of("gpu").language
    model = build_model(arm, language.network.model_copy(update={"num_layers": 1}), 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=language.training.learning_rate)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokens = torch.randint(64, (2, 33))
    segment_length = 16 if language.segment_of(arm) else None
    loss = next_token_loss(model, tokens[:, :-1], tokens[:, 1:], segment_length)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert [name for name, weight in model.named_parameters() if torch.equal(before[name], weight)] == []


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ["gla", "gla_vector"]}, "unknown model 'gla_vector'; choose one of transformer"),
        ({"models": ["gla", "gla"]}, "listed twice"),
        ({"long_context": 1000}, r"long_context \(1000\) must divide the 2048 tokens of a step"),
        ({"truncated_context": 2048 + 128}, r"truncated_context \(2176\) must"),
        ({"test_length": 300}, r"test_length \(300\) must be a multiple of the context \(256\)"),
        ({"test_length": 256}, "at least twice as long"),
        ({"contexts": 3}, "contexts"),
    ],
)
def test_impossible_experiments(changes: dict[str, Any], words: str) -> None:
    valid = params_of("small").language.model_dump()
    with pytest.raises(ValueError, match=words):
        Language.model_validate(valid | changes)


def test_impossible_timings() -> None:
    valid = params_of("small").speed.model_dump()
    with pytest.raises(ValueError, match=r"training_lengths must divide training_tokens \(4096\); not so: \[300\]"):
        Speed.model_validate(valid | {"training_lengths": [256, 300]})
