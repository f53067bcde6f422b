"""``save`` and ``load``: a checked JSON header and tensors, in one safetensors file.

Nothing in a file is ever run: no pickle is read, classes are looked up in a short list, and what
is not known is refused before anything is made of it.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from sktransfer._atomic_write import whole_file
from sktransfer._jsonable import decode, encode
from sktransfer._version import __version__
from sktransfer.networks._preprocessing import Preprocessing

FORMAT = 1
_KEY = "sktransfer"
_MAX_HEADER_BYTES = 32 * 2**20

_COMMON: dict[str, type] = {"n_features_in_": int, "n_features_out_": int, "_n_image_columns": int}
_TUNED: dict[str, type] = {
    **_COMMON,
    "history_": list,
    "n_iter_": int,
    "best_epoch_": int,
    "_blind_scores": np.ndarray,
    "_lowest": int,
    "_moves_statistics": bool,
}
# Class -> its fitted attributes that a file holds, and their types.
_CLASSES: dict[str, dict[str, type]] = {
    "PretrainedFeatureExtractor": _COMMON,
    "FineTuningClassifier": {**_TUNED, "classes_": np.ndarray, "_kind": str},
    "FineTuningRegressor": {
        **_TUNED,
        "_n_targets": int,
        "_is_flat": bool,
        "_target_mean": np.ndarray,
        "_target_scale": np.ndarray,
    },
}
# What belongs to a machine rather than to a model comes back as its default.
_OF_THE_MACHINE = ("memory", "device", "n_jobs", "verbose", "callbacks")


def save(estimator: Any, path: str | os.PathLike, *, standalone: bool = False) -> None:
    """Write a fitted estimator to a file that is safe to open.

    Parameters
    ----------
    estimator : PretrainedFeatureExtractor, FineTuningClassifier or FineTuningRegressor
    path : str or Path
        By custom it ends in ``.safetensors``.
    standalone : bool, default=False
        Whether the file holds all of the network's weights. Otherwise it holds those that were
        trained, and how to bring back the others, with their digest. What came from a file that
        stands alone is written as one.

    Raises
    ------
    ValueError
        If parameters were changed after `fit`, so that nobody could open the file; none is
        written.
    TypeError
        If a parameter or the labels are of a type that a file cannot hold.
    OSError
        If `path` cannot be written, as ``open`` would say.

    See Also
    --------
    load : Bring it back.

    Notes
    -----
    `memory`, `device`, `n_jobs`, `verbose` and `callbacks` are not kept. Parameters that are
    functions or modules cannot be written, but for a module as `backbone`, which `load` takes
    again; pickle keeps them. Labels may be NumPy's numbers, booleans, strings and times, and
    strings as objects. Other objects (tuples, ``datetime.date``, pandas' periods and intervals)
    cannot be written as labels: give `fit` their strings, or use pickle.

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

    kind: Any = type(estimator)
    name = kind.__name__
    if name not in _CLASSES or kind is not _class(name):
        raise TypeError(f"save writes {list(_CLASSES)}; got {estimator!r}.")
    check_is_fitted(estimator)
    is_named = isinstance(estimator.backbone, str)
    standalone = standalone or (is_named and estimator.backbone_.has_own_weights)
    tensors: dict[str, np.ndarray] = {}
    attributes = {}
    for key in _CLASSES[name]:
        if key not in ("_lowest", "_moves_statistics"):
            attributes[key] = getattr(estimator, key)
    if hasattr(estimator, "feature_names_in_"):
        attributes["feature_names_in_"] = estimator.feature_names_in_
    if "_tuned" in vars(estimator):
        tuned = estimator._tuned
        attributes |= {"_lowest": tuned.lowest, "_moves_statistics": tuned.moves_statistics}
        tensors |= {f"trained/{k}": v for k, v in tuned.trained_state().items()}
        state = tuned.head.state_dict()
        tensors |= {f"head/{k}": v.detach().cpu().numpy() for k, v in state.items()}
    if standalone:
        state = estimator.backbone_.network.module.state_dict()
        tensors |= {f"backbone/{k}": v.detach().cpu().numpy() for k, v in state.items()}
    parameters = {
        k: v
        for k, v in estimator.get_params(deep=False).items()
        if k not in _OF_THE_MACHINE and (k != "backbone" or is_named)
    }
    header = {
        "format": FORMAT,
        "version": __version__,
        "class": name,
        "fingerprint": estimator.backbone_.fingerprint,
        "standalone": bool(standalone),
        "preprocessing": encode(_settings(estimator.backbone_.preprocessing), "preprocessing"),
        "parameters": {k: encode(v, f"the parameter {k}") for k, v in parameters.items()},
        "attributes": {k: encode(v, k) for k, v in attributes.items()},
    }
    contiguous = {k: np.array(v, order="C") for k, v in tensors.items()}
    with whole_file(os.fsdecode(path)) as part:
        save_file(contiguous, part, metadata={_KEY: json.dumps(header)})
        _check_opens(part, estimator, None if is_named else estimator.backbone)


def _check_opens(part: Path, estimator: Any, backbone: Any) -> None:
    """Parameters may have been changed since the fit, and then do not fit what it left."""
    try:
        again = load(part, backbone=backbone)
        if again.backbone_.cut != estimator.backbone_.cut:
            raise ValueError("it would embed otherwise than what was fitted.")
    except ValueError as error:
        raise ValueError(
            f"This {type(estimator).__name__} could not be loaded again, so it is not saved. Were "
            "parameters such as `head`, `weights`, `layer`, `pooling` or `preprocessing` changed "
            f"after fit? Fit again, or set them to what they were. (Loading says: {error})"
        ) from error


def load(path: str | os.PathLike, *, backbone: Any = None) -> Any:
    """Read a file that :func:`save` wrote.

    Parameters
    ----------
    path : str or Path
    backbone : nn.Module or callable, default=None
        The module that was the estimator's `backbone`, where that was no name.

    Returns
    -------
    estimator
        Fitted.

    Raises
    ------
    ValueError
        If the file is not one of ours, holds anything that is not known, or does not fit the
        weights that its backbone's name brings back.
    OSError
        If `path` cannot be read.
    """
    path = os.fsdecode(path)
    try:
        header, tensors = _read(path)
        cls = _class(header["class"])
        estimator = cls(**_parameters(cls, header, backbone, path))
        attributes = _attributes(header, path)
    except RecursionError as error:
        raise _refused(path, "its header is nested too deeply") from error
    estimator._validate_params()
    _check_consistent(estimator, attributes, path)
    estimator.backbone_ = _backbone(estimator, header, tensors, path)
    lowest, moves = attributes.pop("_lowest", None), attributes.pop("_moves_statistics", False)
    for key, value in attributes.items():
        setattr(estimator, key, value)
    estimator.bad_images_ = []
    widths = list(accumulate(width for _, width in estimator.backbone_.feature_groups))
    widths = [width * attributes["_n_image_columns"] for width in widths]
    # An extractor's columns may be the first groups alone: cache_layers are for the store.
    if attributes["n_features_out_"] not in (widths if lowest is None else widths[-1:]):
        raise _refused(path, f"{widths[-1]} columns do not agree with n_features_out_")
    if lowest is not None:
        estimator._tuned = _tuned_network(estimator, lowest, moves, tensors, path)
    elif tensors:
        raise _refused(path, f"unknown tensors {sorted(tensors)[:5]}")
    return estimator


def _read(path: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):
        pass  # safetensors' own errors do not say what is wrong with a folder
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise _refused(path, "it has no header of ours")
            if len(text) > _MAX_HEADER_BYTES:
                raise _refused(path, f"its header has {len(text)} characters")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError) as error:  # the last: dtypes beyond NumPy
        raise _refused(path, f"it is no safetensors file ({error})") from error
    try:
        header = json.loads(text)
    except ValueError as error:  # no JSON, or an integer that is too long
        raise _refused(path, f"its header is no JSON ({error})") from error
    expected = {
        "format": int, "version": str, "class": str, "fingerprint": str, "standalone": bool,
        "preprocessing": dict, "parameters": dict, "attributes": dict,
    }  # fmt: skip
    if not isinstance(header, dict) or "format" not in header:
        raise _refused(path, "its header names no format")
    if header["format"] != FORMAT:
        raise _refused(path, f"its format is {header['format']!r}, and this version reads {FORMAT}")
    if set(header) != set(expected):
        raise _refused(path, f"its header holds {sorted(header)}")
    for key, kind in expected.items():
        if type(header[key]) is not kind:
            raise _refused(path, f"{key!r} of its header is {header[key]!r}")
    if header["class"] not in _CLASSES:
        raise _refused(path, f"its class is {header['class']!r}, not one of {list(_CLASSES)}")
    return header, tensors


def _parameters(
    cls: type, header: dict[str, Any], backbone: Any, path: str | os.PathLike
) -> dict[str, Any]:
    known = set(cls._get_param_names()) - set(_OF_THE_MACHINE)  # type: ignore[attr-defined]
    if unknown := set(header["parameters"]) - known:
        raise _refused(path, f"{cls.__name__} has no parameters {sorted(unknown)}")
    parameters = {}
    for name, value in header["parameters"].items():
        try:
            parameters[name] = decode(value)
        except ValueError as error:
            raise _refused(path, f"its parameter {name!r} is {value!r}") from error
    if ("backbone" in parameters) == (backbone is not None):
        if backbone is None:
            raise ValueError(
                f"The backbone of {path} was a module of your own, which the file does not hold: "
                "give it as load(path, backbone=module)."
            )
        raise ValueError(
            f"{path} names its own backbone, {parameters['backbone']!r}: leave `backbone` out."
        )
    if backbone is not None:
        parameters["backbone"] = backbone
    return parameters


def _attributes(header: dict[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    expected = _CLASSES[header["class"]]
    given = header["attributes"]
    if set(given) - {"feature_names_in_"} != set(expected):
        raise _refused(path, f"its fitted attributes are {sorted(given)}")
    attributes = {}
    for key, value in given.items():
        kind = expected.get(key, np.ndarray)
        try:
            attributes[key] = decode(value)
        except ValueError as error:
            raise _refused(path, f"its {key} is no value of a known kind") from error
        if type(attributes[key]) is not kind:
            raise _refused(path, f"its {key} is of type {type(attributes[key]).__name__}")
        if kind is int and attributes[key] < 0:
            raise _refused(path, f"its {key} is {attributes[key]}")
    if attributes.get("_kind", "multiclass") not in ("multiclass", "multilabel"):
        raise _refused(path, f"its kind of target is {attributes['_kind']!r}")
    rows = attributes.get("history_", [])
    if not all(isinstance(row, dict) for row in rows):
        raise _refused(path, "its history_ is no list of dicts")
    return attributes


def _check_consistent(estimator: Any, attributes: dict[str, Any], path: str) -> None:
    """Refuse attributes that no fit leaves beside each other."""
    for key, value in attributes.items():
        is_float = isinstance(value, np.ndarray) and value.dtype.kind == "f"
        if is_float and not np.isfinite(value).all():
            raise _refused(path, f"its {key} holds NaN or infinity")
    n_features, n_columns = attributes["n_features_in_"], attributes["_n_image_columns"]
    if n_columns < 1 or (estimator.image_shape is None and n_features != n_columns):
        raise _refused(path, f"{n_features} columns of X do not hold {n_columns} images")
    names = attributes.get("feature_names_in_")
    if names is not None and (names.dtype != object or len(names) != n_features):
        raise _refused(path, f"its feature_names_in_ are not those of {n_features} columns")
    n_outputs = attributes.get("_n_targets", 1)
    if "classes_" in attributes:
        classes, n_outputs = attributes["classes_"], len(attributes["classes_"])
        is_multiclass = attributes["_kind"] == "multiclass"
        expected = np.unique(classes) if is_multiclass else np.arange(n_outputs)
        if n_outputs < 2 or not np.array_equal(classes, expected):
            raise _refused(path, "its classes_ are not several different ones in order")
    elif attributes.get("_is_flat") and n_outputs != 1:
        raise _refused(path, f"{n_outputs} targets do not make one column")
    for key in ("_blind_scores", "_target_mean", "_target_scale"):
        array = attributes.get(key)
        if array is not None and (array.dtype != np.float64 or array.shape != (n_outputs,)):
            raise _refused(path, f"its {key} is not a number for each of {n_outputs} outputs")


def _backbone(
    estimator: Any,
    header: dict[str, Any],
    tensors: dict[str, np.ndarray],
    path: str | os.PathLike,
) -> Any:
    from sktransfer.networks._backbone import load_backbone, with_cached_layers

    own = {k: tensors.pop(k) for k in list(tensors) if k.startswith("backbone/")}
    if header["standalone"] != bool(own):
        raise _refused(path, "it says of itself wrongly whether it stands alone")
    is_named = isinstance(estimator.backbone, str)
    layer = with_cached_layers(estimator.layer, getattr(estimator, "cache_layers", None))
    arguments = {"layer": layer, "pooling": estimator.pooling}
    arguments["preprocessing"] = estimator.preprocessing
    if not own or not is_named:
        backbone = load_backbone(estimator.backbone, weights=estimator.weights, **arguments)
        if backbone.fingerprint != header["fingerprint"]:
            raise ValueError(
                f"{path} was written with other weights than backbone={estimator.backbone!r}, "
                f"weights={estimator.weights!r} gives here, so it would predict differently. Use "
                "the same weights file, or write it with save(..., standalone=True)."
            )
        return backbone
    return _standalone_backbone(estimator, own, header, path)


def _standalone_backbone(
    estimator: Any, own: dict[str, np.ndarray], header: dict[str, Any], path: Any
) -> Any:
    import torch

    from sktransfer.fine_tuning._tuned_network import with_own_weights
    from sktransfer.networks._backbone import with_cached_layers

    state = {k.partition("/")[2]: torch.from_numpy(np.array(v)) for k, v in own.items()}
    try:
        preprocessing = Preprocessing(**decode(header["preprocessing"]))
        return with_own_weights(
            estimator.backbone,
            state,
            with_cached_layers(estimator.layer, getattr(estimator, "cache_layers", None)),
            estimator.pooling,
            preprocessing,
        )
    except (RuntimeError, TypeError) as error:
        raise _refused(path, f"its weights do not fit {estimator.backbone!r}: {error}") from error


def _settings(preprocessing: Any) -> dict[str, Any]:
    return asdict(preprocessing) if isinstance(preprocessing, Preprocessing) else {}


def _tuned_network(
    estimator: Any, lowest: int, moves: bool, tensors: dict[str, np.ndarray], path: Any
) -> Any:
    import torch

    from sktransfer.fine_tuning._head import make_head
    from sktransfer.fine_tuning._tuned_network import TunedNetwork

    backbone, n_columns = estimator.backbone_, estimator._n_image_columns
    state = {
        k.partition("/")[2]: torch.from_numpy(np.array(tensors.pop(k))).float()
        for k in list(tensors)
        if k.startswith("head/")
    }
    width = n_columns * backbone.n_features
    try:
        # What the file says of its size takes no memory before it is known to fit.
        with torch.device("meta"):
            head = make_head(estimator.head, width, estimator._n_outputs, estimator.dropout)
        head.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError) as error:
        raise _refused(path, f"its head does not fit: {error}") from error
    tuned = TunedNetwork(
        backbone, head, n_columns, lowest, moves_statistics=moves, precision=estimator.precision
    )
    trained = {
        k.partition("/")[2]: tensors.pop(k) for k in list(tensors) if k.startswith("trained/")
    }
    if tensors:
        raise _refused(path, f"unknown tensors {sorted(tensors)[:5]}")
    expected = tuned.expected_state() if lowest <= len(tuned.stage_names) else None
    if expected is None or expected != {k: v.shape for k, v in trained.items()}:
        raise _refused(path, "its trained tensors are not those of the stages it says it trained")
    tuned.load_trained_state(copy.copy(trained))
    return tuned


def _class(name: str) -> type:
    import sktransfer

    return getattr(sktransfer, name)


def _refused(path: Any, reason: str) -> ValueError:
    return ValueError(
        f"{path} is not opened: {reason}. sktransfer.load reads what sktransfer.save of this "
        "version wrote, and nothing else."
    )
