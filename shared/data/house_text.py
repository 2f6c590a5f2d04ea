"""Running text for the house language models: lower-cased words, the most frequent of them as vocabulary."""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shared.config import UserError, data_root
from shared.data.house_lexicon import BOS, Tokens
from shared.data.text import corpus, python_text

TextName = Literal["python", "children", "agnews"]
UNKNOWN = "<unk>"
WORD = re.compile(r"<unk>|[a-z]+(?:'[a-z]+)?|[0-9]+|[^\sa-z0-9]")
TYPEWRITTEN = str.maketrans("‘’“”", "''\"\"")
HELD_OUT_BOOK = 236  # The Jungle Book


@dataclass(frozen=True)
class WordCorpus:
    """Text as tokens: one stream to train on, held-out streams by the name of their source.

    `vocabulary` is `<bos>`, `<unk>`, then the most frequent words of the training text, ties in alphabetical order.
    Documents begin with `<bos>`.
    """

    name: str
    source: str
    vocabulary: tuple[str, ...]
    train: Tokens
    test: dict[str, Tokens]


def load_words(name: TextName, vocab_size: int) -> WordCorpus:
    """A corpus by name: `python` is at hand anywhere, the others are read from `$REPRISE_DATA`.

    - `python`: the documentation that ships with Python, topics of `help()` and docstrings of the standard library;
      held out are every tenth topic and every tenth module. Other releases of Python have another text.
    - `children`: eight children's books, child-directed speech and encyclopedia articles; held out are The Jungle
      Book, the transcripts of the oldest twentieth of the children, and the articles of WikiText-2's test set.
    - `agnews`: news of AG News' official test set; rows whose index ends in 0 to 7 to train on, in 9 held out.
    """
    if name not in CORPORA:
        raise UserError(f"there is no text {name!r}: choose one of {', '.join(CORPORA)}")
    if vocab_size < 3:
        raise UserError(f"vocab_size is {vocab_size}, but must leave room for words beside {BOS} and {UNKNOWN}")
    source, read = CORPORA[name]
    train, test = read()
    words = [split_words(document) for document in train]
    counts = Counter(word for document in words for word in document)
    counts.pop(UNKNOWN, None)
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - 2]
    vocabulary = (BOS, UNKNOWN, *frequent)
    number = {word: index for index, word in enumerate(vocabulary)}
    held_out = {part: _encode(map(split_words, documents), number) for part, documents in test.items()}
    return WordCorpus(name, source, vocabulary, _encode(words, number), held_out)


def split_words(text: str) -> list[str]:
    """Lower-cased words, numbers and single punctuation marks; `don't` is one word."""
    return WORD.findall(text.lower().translate(TYPEWRITTEN))


def _encode(documents: Iterable[list[str]], number: dict[str, int]) -> Tokens:
    unknown = number[UNKNOWN]
    return np.array(
        [token for words in documents for token in (number[BOS], *(number.get(word, unknown) for word in words))],
        dtype=np.int32,
    )


Parts = tuple[list[str], dict[str, list[str]]]


def _python() -> Parts:
    train, test = [], []
    for documents in (python_text().split("\n\n\n"), module_docstrings()):
        train += [document for place, document in enumerate(documents) if place % 10]
        test += documents[::10]
    return train, {"python": test}


@cache
def module_docstrings() -> tuple[str, ...]:
    """All docstrings of each module of the standard library, tests left out, in the order of the modules' paths."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test"}.isdisjoint(folders):
            continue
        # In bytes, so that a module's own declaration of its encoding holds.
        parts = [
            docstring
            for node in ast.walk(ast.parse(path.read_bytes()))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and (docstring := ast.get_docstring(node))
        ]
        if parts:
            texts.append("\n\n".join(parts))
    return tuple(texts)


def _children() -> Parts:
    books = [json.loads(line) for line in _read("_corpora/gutenberg_books/books.jsonl").splitlines()]
    books = [book for book in books if book["kind"] == "children"]
    speech = list(
        csv.DictReader(io.StringIO(_read("_corpora/aochildes/utterances.tsv")), delimiter="\t", quoting=csv.QUOTE_NONE)
    )
    transcripts: dict[str, list[str]] = {}
    for row in speech:
        transcripts.setdefault(row["transcript_id"], []).append(row["utterance"])
    talks = ["\n".join(lines) for lines in transcripts.values()]
    young = len(talks) * 19 // 20
    train = [book["text"] for book in books if book["id"] != HELD_OUT_BOOK]
    test = {
        "books": [book["text"] for book in books if book["id"] == HELD_OUT_BOOK],
        "speech": talks[young:],
        "articles": [corpus("wikitext2", "test")],
    }
    return [*train, *talks[:young], corpus("wikitext2", "validation")], test


def _news() -> Parts:
    rows = list(csv.reader(io.StringIO(_read("coreinfer/ag_news_test.csv"))))
    texts = [f"{title} . {description}".replace("\\", " ") for _, title, description in rows]
    return [text for i, text in enumerate(texts) if i % 10 < 8], {"news": texts[9::10]}


CORPORA: dict[str, tuple[str, Callable[[], Parts]]] = {
    "python": ("generated: the documentation that ships with Python", _python),
    "children": ("real: children's books, child-directed speech, WikiText-2 (validation)", _children),
    "agnews": ("real: AG News (official test set, divided anew)", _news),
}


def _read(name: str) -> str:
    path: Path = data_root() / name
    packed = path.with_name(path.name + ".gz")
    try:
        content: Any = gzip.decompress(packed.read_bytes()) if packed.is_file() else path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: put it there, plain or as {packed.name}, or point REPRISE_DATA to the folder that "
            "holds your data sets. The corpus 'python' needs no file"
        ) from None
    except (OSError, EOFError) as error:
        raise UserError(f"{packed} cannot be read ({error}): fetch it again") from None
    return content.decode("utf-8")
