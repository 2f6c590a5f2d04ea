"""Terms: what programs are made of, how they are read, written and measured.

    term  ::=  primitive  |  (term term …)  |  (lam term)  |  $i  |  {name}term

`$i` is a de Bruijn index: `$0` is bound by the nearest `lam`. Lambdas occur only in the bodies of invented primitives.
An invented primitive is written by its name, `fn_0`; `{fn_0}(lam (push $0))` spells out its body as well, as the
published files do. Every lambda uses its variable exactly once: inlining then copies and drops nothing, so that mass
adds up over a term.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from shared.config import UserError

from .types import Arrow, Inference, T, Type, TypeMismatch, arrow

MAX_DEPTH = 300


@dataclass(frozen=True, slots=True)
class Primitive:
    """A primitive of the language; what it does stands in `interpreter`."""

    name: str
    type: Type

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Invented:
    """A primitive that compression has found: a name for its body, a closed term. Make it with `invent`."""

    name: str
    body: Term

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Apply:
    """A function applied to one argument; further arguments by further applications."""

    function: Term
    argument: Term
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Kept, since terms are looked up a lot, and a hash that looks at the whole term takes as long as the term is.
        object.__setattr__(self, "_hash", hash((self.function, self.argument)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        head, arguments = spine(self)
        return f"({' '.join(map(str, [head, *arguments]))})"


@dataclass(frozen=True, slots=True)
class Lambda:
    """A function of one argument, which `Index(0)` names in the body (and `Index(n)` under n further lambdas)."""

    body: Term

    def __str__(self) -> str:
        return f"(lam {self.body})"


@dataclass(frozen=True, slots=True)
class Index:
    """A variable, named by the number of lambdas between it and its own."""

    number: int

    def __str__(self) -> str:
        return f"${self.number}"


Named: TypeAlias = Primitive | Invented
Term: TypeAlias = Primitive | Invented | Apply | Lambda | Index

IDENTITY = Primitive("identity", T)
FUNC = Primitive("func", arrow(T, T, T))
IF_POSITIONS_EQUAL = Primitive("if_positions_equal", arrow(T, T, T, T, T, T))
_UNARY = {
    name: Primitive(name, arrow(T, T)) for name in ("next_port", "prev_port", "move", "add", "push", "pop", "connect")
}
PRIMITIVES: Mapping[str, Primitive] = {
    "identity": IDENTITY,
    **_UNARY,
    "func": FUNC,
    "if_positions_equal": IF_POSITIONS_EQUAL,
}


# --- building and taking apart -----------------------------------------------------------------------------------


def apply(function: Term, *arguments: Term) -> Term:
    """`apply(f, a, b)` is (f a b)."""
    return functools.reduce(Apply, arguments, function)


def spine(term: Term) -> tuple[Term, list[Term]]:
    """Head and arguments: (f a b) is f with [a, b]."""
    arguments = []
    while isinstance(term, Apply):
        arguments.append(term.argument)
        term = term.function
    return term, arguments[::-1]


def beta(function: Lambda, argument: Term, depth: int = 0) -> Term:
    """The body of `function` with the closed `argument` in the place of its variable."""

    def put(term: Term, depth: int) -> Term:
        match term:
            case Index(number) if number == depth:
                return argument
            case Apply(inner, of):
                return Apply(put(inner, depth), put(of, depth))
            case Lambda(body):
                return Lambda(put(body, depth + 1))
        return term

    return put(function.body, depth)


def invent(name: str, body: Term) -> Invented:
    """A new primitive for a closed, well-typed `body` in which every lambda uses its variable exactly once."""
    for function in _lambdas(body):
        if (count := _uses(function.body)) != 1:
            raise UserError(f"the body of {name} uses the argument of {function} {count} times; it must use it once")
    try:
        type_of(body)
    except TypeMismatch as error:
        raise UserError(f"the body of {name}, {body}, is ill-typed: {error}") from None
    return Invented(name, body)


def _lambdas(term: Term) -> Iterator[Lambda]:
    match term:
        case Apply(function, argument):
            yield from _lambdas(function)
            yield from _lambdas(argument)
        case Lambda(body):
            yield term
            yield from _lambdas(body)


def _uses(term: Term, number: int = 0) -> int:
    """How often the variable occurs that `$number` names at the top of the term."""
    match term:
        case Index(other):
            return int(other == number)
        case Apply(function, argument):
            return _uses(function, number) + _uses(argument, number)
        case Lambda(body):
            return _uses(body, number + 1)
    return 0


def inline(term: Term) -> Term:
    """The term without invented primitives: each replaced by its body, applied to its arguments."""
    head, arguments = spine(term)
    match head:
        case Invented():
            head = head.body
        case Lambda() if not arguments:
            return Lambda(inline(head.body))
        case _ if not isinstance(head, Lambda):
            return apply(head, *map(inline, arguments))
    while isinstance(head, Lambda) and arguments:
        head = beta(head, arguments.pop(0))
    return inline(apply(head, *arguments))


# --- measures ----------------------------------------------------------------------------------------------------


def size(term: Term) -> int:
    """Number of primitives; an invented one counts 1."""
    match term:
        case Primitive() | Invented():
            return 1
        case Apply(function, argument):
            return size(function) + size(argument)
        case Lambda(body):
            return size(body)
    return 0


def mass(term: Term) -> int:
    """Number of primitives once all invented ones are inlined."""
    match term:
        case Primitive():
            return 1
        case Invented():
            return _mass_of_body(term)
        case Apply(function, argument):
            return mass(function) + mass(argument)
        case Lambda(body):
            return mass(body)
    return 0


@functools.lru_cache(maxsize=4096)
def _mass_of_body(invented: Invented) -> int:
    return mass(invented.body)


def type_of(term: Term) -> Type:
    """The type of a closed term; `TypeMismatch` if it has none."""
    inference = Inference()
    return inference.settled(_infer(term, (), inference))


def _infer(term: Term, scope: tuple[Type, ...], inference: Inference) -> Type:
    """Type of a term whose variables have the types of `scope`, that of `$0` first."""
    match term:
        case Primitive():
            return term.type
        case Invented():
            return _type_of_body(term)
        case Index(number):
            if number >= len(scope):
                raise TypeMismatch(f"{term} is bound by no lambda")
            return scope[number]
        case Lambda(body):
            argument = inference.fresh()
            return Arrow(argument, _infer(body, (argument, *scope), inference))
        case Apply(function, argument):
            return inference.applied(_infer(function, scope, inference), _infer(argument, scope, inference))


@functools.lru_cache(maxsize=4096)
def _type_of_body(invented: Invented) -> Type:
    return type_of(invented.body)


# --- reading and writing -----------------------------------------------------------------------------------------


def spell(term: Term) -> str:
    """The term as text that needs no library: every invented primitive with its body."""
    match term:
        case Invented(name, body):
            return f"{{{name}}}{spell(body)}"
        case Lambda(body):
            return f"(lam {spell(body)})"
        case Apply():
            head, arguments = spine(term)
            return f"({' '.join(map(spell, [head, *arguments]))})"
    return str(term)


def parse(text: str, library: Mapping[str, Named] = PRIMITIVES, expected: Type | None = T) -> Term:
    """Read a term of type `expected` (by default a program; `None`: of any type).

    `library` holds the primitives by name. The outermost parentheses may be left out. A mistake raises `UserError`
    with the column, counted from 1.
    """
    reader = _Reader(text, library)
    term, found = reader.application(())
    reader.end()
    found = reader.inference.settled(found)
    if expected is not None and found != expected:
        raise reader.error(0, f"the whole is {found}, but {expected} is expected")
    return term


class _Reader:
    """Recursive descent over the tokens of one text; types are inferred on the way, so that a mistake has a place."""

    def __init__(self, text: str, library: Mapping[str, Named]) -> None:
        self.text = text
        self.library = library
        self.inference = Inference()
        self.tokens = [(found.group(), found.start()) for found in re.finditer(r"[(){}]|[^\s(){}]+", text)]
        self.tokens.append(("", len(text)))
        self.next = 0
        self.depth = 0

    def error(self, position: int, message: str) -> UserError:
        excerpt = self.text[max(0, position - 20) : position + 20]
        return UserError(f"column {position + 1}, near {excerpt!r}: {message}")

    def take(self, wanted: str | None = None) -> tuple[str, int]:
        """The next token and where it starts; it must be `wanted`, if that is given."""
        token, position = self.tokens[self.next]
        if (wanted is not None and token != wanted) or not token:
            what = repr(wanted) if wanted else "a term"
            raise self.error(position, f"{what} is expected here, but {repr(token) if token else 'the text ends'}")
        self.next += 1
        return token, position

    def end(self) -> None:
        token, position = self.tokens[self.next]
        if token:
            raise self.error(position, f"the term is complete, but {token!r} follows")

    def term(self, scope: tuple[Type, ...]) -> tuple[Term, Type]:
        """One term and its type; `scope` holds the types of its variables, that of `$0` first."""
        token, position = self.take()
        match token:
            case "(":
                self.depth += 1
                if self.depth > MAX_DEPTH:
                    raise self.error(position, f"nested more than {MAX_DEPTH} deep")
                found = (
                    self.abstraction(position, scope) if self.tokens[self.next][0] == "lam" else self.application(scope)
                )
                self.take(")")
                self.depth -= 1
                return found
            case "{":
                name, _ = self.take()
                self.take("}")
                body, _ = self.term(())
                try:
                    invented = invent(name, body)
                except UserError as error:
                    raise self.error(position, str(error)) from None
                return invented, type_of(invented)
            case ")" | "}":
                raise self.error(position, f"a term is expected here, but {token!r}")
        if token.startswith("$"):
            if not token[1:].isdecimal() or int(token[1:]) >= len(scope):
                raise self.error(position, f"no lambda binds {token}")
            return Index(int(token[1:])), scope[int(token[1:])]
        if token not in self.library:
            raise self.error(position, f"unknown primitive {token!r}; known: {', '.join(self.library)}")
        named = self.library[token]
        return named, type_of(named)

    def abstraction(self, position: int, scope: tuple[Type, ...]) -> tuple[Term, Type]:
        self.take("lam")
        argument = self.inference.fresh()
        body, result = self.term((argument, *scope))
        if (count := _uses(body)) != 1:
            raise self.error(position, f"this lambda uses its argument {count} times; it must use it once")
        return Lambda(body), Arrow(argument, result)

    def application(self, scope: tuple[Type, ...]) -> tuple[Term, Type]:
        """A term and the arguments that follow it."""
        term, found = self.term(scope)
        while self.tokens[self.next][0] not in (")", ""):
            start = self.tokens[self.next][1]
            argument, of = self.term(scope)
            try:
                found = self.inference.applied(found, of)
            except TypeMismatch as error:
                raise self.error(start, f"{argument} is no argument for {term}: {error}") from None
            term = Apply(term, argument)
        return term, found
