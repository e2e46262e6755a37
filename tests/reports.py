"""What the tests of reports share: runs made by hand over a small real cache, and pages read back."""

import html
import json
from html.parser import HTMLParser

import made_caches
import numpy as np
from browser import found_by
from scipy.ndimage import gaussian_filter

from supercl_core.cache.reader import open_cache
from supercl_core.cache.schema import ASP_GRID
from supercl_core.formats.volumes import write_label_map
from supercl_core.intensity import rescale_slice
from train.metrics import MISSING_RULE, score_case, summarise
from train.paper_protocol import PaperScores
from train.runs import FORMAT_VERSION, content_digests, describe_cache

CLASSES = ("background", "liver", "spleen")
SHAPE_ZYX = (4, 48, 64)
SPACING_MM = (3.0, 1.0, 1.0)
CASE_IDS = ("case_0", "case_1", "case_2")
NASTY = 'a"><script>alert(1)</script>$x$'


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


def write_run(
    path,
    cache_path,
    *,
    kind="finetune",
    status="finished",
    init=None,
    steps=60,
    seen=0,
    labelled=2,
    config=None,
):
    """The folder of a run that has trained for `steps` but is not evaluated; `config`: settings to add."""
    path.mkdir(parents=True)
    cache = open_cache(cache_path)
    case_ids = [row.id for row in cache.done]
    tuned = kind == "finetune"
    record = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "name": path.name,
        "config": {"steps": steps, "lr": 0.001, "augment": {"mirror": True}, **(config or {})},
        "world_size": 1,
        "model": {
            "backbone": "unet",
            "in_channels": 1,
            "num_classes": len(cache.class_names) if tuned else None,
            "filters": 8,
        },
        "inference": {"adjacent_slices": 0, "mirror_axes": [], "largest_component": []} if tuned else None,
        "cache": describe_cache(cache),
        "cases": {
            "train": [] if tuned else case_ids,
            "validation": [],
            "test": case_ids if tuned else [],
        },
        "content_digests": content_digests(cache, [] if tuned else case_ids),
        "split": {"file": "splits.txt", "labelled": labelled} if tuned else None,
        "init": init,
        "lineage": [],
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
            if tuned and step % 10 == 0:
                file.write(json.dumps({"step": step, "validation_dsc": 0.5 + step / steps / 3}) + "\n")
    return path


def evaluate(run_path, cache_path, *, shift, paper=False):
    """Score and save the ground truth moved by `shift` columns, one more from case to case.

    `paper`: by the published protocol too.
    """
    cache = open_cache(cache_path)
    rows, published = [], PaperScores(cache.class_names, crop=(40, 40)) if paper else None
    for index, case_row in enumerate(cache.done):
        case = cache.case(case_row.id)
        prediction = np.roll(case.ground_truth_ZYX, shift + index, axis=2)
        scores = score_case(
            prediction, case.ground_truth_ZYX, class_names=cache.class_names, spacing_mm=case_row.spacing_mm
        )
        rows += [{"case": case_row.id, **score.as_dict()} for score in scores]
        if published:
            published.add(prediction, case.ground_truth_ZYX)
        write_label_map(run_path / "predictions" / f"{case_row.id}.nii.gz", prediction, case.geometry())
    evaluation = {
        "protocol": "per case, 3-D, in the source's geometry",
        "unit": "mm",
        "missing_rule": MISSING_RULE,
        "part": "test",
        "class_names": list(cache.class_names),
        "rows": rows,
        "summary": summarise(rows),
        "paper": published.result() if published else None,
    }
    (run_path / "evaluation.json").write_text(json.dumps(evaluation))
    return evaluation


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


def check_asks_nothing_outside(page_path):
    page = read_page(page_path)
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in page.source
    assert "url(" not in page.source
    assert "default-src 'none'" in page.source


def check_in_a_browser(page_path, folder, *, width):
    """All pictures are shown, and none makes a frame of `width` pixels scroll sideways."""
    found = _measured(page_path, folder, width=width)
    assert found["images"] == page_path.read_text(encoding="utf-8").count("<img ")
    assert (found["broken"], found["wide"]) == (0, 0)
    assert found["page"] <= found["window"] <= width


def _measured(page_path, folder, *, width):
    """What a browser finds of a page in a frame of `width` pixels, all fold-outs open."""
    # The page has no script of its own, and its policy would refuse one. A frame around it, which measures.
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f"""<!DOCTYPE html><meta charset="utf-8"><iframe id="page" style="width:{width}px;height:900px;border:0"
        srcdoc="{html.escape(page_path.read_text(encoding="utf-8"))}"></iframe><pre id="found"></pre><script>
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
    return found_by(wrapper, width=width)
