"""The encoder, the graph module and networks that are computed together, against the paper's equations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError

from ..config import GraphModule, Network
from ..model import (
    ConvResidual,
    Dropout,
    Encoder,
    Ensemble,
    GINEConv,
    GraphStructured,
    GraphTensors,
    build_model,
    chunk_entries,
    draw_dropout,
    element_positions,
    graph_tensors,
    num_elements,
    sincos_2d,
)
from .graphs import KITE, PAIR, PATH

SMALL = Network(image_size=16, grid_size=4, width=8, conv_blocks=1, num_heads=2, head_dim=4, mlp_size=8)
MODULE = GraphModule(dim=24)
CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Positions and chunks ---------------------------------------------------------------------------------------------


def test_positions_by_hand() -> None:
    """With dim 8 there are two frequencies, 1 and 1/10,000."""
    found = sincos_2d(torch.tensor([2.0]), torch.tensor([3.0]), 8)[0]
    angles = [2, 2e-4, 3, 3e-4]
    expected = [*map(math.sin, angles[:2]), *map(math.cos, angles[:2]), *map(math.sin, angles[2:])]
    torch.testing.assert_close(found, torch.tensor([*expected, *map(math.cos, angles[2:])]))


def test_chunks_by_hand() -> None:
    """Ten entries in four chunks: 0 … 3 (two, and the remainder of two), 4 and 5, 6 and 7, 8 and 9."""
    entries = chunk_entries(torch.arange(4), 4, 10)
    assert entries[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert entries[1].tolist() == [4, 5] * 5
    assert entries[3].tolist() == [8, 9] * 5


def test_two_nodes_as_published() -> None:
    """The edge is listed from both ends: four chunks of six entries, and the last one is not used."""
    assert num_elements(PAIR, dedup_edges=False) == 4
    tensors = graph_tensors(PAIR, MODULE)
    assert tensors.source.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
    assert tensors.target.tolist() == [[0, 1], [1, 0], [1, 0], [0, 1]]
    assert tensors.node_chunks[:, 0].tolist() == [0, 6]
    assert tensors.edge_chunks[:, 0].tolist() == [12] * 4
    used = torch.cat([tensors.node_chunks, tensors.edge_chunks]).unique().tolist()
    assert used == list(range(18))
    assert tensors.pooling.tolist() == [0.5, 0.5]


def test_two_nodes_with_the_edge_listed_once() -> None:
    assert num_elements(PAIR, dedup_edges=True) == 3
    tensors = graph_tensors(PAIR, MODULE.model_copy(update={"dedup_edges": True}))
    assert tensors.source.tolist() == [[1, 0], [0, 1]]
    assert tensors.edge_chunks[:, 0].tolist() == [16] * 2
    assert torch.cat([tensors.node_chunks, tensors.edge_chunks]).unique().tolist() == list(range(24))


def test_the_grid_of_positions_as_computed() -> None:
    """A transcription of the grid: coordinates laid out [slots, elements], then read as [elements, slots]."""
    count, slots = 5, MODULE.max_connections + 1
    x, y = torch.meshgrid(torch.arange(count), torch.arange(slots), indexing="xy")
    grid = sincos_2d(x.flatten(), y.flatten(), MODULE.dim).view(count, slots, MODULE.dim)
    ids, at = torch.tensor([0, 3, 4]), torch.tensor([0, 2, 10])
    torch.testing.assert_close(element_positions(ids, at, count, MODULE), grid[ids, at])
    intended = MODULE.model_copy(update={"positions": "as_intended"})
    torch.testing.assert_close(element_positions(ids, at, count, intended), sincos_2d(ids, at, MODULE.dim))
    # Both tell all places apart.
    everywhere = torch.cartesian_prod(torch.arange(count), torch.arange(slots)).T
    for settings in (MODULE, intended):
        assert len(element_positions(*everywhere, count, settings).unique(dim=0)) == count * slots


def test_a_graph_with_more_elements_than_entries() -> None:
    with pytest.raises(UserError, match=r"4 nodes and 4 edges cuts .* 12 chunks, and it has 8 .*dim to 12 at least"):
        graph_tensors(KITE, GraphModule(dim=8))
    graph_tensors(KITE, GraphModule(dim=8, dedup_edges=True))


# --- Message passing --------------------------------------------------------------------------------------------------


def test_message_passing_equals_the_library() -> None:
    from torch_geometric.nn import GINEConv as Reference

    tensors = graph_tensors(KITE, MODULE)
    own = GINEConv(MODULE.dim)
    reference = Reference(own.linear, eps=0.0)
    nodes, edges = noise(2, tensors.num_nodes, MODULE.dim), noise(2, tensors.num_edges, MODULE.dim, seed=1)
    ends = torch.stack([tensors.source.argmax(dim=1), tensors.target.argmax(dim=1)])
    for example in range(2):
        expected = reference(nodes[example], ends, edges[example])
        torch.testing.assert_close(own(nodes, edges, tensors.source, tensors.target)[example], expected)


def direct(module: GraphStructured, x: Tensor, graph: object, settings: GraphModule) -> Tensor:
    """One example's logit, node by node and edge by edge, as the published code goes about it."""
    listed = []
    for a, b, edge, port in graph.edges:  # type: ignore[attr-defined]
        listed += [(a, b, edge, port)] if settings.dedup_edges else [(a, b, edge, port), (b, a, edge, port)]
    nodes = sorted(graph.nodes)  # type: ignore[attr-defined]
    count = len(nodes) + len(listed)
    length, rest = divmod(settings.dim, count)
    bounds = [0, *range(length + rest, settings.dim + 1, length)]
    chunks = [x[start:stop].repeat(settings.dim)[: settings.dim] for start, stop in itertools.pairwise(bounds)]
    positions = {
        (k, slot): element_positions(torch.tensor([k]), torch.tensor([slot]), count, settings)[0]
        for k in range(count)
        for slot in range(settings.max_connections + 1)
    }
    h = {node: chunks[node] + positions[node, 0] for node in nodes}
    for convolution in module.convolutions:
        sums = {node: h[node].clone() for node in nodes}
        for a, b, edge, port in listed:
            feature = chunks[edge] + positions[edge, port + 1]
            for source, target in ((a, b), (b, a)):
                sums[target] += functional.relu(h[source] + feature)
        h = {node: convolution.linear(value) for node, value in sums.items()}
    return module.head(torch.stack(list(h.values())).mean(dim=0))[0]


@pytest.mark.parametrize("graph", [PAIR, PATH, KITE])
@pytest.mark.parametrize("changes", [{}, {"dedup_edges": True}, {"positions": "as_intended"}])
def test_the_graph_module_step_by_step(graph: object, changes: dict[str, object]) -> None:
    settings = GraphModule.model_validate({"dim": 28, **changes})
    torch.manual_seed(0)
    module = GraphStructured(settings)
    x = noise(3, 28)
    found = module(x, graph_tensors(graph, settings))  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.stack([direct(module, each, graph, settings) for each in x]))


def test_the_order_of_nodes_and_edges_does_not_matter() -> None:
    tensors = graph_tensors(KITE, MODULE)
    module, x = GraphStructured(MODULE), noise(3, MODULE.dim)
    nodes = torch.randperm(tensors.num_nodes, generator=torch.Generator().manual_seed(0))
    edges = torch.randperm(tensors.num_edges, generator=torch.Generator().manual_seed(1))
    permuted = GraphTensors(
        node_chunks=tensors.node_chunks[nodes],
        edge_chunks=tensors.edge_chunks[edges],
        node_positions=tensors.node_positions[nodes],
        edge_positions=tensors.edge_positions[edges],
        source=tensors.source[edges][:, nodes],
        target=tensors.target[edges][:, nodes],
        pooling=tensors.pooling[nodes],
    )
    torch.testing.assert_close(module(x, permuted), module(x, tensors))
    torch.testing.assert_close(module(x, tensors.padded(9, 40)), module(x, tensors))


def test_dropout_reaches_nodes_and_directed_edges_of_every_layer() -> None:
    tensors = graph_tensors(PATH, MODULE)
    drawn = draw_dropout(tensors, MODULE, 500, torch.Generator().manual_seed(0))
    assert drawn.nodes.shape == (3, 500, 3, 24)
    assert drawn.edges.shape == (3, 500, 8, 24)
    for part in (drawn.nodes, drawn.edges):
        torch.testing.assert_close(part.unique(), torch.tensor([0, 1 / 0.7]))
        assert part.mean().item() == pytest.approx(1, abs=0.01)
    module, x = GraphStructured(MODULE), noise(500, MODULE.dim)
    ones = Dropout(torch.ones_like(drawn.nodes), torch.ones_like(drawn.edges))
    torch.testing.assert_close(module(x, tensors, ones), module(x, tensors))
    assert not torch.allclose(module(x, tensors, drawn), module(x, tensors))


# --- Encoder ----------------------------------------------------------------------------------------------------------


def test_the_stem_sees_one_patch_a_cell() -> None:
    encoder = Encoder(SMALL, 3)
    image = noise(1, 1, 16, 16)
    changed = image.clone()
    changed[0, 0, 4:8, 8:12] += 1
    difference = (encoder.stem(changed) - encoder.stem(image)).abs().sum(dim=1)[0]
    assert difference.nonzero().tolist() == [[1, 2]]


def test_a_residual_block_against_its_equation() -> None:
    block, x = ConvResidual(8, 4), noise(2, 8, 4, 4)
    first, _, second, _, third = block.layers
    h = functional.conv2d(x, first.weight, padding=1)
    # Normalized over channels and places together.
    mean, variance = h.mean(dim=(1, 2, 3), keepdim=True), h.var(dim=(1, 2, 3), keepdim=True, correction=0)
    h = (h - mean) / (variance + 1e-5).sqrt()
    h = torch.einsum("oc,bchw->bohw", second.weight[:, :, 0, 0], h)
    h = torch.einsum("oc,bchw->bohw", third.weight[:, :, 0, 0], functional.gelu(h))
    torch.testing.assert_close(block(x), x + h)


def test_only_convolutions_and_positions_know_where_a_patch_is() -> None:
    settings = SMALL.model_copy(update={"conv_blocks": 0})
    encoder = Encoder(settings, 3)
    image = noise(2, 1, 16, 16)
    moved = image.roll(4, dims=-1)
    assert not torch.allclose(encoder(image), encoder(moved))
    encoder.positions.zero_()
    torch.testing.assert_close(encoder(image), encoder(moved))


def test_a_transformer_layer_against_its_equations() -> None:
    layer = Encoder(SMALL, 3).transformer[0]
    x = noise(2, 16, 8)
    normalized = functional.layer_norm(x, (8,))
    heads = []
    for head in range(2):
        query, key, value = (normalized @ layer.attention.qkv.weight[8 * i + 4 * head :][:4].T for i in range(3))
        heads.append((query @ key.transpose(1, 2) / 2).softmax(dim=-1) @ value)
    expected = x + torch.cat(heads, dim=-1) @ layer.attention.out.weight.T
    first, second = layer.mlp[1], layer.mlp[3]
    expected = expected + second(functional.gelu(first(functional.layer_norm(expected, (8,)))))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 16, 16), (2, 3, 16, 16)])
def test_images_of_another_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"takes images \[batch, 1, 16, 16\] .* data.image_size"):
        Encoder(SMALL, 3)(torch.zeros(shape))


# --- Many at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [None, (PAIR, KITE, PATH)])
def test_together_as_one_at_a_time(graphs: tuple[object, ...] | None) -> None:
    """Logits and gradients, each network with a graph, images and dropout of its own."""
    module = MODULE if graphs is not None else None
    models = [build_model(SMALL, module, seed) for seed in range(3)]
    tensors = [graph_tensors(graph, MODULE) for graph in graphs] if graphs is not None else None  # type: ignore[arg-type]
    images = noise(3, 4, 1, 16, 16)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(3)]

    together = Ensemble(models, tensors, CPU)
    logits = together(images, together.draw_dropout(MODULE, 4, generators()))
    gradients = torch.autograd.grad(logits.square().sum(), list(together.weights.values()))
    for index, generator in enumerate(generators()):
        one = Ensemble([build_model(SMALL, module, index)], tensors and [tensors[index]], CPU)
        own = one(images[index][None], one.draw_dropout(MODULE, 4, [generator]))
        torch.testing.assert_close(logits[index], own[0])
        of_own = torch.autograd.grad(own.square().sum(), list(one.weights.values()))
        for gradient, expected in zip(gradients, of_own, strict=True):
            torch.testing.assert_close(gradient[index], expected[0], rtol=1e-3, atol=1e-4)
    # Without dropout and with images that all see.
    shared = together(images[0])
    for index in range(3):
        model: nn.Module = build_model(SMALL, module, index)
        expected = model(images[0]) if tensors is None else model(images[0], tensors[index])
        torch.testing.assert_close(shared[index], expected)


def test_weights_are_parts_of_one_block() -> None:
    ensemble = Ensemble([build_model(SMALL, MODULE, seed) for seed in range(2)], [graph_tensors(PAIR, MODULE)] * 2, CPU)
    before = ensemble(noise(2, 1, 16, 16))
    ensemble.flat[1].zero_()
    after = ensemble(noise(2, 1, 16, 16))
    torch.testing.assert_close(after[0], before[0])
    assert after[1].abs().max() == 0
