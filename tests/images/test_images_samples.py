"""Files of other than eight bits hold the numbers that were written, or are bad images."""

import io
import struct
import zlib

import numpy as np
import pytest
from image_forms import BadImage, as_images, pixels
from PIL import Image

H, W = 24, 40
ROWS = 7  # of a strip
RAMP = np.linspace(0, 1, H * W).reshape(H, W)
COLOR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)
TWELVE_BITS = np.rint(RAMP * 4095).astype(np.uint16)


def tiff(array, byte_order="<", is_white_low=False, planar=1, compressed=False, n_bits=None):
    """A TIFF of an array (H, W) or (H, W, C), uncompressed or deflated, in strips."""
    channels = array.reshape(H, W, -1)
    parts = np.moveaxis(channels, -1, 0)[..., None] if planar == 2 else [channels]
    dtype = array.dtype.newbyteorder(byte_order)
    strips = [
        part[i : i + ROWS].astype(dtype).tobytes() for part in parts for i in range(0, H, ROWS)
    ]
    if n_bits == 12:
        pairs = array.reshape(-1, 2).astype(int)
        first, second = pairs.T
        packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1)
        strips = [packed.astype(np.uint8).tobytes()]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    n_channels = channels.shape[2]
    photometric = 2 if n_channels > 2 else int(not is_white_low)
    tags = {256: [W], 257: [H], 258: [n_bits or 8 * array.itemsize] * n_channels,
            259: [8 if compressed else 1], 262: [photometric], 277: [n_channels],
            278: [H if n_bits else ROWS], 284: [planar],
            339: [{"u": 1, "i": 2, "f": 3}[array.dtype.kind]] * n_channels}  # fmt: skip
    tags |= {338: [2]} if n_channels == 2 else {}  # grey and alpha
    tags[279] = [len(strip) for strip in strips]
    tags[273] = list(8 + np.cumsum([0, *tags[279][:-1]]))
    body, entries = b"".join(strips), b""
    for tag, values in sorted(tags.items()):
        field = b"".join(struct.pack(byte_order + "L", value) for value in values)
        if len(values) > 1:
            offset, body = 8 + len(body), body + field
            field = struct.pack(byte_order + "L", offset)
        entries += struct.pack(byte_order + "HHL", tag, 4, len(values)) + field
    head = b"II*\0" if byte_order == "<" else b"MM\0*"
    directory = struct.pack(byte_order + "H", len(tags)) + entries + bytes(4)
    return head + struct.pack(byte_order + "L", 8 + len(body)) + body + directory


def png(array, n_bits=16, color_type=None, key=None):
    """A PNG of an array (H, W, C) of 16 bits, or (H, W) of fewer; `key`: what is transparent."""
    if n_bits <= 8:
        bits = np.unpackbits(array.astype(np.uint8)[..., None], axis=-1)[..., 8 - n_bits :]
        rows, n_channels = np.packbits(bits.reshape(len(array), -1), axis=1), 1
    else:
        rows, n_channels = array.astype(">u2"), array.shape[2]
    header = struct.pack(
        ">IIBBBBB", *array.shape[1::-1], n_bits, {1: 0, 2: 4, 3: 2, 4: 6}[n_channels], 0, 0, 0
    )
    chunks = [(b"IHDR", header)]
    chunks += [] if key is None else [(b"tRNS", np.atleast_1d(key).astype(">u2").tobytes())]
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in [*chunks, (b"IEND", b"")]
    )


def assert_shows(file, expected, value_range=None, warns=False):
    """Check the pixels against floats in 0…1."""
    images = as_images([file], None, value_range)
    expected = expected if expected.ndim == 3 else expected[..., None]
    decoded = pixels(images, 0)
    assert decoded.dtype == np.uint8
    assert not decoded.flags.writeable or isinstance(images.decode(0), Image.Image)
    np.testing.assert_allclose(decoded / 255, np.broadcast_to(expected, (H, W, 3)), atol=0.0065)
    assert (images.take_warnings() is not None) == warns


WINDOW = (1000, 3000)
WINDOWED = np.clip((RAMP * 4095 - 1000) / 2000, 0, 1)
both_orders = pytest.mark.parametrize("byte_order", "<>")
deflated_or_not = pytest.mark.parametrize("compressed", [False, True])


@both_orders
@deflated_or_not
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("n_channels", [3, 4])
def test_tiff_of_16_bit_colors(n_channels, planar, compressed, byte_order):
    opaque = np.ones((H, W, n_channels - 3))
    array = np.rint(np.concatenate([COLOR, opaque], axis=2) * 65535).astype(np.uint16)
    options = {"byte_order": byte_order, "planar": planar, "compressed": compressed}
    assert_shows(tiff(array, **options), COLOR)
    if planar == 1 or compressed:
        loaded = Image.open(io.BytesIO(tiff(array, **options)))
        loaded.load()
        assert_shows(loaded, COLOR, (0, 65535))
    if planar == 1 or not compressed:  # else Pillow reads eight bits
        window = np.clip((COLOR * 65535 - 2000) / 3000, 0, 1)
        assert_shows(tiff(array, **options), window, (2000, 5000))
        twelve = np.concatenate([array[..., :3] >> 4, array[..., 3:]], axis=2)
        assert_shows(tiff(twelve, **options), COLOR, (0, 4095))
        assert_shows(tiff(twelve, **options), COLOR / 16, warns=n_channels == 3)


@both_orders
@deflated_or_not
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32])
def test_tiff_of_one_channel(dtype, compressed, byte_order):
    low, high = (0, 1) if dtype == np.float32 else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    array = RAMP.astype(dtype)
    if dtype != np.float32:
        array = np.rint(RAMP * (high - low) + low).astype(dtype)
    data = tiff(array, byte_order, compressed=compressed)
    assert_shows(data, RAMP, warns=np.dtype(dtype).kind == "i")
    middle = (low / 2 + high / 2) / 2 + low / 2, (low / 2 + high / 2) / 2 + high / 2
    assert_shows(data, np.clip(RAMP * 2 - 0.5, 0, 1), middle)


def test_tiff_of_signed_bytes_and_unsigned_words():
    assert_shows(tiff(np.rint(RAMP * 200 - 100).astype(np.int8)), RAMP, (-100, 100))
    assert_shows(tiff((RAMP * (2**32 - 1)).astype(np.uint32)), RAMP, warns=True)


@deflated_or_not
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_white_is_the_least_number(dtype, compressed):
    most = 1 if dtype == np.float32 else np.iinfo(dtype).max
    data = tiff((RAMP * most).astype(dtype), is_white_low=True, compressed=compressed)
    assert_shows(data, 1 - RAMP)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert_shows(image, 1 - RAMP)
    data = tiff(TWELVE_BITS, is_white_low=True, compressed=compressed)
    assert_shows(data, 1 - WINDOWED, WINDOW)


def test_big_endian_floats_whose_least_number_is_white():
    for compressed in (False, True):
        data = tiff(RAMP.astype(np.float32), ">", is_white_low=True, compressed=compressed)
        assert_shows(data, 1 - RAMP)


def test_a_file_that_says_12_bits():
    height_and_width = b"%d %d 4095\n" % (W, H)
    color = np.rint(COLOR * 4095).astype(np.uint16)
    binary = b"P5 " + height_and_width + TWELVE_BITS.astype(">u2").tobytes()
    text = b"P2 " + height_and_width + " ".join(map(str, TWELVE_BITS.ravel())).encode()
    for data in (tiff(TWELVE_BITS, n_bits=12), binary, text):
        assert_shows(data, RAMP)
        assert_shows(data, WINDOWED, WINDOW)
    data = b"P6 " + height_and_width + color.astype(">u2").tobytes()
    assert_shows(data, COLOR)
    assert_shows(data, np.clip((COLOR * 4095 - 1000) / 2000, 0, 1), WINDOW)
    eight = np.rint(RAMP * 255).astype(np.uint8)
    for file in (b"P5 %d %d 255\n" % (W, H) + eight.tobytes(), tiff(eight), png(eight, 8)):
        assert_shows(file, RAMP)
        assert_shows(file, RAMP, (0, 255))
    few = np.rint(RAMP * 15).astype(np.uint8)
    data = b"P5 %d %d 15\n" % (W, H) + few.tobytes()
    for value_range in (None, (0, 15)):
        assert_shows(data, few / 15, value_range)


def test_png_and_pgm_of_12_bits_in_16():
    data = b"P5 %d %d 65535\n" % (W, H) + TWELVE_BITS.astype(">u2").tobytes()
    color = np.rint(COLOR * 4095).astype(np.uint16)
    opaque = np.full((H, W, 1), 65535)
    for file, expected in [
        (data, RAMP),
        (png(TWELVE_BITS[..., None]), RAMP),
        (png(color), COLOR),
        (png(np.concatenate([TWELVE_BITS[..., None], opaque], axis=2)), RAMP),
        (png(np.concatenate([color, opaque], axis=2)), COLOR),
        (png(np.concatenate([color, opaque >> 4], axis=2)), COLOR),
        (Image.fromarray(TWELVE_BITS), RAMP),
        (Image.fromarray(TWELVE_BITS.astype(np.int32)), RAMP),
    ]:
        assert_shows(file, expected, (0, 4095))
    for file in (data, png(TWELVE_BITS[..., None]), png(color), Image.fromarray(TWELVE_BITS)):
        images = as_images([file])
        pixels(images, 0)
        warning = images.take_warnings()
        assert "1 image of dtype uint16 (row 0: 0…4095) was read as 16 bits" in warning
        assert "value_range=(0, 4095)" in warning


def test_png_of_16_bit_grey_and_alpha():
    array = np.rint(np.stack([RAMP, RAMP[::-1]], axis=-1) * 65535).astype(np.uint16)
    assert_shows(png(array), RAMP * RAMP[::-1] + 1 - RAMP[::-1])


def test_what_is_transparent_in_a_png_is_white():
    grey = np.rint(RAMP * 65535).astype(np.uint16)
    grey[3, 4] = grey[5, 6] - 1  # differs in the lower bits alone
    expected = grey / 65535
    expected[5, 6] = 1
    data = png(grey[..., None], key=grey[5, 6])
    assert_shows(data, expected)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert_shows(image, expected)
    color = np.rint(COLOR * 65535).astype(np.uint16)
    color[3, 4] = color[5, 6] + [0, 0, 1]
    expected = color / 65535
    expected[5, 6] = 1
    assert_shows(png(color, key=color[5, 6]), expected)


@pytest.mark.parametrize("n_bits", [1, 2, 4])
def test_transparent_grey_of_few_bits(n_bits):
    array = np.arange(H * W).reshape(H, W) % 2**n_bits
    expected = np.where(array == 1, 1, array / (2**n_bits - 1))
    assert_shows(png(array, n_bits, key=1), expected)


def test_deep_images_stand_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    for array in (TWELVE_BITS[..., None], np.rint(COLOR * 4095).astype(np.uint16)):
        data, body = png(array), exif.tobytes()
        chunk = struct.pack(">I", len(body)) + b"eXIf" + body
        data = data[:33] + chunk + struct.pack(">I", zlib.crc32(b"eXIf" + body)) + data[33:]
        decoded = pixels(as_images([data], None, (0, 4095)), 0)
        upright = pixels(as_images([np.rot90(array, -1)], None, (0, 4095)), 0)
        np.testing.assert_array_equal(decoded, upright)


def test_a_tiff_that_pillow_misreads_is_a_bad_image():
    for data in (
        tiff(RAMP.astype(np.float64)),
        tiff(COLOR.astype(np.float32)),
        tiff(TWELVE_BITS, ">", is_white_low=True),
    ):
        with pytest.raises(BadImage, match=r"a TIFF whose numbers Pillow does not read.*tifffile"):
            pixels(as_images([data]), 0)
    with pytest.raises(BadImage, match="a TIFF of one channel whose PlanarConfiguration is not 1"):
        pixels(as_images([tiff(TWELVE_BITS, planar=2)]), 0)
    assert_shows(tiff(np.rint(RAMP * 255).astype(np.uint8), planar=2), RAMP)


@deflated_or_not
def test_tiff_of_grey_and_alpha(compressed):
    grey = np.rint(RAMP * 255).astype(np.uint8)
    array = np.stack([grey, np.full((H, W), 255, np.uint8)], axis=-1)
    assert_shows(tiff(array, compressed=compressed), RAMP)
    with pytest.raises(BadImage, match="a TIFF of grey and transparency whose PlanarConf"):
        pixels(as_images([tiff(array, planar=2, compressed=compressed)]), 0)


@both_orders
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_the_second_frame_of_a_tiff(dtype, compression, byte_order):
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    frames = (np.stack([RAMP[::-1], RAMP]) * 4095).astype(dtype)
    options = {"compression": compression, "photometric": "minisblack", "metadata": None}
    tifffile.imwrite(stream, frames, byteorder=byte_order, **options)
    image = Image.open(stream)
    image.seek(1)
    assert_shows(image, RAMP, (0, 4095))
