"""Seconds of a transform whose rows are all in the store already.

    python docs/benchmarks/warm_store.py [--images 10000] [--rounds 3] [--profile]

Of files, which are known by their stat, and of 64×64 colour arrays, which are known by their
digest; with the store in memory and on disk. The rows are as wide as the built-in network's,
and come from a small module, since filling the store is not what is measured.
"""

import argparse
import cProfile
import pstats
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _report import save
from PIL import Image

from sktransfer import PretrainedFeatureExtractor

WIDTH = 1408


class Quick(torch.nn.Sequential):
    """Something that computes rows quickly."""

    def __init__(self):
        super().__init__(
            torch.nn.Conv2d(3, WIDTH, 16, stride=16),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (options.images, 64, 64, 3), dtype=np.uint8)
    torch.manual_seed(0)
    module = Quick()
    figures = {"n_images": options.images, "width": WIDTH}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "pictures").mkdir()
        paths = []
        for i, array in enumerate(arrays):
            paths.append(str(folder / "pictures" / f"picture {i:06d}.bmp"))
            Image.fromarray(array[:32, :32]).save(paths[-1])
        time.sleep(2.5)  # so that the files' times are settled
        for place, memory in [("memory", None), ("disk", folder / "store")]:
            extractor = PretrainedFeatureExtractor(
                module, preprocessing={"size": 32, "crop": 32}, memory=memory
            )
            for form, X in [("files", paths), ("arrays", arrays)]:
                extractor.fit(X)
                expected = extractor.transform(X)
                warm = min(seconds(lambda: extractor.transform(X)) for _ in range(options.rounds))  # noqa: B023
                figures[f"{form}_{place}_s"] = warm
                print(f"{options.images:,} {form}, store in {place}: {warm:.2f} s", flush=True)
                np.testing.assert_array_equal(extractor.transform(X), expected)
                if options.profile:
                    profile = cProfile.Profile()
                    profile.runcall(extractor.transform, X)
                    pstats.Stats(profile).sort_stats("tottime").print_stats(14)
    save("warm_store", figures)


if __name__ == "__main__":
    main()
