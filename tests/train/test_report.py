"""The report of fabricated runs over a small real cache: what it holds, what it asks for, how wide it gets."""

from __future__ import annotations

import base64
import html
import json
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import made_caches
import numpy as np
import pytest
from browser import found_by
from scipy.ndimage import gaussian_filter

from supercl_core.cache_reader import open_cache
from supercl_core.errors import SuperCLError
from supercl_core.intensity import rescale_slice
from supercl_core.schema import ASP_GRID
from supercl_core.volumes import write_label_map
from train.metrics import score_case, summarise
from train.report import write_report
from train.runs import FORMAT_VERSION, content_digests, describe_cache

CLASSES = ("background", "liver", "spleen")
SHAPE_ZYX = (4, 48, 64)
SPACING_MM = (3.0, 1.0, 1.0)
CASE_IDS = ("case_0", "case_1", "case_2")
NASTY = 'a"><script>alert(1)</script>$x$'


# ---------------------------------------------------------------- fabricated data


@pytest.fixture(scope="session")
def cache_path(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("data") / "phantom.zarr", with_truth=True)


def write_cache(path, *, with_truth):
    """Three cases of smooth noise with a block grid as superpixels, two classes, and weak labels by hand."""
    cases = {}
    for index, case_id in enumerate(CASE_IDS):
        noise = np.random.default_rng(index).normal(size=SHAPE_ZYX)
        image = gaussian_filter(noise, (0, 4, 4))[None].astype(np.float32)
        truth = np.zeros(SHAPE_ZYX, np.uint8)
        truth[1:, 12:30, 10:28] = 1
        truth[2:, 20:34, 36:50] = 2
        y, x = np.indices(SHAPE_ZYX[1:])
        asp = [rescale_slice(part)[0, :ASP_GRID, :ASP_GRID] for part in image.transpose(1, 0, 2, 3)]
        cases[case_id] = {
            "image": image,
            "superpixels": np.broadcast_to(y // 24 * 2 + x // 32, SHAPE_ZYX).astype(np.uint8),
            "asp": np.stack(asp).astype(np.float16),
            **({"ground_truth": truth} if with_truth else {}),
        }
    return made_caches.write_cache(
        path,
        cases,
        name="phantom",
        channel_names=("CT",),
        class_names=CLASSES,
        spacing_mm=SPACING_MM,
        levels=(np.arange(12) // 2, [0, 0, 1, 1] * 3),
    )


def write_run(path, cache_path, *, kind="finetune", status="finished", init=None, steps=60, seen=0):
    """The folder of a run that has trained for `steps` but is not evaluated."""
    path.mkdir(parents=True)
    cache = open_cache(cache_path)
    case_ids = [row.id for row in cache.done]
    tuned = kind == "finetune"
    record = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "name": path.name,
        "config": {"steps": steps, "lr": 0.001, "augment": {"mirror": True}},
        "world_size": 1,
        "model": {
            "backbone": "unet",
            "in_channels": 1,
            "num_classes": len(cache.class_names) if tuned else None,
            "filters": 8,
        },
        "cache": describe_cache(cache),
        "cases": {
            "train": [] if tuned else case_ids,
            "validation": [],
            "test": case_ids if tuned else [],
        },
        "content_digests": content_digests(cache, [] if tuned else case_ids),
        "split": {"file": "splits.txt", "labelled": 2} if tuned else None,
        "init": init,
        "unlabelled_test_cases_seen": seen,
        "weak_labels": None if tuned else {"name": "by_hand", "level": 1},
        "provenance": {"time": "2026-01-01T00:00:00+00:00", "versions": {"numpy": "2"}},
        "status": status,
    }
    (path / "run.json").write_text(json.dumps(record))
    terms = ("loss_ce", "loss_dice") if tuned else ("loss_ins", "loss_intra", "loss_inter")
    random = np.random.default_rng(len(path.name))
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(0, steps, 2):
            losses = {
                term: float(np.exp(-step / steps * 2) + 0.05 * random.random()) for term in ("loss", *terms)
            }
            speed = {"samples_per_s": 80.0, "data_wait_share": 0.031, "seconds": 3.0, "lr": 0.1}
            file.write(json.dumps({"step": step, "epoch": 0, **losses, **speed}) + "\n")
    return path


def evaluate(run_path, cache_path, *, shift):
    """Score and save the ground truth moved by `shift` columns, one more from case to case."""
    cache = open_cache(cache_path)
    rows = []
    for index, case_row in enumerate(cache.done):
        case = cache.case(case_row.id)
        prediction = np.roll(case.ground_truth_ZYX, shift + index, axis=2)
        scores = score_case(
            prediction, case.ground_truth_ZYX, class_names=cache.class_names, spacing_mm=case_row.spacing_mm
        )
        rows += [{"case": case_row.id, **score.as_dict()} for score in scores]
        write_label_map(run_path / "predictions" / f"{case_row.id}.nii.gz", prediction, case.geometry())
    evaluation = {
        "protocol": "per case, 3-D, in the source's geometry",
        "unit": "mm",
        "class_names": list(cache.class_names),
        "rows": rows,
        "summary": summarise(rows),
    }
    (run_path / "evaluation.json").write_text(json.dumps(evaluation))
    return evaluation


def fabricate(folder, cache_path):
    """A pre-training, a fine-tuning from scratch and one from the pre-training, the latter two evaluated."""
    init = {
        "source": "runs/pretrain",
        "loaded": ["a", "b", "c", "d"],
        "adapted": [],
        "skipped": ["head.2"],
    }
    paths = [
        write_run(folder / "scratch", cache_path),
        write_run(folder / "pretrained", cache_path, init=init, seen=3),
        write_run(folder / "pretrain", cache_path, kind="pretrain", steps=700),
    ]
    evaluate(paths[0], cache_path, shift=3)
    evaluate(paths[1], cache_path, shift=1)
    return paths


@pytest.fixture(scope="module")
def run_paths(tmp_path_factory, cache_path):
    return fabricate(tmp_path_factory.mktemp("runs"), cache_path)


@pytest.fixture(scope="module")
def page_path(tmp_path_factory, run_paths):
    return write_report(run_paths, tmp_path_factory.mktemp("page") / "report.html")


# ---------------------------------------------------------------- reading a page


class Page(HTMLParser):
    """What a page asks for, its texts, tags and alternative texts."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.alts, self.texts = [], [], [], []
        self.source = text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "data"):
                self.links.append(value)
            if name == "alt":
                self.alts.append(value)

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def read_page(path):
    return Page(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- what the page holds


def test_the_page_asks_for_nothing_outside(page_path):
    page = read_page(page_path)
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in page.source
    assert "url(" not in page.source
    assert "default-src 'none'" in page.source


def test_every_picture_is_whole_and_has_an_alternative_text(page_path):
    page = read_page(page_path)
    assert len(page.alts) == page.tags.count("img") == len(page.links)
    assert all(len(alt) > 10 for alt in page.alts)
    # 3 box plots, 4 + 3 loss curves, 3 cases x 2 runs, 4 of superpixels, 2 components x 6 slices
    assert len(page.links) == 3 + 7 + 6 + 4 + 12
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


def test_the_page_says_what_a_reader_must_know(page_path):
    text = read_page(page_path).text
    for content in (
        "pretrained: unlabelled test images seen in pre-training: 3.",
        "count 0 in DSC and JC",
        "Best case by the mean DSC of run B",
        "Worst case by the mean DSC of run B",
        "level 1 of 0 to 1",
        "2 components of 12 slices; 100 % of the slices have a partner in another case",
        "Component 0: 6 slices of 3 cases",
        "augment.mirror True",
        "skipped head.2",
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
    assert len(page.links) == 3 + 7


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


def test_a_folder_that_is_no_run_is_refused_and_leaves_no_page(tmp_path):
    with pytest.raises(SuperCLError, match="no run here"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- in a browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [400, 1400])
def test_no_sideways_scrolling_in_a_browser(tmp_path, page_path, width):
    # The page has no script of its own, and its policy would refuse one. A frame around it, which measures.
    content = page_path.read_text(encoding="utf-8")
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f"""<!DOCTYPE html><meta charset="utf-8"><iframe id="page" style="width:{width}px;height:900px;border:0"
        srcdoc="{html.escape(content)}"></iframe><pre id="found"></pre><script>
        const frame = document.getElementById("page");
        frame.onload = () => {{
          const root = frame.contentDocument.documentElement;
          for (const part of frame.contentDocument.querySelectorAll("details")) part.open = true;
          const images = [...frame.contentDocument.images];
          document.getElementById("found").textContent = JSON.stringify({{
            page: root.scrollWidth, window: root.clientWidth,
            broken: images.filter((image) => image.naturalWidth === 0).length,
            wide: images.filter((image) => image.getBoundingClientRect().right > root.clientWidth).length,
            images: images.length,
          }});
        }};
        </script>""",
        encoding="utf-8",
    )
    found = found_by(wrapper, width=width)
    assert found["images"] == content.count("<img ")
    assert (found["broken"], found["wide"]) == (0, 0)
    assert found["page"] <= found["window"] <= width
