"""Latency of one image in three ways, and the memory and throughput of the example's server.

python docs/benchmarks/serving.py
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import requests
import torch
from _report import save as save_figures
from _report import write_jpegs
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor, export, save, to_module

SERVER = Path(__file__).parents[2] / "examples" / "serve"


def callables(model, folder):
    """Three functions from the bytes of a JPEG file to probabilities."""
    resize_crop = model[0].backbone_.preprocessing.resize_crop
    export(model, folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    module = to_module(model)

    def pixels(content):
        image = resize_crop(Image.open(io.BytesIO(content)).convert("RGB"))
        return np.ascontiguousarray(image.transpose(2, 0, 1)[None])

    def run_module(content):
        with torch.inference_mode():
            return module(torch.from_numpy(pixels(content))).numpy()

    return {
        "predict_proba": lambda content: model.predict_proba([content]),
        "onnxruntime": lambda content: session.run(None, {"images": pixels(content)})[0],
        "torch module": run_module,
        "of which decoding": pixels,
    }


def milliseconds(function, contents):
    times = []
    for content in contents:
        start = time.perf_counter()
        function(content)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measure_latency(model, contents, n_rounds):
    """Milliseconds an image: the least, the middle and the largest median of the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        functions = callables(model, Path(folder))
        expected = functions["predict_proba"](contents[0])
        for name, function in functions.items():
            if name != "of which decoding":
                np.testing.assert_allclose(function(contents[0]), expected, atol=0.02)
            milliseconds(function, contents[:10])
        rounds = {name: [] for name in functions}
        for _ in range(n_rounds):
            for name, function in functions.items():
                rounds[name].append(milliseconds(function, contents))
    ranges = {}
    for name, values in rounds.items():
        ranges[name] = [min(values), statistics.median(values), max(values)]
        print(f"  {name:18} {ranges[name][1]:6.1f} ms  ({min(values):.1f}…{max(values):.1f})")
    return ranges


def resident_mb(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS"))


def measure_server(model, contents):
    """Resident memory before and after requests, and requests a second by eight clients."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.sktransfer"
        save(model, path, standalone=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", SERVER]
        environment = os.environ | {"MODEL": str(path), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*command, "--port", str(port), "--log-level", "warning"], env=environment
        )
        address = f"http://127.0.0.1:{port}"
        try:
            start = time.perf_counter()
            while True:
                try:
                    requests.get(f"{address}/health", timeout=60)
                    break
                except requests.ConnectionError:
                    time.sleep(0.05)
            figures = {"start_s": time.perf_counter() - start, "mb": resident_mb(process.pid)}
            post = partial(requests.post, f"{address}/predict", timeout=60)
            start = time.perf_counter()
            with ThreadPoolExecutor(8) as clients:
                answers = list(clients.map(lambda c: post(files={"image": c}), contents))
            assert all(answer.status_code == 200 for answer in answers)
            figures["requests_per_s"] = len(contents) / (time.perf_counter() - start)
            figures["mb_after"] = resident_mb(process.pid)
        finally:
            process.terminate()
            process.wait()
    print("  server:", {key: round(value, 1) for key, value in figures.items()})
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder), options.images)
        contents = [Path(path).read_bytes() for path in paths]
    figures = {"n_images": options.images, "threads": options.threads}
    for name, weights in [("builtin", "DEFAULT"), ("resnet18", None)]:
        extractor = PretrainedFeatureExtractor(name, weights=weights, memory=False)
        model = make_pipeline(extractor, StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(contents[:20], np.arange(20) % 4)
        print(name)
        figures[name] = measure_latency(model, contents, options.rounds)
        figures[name]["server"] = measure_server(model, contents * 2)
    save_figures("serving", figures)


if __name__ == "__main__":
    main()
