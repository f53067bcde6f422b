"""The numbers in image files where Pillow loads others: 16-bit colours, variants of TIFF, PNM."""

from __future__ import annotations

import io
import re
import struct
import sys
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from sktransfer.images._pixels import BadImage, Note, Range, to_rgb

_BITS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 262, 284, 339  # tags of TIFF


class Samples(NamedTuple):
    """Numbers, and what their file says: those that are black and white, or that low is white."""

    array: np.ndarray
    value_range: Range | None = None
    is_negative: bool = False

    def to_rgb(self, note: Note, value_range: Range | None) -> np.ndarray:
        return to_rgb(self.array, note, value_range or self.value_range, self.is_negative)


def prepare(image: Image.Image, data: bytes) -> Image.Image | None:
    """Correct how Pillow will load an opened file.

    Of 16-bit colours Pillow keeps the upper bytes; returned is an image of the lower ones.
    """
    if image.format == "PPM" and image.mode in ("L", "I", "RGB"):
        maximum = _args(image.tile[0])[-1]  # type: ignore[attr-defined]
        image.info["maximum"] = maximum if isinstance(maximum, int) else None
    if not isinstance(image, (PngImageFile, TiffImageFile)):
        return None
    _correct_tiff(image)
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
    _correct_tiff(lower)
    swapped = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    _replace_raw_modes(lower, lambda mode: mode[:-1] + swapped[mode[-1]])
    return lower


def unknown_format(data: bytes) -> str:
    """Return the reason for which Pillow does not open a file."""
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return (
            "it is a TIFF whose numbers Pillow does not read, such as floats of 64 bits or in "
            "colour: save it as integers of 8 or 16 bits, or give the array that tifffile reads"
        )
    return f"Pillow does not know its file format; it begins with {data[:12]!r}"


def samples_of(
    image: Image.Image, upright: Image.Image, lower: Image.Image | None = None
) -> Samples | None:
    """Return the numbers of a loaded image; None if Pillow's eight bits are all of them.

    `image` is as opened, `upright` has its pixels, and `lower` is what `prepare` returned.
    """
    is_deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    scaled = 65535 if image.mode == "I" else 255  # to which Pillow scales PNM
    maximum = image.info.get("maximum") or (scaled if image.format == "PPM" else None)
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    kind = tags.get(_BITS), tags.get(_SAMPLE_FORMAT, (1,))
    if lower is None and not is_deep and kind != ((8,), (2,)) and maximum in (None, 255):
        return None
    array, value_range = np.asarray(upright), None
    if lower is not None:
        low = np.asarray(lower)
        array = low.view(">u2") if "is_grey" in lower.info else array.astype(np.uint16) << 8 | low
    elif maximum is not None and image.mode != "F":
        array = np.rint(array * (maximum / scaled)).astype(np.uint16)
        value_range = None if maximum == 65535 else (0.0, float(maximum))
    elif kind == ((8,), (2,)):
        array = array.view(np.int8)  # Pillow takes signed numbers as unsigned …
    elif kind == ((32,), (1,)):
        array = array.view(np.uint32)  # … and unsigned ones as signed
    elif kind[0] == (12,):
        value_range = 0.0, 4095.0
    if array.dtype.itemsize == 2 and "transparency" in image.info:
        pixels = array[..., None] if array.ndim == 2 else array
        is_opaque = (pixels != image.info["transparency"]).any(axis=2, keepdims=True)
        array = np.concatenate([pixels, is_opaque * np.uint16(65535)], axis=2)
    return Samples(array, value_range, tags.get(_PHOTOMETRIC) == 0)


def _correct_tiff(image: Image.Image) -> None:
    """Correct the modes in which Pillow will read an opened TIFF."""
    if not isinstance(image, TiffImageFile) or not image.tile:
        return
    if image.tile[0].codec_name == "libtiff":  # gives numbers in this machine's byte order
        native = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}
        _replace_raw_modes(image, lambda mode: native.get(mode, mode))
    elif image.tag_v2.get(_PLANAR) == 2:  # of a plane's mode Pillow takes one letter
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
