"""Where one can look into a language model, and how: hook points, reading and replacing parts of an activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from shared.config import UserError

Index = int | Sequence[int] | Tensor

POINTS: dict[str, tuple[str, ...]] = {
    "resid_pre": ("batch", "position", "channel"),
    "attn.in": ("batch", "position", "channel"),
    "attn.q": ("batch", "position", "head", "channel"),
    "attn.k": ("batch", "position", "key_value_head", "channel"),
    "attn.v": ("batch", "position", "key_value_head", "channel"),
    "attn.scores": ("batch", "head", "position", "key"),
    "attn.pattern": ("batch", "head", "position", "key"),
    "attn.z": ("batch", "position", "head", "channel"),
    "attn.result": ("batch", "position", "head", "channel"),
    "attn.out": ("batch", "position", "channel"),
    "resid_mid": ("batch", "position", "channel"),
    "mlp.in": ("batch", "position", "channel"),
    "mlp.pre": ("batch", "position", "neuron"),
    "mlp.up": ("batch", "position", "neuron"),
    "mlp.act": ("batch", "position", "neuron"),
    "mlp.out": ("batch", "position", "channel"),
    "resid_post": ("batch", "position", "channel"),
    "final_norm.scale": ("batch", "position", "one"),
    "logits": ("batch", "position", "token"),
}
"""Axes of the activation at each point, in the order of computation; `HookedLM` says what each holds."""

WITHOUT_LAYER = ("final_norm.scale", "logits")


@dataclass(frozen=True, eq=False)
class Hook:
    """Call `function` on an activation, or on the chosen part of it, whenever the model computes it.

    `function` gets the part as a tensor with the axes of `POINTS[point]` and returns its replacement (anything that
    broadcasts to the part's shape), or None in order to leave it as it is. `layer` counts the executed layers: it is
    the layer's number unless the model runs a path. `positions` count from the start of the tokens of this call,
    negative ones from their end; a tensor `[B, P]` chooses other positions in every sequence. `heads` are those of the
    point's own axis (under grouped-query attention keys and values have fewer heads than queries), `neurons` those of
    the feed-forward layer.
    """

    point: str
    layer: int | None
    function: Callable[[Tensor], Tensor | float | None]
    positions: Index | None = None
    heads: Index | None = None
    neurons: Index | None = None

    def __post_init__(self) -> None:
        axes = axes_of(self.point)
        if self.heads is not None and not {"head", "key_value_head"} & set(axes):
            self._no_such_axis("heads")
        if self.neurons is not None and "neuron" not in axes:
            self._no_such_axis("neurons")

    def _no_such_axis(self, what: str) -> NoReturn:
        raise UserError(f"{self.point} has no {what}: its axes are {', '.join(axes_of(self.point))}")


def axes_of(point: str) -> tuple[str, ...]:
    if point not in POINTS:
        raise UserError(f"there is no hook point {point!r}: choose one of {', '.join(POINTS)}")
    return POINTS[point]


def mask_heads(heads: Sequence[tuple[int, int]], mode: str = "uniform", means: Tensor | None = None) -> list[Hook]:
    """Hooks that silence attention heads, given as pairs (layer, head).

    `uniform`: the head attends equally to every position it sees, as in the released code of Wu et al. (2024), which
    zeroes its query or its scores; the mean value vector still passes. `zero`: its output is 0. `mean`: its output is
    replaced by `means[layer, head]`, `[L, H, K]`, the mean of "attn.z" over reference text (see `mean_head_output`).
    """
    if mode not in ("uniform", "zero", "mean"):
        raise UserError(f"there is no masking mode {mode!r}: choose uniform, zero or mean")
    if mode == "mean" and means is None:
        raise UserError("mask_heads(mode='mean') needs `means` [L, H, K]: the result of mean_head_output")
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(int(layer), []).append(int(head))
    point = "attn.q" if mode == "uniform" else "attn.z"
    hooks = []
    for layer, chosen in by_layer.items():
        value = means[layer, chosen] if mode == "mean" and means is not None else 0.0
        hooks.append(Hook(point, layer, lambda _, value=value: value, heads=chosen))
    return hooks


@dataclass
class Activations:
    """What a call kept: `kept["attn.z", 3]` of a layer, `kept["logits"]` of the whole model, `kept.stack("attn.z")`."""

    tensors: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        name, layer = key if isinstance(key, tuple) else (key, None)
        if (name, layer) not in self.tensors:
            known = ", ".join(sorted({point for point, _ in self.tensors})) or "nothing"
            where = "" if layer is None else f" of layer {layer}"
            raise UserError(f"{name}{where} was not kept (kept: {known}): name it in `cache`")
        return self.tensors[name, layer]

    def stack(self, point: str) -> Tensor:
        """All layers' activations at a point, `[L, …]`."""
        layers = sorted(layer for name, layer in self.tensors if name == point and layer is not None)
        return torch.stack([self[point, layer] for layer in layers])


class Taps:
    """The hooks and wishes of one call; `taps(point, layer, x)` returns x as the hooks leave it."""

    def __init__(
        self,
        num_layers: int,
        hooks: Sequence[Hook] = (),
        cache: Sequence[str | tuple[str, int]] = (),
        cache_positions: Index | None = None,
    ) -> None:
        self.kept = Activations()
        self.cache_positions = cache_positions
        self.hooks: dict[tuple[str, int | None], list[Hook]] = {}
        self.wanted: set[tuple[str, int | None]] = set()
        for hook in hooks:
            self.hooks.setdefault(_key(hook.point, hook.layer, num_layers), []).append(hook)
        for item in cache:
            point, layer = (item, None) if isinstance(item, str) else item
            every = range(num_layers) if layer is None and point not in WITHOUT_LAYER else [layer]
            self.wanted.update(_key(point, each, num_layers) for each in every)

    def touches(self, point: str, layer: int | None) -> bool:
        """Whether anyone wants to read or replace this activation."""
        return (point, layer) in self.hooks or (point, layer) in self.wanted

    def hooked(self, point: str, layer: int | None) -> bool:
        """Whether a hook may have replaced this activation."""
        return (point, layer) in self.hooks

    def __call__(self, point: str, layer: int | None, x: Tensor) -> Tensor:
        key = (point, layer)
        for hook in self.hooks.get(key, ()):
            x = _apply(hook, x)
        if key in self.wanted:
            kept = x
            for axis, index in _selection(x, axes_of(point), self.cache_positions):
                kept = _take(kept, axis, index)
            self.kept.tensors[key] = kept
        return x


def _key(point: str, layer: int | None, num_layers: int) -> tuple[str, int | None]:
    axes_of(point)
    if point in WITHOUT_LAYER:
        if layer is not None:
            raise UserError(f"{point} belongs to the whole model: it takes no layer (given: {layer})")
    elif layer is None or not 0 <= layer < num_layers:
        raise UserError(f"{point} of layer {layer}: this run has the layers 0 to {num_layers - 1}")
    return point, layer


def _apply(hook: Hook, x: Tensor) -> Tensor:
    def replaced(part: Tensor, selection: list[tuple[int, Tensor]]) -> Tensor | None:
        if selection:
            (axis, index), *rest = selection
            new = replaced(_take(part, axis, index), rest)
            return None if new is None else _put(part, axis, index, new)
        new = hook.function(part)
        return None if new is None else torch.as_tensor(new, dtype=x.dtype, device=x.device).expand_as(part)

    new = replaced(x, _selection(x, axes_of(hook.point), hook.positions, hook.heads, hook.neurons))
    return x if new is None else new


def _selection(
    x: Tensor,
    axes: tuple[str, ...],
    positions: Index | None,
    heads: Index | None = None,
    neurons: Index | None = None,
) -> list[tuple[int, Tensor]]:
    """The axes of `x` on which a part is chosen, with the indices, all from 0 on."""
    chosen = {"position": positions, "head": heads, "key_value_head": heads, "neuron": neurons}
    selection = []
    for axis, (name, size) in enumerate(zip(axes, x.shape, strict=True)):
        if (given := chosen.get(name)) is None:
            continue
        index = torch.atleast_1d(torch.as_tensor(given, device=x.device).long())
        if index.numel() and not (-size <= int(index.min()) and int(index.max()) < size):
            raise UserError(f"this activation has {size} {name.replace('_', '-')}s; chosen: {index.flatten().tolist()}")
        if index.ndim > 2 or (index.ndim == 2 and (name != "position" or len(index) != x.shape[0])):
            raise UserError(
                f"choose {name}s by a number or a list, or positions by a tensor [B, P] with a row for each of the "
                f"{x.shape[0]} sequences (given: shape {list(index.shape)})"
            )
        selection.append((axis, torch.where(index < 0, index + size, index)))
    return selection


def _take(x: Tensor, axis: int, index: Tensor) -> Tensor:
    return x.index_select(axis, index) if index.ndim == 1 else x.gather(axis, _spread(index, x, axis))


def _put(x: Tensor, axis: int, index: Tensor, new: Tensor) -> Tensor:
    return x.index_copy(axis, index, new) if index.ndim == 1 else x.scatter(axis, _spread(index, x, axis), new)


def _spread(index: Tensor, x: Tensor, axis: int) -> Tensor:
    """`[B, P]` in the shape of `x` with P in place of `axis`."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = index.shape
    return index.reshape(shape).expand(*x.shape[:axis], index.shape[1], *x.shape[axis + 1 :])
