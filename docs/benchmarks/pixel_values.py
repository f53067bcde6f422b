"""Accuracy on numbers that are not 8-bit images, before and after, against the 8-bit originals.

    python docs/benchmarks/pixel_values.py

Features of the built-in network, a scaler and logistic regression, cross-validated:
- digits: scikit-learn's, as floats within -0.5…0.5 (six classes, 360 rows, three folds);
- mri floats: scans of brain_mri enlarged by bicubic interpolation, which overshoots 0…1
  (30 images of each class, five folds);
- mri 12 bits: scans as 12-bit numbers in uint16, read with ``value_range=(0, 4095)``
  (60 images of each class, five folds).
"Before" is the rule that was: rounded to 0…255 where the numbers fit there, uint16 as 16 bits.
"""

import warnings

import numpy as np
from _report import data_set, save
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor


def accuracy(images, y, n_folds, **parameters):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the range of the numbers
        rows = PretrainedFeatureExtractor(memory=False, **parameters).fit_transform(images)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return cross_val_score(model, rows, y, cv=n_folds).mean()


def former(image):
    """Read an image by the rule that was."""
    if image.dtype == np.uint16:
        return (image >> 8).astype(np.uint8)
    low, high = image.min(), image.max()
    if low >= -0.5 / 255 and high <= 1 + 0.5 / 255:
        return np.rint(image * 255).clip(0, 255).astype(np.uint8)
    if low >= -0.5 and high <= 255.5:
        return np.rint(image).clip(0, 255).astype(np.uint8)
    return np.rint((image - low) / (high - low) * 255).astype(np.uint8)


def scans(n_per_class):
    folders = sorted((data_set("brain_mri") / "train").iterdir())
    paths = [path for folder in folders for path in sorted(folder.glob("*.jpg"))[:n_per_class]]
    images = [np.asarray(Image.open(path).convert("L")) for path in paths]
    return images, np.repeat(np.arange(len(folders)), n_per_class)


def enlarged(image):
    """Floats that overshoot 0…1 at edges."""
    floats = Image.fromarray(image.astype(np.float32) / 255)
    return np.asarray(floats.resize((2 * image.shape[1], 2 * image.shape[0]), Image.BICUBIC))


def figures(originals, images, y, n_folds, **parameters):
    return {
        "8-bit original": accuracy(originals, y, n_folds),
        "before": accuracy([former(image) for image in images], y, n_folds),
        "after": accuracy(images, y, n_folds, **parameters),
    }


def main():
    X, y = load_digits(n_class=6, return_X_y=True)
    digits, y = X[:360].reshape(-1, 8, 8) / 16, y[:360]
    found = {"digits": figures(list(digits), list(digits - 0.5), y, 3)}

    images, y = scans(30)
    floats = [enlarged(image) for image in images]
    originals = [np.rint(image.clip(0, 1) * 255).astype(np.uint8) for image in floats]
    found["mri floats"] = figures(originals, floats, y, 5)
    found["mri floats"]["range"] = [min(x.min() for x in floats), max(x.max() for x in floats)]

    images, y = scans(60)
    twelve_bits = [np.rint(image * (4095 / 255)).astype(np.uint16) for image in images]
    found["mri 12 bits"] = figures(images, twelve_bits, y, 5, value_range=(0, 4095))

    for name, row in found.items():
        print(f"{name:12}", *(f"{key}: {np.round(value, 3)}" for key, value in row.items()))
    save("pixel_values", found)


if __name__ == "__main__":
    main()
