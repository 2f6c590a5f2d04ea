"""What a program does: it moves a cursor over a graph that it builds.

A state is a graph, a cursor (a node and a port), and a stack of nodes. A program runs from the initial state: one node
with id 0, the cursor on it at port 0, the stack empty. Nodes and edges draw their ids from one sequence, in order of
creation. All primitives but `identity` are in continuation style: they change the state, then run their last argument.
What the primitives do is the paper's, as its published interpreter has it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shared.config import UserError

from .terms import Invented, Lambda, Primitive, Term, apply, beta, size, spine, type_of
from .types import T, TypeMismatch

MAX_CONNECTIONS = 10
MAX_SIZE = 150
MAX_STEPS = 20_000
"""Primitives that one program may run, in the place of the paper's limit of 0.1 s. This interpreter runs 10,000 to
40,000 in that time, on one core; unlike a clock, a count gives the same result everywhere."""


class LimitExceeded(UserError):
    """A program that is too large, or runs for too long."""


class State(NamedTuple):
    """Where a program stands. An edge is (node, node, id, port), and holds the same port at both of its ends."""

    nodes: tuple[int, ...] = (0,)
    edges: tuple[tuple[int, int, int, int], ...] = ()
    components: int = 1
    position: int = 0
    port: int = 0
    stack: tuple[int, ...] = ()
    max_connections: int = MAX_CONNECTIONS

    @property
    def has_isolated_node(self) -> bool:
        return self.components > 1


# --- the primitives that take only the rest of the program -------------------------------------------------------


def next_port(state: State) -> State:
    return state._replace(port=(state.port + 1) % state.max_connections)


def prev_port(state: State) -> State:
    return state._replace(port=(state.port - 1) % state.max_connections)


def neighbor(state: State, node: int) -> int | None:
    """The other end of the edge at the node's current port."""
    for one, other, _, port in state.edges:
        if port == state.port and node in (one, other):
            return other if node == one else one
    return None


def move(state: State) -> State:
    """Follow the edge at the cursor's port, if there is one."""
    other = neighbor(state, state.position)
    return state if other is None else state._replace(position=other)


def add(state: State) -> State:
    """Add an isolated node and go there, if it can be connected later: the stack holds a node, and no other waits."""
    if not state.stack or state.has_isolated_node:
        return state
    node = len(state.nodes) + len(state.edges)
    return state._replace(nodes=(*state.nodes, node), components=state.components + 1, position=node)


def push(state: State) -> State:
    return state._replace(stack=(state.position, *state.stack))


def pop(state: State) -> State:
    """Drop the top of the stack, unless an isolated node under the cursor would find nothing there to connect to."""
    rest = state.stack[1:]
    if state.has_isolated_node and all(node == state.position for node in rest):
        return state
    return state._replace(stack=rest)


def connect(state: State) -> State:
    """Join the cursor's node with the stack's top, if the port is free at both and they are two."""
    if not state.stack:
        return state
    here, there = state.position, state.stack[0]
    if here == there or neighbor(state, here) is not None or neighbor(state, there) is not None:
        return state
    edge = (min(here, there), max(here, there), len(state.nodes) + len(state.edges), state.port)
    return state._replace(edges=(*state.edges, edge), components=1)


STEPS: Mapping[str, Callable[[State], State]] = {
    step.__name__: step for step in (next_port, prev_port, move, add, push, pop, connect)
}


def keep_graph(before: State, after: State) -> State:
    """`func`: of a subroutine that ended in `after` only the graph is kept, and only if it is in one piece."""
    if after.has_isolated_node:
        return before
    return before._replace(nodes=after.nodes, edges=after.edges, components=after.components)


# --- running a program -------------------------------------------------------------------------------------------


class Clock:
    """Counts the primitives that run, and stops a program that runs too many, or past `time_limit` seconds."""

    def __init__(self, max_steps: int = MAX_STEPS, time_limit: float | None = None) -> None:
        self.steps, self.max_steps, self.time_limit = 0, max_steps, time_limit
        self.start = time.perf_counter()

    def tick(self) -> None:
        self.steps += 1
        if self.steps > self.max_steps:
            raise LimitExceeded(f"the program runs more than {self.max_steps} primitives; a shorter one is needed")
        if self.time_limit is not None and time.perf_counter() - self.start > self.time_limit:
            raise LimitExceeded(f"the program runs for more than {self.time_limit} s; a shorter one is needed")


def execute(term: Term, state: State, clock: Clock) -> State:
    """Run a program in `state`; the state in which it ends."""
    while True:
        clock.tick()
        match spine(term):
            case Primitive("identity"), []:
                return state
            case Primitive("func"), [routine, rest]:
                state, term = keep_graph(state, execute(routine, state, clock)), rest
            case Primitive("if_positions_equal"), [left, right, then, otherwise, rest]:
                equal = execute(left, state, clock).position == execute(right, state, clock).position
                state, term = execute(then if equal else otherwise, state, clock), rest
            case Primitive(name), [rest]:
                state, term = STEPS[name](state), rest
            case (Invented() | Lambda()) as head, arguments:
                term = call(head, arguments)


def call(head: Invented | Lambda, arguments: list[Term]) -> Term:
    """An invented primitive (or a lambda) applied: its body with the arguments put in."""
    body = head.body if isinstance(head, Invented) else head
    while isinstance(body, Lambda) and arguments:
        body, arguments = beta(body, arguments[0]), arguments[1:]
    return apply(body, *arguments)


def run(
    term: Term,
    *,
    max_connections: int = MAX_CONNECTIONS,
    max_steps: int = MAX_STEPS,
    time_limit: float | None = None,
) -> Graph | None:
    """The graph that a program builds; `None` if it is trivial: fewer than two nodes, or more than one component.

    Raises `LimitExceeded` for a program of more than 150 primitives, or one that runs more than `max_steps` of them
    or, if that is given, for longer than `time_limit` seconds. `UserError` for a term that is no program.
    """
    if (measured := size(term)) > MAX_SIZE:
        raise LimitExceeded(f"the program has size {measured}; up to {MAX_SIZE} is allowed")
    if max_connections < 1:
        raise UserError(f"max_connections is {max_connections}; a node has at least one port")
    try:
        found = type_of(term)
    except TypeMismatch as error:
        raise UserError(f"{term} is ill-typed: {error}") from None
    if found != T:
        raise UserError(f"{term} is {found}, not a program; a program's type is T")
    try:
        return graph_of(execute(term, State(max_connections=max_connections), Clock(max_steps, time_limit)))
    except RecursionError:
        raise LimitExceeded("the program nests its subroutines too deeply; a flatter one is needed") from None


def graph_of(state: State) -> Graph | None:
    """The graph of a final state; `None` if it is trivial."""
    if len(state.nodes) < 2 or state.components > 1:
        return None
    return Graph(tuple(sorted(state.edges)), state.nodes, state.max_connections)


# --- graphs and their files --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Graph:
    """What a program leaves: nodes by id in order of creation, and edges (node, node, id, port), each once, sorted."""

    edges: tuple[tuple[int, int, int, int], ...]
    nodes: tuple[int, ...]
    max_connections: int = MAX_CONNECTIONS

    @property
    def next_id(self) -> int:
        """Nodes and edges share one sequence of ids, so this is how many there are of both."""
        return len(self.nodes) + len(self.edges)

    def to_json(self) -> dict[str, Any]:
        """The fields of a line of `graphs.jsonl` that describe the graph."""
        return {
            "nodes": list(self.nodes),
            "edges": [list(edge) for edge in self.edges],
            "max_conn": self.max_connections,
            "n_nodes": len(self.nodes),
            "next_id": self.next_id,
        }

    @classmethod
    def from_json(cls, record: Any) -> Graph:
        """Read what `to_json` writes (further fields may be there); `UserError` says what is wrong with it."""
        if not isinstance(record, dict):
            raise UserError(f"a graph is an object with the fields nodes, edges and max_conn, not {record!r:.60}")
        missing = [name for name in ("nodes", "edges", "max_conn") if name not in record]
        if missing:
            raise UserError(f"the graph lacks the field {missing[0]!r}")
        nodes, edges, ports = record["nodes"], record["edges"], record["max_conn"]
        if type(ports) is not int or ports < 1:
            raise UserError(f"max_conn is {ports!r}; a whole number of at least 1 is allowed")
        if not _are_ids(nodes):
            raise UserError(f"nodes is {nodes!r:.60}; a list of ids, whole numbers from 0, is expected")
        if not isinstance(edges, list):
            raise UserError(f"edges is {edges!r:.60}; a list of [node, node, id, port] is expected")
        taken: set[tuple[int, int]] = set()
        for edge in edges:
            if not _are_ids(edge) or len(edge) != 4:
                raise UserError(f"edge {edge!r:.60} is not of the form [node, node, id, port]")
            one, other, _, port = edge
            if one == other or not {one, other} <= set(nodes):
                raise UserError(f"edge {edge} does not join two of the nodes {nodes}")
            if port >= ports or taken & {(one, port), (other, port)}:
                raise UserError(f"edge {edge}: port {port} is taken already, or not below max_conn = {ports}")
            taken |= {(one, port), (other, port)}
        ids = sorted([*nodes, *(edge[2] for edge in edges)])
        if ids != list(range(len(ids))):
            raise UserError(f"the ids of nodes and edges together must count up from 0 without a gap; they are {ids}")
        if record.get("next_id", len(ids)) != len(ids) or record.get("n_nodes", len(nodes)) != len(nodes):
            raise UserError(f"next_id and n_nodes must be {len(ids)} and {len(nodes)}, as many as there are")
        return cls(tuple(sorted(map(tuple, edges))), tuple(sorted(nodes)), ports)


def _are_ids(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def read_graphs(path: Path) -> list[tuple[Graph, dict[str, Any]]]:
    """The graphs of a file like `graphs.jsonl`, one a line, each with its record; `UserError` names file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is missing or not a text file: {error}") from None
    graphs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            graphs.append((Graph.from_json(record), record))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}, column {error.colno}: not valid JSON: {error.msg}") from None
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return graphs
