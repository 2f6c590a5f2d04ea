from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from shared.config import UserError
from shared.evaluation.language import token_loss
from shared.lm import HouseConfig, HouseModel
from shared.nn import Attention, LanguageModel
from shared.nn.low_rank import (
    add_low_rank,
    load_low_rank,
    merge_low_rank,
    parameter_counts,
    save_low_rank,
)
from shared.training.checkpoint import save_tensors

pytest.importorskip("peft")

TOKENS = torch.randint(12, (2, 7), generator=torch.Generator().manual_seed(0))


def language_model() -> nn.Module:
    return LanguageModel(12, 8, 2, lambda _: Attention(8, 2), feed_forward_size=16).double()


def house_model() -> nn.Module:
    return HouseModel(HouseConfig(vocab_size=12, num_layers=2, num_heads=2, hidden_size=8)).double()


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).double()


def logits_of(model: nn.Module) -> torch.Tensor:
    model.eval()
    output = model(TOKENS)
    return output if isinstance(output, torch.Tensor) else output.logits


def randomized(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """B away from zero, as after training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    return model


models = pytest.mark.parametrize("make", [language_model, house_model, llama])


@models
def test_starts_where_the_model_is(make: type) -> None:
    model = make()
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(add_low_rank(model, rank=2)), expected, rtol=0, atol=0)


@models
def test_attention_projections_are_adapted_and_counted(make: type) -> None:
    model = make()
    total = parameter_counts(model).total
    assert parameter_counts(model).trained == total
    add_low_rank(model, rank=3)
    # Two layers, four maps, A [3, 8] and B [8, 3] each.
    added = 2 * 4 * 2 * 3 * 8
    assert (parameter_counts(model).trained, parameter_counts(model).total) == (added, total + added)


@models
def test_only_a_and_b_get_gradients(make: type) -> None:
    model = randomized(add_low_rank(make(), rank=2))
    token_loss(logits_of(model)[:, :-1], TOKENS[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@models
def test_merged_is_unmerged(make: type) -> None:
    model = make()
    names = [name for name, _ in model.named_modules()]
    randomized(add_low_rank(model, rank=2, alpha=5))
    expected = logits_of(model)
    merge_low_rank(model)
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-12)
    assert [name for name, _ in model.named_modules()] == names
    add_low_rank(model, rank=4)
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-12)


def test_weights_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    add_low_rank(model, rank=1, alpha=3, dropout=0, targets="0")
    model[0].lora_A["default"].weight.data = torch.tensor([[2.0, -1.0]])
    model[0].lora_B["default"].weight.data = torch.tensor([[0.5], [1.0]])
    # B A = [[1, -0.5], [2, -1]], three times of it added.
    expected = torch.tensor([[4.0, -1.5], [6.0, -2.0]])
    x = torch.randn(5, 2)
    torch.testing.assert_close(model(x), x @ expected.T)
    torch.testing.assert_close(merge_low_rank(model)[0].weight, expected)


def test_scale_is_alpha_over_rank() -> None:
    model = add_low_rank(language_model(), rank=4, alpha=6)
    layer = model.blocks[0].mixer.query
    randomized(model)
    low_rank = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = layer.get_base_layer().weight + 6 / 4 * low_rank
    torch.testing.assert_close(merge_low_rank(model).blocks[0].mixer.query.weight, expected)


def test_a_step_changes_a_and_b_only() -> None:
    model = add_low_rank(language_model(), rank=2)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        token_loss(model(TOKENS[:, :-1]), TOKENS[:, 1:]).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("lora_" in name), name


@models
def test_saved_maps_go_into_a_fresh_copy(make: type, tmp_path: Path) -> None:
    model = make()
    fresh, other = copy.deepcopy(model), copy.deepcopy(model)
    randomized(add_low_rank(model, rank=2, alpha=7, dropout=0.2))
    path = tmp_path / "maps.safetensors"
    save_low_rank(path, model)
    random_state = torch.get_rng_state()
    load_low_rank(path, fresh)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(logits_of(fresh), logits_of(model), rtol=0, atol=0)
    assert parameter_counts(fresh) == parameter_counts(model)
    # A model that has its maps already takes over the saved ones.
    load_low_rank(path, add_low_rank(other, rank=2, alpha=7))
    torch.testing.assert_close(logits_of(other), logits_of(model), rtol=0, atol=0)


def test_merged_house_model_is_saved_as_usual(tmp_path: Path) -> None:
    model = merge_low_rank(randomized(add_low_rank(house_model(), rank=2)))
    assert isinstance(model, HouseModel)
    model.save(tmp_path, [f"w{number}" for number in range(12)])
    torch.testing.assert_close(logits_of(HouseModel.load(tmp_path)).float(), logits_of(model).float())


def test_dropout_acts_on_the_low_rank_path_in_training() -> None:
    model = randomized(add_low_rank(language_model(), rank=2, dropout=0.5), scale=1.0).train()
    assert (model(TOKENS) - model(TOKENS)).abs().max() > 1e-6
    model.eval()
    torch.testing.assert_close(model(TOKENS), model(TOKENS), rtol=0, atol=0)


def test_mode_is_kept() -> None:
    assert not add_low_rank(language_model().eval(), rank=2).training
    assert add_low_rank(language_model().train(), rank=2).training


def test_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    with pytest.raises(UserError, match=r"rank ≥ 1"):
        add_low_rank(model, rank=0)
    with pytest.raises(UserError, match=r"no low-rank maps can be added for 'nothing'.*mixer\.query"):
        add_low_rank(model, targets="nothing")
    for use in (merge_low_rank, lambda model: save_low_rank(tmp_path / "none", model)):
        with pytest.raises(UserError, match="add them first"):
            use(model)
    add_low_rank(model, rank=2)
    with pytest.raises(UserError, match="already"):
        add_low_rank(model, rank=2)
    path = tmp_path / "maps.safetensors"
    save_low_rank(path, model)
    with pytest.raises(UserError, match="same rank, alpha and targets"):
        load_low_rank(path, add_low_rank(language_model(), rank=3))
    with pytest.raises(UserError, match="same rank, alpha and targets"):
        load_low_rank(path, add_low_rank(language_model(), rank=2, alpha=1))
    with pytest.raises(UserError, match=r"another model: this one has no linear map blocks\.0\.mixer"):
        load_low_rank(path, house_model())
    save_tensors(path, {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="holds no low-rank maps"):
        load_low_rank(path, model)
    with pytest.raises(UserError, match="is missing"):
        load_low_rank(tmp_path / "none", model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hyporadise\]'"):
        add_low_rank(language_model())


def test_parts_for_transcripts_load_no_heavy_package() -> None:
    modules = ("nn.low_rank", "nn.sequence_to_sequence", "nn.beam_search", "lm.ngram", "data.nbest")
    modules = (*modules, "evaluation.transcription", "evaluation.rover")
    heavy = ("peft", "jiwer", "rapidfuzz", "transformers", "datasets", "mlflow", "matplotlib", "pandas")
    program = f"import sys; {'; '.join(f'import shared.{name}' for name in modules)}; "
    program += f"print([name for name in {heavy!r} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
