"""A smaller copy of a data set, for studies on machines without a GPU.

    python -m benchmarks.shrink DATA OUT --factor 3

DATA is a data set in the layout of the Medical Segmentation Decathlon, OUT a new folder of the same layout: rows and
columns are divided by the factor, slices stay, and a rest at the edge is left out. A pixel becomes the mean of those it
covers, a label the one in their middle, so that both lie over each other. Called by `make study-acdc` and
`benchmarks.igcp_ablation`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import click


@click.command(help=__doc__)
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--factor", default=3, show_default=True, type=click.IntRange(min=1))
def main(data: Path, out: Path, factor: int) -> None:
    """Write the smaller copy."""
    print(f"{out}: {shrink(data, out, factor=factor)} cases")


def shrink(data: Path, out: Path, *, factor: int, left_out: Collection[str] = ()) -> int:
    """Write the labelled cases of `data`, but for the ids `left_out`, to `out`; return their number.

    dataset.json is written last, so that a folder with one is whole.
    """
    import SimpleITK as sitk

    declared = json.loads((data / "dataset.json").read_text())
    entries = [
        entry
        for entry in declared["training"]
        if Path(entry["image"]).name.removesuffix(".nii.gz") not in left_out
    ]
    for entry in entries:
        for name, reduced in ((entry["image"], sitk.BinShrink), (entry["label"], sitk.Shrink)):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            volume = sitk.ReadImage(str(data / name))
            # Whole blocks alone: of a rest, Shrink would centre its grid elsewhere than BinShrink.
            width, height = (size // factor * factor for size in volume.GetSize()[:2])
            volume = reduced(volume[:width, :height], [factor, factor, 1])
            sitk.WriteImage(volume, str(out / name))
    (out / "dataset.json").write_text(json.dumps({**declared, "training": entries, "test": []}))
    return len(entries)


if __name__ == "__main__":
    main()
