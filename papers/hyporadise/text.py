"""General text, which tells nothing of the domain: for the recognizer's lexicon and bigram, and to pretrain on."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from shared.config import UserError
from shared.data.text import corpus

# Documentation that comes with packages whose versions constraints.txt fixes.
DOCUMENTED = ("pandas", "scipy", "sklearn")
_SENTENCE_END = re.compile(r"[.!?:;]\s|\n\s*\n|\n\s*[-*>.]")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
# What docstrings hold beside English: code, names with underscores, dots and digits in them.
_NOT_WORDS = re.compile(r"`[^`]*`|\S*[_=\\/()\[\]{}<>0-9]\S*|\b\w+\.\w+\S*")


def sentences_of(text: str, *, shortest: int = 4, longest: int = 40) -> list[str]:
    """Sentences of running text as lower-case words between blanks, those that have neither too few nor too many."""
    split = (_WORD.findall(_NOT_WORDS.sub(" ", part.lower())) for part in _SENTENCE_END.split(text))
    return [" ".join(words) for words in split if shortest <= len(words) <= longest]


def documentation(most: int | None = None) -> list[str]:
    """Sentences of the docstrings of pandas, SciPy and scikit-learn, each once, in order of files; at most `most`."""
    found: dict[str, None] = {}
    for docstring in chain.from_iterable(map(_docstrings, DOCUMENTED)):
        found |= dict.fromkeys(sentences_of(docstring))
        if most is not None and len(found) >= most:
            break
    return list(found)[:most]


def _docstrings(package: str) -> Iterator[str]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{package} is not installed, whose documentation is the general text: pip install {package}")
    folder = Path(spec.origin).parent
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        if {"tests", "externals", "_lib"}.isdisjoint(path.relative_to(folder).parts):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
                    yield docstring


def books(most: int | None = None) -> list[str]:
    """Sentences of old books and of WikiText-2's validation and test sets, from `$REPRISE_DATA`; at most `most`."""
    articles = sentences_of(corpus("wikitext2").replace("<unk>", " "))
    return [*articles, *sentences_of(corpus("gutenberg_books", "train"))][:most]
