"""Augmentation of whole batches, on the device they lie on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

Augment = Callable[[torch.Tensor], torch.Tensor]

# (smallest part of the picture that is kept, largest change of its proportions,
#  change of brightness, contrast and saturation)
_STRENGTHS = {"light": (0.7, 1.15, 0.0), "strong": (0.35, 4 / 3, 0.3)}


class RandomViews:
    """Mirror, crop and resize, and change the colours of each picture of a batch.

    Parameters
    ----------
    strength : {"light", "strong"}
        ``"light"``: mirrored, and at least seven tenths of the picture. ``"strong"``: at least
        a third of it, and brightness, contrast and saturation changed by up to 30 %.
    generator : torch.Generator
        On the CPU: the same draws on every device.

    Notes
    -----
    One affine map per picture, so that a batch costs one bilinear sampling.
    """

    def __init__(self, strength: str, generator: torch.Generator):
        self.min_area, self.max_ratio, self.colour = _STRENGTHS[strength]
        self.generator = generator

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return float pixels in 0…255, N×C×H×W; what is no uint8 keeps its range and colours."""
        x = pixels.float()
        x = F.grid_sample(
            x, self._grid(x), mode="bilinear", padding_mode="reflection", align_corners=False
        )
        if self.colour and pixels.dtype == torch.uint8:
            x = self._recoloured(x)
        return x

    def _grid(self, x: torch.Tensor) -> torch.Tensor:
        n = len(x)
        area = self._uniform(n, self.min_area, 1.0)
        log_ratio = self._uniform(n, -math.log(self.max_ratio), math.log(self.max_ratio))
        width = (area * log_ratio.exp()).sqrt().clamp(max=1.0)
        height = (area / log_ratio.exp()).sqrt().clamp(max=1.0)
        mirror = torch.where(self._uniform(n, 0.0, 1.0) < 0.5, -1.0, 1.0)
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
        theta[:, 0, 2] = (1 - width) * self._uniform(n, -1.0, 1.0)
        theta[:, 1, 2] = (1 - height) * self._uniform(n, -1.0, 1.0)
        return F.affine_grid(theta.to(x.device), list(x.shape), align_corners=False)

    def _recoloured(self, x: torch.Tensor) -> torch.Tensor:
        def factors() -> torch.Tensor:
            low, high = 1 - self.colour, 1 + self.colour
            return self._uniform(len(x), low, high).view(-1, 1, 1, 1).to(x.device)

        x = x * factors()
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (x - mean) * factors()
        if x.shape[1] == 3:
            grey = x.mean(1, keepdim=True)
            x = grey + (x - grey) * factors()
        return x.clamp(0, 255)

    def _uniform(self, n: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=self.generator)


class EachPicture:
    """A user's own augmentation, called with one picture (C×H×W) after another."""

    def __init__(self, function: Callable[[torch.Tensor], Any]):
        self.function = function

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        out = []
        for picture in pixels:
            changed = torch.as_tensor(self.function(picture))
            if changed.shape != picture.shape:
                raise ValueError(
                    f"augment returned a picture of shape {tuple(changed.shape)} for one of "
                    f"{tuple(picture.shape)}: it has to keep the shape."
                )
            if changed.is_floating_point() and picture.dtype == torch.uint8:
                raise ValueError(
                    f"augment returned {changed.dtype} for a uint8 picture: return uint8, "
                    "0…255; the network's own normalisation comes afterwards."
                )
            out.append(changed)
        return torch.stack(out)


def resolve_augment(augment: Any, generator: torch.Generator) -> Augment | None:
    """The function of a batch that the parameter ``augment`` stands for."""
    if augment is None:
        return None
    if isinstance(augment, str):
        return RandomViews(augment, generator)
    return EachPicture(augment)
