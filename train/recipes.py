"""The settings of fine-tuning, and the recipes that are presets of them: `strong`, ours, and the published one.

Called by `train.finetuning`, studies, and the command `supercl finetune`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from train.augment import AugmentConfig
from train.loop import LoopConfig, Schedule


def _strong_augmentation() -> AugmentConfig:
    """Intensity changes with the chances and ranges of nnU-Net v2, METHOD's geometry, no random crop."""
    return AugmentConfig(
        p_noise=0.1,
        p_blur=0.1,
        blur_sigma=(0.5, 1.0),
        p_brightness=0.0,
        p_contrast=0.15,
        contrast=(0.75, 1.25),
        p_clipped_contrast=0.15,
        p_low_resolution=0.125,
        p_gamma=0.37,
        crop=(1.0, 1.0),
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopConfig):
    """Settings of a fine-tuning run; the defaults are the recipe `strong`.

    Runs that are compared get the same number of steps, whatever they start from.
    """

    steps: int = 4_000
    batch_size: int = 16
    lr: float = 1e-3
    final_lr: float = 1e-5
    warmup_steps: int = 50
    encoder_lr: float | None = None
    """Highest learning rate of the encoder; none takes that of the decoder."""
    encoder_final_lr: float | None = None
    """Learning rate of the encoder at the end of its half cosine; none takes the same share of encoder_lr that final_lr
    is of lr."""
    encoder_warmup_steps: int | None = None
    """Steps over which the encoder's learning rate rises; none takes those of the decoder."""
    loss: Literal["dice_ce", "ce"] = "dice_ce"
    """Soft Dice plus cross-entropy, or cross-entropy alone (published)."""
    ema_decay: float = 0.999
    """What the average of the weights keeps of itself in a step, less in the first ones; the average is what is kept
    and scored. 0: no average."""
    foreground_share: float = 0.33
    """Of the slices, those that are drawn for a class that they show, and of the patches, those that are placed on a
    pixel of a class."""
    augment: AugmentConfig = field(default_factory=_strong_augmentation)
    """Intensity changes, then mirroring, elastic deformation, rotation and scaling. Leave mirroring out
    (augment.mirror_axes=[]) where sides or ends tell classes apart."""
    mirrored_inference: bool = True
    """Whether predictions are means over the mirrored images, along the axes of augment.mirror_axes."""
    largest_component: bool = True
    """Whether predictions keep only the largest component of every class that has but one in the labelled cases."""
    validation_folds: int = 0
    """Folds into which the labelled patients are cut, to leave one out for validation; 0 trains on all."""
    validation_fold: int = 0
    """The fold that is left out, from 0."""
    validate_every: int = 0
    """Steps from one scoring of the validation cases to the next; 0: never."""
    keep: Literal["last", "best"] = "last"
    """The network that is kept: that of the last step, or the one with the best DSC on the validation cases."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoder_lr", "encoder_final_lr", "encoder_warmup_steps"):
            value = getattr(self, name)
            self.check(name, value is None or 0 <= value < math.inf, "at least 0, or none")
        self.check("ema_decay", 0 <= self.ema_decay < 1, "at least 0, below 1")
        self.check("foreground_share", 0 <= self.foreground_share <= 1, "a share between 0 and 1")
        is_number = self.validation_folds == 0 or self.validation_folds >= 2
        self.check("validation_folds", is_number, "0, or 2 or more")
        is_fold = 0 <= self.validation_fold < max(1, self.validation_folds)
        self.check("validation_fold", is_fold, "below validation_folds, or 0 without them")
        self.check("validate_every", self.validate_every >= 0, "at least 0")
        has_cases = self.validation_folds > 0 or self.validate_every == 0
        self.check("validate_every", has_cases, "0 without validation_folds")
        self.check(
            "keep", self.keep == "last" or self.validate_every > 0, "'last', where validate_every is 0"
        )

    def schedules(self) -> dict[str, Schedule]:
        """Of the encoder, and of all else."""
        [rest] = super().schedules().values()
        highest = self.lr if self.encoder_lr is None else self.encoder_lr
        encoder = Schedule(
            highest,
            highest / self.lr * self.final_lr if self.encoder_final_lr is None else self.encoder_final_lr,
            rest.warmup_steps if self.encoder_warmup_steps is None else self.encoder_warmup_steps,
            rest.steps,
        )
        return {"encoder.": encoder, "": rest}


PRESETS: Final[dict[str, dict[str, Any]]] = {
    "strong": {},
    "published": {
        "epochs": 100,
        "batch_size": 10,
        "loss": "ce",
        "optimiser": "adam",
        "lr": 5e-4,
        "final_lr": 5e-6,
        "warmup_steps": 0,
        "weight_decay": 1e-5,
        "ema_decay": 0.0,
        "foreground_share": 0.0,
        "mirrored_inference": False,
        "largest_component": False,
        "augment": dict.fromkeys(
            (
                "p_noise",
                "p_blur",
                "p_brightness",
                "p_contrast",
                "p_clipped_contrast",
                "p_low_resolution",
                "p_gamma",
            ),
            0.0,
        ),
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
"""`strong`: the defaults. `published`: METHOD's table. `demo`: minutes on a CPU."""
