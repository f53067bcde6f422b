"""One store in many processes: writing at once, locks, forks, kill -9."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import random
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from store_process import FINGERPRINT, check, digests_of, filled, opened, put, rows_of

from sktransfer import embedding_store

SCRIPT = Path(__file__).with_name("store_process.py")


def start(role, *arguments):
    """Another process that does what the script says; its warnings are errors."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "PYTHONWARNINGS": "error"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), role, *map(str, arguments)],
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


def integrity(store):
    with contextlib.closing(sqlite3.connect(store.path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall()


def test_one_process_at_a_time_makes_the_file(tmp_path, monkeypatch):
    """SQLite does not wait there: "database is locked", and a process goes without the store."""
    connect, is_held = sqlite3.connect, []

    def note(statement):
        if "journal_mode" in statement:
            lock = opened(tmp_path).lock("opening", 0)
            is_held.append(not lock.acquire(blocking=False))

    def connect_traced(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(note)
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect_traced)
    store = filled(tmp_path)
    store.close()
    assert is_held == [True]
    lock = store.lock("opening", 0)
    assert lock.acquire(blocking=False)
    lock.release()


def test_processes_write_one_store_at_once(tmp_path):
    finish(*(start("write", tmp_path, seed, 400) for seed in range(6)))

    store = opened(tmp_path)
    assert check(store, range(400)) == list(range(400))
    assert len(store) == 400
    store.close()
    assert integrity(store) == [("ok",)]


@pytest.mark.skipif(os.name == "nt", reason="needs kill -9")
def test_a_killed_writer_leaves_a_usable_file(tmp_path):
    """What was written is there; what was being written is there in whole or not at all."""
    store, n_kept, chance = opened(tmp_path), 0, random.Random(0)
    for _ in range(8):
        writer = start("write_forever", tmp_path, n_kept)
        n_written = int(writer.stdout.readline())
        time.sleep(chance.uniform(0.0, 0.05))
        writer.kill()
        out, _ = writer.communicate()
        n_written = int((out.splitlines() or [n_written])[-1])
        there = check(store, range(n_written + 30))
        assert there == list(range(len(store)))
        n_kept = len(there)
        assert n_kept in (n_written, n_written + 10)
        store.close()
    assert integrity(store) == [("ok",)]


def test_pickles_and_copies(store):
    store.put_many("f", digests_of([1]), rows_of([1]))
    assert copy.deepcopy(store) is store

    again = pickle.loads(pickle.dumps(store))
    assert type(again) is type(store)
    assert again.max_bytes == store.max_bytes
    assert len(pickle.dumps(store)) < 500
    assert len(again) == (1 if store.info().path else 0)
    again.close()


# Threads and forks -----------------------------------------------------------------------------


def test_threads(store):
    failures = []

    def work(seed):
        order = random.Random(seed).sample(range(400), 400)
        try:
            for start in range(0, 400, 40):
                put(store, order[start : start + 40])
                check(store, order[:50])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert check(store, range(400)) == list(range(400))


def _use_in_child(store, results):
    before = check(store, range(5))
    put(store, [77])
    results.put((before, check(store, [77]), store.lock("f", 5).acquire(blocking=False)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_while_threads_are_at_work(store):
    """The child gets neither a held lock nor the parent's connection."""
    put(store, range(5))
    lock = store.lock("f", 5)
    assert lock.acquire()
    is_on_disk = store.info().path is not None
    stop = threading.Event()

    def work():
        number = 1000
        while not stop.is_set():
            put(store, [number])
            number += 1

    thread = threading.Thread(target=work)
    thread.start()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    try:
        for _ in range(10):
            child = context.Process(target=_use_in_child, args=(store, results))
            child.start()
            assert results.get(timeout=60) == ([0, 1, 2, 3, 4], [77], not is_on_disk)
            child.join()
    finally:
        stop.set()
        thread.join()
    assert check(store, [77]) == ([77] if is_on_disk else [])
    assert check(store, range(5)) == [0, 1, 2, 3, 4]


# Locks -----------------------------------------------------------------------------------------


def test_a_lock_excludes_other_users_of_its_block(store):
    first = store.lock("f", 3)
    assert first.acquire(blocking=False)
    second = store.lock("f", 3)
    assert not second.acquire(blocking=False)
    assert not second.acquire(timeout=0.01)
    for free in (store.lock("g", 3), store.lock("f", 4)):
        assert free.acquire(blocking=False)
        free.release()

    acquired = threading.Event()
    thread = threading.Thread(target=lambda: (second.acquire(), acquired.set()))
    thread.start()
    assert not acquired.wait(0.1)
    first.release()
    thread.join(timeout=60)
    assert acquired.is_set()
    assert not store.lock("f", 3).acquire(blocking=False)
    second.release()
    assert store.lock("f", 3).acquire(blocking=False)


def test_a_store_that_keeps_nothing_locks_nothing():
    store = embedding_store(False)
    locks = [store.lock("f", 3) for _ in range(2)]
    assert all(lock.acquire(blocking=False) for lock in locks)


def test_where_no_file_can_be_locked_the_lock_is_free(tmp_path):
    (tmp_path / "locks").touch()
    store = opened(tmp_path)
    locks = [store.lock("f", 3) for _ in range(2)]
    assert all(lock.acquire() for lock in locks)
    for lock in locks:
        lock.release()


def test_a_lock_excludes_other_processes_until_they_die(tmp_path):
    holder = start("hold", tmp_path)
    assert holder.stdout.readline() == "held\n"
    lock = opened(tmp_path).lock(FINGERPRINT, 3)
    assert not lock.acquire(blocking=False)
    holder.kill()
    holder.communicate()
    assert lock.acquire(timeout=60)
    lock.release()


def test_processes_that_hold_locks_compute_each_row_once(tmp_path):
    answers = finish(*(start("share", tmp_path, seed, 300) for seed in range(3)))

    assert sum(map(int, answers)) == 300
    store = filled(tmp_path, 0)
    assert check(store, range(300)) == list(range(300))
    store.close()
