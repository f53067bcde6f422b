"""
What a model gets wrong, and where it looks
===========================================

A good score in cross-validation can have the wrong reason. Here all images of one class carry the
mark of an archive, and the model learns the mark. Its most confident mistakes on other images and
a saliency map show it.

Give a folder of your images, ``FOLDER/CLASS/*.jpg``, as an argument to look at your own model.
"""

# %%
# A mark in one class
# -------------------
# The images are crops of photographs that scikit-image ships, in grey. In the training set the
# mark is in a corner of each crop of the cat. The test crops are from the other halves of the
# photographs, and the mark is on half of them, of any class.
import sys

import matplotlib.pyplot as plt
import numpy as np
from skimage import color, data
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor
from sktransfer.inspection import SaliencyDisplay, TopLossesDisplay

NAMES = ["astronaut", "camera", "cat", "coffee"]
rng = np.random.default_rng(0)


def cut_crops(side, n_crops=40, size=80):
    """Return crops of the left (0) or the right (1) half of each photograph, and their names."""
    crops = []
    for name in NAMES:
        photo = getattr(data, name)()
        photo = (color.rgb2gray(photo) * 255 if photo.ndim == 3 else photo).astype("uint8")
        half = photo.shape[1] // 2
        for _ in range(n_crops):
            y = rng.integers(photo.shape[0] - size)
            x = side * half + rng.integers(half - size)
            crops.append(photo[y : y + size, x : x + size])
    return np.stack(crops), np.repeat(NAMES, n_crops)


if len(sys.argv) > 1:
    from sktransfer.datasets import load_folder

    X, y = (np.asarray(part) for part in load_folder(sys.argv[1]))
    X_train, X_test, y_train, y_test = train_test_split(X, y, stratify=y, random_state=0)
else:
    (X_train, y_train), (X_test, y_test) = cut_crops(0), cut_crops(1)
    mark = np.kron(np.indices((2, 4)).sum(axis=0) % 2 * 255, np.ones((8, 8)))
    X_train[y_train == "cat", 4:20, 4:36] = mark
    X_test[::2, 4:20, 4:36] = mark

# %%
# A score that looks good
# -----------------------
model = make_pipeline(
    PretrainedFeatureExtractor(), StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)
)
print(f"cross-validation: {cross_val_score(model, X_train, y_train).mean():.2f}")
print(f"test images:      {model.fit(X_train, y_train).score(X_test, y_test):.2f}")

# %%
# The mistakes the model is most confident of
# -------------------------------------------
# Almost all are marked images that the model takes for the cat. On your own data, look for wrong
# labels here first.
mistakes = TopLossesDisplay.from_estimator(model, X_test, y_test, n_images=8)
plt.show()

# %%
# Where it looks
# --------------
# A window hides each part of an image in turn. Where the probability of the predicted class
# falls, the prediction depends on that part: on the mark.
SaliencyDisplay.from_estimator(model, [X_test[row] for row in mistakes.rows[:6]], n_patches=5)
plt.show()
