"""
Medical images: 12 bits, few positives, probabilities
=====================================================

Scanners write 10, 12 or 14 bits into 16, lesions are rare, and a doctor needs a probability that
means what it says. ``value_range``, ``class_weight`` and ``CalibratedClassifierCV`` take care of
these.

Give a folder of your images, ``FOLDER/CLASS/*.png``, as an argument; the class with the fewest
images is taken for the positive one.
"""

# %%
# Scans of 12 bits
# ----------------
# Each drawn scan is a disc of tissue in 0…4095, and one in eight has a small bright lesion.
import sys

import matplotlib.pyplot as plt
import numpy as np
from skimage import draw, filters
from sklearn.calibration import CalibratedClassifierCV, CalibrationDisplay
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import PrecisionRecallDisplay, average_precision_score, brier_score_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor

rng = np.random.default_rng(0)


def draw_scan(has_lesion, size=96):
    tissue = filters.gaussian(rng.normal(0, 1, (size, size)), 3)
    scan = 500 + 220 * tissue / tissue.std()
    scan[draw.disk((48, 48), rng.integers(36, 44), shape=scan.shape)] += 600
    if has_lesion:
        y, x = 48 + rng.integers(-18, 19, size=2)
        lesion = np.zeros_like(scan)
        lesion[draw.ellipse(y, x, *rng.integers(5, 9, size=2), shape=scan.shape)] = 1
        scan += rng.uniform(500, 1100) * filters.gaussian(lesion, 1.5)
    return (scan + rng.normal(0, 60, scan.shape)).clip(0, 4095).astype("uint16")


if len(sys.argv) > 1:
    from sktransfer.datasets import load_folder

    images, labels = load_folder(sys.argv[1])
    names, counts = np.unique(labels, return_counts=True)
    y = np.asarray(labels) == names[counts.argmin()]
    value_ranges = [None]
else:
    y = rng.random(600) < 1 / 8
    images = [draw_scan(has_lesion) for has_lesion in y]
    value_ranges = [(0, 65535), (0, 4095)]
print(f"{len(y)} images, {y.mean():.0%} of them positive")

# %%
# The range of the numbers
# ------------------------
# Read as 16 bits, numbers below 4096 are nearly black; the extractor warns of it unless the range
# is given. ``value_range`` says which numbers are black and white. Four classes of real MRI scans
# of 12 bits were predicted with an accuracy of 85.0 % read as 16 bits, and of 91.7 % with
# ``value_range=(0, 4095)`` (``docs/benchmarks/pixel_values.py``).
#
# Accuracy says little where seven of eight images are negative, so the precision at each recall
# is drawn. With ``class_weight="balanced"`` a lesion counts as much as seven other scans.
folds = StratifiedKFold(5, shuffle=True, random_state=0)
scores = {}
for value_range in value_ranges:
    model = make_pipeline(
        PretrainedFeatureExtractor(value_range=value_range),
        StandardScaler(),
        LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000),
    )
    score = cross_val_predict(model, images, y, cv=folds, method="predict_proba")[:, 1]
    scores[f"value_range={value_range}"] = score
    print(f"{value_range}: average precision {average_precision_score(y, score):.2f}")

# %%
# Probabilities
# -------------
# Balanced weights make lesions look too frequent. ``CalibratedClassifierCV`` fits the
# probabilities on folds of the training part, and a score of 0.2 then means two lesions in ten
# such scans.
calibrated = CalibratedClassifierCV(model, cv=3)
probability = cross_val_predict(calibrated, images, y, cv=folds, method="predict_proba")[:, 1]
figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
for name, values in scores.items():
    PrecisionRecallDisplay.from_predictions(y, values, name=name, ax=axes[1])
for name, values in {"balanced weights": score, "calibrated": probability}.items():
    print(f"{name:18} Brier score {brier_score_loss(y, values):.3f}")
    options = {"n_bins": 6, "strategy": "quantile", "name": name, "ax": axes[2]}
    CalibrationDisplay.from_predictions(y, values, **options)

surest = images[int(np.argmax(score * y))]
surest = plt.imread(surest) if isinstance(surest, str) else surest
axes[0].imshow(surest, cmap="gray")
axes[0].set(title="The surest lesion", xticks=[], yticks=[])
axes[1].set(title="Precision and recall", xlabel="recall", ylabel="precision")
axes[2].set(title="Calibration", xlabel="mean predicted probability", ylabel="share of lesions")
for ax in axes[1:]:
    ax.legend(fontsize="small")
plt.show()
