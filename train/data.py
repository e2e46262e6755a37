"""Batches from the memory map: threads copy random crops into tensors.

No worker processes: copying from a map releases the GIL, and threads on a map were 6-10 times faster than a
DataLoader with two processes. Which slices a batch holds is decided in `train.sampling`; where they are cropped is
a function of (seed, step, rank) alone, so a resumed run goes on in the middle of an epoch. Normalisation happens on
the device. Called by `train.pretraining` and `train.finetuning`; `SliceDataset` also serves anybody's DataLoader.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from supercl_core.cache_reader import Cache, CachedCase
from supercl_core.errors import CacheError, UsageError
from train.models.unet import STRIDE
from train.sampling import SliceOrder

NUM_THREADS: Final = 4
"""Threads that gather batches, and batches gathered ahead."""

MAX_PATCH: Final = 512
"""Largest side of a patch chosen by itself (published: 512 x 512)."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B crops of slices, on one device."""

    image_BCYX: Tensor
    """float32: stored intensities from the loader, zero-mean and unit-variance after `normalise`."""
    windows_BC4: Tensor
    """float32: low, high, mean and standard deviation of each channel's case, in stored units."""
    superpixels_Bhw: Tensor
    """int16: superpixel ids at the centres of the stride-16 grid; -1 in padding."""
    ground_truth_BYX: Tensor | None
    """uint8 classes, background in padding; None unless asked for."""
    positions_B: Tensor
    """float32 in (0, 1]: position of each slice in its volume."""
    slices_B: Tensor
    """int64: index of each slice in the cache."""

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class SliceDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The slices of some cases of a cache, as crops of one size.

    As a dataset it gives centred, normalised crops by index; `gather` makes whole batches of random ones, which
    is what our own loops use. `case_ids`: None takes every case. With `ground_truth`, cases must have one.

    Raises CacheError for unknown cases or a missing ground truth, UsageError for no case or an impossible patch size.

    Example:
        dataset = SliceDataset(open_cache("heart.zarr"), patch_size=(256, 256))
        loader = torch.utils.data.DataLoader(dataset, batch_size=16)
    """

    def __init__(
        self,
        cache: Cache,
        case_ids: list[str] | None = None,
        *,
        patch_size: tuple[int, int] | None = None,
        ground_truth: bool = False,
    ) -> None:
        self.cache = cache
        self.case_ids = [row.id for row in cache.done] if case_ids is None else list(case_ids)
        self.slices = cache.case_slices(self.case_ids)
        """int64 (n,): indices of the slices in the cache."""
        if not len(self.slices):
            raise UsageError(
                "There are no slices to train on.",
                where=cache.path,
                expected="at least one case",
                found="none: the list of cases is empty",
                next_step="Check the split's list of labelled cases.",
            )
        self.patch_size = patch_size or automatic_patch_size(cache)
        self._ground_truth = ground_truth
        unlabelled = [i for i in self.case_ids if ground_truth and not cache.case(i).row.has_ground_truth]
        if unlabelled:
            raise CacheError(
                "Cases without ground truth cannot be used for fine-tuning.",
                where=cache.path,
                expected="a label map for every labelled case of the split",
                found=", ".join(unlabelled[:5]),
                next_step="Take these cases out of the split, or preprocess them with their label maps.",
            )
        if any(side < STRIDE or side % STRIDE for side in self.patch_size):
            raise UsageError(
                "The patch size does not suit the network.",
                expected=f"rows and columns that are multiples of {STRIDE}",
                found=f"{self.patch_size[0]} x {self.patch_size[1]}",
                next_step="Set patch_size to such numbers, or leave it out to have it chosen.",
            )

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = normalise(self.gather(self.slices[[index]], None))
        item = {
            "image": batch.image_BCYX[0],
            "superpixels": batch.superpixels_Bhw[0],
            "position": batch.positions_B[0],
            "slice": batch.slices_B[0],
        }
        if batch.ground_truth_BYX is not None:
            item["ground_truth"] = batch.ground_truth_BYX[0]
        return item

    def gather(self, slices: np.ndarray, generator: np.random.Generator | None) -> Batch:
        """Crops of the given slices (indices in the cache), stored intensities.

        `generator` places the crops, or the slices within the padding; None centres them.
        """
        height, width = self.patch_size
        size, channels = len(slices), self.cache.num_channels
        image = np.empty((size, channels, height, width), np.float32)
        windows = np.empty((size, channels, 4), np.float32)
        superpixels = np.full((size, height // STRIDE, width // STRIDE), -1, np.int16)
        truth = np.zeros((size, height, width), np.uint8) if self._ground_truth else None
        for item, index in enumerate(slices):
            case = self._case(index)
            z = self.cache.slice_z[index]
            rows, out_rows = _window(case.row.shape[2], height, generator)
            columns, out_columns = _window(case.row.shape[3], width, generator)
            windows[item] = normalisation_window(case)
            image[item] = windows[item, :, 2, None, None]  # padding becomes 0 by normalisation
            image[item, :, out_rows, out_columns] = case.image_ZCYX[z, :, rows, columns]
            _sample_superpixels(
                case.superpixels_ZYX[z], superpixels[item], rows, out_rows, columns, out_columns
            )
            if truth is not None and (stored := case.ground_truth_ZYX) is not None:
                truth[item, out_rows, out_columns] = stored[z, rows, columns]
        return Batch(
            image_BCYX=torch.from_numpy(image),
            windows_BC4=torch.from_numpy(windows),
            superpixels_Bhw=torch.from_numpy(superpixels),
            ground_truth_BYX=None if truth is None else torch.from_numpy(truth),
            positions_B=torch.from_numpy(self.cache.slice_position[slices]),
            slices_B=torch.from_numpy(slices),
        )

    def _case(self, index: int) -> CachedCase:
        return self.cache.case(self.cache.rows[self.cache.slice_case[index]].id)


class BatchLoader:
    """An endless stream of training batches of one process, from `first_step` on, gathered ahead by threads."""

    def __init__(
        self,
        dataset: SliceDataset,
        order: SliceOrder,
        *,
        device: torch.device,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._dataset, self._device = dataset, device
        self._rank, self._world_size = rank, world_size
        self._ahead: deque[Future[Batch]] = deque()
        self.wait_s = 0.0
        """Seconds for which the consumer has waited for batches."""
        self.restart(order, first_step)

    def restart(self, order: SliceOrder, step: int) -> None:
        """Go on with the batches of another order from `step` on; what was gathered ahead is dropped."""
        self._cancel()
        self._seed, self._drawn = order.seed, enumerate(order.batches(step), step)

    def __iter__(self) -> Generator[Batch]:
        with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="gather") as pool:
            try:
                while True:
                    while len(self._ahead) < NUM_THREADS:
                        self._ahead.append(pool.submit(self._gather, *next(self._drawn)))
                    start = time.perf_counter()
                    batch = self._ahead.popleft().result()
                    self.wait_s += time.perf_counter() - start
                    yield normalise(batch.to(self._device))
            finally:
                self._cancel()

    def _gather(self, step: int, slices: np.ndarray) -> Batch:
        generator = np.random.default_rng([self._seed, step, self._rank])
        batch = self._dataset.gather(slices[self._rank :: self._world_size], generator)
        if self._device.type == "cuda":
            pinned = {k: v.pin_memory() for k, v in vars(batch).items() if isinstance(v, Tensor)}
            batch = replace(batch, **pinned)
        return batch

    def _cancel(self) -> None:
        while self._ahead:
            self._ahead.popleft().cancel()


def normalise(batch: Batch) -> Batch:
    """The batch with its images normalised by `normalise_images`."""
    return replace(batch, image_BCYX=normalise_images(batch.image_BCYX, batch.windows_BC4))


def normalise_images(image_BCYX: Tensor, windows_BC4: Tensor) -> Tensor:
    """Clip every channel to its case's 0.5 and 99.5 percentiles, then to zero mean and unit variance.

    `image_BCYX`: float32, stored units. `windows_BC4`: as in Batch, or one for all images (B = 1).
    """
    low, high, mean, std = windows_BC4[..., None, None].unbind(2)
    return (image_BCYX.clamp(low, high) - mean) / std


def normalisation_window(case: CachedCase) -> np.ndarray:
    """Low, high, mean and standard deviation of each channel, in stored units: float32 (c, 4).

    The standard deviation of a constant channel is given as 1.
    """
    row = case.row
    low, high, mean = (
        (row.statistic(name) - row.image_offset) / row.image_scale
        for name in ("percentile_00_5", "percentile_99_5", "mean")
    )
    std = row.statistic("std") / row.image_scale
    return np.stack([low, high, mean, np.where(std > 0, std, 1)], axis=1).astype(np.float32)


def automatic_patch_size(cache: Cache) -> tuple[int, int]:
    """The median size of the cache's slices, rounded to a multiple of 16, from 16 to 512."""
    shapes = np.array([row.shape for row in cache.done])
    median = np.median(shapes[:, 2:], axis=0)
    height, width = np.clip(np.rint(median / STRIDE), 1, MAX_PATCH // STRIDE).astype(int) * STRIDE
    return int(height), int(width)


def _window(size: int, patch: int, generator: np.random.Generator | None) -> tuple[slice, slice]:
    """Where a patch lies along one axis: the part of the slice it shows, and the part of the patch that fills."""
    slack = size - patch
    if generator is None:
        start = slack // 2
    else:
        start = int(generator.integers(min(slack, 0), max(slack, 0), endpoint=True))
    first, last = max(start, 0), min(start + patch, size)
    return slice(first, last), slice(first - start, last - start)


def _sample_superpixels(
    stored_YX: np.ndarray,
    out_hw: np.ndarray,
    rows: slice,
    out_rows: slice,
    columns: slice,
    out_columns: slice,
) -> None:
    """Read the superpixel map at the centres of the stride-16 grid of a patch; cells in padding are left."""
    source, target = [], []
    for shown, filled in ((rows, out_rows), (columns, out_columns)):
        first = -(-(filled.start - STRIDE // 2) // STRIDE)  # the first cell whose centre is not padding
        first = max(first, 0)
        last = -(-(filled.stop - STRIDE // 2) // STRIDE)
        begin = shown.start - filled.start + first * STRIDE + STRIDE // 2
        target.append(slice(first, last))
        source.append(slice(begin, shown.stop, STRIDE))
    out_hw[target[0], target[1]] = stored_YX[source[0], source[1]]
