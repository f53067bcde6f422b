"""From ``y`` and ``class_weight`` to the numbers that a network is trained on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_consistent_length, column_or_1d


def check_y_given(y: object, class_name: str, name: str = "y") -> None:
    """Raise ValueError for a missing ``y``, in scikit-learn's words, or one without rows."""
    if y is None:
        raise ValueError(
            f"This {class_name} estimator requires y to be passed, but the target y is None."
        )
    _check_has_rows(y, name)


def read_labels(y: npt.ArrayLike, n_rows: int, name: str = "y") -> tuple[np.ndarray, bool]:
    """Labels as an array, and whether they are an indicator matrix of several labels.

    Raises
    ------
    ValueError
        For continuous targets, missing labels, a wrong number of labels, or several columns that
        do not hold 0 and 1.
    """
    labels = _as_array(y)
    _check_none_missing(labels, name)
    if labels.ndim == 2 and labels.shape[1] > 1:
        # A data frame of several dtypes is an array of objects.
        if labels.dtype.kind not in "biufO" or not np.isin(labels, (0, 1)).all():
            raise ValueError(
                f"{name} has shape {labels.shape} and is not an indicator matrix of 0 and 1. "
                "Unknown label type: give one label per row, or a 0/1 column per label."
            )
        check_consistent_length(np.empty(n_rows), labels)
        return labels.astype(np.int64), True
    labels = column_or_1d(labels, warn=True)
    check_consistent_length(np.empty(n_rows), labels)
    _check_discrete(labels, name)
    return labels, False


def read_classes(classes: npt.ArrayLike) -> np.ndarray:
    """The parameter ``classes`` of partial_fit, sorted."""
    _check_has_rows(classes, "classes")
    labels = _as_array(classes).ravel()
    _check_none_missing(labels, "classes")
    return sorted_classes(labels, "classes")


def read_numbers(y: npt.ArrayLike, n_rows: int, name: str = "y") -> np.ndarray:
    """Regression targets, float64: (n,) or (n, n_targets)."""
    target = check_array(y, ensure_2d=False, dtype="numeric", input_name=name)
    if target.ndim == 2 and target.shape[1] == 1:
        target = column_or_1d(target, warn=True)
    check_consistent_length(np.empty(n_rows), target)
    return np.asarray(target, dtype=np.float64)


def sorted_classes(labels: np.ndarray, name: str = "y") -> np.ndarray:
    """The different labels in order; all must be of one type that can be sorted."""
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


def shown(label: object) -> object:
    """A label for messages, without NumPy's type around it."""
    is_time = isinstance(label, (np.datetime64, np.timedelta64))  # `item` makes them numbers
    return str(label) if is_time else label.item() if isinstance(label, np.generic) else label


def _check_has_rows(y: object, name: str) -> None:
    ndim = y.ndim if hasattr(y, "ndim") else np.asarray(y).ndim
    if ndim == 0:  # a generator, a set, a dict, a string, a number
        raise ValueError(
            f"{name} should be a 1d array, got {type(y).__name__}, which has no rows: give a list, "
            "an array or a Series."
        )


def _as_array(y: npt.ArrayLike) -> np.ndarray:
    """The labels of `y` as an array, each of its own type."""
    if hasattr(y, "toarray"):  # scipy sparse indicator
        return y.toarray()
    labels = np.asarray(y)
    if isinstance(y, (list, tuple)) and labels.dtype.kind == "U":
        # NumPy turns numbers and NaN among strings into strings.
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


def _is_missing(label: object) -> bool:
    # pandas' NA compares as NA, not as a boolean.
    return label is None or type(label).__name__ == "NAType" or bool(label != label)


def _check_discrete(labels: np.ndarray, name: str) -> None:
    """Raise ValueError for numbers with fractions and infinity, in scikit-learn's words.

    Objects of types that scikit-learn does not know (dates, periods) are accepted as labels.
    """
    if labels.dtype.kind == "O" and not are_strings(labels):
        labels = np.array([x for x in labels if isinstance(x, (float, np.floating))], dtype=float)
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        check_array(labels, ensure_2d=False, dtype=None, input_name=name)
    if len(labels):
        check_classification_targets(labels)


def _comparable(labels: np.ndarray, others: np.ndarray) -> list:
    """Labels as Python objects; times of two arrays as numbers in one unit."""
    if labels.dtype.kind in "mM" and labels.dtype.kind == others.dtype.kind:
        return labels.astype(np.promote_types(labels.dtype, others.dtype)).astype(int).tolist()
    return labels.tolist()


def check_class_weight(class_weight: Mapping | str | None, classes, is_multilabel: bool) -> None:
    """Raise ValueError for a ``class_weight`` that does not fit the classes."""
    if isinstance(class_weight, Mapping):
        if is_multilabel:
            raise ValueError(
                f"class_weight={class_weight!r} with several labels per row: only 'balanced' and "
                "None are accepted; give sample_weight for anything else."
            )
        _class_weights(class_weight, classes)


def class_factors(
    class_weight: Mapping | str | None, classes: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> np.ndarray | float:
    """What ``class_weight`` multiplies the rows' weights by."""
    if class_weight is None:
        return 1.0
    if target.ndim > 1:
        # As scikit-learn's compute_sample_weight: the product over the labels.
        columns = target.astype(np.int64).T
        return np.prod([_balanced_factors(c, weight, 2) for c in columns], axis=0)
    if not isinstance(class_weight, Mapping):
        return _balanced_factors(target, weight, len(classes))
    factors = _class_weights(class_weight, classes)[target]
    if not factors.any():
        alone = [shown(label) for label in classes[np.unique(target)]]
        raise ValueError(
            f"class_weight={class_weight!r} leaves nothing to train on or to validate on: all "
            f"rows are of the classes {alone}, whose weight is 0. Add rows of other classes, or "
            "leave these out."
        )
    return factors


def _class_weights(class_weight: Mapping, classes: np.ndarray) -> np.ndarray:
    """The weight of each class, 1 where `class_weight` names none.

    As scikit-learn's compute_class_weight, which accepts no objects as labels but strings.
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


def _balanced_factors(codes: np.ndarray, weight: np.ndarray, n_classes: int) -> np.ndarray:
    """Each row's factor for "balanced": n / (n_present_classes · n_of_its_class).

    As in scikit-learn, with weights counted as rows.
    """
    counts = np.bincount(codes, weights=weight, minlength=n_classes)
    is_present = counts > 0
    factors = counts.sum() / (is_present.sum() * np.where(is_present, counts, 1.0))
    return factors[codes]
