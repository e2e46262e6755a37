"""The text of `cache_schema.md`, from the declaration of the cache and the recipes (`make schema`).

`python -m supercl_core.cache.schema_page` prints it. The examples are made up; a test holds them against a cache that
was written: the same keys, values of the same types.
"""

from __future__ import annotations

import json
from typing import Any, Final

from supercl_core.cache.recipes import RECIPES
from supercl_core.cache.schema import (
    ARRAYS,
    ASP_GRID,
    ATTRIBUTES,
    CHECKSUM_BYTES,
    OME_VERSION,
    SCHEMA_VERSION,
)

_PROVENANCE: Final = {
    "time": "2026-05-04T10:21:00+00:00",
    "command": "supercl preprocess Task02_Heart heart.zarr",
    "host": "node7",
    "platform": "Linux-6.8.0-x86_64-with-glibc2.39",
    "num_cores": 32,
    "python": "3.11.9",
    "versions": {"supercl": "0.1.0", "numpy": "2.4.6", "zarr": "3.1.6"},
    "commit": None,
}

EXAMPLES: Final[dict[str, dict[str, Any]]] = {
    "/": {
        "schema_version": SCHEMA_VERSION,
        "complete": True,
        "name": "Task02_Heart",
        "channel_names": ["MRI"],
        "class_names": ["background", "left atrium"],
        "config": {
            "slic": "fast",
            "n_segments": 100,
            "compactness": 10.0,
            "foreground_above": None,
            "image_dtype": "source",
            "spacing": "file",
        },
        "kernels": "1",
        "config_digest": "8c1f…",
        "default_weak_labels": "intensity",
        "metadata_digest": "51d0…",
        "provenance": {**_PROVENANCE, "input": "/data/Task02_Heart"},
    },
    "cases/{case}": {
        "row": {
            "id": "la_003",
            "digest": "e3b0…",
            "state": "done",
            "reason": "",
            "source": "imagesTr/la_003.nii.gz",
            "content_digest": "77aa…",
            "shape": [1, 130, 320, 320],
            "image_dtype": "int16",
            "superpixels_dtype": "uint8",
            "num_superpixels": 118,
            "has_ground_truth": True,
            "spacing_mm": [1.37, 1.25, 1.25],
            "image_scale": 1.0,
            "image_offset": 0.0,
            "statistics": [[0.0, 0.0, 1021.0, 1893.0, 174.5, 201.7]],
        },
        "key": "0f3c…",
        "shards_digest": "5d10…",
        "metadata_digest": "92be…",
        "provenance": {"source_stamp": [[9482112, 1714809600000000000, 1714809600000000000]]},
        "geometry": {
            "spacing_mm": [1.25, 1.25, 1.37],
            "origin_mm": [-179.2, -108.0, 41.6],
            "direction": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        },
        "orientation": "LPS",
        "largest_error": 0.0,
        "num_clipped": 0,
    },
    "weak_labels/{name}": {
        "num_components": [412, 97, 21],
        "descriptors": "intensity",
        "descriptors_digest": "",
        "neighbours": "any",
        "recall": 1.0,
        "slices_digest": "81d7…",
        "metadata_digest": "f09a…",
        "provenance": _PROVENANCE,
    },
    "descriptors/{name}": {
        "encoder": {
            "source": "runs/pretrain",
            "digest": "c40b…",
            "backbone": "unet",
            "filters": 32,
            "in_channels": 1,
        },
        "digest": "7e2a…",
        "slices_digest": "81d7…",
        "metadata_digest": "2c4f…",
        "provenance": {**_PROVENANCE, "command": "supercl describe heart.zarr --encoder runs/pretrain"},
    },
}
"""Attributes of every group as they might be; digests are shortened."""

_LAYOUT: Final = f"""\
# The cache

<!-- Generated from supercl_core/cache/schema.py by `make schema`; edit there and in schema_page.py and recipes.py. -->

A cache is one Zarr v3 group, a folder. Any Zarr v3 reader opens it. This is schema version {SCHEMA_VERSION}.

```
NAME.zarr/
  cases/<case>/              one group per case that is done, which is an OME-NGFF {OME_VERSION} image
    image                    intensities
    labels/superpixels/0     superpixel ids
    labels/ground_truth/0    classes, where the case has a ground truth
    asp                      ASP maps on a small grid
  table/                     one row per case, failed ones too
  slices/                    one entry per slice of all cases that are done, in the order of `table`
  descriptors/<name>/        descriptors of all slices from an encoder, where there are any
  weak_labels/<name>/        CCL labels of all slices; one set is the default
```

Words:

- ASP map: a slice in which every pixel is the mean over its superpixel
- CCL, weak label: slices are linked to the slice with the most similar ASP map, and slices that are linked, directly
  or through others, share a label; coarser levels link the groups in the same way
- IGCP: the pairs of slices with one weak label, which training pulls together

Letters of the axes:

- c channel, z slice, y row, x column
- g cell of the ASP grid ({ASP_GRID} along y, {ASP_GRID} along x)
- n slices of the whole cache, m cases, l levels of the CCL hierarchy, d features of a descriptor
- w bytes of a text column: UTF-8, padded with zero bytes to the longest text
- a digit is a fixed length

## Files

No array is compressed. Every chunk is the raw values (little-endian), and behind them {CHECKSUM_BYTES} bytes of crc32c.

- *Mapped* arrays are sharded: one shard file per array and case, one inner chunk per slice with all its channels, in
  order. Slice z starts at byte z × (bytes of a slice + {CHECKSUM_BYTES}). The file ends with the index of Zarr's
  sharding codec: offset and length of every slice (16 bytes), then a crc32c. So any reader takes and checks a slice
  with one range read, and ours maps the file.
- All other arrays are one chunk, one file.

"""

_ARCHIVES: Final = """
## Packed

`supercl pack CACHE ARCHIVE` writes the same group compressed: a folder for an object store, or one zip file (members
stored, zip64) where the name ends in `.zip`. Any Zarr v3 reader opens it: the same nodes, names, shapes and attributes,
and the root's attribute `supercl.form` is `archive`. Arrays of cases have one shard, and one inner chunk per slice with
the codecs `bytes`, `crc32c`, `zstd` (level 3), `crc32c`, so a slice is one range read. All else is stored as in the
cache. `supercl unpack ARCHIVE CACHE` gives back every byte.
"""

_VIEWERS: Final = f"""
## In viewers

Each case is a valid OME-NGFF {OME_VERSION} image with label layers. With the plugin napari-ome-zarr,
`napari NAME.zarr/cases/<case>` opens it. Label layers are hidden there until they are switched on.

What the attribute `ome` says:

- of `cases/<case>`: `multiscales`, one level with the axes c, z, y, x and the spacing in millimeters; `omero`, name
  and window of every channel. The first channel is shown at first, grey, at the middle slice.
- of `cases/<case>/labels`: `labels`, the names of the layers.
- of `cases/<case>/labels/superpixels`: `image-label`. Id 0 is a superpixel like any other, though
  viewers may leave it clear.
- of `cases/<case>/labels/ground_truth`: `image-label`, colour and name of every class. The background is clear.

Good to know:

- Viewers show stored values, and windows are given in them. The source's value is
  `stored * image_scale + image_offset`.
- Where the spacing is unknown, the scale is 1 and the unit is left out.
- Position and direction of the volume are in `geometry` only: OME-NGFF {OME_VERSION} has no turned axes.
- Open cases one at a time: the root is not an image.
"""


def markdown() -> str:
    """The text of `cache_schema.md`."""
    return "\n".join([_LAYOUT + _arrays(), _attributes(), _ARCHIVES, _VIEWERS, _recipes()])


def _arrays() -> str:
    lines = [
        "## Arrays",
        "",
        "| path | dtype | axes | unit or range | mapped | meaning |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for spec in ARRAYS:
        meaning = spec.meaning + (" Optional." if spec.optional else "")
        lines.append(
            f"| `{_shown(spec.path)}` | {', '.join(spec.dtypes)} | ({', '.join(spec.axes)}) | {spec.unit} "
            f"| {'yes' if spec.mapped else ''} | {meaning} |"
        )
    return "\n".join([*lines, ""])


def _attributes() -> str:
    lines = [
        "## Attributes",
        "",
        "Ours lie below the key `supercl` of a group's attributes. `ome` beside it is OME-NGFF's (see In viewers).",
    ]
    for group, examples in EXAMPLES.items():
        lines += ["", f"### Of `{_shown(group)}`", "", "| key | type | meaning |", "| --- | --- | --- |"]
        lines += [
            f"| `{spec.key}` | {spec.type} | {spec.meaning} |" for spec in ATTRIBUTES if spec.group == group
        ]
        lines += ["", "For example:", "", "```json", _object(examples), "```"]
    return "\n".join(lines)


def _recipes() -> str:
    lines = [
        "## Recipes",
        "",
        "None of these needs this package; a test runs each as it is printed. Set the names that they use first:",
        "",
        "```python",
        'CACHE, CASE, Z = "heart.zarr", "la_003", 60      # a cache, a case, a slice',
        "```",
    ]
    for recipe in RECIPES:
        lines += ["", f"### {recipe.title}", "", f"Needs {', '.join(recipe.packages)}."]
        lines += ["", "```python", recipe.code.strip(), "```"]
    return "\n".join([*lines, ""])


def _object(values: dict[str, Any], indent: str = "") -> str:
    """JSON with one line for every value that is no object."""
    pairs = []
    for key, value in values.items():
        text = (
            _object(value, indent + "  ")
            if isinstance(value, dict)
            else json.dumps(value, ensure_ascii=False)
        )
        pairs.append(f'{indent}  "{key}": {text}')
    return ",\n".join(["{", *pairs]).replace("{,", "{", 1) + f"\n{indent}}}"


def _shown(path: str) -> str:
    return path.replace("{", "<").replace("}", ">")


if __name__ == "__main__":
    print(markdown(), end="")
