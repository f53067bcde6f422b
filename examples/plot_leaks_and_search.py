"""
Leaks, near-duplicates and image search
=======================================

Collections hold the same image more than once: re-saved, resized, cropped or mirrored. If one
copy is in the training set and another in the test set, the score is too high.
:func:`~sktransfer.transferability.find_leaks` lists such pairs, and the columns behind it find
the images most like a given one.

Give a folder of your images, ``FOLDER/CLASS/*.jpg``, as an argument to search in them.
"""

# %%
# A collection with copies
# ------------------------
# 160 parts of photographs that scikit-image ships. Sixty of them are put into the collection once
# more, each changed in one way.
import io
import sys

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage import data
from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

from sktransfer import PretrainedFeatureExtractor
from sktransfer.inspection import LeaksDisplay, NeighborsDisplay
from sktransfer.transferability import find_leaks

NAMES = ["astronaut", "brick", "coffee", "grass", "gravel", "hubble_deep_field", "retina", "rocket"]
rng = np.random.default_rng(0)


def resaved(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "jpeg", quality=60)
    return np.asarray(Image.open(stream))


def halved(image):
    return np.asarray(Image.fromarray(image).resize((48, 48)))


def mirrored(image):
    return image[:, ::-1]


def cropped(image):
    return image[8:88, 10:90]


if len(sys.argv) > 1:
    from sktransfer.datasets import load_folder

    X, y = load_folder(sys.argv[1])
    X, y = list(X), np.asarray(y)
else:
    X, y = [], []
    for name in NAMES:
        photo = getattr(data, name)()
        for k in range(20):
            top = k // 5 * (photo.shape[0] // 4) + rng.integers(photo.shape[0] // 4 - 95)
            left = k % 5 * (photo.shape[1] // 5)
            X.append(photo[top : top + 96, left : left + 96])
            y.append(name)
    copied = rng.choice(len(X), 60, replace=False)
    changes = [resaved, halved, mirrored, cropped]
    X += [changes[i % len(changes)](X[row]) for i, row in enumerate(copied)]
    y = np.array(y + [y[row] for row in copied])

# %%
# The pairs
# ---------
# Given one set, the function compares it with itself; given two, a test set with a training set.
leaks = find_leaks(X)
print(f"{len(leaks.table_)} pairs")
print(leaks.table_["kind"].value_counts())
LeaksDisplay.from_leaks(leaks, X, n_pairs=12)
plt.show()

# %%
# What they do to a score
# -----------------------
# ``groups_`` has one number for images that are connected by pairs. With ``GroupKFold`` they stay
# together. In a real set of magnetic tiles, photographed several times each, 97 % of the test
# images of a random split were pairs of training images (``docs/benchmarks/leaks.py``).
model = make_pipeline(PretrainedFeatureExtractor(), KNeighborsClassifier(1))
random_split = StratifiedKFold(4, shuffle=True, random_state=0)
grouped = GroupKFold(4, shuffle=True, random_state=0)
print(f"random folds:  {cross_val_score(model, X, y, cv=random_split).mean():.3f}")
print(f"grouped folds: {cross_val_score(model, X, y, cv=grouped, groups=leaks.groups_).mean():.3f}")

# %%
# Image search
# ------------
# The images nearest to four others, by the angle between their columns.
queries = list(range(5, len(X), len(X) // 4))[:4]
rest = [row for row in range(len(X)) if row not in queries]
NeighborsDisplay.from_estimator(
    PretrainedFeatureExtractor(),
    [X[row] for row in rest],
    [X[row] for row in queries],
    y_train=y[rest],
    n_neighbors=5,
)
plt.show()
