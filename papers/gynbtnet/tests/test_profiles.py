"""Profiles and ledger, one step of the large profiles, and params that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipelines.papers import Beats, Paper, Ratio, load_paper
from shared.config import UserError, load_params, validate
from shared.nn.masked_modeling import patch_mask
from shared.nn.residual_unet import STU_NET_SIZES
from shared.training import Moment

from ..config import ATLAS, BASELINES, VARIANTS, Params, PhantomData
from ..model import masked_model
from ..train import Segmentation, build

FOLDER = Path(__file__).parents[1]
SECTIONS: dict[str, Any] = yaml.safe_load((FOLDER / "params.yaml").read_text(encoding="utf-8"))
PROFILES = [name for name in SECTIONS if name != "profile"]
WITH_THREE_STAGES = ["small", "long", "gpu", "paper"]


def params_of(profile: str) -> Params:
    return load_params(FOLDER / "params.yaml", Params, profile)[1]


@pytest.fixture(scope="module")
def ledger() -> Paper:
    return load_paper(FOLDER)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads_and_compares_over_three_seeds(profile: str) -> None:
    assert len(params_of(profile).seeds) >= (5 if profile == "real" else 3)


@pytest.mark.parametrize("profile", WITH_THREE_STAGES)
def test_all_models_are_compared_on_twelve_cases(profile: str) -> None:
    params = params_of(profile)
    assert set(params.models[12]) == {*VARIANTS, *BASELINES}
    assert params.main_cases == 12
    if profile != "small":
        assert {4, 12, 40} <= set(params.models)


@pytest.mark.parametrize("profile", ["small", "long", "gpu", "paper", "real"])
def test_checks_name_what_the_profile_measures(profile: str, ledger: Paper) -> None:
    judged = [claim for claim in ledger.claims if profile in claim.profiles]
    assert len(judged) >= (3 if profile == "real" else 13)
    models = {*params_of(profile).models.get(12, ("scratch", "self_supervised")), ATLAS}
    for claim in judged:
        for check in claim.all_checks():
            if isinstance(check, Beats) and check.datasets[0] in ("cases_12", "real_ct"):
                assert {model for pair in check.all_pairs() for model in pair} <= models
            if isinstance(check, Ratio):
                assert check.datasets == (("masked_real_ct",) if profile == "real" else ("masked_phantoms",))


def test_every_claim_of_the_paper_has_a_row(ledger: Paper) -> None:
    assert {claim.id for claim in ledger.claims} >= {f"C{number}" for number in range(1, 6)}
    figures = {each.label: each.value for claim in ledger.claims for each in claim.reference}
    assert figures == {"dice/ctv": 0.837, "dice/bladder": 0.94, "dice/rectum": 0.842, "dice/uterus": 0.871}


def test_stages_feed_each_other() -> None:
    stages = yaml.safe_load((FOLDER / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert "runs/pretrain" in stages["multi_organ"]["deps"]
    assert {"runs/pretrain", "runs/multi_organ"} <= set(stages["brachytherapy"]["deps"])
    trained = {f"runs/{name}" for name in ("pretrain", "multi_organ", "brachytherapy", "baselines")}
    assert trained <= set(stages["evaluate"]["deps"])


# --- large profiles ---


@pytest.mark.parametrize("profile", ["gpu", "long"])
def test_large_profiles_take_a_step(profile: str) -> None:
    """Networks of their size on patches as small as they allow."""
    params = params_of(profile)
    side = 2 * 2 ** (params.network.resolutions - 1)
    params = params.model_copy(update={"patch": (side, side, side)})
    torch.manual_seed(0)
    image, labels = torch.randn(1, 1, side, side, side), torch.randint(6, (1, side, side, side))
    spark = masked_model(params.network, 0)
    assert spark(image, patch_mask(1, spark.patches_of(image), 0.6)).shape == image.shape
    for model in ("gynbtnet", "nnunet"):
        network = build(params, model, 6, 0)
        loss = Segmentation()(network, (image, labels), Moment(0, 0, 1, 1))["loss"]
        loss.backward()
        assert torch.isfinite(loss)


def test_the_paper_profile_is_stu_net_large() -> None:
    """The paper names no size; STU-Net-L has 440.30 million parameters for TotalSegmentator's classes."""
    params = params_of("paper")
    assert {"width": params.network.width, "blocks": params.network.blocks} == STU_NET_SIZES["L"]
    with torch.device("meta"):
        count = sum(each.numel() for each in build(params, "gynbtnet", 105, 0).parameters())
    assert count == pytest.approx(440.30e6, rel=1e-4)
    assert (params.swin.feature_size, params.swin.window_size, params.swin.norm) == (48, 7, "instance")
    assert isinstance(params.data, PhantomData)
    assert (params.data.brachytherapy, params.data.test) == (116, 29)


# --- mistakes ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch": [16, 16, 15]}, r"multiples of 4, the stride of 3 resolutions \(given: \[16, 16, 15\]\)"),
        ({"patch": [16, 16]}, "at least 3 items"),
        ({"patch": [32, 16, 16]}, "larger than the phantoms"),
        ({"models": {3: ["resnet"]}}, "unknown model 'resnet'; choose among scratch, self_supervised"),
        ({"models": {3: ["scratch", "scratch"]}}, "listed twice"),
        ({"models": {4: ["scratch"]}}, "there are 3 cases to train on; raise data.brachytherapy"),
        ({"seeds": [0, 0]}, "a seed is listed twice"),
        ({"mask_ratio": 1.0}, "less than 1"),
        ({"mirrored_axes": [0]}, "1 or 2"),
        ({"learning_rates": {"scratch": 0.1}}, "unknown baseline 'scratch'; choose among nnunet, swin_unetr"),
        ({"loaders": 4, "workers": 2}, "set workers to 1 or loaders to 0"),
        ({"swin": {"feature_size": 10}}, "multiple of 12"),
        ({"network": {"widht": 8}}, "unknown key; allowed here: blocks"),
        ({"data": {"source": "mri"}}, "'phantoms', 'real_ct'"),
        ({"data": {"source": "real_ct"}}, "the real CT has no third stage"),
    ],
)
def test_impossible_params(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(Params, SECTIONS["tiny"] | changes, "here")
