"""The tables of the store on disk, and every statement that is run on them.

Functions that write are called within a transaction.
"""

from __future__ import annotations

import os
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sktransfer.store._claims import is_gone, this_worker
from sktransfer.store._info import FILES_SHARE, FileStat
from sktransfer.store._sqlite_file import transaction

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

# Values in one IN (...): enough to forget Python's own cost, few enough that the rows found
# are still in the processor's cache when they are copied out.
_BATCH = 100
_FILE_BYTES = 50  # of what is known of a file, beside its path


class StoredRow(NamedTuple):
    """A row as it was found; ``vector`` is None where its checksum does not fit."""

    digest: bytes
    width: int
    used: int
    checksum: int
    vector: np.ndarray | None


# Rows ----------------------------------------------------------------------------------------


def read_rows(
    connection: sqlite3.Connection, fingerprint: str, digests: Sequence[bytes]
) -> Iterator[tuple[int, Sequence[bytes], dict[bytes, StoredRow]]]:
    """Batches of (index of the first digest, digests, rows found)."""
    seed = zlib.crc32(fingerprint.encode())
    for start, batch in _batches(digests):
        found = {}
        for width, digest, checksum, used, data in connection.execute(
            # CROSS JOIN keeps SQLite's planner to this order.
            "SELECT f.width, k.digest, k.checksum, k.used, v.data FROM fingerprints f"
            " CROSS JOIN keys k CROSS JOIN vectors v WHERE f.text = ? AND k.fingerprint = f.id"
            f" AND v.id = k.id AND k.digest IN ({_marks(batch)})",
            (fingerprint, *batch),
        ):
            vector = None
            if (
                isinstance(data, bytes)
                and len(data) % 4 == 0
                and zlib.crc32(data, zlib.crc32(digest, seed)) == checksum
            ):
                vector = np.frombuffer(data, dtype="<f4")
            found[digest] = StoredRow(digest, width, used, checksum, vector)
        yield start, batch, found


def write_rows(
    connection: sqlite3.Connection, fingerprint: str, width: int, rows: dict[bytes, np.ndarray]
) -> None:
    """Write rows (little-endian float32), in place of any of the same keys."""
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
    first = execute("SELECT coalesce(max(id), 0) FROM vectors").fetchone()[0] + 1
    if first > 2**62:
        raise sqlite3.DatabaseError("the numbers of rows are damaged")
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


def note_reading(
    connection: sqlite3.Connection,
    fingerprint: str,
    used: Sequence[bytes],
    damaged: Sequence[tuple[bytes, int]],
) -> None:
    """Mark rows as used now and forget damaged (digest, checksum), unless others are writing."""
    timeout = connection.execute("PRAGMA busy_timeout").fetchone()[0]
    connection.execute("PRAGMA busy_timeout = 100")
    group = "(SELECT id FROM fingerprints WHERE text = ?)"
    try:
        with transaction(connection):
            connection.executemany(
                f"UPDATE keys SET used = ? WHERE digest = ? AND fingerprint = {group}",
                ((int(time.time()), digest, fingerprint) for digest in used),
            )
            connection.executemany(
                f"DELETE FROM keys WHERE digest = ? AND checksum = ? AND fingerprint = {group}",
                ((*row, fingerprint) for row in damaged),
            )
    except sqlite3.OperationalError:
        pass  # the next reader will
    finally:
        connection.execute(f"PRAGMA busy_timeout = {timeout}")


def check_keys(connection: sqlite3.Connection) -> None:
    """Raise as SQLite does for a damaged file where keys are out of order.

    Searching such a table raises nothing, and may miss for ever what is written to it.
    """
    (answer,) = connection.execute("PRAGMA integrity_check(keys)").fetchone()
    if answer != "ok":
        raise sqlite3.DatabaseError(answer.splitlines()[-1])


def row_counts(connection: sqlite3.Connection) -> dict[str, int]:
    """Rows of each fingerprint."""
    return dict(
        connection.execute(
            "SELECT f.text, count(*) FROM keys k JOIN fingerprints f ON f.id = k.fingerprint"
            " GROUP BY f.id ORDER BY f.id"
        )
    )


# Files ---------------------------------------------------------------------------------------


def read_files(
    connection: sqlite3.Connection, stats: Sequence[FileStat | None]
) -> list[bytes | None]:
    """The digests of the files that are as they were."""
    rows = [None if stat is None else _file_row(stat) for stat in stats]
    known: dict[tuple, bytes] = {}
    for _, batch in _batches([row[0] for row in rows if row is not None]):
        for *row, digest, checksum in connection.execute(
            "SELECT path, size, mtime_ns, inode, digest, checksum FROM files"
            f" WHERE path IN ({_marks(batch)})",
            batch,
        ):
            if _file_checksum(row, digest) == checksum:
                known[tuple(row)] = digest
    return [None if row is None else known.get(row) for row in rows]


def write_files(connection: sqlite3.Connection, files: Sequence[tuple[FileStat, bytes]]) -> None:
    """Remember what files hold."""
    connection.executemany(
        "REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)",
        (
            (*row, digest, _file_checksum(row, digest))
            for stat, digest in files
            for row in [_file_row(stat)]
        ),
    )


def _file_row(stat: FileStat) -> tuple[bytes, int, int, int]:
    path, size, mtime_ns, inode = stat
    # Inodes may take 64 bits without a sign; SQLite's integers have one.
    return os.fsencode(path), size, mtime_ns, inode & (2**63 - 1)


def _file_checksum(row: Sequence, digest: bytes) -> int:
    return zlib.crc32(repr((tuple(row), digest)).encode())


# Claims --------------------------------------------------------------------------------------


def present_digests(
    connection: sqlite3.Connection, fingerprints: Sequence[str], digests: Sequence[bytes]
) -> set[bytes]:
    """The digests that have a row of every fingerprint."""
    present = set(digests)
    for fingerprint in fingerprints:
        with_row: set[bytes] = set()
        for _, batch in _batches(list(present)):
            with_row.update(
                digest
                for (digest,) in connection.execute(
                    "SELECT k.digest FROM fingerprints f CROSS JOIN keys k"
                    f" WHERE f.text = ? AND k.fingerprint = f.id AND k.digest IN ({_marks(batch)})",
                    (fingerprint, *batch),
                )
            )
        present &= with_row
    return present


def claimed_digests(
    connection: sqlite3.Connection, fingerprint: str, digests: Sequence[bytes]
) -> set[bytes]:
    """The digests that a living other has claimed."""
    me, now = this_worker(), time.time()
    claimed: set[bytes] = set()
    for _, batch in _batches(digests):
        for digest, owner in connection.execute(
            "SELECT digest, owner FROM claims WHERE fingerprint = ? AND until > ? AND owner <> ?"
            f" AND digest IN ({_marks(batch)})",
            (fingerprint, now, me, *batch),
        ):
            if isinstance(owner, str) and not is_gone(owner):
                claimed.add(digest)
    return claimed


def write_claims(
    connection: sqlite3.Connection, fingerprint: str, digests: Sequence[bytes], until: float
) -> None:
    """Claim rows for this thread."""
    me = this_worker()
    connection.executemany(
        "REPLACE INTO claims VALUES (?, ?, ?, ?)",
        ((fingerprint, digest, me, until) for digest in digests),
    )


def delete_claims(
    connection: sqlite3.Connection, fingerprint: str, digests: Sequence[bytes]
) -> None:
    """Give back what this thread has claimed."""
    me = this_worker()
    connection.executemany(
        "DELETE FROM claims WHERE fingerprint = ? AND digest = ? AND owner = ?",
        ((fingerprint, digest, me) for digest in digests),
    )


# Size ----------------------------------------------------------------------------------------


def used_bytes(connection: sqlite3.Connection) -> int:
    """Bytes of the pages with something on them."""
    page_bytes, n_pages, n_free = _pages(connection)
    return page_bytes * (n_pages - n_free)


def delete_older(connection: sqlite3.Connection, used_before: float) -> None:
    """Delete rows not used since."""
    _delete(connection, _oldest_first(connection, "WHERE used < ?", used_before))


def delete_down_to_rows(connection: sqlite3.Connection, n_rows: int) -> None:
    """Delete the least recently used rows but so many."""
    n_now = connection.execute("SELECT count(*) FROM keys").fetchone()[0]
    if n_now > n_rows:
        _delete(connection, _oldest_first(connection, "LIMIT ?", n_now - n_rows))


def delete_down_to_bytes(connection: sqlite3.Connection, n_bytes: int) -> None:
    """Delete the least recently used rows until `used_bytes` is at most so many."""
    if used_bytes(connection) <= n_bytes:
        return
    delete_loose_files(connection)
    (file_bytes,) = connection.execute(
        f"SELECT total(length(path) + {_FILE_BYTES}) FROM files"
    ).fetchone()
    if file_bytes > FILES_SHARE * n_bytes:  # a known file saves only a reading
        connection.execute("DELETE FROM files")
    doomed = _oldest_first(connection)
    for start in range(0, len(doomed), 64):
        if used_bytes(connection) <= n_bytes:
            break
        _delete(connection, doomed[start : start + 64])


def delete_loose_files(connection: sqlite3.Connection) -> None:
    """Forget files that no row stands for: they are gone, or will be looked at again."""
    connection.execute("DELETE FROM files WHERE digest NOT IN (SELECT digest FROM keys)")


def delete_all(connection: sqlite3.Connection) -> None:
    """Empty every table."""
    for table in ("keys", "vectors", "files", "claims", "fingerprints"):
        connection.execute(f"DELETE FROM {table}")


def shrink_file(connection: sqlite3.Connection, n_bytes: int) -> None:
    """Give pages without content back while the file is larger; not within a transaction."""
    page_bytes, n_pages, n_free = _pages(connection)
    n_excess = min(n_free, n_pages - n_bytes // page_bytes)
    if n_excess > 0:
        # Each step frees one page and gives a row without columns, after which execute() stops.
        connection.executescript(f"PRAGMA incremental_vacuum({n_excess})")


def _pages(connection: sqlite3.Connection) -> tuple[int, int, int]:
    page_bytes, n_pages, n_free = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_size", "page_count", "freelist_count")
    )
    return page_bytes, n_pages, n_free


def _oldest_first(
    connection: sqlite3.Connection, condition: str = "", *values: float
) -> list[tuple[int, bytes, int]]:
    where, limit = (condition, "") if condition.startswith("WHERE") else ("", condition)
    return connection.execute(
        f"SELECT fingerprint, digest, id FROM keys {where} ORDER BY used, id {limit}", values
    ).fetchall()


def _delete(connection: sqlite3.Connection, keys: Sequence[tuple[int, bytes, int]]) -> None:
    connection.executemany(
        "DELETE FROM keys WHERE fingerprint = ? AND digest = ?", [key[:2] for key in keys]
    )
    connection.executemany("DELETE FROM vectors WHERE id = ?", [key[2:] for key in keys])


def _batches(values: Sequence[bytes]) -> Iterator[tuple[int, Sequence[bytes]]]:
    for start in range(0, len(values), _BATCH):
        yield start, values[start : start + _BATCH]


def _marks(values: Sequence) -> str:
    return ",".join("?" * len(values))
