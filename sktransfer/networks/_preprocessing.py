"""From a decoded image to the pixels a network takes: resize, crop, and what to normalise by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

import numpy as np
from PIL import Image

from sktransfer.networks._fingerprint import digest_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Images up to this many times as long as wide are resized whole.
_MAX_STRETCH = 16
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop and normalisation that a network's weights were trained with.

    Parameters
    ----------
    size : int or tuple of 2 ints, default=256
        Length of the image's shorter side after resizing, in pixels; or the height and width
        it is resized to, whatever its proportions.
    crop : int or tuple of 2 ints, default=224
        Height and width of the centre crop. What is smaller is padded with black.
    mean, std : tuple of floats
        Of each channel of the training images, for pixels in 0…1. One value each: the network
        takes grey images.
    interpolation : {"bilinear", "bicubic", "nearest", "box", "hamming", "lanczos"}
    fast_decode : bool, default=True
        Whether a JPEG may be decoded at a half, a quarter or an eighth of its size, where
        both sides stay at least twice as long as `size`.

    Notes
    -----
    Resizing equals torchvision's preset on PIL images pixel for pixel, for images up to
    sixteen times as long as wide, and within one of 255 beyond.
    """

    size: int | tuple[int, int] = 256
    crop: int | tuple[int, int] = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    fast_decode: bool = True

    def __post_init__(self) -> None:
        for name in ("size", "crop"):
            value = getattr(self, name)
            pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
            if len(pair) != 2 or not all(
                isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v > 0 for v in pair
            ):
                raise ValueError(
                    f"preprocessing {name!r} is {value!r}: give a positive number of pixels, or a "
                    "pair (height, width)."
                )
            is_single = isinstance(value, (int, np.integer)) and name == "size"
            object.__setattr__(self, name, int(value) if is_single else tuple(map(int, pair)))
        for name in ("mean", "std"):
            value = getattr(self, name)
            values = np.atleast_1d(np.asarray(value, dtype=float))
            if values.ndim != 1 or len(values) not in (1, 3) or not np.isfinite(values).all():
                raise ValueError(
                    f"preprocessing {name!r} is {value!r}: give 3 numbers (red, green, blue, for "
                    "pixels in 0…1), or 1 for a network of grey images."
                )
            object.__setattr__(self, name, tuple(values.tolist()))
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"preprocessing 'mean' has {len(self.mean)} values, 'std' "
                f"{len(self.std)}: give as many of each."
            )
        if min(self.std) <= 0:
            raise ValueError(
                f"preprocessing 'std' is {self.std!r}: it divides, so it must be positive."
            )
        if max(map(abs, self.mean)) > 2:
            raise ValueError(
                f"preprocessing 'mean' is {self.mean!r}: it is of pixels in 0…1, not 0…255; "
                "divide it, and 'std', by 255."
            )
        if self.interpolation not in _FILTERS:
            raise ValueError(
                f"preprocessing 'interpolation' is {self.interpolation!r}: one of "
                f"{sorted(_FILTERS)} is accepted."
            )
        if not isinstance(self.fast_decode, (bool, np.bool_)):
            raise ValueError(
                f"preprocessing 'fast_decode' is {self.fast_decode!r}: True or False is accepted."
            )

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of the crop."""
        return self.crop if isinstance(self.crop, tuple) else (self.crop, self.crop)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of what the network gets."""
        height, width = self.crop_size
        return len(self.mean), height, width

    @property
    def min_size(self) -> tuple[int, int] | None:
        """Smallest height and width a reduced JPEG may have; ``None``: decode it in full."""
        if not self.fast_decode:
            return None
        # Twice the target: what the resize then averages is as good as the full image.
        height, width = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        return 2 * height, 2 * width

    @property
    def identity(self) -> str:
        """What sets this preprocessing apart, for fingerprints."""
        return repr(sorted(asdict(self).items()))

    def resize_crop(self, image: np.ndarray | Image.Image) -> np.ndarray:
        """Resize an image's shorter side and cut out its centre.

        Parameters
        ----------
        image : ndarray of shape (height, width, 3), uint8; or PIL image in RGB

        Returns
        -------
        pixels : ndarray of shape (crop height, crop width, channels), uint8
        """
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        width, height = picture.size
        new_h, new_w = self._resized(height, width)
        crop_h, crop_w = self.crop_size
        # Part of the resized image that the crop keeps, as torchvision's center_crop rounds.
        top, left = _offset(new_h, crop_h), _offset(new_w, crop_w)
        kept_h, kept_w = min(new_h, crop_h), min(new_w, crop_w)
        if len(self.mean) == 1:
            picture = picture.convert("L")
        kind = _FILTERS[self.interpolation]
        kept = (slice(top, top + kept_h), slice(left, left + kept_w))
        if (new_h, new_w) == (height, width):
            pixels = np.asarray(picture)[kept]
        elif max(new_h, new_w) <= _MAX_STRETCH * min(new_h, new_w):
            pixels = np.asarray(picture.resize((new_w, new_h), kind))[kept]
        else:
            # 1 × 100,000 pixels would become 256 × 25,600,000: only the kept part is computed.
            # Pillow holds the box in single precision, so that a value may differ by one.
            y, x = height / new_h, width / new_w
            right, bottom = min((left + kept_w) * x, width), min((top + kept_h) * y, height)
            pixels = np.asarray(
                picture.resize((kept_w, kept_h), kind, box=(left * x, top * y, right, bottom))
            )
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if (kept_h, kept_w) != (crop_h, crop_w):
            padded = np.zeros((crop_h, crop_w, pixels.shape[2]), dtype=np.uint8)
            pad_h, pad_w = (crop_h - kept_h) // 2, (crop_w - kept_w) // 2
            padded[pad_h : pad_h + kept_h, pad_w : pad_w + kept_w] = pixels
            return padded
        return np.ascontiguousarray(pixels)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        if height <= width:
            return self.size, max(1, int(self.size * width / height))
        return max(1, int(self.size * height / width)), self.size


def _offset(length: int, crop: int) -> int:
    return round((length - crop) / 2.0) if length > crop else 0


@dataclass(frozen=True)
class CallablePreprocessing:
    """A user's own way from a decoded image to the network's input.

    Parameters
    ----------
    function : callable
        Takes a uint8 array (height, width, 3); returns a float array or tensor (channels,
        height, width), the same shape for every image, normalised as the network wants it.
    """

    function: Callable[[np.ndarray], Any]
    min_size: tuple[int, int] | None = None

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width, found out with one grey image."""
        channels, height, width = self.resize_crop(np.full((240, 320, 3), 127, np.uint8)).shape
        return channels, height, width

    @property
    def identity(self) -> str:
        return f"callable:{_callable_digest(self.function)}"

    def resize_crop(self, image: np.ndarray | Image.Image) -> np.ndarray:
        """Apply the user's function; float32 (channels, height, width)."""
        image = np.asarray(image)
        got = self.function(image)
        pixels = np.asarray(got, dtype=np.float32)
        if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
            raise ValueError(
                f"The preprocessing function returned {type(got).__name__} of shape "
                f"{pixels.shape} for an image of shape {image.shape}: a float array or tensor of "
                "shape (channels, height, width) with 1 or 3 channels is needed."
            )
        return pixels


AnyPreprocessing = Preprocessing | CallablePreprocessing


def resolve_preprocessing(asked: Any, default: Preprocessing) -> AnyPreprocessing:
    """What the user asked for, on top of what the weights were trained with."""
    if isinstance(asked, str) and asked == "auto":
        return default
    if isinstance(asked, (Preprocessing, CallablePreprocessing)):
        return asked
    if isinstance(asked, Mapping):
        known = [field.name for field in fields(Preprocessing)]
        unknown = [key for key in asked if key not in known]
        if unknown:
            close = get_close_matches(str(unknown[0]), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"preprocessing has the unknown key {unknown[0]!r}; accepted are {known}.{hint}"
            )
        return replace(default, **_without_padding(dict(asked), default))
    if callable(asked):
        return CallablePreprocessing(_copied(asked))
    raise ValueError(
        f"preprocessing is {asked!r}: 'auto', a dict with some of "
        f"{[field.name for field in fields(Preprocessing)]}, or a function (uint8 array H×W×3 -> "
        "float array C×H×W) is accepted."
    )


def _copied(function: Any) -> Any:
    """As it is now, like a module given as backbone; itself where it cannot be copied."""
    try:
        return copy.deepcopy(function)
    except Exception:
        return function


def _without_padding(asked: dict[str, Any], default: Preprocessing) -> dict[str, Any]:
    """Adjust what was not asked for, where the crop would reach beyond the resized image."""
    if ("size" in asked) == ("crop" in asked):
        return asked
    merged = replace(default, **asked)
    shape = merged.size if isinstance(merged.size, tuple) else (merged.size, merged.size)
    crop = merged.crop_size
    if isinstance(merged.size, tuple) or isinstance(default.size, tuple):
        # The whole image is squeezed into the network's input: they are one.
        asked["size"], asked["crop"] = (shape, shape) if "size" in asked else (crop, crop)
    elif max(crop) > merged.size:
        old = max(default.crop_size)
        if "size" in asked:
            asked["crop"] = merged.size
        else:
            asked["size"] = max(max(crop), round(default.size * max(crop) / old))
    return asked


def _callable_digest(function: Any) -> str:
    """Digest of what a callable does: its code, what that reads, and what it carries along."""
    own = getattr(function, "fingerprint", None)
    return own if isinstance(own, str) else digest_of(function, _refuse)


def _refuse(value: Any) -> bytes:
    raise ValueError(
        f"preprocessing uses {value!r}, of which no digest can be made, so that nobody could tell "
        "one such function from another. Do without it, or give the function an attribute "
        "`fingerprint` (a string that changes when what it does changes)."
    )
