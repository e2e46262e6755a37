"""Short programs that read a cache without this package. They are printed in `cache_schema.md`.

Called by `supercl_core.cache.schema_page`; a test runs each of them exactly as it is printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One program. It finds the path `CACHE`, the case id `CASE` and the slice number `Z` as global names."""

    title: str
    packages: tuple[str, ...]
    """What it needs beside the standard library, by the names under which packages are installed."""
    code: str


RECIPES: Final = (
    Recipe(
        title="List the cases, with state and reason",
        packages=("zarr",),
        code="""
import zarr

def texts(column):
    return [bytes(row).rstrip(b"\\0").decode() for row in column[:]]

table = zarr.open_group(CACHE, mode="r")["table"]
states = [("done", "failed")[state] for state in table["state"][:]]
cases = list(zip(texts(table["id"]), states, texts(table["reason"])))
for case_id, state, reason in cases:
    print(case_id, state, reason)
""",
    ),
    Recipe(
        title="Open one slice, in the source's intensities",
        packages=("zarr",),
        code="""
import zarr

case = zarr.open_group(f"{CACHE}/cases/{CASE}", mode="r")
row = case.attrs["supercl"]["row"]
image = case["image"][:, Z] * row["image_scale"] + row["image_offset"]   # (c, y, x)
superpixels = case["labels/superpixels/0"][Z]                            # (y, x)
""",
    ),
    Recipe(
        title="Draw the borders of the superpixels over a slice",
        packages=("numpy", "pillow", "zarr"),
        code="""
import numpy as np
import zarr
from PIL import Image

case = zarr.open_group(f"{CACHE}/cases/{CASE}", mode="r")
image = case["image"][0, Z].astype(float)
superpixels = case["labels/superpixels/0"][Z]

window = case.attrs["ome"]["omero"]["channels"][0]["window"]             # in stored values
grey = (image - window["start"]) / (window["end"] - window["start"]) * 255
picture = np.stack([grey.clip(0, 255).astype(np.uint8)] * 3, axis=-1)    # (y, x, rgb)
picture, superpixels = (array.repeat(4, 0).repeat(4, 1) for array in (picture, superpixels))
border = np.zeros(superpixels.shape, bool)
border[1:] |= superpixels[1:] != superpixels[:-1]
border[:, 1:] |= superpixels[:, 1:] != superpixels[:, :-1]
picture[border] = 255, 220, 0
Image.fromarray(picture).save("superpixels.png")
""",
    ),
    Recipe(
        title="Ground truth as classes with names",
        packages=("numpy", "zarr"),
        code="""
import numpy as np
import zarr

names = zarr.open_group(CACHE, mode="r").attrs["supercl"]["class_names"]
case = zarr.open_group(f"{CACHE}/cases/{CASE}", mode="r")
classes = case["labels/ground_truth/0"][:]                               # (z, y, x)
voxels = dict(zip(names, np.bincount(classes.ravel(), minlength=len(names))))
for name, count in voxels.items():
    print(name, count)
""",
    ),
    Recipe(
        title="List a CCL group: every slice that shares a weak label with slice Z of a case",
        packages=("numpy", "zarr"),
        code="""
import numpy as np
import zarr

cache = zarr.open_group(CACHE, mode="r")
ids = [bytes(row).rstrip(b"\\0").decode() for row in cache["table/id"][:]]
case, z = cache["slices/case"][:], cache["slices/z"][:]
ccl = cache["weak_labels"][cache.attrs["supercl"]["default_weak_labels"]]["ccl"]

finest = ccl[0]                                                          # ccl[-1] is the coarsest level
query = np.flatnonzero((case == ids.index(CASE)) & (z == Z))[0]
members = [(ids[case[n]], int(z[n])) for n in np.flatnonzero(finest == finest[query])]
""",
    ),
    Recipe(
        title="Paint the ASP map of a slice at full resolution, and compare it with the stored grid",
        packages=("numpy", "zarr"),
        code="""
import numpy as np
import zarr

case = zarr.open_group(f"{CACHE}/cases/{CASE}", mode="r")
image = case["image"][0, Z].astype(float)                                # of one channel
superpixels = case["labels/superpixels/0"][Z]

grey = (image - image.min()) / (image.max() - image.min())
sums, counts = np.bincount(superpixels.ravel(), grey.ravel()), np.bincount(superpixels.ravel())
asp = (sums / counts)[superpixels]                                       # (y, x), 0 to 1

stored = case["asp"][Z]                                                  # (g, g)
centres = (np.arange(len(stored)) + 0.5) / len(stored)
rows, columns = ((centres * size).astype(int) for size in asp.shape)
print(np.abs(asp[np.ix_(rows, columns)] - stored).max())                 # about 0.0002: float16
""",
    ),
    Recipe(
        title="Read a slice with nothing but NumPy",
        packages=("numpy",),
        code="""
import json
from pathlib import Path

import numpy as np

array = Path(CACHE, "cases", CASE, "image")
metadata = json.loads((array / "zarr.json").read_text())
channels, num_slices, height, width = metadata["shape"]
dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
count = channels * height * width
step = count * dtype.itemsize + 4                                        # 4 bytes of crc32c behind each slice
stored = np.fromfile(array / "c/0/0/0/0", dtype, count, offset=Z * step)
stored = stored.reshape(channels, height, width)
""",
    ),
    Recipe(
        title="Open a case as an image with label layers",
        packages=("ome-zarr",),
        code="""
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader

nodes = Reader(parse_url(f"{CACHE}/cases/{CASE}"))()
layers = {node.zarr.basename(): node for node in nodes if node.data}
for name, node in layers.items():
    print(name, node.data[0].shape, node.data[0].dtype)                  # data[0] is a Dask array
""",
    ),
)
