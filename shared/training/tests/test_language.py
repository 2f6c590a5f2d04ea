"""Which examples a language model is trained on, when the learning rate is what, and where the gradient is cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.config import UserError
from shared.training.language import (
    LanguageTraining,
    TokenValidation,
    next_token_loss,
    train_language_model,
)

VOCAB = 7


class Recurrent(nn.Module):
    """A small language model with a state, in the form that `shared.nn.language_model` has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.cell = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, VOCAB)
        self.seen: list[Tensor] = []

    def forward(self, tokens: Tensor, state: Any = None, keep_state: bool = False) -> Any:
        if self.training:
            self.seen.append(tokens.clone())
        hidden, last = self.cell(self.embed(tokens), None if state is None else state["h"])
        return (self.head(hidden), {"h": last}) if keep_state else self.head(hidden)


def settings(**changes: Any) -> LanguageTraining:
    return LanguageTraining.model_validate({"steps": 6, "batch_size": 2, "learning_rate": 1e-2} | changes)


def model() -> Recurrent:
    torch.manual_seed(0)
    return Recurrent()


def numbered_windows(count: int, length: int = 5) -> Tensor:
    """Windows that begin with their own number, in seven tokens at most."""
    windows = torch.zeros(count, length + 1, dtype=torch.uint8)
    windows[:, 0] = torch.arange(count)
    return windows


def first_tokens(trained: Recurrent) -> list[int]:
    return torch.cat([tokens[:, 0] for tokens in trained.seen]).tolist()


# --- Order ------------------------------------------------------------------------------------------------------------


def test_every_pass_sees_every_example_once(tmp_path: Path) -> None:
    trained = model()
    train_language_model(trained, numbered_windows(6), None, settings(validations=2), directory=tmp_path, seed=0)
    seen = first_tokens(trained)
    assert [len(tokens) for tokens in trained.seen] == [2] * 6
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]


def test_a_training_shorter_than_a_pass_sees_no_example_twice(tmp_path: Path) -> None:
    trained = model()
    windows = torch.randint(VOCAB, (40, 6), generator=torch.Generator().manual_seed(0))
    train_language_model(trained, windows, None, settings(validations=3), directory=tmp_path, seed=0)
    seen = torch.cat(trained.seen)
    assert len(torch.unique(seen, dim=0)) == len(seen) == 12


def test_the_order_follows_the_seed_alone(tmp_path: Path) -> None:
    orders = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        trained = model()
        train_language_model(
            trained, numbered_windows(7), None, settings(steps=7), directory=tmp_path / name, seed=seed
        )
        orders[name] = first_tokens(trained)
    assert orders["first"] == orders["again"] != orders["other"]


def test_memory_mapped_tokens_train_as_others_do(tmp_path: Path) -> None:
    tokens = torch.randint(VOCAB, (60,)).to(torch.uint16)
    views = tokens.unfold(0, 6, 5)
    weights = []
    for name, windows in (("views", views), ("copies", views.long().contiguous())):
        trained = model()
        train_language_model(trained, windows, None, settings(), directory=tmp_path / name, seed=0)
        weights.append(trained.head.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_the_best_of_the_validations_is_kept(tmp_path: Path) -> None:
    losses = iter([3.0, 1.0, 2.0])
    result = train_language_model(
        model(),
        numbered_windows(6),
        lambda _: {"validation/loss": next(losses)},
        settings(validations=3),
        directory=tmp_path,
        seed=0,
    )
    assert (result.best_epoch, result.best_value, result.epochs) == (1, 1.0, 3)


# --- Recipe -----------------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_over_the_warmup_and_falls_to_its_last_fraction() -> None:
    recipe = settings(steps=100, warmup_steps=20, validations=4, final_fraction=0.1, learning_rate=2.0)
    loop = recipe.loop_settings()

    def rate(step: int) -> float:
        return loop.learning_rate_at(step / recipe.steps_between_validations)

    assert [rate(0), rate(10), rate(20)] == pytest.approx([0, 1, 2])
    assert rate(60) == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rate(100) == pytest.approx(0.2)
    assert (loop.optimizer, loop.betas, loop.weight_decay, loop.gradient_clip) == ("adamw", (0.9, 0.95), 0.01, 1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 10, "validations": 3}, r"steps \(10\) must be a multiple of validations \(3\)"),
        ({"warmup_steps": 6}, r"warmup_steps \(6\) must be fewer than steps \(6\)"),
        ({"epochs": 3}, "epochs"),
    ],
)
def test_impossible_recipes(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**changes)


@pytest.mark.parametrize(
    ("examples", "segment_length", "words"),
    [
        (torch.zeros(0, 6, dtype=torch.int64), None, "no example to train on"),
        ((torch.zeros(3, 6), torch.zeros(3, 5)), None, r"\[3, 6\] and \[3, 5\]"),
        (torch.zeros(3, 6, dtype=torch.int64), 2, "segments of 2 tokens do not divide sequences of 5"),
        ((torch.zeros(3, 6), torch.zeros(3, 6)), 3, "windows of text only"),
    ],
)
def test_impossible_examples(tmp_path: Path, examples: Any, segment_length: int | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train_language_model(
            model(), examples, None, settings(), directory=tmp_path, seed=0, segment_length=segment_length
        )


# --- Truncated backpropagation through time ---------------------------------------------------------------------------


def test_segments_have_the_loss_of_the_whole_sequence_and_a_gradient_of_their_own() -> None:
    tokens = torch.randint(VOCAB, (3, 13))
    whole, cut = model(), model()
    full = next_token_loss(whole, tokens[:, :-1], tokens[:, 1:])
    truncated = next_token_loss(cut, tokens[:, :-1], tokens[:, 1:], segment_length=4)
    torch.testing.assert_close(full, truncated)
    full.backward()
    truncated.backward()
    assert not torch.allclose(whole.cell.weight_hh_l0.grad, cut.cell.weight_hh_l0.grad, rtol=1e-3)

    # The same by hand: the mean of the segments' gradients, the state of each a constant.
    by_hand, state = model(), None
    for start in (0, 4, 8):
        logits, state = by_hand(tokens[:, start : start + 4], state=state, keep_state=True)
        state = {"h": state["h"].detach()}
        labels = tokens[:, start + 1 : start + 5]
        (nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) / 3).backward()
    for parameter, other in zip(cut.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


# --- Labels -----------------------------------------------------------------------------------------------------------


def test_only_labels_that_count_are_learnt(tmp_path: Path) -> None:
    """Where nothing is asked the label may be anything, even one that is not in the vocabulary."""
    inputs = torch.randint(VOCAB, (8, 5), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(inputs, -100)
    labels[:, 2] = (inputs[:, 1] + 1) % VOCAB
    trained = model()
    recipe = settings(steps=150, batch_size=8, learning_rate=3e-2)
    train_language_model(trained, (inputs, labels), None, recipe, directory=tmp_path, seed=0)
    assert TokenValidation((inputs, labels), 8)(trained)["validation/accuracy"] == 1.0


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_validation_is_a_mean_over_labels(batch_size: int) -> None:
    class Sure(nn.Module):
        """Predicts that a token repeats, with odds of e² to 1 against each of the others."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, tokens: Tensor) -> Tensor:
            return nn.functional.one_hot(tokens, 3) * self.weight

    windows = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 2], [2, 0, 2, 0]])
    # Of nine predictions four are right.
    total = math.log(math.e**2 + 2)
    values = TokenValidation(windows, batch_size)(Sure())
    assert values["validation/accuracy"] == pytest.approx(4 / 9)
    assert values["validation/loss"] == pytest.approx(total - 2 * 4 / 9, rel=1e-6)
    inputs, labels = windows[:, :-1], windows[:, 1:].clone()
    labels[0] = -100
    assert TokenValidation((inputs, labels), batch_size)(Sure())["validation/accuracy"] == pytest.approx(2 / 6)
