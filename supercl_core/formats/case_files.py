"""The one way from a case's files to its image and its label map, whatever their formats and however many they are.

Preprocessing, prediction and benchmarks read cases here and nowhere else; which files a case has, the layouts in
`supercl_core.sources` say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from supercl_core.errors import SuperCLError
from supercl_core.formats import array_files, dicom_files, flat_images, volumes
from supercl_core.formats.array_files import Part
from supercl_core.formats.geometry import check_place
from supercl_core.formats.volume_headers import files_of
from supercl_core.formats.volumes import Header, Volume
from supercl_core.sources.base import CaseSource


def read_image(case: CaseSource) -> Volume:
    """The image of a case, (c, z, y, x), with the slope and intercept that its files declare applied.

    Integers or floats: of several files, the type that holds the values of all. Raises SuperCLError when a file cannot
    be read, or files do not fit.
    """
    if case.reading == "series":
        return dicom_files.read_series(case.image_paths)
    return _joined(case.image_paths, "image")


def read_label_map(case: CaseSource) -> Volume | None:
    """The label map of a case, (1, z, y, x), in numbers of classes; None where it has none.

    uint8 where `case.label_classes` says what values stand for, else values and type of the file. Raises SuperCLError
    as `read_image` does, and when a value is none of `case.label_classes`.
    """
    if not case.label_paths:
        return None
    label = _joined(case.label_paths, "label")
    if case.label_classes is None:
        return label
    return Volume(
        array_CZYX=_in_classes(label.array_CZYX, case.label_classes, case.label_paths[0]),
        geometry=label.geometry,
    )


def read_headers(case: CaseSource) -> Header:
    """The shape and type of a case's image, without its values.

    Raises SuperCLError when a file of image or label map cannot be opened, or the files of the image do not fit.
    """
    for path in case.label_paths:
        _read_header(path, "label")
    if case.reading == "series":
        return dicom_files.read_series_header(case.image_paths)
    headers = [_read_header(path, "image") for path in case.image_paths]
    for path, header in zip(case.image_paths, headers, strict=True):
        _check_shape(path, header.shape, headers[0].shape)
    channels, slices, rows, columns = headers[0].shape
    return Header(shape=(channels * len(headers), slices, rows, columns), dtype=headers[0].dtype)


def all_files(case: CaseSource) -> tuple[Path, ...]:
    """Every file that holds a part of a case, those included that a header names for its values."""
    return tuple(dict.fromkeys(file for path in case.paths for file in files_of(path)))


def _joined(paths: Sequence[Path], part: Part) -> Volume:
    """One volume of files of equal shape: the channels of an image, or the slices of a label map."""
    first = _read_file(paths[0], part)
    if len(paths) == 1:
        return first
    shape = first.array_CZYX.shape
    joined = np.empty((len(paths), *shape), first.array_CZYX.dtype)
    joined[0] = first.array_CZYX
    for index, path in enumerate(paths[1:], 1):
        volume = _read_file(path, part)
        _check_shape(path, volume.array_CZYX.shape, shape)
        check_place(
            volume.geometry,
            first.geometry,
            shape[1:],
            what=f"{path.name} lies elsewhere than {paths[0].name}, with which it is one case.",
            next_step="Resample the channels to one grid.",
        )
        joined = joined.astype(np.result_type(joined, volume.array_CZYX), copy=False)
        joined[index] = volume.array_CZYX
    array_CZYX = (
        joined.reshape(-1, *shape[1:]) if part == "image" else joined.reshape(shape[0], -1, *shape[2:])
    )
    return Volume(array_CZYX=array_CZYX, geometry=first.geometry)


def _check_shape(path: Path, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise SuperCLError(
            "The files of the case differ in shape.",
            where=path,
            expected=f"(c, z, y, x) = {expected}, as in the first file",
            found=found,
            next_step="Resample them to one grid, or take the case out of the folder.",
        )


def _read_file(path: Path, part: Part) -> Volume:
    """One file of any format, known by its name; what has no known ending is refused as a volume."""
    if flat_images.image_suffix(path.name):
        return flat_images.read_image(path, is_label=part == "label")
    if array_files.array_suffix(path.name):
        return array_files.read_array(path, part)
    return volumes.read_volume(path)


def _read_header(path: Path, part: Part) -> Header:
    if flat_images.image_suffix(path.name):
        return flat_images.read_image_header(path, is_label=part == "label")
    if array_files.array_suffix(path.name):
        return array_files.read_array_header(path, part)
    return volumes.read_header(path)


def _in_classes(array_CZYX: np.ndarray, classes: Mapping[int, int], path: Path) -> np.ndarray:
    """The class of every voxel of a label map, uint8 of the same shape."""
    values = np.array(sorted(classes))
    numbers = np.array([classes[value] for value in sorted(classes)], np.uint8)
    mapped = np.empty(array_CZYX.shape, np.uint8)
    for z in range(array_CZYX.shape[1]):
        part = array_CZYX[:, z]
        index = np.searchsorted(values, part).clip(max=len(values) - 1)
        if (unknown := values[index] != part).any():
            raise SuperCLError(
                "The label map has values that stand for no class.",
                where=path,
                expected="only "
                + ", ".join(map(str, values[:12]))
                + (" and more" if len(values) > 12 else ""),
                found=f"{np.unique(part[unknown])[:5].tolist()} in slice {z}",
                next_step="Mend the label map, or name another layout with --layout.",
            )
        mapped[:, z] = numbers[index]
    return mapped
