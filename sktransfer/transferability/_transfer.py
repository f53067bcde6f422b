"""transfer_report: whether pre-training helps an estimator, and from how many rows on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, clone, is_classifier, is_regressor
from sklearn.metrics import check_scoring
from sklearn.pipeline import Pipeline
from sklearn.utils import indexable

from sktransfer._progress import warn
from sktransfer._validation import safe_indexing
from sktransfer.fine_tuning._base import BaseFineTuning
from sktransfer.transferability._baselines import (
    BASELINES,
    images_of,
    make_baseline,
    networks_in,
    takes_texts,
)
from sktransfer.transferability._folds import as_seed, group_numbers, make_folds, nested_order
from sktransfer.transferability._leaks import find_leaks
from sktransfer.transferability._report import OWN, TransferReport
from sktransfer.transferability._scores import read_labels, read_numbers
from sktransfer.transferability._table import name_of_score

# With as many rows and early stopping at "auto" an estimator holds out its own validation part.
_N_ROWS_TO_SPLIT = 1000
_N_LEAK_TESTS = 300
_LEAKY_SHARE = 0.1


def transfer_report(
    estimator: BaseEstimator,
    X,
    y: ArrayLike,
    *,
    train_sizes: Sequence[float] = (0.1, 0.25, 0.5, 1.0),
    against: Sequence[str] = BASELINES,
    cv: object = 10,
    groups: ArrayLike | None = None,
    scoring: object = None,
    n_jobs: int | None = None,
    random_state: object = None,
) -> TransferReport:
    """Compare an estimator that uses a pre-trained network with itself without pre-training.

    In each fold all models are fitted on the same nested parts of the training rows and scored on
    the same test rows, so that their differences are paired.

    Read more in the :ref:`User Guide <transferability>`.

    Parameters
    ----------
    estimator : estimator
        A classifier or regressor with a network in it: a fine-tuning estimator, or a pipeline,
        ColumnTransformer or search with a :class:`PretrainedFeatureExtractor`.
    X : list, array, Series or data frame of n_samples rows
        What `estimator` takes.
    y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        Labels or numbers.
    train_sizes : sequence of int or float, default=(0.1, 0.25, 0.5, 1.0)
        Numbers of training rows; floats are shares of the smallest fold's. Parts are nested and
        stratified, and hold whole groups, so that they may be a little larger.
    against : sequence of {"random", "pixels", "dummy"}, default=("random", "pixels", "dummy")
        The baselines. ``"random"``: the same estimator with ``weights=None``, other random weights
        in each fold, so that no single draw of them decides; a search does not search its
        `weights`. ``"pixels"``: the same pipeline with images of 32 × 32 pixels as columns in place
        of the network's; for a fine-tuning estimator a scaled linear model of them. Texts have no
        pixels: in their place the words by tf-idf, ``"tf-idf"``. ``"dummy"``: the class
        frequencies, or the mean. The verdict is about the first.
    cv : int, splitter or iterable, default=10
        Folds; those of a number are shuffled, and stratified in classification. Five take half
        the time and find large differences only.
    groups : array-like of shape (n_samples,), default=None
        Rows of a group are never on both sides of a fold. A row whose label is missing is a group
        of its own.
    scoring : str or callable, default=None
        A scorer of scikit-learn. ``None``: the estimator's ``score``, and for a search, or a
        pipeline that ends with one, its `scoring`.
    n_jobs : int or None, default=None
        Fits at the same time, in threads, which share the embeddings kept in memory.
    random_state : int, RandomState instance or None, default=None
        Seed of folds and parts, and of all estimators whose `random_state` is None.

    Returns
    -------
    report : TransferReport

    Warns
    -----
    UserWarning
        If images of the first fold's test part have near-duplicates in its training part.

    See Also
    --------
    rank_backbones : Which network to choose.

    Notes
    -----
    The estimator and its twin with random weights have the same settings otherwise. Those of
    fine-tuning are made for pre-trained weights: training from scratch takes more epochs and a
    larger learning rate, with which the twin may come closer.

    All differences are means over folds with standard errors and p-values that are corrected for
    the overlap of training sets, by the ratio of test to training rows of whole folds [1]_;
    smaller parts overlap less. The verdict is of one test, of the difference averaged over all
    training sizes, so that looking at several sizes gives no further chance of a false one.

    References
    ----------
    .. [1] C. Nadeau and Y. Bengio. "Inference for the generalization error." Machine Learning
       2003. https://doi.org/10.1023/A:1024068626366
    .. [2] L. Torrey and J. Shavlik. "Transfer learning." Handbook of Research on Machine Learning
       Applications, 2009: higher start, slope and asymptote.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from sktransfer import PretrainedFeatureExtractor
    >>> from sktransfer.transferability import transfer_report
    >>> X = np.random.default_rng(0).integers(0, 60, (30, 32, 32, 3), dtype=np.uint8)
    >>> X[::2, :, ::4] += 120  # stripes, which any network sees
    >>> model = make_pipeline(PretrainedFeatureExtractor(layer="stem"), LogisticRegression())
    >>> report = transfer_report(
    ...     model, X, ["stripes", "plain"] * 15, train_sizes=[4, 24], random_state=0
    ... )
    >>> report.verdict_
    'no evidence'
    """
    is_estimator = hasattr(estimator, "fit") and not isinstance(estimator, type)
    if not is_estimator or not (is_classifier(estimator) or is_regressor(estimator)):
        raise TypeError(f"estimator={estimator!r} is neither a classifier nor a regressor.")
    if not networks_in(estimator):
        raise ValueError(
            f"{estimator!r} has no pre-trained network in it: give a fine-tuning estimator, or a "
            "pipeline with a PretrainedFeatureExtractor."
        )
    against = _checked_against(against)
    if any(map(takes_texts, networks_in(estimator).values())):
        against = ["tf-idf" if name == "pixels" else name for name in against]
    X, y = indexable(X, y)
    classifies, seed = is_classifier(estimator), as_seed(random_state)
    target = read_labels(y) if classifies else read_numbers(y)
    scoring = _own_scoring(estimator) if scoring is None else scoring
    score_name = name_of_score(scoring, not classifies)
    groups = group_numbers(groups, len(target))
    has_one_label = classifies and target.ndim == 1
    folds = make_folds(target, cv, groups, has_one_label, seed)
    n_least = max(2, len(np.unique(target))) if has_one_label else 2
    sizes = _as_sizes(train_sizes, min(len(train) for train, _ in folds), n_least)
    models = {OWN: clone(estimator)}
    models |= {name: make_baseline(name, estimator, target.ndim > 1) for name in against}
    if random_state is not None:
        for model in models.values():
            model.set_params(**_seeds(model, seed))
    _warn_of_leaks(images_of(estimator, X), folds[0], seed)
    rng = np.random.RandomState(seed)
    parts = []
    for train, _ in folds:
        own_groups = None if groups is None else groups[train]
        order, ends = nested_order(target[train], own_groups, has_one_label, rng)
        stops = ends[np.minimum(np.searchsorted(ends, sizes), len(ends) - 1)]
        parts.append([train[order[:stop]] for stop in stops])
    results = Parallel(n_jobs=n_jobs, prefer="threads")(
        delayed(_fit_and_score)(model, X, target, part, test, scoring, k, part is of_fold[-1])
        for model in models.values()
        for k, ((_, test), of_fold) in enumerate(zip(folds, parts, strict=True))
        for part in of_fold
    )
    shape = len(models), len(folds), len(sizes)
    scores = np.array([score for score, _ in results]).reshape(shape)
    by_epoch = _by_epoch(list(models), [epochs for _, epochs in results], shape)
    return TransferReport(
        dict(zip(models, scores, strict=True)),
        np.mean([[len(part) for part in of_fold] for of_fold in parts], axis=0),
        by_epoch,
        folds,
        score_name=score_name,
        is_fine_tuned=isinstance(estimator, BaseFineTuning),
    )


# -- one model -------------------------------------------------------------------------------
def _fit_and_score(
    model: BaseEstimator,
    X,
    y: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    scoring: object,
    fold: int,
    has_all_rows: bool,
) -> tuple[float, np.ndarray | None]:
    """Fit a clone; return its score and, for fine-tuning with all rows, those of each epoch."""
    from sktransfer.networks._sources import random_seed

    model, parts = clone(model), [safe_indexing(X, rows) for rows in (train, test)]
    validation = {}
    follows_epochs = has_all_rows and isinstance(model, BaseFineTuning)
    if follows_epochs and (is_regressor(model) or np.isin(y[test], y[train]).all()):
        waits = model.early_stopping == "auto" and len(train) < _N_ROWS_TO_SPLIT
        if waits or model.early_stopping is False:
            # The scores of test rows are noted and choose nothing.
            model.set_params(early_stopping=False)
            validation = {"X_val": parts[1], "y_val": y[test]}
    rows, token = train, random_seed.set(fold)  # other random weights in each fold
    try:
        model.fit(parts[0], y[train], **validation)
        rows = test
        score = check_scoring(model, scoring=scoring)(model, parts[1], y[test])
    except ValueError as error:
        bad = getattr(error, "bad_images", None)
        if bad and not validation:  # otherwise they may be of either part
            own = sorted({int(rows[image.row]) for image in bad})
            error.add_note(f"These are rows of one part of X; in X itself they are rows {own}.")
        raise
    finally:
        random_seed.reset(token)
    if not follows_epochs:
        return score, None
    return score, np.array([row.get("valid_score", np.nan) for row in model.history_])


def _by_epoch(
    names: list[str], found: list[np.ndarray | None], shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """Collect the epochs of each model's folds; shorter trainings end with NaN."""
    of_models = [found[k * shape[1] * shape[2] :][: shape[1] * shape[2]] for k in range(shape[0])]
    by_epoch = {}
    for name, of_model in zip(names, of_models, strict=True):
        curves = [curve for curve in of_model if curve is not None]
        if curves:
            n_epochs = max(map(len, curves))
            fill = [np.pad(c, (0, n_epochs - len(c)), constant_values=np.nan) for c in curves]
            by_epoch[name] = np.array(fill)
    return by_epoch


# -- before fitting --------------------------------------------------------------------------
def _own_scoring(estimator: BaseEstimator) -> object:
    """Return the scorer of a search, which baselines without the search would not use."""
    last = estimator.steps[-1][1] if isinstance(estimator, Pipeline) else estimator
    # Searches have error_score; others may have a `scoring` that their `score` does not use.
    return last.scoring if hasattr(last, "error_score") else None


def _checked_against(against: Sequence[str]) -> list[str]:
    names = [against] if isinstance(against, str) else list(against)
    unknown = [name for name in names if name not in BASELINES]
    if unknown or not names:
        raise ValueError(f"against={against!r}: give one or more of {list(BASELINES)}.")
    return list(dict.fromkeys(names))


def _as_sizes(train_sizes: Sequence[float], n_rows: int, n_least: int) -> np.ndarray:
    sizes = set()
    for size in np.atleast_1d(np.asarray(train_sizes, dtype=object)):
        is_count = isinstance(size, Integral)
        is_share = isinstance(size, Real) and 0 < float(size) <= 1
        if not (n_least <= size <= n_rows if is_count else is_share):
            raise ValueError(
                f"train_sizes holds {size!r}: whole numbers of rows from {n_least} to {n_rows}, "
                "the rows of the smallest training part, or shares above 0 and up to 1.0 are "
                "accepted."
            )
        sizes.add(int(size) if is_count else max(n_least, round(size * n_rows)))
    if not sizes:
        raise ValueError("train_sizes is empty: give at least one.")
    return np.array(sorted(sizes))


def _seeds(model: BaseEstimator, seed: int) -> dict[str, int]:
    params = model.get_params()
    return {
        name: seed
        for name, value in params.items()
        if value is None and name.rpartition("__")[2] == "random_state"
    }


def _warn_of_leaks(images, fold: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    """Look for images of the test part that are in the training part, too."""
    if images is None:
        return
    train, test = fold
    if len(test) > _N_LEAK_TESTS:
        test = np.random.RandomState(seed).choice(test, _N_LEAK_TESTS, replace=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fits warn of what they read, with their value_range
        leaks = find_leaks(safe_indexing(images, train), safe_indexing(images, test))
    n_found = len(np.unique(leaks.table_["test_row"]))
    if n_found > _LEAKY_SHARE * len(test):
        warn(
            f"{n_found} of {len(test)} test images have a near-duplicate among the training "
            "images, so that scores are too high. find_leaks lists them, and its groups_ are "
            "groups to give here."
        )
