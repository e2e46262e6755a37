"""Caches written by hand, without preprocessing: for content that tests choose to the last pixel."""

import numpy as np
import references

from supercl_core import provenance
from supercl_core.cache import writer as cache_writer
from supercl_core.cache.cases import CaseRow
from supercl_core.cache.reader import open_cache
from supercl_core.cache.schema import ASP_GRID

GEOMETRY = {
    "spacing_mm": [1.0, 1.0, 1.0],
    "origin_mm": [0.0, 0.0, 0.0],
    "direction": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
}
"""Along x, y, z."""
ROOT = {"config": {}, "kernels": "by hand", "config_digest": "d", "provenance": {}}
CASE = {"key": "", "provenance": {}, "orientation": "LPS", "largest_error": 0.0, "num_clipped": 0}


def write_cache(path, cases, *, name, channel_names, class_names, scales=None, spacing_mm=None, levels=()):
    """A complete cache at `path`, which is returned.

    `cases`: by id in order, the stored arrays `image`, `superpixels` and, if wanted, `ground_truth` and `asp`.
    `scales`: by id, scale and offset of the image. `spacing_mm`: along z, y, x. `levels`: the weak label of every
    slice, finest level first; without any there are no weak labels.
    """
    names = {"name": name, "channel_names": list(channel_names), "class_names": list(class_names)}
    default = {"default_weak_labels": "by_hand" if len(levels) else ""}
    cache_writer.create_cache(path, {**ROOT, **names, **default})
    geometry = GEOMETRY if spacing_mm is None else {**GEOMETRY, "spacing_mm": list(spacing_mm[::-1])}
    rows = []
    for case_id, arrays in cases.items():
        scale, offset = (scales or {}).get(case_id, (1.0, 0.0))
        image, superpixels = arrays["image"], arrays["superpixels"]
        row = CaseRow(
            id=case_id,
            shape=image.shape,
            image_dtype=image.dtype.name,
            superpixels_dtype=superpixels.dtype.name,
            num_superpixels=int(superpixels.max()) + 1,
            has_ground_truth="ground_truth" in arrays,
            spacing_mm=spacing_mm,
            image_scale=scale,
            image_offset=offset,
            statistics=references.statistics(image * scale + offset),
        )
        asp = np.zeros((image.shape[1], ASP_GRID, ASP_GRID), np.float16)
        attributes = {**CASE, "geometry": geometry}
        rows.append(cache_writer.write_case(path, row, {"asp": asp, **arrays}, attributes=attributes))
    cache_writer.write_tables(path, rows, num_channels=len(channel_names))
    if len(levels):
        write_levels(path, levels)
    cache_writer.set_root_attributes(path, {"complete": True})
    return path


def write_noise(path, seeds, *, name="noise", num_classes=2):
    """A cache of cases of noise, 3 slices of 32 x 32; `seeds`: by id, and cases of one seed are identical."""
    cases = {}
    for case_id, seed in sorted(seeds.items()):
        random = np.random.default_rng(seed)
        cases[case_id] = {
            "image": random.integers(0, 1000, (1, 3, 32, 32)).astype(np.int16),
            "superpixels": np.broadcast_to(np.arange(32, dtype=np.uint8) // 8, (3, 32, 32)).copy(),
            "ground_truth": random.integers(0, num_classes, (3, 32, 32)).astype(np.uint8),
        }
    return write_cache(
        path,
        cases,
        name=name,
        channel_names=("MRI",),
        class_names=("background", *(f"class {index}" for index in range(1, num_classes))),
        levels=[np.arange(3 * len(cases)) // 2],
    )


def write_levels(path, levels):
    """Weak labels `by_hand`: the component of every slice, finest level first. Neighbours are left out."""
    ccl = np.array(levels, np.int32)
    arrays = {"ccl": ccl, "nearest": np.zeros_like(ccl), "similarity": np.zeros(ccl.shape, np.float32)}
    counts = [int(level.max()) + 1 for level in ccl]
    cache_writer.write_weak_labels(path, "by_hand", arrays, label_attributes(path, counts))


def label_attributes(path, num_components):
    """Attributes of weak labels of the slices that the cache at `path` holds now."""
    return {
        "num_components": list(num_components),
        "descriptors": "by hand",
        "descriptors_digest": "",
        "neighbours": "any",
        "recall": 1.0,
        "slices_digest": open_cache(path, unfinished=True).slices_digest,
        "provenance": {},
    }


def add_descriptors(path):
    """Descriptors of noise, named like the labels from intensities: with them a cache has all that one may have."""
    values = np.random.default_rng(0).random((open_cache(path).num_slices, ASP_GRID**2), np.float32)
    write_descriptors(path, "intensity", values)


def write_descriptors(path, name, values):
    """Descriptors of the slices that the cache at `path` holds now."""
    attributes = {
        "slices_digest": open_cache(path).slices_digest,
        "encoder": {"source": "by hand", "digest": "", "backbone": "unet", "filters": 8, "in_channels": 1},
        "provenance": provenance.record(),
    }
    cache_writer.write_descriptors(path, name, values, attributes)
