"""Evaluation: predictions lie over their sources, rows are what the written files say, and what is refused."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import training
import zarr

from supercl_core.cache import writer as cache_writer
from supercl_core.cache.reader import CachedCase, open_cache
from supercl_core.errors import CacheError, CasesFailedError, SuperCLError, UsageError
from supercl_core.formats.volumes import write_label_map
from train.evaluate import evaluate, evaluate_folder
from train.inference import load_network
from train.methods import PretrainConfig
from train.metrics import MISSING_RULE, score_case, summarise
from train.paper_protocol import PaperScores
from train.pretraining import pretrain
from train.runs import read_evaluation, read_run

CLASSES = ("background", "anterior", "posterior")


@pytest.fixture
def run(tuned_path, tmp_path):
    """A copy of the fine-tuned run that a test may change."""
    return Path(shutil.copytree(tuned_path, tmp_path / "run"))


def describe(run, **changes):
    """Change parts of run.json."""
    (run / "run.json").write_text(json.dumps({**read_run(run), **changes}))


def evaluated(run, cache_path, **settings):
    return evaluate(run, open_cache(cache_path), device_name="cpu", **settings)


def written(run):
    """Everything in the run folder that evaluation makes."""
    names = ("evaluation.json", "evaluation.csv", "predictions")
    return [name for name in names if (run / name).exists()]


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
    for found, wanted in zip(result["rows"], rows, strict=True):
        for key in ("dsc", "jc", "hd95", "asd"):
            assert found[key] == (None if wanted[key] is None else pytest.approx(wanted[key], rel=1e-5))
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
    of_known = evaluate_folder(run / "predictions", open_cache(cache_copy), case_ids=["case_a"])
    assert of_known["rows"] == in_mm["rows"][:2]


def test_the_network_is_the_one_that_was_saved(run):
    network = load_network(read_run(run), run)
    assert not network.training
    other = load_network(read_run(run), run)
    image = torch.randn(1, 1, 32, 32)
    assert torch.equal(network(image), other(image))


def test_the_csv_holds_the_rows(run, cache_path):
    result = evaluated(run, cache_path)
    with (run / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row.pop("unit") for row in rows} == {"mm"}
    assert rows == [
        {key: "" if value is None else str(value) for key, value in row.items()} for row in result["rows"]
    ]


def test_what_counts_where_a_structure_is_missing_is_declared_and_counted(tmp_path, cache_path):
    """Of the posterior, case_a gets no voxel and case_c gets the truth; of the anterior, both get the truth."""
    cache = open_cache(cache_path)
    for case_id in ("case_a", "case_c"):
        case = cache.case(case_id)
        classes = np.array(case.ground_truth_ZYX)
        if case_id == "case_a":
            classes[classes == 2] = 0
        write_label_map(tmp_path / f"{case_id}.nii.gz", classes, case.geometry())
    result = evaluate_folder(tmp_path, cache, case_ids=["case_a", "case_c"])
    assert result["missing_rule"] == MISSING_RULE
    posterior = result["summary"]["posterior"]
    assert (posterior["dsc"], posterior["jc"], posterior["hd95"], posterior["asd"]) == (0.5, 0.5, 0, 0)
    assert (posterior["num_cases"], posterior["num_distances"]) == (2, 1)
    assert (posterior["num_missing_in_prediction"], posterior["num_missing_in_truth"]) == (1, 0)
    assert result["summary"]["mean"]["num_distances"] == 3


def test_validation_cases_go_to_files_of_their_own(run, cache_path):
    describe(run, cases={"train": [], "validation": ["case_b"], "test": ["case_a", "case_c"]})
    result = evaluated(run, cache_path, part="validation")
    assert {row["case"] for row in result["rows"]} == {"case_b"}
    assert (result["part"], json.loads((run / "validation.json").read_text())) == ("validation", result)
    assert (run / "validation.csv").is_file()
    assert [file.name for file in (run / "validation_predictions").iterdir()] == ["case_b.nii.gz"]
    assert written(run) == []
    assert evaluated(run, cache_path)["part"] == "test"
    assert read_evaluation(run)["part"] == "test"


def test_the_published_protocol_is_beside_ours(run, cache_path):
    plain = evaluated(run, cache_path)
    assert plain["paper"] is None
    cache = open_cache(cache_path)
    for crop, asked in (((32, 32), "patch"), ((10, 40), (10, 40))):  # the run's patch is 32 x 32
        result = evaluated(run, cache_path, crop=asked)
        wanted = PaperScores(CLASSES, crop=crop)
        for case_id in ("case_a", "case_c"):
            prediction = sitk.ReadImage(str(run / "predictions" / f"{case_id}.nii.gz"))
            wanted.add(sitk.GetArrayFromImage(prediction), np.array(cache.case(case_id).ground_truth_ZYX))
        assert result["paper"] == wanted.result()
        assert result["paper"]["crop"] == list(crop)
        assert {**result, "paper": None, "provenance": 0} == {**plain, "provenance": 0}


def test_the_patch_of_a_run_that_chose_none_is_that_of_its_cache(run, cache_path):
    config = {**read_run(run)["config"], "patch_size": None}
    describe(run, config=config)
    assert evaluated(run, cache_path, crop="patch")["paper"]["crop"] == [32, 16]


def test_evaluation_stops_between_cases_where_it_is_told_to(run, cache_path):
    with pytest.raises(training.Killed):
        evaluated(run, cache_path, check=training.call_at(2, training.kill, lambda: None))
    assert written(run) == ["predictions"]
    assert [file.name for file in (run / "predictions").iterdir()] == ["case_a.nii.gz"]


# ---------------------------------------------------------------- a folder of predictions


@pytest.fixture
def folder(tmp_path, cache_path):
    """Predictions made elsewhere for all labelled cases: the truth, shifted by two columns."""
    cache = open_cache(cache_path)
    for case_id in ("case_a", "case_b", "case_c"):
        case = cache.case(case_id)
        classes = np.roll(case.ground_truth_ZYX, 2, axis=2)
        write_label_map(tmp_path / "folder" / f"{case_id}.nii.gz", classes, case.geometry())
    return tmp_path / "folder"


def test_a_run_and_the_folder_of_its_predictions_score_the_same(run, cache_path):
    of_run = evaluated(run, cache_path)
    of_folder = evaluate_folder(run / "predictions", open_cache(cache_path), case_ids=("case_a", "case_c"))
    for key in ("protocol", "unit", "missing_rule", "class_names", "rows", "summary", "paper"):
        assert of_run[key] == of_folder[key]
    assert (of_folder["failed"], of_folder["unused"], of_folder["part"]) == ([], [], "folder")
    assert json.loads((run / "predictions" / "evaluation.json").read_text()) == of_folder
    assert (run / "predictions" / "evaluation.csv").read_text() == (run / "evaluation.csv").read_text()


def test_scores_go_where_they_are_asked_for(folder, cache_path, tmp_path):
    result = evaluate_folder(
        folder, open_cache(cache_path), crop=(8, 8), output_path=tmp_path / "out" / "mine.json"
    )
    assert json.loads((tmp_path / "out" / "mine.json").read_text()) == result
    assert (tmp_path / "out" / "mine.csv").is_file()
    assert sorted(file.name for file in folder.iterdir()) == [f"case_{x}.nii.gz" for x in "abc"]
    assert {row["case"] for row in result["rows"]} == {"case_a", "case_b", "case_c"}  # case_d has no truth
    assert result["paper"]["num_slices"] == 16


def test_no_label_is_read_but_those_of_the_cases_to_score(folder, cache_path, monkeypatch):
    read, looked_at = CachedCase.read, set()

    def watched(case, name, slices):
        looked_at.add((case.row.id, name))
        return read(case, name, slices)

    monkeypatch.setattr(CachedCase, "read", watched)
    monkeypatch.setattr(CachedCase, "ground_truth_ZYX", None)
    evaluate_folder(folder, open_cache(cache_path), case_ids=["case_b"])
    assert looked_at == {("case_b", "ground_truth")}


def test_bad_cases_are_listed_and_stop_no_other(folder, cache_path):
    (folder / "case_b.nii.gz").write_text("no volume")
    (folder / "case_c.nii.gz").unlink()
    shutil.copy(folder / "case_a.nii.gz", folder / "other.nii.gz")
    shutil.copy(folder / "case_a.nii.gz", folder / "case_d.nii.gz")
    result = evaluate_folder(
        folder, open_cache(cache_path), case_ids=["case_a", "case_b", "case_c", "case_d"]
    )
    assert {row["case"] for row in result["rows"]} == {"case_a"}
    assert [entry["case"] for entry in result["failed"]] == ["case_b", "case_c", "case_d"]
    reasons = [entry["reason"] for entry in result["failed"]]
    assert "not what its name says" in reasons[0]
    assert reasons[1:] == ["There is no prediction", "The case has no ground truth"]
    assert result["unused"] == ["other.nii.gz"]


def test_where_nothing_can_be_scored_nothing_is_written(folder, cache_path, tmp_path):
    with pytest.raises(CasesFailedError, match="No prediction could be scored") as refused:
        evaluate_folder(folder, open_cache(cache_path), case_ids=["case_d"])
    assert "case_d: The case has no ground truth" in str(refused.value.found)
    assert not (folder / "evaluation.json").exists()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="no predictions here"):
            evaluate_folder(path, open_cache(cache_path))


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


def test_a_cache_of_another_resolution_or_numbering_is_refused(run, cache_path):
    """As of the cache with one or two of the labelled cases made otherwise, or under other numbers."""
    [digest] = read_run(run)["content_digests"].values()
    for digests, found in (
        ({"case_b": "of the same case at another resolution"}, "1 of 1 missing or different: case_b"),
        ({"case_b": digest, "case_9": "of a case that is gone"}, "1 of 2 missing or different: case_9"),
        ({"case_a": digest}, "1 of 1 missing or different: case_a"),
    ):
        describe(run, content_digests=digests)
        with pytest.raises(CacheError, match="not the one that the run was made with") as refused:
            evaluated(run, cache_path)
        assert refused.value.found == found
        assert str(cache_path) in refused.value.next_step
    describe(run, cache={**read_run(run)["cache"], "config_digest": "another"})
    with pytest.raises(CacheError, match="made with other settings of preprocessing"):
        evaluated(run, cache_path)
    assert written(run) == []


def test_a_cache_that_was_moved_and_grew_is_still_the_one_of_the_run(run, cache_path):
    described = read_run(run)["cache"]
    describe(run, cache={**described, "config_digest": "another", "num_slices": 7, "path": "/elsewhere"})
    assert evaluated(run, cache_path)["rows"]


def test_a_model_that_needs_more_memory_than_its_weights_is_refused_before(run, cache_path):
    for filters in (5, 60_000):  # the latter asks for a hundred terabytes
        describe(run, model={**read_run(run)["model"], "filters": filters})
        with pytest.raises(SuperCLError, match="another architecture"):
            evaluated(run, cache_path)
    assert written(run) == []
