"""The order of slices: which of them the batch of a step holds, as a function of the seed, the step and the labels.

Either at random, or in groups: two by two with the same weak label, so that every anchor of IGCP has a positive in
another slice. Reading the slices is left to `train.data`. Called by `train.loop` and `train.pretraining`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from supercl_core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class SliceOrder:
    """An endless series of epochs, each of them all slices in an order of its own.

    In groups, the slices of every component are shuffled and taken two by two, and then these pairs are shuffled. The
    last slice of an odd component goes with the first one of it again, and a slice alone in its component with itself,
    so every slice is there at least once an epoch. The last, incomplete batch of an epoch is left out. Fewer slices
    than a batch needs are repeated until they fill it. Groups of two are our choice: in no other way are there so
    many components in a batch with a positive for every anchor.

    Raises UsageError for groups in batches of an odd size.
    """

    slices: np.ndarray
    """int64 (n,): indices in the cache."""
    batch_size: int
    """Of all processes together."""
    seed: int
    labels: np.ndarray | None = None
    """Integers (n,): the component of each of the slices, for an order in groups; None for a random one."""
    first_step: int = 0
    """The step at which the first of these epochs begins."""

    def __post_init__(self) -> None:
        if self.labels is not None and self.batch_size % 2:
            raise UsageError(
                "Groups need batches of an even size, since they hold slices two by two.",
                expected="an even number of slices a step, over all processes",
                found=self.batch_size,
                next_step="Set an even batch_size, or batches = 'random'.",
            )

    @cached_property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch; 1 where there are too few slices for one."""
        if self.labels is None:
            num_drawn = len(self.slices)
        else:
            counts = np.unique(self.labels, return_counts=True)[1]
            num_drawn = int((counts + counts % 2).sum())
        return max(1, num_drawn // self.batch_size)

    def batches(self, step: int) -> Iterator[np.ndarray]:
        """The slices of the batch of `step` (from `first_step` on) and of all after it: int64 (batch_size,) each."""
        assert step >= self.first_step, step
        epoch, begun = divmod(step - self.first_step, self.steps_per_epoch)
        while True:
            first_of_epoch = self.first_step + epoch * self.steps_per_epoch
            order = self._epoch(np.random.default_rng([self.seed, first_of_epoch]))
            order = np.resize(order, self.steps_per_epoch * self.batch_size)
            yield from order.reshape(-1, self.batch_size)[begun:]
            epoch, begun = epoch + 1, 0

    def _epoch(self, generator: np.random.Generator) -> np.ndarray:
        """All slices in random order, or in pairs of one label in random order: int64 (at least n,)."""
        order = generator.permutation(len(self.slices))
        if self.labels is None:
            return self.slices[order]
        order = order[np.argsort(self.labels[order], kind="stable")]  # shuffled within each component
        _, first, counts = np.unique(self.labels[order], return_index=True, return_counts=True)
        even = counts + counts % 2
        place = np.arange(even.sum()) - np.repeat(np.cumsum(even) - even, even)
        drawn = order[np.repeat(first, even) + place % np.repeat(counts, even)]
        return self.slices[generator.permutation(drawn.reshape(-1, 2)).ravel()]
