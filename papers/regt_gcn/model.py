"""RegT-GCN: graph convolutions region by region, then a gated unit on the whole graph, for every step of the input.

Shapes: windows x `[batch, P, N, num_features]` of P input steps and N sites to forecasts `[batch, horizon, N]` of the
scaled target, all steps of the horizon at once. With X_p the features of step p, the network computes

    h_p = LeakyReLU(W [Cheb(X_p, A_1) ‖ … ‖ Cheb(X_p, A_R)])                regions A_r, one Chebyshev convolution
    z, r = σ(W_z [GCN_z(X_p, A) ‖ h_p]), σ(W_r [GCN_r(X_p, A) ‖ h_p])        the T-GCN cell
    h̃ = tanh(W_h [GCN_h(X_p, A) ‖ r ⊙ h_p]),   H_p = z ⊙ h_p + (1 − z) ⊙ h̃
    H = Σ_p softmax(a)_p H_p,   y = Linear(ReLU(Linear(ReLU(H))))           temporal attention and decoder

No step feeds the next, so all of them go through as one batch. Variants: `t_gcn` (one Chebyshev convolution on the
whole graph is h_p), `rant_gcn` (regions drawn at random), `regt_gcn_recurrent` (the cell's state is h_p + H_(p−1)).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.nn.graph import GraphConv, aggregate, chebyshev_operators, gcn_operators

from .config import NEURAL, Network
from .data import Graph

MODELS = NEURAL
CHEBYSHEV_ORDER = 2


class OnGraph(nn.Module):
    """A graph layer and the graph it works on: x `[..., N, in_channels]` to `layer(x, graph)`."""

    def __init__(self, layer: nn.Module, graph: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("graph", graph, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.graph)


class RegionalBranch(nn.Module):
    """h = LeakyReLU(W [Cheb(x, A_1) ‖ … ‖ Cheb(x, A_R)]): x `[..., N, num_features]` to `[..., N, hidden_size]`.

    One Chebyshev convolution for all regions. All nodes pass with every region; for those outside of it the region's
    graph has no edges, and they get what the convolution gives an isolated node: Θ_0 x + b at order 2.

    Nothing stands between the convolutions and W, so that W [‖_r Σ_k T_k(L̂_r) x Θ_k] = Σ_(r,k) T_k(L̂_r) x (Θ_k W_r):
    it is computed as one product with the small matrices Θ_k W_r, instead of R times hidden_size channels a node.
    """

    def __init__(
        self, num_features: int, hidden_size: int, regions: Sequence[Tensor], order: int = CHEBYSHEV_ORDER
    ) -> None:
        super().__init__()
        self.convolution = GraphConv(num_features, hidden_size, order)
        self.merge = nn.Linear(len(regions) * hidden_size, hidden_size)
        polynomials = torch.stack([chebyshev_operators(region, order) for region in regions])
        # T_0 = I is common to all regions.
        operators = torch.cat([polynomials[0, :1], polynomials[:, 1:].flatten(0, 1)])
        self.register_buffer("operators", operators, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        of_region = self.merge.weight.unflatten(1, (-1, self.convolution.weight.shape[-1]))
        products = torch.einsum("kic,orc->rkio", self.convolution.weight, of_region)
        weight = torch.cat([products[:, :1].sum(dim=0), products[:, 1:].flatten(0, 1)])
        bias = self.merge.bias + of_region.sum(dim=1) @ self.convolution.bias
        return functional.leaky_relu(functional.linear(aggregate(x, self.operators), weight.flatten(0, 1).T, bias))


class TGCNCell(nn.Module):
    """A gated recurrent unit whose inputs are graph convolutions (T-GCN, Zhao et al. 2019); see the module's equations.

    Features `[..., N, num_features]` and state `[..., N, hidden_size]` to the new state. Edges count, their weights do
    not: the published code hands none to these convolutions.

    As in `RegionalBranch`, the part of W_z, W_r and W_h that multiplies a convolution is folded into its weights:
    W [Âx Θ ‖ h] is one product of [Âx ‖ h], which has num_features + hidden_size channels instead of 2·hidden_size.
    """

    def __init__(self, num_features: int, hidden_size: int, adjacency: Tensor) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(GraphConv(num_features, hidden_size) for _ in ("update", "reset", "new"))
        self.gates = nn.ModuleList(nn.Linear(2 * hidden_size, hidden_size) for _ in self.convolutions)
        self.register_buffer("operators", gcn_operators((adjacency != 0).to(adjacency)), persistent=False)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        of_update, of_reset, of_new = self._folded()
        neighborhood = aggregate(x, self.operators)
        seen = torch.cat([neighborhood, state], dim=-1)
        update = torch.sigmoid(functional.linear(seen, *of_update))
        reset = torch.sigmoid(functional.linear(seen, *of_reset))
        new = torch.tanh(functional.linear(torch.cat([neighborhood, reset * state], dim=-1), *of_new))
        return torch.lerp(new, state, update)

    def _folded(self) -> list[tuple[Tensor, Tensor]]:
        """Weight `[hidden_size, num_features + hidden_size]` and bias of each gate."""
        folded = []
        for convolution, gate in zip(self.convolutions, self.gates, strict=True):
            of_input, of_state = gate.weight.chunk(2, dim=1)
            weight = torch.cat([of_input @ convolution.weight[0].T, of_state], dim=1)
            folded.append((weight, of_input @ convolution.bias + gate.bias))
        return folded


class TGCNEncoder(nn.Module):
    """H_p of every step: x `[batch, P, N, num_features]` to `[batch, P, N, hidden_size]`.

    `initial_state` makes h_p of X_p. The published model starts the cell from h_p at every step, H_p = cell(X_p, h_p).
    With `recurrent`, H_p = cell(X_p, h_p + H_(p−1)) and H_0 = 0: the regions speak at every step, the steps are
    chained, and no weight is added; for P = 1 both are the same.
    """

    def __init__(self, initial_state: nn.Module, cell: TGCNCell, recurrent: bool = False) -> None:
        super().__init__()
        self.initial_state = initial_state
        self.cell = cell
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        h = self.initial_state(x)
        if not self.recurrent:
            return self.cell(x, h)
        states, state = [], torch.zeros_like(h[:, 0])
        for x_p, h_p in zip(x.unbind(1), h.unbind(1), strict=True):
            state = self.cell(x_p, h_p + state)
            states.append(state)
        return torch.stack(states, dim=1)


class TemporalAttention(nn.Module):
    """Σ_p softmax(a)_p H_p over the P steps: `[batch, P, N, channels]` to `[batch, N, channels]`.

    The scores a are learned and do not depend on the input; they start equal. (The published code draws them from
    [0, 1], which favors steps by chance.)
    """

    def __init__(self, input_steps: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(input_steps))

    def forward(self, states: Tensor) -> Tensor:
        return torch.einsum("p,bpnc->bnc", self.scores.softmax(dim=0), states)


class SumOverSteps(nn.Module):
    """Σ_p H_p: `[batch, P, N, channels]` to `[batch, N, channels]`."""

    def forward(self, states: Tensor) -> Tensor:
        return states.sum(dim=1)


class Forecaster(nn.Module):
    """Encoder of every step, pooling over steps, decoder: x `[batch, P, N, num_features]` to `[batch, horizon, N]`."""

    def __init__(self, encoder: nn.Module, pooling: nn.Module, horizon: int, network: Network) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        decoder_size = network.decoder_size or max(network.hidden_size // 2, 1)
        self.decoder = nn.Sequential(
            nn.ReLU(), nn.Linear(network.hidden_size, decoder_size), nn.ReLU(), nn.Linear(decoder_size, horizon)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.pooling(self.encoder(x))).transpose(1, 2)


def build_model(
    name: str, graph: Graph, *, num_features: int, input_steps: int, horizon: int, settings: Network
) -> nn.Module:
    """Build one of `MODELS`: `model(x [batch, input_steps, N, num_features])` is the forecast `[batch, horizon, N]`.

    All are tied to the sites of `graph`; the graph is part of the model and not of its saved weights. `UserError` for
    a name that is not known.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    adjacency = torch.from_numpy(graph.adjacency)
    if name not in ("regt_gcn", "regt_gcn_recurrent", "rant_gcn", "t_gcn"):
        # The baselines are made of this module's parts.
        from .baselines import build_baseline

        return build_baseline(
            name, adjacency, num_features=num_features, input_steps=input_steps, horizon=horizon, settings=settings
        )
    if name == "t_gcn":
        convolution = GraphConv(num_features, settings.hidden_size, CHEBYSHEV_ORDER)
        initial_state = OnGraph(convolution, chebyshev_operators(adjacency, CHEBYSHEV_ORDER))
    else:
        regions = graph.random_regions(settings.decomposition_seed) if name == "rant_gcn" else graph.regions
        initial_state = RegionalBranch(num_features, settings.hidden_size, _tensors(regions))
    cell = TGCNCell(num_features, settings.hidden_size, adjacency)
    encoder = TGCNEncoder(initial_state, cell, recurrent=name == "regt_gcn_recurrent")
    return Forecaster(encoder, TemporalAttention(input_steps), horizon, settings)


def _tensors(arrays: Sequence[NDArray[np.float32]]) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]
