"""Augmentation of training batches, on the device where they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from sktransfer._progress import did_you_mean, shown

# (smallest share of the image that is kept, largest change of its proportions,
#  change of brightness, contrast and saturation)
_STRENGTHS = {"light": (0.7, 1.15, 0.0), "strong": (0.35, 4 / 3, 0.3)}


class RandomViews:
    """Mirror, crop and resize each image of a batch, and change its colours.

    The maps of a batch's images are affine and need one bilinear sampling. The generator is on the
    CPU, so that it draws the same numbers on every device.
    """

    def __init__(self, strength: str, generator: torch.Generator):
        self.min_area, self.max_ratio, self.colour = _STRENGTHS[strength]
        self.generator = generator

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return float pixels, N×C×H×W, in the range of `pixels`; only uint8 changes colour."""
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


class BatchAugment:
    """Augment a batch's images and, with MixUp or CutMix, mix its targets and weights.

    ``"light"`` and ``"strong"`` draw from `generator`, all others from torch's global state. They
    and the mixing run on `device`; functions of one image run on the CPU, where they may use NumPy.
    """

    def __init__(
        self,
        augment: str | Callable | Sequence,
        kind: str,
        n_outputs: int,
        generator: torch.Generator,
        device: torch.device,
    ):
        self.n_outputs, self.device = n_outputs, device
        self.steps: list[tuple[Callable, bool]] = []
        for step in _flattened(augment):
            mixes = list(_mixes_in(step))
            for mix in mixes:
                _check_mix(mix, kind, n_outputs)
            own = RandomViews(step, generator) if isinstance(step, str) else step
            self.steps.append((own, bool(mixes)))

    def __call__(
        self, x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return images (n, n_columns, …), targets and weights of a batch."""
        n_columns, are_pixels = x.shape[1], x.dtype == torch.uint8
        white = 255.0 if are_pixels else 1.0
        for step, is_mix in self.steps:
            if is_mix:
                x, target, weight = (part.to(self.device) for part in (x, target, weight))
                # Transforms of torchvision take float pixels as 0…1.
                x, target, weight = self._mixed(step, x / white, target, weight)
                x = x * white
            else:
                is_own = isinstance(step, RandomViews)
                flat = x.to(self.device if is_own else "cpu").flatten(0, 1)
                if are_pixels and flat.is_floating_point():  # still 0…255, from the step before
                    flat = flat.round().to(torch.uint8)
                flat = step(flat) if is_own else _one_by_one(step, flat)
                x = flat.unflatten(0, (-1, n_columns))
        return x, target, weight

    def _mixed(
        self, mix: Callable, x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mix rows; each of the two images of a new one counts with its own row's weight."""
        if target.ndim == 1:
            target = F.one_hot(target, self.n_outputs)
        # A row's image columns are mixed alike, as if they were channels.
        flat, weighted = mix(x.flatten(1, 2), target * weight[:, None])
        weight = weighted.sum(1)
        target = weighted / weight.clamp(min=1e-12)[:, None]
        return flat.unflatten(1, x.shape[1:3]), target, weight


def _flattened(augment: str | Callable | Sequence) -> Iterator[str | Callable]:
    """Yield the steps of `augment`, also those of lists and v2.Compose in it."""
    steps = augment.transforms if isinstance(augment, v2.Compose) else augment
    if isinstance(steps, Sequence) and not isinstance(steps, str):
        for step in steps:
            yield from _flattened(step)
    elif (callable(steps) and not isinstance(steps, type)) or steps in _STRENGTHS:
        yield steps
    else:
        raise ValueError(
            f"augment holds {shown(steps)}: 'light', 'strong', a callable of one image, a "
            "transform of torchvision.transforms.v2 (an instance), or a list of these is accepted."
            f"{did_you_mean(str(steps), _STRENGTHS)}"
        )


def _mixes_in(step: object) -> Iterator[v2.MixUp | v2.CutMix]:
    if isinstance(step, (v2.MixUp, v2.CutMix)):
        yield step
    else:  # v2.RandomChoice, RandomApply and RandomOrder hold transforms
        for part in getattr(step, "transforms", ()):
            yield from _mixes_in(part)


def _check_mix(mix: v2.MixUp | v2.CutMix, kind: str, n_outputs: int) -> None:
    if kind != "multiclass":
        targets = "several labels per row" if kind == "multilabel" else "numbers"
        raise ValueError(
            f"augment holds {mix}, which mixes classes, but y holds {targets}: leave it out."
        )
    if mix.num_classes not in (None, n_outputs):
        raise ValueError(
            f"augment holds {mix} with num_classes={mix.num_classes}, but y has {n_outputs} "
            f"classes: give num_classes={n_outputs}, or leave it out."
        )


def _one_by_one(function: Callable, pixels: torch.Tensor) -> torch.Tensor:
    """Call a user's function with one image (C×H×W) after another."""
    out = []
    for image in pixels:
        try:
            changed = function(image)
            if isinstance(changed, np.ndarray):  # torch takes no negative strides
                changed = np.ascontiguousarray(changed)
            changed = torch.as_tensor(changed)
        except Exception as error:
            error.add_note(f"augment={function!r} must turn a tensor of one image into another.")
            raise
        if changed.shape != image.shape:
            raise ValueError(
                f"augment returned an image of shape {tuple(changed.shape)} for one of "
                f"{tuple(image.shape)}: it has to keep the shape."
            )
        if changed.is_floating_point() and image.dtype == torch.uint8:
            raise ValueError(
                f"augment returned {changed.dtype} for a uint8 image: return uint8, "
                "0…255; the network's own normalisation comes afterwards."
            )
        out.append(changed)
    return torch.stack(out)
