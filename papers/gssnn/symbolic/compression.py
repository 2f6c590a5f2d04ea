"""Compression: new primitives from what programs have in common, in the manner of Stitch (Bowers et al. 2023).

An abstraction is a pattern: a term with up to `max_arity` holes. Calling it instead of spelling out its b primitives
saves b - 1 of them a use; its body costs b once. Patterns are grown from the top, one hole at a time, on the places in
the programs where they match, and a pattern is given up once even its best completion cannot beat the best one found.
Size counts primitives, so a corpus with its abstractions' bodies never grows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shared.config import UserError

from .library import Library
from .terms import Apply, Index, Invented, Lambda, Named, Term, apply, invent, size, type_of
from .types import Arrow, Type


@dataclass(frozen=True, slots=True)
class Open:
    """A hole that is not decided yet: it will be a primitive, an application, or an argument."""

    def __str__(self) -> str:
        return "?"


@dataclass(frozen=True, slots=True)
class Abstraction:
    """What one round of compression found: the primitive, its number of arguments, how often the rewritten programs
    call it, how many primitives the calls save, and what is left of that once its body is counted."""

    invented: Invented
    arity: int
    uses: int
    saved: int

    @property
    def utility(self) -> int:
        return self.saved - size(self.invented.body)


Pattern: TypeAlias = "Named | Apply | Open | Index"
"""A term in which `Index(i)` is argument i, from left to right, and `Open()` a hole that is not decided yet."""


def compress(
    programs: Sequence[Term], library: Library, *, abstractions: int = 3, max_arity: int = 2
) -> tuple[Library, list[Term], list[Abstraction]]:
    """Add up to `abstractions` primitives to the library, one after the other, and rewrite the programs with each.

    Each time it is the one of greatest utility, uses x primitives saved - size of the body. A tie goes to the larger
    body, then to more arguments, as in the published run, whose first abstraction is (lam (push (add (connect $0))))
    where (add (connect identity)) would save as much; then to the first in alphabetical order, arguments last. It ends
    early where none has a utility above 0. The new library is uniform. Rewritten programs inline to what they were.

    Raises `UserError` for impossible numbers.
    """
    if abstractions < 0 or max_arity < 0:
        raise UserError(f"abstractions is {abstractions} and max_arity {max_arity}; both must be at least 0")
    programs, report = list(programs), []
    for _ in range(abstractions):
        name = f"fn_{sum(isinstance(named, Invented) for named in library.primitives)}"
        corpus = Corpus(programs)
        if (found := _best(name, corpus, max_arity)) is None:
            break
        programs = corpus.rewritten(found.invented)
        library = Library.uniform((*library.primitives, found.invented))
        report.append(found)
    return library, programs, report


class Corpus:
    """Programs, and what they are made of: every different sub-term with its number of places, size and type."""

    def __init__(self, programs: Sequence[Term]) -> None:
        self.programs = programs
        self.places = Counter(term for program in programs for term in _subterms(program))
        self.sizes = {term: size(term) for term in self.places}
        self.types = {term: type_of(term) for term in self.places}

    def rewritten(self, invented: Invented) -> list[Term]:
        """The smallest programs that say the same with calls of `invented` where its body stands now."""
        pattern, takes, gives = _pattern_of(invented)
        smallest: dict[Term, Term] = {}

        def rewrite(term: Term) -> Term:
            if term in smallest:
                return smallest[term]
            best = Apply(rewrite(term.function), rewrite(term.argument)) if isinstance(term, Apply) else term
            arguments = _match(pattern, term)
            if arguments is not None and [self.types[each] for each in (term, *arguments)] == [gives, *takes]:
                best = min(best, apply(invented, *map(rewrite, arguments)), key=size)
            smallest[term] = best
            return best

        return [rewrite(program) for program in self.programs]


def _pattern_of(invented: Invented) -> tuple[Pattern, list[Type], Type]:
    """Body, types of the arguments and type of the result of an invented primitive, for matching."""
    body, of, takes = invented.body, type_of(invented), []
    while isinstance(body, Lambda) and isinstance(of, Arrow):
        takes.append(of.argument)
        body, of = body.body, of.result
    return _renumbered(body, len(takes)), takes, of


def _renumbered(body: Term, arity: int) -> Term:
    """Swap de Bruijn indices, where the last argument is 0, for arguments numbered from the left; and back."""
    match body:
        case Index(number):
            return Index(arity - 1 - number)
        case Apply(function, argument):
            return Apply(_renumbered(function, arity), _renumbered(argument, arity))
    return body


def _match(pattern: Pattern, term: Term) -> list[Term] | None:
    """The arguments with which the pattern is the term; `None` if it never is."""
    match pattern, term:
        case Index(), _:
            return [term]
        case Apply(), Apply():
            functions = _match(pattern.function, term.function)
            arguments = None if functions is None else _match(pattern.argument, term.argument)
            return None if arguments is None else functions + arguments
    return [] if pattern == term else None


# --- the search for the best pattern -----------------------------------------------------------------------------


def _best(name: str, corpus: Corpus, max_arity: int) -> Abstraction | None:
    """The abstraction of greatest utility, if there is one above 0."""
    best: Abstraction | None = None

    def grow(pattern: Pattern, arity: int, matches: list[tuple[int, list[Term]]]) -> None:
        """Decide the leftmost open hole. `matches`: number of places, and the terms at all open holes there."""
        nonlocal best
        body = size(pattern)
        saved_at_best = sum(count * (body - 1 + sum(map(corpus.sizes.get, terms))) for count, terms in matches)
        if saved_at_best - body < (best.utility if best else 1):
            return
        if not matches[0][1]:
            best = _better(best, _measured(name, pattern, arity, corpus))
            return
        ways: defaultdict[Pattern, list[tuple[int, list[Term]]]] = defaultdict(list)
        for count, (first, *rest) in matches:
            if isinstance(first, Apply):
                ways[Apply(Open(), Open())].append((count, [first.function, first.argument, *rest]))
            else:
                ways[first].append((count, rest))
        if arity < max_arity:
            ways[Index(arity)] = [(count, rest) for count, (_, *rest) in matches]
        for way, remaining in sorted(ways.items(), key=lambda item: (-len(item[1]), str(item[0]))):
            grow(_filled(pattern, way), arity + isinstance(way, Index), remaining)

    grow(Open(), 0, [(count, [term]) for term, count in corpus.places.items()])
    return best


def _filled(pattern: Pattern, way: Pattern) -> Pattern:
    """The pattern with its leftmost open hole decided."""
    match pattern:
        case Open():
            return way
        case Apply(function, argument) if _is_open(function):
            return Apply(_filled(function, way), argument)
        case Apply(function, argument):
            return Apply(function, _filled(argument, way))
    return pattern


def _is_open(pattern: Pattern) -> bool:
    match pattern:
        case Apply(function, argument):
            return _is_open(function) or _is_open(argument)
    return isinstance(pattern, Open)


def _subterms(term: Term) -> Iterator[Term]:
    yield term
    if isinstance(term, Apply):
        yield from _subterms(term.function)
        yield from _subterms(term.argument)


def _measured(name: str, pattern: Pattern, arity: int, corpus: Corpus) -> Abstraction:
    """What the pattern saves where the programs are rewritten with it."""
    body = _renumbered(pattern, arity)
    for _ in range(arity):
        body = Lambda(body)
    invented = invent(name, body)
    rewritten = corpus.rewritten(invented)
    uses = sum(term == invented for program in rewritten for term in _subterms(program))
    return Abstraction(invented, arity, uses, sum(map(size, corpus.programs)) - sum(map(size, rewritten)))


def _better(one: Abstraction | None, other: Abstraction) -> Abstraction | None:
    if other.utility < 1 or one is None:
        return one if other.utility < 1 else other
    return min(one, other, key=_precedence)


def _precedence(found: Abstraction) -> tuple[int, int, int, str]:
    """What comes first is better; of equally good bodies, the one with primitives where others have arguments."""
    body = found.invented.body
    return -found.utility, -size(body), -found.arity, str(body).replace("$", "~")
