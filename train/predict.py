"""Prediction: volumes from files segmented by a fine-tuned run, as NIfTI in the geometry of their files.

Called by `supercl predict` and from Python. Volumes are read, stored and normalised as preprocessing and training do,
so a file gives the segmentation that evaluation gets from a cache of it. A cache of quantised intensities
(`image_dtype = int16`) differs by their rounding.

Beside the segmentations lies a record of what made each of them, one line a file, so that a second call does only
what is not done. It is written after the segmentation: where both do not agree, the file is done again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from supercl_core import sources
from supercl_core.errors import CacheError, StorageError, SuperCLError, UsageError, printable, some_of
from supercl_core.files import digest_of, parse_json, read_text, write_text
from supercl_core.formats.case_files import all_files, read_headers, read_image
from supercl_core.formats.geometry import Geometry
from supercl_core.formats.volumes import write_label_map
from supercl_core.intensity import to_stored, volume_window
from supercl_core.locks import check_lock, hold
from supercl_core.messages import note
from supercl_core.progress import progress
from supercl_core.sources import CaseSource
from supercl_core.sources.base import with_usable_ids
from supercl_core.sources.walk import data_suffix, stem
from train import runs
from train.device import select_device
from train.inference import InferenceSettings, check_finished, load_network, segment
from train.models.unet import UNet
from train.models.weights import WEIGHTS_NAME

RECORD_NAME: Final = "predictions.jsonl"
"""In the output folder: case, and SHA-256 (hex) of its input files, of the network and of the segmentation."""

LARGEST_RECORD_BYTES: Final = 1 << 28
"""Half a million segmentations."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What became of the files of one call."""

    class_names: tuple[str, ...]
    """Of the segmentations, the background first."""
    num_predicted: int
    num_kept: int
    """Done by an earlier call, with the same network, from the same files."""
    failed: tuple[dict[str, str], ...]
    """`case` and `reason` of each file that could not be segmented."""
    leftover: tuple[str, ...]
    """Names of the other files in the output folder: of no case of the input folder. Empty for a single volume."""


def predict(
    run_path: Path,
    input_path: Path,
    output_path: Path,
    *,
    layout: str | None = None,
    device_name: str = "auto",
) -> Predicted:
    """Segment one volume or all of a folder with a fine-tuned run; what is done already is left as it is.

    `input_path`: a volume, or a folder in any layout of `supercl_core.sources`, which `layout` names where it is not to
    be recognised. Writes `output_path/<case>.nii.gz`, uint8 classes in the geometry of the file, each at once and
    whole. Of a file that cannot be segmented any more, the segmentation of an earlier call is removed.

    Raises UsageError for a run that is not fine-tuned or not finished, and for an output folder that holds something
    else or in which outputs would be inputs of the next call; CacheError where another call is writing there (`locks`);
    SuperCLError where there is no input. What is wrong with one volume, such as another number of channels than the
    network was trained on, stops no other.
    """
    run = runs.read_run(run_path)
    check_finished(run, run_path)
    cases = _cases(input_path, layout)
    _check_output(input_path, output_path)
    device = select_device(device_name)
    network = load_network(run, run_path).to(device)
    settings = InferenceSettings.from_run(run)
    network_digest = _network_digest(run_path, settings)
    record_path = output_path / RECORD_NAME
    files = {case.id: output_path / f"{case.id}.nii.gz" for case in cases}
    num_predicted = num_kept = 0
    failed: list[dict[str, str]] = []
    with ExitStack() as stack:
        token = stack.enter_context(hold(record_path))
        done = _read_record(record_path)
        write_text(record_path, "".join(json.dumps(entry) + "\n" for entry in done.values()))
        record = stack.enter_context(record_path.open("a"))
        advance = stack.enter_context(progress("predict", total=len(cases), unit="volumes"))
        for case in cases:
            file = files[case.id]
            try:
                if case.problem:
                    raise SuperCLError(case.problem, next_step="Mend this entry of the folder.")
                read_headers(case)
                made_of = {"input": digest_of(all_files(case)), "network": network_digest}
                if _is_done(file, done.get(case.id), made_of):
                    num_kept += 1
                else:
                    classes_ZYX, geometry = _segmented(
                        case, network=network, run=run, settings=settings, device=device
                    )
                    check_lock(record_path, token)
                    write_label_map(file, classes_ZYX, geometry)
                    line = {"case": case.id, **made_of, "segmentation": digest_of([file])}
                    record.write(json.dumps(line) + "\n")
                    record.flush()
                    num_predicted += 1
            except (StorageError, CacheError):
                raise
            except SuperCLError as error:
                file.unlink(missing_ok=True)  # an earlier call made it of another input
                failed.append({"case": case.id, "reason": error.one_line()})
            advance(note=case.id)
    names = {entry.name for entry in output_path.iterdir()} if input_path.is_dir() else set()
    return Predicted(
        class_names=tuple(run["cache"]["class_names"]),
        num_predicted=num_predicted,
        num_kept=num_kept,
        failed=tuple(failed),
        leftover=tuple(sorted(names - {RECORD_NAME, *(file.name for file in files.values())})),
    )


def _cases(input_path: Path, layout: str | None) -> tuple[CaseSource, ...]:
    """The cases of the input, without their label maps."""
    if not input_path.is_file():
        source = sources.discover(input_path, layout)
        note(*source.notes(input_path))
        return tuple(dataclasses.replace(case, label_paths=()) for case in source.cases)
    if layout is not None:
        raise UsageError(
            "A single volume has no layout.",
            where=input_path,
            expected="a folder, where a layout is named",
            found="a file",
            next_step="Leave --layout out, or name the folder.",
        )
    name = printable(input_path.name)
    return with_usable_ids([CaseSource(id=stem(input_path.name), name=name, image_paths=(input_path,))])


def _segmented(
    case: CaseSource, *, network: UNet, run: dict[str, Any], settings: InferenceSettings, device: torch.device
) -> tuple[np.ndarray, Geometry]:
    """The classes of one volume, uint8 (z, y, x), and where they lie.

    Raises SuperCLError for a volume of other channels than the training data: those of its cache, since a network of
    more may have been given one of them repeatedly.
    """
    volume = read_image(case)
    if len(volume.array_CZYX) != run["cache"]["num_channels"]:
        raise SuperCLError(
            "The volume has another number of channels than the network was trained on.",
            expected=run["cache"]["num_channels"],
            found=len(volume.array_CZYX),
            next_step="Give volumes of the same kind as the training data.",
        )
    geometry, stored = volume.geometry, to_stored(volume.array_CZYX)
    del volume  # one that was converted is not needed any more
    window_C4 = volume_window(stored)
    return segment(network, stored.array_CZYX, window_C4, settings=settings, device=device), geometry


def _check_output(input_path: Path, output_path: Path) -> None:
    """Raise UsageError for an output folder that lies among the inputs, is no folder, or holds other things."""
    found = ""
    inputs, output = (
        (input_path if input_path.is_dir() else input_path.parent).resolve(),
        output_path.resolve(),
    )
    if output == inputs or (input_path.is_dir() and inputs in output.parents):
        found = "a folder of the input, where segmentations would be taken for volumes"
    elif output.is_dir():
        names = sorted(entry.name for entry in output.iterdir())
        if names and not any(name.startswith(RECORD_NAME) for name in names):  # the record, or its lock
            found = f"a folder with other files: {some_of(names)}"
    elif output.exists() or data_suffix(output.name) is not None:
        found = "a file" if output.exists() else "the name of a file"
    if found:
        raise UsageError(
            "Segmentations need a folder of their own.",
            where=output_path,
            expected="a new folder, or one that `supercl predict` wrote to",
            found=found,
            next_step="Name another folder.",
        )


def _is_done(file: Path, recorded: dict[str, Any] | None, made_of: dict[str, str]) -> bool:
    """Whether the segmentation is there as recorded, of the same input and the same network."""
    if recorded is None or any(recorded.get(key) != digest for key, digest in made_of.items()):
        return False
    return file.is_file() and recorded.get("segmentation") == digest_of([file])


def _read_record(record_path: Path) -> dict[str, dict[str, Any]]:
    """The last line of each case. What is cut off or damaged stands for nothing done."""
    record: dict[str, dict[str, Any]] = {}
    if record_path.is_file():
        with suppress(ValueError):
            for line in read_text(record_path, limit_bytes=LARGEST_RECORD_BYTES).splitlines():
                with suppress(ValueError, TypeError, KeyError):
                    entry = parse_json(line)
                    record[entry["case"]] = entry
    return record


def _network_digest(run_path: Path, settings: InferenceSettings) -> str:
    """SHA-256 (hex) of all that decides what the network gives: its weights and how it is applied."""
    return hashlib.sha256(f"{digest_of([run_path / WEIGHTS_NAME])} {settings}".encode()).hexdigest()
