"""The embedding store, against a dictionary."""

from __future__ import annotations

import copy
import datetime
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joblib import Memory

from sktransfer import _disk_store, _store_contract
from sktransfer._cache import DiskStore, MemoryStore, as_store
from sktransfer._claims import is_gone, this_worker
from sktransfer._embedding_tables import APPLICATION_ID
from sktransfer._network_folder import is_network_folder

WIDTH = 12
NOW_NS = 1_900_000_000 * 10**9
OLD_NS = NOW_NS - 3600 * 10**9


def digests_of(numbers):
    return [int(number).to_bytes(16, "big") for number in numbers]


def rows_of(numbers, width=WIDTH, seed=0):
    """A row that its number alone decides, so that any reader can tell whether it is right."""
    return np.stack(
        [np.random.default_rng([seed, number]).random(width, np.float32) for number in numbers]
    )


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    store = MemoryStore() if request.param == "memory" else DiskStore(tmp_path)
    yield store
    store.close()


# Rows ----------------------------------------------------------------------------------------


def test_rows_come_back_bit_for_bit(store):
    numbers = range(1200)  # more than one batch of a question
    rows = rows_of(numbers)
    rows[0, :4] = [np.nan, np.inf, -0.0, np.float32(1e-45)]
    store.put_many("f", digests_of(numbers), rows)

    out = np.full((len(rows), WIDTH), -1, dtype=np.float32)
    found = store.get_into("f", digests_of(numbers), out)

    assert found.all()
    np.testing.assert_array_equal(out.view(np.uint32), rows.view(np.uint32))
    for kept, row in zip(store.get_many("f", digests_of(numbers)), rows, strict=True):
        np.testing.assert_array_equal(kept.view(np.uint32), row.view(np.uint32))
        assert not kept.flags.writeable


def test_what_is_missing_is_said_and_left_alone(store):
    store.put_many("f", digests_of([1, 3]), rows_of([1, 3]))
    out = np.full((5, WIDTH), -1, dtype=np.float32)

    found = store.get_into("f", digests_of([0, 1, 2, 3, 1]), out)

    assert found.tolist() == [False, True, False, True, True]
    np.testing.assert_array_equal(out[found], rows_of([1, 3, 1]))
    assert (out[~found] == -1).all()
    assert [row is not None for row in store.get_many("f", digests_of([0, 1]))] == [False, True]


def test_another_fingerprint_is_another_row(store):
    store.put_many("resnet50 layer3", digests_of([1]), rows_of([1]))
    store.put_many("resnet50 layer4", digests_of([1]), rows_of([2]))

    np.testing.assert_array_equal(
        store.get_many("resnet50 layer3", digests_of([1]))[0], rows_of([1])[0]
    )
    assert store.get_many("resnet50 layer2", digests_of([1])) == [None]


def test_another_width_is_a_miss(store):
    store.put_many("f", digests_of([1]), rows_of([1]))

    assert store.get_many("f", digests_of([1]), WIDTH + 1) == [None]
    assert not store.get_into("f", digests_of([1]), np.empty((1, WIDTH - 1), np.float32)).any()
    assert store.get_many("f", digests_of([1]), WIDTH)[0] is not None


def test_a_row_put_again_is_replaced(store):
    store.put_many("f", digests_of([1, 2]), rows_of([1, 2]))
    store.put_many("f", digests_of([2, 2, 3]), rows_of([7, 8, 9]))

    kept = store.get_many("f", digests_of([1, 2, 3]))
    np.testing.assert_array_equal(np.stack(kept), rows_of([1, 8, 9]))
    assert store.info().n_rows == 3


def test_rows_are_copies(store):
    rows = rows_of(range(4))
    store.put_many("f", digests_of(range(4)), rows)
    rows[:] = 0

    np.testing.assert_array_equal(
        np.stack(store.get_many("f", digests_of(range(4)))), rows_of(range(4))
    )


@pytest.mark.parametrize("width", [1, 512, 1280, 2048, 20_000])
def test_any_width_and_layout(store, width):
    rows = rows_of(range(6), width)
    store.put_many("f", digests_of(range(6)), np.asfortranarray(rows.astype(np.float64)))

    np.testing.assert_array_equal(np.stack(store.get_many("f", digests_of(range(6)), width)), rows)


def test_nothing_asked_nothing_put(store):
    store.put_many("f", [], np.empty((0, WIDTH), np.float32))

    assert store.get_many("f", []) == []
    assert store.get_into("f", [], np.empty((0, WIDTH), np.float32)).shape == (0,)
    assert store.get_file_digests([]) == []
    assert store.info().n_rows == 0


def test_more_digests_than_rows(store):
    with pytest.raises(ValueError):
        store.put_many("f", digests_of([1, 2]), rows_of([1]))


actions = st.lists(
    st.one_of(
        st.tuples(
            st.just("put"),
            st.sampled_from("ab"),
            st.lists(st.integers(0, 15), max_size=6),
            st.integers(0, 2),
        ),
        st.tuples(st.just("get"), st.sampled_from("ab"), st.lists(st.integers(0, 15), max_size=6)),
        st.tuples(st.just("keep"), st.integers(0, 12)),
        st.tuples(st.just("clear")),
        st.tuples(st.just("reopen")),
    ),
    max_size=20,
)


@pytest.mark.parametrize("kind", ["memory", "disk"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(actions=actions)
def test_it_behaves_as_a_dictionary(kind, actions, tmp_path):
    store = MemoryStore() if kind == "memory" else DiskStore(tmp_path)
    store.clear()
    model: dict = {}
    for action, *given_ in actions:
        if action == "put":
            fingerprint, numbers, seed = given_
            if numbers:
                rows = rows_of(numbers, seed=seed)
                store.put_many(fingerprint, digests_of(numbers), rows)
                for number, row in zip(numbers, rows, strict=True):
                    model[fingerprint, number] = row
        elif action == "get":
            fingerprint, numbers = given_
            for number, row in zip(
                numbers, store.get_many(fingerprint, digests_of(numbers), WIDTH), strict=True
            ):
                wanted = model.get((fingerprint, number))
                assert (row is None) == (wanted is None)
                if row is not None:
                    np.testing.assert_array_equal(row, wanted)
        elif action == "keep":
            store.reduce_size(items_limit=given_[0])
            assert store.info().n_rows == min(len(model), given_[0])
            model = {
                (fingerprint, number): row
                for (fingerprint, number), row in model.items()
                if store.get_many(fingerprint, digests_of([number]))[0] is not None
            }
            assert len(model) <= given_[0]
        elif action == "clear":
            store.clear()
            model = {}
        elif action == "reopen" and kind == "disk":
            store.close()
            store = DiskStore(tmp_path)
    info = store.info()
    assert info.n_rows == len(model) == sum(info.rows_by_fingerprint.values())
    store.close()


# Files ---------------------------------------------------------------------------------------


def test_a_file_is_known_until_its_stat_changes(store):
    stats = [(f"/data/image {i} é.jpg", 1000 + i, OLD_NS + i, 2**64 - 1 - i) for i in range(1100)]
    digests = digests_of(range(1100))
    store.put_file_digests(stats, digests, taken_at_ns=NOW_NS)

    assert store.get_file_digests(stats) == digests
    path, size, mtime_ns, inode = stats[0]
    assert store.get_file_digests(
        [
            (path, size + 1, mtime_ns, inode),
            (path, size, mtime_ns + 1, inode),
            (path, size, mtime_ns, inode - 1),
            (path + "x", size, mtime_ns, inode),
            None,
            stats[1],
        ]
    ) == [None, None, None, None, None, digests[1]]


def test_a_changed_file_is_learnt_anew(store):
    store.put_file_digests([("a", 1, OLD_NS, 5)], digests_of([1]), taken_at_ns=NOW_NS)
    store.put_file_digests([("a", 2, OLD_NS, 5), None], digests_of([2, 3]), taken_at_ns=NOW_NS)

    assert store.get_file_digests([("a", 1, OLD_NS, 5), ("a", 2, OLD_NS, 5)]) == [
        None,
        digests_of([2])[0],
    ]
    assert store.info().n_files == 1


def test_a_file_just_written_is_not_trusted_by_its_stat(store, tmp_path):
    """It may change in place, within one tick of the clock, and keep its size and time."""
    path = tmp_path / "image"
    path.write_bytes(b"one")
    stat = path.stat()
    young = (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    store.put_file_digests([young], digests_of([1]))
    assert store.get_file_digests([young]) == [None]

    os.utime(path, ns=(OLD_NS, NOW_NS + 5))  # from the future: a clock that is wrong
    store.put_file_digests([(str(path), 3, NOW_NS + 5, 1)], digests_of([1]), taken_at_ns=NOW_NS)
    assert store.info().n_files == 0

    settled = (str(path), 3, NOW_NS - _store_contract.SETTLED_AFTER_NS - 1, 1)
    store.put_file_digests([settled], digests_of([1]), taken_at_ns=NOW_NS)
    assert store.get_file_digests([settled]) == digests_of([1])


def test_a_path_that_is_no_unicode(store):
    path = os.fsdecode(b"/data/\xff\xfe.jpg")
    store.put_file_digests([(path, 1, OLD_NS, 1)], digests_of([1]), taken_at_ns=NOW_NS)
    assert store.get_file_digests([(path, 1, OLD_NS, 1)]) == digests_of([1])


# Bounds --------------------------------------------------------------------------------------


class Clock:
    """The wall clock of the stores, moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 1_800_000_000.0
        monkeypatch.setattr("time.time", lambda: self.now)

    def advance(self, hours):
        self.now += 3600 * hours


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def present(store, numbers):
    return [
        number
        for number, row in zip(numbers, store.get_many("f", digests_of(numbers)), strict=True)
        if row is not None
    ]


def test_the_least_recently_used_goes_first(store, clock):
    for number in range(10):
        store.put_many("f", digests_of([number]), rows_of([number]))
        clock.advance(2)
    store.get_many("f", digests_of([0, 3]))
    clock.advance(2)

    store.reduce_size(items_limit=4)

    assert present(store, range(10)) == [0, 3, 8, 9]


def test_age_limit(store, clock):
    for number in range(6):
        store.put_many("f", digests_of([number]), rows_of([number]))
        clock.advance(2)
    store.get_many("f", digests_of([0]))

    store.reduce_size(age_limit=datetime.timedelta(hours=5))

    assert present(store, range(6)) == [0, 4, 5]


@pytest.mark.parametrize("bound", [200_000, "200K"])
def test_bytes_limit(store, bound, clock):
    for number in range(0, 300, 10):
        numbers = range(number, number + 10)
        store.put_many("f", digests_of(numbers), rows_of(numbers, 512))
        clock.advance(2)
    assert store.info().n_bytes > 500_000

    store.reduce_size(bytes_limit=bound)

    info = store.info()
    assert 100_000 < info.n_bytes < 205_000
    kept = present(store, range(300))
    assert kept == list(range(300 - len(kept), 300))  # the newest
    if info.path:
        store.close()
        assert os.path.getsize(info.path) < 210_000


def test_the_bound_holds_while_writing(tmp_path, clock):
    for store in (MemoryStore("500K"), DiskStore(tmp_path, "500K")):
        for number in range(0, 600, 20):
            numbers = range(number, number + 20)
            store.put_many("f", digests_of(numbers), rows_of(numbers, 512))
            assert store.info().n_bytes <= 500 * 1024
            clock.advance(2)
        kept = present(store, range(600))
        assert len(kept) > 100
        assert kept[-20:] == list(range(580, 600))
        np.testing.assert_array_equal(
            np.stack(store.get_many("f", digests_of(kept))), rows_of(kept, 512)
        )
        store.close()
    assert os.path.getsize(store.path) <= 500 * 1024


def test_a_use_is_noted_once_an_hour(tmp_path, clock, monkeypatch):
    store = DiskStore(tmp_path)
    store.put_many("f", digests_of(range(5)), rows_of(range(5)))
    notes = []
    note = _disk_store.tables.note_reading
    monkeypatch.setattr(
        _disk_store.tables, "note_reading", lambda *args: (notes.append(args[2]), note(*args))
    )
    present(store, range(5))
    assert notes == []
    clock.advance(1.5)
    present(store, range(5))
    present(store, range(5))
    assert [len(used) for used in notes] == [5]
    store.close()


def test_a_row_larger_than_the_bound(tmp_path):
    store = MemoryStore(1000)
    store.put_many("f", digests_of([1]), rows_of([1], 5000))
    assert store.info().n_rows == store.info().n_bytes == 0
    store = DiskStore(tmp_path, 1000)
    store.put_many("f", digests_of([1]), rows_of([1], 5000))
    assert store.info().n_rows == 0
    store.close()


def test_no_bound(tmp_path):
    for store in (MemoryStore(None), DiskStore(tmp_path, None)):
        store.put_many("f", digests_of(range(50)), rows_of(range(50)))
        assert store.info().n_rows == 50
        assert store.info().max_bytes is None
        store.close()


def test_files_in_memory_are_bounded_too():
    store = MemoryStore(20_000)
    stats = [(f"/data/{i}", 1, OLD_NS, 1) for i in range(1000)]
    store.put_file_digests(stats, digests_of(range(1000)), taken_at_ns=NOW_NS)

    assert store.info().n_bytes <= 20_000
    assert 10 < store.info().n_files < 100
    assert store.get_file_digests(stats[-1:]) == digests_of([999])


def test_files_are_forgotten_with_their_rows(tmp_path):
    store = DiskStore(tmp_path)
    store.put_many("f", digests_of([1, 2]), rows_of([1, 2]))
    stats = [(f"/data/{i}", 1, OLD_NS, 1) for i in (1, 2)]
    store.put_file_digests(stats, digests_of([1, 2]), taken_at_ns=NOW_NS)
    store.reduce_size(items_limit=1)
    assert store.info().n_files == 1
    store.close()


def test_clear(store):
    store.put_many("f", digests_of(range(500)), rows_of(range(500), 512))
    store.put_file_digests([("a", 1, OLD_NS, 1)], digests_of([1]), taken_at_ns=NOW_NS)
    store.clear()

    info = store.info()
    assert (info.n_rows, info.n_files, info.rows_by_fingerprint) == (0, 0, {})
    assert store.get_many("f", digests_of([1])) == [None]
    assert store.claim("f", digests_of([1])).all()
    if info.path:
        store.close()
        assert os.path.getsize(info.path) < 120_000


@pytest.mark.parametrize("bound", [-1, "many", "G", [3]])
def test_a_bound_that_is_none(bound):
    with pytest.raises(ValueError, match=r"max_bytes must be a number of bytes.*got"):
        MemoryStore(bound)


def test_info_and_repr(store):
    store.put_many("resnet50", digests_of(range(3)), rows_of(range(3)))
    store.put_many("vit_b_16", digests_of(range(2)), rows_of(range(2)))
    info = store.info()

    assert info.rows_by_fingerprint == {"resnet50": 3, "vit_b_16": 2}
    assert info.n_rows == 5
    assert info.n_bytes >= 5 * 4 * WIDTH
    assert repr(store).endswith(
        "at most 10 GiB>" if isinstance(store, DiskStore) else "<MemoryStore of at most 512 MiB>"
    )


# Claims --------------------------------------------------------------------------------------


@pytest.fixture
def another():
    """Another thread: ``another(function)`` is what the function returns there."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function: pool.submit(function).result()


def test_a_claim_keeps_others_away_until_it_is_void(store, clock, another):
    digests = digests_of(range(4))
    store.put_many("f", digests[:1], rows_of([0]))
    assert store.claim("f", digests[:3]).tolist() == [False, True, True]
    assert store.claim("f", digests[:3]).tolist() == [False, True, True]  # my own again

    assert another(lambda: store.claim("f", digests)).tolist() == [False, False, False, True]
    assert another(lambda: store.claim("g", digests)).all()

    store.release("f", digests[1:2])
    store.release("f", digests[3:])  # not mine: nothing happens
    assert another(lambda: store.claim("f", digests)).tolist() == [False, True, False, True]
    store.put_many("f", digests[2:3], rows_of([2]))
    store.reduce_size(items_limit=0)
    assert another(lambda: store.claim("f", digests[2:3])).all()
    clock.advance(1)
    assert another(lambda: store.claim("f", digests)).all()


def test_the_claim_of_a_dead_process_is_void():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    host, pid, thread = this_worker().rsplit(":", 2)
    assert is_gone(f"{host}:{child.pid}:{thread}")
    assert not is_gone(f"{host}:{pid}:1")
    assert not is_gone(f"elsewhere:{child.pid}:{thread}")


# One store in many places ----------------------------------------------------------------------


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


# as_store ------------------------------------------------------------------------------------


def test_as_store(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert as_store(None) is as_store(None)
    assert isinstance(as_store(None), MemoryStore)
    store = as_store(tmp_path / "cache")
    assert isinstance(store, DiskStore)
    assert as_store(store) is store
    assert as_store("cache") is store
    assert as_store("~/cache") is store
    assert as_store(Memory(str(tmp_path / "cache"), verbose=0)) is store
    assert Path(store.path).parent == tmp_path / "cache"
    assert not (tmp_path / "cache" / "embeddings-v1.sqlite").exists()


@pytest.mark.parametrize("nothing", [False, Memory(None, verbose=0)])
def test_a_store_that_keeps_nothing(nothing):
    store = as_store(nothing)
    store.put_many("f", digests_of([1]), rows_of([1]))
    store.put_file_digests([("a", 1, OLD_NS, 1)], digests_of([1]), taken_at_ns=NOW_NS)
    assert store.info().n_rows == store.info().n_files == store.info().n_bytes == 0


@pytest.mark.parametrize("memory", [3, True, b"cache", ["cache"], object()])
def test_what_is_no_memory(memory):
    with pytest.raises(TypeError, match=r"memory must be None .* a folder .* got .* of type"):
        as_store(memory)


@pytest.mark.parametrize("memory", ["", "s3://bucket/cache", "a\0b"])
def test_what_is_no_local_folder(memory):
    with pytest.raises(ValueError, match="memory must be a local folder; got"):
        as_store(memory)


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ValueError, match=r"memory must be a folder, and .* is a file"):
        as_store(path)


def test_many_folders_stay_usable(tmp_path):
    for i in range(12):
        as_store(tmp_path / str(i)).put_many("f", digests_of([i]), rows_of([i]))
    for i in range(12):
        assert present(as_store(tmp_path / str(i)), [i]) == [i]
        as_store(tmp_path / str(i)).close()


def test_importing_the_store_imports_nothing_heavy():
    question = (
        "import sys, sktransfer._cache;"
        "print([m for m in ('torch', 'torchvision', 'joblib', 'sklearn') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", question], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


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
    monkeypatch.setattr("sktransfer._sqlite_file.is_network_folder", lambda folder: True)
    store = DiskStore(tmp_path)
    store.put_many("f", digests_of([1]), rows_of([1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "embeddings-v1.sqlite",
        "embeddings-v1.sqlite.lock",
    ]
    assert present(store, [1]) == [1]
    store.close()
