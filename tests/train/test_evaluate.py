"""Evaluation: predictions lie over their sources, rows are what the written files say, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import zarr
from made_caches import write_cache

import train.evaluate
from supercl_core import cache_writer
from supercl_core.cache_reader import open_cache
from supercl_core.errors import CacheError, SuperCLError, UsageError
from supercl_core.splits import Split
from train.evaluate import evaluate, load_network, segment
from train.finetuning import FinetuneConfig, finetune
from train.methods import PretrainConfig
from train.metrics import score_case, summarise
from train.models.backbones import build_encoder
from train.models.unet import Encoder, UNet
from train.models.weights import save_weights
from train.pretraining import pretrain
from train.runs import read_run

CLASSES = ("background", "anterior", "posterior")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(cache_path, tmp_path_factory):
    """A run fine-tuned on case_b, long enough to predict every class somewhere; case_a and case_c are tested."""
    path = tmp_path_factory.mktemp("trained") / "run"
    split = Split(file="s.json", labelled=("case_b",), test=("case_a", "case_c"), num_labelled_keys=1)
    config = FinetuneConfig(
        steps=30, batch_size=6, patch_size=(32, 32), filters=4, lr=1e-2, warmup_steps=2, device="cpu"
    )
    finetune(open_cache(cache_path), path, split=split, config=config)
    return path


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def describe(run, **changes):
    """Change parts of run.json."""
    (run / "run.json").write_text(json.dumps({**read_run(run), **changes}))


def evaluated(run, cache_path):
    return evaluate(run, open_cache(cache_path), device_name="cpu")


def written(run):
    """Everything in the run folder that evaluation makes."""
    return [path.name for path in (run / "evaluation.json", run / "predictions") if path.exists()]


# ---------------------------------------------------------------- predictions


def test_predictions_lie_over_their_sources(run, cache_path, msd_path):
    evaluated(run, cache_path)
    assert sorted(file.name for file in (run / "predictions").iterdir()) == ["case_a.nii.gz", "case_c.nii.gz"]
    for name in ("case_a.nii.gz", "case_c.nii.gz"):
        prediction = sitk.ReadImage(str(run / "predictions" / name))
        source = sitk.ReadImage(str(msd_path / "imagesTr" / name))
        assert prediction.GetSize() == source.GetSize() == (20, 24, 5)
        for part in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(prediction, part)() == pytest.approx(getattr(source, part)(), abs=1e-6)
        assert prediction.GetPixelIDTypeAsString() == "8-bit unsigned integer"


@pytest.mark.parametrize(
    ("case_id", "slices_at_once"),
    [("case_b", 1), ("case_c", 2), ("case_c", 16), ("case_d", 16)],  # 24 x 20 pixels, case_d 18 x 26
)
def test_segment_equals_slices_padded_one_by_one(cache_path, monkeypatch, case_id, slices_at_once):
    monkeypatch.setattr(train.evaluate, "SLICES_AT_ONCE", slices_at_once)
    torch.manual_seed(3)
    network = UNet(Encoder(4, 4), num_classes=3)
    network(torch.randn(4, 4, 32, 32))  # moves the batch statistics from their defaults
    network.eval()
    found = segment(network, open_cache(cache_path).case(case_id), device=CPU)

    stored = zarr.open_group(cache_path, mode="r")[f"cases/{case_id}/image"][0].astype(float)
    low, high = np.percentile(stored, (0.5, 99.5))
    clipped = np.clip(stored, low, high)
    images = (clipped - clipped.mean()) / clipped.std()
    _, height, width = images.shape
    assert found.shape == images.shape
    assert found.dtype == np.uint8
    for z, image in enumerate(images):
        padded = np.pad(image, ((0, 32 - height), (0, 32 - width)))
        with torch.no_grad():
            logits = network(torch.from_numpy(padded).float().expand(1, 4, 32, 32))
        wanted = logits[0].argmax(dim=0).numpy()[:height, :width]
        assert (found[z] == wanted).mean() > 0.995  # scores that tie within rounding may fall either way
    assert len(np.unique(found)) == 3


# ---------------------------------------------------------------- evaluation.json


def test_rows_agree_with_the_written_files(run, cache_path, msd_path):
    result = evaluated(run, cache_path)
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert (result["unit"], result["class_names"]) == ("mm", list(CLASSES))
    rows = []
    for case_id in ("case_a", "case_c"):
        prediction = sitk.ReadImage(str(run / "predictions" / f"{case_id}.nii.gz"))
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(msd_path / "labelsTr" / f"{case_id}.nii.gz")))
        spacing_mm = prediction.GetSpacing()[::-1]
        scores = score_case(
            sitk.GetArrayFromImage(prediction), truth, class_names=CLASSES, spacing_mm=spacing_mm
        )
        rows += [{"case": case_id, **score.as_dict()} for score in scores]
    for key in ("case", "class", "state"):
        assert [row[key] for row in result["rows"]] == [row[key] for row in rows]
    for key in ("dsc", "jc", "hd95", "asd"):
        assert [row[key] for row in result["rows"]] == pytest.approx([row[key] for row in rows], rel=1e-5)
    assert result["summary"] == summarise(result["rows"])
    assert any(row["state"] == "ok" and row["hd95"] > 0 for row in rows)


def test_evaluating_again_gives_the_same(run, cache_path):
    first = evaluated(run, cache_path)
    again = evaluated(run, cache_path)
    assert {**again, "provenance": None} == {**first, "provenance": None}


def test_distances_are_in_voxels_where_one_spacing_is_unknown(run, cache_path, cache_copy):
    in_mm = evaluated(run, cache_path)
    spacing = zarr.open_group(cache_copy, mode="r+")["table/spacing_mm"]
    spacing[2] = np.nan  # case_c
    result = evaluated(run, cache_copy)
    assert (in_mm["unit"], result["unit"]) == ("mm", "voxel")
    rows = []
    for case_id in ("case_a", "case_c"):
        prediction = sitk.GetArrayFromImage(sitk.ReadImage(str(run / "predictions" / f"{case_id}.nii.gz")))
        truth = open_cache(cache_path).case(case_id).ground_truth_ZYX
        scores = score_case(prediction, truth, class_names=CLASSES, spacing_mm=None)
        rows += [{"case": case_id, **score.as_dict()} for score in scores]
    assert result["rows"] == rows
    assert [row["hd95"] for row in rows] != [row["hd95"] for row in in_mm["rows"]]


def test_the_network_is_the_one_that_was_saved(trained):
    network = load_network(read_run(trained), trained)
    assert not network.training
    other = load_network(read_run(trained), trained)
    image = torch.randn(1, 1, 32, 32)
    assert torch.equal(network(image), other(image))


# ---------------------------------------------------------------- refusals


def test_an_unfinished_run_is_refused(run, cache_path):
    describe(run, status="running")
    with pytest.raises(UsageError, match="status running"):
        evaluated(run, cache_path)
    assert written(run) == []


def test_a_pretraining_run_is_refused(cache_path, tmp_path):
    config = PretrainConfig(steps=1, batch_size=2, patch_size=(32, 32), filters=4, device="cpu")
    pretrain(open_cache(cache_path), tmp_path / "pre", config=config)
    with pytest.raises(UsageError, match="kind pretrain"):
        evaluated(tmp_path / "pre", cache_path)


def test_a_folder_without_a_run_is_refused(cache_path, tmp_path):
    with pytest.raises(SuperCLError, match="no run here"):
        evaluated(tmp_path, cache_path)


def test_a_run_without_test_cases_is_refused(run, cache_path):
    describe(run, cases={"train": ["case_b"], "validation": [], "test": []})
    with pytest.raises(UsageError, match="no test case"):
        evaluated(run, cache_path)


def test_a_cache_of_other_classes_is_refused(run, cache_copy):
    cache_writer.set_root_attributes(cache_copy, {"class_names": ["background", "liver"]})
    with pytest.raises(CacheError, match="background, anterior, posterior") as refused:
        evaluated(run, cache_copy)
    assert refused.value.found == "background, liver"
    assert written(run) == []


def test_a_cache_without_the_test_cases_is_refused(run, cache_path):
    describe(run, cases={"train": ["case_b"], "validation": [], "test": ["case_a", "patient_7"]})
    with pytest.raises(CacheError, match="patient_7"):
        evaluated(run, cache_path)
    assert written(run) == []


def test_a_test_case_without_ground_truth_is_refused_before_anything_is_written(run, cache_path):
    describe(run, cases={"train": ["case_b"], "validation": [], "test": ["case_a", "case_d"]})
    with pytest.raises(CacheError, match="no ground truth") as refused:
        evaluated(run, cache_path)
    assert refused.value.found == "case_d"
    assert written(run) == []


def test_a_cache_of_other_channels_is_refused(run, cache_path):
    describe(run, model={**read_run(run)["model"], "in_channels": 2})
    cache = open_cache(cache_path)
    cache.attributes["channel_names"] = ["t1", "t2", "flair"]
    with pytest.raises(UsageError, match="input channels"):
        evaluate(run, cache, device_name="cpu")
    assert not (run / "predictions").exists()


def test_a_model_that_needs_more_memory_than_its_weights_is_refused_before(run, cache_path):
    for filters in (5, 60_000):  # the latter asks for a hundred terabytes
        describe(run, model={**read_run(run)["model"], "filters": filters})
        with pytest.raises(SuperCLError, match="another architecture"):
            evaluated(run, cache_path)
    assert written(run) == []


def test_the_network_of_another_backbone_segments_as_it_did_in_training(tmp_path):
    model = {"backbone": "monai:resnet10", "in_channels": 2, "num_classes": 3, "filters": 32}
    torch.manual_seed(3)
    trained = UNet(build_encoder("monai:resnet10", in_channels=2, filters=32), num_classes=3)
    trained(torch.randn(4, 2, 64, 64))  # moves the batch statistics from their defaults
    trained.eval()
    save_weights(trained, tmp_path / "weights.safetensors", {})
    network = load_network({"model": model, "cache": {"class_names": list(CLASSES)}}, tmp_path)

    image = np.random.default_rng(0).integers(0, 9, (1, 2, 40, 16)).astype(np.int16)
    case = {"image": image, "superpixels": np.zeros((2, 40, 16), np.uint8)}
    path = write_cache(tmp_path / "a.zarr", {"a": case}, name="a", channel_names=["a"], class_names=CLASSES)
    found = segment(network, open_cache(path).case("a"), device=CPU)
    normal = (image[0] - image.mean()) / image.std()
    padded = np.pad(normal, ((0, 0), (0, 24), (0, 16)))  # to multiples of 32
    with torch.no_grad():
        logits = trained(torch.from_numpy(padded).float()[:, None].repeat(1, 2, 1, 1))
    np.testing.assert_array_equal(found, logits.argmax(dim=1)[:, :40, :16])
    assert len(np.unique(found)) > 1
