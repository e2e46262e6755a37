"""Checkpoints where the disk is full; what they restore is tested with the loop."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from train.checkpoints import State, save_checkpoint


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named_as_such_and_leaves_nothing(tmp_path):
    network = torch.nn.Linear(2, 2)
    state = State(
        network=network, optimiser=torch.optim.SGD(network.parameters()), scaler=torch.amp.GradScaler("cpu")
    )
    (tmp_path / ".wip_step_00000001.pt").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        save_checkpoint(tmp_path, 1, state, keep=1)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())
