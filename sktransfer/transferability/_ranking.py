"""rank_backbones: which network, and which of its layers, suits a task."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.utils import check_consistent_length
from sklearn.utils.multiclass import type_of_target

from sktransfer._progress import warn
from sktransfer.embedding._extractor import PretrainedFeatureExtractor
from sktransfer.images._images import Images, as_images
from sktransfer.transferability._baselines import make_probe, twin_preprocessing
from sktransfer.transferability._folds import Folds, as_seed, estimate, make_folds
from sktransfer.transferability._scores import (
    finite,
    h_score,
    logme_score,
    read_labels,
    spectrum,
    transrate_of,
)
from sktransfer.transferability._table import as_frame, as_html, as_text, plus_minus

if TYPE_CHECKING:
    import pandas as pd

    from sktransfer.embedding._embed import BadRow
    from sktransfer.inspection import BackboneRankingDisplay
    from sktransfer.networks._backbone import Backbone
    from sktransfer.transferability._table import Table

_CHUNK = 64  # images that are in memory for all networks at once
_N_TIMED = 16
_N_REPORTED = 10
# Names of scikit-learn's scorers of regressors.
_OF_REGRESSORS = re.compile("r2|neg_(mean|root|median|max)|max_error|explained|d2_(abs|pin|twee)")
Layer = str | list | None
Layers = str | list | dict | None


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
    the probe, is cross-validated. Whatever a probe gains over the random twin is owed to
    pre-training.

    Read more in the :ref:`User Guide <transferability>`.

    Parameters
    ----------
    X : list, array, Series or data frame of n_samples images
        As :class:`PretrainedFeatureExtractor` takes it. Flat rows have the `image_shape` of an
        extractor among the backbones.
    y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        Labels of any type, or numbers. Numbers are regression targets if any has a fractional
        part, if more than half of them differ, or if `scoring` names a scorer of regressors.
    backbones : list of str, torch.nn.Module, callable or PretrainedFeatureExtractor
        The candidates. An extractor brings its own weights, layers, preprocessing, device and
        precision.
    layers : "stages", list of str or None, dict or None, default=None
        The layers of each network that are candidates, all embedded in one pass: its stages and
        the embedding, the named ones (None is the embedding, a list of names joins their
        columns), or those of a dict by the name of the backbone. ``None``: the embedding alone, or
        the layer of an extractor.
    weights : str, Path, None or list of these, default="DEFAULT"
        One for all backbones, or a list with one for each.
    scoring : str or callable, default=None
        A scorer of scikit-learn. ``None``: accuracy, or R² in regression.
    cv : int, splitter or iterable, default=5
        Folds of the probe. Those of a number are shuffled, and stratified in classification.
    groups : array-like of shape (n_samples,), default=None
        Rows of a group are never on both sides of a fold.
    memory : str, Path, joblib.Memory, store, False or None, default=None
        Where rows are kept, as in :class:`PretrainedFeatureExtractor`. The rows are those of the
        extractor, so that a later search embeds nothing again.
    random_state : int, RandomState instance or None, default=None
        Of the shuffling of folds.

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
    are of the columns as they are; TransRate, which depends on their scale, of the columns divided
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
    candidates = _candidates(backbones, weights, memory)
    images = as_images(X, candidates[0].extractor.image_shape)
    target, is_regression = _read_target(y, images.n_rows, scoring)
    folds = make_folds(target, cv, groups, not is_regression, as_seed(random_state))
    for candidate in candidates:
        candidate.load(layers, images)
    sample = _embed(candidates, images)
    rows = []
    for candidate in candidates:
        rows += candidate.measure(images, sample, target, is_regression, folds, scoring)
    rows.sort(key=lambda row: (np.isnan(row["score"]), -row["score"]))
    return BackboneRanking(rows, _score_name(scoring, is_regression))


class BackboneRanking:
    """What :func:`rank_backbones` found.

    Attributes
    ----------
    table_ : DataFrame, or Table where pandas is not installed
        A row for each candidate, the best first and those without a score last. ``backbone``,
        ``layer``, ``columns`` (their number); ``score`` of the probe and its standard error
        ``score_se``; ``gain`` over the random twin and its standard error ``gain_se``, paired by
        folds; ``seconds`` for 1,000 decoded images on this machine, measured with 16;
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
            "s / 1,000 images": c["seconds"],
            "LogME": c["logme"],
            "H-score": c["h_score"],
            "TransRate": c["transrate"],
        }

    def __repr__(self) -> str:
        return as_text(self._shown())

    def _repr_html_(self) -> str:
        return as_html(self._shown())


# -- candidates ------------------------------------------------------------------------------
@dataclass
class _Candidate:
    """A network to embed with, and its twin with random weights.

    Attributes
    ----------
    layers : list of str, None or list
        What becomes a row of the table.
    blocks : dict of str or None to ndarray of int
        The columns of each layer.
    columns : dict of str to ndarray of shape (n_images, n_features)
        Rows of ``"own"`` and, if there is one, of ``"random"``.
    """

    extractor: PretrainedFeatureExtractor
    label: str
    layers: list[Layer] = field(default_factory=list)
    blocks: dict[str | None, np.ndarray] = field(default_factory=dict)
    networks: dict[str, Backbone] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, object]:
        """Arguments of `embed_images`."""
        names = ("memory", "batch_size", "device", "precision", "n_jobs", "verbose")
        return {name: getattr(self.extractor, name) for name in names}

    def load(self, layers: Layers, images: Images) -> None:
        from sktransfer.embedding._embed import check_place
        from sktransfer.networks._backbone import load_backbone
        from sktransfer.transferability._shared import HeldBackbone

        own = self.extractor.get_params(deep=False)
        check_place(own["memory"], own["device"])
        asked = {name: own[name] for name in ("weights", "pooling", "preprocessing")}
        if isinstance(layers, dict):
            layers = layers.get(own["backbone"], None)
        if layers is None:
            self.layers = [own["layer"]]
        elif layers == "stages":
            self.layers = [*load_backbone(own["backbone"], **asked).stage_names_to_layer, None]
        else:
            self.layers = [layers] if isinstance(layers, str) else list(layers)
        flat = [*dict.fromkeys(name for layer in self.layers for name in _names_of(layer))]
        loaded = load_backbone(own["backbone"], layer=flat, **asked)
        self.networks["own"] = HeldBackbone(loaded)
        ends = np.cumsum([width for _, width in loaded.feature_groups])
        self.blocks = dict(zip(flat, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
        try:
            preprocessing = twin_preprocessing(loaded) or {"preprocessing": own["preprocessing"]}
            asked |= {"weights": None, **preprocessing}
            twin = load_backbone(own["backbone"], layer=flat, **asked)
            self.networks["random"] = HeldBackbone(twin)
        except ValueError as error:
            warn(f"{self.label} has no twin with random weights, and so no gain: {error}")
        for name, network in self.networks.items():
            self.columns[name] = np.empty((len(images), network.n_features), dtype=np.float32)

    def measure(
        self,
        images: Images,
        sample: Images,
        target: np.ndarray,
        is_regression: bool,
        folds: Folds,
        scoring: object,
    ) -> list[dict]:
        """Return a row of the table for each layer."""
        rows = []
        for layer in self.layers:
            used = np.concatenate([self.blocks[name] for name in _names_of(layer)])
            columns = {
                kind: rows_[:, used].reshape(images.n_rows, -1).astype(float)
                for kind, rows_ in self.columns.items()
            }
            probe = make_probe(columns["own"].shape[1], is_regression)
            scores = {
                kind: cross_val_score(probe, block, target, cv=folds, scoring=scoring)
                if np.isfinite(block).all()
                else np.full(len(folds), np.nan)
                for kind, block in columns.items()
            }
            score = estimate(scores["own"], folds)
            gain = estimate(scores["own"] - scores.get("random", np.nan), folds)
            row = {
                "backbone": self.label,
                "layer": " + ".join(name or "embedding" for name in _names_of(layer)),
                "columns": columns["own"].shape[1],
                "score": score.value,
                "score_se": score.error,
                "gain": gain.value,
                "gain_se": gain.error,
                "seconds": self._seconds(layer, sample),
                **_other_scores(columns["own"], target, is_regression),
            }
            extractor = clone(self.extractor).set_params(layer=layer, cache_layers=None)
            rows.append(row | {"extractor": extractor})
        return rows

    def _seconds(self, layer: Layer, sample: Images) -> float:
        """Measure resizing and the network, for 1,000 images; decoding is the same for all."""
        from sktransfer.embedding._embed import embed_images
        from sktransfer.networks._backbone import load_backbone

        backbone = self.networks["own"]
        if len(self.layers) > 1:  # a lower layer needs but a part of the network
            names = ("backbone", "weights", "pooling", "preprocessing")
            same = {name: getattr(self.extractor, name) for name in names}
            backbone = load_backbone(**same, layer=layer)
        out = np.empty((len(sample), backbone.n_features), dtype=np.float32)
        settings = self.settings | {"memory": False, "verbose": 0}
        seconds = []
        for _ in range(4):
            since = time.perf_counter()
            embed_images(sample, backbone, out=out, **settings)  # type: ignore[arg-type]
            seconds.append(time.perf_counter() - since)
        # The first run prepares the network, and decodes images whose rows were in the store.
        return min(seconds[1:]) * 1000 / len(sample)


def _candidates(backbones: Sequence, weights: object, memory: object) -> list[_Candidate]:
    if not isinstance(backbones, (list, tuple)) or not backbones:
        raise ValueError(
            f"backbones={backbones!r} must be a list with at least one backbone, such as "
            "['builtin', 'resnet18']."
        )
    each = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(backbones)
    if len(each) != len(backbones):
        raise ValueError(
            f"weights has {len(each)} entries and backbones {len(backbones)}: give one for each "
            "backbone, or a single one for all."
        )
    candidates: list[_Candidate] = []
    for backbone, own in zip(backbones, each, strict=True):
        if isinstance(backbone, PretrainedFeatureExtractor):
            extractor = clone(backbone)
            if memory is not None:
                extractor.set_params(memory=memory)
        else:
            extractor = PretrainedFeatureExtractor(backbone, weights=own, memory=memory)
        label = _name_of(extractor.backbone)
        n_before = sum(c.label.partition(" #")[0] == label for c in candidates)
        candidates.append(_Candidate(extractor, f"{label} #{n_before + 1}" if n_before else label))
    shapes = {tuple(c.extractor.image_shape) for c in candidates if c.extractor.image_shape}
    if len(shapes) > 1:
        raise ValueError(f"The extractors' image_shape differ: {sorted(shapes)}.")
    for candidate in candidates:
        candidate.extractor.set_params(image_shape=next(iter(shapes), None))
    return candidates


def _names_of(layer: Layer) -> list[str | None]:
    """Return the layers that are joined as the columns of a candidate."""
    return [layer] if layer is None or isinstance(layer, str) else list(layer)


def _name_of(backbone: object) -> str:
    named = backbone if isinstance(backbone, str) else getattr(backbone, "__name__", None)
    return named or type(backbone).__name__


def _read_target(y: ArrayLike, n_rows: int, scoring: object) -> tuple[np.ndarray, bool]:
    """Return y as an array, and whether it holds numbers to predict rather than labels."""
    target = np.asarray(y)
    if target.ndim == 2 and target.shape[1] == 1:
        target = target.ravel()
    check_consistent_length(np.empty(n_rows), target)
    if target.dtype.kind in "iuf" and (
        (isinstance(scoring, str) and _OF_REGRESSORS.match(scoring))
        or len(np.unique(target)) > max(2, len(target) / 2)
        or type_of_target(target, input_name="y").startswith("continuous")
    ):
        return finite(target, "y", ensure_2d=False), True
    if target.ndim > 1:
        raise ValueError(f"y must hold one label a row, or numbers; its shape is {target.shape}.")
    return read_labels(target), False


def _score_name(scoring: object, is_regression: bool) -> str:
    if scoring is None:
        return "R²" if is_regression else "accuracy"
    return scoring if isinstance(scoring, str) else getattr(scoring, "__name__", "score")


# -- columns and scores ----------------------------------------------------------------------
def _embed(candidates: list[_Candidate], images: Images) -> Images:
    """Fill in the columns of all networks, a part of the images after the other.

    Returns the first part, in memory, to measure the time with.
    """
    from sktransfer.embedding._embed import embed_images
    from sktransfer.transferability._shared import SharedImages

    bad: dict[tuple[int, str], BadRow] = {}
    sample = SharedImages(images, slice(0, _N_TIMED))
    starts = [0, *range(_N_TIMED, len(images), _CHUNK)]
    for start, stop in itertools.pairwise([*starts, len(images)]):
        part = slice(start, stop)
        shared = SharedImages(images, part) if start else sample
        for candidate in candidates:
            for name, network in candidate.networks.items():
                out = candidate.columns[name][part]
                found = embed_images(shared, network, out=out, **candidate.settings)  # type: ignore[arg-type]
                bad |= {(row.row, row.where): row for row in found}
    if assumed := images.take_warnings():
        warn(assumed)
    if bad:
        rows = [bad[place] for place in sorted(bad)]
        listed = [f"  {row}" for row in rows[:_N_REPORTED]]
        if len(rows) > _N_REPORTED:
            listed.append(f"  … and {len(rows) - _N_REPORTED} more, all in the error's bad_images.")
        first = f"{len(rows)} of {len(images)} images could not be read:"
        error = ValueError("\n".join([first, *listed, "Repair or drop these rows."]))
        error.bad_images = rows  # type: ignore[attr-defined]
        raise error
    return sample


def _other_scores(columns: np.ndarray, target: np.ndarray, is_regression: bool) -> dict[str, float]:
    scores = dict.fromkeys(("logme", "h_score", "transrate"), np.nan)
    if not np.isfinite(columns).all():
        return scores
    spectrum_ = spectrum(columns)
    task = "regression" if is_regression else "classification"
    scores["logme"] = logme_score(spectrum_, target, task=task)
    if not is_regression:
        scores["h_score"] = h_score(spectrum_, target)
        scale = np.sqrt(columns.var(axis=0).mean())
        alike = spectrum_._replace(s=spectrum_.s / scale) if scale > 0 else spectrum_
        scores["transrate"] = transrate_of(alike, target)
    return scores
