"""Transfer learning inside scikit-learn: images in, columns out.

Public names are loaded when they are first used, so that ``import sktransfer``
imports neither torch nor torchvision nor skorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sktransfer._version import __version__

if TYPE_CHECKING:
    from sktransfer._save import load, save
    from sktransfer.embedding._extractor import PretrainedFeatureExtractor
    from sktransfer.fine_tuning._classifier import FineTuningClassifier
    from sktransfer.fine_tuning._regressor import FineTuningRegressor
    from sktransfer.networks._backbone import load_backbone
    from sktransfer.networks._catalog import list_backbones
    from sktransfer.store._store import embedding_store

# Public name -> the module that defines it.
_HOMES = {
    "FineTuningClassifier": "sktransfer.fine_tuning._classifier",
    "FineTuningRegressor": "sktransfer.fine_tuning._regressor",
    "PretrainedFeatureExtractor": "sktransfer.embedding._extractor",
    "embedding_store": "sktransfer.store._store",
    "list_backbones": "sktransfer.networks._catalog",
    "load": "sktransfer._save",
    "save": "sktransfer._save",
    "load_backbone": "sktransfer.networks._backbone",
}

__all__ = [
    "FineTuningClassifier",
    "FineTuningRegressor",
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
