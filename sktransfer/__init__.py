"""Transfer learning inside scikit-learn: images in, columns out.

Public names are loaded when they are first used, so that ``import sktransfer``
imports neither torch nor torchvision nor skorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sktransfer._version import __version__

if TYPE_CHECKING:
    from sktransfer._backbones import load_backbone
    from sktransfer._cache import embedding_store
    from sktransfer._catalog import list_backbones
    from sktransfer._extractor import PretrainedFeatureExtractor
    from sktransfer._fine_tuning_classifier import FineTuningClassifier
    from sktransfer._fine_tuning_regressor import FineTuningRegressor
    from sktransfer._learning._optimizers import Optimizer
    from sktransfer._persistence import load, save

# Public name -> the module that defines it.
_HOMES = {
    "FineTuningClassifier": "sktransfer._fine_tuning_classifier",
    "FineTuningRegressor": "sktransfer._fine_tuning_regressor",
    "Optimizer": "sktransfer._learning._optimizers",
    "PretrainedFeatureExtractor": "sktransfer._extractor",
    "embedding_store": "sktransfer._cache",
    "list_backbones": "sktransfer._catalog",
    "load": "sktransfer._persistence",
    "save": "sktransfer._persistence",
    "load_backbone": "sktransfer._backbones",
}

__all__ = [
    "FineTuningClassifier",
    "FineTuningRegressor",
    "Optimizer",
    "PretrainedFeatureExtractor",
    "__version__",
    "embedding_store",
    "list_backbones",
    "load",
    "load_backbone",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sktransfer' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
