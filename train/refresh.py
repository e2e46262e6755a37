"""Weak labels from the encoder in training, in place of those of the cache: computed again every few epochs.

Descriptors and hierarchy are left to `train.descriptors` and `train.hierarchy`; this module says when they are
computed, chooses the level, and puts the labels where the losses and the order of slices find them. Called by
`train.loop`, made by `train.pretraining`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from supercl_core.cache.weak_labels import Linked, auto_level
from train import distributed
from train.data import SliceDataset
from train.descriptors import describe
from train.hierarchy import first_neighbour_hierarchy
from train.models.unet import Backbone
from train.sampling import SliceOrder


@dataclass(kw_only=True)
class Refresh:
    """The weak labels in use, and how to compute them again. Part of every checkpoint, as a network is."""

    dataset: SliceDataset
    """The slices that are described and labelled."""
    encoder: Backbone
    """The one in training."""
    ccl: Tensor
    """int32 (slices of the cache,), on the device: the labels that the losses read, changed in place."""
    order: SliceOrder
    """The order of slices under these labels; in groups by them, if the first one was in groups."""
    every: int
    """Epochs of the order from one computation to the next."""
    level: int | None
    """Level of the hierarchy, the coarsest where it has fewer levels; None chooses by `auto_level`."""
    neighbours: Linked
    """Whether a slice may be linked to one of its own patient."""
    batch_size: int
    """Slices that are contrasted with each other in a step: for the choice of the level."""

    def due(self, step: int) -> bool:
        """Whether `step` is to begin with new labels."""
        return step >= self.order.first_step + self.every * self.order.steps_per_epoch

    def __call__(self, step: int) -> dict[str, int]:
        """Compute the labels that are used from `step` on: on rank 0, and equal on all ranks.

        Returns `ccl_level` and `num_components`. Raises SuperCLError for features that are not finite.
        """
        num_slices = len(self.dataset.slices)
        found = torch.zeros(num_slices + 1, dtype=self.ccl.dtype)
        if distributed.rank() == 0:
            found[:-1], found[-1] = self._compute()
        distributed.of_rank_0(found)  # on the CPU: gloo waits for 30 minutes, NCCL for 10
        self._use(found[:-1], step)
        return {"ccl_level": int(found[-1]), "num_components": int(found[:-1].max()) + 1}

    def state_dict(self) -> dict[str, Any]:
        """The labels of the data set's slices, int32 (n,) on the CPU, and the step that they were computed for."""
        return {"labels": self.ccl[self._slices].cpu(), "first_step": self.order.first_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Use the labels of a `state_dict`. Raises ValueError for those of another number of slices."""
        if state["labels"].shape != self._slices.shape:
            raise ValueError(f"weak labels of shape {tuple(state['labels'].shape)}")
        self._use(state["labels"], operator.index(state["first_step"]))

    def _compute(self) -> tuple[Tensor, int]:
        cache, slices = self.dataset.cache, self.dataset.slices
        descriptors = describe(
            self.encoder,
            cache,
            self.dataset.case_ids,
            adjacent_slices=self.dataset.adjacent_slices,
            device=self.ccl.device,
        )
        groups = None
        if self.neighbours == "other-cases":
            groups = torch.from_numpy(cache.slice_patient[slices]).to(self.ccl.device)
        levels = first_neighbour_hierarchy(descriptors, groups)
        if self.level is None:
            level = auto_level(torch.stack(levels).cpu().numpy(), self.batch_size)
        else:
            level = min(self.level, len(levels) - 1)
        return levels[level], level

    def _use(self, labels: Tensor, first_step: int) -> None:
        self.ccl[self._slices] = labels.to(self.ccl)
        grouped = self.order.labels is not None
        self.order = replace(
            self.order, labels=labels.cpu().numpy() if grouped else None, first_step=first_step
        )

    @property
    def _slices(self) -> Tensor:
        return torch.from_numpy(self.dataset.slices).to(self.ccl.device)
