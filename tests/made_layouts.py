"""Small phantoms written in the layout of every kind of folder and public data set that SuperCL reads.

`write(name, path)` writes a few cases with all classes, and gives back what reading them must give.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import made_dicom
import numpy as np
import SimpleITK as sitk
from PIL import Image
from scipy.ndimage import gaussian_filter

Case = tuple[np.ndarray, np.ndarray | None]
"""Image (c, z, y, x) and classes, uint8 (z, y, x)."""

SHAPE: Final = (4, 40, 36)


def write(name: str, path: Path, num_cases: int = 3) -> dict[str, Case]:
    """Write `num_cases` cases in the layout `name` into the folder `path`; gives the cases by their ids."""
    return WRITERS[name](path, num_cases)


def phantom(index: int, num_classes: int, num_channels: int = 1, shape: tuple[int, ...] = SHAPE) -> Case:
    """Blobs: int16 (c, z, y, x) from 0 to about 1000, and their classes, all of which are there."""
    generator = np.random.default_rng(index)
    field = gaussian_filter(generator.normal(size=shape), (0, 4, 4))
    edges = np.quantile(field, np.linspace(0.5, 1, num_classes)[:-1])
    label = np.digitize(field, edges).astype(np.uint8)
    image = np.stack(
        [300.0 * label + generator.normal(100, 20, shape) * (c + 1) for c in range(num_channels)]
    )
    return image.clip(0).astype(np.int16), label


def write_nifti(path: Path, array_ZYX: np.ndarray) -> None:
    """A volume with the spacing (x, y, z) = (0.8, 0.9, 3) mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array_ZYX)
    image.SetSpacing((0.8, 0.9, 3.0))
    sitk.WriteImage(image, str(path))


def write_picture(path: Path, array: np.ndarray) -> None:
    """A grey (y, x) or RGB (y, x, 3) image of bytes, in the format of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_dataset_json(path: Path, **declared: object) -> None:
    """A dataset.json in the folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "dataset.json").write_text(json.dumps(declared))


def _valued(label_ZYX: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """The label map as a data set stores it, int16: the value of each class."""
    return np.array(values, np.int16)[label_ZYX]


def _volumes(
    image: str, label: str, ids: str, values: Sequence[int], channels: Sequence[str] = ("",), first: int = 1
) -> Callable[[Path, int], dict[str, Case]]:
    """What writes NIfTI files whose names are made of a number and, of images, a channel."""

    def write_all(path: Path, num_cases: int) -> dict[str, Case]:
        cases = {}
        for number in range(first, first + num_cases):
            case = phantom(number, len(values), len(channels))
            assert case[1] is not None
            for channel, array_ZYX in zip(channels, case[0], strict=True):
                write_nifti(path / image.format(number, channel), array_ZYX)
            write_nifti(path / label.format(number), _valued(case[1], values))
            cases[ids.format(number)] = case
        return cases

    return write_all


def _acdc(path: Path, num_cases: int) -> dict[str, Case]:
    place = "training/patient{0:03}/patient{0:03}_frame01"
    cases = _volumes(f"{place}.nii.gz", f"{place}_gt.nii.gz", "patient{:03}_frame01", range(4))(
        path, num_cases
    )
    for number in range(1, num_cases + 1):
        write_nifti(
            path / f"training/patient{number:03}/patient{number:03}_4d.nii.gz", np.zeros(SHAPE, np.int16)
        )
        (path / f"training/patient{number:03}/Info.cfg").write_text("ED: 1\n")
    return cases


def decathlon(name: str, modality: str, *classes: str) -> Callable[[Path, int], dict[str, Case]]:
    """What writes a task of the Decathlon; `classes`: but for the background."""

    def write_all(path: Path, num_cases: int) -> dict[str, Case]:
        place = f"{{}}sTr/{name.lower()}_{{:03}}.nii.gz"
        write_dataset_json(
            path,
            name=name,
            modality={"0": modality},
            labels={str(number): label for number, label in enumerate(("background", *classes))},
            training=[
                {part: f"./{place.format(part, number)}" for part in ("image", "label")}
                for number in range(1, num_cases + 1)
            ],
            test=[],
        )
        image, label = (place.replace("{}", part, 1) for part in ("image", "label"))
        return _volumes(image, label, f"{name.lower()}_{{:03}}", range(len(classes) + 1))(path, num_cases)

    return write_all


def _nnunet(path: Path, num_cases: int) -> dict[str, Case]:
    write_dataset_json(
        path,
        channel_names={"0": "T1", "1": "T2"},
        labels={"background": 0, "organ": 1, "tumour": 2},
        file_ending=".nii.gz",
        numTraining=num_cases,
    )
    images, labels = "imagesTr/case_{:03}_{}.nii.gz", "labelsTr/case_{:03}.nii.gz"
    return _volumes(images, labels, "case_{:03}", range(3), ("0000", "0001"))(path, num_cases)


def _isic(path: Path, num_cases: int) -> dict[str, Case]:
    cases = {}
    for number in range(num_cases):
        image, label = phantom(number, 2, 3, (1, 40 + 4 * number, 36))
        assert label is not None
        image = (image / 8).clip(0, 255).astype(np.uint8)
        name = f"ISIC_{number:07}"
        write_picture(
            path / f"ISIC2018_Task1-2_Training_Input/{name}.png", np.moveaxis(image[:, 0], 0, -1).copy()
        )
        truth = path / "ISIC2018_Task1_Training_GroundTruth"
        write_picture(truth / f"{name}_segmentation.png", label[0] * np.uint8(255))
        write_picture(truth / f"{name}_attribute_streaks.png", label[0] * np.uint8(255))
        (truth / "LICENSE.txt").write_text("CC-0")
        cases[name] = (image, label)
    return cases


def _images(path: Path, num_cases: int) -> dict[str, Case]:
    cases = {}
    for number in range(num_cases):
        image, label = phantom(number, 2, 1, (1, 40, 36 + 4 * number))
        assert label is not None
        image = (image / 8).clip(0, 255).astype(np.uint8)
        write_picture(path / f"images/photo_{number}.bmp", image[0, 0])
        write_picture(path / f"masks/photo_{number}_mask.png", label[0] * np.uint8(255))
        cases[f"photo_{number}"] = (image, label)
    return cases


def _arrays(path: Path, num_cases: int) -> dict[str, Case]:
    write_dataset_json(path, labels={"background": 0, "liver": 1, "spleen": 2})
    cases = {}
    for number in range(num_cases):
        image, label = phantom(number, 3)
        np.savez_compressed(path / f"case_{number}.npz", image=image[0], label=label)
        cases[f"case_{number}"] = (image, label)
    return cases


def _bids(path: Path, num_cases: int) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for number in range(1, num_cases + 1):
        image, _ = phantom(number, 2)
        name = f"sub-{number:02}_ses-1_T1w"
        write_nifti(path / f"sub-{number:02}/ses-1/anat/{name}.nii.gz", image[0])
        write_nifti(path / f"sub-{number:02}/ses-1/anat/{name}_brain_mask.nii.gz", image[0])
        write_nifti(path / f"sub-{number:02}/ses-1/anat/{name}_label-lesion_roi.nii.gz", image[0])
        write_nifti(path / f"sub-{number:02}/ses-1/func/sub-{number:02}_bold.nii.gz", image[0])
        write_nifti(path / f"derivatives/x/sub-{number:02}/anat/{name}.nii.gz", image[0])
        cases[name] = (image, None)
    (path / "dataset_description.json").write_text("{}")
    return cases


def _dicom(path: Path, num_cases: int) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for number in range(num_cases):
        image, _ = phantom(number, 2)
        made_dicom.series(path / f"study_{number}", image[0], uid=f"1.2.3.{number + 1}")
        cases[f"study_{number}_series_5"] = (image, None)
    return cases


def _plain(path: Path, num_cases: int) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for number in range(num_cases):
        image, _ = phantom(number, 2)
        write_nifti(path / f"site/scan_{number}.nii.gz", image[0])
        cases[f"site_scan_{number}"] = (image, None)
    return cases


def _chaos(path: Path, num_cases: int) -> dict[str, Case]:
    cases = {}
    for number in range(1, num_cases + 1):
        for sequence, images in (("T2SPIR", "DICOM_anon"), ("T1DUAL", "DICOM_anon/InPhase")):
            image, label = phantom(number + len(images), 5)
            assert label is not None
            place = path / f"Train_Sets/MR/{number}/{sequence}"
            files = made_dicom.series(
                place / images, image[0], names="IMG-0004-{:05d}.dcm", uid=f"1.2.77.{number}", modality="MR"
            )
            for file, label_YX in zip(files, label, strict=True):
                write_picture(place / f"Ground/{file.stem}.png", (label_YX * 63).astype(np.uint8))
            cases[f"patient{number}_{sequence.lower()}"] = (image, label)
        made_dicom.series(
            path / f"Train_Sets/MR/{number}/T1DUAL/DICOM_anon/OutPhase",
            image[0],
            names="IMG-0003-{:05d}.dcm",
        )
        write_picture(path / f"Train_Sets/CT/{number}/Ground/liver_GT_000.png", np.zeros((8, 8), np.uint8))
    return cases


_MMWHS_VALUES: Final = (0, 205, 420, 500, 550, 600, 820, 850)

WRITERS: Final[Mapping[str, Callable[[Path, int], dict[str, Case]]]] = {
    "nnunet": _nnunet,
    "msd": decathlon("Heart", "MRI", "left atrium"),
    "bids": _bids,
    "chd": _volumes("ct_{:04}_image.nii.gz", "ct_{:04}_label.nii.gz", "ct_{:04}", range(8), first=1001),
    "brats2018": _volumes(
        "HGG/Brats18_TCIA_{0}_1/Brats18_TCIA_{0}_1_{1}.nii.gz",
        "HGG/Brats18_TCIA_{0}_1/Brats18_TCIA_{0}_1_seg.nii.gz",
        "Brats18_TCIA_{}_1",
        (0, 1, 2, 4),
        ("flair", "t1", "t1ce", "t2"),
    ),
    "kits2019": _volumes(
        "data/case_{:05}/imaging.nii.gz", "data/case_{:05}/segmentation.nii.gz", "case_{:05}", range(3)
    ),
    "acdc": _acdc,
    "mmwhs": _volumes(
        "ct_train/ct_train_{}_image.nii.gz",
        "ct_train/ct_train_{}_label.nii.gz",
        "patient{}",
        _MMWHS_VALUES,
        first=1001,
    ),
    "mmwhs-mr": _volumes(
        "mr_train/mr_train_{}_image.nii.gz",
        "mr_train/mr_train_{}_label.nii.gz",
        "patient{}",
        _MMWHS_VALUES,
        first=1001,
    ),
    "hvsmr": _volumes(
        "Training dataset/training_axial_full_pat{}.nii.gz",
        "Ground truth/training_axial_full_pat{}-label.nii.gz",
        "patient{}_axial_full",
        range(3),
        first=0,
    ),
    "isic2018": _isic,
    "chaos": _chaos,
    "dicom": _dicom,
    "images": _images,
    "arrays": _arrays,
    "plain": _plain,
}
"""Of every layout, what writes it."""
