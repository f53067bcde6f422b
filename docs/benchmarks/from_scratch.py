"""What the built-in backbone's pre-training is worth as a start for fine-tuning.

    python docs/benchmarks/from_scratch.py [--sets hymenoptera dtd10] [--sizes 50 200 0]
        [--seeds 3] [--scratch-epochs 20]

The same network, the same training images (50, 200 or all of a set, drawn anew for each seed, as
many of each class as the set has in proportion), the same test part:

    fine-tuned    FineTuningClassifier(), its defaults, from V1
    scratch       weights=None: random weights, batch norm's statistics moving, one learning rate
                  of 1e-3 for all stages, mirrored and shifted images, more epochs
    probe         head only: the linear probe on the frozen features of V1

Negative transfer would be a scratch column above the others.
"""

import argparse
import time
import warnings

import numpy as np
from _fine_tuning_peers import SETS, read_set, score
from _report import save
from sklearn.model_selection import train_test_split

from sktransfer import FineTuningClassifier


def methods(scratch_epochs):
    return {
        "fine-tuned": {},
        "scratch": {
            "weights": None, "head_init": "random", "lr": 1e-3, "layer_decay": 1.0,
            "augment": "light", "max_epochs": scratch_epochs,
        },
        "probe": {"unfreeze": 0, "max_epochs": 0},
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 200, 0], help="0: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scratch-epochs", type=int, default=20)
    parser.add_argument("--backbone", default="builtin")
    parser.add_argument("--name", default="from_scratch")
    options = parser.parse_args()
    figures = []
    for name in options.sets:
        X, y, X_test, y_test = read_set(name, 0, 0)
        for n in options.sizes:
            for seed in range(options.seeds if n else 1):
                X_part, y_part = X, y
                if n and n < len(y):
                    X_part, _, y_part, _ = train_test_split(
                        X, y, train_size=n, stratify=y, random_state=seed
                    )
                for method, settings in methods(options.scratch_epochs).items():
                    start = time.perf_counter()
                    model = FineTuningClassifier(options.backbone, random_state=seed, **settings)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        got = model.fit(X_part, y_part).predict(X_test)
                    figures.append(
                        {
                            "set": name, "n_train": len(y_part), "seed": seed, "method": method,
                            "score": score(name, y_test, got),
                            "seconds": time.perf_counter() - start,
                        }
                    )  # fmt: skip
            line = f"{name:14} {len(y_part):5} images"
            for method in methods(options.scratch_epochs):
                scores = [
                    100 * row["score"] for row in figures
                    if (row["set"], row["n_train"], row["method"]) == (name, len(y_part), method)
                ]  # fmt: skip
                line += f"  {method} {np.mean(scores):5.1f} ± {np.std(scores):3.1f}"
            print(line, flush=True)
    save(options.name, {"options": vars(options), "runs": figures})


if __name__ == "__main__":
    main()
