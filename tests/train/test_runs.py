"""The run folder: created, taken up again, refused where it is another run's, and its metrics."""

import copy
import json

import pytest

from supercl_core.cache.reader import open_cache
from supercl_core.errors import SuperCLError, UsageError
from train import runs

DESCRIPTION = {
    "kind": "finetune",
    "config": {"lr": 0.1, "precision": "float32", "augment": {"p_blur": 0.5}, "patch_size": [32, 32]},
    "world_size": 2,
    "model": {"backbone": "unet", "in_channels": 1, "num_classes": 3, "filters": 4},
    "inference": {"adjacent_slices": 0, "mirror_axes": ["y", "x"], "largest_component": [1]},
    "cache": {
        "path": "/data/a.zarr",
        "name": "a",
        "config_digest": "d",
        "num_channels": 1,
        "num_slices": 9,
        "class_names": [],
    },
    "cases": {"train": [f"case_{i}" for i in range(9)], "validation": [], "test": ["case_9"]},
    "content_digests": {f"case_{i}": f"digest {i}" for i in range(9)},
    "split": {"file": "split.json", "labelled": 2},
    "init": {"source": "runs/pretrain", "loaded": ["encoder.a", "encoder.b"], "adapted": [], "skipped": []},
    "lineage": [],
    "unlabelled_test_cases_seen": 0,
    "weak_labels": None,
}


def changed(path, value):
    """The description with the value at a dotted path changed."""
    description = copy.deepcopy(DESCRIPTION)
    *parts, last = path.split(".")
    inner = description
    for part in parts:
        inner = inner[part]
    inner[last] = value
    return description


def test_a_new_run_is_described_and_finished(tmp_path):
    run = runs.start_run(tmp_path / "deep" / "mine", DESCRIPTION)
    assert run == runs.read_run(tmp_path / "deep" / "mine")
    assert {key: run[key] for key in DESCRIPTION} == DESCRIPTION
    assert (run["name"], run["status"], run["format_version"]) == ("mine", "running", 4)
    assert run["provenance"]["versions"]["torch"]
    runs.finish_run(tmp_path / "deep" / "mine")
    assert runs.read_run(tmp_path / "deep" / "mine") == {**run, "status": "finished"}


def test_an_empty_folder_may_become_a_run(tmp_path):
    assert runs.start_run(tmp_path, DESCRIPTION)["status"] == "running"


@pytest.mark.parametrize("path", [None, "cache.path", "unlabelled_test_cases_seen"])
def test_a_run_goes_on_with_its_first_description(tmp_path, path):
    first = runs.start_run(tmp_path / "run", DESCRIPTION)
    again = DESCRIPTION if path is None else changed(path, "/elsewhere/a.zarr")
    assert runs.start_run(tmp_path / "run", again) == first


@pytest.mark.parametrize("setting", ["device", "log_every", "checkpoint_every", "keep_checkpoints"])
def test_a_run_may_go_on_elsewhere(tmp_path, setting):
    first = runs.start_run(tmp_path / "run", changed(f"config.{setting}", 1))
    assert runs.start_run(tmp_path / "run", changed(f"config.{setting}", 2)) == first


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("kind", "pretrain", "kind: 'finetune' there, 'pretrain' here"),
        ("config.lr", 0.2, "config.lr: 0.1 there, 0.2 here"),
        ("config.augment.p_blur", 0.0, "config.augment.p_blur: 0.5 there, 0.0 here"),
        ("config.patch_size", None, "config.patch_size: [32, 32] there, None here"),
        ("config.precision", "bfloat16", "config.precision: 'float32' there, 'bfloat16' here"),
        ("model.filters", 8, "model.filters: 4 there, 8 here"),
        ("model.backbone", "smp:resnet18", "model.backbone: 'unet' there, 'smp:resnet18' here"),
        ("cases.train", ["case_0"], "cases.train: 9 entries there, 1 others here"),
        ("cases.test", [], "cases.test: ['case_9'] there, [] here"),
        (
            "content_digests.case_3",
            "another",
            "content_digests.case_3: 'digest 3' there, 'another' here",
        ),
        ("split.labelled", 3, "split.labelled: 2 there, 3 here"),
        ("init", None, "init: 'runs/pretrain' there, None here"),
        ("init.source", "runs/other", "init: 'runs/pretrain' there, 'runs/other' here"),
        ("cache.config_digest", "e", "cache.config_digest: 'd' there, 'e' here"),
        ("cache.num_slices", 10, "cache.num_slices: 9 there, 10 here"),
        ("weak_labels", {"name": "n", "level": 0}, "weak_labels: None there, {'name': 'n', 'level': 0} here"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_the_difference_named(tmp_path, path, value, named):
    runs.start_run(tmp_path, DESCRIPTION)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(UsageError, match="run with other settings") as refused:
        runs.start_run(tmp_path, changed(path, value))
    assert refused.value.found == named
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_run_of_another_number_of_processes_is_refused(tmp_path):
    runs.start_run(tmp_path, DESCRIPTION)
    with pytest.raises(UsageError, match="another number of processes") as refused:
        runs.start_run(tmp_path, changed("world_size", 3))
    assert refused.value.found == 3
    assert refused.value.expected.startswith("2: batch_size is that of each process")


def test_a_folder_with_anything_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="thesis.tex"):
        runs.start_run(tmp_path, DESCRIPTION)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_without_run_json_is_no_run(tmp_path):
    with pytest.raises(SuperCLError, match="no run here"):
        runs.read_run(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[broken", "[]", '{"format_version": "1"}'])
def test_a_damaged_run_json_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SuperCLError, match=r"damaged(.|\n)*run\.json"):
        runs.read_run(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("kind", "other", "'other' at kind"),
        ("config", None, "None at config"),
        ("model.filters", 1 << 40, f"{1 << 40} at model.filters"),
        ("model.num_classes", True, "True at model.num_classes"),
        ("model.backbone", None, "None at model.backbone"),
        ("world_size", 0, "0 at world_size"),
        ("cache", {}, "no 'path' at cache"),
        ("cases.train", {}, "no list at cases.train"),
        ("cases.test", ["a", 7], "7 at cases.test[1]"),
        ("content_digests.case_0", 7, "7 at content_digests.case_0"),
        ("split", [], "no object at split"),
        ("init.source", None, "None at init.source"),
        ("inference.mirror_axes", "y", "'y' at inference.mirror_axes"),
        ("inference.mirror_axes", ["z"], "['z'] at inference.mirror_axes"),
        ("inference.mirror_axes", ["y", "y"], "['y', 'y'] at inference.mirror_axes"),
        ("unlabelled_test_cases_seen", -1, "-1 at unlabelled_test_cases_seen"),
    ],
)
def test_a_part_of_run_json_that_is_not_what_it_should_be_is_named(tmp_path, path, value, named):
    runs.start_run(tmp_path, DESCRIPTION)
    stored = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**stored, **changed(path, value)}))
    with pytest.raises(SuperCLError) as refused:
        runs.read_run(tmp_path)
    assert str(refused.value.found) == named


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"loss": 1}\n', "no 'step' at [0]"),
        ('{"step": 1}\n{"step": 2, "loss": "low"}\n', "'low' at [1].loss"),
        ('{"step": NaN}\n', "the number nan"),
        ('{"step": 1}{}\n', "Extra data: line 1 column 12 (char 11)"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(tmp_path, content, named):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SuperCLError, match=r"metrics\.jsonl") as refused:
        runs.read_metrics(tmp_path)
    assert str(refused.value.found) == named


def test_an_evaluation_lacks_no_class(tmp_path):
    assert runs.read_evaluation(tmp_path) is None
    scores = dict.fromkeys(("dsc", "jc", "hd95", "asd"))
    summary = {**scores, "num_cases": 0, "num_missing_in_prediction": 0, "num_missing_in_truth": 0}
    evaluation = {
        "protocol": "p",
        "unit": "mm",
        "class_names": ["background", "a"],
        "rows": [{"case": "x", "class": "a", "state": "absent in both", **scores}],
        "summary": {"a": summary, "mean": summary},
        "paper": None,
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert runs.read_evaluation(tmp_path) == evaluation
    del evaluation["summary"]["a"]
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(SuperCLError, match="no 'a' at summary"):
        runs.read_evaluation(tmp_path)


def test_a_run_of_another_format_version_is_refused(tmp_path):
    runs.start_run(tmp_path, DESCRIPTION)
    stored = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**stored, "format_version": 99}))
    with pytest.raises(SuperCLError, match="99"):
        runs.start_run(tmp_path, DESCRIPTION)


def test_metrics_after_a_step_are_forgotten(tmp_path):
    assert runs.read_metrics(tmp_path) == []
    entries = [{"step": step, "loss": step / 7} for step in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    runs.forget_metrics_after(tmp_path, 20)
    assert runs.read_metrics(tmp_path) == entries[:2]
    runs.forget_metrics_after(tmp_path, 0)
    assert runs.read_metrics(tmp_path) == []


def test_a_metrics_line_cut_off_by_a_kill_does_not_stop_the_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert runs.read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]
    runs.forget_metrics_after(tmp_path, 5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


def test_the_cache_is_described_by_what_identifies_it(cache_path):
    described = runs.describe_cache(open_cache(cache_path))
    assert described.pop("path") == str(cache_path)
    assert len(described.pop("config_digest")) == 64
    assert described == {
        "name": "Task99_Tiny",
        "num_channels": 1,
        "num_slices": 23,
        "class_names": ["background", "anterior", "posterior"],
    }
