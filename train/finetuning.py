"""Fine-tuning: a U-Net on the labelled cases of a split, from scratch or from a pre-trained encoder.

Called by `supercl finetune` and, as `train.finetune`, from Python. Never looks at a test case: the network that
is kept is the one after the last step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from monai.losses import DiceLoss
from torch import Tensor
from torch.nn.functional import cross_entropy

from supercl_core.cache_reader import Cache
from supercl_core.config import as_dict
from supercl_core.errors import UsageError
from supercl_core.splits import Split, check_contents, some_of
from train import runs
from train.augment import AugmentConfig, geometric_view, intensity_view
from train.data import Batch, SliceDataset
from train.device import prepare, resolve_precision, select_device
from train.loop import LoopConfig, fit
from train.models.backbones import build_encoder
from train.models.unet import UNet
from train.models.weights import WEIGHTS_NAME, load_encoder, save_weights
from train.pretraining import network_channels, repeat_channels

SCRATCH: Final = "scratch"
"""The value of `init` that means no pre-trained encoder."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopConfig):
    """Settings of a fine-tuning run. What the publication sets is in the preset `published`.

    Runs that are compared get the same number of steps, whatever they start from.
    """

    steps: int = 4_000
    batch_size: int = 16
    lr: float = 1e-3
    final_lr: float = 1e-5
    warmup_steps: int = 50
    loss: Literal["dice_ce", "ce"] = "dice_ce"
    """Soft Dice plus cross-entropy, or cross-entropy alone (published)."""
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(crop=(1.0, 1.0)))
    """Intensity changes, then mirroring, elastic deformation, rotation and scaling; no random crop (METHOD)."""


PRESETS: Final[dict[str, dict[str, Any]]] = {
    "published": {
        "loss": "ce",
        "optimiser": "adam",
        "lr": 5e-4,
        "final_lr": 5e-6,
        "warmup_steps": 0,
        "weight_decay": 1e-5,
        "augment": {"p_brightness": 0.0, "p_contrast": 0.0, "p_blur": 0.0},
    },
    # No mirroring: on which side an organ lies is what tells the phantom's liver from its spleen.
    "demo": {
        "steps": 700,
        "batch_size": 8,
        "filters": 8,
        "lr": 4e-3,
        "augment": {"mirror_axes": []},
    },
}
"""`published`: METHOD's table. `demo`: minutes on a CPU."""


def finetune(
    cache: Cache, run_path: Path, *, split: Split, init: str = SCRATCH, config: FinetuneConfig | None = None
) -> Path:
    """Fine-tune a segmentation network on the labelled cases of a split; go on where an earlier call stopped.

    `init`: `scratch`, a pre-training run, or a file of weights. Writes the run folder (`train.runs`) and returns
    the path of its weights.

    Raises UsageError for settings that do not fit the cache, a labelled case with the content of a test case, an
    encoder that knows labels of test cases, or a run folder of another run, CacheError for a labelled case without
    ground truth, SuperCLError for weights of another architecture.
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
    check_contents(split, cache.rows)
    config = replace(config, precision=resolve_precision(config.precision, device))
    in_channels = network_channels(config.in_channels, cache.num_channels)
    torch.manual_seed(config.seed)
    encoder = build_encoder(config.backbone, in_channels=in_channels, filters=config.filters)
    dataset = SliceDataset(
        cache,
        list(split.labelled),
        patch_size=config.patch_size,
        ground_truth=True,
        multiple_of=encoder.strides[-1],
    )
    network = UNet(encoder, num_classes=len(cache.class_names))
    report = None if init == SCRATCH else load_encoder(network, init)
    model = {"backbone": config.backbone, "in_channels": in_channels, "filters": config.filters}
    run = runs.start_run(
        run_path,
        {
            "kind": "finetune",
            "config": as_dict(config),
            "model": {**model, "num_classes": len(cache.class_names)},
            "world_size": 1,
            "cache": runs.describe_cache(cache),
            "cases": {"train": list(split.labelled), "validation": [], "test": list(split.test)},
            "content_digests": runs.content_digests(cache, split.labelled),
            "split": {"file": split.file, "labelled": split.num_labelled_keys},
            "init": None if report is None else report.as_dict(),
            "unlabelled_test_cases_seen": _test_cases_seen(init, split, cache),
            "weak_labels": None,
        },
    )
    weights_path = run_path / WEIGHTS_NAME
    if run["status"] == "finished":
        return weights_path
    fit(
        run_path,
        network=network,
        dataset=dataset,
        compute_losses=SegmentationLosses(
            prepare(network, config=config, device=device), config=config, in_channels=in_channels
        ),
        config=config,
        device=device,
    )
    save_weights(network, weights_path, {name: str(value) for name, value in model.items()})
    runs.finish_run(run_path)
    return weights_path


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


def _test_cases_seen(init: str, split: Split, cache: Cache) -> int:
    """Test cases whose images the run `init`, or the run of that file, has seen; 0 for foreign weights.

    A case is known again by its content, under whatever name, and by its id in caches of one data set: other settings
    of preprocessing give its images another content. Raises UsageError where the run has seen their labels too.
    """
    run_path = Path(init) if Path(init).is_dir() else Path(init).parent
    if init == SCRATCH or not (run_path / "run.json").is_file():
        return 0
    run = runs.read_run(run_path)
    known_ids = set(run["content_digests"]) if run["cache"]["name"] == cache.name else set()
    known = set(run["content_digests"].values())
    test = runs.content_digests(cache, split.test)
    seen = [case_id for case_id, digest in test.items() if case_id in known_ids or digest in known]
    if seen and run["kind"] == "finetune":
        raise UsageError(
            "The network to start from was fine-tuned on test cases, with their labels.",
            where=init,
            expected="a network that knows the label of no test case",
            found=some_of(seen),
            next_step="Start from a pre-training run, or use the split of that run.",
        )
    return len(seen)
