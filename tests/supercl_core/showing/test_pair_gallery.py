"""The gallery of components: which levels, components and slices it shows, and what is drawn of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made_caches
import numpy as np
import pytest
from PIL import Image, ImageDraw

from supercl_core.cache.reader import Cache, open_cache
from supercl_core.errors import UsageError
from supercl_core.showing import pair_gallery
from supercl_core.showing.pictures import class_rgb


def write(path: Path, num_slices: dict[str, int], levels: Any, **truths: np.ndarray) -> Cache:
    """A cache of cases with so many slices of 16 x 16, those named in `truths` with ground truth (y, x) in each."""
    cases = {}
    for seed, (case_id, count) in enumerate(num_slices.items()):
        image = np.random.default_rng(seed).integers(0, 1000, (1, count, 16, 16)).astype(np.int16)
        cases[case_id] = {"image": image, "superpixels": np.zeros((count, 16, 16), np.uint8)}
        if case_id in truths:
            cases[case_id]["ground_truth"] = np.broadcast_to(truths[case_id], (count, 16, 16)).copy()
    return open_cache(
        made_caches.write_cache(
            path,
            cases,
            name="hand",
            channel_names=("MRI",),
            class_names=("background", "one", "two"),
            levels=levels,
        )
    )


def drawn(
    monkeypatch: pytest.MonkeyPatch, cache: Cache, *, batch_size: int = 4, **options: Any
) -> tuple[np.ndarray, list[str]]:
    """The gallery of the default labels, uint8 (y, x, 3), and the texts on it."""
    texts: list[str] = []
    text = ImageDraw.ImageDraw.text

    def remember(self: Any, place: Any, words: str, *rest: Any) -> None:
        texts.append(words)
        text(self, place, words, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", remember)
    sheet = pair_gallery.gallery(cache, cache.weak_labels(), batch_size=batch_size, **options)
    return np.asarray(sheet), texts


def num_pixels(sheet: np.ndarray, value: int) -> int:
    return int((sheet == class_rgb(value)).all(axis=-1).sum())


@pytest.mark.parametrize(
    ("num_levels", "auto", "levels"),
    [
        (1, 0, [0]),
        (3, 1, [0, 1, 2]),
        (5, 4, [0, 1, 2, 3, 4]),
        (9, 4, [0, 2, 4, 6, 8]),
        (9, 5, [0, 2, 4, 5, 6, 8]),
    ],
)
def test_the_finest_level_the_coarsest_and_that_of_training_are_shown(
    num_levels: int, auto: int, levels: list[int]
) -> None:
    assert pair_gallery.shown_levels(num_levels, auto) == levels


@pytest.mark.parametrize(
    ("sizes", "components"),
    [([3], [0]), ([2, 5], [1, 0]), ([2, 5, 3, 4], [1, 3, 2, 0]), ([1, 2, 3, 4, 5, 6, 7], [6, 4, 3, 2])],
)
def test_the_largest_component_and_those_of_middle_size_are_shown(
    sizes: list[int], components: list[int]
) -> None:
    assert pair_gallery.shown_components(np.array(sizes)) == components


def test_slices_of_a_component_are_of_as_many_patients_as_can_be() -> None:
    patient = np.array([5] * 20 + [2] * 9 + [7] + [1])
    found = pair_gallery.spread(patient)
    assert sorted(patient[found]) == [1, 2, 2, 2, 5, 5, 5, 7]
    assert (np.diff(found) > 0).all()
    assert len(set(pair_gallery.spread(np.arange(100)))) == pair_gallery.MAX_SLICES
    assert pair_gallery.spread(np.zeros(3, int)).tolist() == [0, 1, 2]


def test_the_gallery_says_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = np.zeros((16, 16), np.uint8)
    truth[4:12, 4:12] = 2
    levels = [[0, 0, 0, 1, 1, 0, 2], [0] * 7]
    cache = write(tmp_path / "c.zarr", {"a": 3, "b": 2, "c": 1, "d": 1}, levels, b=truth)
    sheet, texts = drawn(monkeypatch, cache)
    assert "Components of the weak labels 'by_hand'" in texts
    assert "two" in texts
    assert [text for text in texts if text.startswith("hand · 7 slices · batches of 4 · ")]
    assert [text for text in texts if text.startswith("Level")] == [
        "Level 0, which training takes: 3 components",
        "Level 1: 1 component",
    ]
    assert [text for text in texts if text.endswith(("patient", "patients"))] == [
        "the largest: 4 slices of 2 patients",
        "2 slices of 1 patient",
        "1 slice of 1 patient",
        "7 slices of 4 patients",
    ]
    # The outline of a square of half the size in each of 4 pictures, and the swatch.
    side = pair_gallery.SLICE_PIXELS // 2
    assert num_pixels(sheet, 2) == pytest.approx(4 * 4 * side + 200, rel=0.1)
    assert (num_pixels(sheet, 1), num_pixels(sheet, 0)) == (0, 0)  # nor is the background outlined
    captions_of_one = drawn(monkeypatch, cache, batch_size=1)[1]
    assert "Level 1, which training takes: 1 component" in captions_of_one


def test_test_cases_are_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = np.ones((16, 16), np.uint8)
    truth[:8] = 2
    cache = write(tmp_path / "c.zarr", {"a": 2, "b": 1}, [[0, 0, 0]], b=truth)
    assert num_pixels(drawn(monkeypatch, cache)[0], 1) > 100
    sheet, texts = drawn(monkeypatch, cache, test_case_ids=("b",))
    assert (num_pixels(sheet, 1), num_pixels(sheet, 2)) == (0, 0)
    assert "2 slices of 1 patient" in texts
    with pytest.raises(UsageError, match="No case is left"):
        drawn(monkeypatch, cache, test_case_ids=("a", "b"))


def test_wide_components_share_no_row_with_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = drawn(monkeypatch, write(tmp_path / "few.zarr", {"a": 8}, [[0, 0, 1, 1, 2, 2, 3, 3]]))[0]
    many = drawn(monkeypatch, write(tmp_path / "many.zarr", {"a": 32}, [np.arange(32) // 8]))[0]
    assert many.shape[0] - few.shape[0] > pair_gallery.SLICE_PIXELS
    assert many.shape[1] == few.shape[1]
    right = many[:, -200:].max(axis=(1, 2)) > 200
    assert right.any(), "the last slices of a row are not cut off"


def test_the_file_is_a_picture_and_the_same_every_time(tmp_path: Path) -> None:
    cache = write(tmp_path / "c.zarr", {"a": 1}, [[0]])
    for name in ("first.png", "second.png"):
        pair_gallery.write_gallery(tmp_path / name, cache, cache.weak_labels(), batch_size=1)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    with Image.open(tmp_path / "first.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
