"""Weak labels over a whole cache: nearest neighbours in ASP space and a hierarchy of connected components (CCL).

Every slice is linked to its nearest neighbour; the connected components of that graph are the finest partition.
Components are averaged, linked and merged again, up to the last partition with at least five components
(METHOD, cached IGCP; Sarfraz et al., "Efficient Parameter-free Clustering Using First Neighbor Relations",
CVPR 2019). Called at the end of preprocessing and by `supercl weak-labels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from preprocess.kernels.union_find import connected_components
from supercl_core.cache_reader import Cache, open_cache
from supercl_core.cache_writer import set_root_attributes, write_weak_labels
from supercl_core.locks import hold

MIN_COMPONENTS: Final = 5
"""The hierarchy stops before a level with fewer components (DESIGN)."""

BLOCK_ROWS: Final = 2048
"""Rows of one block of the similarity matrix: 16 MiB of float32."""

INTENSITY: Final = "intensity"
"""Name of the descriptors from intensities, and of the labels made from them."""


@dataclass(frozen=True, kw_only=True)
class Hierarchy:
    """CCL labels of n slices at every level, finest first."""

    ccl: np.ndarray
    """int32 (levels, n)."""
    nearest: np.ndarray
    """int32 (levels, n): nearest neighbour of each node of a level, -1 beyond its nodes."""
    similarity: np.ndarray
    """float32 (levels, n): cosine similarity to it, NaN beyond the nodes."""
    num_components: tuple[int, ...]


def weak_labels(cache: Cache) -> Hierarchy:
    """Compute the weak labels of a complete cache from its intensity ASP maps and make them the default ones.

    Raises CacheError where another process changes the cache.
    """
    with hold(cache.path):
        hierarchy = first_neighbour_hierarchy(intensity_descriptors(open_cache(cache.path)))
        # While one set of labels is exchanged for another.
        set_root_attributes(cache.path, {"complete": False})
        _store(cache.path, hierarchy)
        set_root_attributes(cache.path, {"complete": True})
    return hierarchy


def store_weak_labels(cache: Cache) -> None:
    """The same for a cache that is not complete, by the holder of its lock."""
    _store(cache.path, first_neighbour_hierarchy(intensity_descriptors(cache)))


def _store(path: Path, hierarchy: Hierarchy) -> None:
    write_weak_labels(
        path,
        INTENSITY,
        {"ccl": hierarchy.ccl, "nearest": hierarchy.nearest, "similarity": hierarchy.similarity},
        {"num_components": list(hierarchy.num_components), "descriptors": INTENSITY},
    )
    set_root_attributes(path, {"default_weak_labels": INTENSITY})


def intensity_descriptors(cache: Cache) -> np.ndarray:
    """The ASP map of every slice as one row: float32 (n, g * g), in the order of the cache's slices."""
    maps = [cache.case(row.id).asp_ZGG.reshape(row.shape[1], -1) for row in cache.done]
    return np.concatenate(maps).astype(np.float32)


def first_neighbour_hierarchy(descriptors: np.ndarray) -> Hierarchy:
    """Link, merge and average until one more level would leave fewer than five components.

    `descriptors`: float (n, d). Rows are compared by the cosine after subtracting each row's own mean, so neither
    brightness nor contrast of a slice counts (our choice). The finest level is kept however few components it has.
    """
    nodes = normalise(descriptors)
    num_slices = len(nodes)
    component_of_slice = np.arange(num_slices)
    levels: list[np.ndarray] = []
    nearest_rows, similarity_rows, counts = [], [], []
    while True:
        nearest, similarity = nearest_neighbours(nodes)
        merged = connected_components(len(nodes), np.arange(len(nodes)), nearest)
        num_components = int(merged.max()) + 1
        if levels and (num_components < MIN_COMPONENTS or num_components == len(nodes)):
            break
        component_of_slice = merged[component_of_slice]
        levels.append(component_of_slice)
        nearest_rows.append(_padded(nearest, num_slices, np.int32(-1)))
        similarity_rows.append(_padded(similarity, num_slices, np.float32(np.nan)))
        counts.append(num_components)
        nodes = _component_means(normalise(descriptors), component_of_slice, num_components)
    return Hierarchy(
        ccl=np.stack(levels).astype(np.int32),
        nearest=np.stack(nearest_rows),
        similarity=np.stack(similarity_rows),
        num_components=tuple(counts),
    )


def normalise(descriptors: np.ndarray) -> np.ndarray:
    """Rows with their mean subtracted and scaled to length 1: float32 (n, d + 1).

    The last column is 1 for rows without any contrast and 0 for all others: constant slices are alike among
    themselves and like nothing else.
    """
    centred = descriptors.astype(np.float64)
    centred -= centred.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    flat = length[:, 0] < 1e-6 * np.sqrt(descriptors.shape[1])
    unit = np.where(flat[:, None], 0.0, centred / np.where(length > 0, length, 1))
    return np.concatenate([unit, flat[:, None]], axis=1).astype(np.float32)


def nearest_neighbours(unit_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most similar other row of every row, by exact search in blocks.

    `unit_rows`: float32 (n, d) of length 1. Returns indices int32 (n,) and cosines float32 (n,). Ties go to the
    lower index. A single row is its own neighbour.
    """
    num_rows = len(unit_rows)
    nearest = np.zeros(num_rows, np.int32)
    similarity = np.ones(num_rows, np.float32)
    if num_rows == 1:
        return nearest, similarity
    for start in range(0, num_rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, num_rows)
        best = np.full(stop - start, -np.inf, np.float32)
        rows = np.arange(stop - start)
        for other in range(0, num_rows, BLOCK_ROWS):
            block = unit_rows[start:stop] @ unit_rows[other : other + BLOCK_ROWS].T
            if other == start:
                np.fill_diagonal(block, -np.inf)
            index = block.argmax(axis=1)
            value = block[rows, index]
            better = value > best
            best[better] = value[better]
            nearest[start:stop][better] = other + index[better]
        similarity[start:stop] = best
    return nearest, similarity


def _component_means(unit_rows: np.ndarray, components: np.ndarray, num_components: int) -> np.ndarray:
    """The mean row of each component, scaled to length 1: float32 (num_components, d)."""
    order = np.argsort(components, kind="stable")
    starts = np.searchsorted(components[order], np.arange(num_components))
    sums = np.add.reduceat(unit_rows[order].astype(np.float64), starts, axis=0)
    length = np.linalg.norm(sums, axis=1, keepdims=True)
    return (sums / np.where(length > 0, length, 1)).astype(np.float32)


def _padded(values: np.ndarray, size: int, fill: np.generic) -> np.ndarray:
    padded = np.full(size, fill)
    padded[: len(values)] = values
    return padded
