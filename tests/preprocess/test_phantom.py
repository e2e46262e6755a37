"""The phantom: reproducible to the byte, readable in its layout, and varied."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from preprocess.phantom import LABELS, phantom_case, write_phantom
from supercl_core.errors import UsageError


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def phantom_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("phantom") / "out", num_cases=3, seed=5)


def test_same_seed_gives_same_bytes_of_every_file(phantom_path: Path, tmp_path: Path) -> None:
    assert content(write_phantom(tmp_path / "again", num_cases=3, seed=5)) == content(phantom_path)


def test_gzip_headers_hold_neither_time_nor_name(phantom_path: Path) -> None:
    for name, written in content(phantom_path).items():
        if name.endswith(".gz"):
            assert written[:4] == b"\x1f\x8b\x08\x00"  # gzip, deflate, no optional fields
            assert written[4:8] == bytes(4)  # the time of writing


def test_a_case_does_not_depend_on_how_many_are_written(phantom_path: Path, tmp_path: Path) -> None:
    three, one = content(phantom_path), content(write_phantom(tmp_path / "one", num_cases=1, seed=5))
    del one["dataset.json"]
    assert len(one) == 2
    assert one.items() <= three.items()


def test_another_seed_gives_another_case() -> None:
    first, second = phantom_case(0, seed=0), phantom_case(0, seed=1)
    assert first.image.shape != second.image.shape or (first.image != second.image).mean() > 0.5


def test_dataset_json_and_files_agree(phantom_path: Path) -> None:
    description = json.loads((phantom_path / "dataset.json").read_text())
    training = description["training"]
    assert (description["numTraining"], description["numTest"], description["test"]) == (3, 0, [])
    assert description["labels"] == {str(value): name for value, name in LABELS.items()}
    assert description["modality"] == {"0": "MRI"}
    listed = {str(Path(path)) for entry in training for path in entry.values()}
    assert content(phantom_path).keys() == listed | {"dataset.json"}


def test_files_hold_the_cases_with_one_geometry(phantom_path: Path) -> None:
    for index, entry in enumerate(json.loads((phantom_path / "dataset.json").read_text())["training"]):
        case = phantom_case(index, seed=5)
        image, label = (sitk.ReadImage(phantom_path / entry[kind]) for kind in ("image", "label"))
        assert image.GetPixelID() == sitk.sitkInt16
        assert label.GetPixelID() == sitk.sitkUInt8
        np.testing.assert_array_equal(sitk.GetArrayViewFromImage(image), case.image)
        np.testing.assert_array_equal(sitk.GetArrayViewFromImage(label), case.label)
        np.testing.assert_allclose(image.GetSpacing()[::-1], case.spacing_mm, rtol=1e-6)
        assert image.IsSameImageGeometryAs(label)


def test_cases_vary_within_the_documented_ranges_and_hold_every_organ() -> None:
    cases = [phantom_case(index, seed=0) for index in range(24)]
    for case in cases:
        num_slices, num_rows, num_columns = case.image.shape
        assert 14 <= num_slices <= 24
        assert 72 <= num_rows <= 104
        assert 84 <= num_columns <= 104
        between_mm, row_mm, column_mm = case.spacing_mm
        assert 2.9 <= between_mm <= 6.0
        assert 0.98 <= row_mm == column_mm <= 1.61
        assert (case.image.dtype, case.label.dtype) == (np.int16, np.uint8)
        assert case.image.min() >= 0
        assert set(np.unique(case.label)) == set(LABELS)
        for value in set(LABELS) - {0}:
            slices = (case.label == value).any(axis=(1, 2))
            assert 3 <= slices.sum() < num_slices
    assert len({case.image.shape for case in cases}) > 20
    assert len({case.spacing_mm for case in cases}) > 20


def test_what_a_slice_shows_follows_from_its_height() -> None:
    liver, spleen, kidneys = (
        next(v for v, n in LABELS.items() if n == name) for name in ("liver", "spleen", "kidneys")
    )
    for index in range(6):
        label = phantom_case(index, seed=0).label
        height = {
            value: np.nonzero(label == value)[0].mean() / len(label) for value in (liver, spleen, kidneys)
        }
        assert height[kidneys] < min(height[liver], height[spleen])


def test_intensity_alone_does_not_separate_the_organs() -> None:
    for index in range(6):
        case = phantom_case(index, seed=0)
        liver, spleen = (case.image[case.label == value].astype(float) for value in (1, 2))
        spread = np.hypot(liver.std(), spleen.std())
        assert abs(liver.mean() - spleen.mean()) < 2 * spread
        looks_like_liver = np.abs(case.image - np.median(liver)) < liver.std()
        assert (looks_like_liver & (case.label == 0)).sum() > 0.2 * liver.size


def test_on_case_is_told_of_each_case(tmp_path: Path) -> None:
    seen: list[int] = []
    write_phantom(tmp_path / "out", num_cases=2, on_case=seen.append)
    assert seen == [0, 1]


def test_an_empty_folder_is_filled_and_no_wip_is_left(tmp_path: Path) -> None:
    out_path = tmp_path / "out"
    out_path.mkdir()
    assert write_phantom(out_path, num_cases=1) == out_path
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_run_leaves_no_output_and_the_next_replaces_its_rest(tmp_path: Path) -> None:
    def interrupt(index: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "out", num_cases=2, seed=1, on_case=interrupt)
    assert not (tmp_path / "out").exists()
    write_phantom(tmp_path / "out", num_cases=1, seed=0)
    write_phantom(tmp_path / "uninterrupted", num_cases=1, seed=0)
    assert content(tmp_path / "out") == content(tmp_path / "uninterrupted")


@pytest.mark.parametrize(("num_cases", "seed"), [(0, 0), (-1, 0), (1, -1)])
def test_settings_without_sense_are_refused(tmp_path: Path, num_cases: int, seed: int) -> None:
    with pytest.raises(UsageError, match=r"expected: [01] or more\n  found:    (0|-1)"):
        write_phantom(tmp_path / "out", num_cases=num_cases, seed=seed)
    assert not any(tmp_path.iterdir())


def test_a_taken_output_path_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = content(tmp_path)
    for name in ("folder", "file"):
        with pytest.raises(UsageError, match="does not exist, or an empty folder"):
            write_phantom(tmp_path / name, num_cases=1)
    assert content(tmp_path) == before
