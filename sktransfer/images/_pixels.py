"""Arrays of any number type as 8-bit RGB."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sktransfer._rows import BadCell

# Called as note(kind, low, high) where the range of an image's values had to be assumed.
Note = Callable[[str, float, float], None]
Range = tuple[float, float]

# Floats this far outside 0…1 still round to 0 or 255: half a level of eight bits.
_HALF_LEVEL = 0.5 / 255
# Interpolation and scalers that were fitted on other images overshoot 0…1 by at most this.
_OVERSHOOT = 0.25
# As many levels of brightness are too few for an image of more values.
_FEW_LEVELS = 16
_QUARTER = 2**14  # of 16 bits; images of 10, 12 and 14 bits are below it


def _no_note(kind: str, low: float, high: float) -> None: ...


class BadImage(BadCell):
    """An image cannot be read."""


class Samples(NamedTuple):
    """Raw values with what their file says: the values of black and white, or inverted ones."""

    array: np.ndarray
    value_range: Range | None = None
    is_negative: bool = False

    def to_rgb(self, note: Note, value_range: Range | None) -> np.ndarray:
        return to_rgb(self.array, note, value_range or self.value_range, self.is_negative)


def to_rgb(
    array: np.ndarray, note: Note, value_range: Range | None = None, is_negative: bool = False
) -> np.ndarray:
    """Convert one image, (H, W) or (H, W, 1…4), to 8-bit RGB, (H, W, 3), over white.

    The result is read-only, and a view of the given array where nothing had to be done. If
    `is_negative`, the smallest numbers are white; `value_range` does not apply to bool and alpha.

    Without `value_range`, what a number means follows from its type and from this image alone,
    never from the other images:

    - bool: black and white; uint8: unchanged;
    - uint16: 16 bits, of which the upper eight are kept; noted below a quarter of the range;
    - floats within 0…1: ``rint(255 * x)``, so that ``x / 255.`` is the image ``x``;
    - other integers within 0…255: unchanged;
    - floats within -0.25…1.25: clipped to 0…1, and noted;
    - integral floats within 0…255, and floats within -1…318.75 of which the largest is above
      16: clipped to 0…255, and noted;
    - everything else: stretched from its own minimum…maximum to 0…255, and noted.

    A noted reading that would leave an image of more values at most 16 levels gives way to the
    next one; the last resort is the rank of each value.
    """
    _check_shape(array)
    n_channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or value_range is not None:
        if n_channels in (2, 4):  # the range of the colours says nothing about that of alpha
            alpha = array[..., -1:]
            if _is_uint16(alpha) and alpha.max() >= _QUARTER:
                note = _no_note  # alpha shows that the dark colours use 16 bits
            color = _to_uint8(array[..., :-1], note, value_range)
            array = np.concatenate([color, _alpha_to_uint8(alpha, value_range)], axis=2)
        else:
            array = _to_uint8(array, note, value_range)
            array = 255 - array if is_negative else array
    if array.ndim == 2:
        array = array[..., None]
    if n_channels in (2, 4):
        array = _over_white(array)
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    array = np.ascontiguousarray(array).view()
    array.flags.writeable = False  # of the view: it may show the user's own data
    return array


def _over_white(array: np.ndarray) -> np.ndarray:
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


def _check_shape(array: np.ndarray) -> None:
    """Raise BadImage unless the array is (H, W) or (H, W, 1…4) and not empty."""
    shape = array.shape
    if array.ndim not in (2, 3):
        raise BadImage(
            f"its shape is {shape}; an image is an array of shape (H, W) or (H, W, C), "
            "C one of 1 (grey), 2 (grey, alpha), 3 (RGB), 4 (RGBA)"
        )
    if array.size == 0:
        raise BadImage(f"it has no pixels: its shape is {shape}")
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


def _to_uint8(array: np.ndarray, note: Note, value_range: Range | None) -> np.ndarray:
    kind = array.dtype.kind
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind == "c":
        raise BadImage(f"Complex data not supported: its dtype is {array.dtype}")
    if kind not in "uif":
        raise BadImage(f"its dtype is {array.dtype}; pixels are bool, integers or floats")
    low, high = _range(array)
    if value_range is not None:
        return _between(array, *value_range)
    if _is_uint16(array):
        if 0 < high < _QUARTER:
            note("dark 16 bits", low, high)
        return (array >> 8).astype(np.uint8)
    if kind in "ui" and low >= 0 and high <= 255:
        return array.astype(np.uint8)
    if kind == "f" and low >= -_HALF_LEVEL and high <= 1 + _HALF_LEVEL:
        pixels = _between(array, 0, 1)
        if high <= 1 / 16 and len(np.unique(array)) > 1 + _FEW_LEVELS:  # 12 bits of 16
            note("dark floats", low, high)
        return pixels
    return _assume(array, low, high, note)


def _assume(array: np.ndarray, low: float, high: float, note: Note) -> np.ndarray:
    """Scale values of an unknown range in the first way that fits and keeps them distinct."""
    ways = []
    if array.dtype.kind == "f":
        if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
            ways.append(("clipped", 0.0, 1.0))
        is_integral = low >= 0 and high <= 255 and bool((array == np.rint(array)).all())
        if is_integral or (high > _FEW_LEVELS and low >= -1 and high <= 255 * (1 + _OVERSHOOT)):
            ways.append(("0…255", 0.0, 255.0))
    ways.append(("stretched" if low < 0 or high > 255 else "stretched floats", low, high))
    for way, *ends in ways:
        pixels = _between(array, *ends)
        if not _loses_values(array, pixels):
            note(way, low, high)
            return pixels
    note("ranked", low, high)
    values, ranks = np.unique(array, return_inverse=True)
    return _between(ranks.reshape(array.shape), 0, len(values) - 1)


def _loses_values(array: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether few levels are left of an image of more values."""
    n_levels = np.count_nonzero(np.bincount(pixels.ravel(), minlength=256))
    return bool(n_levels <= _FEW_LEVELS < len(np.unique(array)))


def _alpha_to_uint8(alpha: np.ndarray, value_range: Range | None) -> np.ndarray:
    """Scale by the value that is opaque: the largest of the type, or of the image."""
    if alpha.dtype.kind not in "uif":
        return _to_uint8(alpha, _no_note, None)
    _, high = _range(alpha)
    if alpha.dtype.kind == "f":
        return _between(alpha, 0, 1 if high <= 1 + _HALF_LEVEL else max(255, high))
    n_bits = 16 if _is_uint16(alpha) and value_range is None else int(high).bit_length()
    return _between(alpha, 0, 2.0 ** max(8, n_bits) - 1)


def _is_uint16(array: np.ndarray) -> bool:
    return array.dtype.kind == "u" and array.dtype.itemsize == 2


def _between(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low…high to 0…255, and clip other values."""
    if array.dtype == np.uint8:
        table = _between(np.arange(256.0), low, high).tobytes()
        return np.frombuffer(array.tobytes().translate(table), np.uint8).reshape(array.shape)
    if low == high:
        return np.zeros(array.shape, np.uint8)
    # float16 holds k / 255 well enough to find k again, not its product with 255.
    is_short = array.dtype.kind == "f" and array.dtype.itemsize <= 4 and (low, high) == (0, 1)
    x: np.ndarray = array.astype(np.float32 if is_short else np.float64)
    if not np.isfinite(high - low):  # halves, for the difference is beyond the largest float
        x, low, high = x * 0.5, low / 2, high / 2
    with np.errstate(over="ignore"):
        np.multiply(np.divide(np.subtract(x, low, out=x), high - low, out=x), 255, out=x)
    return np.clip(np.rint(x, out=x), 0, 255, out=x).astype(np.uint8)


def _range(array: np.ndarray) -> tuple[float, float]:
    low, high = float(array.min().item()), float(array.max().item())
    # A NaN anywhere makes both NaN.
    if not (np.isfinite(low) and np.isfinite(high)):
        n_bad = array.size - int(np.isfinite(array).sum())
        raise BadImage(f"{n_bad} of its {array.size} values are NaN or infinite")
    return low, high
