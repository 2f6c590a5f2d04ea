"""Needles in contexts: length, depth, borders of sentences; and files that are missing or damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared.config import UserError
from shared.data.house_lexicon import load_lexicon

from ..config import Grid
from ..data import PUBLISHED, begun_sentences, house_needles, insertion_point, read_published, read_texts

LEXICON = load_lexicon("embedded")
GRID = Grid(lengths=(40,), depths=(0, 50, 100), documents=4)


def words(tokens: object) -> list[str]:
    return [LEXICON.vocabulary[int(token)] for token in tokens]


@pytest.mark.parametrize(("form", "question"), [("plain", "What is the code of"), ("chat", "Tell me the code for")])
def test_a_needle_stands_where_it_should(form: str, question: str) -> None:
    needles = house_needles(GRID, 40, 2, np.random.default_rng(0), LEXICON, form)
    assert needles.tokens.shape == (12, 1 + 40 + 6)
    for row, answer, start, (begin, end), depth in zip(
        needles.tokens, needles.answer, needles.start, needles.needle, needles.depth, strict=True
    ):
        text = words(row)
        name = text[-1]
        assert text[-6:-1] == question.split()
        assert text[begin:end] == ["The", "code", "of", name, *words(answer), "."]
        assert words(row[start : start + 3]) == words(answer)
        assert begin == 1 or text[begin - 1] == "."
        assert text[:41].count("code") == 3
        assert text.count(name) == 2
        if depth in (0, 100):
            assert begin == (1 if depth == 0 else 41 - 8)


def test_an_insertion_point_lies_behind_the_nearest_full_stop() -> None:
    context = np.array([5, 6, 1, 7, 8, 9, 1, 7])
    stop = np.array([1])
    assert [insertion_point(context, depth, stop) for depth in (0, 25, 37.5, 50, 80, 87.5, 100)] == [
        0,
        0,
        3,
        3,
        3,
        7,
        8,
    ]


def test_begun_sentences_may_not_end_yet() -> None:
    for row in begun_sentences(5, np.random.default_rng(0), LEXICON):
        text = words(row)
        assert text[0] == "<bos>"
        assert text[-4] == "."
        assert all(word.startswith("f") for word in text[-3:])


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(UserError, match="make it 32 tokens at least"):
        house_needles(GRID, 20, 2, np.random.default_rng(0), LEXICON)


def test_published_scores_must_be_there_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "head_scores.npz"
    with pytest.raises(UserError, match="is missing"):
        read_published(path)
    path.write_bytes(b"not an archive")
    with pytest.raises(UserError, match="not the table"):
        read_published(path)
    np.savez(path, llama_2_7b_80k=np.zeros((2, 2, 3)))
    with pytest.raises(UserError, match="not the table"):
        read_published(path)
    np.savez(path, **{key: np.full((2, 3, 4), -1.0) for key in PUBLISHED})
    with pytest.raises(UserError, match="not negative"):
        read_published(path)
    np.savez(path, **{key: np.arange(24.0).reshape(2, 3, 4) for key in PUBLISHED})
    scores = read_published(path)["yi-6b-200k"]
    assert scores.shape == (4, 2, 3)
    assert scores[1, 0, 2] == 9


def test_texts_must_be_there_and_complete(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        read_texts(tmp_path)
    (tmp_path / "needles.jsonl").write_text('{"needle": "x"}\n')
    with pytest.raises(UserError, match="haystack_part1"):
        read_texts(tmp_path)
