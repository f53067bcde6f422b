"""Make estimators from the JSON and tensors of a file."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from sktransfer.embedding._extractor import PretrainedFeatureExtractor
from sktransfer.embedding._text_extractor import PretrainedTextExtractor
from sktransfer.fine_tuning._classifier import FineTuningClassifier
from sktransfer.fine_tuning._regressor import FineTuningRegressor
from sktransfer.networks._preprocessing import Preprocessing
from sktransfer.saving._archive import Refused, read, require
from sktransfer.saving._classical import check_types, loads
from sktransfer.saving._jsonable import Decoder
from sktransfer.saving._own_code import warn_of_changes

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator
    from torch import nn

    from sktransfer.fine_tuning._module import TunedNetwork
    from sktransfer.networks._backbone import Backbone
    from sktransfer.networks._sources import Source
    from sktransfer.saving._archive import Tensors

FORMAT = 3
# Each entry of the header, and its type.
_HEADER = {"format": (int,), "version": (str,), "estimators": (list,)}
# The entries of an estimator; `fit` is None if it is not fitted.
_NONE = type(None)
_RECORD = {"class": (str,), "parameters": (dict,), "needs": (dict,), "network": (int, _NONE)}
_RECORD |= {"output": (str, _NONE), "routing": (dict,), "fit": (dict, _NONE)}
_FIT: dict[str, tuple] = {
    "weights": (str,),
    "preprocessing": (dict, _NONE),
    "attributes": (dict,),
    "training": (list,),
}

# Class -> the fitted attributes that a file holds, and their types.
_COMMON: dict[str, type] = {"n_features_in_": int, "n_features_out_": int, "_n_image_columns": int}
TUNED_ATTRIBUTES: dict[str, type] = {"first_trained_stage": int, "moves_statistics": bool}
_TUNED = _COMMON | TUNED_ATTRIBUTES | {"history_": list, "n_iter_": int, "best_epoch_": int}
CLASSES: dict[type, dict[str, type]] = {
    PretrainedFeatureExtractor: _COMMON,
    PretrainedTextExtractor: _COMMON | {"_word_weights": dict},
    FineTuningClassifier: _TUNED
    | {"classes_": np.ndarray, "class_priors_": np.ndarray, "_kind": str},
    FineTuningRegressor: _TUNED
    | {"_n_targets": int, "_is_flat": bool}
    | {"_target_mean": np.ndarray, "_target_scale": np.ndarray},
}
NAMES = {cls.__name__: cls for cls in CLASSES}
# Parameters of a machine rather than of a model: `load` sets their defaults.
OF_MACHINE = ("memory", "device", "n_jobs", "verbose")
ROUTED = ("fit", "partial_fit", "score")
# Names of networks in a hub or on another machine's share.
_REMOTE_NAMES = re.compile(r"timm:.*:|[/\\]{2}")
# Names of networks in a folder, which is not read if the file holds the weights.
_FOLDER_NAMES = ("hf:", "vectors:", "static:")


class Reader:
    """Makes the estimators of a file; with `trusted` None, everything is trusted."""

    def __init__(
        self,
        path: str,
        *,
        weights: str | os.PathLike | None = None,
        backbone: object = None,
        head: object = None,
        trusted: Collection[str] | None,
    ):
        self.path, self.weights, self.trusted = path, weights, trusted
        self.given = {"backbone": backbone, "head": head}
        self.tensors: Tensors = {}
        self._networks: dict[int, Source | nn.Module] = {}

    def read(self) -> tuple[BaseEstimator, list[BaseEstimator]]:
        """Return what was saved, and the estimators of ours in it."""
        header, self.tensors = read(self.path)
        records = _checked_records(header)
        data = self.tensors.pop("skops", None)
        classical = b"" if data is None else data.numpy().tobytes()
        if classical:
            check_types(classical, self.trusted, self.path)
        self._check_given(records)
        ours = [self._estimator(i, record) for i, record in enumerate(records)]
        require(not self.tensors, f"it holds unknown tensors {sorted(self.tensors)[:5]}")
        require(bool(classical) or len(ours) == 1, f"it holds {len(ours)} estimators, not joined")
        return (loads(classical, ours) if classical else ours[0]), ours

    def _check_given(self, records: list[dict]) -> None:
        needs = {role: any(role in record["needs"] for record in records) for role in self.given}
        needs["weights"] = any(map(_names_file, (record["parameters"] for record in records)))
        for name, value in {**self.given, "weights": self.weights}.items():
            if value is not None and not needs[name]:
                raise ValueError(f"{self.path} needs no {name} of yours: leave `{name}` out.")

    # -- parameters ---------------------------------------------------------------------------
    def _estimator(self, i: int, record: dict) -> BaseEstimator:
        from sktransfer._validation import check_parameters

        estimator, decoder = NAMES[record["class"]](backbone="builtin"), Decoder(self.tensors)
        known = set(estimator.get_params(deep=False)) - set(OF_MACHINE) - set(record["needs"])
        unknown = sorted(set(record["parameters"]) - known)
        require(not unknown, f"{record['class']} has no parameters {unknown} in a file")
        parameters = {
            key: _decoded(decoder, value, f"parameter {key!r}", key)
            for key, value in record["parameters"].items()
        }
        # The network of an estimator that is not fitted, as in a ColumnTransformer, is not loaded.
        self._check_names(parameters, record["network"] is not None or record["fit"] is None)
        if self.weights is not None and _names_file(parameters):
            parameters["weights"] = self.weights
        for role in record["needs"]:
            parameters[role] = self._own_module(role, record)
        estimator.set_params(**parameters)
        check_parameters(estimator)
        _restore_output_and_routing(estimator, record)
        if record["fit"] is not None:
            attributes = _attributes(record, decoder)
            settings = _decoded(decoder, record["fit"]["preprocessing"], "preprocessing")
            backbone = self._backbone(estimator, record, settings)
            self._restore_fit(i, estimator, backbone, attributes)
            training = _decoded(decoder, record["fit"]["training"], "training")
            if training and hasattr(estimator, "_tuned"):
                tensors = _pop_prefix(self.tensors, f"{i}/training/")
                _restore_training(estimator._tuned, training, tensors)
        return estimator

    def _check_names(self, parameters: dict, is_standalone: bool) -> None:
        for key in ("backbone", "weights"):
            name = parameters.get(key)
            trusted = [name] if self.trusted is None else self.trusted
            if not isinstance(name, str) or name in trusted:
                continue
            if _REMOTE_NAMES.match(name) or (name.startswith(_FOLDER_NAMES) and not is_standalone):
                raise ValueError(
                    f"{self.path} names {key}={name!r}, which a hub, a folder or another machine "
                    "holds. If you know where the file comes from, load it with "
                    f"load(path, trusted=[{name!r}])."
                )

    def _own_module(self, role: str, record: dict) -> object:
        """Return the user's module for a role, with its weights if the file holds them."""
        from torch import nn

        label, code = record["needs"][role]
        module = self.given[role]
        module = module.get(label) if isinstance(module, Mapping) else module
        is_module = isinstance(module, nn.Module) or (role == "backbone" and callable(module))
        if not is_module:
            has_weights = role == "head" or record["network"] is not None
            raise ValueError(
                f"The {role} of {self.path} was a module of your own, {label}, whose code a file "
                f"does not hold: give it as load(path, {role}=module), with "
                f"{'any' if has_weights else 'its'} weights. If there are several, give a dict: "
                f"{{{label!r}: module, …}}."
            )
        if role == "backbone" and record["network"] is not None:
            module = self._network(record["network"], label, module)
        if isinstance(module, nn.Module):
            warn_of_changes(module, code, self.path)
        return module

    def _network(self, k: int, name: str, module: object = None) -> Source | nn.Module:
        """Return a network with the weights of the file: a source by name, or the given module."""
        from sktransfer.networks._backbone import resolve_source
        from sktransfer.networks._published import saved_source

        if k not in self._networks:
            state = _pop_prefix(self.tensors, f"networks/{k}/")
            require(bool(state), f"it holds no weights for {name!r}")
            if module is None:
                self._networks[k] = saved_source(name, state)
                return self._networks[k]
            own = copy.deepcopy(resolve_source(module, "DEFAULT").module)  # type: ignore[attr-defined]
            try:
                own.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(
                    f"The module given as backbone does not take the weights of {self.path}: "
                    f"{error}"
                ) from error
            self._networks[k] = own
        return self._networks[k]

    # -- fitted attributes --------------------------------------------------------------------
    def _backbone(self, estimator: BaseEstimator, record: dict, settings: object) -> Backbone:
        from sktransfer.networks._weights import may_download

        network, weights = estimator.backbone, estimator.weights
        is_own, is_standalone = not isinstance(network, str), record["network"] is not None
        if is_standalone:
            network = network if is_own else self._network(record["network"], network)
            weights = "DEFAULT"
        # A file may name any published network, but only trusted ones are downloaded.
        is_trusted = self.trusted is None or network in self.trusted
        token = may_download.set(is_trusted)
        try:
            given = {"backbone": network, "weights": weights}
            if settings is not None:  # those of fit, as the meaning of "auto" may change
                given["preprocessing"] = Preprocessing(**settings)  # type: ignore[arg-type]
            backbone = estimator._load(**given)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} {self.path} holds no weights of its own: give the place of the weights "
                "file as load(path, weights=...), or write it with save(..., standalone=True)."
            ) from error
        except (RuntimeError, TypeError, OverflowError) as error:
            raise Refused(f"its network cannot be built ({error})") from error
        finally:
            may_download.reset(token)
        backbone.is_standalone = is_standalone
        if not is_standalone and backbone.weights_digest != record["fit"]["weights"]:
            name = record["needs"]["backbone"][0] if is_own else network
            raise ValueError(
                f"{self.path} was written with other weights than backbone={name!r}, "
                f"weights={weights!r} gives here, so it would predict differently. Use the same "
                "weights, or write it with save(..., standalone=True)."
            )
        return backbone

    def _restore_fit(
        self, i: int, estimator: BaseEstimator, backbone: Backbone, attributes: dict
    ) -> None:
        of_tuned = {key: attributes.pop(key) for key in TUNED_ATTRIBUTES if key in attributes}
        # The columns of an extractor are the first groups; those of `cache_layers` are only stored.
        widths = list(accumulate(width for _, width in backbone.feature_groups))
        n_columns, n_features = attributes["_n_image_columns"], attributes["n_features_out_"]
        allowed = [n_columns * width for width in (widths[-1:] if of_tuned else widths)]
        require(n_features in allowed, f"its n_features_out_ is {n_features}, not {allowed[-1]}")
        estimator.backbone_ = backbone
        setattr(estimator, f"bad_{estimator._content}_", [])
        for key, value in attributes.items():
            setattr(estimator, key, value)
        if of_tuned:
            trained = _pop_prefix(self.tensors, f"{i}/trained/")
            head = _pop_prefix(self.tensors, f"{i}/head/")
            estimator._tuned = _tuned_network(estimator, of_tuned, trained, head)


def _checked_records(header: object) -> list[dict]:
    require(isinstance(header, dict) and "format" in header, "its header names no format")
    assert isinstance(header, dict)
    version = header["format"]
    require(version == FORMAT, f"its format is {version!r}, and this version reads {FORMAT}")
    _check_entries(header, _HEADER, "its header")
    for record in header["estimators"]:
        _check_entries(record, _RECORD, "an estimator in it")
        name = record["class"]
        require(name in NAMES, f"its class is {name!r}, not one of {list(NAMES)}")
        if record["fit"] is not None:
            _check_entries(record["fit"], _FIT, "an estimator in it")
        for role, need in record["needs"].items():
            is_right = role in ("backbone", "head") and isinstance(need, list)
            is_right = is_right and list(map(type, need)) == [str, dict]
            require(is_right, f"it needs {role!r} as {need!r}")
    return header["estimators"]


def _check_entries(given: object, expected: Mapping[str, tuple], what: str) -> None:
    is_right = isinstance(given, dict) and set(given) == set(expected)
    is_right = is_right and all(type(given[key]) in expected[key] for key in expected)  # type: ignore[index]
    require(is_right, f"{what} does not hold {sorted(expected)}, each of its type")


def _names_file(parameters: Mapping) -> bool:
    from sktransfer.networks._sources import is_path

    return is_path(parameters.get("weights"))


def _decoded(decoder: Decoder, value: object, what: str, parameter: str = "") -> object:
    try:
        return decoder.decode(value, parameter)  # type: ignore[arg-type]
    except ValueError as error:
        raise Refused(f"its {what} is not of a known kind: {error}") from error


def _attributes(record: dict, decoder: Decoder) -> dict:
    """Decode the fitted attributes and check their types."""
    expected, given = CLASSES[NAMES[record["class"]]], record["fit"]["attributes"]
    is_known = set(given) - {"feature_names_in_"} == set(expected)
    require(is_known, f"its fitted attributes are {sorted(given)}")
    attributes: dict = {key: _decoded(decoder, value, key) for key, value in given.items()}
    for key, value in attributes.items():
        kind = expected.get(key, np.ndarray)
        require(type(value) is kind, f"its {key} is of type {type(value).__name__}")
        require(kind is not int or value >= 0, f"its {key} is {value}")
        is_finite = kind is not np.ndarray or value.dtype.kind != "f" or np.isfinite(value).all()
        require(key == "classes_" or bool(is_finite), f"its {key} is not finite")
    return attributes


def _restore_output_and_routing(estimator: BaseEstimator, record: dict) -> None:
    """Restore the output's container and the metadata requests."""
    from sklearn import config_context

    try:
        if record["output"] is not None:
            is_known = record["output"] in ("default", "pandas", "polars")
            require(is_known, f"its output is {record['output']!r}")
            estimator.set_output(transform=record["output"])
        with config_context(enable_metadata_routing=True):
            for method, requests in record["routing"].items():
                require(method in ROUTED, f"it routes metadata to {method!r}")
                getattr(estimator, f"set_{method}_request")(**requests)
    except (TypeError, AttributeError) as error:
        raise Refused(f"its settings cannot be restored: {error}") from error


def _tuned_network(
    estimator: BaseEstimator, of_tuned: dict, trained: Tensors, state: Tensors
) -> TunedNetwork:
    import torch

    from sktransfer.fine_tuning._head import make_head
    from sktransfer.fine_tuning._module import TunedNetwork

    backbone, n_columns = estimator.backbone_, estimator._n_image_columns
    is_own = isinstance(estimator.head, torch.nn.Module)
    what = "the head given" if is_own else "its head"
    try:
        # On the meta device, a head of a wrong size takes no memory.
        with torch.device("cpu" if is_own else "meta"):
            width = n_columns * backbone.n_features
            head = make_head(estimator.head, width, estimator._n_outputs, estimator.dropout)
        kinds = {key: tensor.dtype for key, tensor in head.state_dict().items()}
        is_right = kinds == {key: tensor.dtype for key, tensor in state.items()}
        require(is_right, f"{what} does not fit: saved were {list(state)}, not {list(kinds)}")
        head.load_state_dict(state, assign=not is_own)
    except (RuntimeError, TypeError) as error:
        raise Refused(f"{what} does not fit: {error}") from error
    tuned = TunedNetwork(backbone, head, n_columns, precision=estimator.precision, **of_tuned)
    is_right = of_tuned["first_trained_stage"] <= len(tuned.stage_names)
    is_right = is_right and tuned.expected_state() == {k: v.shape for k, v in trained.items()}
    require(is_right, "its trained tensors are not those of the stages that it names")
    _check_finite({**trained, **state})
    tuned.load_trained_state({key: tensor.numpy() for key, tensor in trained.items()})
    return tuned


def _restore_training(tuned: TunedNetwork, plain: object, tensors: Tensors) -> None:
    """Restore the state for the next epoch of partial_fit."""
    from sktransfer.fine_tuning._training_state import TrainingState

    kinds = [str, list, list, dict]
    is_right = isinstance(plain, list) and [type(part) for part in plain] == kinds
    require(is_right, "its state of training is of an unknown kind")
    assert isinstance(plain, list)
    names = [*tensors, *plain[3]]
    is_right = all(isinstance(name, str) and re.fullmatch(r"\d{1,6}\.\w+", name) for name in names)
    is_right = is_right and all(isinstance(part, dict) for part in (*plain[1], *plain[2]))
    require(is_right, "its state of training is of an unknown kind")
    _check_finite(tensors)
    optimizer, history, rates, numbers = plain
    tuned.set_training_state(TrainingState(optimizer, history, rates, numbers, tensors))


def _check_finite(state: Tensors) -> None:
    for name, tensor in state.items():
        is_finite = not tensor.is_floating_point() or bool(tensor.isfinite().all())
        require(is_finite, f"its trained tensor {name!r} is not finite")


def _pop_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """Remove the tensors with this prefix, and return them by the rest of their names."""
    keys = [key for key in tensors if key.startswith(prefix)]
    return {key.removeprefix(prefix): tensors.pop(key) for key in keys}
