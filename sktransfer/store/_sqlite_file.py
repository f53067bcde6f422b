"""One SQLite file shared by many processes: opening, forks, and every fault it may meet.

Whoever works on the file does it through `SQLiteFile.run`, which answers with a stand-in when the
file cannot be worked on. A fault is warned of once per process and kind, and then left
alone for a minute; only the user's own interrupts come through.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sqlite3
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sktransfer.store._fork_safety import hold_across_fork
from sktransfer.store._network_folder import is_network_folder

try:
    import fcntl
except ImportError:  # Windows: an open file cannot be renamed there, so that nothing races
    fcntl = None  # type: ignore[assignment]

Result = TypeVar("Result")

# How long a writer waits for the other writers, and how long a fault is left alone.
BUSY_SECONDS = 60.0
PAUSE_SECONDS = 60.0
# Rows of 8 KB, the widest common ones, leave an eighth of such pages empty; read and written
# fastest of 4, 8, 16 and 32 KiB.
PAGE_BYTES = 8192
WAL_BYTES = 16 * 2**20

_open_files: weakref.WeakSet = weakref.WeakSet()
_warned: set[tuple[str, str]] = set()
# Connections inherited through a fork that Python did not see: closing them would be harmful.
_abandoned: list[sqlite3.Connection] = []


class NotOurs(Exception):
    """The file must be left as it is: a newer format, or somebody else's."""


class SQLiteFile:
    """A file of a given schema, created on first use.

    Parameters
    ----------
    path : str
        Absolute.
    schema : sequence of str
        The statements that make it.
    version : int
        Of the schema; a file of a greater one is not touched.
    application_id : int
        Marks the file as ours (https://sqlite.org/fileformat.html, offset 68).
    """

    def __init__(self, path: str, schema: tuple[str, ...], version: int, application_id: int):
        self.path = path
        self.schema = schema
        self.version = version
        self.application_id = application_id
        self.is_read_only = False
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._pid = os.getpid()
        # time.monotonic() until which the file, or writing to it, is left alone
        self._paused_until = -1.0
        self._no_writing_until = -1.0
        self.fork_lock = threading.RLock()
        hold_across_fork(self)
        _open_files.add(self)

    def run(
        self, work: Callable[[sqlite3.Connection], Result], otherwise: Result, writes: bool = False
    ) -> Result:
        """``work(connection)``, or ``otherwise`` when the file cannot be worked on."""
        with self.fork_lock:
            for _ in range(2):  # once more on a fresh file, after a damaged one was moved aside
                try:
                    connection = self._connected()
                    if connection is None or (writes and not self._may_write()):
                        break
                    return work(connection)
                except NotOurs as error:
                    self._give_up(str(error))
                    break
                except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
                    raise  # our own bug
                except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
                    if is_damage(error):
                        if not self._move_aside(error):
                            break
                    elif writes and self._connection is not None:
                        self._stop_writing(error)
                        break
                    else:
                        self._give_up(f"cannot be used ({error})")
                        break
        return otherwise

    def close(self) -> None:
        """Close the connection; the next use opens it again."""
        with self.fork_lock:
            connection, self._connection = self._connection, None
            if connection is None:
                return
            if self._pid != os.getpid():
                _abandoned.append(connection)
                return
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def before_fork(self) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_connection", None) is not None:
            self.close()

    def warn_once(self, kind: str, message: str) -> None:
        """Warn, unless this process has warned of this kind for this file."""
        if (self.path, kind) not in _warned:
            _warned.add((self.path, kind))
            warnings.warn(message, UserWarning, stacklevel=2)

    # Opening ---------------------------------------------------------------------------------

    def _connected(self) -> sqlite3.Connection | None:
        if self._connection is not None and (
            self._pid != os.getpid() or self._identity != identity_of(self.path)
        ):
            self.close()  # forked behind our back, or the file was moved, deleted, replaced
        if self._connection is not None:
            if self._connection.in_transaction:  # an interrupt fell between two lines of ours
                self._connection.rollback()
            return self._connection
        if time.monotonic() < self._paused_until:
            return None
        self._open()
        return self._connection

    def _open(self) -> None:
        folder = os.path.dirname(self.path)
        with contextlib.suppress(PermissionError):
            os.makedirs(folder, exist_ok=True)
        exists = os.path.exists(self.path)
        self.is_read_only = not (
            _is_writable(folder) and (_is_writable(self.path) if exists else True)
        )
        self._pid = os.getpid()
        if self.is_read_only:
            if not exists:
                raise PermissionError(f"no permission to write in {folder!r}")
            self._connection = self._open_to_read()
            self._identity = identity_of(self.path)
            return
        with self._opening_lock():
            connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            finally:
                self._identity = identity_of(self.path)
            self._connection = connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        def ask(pragma: str) -> Any:
            return connection.execute(f"PRAGMA {pragma}").fetchone()

        connection.text_factory = lambda text: text.decode("utf-8", "replace")
        is_new = self._check_format(connection)
        if is_new:
            ask(f"page_size = {PAGE_BYTES}")
            ask("auto_vacuum = INCREMENTAL")
        page_bytes = ask("page_size")[0]
        try:
            # WAL needs memory shared by all who use the file: one machine, its own disk.
            wanted = "DELETE" if is_network_folder(os.path.dirname(self.path)) else "WAL"
            ask(f"journal_mode = {wanted}")
        except sqlite3.OperationalError:
            ask("journal_mode = DELETE")
        # NORMAL: kill -9 loses nothing committed; a power cut may lose the last rows, never more.
        for pragma in (
            "synchronous = NORMAL",
            f"wal_autocheckpoint = {WAL_BYTES // page_bytes}",
            f"journal_size_limit = {2 * WAL_BYTES}",
            "cache_size = -8192",
            "temp_store = MEMORY",
            "cell_size_check = ON",
            "trusted_schema = OFF",
        ):
            ask(pragma)
        if is_new:
            with transaction(connection):
                for statement in self.schema:
                    connection.execute(statement)
                ask(f"user_version = {self.version}")
                ask(f"application_id = {self.application_id}")

    def _check_format(self, connection: sqlite3.Connection) -> bool:
        """True for an empty file; raises for one that is not ours or not whole."""
        version, application_id, n_tables = (
            connection.execute(question).fetchone()[0]
            for question in (
                "PRAGMA user_version",
                "PRAGMA application_id",
                "SELECT count(*) FROM sqlite_master",
            )
        )
        if n_tables and application_id != self.application_id:
            raise NotOurs("is an SQLite file of another program")
        if version > self.version:
            raise NotOurs(
                f"has format {version}, made by a newer sktransfer; this one reads up to "
                f"{self.version}. Upgrade sktransfer, or give this version another folder"
            )
        if n_tables and version < self.version:
            raise sqlite3.DatabaseError("the header of the file is damaged")
        return not n_tables

    def _open_to_read(self) -> sqlite3.Connection:
        # A WAL file is read with the help of a file beside it. Where that cannot be made, the
        # file is read as if nobody wrote to it; rows carry checksums, so that none is read wrong.
        uri = Path(self.path).as_uri()
        for mode in ("mode=ro", "immutable=1"):
            connection = sqlite3.connect(
                f"{uri}?{mode}",
                uri=True,
                timeout=BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                connection.text_factory = lambda text: text.decode("utf-8", "replace")
                if self._check_format(connection):
                    raise NotOurs("is empty and cannot be written to")
                return connection
            except BaseException as error:
                connection.close()
                if mode == "immutable=1" or not isinstance(error, sqlite3.OperationalError):
                    raise
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _opening_lock(self) -> Iterator[None]:
        # Held while a connection is opened and while a damaged file is moved, so that nobody
        # opens the file under its old name and its WAL under the new one.
        if fcntl is None:
            yield
            return
        handle = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            give_up_at = time.monotonic() + BUSY_SECONDS
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > give_up_at:
                        raise
                    time.sleep(0.005)
                except OSError:  # a file system without locks
                    break
            yield
        finally:
            os.close(handle)

    # Faults ----------------------------------------------------------------------------------

    def _may_write(self) -> bool:
        if self.is_read_only:
            self.warn_once(
                "read-only",
                f"The embedding store {self.path!r} is read-only: what it holds is used, new "
                "embeddings are not kept. Make it writable, or give another folder as memory.",
            )
            return False
        return time.monotonic() >= self._no_writing_until

    def _stop_writing(self, error: Exception) -> None:
        self._no_writing_until = time.monotonic() + PAUSE_SECONDS
        self.warn_once(
            f"write: {error}",
            f"New embeddings are not kept in {self.path!r} for now ({error}); computing goes on. "
            "Free some disk space (or call reduce_size), or see what else locks the file.",
        )

    def _give_up(self, reason: str) -> None:
        self.close()
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        self.warn_once(
            f"unusable: {reason}",
            f"The embedding store {self.path!r} {reason}. It is left as it is; embeddings are "
            "computed and not kept.",
        )

    def _move_aside(self, error: Exception) -> bool:
        """Move the damaged file away, unless somebody else has; False if that cannot be."""
        seen = self._identity
        self.close()
        if self.is_read_only:
            self._give_up(f"is damaged ({error}) and read-only")
            return False
        aside = None
        try:
            with self._opening_lock():
                if seen is not None and identity_of(self.path) == seen:
                    aside = self._free_name_aside()
                    # Journals first: one left behind would be played into the new file.
                    for suffix in ("-wal", "-journal", "-shm", ""):
                        with contextlib.suppress(FileNotFoundError):
                            os.rename(self.path + suffix, aside + suffix)
        except OSError as cause:
            self._give_up(f"is damaged ({error}) and cannot be moved aside ({cause})")
            return False
        if aside is not None:
            self.warn_once(
                f"damaged: {aside}",
                f"The embedding store {self.path!r} was damaged ({error}). It was moved to "
                f"{aside!r}, which may be deleted, and a fresh one was started.",
            )
        return True

    def _free_name_aside(self) -> str:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        n_taken = 0
        while True:
            aside = f"{self.path}.damaged-{stamp}" + (f"-{n_taken}" if n_taken else "")
            if not os.path.lexists(aside):
                return aside
            n_taken += 1


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, also when interrupted."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


def is_damage(error: BaseException) -> bool:
    """Whether the file itself is broken, against a full disk, a lock, a permission."""
    if isinstance(error, sqlite3.OperationalError):
        # A schema without our tables, in a file that is marked as ours.
        return any(
            words in str(error)
            for words in ("no such table", "no such column", "has no column", "Could not decode")
        )
    if isinstance(error, UnicodeDecodeError):  # of SQLite's message, which quotes the file
        return True
    # sqlite3 raises the bare class for SQLITE_CORRUPT and SQLITE_NOTADB; constraints that our
    # statements cannot break, and records of impossible size, are damaged pages as well.
    return type(error) is sqlite3.DatabaseError or isinstance(
        error, sqlite3.IntegrityError | sqlite3.InternalError | sqlite3.DataError
    )


def identity_of(path: str) -> tuple[int, int] | None:
    """Device and inode; None where there is no file."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _is_writable(path: str) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


@atexit.register
def _close_all() -> None:
    for file in list(_open_files):
        file.close()
