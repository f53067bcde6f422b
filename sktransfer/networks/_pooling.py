"""From a map or a sequence of tokens to one vector per image."""

from __future__ import annotations

import torch
from torch import nn

POOLINGS = ("auto", "avg", "max", "avgmax", "gem", "cls", "flatten")
_GEM_POWER = 3.0


class Pooling(nn.Module):
    """Reduce a network's value to one row per image, in float32.

    Parameters
    ----------
    kind : {"none", "avg", "max", "avgmax", "gem", "cls", "flatten"}
        ``"gem"`` is the generalised mean (mean of x^p)^(1/p) with p = 3 [1]_.
    layout : {"vector", "map", "map_last", "tokens"}
        N×C; N×C×H×W; N×H×W×C; N×places×C.
    token : int, default=0
        Position of the class token, for ``"cls"``.
    n_prefix : int, default=0
        Number of tokens at the beginning that are not part of the image (class token and
        registers); the other kinds leave them out where the network does.

    References
    ----------
    .. [1] F. Radenović, G. Tolias, O. Chum: "Fine-tuning CNN image retrieval with no human
       annotation", IEEE TPAMI 41(7), 2019. :doi:`10.1109/TPAMI.2018.2846566`
    """

    def __init__(self, kind: str, layout: str, token: int = 0, n_prefix: int = 0):
        super().__init__()
        self.kind, self.layout, self.token, self.n_prefix = kind, layout, token, n_prefix

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, layout={self.layout!r}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "cls":
            return x[:, self.token].float()
        if self.kind == "flatten":
            return x.flatten(1).float()
        if self.layout == "vector":
            return x.float()
        # Averaged in float32, whatever the network computes in.
        places = x
        axes: tuple[int, ...] = (2, 3)
        if self.layout == "map_last":
            axes = (1, 2)
        elif self.layout == "tokens":
            places, axes = x[:, self.n_prefix :], (1,)
        if self.kind == "max":
            return places.amax(axes).float()
        if self.kind == "avg":
            return places.mean(axes, dtype=torch.float32)
        if self.kind == "avgmax":
            return torch.cat(
                [places.mean(axes, dtype=torch.float32), places.amax(axes).float()], dim=1
            )
        # (1/n Σ x^p)^(1/p) needs x > 0; 1e-6 as in the authors' code.
        powers = places.float().clamp(min=1e-6).pow(_GEM_POWER)
        return powers.mean(axes).pow(1.0 / _GEM_POWER)


def layout_of(shape: tuple[int, ...], is_channels_last: bool) -> str | None:
    """Which axes of a value are the channels; None if it is not one vector or map per image."""
    if len(shape) == 2:
        return "vector"
    if len(shape) == 3:
        return "tokens"
    if len(shape) == 4:
        return "map_last" if is_channels_last else "map"
    return None


def resolve_pooling(pooling: str, layout: str, layer: str, class_token: int | None) -> str:
    """The kind of pooling for one layer; a ValueError where that layer cannot be pooled so."""
    if pooling == "auto":
        if layout == "vector":
            return "avg"
        return "cls" if layout == "tokens" and class_token is not None else "avg"
    if pooling == "cls" and (layout != "tokens" or class_token is None):
        what = {
            "vector": "one vector per image",
            "map": "a map with height and width",
            "map_last": "a map with height and width",
            "tokens": "a sequence of tokens, and the network classifies from all of them",
        }[layout]
        raise ValueError(
            f"pooling='cls' asks for the class token, but {layer} gives {what}: use pooling='avg', "
            "'max', 'avgmax', 'gem' or 'flatten', or a vision transformer's layer."
        )
    return pooling


def pooled_width(kind: str, layout: str, shape: tuple[int, ...]) -> int:
    """Number of columns that pooling a value of `shape` (with its batch axis) gives."""
    if kind == "flatten" and layout != "vector":
        width = 1
        for length in shape[1:]:
            width *= length
        return width
    channels = shape[1] if layout in ("vector", "map") else shape[-1]
    return channels * (2 if kind == "avgmax" and layout != "vector" else 1)
