"""What the tests of fine-tuning share."""

import numpy as np
import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """What is so small gains nothing from several threads."""


@pytest.fixture
def coded(stripes):
    """Images and 0, 1, 2."""
    X, y = stripes
    return X, np.unique(y, return_inverse=True)[1]


@pytest.fixture
def numbers(stripes):
    """Images and the mean of each."""
    X, _ = stripes
    return X, X.mean(axis=(1, 2, 3))


@pytest.fixture
def first_inputs():
    """Batches that enter the first convolution of a network, one after another."""
    seen = []

    def note(module, inputs):
        # Two images at a time are those by which the library checks a network.
        if isinstance(module, nn.Conv2d) and module.in_channels == 3 and len(inputs[0]) > 2:
            seen.append(inputs[0].detach().clone())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    yield seen
    handle.remove()
