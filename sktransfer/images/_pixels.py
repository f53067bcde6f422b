"""Arrays of any number type as 8-bit RGB."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Called as note(kind, low, high) where the range of an image's values had to be assumed.
Note = Callable[[str, float, float], None]

# Floats this far outside 0…1 still round to 0 or 255: half a level of eight bits.
_HALF_LEVEL = 0.5 / 255


class BadImage(ValueError):
    """One image cannot be read; the message is the reason and names no row."""


def to_rgb(array: np.ndarray, note: Note) -> np.ndarray:
    """Convert one image to 8-bit RGB.

    Parameters
    ----------
    array : ndarray of shape (H, W) or (H, W, C), C in 1…4
        Grey, grey + alpha, RGB or RGBA. Alpha is laid over white.
    note : callable
        Called for each assumption about the range of the values.

    Returns
    -------
    ndarray of shape (H, W, 3), uint8, C-contiguous
        Read-only. It is a view of the given array where nothing had to be done.

    Notes
    -----
    What a number means follows from its type and, for floats, from this image alone, never
    from the other images:

    - bool: black and white; uint8: as it is;
    - uint16: 16 bits, of which the upper eight are kept, as Pillow reads 16-bit files;
    - floats within 0…1: ``rint(255 * x)``, so that ``x / 255.`` is the image ``x``;
    - other integers within 0…255: as they are;
    - floats within 0…255: ``rint(x)``, and noted;
    - everything else: stretched from its own minimum…maximum to 0…255, and noted.
    """
    _check_shape(array)
    n_channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8:
        if n_channels in (2, 4):  # the range of the colours says nothing about that of alpha
            parts = [_to_uint8(array[..., :-1], note), _to_uint8(array[..., -1:], _ignore)]
            array = np.concatenate(parts, axis=2)
        else:
            array = _to_uint8(array, note)
    if array.ndim == 2:
        array = array[..., None]
    if n_channels in (2, 4):
        array = _over_white(array)
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    array = np.ascontiguousarray(array).view(np.ndarray)
    array.flags.writeable = False  # of the view: it may show the user's own data
    return array


def _ignore(kind: str, low: float, high: float) -> None:
    """Note nothing."""


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


def _to_uint8(array: np.ndarray, note: Note) -> np.ndarray:
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind == "c":
        raise BadImage(f"Complex data not supported: its dtype is {array.dtype}")
    if kind not in "uif":
        raise BadImage(f"its dtype is {array.dtype}; pixels are bool, integers or floats")
    low, high = _range(array)
    if kind == "u" and size == 2:
        if 0 < high <= 255:
            note("dark 16 bits", low, high)
        return (array >> 8).astype(np.uint8)
    if kind in "ui" and low >= 0 and high <= 255:
        return array.astype(np.uint8)
    if kind == "f" and low >= -_HALF_LEVEL and high <= 1 + _HALF_LEVEL:
        # float16 holds k / 255 well enough to find k again, not its product with 255.
        x = array.astype(np.float32, copy=False) * np.float32(255)
        return np.clip(np.rint(x, out=x), 0, 255, out=x).astype(np.uint8)
    if kind == "f" and low >= -0.5 and high <= 255.5:
        note("0…255", low, high)
        x = np.rint(array)
        return np.clip(x, 0, 255, out=x).astype(np.uint8)
    note("stretched", low, high)
    # Halves, for high - low may be beyond the largest float.
    x = array.astype(np.float64) / 2 - low / 2
    span = high / 2 - low / 2
    if span < np.finfo(np.float64).tiny:  # one value everywhere
        return np.zeros(array.shape, np.uint8)
    return np.clip(np.rint(x / span * 255), 0, 255).astype(np.uint8)


def _range(array: np.ndarray) -> tuple[float, float]:
    low, high = float(array.min().item()), float(array.max().item())
    # A NaN anywhere makes both NaN.
    if not (np.isfinite(low) and np.isfinite(high)):
        n_bad = array.size - int(np.isfinite(array).sum())
        raise BadImage(f"{n_bad} of its {array.size} values are NaN or infinite")
    return low, high
