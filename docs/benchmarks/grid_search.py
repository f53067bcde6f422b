"""What a grid search over a frozen network and a classifier costs: one pass over the images.

    python docs/benchmarks/grid_search.py [--images 400] [--images-slow 100] [--backbone builtin]

Five folds and ten candidates over ``make_pipeline(PretrainedFeatureExtractor(),
LogisticRegression())`` on JPEG files. Every image that goes through a network is counted, in
all processes. The time is compared, in this run, with one extraction plus the same grid on the
ready features, and on fewer images with the search without the store and with scikit-learn's
own ``Pipeline(memory=…)``. A grid over the layers follows.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import joblib
import numpy as np
from _report import save, write_jpegs
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline

from sktransfer import PretrainedFeatureExtractor

COUNTER = "SKTRANSFER_BENCHMARK_COUNTER"  # a file; workers inherit the variable
CANDIDATES = np.logspace(-4, 0, 10)


def count_images():
    """Write to a file how many images go through a network's first convolution."""
    import torch

    if hasattr(PretrainedFeatureExtractor, "is_counted"):  # in this process
        return
    PretrainedFeatureExtractor.is_counted = True

    def count(module, inputs, output):
        is_first = isinstance(module, torch.nn.Conv2d) and module.in_channels == 3
        if is_first and type(inputs[0]) is torch.Tensor and inputs[0].device.type != "meta":
            with open(os.environ[COUNTER], "ab", buffering=0) as file:
                file.write(b"." * len(inputs[0]))

    torch.nn.modules.module.register_module_forward_hook(count)


class Counted(PretrainedFeatureExtractor):
    """Counts the images that go through the network, in whichever process."""

    def transform(self, X):
        count_images()
        return super().transform(X)

    def fit_transform(self, X, y=None):
        count_images()
        return super().fit_transform(X, y)


def n_counted():
    path = Path(os.environ[COUNTER])
    n = path.stat().st_size if path.exists() else 0
    path.unlink(missing_ok=True)
    return n


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def search(model, X, y, n_jobs=None, grid=None):
    """Seconds and images through the network of one search."""
    grid = grid or {"logisticregression__C": CANDIDATES}
    n_counted()
    seconds, fitted = timed(lambda: GridSearchCV(model, grid, cv=5, n_jobs=n_jobs).fit(X, y))
    assert np.isfinite(fitted.cv_results_["mean_test_score"]).all()
    return seconds, n_counted()


def pipeline(**parameters):
    return make_pipeline(Counted(**parameters), LogisticRegression(max_iter=2000))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--images-slow", type=int, default=100)
    parser.add_argument("--backbone", default="builtin")
    options = parser.parse_args()
    n, n_slow = options.images, options.images_slow
    network = {"backbone": options.backbone}
    if options.backbone != "builtin":
        network["weights"] = None
    figures = {"backbone": options.backbone, "n_images": n, "n_images_slow": n_slow}

    def report(name, value, unit=""):
        figures[name] = value
        print(f"{name.replace('_', ' '):>60}: {value:.3g}{unit}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ[COUNTER] = str(folder / "counter")
        X, y = write_jpegs(folder, n), np.arange(n) % 4
        time.sleep(2.5)  # so that the files' times are settled
        Counted(memory=False, **network).fit_transform(X[:64])  # loads the network

        once, rows = timed(lambda: Counted(memory=False, **network).fit_transform(X))
        ready, _ = search(make_pipeline(LogisticRegression(max_iter=2000)), rows, y)
        report("one_extraction_s", once, " s")
        report("the_grid_on_ready_features_s", ready, " s")
        ours, seen = search(pipeline(**network), X, y)
        report("the_search_s", ours, " s")
        report("images_through_the_network_per_image", seen / n)
        report("the_search_over_extraction_and_grid", ours / (once + ready))

        ready, _ = search(make_pipeline(LogisticRegression(max_iter=2000)), rows, y, n_jobs=2)
        on_disk = pipeline(memory=folder / "store", **network)
        ours, seen = search(on_disk, X, y, n_jobs=2)
        report("two_processes_the_search_s", ours, " s")
        report("two_processes_images_through_the_network_per_image", seen / n)
        report("two_processes_over_extraction_and_grid", ours / (once + ready))
        again, seen = search(on_disk, X, y, n_jobs=2)
        report("two_processes_again_s", again, " s")
        report("two_processes_again_images_per_image", seen / n)

        names = Counted(**network).fit(X).backbone_.stage_names[1:5]
        layers = {"counted__layer": names}
        ours, seen = search(
            pipeline(cache_layers=names, memory=folder / "layers", **network), X, y, grid=layers
        )
        report("grid_over_four_layers_s", ours, " s")
        report("grid_over_four_layers_images_per_image", seen / n)

        X, y = X[:n_slow], y[:n_slow]
        ours, seen = search(pipeline(memory=folder / "fewer", **network), X, y)
        without, seen_without = search(pipeline(memory=False, **network), X, y)
        steps = pipeline(memory=False, **network).steps
        cached = Pipeline(steps, memory=joblib.Memory(folder / "sklearn", verbose=0))
        pipeline_memory, seen_cached = search(cached, X, y)
        report("without_the_store_images_per_image", seen_without / n_slow)
        report("without_the_store_over_ours", without / ours)
        report("pipeline_memory_images_per_image", seen_cached / n_slow)
        report("pipeline_memory_over_ours", pipeline_memory / ours)
    save("grid_search", figures)


if __name__ == "__main__":
    main()
