"""A whole grid search over how far to unfreeze and how fast to learn, against skorch's.

    python docs/benchmarks/fine_tuning_search.py [--backbone mobilenet_v2] [--set hymenoptera]
        [--per-class 40] [--epochs 4]

``GridSearchCV``, three folds, six candidates: ``unfreeze`` (head, last stage, last two) and two
learning rates. skorch's net has the same parameters frozen by its Freezer; its data set holds
ready tensors, so that it decodes nothing, which a search over paths would do.
"""

import argparse
import time

import numpy as np
from _fine_tuning_peers import SETS, WEIGHTS, head_of, module_of, pictures, read_set, skorch_net
from _report import save
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from sktransfer import FineTuningClassifier, load_backbone

UNFREEZE, RATES = [0, 1, 2], [3e-4, 1e-3]


def ours(options, X, y, folds):
    model = FineTuningClassifier(
        options.backbone, weights=WEIGHTS[options.backbone], max_epochs=options.epochs,
        early_stopping=False, random_state=0,
    )  # fmt: skip
    search = GridSearchCV(model, {"unfreeze": UNFREEZE, "lr": RATES}, cv=folds, refit=False)
    return search.fit(X, y)


def skorch(options, X, y, folds):
    import torch
    from skorch.callbacks import Freezer

    classes, codes = np.unique(y, return_inverse=True)
    ready = pictures(options.backbone, X, codes)
    tensors = np.stack([ready[i][0].numpy() for i in range(len(X))])
    origin = load_backbone(options.backbone, weights=WEIGHTS[options.backbone])
    stages = [stage for stage in origin.stages if stage.name not in ("pool", "head")]
    by_id = {id(p): name for name, p in origin.network.module.named_parameters()}
    head = head_of(options.backbone)
    freezers = []
    for k in UNFREEZE:
        free = {by_id[id(p)] for stage in stages[len(stages) - k :]
                for p in stage.module.parameters()}  # fmt: skip
        freezers.append(
            Freezer(lambda name, free=free: name not in free and not name.startswith(head))
        )
    torch.manual_seed(0)
    net = skorch_net(
        module_of(options.backbone, len(classes)), lambda name: False, options.epochs, "adamw"
    )
    net.set_params(callbacks=[("freezer", freezers[0])])
    search = GridSearchCV(net, {"callbacks__freezer": freezers, "lr": RATES}, cv=folds, refit=False)
    return search.fit(tensors, codes.astype(np.int64))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="mobilenet_v2", choices=list(WEIGHTS))
    parser.add_argument("--set", default="hymenoptera", choices=list(SETS))
    parser.add_argument("--per-class", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    X, y, _, _ = read_set(options.set, options.per_class, 0)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    figures = {"options": vars(options)}
    for label, run in (("sktransfer", ours), ("skorch", skorch)):
        start = time.perf_counter()
        search = run(options, X, y, folds)
        seconds = time.perf_counter() - start
        figures[label] = {
            "seconds": seconds,
            "best": search.best_score_,
            "mean": float(np.mean(search.cv_results_["mean_test_score"])),
        }
        print(
            f"{label:11} {seconds:7.1f} s, best accuracy {search.best_score_:.3f}, "
            f"mean of the candidates {figures[label]['mean']:.3f}"
        )
    ratio = figures["skorch"]["seconds"] / figures["sktransfer"]["seconds"]
    figures["ratio"] = ratio
    print(f"skorch takes {ratio:.2f} times as long")
    save("fine_tuning_search", figures)


if __name__ == "__main__":
    main()
