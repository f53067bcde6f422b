"""How near the scheduling for an accelerator comes to the ideal, without an accelerator.

    python docs/benchmarks/gpu_scheduling.py [--threads 16] [--rate 8000] [--rounds 3] [--slower 10]

The network is a clock that computes `rate` images a second, beside this process; decoding and
reading are sleeps, which many threads do at once on any number of cores. All else is the
library's own code. The ideal is the time of the slower of decoding and network alone. Printed
is the median over the rounds of the ideal's time over the time taken, twice: of the scheduling
alone, in slow motion, and in real time on this machine. In slow motion all costs are `--slower`
times as large: the library's own work between images, which shares the few cores of this machine,
then hardly counts. Last comes that work alone: processor time an image with nothing to
wait for. Most of it holds Python's lock, so with any number of threads it has to be far less than
the device's time for an image (125 µs).

JPEG files of 500×375 take 2.36 ms to decode and resize, uint8 arrays of 224×224 0.03 ms to copy;
both 0.1 ms to read and digest.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from _report import save

from sktransfer import PretrainedFeatureExtractor
from sktransfer.embedding import _batches, _embed

READ = 1e-4
KINDS = {"JPEGs": 2.36e-3, "arrays": 3e-5}  # seconds to decode one


class Clock:
    """A device that computes one batch after another, each as long as its images take."""

    def __init__(self, rate):
        self.rate, self.free_at = rate, 0.0
        # Made once: a CPU's threads would fill them between those that decode.
        self.rows = torch.zeros(256, 1408)

    def forward(self, limit, network, batch, device=None):
        self.free_at = max(self.free_at, time.perf_counter()) + len(batch) / self.rate
        return [self.rows[: len(batch)]]

    def copied_back(self, parts, device):
        done_at = self.free_at

        def wait():
            time.sleep(max(0.0, done_at - time.perf_counter()))
            return parts

        return wait


def simulate(clock, n_threads):
    """Put the clock in place of the device, and sleeps in place of reading and decoding."""
    pixels = np.zeros((8, 8, 3), np.uint8)  # copying is part of the sleeps
    run, cost = _embed.EmbeddingRun, {"read": READ, "decode": 0.0}
    read, decode = run._read, run.decode

    def slow_read(self, together):
        time.sleep(cost["read"] * len(together))
        return read(self, together)

    def slow_decode(self, batch, places):
        time.sleep(cost["decode"] * len(places))
        decode(self, batch, places)

    run._read, run.decode, run._decode = slow_read, slow_decode, lambda self, row: pixels
    _batches.BatchLimit.forward = lambda *arguments: clock.forward(*arguments)
    _batches._copied_back = clock.copied_back
    _embed.run_on_cpu = lambda run, n_images, batch_size, _: _batches.run_on_accelerator(
        run, torch.device("cpu"), batch_size, n_threads
    )
    return cost


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--rate", type=float, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slower", type=float, default=10)
    parser.add_argument("--images", type=int, nargs="*", default=[256, 1000, 8192])
    options = parser.parse_args()
    clock = Clock(options.rate)
    cost = simulate(clock, options.threads)
    content = vars(options) | {"scheduling_alone": {}, "in_real_time": {}, "own_work": {}}
    for name, slower in (("scheduling_alone", options.slower), ("in_real_time", 1.0)):
        clock.rate, cost["read"] = options.rate / slower, slower * READ
        for kind, decoding in KINDS.items():
            cost["decode"] = slower * decoding
            each = max(1 / clock.rate, max(cost["decode"], cost["read"]) / options.threads)
            for n in options.images:
                took = statistics.median(seconds for seconds, _ in passes(n, options.rounds))
                content[name][f"{n} {kind}"] = n * each / took
                print(f"{name}: {n} {kind}: {n * each / took:.2f} of the ideal", flush=True)
    clock.rate, cost["read"], cost["decode"] = np.inf, 0.0, 0.0
    for n in options.images:
        work = 1e6 * statistics.median(work for _, work in passes(n, options.rounds)) / n
        content["own_work"][n] = work
        print(f"{n}: {work:.0f} µs of own work an image", flush=True)
    save("gpu_scheduling", content)


def passes(n, n_rounds):
    """Return the seconds and the processor's seconds of passes over n images."""
    X = [np.full((2, 2, 3), (i % 256, i // 256, 7), np.uint8) for i in range(n)]
    extractor = PretrainedFeatureExtractor(memory=False, device="cpu").fit(X)
    extractor.transform(X[:32])  # imports
    found = []
    for _ in range(n_rounds):
        start, work = time.perf_counter(), time.process_time()
        extractor.transform(X)
        found.append((time.perf_counter() - start, time.process_time() - work))
    return found


if __name__ == "__main__":
    main()
