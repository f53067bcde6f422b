"""Encode losses, optimizers, transforms, callbacks and splitters of known libraries as data.

An object is written as the public name of its class and its parameters. Only names of the modules
below are looked up, so that a file cannot make other objects.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib import import_module
from types import FunctionType

import numpy as np

# Parameter of an estimator -> the modules whose public classes and functions it may hold.
_TRANSFORMS = ("torchvision.transforms.v2", "torchvision.transforms")
_MODULES = {
    "loss": ("torch.nn", "torch.nn.functional", "torchvision.ops"),
    "optimizer": ("torch.optim",),
    "augment": _TRANSFORMS,
    "preprocessing": _TRANSFORMS,
    "callbacks": ("skorch.callbacks", "torch.optim.lr_scheduler"),
    "early_stopping": ("sklearn.model_selection",),
}
# Module -> where its classes and functions are defined. Of torch.nn only the losses are accepted,
# as other layers may take any amount of memory.
_DEFINED = {
    "sklearn.model_selection": "sklearn.model_selection._split",
    "torch.nn": "torch.nn.modules.loss",
    "torchvision.ops": "torchvision.ops.focal_loss",
    "torchvision.transforms.v2": "torchvision.transforms.",
    "torchvision.transforms": "torchvision.transforms.",
}
# Other callbacks of skorch read or write files, or send reports to services.
_CALLBACKS = {
    "BatchScoring",
    "EarlyStopping",
    "EpochScoring",
    "EpochTimer",
    "GradientNormClipping",
    "LRScheduler",
    "PassthroughScoring",
    "PrintLog",
    "ProgressBar",
    "WarmRestartLR",
}


class NotPlain(TypeError):
    """A value cannot be written as data; the message is the reason."""


def describe(value: object, parameter: str) -> tuple[dict[str, str], dict[str, object]]:
    """Return the names that :func:`make` needs, and the parts to be encoded in turn."""
    import torch

    if isinstance(value, functools.partial):
        parts = {"function": value.func, "args": value.args, "keywords": value.keywords}
        return {"of": "", "name": "", "how": "partial"}, parts
    if isinstance(value, torch.dtype) and parameter:
        return {"of": "torch", "name": str(value).removeprefix("torch."), "how": "dtype"}, {}
    if isinstance(value, (type, FunctionType)):
        return {**_place(value, parameter), "how": "itself"}, {}
    place = _place(type(value), parameter)
    if isinstance(value, Enum):
        return {**place, "how": "member"}, {"value": value.value}
    arguments = _arguments(value)
    try:
        is_same = _equal(type(value)(**arguments), value)
    except Exception as error:
        raise NotPlain(f"its parameters do not make it again: {error}") from error
    if not is_same:
        raise NotPlain("its parameters do not make it again")
    return {**place, "how": "made"}, {"arguments": arguments}


def make(names: dict, parts: dict, parameter: str) -> object:
    """Return what :func:`describe` described; ValueError for anything else."""
    import torch

    how = names["how"]
    try:
        if how == "partial" and isinstance(parts["function"], (type, FunctionType)):
            return functools.partial(parts["function"], *parts["args"], **parts["keywords"])
        if how == "dtype" and isinstance(dtype := vars(torch).get(names["name"]), torch.dtype):
            return dtype
        found = _find(names["of"], names["name"], parameter)
        if how == "itself":
            return found
        if how == "member" and isinstance(found, type) and issubclass(found, Enum):
            return found(parts["value"])
        if how == "made" and isinstance(found, type):
            return found(**parts["arguments"])
    except Exception as error:
        raise ValueError(f"{names} cannot be made: {error}") from error
    raise ValueError(f"{names} is not known")


def _place(value: type | FunctionType, parameter: str) -> dict[str, str]:
    for module in _MODULES.get(parameter, ()):
        try:
            if _find(module, value.__name__, parameter) is value:
                return {"of": module, "name": value.__name__}
        except LookupError:
            pass
    raise NotPlain


def _find(module: str, name: str, parameter: str) -> type | FunctionType:
    if module not in _MODULES.get(parameter, ()):
        raise LookupError(f"{parameter!r} takes nothing of {module!r}")
    found = vars(import_module(module)).get(name)
    is_known = module != "skorch.callbacks" or name in _CALLBACKS
    is_known = is_known and isinstance(found, (type, FunctionType))
    if is_known and found.__module__.startswith(_DEFINED.get(module, module)):  # type: ignore[union-attr]
        return found  # type: ignore[return-value]
    raise LookupError(f"{module} has no {name!r} that may be made")


def _arguments(value: object) -> dict[str, object]:
    """Return the arguments of an object, which classes of these libraries keep as attributes."""
    arguments: dict[str, object] = {}
    for name, parameter in inspect.signature(type(value)).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(getattr(value, name, {}))
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            found = getattr(value, name, parameter.default)
            if found is not parameter.default:
                arguments[name] = found
    return arguments


def _equal(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(map(_equal, a, b))
    if hasattr(a, "shape"):
        return np.array_equal(a, b)  # type: ignore[arg-type]
    if hasattr(a, "__dict__") and not isinstance(a, (type, FunctionType, Enum)):
        return _equal(vars(a), vars(b))
    return a is b or a == b
