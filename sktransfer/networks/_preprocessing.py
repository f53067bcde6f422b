"""Preprocessing of decoded images: resize, crop, and the constants of the normalisation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch.nn import functional as F

from sktransfer._progress import did_you_mean
from sktransfer.networks._fingerprint import function_digest
from sktransfer.networks._tokens import Tokens

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Images up to this many times as long as wide are resized whole.
_MAX_STRETCH = 16
_METHODS = {method.name.lower(): method for method in Image.Resampling}
_METHODS_OF_DEVICES = ("bilinear", "bicubic")
_VALUES_AT_ONCE = 2**26  # 256 MiB as float32


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop and normalisation that a network's weights were trained with.

    Parameters
    ----------
    size : int or tuple of 2 ints, default=256
        Length of the image's shorter side after resizing, in pixels; or the height and width
        it is resized to, whatever its proportions.
    crop : int or tuple of 2 ints, default=224
        Height and width of the centre crop. A smaller image is padded with black.
    mean, std : tuple of floats
        Of each channel of the training images, for pixels in 0…1. One value each: the network
        takes grey images.
    interpolation : {"bilinear", "bicubic", "nearest", "box", "hamming", "lanczos"}
    fast_decode : bool, default=True
        Whether a JPEG may be decoded at a half, a quarter or an eighth of its size, where
        both sides stay at least twice as long as `size`.
    resize_on : {"cpu", "device"}, default="cpu"
        Whether Pillow resizes each image in the threads that decode, or torch resizes images of
        one size together on the network's device.

    Notes
    -----
    Resizing equals torchvision's preset on PIL images pixel for pixel, for images up to
    sixteen times as long as wide, and within one of 255 beyond; with ``resize_on="device"``,
    which averages over the same pixels, within two.
    """

    size: int | tuple[int, int] = 256
    crop: int | tuple[int, int] = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    fast_decode: bool = True
    resize_on: str = "cpu"

    def __post_init__(self) -> None:
        size, crop = _pixels("size", self.size), _pixels("crop", self.crop)
        values = {
            "size": size,
            "crop": crop if isinstance(crop, tuple) else (crop, crop),
            "mean": _channels("mean", self.mean),
            "std": _channels("std", self.std),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"preprocessing 'mean' has {len(self.mean)} values, 'std' {len(self.std)}: give as "
                "many of each."
            )
        if max(map(abs, self.mean)) > 2:
            raise _refused("mean", self.mean, "give it, and 'std', for pixels in 0…1, not 0…255.")
        if min(self.std) <= 0:
            raise _refused("std", self.std, "it divides, so it must be positive.")
        if self.interpolation not in list(_METHODS):  # it may be unhashable
            accepted = f"one of {sorted(_METHODS)} is accepted."
            raise _refused("interpolation", self.interpolation, accepted)
        if not isinstance(self.fast_decode, (bool, np.bool_)):
            raise _refused("fast_decode", self.fast_decode, "True or False is accepted.")
        if self.resize_on not in ("cpu", "device"):
            raise _refused("resize_on", self.resize_on, "'cpu' or 'device' is accepted.")
        if self.resize_on == "device" and self.interpolation not in _METHODS_OF_DEVICES:
            accepted = f"with resize_on='device' one of {list(_METHODS_OF_DEVICES)} is accepted."
            raise _refused("interpolation", self.interpolation, accepted)
        for name, kind in ("interpolation", str), ("fast_decode", bool), ("resize_on", str):
            object.__setattr__(self, name, kind(getattr(self, name)))  # NumPy's have another repr

    @property
    def joins(self) -> bool:
        """Whether images are prepared one by one and resized together, by :meth:`join`."""
        return self.resize_on == "device"

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
        """Its part of fingerprints."""
        values = asdict(self)
        if self.resize_on == "cpu":
            del values["resize_on"]
        return repr(sorted(values.items()))

    def resize_crop(self, image: np.ndarray | Image.Image) -> np.ndarray:
        """Resize the shorter side of an image (height, width, 3) and cut out its centre.

        uint8 (crop height, crop width, channels).
        """
        if self.resize_on == "device":
            pixels = self.join([torch.tensor(np.asarray(self.prepare(image)))])
            return np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy())
        return self._resize_crop(self.prepare(image))

    def prepare(self, image: np.ndarray | Image.Image) -> np.ndarray | Image.Image:
        """Return the image with the network's number of channels: grey if there is one `mean`."""
        if len(self.mean) > 1:
            return image
        return np.asarray(_as_pil(image).convert("L"))[:, :, None]

    def join(
        self, images: Sequence[torch.Tensor], device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Resize and crop images of :meth:`prepare` on a device, those of one size together.

        Pinned ones are copied in the background. uint8 (n, channels, crop height, crop width),
        channels-last in memory.
        """
        by_size: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(i)
        shape = len(images), *self.crop_size, len(self.mean)
        out = torch.zeros(shape, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        for size, places in by_size.items():
            n_at_once = max(1, _VALUES_AT_ONCE // size.numel())
            for k in range(0, len(places), n_at_once):
                some = places[k : k + n_at_once]
                self._resize_into(out, some, [images[i] for i in some])
        return out

    def _resize_into(
        self, out: torch.Tensor, places: list[int], images: list[torch.Tensor]
    ) -> None:
        """Resize images of one size, and put them at `places` of `out`."""
        shape, (top, left, h, w), (down, right) = self._places(*images[0].shape[:2])
        if max(shape) > _MAX_STRETCH * min(shape):
            pixels = np.stack([self._resize_crop(image.numpy()) for image in images])
            out[places] = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(out.device)
            return
        moved = [image.to(out.device, non_blocking=image.is_pinned()) for image in images]
        x = torch.stack(moved).permute(0, 3, 1, 2)
        # As in Pillow: along the width, rounded to eight bits, then along the height.
        for target in (x.shape[2], shape[1]), shape:
            if target != tuple(x.shape[2:]):
                x = F.interpolate(x.float(), target, mode=self.interpolation, antialias=True)
                x = (x + 0.5).floor().clamp(0, 255)
        x = x[:, :, top : top + h, left : left + w].to(torch.uint8)
        out[torch.tensor(places), :, down : down + h, right : right + w] = x

    def _resize_crop(self, image: np.ndarray | Image.Image) -> np.ndarray:
        size = image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]
        shape, kept, (down, right) = self._places(*size)
        top, left, kept_h, kept_w = kept
        if isinstance(image, np.ndarray) and shape == size:
            pixels = image[top : top + kept_h, left : left + kept_w]
        else:
            pixels = self._resize(_as_pil(image), shape, kept)
        crop_h, crop_w = self.crop_size
        if (kept_h, kept_w) == (crop_h, crop_w):
            return np.ascontiguousarray(pixels)
        padded = np.zeros((crop_h, crop_w, pixels.shape[2]), dtype=np.uint8)
        padded[down : down + kept_h, right : right + kept_w] = pixels
        return padded

    def _places(
        self, height: int, width: int
    ) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
        """Return the size after resizing, the crop's (top, left, height, width), its (y, x)."""
        new_h, new_w = self._resized(height, width)
        crop_h, crop_w = self.crop_size
        kept_h, kept_w = min(new_h, crop_h), min(new_w, crop_w)
        # As torchvision's center_crop rounds.
        kept = _offset(new_h, crop_h), _offset(new_w, crop_w), kept_h, kept_w
        return (new_h, new_w), kept, ((crop_h - kept_h) // 2, (crop_w - kept_w) // 2)

    def _resize(
        self, image: Image.Image, shape: tuple[int, int], kept: tuple[int, int, int, int]
    ) -> np.ndarray:
        """Resize to `shape` and keep (top, left, height, width) of the result."""
        (new_h, new_w), (top, left, kept_h, kept_w) = shape, kept
        method = _METHODS[self.interpolation]
        if max(shape) <= _MAX_STRETCH * min(shape) or shape == image.size[::-1]:
            if shape != image.size[::-1]:
                image = image.resize((new_w, new_h), method)
            pixels = np.asarray(image)[top : top + kept_h, left : left + kept_w]
        else:
            # 1 × 100,000 pixels would become 256 × 25,600,000: only the crop is computed.
            # Pillow holds the box in single precision, so that a value may differ by one.
            y, x = image.height / new_h, image.width / new_w
            right, bottom = (left + kept_w) * x, (top + kept_h) * y
            box = (left * x, top * y, min(right, image.width), min(bottom, image.height))
            pixels = np.asarray(image.resize((kept_w, kept_h), method, box=box))
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        if height <= width:
            return self.size, max(1, int(self.size * width / height))
        return max(1, int(self.size * height / width)), self.size


def _as_pil(image: np.ndarray | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])


def _offset(length: int, crop: int) -> int:
    return round((length - crop) / 2.0) if length > crop else 0


def _pixels(name: str, value: int | Sequence[int]) -> int | tuple[int, int]:
    """Return `value` if it is a positive number of pixels, or a pair of them."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    is_whole = [isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in pair]
    if len(pair) != 2 or not all(is_whole) or min(pair) <= 0:
        raise _refused(name, value, "give a positive number of pixels, or a pair (height, width).")
    return (int(pair[0]), int(pair[1])) if pair is value else int(pair[0])


def _channels(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
    """Return `value` as a tuple of 3 numbers, or 1 for a network of grey images."""
    try:
        values = np.atleast_1d(np.asarray(value, dtype=float))
    except (TypeError, ValueError):  # not numbers
        values = np.empty(0)
    if values.shape not in ((1,), (3,)) or not np.isfinite(values).all():
        accepted = "give 3 numbers (red, green, blue, for pixels in 0…1), or 1 for grey images."
        raise _refused(name, value, accepted)
    return tuple(values.tolist())


def _refused(name: str, value: object, accepted: str) -> ValueError:
    return ValueError(f"preprocessing {name!r} is {value!r}: {accepted}")


@dataclass(frozen=True)
class CallablePreprocessing:
    """A user's function from a decoded image to the network's input.

    It takes a uint8 array (height, width, 3) and returns a float array or tensor (channels,
    height, width), the same shape for every image, normalised as the network wants it.
    """

    function: Callable[[np.ndarray], ArrayLike]
    min_size: ClassVar[None] = None  # its images are decoded in full

    @cached_property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width, measured with one grey image."""
        channels, height, width = self.resize_crop(np.full((240, 320, 3), 127, np.uint8)).shape
        return channels, height, width

    @cached_property
    def identity(self) -> str:
        """Its part of fingerprints."""
        return f"callable:{function_digest(self.function)}"

    def resize_crop(self, image: np.ndarray | Image.Image) -> np.ndarray:
        """Apply the user's function; float32 (channels, height, width)."""
        image = np.array(image)  # a copy, into which the function may write
        try:
            got = self.function(image)
        except Exception as error:
            error.add_note(
                "The function given as `preprocessing` got a uint8 array (height, width, 3): a "
                "transform of torchvision needs v2.ToImage() before it."
            )
            raise
        pixels = np.asarray(got, dtype=np.float32)
        if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
            raise ValueError(
                f"The preprocessing function returned {type(got).__name__} of shape "
                f"{pixels.shape} for an image of shape {image.shape}: a float array or tensor of "
                "shape (channels, height, width) with 1 or 3 channels is needed."
            )
        return pixels


AnyPreprocessing = Preprocessing | CallablePreprocessing | Tokens


def resolve_preprocessing(asked: object, default: AnyPreprocessing) -> AnyPreprocessing:
    """Return what the user asked for, completed by what the weights were trained with."""
    known = [field.name for field in fields(Preprocessing)]
    if (isinstance(asked, str) and asked == "auto") or not isinstance(default, Preprocessing):
        return default
    if isinstance(asked, (Preprocessing, CallablePreprocessing)):
        return asked
    if isinstance(asked, Mapping):
        if unknown := [key for key in asked if key not in known]:
            raise ValueError(
                f"preprocessing has the unknown key {unknown[0]!r}; accepted are {known}."
                f"{did_you_mean(str(unknown[0]), known)}"
            )
        return with_overrides(asked, default)
    if callable(asked):
        with contextlib.suppress(Exception):
            asked = copy.deepcopy(asked)  # later changes of it have no effect
        return CallablePreprocessing(asked)
    raise ValueError(
        f"preprocessing is {asked!r}: 'auto', a dict with some of {known}, or a function (uint8 "
        "array H×W×3 -> float array C×H×W) is accepted."
    )


def with_overrides(asked: Mapping, default: Preprocessing) -> Preprocessing:
    """Replace what was asked for, and adapt the size or the crop so that no image is padded."""
    merged = replace(default, **asked)
    if ("size" in asked) == ("crop" in asked):
        return merged
    size, crop = merged.size, merged.crop_size
    if isinstance(size, tuple) or isinstance(default.size, tuple):
        # The whole image is resized to the network's input: size and crop are the same.
        same = size if "size" in asked else crop
        return replace(merged, size=same, crop=same)
    if max(crop) <= size:
        return merged
    if "size" in asked:
        return replace(merged, crop=size)
    size = max(max(crop), round(default.size * max(crop) / max(default.crop_size)))
    return replace(merged, size=size)
