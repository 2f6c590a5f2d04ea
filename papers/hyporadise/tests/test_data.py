"""General text, real lists in the official formats, splits, and what `prepare` leaves."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from shared.config import UserError, validate

from ..config import LinearTraining, Params, Recorded
from ..data import read_domain
from ..text import books, documentation, sentences_of

TINY = {
    "seeds": [0],
    "domains": {"x": {"lists": "x.jsonl"}},
}


def test_sentences_are_words_without_code() -> None:
    text = "Return the mean of `x.y`, which is a number.\n\nParameters\n----------\n"
    text += "The array_like values don't count. Too short."
    assert sentences_of(text) == ["return the mean of which is a number", "the values don't count"]


def test_documentation_is_general_text() -> None:
    found = documentation(2000)
    assert len(found) == len(set(found)) == 2000
    words = {word for sentence in found for word in sentence.split()}
    assert {"the", "of", "is"} <= words
    assert "denver" not in words


def test_missing_books_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    with pytest.raises(UserError, match="missing"):
        books()


def write(folder: Path, name: str, count: int) -> None:
    rows = [{"nbest": [f"the cat {i}", f"a cat {i}"], "ref": f"the cat {i}"} for i in range(count)]
    with gzip.open(folder / name, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def test_one_file_is_split_and_short_lists_are_padded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    (tmp_path / "hyporadise").mkdir()
    write(tmp_path / "hyporadise", "x.jsonl.gz", 50)
    splits = read_domain(Recorded(lists="x.jsonl"), validate(Params, TINY, "here"))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 35, "validation": 5, "test": 10}
    everything = [text for rows in splits.values() for text in rows["reference"]]
    assert len(set(everything)) == 50
    assert all(len(each) == 5 and len(set(each)) == 2 for each in splits["train"]["nbest"])
    assert splits["test"]["scores"][0] == [0.0] * 5


def test_official_files_are_read_and_training_lists_held_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    (tmp_path / "hyporadise").mkdir()
    for name, count in (("train_x.json", 20), ("test_x.json", 3)):
        rows = [
            {"input": [f"{word} {i}" for word in "abcde"], "output": f"a {i}", "score": [-0.1, -0.2, -0.3, -0.4, -0.5]}
            for i in range(count)
        ]
        (tmp_path / "hyporadise" / name).write_text(json.dumps(rows))
    domain = Recorded(train="train_x.json", test="test_x.json", held_out=4)
    splits = read_domain(domain, validate(Params, TINY, "here"))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 16, "validation": 4, "test": 3}
    assert splits["test"]["scores"][0] == [-0.1, -0.2, -0.3, -0.4, -0.5]
    with pytest.raises(UserError, match="held out"):
        read_domain(domain.model_copy(update={"held_out": 20}), validate(Params, TINY, "here"))


def test_missing_lists_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"x\.jsonl is missing"):
        read_domain(Recorded(lists="x.jsonl"), validate(Params, TINY, "here"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": {}}, "domains"),
        ({"domains": {"x": {"train": "a.json"}}}, "'train' and 'test'"),
        ({"models": ["pointer_generator"]}, "encoder_decoder"),
        ({"models": ["lm_full", "lm_full"]}, "twice"),
        ({"checkpoints": {"t5": {"pretrained": "t5-large", "tuning": "full"}}}, "training"),
        ({"checkpoints": {"t5": {"pretrained": "t5-large", "tuning": "prompted", "demonstrations": [11]}}}, "10"),
        (
            {"domains": {"x": {"train": 1, "validation": 1, "test": 1}}, "general_text": "references"},
            "choose another",
        ),
        ({"beam": 4}, "unknown key"),
    ],
)
def test_mistakes_in_params_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Params, TINY | changes, "here")


def test_the_learning_rate_rises_and_falls_linearly() -> None:
    settings = LinearTraining(epochs=4, batch_size=1, learning_rate=1.0, warmup_epochs=1)
    assert [settings.learning_rate_at(epoch) for epoch in (0, 0.5, 1, 2.5, 4)] == pytest.approx([0, 0.5, 1, 0.5, 0])
