"""What both stores share: their summary, their bounds, and which file stats can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

# (absolute path, size in bytes, modification time in ns, a number made of the inode and the time
# of the last change), taken *before* the file is read.
FileStat = tuple[str, int, int, int]

# A file changed in place may keep its size and its modification time while the clock of the file
# system has not ticked: 2 s on FAT, milliseconds elsewhere. So a file younger than this at the
# time of its stat is known by its content only (git's "racily clean" rule).
_SETTLED_AFTER_NS = 2_000_000_000

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Lock(Protocol):
    """What a store's ``lock`` gives: a `threading.Lock`, or one on a file."""

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
    rows_by_fingerprint : dict of str to int
        Rows of each (weights, layer, pooling, preprocessing, precision).
    """

    path: str | None
    n_rows: int
    n_bytes: int
    max_bytes: int | None
    n_files: int
    rows_by_fingerprint: dict[str, int]


def settled_files(
    stats: Sequence[FileStat | None], digests: Sequence[bytes], taken_at_ns: int
) -> dict[FileStat, bytes]:
    """The files any later change of which will show in their stat, taken at that time."""
    settled_before = taken_at_ns - _SETTLED_AFTER_NS
    return {
        stat: digest
        for stat, digest in zip(stats, digests, strict=True)
        if stat is not None and stat[2] < settled_before
    }


def as_bytes(max_bytes: int | str | None) -> int | None:
    """A bound in bytes from an int or from a text such as ``"500M"``, as joblib reads it."""
    if max_bytes is None:
        return None
    text = str(max_bytes).upper()
    unit = _UNITS.get(text[-1:], 1)
    try:
        n_bytes = int(float(text if unit == 1 else text[:-1]) * unit)
    except (ValueError, OverflowError):
        n_bytes = -1
    if n_bytes < 0:
        raise ValueError(
            "max_bytes must be a number of bytes (int >= 0), a text such as '500M' or '10G', or "
            f"None for no bound; got {max_bytes!r}."
        )
    return n_bytes


class BaseStore:
    """What the stores in memory and on disk have in common."""

    def get_many(self, fingerprint: str, digests: Sequence[bytes]) -> list[np.ndarray | None]:
        raise NotImplementedError

    def get_into(self, fingerprint: str, digests: Sequence[bytes], out: np.ndarray) -> np.ndarray:
        """Copy the rows that are kept into ``out``.

        Parameters
        ----------
        fingerprint : str
            Of weights, layer, pooling, preprocessing and precision.
        digests : sequence of bytes, length n_images
            One for each image; an image may occur several times.
        out : float32 array of shape (n_images, width)

        Returns
        -------
        found : bool array of shape (n_images,)
            Where ``out`` was filled.
        """
        rows = self.get_many(fingerprint, digests)
        shape = out.shape[1:]
        found = np.array([row is not None and row.shape == shape for row in rows], dtype=bool)
        if found.any() and found.all() and out.flags.c_contiguous:
            np.concatenate(rows, out=out.reshape(-1))  # type: ignore[arg-type]  # twice as fast
        else:
            for i in np.flatnonzero(found):
                out[i] = rows[i]
        return found

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # clones of an estimator share it
