"""The settings of pre-training, and the methods that are presets of them: ours, the published one, and its rivals.

One configuration, one loss (`train.losses.contrastive`): methods differ in which slices and pixels are positive pairs.
Called by `train.pretraining` and the command `supercl pretrain`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from supercl_core.cache.weak_labels import LinkRule
from train.augment import AugmentConfig
from train.loop import LoopConfig
from train.pairs import AspDivisor, InstanceRule, PixelSampling, ViewPairs


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(LoopConfig):
    """Settings of a pre-training run. What the publication sets is in the preset `published`."""

    steps: int = 20_000
    batch_size: int = 32
    lr: float = 2e-3
    final_lr: float = 0.0
    warmup_steps: int = 100
    temperature: float = 0.1
    """Temperature of all three losses (published: 0.1)."""
    weights: tuple[float, float, float] = (1.0, 1.0, 0.5)
    """Of L_ins, L_intra (ILCP) and L_inter (IGCP); published: 1, 1, 0.5. A loss of weight 0 is not computed."""
    instance_rule: InstanceRule = "position"
    """Positives of L_ins: slices at close positions (PCL), slices in the same part of their volumes (GCL), or only the
    other view of the slice (SimCLR)."""
    position_threshold: float = 0.1
    """Slices closer than this are positive pairs under the rule `position`."""
    num_partitions: int = 4
    """Parts into which the rule `partition` cuts a volume along z."""
    projection: int = 128
    """Width of the pixel projection head of ILCP, which is thrown away afterwards; 0 contrasts the features."""
    ilcp_stride: int | None = None
    """Stride of the feature map whose pixels ILCP contrasts, such as 4; None takes the encoder's deepest (published:
    16)."""
    ilcp_features: Literal["encoder", "decoder"] = "encoder"
    """Whose features at ilcp_stride ILCP contrasts. With `decoder` its blocks down to that stride are pre-trained too,
    and fine-tuning takes them over."""
    ilcp_pixels: PixelSampling = "spread"
    """Pixels that ILCP contrasts: all up to 1,024 and an even grid of a larger map, really all, or the published
    sampling, which on a map of 32 x 32 is two columns."""
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
    batch_statistics: Literal["all_views", "each_view"] = "all_views"
    """Batch normalisation over all views in one forward pass, or over each view in a pass of its own (published)."""
    contrast: Literal["all_ranks", "each_rank"] = "all_ranks"
    """Under torchrun: pairs and negatives from the batches of all processes, or from each one's own (published)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("projection", "position_threshold", "refresh_every"):
            self.check(name, getattr(self, name) >= 0, "at least 0")
        self.check("ilcp_stride", self.ilcp_stride is None or self.ilcp_stride >= 1, "at least 1")
        self.check("num_partitions", self.num_partitions >= 2, "at least 2")
        self.check("temperature", 0 < self.temperature < math.inf, "a number above 0")
        used = self.weights[:2] if self.igcp == "none" else self.weights
        self.check("weights", min(self.weights) >= 0 < max(used), "one above 0, none below")
        known = self.igcp != "none" or self.weights[2] in (0, type(self).weights[2])
        self.check("weights", known, "0 or the default for L_inter, which igcp = 'none' leaves out")
        self.check(
            "igcp", self.igcp == "none" or self.weights[2] > 0, "'none' where L_inter has the weight 0"
        )
        self.check("batches", self.igcp == "cached" or self.batches != "groups", "igcp = 'cached' for groups")
        deepest = self.uses_whole or self.ilcp_stride is None or self.ilcp_features == "decoder"
        self.check("ilcp_stride", deepest, "none where only ILCP trains: deeper layers would not be trained")
        without_effect = {
            "instance_rule": "a weight of L_ins" if not self.uses_ins else None,
            "position_threshold": "instance_rule = 'position'" if self.instance_rule != "position" else None,
            "num_partitions": "instance_rule = 'partition'" if self.instance_rule != "partition" else None,
            "projection": "a weight of L_intra" if not self.uses_intra else None,
            "ilcp_stride": "a weight of L_intra" if not self.uses_intra else None,
            "ilcp_features": "an ilcp_stride" if not (self.uses_intra and self.ilcp_stride) else None,
            "ilcp_pixels": "a weight of L_intra" if not self.uses_intra else None,
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
    def uses_ins(self) -> bool:
        """Whether L_ins is computed."""
        return self.weights[0] > 0

    @property
    def uses_intra(self) -> bool:
        """Whether L_intra (ILCP) is computed."""
        return self.weights[1] > 0

    @property
    def uses_inter(self) -> bool:
        """Whether L_inter (IGCP) is computed."""
        return self.igcp != "none"

    @property
    def uses_local(self) -> bool:
        """Whether the encoder sees x1 and x2."""
        return self.uses_intra or self.igcp == "online"

    @property
    def uses_whole(self) -> bool:
        """Whether the encoder sees x3 and x4."""
        return self.uses_ins or self.uses_inter

    @property
    def in_groups(self) -> bool:
        """Whether batches hold slices two by two with one weak label."""
        return self.batches == "groups" or (self.batches == "auto" and self.igcp == "cached")


_ONLY_INSTANCES: Final = {"weights": [1.0, 0.0, 0.0], "igcp": "none"}

PRESETS: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "published": {
        "epochs": 100,
        "optimiser": "sgd",
        "lr": 0.1,
        "warmup_steps": 0,
        "weight_decay": 1e-5,
        "projection": 0,
        "ilcp_pixels": "published",
        "igcp": "online",
        "asp_divisor": "image",
        "view_pairs": "afterwards",
        "batch_statistics": "each_view",
        "contrast": "each_rank",
    },
    "simclr": {**_ONLY_INSTANCES, "instance_rule": "view"},
    "gcl": {**_ONLY_INSTANCES, "instance_rule": "partition"},
    "pcl": {**_ONLY_INSTANCES, "instance_rule": "position"},
    "supercl-ilcp": {"igcp": "none"},
    "supercl-igcp": {"weights": [1.0, 0.0, 0.5]},
    "demo": {"steps": 350, "batch_size": 16, "filters": 8, "lr": 5e-3, "warmup_steps": 30},
}
"""`default`: SuperCL, ours. `published`: the released choices, where this project's differ, but for superpixels of each
view. `simclr`, `gcl` and `pcl`: only L_ins, by the other view, the part of the volume, or the position; all else as in
`default`, so that methods differ in their pairs alone. `supercl-ilcp` and `supercl-igcp`: L_ins with one of the other
two. `demo`: minutes on a CPU."""
