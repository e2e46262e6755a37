"""`supercl quality`: a cache's superpixels against scikit-image's, in numbers and in a picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references
from PIL import Image

from preprocess.pipeline import PreprocessConfig
from preprocess.quality_report import SUPERPIXEL_RGB, read_slice, sample_slices
from supercl_core.cache.reader import open_cache


@pytest.fixture(scope="module")
def caches(
    write_msd: Callable[..., Path],
    texture: Callable[[tuple[int, ...], int], np.ndarray],
    scheduler: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Caches of three cases of 3, 5 and 9 slices, the last without ground truth: plain, as scikit-image, masked."""
    from preprocess import run

    cases: dict[str, Any] = {}
    for index, num_slices in enumerate((3, 5, 9)):
        blobs = texture((num_slices, 28, 24), index)
        image = (1000 * blobs + 50 * texture((num_slices, 28, 24), index + 9)).astype(np.int16)
        cases[f"case_{index}"] = (image, None if index == 2 else (2.99 * blobs).astype(np.uint8))
    folder = tmp_path_factory.mktemp("quality")
    source = write_msd(folder / "in", cases)
    configs = {
        "fast": PreprocessConfig(n_segments=20),
        "skimage": PreprocessConfig(n_segments=20, slic="skimage"),
        "masked": PreprocessConfig(n_segments=20, foreground_above=300.0),
        "masked_skimage": PreprocessConfig(n_segments=20, slic="skimage", foreground_above=300.0),
    }
    for name, config in configs.items():
        assert not run(source, folder / f"{name}.zarr", config=config, scheduler=scheduler).failed
    return {name: folder / f"{name}.zarr" for name in configs}


def test_scores_are_means_over_cases_of_what_the_references_give(
    caches: dict[str, Path], supercl: Callable[..., Any]
) -> None:
    outcome = supercl("quality", caches["fast"], "--json")
    assert outcome.code == 0, outcome.err
    assert "quality: 17/17 slices" in outcome.err
    values = json.loads(outcome.out)
    assert (values["num_slices"], values["num_slices_in_cache"]) == (17, 17)
    assert (values["num_cases"], values["num_cases_in_cache"]) == (3, 3)
    assert values["config"]["n_segments"] == 20
    cache = open_cache(caches["fast"])
    for kind, column in (("cache", "ours"), ("skimage", "reference")):
        means, counts = [], []
        for row in cache.done:
            scores = []
            for z in range(row.shape[1]):
                found = read_slice(cache, row.id, z)
                superpixels, truth = found.superpixels[kind], found.ground_truth_YX
                scores.append(
                    references.superpixel_scores(
                        superpixels, found.slice_CYX, superpixels if truth is None else truth
                    )
                )
                counts.append(int(superpixels.max()) + 1)
            means.append({name: np.mean([s[name] for s in scores]) for name in scores[0]})
        for name, metric in values["metrics"].items():
            expected = [m[name] for m in (means if name == "explained_variance" else means[:2])]
            assert metric[column] == pytest.approx(100 * np.mean(expected))
            assert metric["num_cases"] == len(expected)
        assert values["superpixels_per_slice"][kind] == {
            "mean": pytest.approx(np.mean(counts)),
            "min": min(counts),
            "max": max(counts),
        }
        assert values["superpixel_pixels"][kind]["mean"] == pytest.approx(28 * 24 * 17 / sum(counts))
    for metric in values["metrics"].values():
        assert metric["difference"] == pytest.approx(metric["ours"] - metric["reference"])
        assert metric["interval"][0] <= metric["difference"] <= metric["interval"][1]


@pytest.mark.parametrize("name", ["skimage", "masked_skimage"])
def test_a_cache_of_scikit_images_superpixels_differs_by_nothing(
    name: str, caches: dict[str, Path], supercl: Callable[..., Any]
) -> None:
    values = json.loads(supercl("quality", caches[name], "--json").out)
    for metric in values["metrics"].values():
        assert (metric["difference"], metric["interval"]) == (0.0, [0.0, 0.0])
    for part in ("superpixels_per_slice", "superpixel_pixels"):
        assert values[part]["cache"] == values[part]["skimage"]


def test_a_foreground_is_the_same_for_both_and_alone_counted(
    caches: dict[str, Path], supercl: Callable[..., Any]
) -> None:
    cache = open_cache(caches["masked"])
    num_pixels = 0
    for row in cache.done:
        for z in range(row.shape[1]):
            found = read_slice(cache, row.id, z)
            foreground_YX = cache.case(row.id).image_ZCYX[z, 0] > 300
            np.testing.assert_array_equal(found.foreground_YX, foreground_YX)
            num_pixels += int(foreground_YX.sum())
            for superpixels in found.superpixels.values():
                assert not set(superpixels[foreground_YX]) & set(superpixels[~foreground_YX])
    values = json.loads(supercl("quality", caches["masked"], "--json").out)
    for kind in ("cache", "skimage"):
        per_slice, pixels = values["superpixels_per_slice"][kind], values["superpixel_pixels"][kind]
        assert per_slice["mean"] * 17 * pixels["mean"] == pytest.approx(num_pixels)


@pytest.mark.parametrize(("num_slices", "expected"), [(2, 2), (4, 4), (10, 10), (17, 17), (1000, 17)])
def test_a_sample_spreads_over_the_cases(num_slices: int, expected: int, caches: dict[str, Path]) -> None:
    sample = sample_slices(open_cache(caches["fast"]), num_slices)
    assert len(set(sample)) == len(sample) == expected
    assert sample == sorted(sample)
    counts = Counter(case for case, _ in sample)
    for case, available in (("case_0", 3), ("case_1", 5), ("case_2", 9)):
        # A case has fewer than another only by one, or because it has no more.
        assert counts[case] >= min(available, max(counts.values()) - 1)
        if counts[case] == 1:
            assert (case, available // 2) in sample


def test_the_table_fits_80_columns_and_says_what_was_measured(
    caches: dict[str, Path], supercl: Callable[..., Any]
) -> None:
    outcome = supercl("quality", caches["fast"], "--slices", "6", "--workers", "1")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].startswith("6 of 17 slices, 3 of 3 cases")
    assert max(map(len, lines)) <= 80
    starts = [" ".join(line.split()[:2]) for line in lines[2:]]
    assert starts == [
        "achievable accuracy,",
        "boundary recall,",
        "under-segmentation error",
        "explained variance",
        *["superpixels a"] * 3,
        *["pixels a"] * 3,
    ]


def test_without_ground_truth_only_explained_variance_is_scored(
    write_msd: Callable[..., Path],
    texture: Callable[[tuple[int, ...], int], np.ndarray],
    scheduler: str,
    tmp_path: Path,
    supercl: Callable[..., Any],
) -> None:
    from preprocess import run

    source = write_msd(tmp_path / "in", {"one": ((999 * texture((2, 20, 20), 1)).astype(np.int16), None)})
    run(source, tmp_path / "out.zarr", scheduler=scheduler)
    metrics = json.loads(supercl("quality", tmp_path / "out.zarr", "--json").out)["metrics"]
    assert metrics.pop("explained_variance")["interval"] is None
    assert metrics == {"asa": None, "boundary_recall": None, "undersegmentation": None}
    lines = supercl("quality", tmp_path / "out.zarr").out.splitlines()
    assert lines[2].split() == ["achievable", "accuracy,", "ASA", "-", "-", "-", "0"]
    assert "(" not in lines[5]


def test_the_picture_shows_both_borders_and_makes_its_folder(
    caches: dict[str, Path], tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    path = tmp_path / "new" / "look.png"
    outcome = supercl("quality", caches["fast"], "--slices", "1", "--picture", path)
    assert outcome.code == 0, outcome.err
    picture = np.asarray(Image.open(path))
    yellow = (picture == SUPERPIXEL_RGB).all(axis=-1)
    left, right = np.array_split(yellow, 2, axis=1)
    assert left.mean() > 0.02
    assert right.mean() > 0.02
    assert [file.name for file in path.parent.iterdir()] == ["look.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--picture", "look.jpg"], 2, "expected: a file name that ends in .png\n  found:    .jpg"),
        (["--picture", "look"], 2, "found:    no ending"),
        (["--slices", "0"], 2, "0 is not in the range"),
        (["--workers", "0"], 2, "0 is not in the range"),
    ],
)
def test_arguments_that_make_no_sense_are_code_2(
    arguments: list[str], code: int, message: str, caches: dict[str, Path], supercl: Callable[..., Any]
) -> None:
    outcome = supercl("quality", caches["fast"], *arguments)
    assert (outcome.code, outcome.out) == (code, "")
    assert message in outcome.err


def test_a_picture_that_cannot_be_written_is_said_before_the_slices_are_measured(
    caches: dict[str, Path], tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    (tmp_path / "file").touch()
    outcome = supercl("quality", caches["fast"], "--picture", tmp_path / "file" / "look.png")
    assert (outcome.code, outcome.out) == (1, "")
    assert "The system refuses a file." in outcome.err
    assert "17/17" not in outcome.err


def test_no_cache_at_the_path_is_code_4(tmp_path: Path, supercl: Callable[..., Any]) -> None:
    outcome = supercl("quality", tmp_path / "none.zarr")
    assert (outcome.code, outcome.out) == (4, "")
    assert "There is no cache here." in outcome.err
