"""The order of slices: which of them the batch of a step holds, as a function of the seed, the step and the labels.

Either at random, if wanted with a share of slices that show a class, or in groups: two by two with the same weak label,
so that every anchor of IGCP has a positive in another slice. Reading the slices, and finding those that show a class,
is left to `train.data`. Called by `train.loop`, `train.pretraining` and `train.finetuning`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from supercl_core.errors import UsageError

FOREGROUND_STREAM: Final = 1
"""Beside the seed and the step, of which `train.loading` draws where slices are cropped."""


@dataclass(frozen=True, kw_only=True)
class SliceOrder:
    """An endless series of epochs, each of them all slices in an order of its own.

    In groups, the slices of every component are shuffled and taken two by two, and then these pairs are shuffled. The
    last slice of an odd component goes with the first one of it again, and a slice alone in its component with itself,
    so every slice is there at least once an epoch. The last, incomplete batch of an epoch is left out. Fewer slices
    than a batch needs are repeated until they fill it. Groups of two are our choice: in no other way are there so
    many components in a batch with a positive for every anchor.

    With a `foreground_share`, each place of a batch is given, with that chance, to a slice of `foreground` in place of
    that of the epoch: of a class drawn uniformly among those that any slice shows, so that rare classes are seen as
    often as others (our choice, after nnU-Net's oversampling of foreground).

    Raises UsageError for groups in batches of an odd size, and for a `foreground_share` where no slice shows a class.
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
    foreground: tuple[np.ndarray, ...] = ()
    """Of each class, the indices in the cache of the slices that show it (`SliceDataset.class_slices`)."""
    foreground_share: float = 0.0
    """From 0 to 1; not for an order in groups, whose pairs it would break."""

    def __post_init__(self) -> None:
        assert 0 <= self.foreground_share <= 1, self.foreground_share
        assert self.labels is None or not self.foreground_share, "pairs of one label would be broken"
        if self.foreground_share and not self._shown:
            raise UsageError(
                "No slice shows a class, so none can be given a share of the batches.",
                expected="ground truth with at least one pixel that is not background",
                found="background alone",
                next_step="Check the labels of the labelled cases, or set foreground_share = 0.",
            )
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
        for at, batch in enumerate(self._of_epochs(step), step):
            if self.foreground_share:
                self._give_to_foreground(batch, np.random.default_rng([self.seed, at, FOREGROUND_STREAM]))
            yield batch

    def _of_epochs(self, step: int) -> Iterator[np.ndarray]:
        """The batches from `step` on, without a share of foreground; each is memory of its own."""
        epoch, begun = divmod(step - self.first_step, self.steps_per_epoch)
        while True:
            first_of_epoch = self.first_step + epoch * self.steps_per_epoch
            order = self._epoch(np.random.default_rng([self.seed, first_of_epoch]))
            order = np.resize(order, self.steps_per_epoch * self.batch_size)
            yield from order.reshape(-1, self.batch_size)[begun:]
            epoch, begun = epoch + 1, 0

    def _give_to_foreground(self, batch: np.ndarray, generator: np.random.Generator) -> None:
        """Give places of a batch to slices that show a class."""
        given = np.flatnonzero(generator.random(len(batch)) < self.foreground_share)
        classes = generator.integers(len(self._shown), size=len(given))
        batch[given] = [generator.choice(self._shown[index]) for index in classes]

    @cached_property
    def _shown(self) -> list[np.ndarray]:
        """The slices of each class that has any."""
        return [slices for slices in self.foreground if len(slices)]

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
