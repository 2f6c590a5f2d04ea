"""Pairs of a labeled positive and a sampled negative, for all members of a ranker at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shared.config import UserError

from .config import CoupledTraining, Source, Variant
from .data import Prepared
from .model import Pairs


@dataclass(frozen=True)
class Member:
    """One training: the fold that it is tested on, and its seed."""

    fold: int
    seed: int


def seed_of(*parts: object) -> int:
    """A seed below 2^63 that is a function of what it is for."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Sampler:
    """Draws the pairs of an epoch, [members, steps, pairs a step], as a function of the members' seeds and the epoch.

    Of every labeled query outside of the member's fold, `negatives_per_query` of its candidates are drawn without
    repetition (with it, where there are fewer), each beside one of its labels. All variants of a source share the
    draws. Members with fewer queries than others see the first pairs of an epoch once more at its end, so that all take
    the same number of steps. `dropped` bool [members, Q, negatives] leaves candidates out. `UserError` where nothing is
    left to train on.
    """

    def __init__(
        self,
        prepared: Prepared,
        labels: str,
        source: Source,
        variant: Variant,
        settings: CoupledTraining,
        members: Sequence[Member],
        dropped: NDArray[np.bool_] | None = None,
    ) -> None:
        self.members, self.settings, self.refresh = members, settings, variant.refresh
        self.positives = prepared.labels[labels]
        self.negatives = prepared.sources[source]
        allowed = usable(prepared, labels, source)
        if variant.drop == "relevant":
            allowed &= ~relevance_of(prepared, source)
        self.allowed = np.broadcast_to(allowed, (len(members), *allowed.shape))
        if dropped is not None:
            self.allowed = self.allowed & ~dropped
        folds = np.array([member.fold for member in members])
        trained = (prepared.fold != folds[:, None]) & (self.positives[:, 0] >= 0) & self.allowed.any(axis=2)
        self.queries = [np.flatnonzero(row) for row in trained]
        if not all(map(len, self.queries)):
            raise UserError(
                f"a fold has no query with a label ({labels}) and a negative ({source}): the pools are too shallow or "
                "the collection is too small"
            )
        pairs = max(map(len, self.queries)) * settings.negatives_per_query
        self.batch_size = min(settings.batch_size, pairs)
        self.steps = -(-pairs // self.batch_size)

    def epoch(self, epoch: int) -> Pairs:
        """The pairs of an epoch, int64 [members, steps, pairs a step]."""
        drawn = [self._of_member(number, epoch) for number in range(len(self.members))]
        shape = (len(self.members), self.steps, self.batch_size)
        return Pairs(*(torch.from_numpy(np.stack(part).reshape(shape)) for part in zip(*drawn, strict=True)))

    def _of_member(self, number: int, epoch: int) -> tuple[NDArray[np.int64], ...]:
        member, queries, count = self.members[number], self.queries[number], self.settings.negatives_per_query
        # Folds of a seed draw alike for all queries, those that they leave out too.
        generator = np.random.default_rng(seed_of("negatives", member.seed, epoch if self.refresh else 0))
        keys = generator.random(self.negatives.shape, dtype=np.float32)[queries]
        allowed = self.allowed[number, queries]
        best = np.argsort(np.where(allowed, keys, np.inf), axis=1)
        column = np.arange(count) % np.minimum(allowed.sum(axis=1), count)[:, None]
        chosen = np.take_along_axis(best, column, axis=1)
        negatives = np.take_along_axis(self.negatives[queries], chosen, axis=1)
        num_labels = (self.positives[queries] >= 0).sum(axis=1)[:, None]
        which = (generator.random((len(self.positives), count))[queries] * num_labels).astype(np.int64)
        positives = np.take_along_axis(self.positives[queries], which, axis=1)
        pairs = np.repeat(queries, count), positives.ravel(), negatives.ravel()
        order = np.random.default_rng(seed_of("order", member.seed, member.fold, epoch)).permutation(pairs[0].size)
        order = np.resize(order, self.steps * self.batch_size)
        return tuple(part[order] for part in pairs)


def usable(prepared: Prepared, labels: str, source: Source) -> NDArray[np.bool_]:
    """Which candidates of a source can be negatives, bool [Q, negatives]: those that are there and not labeled."""
    negatives = prepared.sources[source]
    labeled = np.take_along_axis(prepared.label_mask(labels), np.maximum(negatives, 0), axis=1)
    return (negatives >= 0) & ~labeled


def relevance_of(prepared: Prepared, source: Source) -> NDArray[np.bool_]:
    """Which candidates of a source are relevant, bool [Q, negatives]."""
    negatives = prepared.sources[source]
    return np.take_along_axis(prepared.relevant, np.maximum(negatives, 0), axis=1) & (negatives >= 0)
