"""Every form that X comes in gives the same pixels, and the same embedding."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from image_forms import FLAT_FORMS, FORMS, BadImage, H, N, W, as_images, objects, pixels, tensors
from PIL import Image

from sktransfer import PretrainedFeatureExtractor


def assert_shows(images, stack):
    assert len(images) == len(stack)
    assert images.n_columns == 1
    for i, picture in enumerate(stack):
        decoded = pixels(images, i)
        np.testing.assert_array_equal(decoded, picture)
        assert decoded.dtype == np.uint8
        assert decoded.flags.c_contiguous
        assert not decoded.flags.writeable
    digests = [images.read(i).digest for i in range(len(stack))]
    assert [len(digest) for digest in digests] == [16] * len(stack)
    assert len(set(digests)) == len(stack)
    assert images.take_warnings() is None  # there is nothing to warn of


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pictures(form, stack, folder):
    assert_shows(as_images(FORMS[form](stack, folder)), stack)


@pytest.mark.parametrize("shape", [(H, W, 3), (-1, W, 3), (H, W, -1)])
@pytest.mark.parametrize("form", FLAT_FORMS)
def test_every_form_of_flat_rows_gives_the_same_pictures(form, shape, stack):
    assert_shows(as_images(FLAT_FORMS[form](stack), shape), stack)


def test_home_is_expanded(stack, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert_shows(as_images([f"~/{i}.png" for i in range(N)]), stack)


def test_relative_paths(stack, folder, monkeypatch):
    monkeypatch.chdir(folder)
    images = as_images([f"{i}.png" for i in range(N)])
    assert_shows(images, stack)
    assert images.stat(1)[0] == str(folder / "1.png")


def test_http_is_read_once_for_digest_and_decode(stack, folder, server):
    images = as_images([f"{server.url}/{i}.png" for i in range(N)])
    assert images.stat(0) is None
    server.hits.clear()
    cells = [images.read(i) for i in range(N)]
    assert len({cell.digest for cell in cells}) == N
    for cell, picture in zip(cells, stack, strict=True):
        np.testing.assert_array_equal(cell.decode(), picture)
    assert server.hits.count("GET") == N
    with pytest.raises(BadImage, match="there is nothing at this URL"):
        pixels(as_images([f"{server.url}/none.png"]), 0)


@pytest.mark.parametrize(
    "grey",
    [
        lambda g: list(g),
        lambda g: list(g[..., None]),
        lambda g: g,
        lambda g: g / 255,
        lambda g: g[..., None],
        lambda g: np.stack([g, np.full_like(g, 255)], axis=-1),
        lambda g: torch.from_numpy(g)[:, None],
        lambda g: list(torch.from_numpy(g)),
        lambda g: [Image.fromarray(picture) for picture in g],
        lambda g: [Image.fromarray(picture).convert("LA") for picture in g],
        lambda g: g.astype(np.uint16) * 257,
        lambda g: g.tolist(),
    ],
)
def test_grey_is_three_equal_channels(grey, stack):
    g = np.concatenate([stack[..., 0], stack[..., 1]])  # five or more: no channel count
    assert_shows(as_images(grey(g)), np.repeat(g[..., None], 3, axis=3))


def test_bool_is_black_and_white():
    mask = np.eye(6, dtype=bool)
    expected = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    for form in [mask, mask[..., None], torch.from_numpy(mask), Image.fromarray(mask)]:
        np.testing.assert_array_equal(pixels(as_images([form]), 0), expected)


def test_pictures_of_different_sizes(stack):
    pictures = [stack[0], stack[1][:5], stack[2][:, :2], stack[3][:3, :3]]
    for X in (
        pictures,
        objects(pictures),
        pd.Series(pictures),
        pl.Series(pictures, dtype=pl.Object),
    ):
        images = as_images(X)
        for i, picture in enumerate(pictures):
            np.testing.assert_array_equal(pixels(images, i), picture)


def test_a_view_shares_the_users_array(stack):
    assert np.shares_memory(pixels(as_images(stack), 2), stack)
    assert stack.flags.writeable


def test_no_pixel_is_read_and_nothing_copied():
    images = as_images(["nowhere/a.jpg", "s3://bucket/b.jpg", b"no image", None])
    assert len(images) == 4
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (10**6, 999, 999, 3), (0,) * 4)
    assert len(as_images(huge)) == 10**6
    assert len(as_images(huge.reshape(10**6, -1)[:, :10], (2, 5))) == 10**6


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_a_device(stack):
    X = tensors(stack).to("cuda")
    assert_shows(as_images(X), stack)
    assert_shows(as_images(list(X / 255)), stack)
    assert as_images(X).read(0).digest == as_images(stack).read(0).digest


# -- embeddings ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def expected(stack):
    return PretrainedFeatureExtractor(memory=False).fit_transform(stack)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_embedding(form, expected, stack, folder):
    X = FORMS[form](stack, folder)
    rows = PretrainedFeatureExtractor(memory=False).fit_transform(X)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FLAT_FORMS)
def test_flat_rows_give_the_same_embedding(form, expected, stack):
    extractor = PretrainedFeatureExtractor(memory=False, image_shape=(H, W, 3))
    rows = extractor.fit_transform(FLAT_FORMS[form](stack))
    assert extractor.n_features_in_ == H * W * 3
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


def test_urls_give_the_same_embedding(expected, server):
    server.hits.clear()
    urls = [f"{server.url}/{i}.png" for i in range(len(expected))]
    rows = PretrainedFeatureExtractor(memory=False).fit_transform(urls)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)
    assert server.hits.count("GET") == len(urls)
