"""Text in windows, tasks in splits, and what goes wrong with files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.config import Stage, UserError, load_params

from .. import data
from ..config import Params
from ..data import MADData, MQARData, TextData, load, prepare, read_text, split_text, task_data, text_data

FOLDER = Path(__file__).parents[1]
COUNTS = {"num_train": 6, "num_validation": 3, "num_test": 4}


@pytest.fixture
def novel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextData:
    """A text of 400 characters in two files of a data root of its own."""
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "root"))
    folder = tmp_path / "root" / "novel"
    folder.mkdir(parents=True)
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": "defg" * 50}) + "\n")
    (folder / "a.jsonl").write_text(json.dumps({"text": "abc" * 33}) + "\n\n" + json.dumps({"text": "é" * 97}) + "\n")
    return TextData(kind="text", corpus="a novel", data_folder="novel", length=4, long_length=8)


def test_documents_are_read_in_the_order_of_their_files(novel: TextData) -> None:
    assert read_text(novel, "mine") == "\n\n".join(["abc" * 33, "é" * 97, "defg" * 50])


def test_a_text_is_divided_in_its_order() -> None:
    text = "".join(map(chr, range(33, 133)))
    parts = split_text(text)
    assert "".join(parts.values()) == text
    assert [len(part) for part in parts.values()] == [90, 5, 5]


def test_windows_of_text(novel: TextData) -> None:
    arrays, about = text_data(novel, "mine")
    assert about["source"] == "a novel"
    assert about["vocab_size"] == len(set("abcdefg\né"))
    assert about["characters_per_token"] == 1
    characters = sorted(set("abcdefg\né"))
    test = "".join(characters[token] for token in arrays["test"][:, :-1].flatten())
    assert read_text(novel, "mine")[-20:].startswith(test)
    # Each window's last token is the next one's first: every token is predicted once.
    assert (arrays["train"][:-1, -1] == arrays["train"][1:, 0]).all()
    assert arrays["train"].shape == (89, 5)
    assert arrays["long"].shape == (2, 9)


def test_byte_pairs_are_learnt_from_the_training_text(novel: TextData) -> None:
    arrays, about = text_data(novel.model_copy(update={"vocab_size": 261, "length": 2, "long_length": 4}), "mine")
    assert about["vocab_size"] == 261
    # The test text is defg five times over, whose pairs are among the five most frequent.
    num_tokens = 20 / about["characters_per_token"]
    assert 5 <= num_tokens < 20
    assert len(arrays["test"]) == (num_tokens - 1) // 2


def test_text_that_is_missing_or_too_short(novel: TextData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing holds no .*jsonl\.gz: put a novel there"):
        read_text(novel.model_copy(update={"data_folder": "nothing"}), "mine")
    with pytest.raises(UserError, match="tokens do not fill a window of 32"):
        text_data(novel.model_copy(update={"length": 32, "long_length": 64}), "mine")
    (tmp_path / "root" / "novel" / "a.jsonl").write_text('{"content": "abc"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl is not JSON lines with a field 'text'"):
        read_text(novel, "mine")


def test_the_splits_of_a_task_are_its_examples_in_order() -> None:
    settings = MADData(kind="mad", length=16, vocab_size=16, options={"noise_vocab_size": 4}, **COUNTS)
    splits, about = task_data("noisy_recall", settings, seed=0)
    assert {name: split.shape for name, split in splits.items()} == {
        "train": (2, 6, 16),
        "validation": (2, 3, 16),
        "test": (2, 4, 16),
    }
    assert about["vocab_size"] == 16
    assert len(np.unique(np.concatenate([split[0] for split in splits.values()]), axis=0)) == 13
    again = task_data("noisy_recall", settings, seed=0)[0]
    other = task_data("noisy_recall", settings, seed=1)[0]
    assert (again["test"] == splits["test"]).all()
    assert (other["test"] != splits["test"]).any()


def test_facts_to_memorize_are_the_same_in_training_and_test() -> None:
    settings = MADData(kind="mad", length=32, vocab_size=9, **COUNTS)
    splits, _ = task_data("memorize", settings, seed=0)
    facts = [{(int(k), int(v)) for k, v in zip(s[0, :, 0::2].flat, s[1, :, 1::2].flat, strict=True)}
             for s in splits.values()]  # fmt: skip
    assert facts[0] == facts[1] == facts[2]
    assert len(facts[0]) == 4


def test_keys_are_bound_anew_where_the_settings_say_so() -> None:
    settings = MQARData(kind="mqar", length=24, num_pairs=3, vocab_size=32, **COUNTS)
    plain = task_data("mqar", settings, seed=0)[0]["train"]
    again = task_data("overwrite", settings.model_copy(update={"num_overwritten": 2}), seed=0)[0]["train"]
    assert (plain[1] != -100).sum() == (again[1] != -100).sum() == 6 * 3
    assert (again[1, :, :10] == -100).all()


# --- Prepared files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stage(tmp_path: Path) -> Stage[Params]:
    params = load_params(FOLDER / "params.yaml", Params, "tiny")[1]
    chosen = {name: params.experiments[name] for name in ("mqar", "memorize")}
    return Stage(tmp_path, "prepare", "tiny", params.model_copy(update={"experiments": chosen}))


def test_what_was_prepared_can_be_loaded(stage: Stage[Params]) -> None:
    prepare(stage)
    assert sorted(path.name for path in stage.data_dir.iterdir()) == ["memorize", "mqar"]
    inputs, labels = load(stage.data_dir, "mqar", "train")
    settings = stage.params.experiments["mqar"].data
    expected = task_data("mqar", settings, stage.params.seed)[0]["train"]
    assert inputs.dtype == torch.int32
    assert (inputs.numpy() == expected[0]).all()
    assert (labels.numpy() == expected[1]).all()
    digests = {name: data.about(stage.data_dir, name)["digest"] for name in ("mqar", "memorize")}
    prepare(stage)
    assert {name: data.about(stage.data_dir, name)["digest"] for name in ("mqar", "memorize")} == digests
    assert digests["mqar"] != digests["memorize"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "pickle"])
def test_damaged_files_are_named(stage: Stage[Params], damage: str) -> None:
    prepare(stage)
    path = stage.data_dir / "mqar" / "test.npy"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    else:
        np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"mqar/test\.npy .*reprise run prepare"):
        load(stage.data_dir, "mqar", "test")


def test_data_that_was_not_prepared(stage: Stage[Params]) -> None:
    with pytest.raises(UserError, match="mqar has not been prepared"):
        data.about(stage.data_dir, "mqar")


@pytest.mark.parametrize("length", [100, 128, 64])
def test_long_windows_are_longer(length: int) -> None:
    with pytest.raises(ValueError, match="long_length"):
        TextData(kind="text", length=128, long_length=length)
