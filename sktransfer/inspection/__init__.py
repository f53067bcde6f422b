"""Displays in scikit-learn's manner, drawn with matplotlib (extra ``plot``)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sktransfer.inspection._embedding import EmbeddingDisplay
    from sktransfer.inspection._leaks import LeaksDisplay
    from sktransfer.inspection._neighbors import NeighborsDisplay
    from sktransfer.inspection._saliency import SaliencyDisplay
    from sktransfer.inspection._top_losses import TopLossesDisplay

__all__ = [
    "EmbeddingDisplay",
    "LeaksDisplay",
    "NeighborsDisplay",
    "SaliencyDisplay",
    "TopLossesDisplay",
]

_MODULES = {
    "EmbeddingDisplay": "_embedding",
    "LeaksDisplay": "_leaks",
    "NeighborsDisplay": "_neighbors",
    "SaliencyDisplay": "_saliency",
    "TopLossesDisplay": "_top_losses",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'sktransfer.inspection' has no attribute {name!r}")
    value = getattr(import_module(f"sktransfer.inspection.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
