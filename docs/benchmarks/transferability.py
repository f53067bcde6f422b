"""Which score predicts fine-tuning, what rank_backbones costs, and how often a verdict is false.

    python docs/benchmarks/transferability.py [tau | cost | verdicts] [--sets hymenoptera ...]

* ``tau``: stages of the built-in network, MobileNetV2, SqueezeNet and their twins with random
  weights. Weighted Kendall's tau of each score, and of the probe on all and on half of the rows,
  with the accuracy of the same network and layer fine-tuned, on test images; CPU seconds of each.
  Each column is standardised for no score; TransRate is also given as `rank_backbones` scales it.
  LEEP is of the network's own head, and so the same for all layers of a network.
* ``cost``: CPU seconds of `rank_backbones`, less those of its probes and scores, against those of
  the embedding passes alone, the twins' included.
* ``verdicts``: the share of false verdicts among paired folds of two models of equal quality, on
  simulated columns, by the p-value that a verdict needs.

Results are written after each set, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
from _report import DATA, data_set, save
from scipy.special import softmax
from scipy.stats import weightedtau
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import FineTuningClassifier, PretrainedFeatureExtractor
from sktransfer.transferability import (
    h_score,
    leep_score,
    logme_score,
    rank_backbones,
    transrate_score,
)
from sktransfer.transferability._folds import estimate, make_folds

SETS = ("hymenoptera", "flowers5", "dtd10", "brain_mri", "magnetic_tile")
WEIGHTS = {
    "builtin": "DEFAULT",
    "squeezenet1_1": DATA / "weights" / "squeezenet1_1_imagenet.safetensors",
    "mobilenet_v2": DATA / "weights" / "mobilenet_v2_imagenet.safetensors",
}
HEADS = {"builtin": "head", "squeezenet1_1": "classifier", "mobilenet_v2": "classifier"}
LAYERS = {"builtin": ["stage2", "stage3", None], "squeezenet1_1": [None], "mobilenet_v2": [None]}


def cpu_seconds(call):
    since = time.process_time()
    return call(), time.process_time() - since


# -- tau -------------------------------------------------------------------------------------
def load_part(name, part, per_class, rng):
    """Paths and labels of at most so many images of each class."""
    paths, y = [], []
    for folder in sorted((data_set(name) / part).iterdir()):
        files = sorted(folder.rglob("*.jpg"))
        for k in rng.permutation(len(files))[:per_class]:
            paths.append(str(files[k]))
            y.append(folder.name)
    return np.array(paths), np.array(y)


def probe(columns, y):
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=100 / columns.shape[1], max_iter=1000)
    )
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return cross_val_score(model, columns, y, cv=folds).mean()


def scaled_transrate(columns, y):
    return transrate_score(columns / np.sqrt(columns.var(axis=0).mean()), y)


SCORES = {
    "logme": logme_score,
    "h_score": h_score,
    "transrate": transrate_score,
    "transrate, scaled": scaled_transrate,
    "probe": probe,
    "probe, half of the rows": lambda columns, y: probe(columns[::2], y[::2]),
}


def taus_of(rows):
    truth = [row["fine-tuned"] for row in rows]
    return {s: weightedtau(truth, [row[s] for row in rows]).statistic for s in (*SCORES, "leep")}


def measure_set(name, args):
    rng = np.random.default_rng(0)
    X, y = load_part(name, "train", args.per_class, rng)
    shuffled = rng.permutation(len(X))
    X, y = X[shuffled], y[shuffled]
    X_test, y_test = load_part(name, "test", args.test_per_class, rng)
    metric = balanced_accuracy_score if name == "magnetic_tile" else accuracy_score
    size = {"preprocessing": {"size": args.pixels, "crop": args.pixels}}
    rows = []
    for backbone, weights in WEIGHTS.items():
        for layer in LAYERS[backbone]:
            for own in (weights, None):
                same = {"backbone": backbone, "weights": own, "layer": layer, **size}
                extractor = PretrainedFeatureExtractor(**same)
                columns, embedding = cpu_seconds(lambda e=extractor: e.fit_transform(X))
                row = {"backbone": backbone, "layer": layer, "random": own is None}
                row["seconds"] = {"embedding": embedding}
                for score, function in SCORES.items():
                    row[score], row["seconds"][score] = cpu_seconds(
                        lambda f=function, c=columns: f(c.astype(float), y)
                    )
                head = PretrainedFeatureExtractor(**same | {"layer": HEADS[backbone]})
                row["leep"], row["seconds"]["leep"] = cpu_seconds(
                    lambda e=head: leep_score(softmax(e.fit_transform(X).astype(float), axis=1), y)
                )
                tuned = FineTuningClassifier(**same, max_epochs=args.epochs, random_state=0)
                _, row["seconds"]["fine-tuning"] = cpu_seconds(lambda t=tuned: t.fit(X, y))
                row["fine-tuned"] = metric(y_test, tuned.predict(X_test))
                rows.append(row)
                print(name, {k: v for k, v in row.items() if k != "seconds"}, flush=True)
    taus, among = taus_of(rows), taus_of([row for row in rows if not row["random"]])
    seconds = {k: np.mean([row["seconds"][k] for row in rows]) for k in rows[0]["seconds"]}
    print(name, "tau", taus, "without twins", among, "seconds", seconds, flush=True)
    return {"tau": taus, "tau_without_twins": among, "seconds": seconds, "rows": rows}


def measure_tau(args):
    figures = {"settings": vars(args), "sets": {}}
    for name in args.sets:
        figures["sets"][name] = measure_set(name, args)
        save("transferability", figures)


# -- cost ------------------------------------------------------------------------------------
def measure_cost(args):
    names = ["builtin", "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small"]
    names += ["mnasnet0_5", "resnet18", "mobilenet_v2", "squeezenet1_0"]
    weights = [WEIGHTS.get(name) for name in names]
    rng = np.random.default_rng(0)
    X, y = load_part("flowers5", "train", args.n_images // 5, rng)
    made = [
        PretrainedFeatureExtractor(name, weights=own, memory=False)
        for name, of_name in zip(names, weights, strict=True)
        for own in (of_name, None)
    ]
    for extractor in made:
        extractor.fit_transform(X[:8])  # networks are loaded and planned
    columns, passes = cpu_seconds(lambda: [e.fit_transform(X).astype(float) for e in made])
    _, probes = cpu_seconds(lambda: [probe(c, y) for c in columns])
    _, scores = cpu_seconds(
        lambda: [(logme_score(c, y), h_score(c, y), transrate_score(c, y)) for c in columns[::2]]
    )
    _, ranking = cpu_seconds(
        lambda: rank_backbones(X, y, names, weights=weights, memory=False, random_state=0)
    )
    figures = {"passes": passes, "probes": probes, "scores": scores, "rank_backbones": ranking}
    figures |= {"n_images": len(X), "ratio": (ranking - probes - scores) / passes}
    print(figures)
    save("transferability_cost", figures)


# -- verdicts --------------------------------------------------------------------------------
def ridge_score(columns, train, test, y):
    """Accuracy of a ridge classifier, in closed form."""
    mean, target = columns[train].mean(axis=0), 2.0 * y[train] - 1
    A = columns[train] - mean
    w = np.linalg.solve(A.T @ A + np.eye(A.shape[1]), A.T @ (target - target.mean()))
    return np.mean(((columns[test] - mean) @ w + target.mean() > 0) == y[test])


def measure_verdicts(args):
    figures = {}
    for n in (40, 90, 300):
        for signal in (0.0, 0.7):
            for k in (3, 5, 10):
                p = []
                for seed in range(args.n_draws):
                    rng = np.random.default_rng(seed)
                    y = np.arange(n) % 2
                    shift = signal * y[:, None] * (np.arange(8) < 2)
                    two = [rng.normal(size=(n, 8)) + shift for _ in range(2)]
                    folds, gains = make_folds(y, k, None, True, seed), []
                    for train, test in folds:
                        train = rng.permutation(train)
                        parts = [train[: round(s * len(train))] for s in (0.25, 0.5, 1.0)]
                        scores = [[ridge_score(X, part, test, y) for part in parts] for X in two]
                        gains.append(np.mean(scores[0]) - np.mean(scores[1]))
                    p.append(estimate(np.array(gains), folds).p_value)
                shares = {a: float(np.mean(np.array(p) <= a)) for a in (0.02, 0.03, 0.05)}
                figures[f"{n} rows, signal {signal}, {k} folds"] = shares
                print(n, signal, k, shares, flush=True)
    save("transferability_verdicts", figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["tau", "cost", "verdicts"], nargs="?", default="tau")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--test-per-class", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--n-images", type=int, default=1000)
    parser.add_argument("--n-draws", type=int, default=400)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    {"tau": measure_tau, "cost": measure_cost, "verdicts": measure_verdicts}[args.what](args)
