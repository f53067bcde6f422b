"""The embedding store of one process: rows in memory, least recently used out first."""

from __future__ import annotations

import datetime
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np

from sktransfer.store._claims import Refusals
from sktransfer.store._fork_safety import hold_across_fork
from sktransfer.store._info import (
    FILES_SHARE,
    FileStat,
    StoreInfo,
    as_bytes,
    in_words,
    is_settled,
    read_limits,
)

DEFAULT_MEMORY_BYTES = 512 * 2**20

# What CPython takes for one kept row or file beside its numbers: key, array header, dict slots.
_ROW_OVERHEAD = 400
_FILE_OVERHEAD = 500


class MemoryStore:
    """Embeddings and file identities kept in this process.

    Parameters
    ----------
    max_bytes : int, str or None, default=512 MiB
        The bound; beyond it the least recently used goes first. ``0`` keeps nothing, None is
        without a bound.

    Notes
    -----
    Safe in threads and through a fork. A deep copy is the store itself, so that clones of an
    estimator share it; an unpickled one is empty.
    """

    def __init__(self, max_bytes: int | str | None = DEFAULT_MEMORY_BYTES):
        self.max_bytes = as_bytes(max_bytes, "max_bytes")
        # (fingerprint, digest) -> (row, time of last use in s)
        self._rows: OrderedDict[tuple[str, bytes], tuple[np.ndarray, float]] = OrderedDict()
        # path -> (stat, digest)
        self._files: OrderedDict[str, tuple[FileStat, bytes]] = OrderedDict()
        # (fingerprint, digest) -> (thread that computes it, until when in s)
        self._claims: dict[tuple[str, bytes], tuple[int, float]] = {}
        self._refusals = Refusals()
        self._n_bytes = self._n_file_bytes = 0  # the latter are part of the former
        self.fork_lock = threading.RLock()
        hold_across_fork(self)

    def get_into(self, fingerprint: str, digests: Sequence[bytes], out: np.ndarray) -> np.ndarray:
        """Copy the rows at hand into ``out``; True where ``out`` was filled.

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
        """
        rows = self.get_many(fingerprint, digests, out.shape[1])
        found = np.fromiter((row is not None for row in rows), dtype=bool, count=len(rows))
        if found.all() and len(rows) and out.flags.c_contiguous:  # the quickest copy there is
            np.concatenate(rows, out=out.reshape(-1))  # type: ignore[arg-type]
            return found
        for i in np.flatnonzero(found):
            out[i] = rows[i]
        return found

    def get_many(
        self, fingerprint: str, digests: Sequence[bytes], width: int | None = None
    ) -> list[np.ndarray | None]:
        """The rows (read-only arrays), None for each that is not here."""
        now = time.time()
        rows: list[np.ndarray | None] = []
        with self.fork_lock:
            for digest in digests:
                key = (fingerprint, digest)
                kept = self._rows.get(key)
                if kept is None or (width is not None and kept[0].shape[0] != width):
                    rows.append(None)
                    continue
                self._rows[key] = (kept[0], now)
                self._rows.move_to_end(key)
                rows.append(kept[0])
        return rows

    def put_many(self, fingerprint: str, digests: Sequence[bytes], rows: np.ndarray) -> None:
        """Keep copies of ``rows``, float32 of shape (n_images, width)."""
        now = time.time()
        with self.fork_lock:
            for digest, row in zip(digests, rows, strict=True):
                key = (fingerprint, digest)
                self._claims.pop(key, None)
                if self.max_bytes is not None and row.nbytes + _ROW_OVERHEAD > self.max_bytes:
                    continue
                self._drop_row(key)
                # A copy for itself: a view would keep the whole batch alive.
                kept = np.array(row, dtype=np.float32)
                kept.flags.writeable = False
                self._rows[key] = (kept, now)
                self._n_bytes += kept.nbytes + _ROW_OVERHEAD
            self._fit_into(self.max_bytes)

    def get_file_digests(self, stats: Sequence[FileStat | None]) -> list[bytes | None]:
        """The content digests of files that are as they were; None for all others."""
        digests: list[bytes | None] = []
        with self.fork_lock:
            for stat in stats:
                known = None if stat is None else self._files.get(stat[0])
                if stat is None or known is None or known[0] != tuple(stat):
                    digests.append(None)
                    continue
                self._files.move_to_end(stat[0])
                digests.append(known[1])
        return digests

    def put_file_digests(
        self,
        stats: Sequence[FileStat | None],
        digests: Sequence[bytes],
        taken_at_ns: int | None = None,
    ) -> None:
        """Remember what files hold, but for those changed less than 2 s before their stat.

        ``taken_at_ns`` is ``time.time_ns()`` of just before the stats were taken, which in turn
        was before the files were read; None is now.
        """
        with self.fork_lock:
            for stat, digest in zip(stats, digests, strict=True):
                if stat is None or not is_settled(stat, taken_at_ns) or self.max_bytes == 0:
                    continue
                self._drop_file(stat[0])
                self._files[stat[0]] = (tuple(stat), digest)  # type: ignore[assignment]
                self._count_file(stat[0], 1)
            self._fit_into(self.max_bytes)

    def claim(
        self, fingerprints: str | Sequence[str], digests: Sequence[bytes], seconds: float = 60.0
    ) -> np.ndarray:
        """Say which rows this thread will compute, so that other threads need not.

        See `DiskStore.claim`.
        """
        fingerprints = [fingerprints] if isinstance(fingerprints, str) else list(fingerprints)
        now, me = time.time(), threading.get_ident()
        if self.max_bytes == 0:  # nothing will come of waiting
            return np.ones(len(digests), dtype=bool)
        mine = np.zeros(len(digests), dtype=bool)
        with self.fork_lock:
            for i, digest in enumerate(digests):
                key = (fingerprints[0], digest)
                owner, until = self._claims.get(key, (me, 0.0))
                if owner != me and until > now:
                    continue
                is_present = all((f, digest) in self._rows for f in fingerprints)
                if is_present and self._refusals.refuse(*key):
                    continue
                self._claims[key] = (me, now + seconds)
                mine[i] = True
        return mine

    def release(self, fingerprints: str | Sequence[str], digests: Sequence[bytes]) -> None:
        """Give claims of this thread back; ``put_many`` does so by itself."""
        fingerprint = fingerprints if isinstance(fingerprints, str) else fingerprints[0]
        me = threading.get_ident()
        with self.fork_lock:
            for digest in digests:
                if self._claims.get((fingerprint, digest), (None,))[0] == me:
                    del self._claims[fingerprint, digest]

    def reduce_size(
        self,
        bytes_limit: int | str | None = None,
        items_limit: int | None = None,
        age_limit: datetime.timedelta | None = None,
    ) -> None:
        """Drop the least recently used rows until all limits hold, as ``joblib.Memory`` does."""
        n_bytes, n_rows, age = read_limits(bytes_limit, items_limit, age_limit)
        with self.fork_lock:
            if age is not None:
                oldest = time.time() - age
                for key in [key for key, (_, used) in self._rows.items() if used < oldest]:
                    self._drop_row(key)
            while n_rows is not None and len(self._rows) > n_rows:
                self._drop_row(next(iter(self._rows)))
            self._fit_into(n_bytes)

    def clear(self) -> None:
        """Forget everything."""
        with self.fork_lock:
            self._rows.clear()
            self._files.clear()
            self._claims.clear()
            self._n_bytes = self._n_file_bytes = 0

    def info(self) -> StoreInfo:
        """What is kept."""
        with self.fork_lock:
            counts = Counter(fingerprint for fingerprint, _ in self._rows)
            return StoreInfo(
                None,
                len(self._rows),
                self._n_bytes,
                self.max_bytes,
                len(self._files),
                dict(counts),
            )

    def close(self) -> None:
        """Nothing is open; here because every store has it."""

    def before_fork(self) -> None:
        """Nothing: memory is inherited as it is."""

    def _drop_row(self, key: tuple[str, bytes]) -> None:
        kept = self._rows.pop(key, None)
        if kept is not None:
            self._n_bytes -= kept[0].nbytes + _ROW_OVERHEAD

    def _drop_file(self, path: str) -> None:
        if self._files.pop(path, None) is not None:
            self._count_file(path, -1)

    def _count_file(self, path: str, n: int) -> None:
        n_bytes = n * (len(path) + _FILE_OVERHEAD)
        self._n_bytes += n_bytes
        self._n_file_bytes += n_bytes

    def _fit_into(self, bound: int | None) -> None:
        # A known file saves only a reading: rows keep most of the room.
        while bound is not None and self._n_bytes > bound:
            if self._rows and self._n_file_bytes <= FILES_SHARE * bound:
                self._drop_row(next(iter(self._rows)))
            else:
                self._drop_file(next(iter(self._files)))

    def __deepcopy__(self, memo: dict) -> MemoryStore:
        return self

    def __reduce__(self) -> tuple:
        return (MemoryStore, (self.max_bytes,))

    def __repr__(self) -> str:
        return f"<MemoryStore of at most {in_words(self.max_bytes)}>"
