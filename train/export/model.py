"""What is exported: the network of a fine-tuned run, or the encoder of a run or of a file of weights.

Called by the command `supercl export`, which hands it to the module of a format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supercl_core.errors import UsageError
from train import runs
from train.descriptors import read_encoder
from train.inference import load_network
from train.lineage import KEY, read_lineage
from train.models.backbones import UNET
from train.models.unet import UNet
from train.models.weights import DECODER_PREFIX, ENCODER_PREFIX, load_pretrained, read_metadata


class Written(NamedTuple):
    """What the module of a format gives back."""

    holds: str
    """What of the model is in the files."""
    load: list[str]
    """Lines of Python, or of a shell, that load them in the folder that they are in."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained network, or a U-Net around a trained encoder."""

    source: Path
    """The run or the file of weights."""
    run: dict[str, Any] | None
    """run.json of the run; None for a file."""
    network: UNet
    """On the CPU, in evaluation mode. What `state` leaves out has initial values."""
    state: dict[str, Tensor]
    """What was trained, under the network's names: `encoder.*`, and of `decoder.*` as much as was."""
    is_whole: bool
    """Whether that is the whole network, not an encoder (with blocks of a decoder, where those were pre-trained)."""
    backbone: str
    """As `build_encoder` takes it."""
    adjacent_slices: int
    """Slices before and after each one that are channels of its image."""
    lineage: list[dict[str, Any]]
    """The runs that it has learned in, as `read_lineage` gives them."""

    @property
    def in_channels(self) -> int:
        """Of the images, those of adjacent slices included."""
        return self.network.encoder.in_channels

    @property
    def filters(self) -> int:
        """Channels of the finest feature map."""
        return self.network.encoder.channels[0]

    @property
    def class_names(self) -> list[str] | None:
        """In the order of the network's scores, the background first; None for an encoder."""
        return self.run["cache"]["class_names"] if self.is_whole and self.run else None

    @property
    def num_classes(self) -> int:
        """Of the network's scores, the background included; for an encoder 2, to have an example."""
        return len(self.class_names or ("background", "foreground"))

    @property
    def metadata(self) -> dict[str, str]:
        """For the header of safetensors files: what `read_lineage` reads there."""
        return {KEY: json.dumps(self.lineage)} if self.lineage else {}

    @property
    def holds(self) -> str:
        """What of a network `state` is."""
        if self.is_whole:
            return "the whole network"
        blocks = any(name.startswith(DECODER_PREFIX) for name in self.state)
        return "the encoder and the pre-trained blocks of the decoder" if blocks else "the encoder"

    @property
    def encoder_state(self) -> dict[str, Tensor]:
        """The state dict of `network.encoder`."""
        return {
            name.removeprefix(ENCODER_PREFIX): tensor
            for name, tensor in self.state.items()
            if name.startswith(ENCODER_PREFIX)
        }


def read_model(source: Path, *, encoder_only: bool = False) -> Model:
    """Read what `source` has to export: the network of a fine-tuned run, the encoder of anything else.

    `source`: a finished run, or what `train.models.weights.read_weights` reads. `encoder_only`: of a fine-tuned run
    too, and only of one.

    Raises UsageError for that, and for a run that is not finished, SuperCLError where there are no weights, or not
    those of the run's network or of an encoder.
    """
    run = runs.read_run(source) if (source / "run.json").is_file() else None
    if run is not None and run["status"] != "finished":
        raise UsageError(
            "The run is not finished.",
            where=source,
            expected="status finished",
            found=f"status {run['status']}",
            next_step=f"Run `supercl {run['kind']}` to its end first.",
        )
    if encoder_only and (run is None or run["kind"] != "finetune"):
        raise UsageError(
            "There is nothing but an encoder here.",
            where=source,
            expected="a fine-tuned run with --encoder",
            found="a file of weights" if run is None else f"kind {run['kind']}",
            next_step="Leave --encoder out.",
        )
    is_whole = run is not None and run["kind"] == "finetune" and not encoder_only
    backbone = read_metadata(source).get("backbone", UNET)
    if run is not None and is_whole:
        network = load_network(run, source)
        adjacent_slices = run["inference"]["adjacent_slices"]
        state = network.state_dict()
    else:
        encoder, adjacent_slices = read_encoder(source, num_channels=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # so that what was not trained is the same in every export
            network = UNet(encoder, num_classes=2).eval()
        report = load_pretrained(network, source)
        state = {name: network.state_dict()[name] for name in (*report.loaded, *report.adapted)}
    assert all(name.startswith((ENCODER_PREFIX, DECODER_PREFIX)) for name in state)
    return Model(
        source=source,
        run=run,
        network=network,
        state=state,
        is_whole=is_whole,
        backbone=backbone,
        adjacent_slices=adjacent_slices,
        lineage=read_lineage(source),
    )
