"""Arrays as volumes: which array is meant, what its axes are, and files that would run code or lead elsewhere."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supercl_core.errors import SuperCLError
from supercl_core.formats.array_files import array_suffix, has_label, read_array, read_array_header

IMAGE = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


def hdf5(path: Path) -> Any:
    return pytest.importorskip("h5py").File(path, "w")


def save(path: Path, array: np.ndarray, **others: np.ndarray) -> None:
    """Write an array as `image`, in the format of the file's name."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, image=array, **others)
    else:
        with hdf5(path) as file:
            for name, values in {"image": array, **others}.items():
                file.create_dataset(name, data=values, compression="gzip")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "a.HDF5"])
@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (IMAGE, "int16"),
        (IMAGE[0], "int16"),
        (np.stack([IMAGE, IMAGE + 1]), "int16"),
        (IMAGE.astype(">f4"), "float32"),
        (np.asfortranarray(IMAGE), "int16"),
        (IMAGE > 9, "uint8"),
        (IMAGE.astype(np.float16), "float32"),
        (IMAGE.astype(np.uint64), "uint64"),
    ],
)
def test_values_and_axes(name: str, array: np.ndarray, dtype: str, tmp_path: Path) -> None:
    if name == "a.HDF5":
        with hdf5(tmp_path / name) as file:
            file["deep/values"] = array
    else:
        save(tmp_path / name, array)
    volume = read_array(tmp_path / name)
    assert volume.array_CZYX.shape == (1,) * (4 - array.ndim) + array.shape
    np.testing.assert_array_equal(volume.array_CZYX.reshape(array.shape), array)
    assert volume.array_CZYX.dtype == dtype
    assert volume.array_CZYX.flags.c_contiguous
    assert not volume.geometry.has_spacing
    assert read_array_header(tmp_path / name).shape == volume.array_CZYX.shape


@pytest.mark.parametrize("name", ["a.npz", "a.h5"])
def test_which_array_is_meant(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    save(path, IMAGE, label=IMAGE + 1, other=IMAGE + 2)
    assert has_label(path)
    np.testing.assert_array_equal(read_array(path, "image").array_CZYX[0], IMAGE)
    np.testing.assert_array_equal(read_array(path, "label").array_CZYX[0], IMAGE + 1)


@pytest.mark.parametrize("arrays", [{"a": IMAGE, "b": IMAGE}, {"a": IMAGE, "b": IMAGE, "label": IMAGE}, {}])
def test_a_file_of_several_arrays_that_could_be_meant_is_refused(
    arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(SuperCLError, match="does not say which array is the image") as caught:
        read_array(tmp_path / "a.npz")
    assert caught.value.found == (", ".join(arrays) or "no array")


class Attack:
    """What a file would do if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("ran").write_text, ("code",))


def objects(path: Path) -> None:
    array = np.empty((2, 2), object)
    array[:] = Attack()
    np.save(path, array, allow_pickle=True)


def npy_header(shape: tuple[int, ...], dtype: str = "<i2") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", npy_header((1 << 20, 1 << 20, 8)) + bytes(1000))


def lzma(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("image.npy", npy_header((2, 3)) + bytes(12))


def wrong_checksum(path: Path) -> None:
    np.savez(path, image=IMAGE)
    content = path.read_bytes()
    place = content.index(IMAGE.tobytes()) + 5
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])


def external(path: Path) -> None:
    with hdf5(path) as file:
        file.create_dataset("image", (2, 3), "i2", external=[("/etc/hostname", 0, 12)])


def external_link(path: Path) -> None:
    import h5py

    with hdf5(path.with_name("other.bin")) as other:
        other["image"] = IMAGE
    with hdf5(path) as file:
        file["image"] = h5py.ExternalLink("other.bin", "image")


def virtual(path: Path) -> None:
    import h5py

    layout = h5py.VirtualLayout((2, 3), "i2")
    layout[:] = h5py.VirtualSource("other.h5", "image", (2, 3))
    with hdf5(path) as file:
        file.create_virtual_dataset("image", layout)


def unallocated(path: Path) -> None:
    with hdf5(path) as file:
        file.create_dataset("image", (1 << 20, 1 << 20, 8), "i2", chunks=(1, 64, 8))


def large_chunks(path: Path) -> None:
    """Four rows, for which two megabytes are unpacked from 46 bytes, in two steps."""
    from h5py import h5d, h5p, h5s, h5t

    created = h5p.create(h5p.DATASET_CREATE)
    created.set_chunk((1024, 1024))
    created.set_deflate(9)
    created.set_deflate(9)
    with hdf5(path) as file:
        space = h5s.create_simple((4, 4), (h5s.UNLIMITED, h5s.UNLIMITED))
        h5d.create(file.id, b"image", h5t.STD_I16LE, space, created)
        file["image"][...] = 0


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.npy", objects, "pickled objects are never read"),
        ("a.npy", lambda path: path.write_bytes(pickle.dumps(Attack())), "damaged"),
        ("a.npz", lambda path: path.write_bytes(pickle.dumps(Attack())), "damaged"),
        ("a.npy", lambda path: path.write_bytes(npy_header((1 << 40, 9)) + bytes(99)), "asks for"),
        ("a.npy", lambda path: path.write_bytes(npy_header((2, 3)) + bytes(11)), "asks for 12"),
        ("a.npy", lambda path: path.write_bytes(npy_header((2, 0))), "empty"),
        ("a.npy", lambda path: path.write_bytes(npy_header((-2, 3)) + bytes(99)), "damaged"),
        ("a.npy", lambda path: path.write_bytes(b"\x93NUMPY\x03\x00" + bytes(99)), "as NumPy writes it"),
        ("a.npz", bomb, "asks for"),
        ("a.npz", lzma, "compression 14"),
        ("a.npz", wrong_checksum, "damaged"),
        ("a.npy", lambda path: np.save(path, np.zeros(9)), "shape (9,)"),
        ("a.npy", lambda path: np.save(path, np.zeros((1,) * 5)), "shape (1, 1, 1, 1, 1)"),
        ("a.npy", lambda path: np.save(path, np.zeros((2, 2), complex)), "complex128"),
        ("a.npy", lambda path: np.save(path, np.zeros((2, 2), "U4")), "<U4"),
        ("a.npy", lambda path: np.save(path, np.array([[0, np.inf]])), "NaN or infinite"),
        ("a.npz", lambda path: path.mkdir(), "a folder"),
        ("a.h5", lambda path: path.write_bytes(b"\x89HDF no"), "damaged"),
        ("a.h5", external, "from elsewhere"),
        ("a.h5", external_link, "no array"),
        ("a.h5", virtual, "from elsewhere"),
        ("a.h5", unallocated, "asks for"),
        ("a.h5", large_chunks, "asks for 2,097,152"),
        ("a.h5", lambda path: hdf5(path).create_dataset("image", data="text"), "type is not supported"),
    ],
)
def test_what_cannot_be_used_is_refused(
    name: str, write: Callable[[Path], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    write(path)
    with pytest.raises(SuperCLError) as caught:
        read_array(path)
    assert message in caught.value.message()
    assert caught.value.where == path
    assert not Path("ran").exists()


def test_hdf5_without_h5py_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.h5", IMAGE)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(SuperCLError, match="need h5py") as caught:
        read_array(tmp_path / "a.h5")
    assert "supercl[hdf5]" in caught.value.next_step


def test_arrays_are_known_by_their_names() -> None:
    assert [array_suffix(name) for name in ("a.NPY", "a.npz", ".npz", "a.mat")] == [
        ".npy",
        ".npz",
        None,
        None,
    ]
