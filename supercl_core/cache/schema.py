"""The cache, declared once: every array and attribute, with shape, dtype, unit and meaning.

`schema_page` makes `cache_schema.md` of it (`make schema`), the writer creates arrays from it and the reader
checks against it. A change of meaning, dtype or layout raises `SCHEMA_VERSION`.

Axes: c channel, z slice, y row, x column, g cell of the ASP grid; n slices of the whole cache in case order,
m cases, l levels of the CCL hierarchy, d features of a descriptor, w bytes of a text column (UTF-8, padded with zero
bytes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SCHEMA_VERSION: Final = 2
"""Version of the layout; a cache of another version is refused."""

OME_VERSION: Final = "0.5"
"""Version of OME-NGFF that the metadata of cases follows."""

ASP_GRID: Final = 32
"""Cells of the ASP map along y and along x (g)."""

CHECKSUM_BYTES: Final = 4
"""Bytes of the crc32c checksum behind every inner chunk."""

STATISTICS: Final = ("minimum", "percentile_00_5", "percentile_99_5", "maximum", "mean", "std")
"""Intensity statistics of a case, in the order of the last axis of `table/statistics`."""

ARCHIVE_FORM: Final = "archive"
"""What the attribute `form` of the root says of a packed cache; others have no such attribute."""

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

    @property
    def case_path(self) -> str:
        """Path of an array of a case below the folder of the case."""
        return self.path.removeprefix("cases/{case}/")


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
        meaning="Path of the image below the folder of the data set.",
    ),
    ArraySpec(
        path="table/content_digest",
        dtypes=("uint8",),
        axes="mw",
        unit="UTF-8",
        meaning="SHA-256 (hex) over the checksums of `image`, `superpixels` and `asp`: equal for cases with identical "
        "content; empty for a failed case.",
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
        dtypes=("float64",),
        axes="mc6",
        unit="source's unit",
        meaning="Per channel: "
        + ", ".join(STATISTICS)
        + "; the percentiles are the 0.5th and the 99.5th, mean and standard deviation after clipping to these. "
        "NaN for a failed case.",
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

DESCRIPTOR_ARRAYS: Final = (
    ArraySpec(
        path="descriptors/{name}/values",
        dtypes=("float32",),
        axes="nd",
        unit="features of the encoder",
        meaning="Descriptor of every slice from an encoder: the channel mean of its last feature map, brought to the "
        "pixels of the slice, averaged over superpixels and read at the centres of a g x g grid (d = g * g).",
        optional=True,
    ),
)

SETS: Final = {"descriptors": DESCRIPTOR_ARRAYS, "weak_labels": LABEL_ARRAYS}
"""Groups that hold any number of sets of arrays over all slices, by name, and the arrays of a set."""

ARRAYS: Final = (*CASE_ARRAYS, *TABLE_ARRAYS, *SLICE_ARRAYS, *DESCRIPTOR_ARRAYS, *LABEL_ARRAYS)

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
    AttributeSpec(
        group="/",
        key="kernels",
        type="string",
        meaning="Version of the computation: raised when equal input would give other bytes.",
    ),
    AttributeSpec(
        group="/", key="config_digest", type="string", meaning="SHA-256 (hex) of `config` and `kernels`."
    ),
    AttributeSpec(
        group="/",
        key="default_weak_labels",
        type="string",
        meaning="Name of the weak labels that training uses unless told otherwise; empty before there are any.",
    ),
    AttributeSpec(
        group="/",
        key="metadata_digest",
        type="string",
        meaning="SHA-256 (hex) of this zarr.json without `provenance` and this attribute.",
    ),
    AttributeSpec(
        group="/",
        key="provenance",
        type="object",
        meaning="Time, machine, versions, command and input folder; what varies between equal runs.",
    ),
    AttributeSpec(group="cases/{case}", key="row", type="object", meaning="The case's row of `table`."),
    AttributeSpec(
        group="cases/{case}",
        key="key",
        type="string",
        meaning="SHA-256 (hex) of the root's `config_digest` and the digest of the source files: what identifies the "
        "content.",
    ),
    AttributeSpec(
        group="cases/{case}",
        key="shards_digest",
        type="string",
        meaning="SHA-256 (hex) over the checksums of every slice of `asp`, `ground_truth`, `image` and `superpixels`.",
    ),
    AttributeSpec(
        group="cases/{case}",
        key="metadata_digest",
        type="string",
        meaning="SHA-256 (hex) of every zarr.json of the case without `provenance` and this attribute.",
    ),
    AttributeSpec(
        group="cases/{case}",
        key="provenance",
        type="object",
        meaning="`source_stamp`: size in bytes and times of change (ns) of every source file; what varies between "
        "equal runs.",
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
        meaning="Anatomical directions in which x, y and z grow (such as RAS); `unknown` where the file does not say.",
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
        meaning="What the labels were computed from: `intensity` (the arrays `asp`) or a name in `descriptors`.",
    ),
    AttributeSpec(
        group="weak_labels/{name}",
        key="descriptors_digest",
        type="string",
        meaning="The attribute `digest` of these descriptors; empty for `intensity`.",
    ),
    AttributeSpec(
        group="weak_labels/{name}",
        key="neighbours",
        type="string",
        meaning="Which slices may be linked at the finest level: `any`, or only those of `other-cases`.",
    ),
    AttributeSpec(
        group="weak_labels/{name}",
        key="recall",
        type="number",
        meaning="Share of slices whose neighbour at the finest level is the nearest one: 1 for an exact search, else "
        "measured on a sample.",
    ),
    AttributeSpec(
        group="descriptors/{name}",
        key="encoder",
        type="object",
        meaning="`source` as it was given, `digest` (SHA-256 of its weights), `backbone`, `filters` and `in_channels`.",
    ),
    AttributeSpec(
        group="descriptors/{name}",
        key="digest",
        type="string",
        meaning="SHA-256 (hex) of `values`: labels made of other ones are stale.",
    ),
    *(
        AttributeSpec(group=f"{group}/{{name}}", key=key, type=kind, meaning=meaning)
        for group in ("weak_labels", "descriptors")
        for key, kind, meaning in (
            (
                "slices_digest",
                "string",
                "SHA-256 (hex) over the content digests of all cases in order; where the cases have changed since, "
                "what was computed from them is stale.",
            ),
            (
                "metadata_digest",
                "string",
                "SHA-256 (hex) of this zarr.json without `provenance` and this attribute.",
            ),
            ("provenance", "object", "Time, machine, versions and command; what varies between equal runs."),
        )
    ),
)


def array_spec(name: str) -> ArraySpec:
    """The declaration of the case array `name` (`image`, `superpixels`, `ground_truth` or `asp`)."""
    return next(spec for spec in CASE_ARRAYS if spec.name == name)
