"""Several views of each picture: at prediction averaged, for the linear probe one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_MakeViews = Callable[[torch.Tensor], list[torch.Tensor]]

_ZOOM = 0.875  # of an enlarged centre
_CORNER = 0.85  # of an enlarged corner, of the picture's side
# Where the part that is enlarged lies, down and to the right.
_CORNERS = ((0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0))


class Views:
    """A backbone that sees several views of each picture: as their mean, or one after another.

    Parameters
    ----------
    backbone : Backbone
    make_views : callable
        A batch of pictures -> the batches of their views.
    names : list of str
        What each view's columns are known by in the store; a single name is that of the mean
        over all views.
    """

    def __init__(self, backbone: Any, make_views: _MakeViews, names: list[str]):
        self.backbone, self.make_views, self.names = backbone, make_views, names
        self.name, self.preprocessing = backbone.name, backbone.preprocessing
        self.input_size = backbone.input_size
        self.feature_groups = list(backbone.feature_groups) * len(names)
        self.n_features = backbone.n_features * len(names)
        self.group_fingerprints = [
            f"{fingerprint}-{name}" for name in names for fingerprint in backbone.group_fingerprints
        ]

    def inference_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The backbone's own, run on each view."""
        network = self.backbone.inference_module(*args, **kwargs)
        return _OnViews(network, self.make_views, len(self.names) == 1)


def mean_over_views(backbone: Any, n_views: int) -> Views:
    """A backbone that embeds a picture as the mean over :func:`views` of it."""
    return Views(backbone, partial(views, n_views=n_views), [f"views{n_views}"])


def each_corner(backbone: Any, n_corners: int) -> Views:
    """A backbone that embeds :func:`corners` of a picture, each as a group of columns."""
    names = [f"corner{k}" for k in range(n_corners)]
    return Views(backbone, partial(corners, n_corners=n_corners), names)


class _OnViews(nn.Module):
    def __init__(self, network: nn.Module, make_views: _MakeViews, is_mean: bool):
        super().__init__()
        self.network, self.make_views, self.is_mean = network, make_views, is_mean

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        rows = [self.network(view) for view in self.make_views(x)]
        if self.is_mean:
            return [torch.stack(parts).mean(0) for parts in zip(*rows, strict=True)]
        return [part for groups in rows for part in groups]


def views(x: torch.Tensor, n_views: int) -> list[torch.Tensor]:
    """The first `n_views` of: the pictures, mirrored, their enlarged centres, those mirrored."""
    found = [x, x.flip(-1)]
    if n_views > 2:
        centre = _enlarged(x, _ZOOM, 0.5, 0.5)
        found += [centre, centre.flip(-1)]
    return found[:n_views]


def corners(x: torch.Tensor, n_corners: int) -> list[torch.Tensor]:
    """Enlarged corners of the pictures; nothing is mirrored, as a "b" is no "d"."""
    return [_enlarged(x, _CORNER, *corner) for corner in _CORNERS[:n_corners]]


def _enlarged(x: torch.Tensor, share: float, down: float, right: float) -> torch.Tensor:
    height, width = x.shape[-2:]
    h, w = max(1, round(share * height)), max(1, round(share * width))
    top, left = int(down * (height - h)), int(right * (width - w))
    part = x[..., top : top + h, left : left + w].float()
    large = F.interpolate(part, (height, width), mode="bilinear", align_corners=False)
    return large.round().to(x.dtype) if x.dtype == torch.uint8 else large
