"""How far from the linear probe's start to the training's end the kept weights should lie.

    python docs/benchmarks/fine_tuning_share.py [--backbone mobilenet_v2] [--size 128]
        [--per-class 20 50 150 0] [--seeds 1] [--settings unfreeze=3]

Each training's first and last weights are blended (WiSE-FT) at several shares, and each blend is
scored on the same test pictures: 0 is the linear probe that training starts from, 1 the last
weights. One training gives a whole row. What `weight_averaging="wise_ft"` takes, by the number of
rows, follows from this.
"""

import argparse
import warnings

import numpy as np
import torch
from _fine_tuning_peers import SETS, WEIGHTS, input_settings, read_set, score
from _report import save
from fine_tuning_defaults import settings_of

from sktransfer import FineTuningClassifier

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def scores_by_share(common, X, y, X_test, y_test, name):
    """Share -> test score of the blend of a training's first and last weights."""
    start = FineTuningClassifier(**common, probe_views=3, max_epochs=0)
    end = FineTuningClassifier(**common, early_stopping=False, weight_averaging=None, probe_views=3)
    start.fit(X, y)
    end.fit(X, y)
    first = start.net_.module_.state_dict()
    module = end.net_.module_
    last = {key: value.clone() for key, value in module.state_dict().items()}
    scores = {}
    for share in SHARES:
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.lerp(first[key], last[key], share))
        end._tuned.has_changed()  # what was kept for predictions is of other weights
        scores[share] = score(name, y_test, end.predict(X_test))
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="mobilenet_v2", choices=list(WEIGHTS))
    parser.add_argument("--size", type=int, default=128, help="pixels; 0: the backbone's own")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--per-class", type=int, nargs="+", default=[20, 50, 150, 0])
    parser.add_argument("--max-test", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--settings", default="default", help="changes to the defaults")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--name", default="fine_tuning_share")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    common = {"backbone": options.backbone, "memory": False}
    common |= input_settings(options.backbone, options.size) | settings_of(options.settings)
    figures = []
    print(f"{'':28} share " + "  ".join(f"{share:5.2f}" for share in SHARES))
    for seed in range(options.seeds):
        for per_class in options.per_class:
            for name in options.sets:
                drawn = read_set(name, per_class, seed, options.max_test)
                scores = scores_by_share(common | {"random_state": seed}, *drawn, name)
                row = {"set": name, "seed": seed, "n_train": len(drawn[0]), "scores": scores}
                figures.append(row)
                cells = "  ".join(f"{100 * value:5.1f}" for value in scores.values())
                print(f"{name:14} {row['n_train']:5} rows, seed {seed} {cells}", flush=True)
    for low, high in ((0, 200), (200, 600), (600, 10**9)):
        rows = [list(r["scores"].values()) for r in figures if low < r["n_train"] <= high]
        if rows:
            cells = "  ".join(f"{100 * value:5.1f}" for value in np.mean(rows, axis=0))
            print(f"{f'{len(rows)} with over {low} rows':34} {cells}")
    save(options.name, {"options": vars(options), "runs": figures})


if __name__ == "__main__":
    main()
