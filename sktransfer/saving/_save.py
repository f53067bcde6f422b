"""``save`` and ``load``: write a fitted estimator or pipeline to a file that is safe to open.

The file holds JSON and tensors (see ``_archive``). Nothing in it is run: no pickle is read, classes
come from short lists, and a file that holds anything unknown is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sktransfer._progress import warn
from sktransfer._threads import own_settings
from sktransfer._version import __version__
from sktransfer.networks._preprocessing import Preprocessing
from sktransfer.saving._archive import Refused, atomic_write, write
from sktransfer.saving._classical import split_estimators
from sktransfer.saving._jsonable import Encoder
from sktransfer.saving._own_code import code_of
from sktransfer.saving._read import (
    CLASSES,
    FORMAT,
    NAMES,
    OF_MACHINE,
    ROUTED,
    TUNED_ATTRIBUTES,
    Reader,
)

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator
    from torch import nn

    from sktransfer.fine_tuning._module import TunedNetwork
    from sktransfer.networks._backbone import Backbone
    from sktransfer.saving._archive import Tensors

# Parameters that predictions do not need, so that they may be missing in a file.
_OF_TRAINING = {"loss", "optimizer", "augment", "callbacks", "early_stopping"}
_OF_TRAINING |= {"class_weight", "random_state"}


# -- saving ----------------------------------------------------------------------------------
def save(estimator: BaseEstimator, path: str | os.PathLike, *, standalone: bool = False) -> None:
    """Write a fitted estimator, or a pipeline that holds some, to a file that is safe to open.

    Parameters
    ----------
    estimator : estimator
        A PretrainedFeatureExtractor, PretrainedTextExtractor, FineTuningClassifier or
        FineTuningRegressor; or an estimator of scikit-learn that contains one: a pipeline, a column
        transformer, a union, a search, a voting or stacking classifier … (extra ``skops``).
    path : str or Path
        By convention it ends in ``.safetensors``.
    standalone : bool, default=False
        Whether the file holds all weights of the networks. Otherwise it holds those that were
        trained, and the names and digests of the others. An estimator from a standalone file is
        always saved to a standalone file.

    Raises
    ------
    ValueError
        If parameters were changed after `fit` so that the file could not be loaded. No file is
        written then.
    TypeError
        If a parameter, a classical step or the labels cannot be written; the message names it.
    OSError
        If `path` cannot be written, as on a full disk. A file that was there before is kept.

    Warns
    -----
    UserWarning
        If `loss`, `optimizer`, `augment`, `callbacks`, `early_stopping`, `class_weight` or
        `random_state` cannot be written. They are left out, as prediction does not need them.

    See Also
    --------
    load : Read the file.

    Notes
    -----
    `memory`, `device`, `n_jobs` and `verbose` are not saved. Classes of torch, torchvision and
    skorch, ``functools.partial`` of them, and splitters of scikit-learn are written by name and
    parameters. A module of yours that was given as `backbone` or `head` has to be given to `load`
    again, as a file holds no code; the weights of a head are in the file, those of a backbone with
    ``standalone=True``. Labels may be NumPy numbers, booleans, strings and times, and strings in an
    object array. Other labels (tuples, ``datetime.date``, pandas' periods and intervals) cannot be
    saved: give `fit` their strings.

    Classical steps are written by :mod:`skops.io`. Saving reads the new file back before it
    replaces an old one. If the process is killed meanwhile, a hidden folder
    ``.sktransfer-….part`` stays beside `path` and can be deleted.

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
    from sklearn.utils.validation import check_is_fitted

    path, ours, dumps = os.fsdecode(path), [estimator], None
    if type(estimator) not in CLASSES:
        if not (hasattr(estimator, "fit") and hasattr(estimator, "get_params")):
            ours = []
        else:
            ours, dumps = split_estimators(estimator, CLASSES.keys())
        if not ours:
            raise TypeError(
                f"save writes {list(NAMES)}, and pipelines and searches that hold one of them; "
                f"got {estimator!r}."
            )
    check_is_fitted(estimator)
    writer = _Writer(standalone)
    records = [writer.record(i, own) for i, own in enumerate(ours)]
    if dumps is not None:
        import torch

        writer.tensors["skops"] = torch.from_numpy(np.array(bytearray(dumps()), np.uint8))
    header = {"format": FORMAT, "version": __version__, "estimators": records}
    with atomic_write(path) as part:
        write(part, header, writer.tensors)
        _check_loads(part, estimator, ours, writer.modules)
    if writer.left_out:
        warn(
            f"{path} does not hold {'; '.join(writer.left_out)}: only plain values, and classes of "
            "torch, torchvision, skorch and splitters of scikit-learn with plain parameters can be "
            "saved. The loaded model predicts the same and has the default there."
        )


class _Writer:
    """Collects the tensors of a file, and the parameters that it cannot hold."""

    def __init__(self, standalone: bool):
        self.standalone = standalone
        self.tensors: Tensors = {}
        self.left_out: dict[str, None] = {}  # an ordered set
        self.modules: dict[str, dict[str, object]] = {"backbone": {}, "head": {}}
        self._encoder = Encoder(self.tensors)
        self._labels: dict[tuple[str, str, str], str] = {}
        self._networks: dict[str, int] = {}

    def record(self, i: int, estimator: BaseEstimator) -> dict:
        """Describe the `i`-th estimator of the file."""
        parameters = estimator.get_params(deep=False)
        for key in OF_MACHINE:
            del parameters[key]
        roles = [
            r for r in self.modules if not isinstance(parameters.get(r, ""), (str, list, tuple))
        ]
        needs = {role: self._need(role, parameters.pop(role)) for role in roles}
        backbone = vars(estimator).get("backbone_")
        requests = (
            estimator.get_metadata_routing() if "_metadata_request" in vars(estimator) else None
        )
        return {
            "class": type(estimator).__name__,
            "parameters": self._parameters(type(estimator).__name__, parameters),
            "needs": needs,
            "network": self._network(estimator, backbone),
            "output": vars(estimator).get("_sklearn_output_config", {}).get("transform"),
            "routing": {m: dict(getattr(requests, m).requests) for m in ROUTED if requests},
            "fit": None if backbone is None else self._fit(i, estimator, backbone),
        }

    def _parameters(self, name: str, parameters: dict) -> dict:
        encoded = {}
        for key, value in parameters.items():
            before = set(self.tensors)
            try:
                encoded[key] = self._encoder.encode(value, f"the parameter {key}", key)
            except TypeError:
                if key not in _OF_TRAINING:
                    raise
                for added in self.tensors.keys() - before:
                    del self.tensors[added]
                self.left_out[f"{key}={value!r} of {name}"] = None
        return encoded

    def _need(self, role: str, module: object) -> list:
        """Return the name by which `load` asks for a user's module, and the digests of its code."""
        from torch import nn

        from sktransfer.networks._weights import state_digest

        name, code = getattr(module, "__name__", type(module).__name__), {}
        digest = repr(module)
        if isinstance(module, nn.Module):
            code = code_of(module)
            if role == "backbone" and not self.standalone:
                digest = state_digest(module)
        if (role, name, digest) not in self._labels:
            n_alike = sum(key[:2] == (role, name) for key in self._labels)
            self._labels[role, name, digest] = f"{name}#{n_alike + 1}" if n_alike else name
        label = self._labels[role, name, digest]
        self.modules[role].setdefault(label, module)
        return [label, code]

    def _network(self, estimator: BaseEstimator, backbone: Backbone | None) -> int | None:
        """Return the number of the network whose weights the file holds for this estimator."""
        from sktransfer.networks._backbone import load_backbone

        is_named = isinstance(estimator.backbone, str)
        if not self.standalone and not (backbone is not None and backbone.is_standalone):
            return None
        if backbone is None:
            if is_named:
                return None
            backbone = load_backbone(estimator.backbone)
        key = f"{backbone.name}:{backbone.weights_digest}"
        if key not in self._networks:
            k = self._networks[key] = len(self._networks)
            state = backbone.network.module.state_dict()
            self.tensors |= {f"networks/{k}/{name}": tensor for name, tensor in state.items()}
        return self._networks[key]

    def _fit(self, i: int, estimator: BaseEstimator, backbone: Backbone) -> dict:
        import torch

        if tuned := vars(estimator).get("_tuned"):
            trained, head = tuned.trained_state(), tuned.head.state_dict()
            arrays = {name: torch.from_numpy(np.array(array)) for name, array in trained.items()}
            self.tensors |= {f"{i}/trained/{name}": tensor for name, tensor in arrays.items()}
            self.tensors |= {f"{i}/head/{name}": tensor for name, tensor in head.items()}
        attributes = {
            key: getattr(tuned if key in TUNED_ATTRIBUTES else estimator, key)
            for key in CLASSES[type(estimator)]
        }
        if hasattr(estimator, "feature_names_in_"):
            attributes["feature_names_in_"] = estimator.feature_names_in_
        settings = backbone.preprocessing
        plain = asdict(settings) if isinstance(settings, Preprocessing) else None
        encode = self._encoder.encode
        return {
            "weights": backbone.weights_digest,
            "preprocessing": encode(plain, "preprocessing") if plain else None,
            "training": self._training(i, tuned),
            "attributes": {key: encode(value, key) for key, value in attributes.items()},
        }

    def _training(self, i: int, tuned: TunedNetwork | None) -> list:
        """Return the state for the next epoch of partial_fit; empty if a file cannot hold it."""
        if tuned is None or (state := tuned.training_state()) is None:
            return []
        *plain, tensors = state
        try:
            encoded = self._encoder.encode(plain, "the optimizer's state")
        except TypeError as error:
            warn(f"The loaded model's partial_fit will start with a new optimizer: {error}")
            return []
        self.tensors |= {f"{i}/training/{name}": tensor for name, tensor in tensors.items()}
        return encoded  # type: ignore[return-value]


def _check_loads(part: Path, estimator: BaseEstimator, ours: list, modules: dict) -> None:
    """Raise ValueError if the file does not load, as after a change of parameters since `fit`."""
    try:
        given = {role: found or None for role, found in modules.items()}
        _, loaded = Reader(str(part), **given, trusted=None).read()
        for own, other in zip(ours, loaded, strict=True):
            if "backbone_" in vars(own) and other.backbone_.cut != own.backbone_.cut:
                raise ValueError("its embeddings would differ from those it was fitted with.")
    except ValueError as error:
        raise ValueError(
            f"This {type(estimator).__name__} could not be loaded again, so it is not saved. Were "
            "parameters such as `head`, `weights`, `layer`, `pooling` or `preprocessing` changed "
            f"after fit? Fit again, or set them to what they were. (Loading says: {error})"
        ) from error


# -- loading ---------------------------------------------------------------------------------
@own_settings()
def load(
    path: str | os.PathLike,
    *,
    weights: str | os.PathLike | None = None,
    backbone: nn.Module | Callable | Mapping | None = None,
    head: nn.Module | Mapping | None = None,
    trusted: str | type | Collection[str | type] = (),
) -> BaseEstimator:
    """Read a file that :func:`save` wrote.

    Parameters
    ----------
    path : str or Path
        The file.
    weights : str or Path, default=None
        The present place of the weights file that was the estimator's `weights`. Its digest is
        checked.
    backbone : nn.Module, callable or dict, default=None
        The module that was the estimator's `backbone`, unless that was a name. Its weights are
        checked, unless a standalone file holds them. If its code has changed by more than comments,
        a warning says so. For several in a pipeline, a dict by the names that the error lists.
    head : nn.Module or dict, default=None
        The module that was the estimator's `head`, with any weights. For several, a dict.
    trusted : str, type, or list of them, default=()
        Types of objects that classical steps may contain, in addition to those that skops trusts;
        names of networks that may be read from a hub or a folder (``"timm:hf-hub:…"``), or whose
        published weights may be downloaded (``"resnet50"``). The error lists what is missing.

    Returns
    -------
    estimator : estimator
        The fitted estimator.

    Raises
    ------
    ValueError
        If :func:`save` did not write the file, if it was changed or damaged, if it holds anything
        unknown or not trusted, or if its backbone has other weights on this machine.
    OSError
        If `path`, or weights that it names, cannot be read. Published weights that are not on
        this machine are not downloaded: :func:`load_backbone` or `trusted` does that.

    See Also
    --------
    save : Write the file.

    Examples
    --------
    >>> import tempfile
    >>> from sktransfer import PretrainedFeatureExtractor, load, save
    >>> extractor = PretrainedFeatureExtractor(image_shape=(8, 8), layer="stage2")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(extractor.fit([[0.0] * 64]), f"{folder}/extractor.safetensors")
    ...     loaded = load(f"{folder}/extractor.safetensors")
    >>> loaded.transform([[0.5] * 64]).shape
    (1, 96)
    """
    path = os.fsdecode(path)
    listed = [trusted] if isinstance(trusted, (str, type)) else trusted
    try:
        names = {t if isinstance(t, str) else f"{t.__module__}.{t.__qualname__}" for t in listed}
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"trusted={trusted!r} is not accepted: a name, a type, or a list of them."
        ) from error
    try:
        reader = Reader(path, weights=weights, backbone=backbone, head=head, trusted=names)
        estimator, _ = reader.read()
    except (Refused, RecursionError, MemoryError) as error:
        reason = error if isinstance(error, Refused) else f"it is too deep or large ({error!r})"
        raise ValueError(
            f"{path} was not loaded: {reason}. sktransfer.load reads what sktransfer.save of "
            "this version wrote, and nothing else."
        ) from error
    return estimator
