"""Several views of each picture: at prediction averaged, for the linear probe one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_ZOOM = 0.875  # of an enlarged centre
_CORNER = 0.85  # of an enlarged corner, of the picture's side
# Where the part that is enlarged lies, down and to the right.
_CORNERS = ((0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0))


class ManyViews:
    """A backbone that embeds a picture as the mean over views of it.

    One view is the picture, two add its mirror image, three and four a slightly enlarged centre
    and that one's mirror image.

    Parameters
    ----------
    backbone : Backbone
    n_views : int
    """

    def __init__(self, backbone: Any, n_views: int):
        self.backbone, self.n_views = backbone, n_views
        self.name, self.preprocessing = backbone.name, backbone.preprocessing
        self.input_size = backbone.input_size
        self.feature_groups, self.n_features = backbone.feature_groups, backbone.n_features
        self.group_fingerprints = [f"{f}-views{n_views}" for f in backbone.group_fingerprints]

    def inference_module(
        self,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        packed_for: tuple | None = None,
    ) -> nn.Module:
        network = self.backbone.inference_module(device, precision, packed_for)
        return _MeanOverViews(network, self.n_views)


class Corners:
    """A backbone that embeds enlarged corners of a picture, each as a group of columns.

    Parameters
    ----------
    backbone : Backbone
    n_corners : int
        Up to 4.
    """

    def __init__(self, backbone: Any, n_corners: int):
        self.backbone, self.n_corners = backbone, n_corners
        self.name, self.preprocessing = backbone.name, backbone.preprocessing
        self.input_size = backbone.input_size
        self.feature_groups = list(backbone.feature_groups) * n_corners
        self.n_features = backbone.n_features * n_corners
        self.group_fingerprints = [
            f"{f}-corner{k}" for k in range(n_corners) for f in backbone.group_fingerprints
        ]

    def inference_module(
        self,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        packed_for: tuple | None = None,
    ) -> nn.Module:
        network = self.backbone.inference_module(device, precision, packed_for)
        return _EachCorner(network, self.n_corners)


class _MeanOverViews(nn.Module):
    def __init__(self, network: nn.Module, n_views: int):
        super().__init__()
        self.network, self.n_views = network, n_views

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        groups = [self.network(view) for view in views(x, self.n_views)]
        return [torch.stack(parts).mean(0) for parts in zip(*groups, strict=True)]


class _EachCorner(nn.Module):
    def __init__(self, network: nn.Module, n_corners: int):
        super().__init__()
        self.network, self.n_corners = network, n_corners

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part for view in corners(x, self.n_corners) for part in self.network(view)]


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
