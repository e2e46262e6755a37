"""Pre-training: L = l1 L_ins + l2 L_intra (ILCP) + l3 L_inter (IGCP) on the slices of a cache (METHOD).

Called by `supercl pretrain` and, as `train.pretrain`, from Python. The loop itself is `train.loop.fit`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from supercl_core.cache_reader import Cache, WeakLabels
from supercl_core.config import as_dict
from supercl_core.errors import UsageError
from supercl_core.splits import identical_to
from train import distributed, runs
from train.augment import AugmentConfig, pretrain_views
from train.data import Batch, SliceDataset
from train.loop import LoopConfig, fit, select_device
from train.losses.contrastive import supervised_contrastive
from train.models.unet import PretrainNet
from train.models.weights import WEIGHTS_NAME, save_weights
from train.pairs import (
    AspDivisor,
    InstanceRule,
    PixelSampling,
    ViewPairs,
    cached_igcp_positives,
    ilcp_positives,
    instance_positives,
    online_igcp_positives,
    sample_pixels,
)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(LoopConfig):
    """Settings of a pre-training run. What the publication sets is in the preset `published`."""

    steps: int = 20_000
    batch_size: int = 32
    lr: float = 2e-3
    final_lr: float = 0.0
    warmup_steps: int = 100
    projection: int = 128
    """Width of the pixel projection head, which is thrown away afterwards; 0 contrasts the encoder's features."""
    temperature: float = 0.1
    """Temperature of all three losses (published: 0.1)."""
    weights: tuple[float, float, float] = (1.0, 1.0, 0.5)
    """Of L_ins, L_intra and L_inter (published: 1, 1, 0.5)."""
    instance_rule: InstanceRule = "position"
    """Positives of L_ins: slices at close positions (volumes), or only the other view of the slice."""
    position_threshold: float = 0.1
    """Slices closer than this are positive pairs under the rule `position`."""
    ilcp_pixels: PixelSampling = "all"
    """Pixels of the stride-16 map that ILCP contrasts."""
    igcp: Literal["cached", "online"] = "cached"
    """Weak labels from the cache (ours), or from the features of each batch (published)."""
    ccl_level: int | None = None
    """Level of the cached labels, 0 the finest; None takes the finest with a positive per anchor."""
    asp_divisor: AspDivisor = "superpixel"
    """For online IGCP: the mean over the superpixel, or its sum over all pixels (as released)."""
    view_pairs: ViewPairs = "edge"
    """For online IGCP: views linked before components are taken, or added to the mask afterwards (as released)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("projection", "position_threshold"):
            self.check(name, getattr(self, name) >= 0, "at least 0")
        self.check("temperature", 0 < self.temperature < math.inf, "a number above 0")
        self.check("weights", min(self.weights) >= 0 < max(self.weights), "one above 0, none below")
        without_effect = {
            "position_threshold": "instance_rule = 'position'" if self.instance_rule != "position" else None,
            "asp_divisor": "igcp = 'online'" if self.igcp != "online" else None,
            "view_pairs": "igcp = 'online'" if self.igcp != "online" else None,
            "ccl_level": "igcp = 'cached'" if self.igcp != "cached" else None,
        }
        for name, needed in without_effect.items():
            is_default = getattr(self, name) == type(self).__dataclass_fields__[name].default
            self.check(name, needed is None or is_default, f"{needed}, or the default")


PRESETS: Final[dict[str, dict[str, Any]]] = {
    "published": {
        "optimiser": "sgd",
        "lr": 0.1,
        "warmup_steps": 0,
        "weight_decay": 1e-5,
        "projection": 0,
        "ilcp_pixels": "published",
        "igcp": "online",
        "asp_divisor": "image",
        "view_pairs": "afterwards",
    },
    "demo": {"steps": 350, "batch_size": 16, "filters": 8, "lr": 5e-3, "warmup_steps": 30},
}
"""`published`: the released choices, where this project's differ. `demo`: minutes on a CPU."""


def pretrain(
    cache: Cache, run_path: Path, *, config: PretrainConfig | None = None, excluded: tuple[str, ...] = ()
) -> Path:
    """Pre-train an encoder on a cache, without labels; go on where an earlier call stopped.

    `excluded`: case ids to leave out, such as the test cases of a study. With them go the cases of identical content
    (`splits.identical_to`): a test case under another name is a test case. Writes the run folder (`train.runs`) and
    returns the path of its weights.

    Raises UsageError for settings that do not fit the cache or a run folder of another run.
    """
    config = config or PretrainConfig()
    device = select_device(config.device)
    left_out = {*excluded, *identical_to(cache.rows, excluded)}
    case_ids = [row.id for row in cache.done if row.id not in left_out]
    if not case_ids:
        raise UsageError(
            "No case is left to pre-train on.",
            where=cache.path,
            expected="cases beside those of the test list",
            found=f"{len(cache.done)} cases, all excluded",
            next_step="Check the split, or leave it out.",
        )
    dataset = SliceDataset(cache, case_ids, patch_size=config.patch_size)
    in_channels = network_channels(config.in_channels, cache.num_channels)
    labels = cache.weak_labels() if config.igcp == "cached" else None
    level = None if labels is None else _ccl_level(labels, dataset.slices, config)
    run = distributed.rank_0_first(
        runs.start_run,
        run_path,
        {
            "kind": "pretrain",
            "config": as_dict(config),
            "model": {"in_channels": in_channels, "num_classes": None, "filters": config.filters},
            "cache": runs.describe_cache(cache),
            "cases": {"train": case_ids, "validation": [], "test": []},
            "content_digests": runs.content_digests(cache, case_ids),
            "split": None,
            "init": None,
            "unlabelled_test_cases_seen": 0,
            "weak_labels": None if labels is None else {"name": labels.name, "level": level},
        },
    )
    weights_path = run_path / WEIGHTS_NAME
    if run["status"] == "finished":
        return weights_path
    torch.manual_seed(config.seed)
    network = PretrainNet(in_channels=in_channels, filters=config.filters, projection=config.projection)
    network.to(device)
    ccl = None if labels is None else torch.tensor(labels.ccl[level], device=device)
    losses = PretrainLosses(
        distributed.parallel(network, device),
        config=config,
        in_channels=in_channels,
        ccl=ccl,
        num_superpixels=max(row.num_superpixels for row in cache.done),
    )
    fit(
        run_path,
        network=network,
        dataset=dataset,
        compute_losses=losses,
        config=config,
        device=device,
    )
    if distributed.rank() == 0:
        save_weights(network, weights_path, {"filters": str(config.filters), "in_channels": str(in_channels)})
        runs.finish_run(run_path)
    return weights_path


@dataclass(frozen=True, kw_only=True)
class PretrainLosses:
    """From a batch to the three losses and their sum, the same however the batch is split over ranks."""

    network: nn.Module = field(kw_only=False)
    """From images to a PretrainOutput."""
    config: PretrainConfig
    in_channels: int
    ccl: Tensor | None
    """int32 (n,): label of every slice of the cache, at the level used; None for online IGCP."""
    num_superpixels: int

    def __call__(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses `loss_ins`, `loss_intra`, `loss_inter` and their weighted sum `loss`."""
        config = self.config
        views = pretrain_views(batch.image_BCYX, generator, config=config.augment)
        images = repeat_channels(torch.cat(views), self.in_channels)
        output = self.network(images)
        features_x1, features_x2, _, _ = output.features.chunk(4)
        pixels_x1, pixels_x2, _, _ = output.pixels.chunk(4)
        _, _, instance_x3, instance_x4 = output.instance.chunk(4)

        gather = distributed.gather
        instances = torch.cat([gather(instance_x3), gather(instance_x4)])
        instance_pairs = instance_positives(
            gather(batch.positions_B), threshold=config.position_threshold, rule=config.instance_rule
        )
        if self.ccl is not None:
            inter_pairs = cached_igcp_positives(self.ccl[gather(batch.slices_B)])
        else:
            # Only the mean over channels is used, so only that is gathered.
            inter_pairs = online_igcp_positives(
                gather(features_x1.detach().mean(dim=1, keepdim=True)),
                gather(features_x2.detach().mean(dim=1, keepdim=True)),
                gather(batch.superpixels_Bhw.int()),  # gloo knows no int16
                num_superpixels=self.num_superpixels,
                divide_by=config.asp_divisor,
                view_pairs=config.view_pairs,
            )
        sampled = sample_pixels(*pixels_x1.shape[-2:], mode=config.ilcp_pixels).to(images.device)
        embeddings = torch.cat([x.flatten(2)[..., sampled].mT for x in (pixels_x1, pixels_x2)], dim=1)
        intra_pairs, valid = ilcp_positives(batch.superpixels_Bhw.flatten(1)[:, sampled])

        t = config.temperature
        terms = {
            "loss_ins": supervised_contrastive(instances, instance_pairs, temperature=t),
            "loss_intra": supervised_contrastive(embeddings, intra_pairs, temperature=t, valid=valid)
            * distributed.share(valid.any(dim=1).sum()),
            "loss_inter": supervised_contrastive(instances, inter_pairs, temperature=t),
        }
        total = torch.stack(
            [weight * term for weight, term in zip(config.weights, terms.values(), strict=True)]
        ).sum()
        return {"loss": total, **terms}


def network_channels(wanted: int | None, cached: int) -> int:
    """Input channels of a network for images of `cached` channels.

    Raises UsageError when the images have several channels and the network is to have another number.
    """
    if wanted is not None and wanted != cached and cached != 1:
        raise UsageError(
            "The network's input channels do not fit the cache.",
            expected=f"{cached}: only single-channel images are repeated",
            found=wanted,
            next_step="Leave in_channels out.",
        )
    return wanted or cached


def repeat_channels(images_BCYX: Tensor, in_channels: int) -> Tensor:
    """Single-channel images repeated to the network's input channels (as published for MRI models of four)."""
    return images_BCYX.expand(-1, in_channels, -1, -1) if images_BCYX.shape[1] == 1 else images_BCYX


def expected_positives(labels: np.ndarray, batch_size: int) -> float:
    """Other slices with the label of an anchor that a random batch holds, on average over anchors."""
    counts = np.unique(labels, return_counts=True)[1]
    return float((batch_size - 1) * (counts * (counts - 1)).sum() / (len(labels) * max(1, len(labels) - 1)))


def _ccl_level(labels: WeakLabels, slices: np.ndarray, config: PretrainConfig) -> int:
    """The level to train with: the one asked for, or the finest with a positive per anchor in a random batch."""
    num_levels = len(labels.ccl)
    if config.ccl_level is not None:
        config.check("ccl_level", 0 <= config.ccl_level < num_levels, f"0 to {num_levels - 1}")
        return config.ccl_level
    enough = [expected_positives(level[slices], config.batch_size) >= 1 for level in labels.ccl]
    return enough.index(True) if any(enough) else num_levels - 1
