"""What ``class_weight`` makes of the rows' weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sktransfer.fine_tuning._targets import shown


def class_weights(class_weight: Mapping[Any, float], classes: np.ndarray) -> np.ndarray:
    """The weight of each class, 1 where none is given; impossible ones are an error.

    As scikit-learn's compute_class_weight, which takes no other objects than strings.
    """
    missing = [shown(label) for label in classes if label not in class_weight]
    if missing and len(classes) - len(missing) != len(class_weight):
        raise ValueError(f"The classes, {missing}, are not in class_weight")
    weights = np.array([class_weight.get(label, 1) for label in classes], dtype=np.float64)
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(
            f"class_weight={class_weight!r} gives the classes {[shown(c) for c in classes[:20]]} "
            f"the weights {weights[:20].tolist()}: none may be negative, NaN or infinite, and not "
            "all zero."
        )
    return weights


def balanced_factors(codes: np.ndarray, weight: np.ndarray, n_classes: int) -> np.ndarray:
    """Each row's factor by "balanced", with weights counted as rows.

    n / (number of classes that there are · n of the class), as in scikit-learn.
    """
    counts = np.bincount(codes, weights=weight, minlength=n_classes)
    is_there = counts > 0
    factors = counts.sum() / (is_there.sum() * np.where(is_there, counts, 1.0))
    return factors[codes]
