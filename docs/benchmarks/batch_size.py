"""Images per second on a CPU by batch size: why ``batch_size="auto"`` is what it is there.

    python docs/benchmarks/batch_size.py [--images 128] [--rounds 3] [resnet50 ...]

From JPEG files to rows with random weights, without a store; all sizes run in turn. What is
printed is the median, and the ratio of "auto" against batches of 32. The number of images should
be a multiple of 32 times the cores, else the last large batches leave a core idle.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from _report import save, write_jpegs

from sktransfer import PretrainedFeatureExtractor

NAMES = (
    "resnet18", "resnet50", "densenet121", "mobilenet_v3_large", "efficientnet_b0",
    "convnext_tiny", "vit_b_32", "builtin",
)  # fmt: skip
SIZES = ("auto", 8, 16, 32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names:
            paths = write_jpegs(Path(folder), args.images * (8 if name == "builtin" else 1))
            weights = "DEFAULT" if name == "builtin" else None
            for precision in ("float32", "bfloat16"):
                extractors = {
                    size: PretrainedFeatureExtractor(
                        name, weights=weights, precision=precision, batch_size=size,
                        memory=False, device="cpu",
                    ).fit(paths)
                    for size in SIZES
                }  # fmt: skip
                extractors["auto"].transform(paths[:16])
                rates = {size: [] for size in SIZES}
                for _ in range(args.rounds):
                    for size, extractor in extractors.items():
                        start = time.perf_counter()
                        extractor.transform(paths)
                        rates[size].append(len(paths) / (time.perf_counter() - start))
                row = {str(size): statistics.median(found) for size, found in rates.items()}
                ratios = [a / b for a, b in zip(rates["auto"], rates[32], strict=True)]
                row["auto_against_32"] = statistics.median(ratios)
                figures[f"{name} {precision}"] = row
                text = "  ".join(f"{key} {value:.1f}" for key, value in row.items())
                print(f"{name:20} {precision:9} {text}", flush=True)
    save("batch_size", figures)


if __name__ == "__main__":
    main()
