"""Columns of the last stage against those of the last two, the last three and all stages joined.

    python docs/benchmarks/columns.py [--networks mobilenet_v2 …] [--sizes 224 128]
        [--per-class 10 50 0] [--draws 3] [--sets hymenoptera …] [--memory FOLDER] [--mixed]

Balanced or plain accuracy (`BALANCED` in _fine_tuning_peers.py) on the test part, of two
classifiers of standardised columns: the linear probe with which fine-tuning starts, which chooses
its regularisation on training rows, and five nearest neighbours. "random" is the same network with
random weights; it is left out with ``--mixed``, which draws both parts from all images, so that
they are alike, and takes balanced accuracy. A gain is against the last stage of the same network,
size, training images and classifier; its standard error is that of the mean over sets and draws.
"""

from __future__ import annotations

import argparse

import numpy as np
from _fine_tuning_peers import MIXED_SETS, SETS, WEIGHTS, read_mixed, read_set, score
from _report import save
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor
from sktransfer.fine_tuning._head import fit_probe

SIZES = {"builtin": [0]}  # 0: its own


def new_extractor(network, size, is_random, memory):
    preprocessing = {"size": round(size * 232 / 224), "crop": size} if size else "auto"
    return PretrainedFeatureExtractor(
        network, weights=None if is_random else WEIGHTS[network], layer="all", memory=memory,
        preprocessing=preprocessing,
    )  # fmt: skip


def joined(extractor):
    """Name -> the columns of the last stage, of the last two, of the last three and of all."""
    widths = [width for _, width in extractor.backbone_.feature_groups]
    starts = np.cumsum([0, *widths])
    counts = {"last": 1, "last two": 2, "last three": 3, "all": len(widths)}
    return {name: slice(starts[-1 - k], None) for name, k in counts.items() if k <= len(widths)}


def predictions(rows, y, test, seed):
    scaler = StandardScaler().fit(rows)
    classes, codes = np.unique(y, return_inverse=True)
    rng = np.random.RandomState(seed)
    coef, intercept = fit_probe(
        rows[:, None], codes, np.ones(len(y)), "multiclass", len(classes), rng
    )
    neighbours = KNeighborsClassifier(5).fit(scaler.transform(rows), y)
    return {
        "probe": classes[(test @ coef.T + intercept).argmax(1)],
        "neighbours": neighbours.predict(scaler.transform(test)),
    }


def measure(network, size, is_random, name, options):
    """One row of figures for each draw, number of training images, columns and classifier."""
    extractor = new_extractor(network, size, is_random, options.memory)
    figures = []
    for per_class in options.per_class:
        for seed in range(options.draws if per_class else 1):
            read = read_mixed if options.mixed else read_set
            X, y, X_test, y_test = read(name, per_class, seed, options.max_test)
            rows, test = extractor.fit_transform(X), extractor.transform(X_test)
            for columns, part in joined(extractor).items():
                for kind, got in predictions(rows[:, part], y, test[:, part], seed).items():
                    figures.append(
                        {
                            "network": network, "size": size, "random": is_random, "set": name,
                            "per_class": per_class, "seed": seed, "columns": columns,
                            "width": rows[:, part].shape[1], "classifier": kind,
                            "n_train": len(y),
                            "score": score(name, y_test, got, options.mixed),
                        }
                    )  # fmt: skip
    return figures


def compact(figures):
    """Scores by set, draw after draw, of each network, columns and classifier."""
    keys = ("network", "size", "random", "per_class", "classifier", "columns", "width")
    found = {}
    for row in figures:
        by_set = found.setdefault(tuple(row[key] for key in keys), {})
        by_set.setdefault(row["set"], []).append(round(float(row["score"]), 4))
    return [
        dict(zip(keys, key, strict=True)) | {"scores": str(by_set)} for key, by_set in found.items()
    ]


def summarise(figures):
    """Print a line for each network, size, number of images and classifier: gains in points."""
    keys = ("network", "size", "random", "per_class", "classifier")
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in figures):
        own = [row for row in figures if tuple(row[k] for k in keys) == key]
        scores = {(row["columns"], row["set"], row["seed"]): row["score"] for row in own}
        cells = []
        for columns in dict.fromkeys(row["columns"] for row in own):
            runs = [run[1:] for run in scores if run[0] == columns]
            if columns == "last":
                cells.append(f"last {100 * np.mean([scores['last', *run] for run in runs]):.1f}")
                continue
            gains = [100 * (scores[columns, *run] - scores["last", *run]) for run in runs]
            error = np.std(gains, ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else np.nan
            of_sets = {
                name: np.mean([g for g, run in zip(gains, runs, strict=True) if run[0] == name])
                for name, _ in runs
            }
            worst = min(of_sets, key=of_sets.get)
            cells.append(
                f"{columns} {np.mean(gains):+.1f}±{error:.1f} ({worst} {of_sets[worst]:+.1f})"
            )
        network, size, is_random, per_class, kind = key
        label = f"{network}{' random' if is_random else ''} {size or ''} {per_class or 'all'}"
        print(f"{label:32} {kind:10} " + ", ".join(cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(WEIGHTS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 128])
    parser.add_argument("--per-class", type=int, nargs="+", default=[10, 50, 0], help="0: all")
    parser.add_argument("--sets", nargs="+")
    parser.add_argument("--mixed", action="store_true", help="draw both parts from all images")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--max-test", type=int, default=0, help="test images a class; 0: all")
    parser.add_argument("--memory", default=None, help="folder of rows for the next run")
    parser.add_argument("--name", default="columns")
    options = parser.parse_args()
    options.sets = options.sets or list(MIXED_SETS if options.mixed else SETS)
    figures = []
    for network in options.networks:
        for size in SIZES.get(network, options.sizes):
            for is_random in (False,) if options.mixed else (False, True):
                for name in options.sets:
                    figures += measure(network, size, is_random, name, options)
                    print(network, size, "random" if is_random else "", name, flush=True)
                summarise([row for row in figures if (row["network"], row["size"], row["random"])
                           == (network, size, is_random)])  # fmt: skip
                settings = {key: value for key, value in vars(options).items() if key != "memory"}
                save(options.name, {"options": settings, "scores": compact(figures)})


if __name__ == "__main__":
    main()
