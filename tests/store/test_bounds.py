"""How much a store keeps, and what goes first."""

from __future__ import annotations

import os

import numpy as np
import pytest
from store_process import WIDTH, digests_of, opened, rows_of

from sktransfer import embedding_store

NOW_NS = 1_900_000_000 * 10**9
OLD_NS = NOW_NS - 3600 * 10**9


def put(store, numbers, width=512):
    store.put_many("f", digests_of(numbers), rows_of(numbers, width))


def present(store, numbers):
    """The numbers whose rows are there."""
    rows = store.get_many("f", digests_of(numbers))
    return [number for number, row in zip(numbers, rows, strict=True) if row is not None]


@pytest.fixture(params=["memory", "disk"])
def small_store(request, tmp_path):
    """A store of 500 KiB."""
    store = embedding_store(None if request.param == "memory" else tmp_path, max_bytes="500K")
    yield store
    store.close()


def test_the_bound_holds_while_writing(small_store):
    for number in range(0, 600, 20):
        put(small_store, range(number, number + 20))
        assert small_store.info().n_bytes <= 500 * 1024
    kept = present(small_store, range(600))
    assert len(kept) > 100
    assert kept == list(range(600 - len(kept), 600))  # the last
    np.testing.assert_array_equal(
        np.stack(small_store.get_many("f", digests_of(kept))), rows_of(kept, 512)
    )
    path = small_store.info().path
    if path:
        small_store.close()
        assert os.path.getsize(path) <= 500 * 1024


def test_in_memory_the_least_recently_used_goes_first():
    store = embedding_store(max_bytes="100K")
    put(store, range(40))
    assert present(store, [0, 3]) == [0, 3]
    put(store, range(40, 75))
    kept = present(store, range(75))
    assert kept[:2] == [0, 3]
    assert kept[2:] == list(range(77 - len(kept), 75))


def test_on_disk_the_first_written_goes_first(tmp_path):
    store = opened(tmp_path, "500K")
    put(store, range(100))
    put(store, [3])  # written anew
    for number in range(100, 400, 20):
        put(store, range(number, number + 20))
        kept = present(store, range(400))
        if 4 not in kept:
            break
    assert 3 in kept
    assert 0 not in kept
    store.close()


def test_a_smaller_bound_shrinks_the_file(tmp_path):
    large = opened(tmp_path)
    put(large, range(1000))
    large.close()
    assert os.path.getsize(large.path) > 2 * 10**6
    small = opened(tmp_path, "500K")
    put(small, [1000])
    assert present(small, range(1001))[-1] == 1000
    small.close()
    assert os.path.getsize(small.path) <= 500 * 1024


def test_known_files_leave_room_for_rows(small_store):
    """Many paths of few images must not drive all rows out."""
    files = [(f"/images/{k:05d}.jpg", 9, OLD_NS, k) for k in range(4000)]
    small_store.put_file_digests(files, digests_of([0]) * len(files), NOW_NS)
    put(small_store, range(100))
    assert small_store.info().n_bytes <= 500 * 1024
    assert present(small_store, range(100)) == list(range(100))


def test_files_alone_are_bounded_too(small_store):
    files = [(f"/images/{k:05d}.jpg", 9, OLD_NS, k) for k in range(20_000)]
    for start in range(0, len(files), 500):
        part = files[start : start + 500]
        small_store.put_file_digests(part, digests_of(range(500)), NOW_NS)
        assert small_store.info().n_bytes <= 500 * 1024
    assert 100 < small_store.info().n_files < len(files)


def test_files_forgotten_with_an_eviction_can_be_put_again(tmp_path):
    files = [(f"/images/{k}.jpg", 9, OLD_NS, k) for k in range(10)]
    store = opened(tmp_path, "500K")
    store.put_file_digests(files, digests_of(range(10)), NOW_NS)
    put(store, range(400))
    assert store.get_file_digests(files) == [None] * 10
    store.put_file_digests(files, digests_of(range(10)), NOW_NS)
    store.close()
    assert store.get_file_digests(files) == digests_of(range(10))
    store.close()


def test_a_row_larger_than_the_bound(tmp_path):
    for store in (embedding_store(max_bytes=1000), opened(tmp_path, 1000)):
        put(store, [1], 5000)
        assert len(store) == 0
        store.close()


def test_no_bound(tmp_path):
    for store in (embedding_store(max_bytes=None), opened(tmp_path, None)):
        put(store, range(50))
        assert len(store) == 50
        assert store.info().max_bytes is None
        store.close()


def test_clear(store):
    put(store, range(500))
    store.put_file_digests([("a", 1, OLD_NS, 1)], digests_of([1]), NOW_NS)
    lock = store.lock("f", 1)
    assert lock.acquire(blocking=False)
    store.clear()

    info = store.info()
    assert (info.n_rows, info.n_files, info.rows_by_fingerprint) == (0, 0, {})
    assert present(store, [1]) == []
    assert store.lock("f", 1).acquire(blocking=False)
    if info.path:
        store.close()
        assert os.path.getsize(info.path) < 120_000


def test_info_and_repr(store):
    store.put_many("resnet50", digests_of(range(3)), rows_of(range(3)))
    store.put_many("vit_b_16", digests_of(range(2)), rows_of(range(2)))
    info = store.info()

    assert info.rows_by_fingerprint == {"resnet50": 3, "vit_b_16": 2}
    assert len(store) == info.n_rows == 5
    assert info.n_bytes >= 5 * 4 * WIDTH
    assert info.max_bytes == 512 * 2**20
    assert repr(store).endswith("max_bytes=536870912)")
