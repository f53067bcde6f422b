"""The stores under test."""

import pytest

from sktransfer import embedding_store


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    """An empty store of each kind, of 512 MiB."""
    store = embedding_store(None if request.param == "memory" else tmp_path, max_bytes="512M")
    yield store
    store.close()
