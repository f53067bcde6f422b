"""Parameters and fitted attributes as JSON and back, for a few harmless types only."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

Json: TypeAlias = "bool | int | float | str | list | dict | None"

_KIND = "__kind__"
# Kind of dtype -> the Python type of its items in JSON. Object arrays may hold strings only.
_ITEMS = {"b": bool, "i": int, "u": int, "f": float, "U": str, "S": str, "O": str}
_ITEMS |= {"M": int, "m": int}  # times are written as their ticks
_DTYPE = re.compile(r"[<>|]?([biufUSOMm])[0-9]{0,4}(\[([1-9][0-9]{0,3})?[a-zA-Z]+\])?")


def encode(value: object, what: str) -> Json:
    """Turn a value into JSON; the TypeError for all other types calls it `what`."""
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


def decode(value: Json) -> object:
    """Turn JSON back into a value; ValueError for anything that :func:`encode` does not write."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(item) for item in value]
    kind = value.get(_KIND)
    keys = {_KIND, "items", "dtype"} if kind == "array" else {_KIND, "items"}
    items = value.get("items")
    if set(value) == keys and isinstance(items, list):
        if kind == "tuple":
            return tuple(decode(item) for item in items)
        if kind == "dict" and all(isinstance(pair, list) and len(pair) == 2 for pair in items):
            try:
                return {decode(k): decode(v) for k, v in items}
            except TypeError:  # an unhashable key
                pass
        if kind == "array":
            return _decode_array(value["dtype"], items)
    raise ValueError(f"not a known value: {value!r}")


def _decode_array(dtype: Json, items: list) -> np.ndarray:
    match = _DTYPE.fullmatch(dtype) if isinstance(dtype, str) else None
    if match is None or not all(type(item) is _ITEMS[match[1]] for item in items):
        raise ValueError(f"not a known array of dtype {dtype!r}")
    if match[1] == "O":
        return np.array([*items, None], dtype=object)[:-1]
    if match[1] == "S":
        items = [item.encode("latin1") for item in items]
    try:
        return np.array(items, dtype=match[0])
    except (TypeError, OverflowError) as error:
        raise ValueError(f"not an array of {dtype}") from error
