"""Losses of segmentation networks with deep supervision, and nnU-Net's learning-rate schedule (Isensee et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from shared.config import UserError


def deep_supervision_weights(num_scales: int) -> list[float]:
    """1, 1/2, 1/4, ... from the finest scale on, over their sum."""
    if num_scales < 1:
        raise UserError(f"deep supervision needs at least one scale (given: {num_scales})")
    total = 2 - 2.0 ** (1 - num_scales)
    return [0.5**scale / total for scale in range(num_scales)]


def soft_dice_loss(logits: Tensor, labels: Tensor, epsilon: float = 1e-5) -> Tensor:
    """1 - mean_c (2 Σ p_c g_c + ε) / (Σ p_c + Σ g_c + ε), sums over all voxels of the batch, a scalar.

    logits `[B, K, *space]`, labels `[B, *space]` int64; p is the softmax, g one-hot, c runs over foreground classes
    1 to K - 1. Classes absent from both are left out: no voxel is labeled so, and of none it is the most probable
    class (Σ p_c itself is never 0). 0 where all are absent.
    """
    _check(logits, labels)
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
    classes, flat = logits.shape[1], labels.flatten()
    of_label = probabilities.gather(1, labels[:, None]).flatten()
    true_positives = probabilities.new_zeros(classes).index_add(0, flat, of_label)[1:]
    predicted = probabilities.sum([0, *range(2, logits.ndim)])[1:]
    labeled = flat.bincount(minlength=classes)[1:]
    present = labeled > 0
    if not present.all():
        # Which class is the most probable one matters only to classes that no voxel has.
        present |= logits.argmax(dim=1).flatten().bincount(minlength=classes)[1:] > 0
    scores = (2 * true_positives + epsilon) / (predicted + labeled + epsilon)
    return ((1 - scores) * present).sum() / present.sum().clamp(min=1)


def segmentation_loss(
    logits: Tensor | Sequence[Tensor], labels: Tensor, weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Soft Dice loss plus cross-entropy, as `loss`, `dice` and `cross_entropy`, means over scales by `weights`.

    logits `[B, K, X, Y, Z]`, or those of all scales, finest first; labels `[B, X, Y, Z]` int64, which coarser scales
    see at every 2nd, 4th, ... voxel. `weights`: by default `deep_supervision_weights`.
    """
    scales = [logits] if isinstance(logits, Tensor) else list(logits)
    weights = deep_supervision_weights(len(scales)) if weights is None else weights
    if len(weights) != len(scales):
        raise UserError(f"deep supervision needs a weight a scale (given: {len(weights)} for {len(scales)} scales)")
    dice, cross_entropy = [], []
    for scale in scales:
        seen = _nearest(labels, scale.shape[2:])
        dice.append(soft_dice_loss(scale, seen))
        cross_entropy.append(functional.cross_entropy(scale, seen))
    terms = {"dice": _weighted(dice, weights), "cross_entropy": _weighted(cross_entropy, weights)}
    return {"loss": terms["dice"] + terms["cross_entropy"], **terms}


def polynomial_decay(learning_rate: float, progress: float, power: float = 0.9) -> float:
    """The learning rate at a share of the training: η (1 - t / T)^power, nnU-Net's "poly" schedule."""
    if not 0 <= progress <= 1:
        raise UserError(f"progress is the share of the training that is done, from 0 to 1 (given: {progress})")
    return learning_rate * (1 - progress) ** power


def _nearest(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels at the first voxel of every cell of a coarser grid."""
    strides = [size // coarse for size, coarse in zip(labels.shape[1:], shape, strict=True)]
    return labels[(slice(None), *(slice(None, None, stride) for stride in strides))]


def _weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([value * weight for value, weight in zip(values, weights, strict=True)]).sum()


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim < 3 or labels.shape != (len(logits), *logits.shape[2:]):
        raise UserError(
            f"logits must be [batch, classes, *space] and labels [batch, *space] (given: {list(logits.shape)} and "
            f"{list(labels.shape)})"
        )
