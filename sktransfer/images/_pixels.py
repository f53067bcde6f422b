"""Arrays of any number type as 8-bit RGB, and a record of what had to be assumed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

# Called as note(kind, low, high) where a picture had to be interpreted.
Note = Callable[[str, float, float], None]

# Floats this far outside 0…1 still round to 0 or 255: half a level of eight bits.
_HALF_LEVEL = 0.5 / 255


class BadImage(ValueError):
    """One picture cannot be read; the message is the reason and names no row."""


def to_rgb(array: np.ndarray, note: Note) -> np.ndarray:
    """Read one picture as people see it: 8-bit RGB.

    Parameters
    ----------
    array : ndarray of shape (H, W) or (H, W, C), C in 1…4
        Grey, grey + alpha, RGB or RGBA. Alpha is laid over white.
    note : callable
        Told about each assumption that was made.

    Returns
    -------
    ndarray of shape (H, W, 3), uint8, C-contiguous
        Read-only. It is the given array itself where nothing had to be done.

    Notes
    -----
    What a number means follows from its type and, for floats, from the one
    picture alone, never from its neighbours:

    - bool: black and white; uint8: as it is;
    - uint16: 16 bits, of which the upper eight are kept, as Pillow reads 16-bit files;
    - floats within 0…1: ``rint(255 * x)``, so that ``x / 255.`` is the picture ``x``;
    - other integers within 0…255: as they are;
    - floats within 0…255: ``rint(x)``, and noted;
    - everything else: stretched from its own minimum…maximum to 0…255, and noted.
    """
    check_picture_shape(array)
    if array.dtype != np.uint8:
        n_colors = array.shape[2] - (array.shape[2] in (2, 4)) if array.ndim == 3 else None
        if n_colors is None or n_colors == array.shape[2]:
            array = _to_uint8(array, note)
        else:  # the range of the colours says nothing about that of the alpha channel
            color, alpha = array[..., :n_colors], array[..., n_colors:]
            array = np.concatenate(
                [_to_uint8(color, note), _to_uint8(alpha, lambda *_: None)], axis=2
            )
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] in (2, 4):
        array = over_white(array)
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return read_only(np.ascontiguousarray(array))


def over_white(array: np.ndarray) -> np.ndarray:
    """Lay the colours of a uint8 (H, W, C + 1) array over white by its last channel."""
    alpha = array[..., -1:]
    if (alpha == 255).all():
        return array[..., :-1]
    # color * alpha + 255 * (255 - alpha) is at most 255 * 255: 16 bits are enough.
    alpha = alpha.astype(np.uint16)
    blend = array[..., :-1] * alpha
    blend += 255 * (255 - alpha) + 127
    blend //= 255
    return blend.astype(np.uint8)


def read_only(array: np.ndarray) -> np.ndarray:
    """Return a view that cannot be written through: it may show the user's own data."""
    if array.flags.writeable or type(array) is not np.ndarray:
        array = array.view(np.ndarray)
        array.flags.writeable = False
    return array


def check_picture_shape(array: np.ndarray) -> None:
    """Raise BadImage unless the array is (H, W) or (H, W, 1…4) and not empty."""
    shape = array.shape
    if array.ndim not in (2, 3):
        raise BadImage(
            f"its shape is {shape}; a picture is an array of shape (H, W) or (H, W, C), "
            "C one of 1 (grey), 2 (grey, alpha), 3 (RGB), 4 (RGBA)"
        )
    if array.size == 0:
        raise BadImage(f"it has no pixel: its shape is {shape}")
    if array.ndim == 3 and shape[2] not in (1, 2, 3, 4):
        hint = ""
        if shape[0] in (1, 2, 3, 4):
            hint = (
                f"; if it is ({shape[0]}, H, W), channels first, give array.transpose(1, 2, 0) "
                "or a torch tensor"
            )
        raise BadImage(
            f"its shape is {shape}, which would be {shape[2]} channels; arrays are "
            f"(H, W) or (H, W, C) with 1, 2, 3 or 4 channels{hint}"
        )


def check_values(array: np.ndarray, note: Note) -> None:
    """Raise BadImage, and note assumptions, as to_rgb would, without converting."""
    check_picture_shape(array)
    if array.dtype == np.uint8 or array.dtype == np.bool_:
        return
    if array.ndim == 3 and array.shape[2] in (2, 4):
        _range(array[..., -1:])
        array = array[..., :-1]
    _reading(array, note)


def _to_uint8(array: np.ndarray, note: Note) -> np.ndarray:
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    reading, low, high = _reading(array, note)
    if reading == "8 bits":
        return array.astype(np.uint8)
    if reading == "16 bits":
        return (array >> 8).astype(np.uint8)
    if reading == "0…1":
        # float16 holds k / 255 well enough to find k again, not its product with 255.
        x = array.astype(np.float32, copy=False) * np.float32(255)
        return np.clip(np.rint(x, out=x), 0, 255, out=x).astype(np.uint8)
    if reading == "0…255":
        x = np.rint(array)
        return np.clip(x, 0, 255, out=x).astype(np.uint8)
    # Halves, for high - low may be beyond the largest float.
    x = array.astype(np.float64) / 2 - low / 2
    span = high / 2 - low / 2
    if span < np.finfo(np.float64).tiny:  # one value everywhere
        return np.zeros(array.shape, np.uint8)
    return np.clip(np.rint(x / span * 255), 0, 255).astype(np.uint8)


def _reading(array: np.ndarray, note: Note) -> tuple[str, float, float]:
    """Return how the numbers are read, and their minimum and maximum."""
    kind = array.dtype.kind
    if kind not in "uif":
        raise BadImage(_wrong_dtype(array.dtype))
    if array.dtype == np.uint8:
        return "8 bits", 0, 255
    low, high = _range(array)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        if 0 < high <= 255:
            note("dark 16 bits", low, high)
        return "16 bits", low, high
    if kind in "ui":
        if low >= 0 and high <= 255:
            return "8 bits", low, high
        note("stretched", low, high)
        return "stretched", low, high
    if low >= -_HALF_LEVEL and high <= 1 + _HALF_LEVEL:
        return "0…1", low, high
    if low >= -0.5 and high <= 255.5:
        note("0…255", low, high)
        return "0…255", low, high
    note("stretched", low, high)
    return "stretched", low, high


def _range(array: np.ndarray) -> tuple[float, float]:
    if array.dtype.kind not in "uif":
        if array.dtype == np.bool_:
            return 0.0, 1.0
        raise BadImage(_wrong_dtype(array.dtype))
    low, high = array.min().item(), array.max().item()
    # A NaN anywhere makes both NaN.
    if array.dtype.kind == "f" and not (np.isfinite(low) and np.isfinite(high)):
        n_bad = array.size - int(np.isfinite(array).sum())
        raise BadImage(f"{n_bad} of its {array.size} values are NaN or infinite")
    return float(low), float(high)


def _wrong_dtype(dtype: np.dtype) -> str:
    if dtype.kind == "c":
        return f"Complex data not supported: its dtype is {dtype}"
    return f"its dtype is {dtype}; pixels are bool, integers or floats"


class Notes:
    """What was assumed about which pictures; filled from several threads at once.

    Parameters
    ----------
    n_pictures : int
        Picture numbers are below this.
    """

    def __init__(self, n_pictures: int) -> None:
        self.n_pictures = n_pictures
        self._lock = threading.Lock()
        # kind -> (flag per picture, first picture, its low, its high). A flag, not a
        # count: a picture may be looked at more than once.
        self._seen: dict[str, tuple[np.ndarray, int, float, float]] = {}

    def add(self, number: int, kind: str, low: float, high: float) -> None:
        with self._lock:
            self._add(number, kind, low, high)

    def _add(self, number: int, kind: str, low: float, high: float) -> None:
        if kind not in self._seen:
            self._seen[kind] = (np.zeros(self.n_pictures, bool), number, low, high)
        flags, first, *_ = self._seen[kind]
        flags[number] = True
        if number < first:
            self._seen[kind] = (flags, number, low, high)

    def merge(self, other: Notes) -> None:
        """Add what another process noted about the same pictures."""
        with self._lock:
            for kind, (flags, first, low, high) in other._seen.items():
                self._add(first, kind, low, high)
                self._seen[kind][0][:] |= flags

    def take(self) -> Notes:
        """Return what was noted until now and start anew."""
        taken = Notes(self.n_pictures)
        with self._lock:
            taken._seen, self._seen = self._seen, {}
        return taken

    def __reduce__(self):
        copy = self.take()
        self.merge(copy)
        return _restore_notes, (copy.n_pictures, copy._seen)

    def message(self, label: Callable[[int], str]) -> str | None:
        """Put everything noted into one text for a warning, or None."""
        sentences = []
        for kind, (told, remedy) in _TEXTS.items():
            if kind not in self._seen:
                continue
            flags, first, low, high = self._seen[kind]
            n = int(flags.sum())
            count = f"{n} picture{'s' if n > 1 else ''}"
            where = f"the first is {label(first)}" if n > 1 else label(first)
            sentences.append(told.format(count=count, where=where, low=low, high=high) + remedy)
        return " ".join(sentences) or None


def _restore_notes(n_pictures: int, seen: dict) -> Notes:
    notes = Notes(n_pictures)
    notes._seen = seen
    return notes


_TEXTS = {
    "0…255": (
        "{count} of floats outside 0…1 ({where}: {low:.4g}…{high:.4g}) were read as 0…255.",
        ' Give X / 255. or X.astype("uint8") to say so.',
    ),
    "stretched": (
        "{count} of numbers outside 0…255 ({where}: {low:.4g}…{high:.4g}) were stretched, "
        "each from its own minimum…maximum, to 0…255.",
        ' Scale X yourself to floats in 0…1 or to 0…255 with .astype("uint8") '
        "where pictures should keep their brightness relative to each other.",
    ),
    "dark 16 bits": (
        "{count} of dtype uint16 ({where}: {low:.4g}…{high:.4g}) were read as 16 bits, "
        "0…65535, and so are almost black.",
        ' Give X.astype("uint8") if 0…255 was meant.',
    ),
    "large": (
        "{count} with more pixels than PIL.Image.MAX_IMAGE_PIXELS ({where}: "
        "{low:.0f} × {high:.0f}) were read, as fewer than twice as many.",
        " Make them smaller, or raise that limit if they can be trusted.",
    ),
}
