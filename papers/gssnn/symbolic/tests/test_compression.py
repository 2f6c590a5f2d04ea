"""What compression finds, and that it changes nothing and adds nothing."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import UserError

from ..compression import Corpus, compress
from ..interpreter import run
from ..library import Library
from ..terms import Term, inline, invent, mass, parse, size, type_of
from ..types import T
from .test_terms import programs

BASE = Library.initial()


def read(*texts: str, library: Library = BASE) -> list[Term]:
    return [parse(text, library) for text in texts]


def test_the_pattern_that_saves_most_is_found() -> None:
    corpus = read(
        "push (add (connect identity))",
        "push (add (connect (next_port (push (add (connect identity))))))",
        "move (push (add (connect (pop identity))))",
    )
    library, rewritten, (found,) = compress(corpus, BASE, abstractions=1)
    assert str(found.invented.body) == "(lam (push (add (connect $0))))"
    assert (found.arity, found.uses, found.saved, found.utility) == (1, 4, 8, 5)
    assert [str(program) for program in rewritten] == [
        "(fn_0 identity)",
        "(fn_0 (next_port (fn_0 identity)))",
        "(move (fn_0 (pop identity)))",
    ]
    assert library["fn_0"] == found.invented
    assert len(set(library.log_probabilities)) == 1


def test_two_holes_and_function_holes() -> None:
    corpus = read(*(f"func (push ({inner} identity)) (add ({outer} identity))" for inner, outer in
                    itertools.product(("move", "pop", "func identity"), ("connect", "next_port"))))  # fmt: skip
    _, rewritten, (found,) = compress(corpus, BASE, abstractions=1)
    assert str(found.invented.body) == "(lam (lam (func (push ($1 identity)) (add ($0 identity)))))"
    assert str(rewritten[0]) == "(fn_0 move connect)"
    assert str(rewritten[-1]) == "(fn_0 (func identity) next_port)"
    _, _, (single,) = compress(corpus, BASE, abstractions=1, max_arity=1)
    assert single.arity == 1
    assert single.utility < found.utility


def test_a_tie_goes_to_the_more_general_as_in_the_published_run() -> None:
    corpus = read("push (add (connect identity))", "push (add (connect (next_port (add (connect identity)))))")
    _, rewritten, found = compress(corpus, BASE)
    assert [str(one.invented.body) for one in found] == ["(lam (push (add (connect $0))))"]
    assert [str(program) for program in rewritten] == ["(fn_0 identity)", "(fn_0 (next_port (add (connect identity))))"]


def test_later_abstractions_build_on_earlier_ones() -> None:
    leaf = "push (add (connect ({})))"
    twice = leaf.format("next_port (push (add (connect ({}))))")
    corpus = read(
        *(outer.format(inner) for outer in (leaf, twice) for inner in ("identity", "pop identity", "move identity"))
    )
    library, rewritten, found = compress(corpus, BASE, abstractions=2)
    assert [str(one.invented.body) for one in found] == [
        "(lam (push (add (connect $0))))",
        "(lam (fn_0 (next_port (fn_0 $0))))",
    ]
    assert str(rewritten[-1]) == "(fn_1 (move identity))"
    assert [inline(program) for program in rewritten] == corpus
    _, _, (third,) = compress([*rewritten, *rewritten], library, abstractions=1)
    assert third.invented.name == "fn_2"


def test_what_does_not_pay_is_not_invented() -> None:
    corpus = read("push (add (connect identity))", "move (pop identity)")
    library, rewritten, found = compress(corpus, BASE)
    assert (library, rewritten, found) == (BASE, corpus, [])
    assert compress([], BASE) == (BASE, [], [])
    assert compress(corpus, BASE, abstractions=0) == (BASE, corpus, [])
    with pytest.raises(UserError, match="max_arity -1"):
        compress(corpus, BASE, max_arity=-1)


def test_a_pattern_is_applied_only_where_types_allow() -> None:
    """`$0 identity` with a hole for T -> T is no pattern for (func identity), which is not a program."""
    taker = invent("fn_0", parse("(lam (push ($0 identity)))", expected=None))
    (program,) = read("push (func identity identity)")
    assert str(Corpus([program]).rewritten(taker)[0]) == "(fn_0 (func identity))"
    (program,) = read("func identity (push identity)")
    assert Corpus([program]).rewritten(taker) == [program]


def test_the_smallest_rewriting_is_taken_where_calls_overlap() -> None:
    """Of push move push move push, taken from the left only one call fits, from the second on as well; two never."""
    pair = invent("fn_0", parse("(lam (push (push (push $0))))", expected=None))
    (program,) = read("push (push (push (push (push (push (push identity))))))")
    (rewritten,) = Corpus([program]).rewritten(pair)
    assert size(rewritten) == 4
    assert inline(rewritten) == program


@settings(max_examples=25, deadline=None)
@given(st.lists(programs(BASE), min_size=1, max_size=5), st.integers(0, 2))
def test_no_program_changes_its_value_and_no_corpus_grows(corpus: list[Term], max_arity: int) -> None:
    corpus = corpus * 2
    library, rewritten, found = compress(corpus, BASE, max_arity=max_arity)
    assert [inline(program) for program in rewritten] == corpus
    assert [run(program) for program in rewritten] == [run(program) for program in corpus]
    assert list(map(mass, rewritten)) == list(map(mass, corpus))
    assert all(type_of(program) == T for program in rewritten)
    bodies = sum(size(one.invented.body) for one in found)
    assert sum(map(size, corpus)) - sum(map(size, rewritten)) - bodies == sum(one.utility for one in found)
    assert all(one.utility > 0 and one.arity <= max_arity for one in found)
    assert library == Library.uniform([*BASE.primitives, *(one.invented for one in found)])


def test_the_best_of_all_patterns_is_found() -> None:
    """Against all sub-terms with all choices of up to one hole."""
    corpus = read(
        "push (add (connect (next_port (add (connect (next_port identity))))))",
        "add (connect (next_port (push (move (add (connect identity))))))",
        "func (add (connect identity)) (push (move (next_port identity)))",
    )
    before = sum(map(size, corpus))
    best = 0
    for place in {text for program in corpus for text in _chains(str(program))}:
        body = invent("fn_0", parse(place, expected=None))
        after = sum(map(size, Corpus(corpus).rewritten(body)))
        best = max(best, before - after - size(body.body))
    (found,) = compress(corpus, BASE, abstractions=1, max_arity=1)[2]
    assert found.utility == best > 0


def _chains(text: str) -> set[str]:
    """Bodies of the form (lam (a (b … $0))) from consecutive steps of a program."""
    words = [word for word in text.replace("(", " ").replace(")", " ").split() if word not in ("func", "identity")]
    return {
        "(lam " + "".join(f"({word} " for word in words[start:end]) + "$0" + ")" * (end - start) + ")"
        for start in range(len(words))
        for end in range(start + 1, len(words) + 1)
    }
