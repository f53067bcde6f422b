"""How much a store keeps, and what goes first."""

from __future__ import annotations

import datetime
import os

import numpy as np
import pytest
from store_under_fire import WIDTH, digests_of, present, rows_of

from sktransfer.store import _disk as _disk_store
from sktransfer.store._store import DiskStore, MemoryStore

NOW_NS = 1_900_000_000 * 10**9
OLD_NS = NOW_NS - 3600 * 10**9


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


def test_known_files_leave_room_for_rows(tmp_path, clock):
    """Many names of few pictures: what is known of the files must not drive all rows out."""
    files = [(f"/pictures/{k:05d}.jpg", 9, OLD_NS, k) for k in range(4000)]
    for store in (MemoryStore("500K"), DiskStore(tmp_path, "500K")):
        store.put_file_digests(files, digests_of([0]) * len(files), NOW_NS)
        numbers = range(100)
        store.put_many("f", digests_of(numbers), rows_of(numbers, 512))
        info = store.info()
        assert info.n_bytes <= 500 * 1024
        assert present(store, numbers) == list(numbers)
        store.close()


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


@pytest.mark.parametrize("bound", [-1, "many", "G", [3], True, float("inf"), "inf"])
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


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"items_limit": 2.5}, ValueError, "items_limit must be a whole number >= 0.*got 2.5"),
        ({"items_limit": -1}, ValueError, "items_limit must be a whole number >= 0.*got -1"),
        ({"items_limit": True}, ValueError, "items_limit must be a whole number >= 0.*got True"),
        ({"bytes_limit": True}, ValueError, "bytes_limit must be a number of bytes.*got True"),
        ({"age_limit": 5}, TypeError, "age_limit must be a datetime.timedelta.*got 5"),
        ({"age_limit": datetime.timedelta(-1)}, ValueError, "age_limit must not be negative"),
    ],
    ids=str,
)
def test_limits_that_are_none(store, limits, error, message):
    store.put_many("f", digests_of(range(4)), rows_of(range(4)))
    with pytest.raises(error, match=message):
        store.reduce_size(**limits)
    assert store.info().n_rows == 4


def test_a_limit_of_numpy(store):
    store.put_many("f", digests_of(range(4)), rows_of(range(4)))
    store.reduce_size(items_limit=np.int64(3))
    assert store.info().n_rows == 3
