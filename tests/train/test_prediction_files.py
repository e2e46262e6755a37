"""Label maps made elsewhere: names, formats and values that are taken, and geometry that is not that of the source."""

import dataclasses

import numpy as np
import pytest
import SimpleITK as sitk
import zarr

from supercl_core.cache.reader import open_cache
from supercl_core.errors import SuperCLError, UsageError
from supercl_core.formats.volumes import write_label_map
from train.prediction_files import files_by_case, read_prediction

CLASSES = ("background", "anterior", "posterior")


@pytest.fixture
def case(cache_path):
    return open_cache(cache_path).case("case_a")


def written(path, case, classes=None, **geometry):
    """The label map of `case`, or others in its place, written with parts of its geometry changed."""
    image = sitk.GetImageFromArray(case.read("ground_truth", slice(None)) if classes is None else classes)
    source = case.geometry()
    image.SetSpacing(geometry.get("spacing", source.spacing_mm))
    image.SetOrigin(geometry.get("origin", source.origin_mm))
    image.SetDirection(geometry.get("direction", source.direction))
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path.parent


def read(folder, case):
    files, _ = files_by_case(folder, [case.row.id])
    return read_prediction(files.get(case.row.id), case, CLASSES)


# ---------------------------------------------------------------- what is taken


@pytest.mark.parametrize(
    "name",
    ["case_a.nii.gz", "case_a.nii", "case_a.nrrd", "case_a.mha", "case_a_0000.nii.gz", "case_a_0000.mhd"],
)
def test_files_are_found_by_name_in_every_format(tmp_path, case, name):
    folder = written(tmp_path / "p" / name, case)
    found = read(folder, case)
    np.testing.assert_array_equal(found, case.ground_truth_ZYX)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.float32, np.float64])
def test_whole_numbers_of_any_type_are_classes(tmp_path, case, dtype):
    folder = written(
        tmp_path / "p" / "case_a.mha", case, case.read("ground_truth", slice(None)).astype(dtype)
    )
    np.testing.assert_array_equal(read(folder, case), case.ground_truth_ZYX)


def test_the_plain_name_comes_before_that_of_nnunet_and_others_are_unused(tmp_path, case):
    folder = written(tmp_path / "p" / "case_a_0000.nii.gz", case, np.zeros((5, 24, 20), np.uint8))
    written(folder / "case_a.nii.gz", case)
    written(folder / "case_b.nii.gz", case)
    (folder / "plans.json").write_text("{}")
    (folder / ".case_c.nii.gz").write_text("hidden")
    files, unused = files_by_case(folder, ["case_a", "case_c"])
    assert {case_id: file.name for case_id, file in files.items()} == {"case_a": "case_a.nii.gz"}
    assert unused == ["case_a_0000.nii.gz", "case_b.nii.gz"]
    assert read(folder, case).any()


def test_rounding_of_the_geometry_is_no_difference(tmp_path, case):
    source = case.geometry()
    folder = written(
        tmp_path / "p" / "case_a.mha",
        case,
        spacing=[value * 1.0005 for value in source.spacing_mm],
        origin=[value + 0.05 for value in source.origin_mm],
    )
    assert read(folder, case).any()


def test_where_spacing_means_nothing_the_place_does_not_count(tmp_path, case, cache_copy):
    zarr.open_group(cache_copy, mode="r+")["table/spacing_mm"][0] = np.nan
    folder = written(tmp_path / "p" / "case_a.mha", case, spacing=(1, 1, 1), origin=(0, 0, 0))
    assert read(folder, open_cache(cache_copy).case("case_a")).any()
    with pytest.raises(SuperCLError):
        read(folder, case)


def test_of_a_source_that_does_not_say_where_it_lies_only_the_spacing_counts(tmp_path, case):
    case.attributes["orientation"] = "unknown"
    folder = written(
        tmp_path / "p" / "case_a.mha", case, origin=(0, 0, 0), direction=np.eye(3).ravel().tolist()
    )
    assert read(folder, case).any()
    written(tmp_path / "p" / "case_a.mha", case, spacing=(0.8, 0.9, 2.0))
    with pytest.raises(SuperCLError, match=r"spacing \[0.8, 0.9, 3.0\]"):
        read(folder, case)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "expected", "found"),
    [
        ({"spacing": (0.8, 0.9, 1.5)}, "spacing [0.8, 0.9, 3.0]", "spacing [0.8, 0.9, 1.5]"),
        ({"origin": (-7.0, 12.5, 103.0)}, "origin [-7.0, 12.5, 100.0]", "origin [-7.0, 12.5, 103.0]"),
        (
            {"direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)},
            "direction [0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0]",
            "direction [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]",
        ),
        (
            {"spacing": (2, 2, 2), "origin": (0, 0, 0)},
            "spacing [0.8, 0.9, 3.0]; origin [-7.0, 12.5, 100.0]",
            "spacing [2.0, 2.0, 2.0]; origin [0.0, 0.0, 0.0]",
        ),
    ],
)
def test_another_geometry_is_refused_with_both(tmp_path, case, change, expected, found):
    folder = written(tmp_path / "p" / "case_a.mha", case, **change)
    with pytest.raises(SuperCLError, match="lies elsewhere than its source") as refused:
        read(folder, case)
    assert refused.value.expected == expected
    assert str(refused.value.found).startswith(found)


def test_another_shape_is_refused_with_both(tmp_path, case):
    folder = written(tmp_path / "p" / "case_a.nii.gz", case, np.zeros((5, 20, 24), np.uint8))
    with pytest.raises(SuperCLError, match="another shape") as refused:
        read(folder, case)
    assert (refused.value.expected, refused.value.found) == ("(z, y, x) = (5, 24, 20)", (5, 20, 24))


def test_several_channels_are_refused(tmp_path, case):
    image = sitk.GetImageFromArray(np.zeros((5, 24, 20, 3), np.float32), isVector=True)
    (tmp_path / "p").mkdir()
    sitk.WriteImage(image, str(tmp_path / "p" / "case_a.mha"))
    with pytest.raises(SuperCLError, match=r"\(c, z, y, x\) = \(3, 5, 24, 20\)"):
        read(tmp_path / "p", case)


@pytest.mark.parametrize(
    ("value", "dtype", "found"),
    [
        (3, np.uint8, "3"),
        (-1, np.int16, "-1"),
        (256, np.int16, "256"),
        (0.5, np.float32, "0.5"),
        (-2.5, np.float64, "-2.5"),
    ],
)
def test_values_that_are_no_class_are_named_and_counted(tmp_path, case, value, dtype, found):
    classes = case.read("ground_truth", slice(None)).astype(dtype)
    classes[1, 2:4, 3] = value
    folder = written(tmp_path / "p" / "case_a.mha", case, classes)
    with pytest.raises(SuperCLError, match="no class") as refused:
        read(folder, case)
    assert refused.value.found == f"{found} in 2 voxels"
    assert refused.value.expected == "integers from 0 to 2 (background, anterior, posterior)"


def test_two_files_of_one_case_are_refused(tmp_path, case):
    folder = written(tmp_path / "p" / "case_a.mha", case)
    written(folder / "case_a.nii.gz", case)
    with pytest.raises(SuperCLError, match=r"case_a\.mha and case_a\.nii\.gz"):
        read(folder, case)


def test_of_an_entry_without_permission_it_is_not_said_that_there_are_two(tmp_path, case):
    folder = written(tmp_path / "p" / "case_a.mha", case)
    (files, _) = files_by_case(folder, ["case_a"])
    unlisted = dataclasses.replace(files["case_a"], problem="The folder cannot be listed: Permission denied")
    with pytest.raises(SuperCLError, match="Permission denied") as refused:
        read_prediction(unlisted, case, CLASSES)
    assert refused.value.next_step == "Mend this entry of the folder."


def test_a_missing_file_and_a_case_without_truth_are_refused(tmp_path, case, cache_path):
    folder = written(tmp_path / "p" / "other.mha", case)
    with pytest.raises(SuperCLError, match="no prediction"):
        read(folder, case)
    unlabelled = open_cache(cache_path).case("case_d")
    write_label_map(folder / "case_d.nii.gz", np.zeros((7, 18, 26)), unlabelled.geometry())
    with pytest.raises(SuperCLError, match="no ground truth"):
        read(folder, unlabelled)


def test_a_folder_without_volumes_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for path, found in ((tmp_path, "a folder without a volume"), (tmp_path / "notes.txt", "no folder")):
        with pytest.raises(UsageError, match="no predictions here") as refused:
            files_by_case(path, ["case_a"])
        assert refused.value.found == found
