"""What the weights are worth: whether they tell false negatives from true ones, and whether S is a selection model.

Everything is over the unlabeled candidates of the source that negatives are drawn from, of the queries that a member
is trained on. A false negative is a relevant one among them, which only complete judgments tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .config import Source, Variant
from .data import Prepared
from .model import Inputs, Models, evaluating, inverse_rejection

FloatArray = NDArray[np.float64]
# Scores computed at once: of a kernel network's members together, so that what is between stays in cache, and of a
# Transformer.
KERNEL_SCORES = 25_000
TRANSFORMER_SCORES = 1024


class Diagnosis:
    """Measures the models of a training as they are, by [members].

    - `auc_of_weights`: the chance that w_R is greater for a true than for a false negative (a tie counts half);
    - `auc_of_relevance`: the chance that R scores a false negative higher than a true one;
    - `variation_of_weights`: standard deviation of w_R over its mean; `weight_of_true`, `weight_of_false`: means;
    - `pool_correlation`, `pool_correlation_of_selection`: of σ(f_R) and of σ(f_S) with being in the annotator's pool.

    Those of which a member has too little, such as no false negative at all, are not a number.
    """

    def __init__(
        self,
        prepared: Prepared,
        unlabeled: NDArray[np.bool_],
        source: Source,
        queries: Sequence[NDArray[np.int64]],
        most: int | None = None,
    ) -> None:
        """`unlabeled` bool [Q, negatives]; `queries` are those of each member; `most` of them are looked at."""
        self.rows = np.unique(np.concatenate([each[:most] for each in queries]))
        self.slots = prepared.sources[source][self.rows]
        of_member = np.stack([np.isin(self.rows, each[:most]) for each in queries])
        self.counted = of_member[:, :, None] & unlabeled[self.rows]
        places = np.maximum(self.slots, 0)
        self.relevant = np.take_along_axis(prepared.relevant[self.rows], places, axis=1)
        self.pooled = np.take_along_axis(prepared.pooled[self.rows], places, axis=1)

    def __call__(self, models: Models, inputs: Inputs, variant: Variant) -> dict[str, list[float]]:
        relevance = score_slots(models.relevance, inputs, self.slots, self.rows)
        found = {
            "auc_of_relevance": self._each(relevance, lambda f, _, false: auc(f[false], f[~false])),
            "pool_correlation": self._each(relevance, lambda f, pooled, _: correlation(_sigmoid(f), pooled)),
        }
        if models.selection is not None:
            scores = score_slots(models.selection, inputs, self.slots, self.rows)
            weights = inverse_rejection(torch.from_numpy(scores), variant.tau).numpy()
            found |= {
                "auc_of_weights": self._each(weights, lambda w, _, false: auc(w[~false], w[false])),
                "variation_of_weights": self._each(weights, lambda w, *_: w.std() / w.mean()),
                "weight_of_true": self._each(weights, lambda w, _, false: mean(w[~false])),
                "weight_of_false": self._each(weights, lambda w, _, false: mean(w[false])),
                "pool_correlation_of_selection": self._each(
                    scores, lambda f, pooled, _: correlation(_sigmoid(f), pooled)
                ),
            }
        return found

    def _each(self, values: FloatArray, function: object) -> list[float]:
        """The function of a member's values, pool membership and relevance, of all members."""
        return [
            float(function(row[counted], self.pooled[counted], self.relevant[counted]))  # type: ignore[operator]
            for row, counted in zip(values, self.counted, strict=True)
        ]


def auc(greater: FloatArray, smaller: FloatArray) -> float:
    """The chance that a value of the first is greater than one of the second; a tie counts half."""
    if not len(greater) or not len(smaller):
        return float("nan")
    ordered = np.sort(smaller)
    below = np.searchsorted(ordered, greater, side="left") + np.searchsorted(ordered, greater, side="right")
    return float(below.mean() / (2 * len(smaller)))


def correlation(values: FloatArray, member: NDArray[np.bool_]) -> float:
    """Pearson correlation of values with a membership; not a number where either does not vary."""
    if len(values) < 2 or values.std() < 1e-12 or member.all() or not member.any():
        return float("nan")
    return float(np.corrcoef(values, member)[0, 1])


def mean(values: FloatArray) -> float:
    """Mean, not a number of nothing."""
    return float(values.mean()) if len(values) else float("nan")


def _sigmoid(scores: FloatArray) -> FloatArray:
    return 0.5 * (1 + np.tanh(0.5 * scores))


@torch.no_grad()
def score_slots(
    model: nn.Module, inputs: Inputs, slots: NDArray[np.int64], rows: NDArray[np.int64] | None = None
) -> FloatArray:
    """Scores of candidates by slot [Q', k] of queries `rows` (default: all), [members, Q', k], -inf for pads.

    A model of one member gives [1, Q', k].
    """
    members = getattr(model, "members", None)
    device = next(model.parameters()).device
    rows = np.arange(len(slots)) if rows is None else rows
    scores = np.full((members or 1, *slots.shape), -np.inf)
    queries, places = np.nonzero(slots >= 0)
    step = TRANSFORMER_SCORES if members is None else max(1, KERNEL_SCORES // members)
    with evaluating(model):
        for start in range(0, len(queries), step):
            part = queries[start : start + step], places[start : start + step]
            asked = (torch.from_numpy(each).to(device) for each in (rows[part[0]], slots[part]))
            scores[:, *part] = model(*inputs(*asked)).double().cpu().numpy()
    return scores
