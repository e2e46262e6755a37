"""`supercl view --html`: what the page of a case holds, and what it does in a browser."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import found_by
from PIL import Image

from supercl_core.cache.reader import open_cache
from supercl_core.showing import view_page
from supercl_core.showing.pictures import BORDER_RGB, asp_slice, boundaries, class_rgb, grey_slice
from supercl_core.showing.view_page import write_page

NASTY_ID = "<script>alert(1)<!--\"'&{{ 7 * 7 }}"
NASTY_CLASS = "</script><script>alert(2)</script>"


@pytest.fixture(scope="module")
def page_path(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of case_b (six slices, two classes), opened in the middle."""
    path = tmp_path_factory.mktemp("page") / "case_b.html"
    write_page(path, open_cache(cache_path).case("case_b"))
    return path


@pytest.fixture(scope="module")
def nasty_path(
    write_volume: Callable[..., Path],
    texture: Callable[[tuple[int, ...], int], np.ndarray],
    scheduler: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The page of a case of two channels, all of whose names try to leave their place."""
    from preprocess import run

    folder = tmp_path_factory.mktemp("nasty")
    write_volume(folder / "in" / f"{NASTY_ID}.nii.gz", (1000 * texture((2, 4, 20, 30), 5)).astype(np.int16))
    assert not run(folder / "in", folder / "two.zarr", scheduler=scheduler).failed
    cache = open_cache(folder / "two.zarr")
    cache.attributes.update(name=NASTY_CLASS, channel_names=[NASTY_CLASS, "T2"])
    write_page(folder / "page.html", cache.case(NASTY_ID), 1)
    return folder / "page.html"


class Page(HTMLParser):
    """Texts, tags and attributes of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self) -> Any:
        return json.loads(next(text for text in self.texts if text.startswith('{"case"')))


def picture(uri: str) -> Image.Image:
    kind, content = uri.split(";base64,")
    found = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == f"data:image/{str(found.format).lower()}"
    return found


def test_pictures_are_the_slices_and_their_layers(page_path: Path, cache_path: Path) -> None:
    case = open_cache(cache_path).case("case_b")
    data = Page(page_path).data
    assert [layer["name"] for layer in data["layers"]] == ["asp", "truth", "borders"]
    assert len(data["slices"]) == 6
    for z, shown in enumerate(data["slices"]):
        [grey] = shown["grey"]
        np.testing.assert_array_equal(picture(grey), grey_slice(case, z))
        np.testing.assert_array_equal(picture(shown["asp"]), asp_slice(case, z))
        truth_YX = case.ground_truth_ZYX[z]
        tinted = np.asarray(picture(shown["truth"]).convert("RGBA"))
        assert not tinted[truth_YX == 0].any()
        for value in (1, 2):
            assert (tinted[truth_YX == value] == (*class_rgb(value), 255)).all()
        lines = np.asarray(picture(shown["borders"]).convert("RGBA"))
        factor = lines.shape[0] // 24
        assert lines.shape == (24 * factor, 20 * factor, 4)
        assert 900 < lines.shape[0] <= 1100
        expected = boundaries(np.kron(case.superpixels_ZYX[z], np.ones((factor, factor), int)))
        assert (lines[expected] == (*BORDER_RGB, 255)).all()
        assert not lines[~expected].any()


def test_large_cases_are_embedded_as_jpeg(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_page, "LOSSLESS_PIXELS", 6 * 24 * 20 - 1)
    case = open_cache(cache_path).case("case_b")
    write_page(tmp_path / "page.html", case)
    for z, shown in enumerate(Page(tmp_path / "page.html").data["slices"]):
        found = picture(shown["grey"][0])
        assert (found.format, found.mode) == ("JPEG", "L")
        assert np.abs(np.asarray(found, dtype=int) - grey_slice(case, z)).mean() < 6


def test_the_page_asks_for_nothing_outside(page_path: Path, nasty_path: Path) -> None:
    for path in (page_path, nasty_path):
        page = Page(path)
        assert not any({"src", "href", "srcset", "action"} & set(attributes) for _, attributes in page.tags)
        assert "default-src 'none'" in page.source
        assert not re.search(r"https?:|url\(|@import", page.source)


def test_the_page_says_what_the_case_is(page_path: Path) -> None:
    text = " ".join(" ".join(Page(page_path).texts).split())
    for content in (
        "Task99_Tiny, 6 slices",
        "6 slices of 24 x 20",
        "3 x 0.9 x 0.8 mm (z, y, x)",
        "float32, lossless",
        "anterior",
        "posterior",
    ):
        assert content in text


def test_a_case_without_ground_truth_has_no_layer_of_it(cache_path: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", open_cache(cache_path).case("case_d"))
    page = Page(tmp_path / "page.html")
    assert [layer["name"] for layer in page.data["layers"]] == ["asp", "borders"]
    assert "truth" not in page.data["slices"][0]
    assert "Classes" not in page.texts


def test_every_control_has_a_name(page_path: Path, nasty_path: Path) -> None:
    for path in (page_path, nasty_path):
        page = Page(path)
        labelled = {attributes.get("for") for attributes in page.named("label")}
        wrapped = re.findall(r'<label><input type="checkbox" id="([^"]+)"', page.source)
        controls = page.named("input") + page.named("select")
        assert len(controls) >= 5
        for attributes in controls:
            names = {"aria-label", "aria-labelledby"} & set(attributes)
            assert names or attributes["id"] in labelled or attributes["id"] in wrapped


def test_nasty_names_stay_texts(nasty_path: Path) -> None:
    page = Page(nasty_path)
    assert len(page.named("script")) == 2  # the data, and the page's own
    assert page.data["case"] == NASTY_ID
    assert NASTY_ID in page.texts
    assert NASTY_CLASS in page.texts  # a channel's name
    assert not any(attribute.startswith("on") for _, attributes in page.tags for attribute in attributes)


def test_the_same_case_gives_the_same_page(page_path: Path, cache_path: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "again.html", open_cache(cache_path).case("case_b"), 3)
    assert (tmp_path / "again.html").read_bytes() == page_path.read_bytes()


def test_the_command_names_the_page_like_the_case(
    cache_path: Path, tmp_path: Path, supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert supercl("view", cache_path, "case_b", "4", "--html").out == "case_b.html\n"
    [slider] = [one for one in Page(tmp_path / "case_b.html").named("input") if one["id"] == "slice"]
    assert (slider["value"], slider["max"]) == ("4", "5")


# ---------------------------------------------------------------- in a browser


def driven(tmp_path: Path, page_path: Path, script: str, *, width: int = 1200) -> Any:
    """What a script returns that runs beside the page; `find`, `key` and `state` are at its service."""
    if shutil.which("chromium") is None:
        pytest.skip("no chromium on this machine")
    # The page's policy refuses foreign scripts: a frame around it, which drives it.
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f"""<!DOCTYPE html><meta charset="utf-8"><iframe id="frame" style="width:{width}px;height:900px;border:0"
        srcdoc="{html.escape(page_path.read_text(encoding="utf-8"))}"></iframe><pre id="found"></pre><script>
        const frame = document.getElementById("frame");
        frame.onload = async () => {{
          const inner = frame.contentDocument, view = frame.contentWindow;
          const find = (id) => inner.getElementById(id);
          const key = (name, target = inner.body) => target.dispatchEvent(
            new view.KeyboardEvent("keydown", {{ key: name, bubbles: true, cancelable: true }}));
          const set = (id, value) => {{
            find(id).value = value;
            find(id).dispatchEvent(new view.Event("input", {{ bubbles: true }}));
          }};
          const wheel = (deltaY) => find("stack").dispatchEvent(
            new view.WheelEvent("wheel", {{ deltaY, bubbles: true, cancelable: true }}));
          const data = JSON.parse(find("data").textContent);
          const state = () => ({{
            z: data.slices.findIndex((pictures) => pictures.grey.includes(find("grey").src)),
            place: find("place").textContent,
            shown: data.layers.filter(({{ name }}) => !find(`layer-${{name}}`).hidden).map(({{ name }}) => name),
          }});
          let result;
          try {{ result = await (async () => {{ {script} }})(); }} catch (error) {{ result = String(error); }}
          document.getElementById("found").textContent = JSON.stringify(result);
        }};
        </script>""",
        encoding="utf-8",
    )
    return found_by(wrapper, width=width)


def test_slider_keys_and_wheel_move_through_the_slices(tmp_path: Path, page_path: Path) -> None:
    found = driven(
        tmp_path,
        page_path,
        """
        const places = [state()];
        for (const name of ["ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown", "End", "ArrowRight", "Home"]) {
          key(name, name === "ArrowUp" ? find("slice") : inner.body);
          places.push(state());
        }
        set("slice", 2); places.push(state());
        for (const delta of [100, 50, 50, -300]) { wheel(delta); places.push(state()); }
        key("ArrowRight", find("opacity-asp")); places.push(state());
        return places;
        """,
    )
    assert [one["z"] for one in found] == [3, 4, 3, 4, 3, 5, 5, 0, 2, 3, 3, 4, 1, 1]
    assert [one["place"] for one in found] == [f"{one['z']} of 0–5" for one in found]


def test_layers_are_toggled_and_faded(tmp_path: Path, page_path: Path) -> None:
    found = driven(
        tmp_path,
        page_path,
        """
        const shown = [state().shown];
        for (const name of ["a", "g", "B"]) { key(name); shown.push(state().shown); }
        find("show-truth").click(); shown.push(state().shown);
        set("opacity-truth", 25);
        key("ArrowRight");
        return {
          shown,
          opacity: view.getComputedStyle(find("layer-truth")).opacity,
          truth: data.slices.findIndex((pictures) => pictures.truth === find("layer-truth").src),
          label: find("stack").getAttribute("aria-label"),
        };
        """,
    )
    assert found["shown"] == [
        ["truth", "borders"],
        ["asp", "truth", "borders"],
        ["asp", "borders"],
        ["asp"],
        ["asp", "truth"],
    ]
    assert found["opacity"] == "0.25"
    assert found["truth"] == 4
    assert found["label"] == "Slice 4 of case_b, ASP map, Ground truth"


def test_channels_change_by_key_and_names_do_no_harm(tmp_path: Path, nasty_path: Path) -> None:
    found = driven(
        tmp_path,
        nasty_path,
        """
        const channel = () => data.slices[1].grey.indexOf(find("grey").src);
        const seen = [channel()];
        for (const press of ["c", "c"]) { key(press); seen.push(channel()); }
        set("channel", 1); seen.push(channel());
        return { seen, title: inner.querySelector("h1").textContent, label: find("stack").ariaLabel };
        """,
    )
    assert found["seen"] == [0, 1, 0, 1]
    assert found["title"] == NASTY_ID
    assert found["label"].startswith(f"Slice 1 of {NASTY_ID}")


@pytest.mark.parametrize("width", [400, 1400])
def test_pixels_keep_their_aspect_and_nothing_scrolls_sideways(
    tmp_path: Path, page_path: Path, width: int
) -> None:
    found = driven(
        tmp_path,
        page_path,
        """
        const box = find("grey").getBoundingClientRect();
        return {
          ratio: box.width / box.height, longest: Math.max(box.width, box.height),
          page: inner.documentElement.scrollWidth, window: inner.documentElement.clientWidth,
        };
        """,
        width=width,
    )
    assert found["ratio"] == pytest.approx((20 * 0.8) / (24 * 0.9), rel=0.01)
    assert found["longest"] > 300
    assert found["page"] <= found["window"] <= width
