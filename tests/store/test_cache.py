"""The embedding store, against a dictionary."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joblib import Memory
from store_under_fire import WIDTH, digests_of, present, rows_of

from sktransfer.store import _disk as _disk_store
from sktransfer.store import _info as _store_contract
from sktransfer.store import _tables as _embedding_tables
from sktransfer.store._store import DiskStore, MemoryStore, as_store, embedding_store

NOW_NS = 1_900_000_000 * 10**9
OLD_NS = NOW_NS - 3600 * 10**9


# Rows ------------------------------------------------------------------------------------------


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
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


# Files -----------------------------------------------------------------------------------------


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


@pytest.fixture
def asked(monkeypatch):
    """How many files the tables on disk are asked for, call by call."""
    counts = []
    read_files = _embedding_tables.read_files

    def count(connection, stats):
        counts.append(len(stats))
        return read_files(connection, stats)

    monkeypatch.setattr(_embedding_tables, "read_files", count)
    return counts


def test_files_are_asked_of_the_disk_once(tmp_path, asked):
    stats = [(f"/data/{i}.jpg", i, 10**18 + i, i) for i in range(300)]
    DiskStore(tmp_path).put_file_digests(stats[:200], digests_of(range(200)))
    store = DiskStore(tmp_path)
    for _ in range(2):
        got = store.get_file_digests([None, *stats])
        assert got == [None, *digests_of(range(200)), *[None] * 100]
    assert asked == [300, 100]

    store.put_file_digests(stats[200:], digests_of(range(200, 300)))
    assert store.get_file_digests(stats) == digests_of(range(300))
    assert asked == [300, 100]

    store.clear()
    assert store.get_file_digests(stats[:2]) == [None, None]


def test_what_an_eviction_forgets_can_be_put_again(tmp_path):
    stats = [(f"/data/{i}.jpg", i, 10**18 + i, i) for i in range(10)]
    store = DiskStore(tmp_path)
    store.put_file_digests(stats, digests_of(range(10)))
    store.put_many("f", digests_of(range(10)), rows_of(range(10)))
    store.reduce_size(items_limit=0)  # what the files held goes with the rows
    assert store.get_file_digests(stats) == [None] * 10
    store.put_file_digests(stats, digests_of(range(10)))
    assert DiskStore(tmp_path).get_file_digests(stats) == digests_of(range(10))


def test_of_too_many_files_the_first_are_kept_in_the_process(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(_disk_store, "_N_IDENTITIES", 30)
    stats = [(f"/data/{i}.jpg", i, 10**18 + i, i) for i in range(50)]
    store = DiskStore(tmp_path)
    store.put_file_digests(stats, digests_of(range(50)))
    for _ in range(3):
        assert store.get_file_digests(stats) == digests_of(range(50))
    assert asked == [20, 20, 20]


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


# embedding_store -------------------------------------------------------------------------------


def test_the_store_behind_a_memory_parameter(tmp_path):
    store = embedding_store()
    store.put_many("f", digests_of([1]), rows_of([1]))
    assert embedding_store(None) is store is as_store(None)
    assert embedding_store(tmp_path) is as_store(str(tmp_path))
    assert embedding_store(store) is store


def test_a_bound_of_its_own(tmp_path):
    default = embedding_store(tmp_path)
    default.put_many("f", digests_of([1]), rows_of([1]))
    large = embedding_store(Memory(tmp_path).location, max_bytes="50G")
    assert (large.max_bytes, default.max_bytes) == (50 * 2**30, 10 * 2**30)
    assert large.info().n_rows == 1  # the same file
    unbound = embedding_store(max_bytes=None)
    assert unbound.max_bytes is None
    assert unbound is not embedding_store()
    assert as_store(large) is large
    with pytest.raises(ValueError, match="max_bytes must be a number of bytes"):
        embedding_store(max_bytes="much")
    with pytest.raises(ValueError, match="memory=False keeps nothing"):
        embedding_store(False, max_bytes="1G")
    with pytest.raises(TypeError, match="memory must be"):
        embedding_store(3)


# as_store --------------------------------------------------------------------------------------


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
    with ThreadPoolExecutor(1) as pool:  # nobody waits for what will not be kept
        assert pool.submit(store.claim, "f", digests_of([1])).result().all()
    assert store.claim("f", digests_of([1])).all()


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
        "import sys, sktransfer.store._store;"
        "print([m for m in ('torch', 'torchvision', 'joblib', 'sklearn') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", question], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
