"""Read a cell of X once, so that its digest and its pixels come from the same bytes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from copy import deepcopy
from hashlib import sha256

import numpy as np
from PIL import Image, ImageFile, ImageOps

from sktransfer._progress import error_text, shown
from sktransfer._rows import is_missing
from sktransfer.images._containers import (
    MASKED,
    describe,
    is_stream,
    is_tensor,
    typed_integers,
)
from sktransfer.images._decoding import Size, correct_tiff, decode, pixels_of
from sktransfer.images._files import (
    Urls,
    is_url,
    local_path,
    read_data_url,
    read_path,
    read_stream,
    reader_lock,
)
from sktransfer.images._pixels import BadImage, Note, Range, Samples

_GIVE_IMAGES = "of pairs (image, label) give the images alone: [image for image, _ in X]"
_STRIPPED = (
    "; np.array(list_of_bytes) strips the zeros that a file ends in: give the list, or "
    "np.array(list_of_bytes, dtype=object)"
)


class Cell:
    """The content of one cell: an encoded image, or pixels (H, W, 3), uint8."""

    def __init__(self, content: bytes | Samples, note: Note, value_range: Range | None) -> None:
        if not content:
            raise BadImage("it is empty (0 bytes)")
        self.content: bytes | np.ndarray = (
            content if isinstance(content, bytes) else content.to_rgb(note, value_range)
        )
        self._note, self._value_range = note, value_range

    @property
    def n_bytes(self) -> int:
        """Size of the content in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes

    @property
    def digest(self) -> bytes:
        """16 bytes of the SHA-256 of the content.

        A file has the same digest as a path, a URL, a data URL and bytes; so have equal pixels
        as an array, a tensor, a PIL image and a flat row.
        """
        # Twice as fast as BLAKE2 on processors with instructions for SHA-256.
        if isinstance(self.content, bytes):
            digest = sha256(b"file\0")
            digest.update(self.content)
        else:
            digest = sha256(f"pixels {self.content.shape}\0".encode())
            digest.update(self.content.reshape(-1).data)  # releases the GIL
        return digest.digest()[:16]

    def decode(self, min_size: Size = None) -> Image.Image | np.ndarray:
        """Decode the first frame in RGB, upright, with transparency over white.

        A JPEG file may be decoded at 1/2, 1/4 or 1/8 if the result is at least as large as
        `min_size`, (height, width). The result is a PIL image or an array (H, W, 3), uint8,
        whichever needs no further copy. The array is read-only: it may be the user's.
        """
        with self.decoded(min_size) as image:
            return image

    @contextlib.contextmanager
    def decoded(self, min_size: Size = None) -> Iterator[Image.Image | np.ndarray]:
        """Decode as :meth:`decode`; other large images wait until the block ends."""
        with contextlib.ExitStack() as stack:
            yield self._decoded(min_size, stack)

    def _decoded(self, min_size: Size, stack: contextlib.ExitStack) -> Image.Image | np.ndarray:
        if isinstance(self.content, np.ndarray):
            return self.content
        try:
            image = decode(self.content, min_size, stack)
            if isinstance(image, Image.Image):
                if self._value_range is None:
                    return image
                image = Samples(np.asarray(image))
            return image.to_rgb(self._note, self._value_range)
        except BadImage as error:
            hint = _STRIPPED if isinstance(self.content, np.bytes_) else ""
            raise BadImage(f"{error}{hint}") from error.__cause__
        except MemoryError as error:
            raise BadImage(f"memory does not suffice to decode it: {error!r}") from error


# -- what cells hold -------------------------------------------------------------------------
def read_cell(cell, urls: Urls) -> bytes | Samples:
    """Return the encoded image or the numbers that a cell holds; raise BadImage."""
    if isinstance(cell, Samples):
        return cell
    if isinstance(cell, str):
        return _read_text(cell, urls)
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return cell if isinstance(cell, np.bytes_) else bytes(cell)
    if isinstance(cell, np.ndarray):
        return _read_array(cell, urls)
    if is_missing(cell):
        raise BadImage(f"the cell is missing: it holds {cell!r}")
    if isinstance(cell, os.PathLike):
        path = os.fsdecode(cell)
        if not is_url(path):
            return read_path(local_path(path))
    if isinstance(cell, Image.Image):
        return _read_pil(cell)
    if is_tensor(cell):
        return _read_array(_from_tensor(cell), urls)
    if isinstance(cell, dict):
        return _read_dict(cell, urls)
    if is_stream(cell):
        return read_stream(cell)
    if hasattr(cell, "read_bytes"):  # a zipfile.Path, a UPath, a resource of a package
        with cell.open("rb") as stream:
            return read_stream(stream)
    if hasattr(cell, "to_list"):  # a nested list in a column of polars
        cell = cell.to_numpy()
    is_tuple = isinstance(cell, tuple)
    if is_tuple and cell and isinstance(cell[0], (str, bytes, Image.Image, Samples)):
        raise BadImage(f"it is a {describe(cell)}; {_GIVE_IMAGES}")
    if is_tuple or isinstance(cell, list) or hasattr(cell, "__array__"):
        try:
            with reader_lock:  # lazy arrays may share a source
                array = np.asarray(cell).copy()
        except (ValueError, TypeError) as error:
            hint = "" if hasattr(cell, "__array__") else f"; {_GIVE_IMAGES}"
            raise BadImage(f"it does not become an array: {error}{hint}") from error
        return _read_array(array, urls)
    raise BadImage(
        f"the cell is of type {type(cell).__name__}; an image is a path, a URL, bytes, a PIL "
        'image, an array, a tensor or {"bytes": …, "path": …}'
    )


def copy_cell(cell) -> object:
    """Copy a cell, which its container may overwrite when it returns the next one."""
    if isinstance(cell, Image.Image):
        return _read_pil(cell)
    if is_stream(cell):
        return read_stream(cell)
    if is_tensor(cell):
        return cell.clone()
    if isinstance(cell, (bytearray, memoryview)):
        return bytes(cell)
    if isinstance(cell, dict):
        return {key: copy_cell(value) for key, value in cell.items()}
    if isinstance(cell, (list, tuple)):
        copies = [copy_cell(value) for value in cell]
        return copies if isinstance(cell, list) else tuple(copies)
    if not hasattr(cell, "__array__"):
        return cell
    array = np.asanyarray(cell)  # keeps the mask; np.array(cell) may return a view
    return deepcopy(array) if array.dtype == object else array.copy()


def _read_text(text: str, urls: Urls) -> bytes:
    if not text.strip():
        raise BadImage("the path is an empty string")
    if text[:5].lower() == "data:":
        return read_data_url(text)
    return urls.read(text) if is_url(text) else read_path(local_path(text))


def _read_pil(image: Image.Image) -> bytes | Samples:
    """Return the file of an image that is not loaded yet, or the upright pixels of a loaded one."""
    if 0 in image.size:
        raise BadImage(f"it has no pixels: its size is {image.width} × {image.height}")
    try:
        with reader_lock:
            if _is_unread_file(image):  # so that a list of Image.open(path) takes no memory
                return read_stream(vars(image)["fp"])
            correct_tiff(image)
            image.load()
            try:
                copy = ImageOps.exif_transpose(image)
            except Exception:  # damaged EXIF
                copy = image.copy()
            pixels = pixels_of(image, copy)
            return pixels if isinstance(pixels, Samples) else Samples(np.asarray(pixels))
    except BadImage:
        raise
    except Exception as error:
        is_unread = bool(getattr(image, "tile", None)) and vars(image).get("fp") is None
        if is_unread or "closed image" in str(error):
            raise BadImage(
                "the PIL image is closed, by the end of its with block or by close(), and its "
                "pixels were not read before: call its load() within the block, or give the path"
            ) from error
        raise BadImage(f"the PIL image cannot be loaded: {error_text(error)}") from error


def _is_unread_file(image: Image.Image) -> bool:
    if not isinstance(image, ImageFile.ImageFile) or image.fp is None or image.tell() != 0:
        return False
    # An unread image has tiles to read; after draft() it has a decoderconfig.
    return bool(image.tile) and not image.decoderconfig


def _read_array(array: np.ndarray, urls: Urls) -> bytes | Samples:
    if np.ma.is_masked(array):
        raise BadImage(f"it is a masked array; {MASKED}")
    array = np.asarray(array)  # an np.matrix cannot have one dimension
    if array.dtype == object and array.ndim:  # nested lists of parquet, as pandas reads them
        is_python = array.ndim > 1 and isinstance(array.flat[0], int)
        array = _stacked(array)
        array = typed_integers(array) if is_python else array
    if array.ndim == 0:
        item = array.item()
        if isinstance(item, (str, bytes)) or is_missing(item):
            return read_cell(item, urls)
        raise BadImage(f"the cell is a single number, {item!r}; an image is an array (H, W)")
    if array.ndim == 1:
        raise BadImage(
            f"it is a flat array of shape {array.shape}; give image_shape=(H, W) or (H, W, C)"
        )
    return Samples(array)


def _stacked(array: np.ndarray) -> np.ndarray:
    if array.dtype != object:
        return array
    try:
        return np.stack([_stacked(np.asarray(part)) for part in array])
    except (ValueError, TypeError) as error:
        raise BadImage(f"its rows do not form an array: {error}") from error


def _from_tensor(tensor) -> np.ndarray:
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
    return tensor.numpy()


def _read_dict(cell: dict, urls: Urls) -> bytes:
    data, path = cell.get("bytes"), cell.get("path")
    if not is_missing(data):
        if isinstance(data, (bytes, bytearray, memoryview)):
            return bytes(data)
        raise BadImage(f'"bytes" of the cell is of type {type(data).__name__}')
    if isinstance(path, (str, os.PathLike)):
        return _read_text(os.fspath(path), urls)
    raise BadImage(
        f'the cell is a dict with the keys {shown(list(cell))}; "bytes" or "path" must hold an '
        "image; of rows that are dicts give the images alone: [row[KEY] for row in X]"
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
