"""Tests of abilities, held against models that know everything or always say the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.config import UserError
from shared.data.house_corpora import Documents, held_out
from shared.data.house_lexicon import Lexicon, load_lexicon
from shared.evaluation import abilities
from shared.evaluation.abilities import (
    ABILITIES,
    TOGETHER,
    Bigram,
    ability_rows,
    gate_rows,
    gated,
    language_rows,
    measure,
    measure_language,
    ngram_loss,
    read_gates,
    write_gates,
)

COUNT = 60


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return load_lexicon("embedded")


def oracle(name: str, lexicon: Lexicon, count: int = COUNT, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A model that knows the very documents of a test by heart."""
    known = abilities.draw_documents(ABILITIES[name], count, lexicon, seed).tokens.clip(min=0)
    place = 0

    def predict(tokens: Tensor) -> Tensor:
        nonlocal place
        rows = torch.from_numpy(known[place : place + len(tokens)]).long()
        place += len(tokens)
        assert torch.equal(rows[:, :-1], tokens)
        return torch.nn.functional.one_hot(rows[:, 1:], len(lexicon.vocabulary)).float()

    return predict


def constant(word: str, lexicon: Lexicon) -> Callable[[Tensor], Tensor]:
    """A model that always says the same."""
    row = torch.zeros(len(lexicon.vocabulary))
    row[lexicon.number[word]] = 50.0
    return lambda tokens: row.expand(*tokens.shape, -1)


@pytest.mark.parametrize("name", ABILITIES)
def test_an_oracle_has_every_ability(name: str, lexicon: Lexicon) -> None:
    assert measure(oracle(name, lexicon), name, lexicon, count=COUNT)["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("name", "word", "expected"),
    [("needle_3", "c7", 0.0), ("ioi", "Alpha", 1 / 99), ("label_binding", "A", 1 / 4), ("boolean_1", "True", 1 / 2)],
)
def test_a_constant_has_what_chance_gives(name: str, word: str, expected: float, lexicon: Lexicon) -> None:
    value = measure(constant(word, lexicon), name, lexicon, count=400)["accuracy"]
    assert abs(value - expected) < 0.08


def test_only_documents_of_the_case_are_tested(lexicon: Lexicon) -> None:
    for facts in (1, 3):
        documents = abilities.draw_documents(ABILITIES[f"needle_{facts}"], COUNT, lexicon, 0)
        assert len(documents) == COUNT
        assert (documents.details["facts"] == facts).all()
    assert (abilities.draw_documents(ABILITIES["sum_6"], COUNT, lexicon, 0).details["terms"] == 6).all()


def test_a_code_is_right_only_as_a_whole(lexicon: Lexicon) -> None:
    perfect = oracle("needle_3", lexicon)

    def forgets_one_word(tokens: Tensor) -> Tensor:
        logits = perfect(tokens)
        return logits * (torch.arange(logits.shape[-1]) != lexicon.number["c0"])

    value = measure(forgets_one_word, "needle_3", lexicon, count=COUNT)["accuracy"]
    documents = abilities.draw_documents(ABILITIES["needle_3"], COUNT, lexicon, 0)
    codes = documents.tokens[documents.answers].reshape(COUNT, 3)
    assert value == np.mean((codes != lexicon.number["c0"]).all(axis=1)) < 1


@pytest.mark.parametrize("name", TOGETHER)
def test_of_several_abilities_the_weakest_counts(name: str, lexicon: Lexicon) -> None:
    def copies(tokens: Tensor) -> Tensor:
        """Says what followed the last time; a text that has not come before goes on with its first word."""
        logits = torch.zeros(*tokens.shape, len(lexicon.vocabulary))
        for row, text in enumerate(tokens.tolist()):
            after: dict[int, int] = {}
            for place, token in enumerate(text):
                if place:
                    after[text[place - 1]] = token
                logits[row, place, after.get(token, text[0])] = 1
        return logits

    values = {each: measure(copies, each, lexicon, count=40)["accuracy"] for each in TOGETHER[name]}
    assert values["induction"] > 0.9
    assert measure(copies, name, lexicon, count=40) == {"accuracy": min(values.values())}


def test_models_that_should_not_have_colors_are_not_asked_for_them() -> None:
    assert set(TOGETHER["skills"]) - set(TOGETHER["skills_but_colors"]) == {"colored_objects"}


def test_the_official_form_is_asked_after_its_example(lexicon: Lexicon) -> None:
    documents = abilities.draw_documents(ABILITIES["colored_objects_official"], COUNT, lexicon, 0)
    assert (documents.answers.sum(axis=1) == 1).all()
    lengths = (documents.tokens >= 0).sum(axis=1)
    assert (documents.answers.argmax(axis=1) == lengths - 1).all()


@pytest.mark.parametrize(
    ("name", "out"), [("colored_objects_official", False), ("colored_objects_official_held_out", True)]
)
def test_the_official_form_asks_for_pairs_as_in_training_or_for_held_out_ones(
    name: str, out: bool, lexicon: Lexicon
) -> None:
    documents = abilities.draw_documents(ABILITIES[name], COUNT, lexicon, 0)
    rows, places = np.arange(COUNT), documents.answers.argmax(axis=1)
    # … What color is the THING ? A : COLOR
    things = [lexicon.things.index(lexicon.vocabulary[token]) for token in documents.tokens[rows, places - 4]]
    colors = [lexicon.colors.index(lexicon.vocabulary[token].lower()) for token in documents.tokens[rows, places]]
    assert (held_out(np.array(things), np.array(colors)) == out).all()


def test_the_logit_difference_is_that_of_the_two_names(lexicon: Lexicon) -> None:
    weights = torch.arange(len(lexicon.vocabulary)).float()
    documents = abilities.draw_documents(ABILITIES["ioi"], COUNT, lexicon, 3)
    expected = np.mean(documents.details["indirect_object"] - documents.details["subject"])
    values = measure(lambda tokens: weights.expand(*tokens.shape, -1), "ioi", lexicon, count=COUNT, seed=3)
    assert values["logit_difference"] == pytest.approx(expected)


def test_the_last_year_is_always_later_but_the_mass_tells(lexicon: Lexicon) -> None:
    """The accuracy cannot tell a comparison from the habit of saying 99; equal shares for all years can be computed."""
    always = measure(constant("99", lexicon), "greater_than", lexicon, count=COUNT)
    assert always["accuracy"] == 1.0
    years = torch.full((len(lexicon.vocabulary),), -math.inf)
    years[lexicon.encode([f"{i:02d}" for i in range(100)])] = 0.0
    even = measure(lambda tokens: years.expand(*tokens.shape, -1), "greater_than", lexicon, count=COUNT)
    begin = abilities.draw_documents(ABILITIES["greater_than"], COUNT, lexicon, 0).details["begin"]
    assert even["probability_difference"] == pytest.approx(np.mean(2 * (99 - begin) / 100 - 1))


def test_a_word_that_is_no_year_is_wrong(lexicon: Lexicon) -> None:
    values = measure(constant("The", lexicon), "greater_than", lexicon, count=COUNT)
    assert values["accuracy"] == 0.0
    assert values["probability_difference"] == pytest.approx(-1)


# ------------------------------------------------------------------------------------------------------------ n-grams


def test_bigram_counts_by_hand() -> None:
    model = Bigram([0, 1, 0, 1, 0, 2], vocab_size=3, add=0.5)
    # After 0 came 1 twice and 2 once.
    expected = torch.tensor([0.5, 2.5, 1.5]) / 4.5
    torch.testing.assert_close(model(torch.tensor([[0]]))[0, 0].exp(), expected)
    torch.testing.assert_close(model(torch.tensor([[2]]))[0, 0].exp(), torch.full((3,), 1 / 3))


def test_ngram_loss_by_hand() -> None:
    train = [0, 1, 0, 1, 0, 2]
    assert ngram_loss(train, [0, 1], 2, 3, add=0.5) == pytest.approx(-math.log(2.5 / 4.5))
    # The context (0, 1) came twice, followed by 0 both times; (2, 2) never.
    assert ngram_loss(train, [0, 1, 0], 3, 3, add=1.0) == pytest.approx(-math.log(3 / 5))
    assert ngram_loss(train, [2, 2, 0], 3, 3, add=1.0) == pytest.approx(math.log(3))


def test_language_is_measured_beside_ngrams() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.integers(5, size=(2, 4000))
    bigram = measure_language(Bigram(train, 5, 0.1), train, test, 5, length=16, count=50)
    assert bigram["loss"] == pytest.approx(bigram["bigram_loss"], abs=1e-3)
    assert bigram["bigram_correlation"] > 0.99
    assert bigram["loss"] == pytest.approx(math.log(5), abs=0.02)
    rows = {row["metric"]: row for row in language_rows(bigram)}
    assert rows["bigram_correlation"]["passed"] is False
    assert rows["loss"]["bigram"] == bigram["bigram_loss"]
    assert rows["loss"]["passed"] is None
    with pytest.raises(UserError, match="fewer than one window"):
        measure_language(Bigram(train, 5), train, test[:10], 5, length=16)


# ------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("value", "low", "high", "passed"),
    [(0.9, 0.9, None, True), (0.89, 0.9, None, False), (0.5, 0.3, 0.4, False), (0.5, None, None, None)],
)
def test_gates(value: float, low: float | None, high: float | None, passed: bool | None) -> None:
    assert gated({"value": value, "at_least": low, "at_most": high})["passed"] is passed


def test_tables_become_scores(tmp_path: Path, lexicon: Lexicon) -> None:
    bigram = Bigram(np.zeros(2), len(lexicon.vocabulary))
    rows = ability_rows(oracle("ioi", lexicon), bigram, ["ioi"], lexicon, count=COUNT)
    assert [row["metric"] for row in rows] == ["accuracy", "logit_difference"]
    identity = {"mixture": "skills", "size": "S", "seed": 2}
    write_gates(tmp_path / "gates.csv", [identity | row for row in rows])
    assert [row["passed"] for row in read_gates(tmp_path)] == [True, None]
    scores = gate_rows(tmp_path)
    assert {"model": "skills/S", "dataset": "gate/ioi", "metric": "accuracy", "seed": 2, "value": 1.0} in scores
    assert {"model": "chance", "dataset": "gate/ioi", "metric": "accuracy", "seed": 2, "value": 0.5} in scores
    assert {row["model"] for row in gate_rows(tmp_path, model="mine")} == {"mine", "bigram", "chance"}


def test_mistakes_are_named(tmp_path: Path, lexicon: Lexicon) -> None:
    with pytest.raises(UserError, match="did you mean 'ioi'"):
        measure(constant("A", lexicon), "io", lexicon)
    with pytest.raises(UserError, match="not the folder of a house model"):
        gate_rows(tmp_path)
    (tmp_path / "gates.csv").write_text("mixture,size\nskills,S\n")
    with pytest.raises(UserError, match="is damaged"):
        gate_rows(tmp_path)


def test_documents_are_fresh_for_each_seed(lexicon: Lexicon) -> None:
    def draw(seed: int) -> Documents:
        return abilities.draw_documents(ABILITIES["needle_3"], COUNT, lexicon, seed)

    np.testing.assert_array_equal(draw(0).tokens, draw(0).tokens)
    assert draw(0).tokens.shape != draw(1).tokens.shape or (draw(0).tokens != draw(1).tokens).any()
