"""What every embedding store speaks: its summary, its bounds, which file stats to trust."""

from __future__ import annotations

import datetime
import operator
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# (absolute path, size in bytes, modification time in ns, number made of the inode and the time of
# the last change), taken *before* the file is read.
FileStat = tuple[str, int, int, int]

# A file changed in place with its size kept may keep its modification time too, as long as the
# clock of the file system has not ticked: 2 s on FAT, milliseconds elsewhere. So a file younger
# than this at the moment of its stat is known by its content only (git's "racily clean" rule).
SETTLED_AFTER_NS = 2_000_000_000

# Of the bound, what is known of files may take so much where rows need the room.
FILES_SHARE = 0.25

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds.

    Attributes
    ----------
    path : str or None
        The file, or None for a store in this process's memory.
    n_rows : int
        Embeddings kept.
    n_bytes : int
        Bytes they take, with what belongs to them.
    max_bytes : int or None
        The bound on ``n_bytes``; None is no bound.
    n_files : int
        Image files whose content is known by their stat.
    rows_by_fingerprint : mapping of str to int
        Rows of each (weights, layer, pooling, preprocessing, precision).
    """

    path: str | None
    n_rows: int
    n_bytes: int
    max_bytes: int | None
    n_files: int
    rows_by_fingerprint: Mapping[str, int] = field(default_factory=dict)


def is_settled(stat: FileStat, taken_at_ns: int | None = None) -> bool:
    """Whether a later change of the file is sure to show in its stat, taken at that time."""
    if taken_at_ns is None:
        taken_at_ns = time.time_ns()
    return stat[2] < taken_at_ns - SETTLED_AFTER_NS


def as_bytes(limit: int | str | None, name: str) -> int | None:
    """A size in bytes from an int or from a text such as ``"500M"``, as joblib reads it."""
    if limit is None:
        return None
    number, unit = limit, 1
    if isinstance(limit, str) and limit[-1:].upper() in _UNITS:
        number, unit = limit[:-1], _UNITS[limit[-1:].upper()]
    try:
        n_bytes = int(float(number) * unit) if isinstance(number, str) else int(number)
    except (TypeError, ValueError, OverflowError):
        n_bytes = -1
    if n_bytes < 0 or isinstance(limit, bool):
        raise ValueError(
            f"{name} must be a number of bytes (int >= 0), a text such as '500M' or '10G', "
            f"or None for no bound; got {limit!r}."
        )
    return n_bytes


def read_limits(
    bytes_limit: Any, items_limit: Any, age_limit: Any
) -> tuple[int | None, int | None, float | None]:
    """The limits of ``reduce_size`` as bytes, rows and seconds; None for each that is none."""
    n_bytes, n_rows, seconds = as_bytes(bytes_limit, "bytes_limit"), None, None
    if items_limit is not None:
        try:
            n_rows = operator.index(items_limit)
        except TypeError:
            n_rows = -1
        if n_rows < 0 or isinstance(items_limit, bool):
            raise ValueError(
                f"items_limit must be a whole number >= 0, or None; got {items_limit!r}."
            )
    if age_limit is not None:
        if not isinstance(age_limit, datetime.timedelta):
            raise TypeError(f"age_limit must be a datetime.timedelta, or None; got {age_limit!r}.")
        seconds = age_limit.total_seconds()
        if seconds < 0:
            raise ValueError(f"age_limit must not be negative; got {age_limit!r}.")
    return n_bytes, n_rows, seconds


def in_words(n_bytes: int | None) -> str:
    """``10 GiB`` for 10737418240, as a repr shows it."""
    if n_bytes is None:
        return "no bound"
    size, unit = float(n_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"
