"""The encoder, the module that a program's graph shapes, and many such networks as one batched computation.

A network is encoder, graph module and a logit; the baseline is the encoder with a logit. The graph module takes the
encoder's vector x [d] apart: node and edge with order id k get chunk k of x, and messages then run along the edges.

Dropout masks are arguments and no randomness of the module: a network then sees the same masks whether it is trained by
itself or beside others, whose graphs are padded to a common size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from shared.config import UserError

from .config import GraphModule, Network

if TYPE_CHECKING:
    from .symbolic.interpreter import Graph

TEMPERATURE = 10_000.0


def sincos_2d(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """sin(x ω) ‖ cos(x ω) ‖ sin(y ω) ‖ cos(y ω), `[..., dim]`, of coordinates `[...]`.

    ω_i = T^(−i/(dim/4 − 1)), i = 0 … dim/4 − 1, T = 10⁴.
    """
    exponents = torch.arange(dim // 4, dtype=torch.float64) / (dim // 4 - 1)
    omega = TEMPERATURE**-exponents
    x, y = x[..., None].double() * omega, y[..., None].double() * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1).float()


# --- Encoder ----------------------------------------------------------------------------------------------------------


class ConvResidual(nn.Module):
    """x + W₃ GELU(W₂ LayerNorm(W₁ * x)), a 3 × 3 and two 1 × 1 convolutions without bias: `[batch, channels, g, g]`."""

    def __init__(self, channels: int, grid_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.LayerNorm((channels, grid_size, grid_size)),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.GELU(),
            nn.Conv2d(channels, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class SelfAttention(nn.Module):
    """Multi-head attention of the normalized tokens, no biases: `[batch, tokens, width]`."""

    def __init__(self, width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * num_heads * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.movedim(-3, 0).transpose(-3, -2)
        # Spelled out: on a CPU PyTorch's fused attention cannot be batched over networks, and 64 tokens gain little.
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
        return self.out((weights @ value).transpose(-3, -2).flatten(-2))


class TransformerLayer(nn.Module):
    """Pre-norm attention and multilayer perceptron, both residual: `[batch, tokens, width]`."""

    def __init__(self, width: int, num_heads: int, head_dim: int, mlp_size: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads, head_dim)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, mlp_size), nn.GELU(), nn.Linear(mlp_size, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Encoder(nn.Module):
    """Images `[batch, 1, size, size]` in [−1, 1] to vectors `[batch, out_features]`.

    Patches become the pixels of a small grid, convolutions run on it, then a transformer on its cells, whose mean is
    projected.
    """

    def __init__(self, settings: Network, out_features: int) -> None:
        super().__init__()
        grid, width, patch = settings.grid_size, settings.width, settings.image_size // settings.grid_size
        self.stem = nn.Sequential(nn.PixelUnshuffle(patch), nn.Conv2d(patch**2, width, 1))
        self.convolutions = nn.Sequential(*(ConvResidual(width, grid) for _ in range(settings.conv_blocks)))
        row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        positions = sincos_2d(column.flatten(), row.flatten(), width)
        self.register_buffer("positions", positions, persistent=False)
        layer = (width, settings.num_heads, settings.head_dim, settings.mlp_size)
        self.transformer = nn.Sequential(*(TransformerLayer(*layer) for _ in range(settings.transformer_layers)))
        self.head = nn.Linear(width, out_features)
        self.image_size = settings.image_size

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-3:] != (1, self.image_size, self.image_size):
            raise UserError(
                f"the encoder takes images [batch, 1, {self.image_size}, {self.image_size}] (given: "
                f"{list(images.shape)}): let data.image_size agree with the prepared images, or prepare them again"
            )
        cells = self.convolutions(self.stem(images)).flatten(-2).transpose(-1, -2)
        return self.head(self.transformer(cells + self.positions).mean(dim=-2))


# --- Graph module -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphTensors:
    """What the graph module is told of a graph with V nodes and D directed edges; stacked `[M, …]` for M networks.

    `node_chunks` [V, d], `edge_chunks` [D, d]: for each entry of a feature the entry of the encoder's vector that it is
    a copy of. `node_positions` [V, d], `edge_positions` [D, d]: embeddings of (order id, slot). `source` and `target`
    [D, V] are one-hot rows, zero for an edge that is padding; `pooling` [V] has the nodes' weights in the mean.
    """

    node_chunks: Tensor
    edge_chunks: Tensor
    node_positions: Tensor
    edge_positions: Tensor
    source: Tensor
    target: Tensor
    pooling: Tensor

    @property
    def num_nodes(self) -> int:
        return self.source.shape[-1]

    @property
    def num_edges(self) -> int:
        return self.source.shape[-2]

    def padded(self, num_nodes: int, num_edges: int) -> GraphTensors:
        """The same graph with isolated nodes without weight and edges from and to nowhere added."""
        nodes, edges = num_nodes - self.num_nodes, num_edges - self.num_edges
        rows = {"node": nodes, "edge": edges, "pooling": nodes}
        padded = {
            name: functional.pad(tensor, (0, rows["pooling"]) if name == "pooling" else (0, 0, 0, rows[name[:4]]))
            for name, tensor in self.tensors().items()
            if name not in ("source", "target")
        }
        incidence = {name: functional.pad(getattr(self, name), (0, nodes, 0, edges)) for name in ("source", "target")}
        return GraphTensors(**padded, **incidence)

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device) -> GraphTensors:
        return GraphTensors(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


def num_elements(graph: Graph, *, dedup_edges: bool) -> int:
    """In how many chunks the encoder's vector is cut: V + E, and V + 2 E where every edge is listed twice."""
    return len(graph.nodes) + len(graph.edges) * (1 if dedup_edges else 2)


def graph_tensors(graph: Graph, settings: GraphModule) -> GraphTensors:
    """A graph as the module takes it. `UserError` for a graph that has more elements than the vector has entries.

    As published, every undirected edge is listed twice, from either end, and gives two directed edges each time:
    D = 4 E of which pairs are equal, sums of messages are doubled, and as order ids end at V + E − 1 the last E of the
    V + 2 E chunks are not used. With `dedup_edges` it is listed once: D = 2 E, and all V + E chunks are used.
    """
    count, dim = num_elements(graph, dedup_edges=settings.dedup_edges), settings.dim
    if count > dim:
        raise UserError(
            f"a graph of {len(graph.nodes)} nodes and {len(graph.edges)} edges cuts the encoder's vector in {count} "
            f"chunks, and it has {dim} entries only: set graph_module.dim to {count} at least, or take smaller graphs"
        )
    listed = [(a, b, edge, port) for a, b, edge, port in graph.edges]
    if not settings.dedup_edges:
        listed = [each for a, b, edge, port in graph.edges for each in ((a, b, edge, port), (b, a, edge, port))]
    index = {node: position for position, node in enumerate(sorted(graph.nodes))}
    starts = torch.tensor([index[a] for a, _, _, _ in listed], dtype=torch.long)
    ends = torch.tensor([index[b] for _, b, _, _ in listed], dtype=torch.long)
    # All listed edges forward, then all of them backward.
    source = functional.one_hot(torch.cat([starts, ends]), len(index)).float()
    target = functional.one_hot(torch.cat([ends, starts]), len(index)).float()
    nodes = torch.tensor(sorted(graph.nodes), dtype=torch.long)
    edges = torch.tensor([edge for _, _, edge, _ in listed], dtype=torch.long).repeat(2)
    slots = torch.tensor([port + 1 for _, _, _, port in listed], dtype=torch.long).repeat(2)
    return GraphTensors(
        node_chunks=chunk_entries(nodes, count, dim),
        edge_chunks=chunk_entries(edges, count, dim),
        node_positions=element_positions(nodes, torch.zeros_like(nodes), count, settings),
        edge_positions=element_positions(edges, slots, count, settings),
        source=source,
        target=target,
        pooling=torch.full((len(nodes),), 1 / len(nodes)),
    )


def chunk_entries(ids: Tensor, count: int, dim: int) -> Tensor:
    """Entries `[len(ids), dim]` of a vector [dim] cut in `count` chunks: chunk k end to end, cut off at `dim`.

    Chunks have floor(dim / count) entries, the first one the remainder too.
    """
    length = dim // count
    first = length + dim % count
    ids = ids[:, None]
    lengths = torch.where(ids == 0, first, length)
    starts = torch.where(ids == 0, 0, first + (ids - 1) * length)
    return starts + torch.arange(dim) % lengths


def element_positions(ids: Tensor, slots: Tensor, count: int, settings: GraphModule) -> Tensor:
    """Embeddings `[len(ids), dim]` of (order id, slot): slot 0 is a node's, slot p + 1 that of an edge at port p.

    As intended, x is the order id and y the slot. As computed by the published code, a grid laid out [slots, elements]
    is read as [elements, slots]: element a at slot b gets x = (a w + b) mod n and y = floor((a w + b) / n), with w
    slots and n elements.
    """
    x, y = ids, slots
    if settings.positions == "as_computed":
        place = ids * (settings.max_connections + 1) + slots
        x, y = place % count, place // count
    return sincos_2d(x, y, settings.dim)


class GINEConv(nn.Module):
    """h_i ← W (h_i + Σ_{j→i} ReLU(h_j + e_ji)) + b: h `[batch, V, d]`, e `[batch, D, d]`, source and target `[D, V]`.

    Hu et al. (2020), with ε = 0 and a linear layer for the network. Gathering and adding up are products with one-hot
    matrices, which are small, batched over networks, and the same to the last digit on a GPU.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, nodes: Tensor, edges: Tensor, source: Tensor, target: Tensor) -> Tensor:
        messages = functional.relu(source @ nodes + edges)
        return self.linear(nodes + target.transpose(-1, -2) @ messages)


@dataclass(frozen=True)
class Dropout:
    """Factors of a step, 0 or 1/(1 − rate): `nodes` `[layers, batch, V, d]`, `edges` `[layers, batch, D, d]`."""

    nodes: Tensor
    edges: Tensor


def draw_dropout(graph: GraphTensors, settings: GraphModule, batch: int, generator: torch.Generator) -> Dropout:
    """Dropout factors of one step of one network; a network alone and one that is padded draw the same."""
    keep = 1 - settings.dropout
    sizes = [settings.layers * batch * rows * settings.dim for rows in (graph.num_nodes, graph.num_edges)]
    # Half of the time that drawing from a Bernoulli distribution takes on a CPU.
    drawn = (torch.rand(sum(sizes), device=generator.device, generator=generator) < keep) * (1 / keep)
    nodes, edges = (part.view(settings.layers, batch, -1, settings.dim) for part in drawn.split(sizes))
    return Dropout(nodes, edges)


class GraphStructured(nn.Module):
    """The encoder's vector x `[batch, d]` to a logit `[batch]` through message passing on a program's graph."""

    def __init__(self, settings: GraphModule) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(GINEConv(settings.dim) for _ in range(settings.layers))
        self.head = nn.Linear(settings.dim, 1)

    def forward(self, x: Tensor, graph: GraphTensors, dropout: Dropout | None = None) -> Tensor:
        nodes = graph.node_positions + x[:, graph.node_chunks]
        edges = graph.edge_positions + x[:, graph.edge_chunks]
        for layer, convolution in enumerate(self.convolutions):
            dropped = (nodes, edges)
            if dropout is not None:
                dropped = nodes * dropout.nodes[layer], edges * dropout.edges[layer]
            nodes = convolution(*dropped, graph.source, graph.target)
        return self.head(graph.pooling @ nodes).squeeze(-1)


# --- Networks ---------------------------------------------------------------------------------------------------------


class Baseline(nn.Module):
    """The encoder with a logit: images `[batch, 1, size, size]` to `[batch]`."""

    def __init__(self, settings: Network) -> None:
        super().__init__()
        self.encoder = Encoder(settings, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images).squeeze(-1)


class SymbolicallySynthesized(nn.Module):
    """Encoder and graph module: images `[batch, 1, size, size]`, a graph and dropout factors to logits `[batch]`."""

    def __init__(self, settings: Network, graph_module: GraphModule) -> None:
        super().__init__()
        self.encoder = Encoder(settings, graph_module.dim)
        self.graph = GraphStructured(graph_module)

    def forward(self, images: Tensor, graph: GraphTensors, dropout: Dropout | None = None) -> Tensor:
        return self.graph(self.encoder(images), graph, dropout)


def build_model(settings: Network, graph_module: GraphModule | None, seed: int = 0) -> nn.Module:
    """The network with a graph module, or the baseline without; weights are PyTorch's defaults, drawn from `seed`."""
    torch.manual_seed(seed)
    return Baseline(settings) if graph_module is None else SymbolicallySynthesized(settings, graph_module)


class Ensemble:
    """M networks of one kind, each with weights and a graph of its own, that are computed together.

    `flat` [M, number of weights] holds the weights of all, and `weights` are its parts by name, `[M, …]`, that
    gradients are taken for. Graphs are padded to the largest.
    """

    def __init__(
        self, models: Sequence[nn.Module], graphs: Sequence[GraphTensors] | None, device: torch.device
    ) -> None:
        self.skeleton = models[0].to(device)
        stacked, self.buffers = stack_module_state([model.to(device) for model in models])
        # One block of memory, so that an optimizer step is a handful of operations and not as many a layer.
        self.flat = torch.cat([tensor.detach().flatten(1) for tensor in stacked.values()], dim=1)
        parts = self.flat.split([tensor[0].numel() for tensor in stacked.values()], dim=1)
        self.weights = {
            name: part.unflatten(1, tensor.shape[1:]).detach().requires_grad_()
            for (name, tensor), part in zip(stacked.items(), parts, strict=True)
        }
        self.alone = len(models) == 1
        self.graphs = [graph.to(device) for graph in graphs] if graphs is not None else None
        self.padded: GraphTensors | None = None
        if self.graphs is not None:
            nodes, edges = (max(getattr(graph, size) for graph in self.graphs) for size in ("num_nodes", "num_edges"))
            padded = [graph.padded(nodes, edges).tensors() for graph in self.graphs]
            self.padded = GraphTensors(**{name: torch.stack([each[name] for each in padded]) for name in padded[0]})

    def draw_dropout(self, settings: GraphModule, batch: int, generators: Sequence[torch.Generator]) -> Dropout | None:
        """Dropout factors of a step of all networks, each from its own generator, `[M, layers, batch, …]`."""
        if self.graphs is None or self.padded is None or settings.dropout == 0:
            return None
        num_nodes, num_edges = self.padded.num_nodes, self.padded.num_edges
        nodes, edges = [], []
        for graph, generator in zip(self.graphs, generators, strict=True):
            drawn = draw_dropout(graph, settings, batch, generator)
            nodes.append(functional.pad(drawn.nodes, (0, 0, 0, num_nodes - graph.num_nodes)))
            edges.append(functional.pad(drawn.edges, (0, 0, 0, num_edges - graph.num_edges)))
        return Dropout(torch.stack(nodes), torch.stack(edges))

    def __call__(self, images: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Logits `[M, batch]` of images `[M, batch, 1, size, size]`, or `[batch, …]` that all networks see."""
        per_network = images.ndim == 5
        arguments: list[object] = [self.weights, self.buffers, images]
        axes: list[int | None] = [0, 0, 0 if per_network else None]
        if self.padded is not None:
            arguments += [self.padded.tensors(), None if dropout is None else (dropout.nodes, dropout.edges)]
            axes += [0, 0 if dropout is not None else None]
        if self.alone:
            # Batching over one network would cost a tenth of the time for nothing.
            chosen = [_first(each) if axis == 0 else each for each, axis in zip(arguments, axes, strict=True)]
            return self._one(*chosen)[None]
        return vmap(self._one, in_dims=tuple(axes))(*arguments)

    def _one(
        self,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        images: Tensor,
        graph: Mapping[str, Tensor] | None = None,
        dropout: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        inputs: tuple[object, ...] = (images,)
        if graph is not None:
            inputs += (GraphTensors(**graph), None if dropout is None else Dropout(*dropout))
        return functional_call(self.skeleton, {**weights, **buffers}, inputs)


def _first(value: object) -> object:
    """A network's own part of what is stacked for one."""
    if isinstance(value, Tensor):
        return value[0]
    if isinstance(value, tuple):
        return tuple(_first(each) for each in value)
    return {name: _first(each) for name, each in value.items()}  # type: ignore[union-attr]
