"""``save`` and ``load``: a checked JSON header and tensors, in one safetensors file.

Nothing in a file is ever run: no pickle is read, classes come from a short list, and a file with
anything unknown in it is refused.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from sktransfer._jsonable import decode, encode
from sktransfer._version import __version__
from sktransfer.embedding._extractor import PretrainedFeatureExtractor
from sktransfer.fine_tuning._classifier import FineTuningClassifier
from sktransfer.fine_tuning._regressor import FineTuningRegressor
from sktransfer.networks._preprocessing import Preprocessing

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator
    from torch import nn

    from sktransfer.fine_tuning._module import TunedNetwork
    from sktransfer.networks._backbone import Backbone

FORMAT = 2
_KEY = "sktransfer"
_HEADER = {"format": int, "version": str, "class": str, "fingerprint": str}
_HEADER |= {"preprocessing": dict, "parameters": dict, "attributes": dict}

# Class -> the fitted attributes that a file holds, and their types.
_COMMON: dict[str, type] = {"n_features_in_": int, "n_features_out_": int, "_n_image_columns": int}
_OF_TUNED: dict[str, type] = {"first_trained_stage": int, "moves_statistics": bool}
_TUNED = _COMMON | _OF_TUNED | {"history_": list, "n_iter_": int, "best_epoch_": int}
_CLASSES: dict[type, dict[str, type]] = {
    PretrainedFeatureExtractor: _COMMON,
    FineTuningClassifier: _TUNED
    | {"classes_": np.ndarray, "class_priors_": np.ndarray, "_kind": str},
    FineTuningRegressor: _TUNED
    | {"_n_targets": int, "_is_flat": bool}
    | {"_target_mean": np.ndarray, "_target_scale": np.ndarray},
}
_NAMES = {cls.__name__: cls for cls in _CLASSES}
# These belong to a machine rather than to a model: `load` leaves them at their defaults.
_OF_THE_MACHINE = ("memory", "device", "n_jobs", "verbose", "callbacks")

Tensors = dict[str, np.ndarray]


class _Refused(ValueError):
    """The reason why a file is not loaded."""


def _require(is_right: bool, reason: str) -> None:
    if not is_right:
        raise _Refused(reason)


# -- saving ----------------------------------------------------------------------------------
def save(estimator: BaseEstimator, path: str | os.PathLike, *, standalone: bool = False) -> None:
    """Write a fitted estimator to a file that is safe to open.

    Parameters
    ----------
    estimator : PretrainedFeatureExtractor, FineTuningClassifier or FineTuningRegressor
    path : str or Path
        By convention it ends in ``.safetensors``.
    standalone : bool, default=False
        Whether the file holds all weights of the network. Otherwise it holds those that were
        trained, and the name and digest of the others. An estimator that was loaded from a
        standalone file is always saved as one.

    Raises
    ------
    ValueError
        If parameters were changed after `fit` so that the file could not be loaded. No file is
        written then.
    TypeError
        If a parameter or the labels are of a type that a file cannot hold.
    OSError
        If `path` cannot be written.

    See Also
    --------
    load : Read the file.

    Notes
    -----
    `memory`, `device`, `n_jobs`, `verbose` and `callbacks` are not saved. Functions, modules and
    other objects given as `loss`, `optimizer`, `augment` or `preprocessing` cannot be saved;
    a module given as `backbone` is left out, and `load` needs it again. pickle keeps all of
    them. Labels may be NumPy numbers, booleans, strings and times, and strings in an object array.
    Other labels (tuples, ``datetime.date``, pandas' periods and intervals) cannot be saved: give
    `fit` their strings, or use pickle.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import FineTuningClassifier, load, save
    >>> X, y = load_digits(n_class=2, return_X_y=True)
    >>> model = FineTuningClassifier(image_shape=(8, 8), unfreeze=0, max_epochs=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "model.safetensors"
    ...     save(model.fit(X[:40] / 16, y[:40]), path)
    ...     print(path.stat().st_size < 20_000, load(path).score(X[:40] / 16, y[:40]))
    True 1.0
    """
    from safetensors.numpy import save_file
    from sklearn.utils.validation import check_is_fitted

    cls = type(estimator)
    if cls not in _CLASSES:
        raise TypeError(f"save writes {list(_NAMES)}; got {estimator!r}.")
    check_is_fitted(estimator)
    backbone = estimator.backbone_
    is_named = isinstance(estimator.backbone, str)
    standalone = standalone or (is_named and backbone.has_own_weights)
    parameters = estimator.get_params(deep=False)
    for key in _OF_THE_MACHINE if is_named else (*_OF_THE_MACHINE, "backbone"):
        parameters.pop(key, None)
    attributes = {
        key: getattr(estimator._tuned if key in _OF_TUNED else estimator, key)
        for key in _CLASSES[cls]
    }
    if hasattr(estimator, "feature_names_in_"):
        attributes["feature_names_in_"] = estimator.feature_names_in_
    settings = backbone.preprocessing
    settings = asdict(settings) if isinstance(settings, Preprocessing) else {}
    header = {
        "format": FORMAT,
        "version": __version__,
        "class": cls.__name__,
        "fingerprint": backbone.fingerprint,
        "preprocessing": encode(settings, "preprocessing"),
        "parameters": {k: encode(v, f"the parameter {k}") for k, v in parameters.items()},
        "attributes": {k: encode(v, k) for k, v in attributes.items()},
    }
    tensors = _tensors_of(estimator, standalone)
    with atomic_write(os.fsdecode(path)) as part:
        save_file(tensors, part, metadata={_KEY: json.dumps(header)})
        _check_loads(part, estimator, None if is_named else estimator.backbone)


def _tensors_of(estimator: BaseEstimator, standalone: bool) -> Tensors:
    """The trained weights as ``"trained/…"`` and ``"head/…"``, all others as ``"backbone/…"``."""
    tensors, modules = {}, {}
    if hasattr(estimator, "_tuned"):
        trained = estimator._tuned.trained_state()
        tensors = {f"trained/{key}": np.array(array) for key, array in trained.items()}
        modules["head"] = estimator._tuned.head
    if standalone:
        modules["backbone"] = estimator.backbone_.network.module
    for prefix, module in modules.items():
        for key, tensor in module.state_dict().items():
            tensors[f"{prefix}/{key}"] = np.array(tensor.detach().cpu().numpy(), order="C")
    return tensors


def _check_loads(part: Path, estimator: BaseEstimator, backbone: nn.Module | None) -> None:
    """Parameters that were changed after `fit` may not agree with the fitted attributes."""
    try:
        loaded = load(part, backbone=backbone)
        if loaded.backbone_.cut != estimator.backbone_.cut:
            raise ValueError("its embeddings would differ from those it was fitted with.")
    except ValueError as error:
        raise ValueError(
            f"This {type(estimator).__name__} could not be loaded again, so it is not saved. Were "
            "parameters such as `head`, `weights`, `layer`, `pooling` or `preprocessing` changed "
            f"after fit? Fit again, or set them to what they were. (Loading says: {error})"
        ) from error


@contextmanager
def atomic_write(path: str) -> Iterator[Path]:
    """Give a temporary file that replaces `path` in one step if no error is raised.

    Raises OSError before anything is written if `path` cannot be.
    """
    target = Path(os.path.realpath(path))  # what a symbolic link names
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    try:
        folder = TemporaryDirectory(prefix=".sktransfer-", suffix=".part", dir=target.parent)
    except OSError as error:  # it names the temporary folder
        raise OSError(error.errno, error.strerror, path) from error
    with folder:
        part = Path(folder.name) / "part"
        part.touch()
        mode = (target if target.exists() else part).stat().st_mode
        yield part
        part.chmod(stat.S_IMODE(mode))  # safetensors lets nobody else read its files
        os.replace(part, target)


# -- loading ---------------------------------------------------------------------------------
def load(path: str | os.PathLike, *, backbone: nn.Module | None = None) -> BaseEstimator:
    """Read a file that :func:`save` wrote.

    Parameters
    ----------
    path : str or Path
    backbone : nn.Module or callable, default=None
        The module that was the estimator's `backbone`, unless that was a name.

    Returns
    -------
    estimator : PretrainedFeatureExtractor, FineTuningClassifier or FineTuningRegressor
        Fitted.

    Raises
    ------
    ValueError
        If :func:`save` did not write the file, if it holds anything unknown, or if it does not
        fit the weights that the name of its backbone gives here.
    OSError
        If `path` cannot be read.

    See Also
    --------
    save : Write the file.
    """
    path = os.fsdecode(path)
    with open(path, "rb"):
        pass  # the errors of safetensors do not name the path
    try:
        header, tensors = _read(path)
        estimator = _unfitted(header, backbone, path)
        _restore_fit(estimator, header, tensors, path)
    except (_Refused, RecursionError) as error:
        reason = "its header is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(
            f"{path} was not loaded: {reason}. sktransfer.load reads what sktransfer.save of "
            "this version wrote, and nothing else."
        ) from error
    return estimator


def _read(path: str) -> tuple[dict, Tensors]:
    """Return the header, with its entries' types checked, and the tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(_KEY, "")
            _require(bool(text), "sktransfer did not write it (it has no header of ours)")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError) as error:  # the last: dtypes beyond NumPy
        raise _Refused(f"it is not a readable safetensors file ({error})") from error
    try:
        header = json.loads(text)
    except ValueError as error:  # also an integer with too many digits
        raise _Refused(f"its header is not JSON ({error})") from error
    _require(isinstance(header, dict) and "format" in header, "its header names no format")
    version = header["format"]
    _require(version == FORMAT, f"its format is {version!r}, and this version reads {FORMAT}")
    types = {key: type(value) for key, value in header.items()}
    _require(types == _HEADER, f"its header does not hold {sorted(_HEADER)}, each of its type")
    name = header["class"]
    _require(name in _NAMES, f"its class is {name!r}, not one of {list(_NAMES)}")
    return header, tensors


def _unfitted(header: dict, backbone: nn.Module | None, path: str) -> BaseEstimator:
    """The estimator with its parameters."""
    from sktransfer._validation import check_parameters

    estimator = _NAMES[header["class"]]()
    known = set(estimator.get_params(deep=False)) - set(_OF_THE_MACHINE)
    unknown = sorted(set(header["parameters"]) - known)
    _require(not unknown, f"{header['class']} has no parameters {unknown}")
    parameters = {k: _decoded(v, f"parameter {k!r}") for k, v in header["parameters"].items()}
    if "backbone" not in parameters and backbone is None:
        raise ValueError(
            f"The backbone of {path} was a module of your own, which the file does not hold: "
            "give it as load(path, backbone=module)."
        )
    if "backbone" in parameters and backbone is not None:
        raise ValueError(
            f"{path} names its own backbone, {parameters['backbone']!r}: leave `backbone` out."
        )
    estimator.set_params(**{"backbone": backbone, **parameters})
    check_parameters(estimator)
    return estimator


def _restore_fit(estimator: BaseEstimator, header: dict, tensors: Tensors, path: str) -> None:
    attributes = _attributes(header)
    backbone = _backbone(estimator, header, _taken(tensors, "backbone/"), path)
    of_tuned = {key: attributes.pop(key) for key in _OF_TUNED if key in attributes}
    # An extractor's columns may be the first groups only: `cache_layers` are for the store.
    widths = list(accumulate(width for _, width in backbone.feature_groups))
    n_columns, n_features = attributes["_n_image_columns"], attributes["n_features_out_"]
    allowed = [n_columns * width for width in (widths[-1:] if of_tuned else widths)]
    _require(n_features in allowed, f"its n_features_out_ is {n_features}, not {allowed[-1]}")
    estimator.backbone_, estimator.bad_images_ = backbone, []
    for key, value in attributes.items():
        setattr(estimator, key, value)
    if of_tuned:
        estimator._tuned = _tuned_network(estimator, of_tuned, tensors)
    _require(not tensors, f"it holds unknown tensors {sorted(tensors)[:5]}")


def _attributes(header: dict) -> dict:
    """Decode the fitted attributes and check their types."""
    expected = _CLASSES[_NAMES[header["class"]]]
    given = header["attributes"]
    is_known = set(given) - {"feature_names_in_"} == set(expected)
    _require(is_known, f"its fitted attributes are {sorted(given)}")
    attributes: dict = {key: _decoded(value, key) for key, value in given.items()}
    for key, value in attributes.items():
        kind = expected.get(key, np.ndarray)
        _require(type(value) is kind, f"its {key} is of type {type(value).__name__}")
        _require(kind is not int or value >= 0, f"its {key} is {value}")
    return attributes


def _backbone(estimator: BaseEstimator, header: dict, own: Tensors, path: str) -> Backbone:
    from sktransfer.networks._backbone import load_backbone, with_cached_layers

    backbone, pooling = estimator.backbone, estimator.pooling
    layer = with_cached_layers(estimator.layer, getattr(estimator, "cache_layers", None))
    if own and isinstance(backbone, str):
        from sktransfer.fine_tuning._module import with_own_weights

        settings = _decoded(header["preprocessing"], "preprocessing")
        try:
            preprocessing = Preprocessing(**settings)  # type: ignore[arg-type]
            return with_own_weights(backbone, _torch(own), layer, pooling, preprocessing)
        except (RuntimeError, TypeError) as error:
            raise _Refused(f"its weights do not fit {backbone!r}: {error}") from error
    loaded = load_backbone(
        backbone,
        weights=estimator.weights,
        layer=layer,
        pooling=pooling,
        preprocessing=estimator.preprocessing,
    )
    if loaded.fingerprint != header["fingerprint"]:
        raise ValueError(
            f"{path} was written with other weights than backbone={backbone!r}, "
            f"weights={estimator.weights!r} gives here, so it would predict differently. Use "
            "the same weights file, or write it with save(..., standalone=True)."
        )
    return loaded


def _tuned_network(estimator: BaseEstimator, of_tuned: dict, tensors: Tensors) -> TunedNetwork:
    import torch

    from sktransfer.fine_tuning._head import make_head
    from sktransfer.fine_tuning._module import TunedNetwork

    backbone, n_columns = estimator.backbone_, estimator._n_image_columns
    state = {key: tensor.float() for key, tensor in _torch(_taken(tensors, "head/")).items()}
    try:
        # On the meta device a head of a size that does not fit takes no memory.
        with torch.device("meta"):
            width = n_columns * backbone.n_features
            head = make_head(estimator.head, width, estimator._n_outputs, estimator.dropout)
        head.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError) as error:
        raise _Refused(f"its head does not fit: {error}") from error
    tuned = TunedNetwork(backbone, head, n_columns, precision=estimator.precision, **of_tuned)
    trained = _taken(tensors, "trained/")
    is_right = of_tuned["first_trained_stage"] <= len(tuned.stage_names)
    is_right = is_right and tuned.expected_state() == {k: v.shape for k, v in trained.items()}
    _require(is_right, "its trained tensors are not those of the stages that it names")
    tuned.load_trained_state(trained)
    return tuned


def _decoded(value: object, what: str) -> object:
    try:
        return decode(value)  # type: ignore[arg-type]
    except ValueError as error:
        raise _Refused(f"its {what} is not of a known kind: {error}") from error


def _taken(tensors: Tensors, prefix: str) -> Tensors:
    """Take the tensors with this prefix out, and return them without it."""
    keys = [key for key in tensors if key.startswith(prefix)]
    return {key.removeprefix(prefix): tensors.pop(key) for key in keys}


def _torch(tensors: Tensors) -> dict:
    import torch

    return {key: torch.from_numpy(np.array(array)) for key, array in tensors.items()}
