"""Fine-tuning against what people do today, on the same weights, splits and epochs.

    python docs/benchmarks/fine_tuning.py [--sets hymenoptera dtd10] [--backbones mobilenet_v2]
        [--per-class 50] [--seeds 3] [--epochs 8] [--methods ours probe fastai skorch]

    ours      FineTuningClassifier(random_state=seed), defaults
    probe     frozen features, StandardScaler, LogisticRegression, C by 3-fold cross-validation
    fastai    vision_learner(...).fine_tune, the body frozen for the first of the epochs
    skorch    the recipe of skorch's transfer-learning notebook: body frozen, new last layer,
              SGD with momentum, learning rate 1e-3 divided by ten every seven epochs

Each run is one process's work in turn: images to predictions, without a store shared between
methods. A set's training images are drawn anew for each seed, the test part is the same. Peers
that are not installed are left out and said to be.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from _report import DATA, save

WEIGHTS = {
    "builtin": "DEFAULT",
    "mobilenet_v2": DATA / "weights/mobilenet_v2_imagenet.safetensors",
    "squeezenet1_1": DATA / "weights/squeezenet1_1_imagenet.safetensors",
}
BALANCED = {"magnetic_tile"}


def read_set(name, per_class, seed, max_test):
    """Paths and labels: `per_class` training images a class, and the test part."""
    rng = np.random.default_rng(seed)
    parts = {}
    for part, limit in (("train", per_class), ("test", max_test)):
        X, y = [], []
        # The test images are the same for every seed.
        draw = rng if part == "train" else np.random.default_rng(0)
        for folder in sorted((DATA / "data" / name / part).iterdir()):
            paths = sorted(map(str, folder.glob("*.jpg")))
            if limit:
                paths = [paths[i] for i in draw.permutation(len(paths))[:limit]]
            X += paths
            y += [folder.name] * len(paths)
        parts[part] = X, np.array(y)
    return *parts["train"], *parts["test"]


def ours(backbone, X, y, X_test, seed, epochs):
    from sktransfer import FineTuningClassifier

    model = FineTuningClassifier(
        backbone, weights=WEIGHTS[backbone], max_epochs=epochs, random_state=seed, memory=False
    )
    return model.fit(X, y).predict(X_test)


def probe(backbone, X, y, X_test, seed, epochs):
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from sktransfer import PretrainedFeatureExtractor

    extractor = PretrainedFeatureExtractor(backbone, weights=WEIGHTS[backbone], memory=False)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1]}
    search = GridSearchCV(classifier, grid, cv=3)
    rows = extractor.fit_transform(X)
    return search.fit(rows, y).predict(extractor.transform(X_test))


def torchvision_module(backbone):
    """The whole network in torchvision's or our own architecture, with its weights."""
    import copy

    from sktransfer import load_backbone

    return copy.deepcopy(load_backbone(backbone, weights=WEIGHTS[backbone]).network.module)


def fastai(backbone, X, y, X_test, seed, epochs):
    from fastai.vision.all import (
        ImageDataLoaders,
        Normalize,
        Resize,
        imagenet_stats,
        set_seed,
        vision_learner,
    )

    set_seed(seed, reproducible=True)
    labels = dict(zip(X, y, strict=True))
    loaders = ImageDataLoaders.from_lists(
        Path("."), X, [labels[x] for x in X], valid_pct=0.0, item_tfms=Resize(224), bs=32,
        num_workers=0, batch_tfms=[Normalize.from_stats(*imagenet_stats)],
    )  # fmt: skip

    def builder(weights=None, **kwargs):
        return torchvision_module(backbone).requires_grad_(True)

    builder.__name__ = backbone
    learner = vision_learner(loaders, builder, pretrained=True, normalize=False)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(epochs - 1, freeze_epochs=1)
        scores, _ = learner.get_preds(dl=loaders.test_dl(X_test, num_workers=0))
    return np.array(loaders.vocab)[scores.argmax(1).numpy()]


def skorch(backbone, X, y, X_test, seed, epochs):
    import torch
    from PIL import Image
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Freezer, LRScheduler

    from sktransfer import load_backbone

    torch.manual_seed(seed)
    preprocessing = load_backbone(backbone, weights=WEIGHTS[backbone]).preprocessing
    mean = torch.tensor(preprocessing.mean).view(3, 1, 1)
    std = torch.tensor(preprocessing.std).view(3, 1, 1)
    classes, codes = np.unique(y, return_inverse=True)

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, paths, targets):
            self.paths, self.targets = paths, targets

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, i):
            picture = np.asarray(Image.open(self.paths[i]).convert("RGB"))
            x = torch.tensor(preprocessing.resize_crop(picture)).permute(2, 0, 1) / 255
            return (x - mean) / std, int(self.targets[i])

    module = torchvision_module(backbone).requires_grad_(True)
    if backbone == "squeezenet1_1":
        head = "classifier.1"
        module.classifier[1] = torch.nn.Conv2d(512, len(classes), 1)
    else:
        head = "head" if backbone == "builtin" else "classifier.1"
        parent, _, leaf = head.rpartition(".")
        layer = module.get_submodule(head)
        setattr(
            module.get_submodule(parent), leaf, torch.nn.Linear(layer.in_features, len(classes))
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = NeuralNetClassifier(
        module, criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=0.001,
        optimizer__momentum=0.9, batch_size=32, max_epochs=epochs, train_split=None, verbose=0,
        iterator_train__shuffle=True, device=device,
        callbacks=[
            LRScheduler(policy="StepLR", step_size=7, gamma=0.1),
            Freezer(lambda name: not name.startswith(head)),
        ],
    )  # fmt: skip
    net.fit(Pictures(X, codes), None)
    return classes[net.predict(Pictures(X_test, np.zeros(len(X_test))))]


METHODS = {"ours": ours, "probe": probe, "fastai": fastai, "skorch": skorch}


def main():
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sets = ["hymenoptera", "flowers5", "dtd10", "brain_mri", "magnetic_tile"]
    parser.add_argument("--sets", nargs="+", default=sets)
    parser.add_argument("--backbones", nargs="+", default=list(WEIGHTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--per-class", type=int, default=50, help="0: all")
    parser.add_argument("--max-test", type=int, default=0, help="test images a class; 0: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--name", default="fine_tuning")
    options = parser.parse_args()
    figures = []
    for name in options.sets:
        metric = balanced_accuracy_score if name in BALANCED else accuracy_score
        for backbone in options.backbones:
            for seed in range(options.seeds):
                X, y, X_test, y_test = read_set(name, options.per_class, seed, options.max_test)
                for method in options.methods:
                    start = time.perf_counter()
                    try:
                        got = METHODS[method](backbone, X, y, X_test, seed, options.epochs)
                    except ImportError as error:
                        print(f"{method} is left out: {error}")
                        continue
                    seconds = time.perf_counter() - start
                    figures.append(
                        {
                            "set": name, "backbone": backbone, "seed": seed, "method": method,
                            "n_train": len(X), "n_test": len(X_test),
                            "score": metric(y_test, got), "seconds": seconds,
                        }
                    )  # fmt: skip
                    row = figures[-1]
                    print(
                        f"{name:14} {backbone:14} seed {seed} {method:7} "
                        f"{row['score']:.3f} {seconds:7.1f} s", flush=True,
                    )  # fmt: skip
    print("\nmean score and seconds over sets, backbones and seeds")
    for method in options.methods:
        rows = [row for row in figures if row["method"] == method]
        if rows:
            score = np.mean([row["score"] for row in rows])
            print(f"{method:8} {score:.3f} {np.mean([row['seconds'] for row in rows]):8.1f} s")
    save(options.name, {"options": vars(options), "runs": figures})


if __name__ == "__main__":
    main()
