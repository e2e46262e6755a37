"""A smaller copy of a data set: images and labels lie over each other, whatever the size."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from benchmarks.shrink import shrink


@pytest.mark.parametrize("size", [(9, 12), (10, 11), (11, 10)])
def test_labels_lie_over_their_image(tmp_path, size):
    """An image that is its own label map, in blocks of pixels that differ along both axes."""
    data, out = tmp_path / "data", tmp_path / "out"
    rows, columns = np.indices(size)
    blocks = (10 * (rows // 3) + columns // 3).astype(np.int16)
    volume = np.stack([blocks, blocks + 100])
    for folder in ("imagesTr", "labelsTr"):
        (data / folder).mkdir(parents=True)
        for name in ("a", "b"):
            sitk.WriteImage(sitk.GetImageFromArray(volume), data / folder / f"{name}.nii.gz")
    training = [
        {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in ("a", "b")
    ]
    (data / "dataset.json").write_text(json.dumps({"name": "Blocks", "training": training, "test": []}))
    assert shrink(data, out, factor=3, left_out={"b"}) == 1
    image, label = (
        sitk.GetArrayFromImage(sitk.ReadImage(out / folder / "a.nii.gz"))
        for folder in ("imagesTr", "labelsTr")
    )
    np.testing.assert_array_equal(image, volume[:, 1::3, 1::3][:, : size[0] // 3, : size[1] // 3])
    np.testing.assert_array_equal(label, image)
    assert json.loads((out / "dataset.json").read_text())["training"] == training[:1]
    assert not (out / "imagesTr" / "b.nii.gz").exists()
