"""as_images(X): whatever holds pictures, as a sequence of pictures that is read late."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from PIL import Image

from sktransfer.images._containers import as_columns, is_missing, is_tensor, read_image_shape
from sktransfer.images._decode import (
    decode_encoded,
    decode_pil,
    encoded_of,
    is_url,
    local_path,
    pil_content,
    read_path,
    read_stream,
    read_text,
)
from sktransfer.images._pixels import BadImage, Note, Notes, check_values, read_only, to_rgb

__all__ = ["BadImage", "Images", "as_images"]

# What digest() read of URLs, streams and unread PIL images is kept, up to this many bytes, for
# decode(): it is of the same picture then, and no second way over a network.
_MAX_FETCHED = 1 << 28
# Keeps neighbouring inodes apart in a stat, whatever the time in ns.
_FAR_APART = 0x9E3779B97F4A7C15


def as_images(X: Any, image_shape: tuple[int, ...] | None = None) -> Images:
    """View X as a sequence of pictures, without reading or copying a pixel.

    Parameters
    ----------
    X : list, tuple, array, Series, DataFrame or tensor
        One of:

        - a list, 1-D array, Series or one-column DataFrame whose cells are paths
          (``str``, ``Path``; ``~`` is expanded), URLs of fsspec (``https://``, ``s3://`` …),
          data URLs, encoded bytes, open binary files, PIL images, arrays (H, W) or
          (H, W, C), torch tensors (H, W) or (C, H, W), or ``{"bytes": …, "path": …}``
          as sets of images in parquet files have them;
        - a DataFrame, or a 2-D array of objects, with several columns of such cells:
          several pictures per row;
        - a numeric array (N, H, W) or (N, H, W, C), a torch tensor (N, H, W) or
          (N, C, H, W): NumPy has the channels last, torch has them first;
        - with `image_shape`, a numeric array, DataFrame, list of lists or list of 1-D
          arrays of shape (N, H * W) or (N, H * W * C).

        Arrays have 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels.
        What their numbers mean is told in :func:`sktransfer.images._pixels.to_rgb`.

    image_shape : (H, W) or (H, W, C), default=None
        Shape of one picture where X holds flat rows; one of the numbers may be -1.

    Returns
    -------
    Images

    Raises
    ------
    TypeError, ValueError
        X cannot be a collection of pictures, or could be two different ones. A single
        cell that is no picture raises BadImage later, when it is read.
    """
    shape = read_image_shape(image_shape)
    columns, names, shape = as_columns(X, shape)
    return Images(columns, names, shape)


class Images:
    """A sequence of pictures: the rows of X times its image columns, row by row.

    ``len(images)`` is ``n_rows * n_columns``: with two image columns the pictures of row 0
    are numbers 0 and 1, so that the embeddings of all pictures, an array of shape
    ``(len(images), d)``, reshape to ``(n_rows, n_columns * d)``. A slice or an array of
    numbers selects a view whose pictures keep the row they came from.

    `digest`, `stat`, `decode`, `picture` and `where` may be called from several threads at once.

    Attributes
    ----------
    n_rows, n_columns : int
        Of X; of a view its length and 1.
    feature_names : list of str or None
        The image columns of a DataFrame, the name of a Series; None for a view.
    """

    def __init__(
        self,
        columns: list[Any],
        names: list[str] | None = None,
        image_shape: tuple[int, ...] | None = None,
    ) -> None:
        self._columns = columns
        self._names = names
        self._image_shape = image_shape
        self._n_x_columns = len(columns)
        n_pictures = len(columns[0]) * len(columns)
        self._positions: np.ndarray | range = range(n_pictures)  # in the columns, row by row …
        self._numbers: np.ndarray | range = self._positions  # … and in X
        self._is_view = False
        self._notes = Notes(n_pictures)
        self._fetched = _Fetched()

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def n_columns(self) -> int:
        return 1 if self._is_view else len(self._columns)

    @property
    def n_rows(self) -> int:
        return len(self) // self.n_columns

    @property
    def feature_names(self) -> list[str] | None:
        return None if self._is_view else self._names

    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> Images:
        view = Images.__new__(Images)
        view.__dict__.update(self.__dict__, _is_view=True)
        if isinstance(index, slice):
            view._positions, view._numbers = self._positions[index], self._numbers[index]
            return view
        index = np.asarray(index)
        if index.ndim != 1:
            raise TypeError(
                f"Images are indexed by slices and 1-D arrays, got {index!r}; "
                "decode(i) gives a single picture"
            )
        index = index if index.dtype == bool else index.astype(np.intp)
        view._positions = np.asarray(self._positions)[index]
        view._numbers = np.asarray(self._numbers)[index]
        return view

    def column(self, j: int) -> Images:
        """Return the pictures of the image column `j`, a view."""
        if not 0 <= j < self.n_columns:
            raise IndexError(f"there is no image column {j}; there are {self.n_columns}")
        return self[j :: self.n_columns]

    def __repr__(self) -> str:
        return f"<Images: {self.n_rows} rows × {self.n_columns} columns>"

    # -- one picture -------------------------------------------------------
    def row(self, i: int) -> int:
        """Return the row of X that picture `i` came from."""
        return int(self._numbers[i]) // self._n_x_columns

    def where(self, i: int) -> str:
        """Return where picture `i` stands in X and what it is, for messages."""
        return f"{self._where(int(self._numbers[i]))} ({_describe(self._cell(i))})"

    def digest(self, i: int) -> bytes:
        """Return 16 bytes that tell picture `i` from any other by its content.

        The same file gives the same digest as a path, a URL, a data URL and bytes; equal
        arrays (also rows of a stack, flat rows and tensors) give the same digest.
        Raises BadImage where the picture cannot be read.
        """
        content = self._content(i, keep=True)
        data: Any = content
        if isinstance(content, np.ndarray):
            check_values(content, self._noter(i))
            kind = f"array {content.dtype.str} {content.shape}"
            # hashlib takes one dimension only, and releases the GIL meanwhile.
            data = np.ascontiguousarray(content).reshape(-1).view(np.uint8).data
        elif isinstance(content, Image.Image):
            kind, data = pil_content(content)
            kind = f"PIL {kind}"
        else:
            kind = "file"
            if not len(content):
                raise BadImage("it is empty (0 bytes)")
        # Today's processors have instructions for SHA-256: twice as fast as BLAKE2 there.
        digest = sha256(f"{kind}\0".encode())
        digest.update(data)
        return digest.digest()[:16]

    def stat(self, i: int) -> tuple[str, int, int, int] | None:
        """Return what a local file is known by while it stays as it is; None for what is none.

        Absolute path, size, modification time in ns, inode and time of the last change as one
        number.
        """
        cell = self._cell(i)
        if type(cell) is not str:
            if isinstance(cell, dict):
                if not is_missing(cell.get("bytes")):
                    return None
                cell = cell.get("path")
            if isinstance(cell, os.PathLike):
                cell = os.fspath(cell)
        if not isinstance(cell, str) or not cell:
            return None
        is_plain = cell[0] == os.sep == "/"  # absolute: the most frequent, and the quickest
        if not is_plain and (cell[:5].lower() == "data:" or is_url(cell)):
            return None
        path = cell if is_plain else local_path(cell)
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return None
        full = os.path.normpath(path) if is_plain else os.path.abspath(path)
        # What copies with an old modification time (cp -p) cannot set is when that was done.
        inode = status.st_ino * _FAR_APART + status.st_ctime_ns
        return full, status.st_size, status.st_mtime_ns, inode & (2**63 - 1)

    def decode(self, i: int, min_size: tuple[int, int] | None = None) -> np.ndarray:
        """Read picture `i` as people see it.

        Upright by its EXIF orientation, the first frame, in RGB, what is transparent
        over white.

        Parameters
        ----------
        i : int
        min_size : (height, width), default=None
            A JPEG may be decoded at 1/2, 1/4 or 1/8 as long as it stays at least that
            large. Other pictures come at full size.

        Returns
        -------
        ndarray of shape (H, W, 3), uint8, C-contiguous
            Read-only: it may be the user's own array.

        Raises
        ------
        BadImage
            With the reason; :meth:`where` tells where.
        """
        return read_only(np.asarray(self.picture(i, min_size)))

    def picture(self, i: int, min_size: tuple[int, int] | None = None) -> Image.Image | np.ndarray:
        """Read picture `i` as `decode` does, but as a PIL image where it becomes one anyway.

        Parameters
        ----------
        i, min_size
            As in :meth:`decode`.

        Returns
        -------
        PIL image in RGB, or ndarray of shape (H, W, 3), uint8
            Either may be the user's own.

        Raises
        ------
        BadImage
            With the reason.
        """
        content = self._content(i, keep=False)
        note = self._noter(i)
        if isinstance(content, np.ndarray):
            return to_rgb(content, note)
        if isinstance(content, Image.Image):
            return decode_pil(content, note)
        return decode_encoded(content, min_size, note)

    # -- what was assumed --------------------------------------------------
    def take_warnings(self) -> str | None:
        """Return what was assumed since the last call as the text of one warning, or None.

        All views of the same X share what was assumed.
        """
        return self._notes.take().message(self._where)

    def take_notes(self) -> Notes:
        """Return and forget what was assumed: a worker process sends it home."""
        return self._notes.take()

    def merge_notes(self, notes: Notes) -> None:
        """Take over what a worker process noted about pictures of the same X."""
        self._notes.merge(notes)

    # -- within ------------------------------------------------------------
    def _cell(self, i: int) -> Any:
        row, column = divmod(int(self._positions[i]), len(self._columns))
        return self._columns[column][row]

    def _where(self, number: int) -> str:
        row, column = divmod(number, self._n_x_columns)
        if self._n_x_columns == 1:
            return f"row {row}"
        name = self._names[column] if self._names else column
        return f"row {row}, column {name!r}"

    def _noter(self, i: int) -> Note:
        return lambda *what: self._notes.add(int(self._numbers[i]), *what)

    def _content(self, i: int, keep: bool) -> np.ndarray | Image.Image | bytes:
        """Resolve a cell to pixels, a PIL image or encoded bytes; raise BadImage."""
        cell = self._cell(i)
        if _is_read_anew(cell):
            number = int(self._numbers[i])
            content: Any = self._fetched.pop(number)
            if content is None:
                content = _read_cell(cell)
            if keep and isinstance(content, bytes):
                self._fetched.put(number, content)
            return content
        if self._image_shape is not None and getattr(cell, "ndim", None) == 1:
            cell = _unflatten(cell, self._image_shape)
        return _read_cell(cell)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_notes": self._notes.n_pictures, "_fetched": None}
        if self._is_view:  # to another process a view takes only its own pictures along
            positions = np.asarray(self._positions, dtype=np.intp)
            cells: Any
            first = self._columns[0]
            if len(self._columns) == 1 and (isinstance(first, np.ndarray) or is_tensor(first)):
                cells = first[positions]
            else:
                cells = [_alone(self._cell(i)) for i in range(len(self))]
            state |= {"_columns": [cells], "_positions": range(len(self))}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        fresh = {"_notes": Notes(state["_notes"]), "_fetched": _Fetched()}
        self.__dict__.update(state | fresh)


def _is_read_anew(cell: Any) -> bool:
    """Whether a cell is read again for decoding and no `stat` would tell that it has changed."""
    if isinstance(cell, str):
        return is_url(cell)
    return _is_stream(cell) or isinstance(cell, Image.Image)


def _is_stream(cell: Any) -> bool:
    return hasattr(cell, "read") and hasattr(cell, "seek")


def _alone(cell: Any) -> Any:
    """A cell that pickles without the rest of the tensor that it is a view of."""
    if is_tensor(cell) and cell.untyped_storage().nbytes() > cell.numel() * cell.element_size():
        return cell.clone()
    return cell


def _read_cell(cell: Any) -> np.ndarray | Image.Image | bytes:
    if isinstance(cell, str):
        return read_text(cell)
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return cell if isinstance(cell, bytes) else bytes(cell)
    if isinstance(cell, np.ndarray):
        return _read_array(cell)
    if is_missing(cell):
        raise BadImage(f"the cell is missing: it holds {cell!r}")
    if isinstance(cell, os.PathLike):
        return read_path(local_path(os.fspath(cell)))
    if isinstance(cell, Image.Image):
        data = encoded_of(cell)
        return cell if data is None else data
    if is_tensor(cell):
        return _read_tensor(cell)
    if isinstance(cell, dict):
        return _read_dict(cell)
    if _is_stream(cell):
        return read_stream(cell)
    if hasattr(cell, "to_list"):  # a nested list in a column of polars
        cell = cell.to_list()
    if hasattr(cell, "__array__") or isinstance(cell, (list, tuple)):
        try:
            return _read_array(np.asarray(cell))
        except BadImage:
            raise
        except (ValueError, TypeError) as error:
            raise BadImage(f"it does not become an array: {error}") from error
    raise BadImage(
        f"the cell is of type {type(cell).__name__}; a picture is a path, a URL, bytes, a PIL "
        'image, an array, a tensor or {"bytes": …, "path": …}'
    )


def _read_array(array: np.ndarray) -> np.ndarray | bytes:
    if array.dtype == object and array.ndim:  # pandas nests arrays where parquet nests lists
        array = _stack_nested(array)
    if array.ndim == 0:
        item = array.item()
        if isinstance(item, (str, bytes)):
            return read_text(item) if isinstance(item, str) else item
        if is_missing(item):
            raise BadImage(f"the cell is missing: it holds {item!r}")
        raise BadImage(f"the cell is a single number, {item!r}; a picture is an array (H, W)")
    if array.ndim == 1:
        raise BadImage(
            f"it is a flat array of shape {array.shape}; give image_shape=(H, W) or (H, W, C)"
        )
    return array


def _stack_nested(array: np.ndarray) -> np.ndarray:
    if array.dtype != object:
        return array
    try:
        return np.stack([_stack_nested(np.asarray(part)) for part in array])
    except (ValueError, TypeError) as error:
        raise BadImage(f"its rows do not form an array: {error}") from error


def _read_tensor(tensor: Any) -> np.ndarray | bytes:
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
    if data is not None and not is_missing(data):
        if isinstance(data, (bytes, bytearray, memoryview)):
            return bytes(data)
        raise BadImage(f'"bytes" of the cell is of type {type(data).__name__}')
    if isinstance(path, (str, os.PathLike)):
        return read_text(os.fspath(path))
    raise BadImage(
        f'the cell is a dict with the keys {list(cell)}; "bytes" or "path" must hold a picture'
    )


def _unflatten(cell: Any, shape: tuple[int, ...]) -> Any:
    n_pixels = int(np.prod(cell.shape))
    try:
        pixels = cell.reshape(shape)
    except (ValueError, RuntimeError):
        raise BadImage(
            f"the row has {n_pixels} values, which image_shape={shape} does not divide"
        ) from None
    # image_shape has the channels last, whoever holds the numbers.
    return pixels.permute(2, 0, 1) if is_tensor(pixels) and pixels.ndim == 3 else pixels


def _describe(cell: Any) -> str:
    if isinstance(cell, dict):
        path = cell.get("path")
        cell = path if path is not None else cell.get("bytes")
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return f"{len(cell)} bytes"
    if isinstance(cell, Image.Image):
        return f"PIL image, mode {cell.mode}, {cell.width} × {cell.height}"
    if isinstance(cell, np.ndarray) or is_tensor(cell):
        kind = "tensor" if is_tensor(cell) else "array"
        return f"{kind} of shape {tuple(cell.shape)}, {cell.dtype}"
    if isinstance(cell, os.PathLike):
        cell = os.fspath(cell)
    text = repr(str(cell) if isinstance(cell, str) else cell)
    return text if len(text) <= 200 else f"{text[:120]}…{text[-20:]}"


class _Fetched:
    """Bytes that were read for digest() and are kept for decode()."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._data: OrderedDict[int, bytes] = OrderedDict()
        self._n_bytes = 0

    def put(self, number: int, data: bytes) -> None:
        with self._lock:
            self._drop(number)
            self._data[number] = data
            self._n_bytes += len(data)
            while self._n_bytes > _MAX_FETCHED:
                self._drop(next(iter(self._data)))

    def pop(self, number: int) -> bytes | None:
        with self._lock:
            return self._drop(number)

    def _drop(self, number: int) -> bytes | None:
        data = self._data.pop(number, None)
        if data is not None:
            self._n_bytes -= len(data)
        return data
