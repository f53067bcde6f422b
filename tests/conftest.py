"""Pictures and folders that several test files share."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def shared_data():
    """The folder with larger real data; the test skips where it is absent."""
    folder = Path(os.environ.get("SKTRANSFER_DATA", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("no larger real data here (SKTRANSFER_DATA)")
    return folder


@pytest.fixture(scope="session")
def pictures():
    """Twelve small colour pictures, each different: uint8 (12, 40, 48, 3)."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 5, 6, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture
def picture_files(pictures, tmp_path):
    """The pictures as PNG files: a list of paths."""
    paths = [tmp_path / f"picture_{i:02d}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    return [str(path) for path in paths]


@pytest.fixture(autouse=True)
def empty_store():
    """Each test starts without rows that another test computed."""
    from sktransfer._cache import as_store

    as_store(None).clear()
