"""Weights of a decoder by role, and the rewritings of a model that leave its predictions as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shared.config import UserError
from shared.lm.decoder import Decoder, Layer, Projection, bias_of, matrix, subtracts_mean


def _heads(projection: Projection) -> Tensor:
    return projection.split(matrix(projection.module)).movedim(0, -2)  # [d, H, K] to [H, d, K]


def _norm_bias(norm: nn.Module) -> Tensor:
    bias = getattr(norm, "bias", None)
    return torch.zeros_like(norm.weight) if bias is None else bias


def _part(name: str, get: Callable[[nn.Module], Tensor]) -> Callable[[Layer], Tensor | None]:
    def of(layer: Layer) -> Tensor | None:
        part = getattr(layer, name)
        return None if part is None else get(part)

    return of


LAYER_ROLES: dict[str, Callable[[Layer], Tensor | None]] = {
    "W_Q": lambda layer: _heads(layer.query),
    "W_K": lambda layer: _heads(layer.key),
    "W_V": lambda layer: _heads(layer.value),
    "b_Q": lambda layer: layer.query.split(bias_of(layer.query.module)),
    "b_K": lambda layer: layer.key.split(bias_of(layer.key.module)),
    "b_V": lambda layer: layer.value.split(bias_of(layer.value.module)),
    "b_O": lambda layer: bias_of(layer.output),
    "g_attn": lambda layer: layer.attention_norm.weight,
    "b_attn": lambda layer: _norm_bias(layer.attention_norm),
    "W_pre": _part("pre", matrix),
    "b_pre": _part("pre", bias_of),
    "W_up": _part("up", matrix),
    "b_up": _part("up", bias_of),
    "W_down": _part("down", matrix),
    "b_down": _part("down", bias_of),
    "g_mlp": lambda layer: layer.feed_forward_norm.weight,
    "b_mlp": lambda layer: _norm_bias(layer.feed_forward_norm),
}
MODEL_ROLES: dict[str, Callable[[Decoder], Tensor | None]] = {
    "W_E": lambda decoder: decoder.embedding.weight,
    "W_pos": lambda decoder: None if decoder.position_embedding is None else decoder.position_embedding.weight,
    "W_U": lambda decoder: matrix(decoder.head),
    "b_U": lambda decoder: bias_of(decoder.head),
    "g_final": lambda decoder: decoder.final_norm.weight,
    "b_final": lambda decoder: _norm_bias(decoder.final_norm),
}
WITH_HEADS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")


def weight(decoder: Decoder, role: str, layer: int | None = None, head: int | None = None) -> Tensor:
    """See `HookedLM.weight`."""
    roles = ("W_O", *LAYER_ROLES)
    if role in MODEL_ROLES:
        if layer is not None or head is not None:
            raise UserError(f"{role} belongs to the whole model: it takes no layer and no head")
        found = MODEL_ROLES[role](decoder)
    elif role not in roles:
        raise UserError(f"there is no weight {role!r}: choose one of {', '.join((*MODEL_ROLES, *roles))}")
    elif layer is None:
        return torch.stack([weight(decoder, role, each, head) for each in range(len(decoder.layers))])
    elif not 0 <= layer < len(decoder.layers):
        raise UserError(f"the model has the layers 0 to {len(decoder.layers) - 1} (given: {layer})")
    elif role == "W_O":
        found = output_heads(decoder, decoder.layers[layer])
    else:
        found = LAYER_ROLES[role](decoder.layers[layer])
    if found is None:
        raise UserError(f"this model has no {role}")
    if head is None:
        return found
    if role not in WITH_HEADS or not 0 <= head < len(found):
        heads = f"has the heads 0 to {len(found) - 1}" if role in WITH_HEADS else "has no heads"
        raise UserError(f"{role} {heads} (given: head {head})")
    return found[head]


def output_heads(decoder: Decoder, layer: Layer) -> Tensor:
    """W_O as `[H, K, d]`, a view."""
    return matrix(layer.output).unflatten(0, (decoder.num_heads, -1))


@torch.no_grad()
def fold_norm(decoder: Decoder) -> None:
    """See `HookedLM.fold_norm`."""
    untie(decoder)
    for layer in decoder.layers:
        readers = dict.fromkeys(p.module for p in (layer.query, layer.key, layer.value))
        _fold(layer.attention_norm, list(readers))
        _fold(layer.feed_forward_norm, [m for m in (layer.pre, layer.up) if m is not None], layer.expert_reads)
    _fold(decoder.final_norm, [decoder.head])


@torch.no_grad()
def center(decoder: Decoder) -> None:
    """See `HookedLM.center`."""
    untie(decoder)
    head = matrix(decoder.head)
    head -= head.mean(dim=1, keepdim=True)
    if decoder.head.bias is not None:
        decoder.head.bias -= decoder.head.bias.mean()
    norms = [norm for layer in decoder.layers for norm in (layer.attention_norm, layer.feed_forward_norm)]
    if not all(subtracts_mean(norm) for norm in (*norms, decoder.final_norm)):
        return
    tables = [decoder.embedding, decoder.position_embedding]
    writers = [m for layer in decoder.layers for m in (layer.output, layer.down)]
    written = [table.weight for table in tables if table is not None]
    written += [part for m in writers if m is not None for part in (matrix(m), m.bias) if part is not None]
    for part in written:  # the residual stream is the last axis of each
        part -= part.mean(dim=-1, keepdim=True)


def untie(decoder: Decoder) -> None:
    """Give the head a weight of its own where it shares the embedding's."""
    if decoder.head.weight is decoder.embedding.weight:
        shared = decoder.head.weight
        decoder.head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)


def _fold(norm: nn.Module, readers: list[nn.Module], expert_reads: tuple[Tensor, ...] = ()) -> None:
    """Move gain and bias of a norm into the linear maps that read it."""
    bias = getattr(norm, "bias", None)
    for reader in readers:
        if bias is not None:
            moved = bias @ matrix(reader)
            if reader.bias is None:
                reader.bias = nn.Parameter(moved, requires_grad=reader.weight.requires_grad)
            else:
                reader.bias += moved
        matrix(reader).mul_(norm.weight[:, None])
    for read in expert_reads:
        read.mul_(norm.weight.reshape(-1, *[1] * (read.ndim - 1)))
    norm.weight.fill_(1)
    if bias is not None:
        bias.zero_()
