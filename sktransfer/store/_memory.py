"""The embedding store of one process: rows in memory, least recently used out first."""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np

from sktransfer._threads import ProcessLock
from sktransfer.store._base import BaseStore, FileStat, Lock, StoreInfo, as_bytes, settled_files

DEFAULT_MEMORY_BYTES = 512 * 2**20

# What CPython takes for one kept row or file beside its numbers: key, array header, dict slots.
_ROW_OVERHEAD = 400
_FILE_OVERHEAD = 500
# Known files take at most this part of the bound: they only save reading a file again.
_FILES_SHARE = 0.25

_mutex = ProcessLock()  # one for all stores in memory: it is held for microseconds


class MemoryStore(BaseStore):
    """Embeddings and file identities kept in this process.

    Parameters
    ----------
    max_bytes : int, str or None, default=512 MiB
        The bound, beyond which the least recently used rows go first. ``0`` keeps nothing, None
        is no bound.

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
        """The rows (read-only arrays), None for each that is not kept."""
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
        """The content digests of files whose stat has not changed; None for all others."""
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
        """The lock to hold while computing the rows of one fingerprint and block of digests.

        ``acquire(blocking, timeout)`` and ``release()`` work as in `threading.Lock`. It excludes
        other threads; where nothing is kept, it is always free.
        """
        if self.max_bytes == 0:
            return threading.Lock()
        with _mutex:
            if self._pid != os.getpid():  # threads of the parent may hold these
                self._locks, self._pid = {}, os.getpid()
            return self._locks.setdefault((fingerprint, block), threading.Lock())

    def clear(self) -> None:
        """Forget everything."""
        with _mutex:
            self._rows.clear()
            self._files.clear()
            self._locks.clear()
            self._n_row_bytes = self._n_file_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def info(self) -> StoreInfo:
        """What is kept."""
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
