"""Evaluation: the test cases of a fine-tuned run, segmented volume by volume and scored per case.

Called by `supercl evaluate`. Metrics are `train.metrics`; this module brings network, volumes and files together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from supercl_core import provenance
from supercl_core.cache_reader import Cache, CachedCase
from supercl_core.errors import CacheError, UsageError
from supercl_core.files import write_json
from supercl_core.progress import progress
from supercl_core.volumes import write_label_map
from train import runs
from train.data import normalisation_window, normalise_images
from train.device import select_device
from train.metrics import score_case, summarise
from train.models.backbones import build_encoder
from train.models.unet import UNet
from train.models.weights import check_same_architecture, read_weights
from train.pretraining import network_channels, repeat_channels

SLICES_AT_ONCE: Final = 16
"""Slices of a volume that go through the network together."""


def evaluate(run_path: Path, cache: Cache, *, device_name: str = "auto") -> dict[str, Any]:
    """Segment and score all test cases of a fine-tuned run; return what `evaluation.json` holds.

    Writes `RUN/predictions/<case>.nii.gz` in the geometry of the sources and `RUN/evaluation.json`. Distances are
    in mm, or in voxels when one of the test cases has no known spacing.

    Raises UsageError for a run that is not fine-tuned, not finished or without test cases, CacheError for a cache
    of other classes, or without the ground truth of a test case; nothing is written then.
    """
    run = runs.read_run(run_path)
    _check_run(run, run_path, cache)
    device = select_device(device_name)
    network = load_network(run, run_path).to(device)
    cases = [cache.case(case_id) for case_id in run["cases"]["test"]]
    unlabelled = [case.row.id for case in cases if not case.row.has_ground_truth]
    if unlabelled:
        raise CacheError(
            "Test cases have no ground truth to score against.",
            where=cache.path,
            expected="a label map for every test case of the split",
            found=", ".join(unlabelled[:5]),
            next_step="Take these cases out of the split's test list, or preprocess them with their label maps.",
        )
    in_mm = all(case.row.spacing_mm is not None for case in cases)
    rows = []
    with progress("evaluate", total=len(cases), unit="cases") as advance:
        for case in cases:
            prediction_ZYX = segment(network, case, device=device)
            write_label_map(
                run_path / "predictions" / f"{case.row.id}.nii.gz", prediction_ZYX, case.geometry()
            )
            truth_ZYX = case.read("ground_truth", slice(None))
            scores = score_case(
                prediction_ZYX,
                truth_ZYX,
                class_names=cache.class_names,
                spacing_mm=case.row.spacing_mm if in_mm else None,
            )
            rows += [{"case": case.row.id, **score.as_dict()} for score in scores]
            advance(note=case.row.id)
    result = {
        "protocol": "per case, 3-D, in the source's geometry",
        "unit": "mm" if in_mm else "voxel",
        "class_names": list(cache.class_names),
        "rows": rows,
        "summary": summarise(rows),
        "provenance": provenance.record(),
    }
    write_json(run_path / "evaluation.json", result)
    return result


def load_network(run: dict[str, Any], run_path: Path) -> UNet:
    """The trained network of a fine-tuned run, on the CPU, in evaluation mode.

    Raises SuperCLError where its weights are missing, or are not those of the model that run.json describes.
    """
    weights = read_weights(run_path)
    with torch.device("meta"):  # run.json may ask for more memory than there is
        expected = _untrained(run).state_dict()
    check_same_architecture(
        {name: tensor.shape for name, tensor in expected.items()},
        {name: tensor.shape for name, tensor in weights.items()},
        run_path,
    )
    network = _untrained(run)
    network.load_state_dict(weights)
    return network.eval()


@torch.inference_mode()
def segment(network: UNet, case: CachedCase, *, device: torch.device) -> np.ndarray:
    """Classes of every voxel of a case, uint8 (z, y, x), slice by slice at the slices' own size.

    Slices are normalised as in training, and padded with their mean to multiples of the network's last stride.
    """
    _, num_slices, height, width = case.row.shape
    window = torch.from_numpy(normalisation_window(case))[None].to(device)
    in_channels, stride = network.encoder.in_channels, network.encoder.strides[-1]
    classes = np.empty((num_slices, height, width), np.uint8)
    padding = (0, -width % stride, 0, -height % stride)
    for first in range(0, num_slices, SLICES_AT_ONCE):
        stored = case.read("image", slice(first, first + SLICES_AT_ONCE))
        images = normalise_images(torch.from_numpy(stored).to(device), window)
        images = torch.nn.functional.pad(images, padding)
        logits = network(repeat_channels(images, in_channels))
        part = logits.argmax(dim=1)[:, :height, :width].to(torch.uint8)
        classes[first : first + SLICES_AT_ONCE] = part.cpu().numpy()
    return classes


def _untrained(run: dict[str, Any]) -> UNet:
    """The network that run.json describes, with random weights on PyTorch's default device."""
    model = run["model"]
    encoder = build_encoder(model["backbone"], in_channels=model["in_channels"], filters=model["filters"])
    return UNet(encoder, num_classes=len(run["cache"]["class_names"]))


def _check_run(run: dict[str, Any], run_path: Path, cache: Cache) -> None:
    if run["kind"] != "finetune" or run["status"] != "finished":
        raise UsageError(
            "Only a finished fine-tuning run can be evaluated.",
            where=run_path,
            expected="kind finetune, status finished",
            found=f"kind {run['kind']}, status {run['status']}",
            next_step="Run `supercl finetune` to its end first.",
        )
    if not run["cases"]["test"]:
        raise UsageError(
            "The run's split has no test case.",
            where=run_path,
            next_step="Fine-tune with a split that has a test list.",
        )
    network_channels(run["model"]["in_channels"], cache.num_channels)
    if list(cache.class_names) != run["cache"]["class_names"]:
        raise CacheError(
            "The cache has other classes than the run learned.",
            where=cache.path,
            expected=", ".join(run["cache"]["class_names"]),
            found=", ".join(cache.class_names) or "none",
            next_step=f"Use the cache that the run was made with: {run['cache']['path']}",
        )
