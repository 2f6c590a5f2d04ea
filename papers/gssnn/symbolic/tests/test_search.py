"""Enumeration against brute force, weights by hand and as published, and what exploring finds."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterator

import pytest

from shared.config import UserError

from .. import bench
from ..interpreter import MAX_CONNECTIONS, Clock, Graph, State, execute, graph_of, run
from ..isomorphism import Classes, Shape
from ..library import Library, estimate_weights
from ..search import Exploration, Reachable, enumerate_programs, explore, program_blocks
from ..terms import PRIMITIVES, Apply, Named, Term, apply, invent, mass, parse, size, type_of
from ..types import Arrow, T, Type


def grown() -> Library:
    """The language with a call before the rest, one whose argument is not run last, one that takes a function, and a
    function that is a call without its last argument."""
    bodies = (
        "(lam (push (add (connect $0))))",
        "(lam (func $0 (push identity)))",
        "(lam (lam (func (push $0) ($1 (add (connect identity))))))",
        "(func (push (add (connect identity))))",
    )
    invented = [invent(f"fn_{number}", parse(body, expected=None)) for number, body in enumerate(bodies)]
    return Library.uniform([*PRIMITIVES.values(), *invented])


def weighted() -> Library:
    library = grown()
    texts = ("fn_0 identity", "fn_2 push (next_port (fn_1 identity))", "fn_3 (fn_1 identity)")
    return estimate_weights(library, [parse(text, library) for text in texts])


def brute_force(library: Library, of: Type, exactly: int) -> Iterator[Term]:
    """All terms of a type and size, by recursion on the head and on how the rest is shared out."""
    for named in library.primitives:
        takes: list[Type] = []
        left = type_of(named)
        while True:
            if left == of:
                yield from _filled(library, named, takes, exactly - 1)
            if not isinstance(left, Arrow):
                break
            takes.append(left.argument)
            left = left.result


def _filled(library: Library, head: Term, takes: list[Type], left: int) -> Iterator[Term]:
    if not takes:
        if left == 0:
            yield head
        return
    for own in range(1, left + 1):
        for argument in brute_force(library, takes[0], own):
            yield from _filled(library, Apply(head, argument), takes[1:], left - own)


# --- the library and its weights ---------------------------------------------------------------------------------


def test_the_initial_library_is_uniform() -> None:
    library = Library.initial()
    assert len(library) == library.mass == 10
    assert set(library.log_probabilities) == {-math.log(10)}
    assert library["push"] == PRIMITIVES["push"]


def test_libraries_are_read_as_written() -> None:
    library = weighted()
    assert Library.from_json(json.loads(json.dumps(library.to_json()))) == library


def test_impossible_libraries_are_refused() -> None:
    push: Named = PRIMITIVES["push"]
    with pytest.raises(UserError, match="two primitives named push"):
        Library.uniform([push, push])
    with pytest.raises(UserError, match=r"log-probability of push is 0\.5"):
        Library((push,), (0.5,))
    with pytest.raises(UserError, match="1 primitives, but 2"):
        Library((push,), (-1.0, -1.0))
    with pytest.raises(UserError, match="unknown primitive 'jump'"):
        Library.from_json([{"name": "jump", "body": None, "log_probability": -1.0}])


def test_weights_of_one_program_by_hand() -> None:
    """Four holes of type T, that all ten primitives could fill."""
    library = estimate_weights(Library.initial(), [parse("push (push (add identity))")], max_difference=100.0)
    expected = {"push": 2.001, "add": 1.001, "identity": 1.001}
    for name, value in zip(library, library.log_probabilities, strict=True):
        assert value == pytest.approx(math.log(expected.get(name, 0.001) / 4.001))


def test_holes_of_another_type_count_for_those_that_can_fill_them() -> None:
    library = grown()
    library = estimate_weights(library, [parse("fn_2 push identity", library)], max_difference=100.0)
    values = dict(zip(library, library.log_probabilities, strict=True))
    # Two holes of T and one of T -> T: a program fills the former, fn_2 and push both (fn_2 with one argument less).
    assert values["identity"] == pytest.approx(math.log(1.001 / 2.001))
    assert values["push"] == values["fn_2"] == pytest.approx(math.log(1.001 / 3.001))


def test_programs_weigh_in_by_their_likelihood() -> None:
    """identity fills one hole of one in ten; push identity fills two, and so weighs a tenth of it."""
    library = estimate_weights(Library.initial(), [parse("identity"), parse("push identity")], max_difference=100.0)
    values = dict(zip(library, library.log_probabilities, strict=True))
    assert values["push"] == pytest.approx(math.log((1 / 11 + 0.001) / (10 / 11 + 2 / 11 + 0.001)))
    assert values["identity"] == pytest.approx(math.log((1 + 0.001) / (12 / 11 + 0.001)))


def test_a_wide_spread_is_rescaled_about_the_mean() -> None:
    frontier = [parse("push (push (add identity))")]
    wide = estimate_weights(Library.initial(), frontier, max_difference=100.0).log_probabilities
    narrow = estimate_weights(Library.initial(), frontier).log_probabilities
    assert max(narrow) - min(narrow) == pytest.approx(0.5)
    assert math.fsum(narrow) == pytest.approx(math.fsum(wide))
    scale = 0.5 / (max(wide) - min(wide))
    assert narrow[0] - narrow[1] == pytest.approx(scale * (wide[0] - wide[1]))


def test_an_empty_frontier_gives_the_uniform_library() -> None:
    assert estimate_weights(weighted(), []) == grown()


def test_weights_as_published_are_those_of_the_published_run() -> None:
    """`results/ssn_0_0/dsls/dsl_3.json` of the official code, from the two survivors of the first iteration."""
    fn_0 = invent("fn_0", parse("(lam (push (add (connect $0))))", expected=None))
    library = Library.uniform([fn_0, *PRIMITIVES.values()])
    frontier = [parse(text, library) for text in ("fn_0 identity", "fn_0 (next_port (add (connect identity)))")]
    library = estimate_weights(library, frontier, as_published=True)
    values = dict(zip(library, library.log_probabilities, strict=True))
    assert values["fn_0"] == values["identity"] == pytest.approx(-0.02730794504315437, abs=1e-15)
    assert values["add"] == values["connect"] == values["next_port"] == pytest.approx(-0.055382551266420776, abs=1e-15)
    assert values["push"] == values["move"] == pytest.approx(-0.05538256350199067, abs=1e-15)


# --- enumeration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("library", "largest"), [(Library.initial(), 5), (grown(), 4), (weighted(), 4)])
def test_enumeration_is_complete_without_repeats_and_in_order(library: Library, largest: int) -> None:
    expected = {term for exactly in range(1, largest + 1) for term in brute_force(library, T, exactly)}
    found = list(enumerate_programs(library, max_size=largest))
    assert len(found) == len(expected)
    assert {term for _, term in found} == expected
    values = [value for value, _ in found]
    assert values == sorted(values, reverse=True)
    for value, term in found[:: len(found) // 50]:
        assert value == pytest.approx(library.log_probability(term), abs=1e-8)


def test_equally_probable_programs_come_by_mass_and_always_in_the_same_order() -> None:
    found = list(enumerate_programs(grown(), max_size=3))
    assert found == list(enumerate_programs(grown(), max_size=3))
    for _, ties in itertools.groupby(found, key=lambda pair: pair[0]):
        masses = [mass(term) for _, term in ties]
        assert masses == sorted(masses)


def test_numbers_of_programs_of_the_initial_language() -> None:
    """7 (n - 1) programs put a step before; func and if_positions_equal share the rest out among 2 and 5."""
    numbers = [0, 1]
    for left in range(1, 6):
        shared = {1: numbers}
        for parts in range(2, 6):
            before = shared[parts - 1]
            shared[parts] = [sum(before[own] * numbers[n - own] for own in range(n)) for n in range(left + 1)]
        numbers = [*numbers, 7 * numbers[left] + shared[2][left] + shared[5][left]]
    counted = Counter(size(term) for _, term in enumerate_programs(Library.initial(), max_size=6))
    assert [0, *(counted[n] for n in range(1, 7))] == numbers == [0, 1, 7, 50, 364, 2697, 20308]


def test_programs_of_a_rank_are_those_enumerated() -> None:
    for block in itertools.islice(program_blocks(weighted(), max_size=4), 60):
        assert [block.term(rank) for rank in range(block.count)] == list(block.terms())


@pytest.mark.parametrize("library", [Library.initial(), grown(), weighted()])
def test_blocks_reach_what_their_programs_reach_one_by_one(library: Library) -> None:
    reachable, programs = Reachable(), 0
    for block in program_blocks(library, max_size=5):
        first: dict[State, int] = {}
        for rank, term in enumerate(block.terms()):
            first.setdefault(execute(term, State(), Clock()), rank)
        finals = reachable.finals(block, reachable.initial)
        assert {reachable.states[final]: rank for final, rank in finals.items()} == first
        programs += block.count
        if programs > 5000:
            break


# --- isomorphism classes -----------------------------------------------------------------------------------------


def connected_shapes(num_nodes: int) -> Iterator[Shape]:
    """All labelled connected graphs."""
    pairs = list(itertools.combinations(range(num_nodes), 2))
    for chosen in itertools.product((False, True), repeat=len(pairs)):
        shape = Shape(num_nodes, frozenset(itertools.compress(pairs, chosen)))
        reached, neighbors = {0}, shape.neighbors()
        queue = deque(reached)
        while queue:
            fresh = set(neighbors[queue.popleft()]) - reached
            reached |= fresh
            queue.extend(fresh)
        if len(reached) == num_nodes:
            yield shape


def program_for(shape: Shape) -> Term:
    """A program that builds a connected graph: a spanning tree by breadth first, then the other edges, a port each."""
    neighbors, parents, order = shape.neighbors(), {0: 0}, [0]
    for node in order:
        for other in sorted(neighbors[node]):
            if other not in parents:
                parents[other] = node
                order.append(other)
    words: list[str] = []
    port_of: dict[int, int] = {}
    position = port = 0

    def turn(to: int) -> None:
        nonlocal port
        words.extend(["next_port"] * ((to - port) % MAX_CONNECTIONS))
        port = to

    def go(to: int) -> None:
        nonlocal position
        up = [to]
        while up[-1]:
            up.append(parents[up[-1]])
        while position not in up:
            turn(port_of[position])
            words.append("move")
            position = parents[position]
        for node in reversed(up[: up.index(position)]):
            turn(port_of[node])
            words.append("move")
            position = node

    tree = {(min(node, parents[node]), max(node, parents[node])) for node in order[1:]}
    for number, node in enumerate(order[1:]):
        go(parents[node])
        turn(number)
        words.extend(["push", "add", "connect"])
        port_of[node], position = number, node
    for number, (one, other) in enumerate(sorted(shape.pairs - tree), len(tree)):
        go(one)
        words.append("push")
        go(other)
        turn(number)
        words.append("connect")
    program: Term = PRIMITIVES["identity"]
    for word in reversed(words):
        program = apply(PRIMITIVES[word], program)
    return program


@pytest.mark.parametrize(("num_nodes", "count"), [(2, 1), (3, 2), (4, 6), (5, 21)])
def test_small_connected_graphs_fall_into_the_known_number_of_classes(num_nodes: int, count: int) -> None:
    classes, built = Classes(), Classes()
    for shape in connected_shapes(num_nodes):
        if classes.find(shape) is None:
            classes.add(shape)
            graph = graph_of(execute(program_for(shape), State(), Clock()))
            assert built.find(Shape.of(graph)) is None
            built.add(Shape.of(graph))
            assert built.find(shape) is not None
    assert classes.count == built.count == count


def test_ids_ports_and_multiplicity_do_not_matter() -> None:
    single = Graph(edges=((0, 1, 2, 0),), nodes=(0, 1))
    double = Graph(edges=((0, 1, 2, 3), (0, 1, 3, 4)), nodes=(0, 1))
    assert Shape.of(single) == Shape.of(double)


# --- exploring ---------------------------------------------------------------------------------------------------

BUDGET = 4_000


def one_by_one(library: Library, known: list[Term], capacity: int, budget: int) -> list[Term]:
    """What `explore` finds, by the book."""
    best, classes = list(known), Classes()
    for program in known:
        classes.add(Shape.of(run(program)))
    for _, program in itertools.islice(enumerate_programs(library), budget):
        graph = graph_of(execute(program, State(), Clock()))
        if graph is None:
            continue
        number = classes.find(Shape.of(graph))
        if number is not None and mass(program) < mass(best[number]):
            best[number] = program
        elif number is None and len(best) < capacity:
            classes.add(Shape.of(graph))
            best.append(program)
    return best


@pytest.mark.parametrize("library", [bench.libraries()["grown"], bench.libraries()["weighted"]])
def test_exploring_finds_what_running_programs_one_by_one_finds(library: Library) -> None:
    heavy = parse("push (add (connect (next_port (prev_port (next_port (add (connect identity)))))))")
    search = explore(library, [heavy], capacity=4, budget=BUDGET)
    assert [found.program for found in search.found] == one_by_one(library, [heavy], 4, BUDGET)
    assert search.programs == BUDGET
    assert [found.known for found in search.found] == [True, False, False, False]
    for found in search.found:
        assert run(found.program) == found.graph
        assert mass(found.program) == found.mass
    assert search.found[0].mass < mass(heavy)
    assert search.replaced >= 1


def test_classes_found_are_among_those_that_exist() -> None:
    found = explore(bench.libraries()["grown"], [], capacity=1000, budget=100_000).found
    counted = Counter(len(one.graph.nodes) for one in found)
    assert (counted[2], counted[3]) == (1, 2)
    assert 0 < counted[4] <= 6
    by_size = defaultdict(Classes)
    for one in found:
        assert by_size[len(one.graph.nodes)].find(Shape.of(one.graph)) is None
        by_size[len(one.graph.nodes)].add(Shape.of(one.graph))


@pytest.mark.parametrize("stop", [1, 7, 500, 3_210])
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(stop: int) -> None:
    library = bench.libraries()["weighted"]
    whole = explore(library, [], capacity=6, budget=BUDGET)
    stopped = explore(library, [], capacity=6, budget=stop)
    record = json.loads(json.dumps(stopped.to_json()))
    assert Exploration.from_json(record, library).to_json() == stopped.to_json()
    resumed = explore(library, [], capacity=6, budget=BUDGET, resume=record)
    assert resumed.to_json() == whole.to_json()


def test_a_search_resumes_from_any_checkpoint() -> None:
    library, records = bench.libraries()["weighted"], []
    whole = explore(library, [], capacity=6, budget=BUDGET, checkpoint=lambda search: records.append(search.to_json()))
    assert len(records) > 10
    for record in records[:: len(records) // 4]:
        assert explore(library, [], capacity=6, budget=BUDGET, resume=record).to_json() == whole.to_json()


def test_a_search_ends_where_programs_or_seconds_do() -> None:
    search = explore(Library.initial(), [], capacity=6, budget=10**9, max_size=3)
    assert (search.programs, search.exhausted, search.found) == (58, True, [])
    assert explore(Library.initial(), [], capacity=6, budget=10**9, seconds=0.0).programs == 1


def test_impossible_searches_are_refused() -> None:
    library, program = Library.initial(), parse("push (add (connect identity))")
    with pytest.raises(UserError, match="budget is 0"):
        explore(library, [], capacity=1, budget=0)
    with pytest.raises(UserError, match="trivial graph"):
        explore(library, [PRIMITIVES["identity"]], capacity=1, budget=1)
    with pytest.raises(UserError, match="earlier known program"):
        explore(library, [program, apply(PRIMITIVES["next_port"], program)], capacity=5, budget=1)


def test_the_benchmark_compares_like_with_like() -> None:
    for library in bench.libraries().values():
        blocks, high = bench.blocks_of(library, 500)
        plain = {term for _, term in bench.Plain(library).programs(T, high)}
        assert plain == {term for block in blocks for term in block.terms()}
        assert bench.run_plainly(library, high) == bench.run_in_blocks(library, 500)
