"""Encoded pictures and PIL images as 8-bit RGB; reading them from files and URLs."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import struct
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from sktransfer._threads import ProcessLock
from sktransfer.images._pixels import BadImage, Note, over_white, read_only, to_rgb

# Also chained ones, "simplecache::s3://…"; "C:" is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+(::[A-Za-z0-9+.\-]+)*://")
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A PIL image loads itself at its first use, and the user may have put the same one
# into several rows: only one thread at a time may touch what is the user's.
_user_lock = ProcessLock()


# ---------------------------------------------------------------------------
# Where the bytes come from
# ---------------------------------------------------------------------------
def is_url(text: str) -> bool:
    """Tell a URL from a local path; ``file://`` is local."""
    return bool(_URL.match(text)) and not text.startswith(("file://", "local://"))


def local_path(text: str) -> str:
    """Return the local path a string names: ``~`` expanded, ``file://`` taken off."""
    if text.startswith(("file://", "local://")):
        text = text.split("://", 1)[1].removeprefix("localhost")
        if "%" in text and not os.path.lexists(text):  # Path.as_uri() quotes
            text = unquote(text)
    return os.path.expanduser(text) if text.startswith("~") else text


def read_text(text: str) -> bytes:
    """Read what a string names: a data URL, a URL of fsspec, or a local path."""
    if not text.strip():
        raise BadImage("the path is an empty string")
    if text[:5].lower() == "data:":
        return _read_data_url(text)
    if is_url(text):
        return _read_url(text)
    return read_path(local_path(text))


def read_path(path: str | bytes) -> bytes:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise BadImage("it is a folder; give the paths of the files in it")
        if not stat.S_ISREG(mode):
            raise BadImage("it is no regular file")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        where = "" if os.path.isabs(path) else f" in {os.getcwd()!r}, where relative paths start"
        raise BadImage(f"there is no such file{where}") from error
    except PermissionError as error:
        raise BadImage("there is no permission to read the file") from error
    except (OSError, UnicodeEncodeError) as error:
        raise BadImage(f"the file cannot be read: {_words(error)}") from error
    except ValueError as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"it is no path: {error}") from error  # a null byte


def _read_url(url: str) -> bytes:
    import fsspec

    # What a file system raises is its own affair: aiohttp, botocore … have their own
    # families of errors; a missing package is an ImportError.
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        data = filesystem.cat_file(path)
    except FileNotFoundError as error:
        raise BadImage("there is nothing at this URL") from error
    except Exception as error:
        raise BadImage(f"the URL cannot be read: {_words(error)}") from error
    return data


def _read_data_url(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise BadImage("the data URL has no comma before its data")
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        text = unquote(body) if "%" in body else body
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImage(f"the data URL does not decode as base64: {error}") from error


def read_stream(stream: Any) -> bytes:
    """Read an open binary file from its beginning and put it back where it stood."""
    try:
        with _user_lock:
            position = stream.tell()
            stream.seek(0)
            data = stream.read()
            stream.seek(position)
    except (OSError, ValueError, AttributeError) as error:
        raise BadImage(f"the open file cannot be read: {_words(error)}") from error
    if not isinstance(data, bytes):
        raise BadImage("the file is open in text mode; open it in mode 'rb'")
    return data


# ---------------------------------------------------------------------------
# Encoded bytes -> RGB
# ---------------------------------------------------------------------------
def decode_encoded(
    data: bytes | bytearray | memoryview, min_size: tuple[int, int] | None, note: Note
) -> Image.Image | np.ndarray:
    """Decode a file's content: first frame, upright, RGB, over white.

    Parameters
    ----------
    data : bytes-like
    min_size : (height, width) or None
        A JPEG may be decoded at 1/2, 1/4 or 1/8 as long as it stays at least that large.
    note : callable
        Told about each assumption that was made.

    Returns
    -------
    PIL image in RGB, or ndarray of shape (H, W, 3), uint8, read-only
        Whichever it is without another copy.
    """
    if not len(data):
        raise BadImage("it is empty (0 bytes)")
    if not isinstance(data, bytes):
        data = bytes(data)
    # Pillow's plugins raise nearly everything at spoilt bytes: OSError, SyntaxError,
    # struct.error, KeyError, zlib.error, MemoryError … so all of it is caught, around
    # Pillow's two calls alone.
    try:
        image, orientation = _open(data)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"the image file cannot be opened: {_words(error)}") from error
    _check_n_pixels(image.size, note)
    try:
        if min_size is not None and isinstance(image, JpegImageFile):
            height, width = min_size if (orientation or 1) < 5 else min_size[::-1]
            image.draft(None, (width, height))
        simple = _simplify(image, orientation)
    except Exception as error:
        raise BadImage(f"the image file cannot be decoded: {_words(error)}") from error
    return _to_rgb(simple, note)


def _open(data: bytes) -> tuple[ImageFile.ImageFile, int | None]:
    """Do what Image.open does, without its warnings; the size is left to the caller.

    A library that decodes in threads cannot silence warnings (``catch_warnings`` is
    process-wide before Python 3.14), so that it has to avoid them.
    """
    if data.startswith(b"\xff\xd8\xff"):
        data, orientation = _take_exif(data)
        return JpegImageFile(io.BytesIO(data)), orientation
    stream, prefix = io.BytesIO(data), data[:16]
    reasons: list[str] = []
    tried: set[str] = set()
    for load_plugins in (Image.preinit, Image.init):
        load_plugins()
        for name in [name for name in Image.ID if name not in tried]:
            tried.add(name)
            factory, accept = Image.OPEN[name]
            accepted = accept is None or accept(prefix)
            if isinstance(accepted, str):  # the format is known, its codec not installed
                reasons.append(accepted)
            elif accepted:
                stream.seek(0)
                try:
                    return factory(stream, ""), None
                except (SyntaxError, IndexError, TypeError, struct.error) as error:
                    if accept is not None:
                        reasons.append(f"{name}: {_words(error)}")
    beginning = f"it begins with {data[:12]!r}"
    raise BadImage(f"it is no image file that Pillow knows; {'; '.join([beginning, *reasons])}")


def _check_n_pixels(size: tuple[int, int], note: Note) -> None:
    # Pillow's own rule (Image._decompression_bomb_check), told in our own way.
    limit = Image.MAX_IMAGE_PIXELS
    width, height = size
    if limit is None or width * height <= limit:
        return
    if width * height > 2 * limit:
        raise BadImage(
            f"its {width} × {height} pixels are more than twice PIL.Image.MAX_IMAGE_PIXELS "
            f"({limit}), Pillow's guard against decompression bombs; raise that limit if the "
            "file can be trusted"
        )
    note("large", width, height)


def _simplify(image: Image.Image, orientation: int | None) -> Image.Image:
    """Load an image, turn it upright and bring it to RGB, RGBA, I;16…, I or F."""
    image.load()
    if orientation is None and image.format != "TIFF":  # Pillow turns TIFF files itself
        orientation = _info_orientation(image.info)
    is_16_bit = _is_16_bit(image)
    if orientation in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[orientation])
    if is_16_bit:
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return image
    palette = image.palette if image.mode == "P" else None
    if (
        "transparency" in image.info
        or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
        or (palette is not None and palette.mode.endswith("A"))
    ):
        image = image.convert("LA") if image.mode == "La" else image
        return image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_16_bit(image: Image.Image) -> bool:
    # Pillow gives 16-bit PNM (and, before 11, PNG) files as 32-bit integers.
    return image.mode == "I" and image.format in ("PNG", "PPM")


def _to_rgb(image: Image.Image, note: Note) -> Image.Image | np.ndarray:
    if image.mode == "RGB":
        return image
    array = np.asarray(image)
    if image.mode == "RGBA":
        return read_only(np.ascontiguousarray(over_white(array)))
    return to_rgb(array, note)


# ---------------------------------------------------------------------------
# PIL images of the user
# ---------------------------------------------------------------------------
def encoded_of(image: Image.Image) -> bytes | None:
    """Return the bytes behind a PIL image that has not been loaded yet, else None.

    Decoding a copy of them leaves the user's image as small as it is: a list of
    ``Image.open(path)`` does not fill the memory.
    """
    if not isinstance(image, ImageFile.ImageFile):
        return None
    with _user_lock:
        # tile: what is still to be read; decoderconfig: draft() has been called.
        if not image.tile or image.decoderconfig or image.fp is None or image.tell() != 0:
            return None
        exif = getattr(image, "_exif", None)  # parsed, and perhaps edited by the user
        if exif is not None and exif.get(_ORIENTATION_TAG) != _info_orientation(image.info):
            return None
        try:
            position = image.fp.tell()
            image.fp.seek(0)
            data = image.fp.read()
            image.fp.seek(position)
        except (OSError, ValueError):
            return None  # load() will say what is wrong
        return data


def decode_pil(image: Image.Image, note: Note) -> Image.Image | np.ndarray:
    """Convert a PIL image of the user as `decode_encoded` does, without changing it."""
    image, orientation = _own(image)
    try:
        simple = _simplify(image, orientation)
    except Exception as error:
        raise BadImage(f"the PIL image cannot be converted: {_words(error)}") from error
    return _to_rgb(simple, note)


def pil_content(image: Image.Image) -> tuple[str, bytes]:
    """Return a PIL image's pixels, and a text with all else that its look depends on."""
    image, orientation = _own(image)
    try:
        palette = image.getpalette("RGBA") if image.mode in ("P", "PA") else None
        transparency = image.info.get("transparency")
        pixels = image.tobytes()
    except Exception as error:
        raise BadImage(f"the PIL image has no pixels to read: {_words(error)}") from error
    mode = f"{image.mode} of 16 bits" if _is_16_bit(image) else image.mode
    return f"{mode} {image.size} {orientation} {palette} {transparency}", pixels


def _own(image: Image.Image) -> tuple[Image.Image, int]:
    """Load a PIL image of the user and return it, or a copy, with its orientation."""
    if 0 in image.size:
        raise BadImage(f"it has no pixel: its size is {image.width} × {image.height}")
    try:
        with _user_lock:
            image.load()
            # The EXIF of an image in memory is either parsed, and perhaps edited, or raw.
            if getattr(image, "_exif", None) is not None:
                orientation = image.getexif().get(_ORIENTATION_TAG)
            elif image.format == "TIFF":
                orientation = None  # done by load()
            else:
                orientation = _info_orientation(image.info)
            if image.mode in ("P", "PA"):  # converting would write to the palette
                image = image.copy()
    except Exception as error:
        raise BadImage(f"the PIL image cannot be loaded: {_words(error)}") from error
    return image, orientation or 1


# ---------------------------------------------------------------------------
# EXIF
# ---------------------------------------------------------------------------
def _take_exif(jpeg: bytes) -> tuple[bytes, int | None]:
    """Return a JPEG without its EXIF segments, and the orientation they gave, or None.

    Pillow would parse all of EXIF to find a resolution that nobody asked for, and warn
    where it is corrupt; only one tag of it is needed here.
    """
    orientation = None
    kept, position = [], 2
    start = 0  # of what is to be kept next
    while position + 4 <= len(jpeg) and jpeg[position] == 0xFF:
        marker = jpeg[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE):  # neither APPn nor a comment
            break
        end = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        if marker == 0xE1 and jpeg.startswith(b"Exif\0", position + 4):
            if orientation is None:
                orientation = _exif_orientation(jpeg[position + 10 : end])
            kept.append(jpeg[start:position])
            start = end
        position = end
    return b"".join([*kept, jpeg[start:]]) if kept else jpeg, orientation


def _info_orientation(info: dict) -> int | None:
    """Find the orientation in what a Pillow plugin left unparsed."""
    orientation = None
    if exif := info.get("exif"):
        orientation = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
    elif text := info.get("Raw profile type exif"):
        try:
            exif = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            return None
        orientation = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
    if orientation is None and (xmp := info.get("XML:com.adobe.xmp") or info.get("xmp")):
        xmp = xmp.encode() if isinstance(xmp, str) else xmp
        if match := _XMP_ORIENTATION.search(xmp):
            orientation = int(match[1])
    return orientation


def _exif_orientation(exif: bytes) -> int | None:
    """Find tag 0x0112 in the first directory of an EXIF block (TIFF 6.0, section 2)."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(order + "L", exif, 4)
        (n_tags,) = struct.unpack_from(order + "H", exif, directory)
        for start in range(directory + 2, directory + 2 + 12 * n_tags, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, start)
            if tag == _ORIENTATION_TAG:
                # 3 is a SHORT, 4 a LONG.
                (value,) = struct.unpack_from(order + ("L" if kind == 4 else "H"), exif, start + 8)
                return value if 1 <= value <= 8 else None
    except struct.error:  # cut off
        pass
    return None


def _words(error: BaseException) -> str:
    text = str(error).strip() or repr(error)
    return text if isinstance(error, (OSError, SyntaxError)) else f"{type(error).__name__}: {text}"
