"""Parameters and fitted attributes as JSON, and back, for a few harmless types alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sktransfer.fine_tuning._optimizers import Optimizer

_KIND = "__kind__"
# Kinds of dtype -> the type of their items in JSON. Of objects strings alone are harmless.
_ITEMS = {"b": bool, "i": int, "u": int, "f": float, "U": str, "S": str, "O": str}
_ITEMS |= {"M": int, "m": int}  # times: their ticks
_DTYPE = re.compile(r"[<>|]?([biufUSOMm])[0-9]{0,4}(\[([1-9][0-9]{0,3})?[a-zA-Z]+\])?")


def encode(value: Any, what: str) -> Any:
    """Turn a value into what JSON holds; `what` names it in the error for all other types."""
    if isinstance(value, np.generic) and value.dtype.kind not in "Mm":
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(item, what) for item in value]
    if isinstance(value, tuple):
        return {_KIND: "tuple", "items": [encode(item, what) for item in value]}
    if isinstance(value, Mapping):
        pairs = [[encode(k, what), encode(v, what)] for k, v in value.items()]
        return {_KIND: "dict", "items": pairs}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Optimizer):
        items = encode(value.get_params(deep=False), what)["items"]
        return {_KIND: "optimizer", "items": items}
    if isinstance(value, np.ndarray) and value.dtype.kind in _ITEMS:
        items = (value.astype(np.int64) if value.dtype.kind in "Mm" else value).tolist()
        if value.dtype.kind == "S":
            items = [item.decode("latin1") for item in items]
        if value.dtype.kind != "O" or all(isinstance(item, str) for item in items):
            dtype = "O" if value.dtype.kind == "O" else value.dtype.str
            return {_KIND: "array", "dtype": dtype, "items": items}
    raise TypeError(
        f"{what} is {value!r}, of type {type(value).__name__}, which a file that is safe to open "
        "cannot hold. Set it to something else before saving, or use pickle or joblib."
    )


def decode(value: Any) -> Any:
    """The value again; ValueError for anything that :func:`encode` does not write."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(item) for item in value]
    kind = value.get(_KIND)
    keys = {_KIND, "items", "dtype"} if kind == "array" else {_KIND, "items"}
    if set(value) != keys or not isinstance(value["items"], list):
        raise ValueError(f"not a known value: {value!r}")
    items = value["items"]
    if kind == "tuple":
        return tuple(decode(item) for item in items)
    if kind in ("dict", "optimizer"):
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in items):
            raise ValueError(f"not a known value: {value!r}")
        try:
            pairs = {decode(k): decode(v) for k, v in items}
            return pairs if kind == "dict" else Optimizer(**pairs)
        except TypeError as error:
            raise ValueError(f"not a known value: {value!r}") from error
    if kind == "array":
        return _decode_array(value["dtype"], items)
    raise ValueError(f"not a known value: {value!r}")


def _decode_array(name: Any, items: list[Any]) -> np.ndarray:
    match = _DTYPE.fullmatch(name) if isinstance(name, str) else None
    if match is None or not all(type(item) is _ITEMS[match[1]] for item in items):
        raise ValueError(f"not a known array of dtype {name!r}")
    if match[1] == "O":
        return np.array([*items, None], dtype=object)[:-1]
    if match[1] == "S":
        items = [item.encode("latin1") for item in items]
    try:
        return np.array(items, dtype=name)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"not an array of {name}") from error
