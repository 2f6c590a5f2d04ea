"""Rows that share a sequence lose and answer what they would alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.config import UserError
from shared.evaluation.language import IGNORED

from ..config import LanguageModel, PromptSettings
from ..model import answer_loss
from ..prompts import write_answers, write_prompts
from ..tokens import Rows, encode_rows, fill_packs, load_tokenizer, pack_rows, packed_mask
from .helpers import people, random_tokens, small_model, tokenizer_of


def tables(count: int = 3) -> list[Rows]:
    rng = np.random.default_rng(1)
    return [
        Rows(
            random_tokens(rng, 0, 6),
            [random_tokens(rng, 2, 9) for _ in range(7)],
            [[*random_tokens(rng, 1, 4), 0] for _ in range(7)],
        )
        for _ in range(count)
    ]


def losses_alone(model: object, rows: Rows) -> list[float]:
    """Negative log-probabilities of all tokens of answers, each row by itself."""
    losses: list[float] = []
    for prompt, answer in zip(rows.whole(), rows.answers, strict=True):
        tokens = torch.tensor([prompt + answer])
        logits = model(input_ids=tokens[:, :-1]).logits[0].log_softmax(-1)
        of_targets = logits[torch.arange(tokens.shape[1] - 1), tokens[0, 1:]]
        losses += (-of_targets[len(prompt) - 1 :]).tolist()
    return losses


@pytest.mark.parametrize("rows_per_prefix", [1, 3, 8])
@torch.no_grad()
def test_the_loss_of_packs_is_that_of_one_row_a_sequence(rows_per_prefix: int) -> None:
    model, rows = small_model(), tables()
    packs = pack_rows(rows, 48, rows_per_prefix, 1, 0)
    expected = np.mean([loss for each in rows for loss in losses_alone(model, each)])
    assert answer_loss(model, tuple(vars(packs).values())).item() == pytest.approx(expected, rel=1e-5)


def test_every_answer_is_a_target_once_and_nothing_else_is() -> None:
    rows = tables()
    packs = pack_rows(rows, 48, 4, 1, 0)
    targets = packs.targets[packs.targets != IGNORED]
    expected = sorted(token for each in rows for answer in each.answers for token in answer)
    assert sorted(targets.tolist()) == expected
    # What is read there is the end of a prompt or an answer that goes on.
    assert (packs.members[packs.targets != IGNORED] > 0).all()


def test_the_mask_by_hand() -> None:
    """Two groups: a prefix of one token with rows of two and one, a row without prefix; then padding."""
    groups = torch.tensor([[0, 0, 0, 0, 1, -1]])
    members = torch.tensor([[0, 1, 1, 2, 1, 0]])
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert packed_mask(groups, members)[0, 0].int().tolist() == expected


def test_packs_are_full() -> None:
    rng = np.random.default_rng(0)
    rows = [Rows(random_tokens(rng, 10, 60), [random_tokens(rng, 20, 60)] * 40, [[2, 3, 0]] * 40) for _ in range(10)]
    assert pack_rows(rows, 384, 8, 1, 0).padding < 0.15
    assert pack_rows(rows, 384, 1, 1, 0).padding < 0.15


def test_packs_hold_every_row_once_within_their_limits() -> None:
    rng = np.random.default_rng(0)
    prefixes = [7, 0, 30]
    rows = [rng.integers(1, 25, 40).tolist() for _ in prefixes]
    packs = fill_packs(prefixes, rows, 64, 4, rng)
    found = sorted((table, row) for pack in packs for table, chosen in pack for row in chosen)
    assert found == [(table, row) for table in range(3) for row in range(40)]
    for pack in packs:
        assert sum(prefixes[table] + sum(rows[table][row] for row in chosen) for table, chosen in pack) <= 64
        assert all(1 <= len(chosen) <= 4 for _, chosen in pack)


def test_rows_that_fit_no_pack() -> None:
    with pytest.raises(UserError, match=r"a row of 25 tokens does not fit into packs of 20"):
        pack_rows([Rows([2] * 10, [[3] * 13], [[4, 5, 0]])], 20, 1, 1, 0)
    with pytest.raises(UserError, match="no rows to pack"):
        pack_rows([], 20, 1, 1, 0)


# --- The context ------------------------------------------------------------------------------------------------------


def encoded(context: int, overlong: str, **settings: object) -> Rows:
    table = people(8)
    parts = write_prompts(table, ("low", "high"), PromptSettings(wording="compact"), heavy=True)
    tokenizer = tokenizer_of([parts.whole(row) for row in range(8)])
    answers = write_answers(np.tile([0.25, 0.75], (8, 1)))
    return encode_rows(tokenizer, parts, answers, context, overlong)


def test_what_fits_is_left_as_it_is() -> None:
    rows = encoded(512, "trim")
    assert rows.overlong == 0
    assert rows.whole() == encoded(512, "cut").whole()


def test_overlong_rows_lose_features_but_no_answer() -> None:
    whole, rows = encoded(512, "trim"), encoded(80, "trim")
    assert rows.overlong == 8
    assert rows.answers == whole.answers
    assert all(len(p) + len(a) <= 80 for p, a in zip(rows.whole(), rows.answers, strict=True))
    # The list of classes and "Answer:" stay too.
    assert all(a[-8:] == b[-8:] for a, b in zip(rows.prompts, whole.prompts, strict=True))


def test_published_cutting_loses_the_answer() -> None:
    rows = encoded(80, "cut")
    assert rows.overlong == 8
    assert all(not answer for answer in rows.answers)
    packs = pack_rows([rows], 80, 1, 1, 0)
    assert (packs.targets == IGNORED).all()


def test_too_many_classes_for_the_context() -> None:
    table = people(4)
    names = tuple(f"class name {number}" for number in range(60))
    parts = write_prompts(table, names, PromptSettings(), heavy=False)
    tokenizer = tokenizer_of([parts.whole(0)])
    with pytest.raises(UserError, match=r"too many classes; raise language\.context"):
        encode_rows(tokenizer, parts, [], 256, "trim", 100)


# --- Tokenizer --------------------------------------------------------------------------------------------------------


def test_any_text_is_encoded_and_decoded() -> None:
    tokenizer = tokenizer_of(["age is 23; class 0: 0.83"] * 3)
    texts = ["age is 104.25; größe: 中文 🙂", " class 0: 0.17; class 1: 0.83."]
    assert tokenizer.decode(tokenizer.encode(texts)) == texts


def test_a_columns_name_is_one_token_and_never_its_value() -> None:
    tokenizer = tokenizer_of(["age is 23; job title is clerk", "age is 23; job title is cook"] * 50)
    pieces = [tokenizer.decode([[token]])[0] for token in tokenizer.encode(["age is 23; job title is clerk"])[0]]
    assert pieces == ["age is ", "2", "3", "; job title is ", "clerk"]


def test_digits_are_tokens_of_their_own() -> None:
    tokenizer = tokenizer_of(["1234 1234 1234 1234"] * 9)
    assert [tokenizer.decode([[token]])[0] for token in tokenizer.encode(["1234"])[0]] == list("1234")


def test_a_tokenizer_that_is_missing(tmp_path: object) -> None:
    with pytest.raises(UserError, match="run the stage prepare again"):
        load_tokenizer(LanguageModel(), tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"language\.pretrained: no tokenizer at"):
        load_tokenizer(LanguageModel(pretrained=str(tmp_path / "gpt2")), tmp_path)
