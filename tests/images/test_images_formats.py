"""Encoded pictures of every kind decode as people see them; what is spoilt is a BadImage."""

import base64
import io
import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_forms import as_images, pixels
from PIL import Image, ImageOps, features

H, W = 24, 40


@pytest.fixture(scope="module")
def picture():
    """A smooth picture without symmetry, so that JPEG changes it little."""
    y, x = np.mgrid[:H, :W]
    rgb = [255 * x / (W - 1), 255 * y / (H - 1), 255 * (x > W / 2) * (y < H / 3)]
    return np.stack(rgb, axis=-1).astype(np.uint8)


def encode(image, format, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def decode(data, **options):
    images = as_images([data])
    decoded = pixels(images, 0, **options)
    images.read(0)
    assert images.take_warnings() is None
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert decoded.shape[2] == 3
    return decoded


def as_rgb(grey):
    return np.repeat(np.asarray(grey, dtype=np.uint8)[..., None], 3, axis=2)


# ---------------------------------------------------------------------------
# Colour
# ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("GIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats(format, options, picture):
    if format == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow was built without WebP")
    if format == "GIF":
        picture = np.asarray(Image.fromarray(picture).quantize(64).convert("RGB"))
    np.testing.assert_array_equal(decode(encode(picture, format, **options)), picture)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg(mode, progressive, picture):
    source = Image.fromarray(picture).convert(mode)
    data = encode(source, "JPEG", quality=95, progressive=progressive)
    decoded = decode(data)
    # To the bit what Pillow gives; and near what was put in.
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == mode
        np.testing.assert_array_equal(decoded, np.asarray(image.convert("RGB")))
    near = np.asarray(source.convert("RGB"), dtype=int)
    assert np.abs(decoded - near).mean() < 6


def test_adobe_cmyk_is_not_a_negative(picture):
    # Adobe's files hold inverted ink; Pillow writes and reads them so.
    data = encode(Image.fromarray(picture).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(decode(data).astype(int) - picture).mean() < 6


def test_grey_files(picture):
    grey = picture[..., 0]
    for format in ("PNG", "BMP", "TIFF", "GIF"):
        np.testing.assert_array_equal(decode(encode(grey, format)), as_rgb(grey))


def test_one_bit(picture):
    mask = picture[..., 0] > 100
    for format in ("PNG", "BMP", "TIFF", "PPM"):
        data = encode(Image.fromarray(mask), format)
        np.testing.assert_array_equal(decode(data), as_rgb(mask * 255))


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette(format, picture):
    image = Image.fromarray(picture).quantize(32)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode(encode(image, format)), expected)
    np.testing.assert_array_equal(decode(image), expected)


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255]), "RGBA"])
def test_palette_with_transparency_is_over_white(transparency):
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    palette = [200, 10, 20, 10, 200, 20, 10, 20, 200]
    image.putpalette(palette)
    alpha = {0: [0, 255, 255]}.get(transparency, [0, 128, 255])
    options = {"transparency": transparency}
    if transparency == "RGBA":
        rgba = [*palette[:3], 0, *palette[3:6], 128, *palette[6:], 255]
        image.putpalette(rgba, "RGBA")
        options = {}
    color, alpha = np.reshape(palette, (1, 3, 3)), np.reshape(alpha, (1, 3, 1)) / 255
    expected = np.rint(color * alpha + 255 * (1 - alpha))
    data = encode(image, "PNG", **options)
    np.testing.assert_array_equal(decode(data), expected)
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        before = opened.getpalette("RGBA")
        np.testing.assert_array_equal(decode(opened), expected)
        assert opened.getpalette("RGBA") == before


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_over_white(format, mode, picture):
    if format == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow was built without WebP")
    image = Image.fromarray(picture).convert(mode)
    image.putalpha(Image.linear_gradient("L").resize((W, H)))
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    white = Image.new("RGBA", (W, H), "white")
    expected = np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
    for form in (encode(image, format, **options), image):
        np.testing.assert_allclose(decode(form).astype(int), expected, atol=1)


@pytest.mark.parametrize(("mode", "key"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_a_transparent_colour_is_white(mode, key):
    image = Image.new(mode, (3, 2), key)
    image.putpixel((1, 1), 0)
    decoded = decode(encode(image, "PNG", transparency=key))
    assert (decoded[0] == 255).all()
    assert (decoded[1, 1] == 0).all()


# ---------------------------------------------------------------------------
# More than eight bits
# ---------------------------------------------------------------------------
def png16(array):
    """A 16-bit PNG of an array (H, W, C), C in 1…4, which Pillow cannot write."""
    height, width, channels = array.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.mark.parametrize("n_channels", [1, 3])
def test_sixteen_bits_are_the_same_as_a_file_and_as_an_array(n_channels):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 65536, (H, W, n_channels), dtype=np.uint16)
    expected = decode(array)
    np.testing.assert_allclose(
        expected.astype(float), np.broadcast_to(array / 257, expected.shape), atol=1
    )
    np.testing.assert_array_equal(decode(png16(array)), expected)


def test_sixteen_bits_with_alpha():
    array = np.full((2, 3, 4), 0, np.uint16)
    array[..., 3] = [0, 65535, 65535]
    np.testing.assert_array_equal(decode(png16(array)), as_rgb([[255, 0, 0]] * 2))
    np.testing.assert_array_equal(decode(array), as_rgb([[255, 0, 0]] * 2))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_grey(format):
    array = np.linspace(0, 65535, H * W).reshape(H, W).astype(np.uint16)
    expected = decode(array)
    image = Image.fromarray(array)
    if format == "PPM":  # by hand: older versions of Pillow read it only
        data = b"P5 %d %d 65535\n" % (W, H) + array.astype(">u2").tobytes()
    else:
        data = encode(image, format)
    np.testing.assert_array_equal(decode(data), expected)
    np.testing.assert_array_equal(decode(image), expected)
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        np.testing.assert_array_equal(decode(opened), expected)


def test_float_and_32_bit_files():
    ramp = np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)
    np.testing.assert_array_equal(decode(encode(ramp, "TIFF")), decode(ramp))
    whole = np.arange(256, dtype=np.int32).reshape(16, 16)
    np.testing.assert_array_equal(decode(encode(whole, "TIFF")), as_rgb(whole))
    images = as_images([encode(whole * 1000, "TIFF"), Image.fromarray(ramp * 3 - 1)])
    np.testing.assert_array_equal(pixels(images, 0), as_rgb(whole))
    pixels(images, 1)
    assert re.search(r"2 images .*first is row 0: 0…2.55e\+05.* stretched", images.take_warnings())


# ---------------------------------------------------------------------------
# Frames and orientation
# ---------------------------------------------------------------------------
@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_frame_counts(format):
    if format == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow was built without WebP")
    frames = [Image.new("RGB", (9, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
        np.testing.assert_array_equal(decode(data), np.full((8, 9, 3), [255, 0, 0]))
        np.testing.assert_array_equal(decode(image), np.full((8, 9, 3), [255, 0, 0]))
        image.seek(1)  # the user's choice
        np.testing.assert_array_equal(decode(image), np.full((8, 9, 3), [0, 255, 0]))


TURN = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def exif_of(orientation, order="<"):
    """The smallest EXIF block that says how the camera was held."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHLHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + head + struct.pack(order + "LH", 8, 1) + entry + b"\0\0\0\0"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation, format, picture):
    if format == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow was built without WebP")
    # The camera turned the upright picture; EXIF says how to turn it back.
    held = np.ascontiguousarray(TURN[orientation](picture))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    data = encode(held, format, exif=exif, **options.get(format, {}))
    upright = decode(data)
    assert upright.shape == picture.shape
    assert np.abs(upright.astype(int) - picture).mean() < (3 if format == "JPEG" else 0.01)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(upright, np.asarray(ImageOps.exif_transpose(image)))
    with Image.open(io.BytesIO(data)) as image:  # PIL images, not loaded, loaded and copied
        np.testing.assert_array_equal(decode(image), upright)
        image.load()
        np.testing.assert_array_equal(decode(image), upright)
        np.testing.assert_array_equal(decode(image.copy()), upright)
        np.testing.assert_array_equal(decode(ImageOps.exif_transpose(image)), upright)


@pytest.mark.parametrize("order", "<>")
def test_orientation_in_both_byte_orders(order, picture):
    data = encode(np.rot90(picture).copy(), "JPEG", exif=exif_of(6, order), quality=95)
    assert decode(data).shape == picture.shape


def test_orientation_in_xmp(picture):
    xmp = b"http://ns.adobe.com/xap/1.0/\0"
    xmp += b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(np.rot90(picture).copy(), "JPEG")
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(xmp)) + xmp + data[2:]
    assert decode(data).shape == picture.shape


def test_an_edited_exif_counts(picture):
    image = Image.fromarray(np.rot90(picture).copy())
    image.getexif()[0x0112] = 6
    np.testing.assert_array_equal(decode(image), picture)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0nonsense that is no TIFF",
        exif_of(0),
        exif_of(9),
        exif_of(6)[:20],
        exif_of(1)[:14] + b"\xff\xff" + exif_of(1)[16:],
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        # A resolution that stands beyond the end, at which Pillow warns.
        b"Exif\0\0II*\0" + struct.pack("<LHHHLL", 8, 1, 0x011A, 5, 1, 99999) + b"\0" * 4,
    ],
)
@pytest.mark.filterwarnings("ignore:.*EXIF")  # Pillow's own, about a JPEG's resolution
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_broken_exif_is_passed_over(exif, format, picture):
    if format == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow was built without WebP")
    data = encode(picture, format, exif=exif)
    assert decode(data).shape == picture.shape
    assert decode(data, min_size=(H, W)).shape == picture.shape


def test_padded_and_repeated_jpeg_segments(picture):
    data = encode(np.rot90(picture).copy(), "JPEG", exif=exif_of(6))
    padded = data[:2] + b"\xff\xff\xff" + data[2:]
    np.testing.assert_array_equal(decode(padded), decode(data))
    twice = data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif_of(3))) + exif_of(3) + data[2:]
    assert decode(twice).shape == (W, H, 3)  # the first counts


# ---------------------------------------------------------------------------
# Reduced decoding
# ---------------------------------------------------------------------------
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_reduced_jpeg(mode, orientation):
    big = Image.linear_gradient("L").resize((803, 401)).convert(mode)
    data = encode(big, "JPEG", exif=exif_of(orientation))
    turn = (lambda shape: shape) if orientation == 1 else (lambda shape: shape[::-1])
    for scale in (1, 2, 4, 8):
        expected = turn((-(-401 // scale), -(-803 // scale)))
        assert decode(data, min_size=turn((401 // scale, 803 // scale))).shape[:2] == expected
        for form in (data, Image.open(io.BytesIO(data))):
            assert decode(form, min_size=turn((401 // scale, 10))).shape[:2] == expected
    assert decode(data, min_size=(9999, 9999)).shape[:2] == turn((401, 803))
    whole = np.asarray(Image.fromarray(decode(data)).resize(turn((101, 201))[::-1], Image.BOX))
    reduced = decode(data, min_size=turn((100, 200)))
    assert np.abs(reduced.astype(int) - whole).max() < 8


@given(
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.tuples(st.integers(1, 100), st.integers(1, 100)),
    st.integers(1, 8),
)
def test_reduced_jpeg_is_never_too_small(size, min_size, orientation):
    data = encode(Image.new("L", size), "JPEG", exif=exif_of(orientation))
    whole = decode(data)
    reduced = decode(data, min_size=min_size)
    for side, least, full in zip(reduced.shape, min_size, whole.shape, strict=False):
        assert min(least, full) <= side <= full


def test_min_size_touches_nothing_but_jpeg(picture):
    for form in (picture, encode(picture, "PNG"), Image.fromarray(picture)):
        np.testing.assert_array_equal(decode(form, min_size=(2, 2)), picture)


def test_base64_may_be_folded_and_quoted(picture):
    text = base64.encodebytes(encode(picture, "PNG")).decode()
    np.testing.assert_array_equal(decode("data:image/png;base64," + text), picture)
    quoted = text.replace("\n", "").replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    np.testing.assert_array_equal(decode("DATA:image/png;BASE64," + quoted), picture)
