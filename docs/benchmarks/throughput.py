"""Images per second from JPEG files to rows, against a plain eager torch loop.

    python docs/benchmarks/throughput.py [--images 256] [--rounds 3] [resnet50 resnet18 ...]

The peer is what people write by hand: open, torchvision's own preset, batches of 32,
channels first, float32, ``inference_mode``, torch's default threads. Both sides run in turn
in this process on the same files with the same random weights (speed does not depend on
them), without a store. The ratio of a round is of two neighbouring runs; the median is
quoted. With a GPU the peer is the network alone on images already in memory.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from _report import save, write_jpegs
from PIL import Image

from sktransfer import PretrainedFeatureExtractor


def plain_loop(paths, model, preset):
    rows = []
    with torch.inference_mode():
        for start in range(0, len(paths), 32):
            images = [preset(Image.open(p).convert("RGB")) for p in paths[start : start + 32]]
            rows.append(model(torch.stack(images)))
    return torch.cat(rows).numpy()


def rate(function, n):
    start = time.perf_counter()
    out = function()
    return n / (time.perf_counter() - start), out


def on_cpu(name, paths, rounds):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    extractors = {
        precision: PretrainedFeatureExtractor(
            name, weights=None, precision=precision, memory=False, device="cpu"
        ).fit(paths)
        for precision in ("float32", "bfloat16")
    }
    model = torchvision.models.get_model(name, weights=None)
    model.load_state_dict(extractors["float32"].backbone_.network.module.state_dict())
    model.fc = torch.nn.Identity()
    model.eval()
    for extractor in extractors.values():
        extractor.transform(paths[:64])
    plain_loop(paths[:32], model, weights.transforms())
    runs = {"plain": [], "float32": [], "bfloat16": []}
    for _ in range(rounds):
        plain, expected = rate(lambda: plain_loop(paths, model, weights.transforms()), len(paths))
        runs["plain"].append(plain)
        for precision, extractor in extractors.items():
            ours, rows = rate(lambda e=extractor: e.transform(paths), len(paths))
            runs[precision].append(ours)
            error = np.abs(rows - expected).max() / np.abs(expected).max()
            assert error < (1e-3 if precision == "float32" else 0.1), error
    figures = {f"{key}_images_per_s": statistics.median(v) for key, v in runs.items()}
    for precision in ("float32", "bfloat16"):
        ratios = [o / p for o, p in zip(runs[precision], runs["plain"], strict=True)]
        figures[f"{precision}_ratio"] = statistics.median(ratios)
    return figures


def on_gpu(name, rounds, n_images=8192):
    images = np.random.default_rng(0).integers(0, 256, (n_images, 224, 224, 3), dtype=np.uint8)
    figures = {}
    for precision in ("float32", "bfloat16"):
        extractor = PretrainedFeatureExtractor(
            name,
            weights=None,
            precision=precision,
            memory=False,
            device="cuda",
            preprocessing={"size": 224},
        ).fit(images)
        network = extractor.backbone_.inference_module(torch.device("cuda"), precision)
        batch = torch.from_numpy(images[:256]).cuda().permute(0, 3, 1, 2)
        extractor.transform(images[:512])
        ratios, rates = [], []
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(n_images // 256):
                network(batch)
            torch.cuda.synchronize()
            alone = n_images / (time.perf_counter() - start)
            ours, _rows = rate(lambda e=extractor: e.transform(images), n_images)
            rates.append(ours)
            ratios.append(ours / alone)
        figures[f"{precision}_images_per_s"] = statistics.median(rates)
        figures[f"{precision}_of_network_alone"] = statistics.median(ratios)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["resnet50", "resnet18"])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder), args.images)
        for name in args.names:
            figures[name] = on_cpu(name, paths, args.rounds)
            print(name, {key: round(value, 2) for key, value in figures[name].items()}, flush=True)
            if torch.cuda.is_available():
                figures[f"{name} on the GPU"] = on_gpu(name, args.rounds)
                print(f"{name} on the GPU", figures[f"{name} on the GPU"], flush=True)
    save("throughput", figures)


if __name__ == "__main__":
    main()
