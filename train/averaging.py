"""An average of a network's weights over the steps of a training, which generalises better than the last ones.

Kept in checkpoints (`train.checkpoints`), updated by `train.loop`, chosen by fine-tuning.
"""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn

NetworkT = TypeVar("NetworkT", bound=nn.Module)


class WeightAverage(Generic[NetworkT]):
    """The exponential moving average of a network's weights and buffers, in a network of its own.

    The average after step t keeps min(`decay`, (1 + t) / (10 + t)) of itself, so that it forgets its random beginning
    however few the steps are (our choice; torch's own average has no such warm-up).
    """

    def __init__(self, network: NetworkT, *, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        """The averaged network, on the device of the other."""
        self._decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights of `network` after the step of that number."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        averaged = self.network.state_dict(keep_vars=True)
        for name, value in network.state_dict(keep_vars=True).items():
            if value.is_floating_point():
                averaged[name].lerp_(value, share)
            else:  # counters of batch normalisation
                averaged[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights by name."""
        return self.network.state_dict()

    def load_state_dict(self, weights: dict[str, Any]) -> None:
        """Go on from averaged weights."""
        self.network.load_state_dict(weights)
