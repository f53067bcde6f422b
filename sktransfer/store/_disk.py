"""The embedding store on disk: one SQLite file, shared by threads, processes and later runs."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import sqlite3
import threading
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Self, TypeVar

import filelock
import numpy as np

from sktransfer.store._info import FileStat, Lock, StoreInfo, as_bytes, in_words, is_settled

DEFAULT_DISK_BYTES = 10 * 2**30
FILE_NAME = "embeddings-v2.sqlite"

_FORMAT_VERSION = 2
_APPLICATION_ID = 0x736B7466  # "sktf" (https://sqlite.org/fileformat.html, offset 68)
_SCHEMA = (
    "CREATE TABLE fingerprints (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE)",
    # A new row has the greatest id: the oldest rows have the least. `data` is little-endian
    # float32, `checksum` the CRC-32 of fingerprint, digest and data.
    "CREATE TABLE vectors (id INTEGER PRIMARY KEY, fingerprint INTEGER NOT NULL,"
    " digest BLOB NOT NULL, checksum INTEGER NOT NULL, data BLOB NOT NULL,"
    " UNIQUE (fingerprint, digest))",
    # `seal` is a hash of stat and digest: it fits neither a changed file nor a damaged digest.
    "CREATE TABLE files (path BLOB PRIMARY KEY, digest BLOB NOT NULL, seal BLOB NOT NULL)"
    " WITHOUT ROWID",
    f"PRAGMA user_version = {_FORMAT_VERSION}",
    f"PRAGMA application_id = {_APPLICATION_ID}",
)
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

# How long to wait for another process that writes.
_BUSY_SECONDS = 60.0
# Bytes of rows in one transaction: what a crash can lose, and how long other writers wait.
_CHUNK_BYTES = 16 * 2**20
# Values in one IN (...): enough to hide Python's own cost, few enough that the rows found are
# still in the processor's cache when they are copied.
_BATCH = 100
# An eviction goes down to this part of the bound, so that it is rare.
_FILLED_AFTER_EVICTION = 0.9
# File identities remembered in this process: about 50 MB.
_N_KNOWN_FILES = 100_000

Result = TypeVar("Result")
T = TypeVar("T")


class DiskStore:
    """Embeddings and file identities kept in a folder.

    Parameters
    ----------
    folder : str or os.PathLike
        Made when missing, on first use.
    max_bytes : int, str or None, default=10 GiB
        The bound on the file, beyond which the oldest rows go first. None is no bound.

    Notes
    -----
    Any number of threads and processes may use a folder at once. Rows carry a checksum; a row
    that fails it counts as missing. No pickle is ever read. If the file cannot be used (a full
    disk, a missing permission, damage, a newer format, a lock held for a minute), the store warns
    once, and embeddings are computed without it until ``close`` is called.
    """

    def __init__(
        self, folder: str | os.PathLike[str], max_bytes: int | str | None = DEFAULT_DISK_BYTES
    ):
        self.folder = os.path.abspath(os.path.expanduser(os.fspath(folder)))
        self.max_bytes = as_bytes(max_bytes)
        self.path = os.path.join(self.folder, FILE_NAME)
        self._known_files: dict[FileStat, bytes] = {}
        self._connection: sqlite3.Connection | None = None
        self._has_failed = self._is_read_only = False
        _stores.add(self)

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
        found = np.zeros(len(digests), dtype=bool)

        def fill(i: int, row: np.ndarray) -> None:
            if row.shape == out.shape[1:]:
                out[i] = row
                found[i] = True

        self._run(lambda connection: _read_rows(connection, fingerprint, digests, fill), None)
        return found

    def get_many(self, fingerprint: str, digests: Sequence[bytes]) -> list[np.ndarray | None]:
        """The rows (read-only arrays), None for each that is not kept."""
        rows: list[np.ndarray | None] = [None] * len(digests)
        self._run(
            lambda connection: _read_rows(connection, fingerprint, digests, rows.__setitem__), None
        )
        return rows

    def put_many(self, fingerprint: str, digests: Sequence[bytes], rows: np.ndarray) -> None:
        """Keep ``rows``, float32 of shape (n_images, width), replacing earlier ones."""
        rows = np.ascontiguousarray(rows, dtype="<f4")
        if rows.ndim != 2 or len(rows) != len(digests):
            raise ValueError(
                f"rows must have the shape (n_images, width) with one row for each of the "
                f"{len(digests)} digests; got {rows.shape}."
            )
        step = max(1, _CHUNK_BYTES // max(1, rows[:1].nbytes))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            chunk = dict(zip(digests[part], rows[part], strict=True))
            self._write(lambda connection: _write_rows(connection, fingerprint, chunk))  # noqa: B023

    def get_file_digests(self, stats: Sequence[FileStat | None]) -> list[bytes | None]:
        """The content digests of files whose stat has not changed; None for all others."""
        digests = [None if stat is None else self._known_files.get(stat) for stat in stats]
        unknown = [
            stat
            for stat, digest in zip(stats, digests, strict=True)
            if stat is not None and digest is None
        ]
        if not unknown:
            return digests
        none: dict[FileStat, bytes] = {}
        read = self._run(lambda connection: _read_files(connection, unknown), none)
        self._remember(read)
        return [
            read.get(stat) if stat is not None and digest is None else digest
            for stat, digest in zip(stats, digests, strict=True)
        ]

    def put_file_digests(
        self,
        stats: Sequence[FileStat | None],
        digests: Sequence[bytes],
        taken_at_ns: int | None = None,
    ) -> None:
        """Remember the digests of files, except files changed less than 2 s before their stat.

        ``taken_at_ns`` is ``time.time_ns()`` of just before the stats were taken, which was
        before the files were read; None is now.
        """
        files = {
            stat: digest
            for stat, digest in zip(stats, digests, strict=True)
            if stat is not None and is_settled(stat, taken_at_ns)
        }
        if files:
            self._write(lambda connection: _write_files(connection, files))
            self._remember(files)

    def _remember(self, files: dict[FileStat, bytes]) -> None:
        room = max(0, _N_KNOWN_FILES - len(self._known_files))
        self._known_files.update(itertools.islice(files.items(), room))

    def lock(self, fingerprint: str, block: int) -> Lock:
        """The lock to hold while computing the rows of one fingerprint and block of digests.

        ``acquire(blocking, timeout)`` and ``release()`` work as in `threading.Lock`. It excludes
        other threads and processes, and is freed when its process dies. Where no file can be
        locked, it is always free.
        """
        folder = os.path.join(self.folder, "locks")
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError:
            return threading.Lock()
        if self._has_failed or self._is_read_only:
            return threading.Lock()
        name = hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()
        return _FileLock(os.path.join(folder, f"{name}-{block}.lock"))

    def clear(self) -> None:
        """Forget everything; the file shrinks to nearly nothing."""

        def delete(connection: sqlite3.Connection) -> None:
            for table in ("vectors", "files", "fingerprints"):
                connection.execute(f"DELETE FROM {table}")

        self._known_files.clear()
        self._write(delete, file_bytes=0)
        shutil.rmtree(os.path.join(self.folder, "locks"), ignore_errors=True)

    def __len__(self) -> int:
        return self._run(lambda c: c.execute("SELECT count(*) FROM vectors").fetchone()[0], 0)

    def info(self) -> StoreInfo:
        """What is kept."""

        def read(connection: sqlite3.Connection) -> StoreInfo:
            counts = dict(
                connection.execute(
                    "SELECT f.text, count(*) FROM vectors v JOIN fingerprints f"
                    " ON f.id = v.fingerprint GROUP BY f.id"
                )
            )
            (n_files,) = connection.execute("SELECT count(*) FROM files").fetchone()
            n_bytes = _used_bytes(connection)
            n_rows = sum(counts.values())
            return StoreInfo(self.path, n_rows, n_bytes, self.max_bytes, n_files, counts)

        return self._run(read, StoreInfo(self.path, 0, 0, self.max_bytes, 0))

    def close(self) -> None:
        """Close the file; the next use opens it again, also after a failure."""
        with _mutex:
            self._disconnect()
            self._has_failed = False

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    def __reduce__(self) -> tuple:
        return (DiskStore, (self.folder, self.max_bytes))

    def __repr__(self) -> str:
        return f"<DiskStore in {self.folder!r}, at most {in_words(self.max_bytes)}>"

    # The file --------------------------------------------------------------------------------

    def _run(self, work: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        """``work(connection)``, or ``otherwise`` where the file cannot be used."""
        with _mutex:
            if self._has_failed:
                return otherwise
            try:
                return work(self._connected())
            except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
                self._has_failed = True
                self._disconnect()
                warnings.warn(
                    f"The embedding store {self.path!r} cannot be used: {error}. Embeddings are "
                    "computed and not kept. Check that the disk is not full, that the folder is "
                    "writable and that no other program locks the file; delete the file if it is "
                    "damaged. It is tried again in a new process, or after "
                    f"embedding_store({self.folder!r}).close().",
                    UserWarning,
                    stacklevel=2,
                )
                return otherwise

    def _write(
        self, work: Callable[[sqlite3.Connection], None], file_bytes: int | None = None
    ) -> None:
        """Run ``work`` in a transaction, then make the file fit the bound, or ``file_bytes``."""

        def write(connection: sqlite3.Connection) -> None:
            if self._is_read_only:
                return
            bound = self.max_bytes if file_bytes is None else file_bytes
            with connection:
                work(connection)
                if bound is not None and _used_bytes(connection) > bound:
                    _evict(connection, int(bound * _FILLED_AFTER_EVICTION))
                    self._known_files.clear()
            if bound is not None:
                _shrink_file(connection, bound)

        self._run(write, None)

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and not os.path.exists(self.path):
            self._disconnect()  # somebody has deleted the folder
        if self._connection is not None:
            return self._connection
        os.makedirs(self.folder, exist_ok=True)
        self._is_read_only = os.path.exists(self.path) and not os.access(
            self.path, os.W_OK, effective_ids=os.access in os.supports_effective_ids
        )
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, isolation_level="IMMEDIATE", check_same_thread=False
        )
        self._connection = connection
        # Called at exit as well: closing the last connection writes SQLite's log back.
        self._finalizer = weakref.finalize(self, connection.close)
        try:
            self._prepare(connection)
        except BaseException:
            self._disconnect()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        is_new = _is_empty(connection)
        if self._is_read_only:
            warnings.warn(
                f"The embedding store {self.path!r} is read-only: the embeddings in it are used, "
                "new ones are not kept. Make it writable, or give another folder as memory.",
                UserWarning,
                stacklevel=2,
            )
            return
        if is_new:
            # Rows of 8 KB, the widest common ones, leave an eighth of such pages empty; read and
            # written fastest of 4, 8, 16 and 32 KiB.
            connection.execute("PRAGMA page_size = 8192")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        for setting in _SETTINGS:
            connection.execute(f"PRAGMA {setting}")
        if is_new:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                if _is_empty(connection):  # no other process was faster
                    for statement in _SCHEMA:
                        connection.execute(statement)

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
            pass  # no locks on this file system: computing a row twice is the lesser evil
        return True

    def release(self) -> None:
        self._lock.release()


# Forks ---------------------------------------------------------------------------------------
# SQLite's mutexes and its list of open files do not survive a fork: the child would wait for
# threads that it does not have (https://sqlite.org/howtocorrupt.html, 2.6). So a fork waits until
# no thread is inside SQLite, and finds every file closed.

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


def _is_empty(connection: sqlite3.Connection) -> bool:
    """Whether the file has no tables yet; raises for one that is not ours."""
    (n_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if n_tables == 0:
        return True
    if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
        raise sqlite3.DatabaseError("it is an SQLite file of another program")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != _FORMAT_VERSION:
        raise sqlite3.DatabaseError(
            f"it has format {version} of a newer sktransfer, and this version reads format "
            f"{_FORMAT_VERSION}; upgrade sktransfer or give another folder as memory"
        )
    return False


def _read_rows(
    connection: sqlite3.Connection,
    fingerprint: str,
    digests: Sequence[bytes],
    fill: Callable[[int, np.ndarray], None],
) -> None:
    """Call ``fill(i, row)`` for each digest that has a row."""
    seed = zlib.crc32(fingerprint.encode())
    for start, batch in _batches(digests):
        rows = {
            digest: np.frombuffer(data, dtype="<f4")
            for digest, checksum, data in connection.execute(
                "SELECT digest, checksum, data FROM vectors WHERE fingerprint ="
                f" (SELECT id FROM fingerprints WHERE text = ?) AND digest IN ({_marks(batch)})",
                (fingerprint, *batch),
            )
            if isinstance(data, bytes) and zlib.crc32(data, zlib.crc32(digest, seed)) == checksum
        }
        for i, digest in enumerate(batch, start):
            if digest in rows:
                fill(i, rows[digest])


def _write_rows(
    connection: sqlite3.Connection, fingerprint: str, rows: dict[bytes, np.ndarray]
) -> None:
    connection.execute("INSERT OR IGNORE INTO fingerprints (text) VALUES (?)", (fingerprint,))
    (group,) = connection.execute(
        "SELECT id FROM fingerprints WHERE text = ?", (fingerprint,)
    ).fetchone()
    seed = zlib.crc32(fingerprint.encode())
    connection.executemany(
        "REPLACE INTO vectors (fingerprint, digest, checksum, data) VALUES (?, ?, ?, ?)",
        (
            (group, digest, zlib.crc32(row.data, zlib.crc32(digest, seed)), row.data)
            for digest, row in rows.items()
        ),
    )


def _read_files(connection: sqlite3.Connection, stats: Sequence[FileStat]) -> dict[FileStat, bytes]:
    known = {}
    for _, batch in _batches(stats):
        paths = [os.fsencode(stat[0]) for stat in batch]
        rows = {
            path: (digest, seal)
            for path, digest, seal in connection.execute(
                f"SELECT path, digest, seal FROM files WHERE path IN ({_marks(batch)})", paths
            )
        }
        for path, stat in zip(paths, batch, strict=True):
            digest, seal = rows.get(path, (None, None))
            if digest is not None and seal == _seal(stat, digest):
                known[stat] = digest
    return known


def _write_files(connection: sqlite3.Connection, files: dict[FileStat, bytes]) -> None:
    connection.executemany(
        "REPLACE INTO files VALUES (?, ?, ?)",
        ((os.fsencode(stat[0]), digest, _seal(stat, digest)) for stat, digest in files.items()),
    )


def _seal(stat: FileStat, digest: bytes) -> bytes:
    return hashlib.blake2b(repr((stat, digest)).encode(), digest_size=16).digest()


def _evict(connection: sqlite3.Connection, n_bytes: int) -> None:
    """Delete the oldest rows until `_used_bytes` is at most so many."""
    connection.execute("DELETE FROM files")  # they only save reading files once more
    n_deleted = 1
    while n_deleted and _used_bytes(connection) > n_bytes:
        n_deleted = connection.execute(
            "DELETE FROM vectors WHERE id IN (SELECT id FROM vectors ORDER BY id LIMIT 64)"
        ).rowcount


def _shrink_file(connection: sqlite3.Connection, n_bytes: int) -> None:
    """Give free pages back to the file system while the file is larger; not in a transaction."""
    page_bytes, n_pages, n_free = _pages(connection)
    n_excess = min(n_free, n_pages - n_bytes // page_bytes)
    if n_excess > 0:
        # Each step frees one page and gives a row without columns, after which execute() stops.
        connection.executescript(f"PRAGMA incremental_vacuum({n_excess})")


def _used_bytes(connection: sqlite3.Connection) -> int:
    page_bytes, n_pages, n_free = _pages(connection)
    return page_bytes * (n_pages - n_free)


def _pages(connection: sqlite3.Connection) -> list[int]:
    names = ("page_size", "page_count", "freelist_count")
    return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]


def _batches(values: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
    for start in range(0, len(values), _BATCH):
        yield start, values[start : start + _BATCH]


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))
