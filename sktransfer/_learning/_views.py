"""Several views of each picture at prediction, their embeddings averaged."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_ZOOM = 0.875
MAX_VIEWS = 4


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
        self.name, self.short_name = backbone.name, backbone.short_name
        self.feature_groups, self.n_features = backbone.feature_groups, backbone.n_features
        self.preprocessing, self.input_size = backbone.preprocessing, backbone.input_size
        self.fingerprint = f"{backbone.fingerprint}-views{n_views}"
        self.group_fingerprints = [f"{f}-views{n_views}" for f in backbone.group_fingerprints]

    def inference_module(
        self, device: torch.device | str = "cpu", precision: str = "float32"
    ) -> nn.Module:
        return _MeanOverViews(self.backbone.inference_module(device, precision), self.n_views)


class _MeanOverViews(nn.Module):
    def __init__(self, network: nn.Module, n_views: int):
        super().__init__()
        self.network, self.n_views = network, n_views

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        groups = [self.network(view) for view in views(x, self.n_views)]
        return [torch.stack(parts).mean(0) for parts in zip(*groups, strict=True)]


def views(x: torch.Tensor, n_views: int) -> list[torch.Tensor]:
    """The first `n_views` views of a batch of pictures."""
    found = [x, x.flip(-1)]
    if n_views > 2:
        height, width = x.shape[-2:]
        h, w = max(1, round(_ZOOM * height)), max(1, round(_ZOOM * width))
        top, left = (height - h) // 2, (width - w) // 2
        centre = x[..., top : top + h, left : left + w].float()
        large = F.interpolate(centre, (height, width), mode="bilinear", align_corners=False)
        large = large.round().to(x.dtype) if x.dtype == torch.uint8 else large
        found += [large, large.flip(-1)]
    return found[:n_views]
