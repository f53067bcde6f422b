"""The store on disk under fire: many processes, kill -9, full disks, damage.

Whatever happens, a row that is there is right, and computing goes on.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
from store_under_fire import FINGERPRINT, check, digests_of, rows_of

from sktransfer import _disk_store, _sqlite_file
from sktransfer._cache import DiskStore

SCRIPT = Path(__file__).with_name("store_under_fire.py")
needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs signals and fork")


def start(*arguments):
    environment = {"PYTHONWARNINGS": "error", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(SCRIPT.parents[1]), environment.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    answers = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        answers.append(out)
    return answers


def filled(folder, n_rows=200):
    store = DiskStore(folder)
    store.put_many(FINGERPRINT, digests_of(range(n_rows)), rows_of(range(n_rows)))
    return store


def put(store, numbers):
    store.put_many(FINGERPRINT, digests_of(numbers), rows_of(numbers))


def damaged_names(folder):
    return [
        name
        for name in os.listdir(folder)
        if ".damaged-" in name and not name.endswith(("-wal", "-shm", "-journal"))
    ]


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


# Many processes ------------------------------------------------------------------------------


def test_eight_processes_write_one_store(tmp_path):
    finish(*(start("write", tmp_path, seed, 400) for seed in range(8)))

    store = DiskStore(tmp_path)
    assert check(store, range(400)) == list(range(400))
    assert store.info().n_rows == 400
    assert store._file.run(lambda c: c.execute("PRAGMA integrity_check").fetchall(), None) == [
        ("ok",)
    ]
    vectors = store._file.run(lambda c: c.execute("SELECT count(*) FROM vectors").fetchone(), None)
    assert vectors == (400,)
    store.close()


def test_processes_that_share_the_work_compute_each_row_once(tmp_path):
    answers = finish(*(start("share", tmp_path, seed, 300) for seed in range(3)))

    assert sum(map(int, answers)) == 300
    store = DiskStore(tmp_path)
    assert check(store, range(300)) == list(range(300))
    store.close()


@needs_posix
def test_the_work_of_a_killed_process_is_taken_over(tmp_path):
    first = start("share", tmp_path, 0, 300)
    store = DiskStore(tmp_path)
    while store.info().n_rows < 60:
        time.sleep(0.01)
    first.kill()
    first.communicate()
    n_left = 300 - store.info().n_rows

    started = time.perf_counter()
    answers = finish(*(start("share", tmp_path, seed, 300) for seed in (1, 2)))
    assert time.perf_counter() - started < 60  # where its claims hold for 300 s
    assert sum(map(int, answers)) == n_left > 0
    assert check(store, range(300)) == list(range(300))
    store.close()


@needs_posix
def test_kill_9_a_hundred_times(tmp_path):
    (answer,) = finish(start("kill", tmp_path, 100, 0))
    n_acknowledged, n_kept = map(int, answer.split())
    assert n_kept >= n_acknowledged > 100  # it did write between the kills


def test_an_interrupt_rolls_back_and_lets_others_write(tmp_path, monkeypatch):
    store, other = filled(tmp_path, 10), DiskStore(tmp_path)
    monkeypatch.setattr(_sqlite_file, "BUSY_SECONDS", 0.2)
    write_rows = _disk_store.tables.write_rows

    def interrupted(*arguments):
        write_rows(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(_disk_store.tables, "write_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(store, range(10, 20))
    monkeypatch.undo()

    put(other, range(20, 30))
    assert check(other, range(30)) == [*range(10), *range(20, 30)]
    put(store, range(10, 20))
    assert check(store, range(30)) == list(range(30))
    store.close()
    other.close()


def test_a_transaction_left_open_is_rolled_back(tmp_path):
    store = filled(tmp_path, 10)
    store._file._connection.execute("BEGIN IMMEDIATE")
    store._file._connection.execute("DELETE FROM keys")
    assert check(store, range(10)) == list(range(10))
    store.close()


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
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=SCRIPT.parents[1]
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


# Faults of the file ----------------------------------------------------------------------------


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


def _flip_header(content, chance):
    for _ in range(chance.randint(1, 20)):
        content[chance.randrange(100)] = chance.randrange(256)


def _flip_anywhere(content, chance):
    for _ in range(chance.randint(1, 200)):
        content[chance.randrange(len(content))] = chance.randrange(256)


def _flip_page_headers(content, chance):
    for _ in range(chance.randint(1, 40)):
        page = chance.randrange(len(content) // 8192) * 8192
        content[page + chance.randrange(40)] = chance.randrange(256)


def _swap_pages(content, chance):
    one, other = (chance.randrange(len(content) // 8192) * 8192 for _ in range(2))
    content[one : one + 8192] = content[other : other + 8192]


def _overwrite_pages(content, chance):
    at = chance.randrange(len(content))
    n_bytes = min(chance.randint(1, 40_000), len(content) - at)
    content[at : at + n_bytes] = chance.randbytes(n_bytes)


def _truncate(content, chance):
    del content[chance.randrange(len(content)) :]


@pytest.mark.parametrize(
    "damage",
    [_flip_header, _flip_anywhere, _flip_page_headers, _swap_pages, _overwrite_pages, _truncate],
)
def test_damage_never_gives_a_wrong_row(tmp_path, damage, no_pause):
    filled(tmp_path / "whole", 120).close()
    stats = [(f"/data/{i}", i, 10**9, i) for i in range(50)]
    store = DiskStore(tmp_path / "whole")
    store.put_file_digests(stats, digests_of(range(50)))
    store.close()
    whole = Path(store.path).read_bytes()
    n_healed = 0
    for seed in range(25):
        content = bytearray(whole)
        damage(content, random.Random(seed))
        store = DiskStore(tmp_path / str(seed))
        os.mkdir(store.folder)
        Path(store.path).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                there = set(check(store, range(120)))
                for known, digest in zip(
                    store.get_file_digests(stats), digests_of(range(50)), strict=True
                ):
                    assert known in (None, digest)
                put(store, [number for number in range(120) if number not in there] or [0])
                store.put_file_digests(stats, digests_of(range(50)))
                store.claim(FINGERPRINT, digests_of(range(130)))
                store.info()
            n_healed += check(store, range(120)) == list(range(120))
            store.reduce_size(items_limit=5)
            assert store.info().n_rows <= 5
            store.close()
    # All but a header that happens to say: newer, or another program's.
    assert n_healed >= (20 if damage is _flip_header else 25)


def test_a_damaged_row_is_a_miss_and_written_anew(tmp_path):
    store = filled(tmp_path, 10)
    store._file.run(
        lambda c: c.execute("UPDATE vectors SET data = zeroblob(length(data)) WHERE id = 4"), None
    )
    # Keys that lead to another's row: each checksum is bound to its key.
    store._file.run(lambda c: c.execute("UPDATE keys SET id = 8 WHERE id = 7"), None)
    with warns_once("holds damaged rows; they are computed again"):
        assert check(store, range(10)) == [0, 1, 2, 4, 5, 7, 8, 9]
        assert check(store, range(10)) == [0, 1, 2, 4, 5, 7, 8, 9]
    assert store.claim(FINGERPRINT, digests_of([2, 3, 6])).tolist() == [False, True, True]
    put(store, [3, 6])
    assert check(store, range(10)) == list(range(10))
    store.close()


def test_keys_out_of_order_are_damage(tmp_path):
    """SQLite finds nothing wrong with such a file as long as it is only asked for rows."""
    store = filled(tmp_path, 120)
    store._file.run(lambda c: c.execute("UPDATE keys SET checksum = 1 WHERE id = 3"), None)
    store.close()
    content = bytearray(Path(store.path).read_bytes())
    for number in range(40, 60):
        at = content.index(digests_of([number])[0])
        content[at : at + 16] = digests_of([200 - number])[0]
    Path(store.path).write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(store, range(120))
    assert len(caught) == 2
    assert "holds damaged rows" in str(caught[0].message)
    assert "was damaged (" in str(caught[1].message)
    put(store, range(120))
    assert check(store, range(120)) == list(range(120))
    store.close()


def test_a_damaged_log(tmp_path):
    writer = filled(tmp_path / "live", 30)
    for number in range(30, 60, 5):
        put(writer, range(number, number + 5))
    for seed in range(30):
        folder = tmp_path / str(seed)
        folder.mkdir()
        for name in ("embeddings-v1.sqlite", "embeddings-v1.sqlite-wal"):
            shutil.copy(tmp_path / "live" / name, folder / name)
        log = folder / "embeddings-v1.sqlite-wal"
        content = bytearray(log.read_bytes())
        chance = random.Random(seed)
        (_truncate if seed % 3 == 0 else _flip_anywhere)(content, chance)
        log.write_bytes(content)
        store = DiskStore(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(store, range(60))
            put(store, range(60))
        assert check(store, range(60)) == list(range(60))
        store.close()
    writer.close()


def test_processes_that_meet_a_damaged_file_at_once(tmp_path):
    store = filled(tmp_path, 100)
    store.close()
    content = bytearray(Path(store.path).read_bytes())
    content[:16] = b"SQLite format 4\0"
    Path(store.path).write_bytes(content)

    processes = [start("write", tmp_path, seed, 200) for seed in range(4)]
    for process in processes:
        process.communicate(timeout=120)
    # One has moved it aside and warned, which is an error there; the others saw a fresh file.
    assert sorted(process.returncode for process in processes) == [0, 0, 0, 1]
    assert len(damaged_names(tmp_path)) == 1
    assert check(store, range(200)) == list(range(200))
    store.close()


def test_damage_under_the_hands_of_writers(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    store = filled(tmp_path, 400)
    store.close()
    processes = [start("write", tmp_path, seed, 600) for seed in range(3)]
    chance = random.Random(0)
    while any(process.poll() is None for process in processes):
        with contextlib.suppress(OSError), open(store.path, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            for _ in range(20):
                file.seek(chance.randrange(max(1, size)))
                file.write(chance.randbytes(8))
        time.sleep(0.05)
    finish(*processes)  # which check every row they read
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(store, range(600))
    store.close()
