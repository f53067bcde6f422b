"""What the numbers of an array mean, and what is said where that had to be assumed."""

import pickle
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
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
                images.read(0)
            return
        images.read(0)
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
    # read() notes the same as decode(), whether or not the store has the row.
    images.read(2)
    assert "1 image of numbers outside 0…255 (row 2: -2000…3000)" in warning_of(images)


def test_rounding_errors_are_no_range():
    almost = np.array([[-1e-9, 1 + 1e-6], [0.5, 1.0]])
    images = as_images([almost, almost * 255])
    np.testing.assert_array_equal(pixels(images, 0)[..., 0], [[0, 255], [128, 255]])
    assert images.take_warnings() is None
    np.testing.assert_array_equal(pixels(images, 1)[..., 0], [[0, 255], [128, 255]])
    assert "read as 0…255" in warning_of(images)


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
EIGHT_BITS = np.rint(RAMP * 255)


def read(image):
    """The grey values of one image, and the warning."""
    images = as_images([image])
    return pixels(images, 0)[..., 0].astype(int), images.take_warnings() or ""


@pytest.mark.parametrize(
    ("numbers", "expected", "way"),
    [
        (RAMP * 1.2 - 0.12, np.clip(RAMP * 1.2 - 0.12, 0, 1) * 255, "was clipped to 0…1"),
        (RAMP * 1.5 - 0.25, np.clip(RAMP * 1.5 - 0.25, 0, 1) * 255, "was clipped to 0…1"),
        (EIGHT_BITS, EIGHT_BITS, "was read as 0…255"),
        (RAMP * 255.5 - 0.5, np.clip(RAMP * 255.5 - 0.5, 0, 255), "was read as 0…255"),
        (RAMP * 301 - 1, np.clip(RAMP * 301 - 1, 0, 255), "was read as 0…255"),
        (np.rint(RAMP * 16), np.rint(RAMP * 16), "was read as 0…255"),
        (RAMP - 0.5, EIGHT_BITS, "outside 0…255 .* was stretched"),
        (RAMP * 1.26, EIGHT_BITS, "outside 0…1 .* was stretched"),
        (RAMP * 15.9, EIGHT_BITS, "outside 0…1 .* was stretched"),
        (RAMP * 4.7 - 2.1, EIGHT_BITS, "was stretched"),
        (RAMP * 2 - 1, EIGHT_BITS, "was stretched"),
        (RAMP * 4095, EIGHT_BITS, "was stretched"),
        (np.rint(RAMP * 4095).astype(np.int16), EIGHT_BITS, "was stretched"),
        (np.rint(RAMP * 4000 - 1000).astype(np.int32), EIGHT_BITS, "was stretched"),
        (np.rint(RAMP * 315 - 30), EIGHT_BITS, "was stretched"),
    ],
)
def test_numbers_outside_their_range(numbers, expected, way):
    for array in (numbers, torch.from_numpy(numbers), numbers[..., None].repeat(3, 2)):
        grey, warning = read(array)
        np.testing.assert_allclose(grey, expected, atol=1)
        assert re.search(f"^1 image of (floats|numbers) .*{way}.*value_range=", warning)


def test_an_image_of_many_values_keeps_more_than_a_few_levels():
    far = {value: np.where(RAMP[3, 3] == RAMP, value, RAMP) for value in (20.0, 1e6, -3.4e38)}
    rng = np.random.default_rng(0)
    darkened = RAMP * 0.25 - 0.24  # clipped to 0…1, two levels would be left
    for numbers in (*far.values(), np.exp(rng.normal(0, 20, RAMP.shape)), darkened):
        grey, warning = read(numbers)
        assert len(np.unique(grey)) > 16
        order = np.argsort(numbers, axis=None)
        assert (np.diff(grey.ravel()[order]) >= 0).all()
        assert "value_range=" in warning
    assert "1 image of numbers far apart (row 0: 0…20) was read by the rank" in read(far[20])[1]
    few = np.array([[0.0, 0.1], [0.2, 1e6]])  # nothing to keep apart but one number
    assert "was stretched" in read(few)[1]


@pytest.mark.parametrize("n_bits", [8, 10, 12, 14])
def test_dark_uint16_is_told(n_bits):
    most = 2**n_bits - 1
    X = [np.full((4, 4), most - 90, np.uint16), np.zeros((4, 4), np.uint16), RAMP]
    images = as_images([*X, np.full((4, 4), 2**14, np.uint16)])
    for i, image in enumerate(X[:2]):
        np.testing.assert_array_equal(pixels(images, i)[..., 0], image >> 8)
    pixels(images, 2)
    pixels(images, 3)
    message = warning_of(images)
    assert f"1 image of dtype uint16 (row 0: {most - 90:.4g}…{most - 90:.4g}) was" in message
    assert f"value_range=(0, {most}). Set" in message
    assert "less than a quarter" in message


def test_the_range_of_all_dark_images_is_told():
    X = [np.full((4, 4), value, np.uint16) for value in (900, 4000, 7)]
    images = as_images(X)
    for i in range(3):
        pixels(images, i)
    message = warning_of(images)
    assert "3 images of dtype uint16 (the first is row 0: 900…900)" in message
    assert "value_range=(0, 4095). Set" in message
    assert message.endswith("these are within 7…4000.")


def test_floats_of_12_bits_in_16_are_told():
    grey, warning = read(np.rint(RAMP * 4095) / 65535)
    assert grey.max() == 16
    assert "floats within 0…1 (row 0: 0…0.06249) was almost black. Set value_range=(" in warning


def test_one_warning_names_column_and_all_kinds():
    frame = pd.DataFrame({"a": [np.full((4, 4), 9.0)], "b": [np.full((4, 4), -9.0)]})
    images = as_images(frame)
    pixels(images[0::2], 0)
    pixels(images[:2], 1)
    message = warning_of(images)
    assert "(row 0, column 'a': 9…9) was read as 0…255" in message
    assert "(row 0, column 'b': -9…-9) was stretched" in message


def test_notes_of_a_worker_come_home():
    images = as_images(np.full((5, 6, 6), 9.0))
    pixels(images, 3)
    worker = pickle.loads(pickle.dumps(images[:2]))
    pixels(worker, 1)
    images.merge_notes(pickle.loads(pickle.dumps(worker.take_notes())))
    assert "2 images of floats outside 0…1 (the first is row 1:" in warning_of(images)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("opaque", [1.0, 255, 4095])
def test_alpha_has_a_range_of_its_own(dtype, opaque):
    if opaque == 1 and np.dtype(dtype).kind != "f":
        pytest.skip("255 is opaque")
    color, alpha = np.rint(RAMP * 255), np.full((64, 64), opaque)
    alpha[0] = 0
    images = as_images([np.stack([color, alpha], axis=-1).astype(dtype)], None, (0, 255))
    expected = np.where(alpha == 0, 255, color)
    np.testing.assert_array_equal(pixels(images, 0)[..., 0], expected)


def test_alpha_is_over_white():
    color = np.array([[[10, 20, 30]] * 3], dtype=np.uint8)
    alpha = np.array([[[255], [0], [128]]], dtype=np.uint8)
    rgba = np.concatenate([color, alpha], axis=2)
    expected = np.rint((color * (alpha / 255)) + 255 * (1 - alpha / 255))
    for X in (rgba, rgba / 255, rgba.astype(np.uint16) * 257, Image.fromarray(rgba)):
        images = as_images([X])
        np.testing.assert_array_equal(pixels(images, 0), expected)
        assert images.take_warnings() is None


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_a_matrix():
    array = np.arange(20, dtype=np.uint8).reshape(4, 5)
    expected = pixels(as_images([array]), 0)
    np.testing.assert_array_equal(pixels(as_images([np.matrix(array)]), 0), expected)
