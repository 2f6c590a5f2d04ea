from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.config import UserError
from shared.nn.graph import GraphConv, chebyshev_operators, gcn_operators

from ..config import Network
from ..data import Graph
from ..model import MODELS, Forecaster, RegionalBranch, TemporalAttention, TGCNCell, TGCNEncoder, build_model

FEATURES, STEPS, REGIONS = 8, 6, 5
SMALL = Network(hidden_size=6, decoder_size=4, stid_embedding_size=4, st_norm_channels=4, stacked_gcn_size=5)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small_graph(num_nodes: int = 10, seed: int = 0) -> Graph:
    """Weighted and directed; region r of the five holds nodes r, r + 5, …; the last node lies in none."""
    generator = np.random.default_rng(seed)
    region = np.arange(num_nodes) % REGIONS
    region[-1] = -1
    adjacency = generator.random((num_nodes, num_nodes)) * (generator.random((num_nodes, num_nodes)) < 0.7)
    np.fill_diagonal(adjacency, 0)
    times = 1000 * adjacency
    regions = tuple((times * np.outer(region == r, region == r)).astype(np.float32) for r in range(REGIONS))
    return Graph(adjacency.astype(np.float32), regions, region)


def build(name: str, graph: Graph, horizon: int = 3, network: Network = SMALL) -> torch.nn.Module:
    return build_model(name, graph, num_features=FEATURES, input_steps=STEPS, horizon=horizon, settings=network).eval()


def as_tensors(graph: Graph) -> tuple[Tensor, list[Tensor]]:
    return torch.from_numpy(graph.adjacency), [torch.from_numpy(region) for region in graph.regions]


def regional_by_definition(branch: RegionalBranch, x: Tensor, regions: list[Tensor], order: int) -> Tensor:
    convolved = [branch.convolution(x, chebyshev_operators(region.to(x), order)) for region in regions]
    return functional.leaky_relu(branch.merge(torch.cat(convolved, dim=-1)), 0.01)


def cell_by_definition(cell: TGCNCell, x: Tensor, h: Tensor, adjacency: Tensor) -> Tensor:
    operators = gcn_operators((adjacency > 0).to(x))
    gcn_z, gcn_r, gcn_h = (convolution(x, operators) for convolution in cell.convolutions)
    w_z, w_r, w_h = cell.gates
    z = torch.sigmoid(w_z(torch.cat([gcn_z, h], dim=-1)))
    r = torch.sigmoid(w_r(torch.cat([gcn_r, h], dim=-1)))
    new = torch.tanh(w_h(torch.cat([gcn_h, r * h], dim=-1)))
    return z * h + (1 - z) * new


def randomize_biases(module: torch.nn.Module) -> None:
    """Biases start at zero, where a mistake with one would not show."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias") or name.endswith("scores"):
            torch.nn.init.normal_(parameter)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_regional_branch_is_its_equation(order: int) -> None:
    regions = as_tensors(small_graph())[1]
    branch = RegionalBranch(FEATURES, 6, [region.double() for region in regions], order).double()
    randomize_biases(branch)
    x = torch.randn(2, STEPS, 10, FEATURES, dtype=torch.float64)
    torch.testing.assert_close(branch(x), regional_by_definition(branch, x, regions, order))


@pytest.mark.parametrize("name", ["regt_gcn", "regt_gcn_recurrent", "rant_gcn", "t_gcn"])
def test_model_is_its_equations_values_and_gradients(name: str) -> None:
    graph = small_graph()
    adjacency, regions = as_tensors(graph)
    if name == "rant_gcn":
        regions = [torch.from_numpy(region) for region in graph.random_regions(42)]
    model = build(name, graph).double()
    randomize_biases(model)
    # The graphs were normalized in single precision; the definition is given the same ones.
    encoder = model.encoder
    encoder.cell.operators = gcn_operators((adjacency > 0).double())
    if name == "t_gcn":
        encoder.initial_state.graph = chebyshev_operators(adjacency.double(), 2)
    else:
        fresh = RegionalBranch(FEATURES, 6, [region.double() for region in regions])
        encoder.initial_state.operators = fresh.operators
    x = torch.randn(2, STEPS, 10, FEATURES, dtype=torch.float64)

    pooled, previous, attention = 0, 0, model.pooling.scores.softmax(dim=0)
    for p in range(STEPS):
        if name == "t_gcn":
            h = encoder.initial_state.layer(x[:, p], chebyshev_operators(adjacency.double(), 2))
        else:
            h = regional_by_definition(encoder.initial_state, x[:, p], regions, 2)
        if name == "regt_gcn_recurrent":
            h = h + previous
        previous = cell_by_definition(encoder.cell, x[:, p], h, adjacency)
        pooled = pooled + attention[p] * previous
    first, second = model.decoder[1], model.decoder[3]
    expected = second(torch.relu(first(torch.relu(pooled)))).mT
    y = model(x)
    torch.testing.assert_close(y, expected)

    parameters = tuple(model.parameters())
    direction = torch.randn_like(y)
    ours, definition = (torch.autograd.grad((out * direction).sum(), parameters) for out in (y, expected))
    for gradient, wanted in zip(ours, definition, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_one_region_that_is_the_whole_graph_gives_t_gcn() -> None:
    """With W the identity and h_p positive, where LeakyReLU is the identity too, the regional branch is T-GCN's."""
    graph = small_graph()
    whole = Graph(graph.adjacency, (graph.adjacency,), np.zeros(10, int))
    regional, global_ = build("regt_gcn", whole), build("t_gcn", graph)
    branch, convolution = regional.encoder.initial_state, global_.encoder.initial_state.layer
    torch.nn.init.constant_(convolution.bias, 20.0)
    branch.convolution.load_state_dict(convolution.state_dict())
    torch.nn.init.eye_(branch.merge.weight)
    torch.nn.init.zeros_(branch.merge.bias)
    regional.encoder.cell.load_state_dict(global_.encoder.cell.state_dict())
    regional.decoder.load_state_dict(global_.decoder.state_dict())
    x = torch.randn(2, STEPS, 10, FEATURES)
    torch.testing.assert_close(regional(x), global_(x))


def test_regions_without_edges_make_a_model_per_node() -> None:
    """h_p then depends on nothing but the node itself; with the cell's graph empty too, so does the forecast."""
    empty = np.zeros((10, 10), np.float32)
    model = build("regt_gcn", Graph(empty, (empty,) * REGIONS, np.full(10, -1)))
    x = torch.randn(1, STEPS, 10, FEATURES)
    changed = x.clone()
    changed[:, :, 3] += 1
    others = [node for node in range(10) if node != 3]
    torch.testing.assert_close(model(changed)[..., others], model(x)[..., others])
    assert not torch.allclose(model(changed)[..., 3], model(x)[..., 3])


def test_nodes_outside_a_region_get_the_convolution_of_an_isolated_node() -> None:
    regions = as_tensors(small_graph())[1]
    convolution = GraphConv(FEATURES, 4, 2)
    torch.nn.init.normal_(convolution.bias)
    x = torch.randn(10, FEATURES)
    alone = x @ convolution.weight[0] + convolution.bias
    for r, region in enumerate(regions):
        outside = [node for node in range(10) if node % REGIONS != r or node == 9]
        torch.testing.assert_close(convolution(x, chebyshev_operators(region, 2))[outside], alone[outside])


def test_edges_of_the_cell_count_and_their_weights_do_not() -> None:
    graph = small_graph()
    doubled = Graph(graph.adjacency * (1 + graph.adjacency), graph.regions, graph.region_of_node)
    x = torch.randn(1, STEPS, 10, FEATURES)
    model, other = build("regt_gcn", graph), build("regt_gcn", doubled)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("name", ["regt_gcn", "regt_gcn_recurrent", "t_gcn", "graph_sage", "gat", "gconv_lstm"])
def test_renumbering_the_sites_renumbers_the_forecast(name: str) -> None:
    graph, order = small_graph(), np.random.default_rng(1).permutation(10)
    inside = np.ix_(order, order)
    renumbered = Graph(
        graph.adjacency[inside], tuple(region[inside] for region in graph.regions), graph.region_of_node[order]
    )
    model, other = build(name, graph), build(name, renumbered)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, STEPS, 10, FEATURES)
    torch.testing.assert_close(other(x[:, :, order.tolist()]), model(x)[..., order.tolist()], rtol=1e-4, atol=1e-5)


def test_random_regions_depend_on_the_seed_alone() -> None:
    graph, x = small_graph(), torch.randn(1, STEPS, 10, FEATURES)
    models = [build("rant_gcn", graph, network=SMALL.model_copy(update={"decomposition_seed": s})) for s in (1, 1, 2)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    first, again, other = (model(x) for model in models)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_attention_starts_uniform_and_sums_to_one() -> None:
    attention, states = TemporalAttention(STEPS), torch.randn(2, STEPS, 3, 4)
    torch.testing.assert_close(attention(states), states.mean(dim=1))
    attention.scores.data[2] = 50.0
    torch.testing.assert_close(attention(states), states[:, 2])


def test_order_of_the_steps_counts_only_with_the_recurrence() -> None:
    """Attention starts uniform and no step feeds the next: the published model cannot tell past from present."""
    graph, x = small_graph(), torch.randn(2, STEPS, 10, FEATURES)
    published, recurrent = build("regt_gcn", graph), build("regt_gcn_recurrent", graph)
    recurrent.load_state_dict(published.state_dict())
    torch.testing.assert_close(published(x.flip(1)), published(x))
    assert not torch.allclose(recurrent(x.flip(1)), recurrent(x), atol=1e-3)


def test_recurrence_over_one_step_is_the_published_model() -> None:
    graph, x = small_graph(), torch.randn(2, 1, 10, FEATURES)
    published, recurrent = build("regt_gcn", graph).encoder, build("regt_gcn_recurrent", graph).encoder
    recurrent.load_state_dict(published.state_dict())
    assert isinstance(recurrent, TGCNEncoder)
    torch.testing.assert_close(recurrent(x), published(x))


@pytest.mark.parametrize("horizon", [1, 36])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_forecasts_and_learns(name: str, horizon: int) -> None:
    model = build(name, small_graph(5), horizon).train()
    y = model(torch.randn(2, STEPS, 5, FEATURES))
    assert y.shape == (2, horizon, 5)
    y.square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    dead = [parameter_name for parameter_name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert not dead


@pytest.mark.parametrize("name", MODELS)
def test_batch_is_a_batch(name: str) -> None:
    """Outside of training, a window's forecast does not depend on the other windows."""
    model, x = build(name, small_graph(5)), torch.randn(3, STEPS, 5, FEATURES)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("horizon", [1, 36])
def test_number_of_parameters_is_the_published_one(horizon: int) -> None:
    """≈ 0.76 M at the published size: 105 sites, 8 features, hidden size 256."""
    empty = np.zeros((105, 105), np.float32)
    graph = Graph(empty, (empty,) * REGIONS, np.zeros(105, int))
    with torch.device("meta"):
        model = build("regt_gcn", graph, horizon, Network(hidden_size=256))
    assert isinstance(model, Forecaster)
    chebyshev, merge = 2 * 8 * 256 + 256, 5 * 256 * 256 + 256
    cell, attention = 3 * (8 * 256 + 256) + 3 * (512 * 256 + 256), 6
    decoder = 256 * 128 + 128 + 129 * horizon
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == chebyshev + merge + cell + attention + decoder == 766_086 + 129 * horizon


def test_weights_do_not_hold_the_graph() -> None:
    assert not [
        name for name in build("regt_gcn", small_graph()).state_dict() if "operators" in name or "graph" in name
    ]


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"unknown model 'gcn'; choose one of regt_gcn, .*st_norm"):
        build("gcn", small_graph())
    with pytest.raises(UserError, match=r"hidden_size \(6\) must be a multiple of gat_heads \(4\)"):
        build("gat", small_graph(), network=SMALL.model_copy(update={"gat_heads": 4}))
    with pytest.raises(UserError, match="9 nodes on a graph of 10"):
        build("regt_gcn", small_graph())(torch.randn(1, STEPS, 9, FEATURES))
