"""The embedding store in memory, which evicts the least recently used rows."""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from sktransfer._threads import process_lock

DEFAULT_MEMORY_BYTES = 512 * 2**20

# Bytes that CPython needs for a row or a file beside its numbers: key, array header, dict slots.
_ROW_OVERHEAD = 400
_FILE_OVERHEAD = 500
# Known files, which only avoid reading a file again, take at most this share of the bound.
_FILES_SHARE = 0.25

_mutex = process_lock()  # of all stores in memory; it is held for microseconds

# (absolute path, size in bytes, modification time in ns, a number made of the inode and the time
# of the last change), taken *before* the file is read.
FileStat = tuple[str, int, int, int]

# A file changed in place may keep its size and its modification time while the clock of the file
# system has not ticked: 2 s on FAT, milliseconds elsewhere. So a file younger than this at the
# time of its stat is known by its content only (git's "racily clean" rule).
_SETTLED_AFTER_NS = 2_000_000_000

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Lock(Protocol):
    """What ``lock`` of a store returns: a `threading.Lock`, or a lock on a file."""

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
        Bytes that they take, keys included.
    max_bytes : int or None
        The bound on ``n_bytes``; None: unbounded.
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
    """Select the files whose stat will show every later change."""
    settled_before = taken_at_ns - _SETTLED_AFTER_NS
    return {
        stat: digest
        for stat, digest in zip(stats, digests, strict=True)
        if stat is not None and stat[2] < settled_before
    }


def as_bytes(max_bytes: int | str | None) -> int | None:
    """Convert a bound, an int or a text such as ``"500M"``, into bytes, as joblib does."""
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
        """Copy the rows that are kept into ``out``, (n_images, width); return which those are.

        An image may occur several times among the digests.
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


class MemoryStore(BaseStore):
    """Embeddings and file identities kept in this process.

    Parameters
    ----------
    max_bytes : int, str or None, default=512 MiB
        The bound, beyond which the least recently used rows go first. ``0`` keeps nothing;
        None: unbounded.

    Notes
    -----
    Threads may share a store. A deep copy is the store itself, so that clones of an estimator
    share it; an unpickled store is empty.
    """

    def __init__(self, max_bytes: int | str | None = DEFAULT_MEMORY_BYTES):
        self.max_bytes = as_bytes(max_bytes)
        self._rows: OrderedDict[tuple[str, bytes], np.ndarray] = OrderedDict()
        self._files: OrderedDict[str, tuple[FileStat, bytes]] = OrderedDict()
        self._n_row_bytes = self._n_file_bytes = 0
        self._locks: dict[tuple[str, int], Lock] = {}
        self._pid = os.getpid()

    def get_many(self, fingerprint: str, digests: Sequence[bytes]) -> list[np.ndarray | None]:
        """Return rows (read-only arrays), None for each that is not kept."""
        rows: list[np.ndarray | None] = []
        with _mutex:
            for digest in digests:
                row = self._rows.get((fingerprint, digest))
                if row is not None:
                    self._rows.move_to_end((fingerprint, digest))
                rows.append(row)
        return rows

    def put_many(self, fingerprint: str, digests: Sequence[bytes], rows: np.ndarray) -> None:
        """Keep copies of ``rows``, float32 of shape (n_images, ...), replacing earlier ones."""
        with _mutex:
            for digest, row in zip(digests, rows, strict=True):
                if self.max_bytes is not None and row.nbytes + _ROW_OVERHEAD > self.max_bytes:
                    continue
                old = self._rows.pop((fingerprint, digest), None)
                if old is not None:
                    self._n_row_bytes -= old.nbytes + _ROW_OVERHEAD
                # A copy of each row: a view would keep the whole batch alive.
                kept = np.array(row, dtype=np.float32)
                kept.flags.writeable = False
                self._rows[fingerprint, digest] = kept
                self._n_row_bytes += kept.nbytes + _ROW_OVERHEAD
            self._drop_excess()

    def get_file_digests(self, stats: Sequence[FileStat | None]) -> list[bytes | None]:
        """Return the digests of files whose stat has not changed; None for all others."""
        digests: list[bytes | None] = []
        with _mutex:
            for stat in stats:
                known = None if stat is None else self._files.get(stat[0])
                digests.append(known[1] if known is not None and known[0] == stat else None)
        return digests

    def put_file_digests(
        self, stats: Sequence[FileStat | None], digests: Sequence[bytes], taken_at_ns: int
    ) -> None:
        """Remember the digests of files, except files changed less than 2 s before their stat.

        ``taken_at_ns`` is ``time.time_ns()`` of just before the stats were taken, which was
        before the files were read.
        """
        with _mutex:
            for stat, digest in settled_files(stats, digests, taken_at_ns).items():
                if self._files.pop(stat[0], None) is None:
                    self._n_file_bytes += len(stat[0]) + _FILE_OVERHEAD
                self._files[stat[0]] = (stat, digest)
            self._drop_excess()

    def lock(self, fingerprint: str, block: int) -> Lock:
        """Return the lock to hold while computing the rows of one fingerprint and block of digests.

        ``acquire(blocking, timeout)`` and ``release()`` work as in `threading.Lock`. It excludes
        other threads; where nothing is kept, it is always free.
        """
        if self.max_bytes == 0:
            return threading.Lock()
        with _mutex:
            if self._pid != os.getpid():  # after a fork: threads of the parent may hold these
                self._locks, self._pid = {}, os.getpid()
            return self._locks.setdefault((fingerprint, block), threading.Lock())

    def clear(self) -> None:
        """Delete all rows and file identities."""
        with _mutex:
            self._rows.clear()
            self._files.clear()
            self._locks.clear()
            self._n_row_bytes = self._n_file_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def info(self) -> StoreInfo:
        """Return what is kept."""
        with _mutex:
            counts = dict(Counter(fingerprint for fingerprint, _ in self._rows))
            n_rows, n_files = len(self._rows), len(self._files)
            n_bytes = self._n_row_bytes + self._n_file_bytes
        return StoreInfo(None, n_rows, n_bytes, self.max_bytes, n_files, counts)

    def close(self) -> None:
        """Do nothing: there is no file to close."""

    def _drop_excess(self) -> None:
        if self.max_bytes is None:
            return
        while self._files and self._n_file_bytes > _FILES_SHARE * self.max_bytes:
            path, _ = self._files.popitem(last=False)
            self._n_file_bytes -= len(path) + _FILE_OVERHEAD
        while self._rows and self._n_row_bytes + self._n_file_bytes > self.max_bytes:
            _, row = self._rows.popitem(last=False)
            self._n_row_bytes -= row.nbytes + _ROW_OVERHEAD

    def __reduce__(self) -> tuple:
        return (MemoryStore, (self.max_bytes,))

    def __repr__(self) -> str:
        return f"MemoryStore(max_bytes={self.max_bytes})"
