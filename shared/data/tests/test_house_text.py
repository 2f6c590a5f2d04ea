"""Running text of the house language models: words, vocabulary, held-out parts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from shared.config import UserError
from shared.data import house_text
from shared.data.house_text import load_words, split_words


def test_words_are_lower_case_and_punctuation_stands_alone() -> None:
    assert split_words("“Don’t!” cried 2 <unk> Dr. B.") == [
        '"',
        "don't",
        "!",
        '"',
        "cried",
        "2",
        "<unk>",
        "dr",
        ".",
        "b",
        ".",
    ]


def test_the_vocabulary_is_the_most_frequent_words(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (["the cat and the dog", "the <unk> and a"], {"later": ["a cat sat"]})
    monkeypatch.setitem(house_text.CORPORA, "python", ("generated: a test", lambda: parts))
    corpus = load_words("python", 5)
    # "the" three times, "and" twice, then the first of those that occur once; <unk> of the source is no word.
    assert corpus.vocabulary == ("<bos>", "<unk>", "the", "and", "a")
    assert corpus.train.tolist() == [0, 2, 1, 3, 2, 1, 0, 2, 1, 3, 4]
    assert corpus.test["later"].tolist() == [0, 4, 1, 1]


def test_python_documentation_is_at_hand() -> None:
    corpus = load_words("python", 512)
    assert len(corpus.vocabulary) == 512
    # More than the topics of help() alone have, which are a tenth of a million.
    assert len(corpus.train) > 300_000
    assert len(corpus.test["python"]) > 20_000
    assert corpus.train.max() < 512
    assert np.mean(corpus.train == 1) < 0.2
    np.testing.assert_array_equal(corpus.train, load_words("python", 512).train)


def test_docstrings_are_those_of_all_modules_but_tests() -> None:
    texts = house_text.module_docstrings()
    (of_json,) = [text for text in texts if text.startswith("JSON (JavaScript Object Notation)")]
    # The module's own, then those of its functions.
    assert "Serialize ``obj`` to a JSON formatted ``str``." in of_json
    # What idlelib/idle_test/test_autocomplete.py begins with.
    assert not any(text.startswith("Test autocomplete") for text in texts)


def test_corpora_are_read_from_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"books\.jsonl is missing.*'python' needs no file"):
        load_words("children", 100)
    news = [f'"{i % 4 + 1}","Title {i}","Story\\number {i}"' for i in range(20)]
    (tmp_path / "coreinfer").mkdir()
    path = tmp_path / "coreinfer" / "ag_news_test.csv.gz"
    path.write_bytes(gzip.compress("\n".join(news).encode()))
    corpus = load_words("agnews", 100)
    told = [corpus.vocabulary[token] for token in corpus.test["news"]]
    # Rows 9 and 19, whose numbers no training row has.
    assert " ".join(told) == "<bos> title <unk> . story number <unk> <bos> title <unk> . story number <unk>"
    assert (corpus.train == 0).sum() == 16
    path.write_bytes(b"not gzip")
    with pytest.raises(UserError, match="cannot be read"):
        load_words("agnews", 100)


def test_the_jungle_book_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    monkeypatch.setattr(house_text, "corpus", lambda name, split: f"articles of {split}")
    folders = {name: tmp_path / "_corpora" / name for name in ("gutenberg_books", "aochildes")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    books = [(236, "children", "mowgli"), (11, "children", "alice"), (1342, "novel", "darcy")]
    lines = [json.dumps({"id": i, "kind": kind, "text": text}) for i, kind, text in books]
    (folders["gutenberg_books"] / "books.jsonl").write_text("\n".join(lines))
    rows = [f"{age}\tB\t{age}\tMother\tlook number {age} ." for age in range(20)]
    head = "age_days\tcorpus\ttranscript_id\tspeaker_role\tutterance"
    (folders["aochildes"] / "utterances.tsv").write_text("\n".join([head, *rows]))
    corpus = load_words("children", 50)
    words = {part: {corpus.vocabulary[t] for t in tokens} for part, tokens in corpus.test.items()}
    assert "alice" in corpus.vocabulary
    assert {"mowgli", "darcy"}.isdisjoint(corpus.vocabulary)
    assert words == {
        "books": {"<bos>", "<unk>"},
        "speech": {"<bos>", "look", "number", "<unk>", "."},
        "articles": {"<bos>", "articles", "of", "<unk>"},
    }


@pytest.mark.parametrize(("name", "size", "message"), [("novels", 10, "choose one of"), ("python", 2, "leave room")])
def test_mistakes_are_named(name: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_words(name, size)  # type: ignore[arg-type]
