"""From what the user calls a backbone to where the network comes from."""

from __future__ import annotations

from typing import Any

from torch import nn

from sktransfer.networks._builtin_source import BuiltinSource
from sktransfer.networks._own import own_source
from sktransfer.networks._published import TorchvisionSource, torchvision_names
from sktransfer.networks._source import Source, did_you_mean
from sktransfer.networks._timm_source import TimmSource


def resolve_source(backbone: Any, weights: Any) -> Source:
    """What `backbone` and `weights` name together."""
    if isinstance(backbone, Source):
        return backbone
    if isinstance(backbone, nn.Module):
        return own_source(backbone, weights)
    if isinstance(backbone, str):
        return _named_source(backbone, weights)
    if callable(backbone):
        made = backbone()
        if not isinstance(made, nn.Module):
            raise TypeError(
                f"backbone={backbone!r} returned {type(made).__name__}: a callable backbone takes "
                "no argument and returns a torch.nn.Module."
            )
        return own_source(made, weights)
    raise TypeError(
        f"backbone={backbone!r} is a {type(backbone).__name__}: a name (see list_backbones()), a "
        "torch.nn.Module or a callable that returns one is accepted."
    )


def _named_source(name: str, weights: Any) -> Source:
    if name == "builtin":
        return BuiltinSource(weights)
    if name.startswith("timm:"):
        return TimmSource(name, weights)
    known = torchvision_names()
    if name in known:
        return TorchvisionSource(name, weights)
    raise ValueError(
        f"backbone={name!r} is not known.{did_you_mean(name, [*known, 'builtin'])} "
        "list_backbones() lists what is; 'timm:NAME' names one of timm's."
    )
