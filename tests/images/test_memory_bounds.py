"""What a file may take is known before it is read or decoded."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet

import numpy as np
import pytest
from image_forms import BadImage, as_images, pixels
from PIL import EpsImagePlugin, Image, features

FORMATS = "sktransfer.images._decoding"
LARGE = 13_000  # pixels a side: 169 million, fewer than Pillow allows


def encode(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def replaced(data, old, new):
    assert old in data
    return data.replace(old, new)


def jpeg():
    data = encode(Image.new("RGB", (64, 64)), "JPEG", progressive=True, subsampling=0)
    return replaced(data, struct.pack(">HH", 64, 64), struct.pack(">HH", LARGE, LARGE))


def gif():
    data = encode(Image.new("P", (99, 99)), "GIF", transparency=0)
    return replaced(data, struct.pack("<HH", 99, 99), struct.pack("<HH", LARGE, LARGE))


def png():
    header = b"IHDR" + struct.pack(">LLBBBBB", LARGE, LARGE, 8, 6, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">L", 13) + header
    return data + struct.pack(">L", zlib.crc32(header)) + struct.pack(">L", 9) + b"IDAT" + bytes(9)


def jpeg_2000():
    data = encode(Image.new("RGB", (77, 77)), "JPEG2000", no_jp2=True)
    return replaced(data, struct.pack(">LL", 77, 77), struct.pack(">LL", LARGE, LARGE))


def webp():
    # A canvas as large as its header says, with nothing on it.
    chunk = b"VP8X" + struct.pack("<LL", 10, 2) + struct.pack("<L", LARGE - 1)[:3] * 2
    frame = encode(Image.new("RGB", (4, 4)), "WEBP", lossless=True)[12:]
    frame = struct.pack("<LL", 0, 0)[:6] + struct.pack("<L", 3)[:3] * 2 + bytes(4) + frame
    anim = b"ANIM" + struct.pack("<LLH", 6, 0, 0)
    body = b"WEBP" + chunk + anim + b"ANMF" + struct.pack("<L", len(frame)) + frame
    return b"RIFF" + struct.pack("<L", len(body)) + body


def tiff(compression, tags, size=16):
    """A TIFF file of so many pixels a side, 3 × 8 bits, with further tags."""
    tags = {256: size, 257: size, 258: 8, 259: compression, 262: 2, 277: 3, 284: 1} | tags
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(64)


TILE = {322: 30_000, 323: 30_000, 324: 8, 325: 50}
STRIP = {273: 8, 278: 2**32 - 1, 279: 50}
ATTACKS = {
    "WebP": (webp, "webp"),
    "JPEG": (jpeg, None),
    "GIF": (gif, None),
    "JPEG 2000": (jpeg_2000, "jpg_2000"),
    "tile, deflate": (lambda: tiff(8, TILE), None),
    "tile, LZW": (lambda: tiff(5, TILE), None),
    "tile, JPEG": (lambda: tiff(7, TILE), None),
    "strip": (lambda: tiff(5, STRIP, LARGE), None),
    "float": (lambda: tiff(5, STRIP | {258: 32, 339: 3, 277: 1, 262: 1}, 9_000), None),
    "PNG": (png, None),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", ATTACKS)
def test_a_header_that_asks_for_much(case, monkeypatch):
    make, feature = ATTACKS[case]
    if feature and not features.check(feature):
        pytest.skip(f"Pillow was built without {feature}")

    def load(self):
        raise AssertionError("it was decoded")

    data = make()
    monkeypatch.setattr("PIL.PngImagePlugin.ImageFile.ImageFile.load", load)
    with pytest.raises(BadImage, match=r"decoding it may take \d+\.\d GB, and at most 1 GB is"):
        pixels(as_images([data]), 0, min_size=(224, 224))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_jpeg_file_that_is_reduced():
    data = encode(Image.new("RGB", (64, 64)), "JPEG")
    data = replaced(data, struct.pack(">HH", 64, 64), struct.pack(">HH", LARGE, LARGE))
    with pytest.raises(BadImage, match=r"1\.4 GB"):
        pixels(as_images([data]), 0)
    assert pixels(as_images([data]), 0, min_size=(224, 224)).shape == (1625, 1625, 3)


def test_pillows_own_bound_stays(monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    data = encode(Image.new("1", (99, 99)), "PNG")
    with pytest.raises(BadImage, match=r"exceeds limit of 200 pixels.*MAX_IMAGE_PIXELS"):
        pixels(as_images([data]), 0)


def test_a_file_of_forty_gigabytes(tmp_path):
    path = tmp_path / "sparse.png"
    with open(path, "wb") as file:
        file.truncate(40 * 10**9)
    cells = [path, str(path), path.as_uri(), f"local://{path}", {"bytes": None, "path": str(path)}]
    with open(path, "rb") as stream:
        for cell in [*cells, stream]:
            with pytest.raises(BadImage, match=r"larger than 256 MB, .*give a smaller copy, or"):
                pixels(as_images([cell]), 0)


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(f"{FORMATS}._LARGE_BYTES", 10_000)
    large, small = (encode(Image.new("RGB", (n, n)), "PNG") for n in (64, 8))
    images = as_images([large, large, small])
    with ThreadPoolExecutor(2) as pool:
        with images.read(0).decoded() as image:
            second, third = pool.submit(pixels, images, 1), pool.submit(pixels, images, 2)
            assert third.result(5).shape == (8, 8, 3)
            with pytest.raises(NotYet):
                second.result(0.1)
            assert image.size == (64, 64)
        assert second.result(5).shape == (64, 64, 3)


# -- the formats that are opened -------------------------------------------------------------
def test_postscript_starts_no_program(monkeypatch, tmp_path):
    def run(*args, **kwargs):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    data = encode(Image.new("RGB", (5, 4)), "EPS")
    (tmp_path / "a.jpg").write_bytes(data)
    for cell in (data, tmp_path / "a.jpg", Image.open(io.BytesIO(data))):
        with pytest.raises(BadImage, match="the format EPS; accepted are JPEG, PNG, GIF, WebP, B"):
            pixels(as_images([cell]), 0)


@pytest.mark.parametrize("format", ["ICO", "ICNS", "PCX", "SGI", "DDS", "QOI", "TGA", "XBM"])
def test_other_formats_are_named(format):
    if format not in Image.SAVE and not Image.init() and format not in Image.SAVE:
        pytest.skip("Pillow does not write it")
    image = Image.new("1" if format == "XBM" else "RGB", (32, 32))
    with pytest.raises(BadImage, match=f"format .*{format}.*; accepted are JPEG, .* JPEG 2000, AV"):
        pixels(as_images([encode(image, format)]), 0)


def test_heic_names_pillow_heif():
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    with pytest.raises(BadImage, match="HEIC file: pip install pillow-heif, and call"):
        pixels(as_images([data]), 0)


@pytest.mark.parametrize("format", ["MPO", "JPEG2000", "AVIF", "PPM"])
def test_formats_that_cameras_and_programs_write(format):
    Image.init()
    if format not in Image.SAVE or (format == "AVIF" and not features.check("avif")):
        pytest.skip("Pillow does not write it")
    options = {"save_all": True, "append_images": [Image.new("RGB", (32, 24))]}
    data = encode(Image.new("RGB", (32, 24), "red"), format, **(options if format == "MPO" else {}))
    red = pixels(as_images([data]), 0)
    np.testing.assert_allclose(red.astype(int), np.full((24, 32, 3), [255, 0, 0]), atol=6)


# -- bytes and images that were damaged before they came here --------------------------------
@pytest.mark.parametrize("format", ["BMP", "PPM"])
def test_zeros_that_numpy_strips(format):
    data = encode(Image.new("L", (8, 8)), format)
    assert data.endswith(b"\0")
    with pytest.raises(BadImage, match=r"np\.array\(list_of_bytes\) strips the zeros .*dtype=obj"):
        pixels(as_images(np.array([data, data])), 0)
    pixels(as_images(np.array([data, data], dtype=object)), 0)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "GIF"])
def test_a_pil_image_after_its_with_block(format, tmp_path):
    path = tmp_path / f"a.{format.lower()}"
    Image.new("RGB", (8, 8)).save(path)
    with Image.open(path) as image:
        pass
    with open(path, "rb") as file:
        other = Image.open(file)
    closed = Image.new("RGB", (8, 8))
    closed.close()
    for cell in (image, closed):
        with pytest.raises(BadImage, match=r"the PIL image is closed, by the end of its with blo"):
            pixels(as_images([cell]), 0)
    for cell in (other, file):
        with pytest.raises(BadImage, match=r"closed file; read it before its with block ends, or"):
            pixels(as_images([cell]), 0)
    with Image.open(path) as image:
        image.load()
    assert pixels(as_images([image]), 0).shape == (8, 8, 3)
