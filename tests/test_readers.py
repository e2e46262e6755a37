"""A cache in the hands of readers that are not ours: ome-zarr, a validator of OME-NGFF 0.5, zarr alone, TensorStore.

What they give is compared with the source volumes that the cache was made from.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import zarr

CASES = ("case_a", "case_b", "case_c", "case_d")


@dataclass(frozen=True)
class Source:
    """What the cache must hold of a case, read from the source files with nibabel."""

    stored: np.ndarray
    """(1, z, y, x): the source's values without scale and offset."""
    label: np.ndarray | None
    """(z, y, x)."""
    spacing_mm: tuple[float, ...]
    """Along z, y, x."""


@pytest.fixture(scope="module", params=CASES)
def case_id(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(case_id: str, msd_path: Path, cache_path: Path) -> Source:
    node = json.loads((cache_path / "cases" / case_id / "zarr.json").read_text())
    row = node["attributes"]["supercl"]["row"]
    [file] = msd_path.glob(f"images*/{case_id}.nii.gz")
    image: Any = nibabel.load(file)
    values = np.asarray(image.dataobj).T
    label_file = msd_path / "labelsTr" / file.name
    label: Any = nibabel.load(label_file) if label_file.exists() else None
    return Source(
        ((values - row["image_offset"]) / row["image_scale"]).astype(row["image_dtype"])[None],
        label and np.asarray(label.dataobj).T,
        tuple(image.header.get_zooms()[::-1]),
    )


def change_ome(group: Path, change: Callable[[dict[str, Any]], object]) -> None:
    node = json.loads((group / "zarr.json").read_text())
    change(node["attributes"]["ome"])
    (group / "zarr.json").write_text(json.dumps(node))


# ome-zarr ------------------------------------------------------------------------------------------------------------


def layers_of(case_path: Path) -> dict[str, Any]:
    """The nodes with pixels that ome-zarr finds from a case, by name."""
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    location = parse_url(str(case_path))
    assert location is not None
    return {node.zarr.basename(): node for node in Reader(location)() if node.data}


def test_ome_zarr_opens_a_case_with_its_label_layers(case_id: str, source: Source, cache_path: Path) -> None:
    layers = layers_of(cache_path / "cases" / case_id)
    assert layers.keys() == {case_id, "superpixels", *(() if source.label is None else ("ground_truth",))}

    [pixels] = layers[case_id].data
    assert pixels.dtype == source.stored.dtype
    np.testing.assert_array_equal(pixels.compute(scheduler="synchronous"), source.stored)
    [superpixels] = layers["superpixels"].data
    assert (superpixels.shape, superpixels.dtype.kind) == (source.stored.shape[1:], "u")
    if source.label is not None:
        [classes] = layers["ground_truth"].data
        assert classes.dtype == np.uint8
        np.testing.assert_array_equal(classes.compute(scheduler="synchronous"), source.label)

    for name, node in layers.items():
        axes, scale = ("czyx", (1.0, *source.spacing_mm)) if name == case_id else ("zyx", source.spacing_mm)
        [[transformation]] = node.metadata["coordinateTransformations"]
        np.testing.assert_allclose(transformation["scale"], scale)
        assert [axis["name"] for axis in node.metadata["axes"]] == list(axes)
        assert {axis.get("unit") for axis in node.metadata["axes"][-3:]} == {"millimeter"}


def test_ome_zarr_is_told_how_to_show_a_case(cache_path: Path) -> None:
    layers = layers_of(cache_path / "cases" / "case_c")
    image = layers["case_c"]
    stored = image.data[0].compute(scheduler="synchronous")
    assert image.metadata["channel_names"] == ["MRI"]
    assert image.metadata["visible"] == [True]
    [window] = image.metadata["contrast_limits"]
    np.testing.assert_allclose(window, np.percentile(stored, [0.5, 99.5]), rtol=1e-5)
    classes = layers["ground_truth"].metadata
    assert classes["properties"] == {
        0: {"name": "background"},
        1: {"name": "anterior"},
        2: {"name": "posterior"},
    }
    assert classes["color"].keys() == {0, 1, 2}


# ome-zarr-models -----------------------------------------------------------------------------------------------------


def validate(case_path: Path) -> None:
    """Validate the case and each label layer as OME-NGFF 0.5. Raises ValueError or RuntimeError where one is not."""
    from ome_zarr_models.v05.image import Image
    from ome_zarr_models.v05.image_label import ImageLabel

    case = zarr.open_group(case_path, mode="r", zarr_format=3)
    image = Image.from_zarr(case)
    assert image.labels is not None
    for name in image.labels.label_paths:
        label = ImageLabel.from_zarr(zarr.open_group(case_path / "labels" / name, mode="r", zarr_format=3))
        assert label.ome_attributes.image_label is not None


def test_a_validator_of_the_specification_accepts_every_case(case_id: str, cache_path: Path) -> None:
    validate(cache_path / "cases" / case_id)


def swap_axes(ome: dict[str, Any]) -> None:
    ome["multiscales"][0]["axes"].reverse()


def shorten_scale(ome: dict[str, Any]) -> None:
    ome["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"].pop()


BREAKS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "version": (".", lambda ome: ome.update(version="0.3")),
    "axes": (".", swap_axes),
    "scale": (".", shorten_scale),
    "image path": (".", lambda ome: ome["multiscales"][0]["datasets"][0].update(path="elsewhere")),
    "listed label": ("labels", lambda ome: ome["labels"].append("lost")),
    "label scale": ("labels/superpixels", shorten_scale),
    "label colour": (
        "labels/ground_truth",
        lambda ome: ome["image-label"]["colors"][0].update(rgba=[0, 0, 256, 0]),
    ),
    "class without colour": ("labels/ground_truth", lambda ome: ome["image-label"]["colors"].pop()),
}


@pytest.mark.parametrize(("group", "change"), BREAKS.values(), ids=BREAKS)
def test_the_validator_refuses_broken_metadata(
    group: str, change: Callable[[dict[str, Any]], object], cache_copy: Path
) -> None:
    case_path = cache_copy / "cases" / "case_a"
    change_ome(case_path / group, change)
    with pytest.raises((ValueError, RuntimeError)):
        validate(case_path)


# zarr alone, and a reader that shares no code with it ----------------------------------------------------------------


@pytest.fixture(scope="module")
def read_by_zarr(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Every array of the cache by its path, read where nothing of ours is imported.

    Warnings are errors there: Zarr warns of whatever does not belong into a hierarchy.
    """
    code = """
import sys, numpy, zarr
root = zarr.open_group(sys.argv[1], mode="r", zarr_format=3)
arrays = {path: array[:] for path, array in root.members(max_depth=None) if isinstance(array, zarr.Array)}
numpy.savez(sys.argv[2], **arrays)
print(*sorted({name.split(".")[0] for name in sys.modules} & {"supercl_core", "preprocess", "train"}))
"""
    folder = tmp_path_factory.mktemp("zarr_alone")
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(cache_path), str(folder / "read.npz")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "\n", "")
    with np.load(folder / "read.npz", allow_pickle=False) as read:
        return dict(read)


def test_zarr_alone_reads_every_case(
    case_id: str, source: Source, read_by_zarr: dict[str, np.ndarray]
) -> None:
    np.testing.assert_array_equal(read_by_zarr[f"cases/{case_id}/image"], source.stored)
    classes = read_by_zarr.get(f"cases/{case_id}/labels/ground_truth/0")
    np.testing.assert_array_equal(classes, source.label)
    assert (classes is None) == (case_id == "case_d")


def test_zarr_alone_reads_the_tables(read_by_zarr: dict[str, np.ndarray]) -> None:
    ids = [bytes(row).rstrip(b"\0").decode() for row in read_by_zarr["table/id"]]
    assert ids == list(CASES)
    assert read_by_zarr["slices/case"].tolist() == [0] * 5 + [1] * 6 + [2] * 5 + [3] * 7


def test_tensorstore_reads_and_checks_the_shards(case_id: str, source: Source, cache_copy: Path) -> None:
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed")

    def read(name: str) -> np.ndarray:
        path = str(cache_copy / "cases" / case_id / name)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        return tensorstore.open(spec, read=True, open=True).result()[...].read().result()

    np.testing.assert_array_equal(read("image"), source.stored)
    if source.label is not None:
        np.testing.assert_array_equal(read("labels/ground_truth/0"), source.label)
    shard = cache_copy / "cases" / case_id / "image" / "c" / "0" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="Digest mismatch"):
        read("image")
