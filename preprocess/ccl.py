"""Weak labels over a whole cache: nearest neighbours of descriptors and a hierarchy of connected components (CCL).

Every slice is linked to its nearest neighbour; the connected components of that graph are the finest partition.
Components are averaged, linked and merged again, up to the last partition with at least five components
(METHOD, cached IGCP; Sarfraz et al., "Efficient Parameter-free Clustering Using First Neighbor Relations",
CVPR 2019). Neighbours are found by `preprocess.neighbours`, descriptors come from the cache. Called at the end of
preprocessing and by `supercl weak-labels`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from preprocess import approximate
from preprocess.kernels.neighbours import component_means
from preprocess.kernels.union_find import connected_components
from preprocess.neighbours import Neighbours, nearest_neighbours, num_block_pairs
from supercl_core import provenance
from supercl_core.cache.reader import Cache, open_cache
from supercl_core.cache.weak_labels import INTENSITY, MIN_COMPONENTS, LinkRule, labels_name, linked
from supercl_core.cache.writer import set_root_attributes, write_weak_labels
from supercl_core.errors import SuperCLError
from supercl_core.files import wip_path
from supercl_core.locks import check_lock, hold
from supercl_core.progress import progress

NORMALISED_ROWS: Final = 4096
"""Descriptors that are normalised at a time: 32 MiB of float64 where they have 1,024 features."""

RECALL_SAMPLE: Final = 1000
"""Slices on which the recall of an approximate search is measured."""

Search = Literal["auto", "exact", "approximate"]


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
    recall: float
    """Share of slices whose neighbour is the nearest one: 1 for an exact search, else measured on a sample."""


def weak_labels(
    cache: Cache,
    descriptors: str = INTENSITY,
    *,
    neighbours: LinkRule = "auto",
    search: Search = "auto",
    executor: Executor | None = None,
    make_default: bool = True,
) -> str:
    """Compute weak labels of a complete cache and store them; returns their name (`labels_name`).

    `descriptors`: `intensity`, or the name of a set that `supercl describe` has stored. `neighbours`: whether slices of
    one patient may be linked. `search`: exact, approximate, or exact up to `EXACT_LIMIT` slices. `executor`: where
    blocks of the search are computed, also by processes on other machines that see the cache; None computes them here.
    Labels that the cache has stay until the new ones are whole; its default changes last.

    Raises CacheError where another process changes the cache or the descriptors are unknown or stale, SuperCLError for
    descriptors that are not finite, and UsageError where there is no other case to link to.
    """
    name = labels_name(descriptors, neighbours)
    with hold(cache.path) as token:
        _compute_and_write(open_cache(cache.path), token, descriptors, neighbours, search, executor)
        if make_default:
            set_root_attributes(cache.path, {"default_weak_labels": name})
    return name


def store_weak_labels(cache: Cache, token: str) -> None:
    """Compute the labels from intensities for the holder of the lock `token`, of a cache that is not complete yet.

    They become the default where that is missing or stale.
    """
    _compute_and_write(cache, token, INTENSITY, "auto", "auto", None)
    default = cache.attributes["default_weak_labels"]
    if default not in cache.set_names("weak_labels") or cache.is_stale("weak_labels", default):
        set_root_attributes(cache.path, {"default_weak_labels": INTENSITY})


def _compute_and_write(
    cache: Cache,
    token: str,
    descriptors: str,
    neighbours: LinkRule,
    search: Search,
    executor: Executor | None,
) -> None:
    """Compute a set of labels in a folder beside the cache, and put it into the cache whole."""
    digest = "" if descriptors == INTENSITY else cache.descriptors_digest(descriptors)
    scratch = wip_path(cache.path) / token / "labels"
    scratch.mkdir(parents=True)
    unit_rows = _unit_rows(cache, descriptors, scratch / "slices.npy")
    rule = linked(neighbours, cache.slice_patient)
    groups = cache.slice_patient if rule == "other-cases" else None
    hierarchy = _hierarchy(unit_rows, groups, search=search, executor=executor, scratch=scratch)
    check_lock(cache.path, token)
    write_weak_labels(
        cache.path,
        labels_name(descriptors, neighbours),
        {"ccl": hierarchy.ccl, "nearest": hierarchy.nearest, "similarity": hierarchy.similarity},
        {
            "num_components": list(hierarchy.num_components),
            "descriptors": descriptors,
            "descriptors_digest": digest,
            "neighbours": rule,
            "recall": hierarchy.recall,
            "slices_digest": cache.slices_digest,
            "provenance": provenance.record(),
        },
    )


def first_neighbour_hierarchy(descriptors: np.ndarray, cases: np.ndarray | None = None) -> Hierarchy:
    """Link, merge and average until one more level would leave fewer than five components.

    `descriptors`: float (n, d), finite. Rows are compared by the cosine after subtracting each row's own mean, so
    neither brightness nor contrast of a slice counts (our choice). `cases`: integers (n,); rows of one case are then
    not linked at the finest level. That level is kept however few components it has.

    Raises UsageError where there is no other case.
    """
    return _hierarchy(normalise(descriptors), cases, search="exact", executor=None, scratch=None)


def _hierarchy(
    unit_rows: np.ndarray,
    cases: np.ndarray | None,
    *,
    search: Search,
    executor: Executor | None,
    scratch: Path | None,
) -> Hierarchy:
    """The hierarchy over rows of length 1; `scratch`: a folder for what other processes are to read."""
    num_slices = len(unit_rows)
    nodes, component_of_slice = unit_rows, np.arange(num_slices)
    levels: list[np.ndarray] = []
    nearest_rows, similarity_rows, counts = [], [], []
    recall = 1.0
    while True:
        groups = None if levels else cases
        many = len(nodes) > approximate.EXACT_LIMIT
        if search != "exact" and (many or (search == "approximate" and not levels)):
            with progress("neighbours", total=len(nodes), unit="slices") as advance:
                found = approximate.approximate_neighbours(nodes, groups, on_rows=advance)
            if not levels:
                recall = approximate.measured_recall(nodes, found, groups, sample=RECALL_SAMPLE)
        else:
            found = _exact_neighbours(nodes, groups, executor)
        merged = connected_components(len(nodes), np.arange(len(nodes), dtype=np.int32), found.index)
        num_components = int(merged.max()) + 1
        if levels and num_components < MIN_COMPONENTS:
            break
        component_of_slice = merged[component_of_slice]
        levels.append(component_of_slice)
        nearest_rows.append(_padded(found.index, num_slices, np.int32(-1)))
        similarity_rows.append(_padded(found.similarity, num_slices, np.float32(np.nan)))
        counts.append(num_components)
        nodes = component_means(unit_rows, component_of_slice, num_components)
        if scratch is not None:
            np.save(scratch / "nodes.npy", nodes)
            nodes = np.lib.format.open_memmap(scratch / "nodes.npy", "r")
    return Hierarchy(
        ccl=np.stack(levels).astype(np.int32),
        nearest=np.stack(nearest_rows),
        similarity=np.stack(similarity_rows),
        num_components=tuple(counts),
        recall=recall,
    )


def _exact_neighbours(nodes: np.ndarray, groups: np.ndarray | None, executor: Executor | None) -> Neighbours:
    num_pairs = num_block_pairs(len(nodes))
    with progress("neighbours", total=num_pairs, unit="blocks", shown=num_pairs > 10) as advance:
        return nearest_neighbours(nodes, groups, executor=executor, on_block=advance)


def _unit_rows(cache: Cache, descriptors: str, file: Path) -> np.ndarray:
    """The normalised descriptors of every slice, in a new file that is mapped read-only: float32 (n, d + 1)."""
    start, rows = 0, None
    for block in descriptor_blocks(cache, descriptors):
        if not (finite := np.isfinite(block).all(axis=1)).all():
            index = start + int(np.argmin(finite))
            raise SuperCLError(
                f"The descriptors {descriptors!r} hold values that are not finite.",
                where=f"{cache.path}, case {cache.rows[cache.slice_case[index]].id}, slice {cache.slice_z[index]}",
                expected="numbers",
                found="NaN or infinity",
                next_step="Compute them again with an encoder whose training did not diverge: "
                "supercl describe CACHE --encoder RUN.",
            )
        if rows is None:
            rows = np.lib.format.open_memmap(
                file, "w+", np.dtype(np.float32), (cache.num_slices, block.shape[1] + 1)
            )
        rows[start : start + len(block)] = normalise(block)
        start += len(block)
    return np.lib.format.open_memmap(file, "r")


def descriptor_blocks(cache: Cache, name: str) -> Iterator[np.ndarray]:
    """Descriptors of a cache as float32 (some, d), in the order of its slices: `intensity`, or of an encoder."""
    if name == INTENSITY:
        for row in cache.done:
            yield cache.case(row.id).asp_ZGG.reshape(row.shape[1], -1).astype(np.float32)
    else:
        values = cache.descriptors(name)
        for start in range(0, len(values), NORMALISED_ROWS):
            yield values[start : start + NORMALISED_ROWS]


def normalise(descriptors: np.ndarray) -> np.ndarray:
    """Rows with their mean subtracted and scaled to length 1: float32 (n, d + 1).

    The last column is 1 for rows without any contrast and 0 for all others: constant slices are alike among
    themselves and like nothing else.
    """
    centred = descriptors.astype(np.float64)
    centred -= centred.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    # Relative, since features of an encoder may be of any size.
    flat = length[:, 0] <= 1e-6 * np.sqrt(descriptors.shape[1]) * np.abs(descriptors).max(axis=1)
    unit = np.where(flat[:, None], 0.0, centred / np.where(length > 0, length, 1))
    return np.concatenate([unit, flat[:, None]], axis=1).astype(np.float32)


def _padded(values: np.ndarray, size: int, fill: np.generic) -> np.ndarray:
    padded = np.full(size, fill)
    padded[: len(values)] = values
    return padded
