"""Transfer learning inside scikit-learn: images in, columns out.

Public names are loaded when they are first used, so that ``import sktransfer``
imports neither torch nor torchvision nor skorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sktransfer._version import __version__

if TYPE_CHECKING:
    from sktransfer.embedding._extractor import PretrainedFeatureExtractor
    from sktransfer.embedding._text_extractor import PretrainedTextExtractor
    from sktransfer.fine_tuning._classifier import FineTuningClassifier
    from sktransfer.fine_tuning._regressor import FineTuningRegressor
    from sktransfer.networks._backbone import load_backbone
    from sktransfer.networks._catalog import list_backbones
    from sktransfer.saving._export import export, to_module
    from sktransfer.saving._save import load, save
    from sktransfer.store._store import embedding_store

__all__ = [
    "FineTuningClassifier",
    "FineTuningRegressor",
    "PretrainedFeatureExtractor",
    "PretrainedTextExtractor",
    "__version__",
    "embedding_store",
    "export",
    "list_backbones",
    "load",
    "load_backbone",
    "save",
    "to_module",
]

_MODULES = {
    "FineTuningClassifier": "fine_tuning._classifier",
    "FineTuningRegressor": "fine_tuning._regressor",
    "PretrainedFeatureExtractor": "embedding._extractor",
    "PretrainedTextExtractor": "embedding._text_extractor",
    "embedding_store": "store._store",
    "export": "saving._export",
    "list_backbones": "networks._catalog",
    "load": "saving._save",
    "load_backbone": "networks._backbone",
    "save": "saving._save",
    "to_module": "saving._export",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'sktransfer' has no attribute {name!r}")
    value = getattr(import_module(f"sktransfer.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
