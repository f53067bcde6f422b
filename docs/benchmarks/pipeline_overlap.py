"""Time from JPEG files to rows against the time of its parts; and reduced JPEG decoding.

    python docs/benchmarks/pipeline_overlap.py [--images 192] [--large 32] [--rounds 3] [names …]

The parts: decoding and resizing alone, in one thread, over the number of cores; and the
network alone on ready batches, one core each, as the library runs it. Their sum is the least
time for both on these cores; the ratio is that sum over the time from files to rows, both
measured in turn in each round, without a store. 500×375 and 12-megapixel JPEGs.

Large JPEGs are decoded at a half, a quarter or an eighth of their size: printed is how much
faster that is and how far the rows move.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from _report import save, write_jpegs

from sktransfer import PretrainedFeatureExtractor
from sktransfer.images._images import as_images

BATCH = 32
LARGE = (4000, 3000)


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def extractor_of(name, paths, **parameters):
    weights = "DEFAULT" if name == "builtin" else None
    extractor = PretrainedFeatureExtractor(name, weights=weights, memory=False, **parameters)
    return extractor.fit(paths)


def parts_alone(extractor, paths):
    """Return functions that decode all files in one thread, and run the network on all rows."""
    preprocessing = extractor.backbone_.preprocessing
    network = extractor.backbone_.inference_module("cpu", "float32")
    images = as_images(paths)

    def decode(indices):
        arrays = [
            preprocessing.resize_crop(images.decode(i, min_size=preprocessing.min_size))
            for i in indices
        ]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    ready = decode(range(min(BATCH, len(paths))))
    n_batches = len(paths) / len(ready)
    n_cores = torch.get_num_threads()
    n_run = max(n_cores, round(n_batches / n_cores) * n_cores)

    def network_alone():
        """Seconds for as many images as there are files."""
        with ThreadPoolExecutor(n_cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(network, [ready] * n_cores))  # warm
            took = seconds(lambda: list(pool.map(network, [ready] * n_run)))
        torch.set_num_threads(n_cores)
        return took * n_batches / n_run

    return lambda: seconds(lambda: decode(range(len(paths)))) / n_cores, network_alone


def overlap(name, paths, rounds):
    extractor = extractor_of(name, paths)
    decoding_alone, network_alone = parts_alone(extractor, paths)
    extractor.transform(paths[:BATCH])
    rows = []
    for _ in range(rounds):
        decoding, network = decoding_alone(), network_alone()
        rows.append((decoding, network, seconds(lambda: extractor.transform(paths))))
    decoding, network, whole = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median((d + n) / w for d, n, w in rows)
    return {
        "decoding_s": decoding,
        "network_s": network,
        "whole_s": whole,
        "images_per_s": len(paths) / whole,
        "of_what_the_parts_allow": ratio,
    }


def reduced_decoding(name, paths):
    fast = extractor_of(name, paths)
    full = extractor_of(name, paths, preprocessing={"fast_decode": False})
    fast.transform(paths[:2])
    results = {}
    took_fast = seconds(lambda: results.update(fast=fast.transform(paths)))
    took_full = seconds(lambda: results.update(full=full.transform(paths)))
    a, b = results["fast"].astype(float), results["full"].astype(float)
    length = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    moved = np.linalg.norm(a - b, axis=1) / length[1]
    # The distance of two different images, to compare with.
    apart = np.linalg.norm(b - np.roll(b, 1, axis=0), axis=1) / length[1]
    return {
        "times_faster": took_full / took_fast,
        "median_relative_distance": np.median(moved),
        "largest_relative_distance": moved.max(),
        "least_cosine": ((a * b).sum(1) / (length[0] * length[1])).min(),
        "median_distance_of_two_pictures": np.median(apart),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["resnet18", "builtin"])
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--large", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    figures = {}

    def report(name, result):
        figures[name] = result
        text = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in result.items())
        print(f"{name}: {text}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "small").mkdir()
        small = write_jpegs(Path(folder) / "small", options.images)
        large = write_jpegs(Path(folder), options.large, LARGE)
        for name in options.names:
            report(f"{name}, 500×375", overlap(name, small, options.rounds))
            report(f"{name}, 12 megapixels", overlap(name, large, options.rounds))
            report(f"{name}, 12 megapixels, reduced decoding", reduced_decoding(name, large))
            report(f"{name}, 500×375, reduced decoding", reduced_decoding(name, small))
    save("pipeline_overlap", figures)


if __name__ == "__main__":
    main()
