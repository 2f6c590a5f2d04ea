"""Reading, writing and measuring terms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import UserError

from ..library import Library
from ..terms import PRIMITIVES, Apply, Index, Lambda, Term, apply, inline, invent, mass, parse, size, spell, type_of
from ..types import T, Type, arrow

FN_0 = invent("fn_0", parse("(lam (push (add (connect $0))))", expected=None))
FN_1 = invent("fn_1", parse("(lam (lam (func (push $0) ($1 (add identity)))))", expected=None))
LIBRARY = Library.uniform([*PRIMITIVES.values(), FN_0, FN_1])


def programs(library: Library = LIBRARY) -> st.SearchStrategy[Term]:
    """Programs of any shape, calls of invented primitives among them."""

    def extended(smaller: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
        heads = [named for named in library.primitives if type_of(named) != T]
        return st.sampled_from(heads).flatmap(
            lambda head: st.tuples(*(functions if takes != T else smaller for takes in _takes(type_of(head)))).map(
                lambda arguments: apply(head, *arguments)
            )
        )

    functions = st.sampled_from([PRIMITIVES["push"], PRIMITIVES["add"], parse("func (push identity)", expected=None)])
    return st.recursive(st.just(PRIMITIVES["identity"]), extended, max_leaves=8)


def _takes(of: Type) -> list[Type]:
    takes = []
    while of != T:
        takes.append(of.argument)
        of = of.result
    return takes


@settings(max_examples=50, deadline=None)
@given(programs())
def test_what_is_written_is_read_back(program: Term) -> None:
    assert parse(str(program), LIBRARY) == program
    assert parse(spell(program)) == program
    assert type_of(program) == T


@settings(max_examples=50, deadline=None)
@given(programs())
def test_mass_is_the_size_once_all_is_inlined(program: Term) -> None:
    assert mass(program) == size(inline(program)) >= size(program)
    assert "fn_" not in spell(inline(program))
    assert type_of(inline(program)) == T


def test_invented_primitives_count_one_by_size_and_their_body_by_mass() -> None:
    program = parse("fn_0 (func identity (fn_1 push identity))", LIBRARY)
    assert size(program) == 6
    assert mass(program) == 3 + 2 + (4 + 1 + 1)
    assert str(inline(program)) == "(push (add (connect (func identity (func (push identity) (push (add identity)))))))"


def test_types_of_bodies_are_inferred() -> None:
    assert type_of(FN_0) == arrow(T, T)
    assert type_of(FN_1) == arrow(arrow(T, T), T, T)
    assert str(type_of(FN_1)) == "(T -> T) -> T -> T"
    assert type_of(parse("if_positions_equal identity identity", expected=None)) == arrow(T, T, T, T)


def test_parentheses_around_the_whole_may_be_left_out() -> None:
    assert parse("push (add identity)") == parse("(push (add identity))")
    assert parse("identity") == PRIMITIVES["identity"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("push (ad identity)", r"column 7.*unknown primitive 'ad'; known: identity, next_port"),
        ("push (add push)", r"column 11.*push is no argument for add: it is T -> T, but T is expected here"),
        ("func identity (identity push)", r"column 25.*takes no argument"),
        ("push (add identity", r"column 19.*'\)' is expected here, but the text ends"),
        ("push (add identity))", r"column 20.*the term is complete, but '\)' follows"),
        ("push ()", r"column 7.*a term is expected here, but '\)'"),
        ("", r"column 1.*a term is expected"),
        ("func identity", r"column 1.*the whole is T -> T, but T is expected"),
        ("push $0", r"column 6.*no lambda binds \$0"),
        ("{fn_9}(lam (func $0 $0)) identity", r"column 7.*uses its argument 2 times"),
        ("{fn_9}(lam (push identity)) identity", r"column 7.*uses its argument 0 times"),
        ("{fn_9}(lam (push $1)) identity", r"column 18.*no lambda binds \$1"),
        ("{fn_9 identity", r"column 7.*'\}' is expected"),
        ("(" * 400 + "identity" + ")" * 400, r"column 301.*nested more than 300 deep"),
    ],
)
def test_mistakes_are_found_with_their_place(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(text)


def test_a_body_must_be_closed_well_typed_and_use_its_arguments_once() -> None:
    push = PRIMITIVES["push"]
    with pytest.raises(UserError, match="2 times"):
        invent("fn", Lambda(apply(PRIMITIVES["func"], Index(0), Index(0))))
    with pytest.raises(UserError, match="ill-typed"):
        invent("fn", Apply(push, push))
    with pytest.raises(UserError, match="bound by no lambda"):
        invent("fn", Apply(push, Index(0)))
    with pytest.raises(UserError, match="ill-typed"):
        invent("fn", Lambda(Lambda(apply(Index(0), Apply(Index(1), push), Apply(push, push)))))
