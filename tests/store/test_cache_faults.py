"""Full disks, missing permissions, locks, other formats: computing goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
from store_under_fire import FINGERPRINT, check, damaged_names, digests_of, filled, put

from sktransfer.store import _sqlite_file
from sktransfer.store._store import DiskStore

SCRIPT = Path(__file__).with_name("store_under_fire.py")
needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs signals and fork")


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(_sqlite_file, "PAUSE_SECONDS", 0.0)


@contextlib.contextmanager
def warns_once(match):
    """Exactly one warning, of this text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    with pytest.warns(UserWarning, match=match):
        warnings.warn(caught[0].message, stacklevel=1)


# Faults of the place ---------------------------------------------------------------------------


def test_full_disk(tmp_path, no_pause):
    store = filled(tmp_path, 50)
    n_pages = store._file.run(lambda c: c.execute("PRAGMA page_count").fetchone()[0], 0)
    store._file.run(lambda c: c.execute(f"PRAGMA max_page_count = {n_pages + 20}").fetchall(), 0)

    with warns_once(r"New embeddings are not kept in .*full.*Free some disk space"):
        for number in range(50, 300, 10):
            put(store, range(number, number + 10))

    there = check(store, range(300))
    assert there[:50] == list(range(50))
    assert len(there) < 300
    store._file.run(lambda c: c.execute("PRAGMA max_page_count = 1000000").fetchall(), 0)
    put(store, range(300))
    assert check(store, range(300)) == list(range(300))
    store.close()


@needs_posix
def test_a_limit_on_the_size_of_files(tmp_path):
    """As a full disk shows itself to the file's own writing, not to SQLite's books."""
    script = f"""
import resource, sys, warnings
sys.path.insert(0, {str(SCRIPT.parent)!r})
from store_under_fire import *
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
store = DiskStore({str(tmp_path)!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for number in range(0, 1000, 10):
        part = range(number, number + 10)
        store.put_many(FINGERPRINT, digests_of(part), rows_of(part))
    there = check(store, range(1000))
    store.close()
assert 0 < len(there) < 1000, len(there)
print(len(caught), caught[0].message)
"""
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=SCRIPT.parents[2]
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("1 New embeddings are not kept"), answer.stdout
    store = DiskStore(tmp_path)
    assert check(store, range(1000))
    put(store, range(1000))
    assert check(store, range(1000)) == list(range(1000))
    store.close()


@contextlib.contextmanager
def without_permission(*paths):
    """Nothing may be written in the folder; also when the tests are run by root."""
    for path in paths:
        os.chmod(path, 0o555 if os.path.isdir(path) else 0o444)
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path in paths:
            os.chmod(path, 0o755 if os.path.isdir(path) else 0o644)


@pytest.fixture
def open_folder():
    """A folder whose parents anybody may pass."""
    folder = Path(tempfile.mkdtemp())
    os.chmod(folder, 0o755)
    yield folder
    shutil.rmtree(folder)


@needs_posix
def test_a_read_only_folder_is_read(open_folder):
    filled(open_folder, 20).close()
    files = [open_folder / name for name in os.listdir(open_folder)]
    before = {path: path.read_bytes() for path in files}

    with without_permission(open_folder, *files):
        store = DiskStore(open_folder)
        assert check(store, range(30)) == list(range(20))
        with warns_once("is read-only: what it holds is used"):
            put(store, range(20, 30))
            put(store, range(20, 30))
            store.clear()
            assert store.claim(FINGERPRINT, digests_of([40])).all()
        assert check(store, range(30)) == list(range(20))
        assert store.info().n_rows == 20
        store.close()

    assert {path: path.read_bytes() for path in open_folder.iterdir()} == before


@needs_posix
def test_a_read_only_folder_left_with_a_log(open_folder, tmp_path):
    """The write-ahead log of a killed writer cannot be played back there."""
    writer = filled(tmp_path, 20)
    for name in ("embeddings-v1.sqlite", "embeddings-v1.sqlite-wal"):
        shutil.copy(tmp_path / name, open_folder / name)
    writer.close()
    with without_permission(open_folder, *open_folder.iterdir()):
        store = DiskStore(open_folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(store, range(30))
        store.close()
    store = DiskStore(open_folder)
    assert check(store, range(30)) == list(range(20))
    store.close()


@needs_posix
def test_a_folder_that_cannot_be_made(open_folder):
    with without_permission(open_folder):
        store = DiskStore(open_folder / "new")
        with warns_once(r"cannot be used \(.*no permission to write"):
            put(store, range(5))
            assert check(store, range(5)) == []
            assert store.info().n_rows == 0


def test_a_lock_held_for_too_long(tmp_path, monkeypatch, no_pause):
    monkeypatch.setattr(_sqlite_file, "BUSY_SECONDS", 0.1)
    store = filled(tmp_path, 10)
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with warns_once(r"New embeddings are not kept in .* \(database is locked\)"):
        put(store, range(10, 20))
        assert check(store, range(20)) == list(range(10))  # reading waits for nobody
        put(store, range(10, 20))
    other.execute("ROLLBACK")
    other.close()
    put(store, range(10, 20))
    assert check(store, range(20)) == list(range(20))
    store.close()


def test_a_fault_is_left_alone_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(_sqlite_file, "BUSY_SECONDS", 0.1)
    store = filled(tmp_path, 10)
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with warns_once("database is locked"):
        put(store, [10])
        started = time.perf_counter()
        for _ in range(20):
            put(store, [10])
        assert time.perf_counter() - started < 1.0
    other.close()
    store.close()


@needs_posix
def test_the_folder_is_deleted_or_replaced_meanwhile(tmp_path):
    folder = tmp_path / "cache"
    store = filled(folder, 10)
    shutil.rmtree(folder)
    assert check(store, range(10)) == []
    put(store, range(5))
    assert check(DiskStore(folder), range(10)) == list(range(5))

    filled(tmp_path / "other", 7).close()
    store.close()
    os.rename(folder, tmp_path / "away")
    assert check(store, range(10)) == []
    shutil.rmtree(folder)
    os.rename(tmp_path / "other", folder)
    assert check(store, range(10)) == list(range(7))
    store.close()


# Other files -----------------------------------------------------------------------------------


def test_a_newer_format_is_not_touched(tmp_path):
    store = filled(tmp_path, 10)
    store._file.run(lambda c: c.execute("PRAGMA user_version = 2"), None)
    store.close()
    before = Path(store.path).read_bytes()

    store = DiskStore(tmp_path)
    with warns_once(r"has format 2, made by a newer sktransfer; this one reads up to 1.*not kept"):
        assert check(store, range(10)) == []
        put(store, range(20))
        store.put_file_digests([("a", 1, 1, 1)], digests_of([1]))
        store.reduce_size(items_limit=0)
        store.clear()
        assert store.claim(FINGERPRINT, digests_of(range(10))).all()
        assert store.info().n_rows == 0
    store.close()
    assert Path(store.path).read_bytes() == before


def test_another_programs_file_is_not_touched(tmp_path):
    store = DiskStore(tmp_path)
    theirs = sqlite3.connect(store.path)
    theirs.execute("CREATE TABLE bookmarks (url)")
    theirs.close()
    with warns_once("is an SQLite file of another program. It is left as it is"):
        put(store, range(20))
    assert sqlite3.connect(store.path).execute("SELECT count(*) FROM bookmarks").fetchone() == (0,)


@pytest.mark.parametrize("content", [b"not a database at all, " * 100, b"\0" * 10_000])
def test_what_is_no_database_is_moved_aside(tmp_path, content):
    store = DiskStore(tmp_path)
    Path(store.path).write_bytes(content)
    with warns_once(
        r"was damaged \(.*\). It was moved to .*damaged-.* and a fresh one was started"
    ):
        put(store, range(20))
        assert check(store, range(20)) == list(range(20))
    (aside,) = damaged_names(tmp_path)
    assert (tmp_path / aside).read_bytes() == content
    store.close()


def test_a_file_without_our_tables_is_damaged(tmp_path):
    store = filled(tmp_path, 10)
    store._file.run(lambda c: c.execute("DROP TABLE keys"), None)
    with warns_once("was damaged"):
        put(store, range(20))
    assert check(store, range(20)) == list(range(20))
    store.close()
