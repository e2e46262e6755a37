"""Crops of slices, from the memory map to a batch on the device.

`SliceDataset` copies stored values into a `StoredBatch`; `normalise` makes a `Batch` of it where it is, so that a GPU
converts, clips and masks. `stack_adjacent` gives whole volumes the channels that crops with adjacent slices have.
Which slices a batch holds is decided in `train.sampling`, threads and devices are left to `train.loading`. Called by
both training loops and by `train.inference`; `SliceDataset` also serves anybody's DataLoader.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from supercl_core.cache.cases import CaseRow
from supercl_core.cache.mapped_shard import MappedShard
from supercl_core.cache.reader import Cache, CachedCase
from supercl_core.cache.schema import STATISTICS
from supercl_core.errors import CacheError, UsageError

MAX_PATCH: Final = 512
"""Largest side of a patch chosen by itself (published: 512 x 512)."""


_Part = tuple[EllipsisType, slice, slice]
"""Index of some rows and columns."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B crops of slices, on one device, ready for augmentation."""

    image_BCYX: Tensor
    """float32: zero mean and unit variance over the slice's case; 0 in padding. With adjacent slices C is all channels
    of the first of them, and so on to the last; the slice itself is in the middle."""
    superpixels_Bhw: Tensor
    """int16: superpixel ids at the centres of the cells of the dataset's `superpixel_stride`; -1 in padding."""
    ground_truth_BYX: Tensor | None
    """uint8 classes, background in padding; None unless asked for."""
    positions_B: Tensor
    """float32 in (0, 1]: position of each slice in its volume."""
    slices_B: Tensor
    """int64: index of each slice in the cache."""


@dataclass(frozen=True, kw_only=True)
class StoredBatch:
    """B crops as the cache stores them, and what makes a Batch of them. What lies in padding is undefined."""

    image_BCYX: Tensor
    """int16, uint16 or float32: stored intensities."""
    superpixels_Bhw: Tensor
    """uint8 or uint16."""
    ground_truth_BYX: Tensor | None
    """uint8."""
    windows_BC4: Tensor
    """float32: low, high, mean and standard deviation of each channel's case (`normalisation_windows`), repeated for
    the adjacent slices."""
    filled_B4: Tensor
    """int64: the part of the patch that the slice fills, as first row, last row + 1, first column, last column + 1."""
    positions_B: Tensor
    slices_B: Tensor
    is_padded: bool = True
    """Whether any patch reaches beyond its slice. Known to the host, so that a device need not mask for nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by the name of the field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> StoredBatch:
        """A copy on another device; from pinned memory it is made in the background."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)


class SliceDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The slices of some cases of a cache, as crops of one size.

    As a dataset it gives centred, normalised crops by index; `train.loading` makes batches of random ones, which is
    what our own loops use. `case_ids`: None takes every case. `patch_size`: rows and columns, None takes
    `automatic_patch_size`. With `ground_truth`, cases must have one. `multiple_of`: what a network asks of rows and
    columns, the stride of its deepest features. `superpixel_stride`: a divisor of it; superpixels are read at the
    centres of cells of so many pixels, (stride // 2 + k * stride). `adjacent_slices`: so many slices before and after
    each one become channels of its image, as `stack_adjacent` puts them; superpixels and ground truth are those of the
    slice itself. `foreground_share`: of the patches that `place` draws, which are to show a class.

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
        multiple_of: int = 16,
        superpixel_stride: int = 16,
        adjacent_slices: int = 0,
        foreground_share: float = 0.0,
    ) -> None:
        assert multiple_of % superpixel_stride == 0, (multiple_of, superpixel_stride)
        assert adjacent_slices >= 0, adjacent_slices
        assert 0 <= foreground_share <= 1, foreground_share
        assert ground_truth or not foreground_share, "patches are placed by their ground truth"
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
        self.patch_size = patch_size or automatic_patch_size(cache, multiple_of)
        self.superpixel_stride = superpixel_stride
        self.adjacent_slices = adjacent_slices
        self.num_channels = stacked_channels(cache.num_channels, adjacent_slices)
        """Of an image with its adjacent slices."""
        self._ground_truth, self._foreground_share = ground_truth, foreground_share
        rows = [cache.case(case_id).row for case_id in self.case_ids]
        unlabelled = [row.id for row in rows if ground_truth and not row.has_ground_truth]
        if unlabelled:
            raise CacheError(
                "Cases without ground truth cannot be used for fine-tuning.",
                where=cache.path,
                expected="a label map for every labelled case of the split",
                found=", ".join(unlabelled[:5]),
                next_step="Take these cases out of the split, or preprocess them with their label maps.",
            )
        if any(side < multiple_of or side % multiple_of for side in self.patch_size):
            raise UsageError(
                "The patch size does not suit the network.",
                expected=f"rows and columns that are multiples of {multiple_of}",
                found=f"{self.patch_size[0]} x {self.patch_size[1]}",
                next_step="Set patch_size to such numbers, or leave it out to have it chosen.",
            )
        # float32 holds a mixture of dtypes without loss.
        self._image_dtype = _common_dtype({row.image_dtype for row in rows}, otherwise=torch.float32)
        self._superpixels_dtype = _common_dtype(
            {row.superpixels_dtype for row in rows}, otherwise=torch.uint16
        )
        self._sizes = np.array([row.shape[2:] for row in cache.rows])
        """Rows and columns of the slices of every row of the cache."""
        depths = np.array([row.shape[1] for row in cache.rows])
        self._z_AN = adjacent_indices(cache.slice_z, depths[cache.slice_case], n=adjacent_slices)
        """The slices of its case that are in the image of each slice of the cache (2n + 1, slices)."""
        used = np.unique(cache.slice_case[self.slices])
        self._windows = np.zeros((len(cache.rows), self.num_channels, 4), np.float32)
        windows = normalisation_windows([cache.rows[index] for index in used])
        self._windows[used] = np.tile(windows, (1, 2 * adjacent_slices + 1, 1))

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = normalise(self.gather(self.slices[[index]]))
        item = {
            "image": batch.image_BCYX[0],
            "superpixels": batch.superpixels_Bhw[0],
            "position": batch.positions_B[0],
            "slice": batch.slices_B[0],
        }
        if batch.ground_truth_BYX is not None:
            item["ground_truth"] = batch.ground_truth_BYX[0]
        return item

    def place(self, slices: np.ndarray, generator: np.random.Generator | None) -> np.ndarray:
        """Where patches begin in the given slices: int64 (B, 2), row and column, negative where a slice is smaller.

        Drawn uniformly from all places within the slice, or of the slice within the patch; None centres them. With
        the chance `foreground_share` only from those that hold a random pixel of a random class of those that the slice
        shows, if any (our choice, after nnU-Net, which centres patches on such a pixel). Raises StorageError where the
        ground truth cannot be read any more.
        """
        slack = self._sizes[self.cache.slice_case[slices]] - self.patch_size
        if generator is None:
            return slack // 2
        first, last = np.minimum(slack, 0), np.maximum(slack, 0)
        if self._foreground_share:
            for item in np.flatnonzero(generator.random(len(slices)) < self._foreground_share):
                pixel = self._foreground_pixel(slices[item], generator)
                if pixel is not None:
                    first[item] = np.maximum(first[item], pixel - self.patch_size + 1)
                    last[item] = np.minimum(last[item], pixel)
        return generator.integers(first, last, endpoint=True)

    def class_slices(self) -> tuple[np.ndarray, ...]:
        """For each class but the background, int64 (n,): indices in the cache of the slices that show it.

        Reads the ground truth of all slices once, one slice at a time. Raises StorageError where that fails.
        """
        found: list[list[int]] = [[] for _ in self.cache.class_names[1:]]
        for index in self.slices:
            truth = self._truth(index).tobytes()
            for value, indices in enumerate(found, 1):
                if value in truth:  # a search that ends where it finds one, many times faster than to count
                    indices.append(index)
        return tuple(np.array(indices, np.int64) for indices in found)

    def buffer(self, size: int, *, pinned: bool = False) -> StoredBatch:
        """Memory for a batch of `size`, of undefined content; pinned, a GPU copies from it in the background."""

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, *shape, dtype=dtype, pin_memory=pinned)

        (height, width), stride = self.patch_size, self.superpixel_stride
        return StoredBatch(
            image_BCYX=empty(self.num_channels, height, width, dtype=self._image_dtype),
            superpixels_Bhw=empty(height // stride, width // stride, dtype=self._superpixels_dtype),
            ground_truth_BYX=empty(height, width, dtype=torch.uint8) if self._ground_truth else None,
            windows_BC4=empty(self.num_channels, 4, dtype=torch.float32),
            filled_B4=empty(4, dtype=torch.int64),
            positions_B=empty(dtype=torch.float32),
            slices_B=empty(dtype=torch.int64),
        )

    def gather(
        self, slices: np.ndarray, corners_B2: np.ndarray | None = None, *, out: StoredBatch | None = None
    ) -> StoredBatch:
        """Crops of the given slices, int64 (B,): indices in the cache. Threads may gather at the same time.

        `corners_B2`: as `place` gives them, None centres the crops. `out`: a `buffer` of this size to fill, which gives
        what is returned its memory; None takes a new one. Raises StorageError where a file of the cache cannot be read
        any more, and CacheError where one is missing or of another size.
        """
        out = self.buffer(len(slices)) if out is None else out
        first = self.place(slices, None) if corners_B2 is None else corners_B2
        cases = self.cache.slice_case[slices]
        shown = np.maximum(first, 0), np.minimum(first + self.patch_size, self._sizes[cases])
        filled = shown[0] - first, shown[1] - first
        stride = self.superpixel_stride
        # From the first cell whose centre lies in the slice to the last one.
        cells = tuple(-((stride // 2 - edge) // stride) for edge in filled)
        centres = first + cells[0] * stride + stride // 2
        out.windows_BC4.numpy()[:] = self._windows[cases]
        edges_B4 = out.filled_B4.numpy()
        edges_B4[:, ::2], edges_B4[:, 1::2] = filled
        out.positions_B.numpy()[:] = self.cache.slice_position[slices]
        out.slices_B.numpy()[:] = slices
        rows = [self.cache.rows[case] for case in cases.tolist()]
        z_AB = self._z_AN[:, slices].tolist()
        own_z_B = z_AB[self.adjacent_slices]  # the middle one
        images_ABCYX = out.image_BCYX.unflatten(1, (-1, self.cache.num_channels)).unbind(1)
        pixels = list(_parts(*shown)), list(_parts(*filled))
        centres_and_cells = _parts(centres, shown[1], stride), _parts(*cells)
        of_arrays: list[Iterator[tuple[MappedShard, int, _Part, np.ndarray]]] = []
        for name, buffer, z_B, (sources, places) in (
            *(("image", images, z_B, pixels) for images, z_B in zip(images_ABCYX, z_AB, strict=True)),
            ("superpixels", out.superpixels_Bhw, own_z_B, centres_and_cells),
            ("ground_truth", out.ground_truth_BYX, own_z_B, pixels),
        ):
            if buffer is not None:
                shards = [self.cache.shard(row, name) for row in rows]
                targets = map(operator.getitem, buffer.numpy(), places)
                of_arrays.append(zip(shards, z_B, sources, targets, strict=True))
        # Slice by slice, each right after it was asked for: other orders take a quarter longer.
        not_there = []
        for copy in itertools.chain.from_iterable(zip(*of_arrays, strict=True)):
            shard, z, source, target = copy
            if shard.prefetch(z, source[1]):
                target[...] = shard.array[z][source]
            else:
                not_there.append(copy)
        for shard, z, source, target in not_there:
            shard.load(z, source[1])
            target[...] = shard.array[z][source]
        is_padded = bool(filled[0].any() or (filled[1] < self.patch_size).any())
        return replace(out, is_padded=is_padded)

    def _foreground_pixel(self, index: int, generator: np.random.Generator) -> np.ndarray | None:
        """Row and column of a random pixel of a random class of those that a slice shows; None where it shows none."""
        truth_YX = self._truth(index)
        shown = np.flatnonzero(truth_YX != 0)
        if not len(shown):
            return None
        classes = truth_YX.ravel()[shown]
        of_class = shown[classes == generator.choice(np.unique(classes))]
        return np.array(np.unravel_index(generator.choice(of_class), truth_YX.shape))

    def _truth(self, index: int) -> np.ndarray:
        """The ground truth of a slice of the cache, uint8 (y, x): a view of the map, which is in memory."""
        row, z = self.cache.rows[self.cache.slice_case[index]], int(self.cache.slice_z[index])
        shard, all_rows = self.cache.shard(row, "ground_truth"), slice(0, row.shape[2])
        if not shard.prefetch(z, all_rows):
            shard.load(z, all_rows)
        return shard.array[z]


def stack_adjacent(image_ZCYX: Tensor, n: int) -> Tensor:
    """Every slice of a volume with the n before and the n after it as channels: (z, c * (2n + 1), y, x).

    All channels of slice z - n come first, then those of the next one, and so on to z + n; beyond the ends of the
    volume the end slice repeats. The result has the dtype and the device of `image_ZCYX` and memory of its own.
    """
    num_slices = len(image_ZCYX)
    indices_AZ = adjacent_indices(np.arange(num_slices), np.full(num_slices, num_slices), n=n)
    return image_ZCYX[torch.from_numpy(indices_AZ.T)].flatten(1, 2)


def stacked_channels(num_channels: int, n: int) -> int:
    """Channels of an image of `num_channels` with the n slices before and the n after it."""
    return num_channels * (2 * n + 1)


def adjacent_indices(z: np.ndarray, depths: np.ndarray, *, n: int) -> np.ndarray:
    """The slices from n before to n after each of some slices, in order: integers (2n + 1, m).

    `z`: integers (m,), each within a volume of so many slices as `depths` (m,) says, and so is what is returned:
    beyond the ends of a volume the end slice repeats.
    """
    return np.minimum(np.maximum(z + np.arange(-n, n + 1)[:, None], 0), depths - 1)


def normalise(stored: StoredBatch) -> Batch:
    """The batch that a stored one stands for, on the same device and in memory of its own."""
    image = normalise_images(stored.image_BCYX, stored.windows_BC4)
    superpixels = stored.superpixels_Bhw.to(torch.int16)
    truth = None if stored.ground_truth_BYX is None else stored.ground_truth_BYX.clone()
    if stored.is_padded:
        height, width = image.shape[2:]
        stride = height // superpixels.shape[1]
        centres = slice(stride // 2, None, stride)
        top, bottom, left, right = (edge[:, None] for edge in stored.filled_B4.unbind(1))
        rows, columns = (torch.arange(side, device=top.device) for side in (height, width))
        padding_BY, padding_BX = (rows < top) | (rows >= bottom), (columns < left) | (columns >= right)
        padding_BYX = padding_BY[:, :, None] | padding_BX[:, None]
        image.masked_fill_(padding_BYX[:, None], 0)
        superpixels.masked_fill_(padding_BYX[:, centres, centres], -1)
        if truth is not None:
            truth.masked_fill_(padding_BYX, 0)
    return Batch(
        image_BCYX=image,
        superpixels_Bhw=superpixels,
        ground_truth_BYX=truth,
        positions_B=stored.positions_B.clone(),
        slices_B=stored.slices_B.clone(),
    )


def normalise_images(image_BCYX: Tensor, windows_BC4: Tensor) -> Tensor:
    """Clip every channel to its case's 0.5 and 99.5 percentiles, then to zero mean and unit variance.

    `image_BCYX`: of any real dtype, stored units. `windows_BC4`: as `normalisation_windows` gives them, or one for all
    images (B = 1). Returns float32, in memory of its own.
    """
    low, high, mean, std = windows_BC4[..., None, None].unbind(2)
    image = image_BCYX.to(torch.float32, copy=True)
    # In place, as fresh memory takes as long as the arithmetic; clamp with tensors for bounds takes twice as long.
    torch.maximum(image, low, out=image)
    torch.minimum(image, high, out=image)
    return image.sub_(mean).div_(std)


def normalisation_window(case: CachedCase) -> np.ndarray:
    """What `normalisation_windows` gives for one case: float32 (c, 4)."""
    return normalisation_windows([case.row])[0]


def normalisation_windows(rows: Sequence[CaseRow]) -> np.ndarray:
    """Low, high, mean and standard deviation of each channel of each case, in stored units: float32 (m, c, 4).

    The standard deviation of a constant channel is given as 1.
    """
    names = ("percentile_00_5", "percentile_99_5", "mean", "std")
    windows = np.array([row.statistics for row in rows])[..., [STATISTICS.index(name) for name in names]]
    windows[..., :3] -= np.array([row.image_offset for row in rows])[:, None, None]
    windows /= np.array([row.image_scale for row in rows])[:, None, None]
    windows[..., 3][windows[..., 3] <= 0] = 1
    return windows.astype(np.float32)


def network_channels(wanted: int | None, cached: int) -> int:
    """Input channels of a network for images of `cached` channels.

    Raises UsageError when the images have several channels and the network is to have another number.
    """
    if wanted is not None and wanted != cached and cached != 1:
        raise UsageError(
            "The network's input channels do not fit the cache.",
            expected=f"{cached}: only single-channel images are repeated",
            found=wanted,
            next_step="Leave in_channels out.",
        )
    return wanted or cached


def repeat_channels(images_BCYX: Tensor, in_channels: int) -> Tensor:
    """Single-channel images repeated to the network's input channels (as published for MRI models of four)."""
    return images_BCYX.expand(-1, in_channels, -1, -1) if images_BCYX.shape[1] == 1 else images_BCYX


def automatic_patch_size(cache: Cache, multiple_of: int = 16) -> tuple[int, int]:
    """The median size of the cache's slices, rounded to a multiple of `multiple_of`, up to 512."""
    shapes = np.array([row.shape for row in cache.done])
    median = np.median(shapes[:, 2:], axis=0)
    most = max(1, MAX_PATCH // multiple_of)
    height, width = np.clip(np.rint(median / multiple_of), 1, most).astype(int) * multiple_of
    return int(height), int(width)


def _parts(first_B2: np.ndarray, last_B2: np.ndarray, step: int = 1) -> Iterator[_Part]:
    """Index of the rows and columns from `first_B2` up to `last_B2`, for each of a batch."""
    axes = zip(first_B2.T.tolist(), last_B2.T.tolist(), strict=True)
    rows, columns = (map(slice, first, last, itertools.repeat(step)) for first, last in axes)
    return zip(itertools.repeat(...), rows, columns)


def _common_dtype(names: set[str], *, otherwise: torch.dtype) -> torch.dtype:
    """The only dtype of these, or `otherwise`."""
    return getattr(torch, names.pop()) if len(names) == 1 else otherwise
