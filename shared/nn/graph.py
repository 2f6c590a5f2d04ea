"""Graph convolutions on a dense adjacency, for graphs of up to a few hundred nodes.

A graph is its adjacency A `[N, N]`: A[i, j] ≥ 0 is the weight of the edge from node j to node i, 0 where there is none.
Features are `[..., N, channels]`, so that all steps of all windows go through one matrix product.

GCN, Chebyshev and GraphSAGE convolutions are one layer, `GraphConv`: y = Σ_k S_k x Θ_k + b, and differ in the operators
S_k that are made from A once: `gcn_operators`, `chebyshev_operators`, `sage_operators`. Each equals torch_geometric's
layer of that name with the edge list of A.

On 98 nodes with 340 edges (384 graphs a batch, forward and backward, one CPU thread) they take 1/25 to 1/2 of
torch_geometric's time from 8 to 64 channels, and 0.5 to 1.3 times as long from 64 to 64; denser graphs favor them more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError


def gcn_operators(adjacency: Tensor) -> Tensor:
    """D^(−1/2) (A + I) D^(−1/2) as operators `[1, N, N]`; a self-loop that A has keeps its weight.

    D holds the row sums of A + I. Kipf and Welling (2017), equation 2.
    """
    _check_adjacency(adjacency)
    looped = adjacency + torch.diag((adjacency.diagonal() == 0).to(adjacency))
    return _normalize(looped, looped.sum(dim=1))[None]


def chebyshev_operators(adjacency: Tensor, order: int) -> Tensor:
    """Chebyshev polynomials T_0 … T_(order−1) of the scaled Laplacian, `[order, N, N]`.

    T_0 = I, T_1 = L̂, T_k = 2 L̂ T_(k−1) − T_(k−2), and L̂ = 2L/λ_max − I = −D^(−1/2) A D^(−1/2), since the normalized
    Laplacian L = I − D^(−1/2) A D^(−1/2) is scaled with its bound λ_max = 2. Self-loops are dropped. D holds the
    sums over outgoing edges, which matters for a directed graph. An isolated node has 0 in its row of T_1.
    Defferrard, Bresson and Vandergheynst (2016), section 2.1.
    """
    _check_adjacency(adjacency)
    if order < 1:
        raise UserError(f"a Chebyshev convolution needs an order of 1 or more (given: {order})")
    adjacency = adjacency - torch.diag(adjacency.diagonal())
    scaled_laplacian = -_normalize(adjacency, adjacency.sum(dim=0))
    operators = [_identity_like(adjacency), scaled_laplacian]
    while len(operators) < order:
        operators.append(2 * scaled_laplacian @ operators[-1] - operators[-2])
    return torch.stack(operators[:order])


def sage_operators(adjacency: Tensor) -> Tensor:
    """The node itself and the mean of its neighbors, `[2, N, N]`; weights do not count, only whether there is an edge.

    A node without neighbors has a mean of 0. Hamilton, Ying and Leskovec (2017), algorithm 1 with the mean aggregator.
    """
    _check_adjacency(adjacency)
    edges = (adjacency != 0).to(adjacency)
    mean = edges / edges.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.stack([_identity_like(adjacency), mean])


def aggregate(x: Tensor, operators: Tensor) -> Tensor:
    """S_k x for every operator, side by side: `[..., N, channels]`, `[K, N, N]` to `[..., N, K·channels]`."""
    if x.shape[-2] != operators.shape[-1]:
        raise UserError(f"features of {x.shape[-2]} nodes on a graph of {operators.shape[-1]}: give [..., N, channels]")
    return torch.einsum("kij,...jc->...ikc", operators, x).flatten(-2)


class GraphConv(nn.Module):
    """y = Σ_k S_k x Θ_k + b with `num_operators` fixed operators S_k; see this module for GCN, Chebyshev and SAGE.

    `x` `[..., N, in_channels]` and operators `[num_operators, N, N]` to `[..., N, out_channels]`. The weights, Θ
    `[num_operators, in_channels, out_channels]`, do not know the graph: the same layer can be applied to several.
    """

    def __init__(self, in_channels: int, out_channels: int, num_operators: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_operators, in_channels, out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        for theta in self.weight:
            nn.init.xavier_uniform_(theta)

    def forward(self, x: Tensor, operators: Tensor) -> Tensor:
        if len(operators) != len(self.weight):
            raise UserError(f"this layer has weights for {len(self.weight)} operators (given: {len(operators)})")
        return functional.linear(aggregate(x, operators), self.weight.flatten(0, 1).T, self.bias)


class GATConv(nn.Module):
    """Graph attention: each head takes a mean of a node's neighbors and itself, weighted by additive attention.

    y_i = ‖_heads Σ_j α_ij Θ x_j + b, α_ij = softmax_j LeakyReLU(a_target·Θ x_i + a_source·Θ x_j), slope 0.2, j over
    the neighbors of i and i itself; weights of edges do not count. `x` `[..., N, in_channels]` and an adjacency
    `[N, N]` to `[..., N, num_heads·head_channels]`. Veličković et al. (2018), equations 1–5.

    The mean is taken of x and Θ applied to it afterwards, which is the same by linearity and cheaper where Θ widens.
    """

    def __init__(self, in_channels: int, head_channels: int, num_heads: int = 1, negative_slope: float = 0.2) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.weight = nn.Parameter(torch.empty(num_heads, in_channels, head_channels))
        self.attend_source = nn.Parameter(torch.empty(num_heads, head_channels))
        self.attend_target = nn.Parameter(torch.empty(num_heads, head_channels))
        self.bias = nn.Parameter(torch.zeros(num_heads * head_channels))
        # Glorot with the fan of the heads together, as in torch_geometric.
        bound = (6 / (in_channels + num_heads * head_channels)) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.xavier_uniform_(self.attend_source)
        nn.init.xavier_uniform_(self.attend_target)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        if x.shape[-2] != len(adjacency):
            raise UserError(f"features of {x.shape[-2]} nodes on a graph of {len(adjacency)}: give [..., N, channels]")
        source = torch.einsum("...jc,hcd,hd->...hj", x, self.weight, self.attend_source)
        target = torch.einsum("...ic,hcd,hd->...hi", x, self.weight, self.attend_target)
        scores = functional.leaky_relu(target[..., :, None] + source[..., None, :], self.negative_slope)
        connected = (adjacency != 0) | (_identity_like(adjacency) != 0)
        attention = scores.masked_fill(~connected, -torch.inf).softmax(dim=-1)
        mean = attention @ x[..., None, :, :]
        return torch.einsum("...hic,hcd->...ihd", mean, self.weight).flatten(-2) + self.bias


def _identity_like(adjacency: Tensor) -> Tensor:
    # On the adjacency's device even where a model is built on another, such as "meta".
    return torch.eye(len(adjacency), dtype=adjacency.dtype, device=adjacency.device)


def _normalize(adjacency: Tensor, degrees: Tensor) -> Tensor:
    """D^(−1/2) A D^(−1/2); edges at a node of degree 0 become 0."""
    scale = torch.where(degrees > 0, degrees, torch.inf).rsqrt()
    return scale[:, None] * adjacency * scale


def _check_adjacency(adjacency: Tensor) -> None:
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise UserError(f"an adjacency must be a square matrix [N, N] (given: {list(adjacency.shape)})")
    if not adjacency.is_meta and not ((adjacency >= 0) & adjacency.isfinite()).all():
        raise UserError("an adjacency must hold finite weights of 0 or more; turn distances into weights first")
