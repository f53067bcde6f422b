"""Encode values of a few safe types as JSON, with arrays as separate tensors, and back."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from sktransfer.saving._named_objects import NotPlain, describe, make

if TYPE_CHECKING:
    import torch

Json: TypeAlias = "bool | int | float | str | list | dict | None"

_KIND = "__kind__"
_DTYPE = re.compile(r"[<>|]?[biufUSMm][0-9]{0,6}(\[([1-9][0-9]{0,3})?[a-zA-Z]+\])?")


class Encoder:
    """Turns values into JSON, and puts the arrays and tensors among them into `tensors`.

    So an array has as many bytes in the file as in memory, and a file cannot pretend to have more.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def encode(self, value: object, what: str, parameter: str = "") -> Json:
        """Return `value` as JSON; TypeError, which names it `what`, for unknown types.

        Objects of torch, torchvision and skorch are known if the estimator's `parameter` accepts
        them.
        """
        if isinstance(value, np.generic) and value.dtype.kind not in "Mm":
            value = value.item()
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [self.encode(item, what, parameter) for item in value]
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        try:
            return self._encode_kind(value, what, parameter)
        except NotPlain as error:
            reason = f" ({error})" if str(error) else ""
        raise TypeError(
            f"{what} is {value!r}, of type {type(value).__name__}, which a file that is safe to "
            f"open cannot hold{reason}. Set it to something else before saving, or use pickle or "
            "joblib."
        )

    def _encode_kind(self, value: object, what: str, parameter: str) -> Json:
        if isinstance(value, tuple):
            items = [self.encode(item, what, parameter) for item in value]
            return {_KIND: "tuple", "items": items}
        if isinstance(value, Mapping):
            pairs = [list(pair) for pair in value.items()]
            return {_KIND: "dict", "items": self.encode(pairs, what, parameter)}
        if isinstance(value, (np.ndarray, np.datetime64, np.timedelta64)):
            return self._encode_array(np.asarray(value))
        if hasattr(value, "untyped_storage"):  # a tensor
            return {_KIND: "tensor", "at": self._put(value)}  # type: ignore[arg-type]
        description, parts = describe(value, parameter)
        encoded = {key: self.encode(part, what, parameter) for key, part in parts.items()}
        return {_KIND: "object", **description, **encoded}

    def _encode_array(self, array: np.ndarray) -> Json:
        import torch

        form: dict = {_KIND: "array", "shape": list(array.shape)}
        if array.dtype.kind == "O" and all(isinstance(item, str) for item in array.flat):
            return {**form, "dtype": "O", "items": array.ravel().tolist()}
        if _DTYPE.fullmatch(array.dtype.str) is None:
            raise NotPlain
        data = np.array(bytearray(array.tobytes()), np.uint8)
        return {**form, "dtype": array.dtype.str, "at": self._put(torch.from_numpy(data))}

    def _put(self, tensor: torch.Tensor) -> str:
        name = f"values/{len(self.tensors)}"
        self.tensors[name] = tensor
        return name


class Decoder:
    """Decodes JSON, and removes the arrays and tensors that it uses from `tensors`.

    ValueError for anything that :class:`Encoder` does not write.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def decode(self, value: Json, parameter: str = "") -> object:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [self.decode(item, parameter) for item in value]
        try:
            return self._decode_kind(dict(value), parameter)
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a known value: {value!r}") from error

    def _decode_kind(self, value: dict, parameter: str) -> object:
        kind = value.pop(_KIND)
        items = value["items"] if set(value) == {"items"} else None
        if kind == "tuple" and isinstance(items, list):
            return tuple(self.decode(item, parameter) for item in items)
        if kind == "dict" and isinstance(items, list):
            pairs = [pair for pair in items if isinstance(pair, list) and len(pair) == 2]
            if len(pairs) < len(items):
                raise KeyError(kind)
            return {self.decode(k, parameter): self.decode(v, parameter) for k, v in pairs}
        if kind == "tensor" and set(value) == {"at"}:
            return self.tensors.pop(value["at"])
        if kind == "array":
            return self._decode_array(**value)
        if kind == "object" and parameter:
            description = {key: value.pop(key) for key in ("of", "name", "how")}
            parts = {key: self.decode(part, parameter) for key, part in value.items()}
            return make(description, parts, parameter)
        raise KeyError(kind)

    def _decode_array(self, dtype: str, shape: list, items: list = (), at: str = "") -> object:  # type: ignore[assignment]
        is_right = all(type(length) is int and length >= 0 for length in shape)
        if not is_right or (len(shape) > 1 and math.prod(shape) == 0):  # it may be long
            raise KeyError(shape)
        if dtype == "O" and all(type(item) is str for item in items) and not at:
            array = np.array([*items, None], dtype=object)[:-1]
            return array.reshape(shape)
        if _DTYPE.fullmatch(dtype) is None or items:
            raise KeyError(dtype)
        data, kind = self.tensors.pop(at).numpy(), np.dtype(dtype)
        if kind.itemsize == 0 or data.nbytes != kind.itemsize * math.prod(shape):
            raise KeyError(at)
        array = np.ndarray(shape, kind, bytearray(data.tobytes()))
        if kind.kind == "U":
            array.ravel().tolist()  # ValueError for invalid characters
        return array[()] if kind.kind in "Mm" and not shape else array
