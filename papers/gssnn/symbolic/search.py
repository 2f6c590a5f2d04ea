"""Search: programs in order of decreasing probability, and the different graphs that they build.

Programs are enumerated a *block* at a time: those that have the same probability, mass and size. Blocks come in order
from a heap, whose entries are a block of functions and the next block of arguments to apply them to; a block costs the
same whether it holds one program or a million.

`Reachable` runs all programs of a block at once. They share their parts, and many parts lead to the same state: per
block and state it keeps, for each state that some program ends in, the rank of the first that does. `explore` then
spells out only the programs that build a graph which no earlier one built, or build it with less mass.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from shared.config import UserError

from .interpreter import MAX_CONNECTIONS, MAX_SIZE, MAX_STEPS, STEPS, Graph, State, call, graph_of, keep_graph, run
from .isomorphism import Classes, Shape
from .library import Library, estimate_weights
from .terms import FUNC, IDENTITY, Apply, Named, Primitive, Term, mass, parse, spine, type_of
from .types import Arrow, T, Type

__all__ = ["Exploration", "Found", "Library", "enumerate_programs", "estimate_weights", "explore", "program_blocks"]

COSTS_PER_NAT = 2**32
"""Negative log-probabilities are summed as whole numbers of this fraction of a nat: then equal sums are equal, in
whatever order they were taken, and ties are ties."""


# --- blocks, in order --------------------------------------------------------------------------------------------


class Weight(NamedTuple):
    """What the terms of a block have in common, and blocks are ordered by."""

    cost: int
    mass: int
    size: int

    def plus(self, other: Weight) -> Weight:
        return Weight(self.cost + other.cost, self.mass + other.mass, self.size + other.size)

    @property
    def log_probability(self) -> float:
        return -self.cost / COSTS_PER_NAT


class Choice(NamedTuple):
    """Any one of a block's terms, in the place of a term.

    The r-th of them adds r x `stride` to the rank of the term that it is part of.
    """

    block: Block
    stride: int


Spine: TypeAlias = "tuple[int, Named, list[Choice]]"
"""A primitive applied to any one of some arguments each; and the rank of the first such term."""


class Block:
    """All terms of one type and weight: some primitives, and some functions applied to some arguments.

    Terms have ranks, from 0. `pieces` holds, after the rank of its first term, either a primitive or a pair of blocks:
    the latter are the terms (f x), f from the one and x from the other, ranked by f and then by x.
    """

    __slots__ = ("_spines", "_terms", "count", "pieces", "type", "weight")

    def __init__(self, of: Type, weight: Weight) -> None:
        self.type, self.weight = of, weight
        self.count = 0
        self.pieces: list[tuple[int, Named | tuple[Block, Block]]] = []
        self._spines: list[Spine] | None = None
        self._terms: list[Term] | None = None

    def append(self, piece: Named | tuple[Block, Block]) -> None:
        self.pieces.append((self.count, piece))
        self.count += piece[0].count * piece[1].count if isinstance(piece, tuple) else 1

    def spines(self) -> list[Spine]:
        """The block once more, as primitives that are applied to choices of arguments."""
        if self._spines is None:
            self._spines = []
            for first, piece in self.pieces:
                if isinstance(piece, tuple):
                    functions, arguments = piece
                    for rank, head, before in functions.spines():
                        strides = [Choice(block, stride * arguments.count) for block, stride in before]
                        self._spines.append((first + rank * arguments.count, head, [*strides, Choice(arguments, 1)]))
                else:
                    self._spines.append((first, piece, []))
        return self._spines

    def terms(self) -> Iterator[Term]:
        """All terms, by rank. Those of its parts are kept, its own are not."""
        for _, piece in self.pieces:
            if isinstance(piece, tuple):
                functions, arguments = piece
                yield from (
                    Apply(function, argument)
                    for function in functions.kept_terms()
                    for argument in arguments.kept_terms()
                )
            else:
                yield piece

    def kept_terms(self) -> list[Term]:
        if self._terms is None:
            self._terms = list(self.terms())
        return self._terms

    def term(self, rank: int) -> Term:
        """The term of that rank, built without the others."""
        first, piece = next(found for found in reversed(self.pieces) if found[0] <= rank)
        if not isinstance(piece, tuple):
            return piece
        functions, arguments = piece
        function, argument = divmod(rank - first, arguments.count)
        return Apply(functions.term(function), arguments.term(argument))


def program_blocks(library: Library, *, max_size: int = MAX_SIZE, max_mass: int = MAX_STEPS) -> Iterator[Block]:
    """The blocks of programs, most probable first, then lightest, then smallest; all that are within the limits."""
    order = itertools.count()
    finished: defaultdict[Type, list[Block]] = defaultdict(list)
    waiting: defaultdict[Type, list[tuple[Block, int]]] = defaultdict(list)
    heap: list[tuple[Weight, int, Named | Block, int]] = []

    def combine(functions: Block, index: int) -> None:
        """Put the function block on the heap with the first argument block from `index` that keeps the limits."""
        takes = functions.type.argument
        for number in range(index, len(finished[takes])):
            weight = functions.weight.plus(finished[takes][number].weight)
            if weight.size <= max_size and weight.mass <= max_mass:
                heapq.heappush(heap, (weight, next(order), functions, number))
                return
        waiting[takes].append((functions, len(finished[takes])))

    for named, value in zip(library.primitives, library.log_probabilities, strict=True):
        # A cost of at least 1: what is combined of two blocks must come after both.
        weight = Weight(max(1, round(-value * COSTS_PER_NAT)), mass(named), 1)
        if weight.size <= max_size and weight.mass <= max_mass:
            heapq.heappush(heap, (weight, next(order), named, 0))
    while heap:
        weight = heap[0][0]
        fresh: dict[Type, Block] = {}
        while heap and heap[0][0] == weight:
            _, _, head, index = heapq.heappop(heap)
            if isinstance(head, Block):
                of, piece = head.type.result, (head, finished[head.type.argument][index])
                combine(head, index + 1)
            else:
                of, piece = type_of(head), head
            fresh.setdefault(of, Block(of, weight)).append(piece)
        for of, block in fresh.items():
            finished[of].append(block)
        for of, block in fresh.items():
            for functions, index in waiting.pop(of, ()):
                combine(functions, index)
            if isinstance(of, Arrow):
                combine(block, 0)
        if T in fresh:
            yield fresh[T]


def enumerate_programs(library: Library, *, max_size: int = MAX_SIZE) -> Iterator[tuple[float, Term]]:
    """All programs of up to `max_size` primitives with their log-probabilities, in non-increasing order, each once.

    Among equally probable ones the lightest come first, then the smallest, then in an order that is always the same.
    Log-probabilities are exact to 2^-33 nats a primitive.
    """
    for block in program_blocks(library, max_size=max_size):
        for term in block.terms():
            yield block.weight.log_probability, term


# --- running blocks ----------------------------------------------------------------------------------------------


Ranks: TypeAlias = dict[int, int]
"""States that can be reached (by number), each with the least rank of a choice that reaches it."""


class Reachable:
    """The final states of whole blocks of programs: the interpreter, where an argument may be a `Choice`.

    As every argument is used once, choices are independent: the rank of a combined choice is the sum of the ranks of
    its parts, and the first program to reach a state is made of the first parts that do.
    """

    def __init__(self, max_connections: int = MAX_CONNECTIONS) -> None:
        self.states: list[State] = []
        self._numbers: dict[State, int] = {}
        self._steps: dict[str, dict[int, int]] = {name: {} for name in STEPS}
        self._finals: defaultdict[Block, dict[int, Ranks]] = defaultdict(dict)
        self.initial = self._number(State(max_connections=max_connections))

    def finals(self, block: Block, state: int) -> Ranks:
        """The final states of the block's programs, run in `state`."""
        known = self._finals[block]
        found = known.get(state)
        if found is None:
            found = known[state] = self._any_of(block, 1, [], state)
        return found

    def _any_of(self, block: Block, stride: int, arguments: list[Term | Choice], state: int) -> Ranks:
        """Run every term of a block, with the same further arguments."""
        merged: Ranks = {}
        for rank, head, own in block.spines():
            if stride != 1:
                own = [Choice(of, inner * stride) for of, inner in own]
            found = self._run(head, own + arguments if arguments else own, state)
            _merge(merged, found, rank * stride)
        return merged

    def _run(self, head: Term | Choice, arguments: list[Term | Choice], state: int) -> Ranks:
        """Run a program in which choices may stand; each primitive does what `interpreter.execute` says."""
        while True:
            if isinstance(head, Choice):
                return self._any_of(*head, arguments, state) if arguments else self._finals_of(head, state)
            if not isinstance(head, Primitive):
                rest = call(head, arguments)
            elif (step := self._steps.get(head.name)) is not None:
                after = step.get(state)
                if after is None:
                    after = step[state] = self._number(STEPS[head.name](self.states[state]))
                state, rest = after, arguments[0]
            elif head == IDENTITY:
                return {state: 0}
            else:
                *conditions, rest = arguments
                middle = self._kept(state, *conditions) if head == FUNC else self._branch(state, *conditions)
                if len(middle) > 1 or 0 not in middle.values():
                    return self._then(middle, rest)
                (state,) = middle
            head, arguments = spine(rest)

    def _finals_of(self, choice: Choice, state: int) -> Ranks:
        finals = self.finals(choice.block, state)
        return finals if choice.stride == 1 else {final: rank * choice.stride for final, rank in finals.items()}

    def _kept(self, state: int, routine: Term | Choice) -> Ranks:
        before, kept = self.states[state], {}
        for final, rank in self._run(*spine(routine), state).items():
            _merge(kept, {self._number(keep_graph(before, self.states[final])): rank})
        return kept

    def _branch(
        self, state: int, left: Term | Choice, right: Term | Choice, then: Term | Choice, otherwise: Term | Choice
    ) -> Ranks:
        ends, other_ends = self._positions(left, state), self._positions(right, state)
        outcomes: Ranks = {}
        for end, other_end in itertools.product(ends, other_ends):
            _merge(outcomes, {int(end == other_end): ends[end] + other_ends[other_end]})
        merged: Ranks = {}
        for equal, rank in outcomes.items():
            _merge(merged, self._run(*spine(then if equal else otherwise), state), rank)
        return merged

    def _positions(self, term: Term | Choice, state: int) -> Ranks:
        positions: Ranks = {}
        for final, rank in self._run(*spine(term), state).items():
            _merge(positions, {self.states[final].position: rank})
        return positions

    def _then(self, middle: Ranks, rest: Term | Choice) -> Ranks:
        """What `rest` makes of every state."""
        merged: Ranks = {}
        for state, rank in middle.items():
            _merge(merged, self._run(*spine(rest), state), rank)
        return merged

    def _number(self, state: State) -> int:
        number = self._numbers.setdefault(state, len(self.states))
        if number == len(self.states):
            self.states.append(state)
        return number


def _merge(into: Ranks, found: Ranks, offset: int = 0) -> None:
    """Add what was found to what is known, `offset` ranks on; the least rank stays."""
    for state, rank in found.items():
        known = into.get(state)
        if known is None or rank + offset < known:
            into[state] = rank + offset


# --- exploring ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """The lightest program seen of one isomorphism class, its graph, and whether the class was known before."""

    program: Term
    graph: Graph
    mass: int
    known: bool


@dataclass(slots=True)
class Exploration:
    """Where a search stands: what it found, by class, and how far the enumeration is.

    `weight` is that of the block in hand, `rank` how many of its programs are done, `programs` how many in all.
    """

    found: list[Found]
    weight: Weight | None = None
    rank: int = 0
    programs: int = 0
    replaced: int = 0
    exhausted: bool = False

    @property
    def log_probability(self) -> float:
        """Of the last program enumerated."""
        return self.weight.log_probability if self.weight else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "found": [{"program": str(one.program), "known": one.known} for one in self.found],
            "weight": self.weight,
            "rank": self.rank,
            "programs": self.programs,
            "replaced": self.replaced,
            "exhausted": self.exhausted,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any], library: Library, max_connections: int = MAX_CONNECTIONS) -> Exploration:
        found = [
            _found(parse(one["program"], library), one["known"], max_connections=max_connections)
            for one in record["found"]
        ]
        weight = None if record["weight"] is None else Weight(*record["weight"])
        return cls(found, weight, record["rank"], record["programs"], record["replaced"], record["exhausted"])


def explore(
    library: Library,
    known: Sequence[Term],
    *,
    capacity: int,
    budget: int,
    seconds: float | None = None,
    max_connections: int = MAX_CONNECTIONS,
    max_size: int = MAX_SIZE,
    resume: dict[str, Any] | None = None,
    checkpoint: Callable[[Exploration], None] | None = None,
) -> Exploration:
    """Enumerate `budget` programs, and keep the lightest of each isomorphism class of the graphs that they build.

    There are as many classes as the programs `known` have, and new ones, in order of their first appearance, up to
    `capacity` in all; a known class takes a lighter program too. `seconds`, if given, ends the search earlier, at the
    end of a block; unlike `budget` it is not deterministic.

    `checkpoint` is called with the search as it stands after every block. A search with `to_json` of that as `resume`,
    and the same other arguments, goes on from there and ends like one that was never stopped.
    """
    if budget < 1 or capacity < 1:
        raise UserError(f"budget is {budget} and capacity {capacity}; both must be at least 1")
    if resume is not None:
        search = Exploration.from_json(resume, library, max_connections)
    else:
        search = Exploration([_found(program, True, max_connections=max_connections) for program in known])
    classes = Classes()
    for one in search.found:
        if classes.find(Shape.of(one.graph)) is not None:
            raise UserError(f"{one.program} builds a graph that an earlier known program builds; give one a class")
        classes.add(Shape.of(one.graph))
    deadline = None if seconds is None else time.monotonic() + seconds
    reachable = Reachable(max_connections)
    for block in program_blocks(library, max_size=max_size):
        if search.weight is not None and block.weight < search.weight:
            continue
        if block.weight != search.weight:
            search.weight, search.rank = block.weight, 0
        end = min(block.count, search.rank + budget - search.programs)
        _sort_in(search, classes, capacity, block, reachable, range(search.rank, end))
        search.programs += end - search.rank
        search.rank = end
        if checkpoint is not None:
            checkpoint(search)
        if search.programs >= budget or (deadline is not None and time.monotonic() > deadline):
            return search
    search.exhausted = True
    return search


def _found(program: Term, known: bool, *, max_connections: int) -> Found:
    graph = run(program, max_connections=max_connections)
    if graph is None:
        raise UserError(f"{program} builds a trivial graph; a known program builds one of two nodes or more, connected")
    return Found(program, graph, mass(program), known)


def _sort_in(
    search: Exploration, classes: Classes, capacity: int, block: Block, reachable: Reachable, ranks: range
) -> None:
    """Put the graphs of those of the block's programs into their classes that have their rank in `ranks`."""
    finals = reachable.finals(block, reachable.initial)
    for state, rank in sorted(finals.items(), key=lambda item: item[1]):
        graph = graph_of(reachable.states[state])
        if rank not in ranks or graph is None:
            continue
        shape = Shape.of(graph)
        number = classes.find(shape)
        if number is None and classes.count < capacity:
            classes.add(shape)
            search.found.append(Found(block.term(rank), graph, block.weight.mass, False))
        elif number is not None and block.weight.mass < search.found[number].mass:
            search.found[number] = Found(block.term(rank), graph, block.weight.mass, search.found[number].known)
            search.replaced += 1
