"""The task of two steps: its documents, and a model that is trained on them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shared.config import Stage, UserError, validate
from shared.data.house_lexicon import load_lexicon
from shared.lm.model import HouseConfig, HouseModel
from shared.training import fit

from ..config import House, Params, TwoSteps
from ..data import _save, end_with, house_tests, random_needles
from ..mask import Condition, prompt_rows
from ..subjects import Subject
from ..train import train_two_steps
from ..two_steps import NO_LABEL, Documents, answer_loss

LEXICON = load_lexicon("embedded")
TASK = {"epochs": 1, "steps_per_epoch": 4, "batch_size": 6, "learning_rate": 1e-3, "lengths": [40, 52], "documents": 5}
GRID = {"lengths": [40], "depths": [0, 100], "documents": 1}
MODELS = [{"name": "skills", "grid": GRID}, {"name": "two-steps", "grid": GRID, "two_steps": TASK}]
HOUSE = validate(House, {"size": "S", "models": MODELS}, "here")
SETTINGS = HOUSE.models[1].two_steps


def words(tokens: torch.Tensor) -> list[str]:
    return [LEXICON.vocabulary[int(token)] for token in tokens]


def test_the_digit_belongs_to_the_first_word_of_the_code_that_is_asked_for() -> None:
    needles = random_needles(HOUSE, 40, 30, np.random.default_rng(0), LEXICON)
    for tokens, at_once, in_steps in zip(
        needles.tokens, end_with(needles, "at_once", LEXICON), end_with(needles, "in_steps", LEXICON), strict=True
    ):
        text = words(tokens)
        context, name = text[:41], text[-1]
        fact = next(i for i in range(41) if context[i : i + 4] == ["The", "code", "of", name])
        code = context[fact + 4]
        digit = str(int(code[1:]) % 10)
        assert words(at_once) == [*context, "Answer", "for", name, "=", digit, "."]
        assert words(in_steps) == [*context, "Answer", "for", name, ":", code, "=", digit, "."]


def test_prompts_end_where_the_answer_begins_and_both_forms_ask_the_same() -> None:
    tests = dict(house_tests(HOUSE, 0, LEXICON))
    at_once, in_steps = tests["at_once"], tests["in_steps"]
    for length in (40, 52):
        assert at_once[f"{length}/tokens"].shape == in_steps[f"{length}/tokens"].shape == (5, 1 + length + 4)
        assert (at_once[f"{length}/tokens"][:, :-1] == in_steps[f"{length}/tokens"][:, :-1]).all()
        assert (at_once[f"{length}/answer"] == in_steps[f"{length}/answer"]).all()
        assert {*words(at_once[f"{length}/tokens"][:, -1])} == {"="}
        assert {*words(in_steps[f"{length}/tokens"][:, -1])} == {":"}
        assert {*words(at_once[f"{length}/answer"])} <= set("0123456789")


def test_of_training_documents_only_answers_are_to_be_learned() -> None:
    documents = Documents(HOUSE, SETTINGS, LEXICON)
    torch.manual_seed(0)
    rows = [documents[index] for index in range(len(documents))]
    assert {(len(tokens), len(labels)) for tokens, labels in rows} == {(1 + 52 + 6 + 3 + 1,) * 2}
    learned = []
    for tokens, labels in rows:
        marked = labels != NO_LABEL
        assert torch.equal(labels[marked], tokens[marked])
        end = int(marked.nonzero().max()) + 1
        answer = int(marked.sum())
        assert marked[end - answer : end].all()
        assert words(tokens[end - 1 : end]) == ["."]
        asked = words(tokens[: end - answer])
        learned.append((answer, "Answer" in asked, asked[-1] if "Answer" in asked else "NAME"))
    # A code and its full stop; a digit; a word, `=` and a digit; a digit.
    cycle = [(4, False, "NAME"), (2, True, "="), (4, True, ":"), (2, True, "=")]
    assert learned == cycle * (len(rows) // 4)


def test_the_loss_is_that_of_the_answer_alone() -> None:
    torch.manual_seed(0)
    model = HouseModel(HouseConfig.of_size("S", len(LEXICON.vocabulary)))
    document = end_with(random_needles(HOUSE, 40, 1, np.random.default_rng(0), LEXICON), "at_once", LEXICON)
    labels = torch.full_like(document, NO_LABEL)
    labels[:, -2:] = document[:, -2:]
    expected = -model(document[:, :-1]).log_softmax(dim=-1)[0, [-2, -1], document[0, -2:]].mean()
    for filling in (0, 7):
        padded = torch.nn.functional.pad(document, (0, filling))
        padded_labels = torch.nn.functional.pad(labels, (0, filling), value=NO_LABEL)
        assert torch.allclose(answer_loss(model, (padded, padded_labels), None)["loss"], expected)


def test_training_lowers_the_loss_and_is_the_same_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = HouseModel(HouseConfig.of_size("S", len(LEXICON.vocabulary)))
    task = validate(TwoSteps, TASK | {"steps_per_epoch": 10}, "here")
    fresh = Documents(HOUSE, task, LEXICON)
    torch.manual_seed(1)
    batch = tuple(torch.stack(part) for part in zip(*(fresh[index] for index in range(40)), strict=True))
    states = []
    for run in ("one", "two"):
        model = HouseModel(start.config)
        model.load_state_dict(start.state_dict())
        before = float(answer_loss(model, batch, None)["loss"].detach())
        fit(model, fresh, answer_loss, task, directory=tmp_path / run, seed=3)
        assert float(answer_loss(model, batch, None)["loss"].detach()) < before - 0.05
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(("kind", "length"), [("scene", 1), ("at_once", 1), ("in_steps", 3)])
def test_of_an_answer_the_last_token_is_judged(kind: str, length: int, tmp_path: Path) -> None:
    """Whatever is written before the digit; of two answers one is right."""
    stage = Stage(
        tmp_path, "mask", "tiny", validate(Params, {"seeds": [0], "house": {"size": "S", "models": MODELS}}, "")
    )
    _save(stage.data_dir / f"{kind}-seed0.npz", {"0/tokens": np.array([[1, 2], [3, 4]]), "0/answer": np.array([5, 6])})
    asked = []

    class Scripted:
        device = torch.device("cpu")

        def prefill(self, tokens: torch.Tensor) -> None:
            assert tokens.tolist() == [[1], [3]]

        def generate(self, tokens: torch.Tensor, count: int, hooks: object, past: object) -> SimpleNamespace:
            asked.append(count)
            return SimpleNamespace(tokens=torch.tensor([[6] * (count - 1) + [5], [6] * (count - 1) + [5]]))

    subject = Subject("scripted", 0, Scripted(), lambda part: iter([]), torch.tensor([0]), 4, np.arange(9), 2)
    (row,) = prompt_rows(stage, subject, kind, [Condition("unmasked", "uniform")])
    assert asked == [length]
    assert (row["accuracy"], row["tests"]) == (0.5, 2)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two_steps is for one that goes on from it"):
        validate(House, {"size": "S", "models": MODELS[::-1]}, "here")
    params = validate(Params, {"seeds": [0], "house": {"size": "S", "models": MODELS, "stand_in_steps": 1}}, "here")
    with pytest.raises(UserError, match=r"two-steps goes on from skills, and .* holds no trained model"):
        train_two_steps(Stage(tmp_path, "train", "small", params), HOUSE.models[1], 0, lambda *_: None)
