"""Prediction: equal to evaluation voxel for voxel, in the geometry of the input, resumable, and bad files listed."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import training
from safetensors.torch import load_file, save_file

import train.predict
from supercl_core import locks
from supercl_core.cache.reader import open_cache
from supercl_core.errors import CacheError, SuperCLError, UsageError
from train.evaluate import evaluate
from train.predict import RECORD_NAME, predict
from train.runs import read_run

NAMES = ["case_a.nii.gz", "case_b.nii.gz", "case_c.nii.gz", "case_d.nii.gz"]


@pytest.fixture
def run(tuned_path, tmp_path):
    """A copy of the fine-tuned run that a test may change."""
    return Path(shutil.copytree(tuned_path, tmp_path / "run"))


@pytest.fixture
def scans(msd_path, tmp_path):
    """The four volumes of the tiny data set in a plain folder."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(msd_path / ("imagesTs" if "_d" in name else "imagesTr") / name, folder)
    return folder


@pytest.fixture
def predicted(run, scans, tmp_path):
    """Predict, by default all scans to `out`."""

    def call(source=scans, out=tmp_path / "out", **given):
        return predict(run, source, out, device_name="cpu", **given)

    return call


def counts(result):
    return result.num_predicted, result.num_kept, len(result.failed)


def files(folder):
    return sorted(file.name for file in folder.iterdir())


def change_weights(run):
    weights = load_file(run / "weights.safetensors")
    weights["decoder.head.0.weight"] = -weights["decoder.head.0.weight"]
    save_file(weights, run / "weights.safetensors")


def change_run(run, part, **changes):
    described = read_run(run)
    described[part] = {**described[part], **changes}
    (run / "run.json").write_text(json.dumps(described))


# ---------------------------------------------------------------- what is predicted


@pytest.mark.parametrize("layout", ["msd", "plain", "one file"])
def test_a_source_gives_what_evaluation_predicts_from_the_cache(
    layout, predicted, run, cache_path, msd_path, scans, tmp_path
):
    """Of int16, float32 and uint16 with an offset alike (case_a, case_b, case_c)."""
    described = {
        **read_run(run),
        "cases": {"train": [], "validation": [], "test": ["case_a", "case_b", "case_c"]},
    }
    (run / "run.json").write_text(json.dumps(described))
    evaluate(run, open_cache(cache_path), device_name="cpu")
    cases = NAMES
    if layout == "one file":
        cases = NAMES[1:2]
        assert counts(predicted(scans / cases[0])) == (1, 0, 0)
    else:
        result = predicted(msd_path if layout == "msd" else scans)
        assert (counts(result), result.class_names) == ((4, 0, 0), ("background", "anterior", "posterior"))
    assert files(tmp_path / "out") == [*cases, "predictions.jsonl"]
    for name in cases:
        found = sitk.ReadImage(str(tmp_path / "out" / name))
        source = sitk.ReadImage(str(scans / name))
        for part in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(found, part)() == pytest.approx(getattr(source, part)(), abs=1e-6)
        assert found.GetPixelIDTypeAsString() == "8-bit unsigned integer"
        if "_d" not in name:
            wanted = sitk.ReadImage(str(run / "predictions" / name))
            np.testing.assert_array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(wanted))
            assert len(np.unique(sitk.GetArrayFromImage(found))) > 1


def test_files_of_sub_folders_and_other_formats_are_named_by_their_path(
    predicted, scans, write_volume, tmp_path
):
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(scans / "case_a.nii.gz")))
    write_volume(scans / "site_b" / "scan.mha", values)
    assert counts(predicted()) == (5, 0, 0)
    one, other = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / f"{name}.nii.gz")))
        for name in ("case_a", "site_b_scan")
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["scan.npy", "scan.npz", "scan.mha"])
def test_every_format_of_the_same_values_gives_the_same_classes(
    name, predicted, scans, write_volume, tmp_path
):
    """The label map in a file is not looked at, nor are classes needed."""
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(scans / "case_a.nii.gz")))
    (tmp_path / "other").mkdir()
    file = tmp_path / "other" / name
    match file.suffix:
        case ".npy":
            np.save(file, values)
        case ".npz":
            np.savez(file, image=values)
        case _:
            write_volume(file, values)
    assert counts(predicted(scans / "case_a.nii.gz", tmp_path / "wanted")) == (1, 0, 0)
    for source in (tmp_path / "other", file):
        assert counts(predicted(source, tmp_path / f"from_{source.stem}")) == (1, 0, 0)
        one, other = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
            for path in (tmp_path / "wanted/case_a.nii.gz", tmp_path / f"from_{source.stem}/scan.nii.gz")
        )
        np.testing.assert_array_equal(one, other)


def test_a_layout_that_is_named_is_taken_and_only_folders_have_one(predicted, scans, tmp_path, capsys):
    np.save(scans / "more.npy", np.zeros((2, 24, 20)))
    with pytest.raises(SuperCLError, match="several layouts"):
        predicted()
    assert counts(predicted(layout="plain")) == (4, 0, 0)
    assert "note: left out: the file more.npy (no part of the layout plain)\n" in capsys.readouterr().err
    with pytest.raises(UsageError, match="A single volume has no layout"):
        predicted(scans / "more.npy", tmp_path / "one", layout="plain")


# ---------------------------------------------------------------- going on


def test_a_second_call_does_nothing_and_changes_nothing(predicted, tmp_path):
    assert counts(predicted()) == (4, 0, 0)
    before = training.snapshot(tmp_path / "out")
    assert counts(predicted()) == (0, 4, 0)
    after = training.snapshot(tmp_path / "out")
    assert {file: content for file, (content, _) in after.items()} == {
        file: content for file, (content, _) in before.items()
    }
    segmentation = tmp_path / "out" / "case_a.nii.gz"
    assert after[segmentation] == before[segmentation]


def test_a_killed_call_goes_on(predicted, monkeypatch, tmp_path):
    whole = tmp_path / "whole"
    predicted(out=whole)
    with monkeypatch.context() as patched, pytest.raises(training.Killed):
        patched.setattr(
            train.predict,
            "write_label_map",
            training.call_at(3, training.kill, train.predict.write_label_map),
        )
        predicted()
    record = tmp_path / "out" / "predictions.jsonl"
    assert files(tmp_path / "out") == [*NAMES[:2], "predictions.jsonl"]
    record.write_bytes(record.read_bytes()[:-20])  # cut off in the second line
    assert counts(predicted()) == (3, 1, 0)
    assert counts(predicted()) == (0, 4, 0)
    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_what_is_damaged_missing_or_of_a_changed_file_is_done_again(predicted, scans, tmp_path):
    predicted()
    whole = {name: (tmp_path / "out" / name).read_bytes() for name in NAMES}
    (tmp_path / "out" / "case_a.nii.gz").write_bytes(whole["case_a.nii.gz"][:-9])
    (tmp_path / "out" / "case_b.nii.gz").unlink()
    shutil.copy(scans / "case_a.nii.gz", scans / "case_c.nii.gz")
    assert counts(predicted()) == (3, 1, 0)
    for name, source in {**{name: name for name in NAMES}, "case_c.nii.gz": "case_a.nii.gz"}.items():
        assert (tmp_path / "out" / name).read_bytes() == whole[source]
    assert counts(predicted()) == (0, 4, 0)


def test_a_change_of_the_values_beside_a_header_is_seen(predicted, scans, tmp_path):
    (tmp_path / "scan").mkdir()
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(scans / "case_a.nii.gz")))
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "scan" / "a.mhd"))
    assert counts(predicted(tmp_path / "scan" / "a.mhd")) == (1, 0, 0)
    (tmp_path / "scan" / "a.raw").write_bytes(values[::-1].tobytes())
    assert counts(predicted(tmp_path / "scan" / "a.mhd")) == (1, 0, 0)
    assert counts(predicted(tmp_path / "scan" / "a.mhd")) == (0, 1, 0)


def test_another_network_or_another_way_to_apply_it_does_all_again(predicted, run, tmp_path):
    predicted()
    before = (tmp_path / "out" / "case_a.nii.gz").read_bytes()
    change_weights(run)
    assert counts(predicted()) == (4, 0, 0)
    assert (tmp_path / "out" / "case_a.nii.gz").read_bytes() != before
    change_run(run, "inference", mirror_axes=[])
    assert counts(predicted()) == (4, 0, 0)
    change_run(run, "config", log_every=7)
    assert counts(predicted()) == (0, 4, 0)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b'[1]\n{"case": []}\n{}\n\n', b'{"case": "case_a", "input": 3}\n']
)
def test_a_damaged_record_stands_for_nothing_done(predicted, tmp_path, content):
    predicted()
    (tmp_path / "out" / "predictions.jsonl").write_bytes(content)
    assert counts(predicted()) == (4, 0, 0)
    assert counts(predicted()) == (0, 4, 0)


# ---------------------------------------------------------------- bad files


def test_bad_files_are_listed_and_stop_no_other(predicted, scans, write_volume, tmp_path):
    (scans / "case_a.nii.gz").write_bytes(gzip.compress(b"no volume" * 100))
    (scans / "case_b.nii.gz").unlink()
    (scans / "case_b.nii.gz").symlink_to("nowhere")
    os.mkfifo(scans / "pipe.nii.gz")
    write_volume(scans / "two.nii.gz", np.zeros((2, 4, 8, 8), np.float32))
    result = predicted()
    assert counts(result) == (2, 0, 4)
    reasons = {entry["case"]: entry["reason"] for entry in result.failed}
    assert list(reasons) == ["case_a", "case_b", "pipe", "two"]
    assert "leads nowhere" in reasons["case_b"]
    assert "pipe" in reasons["pipe"]
    assert reasons["two"].endswith(
        "another number of channels than the network was trained on; expected 1, found 2"
    )
    assert files(tmp_path / "out") == [*NAMES[2:], "predictions.jsonl"]


def test_one_channel_is_not_taken_for_the_four_of_the_training_data(predicted, run):
    """A network of four channels does not tell whether its training data had four, or one that was repeated."""
    change_run(run, "config", in_channels=4)
    change_run(run, "cache", num_channels=4)
    result = predicted()
    assert counts(result) == (0, 0, 4)
    assert {entry["reason"].rpartition("; ")[2] for entry in result.failed} == {"expected 4, found 1"}


def test_a_damaged_volume_keeps_no_segmentation_of_what_it_was_before(predicted, scans, tmp_path):
    predicted()
    (scans / "case_a.nii.gz").write_bytes(b"damaged")
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(scans / "case_b.nii.gz")))
    sitk.WriteImage(
        sitk.GetImageFromArray(np.stack([values] * 2, -1), isVector=True), str(scans / "case_b.nii.gz")
    )
    assert counts(predicted()) == (0, 2, 2)
    assert files(tmp_path / "out") == [*NAMES[2:], "predictions.jsonl"]


def test_segmentations_of_volumes_that_are_gone_are_named(predicted, scans, tmp_path):
    assert predicted().leftover == ()
    (scans / "case_a.nii.gz").unlink()
    (tmp_path / "out" / "notes.txt").touch()
    assert predicted().leftover == ("case_a.nii.gz", "notes.txt")
    assert predicted(scans / "case_b.nii.gz").leftover == ()  # the others are of other calls


# ---------------------------------------------------------------- two calls at once


def test_a_second_call_at_the_same_time_is_refused(predicted, monkeypatch, tmp_path):
    out = tmp_path / "new" / "out"

    def second():
        with pytest.raises(CacheError, match="in use"):
            predicted(out=out)

    with monkeypatch.context() as patched:
        slow = training.call_at(2, second, train.predict.write_label_map)
        patched.setattr(train.predict, "write_label_map", slow)
        assert counts(predicted(out=out)) == (4, 0, 0)
    assert counts(predicted(out=out)) == (0, 4, 0)
    assert files(tmp_path / "new") == ["out"]


def test_a_call_killed_before_its_first_record_does_not_block_the_next(predicted, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(training.Killed):
        patched.setattr(
            train.predict, "write_text", training.call_at(1, training.kill, train.predict.write_text)
        )
        patched.setattr(locks, "_remove", lambda *_: None)
        predicted()
    with pytest.raises(CacheError, match="in use"):  # by this process, which lives
        predicted()
    monkeypatch.setattr(locks.Owner, "is_dead", lambda _: True)
    assert counts(predicted()) == (4, 0, 0)


def test_a_call_whose_lock_was_taken_over_writes_nothing_more(predicted, monkeypatch, tmp_path):
    def lose():
        locks.lock_path(tmp_path / "out" / RECORD_NAME).rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patched:
        patched.setattr(train.predict, "read_image", training.call_at(2, lose, train.predict.read_image))
        with pytest.raises(CacheError, match="lock of the cache was lost"):
            predicted()
    assert files(tmp_path / "out") == [NAMES[0], "predictions.jsonl"]


def test_prediction_does_not_load_pretraining():
    code = "import sys, train.predict, train.evaluate; assert 'train.pretraining' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------- refusals


def test_an_unfinished_run_is_refused(predicted, run, tmp_path):
    (run / "run.json").write_text(json.dumps({**read_run(run), "status": "running"}))
    with pytest.raises(UsageError, match="status running"):
        predicted()
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_not_there_is_refused(predicted, tmp_path):
    for source in (tmp_path / "nowhere", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(SuperCLError):
            predicted(source)
    assert not (tmp_path / "out").exists()


def test_outputs_are_never_put_over_or_among_other_files(predicted, scans, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "case_a.nii.gz").write_text("mine")
    before = training.snapshot(tmp_path)
    for source, out, found in (
        (scans, scans, "of the input"),
        (scans, scans / "out", "of the input"),
        (scans / "case_a.nii.gz", scans, "of the input"),
        (scans, tmp_path / "mine", "other files: case_a.nii.gz"),
        (scans, tmp_path / "mine" / "case_a.nii.gz", "a file"),
        (scans / "case_a.nii.gz", tmp_path / "a.nii.gz", "the name of a file"),
    ):
        with pytest.raises(UsageError, match="folder of their own") as refused:
            predicted(source, out)
        assert found in str(refused.value.found)
    assert training.snapshot(tmp_path) == before
    (tmp_path / "fresh").mkdir()
    assert counts(predicted(out=tmp_path / "fresh")) == (4, 0, 0)
