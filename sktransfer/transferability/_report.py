"""transfer_report: whether pre-training helps an estimator, and from how many rows on."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.metrics import check_scoring
from sklearn.utils import check_consistent_length, indexable

from sktransfer._progress import warn
from sktransfer._validation import safe_indexing
from sktransfer.fine_tuning._base import BaseFineTuning
from sktransfer.transferability._baselines import (
    BASELINES,
    images_of,
    make_baseline,
    networks_in,
)
from sktransfer.transferability._folds import (
    Estimate,
    Folds,
    as_seed,
    estimate,
    make_folds,
    nested_order,
)
from sktransfer.transferability._scores import finite, read_labels
from sktransfer.transferability._table import as_frame, as_html, as_text, plus_minus

if TYPE_CHECKING:
    import pandas as pd

    from sktransfer.inspection import TransferCurveDisplay
    from sktransfer.transferability._scores import finite, read_labels
from sktransfer.transferability._table import Table

OWN = "pre-trained"
# A verdict needs this p-value: in simulations without a difference 0.5 to 2.5 % reach it
# (docs/benchmarks/transferability.py), so that more than two of twenty are rare.
ALPHA = 0.03
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
        in each fold, so that no single draw of them decides. ``"pixels"``: the
        same pipeline with images of 32 × 32 pixels as columns in place of the network's; for a
        fine-tuning estimator a scaled linear model of them. ``"dummy"``: the class frequencies,
        or the mean. The verdict is about the first.
    cv : int, splitter or iterable, default=10
        Folds; those of a number are shuffled, and stratified in classification. Five take half
        the time and find large differences only.
    groups : array-like of shape (n_samples,), default=None
        Rows of a group are never on both sides of a fold.
    scoring : str or callable, default=None
        A scorer of scikit-learn. ``None``: the estimator's ``score``.
    n_jobs : int or None, default=None
        Fits at the same time, in threads, which share the embeddings kept in memory.
    random_state : int, RandomState instance or None, default=None
        Of folds and parts, and of all estimators whose `random_state` is None.

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
    if not networks_in(estimator):
        raise ValueError(
            f"{estimator!r} has no pre-trained network in it: give a fine-tuning estimator, or a "
            "pipeline with a PretrainedFeatureExtractor."
        )
    against = _checked_against(against)
    X, y, groups = indexable(X, y, groups)
    check_consistent_length(X, y)
    classifies, seed = is_classifier(estimator), as_seed(random_state)
    target = read_labels(y) if classifies else finite(y, "y", ensure_2d=False)
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
        own_groups = None if groups is None else np.asarray(groups)[train]
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
    if scoring is None:
        scoring = "accuracy" if classifies else "R²"
    return TransferReport(
        dict(zip(models, scores, strict=True)),
        np.mean([[len(part) for part in of_fold] for of_fold in parts], axis=0),
        by_epoch,
        folds,
        score_name=scoring if isinstance(scoring, str) else getattr(scoring, "__name__", "score"),
        is_fine_tuned=isinstance(estimator, BaseFineTuning),
    )


class TransferReport:
    """What :func:`transfer_report` found.

    Differences are of the pre-trained estimator less a baseline, and positive where pre-training
    is better. Each is a mean over folds, an ``Estimate`` with ``value``, ``error`` (standard
    error) and ``p_value``.

    Attributes
    ----------
    scores_ : dict of str to ndarray of shape (n_folds, n_sizes)
        Test scores of ``"pre-trained"`` and of each baseline.
    train_sizes_ : ndarray of shape (n_sizes,)
        Mean numbers of training rows.
    epochs_ : dict of str to ndarray of shape (n_folds, n_epochs + 1)
        For fine-tuning estimators: accuracy or R² after each epoch from 0 on, with all training
        rows, before weights are interpolated; of the test rows, or of the estimator's own
        validation part where it stops early. Empty for others.
    table_ : DataFrame, or Table where pandas is not installed
        ``model``, ``train_size``, ``score`` and its standard error ``score_se``.
    start_ : dict of str to Estimate
        Of each baseline: the difference at the smallest training size.
    slope_ : dict of str to Estimate
        The slope of the least squares line of the differences against log2 of the training size:
        by how much the difference grows when the rows double. NaN for a single size.
    asymptote_ : dict of str to Estimate
        The difference at the largest training size; it is not extrapolated, as fits of learning
        curves are seldom stable.
    gain_ : dict of str to Estimate
        The difference averaged over the training sizes.
    verdicts_ : dict of str to {"helps", "no evidence", "hurts"}
        The sign of the gain over each baseline, if its p-value is at most 0.03.
    verdict_, p_value_ : str, float
        Those of the first baseline.
    advice_ : list of str
        What to try next.
    """

    def __init__(
        self,
        scores: dict[str, np.ndarray],
        train_sizes: np.ndarray,
        epochs: dict[str, np.ndarray],
        folds: Folds,
        *,
        score_name: str,
        is_fine_tuned: bool,
    ) -> None:
        self.scores_, self.train_sizes_, self.epochs_ = scores, train_sizes, epochs
        self.score_name, self._is_fine_tuned = score_name, is_fine_tuned
        own, *self.baselines = scores
        differences = {name: scores[own] - scores[name] for name in self.baselines}
        x = np.log2(train_sizes) - np.log2(train_sizes).mean()
        slope = x / (x @ x) if len(x) > 1 else np.array([np.nan])

        def of_all(weight: np.ndarray) -> dict[str, Estimate]:
            return {name: estimate(d @ weight, folds) for name, d in differences.items()}

        n = len(train_sizes)
        self.start_, self.asymptote_ = of_all(np.eye(n)[0]), of_all(np.eye(n)[-1])
        self.slope_, self.gain_ = of_all(slope), of_all(np.full(n, 1 / n))
        self.verdicts_ = {name: _verdict(gain) for name, gain in self.gain_.items()}
        self.verdict_ = self.verdicts_[self.baselines[0]]
        self.p_value_ = self.gain_[self.baselines[0]].p_value
        self.means_ = {
            name: [estimate(column, folds) for column in values.T]
            for name, values in scores.items()
        }
        self._rise = estimate(scores[own][:, -1] - scores[own][:, max(n - 2, 0)], folds)
        self.advice_ = self._advise()

    @property
    def table_(self) -> pd.DataFrame | Table:
        rows = [
            (name, size, mean.value, mean.error)
            for name, means in self.means_.items()
            for size, mean in zip(self.train_sizes_, means, strict=True)
        ]
        names = ("model", "train_size", "score", "score_se")
        return as_frame(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))

    def plot(self, ax=None, *, over: str = "train_sizes") -> TransferCurveDisplay:
        """Plot the scores of all models.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            ``None``: of a new figure.
        over : {"train_sizes", "epochs"}, default="train_sizes"

        Returns
        -------
        display : TransferCurveDisplay
        """
        from sktransfer.inspection import TransferCurveDisplay

        return TransferCurveDisplay.from_report(self, ax=ax, over=over)

    def _advise(self) -> list[str]:
        first, advice = self.baselines[0], []
        start, end = self.start_[first], self.asymptote_[first]
        if self.verdict_ == "hurts" and self._is_fine_tuned:
            advice.append(
                "Put the head after a lower stage (layer=), whose features are more general, or "
                "unfreeze more stages, so that the upper ones can change."
            )
        elif self.verdict_ == "hurts":
            advice.append(
                "Try lower layers, whose features are more general: "
                "rank_backbones(..., layers='stages')."
            )
        elif self.verdict_ == "helps" and first == "random" and end.p_value > ALPHA:
            how = "unfreeze more stages" if self._is_fine_tuned else "fine-tune the network"
            if start.p_value <= ALPHA:
                advice.append(f"The gain is gone with all training rows: {how}.")
        if self.verdict_ != "helps":
            advice.append("Try another backbone: rank_backbones compares several.")
        if self.verdict_ == "no evidence":
            error = self.gain_[first].error
            advice.append(
                f"The standard error of the difference is {error:.3f}: more data, or more folds, "
                "show smaller differences."
            )
        if self._rise.p_value <= ALPHA and self._rise.value > 0:
            advice.append(
                f"The score still rises between the last two training sizes, by "
                f"{self._rise.value:.3f}: more data would help."
            )
        for name, what in (("pixels", "raw pixels"), ("dummy", "a prediction without images")):
            if name in self.verdicts_ and name != first and self.verdicts_[name] != "helps":
                advice.append(
                    f"The model is not shown to be better than {what}: check that the images show "
                    "what y names, and that the preprocessing suits them."
                )
        return advice

    def _headline(self) -> str:
        first = self.baselines[0]
        gain = self.gain_[first]
        verdict = {"no evidence": "No evidence that transfer helps or hurts"}.get(
            self.verdict_, f"Transfer {self.verdict_}"
        )
        return (
            f"{verdict}: {self.score_name} {plus_minus(gain.value, gain.error, sign=True)} "
            f"against {first}, p = {gain.p_value:.2g} "
            f"(mean of {len(self.train_sizes_)} training sizes, {len(self.scores_[OWN])} folds)."
        )

    def _curves(self) -> dict[str, list[str]]:
        columns = {"training rows": list(self.scores_)}
        for k, size in enumerate(self.train_sizes_):
            cells = [plus_minus(*means[k][:2]) for means in self.means_.values()]
            columns[f"{size:.0f}"] = cells
        return columns

    def _differences(self) -> dict[str, list[str]]:
        parts = {
            "start": self.start_,
            "slope per doubling": self.slope_,
            "asymptote": self.asymptote_,
            "mean": self.gain_,
        }
        columns = {
            name: [plus_minus(*part[b][:2], sign=True) for b in self.baselines]
            for name, part in parts.items()
        }
        columns["p"] = [f"{self.gain_[b].p_value:.2g}" for b in self.baselines]
        return {"pre-trained less": self.baselines, **columns, "": [*self.verdicts_.values()]}

    def __repr__(self) -> str:
        parts = [self._headline(), as_text(self._curves()), as_text(self._differences())]
        return "\n\n".join([*parts, "\n".join(self.advice_)]).rstrip()

    def _repr_html_(self) -> str:
        advice = "".join(f"<li>{line}</li>" for line in self.advice_)
        tables = as_html(self._curves()) + as_html(self._differences())
        return f"<p>{self._headline()}</p>{tables}<ul>{advice}</ul>"


def _verdict(gain: Estimate) -> str:
    if not gain.p_value <= ALPHA:  # also where it is NaN
        return "no evidence"
    return "helps" if gain.value > 0 else "hurts"


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
    if follows_epochs and np.isin(y[test], y[train]).all():
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
        if bad := getattr(error, "bad_images", None):
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
        if not (n_least <= size <= n_rows if is_count else 0 < size <= 1):
            raise ValueError(
                f"train_sizes holds {size!r}: whole numbers of rows from {n_least} to {n_rows}, "
                "the rows of the smallest training part, or shares above 0 and up to 1.0 are "
                "accepted."
            )
        sizes.add(int(size) if is_count else max(n_least, round(size * n_rows)))
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
    try:
        from sktransfer.transferability._leaks import find_leaks
    except ImportError:
        return

    train, test = fold
    if len(test) > _N_LEAK_TESTS:
        test = np.random.RandomState(seed).choice(test, _N_LEAK_TESTS, replace=False)
    leaks = find_leaks(safe_indexing(images, train), safe_indexing(images, test))
    n_found = len(np.unique(leaks.table_["test_row"]))
    if n_found > _LEAKY_SHARE * len(test):
        warn(
            f"{n_found} of {len(test)} test images have a near-duplicate among the training "
            "images, so that scores are too high. find_leaks lists them, and its groups_ are "
            "groups to give here."
        )
