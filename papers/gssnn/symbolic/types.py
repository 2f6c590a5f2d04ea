"""Types of the language: `T` is a program, and everything else takes programs (or such takers) and gives programs.

A program is a function from state to state. The language never looks inside of one, so `T` is atomic here; `push` is
`T -> T`, `func` is `T -> T -> T`. Type variables stand for what is not known yet while a lambda's body is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Program:
    """The type of a program, written `T`."""

    def __str__(self) -> str:
        return "T"


@dataclass(frozen=True, slots=True)
class Arrow:
    """The type of what takes an `argument` and gives a `result`."""

    argument: Type
    result: Type

    def __str__(self) -> str:
        left = f"({self.argument})" if isinstance(self.argument, Arrow) else str(self.argument)
        return f"{left} -> {self.result}"


@dataclass(frozen=True, slots=True)
class Variable:
    """A type that is not known yet."""

    number: int

    def __str__(self) -> str:
        return f"t{self.number}"


Type: TypeAlias = Program | Arrow | Variable

T = Program()


class TypeMismatch(Exception):
    """Two types that no choice of their variables makes equal."""


def arrow(*types: Type) -> Type:
    """`arrow(A, B, C)` is A -> B -> C."""
    result = types[-1]
    for argument in reversed(types[:-1]):
        result = Arrow(argument, result)
    return result


def suffixes(of: Type) -> Iterator[Type]:
    """The type itself, and what is left of it after one argument, after two, …"""
    yield of
    while isinstance(of, Arrow):
        of = of.result
        yield of


class Inference:
    """What is known so far about type variables."""

    def __init__(self) -> None:
        self._bindings: list[Type | None] = []

    def fresh(self) -> Variable:
        """A variable about which nothing is known."""
        self._bindings.append(None)
        return Variable(len(self._bindings) - 1)

    def resolve(self, of: Type) -> Type:
        """The type with what is known about its variables put in."""
        match of:
            case Variable(number):
                known = self._bindings[number]
                return of if known is None else self.resolve(known)
            case Arrow(argument, result):
                return Arrow(self.resolve(argument), self.resolve(result))
        return of

    def unify(self, left: Type, right: Type) -> None:
        """Learn that both types are equal; `TypeMismatch` where that cannot be."""
        left, right = self.resolve(left), self.resolve(right)
        if left == right:
            return
        match left, right:
            case Arrow(), Arrow():
                self.unify(left.argument, right.argument)
                self.unify(left.result, right.result)
            case (Variable() as variable, other) | (other, Variable() as variable):
                if _occurs(variable, other):
                    raise TypeMismatch(f"{variable} = {other} has no finite solution")
                self._bindings[variable.number] = other
            case _:
                raise TypeMismatch(f"{left} is not {right}")

    def applied(self, function: Type, argument: Type) -> Type:
        """What a function of type `function` gives for an argument of type `argument`."""
        function, argument = self.resolve(function), self.resolve(argument)
        if function == T:
            raise TypeMismatch("a program, T, takes no argument")
        result = self.fresh()
        try:
            self.unify(function, Arrow(argument, result))
        except TypeMismatch:
            expected = function.argument if isinstance(function, Arrow) else function
            raise TypeMismatch(f"it is {argument}, but {expected} is expected here") from None
        return self.resolve(result)

    def settled(self, of: Type) -> Type:
        """The type once nothing more will be learned: what is still unknown is taken to be a program."""
        match self.resolve(of):
            case Arrow(argument, result):
                return Arrow(self.settled(argument), self.settled(result))
        return T


def _occurs(variable: Variable, within: Type) -> bool:
    match within:
        case Arrow(argument, result):
            return _occurs(variable, argument) or _occurs(variable, result)
    return within == variable
