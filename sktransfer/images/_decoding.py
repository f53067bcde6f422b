"""Decode encoded images: accepted formats, bounds on memory, and the values of pixels."""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
import sys
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from sktransfer._progress import error_text
from sktransfer._threads import process_lock
from sktransfer.images._files import BASE64
from sktransfer.images._pixels import BadImage, Samples

Size = tuple[int, int] | None  # (height, width)

# Pillow knows forty more, some of which start other programs: EPS runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "HEIF")
_ACCEPTED = "JPEG, PNG, GIF, WebP, BMP, TIFF, JPEG 2000, AVIF, PPM and, with pillow-heif, HEIC"
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

_MAX_BYTES = 10**9  # to decode one image; Pillow has its own bound on the number of pixels
_LARGE_BYTES = _MAX_BYTES // 4
_one_large_image = process_lock()  # in all threads of the process

# The most bytes per pixel that are held at once from the file to 8-bit RGB: printed by
# docs/benchmarks/decoding_memory.py.
_OF_MODE = {"1": 7, "L": 6, "P": 6, "I;16": 10, "I": 18, "F": 18}
_OF_COLOURS, _OF_16_BIT_COLOURS, _OF_ALPHA, _IF_PROGRESSIVE = 8, 33, 22, 6
_MORE_OF_FORMAT = {"WEBP": 8, "JPEG2000": 12, "AVIF": 4, "HEIF": 8}

_ORIENTATION = 0x0112  # a tag of EXIF; those of TIFF:
_TILE_WIDTH, _TILE_LENGTH, _ROWS_PER_STRIP, _PLANAR = 322, 323, 278, 284
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339


def decode(data: bytes, min_size: Size, stack: ExitStack) -> Image.Image | Samples:
    """Decode the first frame, upright, to a PIL image in RGB or to raw values.

    A JPEG file is decoded at 1/2, 1/4 or 1/8 if the result is larger than `min_size`. Other large
    images wait until `stack` is closed.
    """
    # Pillow's plugins raise nearly everything at damaged bytes: OSError, SyntaxError,
    # struct.error, KeyError, zlib.error, MemoryError …
    is_open = False
    try:
        image, may_decode = _open(data, min_size)
        stack.enter_context(may_decode)
        is_open = True
        lower = _prepare(image, data)
        for part in filter(None, (image, lower)):
            part.load()
            with contextlib.suppress(Exception):  # damaged EXIF: the image is taken as upright
                ImageOps.exif_transpose(part, in_place=True)
        return pixels_of(image, image, lower)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(_unknown_format(data)) from error
    except Image.DecompressionBombError as error:
        message = f"{error} Raise PIL.Image.MAX_IMAGE_PIXELS if the file can be trusted"
        raise BadImage(message) from error
    except Exception as error:
        failed = "decoded" if is_open else "opened"
        raise BadImage(f"the image file cannot be {failed}: {error_text(error)}") from error


def _open(data: bytes, min_size: Size) -> tuple[ImageFile.ImageFile, AbstractContextManager]:
    """Read the header; return the image, and the lock to hold while it is decoded."""
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    image = Image.open(io.BytesIO(data), formats=formats)
    # All coefficients of a progressive file are kept, however small it is decoded.
    is_progressive = "progressive" in image.info or "progression" in image.info
    n_bytes = _IF_PROGRESSIVE * image.width * image.height if is_progressive else 0
    if min_size is not None and isinstance(image, JpegImageFile):
        height, width = min_size[::-1] if _swaps_sides(image) else min_size
        image.draft(None, (width, height))
    n_bytes += _decoded_bytes(image)
    if n_bytes > _MAX_BYTES:
        raise BadImage(
            f"its header says {image.width} × {image.height} pixels ({image.format}, mode "
            f"{image.mode}): decoding it may take {n_bytes / 1e9:.1f} GB, and at most "
            f"{_MAX_BYTES // 10**9} GB is allowed; give a smaller copy, or its pixels as an array"
        )
    return image, _one_large_image if n_bytes > _LARGE_BYTES else contextlib.nullcontext()


def _decoded_bytes(image: ImageFile.ImageFile) -> int:
    per_pixel = _OF_MODE.get(image.mode[:4], _OF_COLOURS)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        per_pixel = _OF_ALPHA
    if image.mode[:4] not in _OF_MODE and ";16" in str(image.tile[:1]):
        per_pixel = _OF_16_BIT_COLOURS
    per_pixel += _MORE_OF_FORMAT.get(image.format or "", 0)
    n_bytes = image.width * image.height * per_pixel
    if any(tile[0] == "libtiff" for tile in image.tile):  # it decodes a whole tile, or strip
        tags = image.tag_v2  # type: ignore[attr-defined]
        width = tags.get(_TILE_WIDTH, image.width)
        height = tags.get(_TILE_LENGTH, min(tags.get(_ROWS_PER_STRIP, image.height), image.height))
        n_bytes += width * height * max(4, math.ceil(sum(tags.get(_BITS, (1,))) / 8))
    return n_bytes


def _swaps_sides(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) >= 5
    except Exception:  # damaged EXIF
        return False


def _unknown_format(data: bytes) -> str:
    prefix = data[:16]
    if prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIC_BRANDS:
        return (
            "it is a HEIC file: pip install pillow-heif, and call "
            "pillow_heif.register_heif_opener() before"
        )
    if prefix[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return (
            "it is a TIFF whose numbers Pillow does not read, such as floats of 64 bits or in "
            "colour: save it as integers of 8 or 16 bits, or give the array that tifffile reads"
        )
    if data.startswith(tuple(prefix.encode() for prefix in BASE64)):
        return "it is base64; give base64.b64decode(data)"
    for name, (_, accept) in Image.OPEN.items():
        with contextlib.suppress(Exception):
            if name not in _FORMATS and accept is not None and accept(prefix) is True:
                name = "TGA or CUR" if name == "CUR" else name  # TGA has no signature
                return f"it looks like a file of the format {name}; accepted are {_ACCEPTED}"
    return f"Pillow does not know its file format; it begins with {data[:12]!r}"


# -- files of which Pillow loads other values than they hold ---------------------------------
def _prepare(image: ImageFile.ImageFile, data: bytes) -> ImageFile.ImageFile | None:
    """Correct how Pillow will load an opened file.

    Pillow keeps the upper bytes of 16-bit colours; the image that is returned has the lower ones.
    """
    if image.format == "PPM" and image.mode in ("L", "I", "RGB"):
        maximum = _args(image.tile[0])[-1]
        image.info["maximum"] = maximum if isinstance(maximum, int) else None
    if not isinstance(image, (PngImageFile, TiffImageFile)):
        return None
    correct_tiff(image)
    key, n_bits = image.info.get("transparency"), data[24]
    if image.mode in ("1", "L") and isinstance(key, int) and n_bits < 8:  # of a PNG
        image.info["transparency"] = min(255, key * 255 // (2**n_bits - 1))  # as the pixels
    raw_modes = [_args(tile)[0] for tile in image.tile]
    if "LA;16B" in raw_modes:  # has the layout of four channels of eight bits
        header = data[12:24] + b"\x08\x06" + data[26:29]
        header += struct.pack(">I", zlib.crc32(header))
        bytewise = PngImageFile(io.BytesIO(data[:12] + header + data[33:]))
        bytewise.info["is_grey"] = True
        return bytewise
    if not all(re.fullmatch("(RGB[AX]?|[RGBA]);16[BLN]", mode) for mode in raw_modes):
        return None
    lower = type(image)(io.BytesIO(data))
    correct_tiff(lower)
    swapped = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    _replace_raw_modes(lower, lambda mode: mode[:-1] + swapped[mode[-1]])
    return lower


def pixels_of(
    image: Image.Image, upright: Image.Image, lower: Image.Image | None = None
) -> Image.Image | Samples:
    """Return a loaded image in RGB, or its raw values.

    `image` is the opened file, `upright` has its pixels, and `lower` is what `_prepare` returned.
    """
    is_deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    scaled = 65535 if image.mode == "I" else 255  # to which Pillow scales PNM
    maximum = image.info.get("maximum") or (scaled if image.format == "PPM" else None)
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    kind = tags.get(_BITS), tags.get(_SAMPLE_FORMAT, (1,))
    is_deep |= kind == ((8,), (2,)) or (image.mode in ("RGB", "RGBA") and 16 in (kind[0] or ()))
    if lower is None and not is_deep and maximum in (None, 255):
        return _eight_bit_pixels(upright)
    array, value_range = np.asarray(upright), None
    if lower is not None:
        low = np.asarray(lower)
        array = low.view(">u2") if "is_grey" in lower.info else array.astype(np.uint16) << 8 | low
    elif maximum is not None and image.mode != "F":
        array = np.rint(array * (maximum / scaled)).astype(np.uint16)
        value_range = None if maximum == 65535 else (0.0, float(maximum))
    elif kind == ((8,), (2,)):
        array = array.view(np.int8)  # Pillow reads signed values as unsigned …
    elif kind == ((32,), (1,)):
        array = array.view(np.uint32)  # … and unsigned ones as signed
    elif kind[0] == (12,):
        value_range = 0.0, 4095.0
    elif array.dtype == np.uint8:  # the user has loaded the upper bytes
        array = array * np.uint16(257)
    if array.dtype.itemsize == 2 and "transparency" in image.info:
        pixels = array[..., None] if array.ndim == 2 else array
        is_opaque = (pixels != image.info["transparency"]).any(axis=2, keepdims=True)
        array = np.concatenate([pixels, is_opaque * np.uint16(65535)], axis=2)
    return Samples(array, value_range, tags.get(_PHOTOMETRIC) == 0)


def _eight_bit_pixels(image: Image.Image) -> Image.Image | Samples:
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    if "transparency" in image.info or image.mode in _WITH_ALPHA or palette.endswith("A"):
        image = image.convert("LA") if image.mode == "La" else image
        return Samples(np.asarray(image.convert("RGBA")))
    if image.mode == "1":
        return Samples(np.asarray(image))
    return image if image.mode == "RGB" else image.convert("RGB")


def correct_tiff(image: Image.Image) -> None:
    """Correct the modes in which Pillow will read an opened TIFF."""
    if not isinstance(image, TiffImageFile) or not image.tile:
        return
    is_planar = image.tag_v2.get(_PLANAR) == 2
    if is_planar and image.mode == "LA":
        raise BadImage("it is a TIFF of grey and transparency whose PlanarConfiguration is not 1")
    if image.tile[0].codec_name == "libtiff":  # returns values in this machine's byte order
        native = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}
        _replace_raw_modes(image, lambda mode: native.get(mode, mode))
    elif is_planar:  # Pillow keeps one letter of a plane's mode
        bits, order = image.tag_v2.get(_BITS, (1,)), "BL"[image.tag_v2.prefix == b"II"]
        if len(bits) > 1 and bits[0] == 16:
            _replace_raw_modes(image, lambda mode: f"{mode};16{order}")
        elif len(bits) == 1 and bits[0] != 8:
            raise BadImage("it is a TIFF of one channel whose PlanarConfiguration is not 1")


def _replace_raw_modes(image: ImageFile.ImageFile, replace: Callable[[str], str]) -> None:
    tiles = [(tile, *_args(tile)) for tile in image.tile]
    image.tile = [tile._replace(args=(replace(mode), *args)) for tile, mode, *args in tiles]


def _args(tile: ImageFile._Tile) -> tuple:
    return tile.args if isinstance(tile.args, tuple) else (tile.args,)
