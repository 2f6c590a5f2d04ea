from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shared.config import UserError
from shared.nn.masked_modeling import (
    MaskedGrid,
    SparK,
    SparseGrid,
    fill_in,
    masked_norm,
    patch_mask,
    reconstruction_loss,
)
from shared.nn.residual_unet import ResidualEncoder, ResidualUNet, transfer_weights

GRIDS = (MaskedGrid, SparseGrid)


def encoder(norm: str = "instance", blocks: int = 2) -> ResidualEncoder:
    """With affine parameters and biases that are not zero, which could leak."""
    built = ResidualEncoder(1, width=2, blocks=blocks, num_stages=3, norm=norm)
    for parameter in built.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5)
    return built


def case(shape: tuple[int, ...] = (2, 1, 8, 16, 12)) -> tuple[Tensor, Tensor]:
    """A volume, and a mask of patches of 4 voxels a side."""
    return torch.randn(shape), patch_mask(shape[0], [side // 4 for side in shape[2:]])


def at_voxels(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask at another resolution, by index."""
    axes = [torch.arange(size) * patches // size for size, patches in zip(shape, mask.shape[2:], strict=True)]
    return mask[:, :, axes[0]][:, :, :, axes[1]][:, :, :, :, axes[2]]


# ------------------------------------------------------------------------------------------------------------ masks


def test_masks_keep_their_share_in_every_sample() -> None:
    mask = patch_mask(8, (3, 4, 5), 0.6, generator=torch.Generator().manual_seed(1))
    assert mask.shape == (8, 1, 3, 4, 5)
    assert mask.dtype == torch.bool
    assert mask.flatten(1).sum(1).tolist() == [24] * 8
    assert len({tuple(sample.flatten().tolist()) for sample in mask}) == 8
    assert torch.equal(mask, patch_mask(8, (3, 4, 5), 0.6, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(mask, patch_mask(8, (3, 4, 5), 0.6, generator=torch.Generator().manual_seed(2)))


def test_every_patch_is_masked_as_often() -> None:
    mask = patch_mask(4000, (2, 2, 2), 0.5, generator=torch.Generator().manual_seed(0))
    assert mask.float().mean(0).flatten().tolist() == pytest.approx([0.5] * 8, abs=0.04)


@pytest.mark.parametrize(("patches", "ratio"), [((2, 2, 2), 0.0), ((2, 2, 2), 1.0), ((1, 1, 1), 0.6)])
def test_masks_that_leave_nothing_to_do(patches: tuple[int, ...], ratio: float) -> None:
    with pytest.raises(UserError, match="at least one"):
        patch_mask(1, patches, ratio)


# ------------------------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("make", [nn.BatchNorm3d, lambda channels: nn.InstanceNorm3d(channels, affine=True)])
def test_statistics_are_those_of_active_places(make: Callable[[int], nn.Module]) -> None:
    layer = make(3).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    mask = torch.rand(2, 1, 4, 4, 4) < 0.4
    y = masked_norm(layer, x, mask)
    for channel in range(3):
        together = isinstance(layer, nn.BatchNorm3d)
        for samples in [slice(None)] if together else [slice(i, i + 1) for i in range(2)]:
            active = mask[samples, 0]
            values = x[samples, channel][active]
            expected = (values - values.mean()) / (values.var(correction=0) + layer.eps).sqrt()
            expected = expected * layer.weight[channel] + layer.bias[channel]
            torch.testing.assert_close(y[samples, channel][active], expected)
    assert not y[~mask.expand_as(y)].any()


@pytest.mark.parametrize("make", [nn.BatchNorm3d, lambda channels: nn.InstanceNorm3d(channels, affine=True)])
def test_with_all_active_a_norm_is_the_layer(make: Callable[[int], nn.Module]) -> None:
    ours, theirs = make(3), make(3)
    everywhere = torch.ones(2, 1, 4, 4, 4, dtype=torch.bool)
    for _ in range(2):
        x = 3 * torch.randn(2, 3, 4, 4, 4) + 1
        torch.testing.assert_close(masked_norm(ours, x, everywhere), theirs(x))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)
    torch.testing.assert_close(masked_norm(ours.eval(), x, everywhere), theirs.eval()(x))


def test_norms_without_a_sparse_form() -> None:
    with pytest.raises(UserError, match="GroupNorm"):
        masked_norm(nn.GroupNorm(1, 2), torch.zeros(1, 2, 2, 2, 2), torch.ones(1, 1, 2, 2, 2, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------------------ grids


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("grid", GRIDS)
def test_with_nothing_masked_the_encoder_is_dense(norm: str, grid: type) -> None:
    model, (x, mask) = encoder(norm).double(), case()
    x = x.double()
    for ours, dense in zip(model(x, grid(torch.ones_like(mask), 3)), model(x), strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-10)


def outcome(model: ResidualEncoder, x: Tensor, mask: Tensor, grid: type) -> dict[str, Tensor]:
    """Features, running statistics, and gradients of a random functional of all features."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    features = model(x, grid(mask, 3))
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in features]
    sum((weight * y).mean() for weight, y in zip(weights, features, strict=True)).backward()
    results = {f"features {level}": y.detach() for level, y in enumerate(features)} | {"input": x.grad}
    results |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return results | {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_masked_dense_and_sparse_kernel_agree(norm: str, dtype: torch.dtype, tolerance: float) -> None:
    x, mask = case()
    masked, sparse = (encoder(norm).to(dtype) for _ in GRIDS)
    sparse.load_state_dict(masked.state_dict())
    expected = outcome(masked, x.to(dtype), mask, MaskedGrid)
    found = outcome(sparse, x.to(dtype), mask, SparseGrid)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_masks_of_unequal_size_agree_too() -> None:
    x, mask = case()
    mask[0], mask[1] = False, True
    mask[0, 0, 1, 2, 0] = True
    model = encoder().double()
    for ours, dense in zip(*(model(x.double(), grid(mask, 3)) for grid in GRIDS), strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-10)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_active_set_never_grows(grid: type) -> None:
    x, mask = case()
    for features in encoder()(x, grid(mask, 3)):
        active = at_voxels(mask, features.shape[2:]).expand_as(features)
        assert not features[~active].any()
        assert features[active].ne(0).all()


def test_without_the_rule_the_mask_erodes() -> None:
    # Nothing but convolutions of ones, without bias: every layer lets one more voxel around the visible patch be seen.
    model = ResidualEncoder(1, width=1, num_stages=2)
    x = torch.zeros(1, 1, 12, 12, 12)
    x[..., 4:8, 4:8, 4:8] = 1
    convolution = model.stages[0][0].conv1
    nn.init.ones_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    seen = [int((x := convolution(x)).count_nonzero()) for _ in range(4)]
    assert seen == [6**3, 8**3, 10**3, 12**3]


def test_without_the_rule_masked_places_become_active() -> None:
    x, mask = case()
    dense = encoder()(x * at_voxels(mask, x.shape[2:]))
    masked = encoder()(x, MaskedGrid(mask, 3))
    for leaking, kept in zip(dense, masked, strict=True):
        hidden = ~at_voxels(mask, kept.shape[2:]).expand_as(kept)
        assert leaking[hidden].ne(0).float().mean() > 0.9
        assert not kept[hidden].any()


@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_masked_has_no_influence(grid: type) -> None:
    x, mask = case()
    hidden = ~at_voxels(mask, x.shape[2:])
    model = encoder()
    changed = torch.where(hidden, 100 * torch.randn_like(x), x)
    for first, second in zip(model(x, grid(mask, 3)), model(changed, grid(mask, 3)), strict=True):
        assert torch.equal(first, second)


def test_mask_of_another_volume() -> None:
    x, mask = case()
    for grid in GRIDS:
        with pytest.raises(UserError, match="mask is for 1 volumes"):
            encoder()(x, grid(mask[:1], 3))
        with pytest.raises(UserError, match=r"mask is for 2 volumes of \[16, 32, 24\]"):
            encoder()(x, grid(mask, 4))


# ------------------------------------------------------------------------------------------------------- model, loss


@pytest.mark.parametrize("decoder_width", [None, 12])
def test_both_forms_of_the_model_agree_and_all_of_it_learns(decoder_width: int | None) -> None:
    x, mask = case()
    model = SparK(encoder(), decoder_width=decoder_width).double()
    assert model.patch == 4
    assert model.patches_of(x) == mask.shape[2:]
    losses = []
    for sparse in (False, True):
        model.sparse = sparse
        prediction = model(x.double(), mask)
        assert prediction.shape == x.shape
        losses.append(reconstruction_loss(prediction, x.double(), mask))
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-10)
    losses[1].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_projections() -> None:
    assert isinstance(SparK(encoder()).projections[0], nn.Identity)
    projections = SparK(encoder(), decoder_width=12).projections
    assert [(p.in_channels, p.out_channels, p.kernel_size[0]) for p in projections] == [(8, 12, 1), (4, 6, 3)]
    with pytest.raises(UserError, match="multiple of 4"):
        SparK(encoder(), decoder_width=6)


def test_masked_places_are_filled_with_the_token() -> None:
    x, mask = case()
    model = SparK(encoder())
    seen: list[Tensor] = []
    model.projections[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(x, mask)
    filled = seen[0].movedim(1, -1)
    assert torch.equal(filled[~mask[:, 0]], model.tokens[0].flatten().expand(int((~mask).sum()), -1))
    assert filled[mask[:, 0]].mean(0).abs().max() < 1e-5  # normalized over active places


def test_predicting_the_mean_of_every_patch_is_a_loss_of_one() -> None:
    x, mask = case()
    x = 50 * x + 300 * at_voxels(torch.rand(mask.shape), x.shape[2:])
    assert reconstruction_loss(torch.zeros_like(x), x, mask).item() == pytest.approx(1, abs=1e-6)
    constant = at_voxels(torch.rand(mask.shape), x.shape[2:])
    assert reconstruction_loss(torch.zeros_like(x), constant, mask).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_by_a_loop_over_masked_patches() -> None:
    x, mask = case((2, 2, 8, 8, 8))
    prediction = torch.randn_like(x)
    errors = []
    for sample, _, i, j, k in (~mask).nonzero().tolist():
        box = (sample, slice(None), *(slice(4 * index, 4 * index + 4) for index in (i, j, k)))
        target = (x[box] - x[box].mean()) / (x[box].var(correction=0) + 1e-6).sqrt()
        errors.append((prediction[box] - target).square().mean())
    torch.testing.assert_close(reconstruction_loss(prediction, x, mask), torch.stack(errors).mean())
    visible = at_voxels(mask, x.shape[2:])
    changed = torch.where(visible, torch.zeros_like(prediction), prediction)
    torch.testing.assert_close(reconstruction_loss(changed, x, mask), reconstruction_loss(prediction, x, mask))


def test_filling_in() -> None:
    x, mask = case()
    assert torch.equal(
        fill_in(torch.zeros_like(x), x, mask)[at_voxels(mask, x.shape[2:])], x[at_voxels(mask, x.shape[2:])]
    )
    sample, _, i, j, k = (~mask).nonzero()[0].tolist()
    box = (sample, 0, *(slice(4 * index, 4 * index + 4) for index in (i, j, k)))
    filled = fill_in(torch.zeros_like(x), x, mask)[box]
    torch.testing.assert_close(filled, x[box].mean().expand_as(filled))
    perfect = torch.zeros_like(x)
    perfect[box] = (x[box] - x[box].mean()) / (x[box].var(correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(fill_in(perfect, x, mask)[box], x[box])


def test_pretraining_learns_and_hands_its_encoder_on() -> None:
    # Stripes that go through all patches: visible ones tell what the masked ones hold.
    generator = torch.Generator().manual_seed(0)
    model = SparK(ResidualEncoder(1, width=4, num_stages=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        phase = 6.28 * torch.rand(4, 1, 1, 1, 1, generator=generator)
        x = torch.sin(0.8 * torch.arange(16.0) + phase).expand(4, 1, 16, 16, 16)
        mask = patch_mask(4, model.patches_of(x), 0.6, generator=generator)
        loss = reconstruction_loss(model(x, mask), x, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.7
    network = ResidualUNet(1, 3, width=4, num_stages=3)
    transfer_weights(network, model.state_dict(), parts=("encoder",))
    assert torch.equal(network.encoder.stages[2][0].conv1.weight, model.encoder.stages[2][0].conv1.weight)


def test_half_precision_under_autocast() -> None:
    x, mask = case()
    model = SparK(encoder())
    exact = model(x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        for sparse in (False, True):
            model.sparse = sparse
            assert (model(x, mask).float() - exact).norm() < 0.05 * exact.norm()
