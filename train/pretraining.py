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

from supercl_core.cache_reader import Cache
from supercl_core.config import as_dict
from supercl_core.errors import UsageError
from supercl_core.splits import cases_without
from supercl_core.weak_labels import LinkRule, auto_level, linked
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
from train.refresh import Refresh
from train.sampling import SliceOrder

LOSS_TERMS: Final = ("loss_ins", "loss_intra", "loss_inter")
"""In the order of their weights."""


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
    """Of L_ins, L_intra and L_inter (published: 1, 1, 0.5); igcp = 'none' leaves the last one out."""
    instance_rule: InstanceRule = "position"
    """Positives of L_ins: slices at close positions (volumes), or only the other view of the slice."""
    position_threshold: float = 0.1
    """Slices closer than this are positive pairs under the rule `position`."""
    ilcp_pixels: PixelSampling = "all"
    """Pixels of the stride-16 map that ILCP contrasts."""
    igcp: Literal["cached", "online", "none"] = "cached"
    """Weak labels from the cache (ours), from the features of each batch (published), or no L_inter at all."""
    weak_labels: str | None = None
    """For cached IGCP: name of the labels in the cache; None takes the cache's default."""
    ccl_level: int | None = None
    """For cached IGCP: level of the labels, 0 the finest; None takes the finest at which a random batch holds a
    positive per anchor. A refresh that finds fewer levels takes the coarsest."""
    batches: Literal["auto", "groups", "random"] = "auto"
    """Slices two by two with one weak label, so that every anchor has a positive in another slice, or at random;
    `auto` takes groups for cached IGCP. Groups need an even number of slices a step."""
    refresh_every: int = 0
    """For cached IGCP: epochs after which the weak labels are computed again, from the encoder in training, and from
    then on again and again; 0 keeps those of the cache."""
    neighbours: LinkRule = "auto"
    """For a refresh: whether a slice may be linked to one of its own patient. For labels of the cache it was decided
    when they were made."""
    asp_divisor: AspDivisor = "superpixel"
    """For online IGCP: the mean over the superpixel, or its sum over all pixels (as released)."""
    view_pairs: ViewPairs = "edge"
    """For online IGCP: views linked before components are taken, or added to the mask afterwards (as released)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("projection", "position_threshold", "refresh_every"):
            self.check(name, getattr(self, name) >= 0, "at least 0")
        self.check("temperature", 0 < self.temperature < math.inf, "a number above 0")
        used = self.weights[:2] if self.igcp == "none" else self.weights
        self.check("weights", min(self.weights) >= 0 < max(used), "one above 0, none below")
        known = self.igcp != "none" or self.weights[2] in (0, type(self).weights[2])
        self.check("weights", known, "0 or the default for L_inter, which igcp = 'none' leaves out")
        self.check("batches", self.igcp == "cached" or self.batches != "groups", "igcp = 'cached' for groups")
        without_effect = {
            "position_threshold": "instance_rule = 'position'" if self.instance_rule != "position" else None,
            "asp_divisor": "igcp = 'online'" if self.igcp != "online" else None,
            "view_pairs": "igcp = 'online'" if self.igcp != "online" else None,
            "weak_labels": "igcp = 'cached'" if self.igcp != "cached" else None,
            "ccl_level": "igcp = 'cached'" if self.igcp != "cached" else None,
            "refresh_every": "igcp = 'cached'" if self.igcp != "cached" else None,
            "neighbours": "refresh_every above 0" if not self.refresh_every else None,
        }
        for name, needed in without_effect.items():
            is_default = getattr(self, name) == type(self).__dataclass_fields__[name].default
            self.check(name, needed is None or is_default, f"{needed}, or the default")

    @property
    def in_groups(self) -> bool:
        """Whether batches hold slices two by two with one weak label."""
        return self.batches == "groups" or (self.batches == "auto" and self.igcp == "cached")


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
    (`splits.cases_without`): a test case under another name is a test case. Writes the run folder (`train.runs`) and
    returns the path of its weights.

    Raises UsageError for settings that do not fit the cache or a run folder of another run, CacheError for weak labels
    that are not there or stale.
    """
    config = config or PretrainConfig()
    device = select_device(config.device)
    case_ids = cases_without(cache.rows, excluded)
    dataset = SliceDataset(cache, case_ids, patch_size=config.patch_size)
    in_channels = network_channels(config.in_channels, cache.num_channels)
    slice_patients = cache.slice_patient[dataset.slices]
    rule = linked(config.neighbours, slice_patients)
    linkable = rule == "any" or linked("auto", slice_patients) == rule
    config.check("neighbours", linkable, "'any', as there are no cases but of one patient")
    labels, described = _weak_labels(cache, dataset.slices, config)
    order = SliceOrder(
        slices=dataset.slices,
        batch_size=config.batch_size * distributed.world_size(),
        seed=config.seed,
        labels=labels[dataset.slices] if labels is not None and config.in_groups else None,
    )
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
            "weak_labels": described,
        },
    )
    weights_path = run_path / WEIGHTS_NAME
    if run["status"] == "finished":
        return weights_path
    torch.manual_seed(config.seed)
    network = PretrainNet(in_channels=in_channels, filters=config.filters, projection=config.projection)
    network.to(device)
    ccl = None if labels is None else torch.tensor(labels, device=device)
    losses = PretrainLosses(
        distributed.parallel(network, device),
        config=config,
        in_channels=in_channels,
        ccl=ccl,
        num_superpixels=max(row.num_superpixels for row in cache.done),
    )
    refresh = None
    if ccl is not None and config.refresh_every:
        refresh = Refresh(
            dataset=dataset,
            encoder=network.encoder,
            ccl=ccl,
            order=order,
            every=config.refresh_every,
            level=config.ccl_level,
            neighbours=rule,
            batch_size=config.batch_size,
        )
    fit(
        run_path,
        network=network,
        dataset=dataset,
        compute_losses=losses,
        config=config,
        device=device,
        order=order,
        refresh=refresh,
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
    """int32 (n,): label of every slice of the cache, at the level used; None unless IGCP is cached."""
    num_superpixels: int

    def __call__(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses `loss_ins`, `loss_intra`, unless IGCP is none `loss_inter`, and their weighted sum `loss`."""
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
        sampled = sample_pixels(*pixels_x1.shape[-2:], mode=config.ilcp_pixels).to(images.device)
        embeddings = torch.cat([x.flatten(2)[..., sampled].mT for x in (pixels_x1, pixels_x2)], dim=1)
        intra_pairs, valid = ilcp_positives(batch.superpixels_Bhw.flatten(1)[:, sampled])

        t = config.temperature
        terms = {
            "loss_ins": supervised_contrastive(instances, instance_pairs, temperature=t),
            "loss_intra": supervised_contrastive(embeddings, intra_pairs, temperature=t, valid=valid)
            * distributed.share(valid.any(dim=1).sum()),
        }
        if config.igcp != "none":
            inter_pairs = self.inter_positives(batch, features_x1, features_x2)
            terms["loss_inter"] = supervised_contrastive(instances, inter_pairs, temperature=t)
        weights = dict(zip(LOSS_TERMS, config.weights, strict=True))
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": total, **terms}

    def inter_positives(self, batch: Batch, features_x1: Tensor, features_x2: Tensor) -> Tensor:
        """The positives of L_inter over all ranks, bool (2B, 2B); features (B, C, h, w) are those of this rank."""
        gather = distributed.gather
        if self.ccl is not None:
            return cached_igcp_positives(self.ccl[gather(batch.slices_B)])
        # Only the mean over channels is used, so only that is gathered.
        return online_igcp_positives(
            gather(features_x1.detach().mean(dim=1, keepdim=True)),
            gather(features_x2.detach().mean(dim=1, keepdim=True)),
            gather(batch.superpixels_Bhw.int()),  # gloo knows no int16
            num_superpixels=self.num_superpixels,
            divide_by=self.config.asp_divisor,
            view_pairs=self.config.view_pairs,
        )


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


def _weak_labels(
    cache: Cache, slices: np.ndarray, config: PretrainConfig
) -> tuple[np.ndarray, dict[str, Any]] | tuple[None, None]:
    """The labels to begin with, int32 (n,) for all slices of the cache, and what the run stores of them."""
    if config.igcp != "cached":
        return None, None
    labels = cache.weak_labels(config.weak_labels)
    level = config.ccl_level
    if level is None:
        level = auto_level(labels.ccl[:, slices], config.batch_size)
    num_levels = len(labels.ccl)
    config.check("ccl_level", 0 <= level < num_levels, f"0 to {num_levels - 1}")
    described = {
        "name": labels.name,
        "level": level,
        "neighbours": labels.neighbours,
        "descriptors": labels.descriptors,
    }
    return labels.ccl[level], described
