"""Displays in scikit-learn's manner, drawn with matplotlib (extra ``plot``)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sktransfer.inspection._embedding import EmbeddingDisplay
    from sktransfer.inspection._fine_tuning import FineTuningDisplay
    from sktransfer.inspection._leaks import LeaksDisplay
    from sktransfer.inspection._neighbors import NeighborsDisplay
    from sktransfer.inspection._ranking import BackboneRankingDisplay
    from sktransfer.inspection._saliency import SaliencyDisplay
    from sktransfer.inspection._top_losses import TopLossesDisplay
    from sktransfer.inspection._transfer_curve import TransferCurveDisplay

__all__ = [
    "BackboneRankingDisplay",
    "EmbeddingDisplay",
    "FineTuningDisplay",
    "LeaksDisplay",
    "NeighborsDisplay",
    "SaliencyDisplay",
    "TopLossesDisplay",
    "TransferCurveDisplay",
]

_MODULES = {
    "BackboneRankingDisplay": "_ranking",
    "EmbeddingDisplay": "_embedding",
    "FineTuningDisplay": "_fine_tuning",
    "LeaksDisplay": "_leaks",
    "NeighborsDisplay": "_neighbors",
    "SaliencyDisplay": "_saliency",
    "TopLossesDisplay": "_top_losses",
    "TransferCurveDisplay": "_transfer_curve",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'sktransfer.inspection' has no attribute {name!r}")
    value = getattr(import_module(f"sktransfer.inspection.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
