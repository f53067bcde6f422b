"""What the numbers of an array mean, and what is said where that had to be assumed."""

import pickle
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from image_forms import BadImage, as_images, pixels
from PIL import Image


@pytest.fixture(scope="module")
def stack():
    return np.random.default_rng(0).integers(0, 256, (4, 7, 9, 3), dtype=np.uint8)


def warning_of(images):
    message = images.take_warnings()
    assert message is not None
    return message


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=6)))
def test_floats_of_eight_bits_are_the_eight_bits(picture):
    expected = np.repeat(picture[..., None], 3, axis=2)
    for dtype in (np.float16, np.float32, np.float64):
        images = as_images([(picture / 255).astype(dtype)])
        np.testing.assert_array_equal(pixels(images, 0), expected)
        assert images.take_warnings() is None


@given(
    arrays(
        st.sampled_from([np.float16, np.float32, np.float64, np.int16, np.int64, np.uint64]),
        array_shapes(min_dims=3, max_dims=3, max_side=4),
        elements=None,
    )
)
def test_any_numbers_decode_or_are_bad(picture):
    images = as_images([picture])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            decoded = pixels(images, 0)
        except BadImage as error:
            assert not np.isfinite(picture).all()
            assert "NaN or infinite" in str(error)  # noqa: PT017
            with pytest.raises(BadImage, match="NaN or infinite"):
                images.digest(0)
            return
        images.digest(0)
    assert decoded.shape == (*picture.shape[:2], 3)
    colors = picture[..., : {2: 1, 4: 3}.get(picture.shape[2], picture.shape[2])]
    if picture.shape[2] in (1, 3) and (colors.min() < -1 or colors.max() > 256):
        assert decoded.min() == 0
        if colors.min() < colors.max():
            assert decoded.max() == 255


def test_floats_to_255_are_read_as_such_and_told(stack):
    X = stack.astype(np.float32)
    images = as_images(X)
    for i in (3, 1, 1):
        np.testing.assert_array_equal(pixels(images, i), stack[i])
    message = warning_of(images)
    low, high = X[1].min(), X[1].max()
    assert re.search(
        rf"2 images of floats outside 0…1 \(the first is row 1: {low:.4g}…{high:.4g}\) were read "
        r"as 0…255\. .*X / 255\..*astype",
        message,
    )
    assert images.take_warnings() is None  # once is enough


def test_other_numbers_are_stretched_and_told():
    ramp = np.linspace(-2, 3, 256)[:, None].repeat(4, 1)
    images = as_images([ramp, ramp * 1e300, (ramp * 1000).astype(np.int16), np.full((4, 4), -7.0)])
    expected = np.arange(256, dtype=np.uint8)
    for i in range(3):
        np.testing.assert_allclose(pixels(images, i)[:, 0, 0], expected, atol=1)
    assert not pixels(images, 3).any()
    message = warning_of(images)
    assert "4 images of numbers outside 0…255 (the first is row 0: -2…3) were stretched" in message
    # digest() tells the same, so that a warning does not hang on what is in the store.
    images.digest(2)
    assert "1 image of numbers outside 0…255 (row 2: -2000…3000)" in warning_of(images)


def test_rounding_errors_are_no_range():
    almost = np.array([[-1e-9, 1 + 1e-6], [0.5, 1.0]])
    images = as_images([almost, almost * 255])
    np.testing.assert_array_equal(pixels(images, 0)[..., 0], [[0, 255], [128, 255]])
    assert images.take_warnings() is None
    np.testing.assert_array_equal(pixels(images, 1)[..., 0], [[0, 255], [128, 255]])
    assert "read as 0…255" in warning_of(images)


def test_dark_uint16_is_told():
    images = as_images([np.full((4, 4), 200, np.uint16), np.zeros((4, 4), np.uint16)])
    assert not pixels(images, 0).any()
    assert not pixels(images, 1).any()
    assert "1 image of dtype uint16 (row 0: 200…200)" in warning_of(images)


def test_one_warning_names_column_and_all_kinds():
    frame = pd.DataFrame({"a": [np.full((4, 4), 9.0)], "b": [np.full((4, 4), -9.0)]})
    images = as_images(frame)
    pixels(images[0::2], 0)
    pixels(images[:2], 1)
    message = warning_of(images)
    assert "(row 0, column 'a': 9…9) were read as 0…255" in message
    assert "(row 0, column 'b': -9…-9) were stretched" in message


def test_notes_of_a_worker_come_home():
    images = as_images(np.full((5, 6, 6), 9.0))
    pixels(images, 3)
    worker = pickle.loads(pickle.dumps(images[:2]))
    pixels(worker, 1)
    images.merge_notes(pickle.loads(pickle.dumps(worker.take_notes())))
    assert "2 images of floats outside 0…1 (the first is row 1:" in warning_of(images)


def test_alpha_is_over_white():
    color = np.array([[[10, 20, 30]] * 3], dtype=np.uint8)
    alpha = np.array([[[255], [0], [128]]], dtype=np.uint8)
    rgba = np.concatenate([color, alpha], axis=2)
    expected = np.rint((color * (alpha / 255)) + 255 * (1 - alpha / 255))
    for X in (rgba, rgba / 255, rgba.astype(np.uint16) * 257, Image.fromarray(rgba)):
        images = as_images([X])
        np.testing.assert_array_equal(pixels(images, 0), expected)
        assert images.take_warnings() is None
