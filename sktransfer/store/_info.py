"""What both stores share: their summary, their bounds, and which file stats can be trusted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

# (absolute path, size in bytes, modification time in ns, a number made of the inode and the time
# of the last change), taken *before* the file is read.
FileStat = tuple[str, int, int, int]

# A file changed in place may keep its size and its modification time while the clock of the file
# system has not ticked: 2 s on FAT, milliseconds elsewhere. So a file younger than this at the
# time of its stat is known by its content only (git's "racily clean" rule).
_SETTLED_AFTER_NS = 2_000_000_000

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Lock(Protocol):
    """What a store's ``lock`` returns; a `threading.Lock` is one."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...

    def release(self) -> None: ...


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
    """Whether any later change of the file will show in its stat, taken at that time."""
    if taken_at_ns is None:
        taken_at_ns = time.time_ns()
    return stat[2] < taken_at_ns - _SETTLED_AFTER_NS


def as_bytes(max_bytes: int | str | None) -> int | None:
    """A bound in bytes from an int or from a text such as ``"500M"``, as joblib reads it."""
    if max_bytes is None:
        return None
    try:
        if isinstance(max_bytes, str):
            unit = _UNITS.get(max_bytes[-1:].upper(), 1)
            n_bytes = int(float(max_bytes if unit == 1 else max_bytes[:-1]) * unit)
        else:
            n_bytes = int(max_bytes)
    except (TypeError, ValueError, OverflowError):
        n_bytes = -1
    if n_bytes < 0 or isinstance(max_bytes, bool):
        raise ValueError(
            "max_bytes must be a number of bytes (int >= 0), a text such as '500M' or '10G', or "
            f"None for no bound; got {max_bytes!r}."
        )
    return n_bytes


def in_words(n_bytes: int | None) -> str:
    """``10 GiB`` for 10737418240, as a repr shows it."""
    if n_bytes is None:
        return "no bound"
    exponent = min(max(n_bytes.bit_length() - 1, 0) // 10, 4)
    return f"{n_bytes / 2 ** (10 * exponent):.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"
