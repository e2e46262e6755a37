"""Fine-tuning: a U-Net on the labelled cases of a split, from scratch or from a pre-trained encoder.

Called by `supercl finetune` and, as `train.finetune`, from Python. Never looks at a test case: the network that is kept
is that of the last step, or the best one on a validation part of the labelled cases. Settings are `train.recipes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from monai.losses import DiceLoss
from torch import Tensor
from torch.nn.functional import cross_entropy

from supercl_core.cache.reader import Cache
from supercl_core.config import as_dict
from supercl_core.errors import UsageError, some_of
from supercl_core.messages import note
from supercl_core.splits import Split, check_patients, fold_numbers
from train import runs
from train.augment import geometric_view, intensity_view
from train.averaging import WeightAverage
from train.data import (
    Batch,
    SliceDataset,
    network_channels,
    normalisation_window,
    repeat_channels,
    stacked_channels,
)
from train.device import prepare, resolve_precision, select_device
from train.inference import InferenceSettings, segment, single_component_classes
from train.lineage import read_lineage
from train.loop import fit
from train.metrics import dice
from train.models.backbones import build_encoder
from train.models.unet import UNet
from train.models.weights import WEIGHTS_NAME, load_pretrained, read_metadata, read_weights, save_weights
from train.recipes import FinetuneConfig
from train.sampling import SliceOrder

SCRATCH: Final = "scratch"
"""The value of `init` that means no pre-trained encoder."""

BEST_NAME: Final = "best.safetensors"
"""The network that was best on the validation cases so far."""


def finetune(
    cache: Cache, run_path: Path, *, split: Split, init: str = SCRATCH, config: FinetuneConfig | None = None
) -> Path:
    """Fine-tune a segmentation network on the labelled cases of a split; go on where an earlier call stopped.

    `init`: `scratch`, a pre-training run, or a file of weights. Writes the run folder (`train.runs`) and returns
    the path of its weights.

    Raises UsageError for settings that do not fit the cache, a class that no labelled case shows, a labelled case of a
    test patient, weights that know labels of held-out cases, or a run folder of another run, CacheError for a labelled
    case without ground truth, SuperCLError for weights of another architecture.
    """
    config = config or FinetuneConfig()
    device = select_device(config.device)
    if len(cache.class_names) < 2:
        raise UsageError(
            "The cache has no classes to learn.",
            where=cache.path,
            expected="a data set whose layout declares classes, such as dataset.json of the Decathlon",
            found=f"classes: {', '.join(cache.class_names) or 'none'}",
            next_step="Preprocess the data set in a layout with labels.",
        )
    check_patients(split, cache.rows)
    config = replace(config, precision=resolve_precision(config.precision, device))
    train_ids, validation_ids = _parts(split, cache, config)
    num_channels = stacked_channels(cache.num_channels, config.adjacent_slices)
    in_channels = network_channels(config.in_channels, num_channels)
    torch.manual_seed(config.seed)
    encoder = build_encoder(config.backbone, in_channels=in_channels, filters=config.filters)
    dataset = SliceDataset(
        cache,
        train_ids,
        patch_size=config.patch_size,
        ground_truth=True,
        multiple_of=encoder.strides[-1],
        adjacent_slices=config.adjacent_slices,
        foreground_share=config.foreground_share,
    )
    class_slices = dataset.class_slices()
    _check_classes(class_slices, cache, train_ids)
    if validation_ids and not any(truth_ZYX.any() for truth_ZYX in _truths(cache, validation_ids)):
        raise UsageError(
            "No validation case shows a class.",
            where=cache.path,
            expected="a class in the ground truth of some case of the fold that is left out",
            found=f"background alone in {some_of(validation_ids)}",
            next_step="Use fewer validation_folds, or another validation_fold.",
        )
    network = UNet(encoder, num_classes=len(cache.class_names))
    report = None if init == SCRATCH else load_pretrained(network, init)
    order = SliceOrder(
        slices=dataset.slices,
        batch_size=config.batch_size,
        seed=config.seed,
        foreground=class_slices,
        foreground_share=config.foreground_share,
    )
    config = config.in_steps(order.steps_per_epoch)
    settings = InferenceSettings(
        adjacent_slices=config.adjacent_slices,
        mirror_axes=config.augment.mirror_axes if config.mirrored_inference else (),
        largest_component=single_component_classes(_truths(cache, train_ids), len(cache.class_names))
        if config.largest_component
        else (),
        precision=config.precision,
    )
    model = {"backbone": config.backbone, "in_channels": in_channels, "filters": config.filters}
    lineage = [] if init == SCRATCH else read_lineage(init)
    _check_lineage(lineage, init, [*split.test, *validation_ids], cache)
    run = runs.start_run(
        run_path,
        {
            "kind": "finetune",
            "config": as_dict(config),
            "model": {**model, "num_classes": len(cache.class_names)},
            "inference": {name: value for name, value in asdict(settings).items() if name != "precision"},
            "world_size": 1,
            "cache": runs.describe_cache(cache),
            "cases": {"train": train_ids, "validation": validation_ids, "test": list(split.test)},
            "content_digests": runs.content_digests(cache, split.labelled),
            "split": {"file": split.file, "labelled": split.num_labelled_keys},
            "init": None if report is None else asdict(report),
            "lineage": lineage,
            "unlabelled_test_cases_seen": len(_known_to(lineage, "pretrain", split.test, cache)),
            "weak_labels": None,
        },
    )
    weights_path = run_path / WEIGHTS_NAME
    if run["status"] == "finished":
        return weights_path
    if report is not None:
        note(report.summary())
        # Channels of the same number may be of another kind: then the report has nothing to tell.
        seen = read_metadata(init).get("adjacent_slices", str(config.adjacent_slices))
        if seen != str(config.adjacent_slices):
            note(f"trained with {seen} adjacent slices on each side, used with {config.adjacent_slices}")
    step = prepare(network, config=config, device=device)
    average = WeightAverage(network, decay=config.ema_decay) if config.ema_decay else None
    scored = average.network if average else network
    fit(
        run_path,
        network=network,
        dataset=dataset,
        compute_losses=SegmentationLosses(step, config=config, in_channels=in_channels),
        config=config,
        device=device,
        order=order,
        average=average,
        validation=Validation(
            network=scored,
            cache=cache,
            case_ids=validation_ids,
            settings=settings,
            device=device,
            config=config,
            run_path=run_path,
        )
        if config.validate_every
        else None,
    )
    if config.keep == "best":
        scored.load_state_dict(read_weights(run_path / BEST_NAME))
    described = {**model, "adjacent_slices": config.adjacent_slices}
    save_weights(scored, weights_path, {name: str(value) for name, value in described.items()})
    runs.finish_run(run_path)
    return weights_path


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Scores a network on the validation cases while it trains, and saves it where it is the best so far."""

    network: UNet
    cache: Cache
    case_ids: Sequence[str]
    settings: InferenceSettings
    device: torch.device
    config: FinetuneConfig
    run_path: Path

    def due(self, done: int) -> bool:
        """Every `validate_every` steps, and after the last one."""
        return done % self.config.validate_every == 0 or done == self.config.steps

    def __call__(self, done: int) -> dict[str, float]:
        """`validation_dsc`: DSC (0..1) over whole volumes, mean over cases and over the classes of a case."""
        scores = []
        for case_id in self.case_ids:
            case = self.cache.case(case_id)
            prediction_ZYX = segment(
                self.network,
                case.read("image", slice(None)).swapaxes(0, 1),
                normalisation_window(case),
                settings=self.settings,
                device=self.device,
            )
            of_classes = dice(
                prediction_ZYX,
                case.read("ground_truth", slice(None)),
                num_classes=len(self.cache.class_names),
            )
            scores += [np.nanmean(of_classes[1:])] if np.isfinite(of_classes[1:]).any() else []
        dsc = float(np.mean(scores))
        logged = [entry.get("validation_dsc", -1.0) for entry in runs.read_metrics(self.run_path)]
        if self.config.keep == "best" and dsc > max(logged, default=-1.0):
            save_weights(self.network, self.run_path / BEST_NAME, {})
        return {"validation_dsc": dsc}


class SegmentationLosses:
    """From a batch with ground truth to cross-entropy, soft Dice and what is minimised."""

    def __init__(
        self, network: Callable[[Tensor], Tensor], *, config: FinetuneConfig, in_channels: int
    ) -> None:
        self._network, self._config, self._in_channels = network, config, in_channels
        # Over the whole batch, so that a class missing from one slice is no division by nothing.
        self._dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)

    def __call__(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses `loss_ce`, with `dice_ce` also `loss_dice`, and their sum `loss`."""
        assert batch.ground_truth_BYX is not None
        augment = self._config.augment
        images = intensity_view(batch.image_BCYX, generator, config=augment)
        images, truth = geometric_view(images, generator, config=augment, labels_BYX=batch.ground_truth_BYX)
        logits = self._network(repeat_channels(images, self._in_channels)).float()
        terms = {"loss_ce": cross_entropy(logits, truth.long())}
        if self._config.loss == "dice_ce":
            terms["loss_dice"] = self._dice(logits, truth[:, None].long())
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}


def _parts(split: Split, cache: Cache, config: FinetuneConfig) -> tuple[list[str], list[str]]:
    """The labelled cases to train on, and those of the fold that is left out for validation."""
    if not config.validation_folds:
        return list(split.labelled), []
    folds = fold_numbers(split.labelled, cache.rows, num_folds=config.validation_folds)
    parts: tuple[list[str], list[str]] = ([], [])
    for case_id, fold in zip(split.labelled, folds, strict=True):
        parts[fold == config.validation_fold].append(case_id)
    return parts


def _check_classes(class_slices: Sequence[np.ndarray], cache: Cache, case_ids: Sequence[str]) -> None:
    """Raise UsageError for classes that none of the cases to train on shows."""
    names = cache.class_names[1:]
    missing = [name for name, slices in zip(names, class_slices, strict=True) if not len(slices)]
    if missing:
        raise UsageError(
            "No labelled case shows a class that is to be learned.",
            where=cache.path,
            expected=f"each of {', '.join(names)} in the ground truth of some case",
            found=f"no voxel of {', '.join(missing)} in {some_of(case_ids)}",
            next_step="Add cases that show it to the labelled list of the split.",
        )


def _truths(cache: Cache, case_ids: Sequence[str]) -> Iterator[np.ndarray]:
    """The classes of each case, uint8 (z, y, x)."""
    for case_id in case_ids:
        yield cache.case(case_id).read("ground_truth", slice(None))


def _known_to(
    lineage: Sequence[dict[str, Any]], kind: str, case_ids: Sequence[str], cache: Cache
) -> list[str]:
    """Those of the cases that runs of the `kind` have learned from.

    A case is known again by its content, under whatever name, and by its id in caches of one data set: other settings
    of preprocessing give its images another content.
    """
    of_kind = [run for run in lineage if run["kind"] == kind]
    digests = {digest for run in of_kind for digest in run["content_digests"].values()}
    ids = {case_id for run in of_kind if run["data_set"] == cache.name for case_id in run["content_digests"]}
    wanted = runs.content_digests(cache, case_ids)
    return [case_id for case_id, digest in wanted.items() if case_id in ids or digest in digests]


def _check_lineage(
    lineage: Sequence[dict[str, Any]], init: str, held_out: Sequence[str], cache: Cache
) -> None:
    """Raise UsageError where the weights have learned from the labels of cases that are held out."""
    if known := _known_to(lineage, "finetune", held_out, cache):
        raise UsageError(
            "The network to start from was fine-tuned on test or validation cases, with their labels.",
            where=init,
            expected="a network that knows the label of no case that is held out",
            found=some_of(known),
            next_step="Start from a pre-training run, or use the split of that run.",
        )
