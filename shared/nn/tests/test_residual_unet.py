from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from shared.config import UserError
from shared.nn.residual_unet import (
    STU_NET_SIZES,
    ResidualBlock,
    ResidualDecoder,
    ResidualEncoder,
    ResidualUNet,
    transfer_weights,
)


def small(**options: int) -> ResidualUNet:
    return ResidualUNet(**{"in_channels": 1, "num_classes": 3, "width": 2, "num_stages": 3, **options})


@pytest.mark.parametrize(("size", "millions"), [("S", 14.60), ("B", 58.26), ("L", 440.30), ("H", 1457.33)])
def test_parameter_counts_of_stu_net(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = ResidualUNet(1, 105, **STU_NET_SIZES[size])
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_a_block_is_its_equation() -> None:
    block = ResidualBlock(2, 3, "instance", stride=2, project=True)
    x = torch.randn(2, 2, 4, 6, 4)

    def norm(y: torch.Tensor) -> torch.Tensor:
        centered = y - y.mean((2, 3, 4), keepdim=True)
        return centered / (centered.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()

    y = functional.conv3d(x, block.conv1.weight, block.conv1.bias, 2, 1)
    y = functional.conv3d(functional.leaky_relu(norm(y), 0.01), block.conv2.weight, block.conv2.bias, 1, 1)
    skip = torch.einsum("oi,bixyz->boxyz", block.skip.weight[:, :, 0, 0, 0], x[:, :, ::2, ::2, ::2])
    expected = functional.leaky_relu(norm(y) + skip + block.skip.bias.view(1, -1, 1, 1, 1), 0.01)
    torch.testing.assert_close(block(x), expected)


def test_a_block_that_keeps_the_shape_adds_its_input() -> None:
    block = ResidualBlock(2, 2, "instance")
    nn.init.zeros_(block.norm2.weight)
    x = torch.randn(1, 2, 4, 4, 4)
    torch.testing.assert_close(block(x), functional.leaky_relu(x, 0.01))


def test_widths_and_resolutions_of_the_encoder() -> None:
    encoder = ResidualEncoder(2, width=1, num_stages=7)
    assert encoder.widths == (1, 2, 4, 8, 16, 16, 16)
    assert encoder.total_stride == 64
    features = ResidualEncoder(2, width=2, num_stages=3)(torch.randn(1, 2, 8, 12, 4))
    assert [tuple(x.shape[1:]) for x in features] == [(2, 8, 12, 4), (4, 4, 6, 2), (8, 2, 3, 1)]


def test_a_decoder_repeats_voxels_and_concatenates_skips() -> None:
    decoder = ResidualDecoder([2, 3])
    seen: list[torch.Tensor] = []
    decoder.stages[0][0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fine, coarse = torch.randn(1, 2, 4, 4, 4), torch.randn(1, 3, 2, 2, 2)
    decoder([fine, coarse])
    repeated = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(seen[0], torch.cat([decoder.reduce[0](repeated), fine], 1))


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_every_parameter_learns_from_all_scales(norm: str) -> None:
    model = ResidualUNet(2, 3, width=2, blocks=2, num_stages=3, norm=norm)
    x = torch.randn(2, 2, 8, 8, 8)
    scales = model.scales(x)
    assert [tuple(scale.shape) for scale in scales] == [(2, 3, 8, 8, 8), (2, 3, 4, 4, 4)]
    sum(scale.square().mean() for scale in scales).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    if norm == "instance":
        torch.testing.assert_close(model(x), scales[0])


def test_the_blocks_of_the_decoder_are_its_own_choice() -> None:
    assert [len(stage) for stage in small(blocks=2).decoder.stages] == [2, 2]
    model = small(blocks=2, decoder_blocks=1)
    assert [len(stage) for stage in model.decoder.stages] == [1, 1]
    assert [len(stage) for stage in model.encoder.stages] == [2, 2, 2]


def test_transfer_to_another_number_of_classes() -> None:
    source, target = small(num_classes=5), small()
    heads = [head.weight.clone() for head in target.heads]
    report = transfer_weights(target, source.state_dict())
    x = torch.randn(1, 1, 8, 8, 8)
    features = source.decoder(source.encoder(x))
    for ours, theirs in zip(target.decoder(target.encoder(x)), features, strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(head.weight, before) for head, before in zip(target.heads, heads, strict=True))
    outputs = ("heads.0.weight", "heads.0.bias", "heads.1.weight", "heads.1.bias")
    assert report.fresh == outputs
    assert report.unused == outputs
    assert set(report.carried) == set(target.state_dict()) - set(outputs)


def test_transfer_of_the_encoder_alone_copies() -> None:
    source, target = small(), small()
    before = target.decoder.reduce[0].weight.clone()
    report = transfer_weights(target, source.state_dict(), parts=("encoder",))
    assert all(name.startswith("encoder.") for name in report.carried)
    assert torch.equal(target.decoder.reduce[0].weight, before)
    with torch.no_grad():
        target.encoder.stages[0][0].conv1.weight.zero_()
    assert source.encoder.stages[0][0].conv1.weight.any()


@pytest.mark.parametrize(
    ("options", "parts", "message"),
    [
        (
            {"width": 4},
            ("encoder",),
            r"encoder\.stages\.0\.0\.conv1\.weight is \[4, 1, 3, 3, 3\], and in the target \[2",
        ),
        ({"num_stages": 4}, ("encoder",), "is not in the target"),
        ({"blocks": 2}, ("encoder", "decoder"), "is not in the target.*and .* more"),
        ({}, ("encoder", "teacher"), "no part 'teacher'.*they have: decoder, encoder, heads"),
    ],
)
def test_transfer_refuses_what_does_not_fit(options: dict[str, int], parts: tuple[str, ...], message: str) -> None:
    target = small()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(UserError, match=message):
        transfer_weights(target, small(**options).state_dict(), parts)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_transfer_from_fewer_tensors() -> None:
    weights = small().state_dict()
    del weights["encoder.stages.1.0.conv2.bias"]
    with pytest.raises(UserError, match=r"encoder\.stages\.1\.0\.conv2\.bias is missing"):
        transfer_weights(small(), weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stages": 1}, "two stages"),
        ({"width": 0}, "at least 1"),
        ({"num_classes": 1}, "two classes"),
        ({"norm": "layer"}, "unknown norm 'layer'"),
    ],
)
def test_networks_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**options)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8, 6), (1, 1, 8, 8)])
def test_volumes_that_do_not_halve(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="multiples of 4"):
        small()(torch.zeros(shape))
