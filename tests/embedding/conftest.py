"""How many images went through a network."""

import numpy as np
import pytest
import torch

from sktransfer.embedding._batches import BatchLimit


@pytest.fixture
def count_embedded(monkeypatch):
    """Counts the images that go through a network: ``count_embedded["images"]``."""
    counts = {"images": 0}
    forward = BatchLimit.forward

    def counting(self, network, batch, device=None):
        counts["images"] += len(batch)
        return forward(self, network, batch, device)

    monkeypatch.setattr(BatchLimit, "forward", counting)
    return counts


@pytest.fixture(scope="module")
def labels():
    return np.arange(12) % 2


@pytest.fixture
def sizes_of_batches(monkeypatch):
    """The sizes of the batches that go through a network, which returns zeros."""
    sizes = []

    def noting(self, network, batch, device=None):
        sizes.append(len(batch))
        return [torch.zeros(len(batch), 1408)]

    monkeypatch.setattr(BatchLimit, "forward", noting)
    return sizes
