"""The embedding store, against a dictionary."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joblib import Memory
from store_process import WIDTH, check, digests_of, filled, opened, put, rows_of

from sktransfer import embedding_store

NOW_NS = 1_900_000_000 * 10**9
OLD_NS = NOW_NS - 3600 * 10**9


# Rows ------------------------------------------------------------------------------------------


def test_rows_come_back_bit_for_bit(store):
    numbers = range(1200)
    rows = rows_of(numbers)
    rows[0, :4] = [np.nan, np.inf, -0.0, np.float32(1e-45)]
    given_rows = np.asfortranarray(rows.astype(np.float64))  # any layout and type
    store.put_many("f", digests_of(numbers), given_rows)
    given_rows[:] = 0  # rows are copies

    out = np.full((len(rows), WIDTH), -1, dtype=np.float32)
    found = store.get_into("f", digests_of(numbers), out)

    assert found.all()
    np.testing.assert_array_equal(out.view(np.uint32), rows.view(np.uint32))
    for kept, row in zip(store.get_many("f", digests_of(numbers)), rows, strict=True):
        np.testing.assert_array_equal(kept.view(np.uint32), row.view(np.uint32))
        assert not kept.flags.writeable


def test_missing_rows_are_left_alone(store):
    store.put_many("f", digests_of([1, 3]), rows_of([1, 3]))
    out = np.full((5, WIDTH), -1, dtype=np.float32)

    found = store.get_into("f", digests_of([0, 1, 2, 3, 1]), out)

    assert found.tolist() == [False, True, False, True, True]
    np.testing.assert_array_equal(out[found], rows_of([1, 3, 1]))
    assert (out[~found] == -1).all()
    assert [row is not None for row in store.get_many("f", digests_of([0, 1]))] == [False, True]


def test_rows_are_read_into_columns_of_a_wider_array(store):
    store.put_many("f", digests_of(range(6)), rows_of(range(6)))
    out = np.full((6, WIDTH + 2), -1, dtype=np.float32)

    assert store.get_into("f", digests_of(range(6)), out[:, 1:-1]).all()

    np.testing.assert_array_equal(out[:, 1:-1], rows_of(range(6)))
    assert (out[:, [0, -1]] == -1).all()


def test_another_fingerprint_is_another_row(store):
    store.put_many("resnet50 layer3", digests_of([1]), rows_of([1]))
    store.put_many("resnet50 layer4", digests_of([1]), rows_of([2]))

    kept = store.get_many("resnet50 layer3", digests_of([1]))
    np.testing.assert_array_equal(kept[0], rows_of([1])[0])
    assert store.get_many("resnet50 layer2", digests_of([1])) == [None]


def test_another_width_is_a_miss(store):
    store.put_many("f", digests_of([1]), rows_of([1]))

    for width, is_found in [(WIDTH - 1, False), (WIDTH, True), (WIDTH + 1, False)]:
        out = np.empty((1, width), np.float32)
        assert store.get_into("f", digests_of([1]), out).tolist() == [is_found]


def test_a_row_put_again_is_replaced(store):
    store.put_many("f", digests_of([1, 2]), rows_of([1, 2]))
    store.put_many("f", digests_of([2, 2, 3]), rows_of([7, 8, 9]))

    np.testing.assert_array_equal(
        np.stack(store.get_many("f", digests_of([1, 2, 3]))), rows_of([1, 8, 9])
    )
    assert len(store) == 3


def test_no_rows(store):
    store.put_many("f", [], np.empty((0, WIDTH), np.float32))

    assert store.get_many("f", []) == []
    assert store.get_into("f", [], np.empty((0, WIDTH), np.float32)).shape == (0,)
    assert store.get_file_digests([]) == []
    assert len(store) == 0


actions = st.lists(
    st.one_of(
        st.tuples(
            st.just("put"),
            st.sampled_from("ab"),
            st.lists(st.integers(0, 15), max_size=6),
            st.integers(0, 2),
        ),
        st.tuples(st.just("get"), st.sampled_from("ab"), st.lists(st.integers(0, 15), max_size=6)),
        st.tuples(st.just("clear")),
        st.tuples(st.just("reopen")),
    ),
    max_size=20,
)


@pytest.mark.parametrize("kind", ["memory", "disk"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=actions)
def test_it_behaves_as_a_dictionary(kind, actions, tmp_path):
    store = embedding_store(max_bytes="1G") if kind == "memory" else opened(tmp_path)
    store.clear()
    model: dict = {}
    for action, *given_ in actions:
        if action == "put":
            fingerprint, numbers, seed = given_
            rows = rows_of(numbers, seed=seed)
            store.put_many(fingerprint, digests_of(numbers), rows)
            model |= {(fingerprint, n): row for n, row in zip(numbers, rows, strict=True)}
        elif action == "get":
            fingerprint, numbers = given_
            kept = store.get_many(fingerprint, digests_of(numbers))
            for number, row in zip(numbers, kept, strict=True):
                assert (row is None) == ((fingerprint, number) not in model)
                if row is not None:
                    np.testing.assert_array_equal(row, model[fingerprint, number])
        elif action == "clear":
            store.clear()
            model = {}
        elif action == "reopen" and kind == "disk":
            store.close()
            store = opened(tmp_path)
    info = store.info()
    assert len(store) == info.n_rows == len(model) == sum(info.rows_by_fingerprint.values())
    store.close()


# Files -----------------------------------------------------------------------------------------


def test_a_file_is_known_until_its_stat_changes(store):
    stats = [(f"/data/image {i} é.jpg", 1000 + i, OLD_NS + i, 2**64 - 1 - i) for i in range(1100)]
    digests = digests_of(range(1100))
    store.put_file_digests(stats, digests, NOW_NS)

    for _ in range(2):
        assert store.get_file_digests([None, *stats]) == [None, *digests]
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


def test_files_are_known_to_later_runs(tmp_path):
    stats = [(f"/data/{i}.jpg", i, OLD_NS, i) for i in range(300)]
    first = opened(tmp_path)
    first.put_file_digests(stats[:200], digests_of(range(200)), NOW_NS)
    first.close()
    store = opened(tmp_path)
    for _ in range(2):
        assert store.get_file_digests(stats) == digests_of(range(200)) + [None] * 100
    store.put_file_digests(stats[200:], digests_of(range(200, 300)), NOW_NS)
    assert store.get_file_digests(stats) == digests_of(range(300))
    store.clear()
    assert store.get_file_digests(stats[:2]) == [None, None]
    store.close()


def test_a_changed_file_replaces_the_old_one(store):
    store.put_file_digests([("a", 1, OLD_NS, 5)], digests_of([1]), NOW_NS)
    store.put_file_digests([("a", 2, OLD_NS, 5), None], digests_of([2, 3]), NOW_NS)

    assert store.get_file_digests([("a", 2, OLD_NS, 5)]) == digests_of([2])
    assert store.info().n_files == 1


def test_a_file_just_written_is_not_trusted_by_its_stat(store):
    """It may change in place, within one tick of the clock, and keep its size and time."""
    for age_ns, is_known in [(-5, False), (2 * 10**9, False), (2 * 10**9 + 1, True)]:
        stat = ("a", 3, NOW_NS - age_ns, 1)
        store.put_file_digests([stat], digests_of([1]), NOW_NS)
        assert store.get_file_digests([stat]) == (digests_of([1]) if is_known else [None])


def test_a_path_that_is_not_unicode(store):
    path = os.fsdecode(b"/data/\xff\xfe.jpg")
    store.put_file_digests([(path, 1, OLD_NS, 1)], digests_of([1]), NOW_NS)
    assert store.get_file_digests([(path, 1, OLD_NS, 1)]) == digests_of([1])


# embedding_store -------------------------------------------------------------------------------


def test_one_store_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    store = embedding_store(tmp_path / "cache")
    for memory in (store, "cache", "~/cache", Memory("cache", verbose=0), Path("cache/../cache")):
        assert embedding_store(memory) is store
    assert Path(store.path).parent == tmp_path / "cache"
    assert not (tmp_path / "cache" / "embeddings-v2.sqlite").exists()  # before it is used
    put(store, [1])
    assert len(store) == 1
    assert embedding_store() is embedding_store(None) is not store
    store.close()


def test_a_bound_of_its_own(tmp_path):
    default = embedding_store(tmp_path)
    put(default, [1])
    large = embedding_store(tmp_path, max_bytes="50G")
    assert (large.max_bytes, default.max_bytes) == (50 * 2**30, 10 * 2**30)
    assert check(large, [1]) == [1]  # the same file
    assert embedding_store(large) is large
    for store in (default, large):
        store.close()
    unbound = embedding_store(max_bytes=None)
    assert unbound.max_bytes is None
    assert unbound is not embedding_store()


def test_bounds_that_are_not_sizes():
    for bound in (-1, "many", "G", "", [3], True, float("inf"), float("nan"), "inf"):
        with pytest.raises(ValueError, match=r"max_bytes must be a number of bytes.*got"):
            embedding_store(max_bytes=bound)
    with pytest.raises(ValueError, match="memory=False keeps nothing: it takes no max_bytes"):
        embedding_store(False, max_bytes="1G")


@pytest.mark.parametrize("nothing", [False, Memory(None, verbose=0)])
def test_a_store_that_keeps_nothing(nothing):
    store = embedding_store(nothing)
    put(store, [1])
    store.put_file_digests([("a", 1, OLD_NS, 1)], digests_of([1]), NOW_NS)
    info = store.info()
    assert len(store) == info.n_rows == info.n_files == info.n_bytes == 0


@pytest.mark.parametrize("memory", [3, True, b"cache", ["cache"], object()])
def test_what_memory_cannot_be(memory):
    with pytest.raises(TypeError, match=r"memory must be None .* a folder .* got .* of type"):
        embedding_store(memory)


@pytest.mark.parametrize("memory", ["", "s3://bucket/cache", "a\0b"])
def test_paths_that_are_not_local_folders(memory):
    with pytest.raises(ValueError, match="memory must be a local folder; got"):
        embedding_store(memory)


def test_a_file_is_not_a_folder(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ValueError, match=r"memory must be a folder, and .* is a file"):
        embedding_store(path)


def test_many_folders_stay_usable(tmp_path):
    for i in range(12):
        put(embedding_store(tmp_path / str(i)), [i])
    for i in range(12):
        assert check(embedding_store(tmp_path / str(i)), [i]) == [i]
        embedding_store(tmp_path / str(i)).close()


def test_clearing_the_process_store_frees_what_fine_tuning_keeps():
    from sktransfer.store._store import activations

    activations.put_many("f", digests_of([1]), np.ones((1, 2, 3, 4)))
    assert activations.get_many("f", digests_of([1]))[0].shape == (2, 3, 4)
    embedding_store().clear()
    assert len(activations) == 0


def test_the_folder_is_made_on_first_use_only(tmp_path):
    folder = tmp_path / "a" / "b"
    store = opened(folder)
    assert not folder.exists()
    put(store, [1])
    assert check(opened(folder), [1]) == [1]
    store.close()


def test_a_deleted_folder_is_made_again(tmp_path):
    store = filled(tmp_path / "cache", 5)
    os.rename(tmp_path / "cache", tmp_path / "away")
    assert check(store, range(5)) == []
    put(store, [1])
    assert check(opened(tmp_path / "cache"), range(5)) == [1]
    store.close()
