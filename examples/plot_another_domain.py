"""
Another domain
==============

A model that learned on the images of one camera often fails on those of another. If images of the
new domain are there, even without labels, scaling the columns of each domain by itself removes
much of the shift.

Give two folders, ``OLD/CLASS/*.jpg`` and ``NEW/CLASS/*.jpg``, as arguments to compare real
domains.
"""

# %%
# Two cameras
# -----------
# Crops of photographs that scikit-image ships. The second camera is out of focus, its contrast is
# low and its colours are warm. Its crops are from other halves of the photographs.
import sys

import matplotlib.pyplot as plt
import numpy as np
from skimage import color, data, filters
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor

NAMES = [
    "astronaut",
    "brick",
    "coffee",
    "grass",
    "gravel",
    "immunohistochemistry",
    "retina",
    "rocket",
]
rng = np.random.default_rng(0)


def cut_crops(side, n_crops=40, size=80):
    """Return crops of the left (0) or the right (1) half of each photograph, and their names."""
    crops = []
    for name in NAMES:
        photo = getattr(data, name)()
        photo = color.gray2rgb(photo) if photo.ndim == 2 else photo
        half = photo.shape[1] // 2
        for _ in range(n_crops):
            y = rng.integers(photo.shape[0] - size)
            x = side * half + rng.integers(half - size)
            crops.append(photo[y : y + size, x : x + size])
    return np.stack(crops), np.repeat(NAMES, n_crops)


def second_camera(image):
    image = filters.gaussian(image, 1.2, channel_axis=-1, preserve_range=True)
    return (70 + 0.4 * image * (1.1, 0.9, 0.6) + rng.normal(0, 6, image.shape)).astype("uint8")


if len(sys.argv) > 2:
    from sktransfer.datasets import load_folder

    (X_old, y_old), (X_new, y_new) = load_folder(sys.argv[1]), load_folder(sys.argv[2])
else:
    (X_old, y_old), (X_new, y_new) = cut_crops(0), cut_crops(1)
    X_new = [second_camera(image) for image in X_new]

# %%
# Scaled together or apart
# ------------------------
# The classifier learns on the old domain and predicts the new one. Only the scaling differs, and
# it uses no label of the new domain. It assumes that both domains have about the same share of
# each class.
extractor = PretrainedFeatureExtractor()
old, new = extractor.fit_transform(X_old), extractor.transform(X_new)
scaler = StandardScaler().fit(old)
columns = {
    "scaled by the old domain": (scaler.transform(old), scaler.transform(new)),
    "each domain scaled by itself": (scaler.transform(old), StandardScaler().fit_transform(new)),
}
scores = {}
for name, (train, test) in columns.items():
    model = LogisticRegression(C=0.01, max_iter=1000).fit(train, y_old)
    scores[name] = model.score(test, y_new)
    print(f"{name:30} accuracy in the new domain {scores[name]:.2f}")

# %%
# The shift, and what is left of it
# ---------------------------------
# The first two principal components of both domains: scaled apart, the domains lie on top of each
# other, and the classes stay apart.
figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
for ax, (name, (train, test)) in zip(axes, columns.items(), strict=True):
    plane = PCA(2, random_state=0).fit(np.vstack([train, test]))
    classes = np.unique(y_old)
    for points, labels, marker in (
        (plane.transform(train), y_old, "o"),
        (plane.transform(test), y_new, "x"),
    ):
        codes = np.searchsorted(classes, labels)
        ax.scatter(*points.T, c=codes, cmap="tab10", vmax=10, marker=marker, s=18, alpha=0.7)
    ax.set(title=f"{name}: accuracy {scores[name]:.2f}", xticks=[], yticks=[])
axes[0].scatter([], [], c="k", marker="o", label="old domain")
axes[0].scatter([], [], c="k", marker="x", label="new domain")
axes[0].legend()
plt.show()

# %%
# From 2000 digits of USPS to 2000 of MNIST, accuracy rises from 0.58 to 0.76 with each domain
# scaled by itself, and from 0.59 to 0.85 the other way round. On brain scans whose test folder is
# of another source it does not help: 0.43 and 0.42.
