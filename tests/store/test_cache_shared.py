"""One store in many threads and processes: sharing, forks, claims."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sktransfer.store._claims import is_gone, this_worker
from sktransfer.store._network_folder import is_network_folder
from sktransfer.store._tables import APPLICATION_ID
from store_under_fire import digests_of, present, rows_of

from sktransfer.store._store import DiskStore

# Threads and forks -----------------------------------------------------------------------------


def test_threads(store):
    numbers = np.arange(600)

    def work(seed):
        order = np.random.default_rng(seed).permutation(numbers)
        for part in np.array_split(order, 12):
            store.put_many("f", digests_of(part), rows_of(part))
            some = order[:50]
            for number, row in zip(some, store.get_many("f", digests_of(some)), strict=True):
                if row is not None:
                    np.testing.assert_array_equal(row, rows_of([number])[0])
        return True

    failures = []

    def guarded(seed):
        try:
            work(seed)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    np.testing.assert_array_equal(
        np.stack(store.get_many("f", digests_of(numbers))), rows_of(numbers)
    )


def _use_in_child(store, results):
    before = present(store, range(5))
    store.put_many("f", digests_of([77]), rows_of([77]))
    results.put((before, present(store, [77])))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_while_threads_are_at_work(store):
    """The child gets neither a locked lock nor the parent's connection."""
    store.put_many("f", digests_of(range(5)), rows_of(range(5)))
    stop = threading.Event()

    def work():
        number = 1000
        while not stop.is_set():
            store.put_many("f", digests_of([number]), rows_of([number]))
            number += 1

    thread = threading.Thread(target=work)
    thread.start()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    try:
        for _ in range(10):
            child = context.Process(target=_use_in_child, args=(store, results))
            child.start()
            assert results.get(timeout=60) == ([0, 1, 2, 3, 4], [77])
            child.join()
    finally:
        stop.set()
        thread.join()
    assert present(store, [77]) == ([77] if isinstance(store, DiskStore) else [])
    assert present(store, range(5)) == [0, 1, 2, 3, 4]


def test_a_copy_is_the_store_and_a_pickle_is_its_address(store):
    store.put_many("f", digests_of([1]), rows_of([1]))
    assert copy.deepcopy(store) is store

    again = pickle.loads(pickle.dumps(store))
    assert type(again) is type(store)
    assert again.max_bytes == store.max_bytes
    assert len(pickle.dumps(store)) < 500
    assert present(again, [1]) == ([1] if isinstance(store, DiskStore) else [])
    again.close()


def test_two_stores_of_one_folder_share_its_rows(tmp_path):
    one, other = DiskStore(tmp_path), DiskStore(str(tmp_path) + "/")
    one.put_many("f", digests_of([1]), rows_of([1]))
    assert present(other, [1]) == [1]
    one.close()
    other.put_many("f", digests_of([2]), rows_of([2]))
    assert present(one, [1, 2]) == [1, 2]
    one.close()
    other.close()


def test_the_folder_is_made_on_first_use_only(tmp_path):
    folder = tmp_path / "a" / "b"
    store = DiskStore(folder)
    assert not folder.exists()
    store.put_many("f", digests_of([1]), rows_of([1]))
    store.close()
    assert present(DiskStore(folder), [1]) == [1]
    assert APPLICATION_ID.to_bytes(4, "big") == b"sktf"


# Claims ----------------------------------------------------------------------------------------


@pytest.fixture
def another():
    """Another thread: ``another(function)`` is what the function returns there."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function: pool.submit(function).result()


def test_a_claim_keeps_others_away_until_it_is_void(store, clock, another):
    digests = digests_of(range(4))
    store.put_many("f", digests[:1], rows_of([0]))
    assert store.claim("f", digests[:3]).tolist() == [False, True, True]
    assert store.claim("f", digests[1:3]).tolist() == [True, True]  # my own again

    assert another(lambda: store.claim("f", digests)).tolist() == [False, False, False, True]
    assert another(lambda: store.claim("g", digests)).all()

    store.release("f", digests[1:2])
    store.release("f", digests[3:])  # not mine: nothing happens
    assert another(lambda: store.claim("f", digests[1:])).tolist() == [True, False, True]
    store.put_many("f", digests[2:3], rows_of([2]))
    store.reduce_size(items_limit=0)
    assert another(lambda: store.claim("f", digests[2:3])).all()
    clock.advance(1)
    assert another(lambda: store.claim("f", digests)).all()


def test_who_could_not_use_a_row_may_compute_it(store):
    """Else it would wait for ever for what nobody will write."""
    store.put_many("f", digests_of([1]), rows_of([1]))
    assert store.claim("f", digests_of([1, 2])).tolist() == [False, True]
    assert store.claim("f", digests_of([1, 2])).tolist() == [True, True]


def test_a_claim_on_several_fingerprints_at_once(store, another):
    store.put_many("layer3", digests_of([1, 2]), rows_of([1, 2]))
    store.put_many("layer4", digests_of([2, 3]), rows_of([2, 3]))
    both = ["layer3", "layer4"]
    assert store.claim(both, digests_of([1, 2, 3])).tolist() == [True, False, True]
    assert another(lambda: store.claim(both, digests_of([1, 3]))).tolist() == [False, False]
    store.release(both, digests_of([1]))
    assert another(lambda: store.claim(both, digests_of([1, 3]))).tolist() == [True, False]


def test_the_claim_of_a_dead_process_is_void():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    host, pid, thread = this_worker().rsplit(":", 2)
    assert is_gone(f"{host}:{child.pid}:{thread}")
    assert not is_gone(f"{host}:{pid}:1")
    assert not is_gone(f"elsewhere:{child.pid}:{thread}")


# Network folders -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "is_network"),
    [
        ("/", False),
        ("/data/x", True),
        ("/data2", False),
        ("/my disk/x", True),
        ("/data/x/y", False),
    ],
)
def test_network_folders_are_recognised(folder, is_network, tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/root rw\n"
        "30 22 0:40 / /data rw,noatime master:1 - nfs4 server:/x rw\n"
        "31 22 0:41 / /my\\040disk rw - fuse.sshfs a:/b rw\n"
        "32 30 8:2 / /data/x/y rw - xfs /dev/sdb rw\n"
    )
    assert is_network_folder(folder, str(mounts)) is is_network
    assert not is_network_folder(folder, str(tmp_path / "absent"))


def test_a_network_folder_is_written_without_a_write_ahead_log(tmp_path, monkeypatch):
    monkeypatch.setattr("sktransfer.store._sqlite_file.is_network_folder", lambda folder: True)
    store = DiskStore(tmp_path)
    store.put_many("f", digests_of([1]), rows_of([1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "embeddings-v1.sqlite",
        "embeddings-v1.sqlite.lock",
    ]
    assert present(store, [1]) == [1]
    store.close()
