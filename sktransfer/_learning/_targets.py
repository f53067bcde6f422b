"""What ``y`` may be, and the numbers a network is trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_array, check_consistent_length, column_or_1d


def check_y_given(y: Any, class_name: str) -> None:
    """Refuse a missing ``y`` in scikit-learn's words."""
    if y is None:
        raise ValueError(
            f"This {class_name} estimator requires y to be passed, but the target y is None."
        )


def read_labels(y: Any, n_rows: int, name: str = "y") -> tuple[np.ndarray, bool]:
    """Labels as an array, and whether they are an indicator matrix of several labels.

    Raises
    ------
    ValueError
        For continuous targets, missing labels, labels of a wrong number or several outputs that
        are no indicator matrix.
    """
    if hasattr(y, "toarray"):  # scipy sparse indicator
        y = y.toarray()
    labels = np.asarray(y)
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        check_array(labels, ensure_2d=False, dtype=None, input_name=name)
    if labels.dtype.kind == "O":
        for row, label in enumerate(labels.reshape(len(labels), -1)[:, 0] if labels.size else []):
            if label is None or label != label or type(label).__name__ == "NAType":
                raise ValueError(
                    f"Input {name} contains NaN or None: the label of row {row} is {label!r}. "
                    "Every row needs a label; leave out those without."
                )
    if labels.ndim == 2 and labels.shape[1] > 1:
        is_indicator = type_of_target(labels, input_name=name) == "multilabel-indicator"
        if not is_indicator or not np.isin(labels, (0, 1)).all():
            raise ValueError(
                f"{name} has shape {labels.shape} and is no indicator matrix of 0 and 1. Unknown "
                "label type: give one label per row, or a 0/1 column per label."
            )
        check_length(labels, n_rows, name)
        return labels.astype(np.int64), True
    labels = column_or_1d(y, warn=True)
    check_length(labels, n_rows, name)
    check_classification_targets(labels)
    return labels, False


def read_numbers(y: Any, n_rows: int, name: str = "y") -> np.ndarray:
    """Regression targets, float64: (n,) or (n, n_targets)."""
    target = check_array(y, ensure_2d=False, dtype="numeric", input_name=name)
    if target.ndim == 2 and target.shape[1] == 1:
        target = column_or_1d(target, warn=True)
    check_length(target, n_rows, name)
    return np.asarray(target, dtype=np.float64)


def check_length(y: np.ndarray, n_rows: int, name: str) -> None:
    """One target per row of images."""
    if len(y) != n_rows:
        check_consistent_length(np.empty(n_rows), y)


def sorted_classes(labels: np.ndarray) -> np.ndarray:
    """The classes in order, for labels of any one type."""
    try:
        return np.unique(labels)
    except TypeError as error:
        kinds = sorted({type(label).__name__ for label in labels})
        raise TypeError(
            f"y holds labels of several types, {kinds}, which have no order. Give all of one "
            "type, such as y.astype(str)."
        ) from error


def codes_of(labels: np.ndarray, classes: np.ndarray, name: str = "y") -> np.ndarray:
    """Position of each label in the sorted `classes`."""
    known = np.isin(labels, classes)
    if not known.all():
        row = int(np.flatnonzero(~known)[0])
        raise ValueError(
            f"{name} holds the label {shown(labels[row])!r} in row {row}, which is not one of the "
            f"classes {classes[:20].tolist()}. Labels of validation rows and of later calls must "
            "be among the classes of the first fit; partial_fit takes them as `classes`."
        )
    return np.searchsorted(classes, labels).astype(np.int64)


def class_factors(
    class_weight: Any, classes: np.ndarray, codes: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Each row's factor by ``class_weight``, "balanced" counting weights as rows.

    ``"balanced"``: n / (n_classes · n of the class), as in scikit-learn.
    """
    if class_weight is None:
        return np.ones(len(codes))
    if isinstance(class_weight, str):
        counts = np.bincount(codes, weights=weight, minlength=len(classes))
        n_present = (counts > 0).sum()
        factors = counts.sum() / (n_present * np.where(counts > 0, counts, 1.0))
    else:
        factors = compute_class_weight(class_weight, classes=classes, y=classes[codes])
    if not (factors[codes] >= 0).all() or not factors[codes].any():
        raise ValueError(
            f"class_weight={class_weight!r} gives the classes {classes[:20].tolist()} the weights "
            f"{factors[:20].tolist()}: none may be negative, and not all zero."
        )
    return factors[codes]


def shown(label: Any) -> Any:
    """A label as it is written, without NumPy's type around it."""
    return label.item() if isinstance(label, np.generic) else label
