"""The house model: its shape, its attention against a slow one, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from shared.config import UserError
from shared.lm.model import SIZES, HouseConfig, HouseModel, rotate, rotation_table


def tiny(**options: object) -> HouseModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 11, "num_layers": 2, "num_heads": 4, "hidden_size": 16, "max_length": 32}
    return HouseModel(HouseConfig(**{**shape, **options})).eval()


@pytest.mark.parametrize(
    ("size", "vocab_size", "parameters"), [("S", 640, 277_056), ("M", 640, 787_680), ("T", 2048, 836_448)]
)
def test_parameter_counts_of_the_sizes(size: str, vocab_size: int, parameters: int) -> None:
    with torch.device("meta"):
        assert HouseModel(HouseConfig.of_size(size, vocab_size)).num_parameters() == parameters


def test_initial_weights_are_normal_and_what_writes_into_the_stream_is_smaller_by_depth() -> None:
    torch.manual_seed(0)
    model = HouseModel(HouseConfig.of_size("D", 640))
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for layer in (model.blocks[0].attention.output, model.blocks[7].feed_forward.output):
        assert layer.weight.std().item() == pytest.approx(0.02 / (2 * 8) ** 0.5, rel=0.05)
    assert torch.equal(model.norm.weight, torch.ones(64))


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_attention_is_the_softmax_over_the_visible_past(key_value_heads: int) -> None:
    attention = tiny(num_key_value_heads=key_value_heads).blocks[0].attention
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 16)
    rotation = rotation_table(torch.arange(5), 4, 10000.0, torch.float32)
    expected = torch.zeros(2, 5, 4, 4)
    for head in range(4):
        group = head * key_value_heads // 4
        q = x @ attention.query.weight[4 * head : 4 * head + 4].T
        k = x @ attention.key.weight[4 * group : 4 * group + 4].T
        v = x @ attention.value.weight[4 * group : 4 * group + 4].T
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        for t in range(5):
            row = (k[:, : t + 1] @ q[:, t, :, None]).squeeze(-1) / 2
            expected[:, t, head] = (row.softmax(-1)[:, None] @ v[:, : t + 1]).squeeze(1)
    expected = expected.flatten(2) @ attention.output.weight.T
    torch.testing.assert_close(attention(x, rotation), expected)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 8).unbind()
    products = []
    for start in (0, 7, 1000):
        cosine, sine = rotation_table(torch.tensor([start, start + 3]), 8, 10000.0, torch.float64)
        turned = rotate(torch.stack([q, k]).double()[None, None], cosine, sine)[0, 0]
        products.append(turned[0] @ turned[1])
    torch.testing.assert_close(products[1], products[0])
    torch.testing.assert_close(products[2], products[0])


def test_the_future_is_invisible() -> None:
    model = tiny()
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 11
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5])
    assert not torch.allclose(model(tokens)[:, 5:], model(changed)[:, 5:])


@pytest.mark.parametrize("options", [{"act": "relu"}, {"act": "gelu", "norm": "layernorm", "pos": "learned"}, {}])
def test_every_kind_trains(options: dict[str, str]) -> None:
    model = tiny(**options).train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    tokens = torch.arange(12).remainder(11).repeat(2, 1)
    losses = []
    for _ in range(40):
        loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_save_and_load_give_the_same_model(tmp_path: Path) -> None:
    model = tiny(act="relu", num_key_value_heads=2, rotary_base=80000.0)
    model.save(tmp_path / "m", [f"w{i}" for i in range(11)])
    state = torch.random.get_rng_state()
    loaded = HouseModel.load(tmp_path / "m")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.config == model.config
    tokens = torch.randint(11, (2, 7))
    assert torch.equal(loaded(tokens), model(tokens))
    assert json.loads((tmp_path / "m" / "vocab.json").read_text()) == [f"w{i}" for i in range(11)]


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"choose one of {', '.join(SIZES)}"):
        HouseConfig.of_size("XL", 640)
    with pytest.raises(UserError, match="num_experts: unknown key"):
        HouseConfig.of_size("S", 640, num_experts=2)
    with pytest.raises(UserError, match="must be a multiple of num_heads"):
        HouseConfig.of_size("S", 640, num_heads=5)
    with pytest.raises(UserError, match="33 tokens long and the model has 32 positions"):
        tiny()(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(UserError, match=r"11 different tokens.*given: 2, 1 different"):
        tiny().save(tmp_path, ["a", "a"])
    with pytest.raises(UserError, match=r"config\.json is missing"):
        HouseModel.load(tmp_path / "nowhere")
    tiny().save(tmp_path / "m", [str(i) for i in range(11)])
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        HouseModel.load(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        HouseModel.load(tmp_path / "m")
