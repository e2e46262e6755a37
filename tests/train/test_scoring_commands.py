"""The commands `evaluate` and `predict`: what they print, where results go, exit codes and refusals."""

import json
import shutil

import pytest

from train.runs import read_run


@pytest.fixture
def run(tuned_path, tmp_path):
    """A copy of the fine-tuned run that a test may change."""
    return shutil.copytree(tuned_path, tmp_path / "run")


@pytest.fixture
def split(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"labelled": {"1": ["case_b"]}, "test": ["case_a", "case_c"]}))
    return path


def refused(outcome, code, *texts):
    """The command ended with `code` and one message that holds all texts."""
    assert outcome.code == code, outcome
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err
    for text in (*texts, "next:"):
        assert text in outcome.err, outcome.err
    return True


def row_of(text, name):
    """The cells of the first row of a printed table that begins with `name`."""
    return next(line.split()[1:] for line in text.splitlines() if line.split()[:1] == [name])


def test_a_run_is_scored_with_both_protocols(supercl, run, cache_path):
    outcome = supercl("evaluate", run, cache_path, "--protocol", "paper", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    result = json.loads((run / "evaluation.json").read_text())
    ours, theirs = outcome.out.split("n: structures behind")
    for text, summary in ((ours, result["summary"]), (theirs, result["paper"]["summary"])):
        for name, values in summary.items():
            shown = row_of(text, name)
            assert shown[0] == f"{100 * values['dsc']:.2f}"
            assert shown[3] == ("–" if values["asd"] is None else f"{values['asd']:.2f}")
    anterior = result["summary"]["anterior"]
    missing = f"{anterior['num_missing_in_prediction']} + {anterior['num_missing_in_truth']}"
    assert row_of(ours, "anterior")[4:] == [
        str(anterior["num_cases"]),
        str(anterior["num_distances"]),
        *missing.split(),
    ]
    told = " ".join(outcome.out.split())
    for text in (
        result["missing_rule"],
        result["paper"]["description"],
        "Means over 2 cases",
        "10 slices of 32 x 32",
    ):
        assert text in told
    assert f"scores: {run}/evaluation.json and .csv" in outcome.out


def test_validation_cases_are_scored_apart(supercl, run, cache_path):
    assert refused(supercl("evaluate", run, cache_path, "--part", "validation"), 2, "no validation case")
    described = {**read_run(run), "cases": {"train": [], "validation": ["case_b"], "test": ["case_a"]}}
    (run / "run.json").write_text(json.dumps(described))
    outcome = supercl("evaluate", run, cache_path, "--part", "validation", "--device", "cpu")
    assert f"scores: {run}/validation.json and .csv" in outcome.out
    assert not (run / "evaluation.json").exists()


def test_a_folder_is_scored_and_what_is_missing_is_listed(supercl, run, cache_path, split, tmp_path):
    assert supercl("evaluate", run, cache_path, "--device", "cpu").code == 0
    folder = run / "predictions"
    shutil.copy(folder / "case_a.nii.gz", folder / "elsewhere.nii.gz")
    outcome = supercl("evaluate", folder, cache_path, "--split", split)
    assert (outcome.code, outcome.out.count("Means over 2 cases")) == (0, 1), outcome.err
    assert "note: 1 files (elsewhere.nii.gz): they belong to none of the cases to score" in outcome.err
    assert f"scores: {folder}/evaluation.json and .csv" in outcome.out

    (folder / "case_c.nii.gz").unlink()
    outcome = supercl("evaluate", folder, cache_path, "--split", split, "-o", tmp_path / "mine.json")
    assert refused(outcome, 3, "1 cases have no score", "case_c: There is no prediction")
    assert "Means over 1 of 2 cases" in outcome.out
    assert f"scores: {tmp_path}/mine.json and .csv" in outcome.out
    outcome = supercl("evaluate", folder, cache_path)  # case_b has ground truth too
    assert refused(outcome, 3, "2 cases have no score", "case_b: There is no prediction")


def test_options_without_an_effect_are_refused(supercl, run, cache_path, split, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for scored, options, text in (
        (run, ("--split", split), "--split has no effect on a run"),
        (run, ("-o", tmp_path / "x.json"), "--output has no effect on a run"),
        (run, ("--crop", 8, 8), "--crop has no effect without --protocol paper"),
        (folder, ("--part", "test"), "--part has no effect on a folder of predictions"),
        (folder, ("--device", "cuda"), "--device has no effect on a folder of predictions"),
        (folder, ("--protocol", "paper"), "does not tell the patch"),
        (folder, ("-o", tmp_path / "x.csv"), "ends in .json"),
        (folder, (), "no predictions here"),
    ):
        assert refused(supercl("evaluate", scored, cache_path, *options), 2, text)
    assert refused(supercl("evaluate", tmp_path / "none", cache_path), 1, "no run here")
    assert supercl("evaluate", run, cache_path, "--protocol", "paper", "--crop", 0, 8).code == 2


def test_volumes_are_predicted_and_kept(supercl, run, msd_path, tmp_path):
    out = tmp_path / "out"
    first = supercl("predict", run, msd_path, out, "--device", "cpu")
    classes = "classes: 0 background, 1 anterior, 2 posterior\n"
    assert (first.code, first.out) == (
        0,
        f"{out}: 4 volumes segmented, 0 kept from before, 0 failed; {classes}",
    )
    assert "predict: 4/4 volumes" in first.err
    again = supercl("predict", run, msd_path, out, "--device", "cpu")
    assert (again.code, again.out) == (
        0,
        f"{out}: 0 volumes segmented, 4 kept from before, 0 failed; {classes}",
    )


def test_volumes_that_cannot_be_predicted_are_listed(supercl, run, msd_path, tmp_path):
    scans = tmp_path / "scans"
    shutil.copytree(msd_path / "imagesTr", scans)
    (scans / "bad.nii.gz").write_text("text")
    outcome = supercl("predict", run, scans, tmp_path / "out", "--device", "cpu")
    assert refused(
        outcome, 3, "1 volumes could not be segmented", "bad: The file's content is not what its name says"
    )
    assert "3 volumes segmented, 0 kept from before, 1 failed" in outcome.out
    assert refused(supercl("predict", run, scans, scans), 2, "folder of their own")
    assert refused(supercl("predict", tmp_path / "none", scans, tmp_path / "o"), 1, "no run here")


def test_segmentations_of_no_volume_of_the_folder_are_named(supercl, run, msd_path, tmp_path):
    shutil.copytree(msd_path / "imagesTr", tmp_path / "scans")
    assert "note" not in supercl("predict", run, tmp_path / "scans", tmp_path / "out", "--device", "cpu").err
    (tmp_path / "scans" / "case_b.nii.gz").unlink()
    outcome = supercl("predict", run, tmp_path / "scans", tmp_path / "out", "--device", "cpu")
    assert "note: 1 files (case_b.nii.gz): they are in OUT, but of no volume of INPUT" in outcome.err


def test_the_help_teaches(supercl):
    assert "supercl evaluate nnunet/predictions heart.zarr" in supercl("evaluate", "--help").out
    assert "supercl predict runs/pretrained scan.nii.gz" in supercl("predict", "--help").out


def test_json_is_what_the_files_hold(supercl, run, cache_path, split, msd_path, tmp_path):
    outcome = supercl("evaluate", run, cache_path, "--device", "cpu", "--json")
    assert json.loads(outcome.out) == json.loads((run / "evaluation.json").read_text())
    assert json.loads(outcome.out)["summary"]["mean"]["num_cases"] == 2 * 2
    (run / "predictions" / "case_c.nii.gz").unlink()
    outcome = supercl("evaluate", run / "predictions", cache_path, "--split", split, "--json")
    assert outcome.code == 3
    assert [failed["case"] for failed in json.loads(outcome.out)["failed"]] == ["case_c"]

    outcome = supercl("predict", run, msd_path / "imagesTr", tmp_path / "out", "--device", "cpu", "--json")
    done = json.loads(outcome.out)
    assert (outcome.code, done["num_predicted"], done["failed"]) == (0, 3, [])
    assert done["class_names"] == ["background", "anterior", "posterior"]


def test_json_of_a_report_compares_the_runs(supercl, run, cache_path, tmp_path):
    page = tmp_path / "report.html"
    outcome = supercl("report", run, "-o", page, "--json")
    assert (outcome.out, outcome.err) == ("null\n", f"report: {page}\n")  # nothing is scored yet
    supercl("evaluate", run, cache_path, "--device", "cpu")
    shutil.copytree(run, tmp_path / "other")
    compared = json.loads(supercl("report", run, tmp_path / "other", "-o", page, "--json").out)
    assert [(row["run"], row["class_name"]) for row in compared["rows"]] == [
        (name, kind) for name in ("run", "other") for kind in ("anterior", "posterior", "mean")
    ]
    assert compared["rows"][-1]["difference"]["mean"] == 0
