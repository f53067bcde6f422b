"""A cell is read once: its digest and its pixels are of the same bytes."""

import functools
import io
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_forms import FORMS, N, as_images, contents, lazy_pil, paths, pixels
from PIL import Image


def test_pil_not_loaded_stays_so(stack, folder):
    (image,) = lazy_pil(stack, folder)[:1]
    images = as_images([image, image])
    encoded = as_images(contents(stack, folder)).read(0)
    assert images.read(0).digest == images.read(1).digest == encoded.digest
    pixels(images, 0)
    assert image.tile  # still to be read
    np.testing.assert_array_equal(np.asarray(image), stack[0])


def test_an_open_file_stays_where_it_stood(stack, folder):
    stream = io.BytesIO(contents(stack, folder)[0])
    stream.seek(5)
    pixels(as_images([stream]), 0)
    assert stream.tell() == 5


FILE_FORMS = ["str", "Path", "memory URL", "data URL", "bytes", "bytes cells", "Arrow bytes"]
ARRAY_FORMS = ["uint8", "4-D", "tensors", "4-D tensor", "Fortran order", "memory map"]


@pytest.mark.parametrize("forms", [FILE_FORMS, ARRAY_FORMS])
def test_digest_is_of_the_content(forms, stack, folder):
    digests = [
        [images.read(i).digest for i in range(N)]
        for images in (as_images(FORMS[form](stack, folder)) for form in forms)
    ]
    assert all(digest == digests[0] for digest in digests)


def test_digest_is_of_the_pixels_whatever_their_type():
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    for same in (grey / 255, grey.astype(np.int8), Image.fromarray(grey), grey[..., None]):
        assert as_images([same]).read(0).digest == as_images([grey]).read(0).digest
    shapes = [np.zeros(shape, np.uint8) for shape in [(4, 6), (6, 4), (2, 12), (4, 5)]]
    images = as_images(shapes)
    assert len({images.read(i).digest for i in range(4)}) == 4


def test_digest_of_pil_sees_palette_and_orientation():
    a, b, c = (Image.new("P", (3, 2)) for _ in range(3))
    a.putpalette([1, 2, 3])
    b.putpalette([3, 2, 1])
    c.putpalette([1, 2, 3])
    c.getexif()[0x0112] = 6
    images = as_images([a, b, c, a.copy()])
    digests = [images.read(i).digest for i in range(4)]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]
    assert pixels(images, 2).shape == (3, 2, 3)


def test_digest_of_pil_sees_what_32_bit_numbers_mean():
    grey = (np.arange(64) * 1000).astype(">u2").reshape(8, 8)
    of_file = Image.open(io.BytesIO(b"P5 8 8 65535\n" + grey.tobytes()))
    of_file.load()
    assert of_file.mode == "I"
    images = as_images([of_file, of_file.copy()])  # a copy no longer says that it has 16 bits
    assert np.abs(pixels(images, 0).astype(int) - pixels(images, 1)).max() > 0
    assert images.read(0).digest != images.read(1).digest


@pytest.mark.parametrize("form", [str, Image.open, functools.partial(open, mode="rb")])
def test_what_is_decoded_is_what_was_digested(form, stack, folder, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes((folder / "0.png").read_bytes())
    cell = form(path)
    images = as_images([cell])
    read = images.read(0)
    with open(path, "r+b") as file:  # in place: an open file sees it
        file.write((folder / "1.png").read_bytes())
        file.truncate()
    np.testing.assert_array_equal(read.decode(), stack[0])
    assert read.digest == as_images(contents(stack, folder)).read(0).digest != images.read(0).digest
    np.testing.assert_array_equal(pixels(images, 0), stack[1])
    if not isinstance(cell, str):
        cell.close()


def test_stat_is_of_local_files_only(stack, folder):
    path = folder / "0.png"
    status = path.stat()
    X = [str(path), path, path.as_uri(), {"bytes": None, "path": str(path)}]
    X.append({"bytes": np.nan, "path": str(path)})
    images = as_images(X)
    stats = [images.stat(i) for i in range(len(X))]
    assert stats == stats[:1] * len(X)
    assert stats[0][:3] == (str(path), status.st_size, status.st_mtime_ns)
    X = [stack[0], path.read_bytes(), "none.png", None, np.nan, "", "a\0b", "memory://a", "data:,"]
    X.append({"bytes": b"12", "path": str(path)})
    images = as_images(X)
    assert [images.stat(i) for i in range(len(X))] == [None] * len(X)


def test_stat_sees_a_change_that_left_size_and_time(tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(b"old")
    images, status = as_images([path]), path.stat()
    before = images.stat(0)
    time.sleep(0.02)  # for the file system's clock
    path.write_bytes(b"new")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert images.stat(0)[:3] == before[:3]
    assert images.stat(0) != before


# ---------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------
def test_threads(stack, folder):
    opened = Image.open(folder / "0.png")
    palette = Image.fromarray(stack[1]).quantize(16)
    X = [opened, palette, paths(stack, folder)[2], stack[3] * 1.0] * 50
    serial = [pixels(as_images([cell]), 0) for cell in X[:4]]
    images = as_images(X)
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(images.decode, range(len(X))))
        digests = list(pool.map(lambda i: images.read(i).digest, range(len(X))))
    opened.close()
    for i, picture in enumerate(decoded):
        np.testing.assert_array_equal(picture, serial[i % 4])
    assert len(set(digests)) == 4
    assert "50 images of floats" in images.take_warnings()
