"""Fine-tuning against what people do today, on the same weights, splits and epochs.

    python docs/benchmarks/fine_tuning.py [--sets hymenoptera dtd10] [--backbones mobilenet_v2]
        [--per-class 50] [--seeds 3] [--epochs 8] [--methods ours probe …]

    ours      FineTuningClassifier(random_state=seed), defaults
    probe     frozen features, StandardScaler, LogisticRegression, C by 3-fold cross-validation
    fastai    vision_learner(...).fine_tune, the body frozen for the first of the epochs
    skorch    the recipe of skorch's transfer-learning notebook: body frozen,
              new last layer, random crops, SGD with momentum, batches of 4, learning rate 1e-3
              divided by ten every seven epochs, 25 epochs
    skorch-8  the same with no more epochs than the others have

Each run is one process's work in turn: images to predictions, without a store shared between
methods. A set's training images are drawn anew for each seed, the test part is the same. Peers
that are not installed are left out and said to be.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from _fine_tuning_peers import (
    SETS,
    WEIGHTS,
    head_of,
    input_settings,
    module_of,
    pictures,
    read_set,
    score,
    scores_of,
    skorch_net,
)
from _report import save


def ours(backbone, X, y, X_test, seed, epochs, size):
    from sktransfer import FineTuningClassifier

    model = FineTuningClassifier(
        backbone,
        **input_settings(backbone, size),
        max_epochs=epochs,
        random_state=seed,
        memory=False,
    )
    return model.fit(X, y).predict(X_test)


def probe(backbone, X, y, X_test, seed, epochs, size):
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from sktransfer import PretrainedFeatureExtractor

    extractor = PretrainedFeatureExtractor(backbone, **input_settings(backbone, size), memory=False)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1]}
    search = GridSearchCV(classifier, grid, cv=3)
    rows = extractor.fit_transform(X)
    return search.fit(rows, y).predict(extractor.transform(X_test))


def fastai(backbone, X, y, X_test, seed, epochs, size):
    from fastai.vision.all import (
        ImageDataLoaders,
        Normalize,
        Resize,
        imagenet_stats,
        set_seed,
        vision_learner,
    )
    from fastai.vision.learner import default_split, model_meta
    from torchvision import models

    from sktransfer import load_backbone

    set_seed(seed, reproducible=True)
    size = load_backbone(backbone, **input_settings(backbone, size)).input_size[1]
    labels = dict(zip(X, y, strict=True))
    loaders = ImageDataLoaders.from_lists(
        Path("."), X, [labels[x] for x in X], valid_pct=0.0, item_tfms=Resize(size),
        # An incomplete batch is dropped: small batches lose fewer of few images.
        bs=min(32, max(2, len(X) // 4)),
        num_workers=0, batch_tfms=[Normalize.from_stats(*imagenet_stats)],
    )  # fmt: skip

    def builder(weights=None, **kwargs):
        return module_of(backbone)

    builder.__name__ = backbone
    # What fastai knows of its own networks: how to cut off what pools and classifies, and the
    # groups of layers that get a learning rate each. (vision_learner's own `cut` is not heeded.)
    known = model_meta.get(getattr(models, backbone, None), {"split": default_split})
    model_meta[builder] = {"cut": -2 if backbone == "builtin" else -1, "split": known["split"]}
    learner = vision_learner(loaders, builder, pretrained=True, normalize=False)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(epochs - 1, freeze_epochs=1)
        scores, _ = learner.get_preds(dl=loaders.test_dl(X_test, num_workers=0))
    return np.array(loaders.vocab)[scores.argmax(1).numpy()]


def skorch(backbone, X, y, X_test, seed, epochs, size):
    return shorter_skorch(backbone, X, y, X_test, seed, 25, size)


def shorter_skorch(backbone, X, y, X_test, seed, epochs, size):
    import torch

    torch.manual_seed(seed)
    classes, codes = np.unique(y, return_inverse=True)
    head = head_of(backbone)
    net = skorch_net(
        module_of(backbone, len(classes)), lambda name: not name.startswith(head), epochs,
        batch_size=4,
    )  # fmt: skip
    net.fit(pictures(backbone, X, codes, is_augmented=True, size=size), None)
    return classes[net.predict(pictures(backbone, X_test, np.zeros(len(X_test)), size=size))]


METHODS = {
    "ours": ours, "probe": probe, "fastai": fastai, "skorch": skorch, "skorch-8": shorter_skorch,
}  # fmt: skip


def summarise(figures, methods):
    """Print what each method scores, and how far ours is from each of the others."""
    for backbone in dict.fromkeys(row["backbone"] for row in figures):
        print(f"\n{backbone}: mean score over the seeds, and seconds; from ours, in points")
        of_backbone = [row for row in figures if row["backbone"] == backbone]
        for name in [*dict.fromkeys(row["set"] for row in of_backbone), "all sets"]:
            rows = [row for row in of_backbone if name in (row["set"], "all sets")]
            ours_scores = scores_of(rows, "method", "ours")
            cells = []
            for method in methods:
                scores = scores_of(rows, "method", method)
                seconds = np.mean([row["seconds"] for row in rows if row["method"] == method])
                cell = f"{method} {100 * np.mean(list(scores.values())):.1f} ({seconds:.0f} s)"
                if method != "ours" and ours_scores:
                    gains = [100 * (ours_scores[key] - scores[key]) for key in scores]
                    error = np.std(gains, ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else 0
                    cell += f" {np.mean(gains):+.1f}±{error:.1f}"
                cells.append(cell)
            print(f"{name:14} " + ", ".join(cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--backbones", nargs="+", default=list(WEIGHTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--per-class", type=int, default=50, help="0: all")
    parser.add_argument("--max-test", type=int, default=0, help="test images a class; 0: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--size", type=int, default=0, help="pixels; 0: the backbone's own")
    parser.add_argument("--name", default="fine_tuning")
    options = parser.parse_args()
    figures = []
    # Imports are not measured.
    X, y, X_test, _ = read_set(options.sets[0], 4, 0, 2)
    for method in list(options.methods):
        try:
            METHODS[method](options.backbones[0], X, y, X_test, 0, 2, options.size)
        except ImportError as error:
            print(f"{method} is left out: {error}")
            options.methods.remove(method)
    for name in options.sets:
        for backbone in options.backbones:
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                X, y, X_test, y_test = read_set(name, options.per_class, seed, options.max_test)
                for method in options.methods:
                    start = time.perf_counter()
                    got = METHODS[method](
                        backbone, X, y, X_test, seed, options.epochs, options.size
                    )
                    seconds = time.perf_counter() - start
                    figures.append(
                        {
                            "set": name, "backbone": backbone, "seed": seed, "method": method,
                            "n_train": len(X), "n_test": len(X_test),
                            "score": score(name, y_test, got), "seconds": seconds,
                        }
                    )  # fmt: skip
                    row = figures[-1]
                    print(
                        f"{name:14} {backbone:14} seed {seed} {method:7} "
                        f"{row['score']:.3f} {seconds:7.1f} s", flush=True,
                    )  # fmt: skip
    summarise(figures, options.methods)
    save(options.name, {"options": vars(options), "runs": figures})


if __name__ == "__main__":
    main()
