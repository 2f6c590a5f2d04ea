"""Sparse convolution on a CPU by two algorithms; the share of a kernel that finds an active place decides.

**Many neighbors** (masks made of blocks): gather all K neighbors of some output rows side by side, with zeros
where there is none, and multiply by the whole kernel in one product, `[rows, K C_in] @ [K C_in, C_out]`. Nothing is
scattered, and the gathered rows stay in the cache: this runs at nearly the speed of the product alone. Gathering the
*output's* gradient in the backward pass, through the transposed neighbors, serves both gradients:

    dx[i] = Σ_k dy[neighbor_k(i)] W_kᵀ            dW_k = Σ_i x[i]ᵀ dy[neighbor_k(i)]

**Few neighbors** (scattered places, and the way back of a strided convolution): for each offset gather the pairs it
joins, multiply, and add to the output rows. Rows that do not exist cost nothing, but adding costs more than gathering.

Measured (two threads, float32, 16 to 64 channels): a pair costs 2.5 to 4 times as much as a place in a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.common import accumulation_dtype

from .rulebook import Rulebook

# The share of neighbors from which on gathering all of them is the faster algorithm.
_MANY_NEIGHBORS = 0.35

# Numbers gathered at a time: enough rows for an efficient product, few enough to stay in the cache.
_GATHERED = 2**21
_FEWEST_ROWS, _MOST_ROWS = 256, 4096


def sparse_conv_cpu(
    features: Tensor, weight: Tensor, bias: Tensor | None, rulebook: Rulebook, transposed: bool
) -> Tensor:
    """As `kernels.submanifold_conv.sparse_conv`, whose checks it relies on; weight `[K, C_in, C_out]`."""
    return _SparseConv.apply(features, weight, bias, rulebook, transposed)


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, rulebook: Rulebook, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(features, weight, bias)
        ctx.rulebook, ctx.transposed = rulebook, transposed
        # Half-precision sums are formed in float32, as on a GPU.
        wide = accumulation_dtype(features.dtype)
        convolve = _by_neighbors if _has_many_neighbors(rulebook, transposed) else _by_pairs
        y = convolve(features.to(wide), weight.to(wide), rulebook, transposed)
        if bias is not None:
            y += bias
        return y.to(features.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias = ctx.saved_tensors
        for_features, for_weight, for_bias = ctx.needs_input_grad[:3]
        wide = accumulation_dtype(features.dtype)
        grad = grad.to(wide)
        direction = ctx.transposed != for_features
        gradients = _gradients_by_neighbors if _has_many_neighbors(ctx.rulebook, direction) else _gradients_by_pairs
        grad_features, grad_weight = gradients(
            features.to(wide), weight.to(wide), grad, ctx.rulebook, ctx.transposed, for_features, for_weight
        )
        return (
            grad_features.to(features.dtype) if for_features else None,
            grad_weight.to(weight.dtype) if for_weight else None,
            grad.sum(0).to(bias.dtype) if for_bias else None,
            None,
            None,
        )


def _has_many_neighbors(rulebook: Rulebook, transposed: bool) -> bool:
    if rulebook.num_offsets == 1:
        return False  # one plain product by pairs
    rows = rulebook.num_inputs if transposed else rulebook.num_outputs
    return rulebook.num_pairs >= _MANY_NEIGHBORS * rows * rulebook.num_offsets


# ---------------------------------------------------------------------------------------------------- many neighbors


def _rows_at_a_time(table: Tensor, channels: int) -> int:
    return min(max(_GATHERED // (table.shape[1] * channels), _FEWEST_ROWS), _MOST_ROWS, max(len(table), 1))


def _gathered(features: Tensor, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows of a table `[N, K]`, and what they gather, `[rows, K C]`; the next step overwrites it."""
    offsets, channels = table.shape[1], features.shape[1]
    step = _rows_at_a_time(table, channels)
    padded = torch.cat([features, features.new_zeros(1, channels)])
    buffer = features.new_empty(step * offsets, channels)
    for start in range(0, len(table), step):
        rows = slice(start, min(start + step, len(table)))
        neighbors = table[rows].flatten()
        gathered = torch.index_select(padded, 0, neighbors, out=buffer[: len(neighbors)])
        yield rows, gathered.view(-1, offsets * channels)


class _SumOfProducts:
    """Σ leftᵀ right over pieces left `[rows, A]` and right `[rows, B]` of the rows gathered through a table.

    Each thread multiplies the rows that it gathered, for its own part of the sum. One product of all rows would move
    every row from one core's cache to the others', which made the backward pass take up to three times as long.
    """

    def __init__(self, table: Tensor, gathered: Tensor, other: Tensor) -> None:
        channels = gathered.shape[1]
        threads = max(1, min(torch.get_num_threads(), _rows_at_a_time(table, channels) // _FEWEST_ROWS))
        self.parts = gathered.new_zeros(threads, table.shape[1] * channels, other.shape[1])

    def add(self, left: Tensor, right: Tensor) -> None:
        threads = len(self.parts)
        each, rest = divmod(len(left), threads)
        even = len(left) - rest
        lefts, rights = (x[:even].reshape(threads, each, x.shape[1]) for x in (left, right))
        self.parts.baddbmm_(lefts.mT, rights)
        if rest:
            self.parts[0].addmm_(left[even:].T, right[even:])

    def total(self) -> Tensor:
        return self.parts.sum(0)


def _by_neighbors(features: Tensor, weight: Tensor, rulebook: Rulebook, transposed: bool) -> Tensor:
    table, mirrored = rulebook.table(transposed)
    weight = (weight.flip(0) if mirrored else weight).flatten(0, 1)
    y = features.new_empty(len(table), weight.shape[1])
    for rows, gathered in _gathered(features, table):
        torch.mm(gathered, weight, out=y[rows])
    return y


def _gradients_by_neighbors(
    features: Tensor,
    weight: Tensor,
    grad: Tensor,
    rulebook: Rulebook,
    transposed: bool,
    for_features: bool,
    for_weight: bool,
) -> tuple[Tensor | None, Tensor]:
    offsets, c_in, c_out = weight.shape
    if not for_features:
        table, mirrored = rulebook.table(transposed)
        products = _SumOfProducts(table, features, grad)
        for rows, gathered in _gathered(features, table):
            products.add(gathered, grad[rows])
        grad_weight = products.total().view(offsets, c_in, c_out)
        return None, grad_weight.flip(0) if mirrored else grad_weight
    table, mirrored = rulebook.table(not transposed)
    back = (weight.flip(0) if mirrored else weight).mT.flatten(0, 1)
    grad_features = torch.empty_like(features)
    products = _SumOfProducts(table, grad, features)
    for rows, gathered in _gathered(grad, table):
        torch.mm(gathered, back, out=grad_features[rows])
        if for_weight:
            products.add(gathered, features[rows])
    grad_weight = products.total().view(offsets, c_out, c_in).mT
    return grad_features, grad_weight.flip(0) if mirrored else grad_weight


# ----------------------------------------------------------------------------------------------------- few neighbors


def _joined(rulebook: Rulebook, transposed: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each offset its number, the rows to gather and the rows to add to; without the center of a submanifold one."""
    for k, (inputs, outputs) in enumerate(rulebook.pairs):
        if not (rulebook.is_submanifold and k == rulebook.num_offsets // 2):
            yield k, *((outputs, inputs) if transposed else (inputs, outputs))


def _by_pairs(features: Tensor, weight: Tensor, rulebook: Rulebook, transposed: bool) -> Tensor:
    if rulebook.is_submanifold:  # the center joins every row with itself
        y = features @ weight[rulebook.num_offsets // 2]
    else:
        y = features.new_zeros(rulebook.num_inputs if transposed else rulebook.num_outputs, weight.shape[2])
    for k, sources, targets in _joined(rulebook, transposed):
        y.index_add_(0, targets, features.index_select(0, sources) @ weight[k])
    return y


def _gradients_by_pairs(
    features: Tensor,
    weight: Tensor,
    grad: Tensor,
    rulebook: Rulebook,
    transposed: bool,
    for_features: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_weight = torch.empty_like(weight)
    if rulebook.is_submanifold:
        center = rulebook.num_offsets // 2
        grad_features = grad @ weight[center].T
        torch.mm(features.T, grad, out=grad_weight[center])
    else:
        grad_features = torch.zeros_like(features)
    for k, sources, targets in _joined(rulebook, transposed):
        gathered = grad.index_select(0, targets)
        if for_weight:
            torch.mm(features.index_select(0, sources).T, gathered, out=grad_weight[k])
        if for_features:
            grad_features.index_add_(0, sources, gathered @ weight[k].T)
    return grad_features, grad_weight
