"""The cache, declared once: every array and attribute, with shape, dtype, unit and meaning.

`cache_schema.md` is generated from this module (`make schema`), the writer creates arrays from it and the
reader checks against it. A change of meaning, dtype or layout raises `SCHEMA_VERSION`.

Axes: c channel, z slice, y row, x column, g cell of the ASP grid; n slices of the whole cache in case order,
m cases, l levels of the CCL hierarchy, w bytes of a text column (UTF-8, padded with zero bytes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SCHEMA_VERSION: Final = 1
"""Version of the layout; a cache of another version is refused."""

OME_VERSION: Final = "0.5"
"""Version of OME-NGFF that the metadata of cases follows."""

ASP_GRID: Final = 32
"""Cells of the ASP map along y and along x (g)."""

CHECKSUM_BYTES: Final = 4
"""Bytes of the crc32c checksum behind every inner chunk."""

STATISTICS: Final = ("minimum", "percentile_00_5", "percentile_99_5", "maximum", "mean", "std")
"""Intensity statistics of a case, in the order of the last axis of `table/statistics`."""

STATES: Final = ("done", "failed")
"""What `table/state` counts: the index into this tuple."""


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of the cache."""

    path: str
    """Path below the root; `{case}` and `{name}` stand for a case id and a name of labels."""
    dtypes: tuple[str, ...]
    """Data types it may have."""
    axes: str
    """One letter an axis."""
    unit: str
    """Physical unit or range of the values."""
    meaning: str
    mapped: bool = False
    """Read through the memory map: one uncompressed shard, one inner chunk per slice."""
    optional: bool = False

    @property
    def name(self) -> str:
        """The last part of the path, by which reader and writer know the array."""
        return self.path.removesuffix("/0").rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class AttributeSpec:
    """One attribute of a group of the cache, below the key `supercl` of the group's attributes."""

    group: str
    key: str
    type: str
    meaning: str


CASE_ARRAYS: Final = (
    ArraySpec(
        path="cases/{case}/image",
        dtypes=("int16", "uint16", "float32"),
        axes="czyx",
        unit="source's unit after `value = stored * image_scale + image_offset`",
        meaning="Intensities of the source, lossless where they are integers of 16 bits; wider integers and "
        "float64 become float32, with the largest error in `largest_error`.",
        mapped=True,
    ),
    ArraySpec(
        path="cases/{case}/labels/superpixels/0",
        dtypes=("uint8", "uint16"),
        axes="zyx",
        unit="id, 0 to K-1 in each slice",
        meaning="Superpixels: ids contiguous in each slice, each one a 4-connected component.",
        mapped=True,
    ),
    ArraySpec(
        path="cases/{case}/labels/ground_truth/0",
        dtypes=("uint8",),
        axes="zyx",
        unit="class, 0 is background",
        meaning="Ground truth, where the source has one.",
        mapped=True,
        optional=True,
    ),
    ArraySpec(
        path="cases/{case}/asp",
        dtypes=("float16",),
        axes="zgg",
        unit="0 to 1",
        meaning="Average-superpixel map of the slice rescaled from its own minimum and maximum, mean over "
        "channels, read at the centres of a g x g grid: the descriptor `intensity`.",
        mapped=True,
    ),
)

TABLE_ARRAYS: Final = (
    ArraySpec(path="table/id", dtypes=("uint8",), axes="mw", unit="UTF-8", meaning="Case id."),
    ArraySpec(
        path="table/digest",
        dtypes=("uint8",),
        axes="mw",
        unit="UTF-8",
        meaning="SHA-256 (hex) of the bytes of the case's source files; empty where they cannot be read.",
    ),
    ArraySpec(
        path="table/state", dtypes=("uint8",), axes="m", unit="0 done, 1 failed", meaning="State of the case."
    ),
    ArraySpec(
        path="table/reason",
        dtypes=("uint8",),
        axes="mw",
        unit="UTF-8",
        meaning="Why the case failed; empty where it is done.",
    ),
    ArraySpec(
        path="table/source",
        dtypes=("uint8",),
        axes="mw",
        unit="UTF-8",
        meaning="Path of the first source file.",
    ),
    ArraySpec(
        path="table/shape",
        dtypes=("int32",),
        axes="m4",
        unit="elements",
        meaning="Channels, slices, rows, columns; zeros for a failed case.",
    ),
    ArraySpec(
        path="table/image_dtype", dtypes=("uint8",), axes="mw", unit="UTF-8", meaning="dtype of `image`."
    ),
    ArraySpec(
        path="table/superpixels_dtype",
        dtypes=("uint8",),
        axes="mw",
        unit="UTF-8",
        meaning="dtype of `superpixels`.",
    ),
    ArraySpec(
        path="table/num_superpixels",
        dtypes=("int32",),
        axes="m",
        unit="count",
        meaning="Largest number of superpixels in a slice of the case.",
    ),
    ArraySpec(
        path="table/has_ground_truth",
        dtypes=("bool",),
        axes="m",
        unit="",
        meaning="Whether the case has a ground truth.",
    ),
    ArraySpec(
        path="table/spacing_mm",
        dtypes=("float64",),
        axes="m3",
        unit="mm",
        meaning="Distance of voxel centres along z, y, x; NaN where the data set has none.",
    ),
    ArraySpec(
        path="table/image_scale",
        dtypes=("float64",),
        axes="m",
        unit="source's unit",
        meaning="Scale of the stored intensities.",
    ),
    ArraySpec(
        path="table/image_offset",
        dtypes=("float64",),
        axes="m",
        unit="source's unit",
        meaning="Offset of the stored intensities.",
    ),
    ArraySpec(
        path="table/statistics",
        dtypes=("float32",),
        axes="mc6",
        unit="source's unit",
        meaning="Per channel: "
        + ", ".join(STATISTICS)
        + "; mean and standard deviation after clipping to the "
        "two percentiles.",
    ),
)

SLICE_ARRAYS: Final = (
    ArraySpec(
        path="slices/case", dtypes=("int32",), axes="n", unit="row of `table`", meaning="Case of the slice."
    ),
    ArraySpec(path="slices/z", dtypes=("int32",), axes="n", unit="index", meaning="Slice within its case."),
    ArraySpec(
        path="slices/position",
        dtypes=("float32",),
        axes="n",
        unit="(0, 1]",
        meaning="Position of the slice in its volume: (z + 1) / Z.",
    ),
)

LABEL_ARRAYS: Final = (
    ArraySpec(
        path="weak_labels/{name}/ccl",
        dtypes=("int32",),
        axes="ln",
        unit="label, 0 to components-1 in each level",
        meaning="Connected-components label of every slice, finest level first. Two slices with one label are a "
        "positive pair of IGCP.",
    ),
    ArraySpec(
        path="weak_labels/{name}/nearest",
        dtypes=("int32",),
        axes="ln",
        unit="slice (level 0) or component of the level before",
        meaning="Nearest neighbour of each node of a level; only the first nodes of a row are used, the rest is -1.",
    ),
    ArraySpec(
        path="weak_labels/{name}/similarity",
        dtypes=("float32",),
        axes="ln",
        unit="cosine, -1 to 1",
        meaning="Similarity of each node to its nearest neighbour; NaN beyond the nodes of the level.",
    ),
)

ARRAYS: Final = (*CASE_ARRAYS, *TABLE_ARRAYS, *SLICE_ARRAYS, *LABEL_ARRAYS)

ATTRIBUTES: Final = (
    AttributeSpec(group="/", key="schema_version", type="integer", meaning="Version of this layout."),
    AttributeSpec(
        group="/",
        key="complete",
        type="boolean",
        meaning="True once every case is done or listed as failed and the weak labels are written.",
    ),
    AttributeSpec(group="/", key="name", type="string", meaning="Name of the data set."),
    AttributeSpec(group="/", key="channel_names", type="list of strings", meaning="Channels, in order."),
    AttributeSpec(
        group="/", key="class_names", type="list of strings", meaning="Classes of the ground truth; 0 first."
    ),
    AttributeSpec(
        group="/", key="config", type="object", meaning="Settings of `supercl preprocess`, resolved."
    ),
    AttributeSpec(group="/", key="config_digest", type="string", meaning="SHA-256 (hex) of `config`."),
    AttributeSpec(
        group="/",
        key="default_weak_labels",
        type="string",
        meaning="Name of the weak labels that training uses unless told otherwise.",
    ),
    AttributeSpec(
        group="/",
        key="provenance",
        type="object",
        meaning="Time, machine, versions and command; the only attribute that varies between equal runs.",
    ),
    AttributeSpec(group="cases/{case}", key="row", type="object", meaning="The case's row of `table`."),
    AttributeSpec(
        group="cases/{case}",
        key="config_digest",
        type="string",
        meaning="Settings that the case was computed with.",
    ),
    AttributeSpec(
        group="cases/{case}",
        key="source_stamp",
        type="list",
        meaning="Path, size in bytes and modification time (ns) of every source file when it was read.",
    ),
    AttributeSpec(
        group="cases/{case}",
        key="geometry",
        type="object",
        meaning="`spacing_mm`, `origin_mm` and `direction` (row-major 3 x 3) as SimpleITK gives them (x, y, z).",
    ),
    AttributeSpec(
        group="cases/{case}",
        key="orientation",
        type="string",
        meaning="Anatomical directions in which x, y and z grow (such as RAS).",
    ),
    AttributeSpec(
        group="cases/{case}",
        key="largest_error",
        type="number",
        meaning="Largest absolute difference between a source value and its stored value.",
    ),
    AttributeSpec(
        group="cases/{case}",
        key="num_clipped",
        type="integer",
        meaning="Voxels outside the window of a quantised image; 0 for every other.",
    ),
    AttributeSpec(
        group="weak_labels/{name}",
        key="num_components",
        type="list of integers",
        meaning="Components of each level, finest first.",
    ),
    AttributeSpec(
        group="weak_labels/{name}",
        key="descriptors",
        type="string",
        meaning="What the labels were computed from.",
    ),
)


def array_spec(name: str) -> ArraySpec:
    """The declaration of the case array `name` (`image`, `superpixels`, `ground_truth` or `asp`)."""
    return next(spec for spec in CASE_ARRAYS if spec.name == name)


def markdown() -> str:
    """The text of `cache_schema.md`."""
    lines = [
        "# The cache",
        "",
        "<!-- Generated from supercl_core/schema.py by `make schema`; edit there. -->",
        "",
        f"Schema version {SCHEMA_VERSION}. One Zarr v3 group. Axes: c channel, z slice, y row, x column, g cell of "
        f"the ASP grid ({ASP_GRID}), n slices of the whole cache in case order, m cases, l levels, w bytes of a "
        "text column (UTF-8, padded with zero bytes).",
        "",
        "Arrays marked *mapped* are uncompressed and sharded: one shard per array and case, one inner chunk per "
        "slice (all channels), codecs `bytes` (little-endian) and `crc32c`. Slice z of such a shard lies at byte "
        f"z × (bytes of a slice + {CHECKSUM_BYTES}), so any Zarr v3 reader fetches and checks one slice with one "
        "range read, and ours maps the file. Cases carry OME-NGFF "
        f"{OME_VERSION} metadata: a viewer opens `cases/<case>` with its label layers.",
        "",
        "## Arrays",
        "",
        "| path | dtype | axes | unit or range | mapped | meaning |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for spec in ARRAYS:
        path = spec.path.replace("{", "<").replace("}", ">")
        meaning = spec.meaning + (" Optional." if spec.optional else "")
        lines.append(
            f"| `{path}` | {', '.join(spec.dtypes)} | ({', '.join(spec.axes)}) | {spec.unit} "
            f"| {'yes' if spec.mapped else ''} | {meaning} |"
        )
    lines += [
        "",
        "## Attributes",
        "",
        "Ours lie below the key `supercl` of a group's attributes; `ome` beside it is OME-NGFF's.",
        "",
        "| group | key | type | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for attribute in ATTRIBUTES:
        group = attribute.group.replace("{", "<").replace("}", ">")
        lines.append(f"| `{group}` | `{attribute.key}` | {attribute.type} | {attribute.meaning} |")
    lines += ["", "## Recipes", "", "Nothing but `zarr` and NumPy (each recipe is run by a test).", ""]
    for title, code in RECIPES:
        lines += [title + ":", "", "```python", code.strip(), "```", ""]
    return "\n".join(lines)


RECIPES: Final = (
    (
        "Which cases there are",
        """
import zarr
cache = zarr.open_group(CACHE, mode="r")
ids = cache["table/id"][:]
ids = [bytes(row).rstrip(b"\\0").decode() for row in ids]
""",
    ),
    (
        "One slice, in the source's intensities, and its superpixels",
        """
import zarr
cache = zarr.open_group(CACHE, mode="r")
case = cache["cases"][CASE]
row = case.attrs["supercl"]["row"]
image = case["image"][:, 3] * row["image_scale"] + row["image_offset"]   # (c, y, x)
superpixels = case["labels/superpixels/0"][3]                            # (y, x)
""",
    ),
    (
        "All slices that share a weak label with slice 0",
        """
import numpy as np, zarr
cache = zarr.open_group(CACHE, mode="r")
labels = cache["weak_labels"][cache.attrs["supercl"]["default_weak_labels"]]
ccl = labels["ccl"][-1]                      # the coarsest level
members = np.flatnonzero(ccl == ccl[0])
case, z = cache["slices/case"][:][members], cache["slices/z"][:][members]
""",
    ),
)


if __name__ == "__main__":
    print(markdown(), end="")
