"""Which settings make good defaults: one change at a time, every set, several seeds.

    python docs/benchmarks/fine_tuning_defaults.py [--backbone mobilenet_v2] [--size 128]
        [--per-class 20] [--seeds 3] [--variants default lr=1e-3 augment=light]

A variant is the defaults with one or more settings changed (``lr=1e-3,layer_decay=0.5``). All
variants of a row learn from the same images and are scored on the same; what is printed is the
mean difference to the linear probe of the last stage, in points, and its standard error over sets
and seeds, then the mean log loss. With ``--mixed`` the training and test parts are drawn from all
images, and every score is a balanced accuracy: the test parts are larger, and like the training.
"""

import argparse
import json
import time
import warnings

import numpy as np
from _fine_tuning_peers import (
    MIXED_SETS,
    SETS,
    WEIGHTS,
    input_settings,
    read_mixed,
    read_set,
    score,
    scores_of,
)
from _report import save
from sklearn.metrics import log_loss

from sktransfer import FineTuningClassifier

VARIANTS = (
    "default", "lr=1e-4", "lr=1e-3", "layer_decay=0.5", "layer_decay=1.0", 'augment="light"',
    'augment="light",max_epochs=16', "max_epochs=16", "dropout=0.2", "weight_decay=0.1",
    "unfreeze=1", "unfreeze=2", 'unfreeze="gradual"', 'optimizer="sgd",lr=3e-3',
    'head_init="random"',
)  # fmt: skip


def settings_of(variant):
    if variant == "default":
        return {}
    return {
        key: json.loads(value) for key, _, value in (p.partition("=") for p in variant.split(","))
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="builtin", choices=list(WEIGHTS))
    parser.add_argument("--size", type=int, default=0, help="pixels; 0: the backbone's own")
    parser.add_argument("--sets", nargs="+")
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--max-test", type=int, default=50)
    parser.add_argument("--mixed", action="store_true", help="draw both parts from all images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--name", default="fine_tuning_defaults")
    options = parser.parse_args()
    options.sets = options.sets or list(MIXED_SETS if options.mixed else SETS)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    common = input_settings(options.backbone, options.size)
    figures = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.sets:
            read = read_mixed if options.mixed else read_set
            X, y, X_test, y_test = read(name, options.per_class, seed, options.max_test)
            for variant in ("probe", *options.variants):
                settings = {"unfreeze": 0, "max_epochs": 0, "layer": None}
                if variant != "probe":
                    settings = settings_of(variant)
                start = time.perf_counter()
                model = FineTuningClassifier(
                    options.backbone, **common, **settings, random_state=seed
                )
                proba = model.fit(X, y).predict_proba(X_test)
                got = model.classes_[proba.argmax(axis=1)]
                figures.append(
                    {
                        "set": name, "seed": seed, "variant": variant,
                        "score": score(name, y_test, got, options.mixed),
                        "log_loss": log_loss(y_test, proba, labels=model.classes_),
                        "seconds": time.perf_counter() - start,
                    }
                )  # fmt: skip
        print(f"\nafter seed {seed}: points above the probe, {options.backbone}")
        probe = scores_of(figures, "variant", "probe")
        print(f"{'probe':32} {100 * np.mean(list(probe.values())):5.1f}")
        for variant in options.variants:
            scores = scores_of(figures, "variant", variant)
            gains = {key: 100 * (value - probe[key]) for key, value in scores.items()}
            values = np.array(list(gains.values()))
            sets = " ".join(
                f"{np.mean([v for k, v in gains.items() if k[0] == name]):+5.1f}"
                for name in options.sets
            )
            error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
            rows = [row for row in figures if row["variant"] == variant]
            loss, seconds = (np.mean([row[key] for row in rows]) for key in ("log_loss", "seconds"))
            print(
                f"{variant:32} {values.mean():+5.2f} ± {error:4.2f}  {sets}  loss {loss:.3f}"
                f"  {seconds:5.1f} s"
            )
        save(options.name, {"options": vars(options), "runs": figures})


if __name__ == "__main__":
    main()
