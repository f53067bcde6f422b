"""Pipelines and searches around our estimators, written and audited by skops.

Stand-ins replace our estimators, at any depth of a pipeline or a search, in the bytes of skops.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from importlib import import_module
from io import BytesIO
from types import FunctionType, ModuleType
from zipfile import ZIP_STORED, ZipFile

import joblib
from sklearn.base import BaseEstimator

from sktransfer.saving._archive import Refused, require

# Public functions of these modules, such as scorers, are written by name.
_FUNCTIONS = ("sklearn.metrics", "sklearn.feature_selection")
# Parts of searches and meta-estimators that only hold their arguments, and that skops does not
# trust by default.
_HARMLESS = {
    "numpy.dtype",
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.compose._column_transformer._RemainderColsList",  # before scikit-learn 1.9
    "sklearn.compose._column_transformer.make_column_selector",
    "sklearn.metrics._scorer._CurveScorer",
    "sklearn.metrics._scorer._MultimetricScorer",
    "sklearn.metrics._scorer._PassthroughScorer",
    "sklearn.metrics._scorer._Scorer",
    "sklearn.model_selection._search_successive_halving.HalvingGridSearchCV",
    "sklearn.model_selection._search_successive_halving.HalvingRandomSearchCV",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    "sklearn.utils._bunch.Bunch",
    "sklearn.utils._metadata_requests.MetadataRequest",
    "sklearn.utils._metadata_requests.MethodMetadataRequest",
}
# A sparse matrix is compressed; it takes at most this many times its bytes.
_MAX_RATIO = 64

_estimators: ContextVar[Sequence] = ContextVar("_estimators")


class StandIn:
    """Replaces an estimator of ours or a function of scikit-learn in the bytes of skops.

    When skops makes it in :func:`loads`, it returns the estimator or the function.
    """

    key: tuple

    def __new__(cls, of: str, name: str | int) -> object:  # type: ignore[misc]
        if of == "estimators":
            return _estimators.get()[name]  # type: ignore[index]
        found = vars(import_module(of)).get(str(name)) if of in _FUNCTIONS else None
        if not isinstance(found, FunctionType):
            raise Refused(f"it names {of}.{name}")
        return found

    def __reduce__(self) -> tuple:
        return StandIn, self.key


_STAND_IN = f"{StandIn.__module__}.{StandIn.__name__}"


class _Pickler(pickle.Pickler):
    """Finds what stand-ins have to replace, anywhere in an object."""

    def __init__(self, file: BytesIO, classes: Collection[type]):
        super().__init__(file, protocol=5)
        self.classes, self.found = classes, list[BaseEstimator]()

    def persistent_id(self, value: object) -> tuple | None:
        if type(value) in self.classes:
            places = [i for i, other in enumerate(self.found) if other is value]
            if not places:
                self.found.append(value)
            return "estimators", places[0] if places else len(self.found) - 1
        if isinstance(value, FunctionType):
            for module in _FUNCTIONS:
                if vars(import_module(module)).get(name := value.__name__) is value:
                    return module, name
        # A cache is a folder of this machine, and does not change predictions.
        return () if isinstance(value, joblib.Memory) else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, key: tuple) -> object:
        if not key:
            return None
        stand_in = object.__new__(StandIn)
        stand_in.key = key
        return stand_in


def split_estimators(
    estimator: BaseEstimator, classes: Collection[type]
) -> tuple[list[BaseEstimator], Callable[[], bytes]]:
    """Find the estimators of `classes` anywhere in `estimator`.

    Return them, and a function that returns skops' bytes of all other parts. TypeError names the
    parameter that cannot be written.
    """
    file = BytesIO()
    pickler = _Pickler(file, classes)
    try:
        pickler.dump(estimator)
    except Exception as error:
        raise _cannot_write(estimator, error) from error

    def dumps() -> bytes:
        skops_io = _import_skops()
        file.seek(0)
        try:
            data = skops_io.dumps(_Unpickler(file).load())
            _loads(data, pickler.found)
        except Exception as error:
            raise _cannot_write(estimator, error) from error
        return data

    return pickler.found, dumps


def _cannot_write(estimator: BaseEstimator, error: Exception) -> TypeError:
    parameters = {
        name: value
        for name, value in estimator.get_params(deep=True).items()
        if not _holds_estimators(value) and not _can_write(value)
    }
    where = ", ".join(f"{name}={value!r}" for name, value in parameters.items())
    return TypeError(
        f"{type(estimator).__name__} holds what a file that is safe to open cannot hold: "
        f"{where or 'an attribute that fit set'} ({type(error).__name__}: {error}). Functions have "
        "to be importable by name: no lambda, no function within a function. Of a search, "
        "`best_estimator_` can be saved alone. joblib.dump keeps other objects."
    )


def _holds_estimators(value: object) -> bool:
    """Whether `get_params` also lists the parameters of estimators in `value`."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds_estimators, value))
    return hasattr(value, "get_params")


def _can_write(value: object) -> bool:
    try:
        _loads(_import_skops().dumps(pickle.loads(pickle.dumps(value))))
    except Exception:
        return False
    return True


def check_types(data: bytes, trusted: Collection[str] | None, path: str) -> None:
    """Refuse bytes of :func:`split_estimators` with types that are not trusted; None trusts all.

    No object is made from the bytes.
    """
    skops_io = _import_skops()
    try:
        _check_sizes(data)
        unknown = set(skops_io.get_untrusted_types(data=data)) - _harmless()
    except (Refused, ImportError):
        raise
    except Exception as error:
        raise Refused(f"its classical steps cannot be read ({error!r})") from error
    unknown -= unknown if trusted is None else set(trusted)
    if unknown:
        raise ValueError(
            f"{path} holds objects of types that are not trusted. If you know where it comes from "
            f"and what these do, load it with load(path, trusted={sorted(unknown)})."
        )


def loads(data: bytes, estimators: Sequence) -> BaseEstimator:
    """Make the pipeline around `estimators` from bytes that passed :func:`check_types`."""
    _import_skops()
    try:
        return _loads(data, estimators)
    except Exception as error:
        raise Refused(f"its classical steps cannot be made ({error!r})") from error


def _loads(data: bytes, estimators: Sequence = ()) -> BaseEstimator:
    skops_io, token = _import_skops(), _estimators.set(estimators)
    try:
        return skops_io.loads(data, trusted=skops_io.get_untrusted_types(data=data))
    finally:
        _estimators.reset(token)


def _harmless() -> set[str]:
    from sklearn import model_selection

    splitters = {
        f"{cls.__module__}.{cls.__name__}"
        for cls in vars(model_selection).values()
        if isinstance(cls, type) and hasattr(cls, "get_n_splits")
    }
    return _HARMLESS | splitters | {_STAND_IN}


def _check_sizes(data: bytes) -> None:
    """Refuse an archive that would take far more memory than it has bytes."""
    with ZipFile(BytesIO(data)) as archive:
        infos = archive.infolist()
        is_stored = all(info.compress_type == ZIP_STORED for info in infos)
        require(is_stored, "its classical steps are compressed")
        is_right = sum(info.file_size for info in infos) <= len(data)
        for info in infos:
            if info.filename.endswith(".npz"):
                with ZipFile(BytesIO(archive.read(info))) as inner:
                    size = sum(part.file_size for part in inner.infolist())
                is_right = is_right and size <= _MAX_RATIO * info.file_size + 2**20
        _check_files(json.loads(archive.read("schema.json")))
    require(is_right, "its classical steps claim more memory than the file has bytes")


def _check_files(node: object) -> None:
    """Refuse a file that is read more than once: its name must be the id of its object."""
    if isinstance(node, dict):
        file = node.get("file", "")
        is_right = not isinstance(file, str) or file[:-4] in ("", str(node.get("__id__")))
        require(is_right, f"its classical steps read {file!r} for another object")
        node = list(node.values())
    for part in node if isinstance(node, list) else ():
        _check_files(part)


def _import_skops() -> ModuleType:
    try:
        return import_module("skops.io")
    except ImportError as error:
        raise ImportError(
            "Pipelines and searches are saved and loaded with the package skops, which cannot be "
            "imported: pip install sktransfer[skops]"
        ) from error
