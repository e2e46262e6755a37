"""The report of fabricated runs over a small real cache: what it holds, what it asks for, how wide it gets."""

import base64
import json
import shutil
from xml.etree import ElementTree

import pytest
from reports import (
    CLASSES,
    NASTY,
    check_asks_nothing_outside,
    check_in_a_browser,
    evaluate,
    read_page,
    write_cache,
    write_run,
)

from supercl_core.errors import SuperCLError
from train.metrics import summarise
from train.report.page import write_report


@pytest.fixture(scope="session")
def cache_path(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("data") / "phantom.zarr", with_truth=True)


def fabricate(folder, cache_path):
    """A pre-training, a fine-tuning from scratch and one from the pre-training, the latter two evaluated."""
    init = {
        "source": "runs/pretrain",
        "loaded": ["a", "b", "c", "d"],
        "adapted": [],
        "skipped": ["head.2"],
        "fresh": ["decoder.head.weight"],
    }
    paths = [
        write_run(folder / "scratch", cache_path),
        write_run(folder / "pretrained", cache_path, init=init, seen=3),
        write_run(folder / "pretrain", cache_path, kind="pretrain", steps=700),
    ]
    evaluate(paths[0], cache_path, shift=3, paper=True)
    evaluate(paths[1], cache_path, shift=1)
    return paths


@pytest.fixture(scope="module")
def run_paths(tmp_path_factory, cache_path):
    return fabricate(tmp_path_factory.mktemp("runs"), cache_path)


@pytest.fixture(scope="module")
def page_path(tmp_path_factory, run_paths):
    return write_report(run_paths, tmp_path_factory.mktemp("page") / "report.html")


# ---------------------------------------------------------------- what the page holds


def test_the_page_asks_for_nothing_outside(page_path):
    check_asks_nothing_outside(page_path)


def test_every_picture_is_whole_and_has_an_alternative_text(page_path):
    page = read_page(page_path)
    assert len(page.alts) == page.tags.count("img") == len(page.links)
    assert all(len(alt) > 10 for alt in page.alts)
    # 3 box plots, 4 + 4 curves, 3 cases x (ground truth + 2 runs), 4 of superpixels, 2 components x 6 slices
    assert len(page.links) == 3 + 8 + 9 + 4 + 12
    for link in page.links:
        kind, content = link.split(";base64,")
        if kind == "data:image/svg+xml":
            assert ElementTree.fromstring(base64.b64decode(content)).tag.endswith("svg")
        else:
            assert base64.b64decode(content).startswith(b"\x89PNG")


def test_the_page_holds_the_numbers_of_the_evaluations(page_path, run_paths):
    page = read_page(page_path)
    for path in run_paths[:2]:
        summary = json.loads((path / "evaluation.json").read_text())["summary"]
        for values in summary.values():
            row = (
                f"{100 * values['dsc']:.2f} {100 * values['jc']:.2f} {values['hd95']:.2f} {values['asd']:.2f}"
            )
            assert row in page.text
    assert "points against A, 3 cases" in page.text
    assert "HD95 [mm]" in page.text


def test_the_published_protocol_has_a_table_of_its_own(page_path, run_paths):
    text = read_page(page_path).text
    paper = json.loads((run_paths[0] / "evaluation.json").read_text())["paper"]
    values = paper["summary"]["liver"]
    assert paper["description"] in text
    assert (
        f"A scratch liver {100 * values['dsc']:.2f} {100 * values['jc']:.2f} {values['hd95']:.2f} {values['asd']:.2f} "
        f"{values['num_empty_slices']} of 12 40 × 40"
    ) in text
    assert text.count("40 × 40") == len(paper["summary"]) == 3  # the other run has no such scores


def test_the_page_says_what_a_reader_must_know(page_path):
    text = read_page(page_path).text
    for content in (
        "pretrained: unlabelled test images seen in pre-training: 3.",
        "counts 0 in DSC and JC",
        "liver spleen Each class has its colour",
        "feature map of stride 16",
        "Best case by the mean DSC of run B",
        "Worst case by the mean DSC of run B",
        "level 1 of 0 to 1",
        "2 components of 12 slices; 100 % of the slices have a partner in another case",
        "Component 0: 6 slices of 3 cases",
        "augment.mirror True",
        "skipped head.2",
        "fresh decoder.head.weight",
        "loaded 4: a, b, c, d",
        "12 of the 12 pixels here",
        "17 min 30 s",
    ):
        assert content in text


def test_the_same_runs_give_the_same_page(tmp_path, page_path, run_paths):
    again = write_report(run_paths, tmp_path / "again.html")
    assert again.read_bytes() == page_path.read_bytes()


def test_nasty_names_are_escaped(tmp_path, cache_path):
    # A folder cannot hold a slash: the whole name comes in as a class.
    run = write_run(tmp_path / NASTY.replace("/", "_"), cache_path)
    evaluation = evaluate(run, cache_path, shift=2)
    text = json.dumps(evaluation).replace("spleen", json.dumps(NASTY)[1:-1])
    (run / "evaluation.json").write_text(text)
    page = read_page(write_report([run], tmp_path / "report.html"))
    assert "script" not in page.tags
    assert NASTY not in page.source
    assert run.name in page.text
    assert NASTY in page.text


# ---------------------------------------------------------------- runs that lack something


def test_an_unfinished_run_is_shown_with_what_it_has(tmp_path, cache_path):
    run = write_run(tmp_path / "young", cache_path, status="running")
    (run / "metrics.jsonl").unlink()
    text = read_page(write_report([run], tmp_path / "report.html")).text
    assert "young is not finished; what is shown is its state at step 0" in text
    assert "No run is evaluated yet" in text
    assert "No step is logged yet" in text
    assert "no run here used any" in text


def test_a_cache_out_of_reach_costs_only_its_pictures(tmp_path, run_paths):
    page = read_page(write_report(run_paths, tmp_path / "report.html", cache_path=tmp_path / "gone.zarr"))
    assert "There is no cache here" in page.text
    assert "gone.zarr" in page.text
    assert len(page.links) == 3 + 8


def test_a_lost_segmentation_is_named(tmp_path, cache_path):
    run = write_run(tmp_path / "tuned", cache_path)
    evaluate(run, cache_path, shift=1)
    (run / "predictions" / "case_0.nii.gz").unlink()
    page = read_page(write_report([run], tmp_path / "report.html"))
    assert page.text.count("No segmentation to show: The file does not exist") == 1
    assert sum("ground truth and segmentation" in alt for alt in page.alts) == 2


def test_one_class_in_voxels_and_a_cache_without_ground_truth(tmp_path, cache_path):
    run = write_run(tmp_path / "tuned", cache_path)
    evaluation = evaluate(run, cache_path, shift=1)
    rows = [row for row in evaluation["rows"] if row["class"] == "liver"]
    changes = {"unit": "voxel", "class_names": CLASSES[:2], "rows": rows, "summary": summarise(rows)}
    (run / "evaluation.json").write_text(json.dumps({**evaluation, **changes}))
    other = write_cache(tmp_path / "unlabelled.zarr", with_truth=False)
    page = read_page(write_report([run], tmp_path / "report.html", cache_path=other))
    assert "The data set has no voxel spacing" in page.text
    assert "HD95 [voxel]" in page.text
    assert sum("Box plot" in alt for alt in page.alts) == 1
    assert page.text.count("The cache has no ground truth of this case.") == 3


def test_a_pre_training_alone_makes_a_page(tmp_path, cache_path):
    run = write_run(tmp_path / "pretrain", cache_path, kind="pretrain")
    page = read_page(write_report([run], tmp_path / "report.html"))
    assert "IGCP loss" in " ".join(page.alts)
    assert not any("Box plot" in alt for alt in page.alts)


def test_pairs_are_shown_at_the_stride_that_was_trained(tmp_path, cache_path):
    settings = {"weights": [1.0, 1.0, 0.5], "ilcp_stride": 4}
    run = write_run(tmp_path / "pretrain", cache_path, kind="pretrain", config=settings)
    assert "feature map of stride 4 " in read_page(write_report([run], tmp_path / "report.html")).text


def test_a_folder_that_is_no_run_is_refused_and_leaves_no_page(tmp_path):
    with pytest.raises(SuperCLError, match="no run here"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- in a browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [400, 1400])
def test_no_sideways_scrolling_in_a_browser(tmp_path, page_path, width):
    check_in_a_browser(page_path, tmp_path, width=width)
