"""The embedding store on disk: one SQLite file, shared by threads, processes and later runs."""

from __future__ import annotations

import datetime
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ._claims import is_gone, this_worker
from ._sqlite_file import SQLiteFile, transaction
from ._store_contract import FileStat, StoreInfo, as_bytes, in_words, is_settled

DEFAULT_DISK_BYTES = 10 * 2**30

FILE_NAME = "embeddings-v1.sqlite"
FORMAT_VERSION = 1
APPLICATION_ID = 0x736B7466  # "sktf"

SCHEMA = (
    "CREATE TABLE fingerprints"
    " (id INTEGER PRIMARY KEY AUTOINCREMENT, text TEXT NOT NULL UNIQUE, width INTEGER NOT NULL)",
    # Small rows apart from the vectors: marking one as used, counting, or looking for the
    # oldest reads and writes no vector. `used` is in seconds of the epoch.
    "CREATE TABLE keys (fingerprint INTEGER NOT NULL, digest BLOB NOT NULL, id INTEGER NOT NULL,"
    " used INTEGER NOT NULL, checksum INTEGER NOT NULL, PRIMARY KEY (fingerprint, digest))"
    " WITHOUT ROWID",
    # float32, little-endian, nothing else
    "CREATE TABLE vectors (id INTEGER PRIMARY KEY, data BLOB NOT NULL)",
    "CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,"
    " inode INTEGER NOT NULL, digest BLOB NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE claims (fingerprint TEXT NOT NULL, digest BLOB NOT NULL, owner TEXT NOT NULL,"
    " until REAL NOT NULL, PRIMARY KEY (fingerprint, digest)) WITHOUT ROWID",
)

# Values in one IN (...): fewer than the 999 of old SQLite, enough to forget Python's own cost.
_BATCH = 500
# Bytes of embeddings in one transaction: what a crash can lose, how long the others wait.
_CHUNK_BYTES = 16 * 2**20
# A use is noted at most once in so many seconds, so that reading seldom writes.
_NOTE_USE_AFTER = 3600
# After an eviction the store is filled to this part of its bound, so that it comes seldom.
_FILLED_AFTER_EVICTION = 0.9


class DiskStore:
    """Embeddings and file identities kept in a folder.

    Parameters
    ----------
    folder : str or os.PathLike
        Made when missing, when first written to.
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
        self._file = SQLiteFile(self.path, SCHEMA, FORMAT_VERSION, APPLICATION_ID)

    # Rows ------------------------------------------------------------------------------------

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
            chunk = dict(
                zip(digests[start : start + step], rows[start : start + step], strict=True)
            )

            def write(
                connection: sqlite3.Connection, chunk: dict[bytes, np.ndarray] = chunk
            ) -> None:
                with transaction(connection):
                    _write_rows(connection, fingerprint, rows.shape[1], chunk)
                    self._evict(connection)
                self._shrink(connection, self.max_bytes)

            self._file.run(write, None, writes=True)

    def _read(
        self,
        fingerprint: str,
        digests: Sequence[bytes],
        width: int | None,
        keep: Callable[[int, np.ndarray], None],
    ) -> None:
        seed = zlib.crc32(fingerprint.encode())
        note_before = int(time.time()) - _NOTE_USE_AFTER
        to_note: list[bytes] = []

        def read(connection: sqlite3.Connection) -> None:
            question = (
                "SELECT f.width, k.digest, k.checksum, k.used, v.data FROM fingerprints f"
                " CROSS JOIN keys k CROSS JOIN vectors v"
                " WHERE f.text = ? AND k.fingerprint = f.id AND v.id = k.id AND k.digest IN (%s)"
            )
            for start, batch in _batches(digests):
                whole: dict[bytes, np.ndarray] = {}
                for n, digest, checksum, used, data in connection.execute(
                    question % _marks(batch), (fingerprint, *batch)
                ):
                    n = n if width is None else width
                    if (
                        not isinstance(data, bytes)
                        or zlib.crc32(data, zlib.crc32(digest, seed)) != checksum
                    ):
                        self._file.warn_once(
                            "row",
                            f"The embedding store {self.path!r} holds damaged rows; they are "
                            "computed again. Its disk may be failing.",
                        )
                    elif len(data) == 4 * n:
                        whole[digest] = np.frombuffer(data, dtype="<f4")
                        if used < note_before:
                            to_note.append(digest)
                for i, digest in enumerate(batch, start):
                    if digest in whole:
                        keep(i, whole[digest])

        self._file.run(read, None)
        if to_note and not self._file.is_read_only:
            self._file.run(lambda connection: _note_use(connection, fingerprint, to_note), None)

    # Files -----------------------------------------------------------------------------------

    def get_file_digests(self, stats: Sequence[FileStat | None]) -> list[bytes | None]:
        """The content digests of files that are as they were; None for all others."""
        rows = [_file_row(stat) for stat in stats if stat is not None]

        def read(connection: sqlite3.Connection) -> dict[tuple, bytes]:
            known = {}
            for _, batch in _batches([row[0] for row in rows]):
                for *row, digest, checksum in connection.execute(
                    "SELECT path, size, mtime_ns, inode, digest, checksum FROM files"
                    f" WHERE path IN ({_marks(batch)})",
                    batch,
                ):
                    if _file_checksum(row, digest) == checksum:
                        known[tuple(row)] = digest
            return known

        known = self._file.run(read, {}) if rows else {}
        return [None if stat is None else known.get(_file_row(stat)) for stat in stats]

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
        rows = [
            (*row, digest, _file_checksum(row, digest))
            for stat, digest in zip(stats, digests, strict=True)
            if stat is not None and is_settled(stat, taken_at_ns)
            for row in [_file_row(stat)]
        ]

        def write(connection: sqlite3.Connection) -> None:
            with transaction(connection):
                connection.executemany("REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", rows)

        if rows:
            self._file.run(write, None, writes=True)

    # Claims ----------------------------------------------------------------------------------

    def claim(
        self, fingerprint: str, digests: Sequence[bytes], seconds: float = 60.0
    ) -> np.ndarray:
        """Say which rows this thread will compute, so that other processes leave them.

        True where the row is neither here nor claimed by another within its time, or by a
        process of this machine that has ended. With no store to write to, all is True.
        """
        mine = np.ones(len(digests), dtype=bool)
        me, now = this_worker(), time.time()

        def write(connection: sqlite3.Connection) -> np.ndarray:
            taken: set[bytes] = set()
            with transaction(connection):
                for _, batch in _batches(digests):
                    taken.update(_present(connection, fingerprint, batch))
                    taken.update(
                        digest
                        for digest, owner in connection.execute(
                            "SELECT digest, owner FROM claims WHERE fingerprint = ? AND until > ?"
                            f" AND owner <> ? AND digest IN ({_marks(batch)})",
                            (fingerprint, now, me, *batch),
                        )
                        if not is_gone(owner)
                    )
                connection.executemany(
                    "REPLACE INTO claims VALUES (?, ?, ?, ?)",
                    ((fingerprint, d, me, now + seconds) for d in digests if d not in taken),
                )
            return np.array([digest not in taken for digest in digests], dtype=bool)

        return self._file.run(write, mine, writes=True)

    def release(self, fingerprint: str, digests: Sequence[bytes]) -> None:
        """Give claims of this thread back; ``put_many`` does so by itself."""

        def write(connection: sqlite3.Connection) -> None:
            with transaction(connection):
                connection.executemany(
                    "DELETE FROM claims WHERE fingerprint = ? AND digest = ? AND owner = ?",
                    ((fingerprint, digest, this_worker()) for digest in digests),
                )

        self._file.run(write, None, writes=True)

    # Size ------------------------------------------------------------------------------------

    def reduce_size(
        self,
        bytes_limit: int | str | None = None,
        items_limit: int | None = None,
        age_limit: datetime.timedelta | None = None,
    ) -> None:
        """Delete the least recently used rows until all limits hold, as ``joblib.Memory`` does.

        The file shrinks with them.
        """
        limit = as_bytes(bytes_limit, "bytes_limit")

        def write(connection: sqlite3.Connection) -> None:
            with transaction(connection):
                if age_limit is not None:
                    oldest = time.time() - age_limit.total_seconds()
                    _delete(connection, _oldest_first(connection, "WHERE used < ?", oldest))
                if items_limit is not None:
                    n_rows = connection.execute("SELECT count(*) FROM keys").fetchone()[0]
                    n_doomed = max(0, n_rows - items_limit)
                    _delete(connection, _oldest_first(connection, "", limit=n_doomed))
                if limit is not None:
                    self._evict(connection, limit, limit)
                _forget_files(connection)
            self._shrink(connection, 0)

        self._file.run(write, None, writes=True)

    def clear(self) -> None:
        """Forget everything; the file shrinks to nearly nothing."""

        def write(connection: sqlite3.Connection) -> None:
            with transaction(connection):
                for table in ("keys", "vectors", "files", "claims", "fingerprints"):
                    connection.execute(f"DELETE FROM {table}")
            self._shrink(connection, 0)

        self._file.run(write, None, writes=True)

    def info(self) -> StoreInfo:
        """What is kept."""

        def read(connection: sqlite3.Connection) -> StoreInfo:
            counts = dict(
                connection.execute(
                    "SELECT f.text, count(*) FROM keys k JOIN fingerprints f"
                    " ON f.id = k.fingerprint GROUP BY f.text ORDER BY f.id"
                )
            )
            n_files = connection.execute("SELECT count(*) FROM files").fetchone()[0]
            n_bytes = _used_bytes(connection)
            return StoreInfo(
                self.path, sum(counts.values()), n_bytes, self.max_bytes, n_files, counts
            )

        return self._file.run(read, StoreInfo(self.path, 0, 0, self.max_bytes, 0, {}))

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._file.close()

    def _evict(
        self, connection: sqlite3.Connection, bound: int | None = None, target: int | None = None
    ) -> None:
        bound = self.max_bytes if bound is None else bound
        if bound is None or _used_bytes(connection) <= bound:
            return
        if target is None:
            target = int(bound * _FILLED_AFTER_EVICTION)
        _forget_files(connection)
        doomed = _oldest_first(connection)
        for start in range(0, len(doomed), 64):
            if _used_bytes(connection) <= target:
                break
            _delete(connection, doomed[start : start + 64])

    def _shrink(self, connection: sqlite3.Connection, bound: int | None) -> None:
        """Give pages without content back to the file system while the file exceeds its bound."""
        if bound is None:
            return
        page_bytes, n_pages, n_free = _pages(connection)
        n_excess = min(n_free, n_pages - bound // page_bytes)
        if n_excess > 0:
            # Each step frees one page, so that all must be asked for.
            connection.execute(f"PRAGMA incremental_vacuum({n_excess})").fetchall()

    def __deepcopy__(self, memo: dict) -> DiskStore:
        return self

    def __reduce__(self) -> tuple:
        return (DiskStore, (self.folder, self.max_bytes))

    def __repr__(self) -> str:
        return f"DiskStore({self.folder!r}, max_bytes={self.max_bytes}): at most " + in_words(
            self.max_bytes
        )


def _batches(values: Sequence[bytes]) -> Iterator[tuple[int, Sequence[bytes]]]:
    for start in range(0, len(values), _BATCH):
        yield start, values[start : start + _BATCH]


def _marks(values: Sequence) -> str:
    return ",".join("?" * len(values))


def _pages(connection: sqlite3.Connection) -> tuple[int, int, int]:
    page_bytes, n_pages, n_free = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_size", "page_count", "freelist_count")
    )
    return page_bytes, n_pages, n_free


def _used_bytes(connection: sqlite3.Connection) -> int:
    page_bytes, n_pages, n_free = _pages(connection)
    return page_bytes * (n_pages - n_free)


def _write_rows(
    connection: sqlite3.Connection, fingerprint: str, width: int, rows: dict[bytes, np.ndarray]
) -> None:
    execute, many = connection.execute, connection.executemany
    execute(
        "INSERT INTO fingerprints (text, width) VALUES (?, ?)"
        " ON CONFLICT (text) DO UPDATE SET width = excluded.width WHERE width <> excluded.width",
        (fingerprint, width),
    )
    group = execute("SELECT id FROM fingerprints WHERE text = ?", (fingerprint,)).fetchone()[0]
    digests = list(rows)
    # What is written anew gets a new place: should damage have two keys share one, they part.
    for _, batch in _batches(digests):
        question = f"FROM keys WHERE fingerprint = ? AND digest IN ({_marks(batch)})"
        execute(f"DELETE FROM vectors WHERE id IN (SELECT id {question})", (group, *batch))
    first = execute("SELECT coalesce(max(id), 0) + 1 FROM vectors").fetchone()[0]
    seed, now = zlib.crc32(fingerprint.encode()), int(time.time())
    blobs = [row.tobytes() for row in rows.values()]
    many("INSERT INTO vectors VALUES (?, ?)", enumerate(blobs, first))
    many(
        "REPLACE INTO keys VALUES (?, ?, ?, ?, ?)",
        (
            (group, digest, first + i, now, zlib.crc32(blob, zlib.crc32(digest, seed)))
            for i, (digest, blob) in enumerate(zip(digests, blobs, strict=True))
        ),
    )
    if execute("SELECT EXISTS (SELECT 1 FROM claims)").fetchone()[0]:
        many(
            "DELETE FROM claims WHERE fingerprint = ? AND digest = ?",
            ((fingerprint, digest) for digest in digests),
        )


def _present(
    connection: sqlite3.Connection, fingerprint: str, digests: Sequence[bytes]
) -> Iterator[bytes]:
    for (digest,) in connection.execute(
        "SELECT k.digest FROM fingerprints f CROSS JOIN keys k"
        f" WHERE f.text = ? AND k.fingerprint = f.id AND k.digest IN ({_marks(digests)})",
        (fingerprint, *digests),
    ):
        yield digest


def _note_use(connection: sqlite3.Connection, fingerprint: str, digests: list[bytes]) -> None:
    """Write down that the rows were used now, unless somebody else is writing."""
    timeout = connection.execute("PRAGMA busy_timeout").fetchone()[0]
    connection.execute("PRAGMA busy_timeout = 100")
    try:
        with transaction(connection):
            connection.executemany(
                "UPDATE keys SET used = ? WHERE digest = ? AND fingerprint ="
                " (SELECT id FROM fingerprints WHERE text = ?)",
                ((int(time.time()), digest, fingerprint) for digest in digests),
            )
    except sqlite3.OperationalError:
        pass  # the next reader will
    finally:
        connection.execute(f"PRAGMA busy_timeout = {timeout}")


def _oldest_first(
    connection: sqlite3.Connection, where: str = "", *values: float, limit: int = -1
) -> list[tuple[int, bytes, int]]:
    return connection.execute(
        f"SELECT fingerprint, digest, id FROM keys {where} ORDER BY used, id LIMIT ?",
        (*values, limit),
    ).fetchall()


def _delete(connection: sqlite3.Connection, keys: list[tuple[int, bytes, int]]) -> None:
    connection.executemany(
        "DELETE FROM keys WHERE fingerprint = ? AND digest = ?", [key[:2] for key in keys]
    )
    connection.executemany("DELETE FROM vectors WHERE id = ?", [key[2:] for key in keys])


def _forget_files(connection: sqlite3.Connection) -> None:
    """Forget files that no row stands for: they are gone, or will be looked at again."""
    connection.execute("DELETE FROM files WHERE digest NOT IN (SELECT digest FROM keys)")


def _file_row(stat: FileStat) -> tuple[bytes, int, int, int]:
    path, size, mtime_ns, inode = stat
    # Inodes may take 64 bits without a sign; SQLite's integers have one.
    return os.fsencode(path), size, mtime_ns, inode & (2**63 - 1)


def _file_checksum(row: Sequence, digest: bytes) -> int:
    return zlib.crc32(repr((tuple(row), digest)).encode())
