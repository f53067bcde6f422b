"""The file formats that are opened, and the memory that decoding a file may take."""

from __future__ import annotations

import contextlib
import io
import math
from contextlib import AbstractContextManager

from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from sktransfer._progress import words
from sktransfer._threads import process_lock
from sktransfer.images._pixels import BadImage
from sktransfer.images._samples import unknown_format

# Pillow knows forty more, some of which start other programs: EPS runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "HEIF")
_ACCEPTED = "JPEG, PNG, GIF, WebP, BMP, TIFF, JPEG 2000, AVIF, PPM and, with pillow-heif, HEIC"
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

_MAX_BYTES = 10**9  # to decode one image; Pillow has its own bound on the number of pixels
_LARGE_BYTES = _MAX_BYTES // 4
_one_large_image = process_lock()  # in all threads of the process

# The most bytes per pixel that are held at once from the file to 8-bit RGB: printed by
# docs/benchmarks/decoding_memory.py.
_OF_MODE = {"1": 7, "L": 6, "P": 6, "I;16": 10, "I": 18, "F": 18}
_OF_COLOURS, _OF_16_BIT_COLOURS, _WITH_ALPHA, _IF_PROGRESSIVE = 8, 33, 22, 6
_MORE_OF_FORMAT = {"WEBP": 8, "JPEG2000": 12, "AVIF": 4, "HEIF": 8}
_TILE_WIDTH, _TILE_LENGTH, _ROWS_PER_STRIP, _BITS_PER_SAMPLE = 322, 323, 278, 258
_ORIENTATION_TAG = 0x0112


def open_image(
    data: bytes, min_size: tuple[int, int] | None
) -> tuple[ImageFile.ImageFile, AbstractContextManager]:
    """Read the header of an encoded image; return it, and what to hold while it is decoded.

    A JPEG file is set to be decoded at 1/2, 1/4 or 1/8 where it stays larger than `min_size`.
    """
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    # Pillow's plugins raise nearly everything at damaged bytes: OSError, SyntaxError,
    # struct.error, KeyError, zlib.error, MemoryError …
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        # However small a progressive file is decoded, all its coefficients are kept.
        is_progressive = "progressive" in image.info or "progression" in image.info
        n_bytes = _IF_PROGRESSIVE * image.width * image.height if is_progressive else 0
        if min_size is not None and isinstance(image, JpegImageFile):
            height, width = min_size[::-1] if _is_on_its_side(image) else min_size
            image.draft(None, (width, height))
        n_bytes += _decoded_bytes(image)
    except UnidentifiedImageError as error:
        raise BadImage(_why_unknown(data)) from error
    except Image.DecompressionBombError as error:
        message = f"{error} Raise PIL.Image.MAX_IMAGE_PIXELS if the file can be trusted"
        raise BadImage(message) from error
    except Exception as error:
        raise BadImage(f"the image file cannot be opened: {words(error)}") from error
    if n_bytes > _MAX_BYTES:
        raise BadImage(
            f"its header says {image.width} × {image.height} pixels ({image.format}, mode "
            f"{image.mode}): decoding it may take {n_bytes / 1e9:.1f} GB, and at most "
            f"{_MAX_BYTES // 10**9} GB is allowed; give a smaller copy, or its pixels as an array"
        )
    return image, _one_large_image if n_bytes > _LARGE_BYTES else contextlib.nullcontext()


def _decoded_bytes(image: ImageFile.ImageFile) -> int:
    per_pixel = _OF_MODE.get(image.mode[:4], _OF_COLOURS)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        per_pixel = _WITH_ALPHA
    if image.mode[:4] not in _OF_MODE and ";16" in str(image.tile[:1]):
        per_pixel = _OF_16_BIT_COLOURS
    per_pixel += _MORE_OF_FORMAT.get(image.format or "", 0)
    n_bytes = image.width * image.height * per_pixel
    if any(tile[0] == "libtiff" for tile in image.tile):  # it decodes a whole tile, or strip
        tags = image.tag_v2  # type: ignore[attr-defined]
        width = tags.get(_TILE_WIDTH, image.width)
        height = tags.get(_TILE_LENGTH, min(tags.get(_ROWS_PER_STRIP, image.height), image.height))
        n_bytes += width * height * max(4, math.ceil(sum(tags.get(_BITS_PER_SAMPLE, (1,))) / 8))
    return n_bytes


def _is_on_its_side(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1) >= 5
    except Exception:  # damaged EXIF
        return False


def _why_unknown(data: bytes) -> str:
    prefix = data[:16]
    if prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIC_BRANDS:
        return (
            "it is a HEIC file: pip install pillow-heif, and call "
            "pillow_heif.register_heif_opener() before"
        )
    for name, (_, accept) in Image.OPEN.items():
        with contextlib.suppress(Exception):
            if name not in _FORMATS and accept is not None and accept(prefix) is True:
                name = "TGA or CUR" if name == "CUR" else name  # TGA has no signature
                return f"it looks like a file of the format {name}; accepted are {_ACCEPTED}"
    return unknown_format(data)
