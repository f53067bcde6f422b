"""What the other processes of `test_cache_fire` do; a script, so that they start light.

``python store_under_fire.py write FOLDER SEED N_ROWS`` writes and reads rows in its own order.
``python store_under_fire.py share FOLDER SEED N_ROWS`` computes what no other process has claimed.
``python store_under_fire.py kill FOLDER N_KILLS SEED`` kills writers and looks at what they left.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import sys
import time

import numpy as np

from sktransfer.store._store import DiskStore

WIDTH = 600
FINGERPRINT = "resnet50 layer4"


def digests_of(numbers):
    return [int(number).to_bytes(16, "big") for number in numbers]


def rows_of(numbers, width=WIDTH, seed=0):
    """A row that its number alone decides, so that any reader can tell whether it is right."""
    start = np.asarray(list(numbers), dtype=np.float32)[:, None]
    return start * 3 + np.arange(width, dtype=np.float32) / 7 + np.float32(seed / 3)


def filled(folder, n_rows=200):
    store = DiskStore(folder)
    put(store, range(n_rows))
    return store


def put(store, numbers):
    store.put_many(FINGERPRINT, digests_of(numbers), rows_of(numbers))


def check(store, numbers):
    """The numbers whose rows are there; each is right, or this fails."""
    numbers = list(numbers)
    out = np.full((len(numbers), WIDTH), np.nan, dtype=np.float32)
    found = store.get_into(FINGERPRINT, digests_of(numbers), out)
    np.testing.assert_array_equal(out[found], rows_of(numbers)[found])
    assert np.isnan(out[~found]).all()
    return [number for number, is_found in zip(numbers, found, strict=True) if is_found]


def present(store, numbers):
    """The numbers whose rows are there, of whatever width, under the fingerprint "f"."""
    rows = store.get_many("f", digests_of(numbers))
    return [number for number, row in zip(numbers, rows, strict=True) if row is not None]


def damaged_names(folder):
    return [
        name
        for name in os.listdir(folder)
        if ".damaged-" in name and not name.endswith(("-wal", "-shm", "-journal"))
    ]


def write(folder, seed, n_rows):
    store = DiskStore(folder)
    order = np.random.default_rng(seed).permutation(n_rows)
    for start in range(0, n_rows, 25):
        part = order[start : start + 25]
        put(store, part)
        check(store, order[:100])
    store.close()


def share(folder, seed, n_rows):
    store = DiskStore(folder)
    n_computed = 0
    left = list(range(n_rows))
    while left:
        later = []
        for start in range(0, len(left), 20):
            there = set(check(store, left[start : start + 20]))
            missing = [n for n in left[start : start + 20] if n not in there]
            mine = store.claim(FINGERPRINT, digests_of(missing), seconds=300)
            time.sleep(0.002 * mine.sum())  # the network
            numbers = [n for n, is_mine in zip(missing, mine, strict=True) if is_mine]
            if numbers:
                put(store, numbers)
            n_computed += len(numbers)
            later += [n for n, is_mine in zip(missing, mine, strict=True) if not is_mine]
        if len(later) == len(left):
            time.sleep(0.02)
        left = later
    store.close()
    print(n_computed)


def write_until_killed(folder, first, acknowledge):
    store = DiskStore(folder)
    number = first
    while True:
        part = range(number, number + 10)
        put(store, part)
        number += 10
        os.write(acknowledge, struct.pack("q", number))


def kill(folder, n_kills, seed):
    chance = random.Random(seed)
    first, n_acknowledged, n_kept = 0, 0, 0
    for n in range(n_kills):
        if n % 20 == 0:  # now and then from nothing, so that creation is hit as well
            place, first = os.path.join(folder, str(n)), 0
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            write_until_killed(place, first, writing)
        os.close(writing)
        time.sleep(chance.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as pipe:
            numbers = [number for (number,) in struct.iter_unpack("q", pipe.read())]
        last = numbers[-1] if numbers else first
        store = DiskStore(place)
        is_last_here = n % 20 == 19
        looked_from = 0 if is_last_here else max(0, first - 50)
        there = check(store, range(looked_from, last + 30))
        # What put_many has returned from is there; what came after is whole or absent.
        n_there = store.info().n_rows
        assert there == list(range(looked_from, n_there)), (n, last, n_there)
        assert n_there in (last, last + 10), (n, last, n_there)
        n_acknowledged += last - first
        n_kept += n_there - first
        first = n_there
        store.close()
        assert not [name for name in os.listdir(place) if "damaged" in name]
    print(n_acknowledged, n_kept)


if __name__ == "__main__":
    role, folder, *numbers = sys.argv[1:]
    {"write": write, "share": share, "kill": kill}[role](folder, *map(int, numbers))
