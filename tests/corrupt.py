"""Corrupt and odd inputs, each with what must become of it: a builder for tests and for `tests/stress.py`.

A data set in the layout of the Medical Segmentation Decathlon: one channel, classes 0 to 2. `FAILING` are cases that
must be listed as failed, `VALID` odd ones that must be computed. Needs no privileges; for files without permission see
`tests/test_corrupt_inputs.py`.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

SHAPE = (4, 24, 20)
"""Of most cases: slices, rows, columns."""
SPACING_MM = (0.8, 0.9, 3.0)
"""Along x, y, z."""


def image(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Waves and noise: int16 (z, y, x), 0..1000."""
    z, y, x = np.indices(shape)
    waves = np.sin(x / 3 + seed) + np.cos(y / 4 + z) + np.random.default_rng(seed).normal(0, 0.1, shape)
    return ((waves - waves.min()) / max(np.ptp(waves), 1e-9) * 1000).astype(np.int16)


def label(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Stripes of the classes 0 to 2: uint8 (z, y, x)."""
    return (np.indices(shape)[1] * 3 // shape[1]).astype(np.uint8)


def nifti(values: np.ndarray, order: str = "<", **fields: Any) -> bytes:
    """A NIfTI-1 file written field by field, right or wrong: `values` with x last, `fields` of its header."""
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(values.dtype.newbyteorder(order))
    header.set_data_shape(values.shape[::-1])
    defaults = {"vox_offset": 352, "qform_code": 1, "scl_slope": 1, "pixdim": [1, *SPACING_MM, 1, 1, 1, 1]}
    for name, value in {**defaults, **fields}.items():
        header[name] = value
    return header.binaryblock + bytes(4) + values.astype(values.dtype.newbyteorder(order)).tobytes()


def text_headed(*lines: str) -> bytes:
    """A header of text, as of NRRD and MetaImage files."""
    return ("\n".join(lines) + "\n").encode()


def meta(values: np.ndarray, data_file: str = "LOCAL", **fields: Any) -> bytes:
    """A MetaImage file; without its values where `data_file` is another."""
    given = {"DimSize": " ".join(map(str, values.shape[::-1])), "ElementSpacing": "0.8 0.9 3", **fields}
    lines = [f"{key} = {value}" for key, value in given.items()]
    header = text_headed(
        "ObjectType = Image", "NDims = 3", *lines, "ElementType = MET_SHORT", f"ElementDataFile = {data_file}"
    )
    return header + (values.tobytes() if data_file == "LOCAL" else b"")


def packed_meta(values: np.ndarray, cut: int = 0, **fields: Any) -> bytes:
    """A MetaImage file whose values are compressed, without the last `cut` bytes of these."""
    packed = zlib.compress(values.tobytes())
    packed = packed[: len(packed) - cut]
    sizes = {"CompressedData": "True", "CompressedDataSize": len(packed), "DimSize": "20 24 4"}
    return meta(values[:0], **sizes, **fields) + packed


def nrrd(values: np.ndarray, *lines: str, sizes: str = "20 24 4", encoding: str = "raw") -> bytes:
    """A NRRD file with values of 16 bits; `lines` are more of its header."""
    fields = ("type: short", "dimension: 3", f"sizes: {sizes}", f"encoding: {encoding}", "endian: little")
    return text_headed("NRRD0004", *fields, *lines, "") + values.tobytes()


@dataclass
class DataSet:
    """A data set that is being written."""

    path: Path
    training: list[Any] = field(default_factory=list)

    def write(self, name: str, content: bytes) -> Path:
        """Write a file, through gzip where its name says so; the path is below the data set's folder."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(content, 1, mtime=0) if name.endswith(".gz") else content)
        return file

    def add(
        self, name: str, content: bytes | None, *, label_content: bytes | None = None, packed: bool = True
    ) -> Path:
        """Add a case: its image `name` (not written where `content` is None) and a label map of the usual shape.

        `packed`: whether a name with `.gz` is compressed here.
        """
        file = self.path / "imagesTr" / name
        if content is not None:
            file = self.write(f"imagesTr/{name}", content)
            if not packed:
                file.write_bytes(content)
        label_name = f"labelsTr/{len(self.training)}.nii.gz"
        self.write(label_name, nifti(label()) if label_content is None else label_content)
        self.training.append({"image": f"./imagesTr/{name}", "label": f"./{label_name}"})
        return file

    def finish(self) -> None:
        """Write dataset.json."""
        (self.path / "imagesTr").mkdir(parents=True, exist_ok=True)
        declared = {
            "name": "Task98_Corrupt",
            "modality": {"0": "MRI"},
            "labels": {"0": "background", "1": "left", "2": "right"},
            "training": self.training,
        }
        (self.path / "dataset.json").write_text(json.dumps(declared))


@dataclass(frozen=True)
class Kind:
    """One way in which an input is corrupt or odd."""

    write: Callable[[DataSet, str], Any]
    """Adds the case with the given name to a data set."""
    reason: str = ""
    """What the reason of the failed case must hold; empty for an odd case that is valid."""
    case_id: str = ""
    """Id of its row, where that is not the name of the kind; `{place}` stands for its place in the list."""
    values: np.ndarray | None = None
    """(z, y, x) of a case that is valid."""


FAILING: dict[str, Kind] = {}
VALID: dict[str, Kind] = {}


def write_data_set(path: Path, kinds: Iterable[str] | None = None) -> dict[str, tuple[str, str]]:
    """Write a data set with three good cases and one of every kind named (default: all).

    Returns of every case, by its id, the kind (`good` of the good ones) and the text that the reason of its failure
    must hold, empty where the case must be computed.
    """
    data_set = DataSet(path)
    expected = {}
    for seed in range(3):
        data_set.add(f"good_{seed}.nii.gz", nifti(image(seed)))
        expected[f"good_{seed}"] = ("good", "")
    known = {**FAILING, **VALID}
    for name in known if kinds is None else kinds:
        kind = known[name]
        expected[(kind.case_id or name).format(place=len(data_set.training))] = (name, kind.reason)
        kind.write(data_set, name)
    data_set.finish()
    return expected


# ---- ways to write a case


def _as_nifti(values: np.ndarray | None = None, **fields: Any) -> Callable[[DataSet, str], None]:
    def write(data_set: DataSet, name: str) -> None:
        data_set.add(f"{name}.nii.gz", nifti(image() if values is None else values, **fields))

    return write


def _as_file(suffix: str, content: bytes) -> Callable[[DataSet, str], None]:
    """The bytes as they are."""
    return lambda data_set, name: data_set.add(name + suffix, content, packed=False) and None


def _with_label(content: bytes) -> Callable[[DataSet, str], None]:
    return lambda data_set, name: (
        data_set.add(f"{name}.nii.gz", nifti(image()), label_content=content) and None
    )


def _named(file_name: str) -> Callable[[DataSet, str], None]:
    return lambda data_set, name: data_set.add(file_name, nifti(image())) and None


def _listed(entry: Any) -> Callable[[DataSet, str], None]:
    return lambda data_set, name: data_set.training.append(entry)


def _made(make: Callable[[Path], Any]) -> Callable[[DataSet, str], None]:
    """Something else than a file in its place, made by a call with its path."""

    def write(data_set: DataSet, name: str) -> None:
        make(data_set.add(f"{name}.nii.gz", None))

    return write


def _packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def _loop(file: Path) -> None:
    file.symlink_to(file.name)


def _changed_values(index: int, value: float, dtype: str) -> np.ndarray:
    values = image().astype(dtype)
    values.reshape(-1)[index] = value
    return values


def _two_formats(data_set: DataSet, name: str) -> None:
    data_set.add(f"{name}.nii", nifti(image()))
    data_set.add(f"{name}.nii.gz", nifti(image(1)))


def _listed_twice(data_set: DataSet, name: str) -> None:
    data_set.add(f"{name}.nii.gz", nifti(image()))
    data_set.training.append(data_set.training[-1])


def _pair(values: np.ndarray | None) -> Callable[[DataSet, str], None]:
    """A header and its values in a file of their own, or None for none."""

    def write(data_set: DataSet, name: str) -> None:
        content = nifti(image() if values is None else values, magic=b"ni1", vox_offset=0)
        data_set.add(f"{name}.hdr", content[:348])
        if values is not None:
            data_set.write(f"imagesTr/{name}.img", content[352:])

    return write


# ---- what must fail

_SHEARED = {
    "qform_code": 0,
    "sform_code": 1,
    "srow_x": [1, 0.5, 0, 0],
    "srow_y": [0, 1, 0, 0],
    "srow_z": [0, 0, 3, 0],
}
_ORIGIN = {"qoffset_x": 5.0}
# What NIfTI's default orientation is in the other formats, whose x and y axes point the other way.
_STRAIGHT = {"TransformMatrix": "-1 0 0 0 -1 0 0 0 1"}
_SPACE = ("space: left-posterior-superior", "space directions: (-0.8,0,0) (0,-0.9,0) (0,0,3)")
_SWAPPED = bytearray(nifti(image()))
_SWAPPED[:4] = _SWAPPED[3::-1]
_RANDOM = np.random.default_rng(0).integers(-32768, 32767, SHAPE, np.int16)
_HUGE = {"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}
_TOO_LITTLE = "bytes of voxels where the header asks for"
_COLOURS = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])

FAILING |= {
    # files
    "truncated_gzip": Kind(_as_file(".nii.gz", _packed(nifti(_RANDOM))[:-900]), "damaged"),
    "truncated_nii": Kind(
        _as_file(".nii", nifti(image())[:-900]), "2,940 bytes of voxels where the header asks for 3,840"
    ),
    "wrong_checksum": Kind(
        _as_file(".nii.gz", _packed(nifti(image()))[:-8] + struct.pack("<2I", 1, 352 + 2 * image().size)),
        "CRC",
    ),
    "garbage_behind_gzip": Kind(_as_file(".nii.gz", _packed(nifti(image())) + b"garbage"), "damaged"),
    "zero_bytes": Kind(_as_file(".nii.gz", b""), "0 bytes"),
    "text": Kind(_as_file(".nii", b"not a volume"), "content that starts with b'not a volume'"),
    "html_page": Kind(
        _as_file(".nii.gz", b"<!DOCTYPE html><html>404" + bytes(500)), "starts with b'<!DOCTYPE html>"
    ),
    "missing": Kind(_made(lambda file: None), "does not exist"),
    "dangling_link": Kind(_made(lambda file: file.symlink_to("gone.nii.gz")), "link leads nowhere"),
    "link_loop": Kind(_made(_loop), "link leads back to itself"),
    "folder": Kind(_made(Path.mkdir), "expected a file, found a folder"),
    "pipe": Kind(_made(os.mkfifo), "expected a file, found a pipe"),
    "device": Kind(_made(lambda file: file.symlink_to("/dev/zero")), "expected a file, found a device"),
    "no_suffix": Kind(_as_file(".txt", b"notes"), "name is not that of a volume", "no_suffix.txt"),
    # headers of NIfTI
    "wrong_magic": Kind(_as_nifti(magic=b"abc"), "the magic b'abc'"),
    "nifti_2": Kind(_as_file(".nii", struct.pack("<i", 540) + bytes(600)), "NIfTI-2 is not supported"),
    "half_swapped_header": Kind(_as_file(".nii", bytes(_SWAPPED)), "dimensions"),
    "nine_dimensions": Kind(_as_nifti(dim=[9, 20, 24, 4, 1, 1, 1, 1]), "9 dimensions"),
    "zero_dimension": Kind(_as_nifti(dim=[3, 20, 0, 4, 1, 1, 1, 1]), "The volume is empty"),
    "negative_dimension": Kind(_as_nifti(dim=[3, 20, -24, -4, 1, 1, 1, 1]), "a shape of (-4, -24, 20)"),
    "more_values_than_declared": Kind(
        _as_nifti(image(0, (20, 24, 20)), dim=[3, 20, 24, 4, 1, 1, 1, 1]), "more values than"
    ),
    "huge_nii": Kind(_as_file(".nii", nifti(image(), **_HUGE)), _TOO_LITTLE),
    "huge_nii_gz": Kind(_as_nifti(**_HUGE), _TOO_LITTLE),
    "wrong_bits": Kind(_as_nifti(bitpix=64), "64 bits a voxel for int16"),
    "unknown_type": Kind(_as_nifti(datatype=77), "77"),
    "single_bits": Kind(_as_nifti(datatype=1, bitpix=1), "type is not supported"),
    "extended_floats": Kind(_as_nifti(datatype=1536, bitpix=128), "type is not supported"),
    "values_far_away": Kind(_as_nifti(vox_offset=1e15), "from byte 999,999,986,991,104 on"),
    "values_nowhere": Kind(_as_nifti(vox_offset=np.nan), "damaged"),
    "zero_spacing": Kind(_as_nifti(pixdim=[1, 0, 1, 1, 1, 1, 1, 1]), "spacing (x, y, z) of (0.0, 1.0, 1.0)"),
    "negative_spacing": Kind(
        _as_nifti(pixdim=[1, 1, 1, -3, 1, 1, 1, 1]), "spacing (x, y, z) of (1.0, 1.0, -3.0)"
    ),
    "nan_spacing": Kind(
        _as_nifti(pixdim=[1, 1, np.nan, 1, 1, 1, 1, 1]), "spacing (x, y, z) of (1.0, nan, 1.0)"
    ),
    "sheared": Kind(_as_nifti(**_SHEARED), "axes are not perpendicular"),
    "nan_orientation": Kind(_as_nifti(quatern_b=np.nan), "NaN or infinite"),
    # other formats
    "huge_nrrd": Kind(_as_file(".nrrd", nrrd(image(), sizes="9999 9999 9999")), _TOO_LITTLE),
    "huge_gzip_nrrd": Kind(
        _as_file(".nrrd", nrrd(image(), sizes="99999 9999 9999", encoding="gzip")), _TOO_LITTLE
    ),
    "nrrd_elsewhere": Kind(
        _as_file(".nrrd", nrrd(image(), "data file: /etc/hostname")), "takes its values from elsewhere"
    ),
    "sheared_nrrd": Kind(
        _as_file(".nrrd", nrrd(image(), "space dimension: 3", "space directions: (1,0,0) (0.5,1,0) (0,0,1)")),
        "axes are not perpendicular",
    ),
    "huge_mha": Kind(_as_file(".mha", meta(image(), DimSize="99999 99999 99999")), _TOO_LITTLE),
    "huge_packed_mha": Kind(
        _as_file(".mha", meta(image(), CompressedData="True", CompressedDataSize=10**15)),
        "'1000000000000000' bytes of compressed values",
    ),
    "truncated_packed_mha": Kind(
        _as_file(".mha", packed_meta(image(), 40)), "compressed values that end too early"
    ),
    "negative_spacing_mha": Kind(
        _as_file(".mha", meta(image(), ElementSpacing="1 -1 1")), "spacing (x, y, z) of"
    ),
    "mhd_above": Kind(_as_file(".mhd", meta(image(), "../secret.raw")), "takes its values from elsewhere"),
    "mhd_absolute": Kind(_as_file(".mhd", meta(image(), "/etc/hostname")), "takes its values from elsewhere"),
    "mhd_list": Kind(
        _as_file(".mhd", meta(image(), "LIST\n1.raw\n2.raw")), "takes its values from elsewhere"
    ),
    "mhd_without_values": Kind(_as_file(".mhd", meta(image(), "gone.raw")), "does not exist"),
    "hdr_without_img": Kind(_pair(None), "does not exist"),
    "hdr_img_nan": Kind(_pair(_changed_values(7, np.nan, "f4")), "NaN or infinite"),
    # values
    "nan": Kind(
        _as_nifti(_changed_values(7, np.nan, "f4")), "1 such voxels, the first at (c, z, y, x) = (0, 0, 0, 7)"
    ),
    "infinite": Kind(_as_nifti(_changed_values(7, -np.inf, "f8")), "NaN or infinite"),
    "infinite_slope": Kind(_as_nifti(scl_slope=3e38), "NaN or infinite"),
    "beyond_float32": Kind(_as_nifti(_changed_values(7, 1e300, "f8")), "beyond single precision"),
    "outlier_1e30": Kind(_as_nifti(_changed_values(7, 1e30, "f8")), "A few values are so large"),
    "far_from_zero": Kind(
        _as_nifti(image().astype(np.int64) + 2**62), "cannot tell the volume's values apart"
    ),
    "complex": Kind(_as_nifti(image().astype(np.complex64)), "complex"),
    "colours": Kind(_as_nifti(_COLOURS), "expected 1, found 3 in shape"),
    "time_series": Kind(_as_nifti(np.stack([image(), image(1)])), "expected 1, found 2 in shape"),
    "five_axes": Kind(_as_nifti(np.zeros((2, 2, *SHAPE), np.int16)), "more axes"),
    # label maps
    "label_missing": Kind(
        lambda data_set, name: (
            data_set.add(f"{name}.nii.gz", nifti(image())),
            data_set.training[-1].update(label="./labelsTr/gone.nii.gz"),
        ),
        "gone.nii.gz",
    ),
    "label_0.9999": Kind(_with_label(nifti(label() * np.float32(0.9999))), "found [0.9998999834060669"),
    "label_not_declared": Kind(
        _with_label(nifti(label() + np.uint8(1))), "expected integers from 0 to 2, found [3]"
    ),
    "label_negative": Kind(_with_label(nifti(label().astype(np.int16) - 1)), "found [-1]"),
    "label_nan": Kind(_with_label(nifti(_changed_values(0, np.nan, "f4"))), "NaN or infinite"),
    "label_shape": Kind(
        _with_label(nifti(label((4, 20, 24)))), "expected (z, y, x) = (4, 24, 20), found (4, 20, 24)"
    ),
    "label_channels": Kind(_with_label(nifti(np.stack([label(), label()]))), "found (2, 4, 24, 20)"),
    "label_spacing": Kind(
        _with_label(nifti(label(), pixdim=[1] * 8)), "spacing_mm [1.0, 1.0, 1.0] instead of"
    ),
    "label_origin": Kind(_with_label(nifti(label(), **_ORIGIN)), "origin_mm [-5.0, 0.0, 0.0] instead of"),
    "label_direction": Kind(_with_label(nifti(label(), quatern_d=1.0)), "direction ["),
    # names
    "two_formats": Kind(_two_formats, "imagesTr/two_formats.nii and imagesTr/two_formats.nii.gz"),
    "listed_twice": Kind(_listed_twice, "Several entries would become the case 'listed_twice'"),
    "newline": Kind(
        _named("new\nline.nii.gz"), "'./imagesTr/new\\nline.nii.gz'", "imagesTr_new_nline.nii.gz"
    ),
    "terminal_codes": Kind(_named("\x1b[31m.nii.gz"), "\\x1b[31m", "imagesTr__x1b[31m.nii.gz"),
    "not_utf_8": Kind(_named("\udcff.nii.gz"), "\\udcff", "imagesTr__udcff.nii.gz"),
    "dots": Kind(_named("...nii.gz"), "keeps for itself", "imagesTr_...nii.gz"),
    "hidden": Kind(_named("._hidden.nii.gz"), "keeps for itself", "imagesTr_._hidden.nii.gz"),
    "name_of_250_bytes": Kind(
        _named("é" * 121 + "n.nii.gz"), "longer than 200 bytes", "imagesTr_" + "é" * 70
    ),
    # entries of dataset.json
    "entry_absolute": Kind(
        _listed({"image": "/etc/hostname.nii.gz", "label": "./labelsTr/0.nii.gz"}),
        "leads outside",
        "hostname",
    ),
    "entry_above": Kind(
        _listed({"image": "../above.nii.gz", "label": "./labelsTr/0.nii.gz"}), "leads outside", "above"
    ),
    "entry_label_above": Kind(
        _listed({"image": "./imagesTr/inside.nii.gz", "label": "../0.nii.gz"}),
        "The label in dataset.json leads outside",
        "inside",
    ),
    "entry_too_long": Kind(
        _listed({"image": "./imagesTr/long.nii.gz", "label": "x" * 300}), "is no path of a file", "long"
    ),
    "entry_number": Kind(_listed(7), "does not name the image", "training-{place}"),
    "entry_without_image": Kind(
        _listed({"label": "./labelsTr/0.nii.gz"}), "found nothing", "training-{place}"
    ),
    "entry_list": Kind(
        _listed({"image": ["a"], "label": "./labelsTr/0.nii.gz"}), "found ['a']", "training-{place}"
    ),
}


# ---- what is odd and must be computed

_HALVES = [_packed(part) for part in (nifti(image())[:1000], nifti(image())[1000:])]


def _mhd(data_set: DataSet, name: str) -> None:
    data_set.add(f"{name}.mhd", meta(image(), f"{name}.raw", **_STRAIGHT))
    data_set.write(f"imagesTr/{name}.raw", image().tobytes())


def _other_shape(shape: tuple[int, ...]) -> Kind:
    def write(data_set: DataSet, name: str) -> None:
        data_set.add(f"{name}.nii.gz", nifti(image(0, shape)), label_content=nifti(label(shape)))

    return Kind(write, values=image(0, shape))


def _linked(data_set: DataSet, name: str) -> None:
    data_set.write(f"elsewhere/{name}.nii.gz", nifti(image()))
    data_set.add(f"{name}.nii.gz", None).symlink_to(f"../elsewhere/{name}.nii.gz")


VALID |= {
    "big_endian": Kind(_as_nifti(order=">"), values=image()),
    "no_orientation": Kind(_as_nifti(qform_code=0), values=image()),
    "int64": Kind(_as_nifti(image().astype(np.int64) * 10**6), values=image() * np.float32(10**6)),
    "uint64": Kind(_as_nifti(image().astype(np.uint64)), values=image()),
    "float64": Kind(_as_nifti(image() / 7), values=(image() / 7).astype(np.float32)),
    "bytes": Kind(_as_nifti((image() // 4).astype(np.uint8)), values=image() // 4),
    "one_slice": _other_shape((1, 24, 20)),
    "one_column": _other_shape((4, 24, 1)),
    "one_voxel": _other_shape((1, 1, 1)),
    "constant": Kind(_as_nifti(image() * 0), values=image() * 0),
    "empty_label": Kind(_with_label(nifti(label() * np.uint8(0))), values=image()),
    "label_in_floats": Kind(_with_label(nifti(label().astype(np.float32))), values=image()),
    "label_nearly_there": Kind(_with_label(nifti(label(), qoffset_x=0.01)), values=image()),
    "two_gzip_members": Kind(_as_file(".nii.gz", b"".join(_HALVES)), values=image()),
    "gzip_named_nii": Kind(_as_file(".nii", _packed(nifti(image()))), values=image()),
    "nii_named_gzip": Kind(_as_file(".nii.gz", nifti(image())), values=image()),
    "nan_slope": Kind(_as_nifti(scl_slope=np.nan, scl_inter=np.nan), values=image()),
    "zero_slope": Kind(_as_nifti(scl_slope=0, scl_inter=9), values=image() + 9),
    "negative_slope": Kind(_as_nifti(scl_slope=-2), values=image() * -2),
    "odd_display_range": Kind(_as_nifti(cal_max=np.nan, cal_min=1e30), values=image()),
    "hdr_img": Kind(_pair(image()), values=image()),
    "nrrd": Kind(_as_file(".nrrd", nrrd(image(), *_SPACE)), values=image()),
    "mhd": Kind(_mhd, values=image()),
    "packed_mha": Kind(_as_file(".mha", packed_meta(image(), **_STRAIGHT)), values=image()),
    "link": Kind(_linked, values=image()),
    "größe 2 – 患者": Kind(_named("größe 2 – 患者.nii.gz"), values=image()),
}
