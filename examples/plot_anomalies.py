"""
Anomalies without labels
========================

A line of production makes good pieces and, seldom, a bad one that nobody has seen before. The
columns of a pre-trained network and a detector of scikit-learn find what is unlike the good
pieces, with no label at all.

Give a folder as an argument: ``FOLDER/good/*.jpg`` and further folders of defects. Half of the
good images are used for training.
"""

# %%
# Good pieces and bad ones
# ------------------------
# Crops of a brick wall that scikit-image ships. Defects are drawn into half of the test images:
# scratches, stains and a blurred spot. Test images are from the right half of the photograph.
import sys

import matplotlib.pyplot as plt
import numpy as np
from skimage import data, draw, filters
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.metrics import RocCurveDisplay, roc_auc_score
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor

rng = np.random.default_rng(0)
wall = data.brick()


def cut_crops(side, n_crops, size=80):
    y = rng.integers(wall.shape[0] - size, size=n_crops)
    x = side * 256 + rng.integers(256 - size, size=n_crops)
    return [wall[i : i + size, j : j + size].copy() for i, j in zip(y, x, strict=True)]


def damage(image, kind):
    """Draw a defect into a crop."""
    y, x = rng.integers(20, 60, size=2)
    if kind == "scratch":
        rows, columns = draw.line(y, x, *rng.integers(5, 75, size=2))
        for shift in range(4):
            image[rows, np.minimum(columns + shift, 79)] = 230
    elif kind == "stain":
        image[draw.disk((y, x), rng.integers(8, 14), shape=image.shape)] //= 2
    else:
        spot = draw.disk((y, x), 18, shape=image.shape)
        image[spot] = filters.gaussian(image, 4, preserve_range=True)[spot]


if len(sys.argv) > 1:
    from sktransfer.datasets import load_folder

    paths, kinds = (np.asarray(part) for part in load_folder(sys.argv[1]))
    good = rng.permutation(paths[kinds == "good"])
    X_train = list(good[: len(good) // 2])
    X_test = [*good[len(good) // 2 :], *paths[kinds != "good"]]
    kinds = np.array(["good"] * (len(good) - len(X_train)) + list(kinds[kinds != "good"]))
else:
    X_train, X_test = cut_crops(0, 150), cut_crops(1, 120)
    kinds = np.array(["good"] * 60 + ["scratch", "stain", "blur"] * 20)
    for image, kind in zip(X_test[60:], kinds[60:], strict=True):
        damage(image, kind)
is_defect = kinds != "good"

# %%
# Detectors
# ---------
# All are fitted on the columns of good images only. ``LedoitWolf`` gives the Mahalanobis distance
# from the mean of the good images. ``PCA`` keeps the 20
# directions in which they differ most.
network = make_pipeline(PretrainedFeatureExtractor(), StandardScaler())
columns_train, columns_test = network.fit_transform(X_train), network.transform(X_test)
distance = LedoitWolf().fit(columns_train)
detectors = {
    "IsolationForest": IsolationForest(random_state=0),
    "LocalOutlierFactor": LocalOutlierFactor(5, novelty=True),
    "LocalOutlierFactor, PCA": make_pipeline(
        PCA(20, random_state=0), LocalOutlierFactor(5, novelty=True)
    ),
}
scores = {"Mahalanobis distance": distance.mahalanobis(columns_test)}
for name, detector in detectors.items():
    scores[name] = -detector.fit(columns_train).decision_function(columns_test)
for name, score in scores.items():
    print(f"{name:23} area under the ROC curve {roc_auc_score(is_defect, score):.2f}")

# %%
# What they find
# --------------
# The numbers above the images are their ranks. The defects are small parts of each image, and the
# columns are means over the whole of it, so small defects are the hardest.
best = max(scores, key=lambda name: roc_auc_score(is_defect, scores[name]))
order = np.argsort(-scores[best])
figure = plt.figure(figsize=(10, 4.5), layout="constrained")
left, right = figure.subfigures(1, 2)
ax = left.subplots()
for name, score in scores.items():
    RocCurveDisplay.from_predictions(is_defect, score, name=name, ax=ax)
ax.legend(fontsize="small")
right.suptitle(f"Most and least unusual: {best}")
for ax, rank in zip(right.subplots(3, 4).flat, [*range(8), -4, -3, -2, -1], strict=True):
    image = X_test[order[rank]]
    ax.imshow(plt.imread(image) if isinstance(image, str) else image, cmap="gray", vmin=0, vmax=255)
    ax.set_title(f"{rank % len(order) + 1}: {kinds[order[rank]]}", fontsize="small")
    ax.axis("off")
plt.show()

# %%
# On 635 photographs of magnetic tiles without a defect and 262 with one (five kinds; a folder
# ``good`` holds those without), this script prints 0.86 for the Mahalanobis distance, 0.83 for
# LocalOutlierFactor, 0.77 for it after PCA and 0.73 for IsolationForest.
