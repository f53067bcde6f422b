"""The embedding store on disk: one SQLite file, shared by threads, processes and later runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sqlite3
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import TypeVar

import filelock
import numpy as np

from sktransfer._progress import warn
from sktransfer.store._memory import BaseStore, FileStat, Lock, StoreInfo, as_bytes, settled_files

DEFAULT_DISK_BYTES = 10 * 2**30
FILE_NAME = "embeddings-v2.sqlite"

_FORMAT_VERSION = 2
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS fingerprints (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE)",
    # The last row written has the greatest id. `data` is little-endian float32; `checksum` is the
    # CRC-32 of fingerprint, digest and data.
    "CREATE TABLE IF NOT EXISTS vectors (id INTEGER PRIMARY KEY, fingerprint INTEGER NOT NULL,"
    " digest BLOB NOT NULL, checksum INTEGER NOT NULL, data BLOB NOT NULL,"
    " UNIQUE (fingerprint, digest))",
    # `seal` is a hash of stat and digest: it shows a changed file and a damaged digest.
    "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, digest BLOB NOT NULL,"
    " seal BLOB NOT NULL) WITHOUT ROWID",
    f"PRAGMA user_version = {_FORMAT_VERSION}",
)
# Settings of a new file. Of pages of 4, 8, 16 and 32 KiB, those of 8 KiB were the fastest.
_LAYOUT = ("page_size = 8192", "auto_vacuum = FULL")
_SETTINGS = (
    # kill -9 loses no committed row; a power cut may lose the last ones, and never more.
    "journal_mode = WAL",
    "synchronous = NORMAL",
    "wal_autocheckpoint = 2048",  # pages: 16 MiB
    f"journal_size_limit = {32 * 2**20}",
    "cache_size = -8192",  # KiB
    "cell_size_check = ON",
    "trusted_schema = OFF",
)

_BUSY_SECONDS = 60.0  # to wait for another process that writes
# Values in one IN (...): enough to hide the cost of a statement, few enough that the rows found
# are still in the processor's cache when they are copied.
_BATCH = 100
_N_KNOWN_FILES = 100_000  # kept in this process: about 50 MB

T = TypeVar("T")


class DiskStore(BaseStore):
    """Embeddings and file identities kept in a folder.

    Parameters
    ----------
    folder : str or os.PathLike
        Made on first use if it does not exist.
    max_bytes : int, str or None, default=10 GiB
        The bound on the file, beyond which the oldest rows are deleted. None: unbounded.

    Notes
    -----
    Many threads and processes may use a folder at once. Rows carry a checksum; a row
    that fails it counts as missing. No pickle is ever read. If the file cannot be read or written
    (a full disk, a missing permission, damage, a newer format, a lock held for a minute), the
    store warns once and does not try again until ``close`` is called: embeddings are computed
    without it. The methods are those of `MemoryStore`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], max_bytes: int | str | None = DEFAULT_DISK_BYTES
    ):
        self.folder = os.path.abspath(os.path.expanduser(os.fspath(folder)))
        self.max_bytes = as_bytes(max_bytes)
        self.path = os.path.join(self.folder, FILE_NAME)
        self._lock_folder = os.path.join(self.folder, "locks")
        self._known_files: dict[FileStat, bytes] = {}
        self._connection: sqlite3.Connection | None = None
        self._can_read = self._can_write = True
        _stores.add(self)

    def get_many(self, fingerprint: str, digests: Sequence[bytes]) -> list[np.ndarray | None]:
        """Return rows (read-only arrays), None for each that is not kept."""
        rows = self._run(lambda connection: _read_rows(connection, fingerprint, digests)) or {}
        return [rows.get(digest) for digest in digests]

    def put_many(self, fingerprint: str, digests: Sequence[bytes], rows: np.ndarray) -> None:
        """Keep ``rows``, float32 of shape (n_images, width), replacing earlier ones."""
        whole = dict(zip(digests, np.ascontiguousarray(rows, dtype="<f4"), strict=True))
        if whole:
            self._write(lambda connection: _write_rows(connection, fingerprint, whole))

    def get_file_digests(self, stats: Sequence[FileStat | None]) -> list[bytes | None]:
        """Return the digests of files whose stat has not changed; None for all others."""
        # In this process each file is looked up once: a hundred times as fast.
        known, read = self._known_files, {}
        asked = [stat for stat in stats if stat is not None and stat not in known]
        if asked:
            read = self._run(lambda connection: _read_files(connection, asked)) or {}
            self._remember(read)
        return [None if s is None else known.get(s) or read.get(s) for s in stats]

    def put_file_digests(
        self, stats: Sequence[FileStat | None], digests: Sequence[bytes], taken_at_ns: int
    ) -> None:
        """Remember the digests of files; see `MemoryStore.put_file_digests`."""
        files = settled_files(stats, digests, taken_at_ns)
        if files:
            self._write(lambda connection: _write_files(connection, files))
            self._remember(files)

    def _remember(self, files: dict[FileStat, bytes]) -> None:
        if len(self._known_files) + len(files) <= _N_KNOWN_FILES:
            self._known_files.update(files)

    def lock(self, fingerprint: str, block: int) -> Lock:
        """Return the lock to hold while computing the rows of one fingerprint and block of digests.

        It excludes other threads and processes, and the system frees it when its process dies.
        Where no file can be locked, it is always free.
        """
        if not self._can_write:
            return threading.Lock()
        with contextlib.suppress(OSError):
            os.makedirs(self._lock_folder, exist_ok=True)
        name = hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()
        return _FileLock(os.path.join(self._lock_folder, f"{name}-{block}.lock"))

    def clear(self) -> None:
        """Delete all rows; the file shrinks to nearly nothing."""
        self._known_files.clear()
        self._write(_delete_all)
        shutil.rmtree(self._lock_folder, ignore_errors=True)

    def __len__(self) -> int:
        return self._run(lambda connection: _value(connection, "SELECT count(*) FROM vectors")) or 0

    def info(self) -> StoreInfo:
        """Return what is kept."""
        n_files, n_bytes, counts = self._run(_summary) or (0, 0, {})
        n_rows = sum(counts.values())
        return StoreInfo(self.path, n_rows, n_bytes, self.max_bytes, n_files, counts)

    def close(self) -> None:
        """Close the file; the next use opens it again, also after a failure."""
        with _mutex:
            self._disconnect()
            self._can_read = self._can_write = True

    def __reduce__(self) -> tuple:
        return (DiskStore, (self.folder, self.max_bytes))

    def __repr__(self) -> str:
        return f"DiskStore({self.folder!r}, max_bytes={self.max_bytes})"

    # The file --------------------------------------------------------------------------------

    def _run(self, work: Callable[[sqlite3.Connection], T], writes: bool = False) -> T | None:
        """Return ``work(connection)``, or None once the file has failed."""
        with _mutex:
            if not (self._can_write if writes else self._can_read):
                return None
            try:
                return work(self._connected())
            except BaseException as error:
                self._disconnect()
                if not isinstance(error, sqlite3.Error | OSError | UnicodeDecodeError):
                    raise
                is_first = self._can_write
                self._can_write = False
                self._can_read &= writes
                if is_first:
                    warn(
                        f"The embedding store {self.path!r} cannot be used: {error}. Embeddings "
                        "are computed, and new ones are not kept. Check that the disk is not full, "
                        "that the folder is writable and that no other program locks the file; "
                        "delete the folder if the file is damaged. The store is tried again in a "
                        f"new process, or after embedding_store({self.folder!r}).close()."
                    )
                return None

    def _write(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Do ``work`` in one transaction, and delete what exceeds the bound."""

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                work(connection)
                if self.max_bytes is not None and _n_bytes(connection) > self.max_bytes:
                    _evict(connection, 0.9 * self.max_bytes)  # so that evictions are rare
                    self._known_files.clear()

        self._run(write, writes=True)

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and not os.path.exists(self.path):
            self._disconnect()  # the folder was deleted
        if self._connection is None:
            os.makedirs(self.folder, exist_ok=True)
            self._connection = sqlite3.connect(
                self.path,
                timeout=_BUSY_SECONDS,
                isolation_level="IMMEDIATE",
                check_same_thread=False,
            )
            # Also called at exit, because closing the last connection writes SQLite's log back.
            self._finalizer = weakref.finalize(self, self._connection.close)
            # SQLite fails at once, without waiting, if two processes create a file together.
            opening = self.lock("opening", 0)
            opening.acquire(timeout=_BUSY_SECONDS)
            try:
                _prepare(self._connection)
            finally:
                opening.release()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._finalizer()
            self._connection = None


class _FileLock:
    """A lock on a file, with the interface of `threading.Lock`."""

    def __init__(self, path: str):
        self._lock = filelock.FileLock(path, thread_local=False)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        try:
            self._lock.acquire(timeout, blocking=blocking)
        except filelock.Timeout:
            return False
        except (OSError, NotImplementedError):
            pass  # no locks on this file system: rows may be computed twice
        return True

    def release(self) -> None:
        self._lock.release()


# Forks ---------------------------------------------------------------------------------------
# SQLite's mutexes and its list of open files do not survive a fork: the child would wait for
# threads that it does not have (https://sqlite.org/howtocorrupt.html, 2.6). So a fork waits until
# no thread uses SQLite, and all files are closed before it.

_mutex = threading.RLock()
_stores: weakref.WeakSet[DiskStore] = weakref.WeakSet()


def _before_fork() -> None:
    _mutex.acquire()
    for store in list(_stores):
        store._disconnect()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_mutex.release, after_in_child=_mutex.release
    )


# SQL -----------------------------------------------------------------------------------------


def _prepare(connection: sqlite3.Connection) -> None:
    is_new = _value(connection, "SELECT count(*) FROM sqlite_master") == 0
    if not is_new and _value(connection, "PRAGMA user_version") != _FORMAT_VERSION:
        raise sqlite3.DatabaseError(
            f"it is not an embedding store of format {_FORMAT_VERSION}, but made by another "
            "program or a newer sktransfer; upgrade sktransfer, or give another folder as memory"
        )
    for setting in (*_LAYOUT, *_SETTINGS) if is_new else _SETTINGS:
        connection.execute(f"PRAGMA {setting}")
    if is_new:
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                connection.execute(statement)


def _read_rows(
    connection: sqlite3.Connection, fingerprint: str, digests: Sequence[bytes]
) -> dict[bytes, np.ndarray]:
    seed = zlib.crc32(fingerprint.encode())
    rows = {}
    for batch in _batches(digests):
        for digest, checksum, data in connection.execute(
            "SELECT digest, checksum, data FROM vectors WHERE fingerprint ="
            f" (SELECT id FROM fingerprints WHERE text = ?) AND digest IN ({_placeholders(batch)})",
            (fingerprint, *batch),
        ):
            is_whole = type(digest) is type(data) is bytes  # other types mean a damaged file
            if is_whole and zlib.crc32(data, zlib.crc32(digest, seed)) == checksum:
                rows[digest] = np.frombuffer(data, dtype="<f4")
    return rows


def _write_rows(
    connection: sqlite3.Connection, fingerprint: str, rows: dict[bytes, np.ndarray]
) -> None:
    connection.execute("INSERT OR IGNORE INTO fingerprints (text) VALUES (?)", (fingerprint,))
    group = _value(connection, "SELECT id FROM fingerprints WHERE text = ?", fingerprint)
    seed = zlib.crc32(fingerprint.encode())
    connection.executemany(
        "REPLACE INTO vectors (fingerprint, digest, checksum, data) VALUES (?, ?, ?, ?)",
        (
            (group, digest, zlib.crc32(row.data, zlib.crc32(digest, seed)), row.data)
            for digest, row in rows.items()
        ),
    )


def _read_files(connection: sqlite3.Connection, stats: Sequence[FileStat]) -> dict[FileStat, bytes]:
    """Return the digests of the files whose stat has not changed."""
    known = {}
    for batch in _batches(stats):
        by_path = {os.fsencode(stat[0]): stat for stat in batch}
        for path, digest, seal in connection.execute(
            f"SELECT path, digest, seal FROM files WHERE path IN ({_placeholders(by_path)})",
            list(by_path),
        ):
            stat = by_path.get(path)
            if stat is not None and seal == _seal(stat, digest):
                known[stat] = digest
    return known


def _write_files(connection: sqlite3.Connection, files: dict[FileStat, bytes]) -> None:
    connection.executemany(
        "REPLACE INTO files VALUES (?, ?, ?)",
        ((os.fsencode(stat[0]), digest, _seal(stat, digest)) for stat, digest in files.items()),
    )


def _seal(stat: FileStat, digest: bytes) -> bytes:
    return hashlib.blake2b(repr((stat, digest)).encode(), digest_size=16).digest()


def _evict(connection: sqlite3.Connection, n_bytes: float) -> None:
    """Delete the oldest rows until the file has at most so many bytes."""
    connection.execute("DELETE FROM files")  # such files are only read once more
    n_deleted = 1
    while n_deleted and _n_bytes(connection) > n_bytes:
        n_deleted = connection.execute(
            "DELETE FROM vectors WHERE id IN (SELECT id FROM vectors ORDER BY id LIMIT 64)"
        ).rowcount


def _delete_all(connection: sqlite3.Connection) -> None:
    for table in ("vectors", "files", "fingerprints"):
        connection.execute(f"DELETE FROM {table}")


def _summary(connection: sqlite3.Connection) -> tuple[int, int, dict[str, int]]:
    """Return the number of files, the bytes, and the number of rows of each fingerprint."""
    n_files = _value(connection, "SELECT count(*) FROM files")
    counts = connection.execute(
        "SELECT text, count(*) FROM vectors v JOIN fingerprints f ON f.id = v.fingerprint"
        " GROUP BY f.id"
    )
    return n_files, _n_bytes(connection), dict(counts)


def _n_bytes(connection: sqlite3.Connection) -> int:
    """Count the bytes of the pages in use; the end of the transaction gives back the others."""
    n_pages = _value(connection, "PRAGMA page_count") - _value(connection, "PRAGMA freelist_count")
    return n_pages * _value(connection, "PRAGMA page_size")


def _value(connection: sqlite3.Connection, question: str, *values: str):
    return connection.execute(question, values).fetchone()[0]


def _batches(values: Sequence[T]) -> Iterator[Sequence[T]]:
    return (values[start : start + _BATCH] for start in range(0, len(values), _BATCH))


def _placeholders(values: Sized) -> str:
    return ",".join("?" * len(values))
