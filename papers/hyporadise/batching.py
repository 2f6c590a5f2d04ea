"""Pairs in groups of like length, so that little of a batch is padding."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


class Groups:
    """Groups of `batch_size` examples of like length, others in every epoch; an epoch has each example once.

    Examples are sorted by length, disturbed by up to `jitter` times it, then cut into groups: as `group_by_length` of
    transformers does, a function of seed and epoch alone.
    """

    def __init__(self, lengths: Tensor, batch_size: int, seed: int, jitter: float = 0.15) -> None:
        self.lengths, self.batch_size, self.seed, self.jitter = lengths.double(), batch_size, seed, jitter
        self._epoch, self._groups = -1, ()

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def rows(self, epoch: int, group: int) -> Tensor:
        """The examples of a group, int64."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            noise = 1 + self.jitter * (2 * torch.rand(len(self.lengths), generator=generator, dtype=torch.float64) - 1)
            self._epoch, self._groups = epoch, (self.lengths * noise).argsort(stable=True).split(self.batch_size)
        return self._groups[group]


def in_order(lengths: Tensor, batch_size: int) -> Iterator[Tensor]:
    """All examples in groups of like length, the shortest first."""
    yield from lengths.argsort(stable=True).split(batch_size)


def of_equal_length(lengths: Tensor, batch_size: int) -> Iterator[Tensor]:
    """All examples in groups whose lengths are the same."""
    for length in lengths.unique().tolist():
        yield from (lengths == length).nonzero()[:, 0].split(batch_size)


def pad_rows(rows: list[list[int]], fill: int, *, left: bool = False) -> Tensor:
    """Lists of tokens as one tensor, int64 [rows, longest], padded behind or in front."""
    width = max(1, *map(len, rows))
    table = torch.full((len(rows), width), fill, dtype=torch.int64)
    for place, row in enumerate(rows):
        if row:
            table[place, slice(width - len(row), None) if left else slice(len(row))] = torch.tensor(row)
    return table
