"""The embedding store on disk: one SQLite file, shared by threads, processes and later runs."""

from __future__ import annotations

import datetime
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from sktransfer.store import _tables as tables
from sktransfer.store._claims import Refusals
from sktransfer.store._info import (
    FileStat,
    StoreInfo,
    as_bytes,
    in_words,
    is_settled,
    read_limits,
)
from sktransfer.store._memory import MemoryStore
from sktransfer.store._sqlite_file import SQLiteFile, transaction

DEFAULT_DISK_BYTES = 10 * 2**30

FILE_NAME = "embeddings-v1.sqlite"

# Bytes of embeddings in one transaction: what a crash can lose, how long the others wait.
_CHUNK_BYTES = 16 * 2**20
# A use is noted at most once in so many seconds, so that reading seldom writes.
_NOTE_USE_AFTER = 3600
# File identities that a process keeps of those it has read or written: about 50 MB.
_N_IDENTITIES = 100_000
# After an eviction the store is filled to this part of its bound, so that it comes seldom.
_FILLED_AFTER_EVICTION = 0.9

Result = TypeVar("Result")


class DiskStore:
    """Embeddings and file identities kept in a folder.

    Parameters
    ----------
    folder : str or os.PathLike
        Made when missing, on first use.
    max_bytes : int, str or None, default=10 GiB
        The bound on the file; beyond it the least recently used rows go first (a use counts to
        the hour). None is without a bound.

    Notes
    -----
    Any number of threads and processes may use a folder at once. A row read is a row written:
    each has a checksum over its numbers and its key, and one that does not fit is not
    there. No pickle is ever read. What goes wrong with the file (full disk, no permission, a
    newer format, damage, a lock held for a minute) is warned of once and costs the
    keeping of embeddings, never the computing of them.
    """

    def __init__(
        self, folder: str | os.PathLike[str], max_bytes: int | str | None = DEFAULT_DISK_BYTES
    ):
        self.folder = os.path.abspath(os.path.expanduser(os.fspath(folder)))
        self.max_bytes = as_bytes(max_bytes, "max_bytes")
        self.path = os.path.join(self.folder, FILE_NAME)
        self._file = SQLiteFile(
            self.path, tables.SCHEMA, tables.FORMAT_VERSION, tables.APPLICATION_ID
        )
        self._refusals = Refusals()
        self._identities = MemoryStore(None)

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
        found = np.zeros(len(digests), dtype=bool)

        def keep(i: int, row: np.ndarray) -> None:
            out[i] = row
            found[i] = True

        self._read(fingerprint, digests, out.shape[1], keep)
        return found

    def get_many(
        self, fingerprint: str, digests: Sequence[bytes], width: int | None = None
    ) -> list[np.ndarray | None]:
        """The rows (read-only arrays), None for each that is not here."""
        rows: list[np.ndarray | None] = [None] * len(digests)
        self._read(fingerprint, digests, width, rows.__setitem__)
        return rows

    def _read(
        self,
        fingerprint: str,
        digests: Sequence[bytes],
        width: int | None,
        keep: Callable[[int, np.ndarray], None],
    ) -> None:
        note_before = int(time.time()) - _NOTE_USE_AFTER
        used: list[bytes] = []
        damaged: list[tuple[bytes, int]] = []

        def read(connection: sqlite3.Connection) -> None:
            for start, batch, found in tables.read_rows(connection, fingerprint, digests):
                whole: dict[bytes, np.ndarray] = {}
                for row in found.values():
                    if row.vector is None:
                        damaged.append((row.digest, row.checksum))
                    elif len(row.vector) == (row.width if width is None else width):
                        whole[row.digest] = row.vector
                        if not isinstance(row.used, int) or row.used < note_before:
                            used.append(row.digest)
                for i, digest in enumerate(batch, start):
                    if digest in whole:
                        keep(i, whole[digest])

        self._file.run(read, None)
        if (used or damaged) and not self._file.is_read_only:
            self._file.run(lambda c: tables.note_reading(c, fingerprint, used, damaged), None)
        if damaged:
            self._file.warn_once(
                "row",
                f"The embedding store {self.path!r} holds damaged rows; they are computed again. "
                "Its disk may be failing.",
            )
            if not self._file.is_read_only:
                self._file.run(tables.check_keys, None)

    def put_many(self, fingerprint: str, digests: Sequence[bytes], rows: np.ndarray) -> None:
        """Keep ``rows``, float32 of shape (n_images, width), in place of any kept before."""
        rows = np.ascontiguousarray(rows, dtype="<f4")
        if rows.ndim != 2 or len(rows) != len(digests):
            raise ValueError(
                f"rows must have the shape (n_images, width) with one row for each of the "
                f"{len(digests)} digests; got {rows.shape}."
            )
        step = max(1, _CHUNK_BYTES // max(1, rows[:1].nbytes))
        for start in range(0, len(rows), step):
            chunk = slice(start, start + step)
            self._write_chunk(fingerprint, dict(zip(digests[chunk], rows[chunk], strict=True)))

    def _write_chunk(self, fingerprint: str, rows: dict[bytes, np.ndarray]) -> None:
        width = len(next(iter(rows.values())))
        has_evicted: list[bool] = []

        def write(connection: sqlite3.Connection) -> None:
            with transaction(connection):
                tables.write_rows(connection, fingerprint, width, rows)
                if self.max_bytes is not None and tables.used_bytes(connection) > self.max_bytes:
                    target = int(self.max_bytes * _FILLED_AFTER_EVICTION)
                    tables.delete_down_to_bytes(connection, target)
                    has_evicted.append(True)
            if self.max_bytes is not None:
                tables.shrink_file(connection, self.max_bytes)

        self._file.run(write, None, writes=True)
        if has_evicted:  # files of rows that are gone went with them, and may be put again
            self._identities.clear()

    def get_file_digests(self, stats: Sequence[FileStat | None]) -> list[bytes | None]:
        """The content digests of files that are as they were; None for all others."""
        # What a file with this stat holds does not change: it is asked once in a process.
        digests = self._identities.get_file_digests(stats)
        asked = [
            i
            for i, (stat, digest) in enumerate(zip(stats, digests, strict=True))
            if stat is not None and digest is None
        ]
        if not asked:
            return digests
        unknown: list[bytes | None] = [None] * len(asked)
        read = self._file.run(lambda c: tables.read_files(c, [stats[i] for i in asked]), unknown)
        found = [(i, digest) for i, digest in zip(asked, read, strict=True) if digest is not None]
        for i, digest in found:
            digests[i] = digest
        self._remember([(stats[i], digest) for i, digest in found])
        return digests

    def _remember(
        self, files: Sequence[tuple[FileStat | None, bytes]], taken_at_ns: int | None = None
    ) -> None:
        # The first ones that fit: of more files than that the last would drive them out again
        # before they are next asked for.
        n_free = max(0, _N_IDENTITIES - self._identities.info().n_files)
        stats, digests = [stat for stat, _ in files[:n_free]], [d for _, d in files[:n_free]]
        self._identities.put_file_digests(stats, digests, taken_at_ns)

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
        files = [
            (stat, digest)
            for stat, digest in zip(stats, digests, strict=True)
            if stat is not None and is_settled(stat, taken_at_ns)
        ]
        if files:
            self._write(lambda c: tables.write_files(c, files), None)
            self._remember(files, taken_at_ns)

    def claim(
        self, fingerprints: str | Sequence[str], digests: Sequence[bytes], seconds: float = 60.0
    ) -> np.ndarray:
        """Say which rows this thread will compute, so that other threads and processes need not.

        Parameters
        ----------
        fingerprints : str or sequence of str
            Of what is computed together; the claim is on the first.
        digests : sequence of bytes
            Of what has just been looked for and not found.
        seconds : float, default=60
            After which the claim is void.

        Returns
        -------
        mine : bool array
            False where another has a claim within its time, or where the rows have come in the
            meantime. The claim of a process of this machine that has ended is void; a row that
            is there is refused once, not to who looked again and comes back. All True when
            there is no store to write to.
        """
        fingerprints = [fingerprints] if isinstance(fingerprints, str) else list(fingerprints)

        def claim(connection: sqlite3.Connection) -> np.ndarray:
            taken = tables.claimed_digests(connection, fingerprints[0], digests)
            for digest in tables.present_digests(connection, fingerprints, digests) - taken:
                if self._refusals.refuse(fingerprints[0], digest):
                    taken.add(digest)
            mine = [digest not in taken for digest in digests]
            wanted = [digest for digest, is_mine in zip(digests, mine, strict=True) if is_mine]
            tables.write_claims(connection, fingerprints[0], wanted, time.time() + seconds)
            return np.array(mine, dtype=bool)

        return self._write(claim, np.ones(len(digests), dtype=bool))

    def release(self, fingerprints: str | Sequence[str], digests: Sequence[bytes]) -> None:
        """Give claims of this thread back; ``put_many`` does so by itself."""
        fingerprint = fingerprints if isinstance(fingerprints, str) else fingerprints[0]
        self._write(lambda c: tables.delete_claims(c, fingerprint, digests), None)

    def reduce_size(
        self,
        bytes_limit: int | str | None = None,
        items_limit: int | None = None,
        age_limit: datetime.timedelta | None = None,
    ) -> None:
        """Delete the least recently used rows until all limits hold, as ``joblib.Memory`` does.

        The file shrinks with them.
        """
        n_bytes, n_rows, age = read_limits(bytes_limit, items_limit, age_limit)

        def reduce(connection: sqlite3.Connection) -> None:
            if age is not None:
                tables.delete_older(connection, time.time() - age)
            if n_rows is not None:
                tables.delete_down_to_rows(connection, n_rows)
            if n_bytes is not None:
                tables.delete_down_to_bytes(connection, n_bytes)
            tables.delete_loose_files(connection)

        self._write(reduce, None, shrink=True)
        self._identities.clear()

    def clear(self) -> None:
        """Forget everything; the file shrinks to nearly nothing."""
        self._write(tables.delete_all, None, shrink=True)
        self._identities.clear()

    def info(self) -> StoreInfo:
        """What is kept."""

        def read(connection: sqlite3.Connection) -> StoreInfo:
            counts = tables.row_counts(connection)
            n_files = connection.execute("SELECT count(*) FROM files").fetchone()[0]
            n_bytes = tables.used_bytes(connection)
            n_rows = sum(counts.values())
            return StoreInfo(self.path, n_rows, n_bytes, self.max_bytes, n_files, counts)

        return self._file.run(read, StoreInfo(self.path, 0, 0, self.max_bytes, 0, {}))

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._file.close()

    def _write(
        self,
        work: Callable[[sqlite3.Connection], Result],
        otherwise: Result,
        shrink: bool = False,
    ) -> Result:
        def write(connection: sqlite3.Connection) -> Result:
            with transaction(connection):
                result = work(connection)
            if shrink:
                tables.shrink_file(connection, 0)
            return result

        return self._file.run(write, otherwise, writes=True)

    def __deepcopy__(self, memo: dict) -> DiskStore:
        return self

    def __reduce__(self) -> tuple:
        return (DiskStore, (self.folder, self.max_bytes))

    def __repr__(self) -> str:
        bound = in_words(self.max_bytes)
        return f"<DiskStore in {self.folder!r}, at most {bound}>"
