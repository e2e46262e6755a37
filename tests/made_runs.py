"""Run folders written by hand, without training: for scores that tests choose."""

import json

from train.metrics import summarise
from train.runs import FORMAT_VERSION

CLASSES = ["background", "anterior", "posterior"]


def write_run(path, dsc_by_case, *, labelled=2, steps=300, unit="mm", classes=CLASSES, kind="finetune"):
    """A run folder; `dsc_by_case`: case -> DSC of each foreground class, None meaning absent in both."""
    path.mkdir(parents=True)
    record = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "name": path.name,
        "status": "finished",
        "config": {"steps": steps},
        "world_size": 1,
        "model": {"backbone": "unet", "in_channels": 1, "num_classes": len(classes), "filters": 4},
        "inference": {"adjacent_slices": 0, "mirror_axes": [], "largest_component": []},
        "cache": {
            "path": "a.zarr",
            "name": "a",
            "config_digest": "d",
            "num_channels": 1,
            "num_slices": 9,
            "class_names": [],
        },
        "cases": {"train": [], "validation": [], "test": list(dsc_by_case)},
        "content_digests": {},
        "split": {"file": "s.txt", "labelled": labelled},
        "init": None,
        "lineage": [],
        "unlabelled_test_cases_seen": 0,
        "weak_labels": None,
        "provenance": {},
    }
    (path / "run.json").write_text(json.dumps(record))
    (path / "metrics.jsonl").write_text(json.dumps({"step": steps, "loss": 1.0}) + "\n")
    rows = []
    for case, values in dsc_by_case.items():
        for name, dsc in zip(classes[1:], values, strict=True):
            state = "absent in both" if dsc is None else "ok" if dsc else "missing in prediction"
            jc, distance = (None if dsc is None else dsc / (2 - dsc)), (3.5 if dsc else None)
            values_of_row = {"dsc": dsc, "jc": jc, "hd95": distance, "asd": distance, "state": state}
            rows.append({"case": case, "class": name, **values_of_row})
    evaluation = {"protocol": "per-case", "unit": unit, "class_names": classes, "rows": rows, "paper": None}
    (path / "evaluation.json").write_text(json.dumps({**evaluation, "summary": summarise(rows)}))
    return path
