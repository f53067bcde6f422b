"""Rows that tell whether they are right, and what other processes do with a store of them.

``python store_process.py write FOLDER SEED N_ROWS`` writes and reads rows in its own order.
``python store_process.py share FOLDER SEED N_ROWS`` computes rows under the locks of their blocks.
``python store_process.py hold FOLDER`` holds a lock until it is killed.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from numpy.testing import assert_array_equal

from sktransfer import embedding_store
from sktransfer.store._store import N_BLOCKS, block_of

WIDTH = 600
FINGERPRINT = "resnet50 layer4"


def digests_of(numbers):
    return [int(number).to_bytes(16, "little") for number in numbers]


def rows_of(numbers, width=WIDTH, seed=0):
    """A row that its number alone decides, so that any reader can tell whether it is right."""
    start = np.asarray(list(numbers), dtype=np.float32)[:, None]
    return start * 3 + np.arange(width, dtype=np.float32) / 7 + np.float32(seed / 3)


def opened(folder, max_bytes="1G"):
    """A store of its own, which shares nothing but the file with others of the folder."""
    return embedding_store(folder, max_bytes=max_bytes)


def filled(folder, n_rows=200):
    store = opened(folder)
    put(store, range(n_rows))
    return store


def put(store, numbers):
    store.put_many(FINGERPRINT, digests_of(numbers), rows_of(numbers))


def check(store, numbers):
    """The numbers whose rows are there; each is right, or this fails."""
    numbers = list(numbers)
    out = np.full((len(numbers), WIDTH), np.nan, dtype=np.float32)
    found = store.get_into(FINGERPRINT, digests_of(numbers), out)
    assert_array_equal(out[found], rows_of(numbers)[found])
    assert np.isnan(out[~found]).all()
    return [number for number, is_found in zip(numbers, found, strict=True) if is_found]


def write(folder, seed, n_rows):
    store = opened(folder)
    order = np.random.default_rng(seed).permutation(n_rows)
    for start in range(0, n_rows, 25):
        put(store, order[start : start + 25])
        check(store, order[:100])
    store.close()


def write_forever(folder, first):
    """Say after each write that everything below a number is kept."""
    store = opened(folder)
    while True:
        put(store, range(first, first + 10))
        first += 10
        print(first, flush=True)


def share(folder, seed, n_rows):
    """Compute the rows that no other process computes, and say how many these are."""
    store = opened(folder)
    n_computed = 0
    blocks = [[] for _ in range(N_BLOCKS)]
    for number, digest in enumerate(digests_of(range(n_rows))):
        blocks[block_of(digest)].append(number)
    for block in np.random.default_rng(seed).permutation(N_BLOCKS):
        lock = store.lock(FINGERPRINT, int(block))
        assert lock.acquire()
        there = set(check(store, blocks[block]))
        missing = [number for number in blocks[block] if number not in there]
        if missing:
            time.sleep(0.005)  # the network
            put(store, missing)
        n_computed += len(missing)
        lock.release()
    store.close()
    print(n_computed)


def hold(folder):
    lock = opened(folder).lock(FINGERPRINT, 3)
    assert lock.acquire()
    print("held", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    role, folder, *numbers = sys.argv[1:]
    globals()[role](folder, *map(int, numbers))
