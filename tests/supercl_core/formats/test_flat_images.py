"""2-D images as slices: every mode that can be used keeps its values, every other is refused with its name."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from supercl_core.errors import SuperCLError
from supercl_core.formats.flat_images import image_suffix, read_image, read_image_header

GREY = np.arange(20, dtype=np.uint8).reshape(4, 5)
WIDE = GREY.astype(np.uint16) * 3000


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("a.png", GREY, GREY[None]),
        ("a.bmp", GREY, GREY[None]),
        ("a.tiff", GREY.astype(np.float32) / 3, GREY[None].astype(np.float32) / 3),
        ("a.TIF", GREY.astype(np.int32) * -70_000, GREY[None].astype(np.int32) * -70_000),
        ("a.png", WIDE, WIDE[None]),
        ("a.tif", WIDE, WIDE[None]),
        ("a.png", GREY > 9, GREY[None] > 9),
        ("a.png", np.stack([GREY, GREY + 1, GREY * 2], axis=-1), np.stack([GREY, GREY + 1, GREY * 2])),
        ("a.jpg", np.full((4, 5), 7, np.uint8), np.full((1, 4, 5), 7)),
    ],
)
def test_values_are_those_of_the_file(
    name: str, array: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    Image.fromarray(array).save(tmp_path / name)
    volume = read_image(tmp_path / name)
    np.testing.assert_array_equal(volume.array_CZYX[:, 0], expected)
    assert volume.array_CZYX.dtype == (array.dtype if array.dtype != bool else np.uint8)
    assert not volume.geometry.has_spacing
    header = read_image_header(tmp_path / name)
    assert header.shape == volume.array_CZYX.shape


def test_a_palette_is_numbers_of_classes_and_no_image(tmp_path: Path) -> None:
    image = Image.fromarray(GREY)
    image.putpalette(range(60))
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", is_label=True).array_CZYX[0, 0], GREY)
    with pytest.raises(SuperCLError, match="cannot be used") as caught:
        read_image(tmp_path / "a.png")
    assert caught.value.found == "Pillow's mode P"


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, with right checksums."""
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def two_pages(path: Path) -> None:
    Image.fromarray(GREY).save(path, save_all=True, append_images=[Image.fromarray(GREY)])


def in_16_bits(path: Path) -> None:
    size = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    path.write_bytes(png((b"IHDR", size), (b"IDAT", zlib.compress(bytes(4 * 31))), (b"IEND", b"")))


def huge(path: Path) -> None:
    size = struct.pack(">IIBBBBB", 1 << 17, 1 << 17, 8, 0, 0, 0, 0)
    path.write_bytes(png((b"IHDR", size), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")))


def not_a_number(path: Path) -> None:
    Image.fromarray(np.full((4, 5), np.nan, np.float32)).save(path)


def cut_off(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.png", lambda path: Image.fromarray(GREY).convert("RGBA").save(path), "Pillow's mode RGBA"),
        ("a.jpg", lambda path: Image.fromarray(GREY).convert("CMYK").save(path), "Pillow's mode CMYK"),
        ("a.tif", two_pages, "2 images"),
        ("a.png", in_16_bits, "16 bits a colour"),
        ("a.tif", not_a_number, "NaN or infinite"),
        ("a.png", huge, "exceeds limit"),
        ("a.png", cut_off, "damaged"),
        ("a.png", lambda path: path.touch(), "an empty file"),
        ("a.png", lambda path: path.mkdir(), "a folder"),
        ("a.png", lambda path: path.symlink_to("nowhere"), "leads nowhere"),
        ("a.png", lambda path: Image.fromarray(GREY).save(path, "JPEG"), "starts with b'\\xff"),
        ("a.bmp", lambda path: path.write_bytes(b"BM" + bytes(20)), "damaged"),
    ],
)
def test_what_cannot_be_used_is_refused(
    name: str, write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(SuperCLError) as caught:
        read_image(tmp_path / name)
    assert message in caught.value.message()
    assert caught.value.where == tmp_path / name


def test_a_label_map_is_no_jpeg(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.jpg")
    with pytest.raises(SuperCLError, match="changes the values"):
        read_image_header(tmp_path / "a.jpg", is_label=True)


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.PNG", ".png"), ("a.jpeg", ".jpeg"), (".png", None), ("a.gif", None)]
)
def test_images_are_known_by_their_names(name: str, suffix: str | None) -> None:
    assert image_suffix(name) == suffix
