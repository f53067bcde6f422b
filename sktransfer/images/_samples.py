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
# libtiff gives numbers in this machine's byte order, whatever that of the file.
_NATIVE_MODES = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}


class Samples(NamedTuple):
    """Numbers, and what their file says about them.

    Attributes
    ----------
    array : ndarray of shape (H, W) or (H, W, C)
    value_range : (low, high) or None
        Which numbers are black and white, where the file says so.
    is_negative : bool
        Whether the smallest numbers are white.
    """

    array: np.ndarray
    value_range: Range | None = None
    is_negative: bool = False

    def to_rgb(self, note: Note, value_range: Range | None) -> np.ndarray:
        return to_rgb(self.array, note, value_range or self.value_range, self.is_negative)


def prepare(image: Image.Image, data: bytes) -> Image.Image | None:
    """Correct how Pillow will load an opened file.

    Of 16-bit colours Pillow keeps the upper bytes; returned is an image of the lower ones.
    """
    if image.format == "PPM":
        args = image.tile[0].args  # type: ignore[attr-defined]
        image.info["maxval"] = args[1] if isinstance(args[1], int) else None
    if not isinstance(image, (PngImageFile, TiffImageFile)):
        return None
    _correct_tiff(image)
    n_bits, key = data[24], image.info.get("transparency")  # n_bits: of a PNG
    if image.mode in ("1", "L") and isinstance(key, int) and n_bits < 8:
        image.info["transparency"] = min(255, key * 255 // (2**n_bits - 1))  # as the pixels
    if "LA;16B" in _raw_modes(image):
        # 16 bits of grey and alpha have the layout of four channels of eight bits.
        header = data[12:24] + b"\x08\x06" + data[26:29]
        checksum = struct.pack(">I", zlib.crc32(header))
        bytewise = PngImageFile(io.BytesIO(data[:12] + header + checksum + data[33:]))
        bytewise.info["grey"] = True
        return bytewise
    if not all(re.fullmatch("(RGB[AX]?|[RGBA]);16[BLN]", mode) for mode in _raw_modes(image)):
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
    image: Image.Image, upright: Image.Image, lower: Image.Image | None
) -> Samples | None:
    """Return the numbers of a loaded image; None if Pillow's eight bits are all of them.

    `image` is as opened, `upright` has its pixels, and `lower` is what `prepare` returned.
    """
    array, declared, is_negative = np.asarray(upright), None, False
    is_deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    if lower is not None:
        low = np.asarray(lower)
        array = low.view(">u2") if "grey" in lower.info else array.astype(np.uint16) << 8 | low
    elif image.format == "PPM" and image.mode in ("L", "I", "RGB"):
        scaled = 65535 if image.mode == "I" else 255
        maximum = image.info.get("maxval") or scaled
        if maximum == 255:
            return None
        array = np.rint(array * (maximum / scaled)).astype(np.uint16)
        declared = None if maximum == 65535 else (0, maximum)
    elif isinstance(image, TiffImageFile):
        tags = image.tag_v2
        bits, sample_format = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))
        if (bits, sample_format) == ((8,), (2,)):
            array = array.view(np.int8)  # Pillow takes signed numbers as unsigned …
        elif not is_deep:
            return None
        elif (bits, sample_format) == ((32,), (1,)):
            array = array.view(np.uint32)  # … and unsigned ones as signed
        declared = (0, 4095) if bits == (12,) else None
        is_negative = tags.get(_PHOTOMETRIC) == 0
    elif not is_deep:
        return None
    if array.dtype.itemsize == 2 and "transparency" in image.info:
        pixels = array[..., None] if array.ndim == 2 else array
        is_opaque = (pixels != image.info["transparency"]).any(axis=2, keepdims=True)
        array = np.concatenate([pixels, is_opaque * np.uint16(65535)], axis=2)
    return Samples(array, declared, is_negative)


def _correct_tiff(image: Image.Image) -> None:
    """Correct the tiles of an opened TIFF; raise BadImage where that is not possible."""
    if not isinstance(image, TiffImageFile):
        return
    bits, photometric = image.tag_v2.get(_BITS, (1,)), image.tag_v2.get(_PHOTOMETRIC)
    if image.tile and image.tile[0].codec_name == "libtiff":
        _replace_raw_modes(image, lambda mode: _NATIVE_MODES.get(mode, mode))
    elif image.tag_v2.get(_PLANAR) == 2:  # of a tile's mode Pillow takes one letter
        if image.mode in ("RGB", "RGBA") and 16 in bits:
            order = "B" if image.tag_v2.prefix == b"MM" else "L"
            _replace_raw_modes(image, lambda mode: f"{mode};16{order}")
        elif len(bits) == 1 and not (bits == (8,) and photometric in (1, 3)):
            raise BadImage(
                "it is a TIFF of one channel whose PlanarConfiguration is 2, which Pillow "
                "misreads; save it with 1"
            )


def _raw_modes(image: ImageFile.ImageFile) -> list[str]:
    return [_args(tile)[0] for tile in image.tile]


def _replace_raw_modes(image: ImageFile.ImageFile, replace: Callable[[str], str]) -> None:
    tiles = [(tile, *_args(tile)) for tile in image.tile]
    image.tile = [tile._replace(args=(replace(mode), *args)) for tile, mode, *args in tiles]


def _args(tile: ImageFile._Tile) -> tuple:
    return tile.args if isinstance(tile.args, tuple) else (tile.args,)
