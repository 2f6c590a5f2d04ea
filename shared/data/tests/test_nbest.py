from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.config import UserError
from shared.data.nbest import (
    END,
    PAD,
    SEP,
    START,
    UNK,
    WordVocabulary,
    distinct,
    make_nbest,
    read_nbest,
    split_nbest,
)
from shared.evaluation.transcription import UNKNOWN

FIVE = ["a b", "a c", "a d", "b", "c"]
ENTRIES = [{"nbest": FIVE, "ref": "a b c"}, {"nbest": FIVE[::-1], "ref": "b"}]


def lines_of(entries: list[Any]) -> bytes:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["lists.jsonl", "lists.jsonl.gz", "lists.json"])
@pytest.mark.parametrize("layout", ["lines", "blank lines", "mark", "array", "indented array", "no last line end"])
def test_files_of_all_layouts(tmp_path: Path, name: str, layout: str) -> None:
    content = {
        "lines": lines_of(ENTRIES),
        "blank lines": b"\n \n" + lines_of(ENTRIES).replace(b"\n", b"\r\n\n"),
        "mark": b"\xef\xbb\xbf" + lines_of(ENTRIES),
        "array": json.dumps(ENTRIES).encode(),
        "indented array": json.dumps(ENTRIES, indent=4).encode() + b"\n",
        "no last line end": lines_of(ENTRIES)[:-1],
    }[layout]
    dataset = read_nbest(written(tmp_path / name, content))
    assert dataset.column_names == ["nbest", "reference"]
    assert dataset.to_list() == [{"nbest": entry["nbest"], "reference": entry["ref"]} for entry in ENTRIES]


def test_official_keys(tmp_path: Path) -> None:
    scores = [-0.1, -0.2, -0.3, -1, -2.5]
    entries = [
        {"input": FIVE, "output": "a b", "score": scores},
        {"input1": "a b.", "input2": "a c. a d. b. c.", "output": "a b", "am_score": scores},
        {"input1": "a b", "input2": "a c. a d. b. c. ", "reference": " a b ", "scores": scores, "id": 7},
    ]
    dataset = read_nbest(written(tmp_path / "atis.json", json.dumps(entries).encode()))
    assert dataset.to_list() == [{"nbest": FIVE, "reference": "a b", "scores": scores}] * 3


def test_only_the_best_hypothesis(tmp_path: Path) -> None:
    path = written(tmp_path / "best.json", json.dumps([{"input1": "a b.", "output": "a b"}]).encode())
    assert read_nbest(path, num_hypotheses=1)["nbest"][:] == [["a b"]]


def test_short_lists_are_filled_up_and_full_ones_stay(tmp_path: Path) -> None:
    full, short, long = ["a", "a", "", "b", "c"], ["x", "", "y", "x"], ["p", "p", "q", "r", "", "s", "t", "u"]
    entries = [{"nbest": hypotheses, "ref": "a"} for hypotheses in (full, short, long, [""], ["", ""])]
    dataset = read_nbest(written(tmp_path / "a.jsonl", lines_of(entries)))
    lists = dataset["nbest"][:]
    assert lists[0] == ["a", "a", UNKNOWN, "b", "c"]
    assert lists[1][:2] == ["x", "y"]
    assert set(lists[1]) == {"x", "y"}
    assert lists[2] == ["p", "q", "r", "s", "t"]
    assert lists[3] == lists[4] == [UNKNOWN] * 5
    assert all(len(hypotheses) == 5 for hypotheses in lists)


def test_repeats_are_drawn_from_the_seed_alone() -> None:
    lists = [["x", "y", "z"]] * 40
    first = make_nbest(lists, ["x"] * 40)["nbest"][:]
    assert first == make_nbest(lists, ["x"] * 40)["nbest"][:]
    assert first != make_nbest(lists, ["x"] * 40, seed=1)["nbest"][:]
    repeats = [text for hypotheses in first for text in hypotheses[3:]]
    assert set(repeats) == {"x", "y", "z"}


def test_scores_follow_their_hypotheses() -> None:
    dataset = make_nbest([["x", "", "y", "x"]], ["x"], [[-1.0, -2.0, -3.0, -4.0]])
    score = {"x": -1.0, "y": -3.0}
    assert dataset["scores"][0] == [score[text] for text in dataset["nbest"][0]]


def test_empty_references_stand_for_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", lines_of([{"nbest": FIVE, "ref": " "}]))
    assert read_nbest(path)["reference"][:] == [UNKNOWN]


@pytest.mark.parametrize("reference", [{}, {"ref": None}])
def test_missing_references(tmp_path: Path, reference: dict[str, Any]) -> None:
    path = written(tmp_path / "a.jsonl", lines_of([ENTRIES[0], {"nbest": FIVE, **reference}, ENTRIES[1]]))
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: there is no reference"):
        read_nbest(path)
    with pytest.warns(UserWarning, match="1 entries without a reference left out, the first in line 2"):
        assert len(read_nbest(path, missing_reference="drop")) == 2
    with pytest.raises(UserError, match="error or drop"):
        read_nbest(path, missing_reference="ignore")


def with_second(entry: Any) -> bytes:
    return lines_of([ENTRIES[0], entry])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_second("text"), "line 2: expected an object"),
        (with_second([1]), "line 2: expected an object"),
        (with_second({"ref": "a"}), "line 2: there must be a list of hypotheses"),
        (with_second({"input1": 3, "ref": "a"}), "line 2: there must be a list of hypotheses"),
        (with_second({"input1": "a", "input2": ["b"], "output": "a"}), "line 2: there must be a list"),
        (with_second({"nbest": "a b", "ref": "a"}), "line 2: nbest must be a list"),
        (with_second({"nbest": [], "ref": "a"}), "line 2: nbest must be a list of at least one"),
        (with_second({"input": ["a", None], "ref": "a"}), "line 2: input must be text, not None"),
        (with_second({"nbest": FIVE, "ref": 5}), "line 2: ref must be text, not 5"),
        (with_second({"nbest": FIVE, "ref": "a", "score": [1, 2]}), "line 2: score must be 5 finite numbers"),
        (with_second({"nbest": FIVE, "ref": "a", "score": "high"}), "line 2: score must be 5 finite numbers"),
        (with_second({"nbest": FIVE, "ref": "a", "score": [1, 2, 3, 4, True]}), "line 2: score must be 5 finite"),
        (with_second({"nbest": FIVE, "ref": "a", "score": [1, 2, 3, 4, 10**400]}), "line 2: score must be 5 finite"),
        (with_second({"nbest": FIVE, "ref": "a", "score": [1, 2, 3, 4, float("nan")]}), "line 2: score must be 5"),
        (with_second({"nbest": FIVE, "ref": "a", "score": [1] * 5}), "line 1: there are no scores"),
        (lines_of(ENTRIES) + b'{"nbest": ["a"', "line 3 is not JSON"),
        (lines_of(ENTRIES) + lines_of(ENTRIES)[:-1].replace(b"\n", b" "), "line 3 is not JSON: there is more"),
        (lines_of(ENTRIES) + b"[" * 200_000, "line 3 is not JSON"),
        (lines_of(ENTRIES) + b'{"nbest": ["\xff"]}', "line 3 is not UTF-8"),
        (with_second({"nbest": FIVE, "ref": "x"}).replace(b'"x"', b'"\\ud800"'), "line 2: ref holds half"),
        (lines_of(ENTRIES) + b'{"nbest": ["' + b"x" * (1 << 20) + b'"]}', "line 3 is longer than 1,048,576 bytes"),
        (b"", "holds no list"),
        (b"\n\n", "holds no list"),
        (b"[]", "holds no list"),
        (b"[" * 200_000, "line 1 is not JSON"),
        (b"[\n" + json.dumps(ENTRIES[0]).encode() + b",\n3]", "line 3: expected an object"),
        (b"[\n\n" + json.dumps(ENTRIES[0], indent=1).encode() + b",\n{x}]", "line 13 is not JSON"),
        (b"[\n" + json.dumps(ENTRIES[0]).encode() + b",\n", "line 3: the array has no end"),
        (b"[" + json.dumps(ENTRIES[0]).encode() + b"\n" + json.dumps(ENTRIES[0]).encode() + b"]", "there is no comma"),
        (b"[" + json.dumps(ENTRIES[0]).encode() + b",,\n]", "line 1 is not JSON"),
        (b"[" + json.dumps(ENTRIES[0]).encode() + b",\n]", "line 2 is not JSON"),
        (b"[\n" + json.dumps(ENTRIES[0]).encode() + b"\n] {}", "line 3: there is more behind the array"),
        (b'[\n\n{"nbest": ["\xff"]}]', "line 3 is not UTF-8"),
        (b'[\n{"nbest": ["' + b"x" * (1 << 20) + b'"]}]', "line 2 is longer than"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = written(tmp_path / "lists.jsonl", content)
    with pytest.raises(UserError, match=r"lists\.jsonl") as caught:
        read_nbest(path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        read_nbest(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_nbest(tmp_path)
    packed = gzip.compress(lines_of(ENTRIES * 500))
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "plain.jsonl.gz").write_bytes(lines_of(ENTRIES))
    for name in ("cut", "plain"):
        with pytest.raises(UserError, match=rf"{name}\.jsonl\.gz cannot be read behind line \d"):
            read_nbest(tmp_path / f"{name}.jsonl.gz")


def test_clear_errors_of_lists() -> None:
    with pytest.raises(UserError, match=r"lists \(2\) as references \(1\)"):
        make_nbest([["a"], ["b"]], ["a"])
    with pytest.raises(UserError, match="at least one"):
        make_nbest([], [])
    with pytest.raises(UserError, match="list 1: hypotheses must be a list"):
        make_nbest([["a"], "b"], ["a", "b"])
    with pytest.raises(UserError, match="list 0: scores must be 1 finite"):
        make_nbest([["a"]], ["a"], [[1.0, 2.0]])
    with pytest.raises(UserError, match="num_hypotheses cannot be 0"):
        make_nbest([["a"]], ["a"], num_hypotheses=0)


def test_distinct_keeps_the_order() -> None:
    assert distinct(["b", "a", "b", "c", "a"]) == ["b", "a", "c"]


def test_splits() -> None:
    dataset = make_nbest([[f"w{number}"] for number in range(101)], ["a"] * 101, num_hypotheses=1)
    splits = split_nbest(dataset)
    parts = [[row[0] for row in splits[name]["nbest"]] for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [71, 10, 20]
    assert sorted(parts[0] + parts[1] + parts[2]) == sorted(row[0] for row in dataset["nbest"])
    assert parts[0] != sorted(parts[0])
    again, other = split_nbest(dataset), split_nbest(dataset, seed=1)
    assert again["test"].to_list() == splits["test"].to_list() != other["test"].to_list()
    with pytest.raises(UserError, match="nothing is left for validation"):
        split_nbest(dataset.select(range(3)))
    with pytest.raises(UserError, match="add up to 1"):
        split_nbest(dataset, (0.5, 0.2, 0.2))


def test_vocabulary() -> None:
    vocabulary = WordVocabulary.build(["b a a", "c b a <unk>", "d"], max_size=3)
    assert vocabulary.words[5:] == ["a", "b", "c"]
    assert WordVocabulary.build(["b a a", "c b a"], min_count=2).words[5:] == ["a", "b"]
    assert vocabulary.encode("a z c") == [5, UNK, 7]
    assert vocabulary.decode([START, 5, SEP, 8, PAD, END, 6], extra=["z"]) == "a z"
    with pytest.raises(UserError, match="number 8 is neither"):
        vocabulary.decode([8])
    for words in (["a", "b", "a"], ["<pad>"]):
        with pytest.raises(UserError, match="twice"):
            WordVocabulary(words)


def test_encoded_lists_by_hand() -> None:
    vocabulary = WordVocabulary(["a", "b"])  # 5, 6
    encoded = vocabulary.encode_nbest([["a x", "y b"], ["b"], [""]], ["a y z", "b", "x"])
    assert encoded.source.tolist() == [[5, 7, SEP, 8, 6], [6, PAD, PAD, PAD, PAD], [PAD] * 5]
    assert encoded.ranks.tolist() == [[1, 1, 1, 2, 2], [1, 0, 0, 0, 0], [0] * 5]
    assert encoded.positions.tolist() == [[0, 1, 2, 0, 1], [0] * 5, [0] * 5]
    assert encoded.extra == [["x", "y"], [], []]
    assert encoded.target is not None
    assert encoded.target.tolist() == [
        [START, 5, 8, UNK, END],
        [START, 6, END, PAD, PAD],
        [START, UNK, END, PAD, PAD],
    ]
    assert vocabulary.decode(encoded.target[0].tolist(), encoded.extra[0]) == "a y <unk>"
    assert encoded.source.dtype == encoded.target.dtype == np.int64


def test_encoded_lists_are_cut() -> None:
    vocabulary = WordVocabulary(["a", "b"])
    encoded = vocabulary.encode_nbest([["a x b", "y"]], ["a b a"], max_source=3, max_target=2)
    assert encoded.source.tolist() == [[5, 7, 6]]
    assert encoded.extra == [["x"]]
    assert encoded.target is not None
    assert encoded.target.tolist() == [[START, 5, 6]]
    best = vocabulary.encode_nbest([["a", "b"], ["b", "a"]], num_hypotheses=1)
    assert (best.source.tolist(), best.target) == ([[5], [6]], None)
    with pytest.raises(UserError, match="1 lists, but 2 references"):
        vocabulary.encode_nbest([["a"]], ["a", "b"])
