"""How much does transfer help? Pixels, HOG, frozen features and fine-tuning, cross-validated.

    python examples/quickstart.py              # real photographs that need no download
    python examples/quickstart.py FOLDER       # yours: FOLDER/CLASS/*.jpg

Without an argument the images are crops of 16 images that scikit-image ships, and a model
predicts which of them a crop was cut from. The crops are grey, as colour would give the answer
away, and the test crops of a fold come from a quarter of each image that no training crop touches.
Prints a table and draws it into quickstart.png.
"""

import argparse
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage import data
from skimage.feature import hog
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from sktransfer import FineTuningClassifier, PretrainedFeatureExtractor

SOURCES = [
    *("astronaut", "brick", "camera", "cat", "clock", "coffee", "coins", "grass"),
    *("gravel", "hubble_deep_field", "immunohistochemistry", "moon"),
    *("page", "retina", "rocket", "stereo_motorcycle"),
]


def cut_crops(size=80, n_crops=10, seed=0):
    """Return grey crops, the name of the image each is from, and its quarter of it: the fold."""
    rng = np.random.default_rng(seed)
    crops, names, quarters = [], [], []
    for name in SOURCES:
        image = getattr(data, name)()
        if isinstance(image, tuple):  # the motorcycle's left and right view
            image = image[0]
        grey = np.asarray(Image.fromarray(image).convert("L"))
        height, width = grey.shape[0] // 2, grey.shape[1] // 2
        for quarter in range(4):
            top, left = (quarter // 2) * height, (quarter % 2) * width
            for _ in range(n_crops):
                y = top + rng.integers(height - size + 1)
                x = left + rng.integers(width - size + 1)
                crops.append(grey[y : y + size, x : x + size])
                names.append(name)
                quarters.append(quarter)
    return crops, np.array(names), np.array(quarters)


def find_images(folder):
    """Return the paths in FOLDER/CLASS/ and their classes."""
    endings = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    paths = sorted(p for p in Path(folder).glob("*/*") if p.suffix.lower() in endings)
    if not paths:
        raise SystemExit(f"No images in {folder}/CLASS/: one folder for each class is expected.")
    return [str(p) for p in paths], np.array([p.parent.name for p in paths])


def small_grey(image, size):
    if isinstance(image, str):
        with Image.open(image) as opened:
            return np.asarray(opened.convert("L").resize((size, size)))
    return np.asarray(Image.fromarray(image).resize((size, size)))


def pixels(images):
    return np.stack([small_grey(image, 32).ravel() / 255.0 for image in images])


def gradients(images):
    cells = {"orientations": 9, "pixels_per_cell": (8, 8), "cells_per_block": (2, 2)}
    return np.stack([hog(small_grey(image, 64), **cells) for image in images])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="FOLDER/CLASS/*.jpg; default: bundled images")
    parser.add_argument("--backbone", default="builtin")
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--output", default="quickstart.png")
    args = parser.parse_args()

    if args.folder is None:
        X, y, quarters = cut_crops()
        folds = list(GroupKFold(4).split(X, y, groups=quarters))
        print(f"{len(X)} grey crops of {len(SOURCES)} photographs: which one is it from?")
    else:
        X, y = find_images(args.folder)
        folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(X, y))
        print(f"{len(X)} images of {len(np.unique(y))} classes in {args.folder}")

    def classical(step):
        return make_pipeline(step, StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))

    network = {"backbone": args.backbone, "weights": args.weights}
    models = {
        "raw pixels": classical(FunctionTransformer(pixels)),
        "HOG": classical(FunctionTransformer(gradients)),
        f"frozen features ({args.backbone})": classical(PretrainedFeatureExtractor(**network)),
        f"fine-tuned ({args.backbone})": FineTuningClassifier(**network, random_state=0),
    }
    scores = {}
    print(f"\n{'model':32} accuracy   per fold{'':25} seconds")
    for name, model in models.items():
        start = time.perf_counter()
        scores[name] = fold_scores = cross_val_score(model, X, y, cv=folds, error_score="raise")
        seconds = time.perf_counter() - start
        folds_text = " ".join(f"{score:.2f}" for score in fold_scores)
        print(f"{name:32} {fold_scores.mean():8.3f}   {folds_text:33} {seconds:7.1f}", flush=True)
    print(f"{'chance':32} {np.unique(y, return_counts=True)[1].max() / len(y):8.3f}")

    draw(X, y, scores, args.output)
    print(f"\nDrawn into {Path(args.output).resolve()}")


def draw(X, y, scores, output):
    """Draw an example of each class (at most 16) beside the folds' accuracies."""
    figure = plt.figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.1])
    labels = [*np.unique(y)[:16], *[None] * 16]
    for ax, label in zip(left.subplots(4, 4).flat, labels[:16], strict=True):
        ax.axis("off")
        if label is not None:
            ax.imshow(small_grey(X[int(np.argmax(y == label))], 96), cmap="gray", vmin=0, vmax=255)
            ax.set_title(str(label)[:14], fontsize=7)
    ax = right.subplots()
    for k, fold_scores in enumerate(scores.values()):
        ax.barh(k, fold_scores.mean(), color=f"C{k}", alpha=0.6)
        ax.plot(fold_scores, [k] * len(fold_scores), "k.", markersize=4)
        ax.text(0.01, k, f"{fold_scores.mean():.2f}", va="center")
    ax.set_yticks(range(len(scores)), scores)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="accuracy (dots: folds)")
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    main()
