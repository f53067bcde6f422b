"""What ``y`` may be, and the numbers a network is trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_consistent_length, column_or_1d


def check_y_given(y: Any, class_name: str, name: str = "y") -> None:
    """Refuse a missing ``y`` in scikit-learn's words, and what has no rows."""
    if y is None:
        raise ValueError(
            f"This {class_name} estimator requires y to be passed, but the target y is None."
        )
    _check_has_rows(y, name)


def read_labels(y: Any, n_rows: int, name: str = "y") -> tuple[np.ndarray, bool]:
    """Labels as an array, and whether they are an indicator matrix of several labels.

    Raises
    ------
    ValueError
        For continuous targets, missing labels, labels of a wrong number or several outputs that
        are no indicator matrix.
    """
    labels = _as_array(y)
    _check_none_missing(labels, name)
    if labels.ndim == 2 and labels.shape[1] > 1:
        # A data frame of several dtypes is an array of objects.
        if labels.dtype.kind not in "biufO" or not np.isin(labels, (0, 1)).all():
            raise ValueError(
                f"{name} has shape {labels.shape} and is no indicator matrix of 0 and 1. Unknown "
                "label type: give one label per row, or a 0/1 column per label."
            )
        check_length(labels, n_rows, name)
        return labels.astype(np.int64), True
    labels = column_or_1d(labels, warn=True)
    check_length(labels, n_rows, name)
    _check_discrete(labels, name)
    return labels, False


def read_classes(classes: Any) -> np.ndarray:
    """What is given as the classes of all calls, in order."""
    _check_has_rows(classes, "classes")
    labels = _as_array(classes).ravel()
    _check_none_missing(labels, "classes")
    return sorted_classes(labels, "classes")


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


def sorted_classes(labels: np.ndarray, name: str = "y") -> np.ndarray:
    """The classes in order, for labels of any one type."""
    if labels.dtype.kind != "O":
        return np.unique(labels)
    try:
        return np.fromiter(sorted(set(labels)), dtype=object)
    except TypeError as error:
        kinds = sorted({type(label).__name__ for label in labels})
        raise TypeError(
            f"{name} holds labels of the types {kinds}, which cannot be brought into an order. "
            f"Give all of one type that can be sorted and hashed, such as str: [str(label) for "
            f"label in {name}]."
        ) from error


def codes_of(labels: np.ndarray, classes: np.ndarray, name: str = "y") -> np.ndarray:
    """Position of each label in the sorted `classes`."""
    positions = {label: code for code, label in enumerate(_comparable(classes, labels))}
    codes = np.array([positions.get(label, -1) for label in _comparable(labels, classes)], int)
    if (codes < 0).any():
        row = int(np.flatnonzero(codes < 0)[0])
        raise ValueError(
            f"{name} holds the label {shown(labels[row])!r} in row {row}, which is not one of the "
            f"classes {[shown(c) for c in classes[:20]]}. Labels of validation rows and of later "
            "calls must be among the classes of the first fit; partial_fit takes them as `classes`."
        )
    return codes


def are_strings(labels: np.ndarray) -> bool:
    """Whether an array of objects holds strings alone."""
    return all(isinstance(label, str) for label in labels.flat)


def shown(label: Any) -> Any:
    """A label as it is written, without NumPy's type around it."""
    is_time = isinstance(label, (np.datetime64, np.timedelta64))  # of them it makes numbers
    return str(label) if is_time else label.item() if isinstance(label, np.generic) else label


def _check_has_rows(y: Any, name: str) -> None:
    ndim = y.ndim if hasattr(y, "ndim") else np.asarray(y).ndim
    if ndim == 0:  # a generator, a set, a dict, a string, a number
        raise ValueError(
            f"{name} should be a 1d array, got {type(y).__name__}, which has no rows: give a list, "
            "an array or a Series."
        )


def _as_array(y: Any) -> np.ndarray:
    """An array whose labels are those of `y`, each of its own type."""
    if hasattr(y, "toarray"):  # scipy sparse indicator
        return y.toarray()
    labels = np.asarray(y)
    if isinstance(y, (list, tuple)) and labels.dtype.kind == "U":
        # NumPy makes strings of numbers, and of NaN, that stand among strings.
        objects = np.asarray(y, dtype=object)
        return labels if are_strings(objects) else objects
    return labels


def _check_none_missing(labels: np.ndarray, name: str) -> None:
    kind = labels.dtype.kind
    if kind in "fc":
        is_missing = np.isnan(labels)
    elif kind in "mM":
        is_missing = np.isnat(labels)
    elif kind == "O":
        found = [_is_missing(label) for label in labels.flat]
        is_missing = np.array(found, dtype=bool).reshape(labels.shape)
    else:
        return
    if is_missing.any():
        where = tuple(np.argwhere(is_missing)[0])
        raise ValueError(
            f"Input {name} contains NaN or None: the label of row {where[0]} is {labels[where]}. "
            "Every row needs a label; leave out those without."
        )


def _is_missing(label: Any) -> bool:
    # Of pandas' NA nobody can say whether it is itself.
    return label is None or type(label).__name__ == "NAType" or bool(label != label)


def _check_discrete(labels: np.ndarray, name: str) -> None:
    """Refuse numbers with fractions and infinity, in scikit-learn's words.

    Objects that scikit-learn knows no name for (dates, periods, numbers as objects) are labels.
    """
    if labels.dtype.kind == "O" and not are_strings(labels):
        labels = np.array([x for x in labels if isinstance(x, (float, np.floating))], dtype=float)
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        check_array(labels, ensure_2d=False, dtype=None, input_name=name)
    if len(labels):
        check_classification_targets(labels)


def _comparable(labels: np.ndarray, others: np.ndarray) -> list[Any]:
    """Python's own labels; of two arrays of times the ticks of one unit."""
    if labels.dtype.kind in "mM" and labels.dtype.kind == others.dtype.kind:
        return labels.astype(np.promote_types(labels.dtype, others.dtype)).astype(int).tolist()
    return labels.tolist()
