"""Conversion of ``y`` and ``class_weight`` to the targets and weights of a training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_consistent_length, column_or_1d

from sktransfer._progress import shown
from sktransfer._rows import is_missing


def check_y_given(y: object, class_name: str, name: str = "y") -> None:
    """Raise ValueError for a ``y`` that is missing, has no rows, or has lists as rows."""
    if y is None:
        raise ValueError(
            f"This {class_name} estimator requires y to be passed, but the target y is None."
        )
    _check_not_label_lists(y, name)
    _check_has_rows(y, name)


def read_labels(y: npt.ArrayLike, n_rows: int, name: str = "y") -> tuple[np.ndarray, bool]:
    """Return labels as an array, and whether they are an indicator matrix of several labels.

    Raises
    ------
    ValueError
        For continuous targets, missing labels, a wrong number of labels, or several columns that
        do not hold 0 and 1.
    """
    labels = _as_array(y)
    _check_finite(labels, name, "label")
    if labels.ndim == 2 and labels.shape[1] > 1:
        # A data frame of several dtypes is an array of objects.
        if labels.dtype.kind not in "biufO" or not np.isin(labels, (0, 1)).all():
            hint = " FineTuningRegressor takes several numbers per row."
            raise ValueError(
                f"{name} has shape {labels.shape} and is not an indicator matrix of 0 and 1. "
                "Unknown label type: give one label per row, or a 0/1 column per label."
                f"{hint if labels.dtype.kind in 'iuf' else ''}"
            )
        check_consistent_length(np.empty(n_rows), labels)
        return labels.astype(np.int64), True
    labels = column_or_1d(labels, warn=True)
    check_consistent_length(np.empty(n_rows), labels)
    _check_discrete(labels, name)
    return labels, False


def read_classes(classes: npt.ArrayLike) -> np.ndarray:
    """Return the parameter ``classes`` of partial_fit, sorted."""
    _check_has_rows(classes, "classes")
    labels = _as_array(classes).ravel()
    _check_finite(labels, "classes", "label")
    return sorted_classes(labels, "classes")


def read_numbers(y: npt.ArrayLike, n_rows: int, name: str = "y") -> np.ndarray:
    """Return regression targets, float64: (n,) or (n, n_targets)."""
    values = _as_array(y)
    cells = values.flat if values.dtype.kind in "USO" else ()
    text = next((i for i, value in enumerate(cells) if isinstance(value, (str, bytes))), None)
    if text is not None:
        row = np.unravel_index(text, values.shape)[0]
        raise ValueError(
            f"{name} holds {shown(values.flat[text])} in row {row}, and FineTuningRegressor "
            "predicts numbers: FineTuningClassifier takes labels. To convert text to numbers, give "
            f"pandas.to_numeric({name})."
        )
    _check_finite(values, name, "number")
    target = check_array(y, ensure_2d=False, dtype="numeric", input_name=name)
    if target.ndim == 2 and target.shape[1] == 1:
        target = column_or_1d(target, warn=True)
    check_consistent_length(np.empty(n_rows), target)
    return np.asarray(target, dtype=np.float64)


def clip_outliers(target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Clip each column to three interquartile ranges beyond its quartiles, Tukey's outer fences.

    Nothing is clipped if half of the weight is on one value.
    """
    columns = []
    for column in target.T:
        order = np.argsort(column, kind="stable")
        total = np.cumsum(weight[order])
        low, high = column[order][np.searchsorted(total, [total[-1] / 4, total[-1] * 3 / 4])]
        with np.errstate(over="ignore"):
            reach = 3 * (high - low) if high > low else np.inf
            columns.append(np.clip(column, low - reach, high + reach))
    return np.stack(columns, axis=1)


def sorted_classes(labels: np.ndarray, name: str = "y") -> np.ndarray:
    """Return the different labels, sorted; TypeError unless all are of one sortable type."""
    if labels.dtype.kind != "O":
        return np.unique(labels)
    try:
        return np.fromiter(sorted(set(labels)), dtype=object)
    except TypeError as error:
        kinds = sorted({type(label).__name__ for label in labels})
        raise TypeError(
            f"{name} holds labels of the types {kinds}, which cannot be sorted. "
            f"Give all of one type that can be sorted and hashed, such as str: [str(label) for "
            f"label in {name}]."
        ) from error


def codes_of(labels: np.ndarray, classes: np.ndarray, name: str = "y") -> np.ndarray:
    """Return the position of each label in the sorted `classes`."""
    positions = {label: code for code, label in enumerate(_comparable(classes, labels))}
    codes = np.array([positions.get(label, -1) for label in _comparable(labels, classes)], int)
    if (codes < 0).any():
        row = int(np.flatnonzero(codes < 0)[0])
        raise ValueError(
            f"{name} holds the label {shown(labels[row])} in row {row}, which is not one of the "
            f"classes {_listed(classes)}. Labels of validation rows and of later "
            "calls must be among the classes of the first fit; partial_fit takes them as `classes`."
        )
    return codes


def are_strings(labels: np.ndarray) -> bool:
    """Whether an array of objects holds only strings."""
    return all(isinstance(label, str) for label in labels.flat)


def _listed(labels: Iterable) -> str:
    return f"[{', '.join(map(shown, itertools.islice(labels, 20)))}]"


def _check_has_rows(y: object, name: str) -> None:
    ndim = y.ndim if hasattr(y, "ndim") else np.asarray(y).ndim
    if ndim == 0:  # a generator, a set, a dict, a string, a number
        raise ValueError(
            f"{name} should be a 1d array, got {type(y).__name__}, which has no rows: give a list, "
            "an array or a Series."
        )


def _as_array(y: npt.ArrayLike) -> np.ndarray:
    """Return the labels of `y` as an array, each of its own type."""
    if hasattr(y, "toarray"):  # scipy sparse indicator
        return y.toarray()
    labels = np.asarray(y)
    if isinstance(y, (list, tuple)) and labels.dtype.kind == "U":
        # NumPy turns numbers and NaN among strings into strings.
        objects = np.asarray(y, dtype=object)
        return labels if are_strings(objects) else objects
    return labels


def _check_not_label_lists(y: object, name: str) -> None:
    """Raise ValueError for lists or sets of labels; in a Series, tuples are labels."""
    values = y if isinstance(y, (list, tuple)) else np.asarray(y)
    kinds: tuple[type, ...] = (list, set, frozenset, np.ndarray)
    is_column = isinstance(values, np.ndarray)
    if not isinstance(values, np.ndarray):
        kinds += (tuple,)
    elif values.dtype.kind != "O" or values.ndim != 1:
        return
    rows: list = [row for row in values if isinstance(row, kinds) and getattr(row, "ndim", 1) > 0]
    lengths = {len(row) for row in rows}
    has_sets = any(isinstance(row, (set, frozenset)) for row in rows)
    if not is_column and not has_sets and len(lengths) <= 1:
        items = [item for row in rows for item in row]
        if lengths == {1} or not any(isinstance(item, str) for item in items):
            return  # a table
    if rows:
        raise ValueError(
            f"{name} holds {shown(rows[0])} and the like as rows. For several labels per row, "
            f"sklearn.preprocessing.MultiLabelBinarizer().fit_transform({name}) makes the 0/1 "
            "column per label that FineTuningClassifier takes."
        )


def column_names(y: npt.ArrayLike) -> np.ndarray | None:
    """Return the names of the columns of a data frame; None for anything else."""
    return np.asarray(y.columns) if hasattr(y, "columns") else None


def _check_finite(values: np.ndarray, name: str, noun: str) -> None:
    """Raise ValueError for a missing or infinite value, with its row."""
    kind = values.dtype.kind
    if kind in "fc":
        are_missing, are_infinite = np.isnan(values), np.isinf(values)
    elif kind == "O":
        kinds = [(is_missing(v), isinstance(v, float) and abs(v) == math.inf) for v in values.flat]
        are_missing, are_infinite = np.array(kinds, dtype=bool).reshape(-1, 2).T
    else:
        are_missing, are_infinite = np.isnat(values) if kind in "mM" else np.zeros(0), np.zeros(0)
    for what, is_bad in (("NaN or None", are_missing), ("infinity", are_infinite)):
        if is_bad.any():
            row, *column = np.argwhere(is_bad.reshape(values.shape))[0].tolist()
            value, where = values[(row, *column)], f" in column {column[0]}" if column else ""
            raise ValueError(
                f"Input {name} contains {what}: the {noun} of row {row} is {value}{where}. Every "
                f"row needs a {noun}; leave out those without."
            )


def _check_discrete(labels: np.ndarray, name: str) -> None:
    """Raise ValueError for numbers with fractions, in scikit-learn's words.

    Objects of types that scikit-learn does not know (dates, periods) are accepted as labels.
    """
    if labels.dtype.kind == "O" and not are_strings(labels):
        labels = np.array([x for x in labels if isinstance(x, (float, np.floating))], dtype=float)
    try:
        if len(labels):
            check_classification_targets(labels)
    except ValueError as error:
        example = labels[labels % 1 != 0][:1] if labels.dtype.kind == "f" else labels[:1]
        raise ValueError(
            f"{error} {name} holds {shown(example[0])}: FineTuningRegressor predicts numbers."
        ) from error


def _comparable(labels: np.ndarray, others: np.ndarray) -> list:
    """Return labels as Python objects; times of two arrays become numbers in one unit."""
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
    """Return the factors of the rows' weights for ``class_weight``."""
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
        alone = _listed(classes[np.unique(target)])
        raise ValueError(
            f"class_weight={class_weight!r} leaves nothing to train on or to validate on: all "
            f"rows are of the classes {alone}, whose weight is 0. Add rows of other classes, or "
            "leave these out."
        )
    return factors


def _class_weights(class_weight: Mapping, classes: np.ndarray) -> np.ndarray:
    """Return the weight of each class, 1 if it is not in `class_weight`.

    As scikit-learn's compute_class_weight, which accepts no other objects than strings as labels.
    """
    missing = [label for label in classes if label not in class_weight]
    if missing and len(classes) - len(missing) != len(class_weight):
        raise ValueError(f"The classes, {_listed(missing)}, are not in class_weight")
    weights = np.array([class_weight.get(label, 1) for label in classes], dtype=np.float64)
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(
            f"class_weight={class_weight!r} gives the classes {_listed(classes)} "
            f"the weights {weights[:20].tolist()}: none may be negative, NaN or infinite, and not "
            "all zero."
        )
    return weights


def _balanced_factors(codes: np.ndarray, weight: np.ndarray, n_classes: int) -> np.ndarray:
    """Return each row's factor for "balanced": n / (n_present_classes · n_of_its_class).

    As in scikit-learn, with weights counted as rows.
    """
    counts = np.bincount(codes, weights=weight, minlength=n_classes)
    is_present = counts > 0
    factors = counts.sum() / (is_present.sum() * np.where(is_present, counts, 1.0))
    return factors[codes]
