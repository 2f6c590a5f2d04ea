from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.config import UserError, data_root
from shared.data import text
from shared.data.text import BytePairTokenizer, CharacterTokenizer, corpus, python_text, windows

SAMPLE = "To be, or not to be:  that is\n\n\tthe question – naïve 日本 😀\r\nto be to be to be  \n " * 5


# ------------------------------------------------------------------------------------------------- where it comes from


def test_python_text_is_every_topic_in_order() -> None:
    from pydoc_data.topics import topics

    whole = python_text()
    assert whole.startswith(topics["assert"])
    assert whole.endswith(topics["yield"])
    place = 0
    for name in sorted(topics):
        assert whole[place : place + len(topics[name])] == topics[name]
        place += len(topics[name]) + len("\n\n")
    assert place == len(whole) + len("\n\n") > 300_000


@pytest.mark.parametrize("module", [None, type(sys)("topics")])
def test_python_without_its_documentation_is_told(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    if module is not None:
        module.topics = {}
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    with pytest.raises(UserError, match=r"without pydoc_data\.topics.*complete installation"):
        python_text()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], None]:
    """Writes a file under the corpora of an empty data root."""
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))

    def put(name: str, content: bytes) -> None:
        path = tmp_path / "_corpora" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return put


def expect(monkeypatch: pytest.MonkeyPatch, name: str, **contents: bytes) -> None:
    """Makes these contents the official ones of a corpus."""
    files = {f"{stem}.txt": hashlib.sha256(content).hexdigest() for stem, content in contents.items()}
    monkeypatch.setitem(text.CORPORA, name, dataclasses.replace(text.CORPORA[name], files=files))


@pytest.mark.parametrize("packed", [False, True])
def test_shakespeare_is_split_by_characters(write: Callable, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    content = "".join(chr(ord("A") + i % 26) for i in range(199)) + "é"
    expect(monkeypatch, "tinyshakespeare", input=content.encode())
    name = "tinyshakespeare/input.txt"
    write(f"{name}.gz" if packed else name, gzip.compress(content.encode()) if packed else content.encode())
    assert corpus("tinyshakespeare") == content
    assert corpus("tinyshakespeare", "train") == content[:180]
    assert corpus("tinyshakespeare", "validation") == content[180:190]
    assert corpus("tinyshakespeare", "test") == content[190:]


def test_a_papers_own_copy_is_found_first(write: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expect(monkeypatch, "tinyshakespeare", input=b"a play")
    with pytest.raises(UserError, match="run 'reprise data fetch plays', or put the file there"):
        corpus("tinyshakespeare", folder="plays")
    (tmp_path / "plays").mkdir()
    own = tmp_path / "plays" / "tinyshakespeare.txt.gz"
    own.write_bytes(gzip.compress(b"a play"))
    assert corpus("tinyshakespeare", folder="plays") == "a play"
    own.unlink()
    write("tinyshakespeare/input.txt", b"a play")
    assert corpus("tinyshakespeare", folder="plays") == "a play"


def test_wikitext_is_split_by_files(write: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(monkeypatch, "wikitext2", valid=b"one\n", test=b"two\n")
    write("wikitext2_valid_test/valid.txt", b"one\n")
    write("wikitext2_valid_test/test.txt", b"two\n")
    assert corpus("wikitext2", "validation") == "one\n"
    assert corpus("wikitext2", "test") == "two\n"
    assert corpus("wikitext2") == "one\ntwo\n"


def json_lines(documents: list[dict]) -> bytes:
    return "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents).encode()


def test_books_are_split_whole(write: Callable) -> None:
    books = [{"id": number, "text": f"book {number}\u2028end"} for number in (11, 35, 76, 98, 236, 4300)]
    write("gutenberg_books/books.jsonl.gz", gzip.compress(json_lines(books)))
    assert corpus("gutenberg_books", "train") == "book 11\u2028end\n\nbook 76\u2028end"
    assert corpus("gutenberg_books", "test").split("\n\n") == [f"book {number}\u2028end" for number in (35, 98, 236)]
    assert corpus("gutenberg_books", "out_of_domain") == "book 4300\u2028end"
    assert sorted(corpus("gutenberg_books").split("\n\n")) == sorted(book["text"] for book in books)


def test_source_files_are_split_by_a_digest_of_their_path(write: Callable) -> None:
    files = [{"path": f"folder/{index}.py", "text": f"file {index}"} for index in range(200)]
    write("python_source/files.jsonl", json_lines(files))
    parts = {split: corpus("python_source", split).split("\n\n") for split in ("train", "validation", "test")}
    bucket = int(hashlib.sha256(b"folder/7.py").hexdigest(), 16) % 20
    assert "file 7" in parts[{0: "test", 1: "validation"}.get(bucket, "train")]
    assert sorted(itertools.chain(*parts.values())) == sorted(file["text"] for file in files)
    assert len(parts["train"]) == pytest.approx(180, abs=13)


def test_a_missing_corpus_says_where_it_belongs_and_comes_from(write: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        corpus("tinyshakespeare")
    message = str(caught.value)
    assert str(tmp_path / "_corpora" / "tinyshakespeare" / "input.txt") in message
    assert "karpathy/char-rnn" in message
    assert "86c4e6aa9db7c042" in message
    with pytest.raises(UserError, match=r"github\.com/GITenberg"):
        corpus("gutenberg_books")


def test_a_corpus_that_is_not_itself_is_refused(write: Callable) -> None:
    write("tinyshakespeare/input.txt", b"First Citizen: not this one.")
    with pytest.raises(UserError, match=r"input\.txt is not the text it should be: .* expected 86c4e6aa"):
        corpus("tinyshakespeare")
    write("tinyshakespeare/input.txt.gz", gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(UserError, match=r"input\.txt\.gz cannot be read .*fetch it again"):
        corpus("tinyshakespeare")
    write("python_source/files.jsonl", b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        corpus("python_source")


def test_unknown_names_are_told_what_there_is() -> None:
    with pytest.raises(UserError, match="no corpus 'shakespeare'; choose one of tinyshakespeare, wikitext2"):
        corpus("shakespeare")
    with pytest.raises(UserError, match="no split 'train'; choose one of validation, test"):
        corpus("wikitext2", "train")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("tinyshakespeare", [1_003_854, 55_770, 55_770]), ("wikitext2", [1_120_192, 1_255_018])],
)
def test_the_official_files_where_they_are_at_hand(name: str, sizes: list[int]) -> None:
    if not (data_root() / "_corpora" / text.CORPORA[name].folder).is_dir():
        pytest.skip(f"no {name} under the data root")
    assert [len(corpus(name, split)) for split in text.CORPORA[name].splits] == sizes


# -------------------------------------------------------------------------------------------------------------- tokens


def test_characters_are_numbered_by_code_point() -> None:
    tokenizer = CharacterTokenizer.train("banana é")
    assert tokenizer.characters == " abné"
    assert tokenizer.vocab_size == 5
    tokens = tokenizer.encode("né b")
    assert tokens.tolist() == [3, 4, 0, 2]
    assert tokens.dtype == np.int64
    assert CharacterTokenizer(" abné").encode("banana").tolist() == [2, 1, 3, 1, 3, 1]
    assert tokenizer.decode([3, 4, 0, 2]) == "né b"
    assert tokenizer.encode("").tolist() == []


def test_characters_go_round(tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer.train(SAMPLE)
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = CharacterTokenizer.load(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(loaded.encode(SAMPLE), tokenizer.encode(SAMPLE))


def test_unknown_characters_and_tokens_are_named() -> None:
    tokenizer = CharacterTokenizer.train("abc")
    with pytest.raises(UserError, match=r"not in the vocabulary: 'X', 'z'; make the tokenizer from all text"):
        tokenizer.encode("azbXz")
    with pytest.raises(UserError, match="between 0 and 2, these between -1 and 3"):
        tokenizer.decode([0, 3, -1])
    with pytest.raises(UserError, match="empty text"):
        CharacterTokenizer.train("")


@pytest.fixture(scope="module")
def byte_pairs() -> BytePairTokenizer:
    return BytePairTokenizer.train(python_text()[:50_000], 400)


@pytest.mark.parametrize("content", [SAMPLE, "", " ", "\x1c \x00\u0085 x", "a" * 300, "  two  blanks\n\n\n  "])
def test_byte_pairs_go_round(byte_pairs: BytePairTokenizer, content: str) -> None:
    tokens = byte_pairs.encode(content)
    assert tokens.dtype == np.int64
    assert tokens.size == 0 or tokens.max() < byte_pairs.vocab_size
    assert byte_pairs.decode(tokens) == content


def test_byte_pairs_shorten_the_text(byte_pairs: BytePairTokenizer) -> None:
    content = python_text()[100_000:110_000]
    assert byte_pairs.vocab_size == 400
    assert len(byte_pairs.encode(content)) < 0.6 * len(content)


def test_the_most_frequent_pair_is_merged_first() -> None:
    tokenizer = BytePairTokenizer.train("abc ab abd", 257)
    assert tokenizer.encode("abc").tolist()[:1] == [256]
    assert len(tokenizer.encode("abc")) == 2
    assert BytePairTokenizer.train("abc ab abd", 500).vocab_size < 300


def test_cutting_a_long_text_changes_no_token(byte_pairs: BytePairTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    alphabet = ["a", "to", "'s", "'", " ", "  ", "\n", "\t", "\u0085", "\x1c", "\xa0", "é", "1", "::", "\r\n"]
    content = "".join(rng.choice(alphabet, size=3_000))
    whole = byte_pairs.tokenizer.encode(content).ids
    cut = text._pieces
    monkeypatch.setattr(text, "_pieces", lambda given: cut(given, 5))
    assert len(list(text._pieces(content))) > 200
    assert "".join(text._pieces(content)) == content
    assert byte_pairs.encode(content).tolist() == whole


def test_byte_pairs_are_the_same_in_every_process(byte_pairs: BytePairTokenizer) -> None:
    code = (
        "import sys; from shared.data.text import *; "
        "sys.stdout.write(BytePairTokenizer.train(python_text()[:50_000], 400).tokenizer.to_str())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8")
    assert out.stdout == byte_pairs.tokenizer.to_str()


def test_byte_pairs_are_saved_and_loaded(byte_pairs: BytePairTokenizer, tmp_path: Path) -> None:
    byte_pairs.save(tmp_path / "tokenizer.json")
    loaded = BytePairTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == byte_pairs.vocab_size
    np.testing.assert_array_equal(loaded.encode(SAMPLE), byte_pairs.encode(SAMPLE))


@pytest.mark.parametrize("kind", [CharacterTokenizer, BytePairTokenizer])
def test_a_file_that_holds_no_tokenizer_is_refused(kind: type, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        kind.load(tmp_path / "none.json")
    for content in ("{}", "[]", "not json", '{"characters": 3}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(UserError, match="does not hold a"):
            kind.load(tmp_path / "other.json")
    (tmp_path / "other.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary"):
        kind.load(tmp_path / "other.json")


def test_fewer_tokens_than_bytes_are_refused() -> None:
    with pytest.raises(UserError, match="vocab_size is 255"):
        BytePairTokenizer.train("abc", 255)


def test_tokenizers_are_imported_only_where_used() -> None:
    code = "import sys, shared.data.text, shared.data.mad; print(sorted({'tokenizers', 'torch'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------- windows


def test_windows_ask_for_every_token_once() -> None:
    cut = windows(range(11), 3)
    assert cut.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert cut.dtype == np.int64
    assert cut.flags.c_contiguous
    assert cut.flags.writeable


@pytest.mark.parametrize(
    ("stride", "expected"),
    [
        (1, [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]),
        (3, [[0, 1, 2], [3, 4, 5]]),
        (4, [[0, 1, 2]]),
    ],
)
def test_windows_start_every_stride(stride: int, expected: list[list[int]]) -> None:
    assert windows(np.arange(6), 2, stride).tolist() == expected


def test_windows_may_fill_the_text_exactly() -> None:
    assert windows(np.arange(4), 3).tolist() == [[0, 1, 2, 3]]
    assert windows(np.arange(7), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]


def test_impossible_windows_are_refused() -> None:
    with pytest.raises(UserError, match=r"3 tokens do not fill a window of 3 .* at least 4 tokens"):
        windows(np.arange(3), 3)
    with pytest.raises(UserError, match="must be at least 1"):
        windows(np.arange(3), 0)
    with pytest.raises(UserError, match="must be at least 1"):
        windows(np.arange(3), 2, 0)
    with pytest.raises(UserError, match="one row of tokens"):
        windows(np.zeros((2, 9)), 2)
