"""rank_backbones: which network, and which of its layers, suits a task."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import clone
from sklearn.utils import check_consistent_length

from sktransfer.images._images import as_images
from sktransfer.texts._texts import as_texts
from sktransfer.transferability._candidates import Layers, embed_all, evaluate, make_candidates
from sktransfer.transferability._folds import as_seed, group_numbers, make_folds
from sktransfer.transferability._scores import as_plain, is_continuous, read_labels, read_numbers
from sktransfer.transferability._table import (
    as_frame,
    as_html,
    as_text,
    name_of_score,
    plus_minus,
)

if TYPE_CHECKING:
    import pandas as pd

    from sktransfer._rows import Rows
    from sktransfer.embedding._extractor import PretrainedFeatureExtractor
    from sktransfer.inspection import BackboneRankingDisplay
    from sktransfer.transferability._table import Table

# Names of scikit-learn's scorers of regressors.
_OF_REGRESSORS = re.compile("r2|neg_(mean|root|median|max)|max_error|explained|d2_(abs|pin|twee)")


def rank_backbones(
    X,
    y: ArrayLike,
    backbones: Sequence,
    *,
    layers: Layers = None,
    weights: object = "DEFAULT",
    scoring: object = None,
    cv: object = 5,
    groups: ArrayLike | None = None,
    memory: object = None,
    random_state: object = None,
) -> BackboneRanking:
    """Rank pre-trained networks, and layers of them, by a linear model on their columns.

    Each network and its twin with random weights embed the images; a linear model on the columns,
    the probe, is cross-validated. What a probe gains over the random twin comes from
    pre-training.

    Read more in the :ref:`User Guide <transferability>`.

    Parameters
    ----------
    X : list, array, Series or data frame of n_samples images or texts
        As :class:`PretrainedFeatureExtractor` or :class:`PretrainedTextExtractor` takes it, with
        the `image_shape` and `value_range` of an extractor among the backbones.
    y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        Labels of any type, or numbers. Numbers are regression targets if any has a fractional
        part, if more than half of them differ, or if `scoring` names a scorer of regressors.
    backbones : list of str, torch.nn.Module, callable or extractor
        The candidates. An extractor brings its own weights, layers, preprocessing, device and
        precision.
    layers : "stages", list of str or None, dict or None, default=None
        The layers of each network that are candidates, all embedded in one pass: its stages and
        the embedding, the named ones (None is the embedding, a list of names joins their
        columns), or those of a dict by the name of the backbone, or of its class. ``None``: the
        embedding alone, or the layer of an extractor.
    weights : str, Path, None or list of these, default="DEFAULT"
        One for all backbones, or a list with one for each.
    scoring : str or callable, default=None
        A scorer of scikit-learn. ``None``: accuracy, or R² in regression.
    cv : int, splitter or iterable, default=5
        Folds of the probe. Those of a number are shuffled, and stratified in classification.
    groups : array-like of shape (n_samples,), default=None
        Rows of a group are never on both sides of a fold. A row whose label is missing is a group
        of its own.
    memory : str, Path, joblib.Memory, store, False or None, default=None
        Where rows are kept, as in :class:`PretrainedFeatureExtractor`. The rows are those of the
        extractor, so that a later search embeds nothing again.
    random_state : int, RandomState instance or None, default=None
        Seed of the shuffling of folds.

    Returns
    -------
    ranking : BackboneRanking

    Raises
    ------
    ValueError
        If images cannot be read; the message lists all of them. The other rows are kept.

    See Also
    --------
    transfer_report : Whether one network helps, over training sizes.

    Notes
    -----
    Each image is read once, and decoded once for all networks; where files are so large that
    networks of different input sizes decode them at different reductions, once for each of these.
    All networks are held in memory at the same time.

    The probe standardises the columns and fits a logistic regression with
    ``C=100 / n_columns``, or :class:`~sklearn.linear_model.RidgeCV`. LogME and the shrunk H-score
    are of the unscaled columns; TransRate, which depends on their scale, of the columns divided
    by one number, so that their mean variance is 1. Standard errors are corrected for the overlap
    of training sets [1]_.

    References
    ----------
    .. [1] C. Nadeau and Y. Bengio. "Inference for the generalization error." Machine Learning
       2003. https://doi.org/10.1023/A:1024068626366

    Examples
    --------
    >>> import numpy as np
    >>> from sktransfer.transferability import rank_backbones
    >>> noise = np.random.default_rng(0).integers(0, 60, (20, 32, 32, 3), dtype=np.uint8)
    >>> noise[::2, :, ::4] += 120  # stripes
    >>> ranking = rank_backbones(
    ...     noise, ["stripes", "plain"] * 10, ["builtin"], layers=["stem", None], random_state=0
    ... )
    >>> ranking.best_
    PretrainedFeatureExtractor(layer='stem')
    """
    candidates = make_candidates(backbones, weights, layers, memory)
    first = candidates[0]
    if first.is_of_images:
        images: Rows = as_images(X, first.extractor.image_shape, first.extractor.value_range)
    else:
        images = as_texts(X)
    target, is_regression = _read_target(y, images.n_rows, scoring)
    score_name = name_of_score(scoring, is_regression)
    groups = group_numbers(groups, images.n_rows)
    folds = make_folds(target, cv, groups, not is_regression, as_seed(random_state))
    # Data that no probe can be fitted or scored on is refused before anything is embedded.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate(np.zeros((len(target), 1)), target, is_regression, folds, scoring)
    for candidate in candidates:
        candidate.load(layers, images)
    sample = embed_all(candidates, images)
    rows = []
    for candidate in candidates:
        rows += candidate.measure(images, sample, target, is_regression, folds, scoring)
    rows.sort(key=lambda row: (np.isnan(row["score"]), -row["score"]))
    return BackboneRanking(rows, score_name)


class BackboneRanking:
    """Result of :func:`rank_backbones`.

    Attributes
    ----------
    table_ : DataFrame, or Table where pandas is not installed
        A row for each candidate, the best first and those without a score last. ``backbone``,
        ``layer``, ``columns`` (their number); ``score`` of the probe and its standard error
        ``score_se``; ``gain`` over the random twin and its standard error ``gain_se``, paired by
        folds; ``seconds`` for 1,000 rows, decoded, on this machine, measured with 16;
        ``logme``, ``h_score`` and ``transrate``, the latter two NaN in regression.
    best_ : PretrainedFeatureExtractor
        The first candidate, to be fitted.
    extractors_ : list of PretrainedFeatureExtractor
        The candidates in the table's order.
    score_name : str
        What ``score`` is.
    """

    def __init__(self, rows: list[dict], score_name: str) -> None:
        self.extractors_ = [row.pop("extractor") for row in rows]
        self._columns = {name: [row[name] for row in rows] for name in rows[0]}
        self.score_name = score_name

    @property
    def table_(self) -> pd.DataFrame | Table:
        return as_frame(self._columns)

    @property
    def best_(self) -> PretrainedFeatureExtractor:
        return clone(self.extractors_[0])

    def plot(self, ax=None) -> BackboneRankingDisplay:
        """Plot the score against the cost.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            ``None``: of a new figure.

        Returns
        -------
        display : BackboneRankingDisplay
        """
        from sktransfer.inspection import BackboneRankingDisplay

        return BackboneRankingDisplay.from_ranking(self, ax=ax)

    def _shown(self) -> dict[str, list]:
        c = self._columns
        return {
            "backbone": c["backbone"],
            "layer": c["layer"],
            "columns": c["columns"],
            self.score_name: [*map(plus_minus, c["score"], c["score_se"])],
            "gain over random": [
                plus_minus(gain, error, sign=True)
                for gain, error in zip(c["gain"], c["gain_se"], strict=True)
            ],
            "s / 1,000 rows": c["seconds"],
            "LogME": c["logme"],
            "H-score": c["h_score"],
            "TransRate": c["transrate"],
        }

    def __repr__(self) -> str:
        return as_text(self._shown())

    def _repr_html_(self) -> str:
        return as_html(self._shown())


def _read_target(y: ArrayLike, n_rows: int, scoring: object) -> tuple[np.ndarray, bool]:
    """Return y as an array, and whether it holds numbers to predict rather than labels."""
    target = as_plain(y)
    if target.ndim == 2 and target.shape[1] == 1:
        target = target.ravel()
    check_consistent_length(np.empty(n_rows), target)
    if target.dtype.kind in "iuf" and (
        (isinstance(scoring, str) and _OF_REGRESSORS.match(scoring))
        or len(np.unique(target)) > max(2, len(target) / 2)
        or is_continuous(target)
    ):
        return read_numbers(target), True
    if target.ndim > 1:
        raise ValueError(f"y must hold one label a row, or numbers; its shape is {target.shape}.")
    return read_labels(target), False
