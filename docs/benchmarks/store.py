"""Rows per second kept and found again by the store on disk, against other ways to keep them.

    python docs/benchmarks/store.py [--rows 10000] [--width 2048] [--rounds 3]

The peers are joblib.Memory with one call a row (what scikit-learn's ``memory`` is), a shelf of
the standard library, one .npy file a row, and diskcache where it is installed (``pip install
diskcache``; nothing of ours needs it). All keep the same float32 rows on the same disk and give
them back as one array, which is compared bit for bit; reading is with a warm page cache, by a
store that was closed and opened again. Each round runs every peer, the slow ones on fewer rows,
just after ours on the same rows; the ratio is of these two, and its median is quoted.
"""

import argparse
import os
import shelve
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import joblib
import numpy as np
from _report import save

from sktransfer import embedding_store

try:
    import diskcache
except ImportError:
    diskcache = None

BATCH = 256  # rows put at once, about what a network gives in one go


class Ours:
    name = "sktransfer"

    def __init__(self, folder):
        self.store = embedding_store(folder)

    def write(self, keys, rows):
        for start in range(0, len(keys), BATCH):
            batch = slice(start, start + BATCH)
            self.store.put_many("resnet50", keys[batch], rows[batch])

    def read(self, keys, out):
        assert self.store.get_into("resnet50", keys, out).all()

    def close(self):
        self.store.close()


class JoblibMemory:
    name = "joblib.Memory"
    n_rows_part = 0.1

    def __init__(self, folder):
        self.rows = {}
        self.cached = joblib.Memory(folder, verbose=0).cache(self.row, ignore=["self"])

    def row(self, key):
        return self.rows[key]

    def write(self, keys, rows):
        self.rows = dict(zip(keys, rows, strict=True))
        for key in keys:
            self.cached(key)

    def read(self, keys, out):
        self.rows = {}
        for i, key in enumerate(keys):
            out[i] = self.cached(key)

    def close(self):
        pass


class Shelf:
    name = "shelve"
    n_rows_part = 0.5

    def __init__(self, folder):
        self.shelf = shelve.open(str(Path(folder) / "shelf"))  # noqa: SIM115

    def write(self, keys, rows):
        for key, row in zip(keys, rows, strict=True):
            self.shelf[key.hex()] = row
        self.shelf.sync()

    def read(self, keys, out):
        for i, key in enumerate(keys):
            out[i] = self.shelf[key.hex()]

    def close(self):
        self.shelf.close()


class Files:
    name = "npy files"
    n_rows_part = 0.5

    def __init__(self, folder):
        self.folder = Path(folder)

    def write(self, keys, rows):
        for key, row in zip(keys, rows, strict=True):
            np.save(self.folder / f"{key.hex()}.npy", row)

    def read(self, keys, out):
        for i, key in enumerate(keys):
            out[i] = np.load(self.folder / f"{key.hex()}.npy")

    def close(self):
        pass


class DiskCache:
    name = "diskcache"
    n_rows_part = 0.3

    def __init__(self, folder):
        self.cache = diskcache.Cache(folder)

    def write(self, keys, rows):
        for start in range(0, len(keys), BATCH):
            with self.cache.transact():
                for i in range(start, min(start + BATCH, len(keys))):
                    self.cache.set(keys[i], rows[i].tobytes())

    def read(self, keys, out):
        for i, key in enumerate(keys):
            out[i] = np.frombuffer(self.cache[key], np.float32)

    def close(self):
        self.cache.close()


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def rates(kind, keys, rows):
    n = len(keys)
    out = np.zeros_like(rows)
    with tempfile.TemporaryDirectory() as folder:
        peer = kind(folder)
        written = n / seconds(peer.write, keys, rows)
        peer.close()
        peer = kind(folder)
        read = n / seconds(peer.read, keys, out)
        peer.close()
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir(exist_ok=True)
    np.testing.assert_array_equal(out, rows)
    return written, read


def warm_lookup(keys, rows):
    """Seconds to know a folder of unchanged files and to have their rows."""
    stats = [
        (f"/data/pictures/train/class {i % 100}/picture {i:07d}.jpg", 100_000 + i, 10**18 + i, i)
        for i in range(len(keys))
    ]
    out = np.empty_like(rows)
    with tempfile.TemporaryDirectory() as folder:
        store = embedding_store(folder)
        store.put_many("resnet50", keys, rows)
        store.put_file_digests(stats, keys, time.time_ns())
        store.close()

        def look_up():
            store.get_into("resnet50", store.get_file_digests(stats), out)

        elapsed = [seconds(look_up) for _ in range(3)]
        store.close()
    np.testing.assert_array_equal(out, rows)
    return min(elapsed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = rng.random((options.rows, options.width), np.float32)
    keys = [rng.bytes(16) for _ in range(options.rows)]

    peers = [JoblibMemory, Shelf, Files] + ([DiskCache] if diskcache else [])
    runs = {kind.name: [] for kind in [Ours, *peers]}
    ratios = {kind.name: [] for kind in peers}
    for _ in range(options.rounds):
        for peer in peers:
            n = max(1, int(len(keys) * peer.n_rows_part))
            ours, theirs = rates(Ours, keys[:n], rows[:n]), rates(peer, keys[:n], rows[:n])
            runs["sktransfer"].append(ours)
            runs[peer.name].append(theirs)
            ratios[peer.name].append((ours[0] / theirs[0], ours[1] / theirs[1]))

    figures = {"n_rows": options.rows, "width": options.width, "peers": {}}
    if hasattr(os, "getloadavg"):  # the ratios bear a busy machine, the rates do not
        figures["load_average"] = load = os.getloadavg()[1]
        print(f"load average over five minutes: {load:.1f}")
    print(f"{'':>14} {'written/s':>10} {'read/s':>10}   ours over it")
    for name, pairs in runs.items():
        written, read = (statistics.median(values) for values in zip(*pairs, strict=True))
        line = {"written_per_s": written, "read_per_s": read}
        text = f"{name:>14} {written:>10,.0f} {read:>10,.0f}"
        if name in ratios:
            over = [statistics.median(values) for values in zip(*ratios[name], strict=True)]
            line |= {"ratio_written": over[0], "ratio_read": over[1]}
            text += f"   written × {over[0]:.1f}, read × {over[1]:.1f}"
        figures["peers"][name] = line
        print(text)
    figures["warm_lookup_s"] = warm_lookup(keys, rows)
    print(f"{options.rows:,} unchanged files known and read: {figures['warm_lookup_s']:.2f} s")
    save("store", figures)


if __name__ == "__main__":
    main()
