"""Which graphs are the same: isomorphism without regard to ids, ports and multiple edges."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from .interpreter import Graph


class Shape(NamedTuple):
    """A graph without ids, ports and multiplicity: how many nodes, and which pairs of them are joined."""

    num_nodes: int
    pairs: frozenset[tuple[int, int]]

    @classmethod
    def of(cls, graph: Graph) -> Shape:
        place = {node: number for number, node in enumerate(graph.nodes)}
        return cls(len(place), frozenset((place[one], place[other]) for one, other, _, _ in graph.edges))

    def neighbors(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for one, other in self.pairs:
            found[one].append(other)
            found[other].append(one)
        return found


class Classes:
    """Isomorphism classes by number, in the order in which `number_of` is first asked for a member.

    Candidates share the paper's key, number of nodes and sorted degrees, refined by two rounds of color refinement
    (which isomorphic graphs share as well); VF2++ decides among them.
    """

    def __init__(self) -> None:
        self.count = 0
        self._numbers: dict[Shape, int] = {}
        self._members: defaultdict[Any, list[tuple[int, Any]]] = defaultdict(list)

    def find(self, shape: Shape) -> int | None:
        """The class of a graph, if there is one."""
        if shape not in self._numbers:
            import networkx

            own = _as_networkx(shape)
            for number, member in self._members[_key(shape)]:
                if networkx.vf2pp_is_isomorphic(own, member):
                    self._numbers[shape] = number
                    break
        return self._numbers.get(shape)

    def add(self, shape: Shape) -> int:
        """A new class, for a graph that `find` knows none for."""
        number, self.count = self.count, self.count + 1
        self._numbers[shape] = number
        self._members[_key(shape)].append((number, _as_networkx(shape)))
        return number


def _key(shape: Shape) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    neighbors = shape.neighbors()
    degrees = colors = [len(found) for found in neighbors]
    for _ in range(2):
        # Hashes of tuples of whole numbers are the same in every process.
        colors = [
            hash((color, *sorted(colors[n] for n in found))) for color, found in zip(colors, neighbors, strict=True)
        ]
    return shape.num_nodes, tuple(sorted(degrees)), tuple(sorted(colors))


def _as_networkx(shape: Shape) -> Any:
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(range(shape.num_nodes))
    graph.add_edges_from(sorted(shape.pairs))
    return graph
