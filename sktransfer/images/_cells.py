"""One cell of X, read once: its digest and its pixels are from the same bytes."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import re
import stat
from copy import deepcopy
from hashlib import sha256
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from sktransfer._threads import process_lock
from sktransfer.images._containers import (
    MASKED,
    is_missing,
    is_stream,
    is_tensor,
    typed_integers,
)
from sktransfer.images._pixels import BadImage, Note, Range
from sktransfer.images._samples import Samples, prepare, samples_of, unknown_format

# Also chained ones, "simplecache::s3://…"; "C:" is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+(::[A-Za-z0-9+.\-]+)*://")
_ORIENTATION_TAG = 0x0112
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
# Open files, PIL images and containers of the user's have a state (a position, a buffer), and
# several rows may share one: one thread at a time uses them.
one_reader = process_lock()


class Cell:
    """The content of one cell, read once.

    Attributes
    ----------
    content : bytes, or ndarray of shape (H, W, 3), uint8
        An encoded image, or the pixels.
    """

    def __init__(self, content: bytes | Samples, note: Note, value_range: Range | None) -> None:
        if not content:
            raise BadImage("it is empty (0 bytes)")
        self.content: bytes | np.ndarray = (
            content if isinstance(content, bytes) else content.to_rgb(note, value_range)
        )
        self._note, self._value_range = note, value_range

    @property
    def n_bytes(self) -> int:
        """Bytes that the content takes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes

    @property
    def digest(self) -> bytes:
        """16 bytes of the SHA-256 of the content.

        A file has the same digest as a path, a URL, a data URL and bytes; so have equal pixels
        as an array, a tensor, a PIL image and a flat row.
        """
        # Processors have instructions for SHA-256: twice as fast as BLAKE2 there.
        if isinstance(self.content, bytes):
            digest = sha256(b"file\0")
            digest.update(self.content)
        else:
            digest = sha256(f"pixels {self.content.shape}\0".encode())
            digest.update(self.content.reshape(-1).data)  # releases the GIL
        return digest.digest()[:16]

    def decode(self, min_size: tuple[int, int] | None = None) -> Image.Image | np.ndarray:
        """Decode the image: upright, the first frame, in RGB, what is transparent over white.

        Parameters
        ----------
        min_size : (height, width), default=None
            A JPEG file may be decoded at 1/2, 1/4 or 1/8 as long as it stays at least that
            large. Other images come at full size.

        Returns
        -------
        PIL image in RGB, or ndarray of shape (H, W, 3), uint8
            Whichever needs no further copy. The array is read-only: it may be the user's own.

        Raises
        ------
        BadImage
            With the reason.
        """
        if isinstance(self.content, np.ndarray):
            return self.content
        image = _decode(self.content, min_size)
        if isinstance(image, Image.Image):
            if image.mode == "RGB" and self._value_range is None:
                return image
            image = Samples(np.asarray(image))
        return image.to_rgb(self._note, self._value_range)


def _decode(data: bytes, min_size: tuple[int, int] | None) -> Image.Image | Samples:
    """Decode the first frame, upright, in RGB, RGBA or 1, or as numbers."""
    # Pillow's plugins raise nearly everything at damaged bytes: OSError, SyntaxError,
    # struct.error, KeyError, zlib.error, MemoryError …
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise BadImage(unknown_format(data)) from error
    except Image.DecompressionBombError as error:
        message = f"{error} Raise PIL.Image.MAX_IMAGE_PIXELS if the file can be trusted"
        raise BadImage(message) from error
    except Exception as error:
        raise BadImage(f"the image file cannot be opened: {_words(error)}") from error
    try:
        if min_size is not None and isinstance(image, JpegImageFile):
            height, width = min_size[::-1] if _is_on_its_side(image) else min_size
            image.draft(None, (width, height))
        lower = prepare(image, data)
        for part in filter(None, (image, lower)):
            part.load()
            with contextlib.suppress(Exception):  # damaged EXIF: the image is taken as upright
                ImageOps.exif_transpose(part, in_place=True)
        return samples_of(image, image, lower) or _simplify(image)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"the image file cannot be decoded: {_words(error)}") from error


def _is_on_its_side(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1) >= 5
    except Exception:  # damaged EXIF
        return False


def _simplify(image: Image.Image) -> Image.Image:
    """Convert a loaded image of at most eight bits to RGB, RGBA or 1."""
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    if "transparency" in image.info or image.mode in _WITH_ALPHA or palette.endswith("A"):
        image = image.convert("LA") if image.mode == "La" else image
        return image.convert("RGBA")
    return image if image.mode in ("RGB", "1") else image.convert("RGB")


# -- what cells hold -------------------------------------------------------------------------
def read_cell(cell) -> bytes | Samples:
    """Return the encoded image or the numbers that a cell holds; raise BadImage."""
    if isinstance(cell, Samples):
        return cell
    if isinstance(cell, str):
        return _read_text(cell)
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return bytes(cell)
    if isinstance(cell, np.ndarray):
        return _read_array(cell)
    if is_missing(cell):
        raise BadImage(f"the cell is missing: it holds {cell!r}")
    if isinstance(cell, os.PathLike):
        return _read_path(local_path(os.fspath(cell)))
    if isinstance(cell, Image.Image):
        return _read_pil(cell)
    if is_tensor(cell):
        return _read_tensor(cell)
    if isinstance(cell, dict):
        return _read_dict(cell)
    if is_stream(cell):
        return _read_stream(cell)
    if hasattr(cell, "to_list"):  # a nested list in a column of polars
        cell = cell.to_numpy()
    if hasattr(cell, "__array__") or isinstance(cell, (list, tuple)):
        try:
            array = np.asarray(cell)
        except (ValueError, TypeError) as error:
            is_pair = isinstance(cell, tuple) and len(cell) == 2
            hint = "; of pairs (image, label) give the images alone" if is_pair else ""
            raise BadImage(f"it does not become an array: {error}{hint}") from error
        return _read_array(array)
    raise BadImage(
        f"the cell is of type {type(cell).__name__}; an image is a path, a URL, bytes, a PIL "
        'image, an array, a tensor or {"bytes": …, "path": …}'
    )


def own_copy(cell) -> object:
    """Copy what a container may change when the next cell is asked for."""
    if isinstance(cell, Image.Image) or is_stream(cell):
        return read_cell(cell)
    if is_tensor(cell):
        return cell.clone()
    if isinstance(cell, (bytearray, memoryview)):
        return bytes(cell)
    if isinstance(cell, dict):
        return {key: own_copy(value) for key, value in cell.items()}
    if isinstance(cell, list):  # rows of numbers
        return deepcopy(cell)
    return np.array(cell, subok=True) if hasattr(cell, "__array__") else cell  # with its mask


def is_url(text: str) -> bool:
    """Whether the text is a URL that is not of a local file."""
    return bool(_URL.match(text)) and not text.startswith(("file://", "local://"))


def local_path(text: str) -> str:
    """Return the local path a string names: ``~`` expanded, ``file://`` taken off."""
    if text.startswith(("file://", "local://")):
        text = text.split("://", 1)[1].removeprefix("localhost")
        if "%" in text and not os.path.lexists(text):  # Path.as_uri() quotes
            text = unquote(text)
    return os.path.expanduser(text) if text.startswith("~") else text


def _read_text(text: str) -> bytes:
    if not text.strip():
        raise BadImage("the path is an empty string")
    if text[:5].lower() == "data:":
        return _read_data_url(text)
    return _read_url(text) if is_url(text) else _read_path(local_path(text))


def _read_path(path: str) -> bytes:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise BadImage("it is a folder; give the paths of the files in it")
        if not stat.S_ISREG(mode):
            raise BadImage("it is not a regular file")
        with open(path, "rb") as file:
            return file.read()
    except BadImage:
        raise
    except FileNotFoundError as error:
        where = "" if os.path.isabs(path) else f" in {os.getcwd()!r}, where relative paths start"
        raise BadImage(f"there is no such file{where}") from error
    except PermissionError as error:
        raise BadImage("there is no permission to read the file") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte, or a lone surrogate
        raise BadImage(f"the file cannot be read: {_words(error)}") from error


def _read_url(url: str) -> bytes:
    import fsspec

    # File systems raise errors of many libraries (aiohttp, botocore …); a missing one of these
    # is an ImportError.
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        return filesystem.cat_file(path)
    except FileNotFoundError as error:
        raise BadImage("there is nothing at this URL") from error
    except Exception as error:
        raise BadImage(f"the URL cannot be read: {_words(error)}") from error


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


def _read_stream(stream) -> bytes:
    """Read an open file from its beginning and put it back where it was."""
    try:
        with one_reader:
            position = stream.tell()
            stream.seek(0)
            data = stream.read()
            stream.seek(position)
    except (OSError, ValueError, AttributeError) as error:
        raise BadImage(f"the open file cannot be read: {_words(error)}") from error
    if not isinstance(data, bytes):
        raise BadImage("the file is open in text mode; open it in mode 'rb'")
    return data


def _read_pil(image: Image.Image) -> bytes | Samples:
    """Return the file behind an image that is not loaded yet, else its pixels, upright."""
    if 0 in image.size:
        raise BadImage(f"it has no pixels: its size is {image.width} × {image.height}")
    try:
        with one_reader:
            if _is_unread_file(image):  # a list of Image.open(path) does not fill the memory
                return _read_stream(vars(image)["fp"])
            image.load()
            try:
                copy = ImageOps.exif_transpose(image)
            except Exception:  # damaged EXIF
                copy = image.copy()
            return samples_of(image, copy) or Samples(np.asarray(_simplify(copy)))
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"the PIL image cannot be loaded: {_words(error)}") from error


def _is_unread_file(image: Image.Image) -> bool:
    if not isinstance(image, ImageFile.ImageFile) or image.fp is None or image.tell() != 0:
        return False
    # tile: what is still to be read; decoderconfig: draft() was called.
    return bool(image.tile) and not image.decoderconfig


def _read_array(array: np.ndarray) -> bytes | Samples:
    if np.ma.is_masked(array):
        raise BadImage(f"it is a masked array; {MASKED}")
    if array.dtype == object and array.ndim:  # pandas nests arrays where parquet nests lists
        is_python = array.ndim > 1 and isinstance(array.flat[0], int)
        array = _stack_nested(array)
        array = typed_integers(array) if is_python else array
    if array.ndim == 0:
        item = array.item()
        if isinstance(item, (str, bytes)):
            return read_cell(item)
        if is_missing(item):
            raise BadImage(f"the cell is missing: it holds {item!r}")
        raise BadImage(f"the cell is a single number, {item!r}; an image is an array (H, W)")
    if array.ndim == 1:
        raise BadImage(
            f"it is a flat array of shape {array.shape}; give image_shape=(H, W) or (H, W, C)"
        )
    return Samples(array)


def _stack_nested(array: np.ndarray) -> np.ndarray:
    if array.dtype != object:
        return array
    try:
        return np.stack([_stack_nested(np.asarray(part)) for part in array])
    except (ValueError, TypeError) as error:
        raise BadImage(f"its rows do not form an array: {error}") from error


def _read_tensor(tensor) -> bytes | Samples:
    """Return a tensor (H, W) or (C, H, W) as an array, channels last."""
    shape = tuple(tensor.shape)
    if tensor.ndim == 3:
        if shape[0] not in (1, 2, 3, 4):
            hint = ""
            if shape[2] in (1, 2, 3, 4):
                hint = "; it looks like (H, W, C): give tensor.permute(2, 0, 1)"
            raise BadImage(
                f"the tensor's shape is {shape}, which would be {shape[0]} channels; tensors "
                f"are (H, W) or (C, H, W) with 1, 2, 3 or 4 channels{hint}"
            )
        tensor = tensor.permute(1, 2, 0)
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # NumPy has none
        tensor = tensor.float()
    return _read_array(tensor.numpy())


def _read_dict(cell: dict) -> bytes:
    data, path = cell.get("bytes"), cell.get("path")
    if not is_missing(data):
        if isinstance(data, (bytes, bytearray, memoryview)):
            return bytes(data)
        raise BadImage(f'"bytes" of the cell is of type {type(data).__name__}')
    if isinstance(path, (str, os.PathLike)):
        return _read_text(os.fspath(path))
    raise BadImage(
        f'the cell is a dict with the keys {list(cell)}; "bytes" or "path" must hold an image'
    )


def unflatten(cell, shape: tuple[int, ...]) -> object:
    """Give a flat row of numbers its shape; other cells are returned unchanged."""
    cell = cell.to_numpy() if hasattr(cell, "to_list") else cell  # of polars
    if getattr(cell, "ndim", None) != 1:
        return cell
    try:
        pixels = cell.reshape(shape)
    except (ValueError, RuntimeError):
        raise BadImage(
            f"the row has {len(cell)} values, which image_shape={shape} does not divide"
        ) from None
    # image_shape has the channels last, for tensors too.
    return pixels.permute(2, 0, 1) if is_tensor(pixels) and pixels.ndim == 3 else pixels


def _words(error: BaseException) -> str:
    text = str(error).strip() or repr(error)
    return text if isinstance(error, (OSError, SyntaxError)) else f"{type(error).__name__}: {text}"
