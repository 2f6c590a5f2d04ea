"""Each primitive on a graph drawn by hand, and the graphs of the published run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shared.config import UserError

from ..interpreter import (
    Clock,
    Graph,
    LimitExceeded,
    State,
    add,
    connect,
    execute,
    keep_graph,
    move,
    next_port,
    pop,
    prev_port,
    push,
    read_graphs,
    run,
)
from ..terms import IDENTITY, PRIMITIVES, apply, invent, mass, parse, size, spell

# 0 --port 0-- 1 --port 1-- 4, edges 2 and 3 between 0 and 1; the cursor on node 1.
#      |          |
#      +--port 2--+
DRAWN = State(nodes=(0, 1, 4), edges=((0, 1, 2, 0), (0, 1, 3, 2), (1, 4, 5, 1)), position=1, stack=(4, 0))


def ends(text: str, state: State = DRAWN) -> State:
    return execute(parse(text), state, Clock())


def test_identity_leaves_the_state() -> None:
    assert ends("identity") == DRAWN


def test_ports_wrap_around() -> None:
    assert next_port(DRAWN).port == 1
    assert prev_port(DRAWN).port == 9
    assert next_port(prev_port(DRAWN)) == DRAWN
    assert prev_port(State(max_connections=3)).port == 2


@pytest.mark.parametrize(("port", "position"), [(0, 0), (1, 4), (2, 0), (3, 1)])
def test_move_follows_the_edge_at_the_port(port: int, position: int) -> None:
    assert move(DRAWN._replace(port=port)) == DRAWN._replace(port=port, position=position)


def test_add_makes_an_isolated_node_with_the_next_id_and_goes_there() -> None:
    state = add(DRAWN._replace(port=3))
    assert (state.nodes, state.position, state.port, state.components) == ((0, 1, 4, 6), 6, 3, 2)
    assert add(state) == state, "one isolated node at a time"
    assert add(State()) == State(), "nothing on the stack to connect it to"


def test_push_and_pop() -> None:
    assert push(DRAWN).stack == (1, 4, 0)
    assert pop(DRAWN).stack == (0,)
    assert pop(State()) == State()


def test_pop_keeps_what_an_isolated_node_needs() -> None:
    isolated = add(DRAWN)
    assert pop(isolated).stack == (0,), "node 0 is left to connect to"
    assert pop(isolated._replace(stack=(4,))).stack == (4,)
    assert pop(isolated._replace(stack=(0, 6))).stack == (0, 6), "the rest is only the isolated node itself"
    assert pop(isolated._replace(position=1, stack=(0, 6))).stack == (6,), "judged from where the cursor is"


def test_connect_joins_the_same_port_of_both() -> None:
    state = connect(DRAWN._replace(port=3))
    assert state.edges[-1] == (1, 4, 6, 3)
    assert connect(state) == state, "the port is taken"
    assert connect(DRAWN._replace(port=1, position=0)) == DRAWN._replace(port=1, position=0), "taken at the other end"
    assert connect(DRAWN._replace(port=3, position=4)).edges == DRAWN.edges, "no edge from a node to itself"
    assert connect(DRAWN._replace(port=3, stack=())).edges == DRAWN.edges, "nothing on the stack"


def test_connecting_an_isolated_node_makes_one_component() -> None:
    assert connect(add(DRAWN._replace(port=3))).components == 1


def test_func_keeps_only_the_graph() -> None:
    state = ends("func (push (next_port (next_port (next_port (add (connect identity)))))) (push identity)")
    assert state == DRAWN._replace(nodes=(0, 1, 4, 6), edges=(*DRAWN.edges, (1, 6, 7, 3)), stack=(1, 4, 0))


def test_func_drops_a_graph_in_two_pieces() -> None:
    assert ends("func (add identity) (push identity)") == push(DRAWN)
    assert keep_graph(DRAWN, add(DRAWN)) == DRAWN


def test_if_positions_equal_compares_where_two_programs_leave_the_cursor() -> None:
    branches = "(push identity) (pop identity)"
    same = f"if_positions_equal (move identity) (next_port (next_port (move identity))) {branches} identity"
    assert ends(same) == push(DRAWN)
    assert ends(f"if_positions_equal identity (move identity) {branches} (next_port identity)") == next_port(pop(DRAWN))


def test_the_worked_example() -> None:
    graph = run(parse("push (add (connect identity))"))
    assert graph == Graph(edges=((0, 1, 2, 0),), nodes=(0, 1))
    assert graph.next_id == 3
    assert graph.to_json()["edges"] == [[0, 1, 2, 0]]


@pytest.mark.parametrize("text", ["identity", "push (next_port identity)", "push (add identity)"])
def test_trivial_graphs_are_none(text: str) -> None:
    assert run(parse(text)) is None


def test_two_nodes_may_be_joined_at_several_ports() -> None:
    assert run(parse("push (add (connect (next_port (connect identity))))")).edges == ((0, 1, 2, 0), (0, 1, 3, 1))
    assert run(parse("push (add (connect (next_port (connect identity))))"), max_connections=1).edges == ((0, 1, 2, 0),)


def test_invented_primitives_do_what_their_body_does() -> None:
    higher = "{fn_1}(lam (next_port ($0 identity)))"
    text = f"push (add (connect ({higher} {{fn_0}}(lam (push (add (connect $0)))))))"
    assert run(parse(text)) == run(parse("push (add (connect (next_port (push (add (connect identity))))))"))


def test_programs_beyond_the_limits_are_refused() -> None:
    long = IDENTITY
    for _ in range(150):
        long = apply(PRIMITIVES["push"], long)
    with pytest.raises(LimitExceeded, match="size 151; up to 150"):
        run(long)
    assert run(long.argument) is None
    with pytest.raises(LimitExceeded, match="more than 3 primitives"):
        run(parse("push (add (connect identity))"), max_steps=3)
    with pytest.raises(LimitExceeded, match=r"more than 0\.0 s"):
        run(parse("push (add (connect identity))"), time_limit=0.0)


def test_a_small_program_that_runs_for_long_is_refused() -> None:
    doubled = invent("fn_0", parse("(lam (push (next_port $0)))", expected=None))
    for number in range(1, 15):
        doubled = invent(f"fn_{number}", parse("(lam (fn (fn $0)))", {"fn": doubled}, expected=None))
    with pytest.raises(LimitExceeded, match="more than 20000 primitives"):
        run(apply(doubled, IDENTITY))
    nested = invent("fn_0", parse("(lam (func (func $0 identity) identity))", expected=None))
    for number in range(1, 11):
        nested = invent(f"fn_{number}", parse("(lam (fn (fn $0)))", {"fn": nested}, expected=None))
    with pytest.raises(LimitExceeded, match="nests"):
        run(apply(nested, IDENTITY))


def test_only_programs_run() -> None:
    with pytest.raises(UserError, match=r"push is T -> T, not a program"):
        run(PRIMITIVES["push"])
    with pytest.raises(UserError, match="ill-typed"):
        run(apply(IDENTITY, IDENTITY))
    with pytest.raises(UserError, match="at least one port"):
        run(IDENTITY, max_connections=0)


# --- files -------------------------------------------------------------------------------------------------------

LINE = {"nodes": [0, 1, 3], "edges": [[0, 1, 2, 0], [1, 3, 4, 1]], "max_conn": 10, "n_nodes": 3, "next_id": 5}


def test_graphs_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "graphs.jsonl"
    graph = Graph.from_json(LINE)
    assert graph.to_json() == LINE
    path.write_text(json.dumps(LINE) + "\n\n" + json.dumps(graph.to_json() | {"id": "x"}) + "\n", encoding="utf-8")
    assert [(found, record.get("id")) for found, record in read_graphs(path)] == [(graph, None), (graph, "x")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nodes: 1}", "line 2, column 2: not valid JSON"),
        ("[]", "line 2: a graph is an object"),
        ({"edges": None}, "line 2: edges is None"),
        ({"nodes": [0, "1"]}, "line 2: nodes is"),
        ({"edges": [[0, 1, 2]]}, r"line 2: edge \[0, 1, 2\] is not of the form"),
        ({"edges": [[0, 2, 1, 0]]}, "line 2: edge .* does not join two of the nodes"),
        ({"edges": [[0, 0, 2, 0]]}, "line 2: edge .* does not join two of the nodes"),
        ({"edges": [[0, 1, 2, 10], [1, 3, 4, 1]]}, "line 2: edge .*: port 10 is taken already, or not below"),
        ({"edges": [[0, 1, 2, 1], [1, 3, 4, 1]]}, "line 2: edge .*: port 1 is taken"),
        ({"edges": [[0, 1, 2, 0], [1, 3, 5, 1]]}, "line 2: the ids of nodes and edges .* without a gap"),
        ({"next_id": 9}, "line 2: next_id and n_nodes must be 5 and 3"),
        ({"max_conn": 0}, "line 2: max_conn is 0"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str | dict, message: str) -> None:
    path = tmp_path / "graphs.jsonl"
    bad = line if isinstance(line, str) else json.dumps(LINE | line)
    path.write_text(json.dumps(LINE) + "\n" + bad + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"graphs.jsonl, {message}"):
        read_graphs(path)


def test_a_missing_field_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks the field 'edges'"):
        Graph.from_json({"nodes": [0], "max_conn": 10})
    with pytest.raises(UserError, match="missing"):
        read_graphs(tmp_path / "none.jsonl")


OFFICIAL = Path(os.environ.get("REPRISE_DATA", "none")) / "gssnn" / "graphs.jsonl"


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="the published run's graphs are not here")
def test_published_programs_build_the_published_graphs() -> None:
    programs = [(graph, record) for graph, record in read_graphs(OFFICIAL) if record.get("program")]
    assert len(programs) == 60
    for graph, record in programs:
        program = parse(record["program"])
        assert run(program) == graph
        assert (spell(program), str(program)) == (record["program"], record["stitch_program"])
        assert (size(program), mass(program)) == (record["program_size"], record["program_mass"])
