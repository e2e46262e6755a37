"""Public data sets of the publication as they are distributed, known by the names of their files.

Files are found by their names wherever they lie below the folder, so that it does not matter how an archive was
unpacked. A case of a data set with published split lists is named `patientN`, N being the key in these lists.
MSD Heart, Hippocampus and Spleen are tasks of the Decathlon (`sources.msd`); CHAOS is DICOM (`sources.chaos`).

ct_1001_image.nii.gz, ct_1001_label.nii.gz                                    chd        (ImageCHD)
HGG/BRATS/BRATS_flair.nii.gz, _t1, _t1ce, _t2, _seg                           brats2018
case_00000/imaging.nii.gz, segmentation.nii.gz                                kits2019
patient001/patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz            acdc
ct_train_1001_image.nii.gz, ct_train_1001_label.nii.gz                        mmwhs, mmwhs-mr
training_axial_full_pat0.nii.gz, training_axial_full_pat0-label.nii.gz        hvsmr
ISIC_0000000.jpg, ISIC_0000000_segmentation.png                               isic2018
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from supercl_core.sources.base import DataSource
from supercl_core.sources.pairs import paired
from supercl_core.sources.walk import walk

_NIFTI = r"\.nii(?:\.gz)?"


@dataclass(frozen=True, kw_only=True)
class NamedLayout:
    """A public data set. Patterns are regular expressions that the end of a file's path matches."""

    NAME: str
    data_set: str
    """Its name in the published split lists."""
    files: str
    """What its files are called, for people."""
    image: str
    """Pattern with groups: those that `case_id` names and, where a channel is a file, `channel`."""
    label: str
    """Pattern with the groups that `case_id` names."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """What other files of the data set are, which are neither, by a pattern of their names."""
    case_id: str = "{case}"
    channels: Mapping[str, str]
    """Name of each channel by what stands for it in a file's name, which is nothing where all are in one file."""
    channel_names: tuple[str, ...] = ()
    """Where all channels are in one file."""
    class_names: tuple[str, ...]
    label_classes: Mapping[int, int] | None = None

    @property
    def EXPECTED(self) -> str:
        return f"{self.NAME}: {self.files}"

    def matches(self, path: Path, files: Sequence[Path]) -> bool:
        """Whether any of these files below `path` is called like an image of this data set."""
        return any(self._find(self.image, path, file) for file in files)

    def read(self, path: Path) -> DataSource:
        """Every case of this data set below `path`; what is missing or there twice is a problem of its case."""
        files, unreadable = walk(path)
        images, labels = [], []
        left_out: dict[Path, str] = {}
        for file in files:
            if found := self._find(self.image, path, file):
                groups = found.groupdict()
                images.append((self.case_id.format(**groups), groups.get("channel", ""), file))
            elif found := self._find(self.label, path, file):
                labels.append((self.case_id.format(**found.groupdict()), file))
            else:
                left_out.update(
                    (file, what) for pattern, what in self.left_out.items() if self._find(pattern, path, file)
                )
        cases = paired(path, images, labels, channels=self.channels, label_classes=self.label_classes)
        return DataSource(
            name=self.data_set,
            cases=(*cases, *unreadable),
            channel_names=self.channel_names or tuple(self.channels.values()),
            class_names=self.class_names,
            left_out=left_out,
        )

    @staticmethod
    def _find(pattern: str, path: Path, file: Path) -> re.Match[str] | None:
        return re.search(rf"(?:^|/){pattern}\Z", file.relative_to(path).as_posix())


LAYOUTS: Final = (
    NamedLayout(
        NAME="chd",
        data_set="CHD",
        files="ct_1001_image.nii.gz, ct_1001_label.nii.gz (ImageCHD)",
        image=rf"(?P<case>ct_\d{{4}})_image{_NIFTI}",
        label=rf"(?P<case>ct_\d{{4}})_label{_NIFTI}",
        channels={"": "CT"},
        # Xu et al., ImageCHD (MICCAI 2020); numbers as in public code, as we have not seen the data. What is above 7
        # counts as background in the code of Zeng et al., Positional Contrastive Learning (MICCAI 2021).
        class_names=(
            "background",
            "left ventricle",
            "right ventricle",
            "left atrium",
            "right atrium",
            "myocardium",
            "aorta",
            "pulmonary artery",
        ),
        label_classes={value: value if value <= 7 else 0 for value in range(256)},
    ),
    NamedLayout(
        NAME="brats2018",
        data_set="BraTS2018",
        files="BRATS_flair.nii.gz, _t1, _t1ce, _t2 and _seg, in a folder for each case (BraTS 2018)",
        image=rf"(?P<case>Brats18_\w+?)_(?P<channel>flair|t1|t1ce|t2){_NIFTI}",
        label=rf"(?P<case>Brats18_\w+?)_seg{_NIFTI}",
        channels={"flair": "FLAIR", "t1": "T1", "t1ce": "T1ce", "t2": "T2"},
        # med.upenn.edu/sbia/brats2018/tasks.html
        class_names=("background", "necrotic and non-enhancing tumour", "oedema", "enhancing tumour"),
        label_classes={0: 0, 1: 1, 2: 2, 4: 3},
    ),
    NamedLayout(
        NAME="kits2019",
        data_set="KiTS2019",
        files="case_00000/imaging.nii.gz, case_00000/segmentation.nii.gz (KiTS 2019)",
        image=rf"(?P<case>case_\d{{5}})/imaging{_NIFTI}",
        label=rf"(?P<case>case_\d{{5}})/segmentation{_NIFTI}",
        channels={"": "CT"},
        class_names=("background", "kidney", "tumour"),  # github.com/neheller/kits19
    ),
    NamedLayout(
        NAME="acdc",
        data_set="ACDC",
        files="patient001/patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz (ACDC)",
        image=rf"(?P<case>patient\d{{3}}_frame\d{{2}}){_NIFTI}",
        label=rf"(?P<case>patient\d{{3}}_frame\d{{2}})_gt{_NIFTI}",
        left_out={rf"patient\d{{3}}_4d{_NIFTI}": "all frames of a patient, most of them without labels"},
        channels={"": "MRI"},
        # Bernard et al., IEEE TMI 37 (2018) 2514-2525
        class_names=("background", "right ventricle", "myocardium", "left ventricle"),
    ),
    *(
        NamedLayout(
            NAME=name,
            data_set=data_set,
            files=f"{kind}_train_1001_image.nii.gz, {kind}_train_1001_label.nii.gz (MM-WHS 2017, {modality})",
            image=rf"{kind}_(?:train|test)_(?P<case>\d{{4}})_image{_NIFTI}",
            label=rf"{kind}_(?:train|test)_(?P<case>\d{{4}})_label{_NIFTI}",
            case_id="patient{case}",
            channels={"": modality},
            # Zhuang and Shen, Medical Image Analysis 31 (2016) 77-87. The order of the classes is that of the code of
            # Zeng et al. (MICCAI 2021). 421 is there in one label map, beside 420.
            class_names=(
                "background",
                "myocardium",
                "left atrium",
                "left ventricle",
                "right atrium",
                "right ventricle",
                "aorta",
                "pulmonary artery",
            ),
            label_classes={0: 0, 205: 1, 420: 2, 421: 2, 500: 3, 550: 4, 600: 5, 820: 6, 850: 7},
        )
        for name, data_set, kind, modality in (
            ("mmwhs", "MMWHS", "ct", "CT"),
            ("mmwhs-mr", "MMWHS-MR", "mr", "MRI"),
        )
    ),
    NamedLayout(
        NAME="hvsmr",
        data_set="HVSMR",
        files="training_axial_full_pat0.nii.gz, training_axial_full_pat0-label.nii.gz (HVSMR 2016)",
        image=rf"(?:training|testing)_(?P<view>axial_full|axial_crop|sa_crop)_pat(?P<case>\d+){_NIFTI}",
        label=rf"(?:training|testing)_(?P<view>axial_full|axial_crop|sa_crop)_pat(?P<case>\d+)-label{_NIFTI}",
        case_id="patient{case}_{view}",
        channels={"": "MRI"},
        # Pace et al., MICCAI 2015; not verified on the data
        class_names=("background", "myocardium", "blood pool"),
    ),
    NamedLayout(
        NAME="isic2018",
        data_set="ISIC2018",
        files="ISIC_0000000.jpg, ISIC_0000000_segmentation.png (ISIC 2018, task 1)",
        image=r"(?P<case>ISIC_\d{7})\.(?:jpg|png)",
        label=r"(?P<case>ISIC_\d{7})_[sS]egmentation\.png",
        left_out={r"ISIC_\d{7}_(?:attribute_\w+|superpixels)\.png": "part of another task of the challenge"},
        channels={"": "RGB"},
        channel_names=("red", "green", "blue"),
        # challenge.isic-archive.com/landing/2018: 8-bit masks of 0 and 255
        class_names=("background", "lesion"),
        label_classes={0: 0, 255: 1},
    ),
)
"""HVSMR's images come in up to three cuts (`axial_full`, `axial_crop`, `sa_crop`); each is a case of its patient."""
