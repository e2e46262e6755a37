"""`supercl view`: the contact sheet of a slice, its neighbours, and requests that make no sense."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from supercl_core.cache.reader import CachedCase, WeakLabels, open_cache
from supercl_core.showing import sheets, view
from supercl_core.showing.pictures import BORDER_RGB, class_rgb


def drawn(monkeypatch: pytest.MonkeyPatch, case: CachedCase, z: int) -> tuple[Image.Image, list[str]]:
    """A contact sheet, and the texts on it."""
    texts: list[str] = []
    cut = sheets.cut

    def remember(text: str, font: Any, width: int) -> str:
        texts.append(text)
        return cut(text, font, width)

    monkeypatch.setattr(view, "cut", remember)
    monkeypatch.setattr(sheets, "cut", remember)
    return view.contact_sheet(case, z), texts


def num_pixels(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(axis=-1).sum())


def test_the_sheet_shows_the_slice_and_says_what_it_is(
    cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = open_cache(cache_path).case("case_b")
    sheet, texts = drawn(monkeypatch, case, 3)
    count = len(np.unique(case.superpixels_ZYX[3]))
    shown = ("case_b, slice 3", "Slice: MRI", f"{count} superpixels", "Ground truth", "anterior", "posterior")
    assert set(shown) <= set(texts)
    [facts] = [text for text in texts if text.startswith("Task99_Tiny")]
    assert facts == "Task99_Tiny · z 3 of 0 to 5 · 24 x 20 pixels · spacing 3 x 0.9 x 0.8 mm (z, y, x)"
    for colour in (BORDER_RGB, class_rgb(1), class_rgb(2)):
        assert num_pixels(sheet, colour) > 100


def test_pixels_keep_their_aspect(cache_path: Path) -> None:
    case = open_cache(cache_path).case("case_b")
    width, height = sheets.fitted(case, 440)
    assert height == 440
    assert width == pytest.approx(440 * (20 * 0.8) / (24 * 0.9), abs=0.5)
    [panel, *_] = view._slice_panels(case, 0)
    assert panel.picture.size == (width, height)


def test_a_case_without_ground_truth_has_no_panel_of_it(
    cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet, texts = drawn(monkeypatch, open_cache(cache_path).case("case_d"), 6)
    assert not any(text.startswith("Ground truth") for text in texts)
    assert num_pixels(sheet, class_rgb(1)) == 0
    _, texts = drawn(monkeypatch, open_cache(cache_path).case("case_a"), 1)
    assert "Ground truth: background only" in texts


def test_neighbours_are_the_nearest_then_those_of_finer_components(cache_path: Path) -> None:
    cache = open_cache(cache_path)
    n = cache.num_slices
    ccl = np.stack([np.arange(n), np.full(n, 1)]).astype(np.int32)
    ccl[0, [3, 4, 5, 12, 20]] = 3  # slices 0-4 are case_a's, 5-10 case_b's
    ccl[1, 21:] = 2
    nearest = np.zeros((2, n), np.int32)
    nearest[0, 3], nearest[0, [5, 12]] = 20, 3
    similarity = np.full((2, n), 0.5, np.float32)
    similarity[0, [3, 5, 12]] = 0.75, 0.25, 0.625
    labels = WeakLabels(
        name="x",
        ccl=ccl,
        nearest=nearest,
        similarity=similarity,
        num_components=(n, 2),
        descriptors="x",
        neighbours="any",
    )
    found = view.nearest_slices(cache, labels, 3)
    assert [dataclasses.astuple(neighbour) for neighbour in found] == [
        (20, 0, 0.75),
        (12, 0, 0.625),
        (5, 0, 0.25),
        (4, 0, None),
        (6, 1, None),  # of another case first
        (7, 1, None),
    ]
    alone = dataclasses.replace(labels, ccl=np.arange(2 * n, dtype=np.int32).reshape(2, n))
    assert view.nearest_slices(cache, alone, 3) == []


def test_the_command_writes_where_it_says(
    cache_path: Path, tmp_path: Path, supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = supercl("view", cache_path, "case_a", "2")
    assert (outcome.code, outcome.out, outcome.err) == (0, "case_a_z2.png\n", "")
    assert supercl("view", cache_path, "case_a", "2", "-o", "new/sheet.png").out == "new/sheet.png\n"
    assert (tmp_path / "new/sheet.png").read_bytes() == (tmp_path / "case_a_z2.png").read_bytes()
    with Image.open(tmp_path / "case_a_z2.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")


@pytest.mark.parametrize(
    ("arguments", "code", "texts"),
    [
        (["case_a"], 2, ["The slice is missing", "0 to 4", "--html"]),
        (["case_a", "5"], 2, ["no slice 5", "0 to 4"]),
        (["case_a", "5", "--html"], 2, ["no slice 5", "0 to 4"]),
        (["case_a", "--", "-1"], 2, ["no slice -1", "0 to 4"]),
        (["case_a", "x"], 2, ["'x' is not a valid integer"]),
        (["case_z", "0"], 4, ["no case 'case_z'", "case_a, case_b"]),
        (["case_a", "0", "-o", "a.jpg"], 2, ["ends in .png", "a.png"]),
        (["case_a", "--html", "-o", "a.png"], 2, ["ends in .html", "a.html"]),
    ],
)
def test_requests_that_make_no_sense_leave_no_file(
    arguments: list[str],
    code: int,
    texts: list[str],
    cache_path: Path,
    tmp_path: Path,
    supercl: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = supercl("view", cache_path, *arguments)
    assert (outcome.code, outcome.out) == (code, "")
    assert all(text in outcome.err for text in texts)
    assert not list(tmp_path.iterdir())


def test_names_are_drawn_in_letters_that_the_font_has() -> None:
    assert sheets.drawable("la 003·é心\x1b[2J\n") == "la 003\\xb7\\xe9\\u5fc3\\x1b[2J\\n"


def test_long_names_end_in_dots() -> None:
    font = view.ImageFont.load_default(18)
    shown = sheets.cut("a long name of a case " * 9, font, 200)
    assert shown.endswith("...")
    assert 150 < font.getlength(shown) <= 200


def test_panels_wrap_into_strips() -> None:
    panels = [view._Panel(picture=Image.new("RGB", (440, 60)), title=str(index)) for index in range(6)]
    assert [strip.size for strip in view._strips(panels)] == [(4 * 440 + 3 * 28, 124), (2 * 440 + 28, 124)]


def test_several_channels_are_all_shown(
    write_volume: Callable[..., Path],
    texture: Callable[[tuple[int, ...], int], np.ndarray],
    scheduler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from preprocess import run

    write_volume(tmp_path / "in" / "two.nii.gz", (1000 * texture((2, 4, 20, 30), 5)).astype(np.int16))
    assert not run(tmp_path / "in", tmp_path / "two.zarr", scheduler=scheduler).failed
    case = open_cache(tmp_path / "two.zarr").case("two")
    _, texts = drawn(monkeypatch, case, 1)
    assert [text for text in texts if text.startswith("Slice: ")] == ["Slice: 0", "Slice: 1"]
    first, second, *_ = view._slice_panels(case, 1)
    assert first.picture.tobytes() != second.picture.tobytes()
