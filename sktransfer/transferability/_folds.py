"""Folds, nested training sets, and what paired folds say about a difference."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    StratifiedGroupKFold,
    StratifiedKFold,
    check_cv,
)
from sklearn.utils import check_random_state

from sktransfer.transferability._scores import are_missing

Folds = list[tuple[np.ndarray, np.ndarray]]


class Estimate(NamedTuple):
    """A mean over folds.

    Attributes
    ----------
    value : float
    error : float
        Its standard error; NaN with a single fold.
    p_value : float
        Two-sided, of the hypothesis that the value is 0.
    """

    value: float
    error: float
    p_value: float


def make_folds(
    y: np.ndarray, cv: object, groups: np.ndarray | None, is_classifier: bool, random_state: object
) -> Folds:
    """Return the folds; those of a number are shuffled, stratified and keep groups together."""
    if isinstance(cv, (int, np.integer)) and not isinstance(cv, bool):
        kinds = (KFold, StratifiedKFold) if groups is None else (GroupKFold, StratifiedGroupKFold)
        cv = kinds[is_classifier](int(cv), shuffle=True, random_state=random_state)
    splitter, rows = check_cv(cv, y, classifier=is_classifier), np.arange(len(y))
    # Folds may be masks.
    folds = [(rows[train], rows[test]) for train, test in splitter.split(rows[:, None], y, groups)]
    if not folds:
        raise ValueError("cv has no folds. A generator gives its folds once: list(...) keeps them.")
    return folds


def group_numbers(groups: ArrayLike | None, n_rows: int) -> np.ndarray | None:
    """Return sorted groups as 0, 1, …; a row whose label is missing is a group of its own."""
    if groups is None:
        return None
    labels = np.asarray(groups, dtype=object)
    if labels.shape not in ((n_rows,), (n_rows, 1)):
        raise ValueError(
            f"groups has shape {labels.shape}; it needs a label for each of {n_rows} rows."
        )
    labels = labels.ravel()
    are_gone = are_missing(labels)
    known = set(labels[~are_gone])  # 1, 1.0 and np.int64(1) are one label, "1" is another
    try:
        ordered = sorted(known)  # as scikit-learn's splitters do
    except TypeError:
        ordered = sorted(known, key=lambda label: (type(label).__name__, label))
    numbers = {label: number for number, label in enumerate(ordered)}
    lone = itertools.count(len(numbers))
    cells = zip(labels, are_gone, strict=True)
    return np.array([next(lone) if is_gone else numbers[label] for label, is_gone in cells])


def nested_order(
    y: np.ndarray, groups: np.ndarray | None, is_classifier: bool, rng: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Order rows so that each beginning is a small training set.

    Every beginning has the classes in about their shares; as long as it has enough rows, it has
    all of them.

    Returns
    -------
    order : ndarray of shape (n_rows,)
    ends : ndarray of int
        Where a beginning may end: after each row, or after the last row of a group.
    """
    names = np.arange(len(y)) if groups is None else groups
    _, first, member_of = np.unique(names, return_index=True, return_inverse=True)
    key = rng.permutation(len(first)).astype(float)
    if is_classifier:
        labels = y[first]  # a group counts for the class of its first row
        by_chance = np.argsort(key)
        for label in np.unique(labels):
            own = by_chance[labels[by_chance] == label]
            key[own] = (np.arange(len(own)) + rng.uniform(size=len(own))) / len(own)
            key[own[0]] -= 1  # one of each class comes first
    rank = np.empty(len(key), dtype=int)
    rank[np.argsort(key, kind="stable")] = np.arange(len(key))
    order = np.argsort(rank[member_of], kind="stable")
    ends = np.cumsum(np.bincount(rank[member_of]))
    return order, ends


def estimate(values: np.ndarray, folds: Folds) -> Estimate:
    """Estimate a mean from one value for each fold.

    The variance of the mean of J folds is ``(1 / J + n_test / n_train) s²``: training sets
    overlap, so that the folds' values depend on each other [1]_. The t statistic has J - 1
    degrees of freedom.

    References
    ----------
    .. [1] C. Nadeau and Y. Bengio. "Inference for the generalization error." Machine Learning
       2003. https://doi.org/10.1023/A:1024068626366
    """
    n_folds, value = len(values), float(np.mean(values))
    if n_folds < 2 or np.isnan(value):
        return Estimate(value, np.nan, np.nan)
    overlap = np.mean([len(test) / len(train) for train, test in folds])
    deviation = np.std(values, ddof=1)
    if deviation < 1e-12:
        # Shares of a few test rows are often equal in all folds: they are known to their rounding.
        deviation = 1 / (np.sqrt(12) * np.mean([len(test) for _, test in folds]))
    error = float(np.sqrt(1 / n_folds + overlap) * deviation)
    return Estimate(value, error, float(2 * stats.t.sf(abs(value) / error, n_folds - 1)))


def as_seed(random_state: object) -> int:
    """Return one seed for all that is drawn."""
    if isinstance(random_state, (int, np.integer)):
        return int(random_state)
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
