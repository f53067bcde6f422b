"""
A search over network, layer and classifier
===========================================

The network, its layer and the classifier behind it are parameters of one pipeline, so a grid
search compares them all. Two questions about the same images show that the best layer depends on
the task.

Give a folder of your images, ``FOLDER/CLASS/*.jpg``, as an argument to search on them instead.
"""

# %%
# Two tasks
# ---------
# The images are crops of photographs that scikit-image ships, in grey, each blurred a little,
# more or not at all. *What is it?* asks which photograph a crop is from. *How sharp is it?* asks
# for the blur. Crops of a fold's test part are from a quarter of the photograph that no training
# crop touches.
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from skimage import color, data, filters
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor

NAMES = [
    "astronaut",
    "brick",
    "camera",
    "coffee",
    "grass",
    "gravel",
    "immunohistochemistry",
    "moon",
]

rng = np.random.default_rng(0)
images, what, sharpness, quarters = [], [], [], []
for name in NAMES:
    photo = getattr(data, name)()
    photo = (color.rgb2gray(photo) * 255 if photo.ndim == 3 else photo).astype("uint8")
    height, width = photo.shape[0] // 2, photo.shape[1] // 2
    for k in range(40):
        quarter, blur = k % 4, int(rng.integers(3))
        y = quarter // 2 * height + rng.integers(height - 80)
        x = quarter % 2 * width + rng.integers(width - 80)
        crop = filters.gaussian(photo[y : y + 80, x : x + 80], 0.8 * blur, preserve_range=True)
        images.append(crop.astype("uint8"))
        what.append(name)
        sharpness.append(["sharp", "soft", "blurred"][blur])
        quarters.append(quarter)
tasks = {"what is it?": (images, what), "how sharp is it?": (images, sharpness)}
folds = GroupKFold(4)
if len(sys.argv) > 1:
    from sktransfer.datasets import load_folder

    tasks = {"your classes": load_folder(sys.argv[1])}
    quarters, folds = None, 4

# %%
# The search
# ----------
# ``weights`` compares the pre-trained network with itself at random weights; with a network
# connection, add ``"network__backbone": ["builtin", "resnet18"]``. With ``cache_layers`` one pass
# of an image through the network computes all layers of the grid, and no fold or candidate
# computes them again. In a measured search (``docs/benchmarks/grid_search.py``) of 400 images
# with 5 folds and 10 candidates, the network saw each image once; without the store the search
# took 9.9 times as long.
layers = ["stem", "stage1", "stage2", "stage3", "stage4"]
grid = {
    "network__weights": ["DEFAULT", None],
    "network__layer": layers,
    "classifier": [RidgeClassifier(alpha=1000), KNeighborsClassifier(5)],
}
model = Pipeline(
    [
        ("network", PretrainedFeatureExtractor(cache_layers=layers)),
        ("scaler", StandardScaler()),
        ("classifier", RidgeClassifier()),
    ]
)
searches = {}
for task, (X, y) in tasks.items():
    searches[task] = search = GridSearchCV(model, grid, cv=folds).fit(X, y, groups=quarters)
    print(f"{task:18} {search.best_score_:.2f} with {search.best_params_}")

# %%
# Which layer for which task
# --------------------------
# Lower layers see edges and their sharpness, higher layers see what is in the image and lose
# details.
size = (2.5 + 3.5 * len(tasks), 3.5)
figure, axes = plt.subplots(
    1, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained"
)
for ax, (task, search) in zip(axes.flat, searches.items(), strict=True):
    table = pd.DataFrame(search.cv_results_)
    is_random = table["param_network__weights"].isna()
    kind = table["param_classifier"].map(lambda model: type(model).__name__)
    for color_name, name in (("C0", "RidgeClassifier"), ("C1", "KNeighborsClassifier")):
        for style, rows, start in (("-", ~is_random, "pre-trained"), (":", is_random, "random")):
            curve = table[rows & (kind == name)]
            x, score = curve["param_network__layer"], curve["mean_test_score"]
            ax.plot(x, score, style, marker="o", color=color_name, label=f"{start}, {name}")
    ax.set(title=task, xlabel="layer")
axes[0, 0].set_ylabel("accuracy in cross-validation")
axes[0, -1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
