"""How many images went through a network."""

import pytest


@pytest.fixture
def count_embedded(monkeypatch):
    """Counts the images that go through a network: ``count_embedded["images"]``."""
    from sktransfer.embedding._batches import BatchLimit

    counts = {"images": 0}
    forward = BatchLimit.forward

    def counting(self, network, batch, device=None):
        counts["images"] += len(batch)
        return forward(self, network, batch, device)

    monkeypatch.setattr(BatchLimit, "forward", counting)
    return counts
