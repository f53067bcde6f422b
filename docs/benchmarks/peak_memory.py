"""Peak memory of one transform of 20,000 images against what it must hold.

    python docs/benchmarks/peak_memory.py [--images 20000]

The images are JPEG files. The peak is the resident set's growth above what it was
once the network had embedded one batch; what it must hold is the output array. The peer
decodes all images into one array first, as transformers that take arrays alone make their
users do; its figure is that array's size, which it cannot go below.
"""

import argparse
import resource
import tempfile
from pathlib import Path

from _report import save, write_jpegs

from sktransfer import PretrainedFeatureExtractor


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = (250, 188)
        paths = write_jpegs(Path(folder), args.images, size)
        extractor = PretrainedFeatureExtractor(memory=False).fit(paths)
        extractor.transform(paths[:512])
        before = peak_mb()
        rows = extractor.transform(paths)
        growth = peak_mb() - before
    output = rows.nbytes / 2**20
    decoded = args.images * size[0] * size[1] * 3 / 2**20
    figures = {
        "n_images": args.images,
        "output_mb": output,
        "growth_of_peak_mb": growth,
        "beyond_output_mb": growth - output,
        "all_decoded_mb": decoded,
        "ratio_all_decoded_to_ours": decoded / growth,
    }
    print({key: round(value, 1) for key, value in figures.items()})
    save("peak_memory", figures)


if __name__ == "__main__":
    main()
