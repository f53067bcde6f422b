"""``as_images``: view X as a sequence of images, which are read on demand."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from sktransfer._rows import Rows, is_missing
from sktransfer.images._cells import Cell, copy_cell, read_cell, unflatten
from sktransfer.images._containers import (
    Container,
    as_columns,
    describe,
    is_tensor,
    read_image_shape,
    read_value_range,
)
from sktransfer.images._files import Urls, is_url, local_path, reader_lock
from sktransfer.images._pixels import BadImage

__all__ = ["BadImage", "Images", "as_images"]

# Multiplies inodes, so that neighbouring ones differ when a time in ns is added.
_FAR_APART = 0x9E3779B97F4A7C15


def as_images(
    X, image_shape: tuple[int, ...] | None = None, value_range: Sequence[float] | None = None
) -> Images:
    """View X as a sequence of images, without reading or copying a pixel.

    Parameters
    ----------
    X : list, array, Series, DataFrame, tensor or another sequence
        - cells, one per row: paths (``str``, ``Path``; ``~`` is expanded), URLs of fsspec
          (``https://``, ``s3://`` …), data URLs, encoded bytes, open binary files, PIL images,
          arrays (H, W) or (H, W, C), torch tensors (H, W) or (C, H, W), or
          ``{"bytes": …, "path": …}``, in any object with ``__len__`` and ``__getitem__``;
        - a DataFrame, or a 2-D array of objects, with several columns of such cells;
        - a numeric array (N, H, W) or (N, H, W, C), channels last, or a torch tensor
          (N, H, W) or (N, C, H, W), channels first;
        - with `image_shape`, flat numeric rows (N, H * W) or (N, H * W * C).

        There are 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels.
        :func:`sktransfer.images._pixels.to_rgb` says what the numbers mean.
    image_shape : (H, W) or (H, W, C), default=None
        Shape of one image where X holds flat rows; one of the numbers may be -1.
    value_range : (low, high), default=None
        The values that are black and white in all images; other values are clipped to them.

    An X that cannot be a collection of images, or could be two different ones, raises a TypeError
    or a ValueError; a single cell that is not an image raises BadImage when it is read.
    """
    limits = read_value_range(value_range)
    return Images(*as_columns(X, read_image_shape(image_shape)), limits)


class Images(Rows):
    """The images of X; several threads may read at once.

    Attributes
    ----------
    value_range : (low, high) or None
        As given to `as_images`.
    """

    kind = "images"

    def __init__(
        self,
        columns: list,
        names: list[str] | None = None,
        image_shape: tuple[int, ...] | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(columns, names)
        self._image_shape, self.value_range = image_shape, value_range
        self._notes = _Notes()
        self._urls = Urls()

    # -- one image -----------------------------------------------------------------------
    def where(self, i: int) -> str:
        place = self._place(int(self._numbers[i]))
        try:
            return f"{place} ({describe(self._cell(i))})"
        except BadImage:
            return place

    def read(self, i: int) -> Cell:
        """Read image `i` once, for its digest and its pixels; raise BadImage with the reason."""
        number = int(self._numbers[i])
        cell = self._cell(i)
        note = functools.partial(self._notes.add, number)
        try:
            if self._image_shape is not None:
                cell = unflatten(cell, self._image_shape)
            return Cell(read_cell(cell, self._urls), note, self.value_range)
        except BadImage:
            raise
        except Exception as error:  # of the user's classes, or memory that does not suffice
            raise BadImage(f"reading it raises {type(error).__name__}: {error!s:.300}") from error

    def decode(self, i: int, min_size: tuple[int, int] | None = None) -> Image.Image | np.ndarray:
        """Return ``read(i).decode(min_size)``."""
        return self.read(i).decode(min_size)

    def stat(self, i: int) -> tuple[str, int, int, int] | None:
        """Return path, size, modification time in ns, and inode and last change as one number."""
        container, row = self._container(i)
        if isinstance(container, Container):  # each of its cells is read once
            return None
        try:
            cell = container[row]
            if isinstance(cell, dict):
                cell = cell.get("path") if is_missing(cell.get("bytes")) else None
            if not isinstance(cell, str):
                cell = os.fsdecode(cell) if isinstance(cell, os.PathLike) else ""
            if not cell:
                return None
            is_plain = cell[0] == os.sep == "/"  # an absolute path, the fastest case
            if not is_plain and (cell[:5].lower() == "data:" or is_url(cell)):
                return None
            path = cell if is_plain else local_path(cell)
            status = os.stat(path)
        except Exception:  # `read` gives the reason
            return None
        full = os.path.normpath(path) if is_plain else os.path.abspath(path)
        # A copy may have the old modification time (cp -p), but not the old time of last change.
        inode = status.st_ino * _FAR_APART + status.st_ctime_ns
        return full, status.st_size, status.st_mtime_ns, inode & (2**63 - 1)

    # -- assumptions about values, shared by all views of X ------------------------------
    def take_warnings(self) -> str | None:
        return _warning(self._notes.take(), self._place)

    def take_notes(self) -> dict:
        return self._notes.take()

    def merge_notes(self, notes: dict) -> None:
        self._notes.merge(notes)

    # -- within --------------------------------------------------------------------------
    def _cell(self, i: int):
        container, row = self._container(i)
        try:
            if isinstance(container, Container):
                with reader_lock:
                    return copy_cell(container[row])
            cell = container[row]
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(f"X[{row}] raises {type(error).__name__}: {error!s:.300}") from error
        if isinstance(cell, BadImage):  # raised when this view was pickled
            raise cell
        return cell

    def _cell_or_error(self, i: int) -> object:
        try:
            cell = self._cell(i)
        except BadImage as error:
            return error
        # The pickle of a view of a tensor would contain the whole tensor.
        is_view = is_tensor(cell) and cell.untyped_storage().nbytes() > cell.nbytes
        return cell.clone() if is_view else cell

    def __getstate__(self) -> dict:
        state = self.__dict__ | {"_notes": None}
        if self._is_view:  # it is pickled with its own images only
            positions = np.asarray(self._positions, dtype=np.intp)
            first = self._columns[0]
            if len(self._columns) == 1 and (isinstance(first, np.ndarray) or is_tensor(first)):
                cells = first[positions]
            else:
                cells = [self._cell_or_error(i) for i in range(len(self))]
            state |= {"_columns": [cells], "_positions": range(len(self))}
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state | {"_notes": _Notes()})


class _Notes:
    """Assumptions about the values of images, collected from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # kind -> number of an image, which may be read more than once -> its extreme values
        self._seen: dict[str, dict[int, tuple[float, float]]] = {}

    def add(self, number: int, kind: str, low: float, high: float) -> None:
        self.merge({kind: {number: (low, high)}})

    def merge(self, seen: dict) -> None:
        with self._lock:
            for kind, images in seen.items():
                self._seen.setdefault(kind, {}).update(images)

    def take(self) -> dict:
        with self._lock:
            seen, self._seen = self._seen, {}
        return seen


def _warning(seen: dict, place: Callable[[int], str]) -> str | None:
    if not seen:
        return None
    sentences = []
    for kind, text in _TEXTS.items():
        if images := seen.get(kind):
            n, first = len(images), min(images)
            low, high = images[first]
            where = f"the first is {place(first)}" if n > 1 else place(first)
            count, were = (f"{n} images", "were") if n > 1 else ("1 image", "was")
            n_bits = max(8, int(max(high for _, high in images.values())).bit_length())
            top = 2 ** (n_bits + n_bits % 2) - 1  # of 8, 10, 12 … bits
            where = f"({where}: {low:.4g}…{high:.4g})"
            sentences.append(text.format(images=count, where=where, were=were, top=top))
    lows, highs = zip(*(ends for images in seen.values() for ends in images.values()), strict=True)
    return (
        f"{' '.join(sentences)} Set value_range=(low, high), the numbers that are black and white, "
        f"to have all images read in one way; these are within {min(lows):.6g}…{max(highs):.6g}."
    )


_STRETCHED = " {where} {were} stretched from the image's own minimum…maximum to 0…255."
_TEXTS = {
    "clipped": "{images} of floats slightly outside 0…1 {where} {were} clipped to 0…1.",
    "0…255": (
        "{images} of floats outside 0…1 {where} {were} read as 0…255. If that is right, give "
        'X / 255. or X.astype("uint8").'
    ),
    "stretched": "{images} of numbers outside 0…255" + _STRETCHED,
    "stretched floats": "{images} of floats outside 0…1" + _STRETCHED,
    "ranked": "{images} of numbers far apart {where} {were} read by the rank of each number.",
    "dark 16 bits": (
        "{images} of dtype uint16 {where} {were} read as 16 bits, 0…65535, of which less than a "
        "quarter is used: consider value_range=(0, {top})."
    ),
    "dark floats": "{images} of floats within 0…1 {where} {were} almost black.",
}
