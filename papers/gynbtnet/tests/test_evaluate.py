"""Scores and what follows from them, by hand; then all stages at tiny size, on phantoms and on a small official CT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipelines.claims import judge_claim
from pipelines.papers import load_paper
from shared.config import Stage, UserError, load_params
from shared.data.volumes import Normalization
from shared.evaluation.scores import read_scores

from .. import data
from ..baselines import baselines
from ..brachytherapy import brachytherapy
from ..config import COMPLEX, ORGANS, SIMPLE, Params
from ..data import CaseSet, Prepared
from ..evaluate import (
    CASES_AT_ONCE,
    atlas_of,
    evaluate,
    gains,
    organ_rows,
    segment,
    segmentation_rows,
    significance,
    trainings,
)
from ..model import residual_unet
from ..multi_organ import multi_organ
from ..pretrain import pretrain
from .test_data import official, real_params  # noqa: F401 (a fixture)

FOLDER = Path(__file__).parents[1]


def table(values: dict[str, float], *, items: int = 12, seeds: int = 3, spread: float = 0.01) -> pd.DataFrame:
    """Dice, HD95 and ASD of models whose Dice is about `values`, organs alike."""
    generator = np.random.default_rng(0)
    rows = [
        {"model": m, "dataset": "cases_12", "metric": metric, "seed": s, "organ": o, "item": i, "value": v + noise}
        for m, v in values.items()
        for metric in ("dice", "hd95", "asd")
        for s in range(seeds)
        for i in range(items)
        for o in ORGANS
        for noise in [generator.normal(0, spread)]
    ]
    return pd.DataFrame(rows)


def test_gains_of_pretraining_by_hand() -> None:
    frame = table({"scratch": 0.5, "self_supervised": 0.6}, spread=0.0)
    complex_ = frame.model.eq("self_supervised") & frame.organ.isin(COMPLEX)
    frame.loc[complex_, "value"] += 0.1
    found = pd.DataFrame(gains(frame, "cases_12"))
    assert found.dataset.eq("gain_of_pretraining").all()
    means = found.groupby("model").value.mean()
    assert means["self_supervised_complex"] == pytest.approx(0.2)
    assert means["self_supervised_simple"] == pytest.approx(0.1)
    assert found.groupby("model").size().tolist() == [36, 36]
    assert {*COMPLEX, *SIMPLE} == set(ORGANS)


def test_cases_are_segmented_together_as_one_by_one(tmp_path: Path) -> None:
    params = load_params(FOLDER / "params.yaml", Params, "tiny")[1]
    prepared = Prepared(tmp_path, (11.0,) * 3, Normalization(-100, 200, 50, 80), "noise", "")
    images = np.random.default_rng(0).normal(50, 80, size=(CASES_AT_ONCE + 1, 16, 16, 16)).astype(np.float32)
    network = residual_unet(params.network, 6, seed=0)
    together = segment(params, prepared, network, CaseSet(images, None), brachytherapy=True)
    alone = [segment(params, prepared, network, CaseSet(image[None], None), brachytherapy=True) for image in images]
    assert together.shape == images.shape
    assert np.unique(together).size > 2
    assert (together == np.concatenate(alone)).mean() > 0.999


def test_gains_by_cases_by_hand() -> None:
    frame = table({"scratch": 0.5, "gynbtnet": 0.7}, spread=0.0)
    fewer = frame.assign(dataset="cases_4")
    fewer.loc[fewer.model.eq("gynbtnet"), "value"] = 0.8
    found = pd.DataFrame(gains(pd.concat([frame, fewer]), "cases_12"))
    found = found[found.dataset.eq("gain_by_cases")]
    assert found.groupby("cases").value.mean().to_dict() == pytest.approx({4: 0.3, 12: 0.2})


def test_organs_stand_in_the_place_of_models() -> None:
    frame = table({"gynbtnet": 0.7, "scratch": 0.5}, spread=0.0)
    frame.loc[frame.organ.eq("sigmoid") & frame.model.eq("gynbtnet"), "value"] = 0.4
    found = pd.DataFrame(organ_rows(frame, "cases_12"))
    assert set(found.model) == set(ORGANS)
    assert found[found.model.eq("sigmoid")].value.eq(0.4).all()
    assert len(found) == 5 * 36


def test_significance() -> None:
    frame = table({"gynbtnet": 0.7, "nnunet": 0.6, "swin_unetr": 0.7, "scratch": 0.5})
    frame = pd.concat([frame, table({"atlas": 0.1}, seeds=1)])
    found = pd.DataFrame(significance(frame)).set_index(["model", "metric"]).value
    # All of 2¹² changes of signs are tried, and two of them are as extreme as the observed one.
    assert found["nnunet", "p/dice"] == pytest.approx(2 / 2**12)
    assert found["swin_unetr", "p/dice"] > 0.05
    assert found["all", "friedman_p/dice"] < 1e-4
    raw, adjusted = (found[found.index.get_level_values(1).str.startswith(name)] for name in ("p/", "p_adjusted/"))
    assert len(raw) == len(adjusted) == 3 * 3
    assert (adjusted.to_numpy() >= raw.to_numpy() - 1e-12).all()
    assert not any(model == "atlas" for model, _ in found.index)


def test_trainings_are_all_that_is_compared() -> None:
    params = load_params(FOLDER / "params.yaml", Params, "small")[1]
    assert len(list(trainings(params))) == 3 * 7
    assert list(trainings(real_params()))[:2] == [("scratch", None, 0), ("self_supervised", None, 0)]


# --- the whole pipeline ---


def run_all(folder: Path, params: Params, profile: str) -> pd.DataFrame:
    for path in (*FOLDER.glob("*.py"), *FOLDER.glob("*.yaml")):
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    for function in (data.prepare, pretrain, multi_organ, brachytherapy, baselines, evaluate):
        function(Stage(folder, function.__name__, profile, params))
    return read_scores(folder / "results" / profile / "scores.csv")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params, pd.DataFrame]:
    """All stages on phantoms, without Swin UNETR, which takes half of the time."""
    folder = tmp_path_factory.mktemp("paper")
    params = load_params(FOLDER / "params.yaml", Params, "tiny")[1]
    models = {n: tuple(name for name in names if name != "swin_unetr") for n, names in params.models.items()}
    params = params.model_copy(update={"models": models})
    return folder, params, run_all(folder, params, "tiny")


def test_every_model_is_scored_on_every_case(finished: tuple[Path, Params, pd.DataFrame]) -> None:
    _, params, scores = finished
    for cases, models in params.models.items():
        rows = scores[scores.dataset.eq(f"cases_{cases}") & scores.metric.eq("dice")]
        for model in models:
            assert rows[rows.model.eq(model)].groupby("seed").size().to_dict() == dict.fromkeys((0, 1, 2), 3 * 5)
        assert rows[rows.model.eq("atlas")].seed.unique().tolist() == [0]
        assert rows.value.between(0, 1).all()


def test_claims_can_be_judged(finished: tuple[Path, Params, pd.DataFrame]) -> None:
    """All but those that need Swin UNETR or three numbers of cases, the data set named as in the small profile."""
    scores = finished[2]
    scores = scores.assign(dataset=scores.dataset.replace("cases_3", "cases_12"))
    with_swin = scores[scores.model.eq("nnunet")].assign(model="swin_unetr")
    scores = pd.concat([scores, with_swin], ignore_index=True)
    for claim in load_paper(FOLDER).claims:
        if "small" in claim.profiles:
            assert judge_claim(claim, scores, "small").verdict in ("holds", "contradicted", "inconclusive")


def test_reconstruction_is_scored_against_the_mean(finished: tuple[Path, Params, pd.DataFrame]) -> None:
    scores = finished[2]
    rows = scores[scores.metric.eq("reconstruction_loss")]
    assert rows.groupby("model").size().to_dict() == {"masked_modeling": 6, "patch_mean": 2}
    assert rows[rows.model.eq("patch_mean")].value.between(0.5, 1.0001).all()


def test_figures_and_costs(finished: tuple[Path, Params, pd.DataFrame]) -> None:
    folder = finished[0] / "results" / "tiny"
    names = {"dice_by_organ", "dice_by_cases", "segmentations", "reconstruction", "phantom"}
    assert {path.stem for path in folder.glob("*.png")} == names
    costs = read_scores(folder / "costs.csv")
    assert set(costs[costs.dataset.eq("masked_modeling_step")].model) == {"masked_dense", "sparse"}
    assert costs[costs.dataset.eq("training")].model.nunique() == 1 + 2 + (5 + 2) + 1


def test_a_perfect_and_an_empty_segmentation(finished: tuple[Path, Params, pd.DataFrame]) -> None:
    folder, params, _ = finished
    prepared = data.load(folder / "data")
    truth = prepared.read("test").labels
    perfect = pd.DataFrame(segmentation_rows(params, prepared, "m", 3, 0, truth))
    assert perfect[perfect.metric.eq("dice")].value.eq(1).all()
    assert perfect[perfect.metric.eq("asd")].value.eq(0).all()
    nothing = pd.DataFrame(segmentation_rows(params, prepared, "m", 3, 0, np.zeros_like(truth)))
    present = sum((truth == organ).any(axis=(1, 2, 3)).sum() for organ in range(1, 6))
    assert nothing[nothing.metric.eq("empty")].value.item() == present
    # An organ that is missed is as far away as the volume is large.
    assert nothing[nothing.metric.eq("hd95")].value.max() == pytest.approx(11 * 16 * 3**0.5, abs=0.01)


def test_missing_weights_are_named(finished: tuple[Path, Params, pd.DataFrame], tmp_path: Path) -> None:
    folder, params, _ = finished
    (tmp_path / "data").symlink_to(folder / "data")
    with pytest.raises(UserError, match=r"brachytherapy/scratch/cases2/seed0/best.safetensors is missing"):
        evaluate(Stage(tmp_path, "evaluate", "tiny", params))


def test_the_real_ct_goes_through(official: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "paper"
    folder.mkdir()
    tiny = load_params(FOLDER / "params.yaml", Params, "tiny")[1]
    update = {name: getattr(tiny, name) for name in ("seeds", "pretrain", "multi_organ", "brachytherapy", "network")}
    params = real_params().model_copy(update=update)
    scores = run_all(folder, params, "real")
    rows = scores[scores.dataset.eq("real_ct") & scores.metric.eq("dice")]
    assert set(rows.model) == {"scratch", "self_supervised", "atlas"}
    assert rows[rows.model.eq("scratch")].groupby("seed").organ.nunique().tolist() == [7, 7, 7]
    claims = {claim.id: judge_claim(claim, scores, "real") for claim in load_paper(FOLDER).claims}
    assert {name for name, verdict in claims.items() if verdict.verdict != "untested"} == {"R1", "R2", "R3"}
    prepared = data.load(folder / "data")
    slices = atlas_of(prepared, params, None)[0]
    assert (slices == slices[:, :, :1]).all()
