"""A library: the primitives that programs are made of, and how probable each is.

A program's log-probability is the sum of those of its primitives. That makes a probabilistic grammar over types: a hole
of some type takes every primitive that is of that type once it has all, some or none of its arguments.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.config import UserError

from .terms import PRIMITIVES, Invented, Named, Term, invent, mass, parse, spell, spine, type_of
from .types import T, Type, suffixes

EPSILON = 0.001


@dataclass(frozen=True)
class Library(Mapping[str, Named]):
    """Primitives, by name, each with its log-probability (none above 0; they need not sum to one)."""

    primitives: tuple[Named, ...]
    log_probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        names = Counter(named.name for named in self.primitives)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise UserError(f"the library has two primitives named {repeated[0]}; names must differ")
        if len(self.primitives) != len(self.log_probabilities):
            raise UserError(f"{len(self.primitives)} primitives, but {len(self.log_probabilities)} log-probabilities")
        for name, value in zip(names, self.log_probabilities, strict=True):
            if not -math.inf < value <= 0:
                raise UserError(f"the log-probability of {name} is {value}; a finite number up to 0 is allowed")

    @classmethod
    def uniform(cls, primitives: Iterable[Named]) -> Library:
        """All primitives equally probable."""
        primitives = tuple(primitives)
        return cls(primitives, (-math.log(len(primitives)),) * len(primitives))

    @classmethod
    def initial(cls) -> Library:
        """The ten primitives of the language."""
        return cls.uniform(PRIMITIVES.values())

    def __getitem__(self, name: str) -> Named:
        for named in self.primitives:
            if named.name == name:
                return named
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (named.name for named in self.primitives)

    def __len__(self) -> int:
        return len(self.primitives)

    @property
    def mass(self) -> int:
        """Primitives of the language in all its primitives together, once all are inlined."""
        return sum(map(mass, self.primitives))

    def log_probability(self, term: Term) -> float:
        """The log-probability under which `enumerate_programs` meets the term."""
        head, arguments = spine(term)
        own = dict(zip(self, self.log_probabilities, strict=True))[str(head)]
        return own + sum(map(self.log_probability, arguments))

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "name": named.name,
                "body": spell(named.body) if isinstance(named, Invented) else None,
                "log_probability": value,
            }
            for named, value in zip(self.primitives, self.log_probabilities, strict=True)
        ]

    @classmethod
    def from_json(cls, records: list[dict[str, Any]]) -> Library:
        def named(name: str, body: str | None) -> Named:
            if body is not None:
                return invent(name, parse(body, expected=None))
            if name not in PRIMITIVES:
                raise UserError(f"unknown primitive {name!r}; the language has {', '.join(PRIMITIVES)}")
            return PRIMITIVES[name]

        return cls(
            tuple(named(record["name"], record["body"]) for record in records),
            tuple(record["log_probability"] for record in records),
        )


def estimate_weights(
    library: Library, frontier: Sequence[Term], max_difference: float = 0.5, *, as_published: bool = False
) -> Library:
    """The library with log-probabilities estimated on the programs of `frontier`, by one step of inside-outside.

    Every program is a set of typed holes, each filled by one of the primitives that it could be filled by. Programs
    weigh in by their likelihood under the uniform library, normalized over the frontier; then, over all holes,
    l(p) = log(uses of p + 0.001) - log(possible uses of p + 0.001). An empty frontier leaves the library uniform.

    Where the spread of l exceeds `max_difference`, l is rescaled about its mean to that spread. The published formula
    scales what is above the mean and what is below by two factors, in which the greatest differences to either side
    are swapped. It does not matter: they cancel, and both factors are max_difference / spread.

    What does matter is that the published log-sum-exp exponentiates its maximum. Likelihoods come out too small, the
    programs' weights sum to nearly nothing, and all l are near 0 (0.001 over 0.001): the published search is nearly
    unweighted. `as_published` computes that.
    """
    log_sum_exp = _published_log_sum_exp if as_published else _log_sum_exp
    uniform = Library.uniform(library.primitives)
    if not frontier:
        return uniform
    filled = [list(_holes(program, T)) for program in frontier]
    candidates = {of: _candidates(library, of) for of in {of for holes in filled for _, of in holes}}
    own = uniform.log_probabilities[0]
    normalizers = {of: log_sum_exp([own] * len(names)) for of, names in candidates.items()}
    likelihoods = [sum(own - normalizers[of] for _, of in holes) for holes in filled]
    total = log_sum_exp(likelihoods)
    uses, possible = Counter[str](), Counter[str]()
    for holes, likelihood in zip(filled, likelihoods, strict=True):
        weight = math.exp(likelihood - total)
        for name, of in holes:
            uses[name] += weight
            for candidate in candidates[of]:
                possible[candidate] += weight
    estimates = [math.log(uses[name] + EPSILON) - math.log(possible[name] + EPSILON) for name in library]
    return Library(library.primitives, tuple(_rescale(estimates, max_difference)))


def _holes(term: Term, of: Type) -> Iterator[tuple[str, Type]]:
    """The holes of a program, each as the name of the primitive that fills it and the hole's type."""
    head, arguments = spine(term)
    yield str(head), of
    takes = type_of(head)
    for argument in arguments:
        yield from _holes(argument, takes.argument)
        takes = takes.result


def _candidates(library: Library, of: Type) -> list[str]:
    return [named.name for named in library.primitives if of in suffixes(type_of(named))]


def _log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def _published_log_sum_exp(values: list[float]) -> float:
    return _log_sum_exp([math.exp(value) for value in values])


def _rescale(values: list[float], max_difference: float) -> list[float]:
    spread, mean = max(values) - min(values), math.fsum(values) / len(values)
    scale = min(1.0, max_difference / spread) if spread else 1.0
    return [min(0.0, mean + scale * (value - mean)) for value in values]
