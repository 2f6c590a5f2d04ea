"""Interrupted trainings, finished ones, diverging ones, and the first round of a variant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.config import Stage, UserError, load_params
from shared.training import Diverged

from .. import data
from ..config import FAMILIES, VARIANTS, Params, Variant, family_of
from ..diagnosis import score_slots
from ..features import FeatureInputs
from ..sampling import Member
from ..train import fit_models, load_trained, make_inputs, member_groups, scored_high, train, variant_of
from .test_diagnosis import Says
from .test_sampling import prepared as small_data

FOLDER = Path(__file__).parents[1]
MEMBERS = (Member(0, 0), Member(1, 0))


def tiny(**training: Any) -> Params:
    params = load_params(FOLDER / "params.yaml", Params, "tiny")[1]
    return params.model_copy(update={"training": params.training.model_copy(update=training)})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> data.Prepared:
    folder = tmp_path_factory.mktemp("data")
    data.prepare(Stage(folder, "prepare", "tiny", tiny()))
    return data.load(folder / "data")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from shared.training.checkpoint import load_tensors

    return load_tensors(directory / "final.safetensors")[0]


def run(params: Params, prepared: data.Prepared, directory: Path, variant: Variant, **options: Any) -> float:
    return fit_models(params, prepared, "weak_pool", "strong", variant, MEMBERS, directory, "identity", **options)


def test_every_variant_belongs_to_one_family() -> None:
    assert sorted(name for members in FAMILIES.values() for name in members) == sorted(VARIANTS)
    assert family_of("cet_tau5") == "coupled"


class Stops(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 3])
def test_an_interrupted_training_ends_with_the_same_numbers(
    prepared: data.Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    from .. import train as module

    params = tiny(checkpoint_every_steps=1)
    whole = run(params, prepared, tmp_path / "whole", VARIANTS["cet_tau1"])
    save, saved = module._save, []

    def save_and_stop(path: Path, *rest: Any) -> None:
        save(path, *rest)
        saved.append(path)
        if len(saved) == stop_at:
            raise Stops

    with monkeypatch.context() as patch:
        patch.setattr(module, "_save", save_and_stop)
        with pytest.raises(Stops):
            run(params, prepared, tmp_path / "cut", VARIANTS["cet_tau1"])
    assert (tmp_path / "cut" / "last.safetensors").exists()
    assert run(params, prepared, tmp_path / "cut", VARIANTS["cet_tau1"]) == whole
    assert not (tmp_path / "cut" / "last.safetensors").exists()
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "cut")[name])


def test_a_finished_training_is_not_repeated_and_one_of_other_code_is(
    prepared: data.Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .. import train as module

    first = run(tiny(), prepared, tmp_path, VARIANTS["fixed_relevance"])
    with monkeypatch.context() as patch:
        patch.setattr(module, "accumulate_gradients", None)
        assert run(tiny(), prepared, tmp_path, VARIANTS["fixed_relevance"]) == first
    calls = []
    original = module.accumulate_gradients
    monkeypatch.setattr(module, "accumulate_gradients", lambda *rest: (calls.append(1), original(*rest))[1])
    fit_models(tiny(), prepared, "weak_pool", "strong", VARIANTS["plain"], MEMBERS, tmp_path, "other")
    assert calls


def test_without_weights_the_selection_model_does_not_matter(prepared: data.Prepared, tmp_path: Path) -> None:
    run(tiny(), prepared, tmp_path / "plain", VARIANTS["plain"])
    assert all(name.startswith("relevance.") for name in weights(tmp_path / "plain"))
    run(tiny(), prepared, tmp_path / "hot", Variant(weights="coupled", tau=1e9, normalize=True))
    for name, tensor in weights(tmp_path / "plain").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "hot")[name])
    run(tiny(), prepared, tmp_path / "cold", Variant(weights="coupled", tau=0.5, normalize=True))
    assert not torch.allclose(
        weights(tmp_path / "cold")["relevance.weight_in"], weights(tmp_path / "plain")["relevance.weight_in"]
    )


def test_the_first_round_is_the_unweighted_model(prepared: data.Prepared, tmp_path: Path) -> None:
    run(tiny(), prepared, tmp_path / "plain", VARIANTS["plain"])
    run(tiny(), prepared, tmp_path / "denoised", VARIANTS["denoised"])
    first = weights(tmp_path / "denoised" / "first_round")
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(tmp_path / "plain").items())


def test_training_lowers_the_loss(prepared: data.Prepared, tmp_path: Path) -> None:
    first = run(tiny(epochs=1), prepared, tmp_path / "short", VARIANTS["plain"])
    assert run(tiny(epochs=8), prepared, tmp_path / "long", VARIANTS["plain"]) < first


def test_a_diverging_training_says_what_to_do(prepared: data.Prepared, tmp_path: Path) -> None:
    variant = Variant(weights="coupled", tau=1e-3)
    with pytest.raises(Diverged, match=r"no checkpoint was written before. Lower learning_rate .* temperature"):
        run(tiny(learning_rate=10.0), prepared, tmp_path, variant)


def test_what_a_first_ranker_scores_above_the_label_is_dropped() -> None:
    """The ranker scores by slot; the label of each query is slot 0, or (member 1) the highest one."""
    sample = small_data()
    inputs = FeatureInputs(torch.arange(9.0).expand(12, 9)[..., None])
    dropped = scored_high(Says(), sample, "weak_pool", "bm25", Variant(drop="scored_high"), inputs)
    labeled = sample.labels["weak_pool"][:, 0] == 0
    slots = sample.sources["bm25"][labeled]
    np.testing.assert_array_equal(dropped[0, labeled], slots > 0)
    assert not dropped[1, labeled].any()
    strict = Variant(drop="scored_high", threshold=0.99)
    np.testing.assert_array_equal(
        scored_high(Says(), sample, "weak_pool", "bm25", strict, inputs)[0, labeled], slots > 4
    )


@pytest.fixture
def stage(tmp_path: Path) -> Stage[Params]:
    for path in (*FOLDER.glob("*.py"), FOLDER / "params.yaml"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return Stage(tmp_path, "train", "tiny", tiny(), "baselines")


def test_a_family_is_trained_and_read_back(stage: Stage[Params]) -> None:
    data.prepare(stage)
    train(stage)
    assert sorted(path.name for path in (stage.runs_dir / "baselines" / "weak_pool").iterdir()) == [
        "denoised_strong",
        "oracle_strong",
        "oracle_weak",
        "pu_strong",
    ]
    (members,) = member_groups(stage.params)
    assert len(members) == 9
    sample = data.load(stage.data_dir)
    trained = load_trained(stage, sample, "weak_pool", "pu_strong", members)
    assert len(trained.history["loss/relevance"]) == 2
    inputs = make_inputs(stage.params, sample, torch.device("cpu"))
    scores = score_slots(trained.relevance, inputs, sample.reranked)
    assert np.isfinite(scores[:, sample.reranked >= 0]).all()
    other = stage.params.model_copy(update={"ranker": stage.params.ranker.model_copy(update={"hidden_size": 9})})
    with pytest.raises(UserError, match=r"does not fit .*run the training again"):
        load_trained(replace(stage, params=other), sample, "weak_pool", "pu_strong", members)


@pytest.mark.parametrize("model", [None, "cet_tau7", "cet_positives"])
def test_a_variant_that_the_profile_does_not_have(stage: Stage[Params], model: str | None) -> None:
    with pytest.raises(UserError, match="choose one of plain, coupled, fixed, baselines, cet"):
        train(replace(stage, model=model))


def test_variants_by_the_names_of_models() -> None:
    experiment = tiny().experiments["weak_pool"]
    assert variant_of(experiment, "fixed_selection_strong") == "fixed_selection"
    assert experiment.trained()["cet_bm25"] == (VARIANTS["cet"], "bm25")
