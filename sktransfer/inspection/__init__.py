"""Displays in scikit-learn's manner, drawn with matplotlib (extra ``plot``)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sktransfer.inspection._fine_tuning import FineTuningDisplay
    from sktransfer.inspection._ranking import BackboneRankingDisplay
    from sktransfer.inspection._transfer_curve import TransferCurveDisplay

__all__ = ["BackboneRankingDisplay", "FineTuningDisplay", "TransferCurveDisplay"]

_MODULES = {
    "BackboneRankingDisplay": "_ranking",
    "FineTuningDisplay": "_fine_tuning",
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
