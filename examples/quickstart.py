"""
Quick start: does transfer help on these images?
================================================

Raw pixels, gradients (HOG), frozen features and fine-tuning, cross-validated on the same folds::

    python examples/quickstart.py              # real photographs that need no download
    python examples/quickstart.py FOLDER       # your own: FOLDER/CLASS/*.jpg

Without an argument the images are grey crops of 16 photographs that scikit-image ships, and a
model predicts which photograph a crop was cut from. The test crops of a fold come from a quarter
of each photograph that no training crop touches.
"""

# %%
import sys
import time
from pathlib import Path

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
from sktransfer.datasets import load_folder

SOURCES = [
    *("astronaut", "brick", "camera", "cat", "clock", "coffee", "coins", "grass"),
    *("gravel", "hubble_deep_field", "immunohistochemistry", "moon"),
    *("page", "retina", "rocket", "stereo_motorcycle"),
]


def cut_crops(size=80, n_crops=5):
    """Cut grey crops of each quarter of each photograph; the quarters are the folds."""
    rng = np.random.default_rng(0)
    crops, names, quarters = [], [], []
    for name in SOURCES:
        photo = getattr(data, name)()
        photo = photo[0] if isinstance(photo, tuple) else photo  # the motorcycle, seen twice
        grey = np.asarray(Image.fromarray(photo).convert("L"))
        height, width = grey.shape[0] // 2, grey.shape[1] // 2
        for quarter in range(4):
            for _ in range(n_crops):
                y = (quarter // 2) * height + rng.integers(height - size + 1)
                x = (quarter % 2) * width + rng.integers(width - size + 1)
                crops.append(grey[y : y + size, x : x + size])
                names.append(name)
                quarters.append(quarter)
    return np.stack(crops), np.array(names), np.array(quarters)


folder = sys.argv[1] if len(sys.argv) > 1 else None
if folder is None:
    X, y, quarters = cut_crops()
    folds = list(GroupKFold(4).split(X, y, groups=quarters))
    print(f"{len(X)} grey crops of {len(SOURCES)} photographs: which one is each from?")
else:
    X, y = load_folder(folder)
    folds = list(StratifiedKFold(4, shuffle=True, random_state=0).split(X, y))
    print(f"{len(X)} images of {len(np.unique(y))} classes in {folder}")

# %%
# Four models. Each is an estimator of scikit-learn, so one function scores them all. The columns
# of the two classical ones are cheap: 16×16 grey pixels, and 324 directions of edges.


def small_grey(image, size):
    opened = Image.open(image) if isinstance(image, str) else Image.fromarray(image)
    return np.asarray(opened.convert("L").resize((size, size)))


def pixels(images):
    return np.stack([small_grey(image, 16).ravel() / 255 for image in images])


def gradients(images):
    cells = {"pixels_per_cell": (16, 16), "cells_per_block": (2, 2)}
    return np.stack([hog(small_grey(image, 64), **cells) for image in images])


def with_classifier(step):
    return make_pipeline(step, StandardScaler(), LogisticRegression(C=0.01, max_iter=300))


models = {
    "raw pixels": with_classifier(FunctionTransformer(pixels)),
    "gradients (HOG)": with_classifier(FunctionTransformer(gradients)),
    "frozen features": with_classifier(PretrainedFeatureExtractor()),
    "fine-tuned": FineTuningClassifier(unfreeze=2, max_epochs=4, random_state=0),
}

# %%
# On a folder of your own, fine-tune a few images first, to say how long all of it will take.
if folder is not None:
    some = np.random.default_rng(0).permutation(len(X))[:32]
    for _ in range(2):  # the first also loads torch and the network
        start = time.perf_counter()
        models["fine-tuned"].fit(X[some], y[some])
    seconds = (time.perf_counter() - start) * len(folds) * len(X) / len(some)
    print(f"All four models take about {5 + seconds:.0f} s.", flush=True)

scores = {}
print(f"\n{'model':18} accuracy   each fold               seconds")
for name, model in models.items():
    start = time.perf_counter()
    scores[name] = cross_val_score(model, X, y, cv=folds, error_score="raise")
    each = " ".join(f"{score:.2f}" for score in scores[name])
    seconds = time.perf_counter() - start
    print(f"{name:18} {scores[name].mean():8.2f}   {each:20} {seconds:10.1f}", flush=True)
chance = np.unique(y, return_counts=True)[1].max() / len(y)
print(f"{'chance':18} {chance:8.2f}")

# %%
# The left half shows an image of each class, the right half the accuracy on each fold.
figure = plt.figure(figsize=(11, 4.2), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=[1, 1.25])
left.suptitle("an image of each class", fontsize=11)
shown = np.unique(y)[:16]
for ax, name in zip(left.subplots(4, 4).flat, [*shown, *[None] * 16], strict=False):
    ax.axis("off")
    if name is not None:
        ax.imshow(small_grey(X[np.argmax(y == name)], 96), cmap="gray", vmin=0, vmax=255)
        ax.set_title(str(name).replace("_", " ")[:20], fontsize=6, pad=2)

ax = right.subplots()
colours = ["#9aa5b1", "#9aa5b1", "#2f7ebc", "#e07b39"]
for k, values in enumerate(scores.values()):
    ax.barh(k, values.mean(), height=0.62, color=colours[k])
    ax.plot(values, [k] * len(values), "o", color="black", alpha=0.45, markersize=4)
    ax.text(1.12, k, f"{values.mean():.0%}", va="center", ha="right", weight="bold")
ax.axvline(chance, color="black", linestyle=":", linewidth=1)
ax.text(chance, -0.62, " chance", fontsize=8, va="center")
ax.set_yticks(range(len(scores)), scores)
ax.set(xlim=(0, 1.12), ylim=(len(scores) - 0.5, -0.85), xlabel="accuracy (dots: each fold)")
ax.set_title("one pre-trained network, no download", fontsize=11)
ax.spines[["top", "right"]].set_visible(False)
figure.savefig("quickstart.png", dpi=150)
print(f"\nThe picture is {Path('quickstart.png').resolve()}")
plt.show()
