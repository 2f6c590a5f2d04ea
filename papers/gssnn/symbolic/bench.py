"""How fast programs are enumerated and run, beside a plain recursive version (`python -m …symbolic.bench` prints it).

The plain version enumerates by recursion over typed holes up to a cost, turns every program into closures, and runs
them one by one. Both are asked for the same programs, and must agree on the graphs that these build.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .interpreter import STEPS, Graph, State, graph_of, keep_graph
from .library import Library, estimate_weights
from .search import Block, Reachable, program_blocks
from .terms import Apply, Invented, Lambda, Named, Primitive, Term, invent, parse, spine, type_of
from .types import Arrow, T, Type

# --- the plain version -------------------------------------------------------------------------------------------

Meaning = Callable[..., State]


class Plain:
    """Enumeration by recursion over typed holes."""

    def __init__(self, library: Library) -> None:
        self.rules: defaultdict[Type, list[tuple[float, Named, list[Type]]]] = defaultdict(list)
        """By type of a hole: the primitives that can fill it, with their costs and the holes that they leave."""
        for named, value in zip(library.primitives, library.log_probabilities, strict=True):
            left, takes = type_of(named), []
            self.rules[left].append((-value, named, []))
            while isinstance(left, Arrow):
                takes = [*takes, left.argument]
                left = left.result
                self.rules[left].append((-value, named, takes))
        self.least = {of: min(cost for cost, _, _ in rules) for of, rules in self.rules.items()}

    def programs(self, of: Type, high: float) -> Iterator[tuple[float, Term]]:
        """Terms whose cost, the negative log-probability, is below `high`.

        Each hole is given what the cheapest heads leave that can fill those after it: few branches come to nothing.
        """
        for cost, named, takes in self.rules[of]:
            reserved = sum(map(self.least.__getitem__, takes))
            if cost + reserved < high:
                yield from self.applied(named, takes, cost, reserved, high)

    def applied(
        self, head: Term, takes: list[Type], cost: float, reserved: float, high: float
    ) -> Iterator[tuple[float, Term]]:
        if not takes:
            yield cost, head
            return
        reserved -= self.least[takes[0]]
        for own, argument in self.programs(takes[0], high - cost - reserved):
            yield from self.applied(Apply(head, argument), takes[1:], cost + own, reserved, high)


def plain_meaning(term: Term, scope: tuple[Meaning, ...] = ()) -> Meaning:
    """The term as a function: of a state, or of further functions."""
    head, arguments = spine(term)
    meanings = [plain_meaning(argument, scope) for argument in arguments]
    match head:
        case Primitive(name):
            function = _PLAIN[name]
        case Invented():
            function = plain_meaning(head.body)
        case Lambda():
            body = head.body

            def function(argument: Meaning) -> Meaning:
                return plain_meaning(body, (argument, *scope))
        case _:
            function = scope[head.number]
    for meaning in meanings:
        function = function(meaning)
    return function


def _plain_if(f: Meaning) -> Meaning:
    return lambda g: lambda h: lambda k: lambda rest: lambda s: rest(h(s) if f(s).position == g(s).position else k(s))


def _plain_step(step: Callable[[State], State]) -> Meaning:
    return lambda rest: lambda state: rest(step(state))


_PLAIN: dict[str, Meaning] = {
    "identity": lambda state: state,
    "func": lambda routine: lambda rest: lambda state: rest(keep_graph(state, routine(state))),
    "if_positions_equal": _plain_if,
    **{
        name: functools.partial(lambda step, rest: lambda state: rest(step(state)), step)
        for name, step in STEPS.items()
    },
}


# --- the comparison ----------------------------------------------------------------------------------------------


def blocks_of(library: Library, programs: int) -> tuple[list[Block], float]:
    """The first blocks that together hold at least so many programs, and a cost between theirs and all later ones."""
    blocks, count = [], 0
    for block in program_blocks(library):
        if count >= programs and block.weight.cost > blocks[-1].weight.cost:
            return blocks, -(blocks[-1].weight.log_probability + block.weight.log_probability) / 2
        blocks.append(block)
        count += block.count
    return blocks, math.inf


def run_in_blocks(library: Library, programs: int) -> set[Graph | None]:
    """The graphs that the programs build, by `program_blocks` and `Reachable`."""
    reachable = Reachable()
    blocks, _ = blocks_of(library, programs)
    finals = {final for block in blocks for final in reachable.finals(block, reachable.initial)}
    return {graph_of(reachable.states[final]) for final in finals}


def run_plainly(library: Library, high: float) -> set[Graph | None]:
    """The graphs that the programs of a cost below `high` build, one by one."""
    return {graph_of(plain_meaning(term)(State())) for _, term in Plain(library).programs(T, high)}


def timed(function: Callable[[], set[Graph | None]], repeats: int) -> tuple[float, set[Graph | None]]:
    """The least processor time of some runs, in seconds, and what the function returns.

    Both versions only compute, on one core: processor time is what they take on a machine that does nothing else.
    """
    best, value = math.inf, set()
    for _ in range(repeats):
        start = time.process_time()
        value = function()
        best = min(best, time.process_time() - start)
    return best, value


GROWN = (
    ("fn_0", "(lam (push (add (connect $0))))"),
    ("fn_1", "(lam (fn_0 (next_port (fn_0 $0))))"),
    ("fn_2", "(add (next_port (connect identity)))"),
)
FRONTIER = ("fn_0 identity", "fn_1 (next_port fn_2)", "fn_1 (pop (next_port (connect fn_2)))", "fn_0 (func fn_2 fn_2)")


def libraries() -> dict[str, Library]:
    """The language as it is; with three primitives that compression finds; and with weights from some programs."""
    library = initial = Library.initial()
    for name, body in GROWN:
        library = Library.uniform((*library.primitives, invent(name, parse(body, library, expected=None))))
    weighted = estimate_weights(library, [parse(text, library) for text in FRONTIER])
    return {"initial": initial, "grown": library, "weighted": weighted}


def search_speed(programs: Sequence[int], compared: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Programs per second of each library, the longest program's size, and the ratio to the plain version.

    The plain version runs up to `compared` programs; `programs` are the numbers asked for, whole blocks the answer.
    """
    for name, library in libraries().items():
        for wanted in programs:
            blocks, high = blocks_of(library, wanted)
            count = sum(block.count for block in blocks)
            seconds, graphs = timed(functools.partial(run_in_blocks, library, wanted), repeats)
            row = {"library": name, "programs": count, "size": max(block.weight.size for block in blocks)}
            row |= {"programs_per_second": count / seconds}
            if wanted <= compared:
                plain_seconds, plain_graphs = timed(functools.partial(run_plainly, library, high), repeats)
                if plain_graphs != graphs:
                    raise RuntimeError(f"the two versions build different graphs from the {name} library")
                row |= {"plain_per_second": count / plain_seconds, "ratio": plain_seconds / seconds}
            yield row


def main() -> None:
    """Print programs per second by both, and how they change as programs grow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compared", type=int, default=100_000, help="programs that both versions run")
    parser.add_argument("--most", type=int, default=10_000_000, help="programs up to which only the fast one runs")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, of which the fastest counts")
    options = parser.parse_args()
    print(f"{'library':<10}{'programs':>12}{'size':>6}{'programs/s':>14}{'plain':>10}{'ratio':>8}")
    programs = [10**power for power in range(3, 1 + round(math.log10(options.most)))]
    for row in search_speed(programs, options.compared, options.repeats):
        plain = f"{row['plain_per_second']:,.0f}" if "ratio" in row else "-"
        ratio = f"{row['ratio']:.1f}" if "ratio" in row else "-"
        head = f"{row['library']:<10}{row['programs']:>12,}{row['size']:>6}"
        print(f"{head}{row['programs_per_second']:>14,.0f}{plain:>10}{ratio:>8}")


if __name__ == "__main__":
    main()
