"""What one stage passes on to the next: which weights carry over, which are new, and files that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.config import Stage, UserError, load_params
from shared.training import save_weights

from ..config import SECOND_STAGE, VARIANTS, Network, Params
from ..model import Origin, inherit, masked_model, origin_of, residual_unet

FOLDER = Path(__file__).parents[1]
NETWORK = Network(width=2, blocks=1, resolutions=3)


def stage_of(folder: Path, name: str = "brachytherapy") -> Stage[Params]:
    return Stage(folder, name, "tiny", load_params(FOLDER / "params.yaml", Params, "tiny")[1])


def same(first: torch.nn.Module, second: torch.nn.Module, part: str) -> bool:
    states = [getattr(model, part).state_dict() for model in (first, second)]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_where_variants_start(tmp_path: Path) -> None:
    stage = stage_of(tmp_path)
    starts = {variant: origin_of(stage, variant, 7) for variant in VARIANTS}
    runs = tmp_path / "runs"
    assert starts == {
        "scratch": None,
        "scratch_long": None,
        "self_supervised": Origin(runs / "pretrain/seed7/best.safetensors", ("encoder",)),
        "multi_organ": Origin(runs / "multi_organ/scratch/seed7/best.safetensors", ("encoder", "decoder")),
        "gynbtnet": Origin(runs / "multi_organ/self_supervised/seed7/best.safetensors", ("encoder", "decoder")),
    }
    assert set(SECOND_STAGE.values()) == {"scratch", "self_supervised"}


def test_the_encoder_of_masked_modeling_carries_over(tmp_path: Path) -> None:
    pretrained = masked_model(NETWORK, seed=0)
    save_weights(tmp_path / "a.safetensors", pretrained)
    network, untouched = (residual_unet(NETWORK, 4, seed=1) for _ in range(2))
    assert not same(network, pretrained, "encoder")
    inherit(network, Origin(tmp_path / "a.safetensors", ("encoder",)))
    assert same(network, pretrained, "encoder")
    assert same(network, untouched, "decoder")
    assert same(network, untouched, "heads")


def test_all_but_the_output_carries_over_to_other_classes(tmp_path: Path) -> None:
    many = residual_unet(NETWORK, 7, seed=0)
    save_weights(tmp_path / "a.safetensors", many)
    network, untouched = (residual_unet(NETWORK, 6, seed=1) for _ in range(2))
    inherit(network, Origin(tmp_path / "a.safetensors", ("encoder", "decoder")))
    assert same(network, many, "encoder")
    assert same(network, many, "decoder")
    assert same(network, untouched, "heads")


def test_seeds_draw_the_weights() -> None:
    first, again, other = (residual_unet(NETWORK, 3, seed) for seed in (0, 0, 1))
    assert same(first, again, "encoder")
    assert not same(first, other, "encoder")


def test_both_ways_of_masking_give_the_same_reconstruction() -> None:
    from shared.nn.masked_modeling import patch_mask

    dense, sparse = (masked_model(NETWORK.model_copy(update={"sparse": way}), 0) for way in (False, True))
    volume, mask = torch.randn(2, 1, 16, 16, 16), patch_mask(2, (4, 4, 4), 0.6)
    torch.testing.assert_close(dense(volume, mask), sparse(volume, mask), atol=1e-5, rtol=1e-5)


def test_weights_that_are_missing_or_of_another_size(tmp_path: Path) -> None:
    network = residual_unet(NETWORK, 3, 0)
    origin = Origin(tmp_path / "best.safetensors", ("encoder",))
    with pytest.raises(UserError, match=r"best.safetensors is missing"):
        inherit(network, origin)
    with pytest.raises(UserError, match=r"best.safetensors is missing: run the earlier stage first"):
        origin.digest()
    save_weights(origin.path, residual_unet(NETWORK.model_copy(update={"width": 3}), 3, 0))
    with pytest.raises(UserError, match=r"best.safetensors does not fit the network of this stage.*other params"):
        inherit(network, origin)
    save_weights(origin.path, torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"does not fit.*no part 'encoder'"):
        inherit(network, origin)
    origin.path.write_bytes(origin.path.read_bytes()[:-5])
    with pytest.raises(UserError, match="damaged"):
        inherit(network, origin)
