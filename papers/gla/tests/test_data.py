"""Text and its splits, examples of recall, and SlimPajama in its official form."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from shared.config import Stage, UserError, load_params
from shared.data.text import python_text

from ..config import Params
from ..data import (
    SPLITS,
    RecallSettings,
    TextSettings,
    load_recall,
    load_text,
    prepare,
    prepare_recall,
    prepare_text,
    split_text,
)

FOLDER = Path(__file__).parents[1]


# --- Text -------------------------------------------------------------------------------------------------------------


def test_splits_are_the_text_in_its_order() -> None:
    text = "".join(chr(97 + index % 26) for index in range(1003))
    parts = split_text(text)
    assert "".join(parts.values()) == text
    assert [len(part) for part in parts.values()] == [902, 50, 51]


def test_the_embedded_text(tmp_path: Path) -> None:
    prepare_text(tmp_path / "language", TextSettings())
    text, original = load_text(tmp_path), python_text()
    assert sum(len(tokens) for tokens in text.tokens.values()) == len(original)
    assert text.vocab_size == len(set(original))
    assert text.characters_per_token == 1
    assert max(tokens.int().max() for tokens in text.tokens.values()) == text.vocab_size - 1


def test_held_out_text_may_be_cut_short(tmp_path: Path) -> None:
    prepare_text(tmp_path / "whole" / "language", TextSettings())
    prepare_text(tmp_path / "short" / "language", TextSettings(num_held_out_tokens=100))
    whole, short = load_text(tmp_path / "whole"), load_text(tmp_path / "short")
    assert short.tokens["test"].tolist() == whole.tokens["test"][:100].tolist()
    assert short.tokens["train"].tolist() == whole.tokens["train"].tolist()


def test_windows_continue_each_other_without_a_copy(tmp_path: Path) -> None:
    prepare_text(tmp_path / "language", TextSettings())
    text = load_text(tmp_path)
    windows = text.windows("test", 10)
    assert windows.shape == ((len(text.tokens["test"]) - 1) // 10, 11)
    assert windows.data_ptr() == text.tokens["test"].data_ptr()
    assert windows[:, -1][:-1].tolist() == windows[1:, 0].tolist()
    with pytest.raises(UserError, match="too few for a window of 10000000"):
        text.windows("test", 10_000_000)


def test_fetched_shakespeare_is_read_plain_or_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    settings = TextSettings(source="tinyshakespeare", data_folder="plays")
    with pytest.raises(UserError, match="missing"):
        prepare_text(tmp_path / "data" / "language", settings)
    (tmp_path / "plays").mkdir()
    for write in (
        lambda path, text: path.with_name(path.name + ".gz").write_bytes(gzip.compress(text.encode())),
        lambda path, text: path.write_text(text),
    ):
        write(tmp_path / "plays" / "tinyshakespeare.txt", "O Romeo, Romeo! " * 20)
        prepare_text(tmp_path / "data" / "language", settings)
        text = load_text(tmp_path / "data")
        assert (text.vocab_size, text.source) == (len(set("O Romeo, Romeo! ")), "tinyshakespeare")


def test_byte_pairs_are_learnt_from_the_training_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    (tmp_path / "gla").mkdir()
    (tmp_path / "gla" / "tinyshakespeare.txt").write_text("to be or not to be, that is the question. " * 100)
    prepare_text(tmp_path / "language", TextSettings(source="tinyshakespeare", vocab_size=300))
    text = load_text(tmp_path)
    assert text.vocab_size <= 300
    assert text.characters_per_token == pytest.approx(210 / len(text.tokens["test"]))
    assert text.characters_per_token > 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "slimpajama"}, "num_tokens goes with source 'slimpajama'"),
        ({"source": "slimpajama", "num_tokens": 5}, "needs num_held_out_tokens"),
        ({"num_tokens": 5}, "num_tokens goes with source 'slimpajama'"),
        ({"source": "slimpajama", "num_tokens": 5, "num_held_out_tokens": 5, "vocab_size": 300}, "its own tokenizer"),
        ({"source": "shakespeare"}, "tinyshakespeare"),
    ],
)
def test_impossible_texts(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TextSettings.model_validate(changes)


# --- SlimPajama -------------------------------------------------------------------------------------------------------

DOCUMENTS = ["a b c", "", "c a d", "b b"]


@pytest.fixture
def slimpajama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as published, three documents in the first, packed, and one in the second; and a tokenizer of words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    root = tmp_path / "gla"
    lines = [json.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}}) + "\n" for text in DOCUMENTS]
    for split in SPLITS:
        folder = root / "slimpajama" / split / "chunk1"
        folder.mkdir(parents=True)
        with pyarrow.output_stream(str(folder / "example_1.jsonl.zst"), compression="zstd") as stream:
            stream.write("".join(lines[:3]).encode())
        (folder / "example_2.jsonl").write_text(lines[3])
    tokenizer = Tokenizer(WordLevel({"</s>": 0, "a": 1, "b": 2, "c": 3, "d": 4}, unk_token="d"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(root / "tokenizer.json"))
    return root


def settings_for(num_tokens: int, num_held_out_tokens: int = 2) -> TextSettings:
    return TextSettings(source="slimpajama", num_tokens=num_tokens, num_held_out_tokens=num_held_out_tokens)


def test_slimpajama_as_published(slimpajama: Path, tmp_path: Path) -> None:
    prepare_text(tmp_path / "language", settings_for(12))
    text = load_text(tmp_path)
    assert text.tokens["train"].tolist() == [1, 2, 3, 0, 0, 3, 1, 4, 0, 2, 2, 0]
    assert text.tokens["test"].tolist() == [1, 2]
    assert text.vocab_size == 5
    # "a b" are three characters in two tokens.
    assert text.characters_per_token == 1.5


def test_too_little_of_slimpajama(slimpajama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train holds 12 tokens, 13 were asked for"):
        prepare_text(tmp_path / "language", settings_for(13))
    assert not list((tmp_path / "language").glob("*.npy"))


def test_missing_and_damaged_files_of_slimpajama(slimpajama: Path, tmp_path: Path) -> None:
    damaged = slimpajama / "slimpajama" / "train" / "chunk1" / "example_1.jsonl.zst"
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(UserError, match=f"{damaged} is damaged"):
        prepare_text(tmp_path / "language", settings_for(12))
    for path in damaged.parent.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"holds no \.jsonl or \.jsonl\.zst files"):
        prepare_text(tmp_path / "language", settings_for(12))
    (slimpajama / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"put the tokenizer of Mistral-7B-v0\.1 there"):
        prepare_text(tmp_path / "language", settings_for(12))


# --- Recall -----------------------------------------------------------------------------------------------------------


def test_examples_of_recall_are_split(tmp_path: Path) -> None:
    settings = RecallSettings(length=16, num_pairs=2, vocab_size=12, num_train=5, num_validation=2, num_test=3)
    prepare_recall(tmp_path / "mqar", settings, seed=0)
    recall = load_recall(tmp_path)
    for split, count in (("train", 5), ("validation", 2), ("test", 3)):
        inputs, labels = recall.examples[split]
        assert inputs.shape == labels.shape == (count, 16)
        for row, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
            pairs = dict(zip(row[0:4:2], row[1:4:2], strict=True))
            asked = {row[place]: answer for place, answer in enumerate(answers) if answer != -100}
            assert asked == pairs
    assert settings.chance == 1 / 6


# --- Files ------------------------------------------------------------------------------------------------------------


def test_preparing_twice_gives_the_same(tmp_path: Path) -> None:
    _, params = load_params(FOLDER / "params.yaml", Params, "tiny")
    digests = []
    for name in ("first", "again"):
        stage = Stage(folder=tmp_path / name, name="prepare", profile="tiny", params=params)
        prepare(stage)
        digests.append((load_text(stage.data_dir).digest, load_recall(stage.data_dir).digest))
    assert digests[0] == digests[1]


def test_missing_and_damaged_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json is missing: run the stage prepare"):
        load_text(tmp_path)
    prepare_text(tmp_path / "language", TextSettings())
    path = tmp_path / "language" / "test.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        load_text(tmp_path)
    np.save(path, np.zeros(3, dtype=np.uint16))
    path.unlink()
    with pytest.raises(UserError, match=r"test\.npy is missing"):
        load_text(tmp_path)
