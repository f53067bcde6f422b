"""What cannot be read is a BadImage with its reason; all else passes through."""

import errno
import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_forms import BadImage, as_images, pixels
from PIL import Image, ImageFile, features

H, W = 24, 40


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


def encode(image, format):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def assert_bad(cell, message, cause=None):
    images = as_images(["other.jpg", cell])
    images.where(1)
    with pytest.raises(BadImage, match=f"(?s){message}") as caught:
        pixels(images, 1)
    assert isinstance(caught.value, ValueError)
    if cause is not None:
        assert isinstance(caught.value.__cause__, cause)


NaN = float("nan")
BAD_CELLS = {
    "None": (None, "the cell is missing: it holds None"),
    "NaN": (NaN, "the cell is missing: it holds nan"),
    "float32 NaN": (np.float32("nan"), "the cell is missing"),
    "0-D NaN": (np.array(NaN), "the cell is missing"),
    "NA": (pd.NA, "the cell is missing: it holds <NA>"),
    "NaT": (pd.NaT, "the cell is missing: it holds NaT"),
    "empty string": ("", "the path is an empty string"),
    "blank": ("  ", "the path is an empty string"),
    "no file": ("none.jpg", "there is no such file in '.*', where relative paths start"),
    "null byte": ("a\0b.jpg", "the file cannot be read: .*null"),
    "long name": ("x" * 5000, "the file cannot be read: .*name too long"),
    "scheme": ("nothing://a.jpg", "the URL cannot be read: .*nothing"),
    "memory": ("memory://none.png", "there is nothing at this URL"),
    "refused": ("http://127.0.0.1:9/a.jpg", "the URL cannot be read: "),
    "empty": (b"", r"it is empty \(0 bytes\)"),
    "empty data": ("data:image/png;base64,", r"it is empty \(0 bytes\)"),
    "no base64": ("data:image/png;base64,@@@", "the data URL does not decode as base64"),
    "bad padding": ("data:image/png;base64,abc", "the data URL does not decode as base64"),
    "no comma": ("data:image/png;base64", "the data URL has no comma"),
    "text": (
        b"<html>not found</html>",
        "its file format; it begins with b'<html>",
    ),
    "text data": ("data:,hello%20you", "does not know its file format; it begins with b'hello y"),
    "zeros": (bytes(1000), "does not know its file format"),
    "no pixel": (np.zeros((0, 5, 3)), r"it has no pixels: its shape is \(0, 5, 3\)"),
    "5 channels": (np.zeros((9, 9, 5)), r"\(9, 9, 5\), which would be 5 channels; arrays are"),
    "C, H, W": (np.zeros((3, 9, 9)), r"channels first, give array.transpose\(1, 2, 0\) or a torch"),
    "4-D": (np.zeros((1, 9, 9, 3)), r"its shape is \(1, 9, 9, 3\); an image is an array"),
    "1-D": (np.zeros(9), r"flat array of shape \(9,\); give image_shape=\(H, W\)"),
    "0-D": (np.array(3), "a single number, 3"),
    "NaN pixel": (np.array([[NaN, 1.0]]), "1 of its 2 values are NaN or infinite"),
    "inf alpha": (np.array([[[0.5, np.inf]]]), "1 of its 1 values are NaN or infinite"),
    "complex": (np.zeros((4, 4), complex), "Complex data not supported"),
    "strings": (np.array([["a", "b"]]), "its dtype is <U1; pixels are bool, integers or floats"),
    "pair": ((np.zeros((4, 4, 3)), 1), r"of pairs \(image, label\) give the images alone"),
    "ragged": ([[1, 2], [3]], "it does not become an array"),
    "PIL, no pixel": (Image.new("RGB", (0, 5)), "it has no pixels: its size is 0 × 5"),
    "PIL, no grey pixel": (Image.new("L", (5, 0)), "it has no pixels: its size is 5 × 0"),
    "dict": ({"data": b""}, r"a dict with the keys \['data'\]; \"bytes\" or \"path\" must hold"),
    "empty dict": ({"bytes": None, "path": None}, '"bytes" or "path" must hold an image'),
    "dict type": ({"bytes": 3}, '"bytes" of the cell is of type int'),
    "int": (3, "the cell is a single number|of type int"),
    "object": (object(), "of type object; an image is a path, a URL, bytes, a PIL image, an"),
    "text mode": (io.StringIO("abc"), "open in text mode"),
}


@pytest.mark.parametrize("case", BAD_CELLS)
def test_bad_cells(case):
    cell, message = BAD_CELLS[case]
    assert_bad(cell, message)


@pytest.mark.parametrize("case", sorted(set(BAD_CELLS) - {"text", "text data", "zeros"}))
def test_digest_finds_all_bad_cells_but_those_that_only_decoding_finds(case):
    with pytest.raises(BadImage, match="(?s)" + BAD_CELLS[case][1]):
        as_images(["other.jpg", BAD_CELLS[case][0]]).read(1)


def test_bad_tensors():
    assert_bad(torch.zeros(9, 9, 3), r"looks like \(H, W, C\): give tensor.permute\(2, 0, 1\)")
    assert_bad(torch.zeros(9, 9, 9), r"would be 9 channels; tensors are")
    np.testing.assert_array_equal(
        pixels(as_images([torch.full((3, 2, 2), 0.5, dtype=torch.bfloat16)]), 0),
        np.full((2, 2, 3), 128),
    )


def test_bad_files(tmp_path):
    assert_bad(tmp_path, "it is a folder; give the paths of the files in it")
    assert_bad(str(tmp_path / "none.jpg"), "^there is no such file$", FileNotFoundError)
    (tmp_path / "empty.jpg").touch()
    assert_bad(tmp_path / "empty.jpg", "it is empty")
    if hasattr(os, "mkfifo"):  # reading one would wait for ever
        os.mkfifo(tmp_path / "fifo.jpg")
        assert_bad(tmp_path / "fifo.jpg", "it is not a regular file")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.touch()

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    assert_bad(path, "there is no permission to read the file", PermissionError)


def test_closed_file(picture):
    stream = io.BytesIO(encode(picture, "PNG"))
    image = Image.open(stream)
    stream.close()
    assert_bad(stream, "the open file cannot be read: .*closed file")
    assert_bad(image, "the open file cannot be read: .*closed file", ValueError)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files(format):
    if format == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow was built without WebP")
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)
    data = encode(noise, format)
    assert_bad(data[: len(data) // 2], "the image file cannot be (opened|decoded)|file format")
    assert_bad(data[:20], "the image file cannot be (opened|decoded)|file format")


@given(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM"]), st.data())
def test_spoilt_files_are_bad_or_decode_and_nothing_else(format, data):
    encoded = bytearray(encode(np.arange(768, dtype=np.uint8).reshape(16, 16, 3), format))
    for _ in range(data.draw(st.integers(1, 5))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own about TIFF tags pass through
        images = as_images([bytes(encoded)])
        try:
            assert pixels(images, 0).dtype == np.uint8
        except BadImage as error:
            assert str(error)  # noqa: PT017


def test_decompression_bombs(monkeypatch, picture):
    data = encode(picture, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W // 2 - 1)
    for bomb in (data, encode(picture, "JPEG")):
        assert_bad(bomb, r"960 pixels.* Raise PIL.Image.MAX_IMAGE_PIXELS if the file can be trust")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert pixels(as_images([data]), 0).shape == picture.shape


def test_pillow_is_left_as_it_was(picture):
    state = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    filters = list(warnings.filters)
    data = encode(picture, "JPEG")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(as_images([data] * 20).decode, range(20)))
    assert state == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    assert filters == list(warnings.filters)


def test_programming_errors_are_not_bad_images(picture):
    with pytest.raises(IndexError):
        as_images([picture]).read(1)
