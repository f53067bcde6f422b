"""Images and settings that several test files share."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

with contextlib.suppress(ImportError):  # the tests of a GPU need no hypothesis
    from hypothesis import settings

    # No test fails because a machine is slow just then.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")


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
    from sktransfer import embedding_store

    embedding_store().clear()


@pytest.fixture(scope="session")
def stripes():
    """Horizontal, vertical and no stripes, noisy: uint8 (48, 20, 20, 3), and their names."""
    rng = np.random.default_rng(0)
    wave = (np.arange(20) // 3 % 2 * 120).astype(float)
    kinds = [wave[:, None] + 0 * wave, wave[None, :] + 0 * wave[:, None], np.full((20, 20), 60.0)]
    y = np.tile([0, 1, 2], 16)
    X = np.stack([kinds[k] for k in y])[..., None] + rng.normal(0, 40, (48, 20, 20, 3)) + 60
    return X.clip(0, 255).astype(np.uint8), np.array(["across", "down", "plain"])[y]


@pytest.fixture
def one_thread():
    """One torch thread: what is so small gains nothing from several."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
