from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shared.config import UserError
from shared.nn.graph import GATConv, GraphConv, aggregate, chebyshev_operators, gcn_operators, sage_operators

# A directed path 0 → 1 → 2 and an isolated node 3; [i, j] is the edge from j to i.
PATH = torch.tensor([[0, 0, 0, 0], [2, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)


def random_graph(num_nodes: int = 9, symmetric: bool = False) -> Tensor:
    """Weighted, directed unless `symmetric`, without self-loops, the last node isolated."""
    adjacency = torch.rand(num_nodes, num_nodes, dtype=torch.float64) + 0.1
    adjacency *= torch.rand(num_nodes, num_nodes) < 0.4
    adjacency.fill_diagonal_(0)
    adjacency[-1] = adjacency[:, -1] = 0
    return adjacency + adjacency.T if symmetric else adjacency


def edge_list(adjacency: Tensor) -> tuple[Tensor, Tensor]:
    target, source = adjacency.nonzero(as_tuple=True)
    return torch.stack([source, target]), adjacency[target, source]


def library() -> object:
    return pytest.importorskip("torch_geometric.nn")


def test_gcn_is_that_of_torch_geometric() -> None:
    adjacency, x = random_graph(), torch.randn(9, 5, dtype=torch.float64)
    theirs, ours = library().GCNConv(5, 4).double(), GraphConv(5, 4).double()
    nn.init.normal_(theirs.bias)
    ours.weight.data[0], ours.bias.data = theirs.lin.weight.T, theirs.bias
    torch.testing.assert_close(ours(x, gcn_operators(adjacency)), theirs(x, *edge_list(adjacency)))


@pytest.mark.parametrize("order", [1, 2, 4])
def test_chebyshev_is_that_of_torch_geometric(order: int) -> None:
    adjacency, x = random_graph(), torch.randn(9, 5, dtype=torch.float64)
    theirs, ours = library().ChebConv(5, 4, K=order).double(), GraphConv(5, 4, order).double()
    nn.init.normal_(theirs.bias)
    ours.weight.data, ours.bias.data = torch.stack([linear.weight.T for linear in theirs.lins]), theirs.bias
    torch.testing.assert_close(
        ours(x, chebyshev_operators(adjacency, order)), theirs(x, *edge_list(adjacency), lambda_max=2.0)
    )


def test_sage_is_that_of_torch_geometric() -> None:
    adjacency, x = random_graph(), torch.randn(9, 5, dtype=torch.float64)
    theirs, ours = library().SAGEConv(5, 4).double(), GraphConv(5, 4, 2).double()
    ours.weight.data = torch.stack([theirs.lin_r.weight.T, theirs.lin_l.weight.T])
    ours.bias.data = theirs.lin_l.bias
    torch.testing.assert_close(ours(x, sage_operators(adjacency)), theirs(x, edge_list(adjacency)[0]))


@pytest.mark.parametrize("num_heads", [1, 3])
def test_graph_attention_is_that_of_torch_geometric(num_heads: int) -> None:
    adjacency, x = random_graph(), torch.randn(9, 5, dtype=torch.float64)
    theirs, ours = library().GATConv(5, 4, heads=num_heads).double(), GATConv(5, 4, num_heads).double()
    nn.init.normal_(theirs.bias)
    ours.weight.data = theirs.lin.weight.T.unflatten(1, (num_heads, 4)).movedim(1, 0)
    ours.attend_source.data, ours.attend_target.data = theirs.att_src[0], theirs.att_dst[0]
    ours.bias.data = theirs.bias
    torch.testing.assert_close(ours(x, adjacency), theirs(x, edge_list(adjacency)[0]))


def test_operators_by_hand() -> None:
    gcn = gcn_operators(PATH)[0]
    # With self-loops the rows sum to 1, 3, 4, 1.
    assert gcn[1, 0].item() == pytest.approx(2 / (3 * 1) ** 0.5)
    assert gcn[2, 2].item() == pytest.approx(1 / 4)
    assert gcn[3].tolist() == [0, 0, 0, 1]
    undirected = PATH + PATH.T  # degrees 2, 5, 3, 0
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[0, 1] = expected[1, 0] = -2 / 10**0.5
    expected[1, 2] = expected[2, 1] = -3 / 15**0.5
    identity, scaled_laplacian, second = chebyshev_operators(undirected, 3)
    assert torch.equal(identity, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(scaled_laplacian, expected)
    torch.testing.assert_close(second, 2 * expected @ expected - identity)
    mean = sage_operators(undirected)[1]
    assert mean.tolist() == [[0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_chebyshev_polynomials_have_eigenvalues_within_one() -> None:
    """The spectrum of L̂ lies in [−1, 1] because that of L lies in [0, 2]; T_k(cos θ) = cos kθ."""
    operators = chebyshev_operators(random_graph(symmetric=True), 5)
    angles = torch.linalg.eigvalsh(operators[1]).clamp(-1, 1).arccos()
    for k, operator in enumerate(operators):
        expected = (k * angles).cos().sort().values
        torch.testing.assert_close(torch.linalg.eigvalsh(operator), expected)


def test_laplacian_ignores_the_unit_of_the_weights_and_self_loops() -> None:
    adjacency = random_graph()
    expected = chebyshev_operators(adjacency, 2)
    torch.testing.assert_close(chebyshev_operators(60 * adjacency, 2), expected)
    torch.testing.assert_close(chebyshev_operators(adjacency + torch.eye(9), 2), expected)


@pytest.mark.parametrize("kind", ["gcn", "chebyshev", "sage", "gat"])
def test_layers_commute_with_a_renumbering_of_the_nodes(kind: str) -> None:
    adjacency, x, order = random_graph(), torch.randn(2, 3, 9, 5, dtype=torch.float64), torch.randperm(9)
    renumbered = adjacency[order][:, order]
    if kind == "gat":
        layer = GATConv(5, 4, 2).double()
        y, permuted = layer(x, adjacency), layer(x[:, :, order], renumbered)
    else:
        make = {"gcn": gcn_operators, "chebyshev": lambda a: chebyshev_operators(a, 3), "sage": sage_operators}[kind]
        layer = GraphConv(5, 4, len(make(adjacency))).double()
        y, permuted = layer(x, make(adjacency)), layer(x[:, :, order], make(renumbered))
    assert y.shape[:3] == (2, 3, 9)
    torch.testing.assert_close(permuted, y[:, :, order])


def test_graph_attention_is_a_mean() -> None:
    """Where all nodes are equal, whatever the weights, attention returns what they have in common."""
    layer = GATConv(5, 4).double()
    x = torch.randn(5, dtype=torch.float64)
    y = layer(x.expand(9, 5), random_graph())
    torch.testing.assert_close(y, (x @ layer.weight[0]).expand(9, 4))


def test_gradients() -> None:
    adjacency = random_graph(4)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    convolution, attention = GraphConv(3, 2, 2).double(), GATConv(3, 2, 2).double()
    operators = chebyshev_operators(adjacency, 2)
    for layer, graph in ((convolution, operators), (attention, adjacency)):
        parameters = dict(layer.named_parameters())
        assert torch.autograd.gradcheck(
            lambda x, *values, layer=layer, graph=graph, names=tuple(parameters): torch.func.functional_call(
                layer, dict(zip(names, values, strict=True)), (x, graph)
            ),
            (x, *parameters.values()),
        )


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"square matrix.*given: \[3, 4\]"):
        gcn_operators(torch.ones(3, 4))
    with pytest.raises(UserError, match="0 or more"):
        sage_operators(-torch.ones(3, 3))
    with pytest.raises(UserError, match="finite"):
        chebyshev_operators(torch.full((3, 3), torch.inf), 2)
    with pytest.raises(UserError, match=r"order of 1 or more \(given: 0\)"):
        chebyshev_operators(PATH, 0)
    with pytest.raises(UserError, match="5 nodes on a graph of 4"):
        aggregate(torch.ones(5, 2, dtype=torch.float64), gcn_operators(PATH))
    with pytest.raises(UserError, match="5 nodes on a graph of 4"):
        GATConv(2, 2).double()(torch.ones(5, 2, dtype=torch.float64), PATH)
    with pytest.raises(UserError, match=r"weights for 1 operators \(given: 2\)"):
        GraphConv(2, 2).double()(torch.ones(4, 2, dtype=torch.float64), sage_operators(PATH))
