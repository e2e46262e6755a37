"""The eleven data sets of the publication, each as a phantom in its own layout, from its files to scores.

With the published recipes and the authors' form of split lists, through the real command line. That labels come out as
the classes that they are is checked against what was written, in the cache and in the scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import made_layouts
import numpy as np
import pytest
import SimpleITK as sitk
from made_layouts import WRITERS, decathlon

from preprocess import run as preprocess
from supercl_core.cache.reader import open_cache
from train.methods import PRESETS, PretrainConfig
from train.pretraining import pretrain
from train.runs import read_run

SMALL: Final = {"filters": 4, "batch_size": 4, "device": "cpu"}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A data set of the publication."""

    write: Callable[[Path, int], dict[str, made_layouts.Case]]
    section: str
    """Its name in the split lists."""
    keys: tuple[int, int, int] = (0, 1, 2)
    """Of three patients in the split lists; the last is for testing."""
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    """But for the background."""
    in_channels: int
    """Of the network; the publication repeats the one of MRI to 4."""
    pretrained_on: str = ""
    """The publication's match."""
    unit: str = "mm"


CHD_CLASSES: Final = (
    "left ventricle",
    "right ventricle",
    "left atrium",
    "right atrium",
    "myocardium",
    "aorta",
    "pulmonary artery",
)
MMWHS_CLASSES: Final = (
    "myocardium",
    "left atrium",
    "left ventricle",
    "right atrium",
    "right ventricle",
    "aorta",
    "pulmonary artery",
)
DATA_SETS: Final = {
    "CHD": Published(
        write=WRITERS["chd"], section="CHD", channels=("CT",), classes=CHD_CLASSES, in_channels=1
    ),
    "BraTS2018": Published(
        write=WRITERS["brats2018"],
        section="BraTS2018",
        channels=("FLAIR", "T1", "T1ce", "T2"),
        classes=("necrotic and non-enhancing tumour", "oedema", "enhancing tumour"),
        in_channels=4,
    ),
    "KiTS2019": Published(
        write=WRITERS["kits2019"],
        section="KiTS2019",
        channels=("CT",),
        classes=("kidney", "tumour"),
        in_channels=1,
    ),
    "ACDC": Published(
        write=WRITERS["acdc"],
        section="ACDC",
        keys=(1, 2, 3),
        channels=("MRI",),
        classes=("right ventricle", "myocardium", "left ventricle"),
        in_channels=1,
        pretrained_on="CHD",
    ),
    "MM-WHS": Published(
        write=WRITERS["mmwhs"],
        section="MMWHS",
        keys=(1001, 1002, 1003),
        channels=("CT",),
        classes=MMWHS_CLASSES,
        in_channels=1,
        pretrained_on="CHD",
    ),
    "HVSMR": Published(
        write=WRITERS["hvsmr"],
        section="HVSMR",
        channels=("MRI",),
        classes=("myocardium", "blood pool"),
        in_channels=4,
        pretrained_on="BraTS2018",
    ),
    "CHAOS": Published(
        write=WRITERS["chaos"],
        section="CHAOS",
        keys=(1, 2, 3),
        channels=("MRI",),
        classes=("liver", "right kidney", "left kidney", "spleen"),
        in_channels=4,
        pretrained_on="BraTS2018",
    ),
    "MSD Heart": Published(
        write=decathlon("Heart", "MRI", "left atrium"),
        section="MSD-Heart",
        channels=("MRI",),
        classes=("left atrium",),
        in_channels=4,
        pretrained_on="BraTS2018",
    ),
    "MSD Hippocampus": Published(
        write=decathlon("Hippocampus", "MRI", "Anterior", "Posterior"),
        section="MSD-Hippocampus",
        channels=("MRI",),
        classes=("Anterior", "Posterior"),
        in_channels=4,
        pretrained_on="BraTS2018",
    ),
    "MSD Spleen": Published(
        write=decathlon("Spleen", "CT", "spleen"),
        section="MSD-Spleen",
        channels=("CT",),
        classes=("spleen",),
        in_channels=1,
        pretrained_on="KiTS2019",
    ),
    "ISIC 2018": Published(
        write=WRITERS["isic2018"],
        section="ISIC2018",
        channels=("red", "green", "blue"),
        classes=("lesion",),
        in_channels=3,
        pretrained_on="KiTS2019",
        unit="voxel",
    ),
}


@pytest.fixture(scope="module")
def encoders(scheduler: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of the publication's three pre-trainings, on phantoms."""
    runs = {}
    for name in ("CHD", "BraTS2018", "KiTS2019"):
        folder = tmp_path_factory.mktemp(name)
        DATA_SETS[name].write(folder / "data", 2)
        preprocess(folder / "data", folder / "cache.zarr", scheduler=scheduler)
        settings: dict[str, Any] = {**PRESETS["published"], **SMALL, "epochs": 1}
        config = PretrainConfig(**settings, in_channels=DATA_SETS[name].in_channels)
        runs[name] = pretrain(open_cache(folder / "cache.zarr"), folder / "run", config=config).parent
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_SETS)
def test_data_set_of_the_publication(
    name: str,
    supercl: Callable[..., Any],
    scheduler: str,
    encoders: dict[str, Path],
    tmp_path: Path,
) -> None:
    data_set = DATA_SETS[name]
    written = data_set.write(tmp_path / "data", 6)
    cache, run, split = tmp_path / "cache.zarr", tmp_path / "run", tmp_path / "splits.txt"
    *labelled, test = data_set.keys
    split.write_text(
        f"# other\ntest: [77]\n# {data_set.section}\nsample 2 train_keys: {labelled}\ntest: [{test}]\n"
    )
    settings = {**SMALL, "in_channels": data_set.in_channels}
    published = ["--preset", "published", "--split", split]
    published += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]

    def call(*arguments: object) -> None:
        outcome = supercl(*arguments)
        assert outcome.code == 0, outcome.err

    call("preprocess", tmp_path / "data", cache, "--scheduler", scheduler)
    opened = open_cache(cache)
    assert opened.attributes["channel_names"] == [*data_set.channels]
    assert opened.class_names == ("background", *data_set.classes)
    assert [row.id for row in opened.done] == sorted(written)
    for case_id, (image, label) in written.items():
        case = opened.case(case_id)
        np.testing.assert_array_equal(case.image_ZCYX.swapaxes(0, 1), image)
        np.testing.assert_array_equal(case.ground_truth_ZYX, label)

    is_flat = [] if data_set.unit == "mm" else ["--set", "instance_rule=view"]
    call("pretrain", cache, tmp_path / "own", *published, "--set", "epochs=1", *is_flat)
    tuning = ("--labelled", 2, *published, "--set", "lr=0.005")
    call("finetune", cache, run, "--init", tmp_path / "own", *tuning, "--set", "epochs=30")
    call("evaluate", run, cache, "--device", "cpu")

    scored = json.loads((run / "evaluation.json").read_text())
    dsc = {(row["case"], row["class"]): row["dsc"] for row in scored["rows"]}
    tested = read_run(run)["cases"]["test"]
    assert scored["unit"] == data_set.unit
    assert set(dsc) == {(case_id, label) for case_id in tested for label in data_set.classes}
    for case_id in tested:
        truth = written[case_id][1]
        found = sitk.GetArrayFromImage(sitk.ReadImage(str(run / "predictions" / f"{case_id}.nii.gz")))
        for number, label in enumerate(data_set.classes, 1):
            both = ((found == number) & (truth == number)).sum()
            sizes = (found == number).sum() + (truth == number).sum()
            assert dsc[case_id, label] == pytest.approx(2 * both / sizes)
    assert any(dsc.values()), "scores of 0 alone would show nothing"

    if data_set.pretrained_on:
        init = encoders[data_set.pretrained_on]
        call("finetune", cache, tmp_path / "matched", "--init", init, *tuning, "--set", "epochs=1")
        taken = read_run(tmp_path / "matched")["init"]
        fits = data_set.in_channels == DATA_SETS[data_set.pretrained_on].in_channels
        assert taken["adapted"] == ([] if fits else ["encoder.contr_1_1.0.weight"])
        assert {tensor.split(".")[0] for tensor in taken["skipped"]} == {"head"}  # of pre-training
