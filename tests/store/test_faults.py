"""Full disks, missing permissions, damage, other formats: one warning, and never a wrong row."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from store_process import FINGERPRINT, check, digests_of, filled, opened, put

needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions and limits")


@contextlib.contextmanager
def warns_once(match):
    """Exactly one warning, of this text."""
    with pytest.warns(UserWarning, match=match) as caught:
        yield
    assert len(caught) == 1, [str(warning.message) for warning in caught]


@contextlib.contextmanager
def warns_at_most_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert len(caught) <= 1, [str(warning.message) for warning in caught]


# Faults of the place ---------------------------------------------------------------------------


def run_in_child(code, folder):
    """What a process prints that has the helpers at hand, and a store of the folder."""
    start = f"""
import sys, warnings
sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(Path(__file__).parent)!r}]
from store_process import *
store = opened({str(folder)!r})
"""
    answer = subprocess.run(
        [sys.executable, "-W", "always", "-c", start + code],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    return answer


@needs_posix
def test_a_disk_that_fills_up(tmp_path):
    """The limit on the size of files shows itself to SQLite as a full disk does."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
for number in range(0, 1000, 10):
    put(store, range(number, number + 10))
print(*check(store, range(1000)))
store.close()
"""
    answer = run_in_child(code, tmp_path)
    assert answer.stderr.count("Warning: The embedding store") == 1
    assert "Check that the disk is not full" in answer.stderr
    kept = [int(number) for number in answer.stdout.split()]  # can still be read
    assert kept == list(range(len(kept)))
    assert 0 < len(kept) < 1000
    store = opened(tmp_path)
    assert check(store, range(1000)) == kept
    put(store, range(1000))
    assert check(store, range(1000)) == list(range(1000))
    store.close()


@pytest.fixture
def open_folder():
    """A folder whose parents anybody may pass."""
    folder = Path(tempfile.mkdtemp())
    os.chmod(folder, 0o777)
    yield folder
    shutil.rmtree(folder)


def without_permission(code, folder, folder_mode):
    """Run as a user who may not write the folder's files; also for root."""
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(folder_mode)
    if os.geteuid() == 0:
        code = "import os\nos.seteuid(65534)\n" + code
    try:
        return run_in_child(code, folder)
    finally:
        folder.chmod(0o755)
        for path in folder.iterdir():
            path.chmod(0o644)


USE_READ_ONLY = """
there = check(store, range(30))
put(store, range(30))
put(store, range(30))
store.clear()
assert check(store, range(30)) == there
locks = [store.lock(FINGERPRINT, 3) for _ in range(2)]
assert all(lock.acquire(blocking=False) for lock in locks)
print(*there)
"""


@needs_posix
@pytest.mark.parametrize(
    ("folder_mode", "new_folder", "reason", "n_read"),
    [
        (0o777, "", "attempt to write a readonly database", 20),  # the file alone
        (0o555, "", "readonly database", 0),
        (0o555, "/new", "Permission denied", 0),
    ],
)
def test_missing_permissions(open_folder, folder_mode, new_folder, reason, n_read):
    filled(open_folder, 20).close()
    before = {path: path.read_bytes() for path in open_folder.iterdir() if path.is_file()}

    code = f"store = opened(store.folder + {new_folder!r})" + USE_READ_ONLY
    answer = without_permission(code, open_folder, folder_mode)

    assert answer.stderr.count("Warning: The embedding store") == 1
    assert reason in answer.stderr
    assert "Check that the disk is not full, that the folder is writable" in answer.stderr
    assert answer.stdout.split() == [str(number) for number in range(n_read)]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_file_that_others_lock(tmp_path, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0.1}))
    store = filled(tmp_path, 10)
    other = connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with warns_once(r"cannot be used: database is locked.*no other program locks the file"):
        put(store, range(10, 20))
        assert check(store, range(20)) == list(range(10))  # reading waits for nobody
        put(store, range(10, 20))
    other.close()
    put(store, range(10, 20))
    assert check(store, range(20)) == list(range(10))
    store.close()  # the next use tries again
    put(store, range(10, 20))
    assert check(store, range(20)) == list(range(20))
    store.close()


def test_an_interrupt_rolls_back_and_lets_others_write(tmp_path):
    store, other = filled(tmp_path, 10), opened(tmp_path)

    class Interrupting(str):
        def encode(self, *args):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put_many(Interrupting(FINGERPRINT), digests_of([1]), [[1.0]])

    put(other, range(20, 30))
    put(store, range(10, 20))
    assert check(store, range(30)) == list(range(30))
    store.close()
    other.close()


# Other files -----------------------------------------------------------------------------------


def use_all(store):
    assert check(store, range(10)) == []
    put(store, range(20))
    store.put_file_digests([("a", 1, 1, 1)], digests_of([1]), 10**18)
    assert store.get_file_digests([("b", 1, 1, 1)]) == [None]
    store.clear()
    assert len(store) == store.info().n_rows == store.info().n_files == 0
    locks = [store.lock(FINGERPRINT, 1) for _ in range(2)]
    assert all(lock.acquire(blocking=False) for lock in locks)
    store.close()


@pytest.mark.parametrize(
    "statement",
    ["PRAGMA user_version = 3", "PRAGMA user_version = 0", "CREATE TABLE bookmarks (x)"],
)
def test_a_file_of_another_format_is_left_as_it_is(tmp_path, statement):
    store = opened(tmp_path)
    if "user_version" in statement:
        put(store, range(10))
        store.close()
    with contextlib.closing(sqlite3.connect(store.path)) as connection:
        connection.execute(statement)
    before = Path(store.path).read_bytes()
    with warns_once(
        r"is not an embedding store of format 2, but made by another program or a newer "
        r"sktransfer; upgrade sktransfer, or give another folder"
    ):
        use_all(store)
    assert Path(store.path).read_bytes() == before


@pytest.mark.parametrize("content", [b"not a database at all, " * 100, b"\0" * 10_000])
def test_a_file_that_is_not_a_database(tmp_path, content):
    store = opened(tmp_path)
    Path(store.path).write_bytes(content)
    with warns_once(r"cannot be used: file is not a database.*delete the folder if the file is d"):
        use_all(store)
    assert Path(store.path).read_bytes() == content
    shutil.rmtree(tmp_path)
    put(store, range(20))
    assert check(store, range(20)) == list(range(20))
    store.close()


# Damage ----------------------------------------------------------------------------------------


def _flip_anywhere(content, chance):
    for _ in range(chance.randint(1, 200)):
        content[chance.randrange(len(content))] = chance.randrange(256)


def _swap_pages(content, chance):
    one, other = (chance.randrange(len(content) // 8192) * 8192 for _ in range(2))
    content[one : one + 8192] = content[other : other + 8192]


def _truncate(content, chance):
    del content[chance.randrange(len(content)) :]


@pytest.mark.parametrize("damage", [_flip_anywhere, _swap_pages, _truncate])
def test_damage_never_gives_a_wrong_row(tmp_path, damage):
    store = filled(tmp_path / "whole", 120)
    stats = [(f"/data/{i}", i, 10**9, i) for i in range(50)]
    store.put_file_digests(stats, digests_of(range(50)), 10**18)
    store.close()
    whole = Path(store.path).read_bytes()
    for seed in range(25):
        content = bytearray(whole)
        damage(content, random.Random(seed))
        store = opened(tmp_path / str(seed))
        os.mkdir(store.folder)
        Path(store.path).write_bytes(content)
        with warns_at_most_once():
            for _ in range(2):
                check(store, range(120))
                known = store.get_file_digests(stats)
                for digest, right in zip(known, digests_of(range(50)), strict=True):
                    assert digest in (None, right)
                put(store, range(120))
                store.put_file_digests(stats, digests_of(range(50)), 10**18)
                assert len(store) >= 0
                store.info()
            store.clear()
        store.close()


def test_a_damaged_row_counts_as_missing_and_is_written_anew(tmp_path):
    store = filled(tmp_path, 10)
    with contextlib.closing(sqlite3.connect(store.path)) as connection, connection:
        connection.execute("UPDATE vectors SET data = zeroblob(length(data)) WHERE id = 4")
        # Another row's numbers: a checksum is bound to its digest.
        connection.execute(
            "UPDATE vectors SET (checksum, data) ="
            " (SELECT checksum, data FROM vectors WHERE id = 8) WHERE id = 7"
        )
        connection.execute("UPDATE vectors SET data = 'text' WHERE id = 9")
    assert check(store, range(10)) == [0, 1, 2, 4, 5, 7, 9]
    put(store, [3, 6, 8])
    assert check(store, range(10)) == list(range(10))
    store.close()
