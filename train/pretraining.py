"""Pre-training: L = l1 L_ins + l2 L_intra (ILCP) + l3 L_inter (IGCP) on the slices of a cache (METHOD).

Called by `supercl pretrain` and, as `train.pretrain`, from Python. The loop itself is `train.loop.fit`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from supercl_core.cache.reader import Cache
from supercl_core.cache.weak_labels import auto_level, linked
from supercl_core.config import as_dict
from supercl_core.errors import UsageError
from supercl_core.messages import note
from supercl_core.splits import cases_without
from train import distributed, runs
from train.augment import pretrain_views
from train.data import Batch, SliceDataset, network_channels, repeat_channels, stacked_channels
from train.device import prepare, resolve_precision, select_device
from train.loop import fit
from train.losses.contrastive import supervised_contrastive
from train.methods import PretrainConfig
from train.models.backbones import build_encoder
from train.models.unet import PretrainNet, PretrainOutput
from train.models.weights import WEIGHTS_NAME, save_weights
from train.pairs import (
    cached_igcp_positives,
    ilcp_labels,
    instance_positives,
    online_igcp_positives,
    sample_pixels,
)
from train.refresh import Refresh
from train.sampling import SliceOrder

LOSS_TERMS: Final = ("loss_ins", "loss_intra", "loss_inter")
"""In the order of their weights."""


def pretrain(
    cache: Cache, run_path: Path, *, config: PretrainConfig | None = None, excluded: tuple[str, ...] = ()
) -> Path:
    """Pre-train an encoder on a cache, without labels; go on where an earlier call stopped.

    `excluded`: case ids to leave out, such as the test cases of a study. With them go the cases of identical content
    (`splits.cases_without`): a test case under another name is a test case. Writes the run folder (`train.runs`) and
    returns the path of its weights.

    Raises UsageError for settings that do not fit the cache, the number of slices or the encoder, and for a run folder
    of another run; CacheError for weak labels that are not there or stale.
    """
    config = config or PretrainConfig()
    device = select_device(config.device)
    config = replace(config, precision=resolve_precision(config.precision, device))
    num_channels = stacked_channels(cache.num_channels, config.adjacent_slices)
    in_channels = network_channels(config.in_channels, num_channels)
    torch.manual_seed(config.seed)
    encoder = build_encoder(config.backbone, in_channels=in_channels, filters=config.filters)
    pixel_stride = config.ilcp_stride or encoder.strides[-1]
    network = PretrainNet(
        encoder,
        projection=config.projection,
        instance=config.uses_whole,
        pixel_stride=pixel_stride if config.uses_intra else None,
        decoder=config.ilcp_features == "decoder",
    )
    case_ids = cases_without(cache.rows, excluded)
    dataset = SliceDataset(
        cache,
        case_ids,
        patch_size=config.patch_size,
        multiple_of=encoder.strides[-1],
        superpixel_stride=pixel_stride,
        adjacent_slices=config.adjacent_slices,
    )
    _check_slices(cache, dataset, config)
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
    config = config.in_steps(order.steps_per_epoch)
    model = {"backbone": config.backbone, "in_channels": in_channels, "filters": config.filters}
    run = distributed.rank_0_first(
        runs.start_run,
        run_path,
        {
            "kind": "pretrain",
            "config": as_dict(config),
            "model": {**model, "num_classes": None},
            "inference": None,
            "world_size": distributed.world_size(),
            "cache": runs.describe_cache(cache),
            "cases": {"train": case_ids, "validation": [], "test": []},
            "content_digests": runs.content_digests(cache, case_ids),
            "split": None,
            "init": None,
            "lineage": [],
            "unlabelled_test_cases_seen": 0,
            "weak_labels": described,
        },
    )
    weights_path = run_path / WEIGHTS_NAME
    if run["status"] == "finished":
        return weights_path
    if config.uses_intra and distributed.rank() == 0:
        _note_few_pairs(cache, pixel_stride, encoder.strides)
    ccl = None if labels is None else torch.tensor(labels, device=device)
    losses = PretrainLosses(
        prepare(network, config=config, device=device),
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
            batch_size=_contrasted(config),
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
        described = {**model, "adjacent_slices": config.adjacent_slices}
        save_weights(network, weights_path, {name: str(value) for name, value in described.items()})
        runs.finish_run(run_path)
    return weights_path


@dataclass(frozen=True, kw_only=True)
class PretrainLosses:
    """From a batch to the losses that the configuration weighs and their sum.

    With the contrast over all ranks the same however the batch is split over ranks.
    """

    network: Callable[..., PretrainOutput] = field(kw_only=False)
    """`PretrainNet.forward`, such as `train.device.prepare` makes it."""
    config: PretrainConfig
    in_channels: int
    ccl: Tensor | None
    """int32 (n,): label of every slice of the cache, at the level used; None unless IGCP is cached."""
    num_superpixels: int

    def __call__(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Of `loss_ins`, `loss_intra` and `loss_inter` those of a weight above 0, and their weighted sum `loss`.

        Besides, where the encoder sees whole slices, `similarity`: the mean cosine similarity of the instance
        embeddings that are contrasted. At 1 all slices look alike to the encoder, and nothing is left to learn from.
        `generator`: in the same state on all ranks.
        """
        config = self.config
        part = (distributed.rank(), distributed.world_size())
        views = pretrain_views(batch.image_BCYX, generator, config=config.augment, part=part)
        local, whole = (
            repeat_channels(torch.cat(pair), self.in_channels) if used else None
            for pair, used in ((views[:2], config.uses_local), (views[2:], config.uses_whole))
        )
        num_views = 2 * (config.uses_local + config.uses_whole)
        output = self.network(local, whole, passes=num_views if config.batch_statistics == "each_view" else 1)
        instances = None if output.instance is None else self._gathered(output.instance)
        terms = {}
        if config.uses_ins:
            assert instances is not None
            terms["loss_ins"] = self.loss_ins(instances, batch)
        if config.uses_intra:
            terms["loss_intra"] = self.loss_intra(output, batch)
        if config.uses_inter:
            assert instances is not None
            terms["loss_inter"] = self.loss_inter(instances, batch, output.features)
        weights = dict(zip(LOSS_TERMS, config.weights, strict=True))
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        if instances is not None:
            terms["similarity"] = normalize(instances.detach(), dim=1).mean(dim=0).square().sum()
        return {"loss": total, **terms}

    def loss_ins(self, instances: Tensor, batch: Batch) -> Tensor:
        """L_ins of the instance embeddings of x3 and x4, over all ranks that are contrasted (2B, 512)."""
        config = self.config
        pairs = instance_positives(
            self._gather(batch.positions_B),
            threshold=config.position_threshold,
            rule=config.instance_rule,
            num_partitions=config.num_partitions,
        )
        return supervised_contrastive(instances, pairs, temperature=config.temperature)

    def loss_intra(self, output: PretrainOutput, batch: Batch) -> Tensor:
        """L_intra (ILCP) of the pixel embeddings of x1 and x2."""
        config = self.config
        assert output.pixels is not None
        sampled = sample_pixels(
            *output.pixels.shape[-2:], mode=config.ilcp_pixels, device=output.pixels.device
        )
        embeddings = torch.cat([view.flatten(2)[..., sampled].mT for view in output.pixels.chunk(2)], dim=1)
        labels = ilcp_labels(batch.superpixels_Bhw.flatten(1)[:, sampled])
        loss = supervised_contrastive(embeddings, labels, temperature=config.temperature)
        # Slices have no part in each other's pairs, so nothing is gathered: a rank's mean counts by its slices.
        return loss * distributed.share((labels >= 0).any(dim=1).sum())

    def loss_inter(self, instances: Tensor, batch: Batch, features: Tensor | None) -> Tensor:
        """L_inter (IGCP) of the instance embeddings of x3 and x4; `features` as for `inter_positives`."""
        pairs = self.inter_positives(batch, features)
        return supervised_contrastive(instances, pairs, temperature=self.config.temperature)

    def inter_positives(self, batch: Batch, features: Tensor | None) -> Tensor:
        """The positives of L_inter over all ranks, bool (2B, 2B).

        `features`: of this rank's x1, then x2 (2b, C, h, w), at the encoder's deepest stride; read by online IGCP.
        """
        if self.ccl is not None:
            return cached_igcp_positives(self.ccl[self._gather(batch.slices_B)])
        assert features is not None
        # Only the mean over channels is used, so only that is gathered.
        means = features.detach().mean(dim=1, keepdim=True, dtype=torch.float32)
        finer = batch.superpixels_Bhw.shape[-1] // features.shape[-1]
        superpixels = batch.superpixels_Bhw[:, finer // 2 :: finer, finer // 2 :: finer]
        means_x1, means_x2 = (self._gather(view) for view in means.chunk(2))
        return online_igcp_positives(
            means_x1,
            means_x2,
            self._gather(superpixels.int()),  # gloo knows no int16
            num_superpixels=self.num_superpixels,
            divide_by=self.config.asp_divisor,
            view_pairs=self.config.view_pairs,
        )

    def _gathered(self, instances: Tensor) -> Tensor:
        """The embeddings of x3, then of x4, of all ranks that are contrasted."""
        # At least float32: gradients are summed over ranks in the precision in which embeddings were gathered.
        instances = instances.to(torch.promote_types(instances.dtype, torch.float32))
        return torch.cat([self._gather(view) for view in instances.chunk(2)])

    def _gather(self, tensor: Tensor) -> Tensor:
        return distributed.gather(tensor) if self.config.contrast == "all_ranks" else tensor


def _check_slices(cache: Cache, dataset: SliceDataset, config: PretrainConfig) -> None:
    """Raise UsageError for too few slices to fill a batch, and for positions where volumes have but one slice."""
    num_slices, needed = len(dataset.slices), config.batch_size * distributed.world_size()
    if num_slices < needed:
        raise UsageError(
            "There are too few slices for a batch.",
            where=cache.path,
            expected=f"at least {needed:,} slices: batch_size on every process",
            found=f"{num_slices:,}",
            next_step="Set a smaller batch_size, or use fewer processes.",
        )
    volumetric = bool((cache.slice_position[dataset.slices] < 1).any())
    if config.uses_ins and config.instance_rule != "view" and not volumetric:
        raise UsageError(
            "Positions mean nothing here: every case is a single slice.",
            where=cache.path,
            expected="volumes, for pairs by position in the volume",
            found=f"instance_rule = {config.instance_rule!r} and {num_slices:,} cases of one slice",
            next_step="Set instance_rule = 'view'.",
        )


def _contrasted(config: PretrainConfig) -> int:
    """Slices that are contrasted with each other in a step."""
    return config.batch_size * (distributed.world_size() if config.contrast == "all_ranks" else 1)


def _note_few_pairs(cache: Cache, stride: int, strides: tuple[int, ...]) -> None:
    """Say where superpixels are so small that ILCP hardly finds two positions in one."""
    width = float(
        np.median([math.sqrt(row.shape[2] * row.shape[3] / row.num_superpixels) for row in cache.done])
    )
    # As on the published 512 x 512: three positions from border to border.
    finer = [other for other in strides if 3 * other <= width] or [strides[0]]
    if width < stride:
        note(
            f"superpixels are {width:.0f} pixels wide and ILCP contrasts every {stride}th: few positive pairs. "
            f"ilcp_stride = {max(finer)} has more."
        )


def _weak_labels(
    cache: Cache, slices: np.ndarray, config: PretrainConfig
) -> tuple[np.ndarray, dict[str, Any]] | tuple[None, None]:
    """The labels to begin with, int32 (n,) for all slices of the cache, and what the run stores of them."""
    if config.igcp != "cached":
        return None, None
    labels = cache.weak_labels(config.weak_labels)
    level = config.ccl_level
    if level is None:
        level = auto_level(labels.ccl[:, slices], _contrasted(config))
    num_levels = len(labels.ccl)
    config.check("ccl_level", 0 <= level < num_levels, f"0 to {num_levels - 1}")
    described = {
        "name": labels.name,
        "level": level,
        "neighbours": labels.neighbours,
        "descriptors": labels.descriptors,
        "digest": hashlib.sha256(labels.ccl[level][slices].tobytes()).hexdigest(),
    }
    return labels.ccl[level], described
