"""What all tests of training share: one thread, so that sums are in one order and other work does not slow them."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
