"""Every figure of a GPU, and whether it is right, in one call of at most four minutes.

    python docs/benchmarks/gpu.py [--device cuda] [--seconds 240] [--only PART …] [--quick]

It needs no network: weights are random, images are made. The most important parts come
first; one that fails says so, one for which no time is left is skipped, and the others still run.
Figures: gpu.json in $OUT, or in results/. `--quick` takes small sizes, which run on a CPU,
too; `--only` takes the names of parts that `--list` prints.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import joblib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from _report import machine  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from sktransfer import (  # noqa: E402
    FineTuningClassifier,
    PretrainedFeatureExtractor,
    load_backbone,
    save,
)
from sktransfer._threads import deterministic_cudnn  # noqa: E402
from sktransfer.images._images import as_images  # noqa: E402
from sktransfer.networks._inference import tensor_float_32  # noqa: E402

PARTS = {}  # name -> (function, seconds that it needs at least, whether only CUDA has it)


def part(name, least=5, needs_cuda=False):
    def add(function):
        PARTS[name] = function, least, needs_cuda
        return function

    return add


class Settings:
    """Sizes, and what all parts use."""

    def __init__(self, device, is_quick):
        self.device, self.is_quick = torch.device(device), is_quick
        self.is_cuda = self.device.type == "cuda"
        self.name = "resnet18" if is_quick else "resnet50"
        self.side = 32 if is_quick else 224
        self.n_repeats = 1 if is_quick else 30
        self.batch = 4 if is_quick else 256
        self.sizes = (4, 8) if is_quick else (64, 256, 1000, 16_384)
        self.precisions = ("float32",) if is_quick else ("bfloat16", "tf32", "float32")
        self.folder = tempfile.mkdtemp()

    def synchronize(self):
        if self.is_cuda:
            torch.cuda.synchronize()

    @functools.cached_property
    def arrays(self):
        rng = np.random.default_rng(0)
        return rng.integers(0, 256, (self.sizes[-1], self.side, self.side, 3), dtype=np.uint8)

    @functools.cached_property
    def files(self):
        """JPEG files of 500×375; equal images differ by a comment after their end."""
        rng = np.random.default_rng(0)
        encoded = []
        for _ in range(8):
            coarse = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
            image = np.asarray(Image.fromarray(coarse).resize((500, 375))).astype(int)
            image = (image + rng.normal(0, 9, image.shape)).clip(0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=90)
            encoded.append(file.getvalue())
        paths = [f"{self.folder}/{i}.jpg" for i in range(min(self.sizes[-1], 8192))]
        for i, path in enumerate(paths):
            Path(path).write_bytes(encoded[i % 8] + i.to_bytes(8, "little"))
        return paths

    def extractor(self, device=None, **parameters):
        parameters = {"preprocessing": {"size": self.side, "crop": self.side}, **parameters}
        device = str(device or self.device)
        extractor = PretrainedFeatureExtractor(
            self.name, weights=None, memory=False, device=device, **parameters
        )
        return extractor.fit(self.arrays[:2])

    def classifier(self, n=64, **parameters):
        parameters = {"unfreeze": 1, "max_epochs": 2, "lr": 1e-3, "random_state": 0, **parameters}
        size = {"size": min(64, self.side), "crop": min(64, self.side)}
        model = FineTuningClassifier(
            **{"backbone": "builtin", "preprocessing": size, **parameters},
            memory=False,
            device=str(self.device),
            early_stopping=False,
        )
        n = min(n, len(self.arrays))
        return model.fit(self.arrays[:n], np.arange(n) % 4)

    def network(self, precision):
        size = {"size": self.side, "crop": self.side}
        backbone = load_backbone(self.name, weights=None, preprocessing=size)
        return backbone.inference_module(self.device, precision)

    def batches(self, n):
        """Three, so that no cache holds one; uint8 as the library uploads them."""
        shape = n, self.side, self.side, 3
        made = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(3)]
        return [batch.to(self.device).permute(0, 3, 1, 2) for batch in made]

    def alone(self, network, n=None, n_repeats=None):
        """Images a second of the network alone, from batches on the device: the median."""
        n, n_repeats = n or self.batch, n_repeats or self.n_repeats
        batches, took = self.batches(n), []
        for i in range(3 + n_repeats):
            self.synchronize()
            start = time.perf_counter()
            network(batches[i % 3])
            self.synchronize()
            took.append(time.perf_counter() - start)
        return round(n / statistics.median(took[3:]))

    @functools.cache  # noqa: B019
    def network_alone(self, precision):
        return self.alone(self.network(precision))

    @functools.cached_property
    def expected(self):
        """Rows of a CPU."""
        return self.extractor("cpu").transform(self.arrays[:32])


def rate(extractor, X, n_rounds=3):
    """Images a second of whole passes: the median."""
    extractor.transform(X[:256])
    rates = []
    for _ in range(n_rounds):
        start = time.perf_counter()
        extractor.transform(X)
        rates.append(len(X) / (time.perf_counter() - start))
    return round(statistics.median(rates))


def difference(rows, expected):
    return float(np.linalg.norm(rows - expected) / np.linalg.norm(expected))


# -- the parts, the most telling first ----------------------------------------------------------
@part("agreement", 10)
def agreement(s):
    """Relative difference of rows from a CPU's in float32."""
    every = ("float32", "tf32", "bfloat16", "float16") if s.is_cuda else s.precisions
    rows = {p: s.extractor(precision=p).transform(s.arrays[:32]) for p in every}
    return {p: difference(r, s.expected) for p, r in rows.items()}


@part("network_alone", 10)
def network_alone(s):
    return {p: s.network_alone(p) for p in s.precisions}


@part("from_arrays", 20)
def from_arrays(s):
    precision = s.precisions[0]
    rates = {n: rate(s.extractor(precision=precision), s.arrays[:n]) for n in s.sizes}
    share = rates[s.sizes[-1]] / s.network_alone(precision)
    return rates | {"share of the network": round(share, 3)}


@part("from_jpegs", 30)
def from_jpegs(s):
    found = {}
    for place in ("cpu", "device"):
        how = {"size": round(s.side * 8 / 7), "crop": s.side, "resize_on": place}
        extractor = s.extractor(precision=s.precisions[0], preprocessing=how)
        for n in s.sizes:
            paths = s.files[:n]
            found[f"{len(paths)}, resized on {place}"] = rate(extractor, paths, 2)
    return found


@part("cuda_tests", 40, needs_cuda=True)
def cuda_tests(s):
    files = ["tests/test_device.py", "tests/networks/test_backbones.py"]
    files += ["tests/fine_tuning/test_other_device.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=80, check=False
    )
    (out_folder() / "cuda_tests.txt").write_text(run.stdout + run.stderr)
    return (run.stdout + run.stderr).strip().splitlines()[-1]


@part("fine_tuning", 40)
def fine_tuning(s):
    """Images a second of an epoch with everything trained, against bare steps."""
    return {p: busy_share(s, p) for p in reversed(s.precisions) if p != "tf32"}


def busy_share(s, precision):
    n, size = (8, 4) if s.is_quick else (2048, 64)
    how = {"size": s.side, "crop": s.side}
    model = s.classifier(
        n, backbone=s.name, weights=None, unfreeze="all", precision=precision, batch_size=size,
        max_epochs=3, preprocessing=how,
    )  # fmt: skip
    ours = n / statistics.median(row["seconds"] for row in model.history_[1:])
    module = model.net_.module_.train()
    x = s.batches(size)[0][:, None]
    target = torch.zeros(size, dtype=torch.long, device=s.device)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-6)

    def step():
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(module(x), target).backward()
        optimizer.step()

    with deterministic_cudnn(s.device), tensor_float_32(s.device, False):  # as in a fit
        step()
        s.synchronize()
        start = time.perf_counter()
        for _ in range(s.n_repeats):
            step()
        s.synchronize()
        bare = size * s.n_repeats / (time.perf_counter() - start)
    return {"epoch": round(ours), "bare steps": round(bare), "busy share": round(ours / bare, 3)}


@part("batch_size", 10)
def batch_size(s):
    sizes = (2, 4) if s.is_quick else (32, 64, 128, 256, 512)
    return {n: s.alone(s.network(s.precisions[0]), n, min(10, s.n_repeats)) for n in sizes}


@part("decoding", 15)
def decoding(s):
    """Images a second of decoding alone: Pillow in threads, torchvision on the device."""
    paths = s.files[: s.sizes[-2]]
    images, how = as_images(paths), load_backbone(s.name, weights=None).preprocessing
    found = {}

    def decode(i):
        return images.decode(i, how.min_size)

    def decode_and_resize(i):
        return how.resize_crop(decode(i))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, work in (("Pillow", decode), ("and resize", decode_and_resize)):
            start = time.perf_counter()
            list(pool.map(work, range(len(paths))))
            found[name] = round(len(paths) / (time.perf_counter() - start))
    if s.is_cuda:
        from torchvision.io import decode_jpeg

        data = [torch.frombuffer(bytearray(Path(p).read_bytes()), dtype=torch.uint8) for p in paths]
        decode_jpeg(data[:64], device=s.device)
        s.synchronize()
        start = time.perf_counter()
        for k in range(0, len(data), 256):
            decode_jpeg(data[k : k + 256], device=s.device)
        s.synchronize()
        found["decode_jpeg"] = round(len(paths) / (time.perf_counter() - start))
    return found


@part("layouts", 15)
def layouts(s):
    """The network alone with other layouts, and as a CUDA graph."""
    network = s.network(s.precisions[0])
    found = {"channels last": s.network_alone(s.precisions[0])}
    before, network.memory_format = network.memory_format, torch.contiguous_format
    found["inputs channels first"] = s.alone(network, n_repeats=min(10, s.n_repeats))
    network.memory_format = before
    if s.is_cuda:
        x, side = s.batches(s.batch)[0], torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                network(x)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            network(x)
        found["CUDA graph"] = s.alone(lambda _: graph.replay())
    return found


@part("out_of_memory", 15, needs_cuda=True)
def out_of_memory(s):
    extractor = s.extractor(batch_size=2 * s.batch)
    X = s.arrays[: 4 * s.batch]
    expected = extractor.transform(X)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(s.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 1.2e9) / total)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = extractor.transform(X)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {"warnings": [str(w.message)[:60] for w in caught], "off": difference(rows, expected)}


@part("peak_memory", 10, needs_cuda=True)
def peak_memory(s):
    found = {}
    for precision in s.precisions:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        s.extractor(precision=precision).transform(s.arrays[: 4 * s.batch])
        found[precision] = f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    return found


@part("opened_on_a_cpu", 20)
def opened_on_a_cpu(s):
    """Largest difference of probabilities of a model trained there, kept, and opened here."""
    model, X = s.classifier(), s.arrays[:16]
    save(model, f"{s.folder}/model.sktransfer")
    Path(f"{s.folder}/model.pickle").write_bytes(pickle.dumps(model))
    np.save(f"{s.folder}/X.npy", X)
    code = """
import pickle, sys, numpy as np
from sktransfer import load
folder = sys.argv[1]
with open(folder + "/model.pickle", "rb") as file:
    models = [load(folder + "/model.sktransfer"), pickle.load(file).set_params(device="cpu")]
X = np.load(folder + "/X.npy")
np.save(folder + "/P.npy", [model.predict_proba(X) for model in models])
"""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, s.folder], check=True, env=env, timeout=100)
    off = np.abs(np.load(f"{s.folder}/P.npy") - model.predict_proba(X)).max((1, 2))
    return dict(zip(("saved", "pickled"), map(float, off), strict=True))


@part("same_seed", 10)
def same_seed(s):
    first, second = (s.classifier().predict_proba(s.arrays[:16]) for _ in range(2))
    return float(np.abs(first - second).max())


@part("memory_after_fits", 15, needs_cuda=True)
def memory_after_fits(s):
    """MiB of the device after fits, without a garbage collection, and with one."""
    s.classifier()
    gc.collect()
    gc.disable()
    found = [torch.cuda.memory_allocated()]
    for _ in range(3):
        s.classifier()
        found.append(torch.cuda.memory_allocated())
    gc.enable()
    gc.collect()
    return [round(n / 2**20, 1) for n in [*found, torch.cuda.memory_allocated()]]


def embedded(parameters, X):
    return PretrainedFeatureExtractor(**parameters).fit(X[:2]).transform(X)


@part("two_workers", 30)
def two_workers(s):
    X = s.arrays[: min(4096, s.sizes[-1])]
    one = s.extractor(precision=s.precisions[0])
    work = joblib.delayed(functools.partial(embedded, one.get_params()))
    with joblib.Parallel(2) as pool:
        pool(work(X[:16]) for _ in range(2))
        start = time.perf_counter()
        rows = np.concatenate(pool(work(half) for half in np.array_split(X, 2)))
        took = time.perf_counter() - start
    return {
        "one process": rate(one, X, 1),
        "two": round(len(X) / took),
        "off": difference(rows[:32], one.transform(X[:32])),
    }


@part("compiled", 60, needs_cuda=True)
def compiled(s):
    network = torch.compile(s.network(s.precisions[0]).extractor)
    x = s.batches(s.batch)[0].to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        start = time.perf_counter()
        network(x)
        s.synchronize()
        took = round(time.perf_counter() - start, 1)
        return {"first call, s": took, "images/s": s.alone(lambda _: network(x))}


# -- running them -------------------------------------------------------------------------------
def out_folder():
    return Path(os.environ.get("OUT") or Path(__file__).parent / "results")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(PARTS))
        return
    began, figures = time.perf_counter(), {}
    settings = Settings(options.device, options.quick)
    print(machine(), flush=True)
    for name, (function, least, needs_cuda) in PARTS.items():
        if name not in options.only:
            continue
        start = time.perf_counter()
        left = options.seconds - (start - began)
        if needs_cuda and not settings.is_cuda:
            value = "SKIPPED: needs CUDA"
        elif left < least:
            value = f"SKIPPED: {left:.0f} s are left"
        else:
            try:
                value = function(settings)
            except Exception as error:
                value = f"FAILED: {type(error).__name__}: {str(error)[:200]}"
                traceback.print_exc(limit=-3)
        figures[name] = value
        print(f"[{time.perf_counter() - start:5.1f} s] {name}: {value}", flush=True)
        content = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "figures": figures}
        (out_folder() / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
        gc.collect()
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    print()
    for name, value in figures.items():
        print(f"{name:18} {value}")
    print(f"in all {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
