from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shared.config import UserError
from shared.evaluation.language import (
    IGNORED,
    answer_accuracy,
    bits,
    labeled_objective,
    loss_by_position,
    token_loss,
)
from shared.training import Moment, TrainingSettings, fit

# Three tokens with probabilities 1/2, 1/4, 1/4, at every position.
LOG_PROBABILITIES = torch.log(torch.tensor([0.5, 0.25, 0.25]))
MOMENT = Moment(0, 0, 1, 1)


def constant(tokens: Tensor) -> Tensor:
    return LOG_PROBABILITIES.expand(*tokens.shape, 3)


class Recorder(nn.Module):
    """Predicts that every token repeats the one before, with odds 8 : 1 : 1, and remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.odds = nn.Parameter(torch.tensor(8.0))
        self.frozen = nn.Dropout(0.5).eval()
        self.calls: list[tuple[int, bool, bool]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls.append((len(tokens), self.training, torch.is_grad_enabled()))
        return nn.functional.one_hot(tokens, 3) * self.odds.log()


def test_token_loss_by_hand() -> None:
    labels = torch.tensor([[0, 1, IGNORED], [2, IGNORED, 0]])
    logits = constant(labels) + 7.0
    expected = (1 + 2 + 2 + 1) / 4 * math.log(2)
    assert token_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    assert token_loss(logits, labels.clamp(min=0), ignore_index=0).item() == pytest.approx(2 * math.log(2), rel=1e-6)


def test_token_loss_keeps_to_its_labels() -> None:
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    labels = torch.tensor([[1, IGNORED, 2], [IGNORED, IGNORED, IGNORED]])
    token_loss(logits, labels).backward()
    used = logits.grad.abs().sum(dim=2) > 0
    assert used.tolist() == (labels != IGNORED).tolist()


def test_no_labels_cost_nothing() -> None:
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    loss = token_loss(logits, torch.full((1, 2), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_token_loss_is_computed_in_single_precision() -> None:
    logits = torch.linspace(-3, 3, 1000).to(torch.bfloat16).view(1, 1, 1000)
    label = torch.tensor([[10]])
    loss = token_loss(logits, label)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(token_loss(logits.double(), label).item(), rel=1e-6)


def test_shapes_must_fit() -> None:
    with pytest.raises(UserError, match="must be those of labels"):
        token_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(UserError, match="same shape"):
        answer_accuracy(constant, tokens, tokens[:, :2])
    with pytest.raises(UserError, match="no token is labeled"):
        answer_accuracy(constant, tokens, torch.full_like(tokens, IGNORED))
    with pytest.raises(UserError, match="batch_size is 0"):
        answer_accuracy(constant, tokens, tokens, batch_size=0)
    with pytest.raises(UserError, match="windows are"):
        loss_by_position(constant, tokens[:, :1])


@pytest.mark.parametrize("as_numpy", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_accuracy_by_hand(batch_size: int, as_numpy: bool) -> None:
    # Repeating the input is right at the first label of row 0 and at both of row 2, saying 0 at two.
    inputs = torch.tensor([[0, 1, 2], [1, 1, 1], [2, 0, 2]])
    labels = torch.tensor([[0, IGNORED, 1], [2, 2, IGNORED], [2, 0, IGNORED]])
    given = (inputs.numpy(), labels.numpy()) if as_numpy else (inputs, labels)
    assert answer_accuracy(Recorder(), *given, batch_size=batch_size) == 3 / 6
    assert answer_accuracy(constant, *given, batch_size=batch_size) == 2 / 6


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_loss_by_position_by_hand(batch_size: int) -> None:
    windows = np.array([[0, 0, 1, 1], [1, 1, 2, 1], [2, 0, 0, 0]])
    # Odds 8 : 1 : 1 on a repetition.
    hit, miss = -math.log(0.8), -math.log(0.1)
    expected = [(2 * hit + miss) / 3, (2 * miss + hit) / 3, (2 * hit + miss) / 3]
    losses = loss_by_position(Recorder(), windows, batch_size=batch_size)
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    tensors = torch.from_numpy(windows)
    whole = token_loss(Recorder()(tensors[:, :-1]), tensors[:, 1:]).item()
    assert losses.mean() == pytest.approx(whole, rel=1e-6)


def test_tokens_may_be_stored_in_any_integer_type() -> None:
    inputs, labels = np.array([[0, 1, 2]]), np.array([[0, IGNORED, 1]])
    for kind in (np.int16, np.int32, np.int64):
        assert answer_accuracy(Recorder(), inputs.astype(kind), labels.astype(kind)) == 1 / 2
    expected = loss_by_position(Recorder(), inputs)
    np.testing.assert_array_equal(loss_by_position(Recorder(), inputs.astype(np.uint16)), expected)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(training: bool) -> None:
    model = Recorder()
    model.training = training
    tokens = torch.zeros(5, 4, dtype=torch.int64)
    answer_accuracy(model, tokens, tokens, batch_size=2)
    loss_by_position(model, tokens, batch_size=3)
    assert model.calls == [
        (2, False, False),
        (2, False, False),
        (1, False, False),
        (3, False, False),
        (2, False, False),
    ]
    assert model.training == training
    assert not model.frozen.training
    assert torch.is_grad_enabled()


def test_the_mode_comes_back_after_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model, tokens = Broken(), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="broken"):
        loss_by_position(model, tokens)
    assert model.training
    assert torch.is_grad_enabled()


def test_units() -> None:
    assert bits(math.log(8)) == pytest.approx(3)
    np.testing.assert_allclose(bits(np.log([2.0, 4.0])), [1, 2])


def test_the_objective_by_hand() -> None:
    inputs = torch.tensor([[0, 1], [2, 2]])
    labels = torch.tensor([[IGNORED, 2], [0, 0]])
    loss = labeled_objective(constant, (inputs, labels), MOMENT)["loss"]
    assert loss.item() == pytest.approx(4 / 3 * math.log(2))
    assert loss.item() == pytest.approx(token_loss(constant(inputs), labels).item())
    nothing = torch.full_like(labels, IGNORED)
    assert labeled_objective(constant, (inputs, nothing), MOMENT)["loss"].item() == 0


def test_the_objective_trains(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))
    tokens = torch.arange(64).view(8, 8) % 5
    data = TensorDataset(tokens, (tokens + 2) % 5)
    settings = TrainingSettings(epochs=40, batch_size=4, learning_rate=0.1)
    result = fit(model, data, labeled_objective, settings, directory=tmp_path, seed=0)
    assert result.history[-1]["train/loss"] < 0.05 < 1 < result.history[0]["train/loss"]
