"""The store on disk under fire: many processes, kill -9, damage.

Whatever happens, a row that is there is right.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from store_under_fire import FINGERPRINT, check, damaged_names, digests_of, filled, put

from sktransfer.store import _disk as _disk_store
from sktransfer.store import _sqlite_file
from sktransfer.store._store import DiskStore

SCRIPT = Path(__file__).with_name("store_under_fire.py")
needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs signals and fork")


def start(*arguments):
    environment = {"PYTHONWARNINGS": "error", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(SCRIPT.parents[2]), environment.get("PYTHONPATH", "")]
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


# Many processes --------------------------------------------------------------------------------


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


# Damage ----------------------------------------------------------------------------------------


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
