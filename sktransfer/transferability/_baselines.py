"""Baselines of a pre-trained network: random weights, pixels or tf-idf, and no image at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.compose import ColumnTransformer
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from sktransfer._validation import safe_indexing
from sktransfer.embedding._extractor import PretrainedFeatureExtractor
from sktransfer.embedding._text_extractor import PretrainedTextExtractor
from sktransfer.fine_tuning._base import BaseFineTuning
from sktransfer.texts._texts import as_texts

if TYPE_CHECKING:
    from sktransfer.networks._backbone import Backbone

BASELINES = ("random", "pixels", "dummy")
_GRIDS = {"param_grid", "param_distributions"}  # of scikit-learn's searches
_MAX_WORDS = 5000  # the most frequent words and pairs of them that tf-idf counts
# Images resized as a whole, values in 0…1.
_SIZE = (32, 32)
_PIXELS = {"size": _SIZE, "mean": (0.0,) * 3, "std": (1.0,) * 3}


def make_probe(n_columns: int, is_regression: bool) -> Pipeline:
    """Return a scaled linear model whose regularisation suits any number of columns.

    The squared norm of a standardised row is about `n_columns`, so that the penalty is given
    relative to it. 100 is within a point of the best on five sets of images; choosing it by
    cross-validation would multiply the cost. Ridge regression chooses its own at no cost.
    """
    if is_regression:
        return make_pipeline(StandardScaler(), RidgeCV(n_columns * np.logspace(-4, 2, 13)))
    return make_pipeline(StandardScaler(), LogisticRegression(C=100 / n_columns, max_iter=1000))


def networks_in(estimator: BaseEstimator) -> dict[str, BaseEstimator]:
    """Return the estimators that use a pre-trained network, by their parameter's name.

    The name of `estimator` itself is ``""``.
    """
    nested = {"": estimator, **estimator.get_params()}
    return {
        name: part
        for name, part in nested.items()
        if hasattr(part, "get_params")
        and not isinstance(part, type)
        and {"backbone", "weights"} <= part.get_params(deep=False).keys()
    }


def make_baseline(kind: str, estimator: BaseEstimator, has_many_labels: bool) -> BaseEstimator:
    """Return the baseline of this name for an estimator, unfitted."""
    if kind == "dummy":
        return DummyClassifier() if is_classifier(estimator) else DummyRegressor()
    baseline = clone(estimator)
    for name, part in networks_in(estimator).items():
        part = random_twin(part) if kind == "random" else without_network(part, has_many_labels)
        baseline = baseline.set_params(**{name: part}) if name else part
    return _without(baseline, [*networks_in(estimator)], "weights" if kind == "random" else "")


def _without(baseline: BaseEstimator, names: list[str], parameter: str) -> BaseEstimator:
    """Return a baseline whose searches do not set this parameter of networks; ``""``: any."""
    starts = tuple(f"{name}__{parameter}" for name in names)

    def is_kept(name: str) -> bool:
        return name not in names and not name.startswith(starts)

    for outer, search in {"": baseline, **baseline.get_params()}.items():
        prefix = f"{outer}__estimator__".removeprefix("__")
        for key in _GRIDS & vars(search).keys() if hasattr(search, "estimator") else ():
            grids = getattr(search, key)
            kept = [
                {k: v for k, v in grid.items() if is_kept(prefix + k)}
                for grid in ([grids] if isinstance(grids, Mapping) else grids)
            ]
            search.set_params(**{key: kept})
    return baseline


def random_twin(part: BaseEstimator) -> BaseEstimator:
    """Return the same estimator with a network of random weights and the same preprocessing."""
    from sktransfer.networks._backbone import load_backbone

    twin = clone(part).set_params(weights=None)
    known = part.get_params(deep=False)
    if "preprocessing" in known and not callable(known["preprocessing"]):
        own = load_backbone(
            known["backbone"], weights=known["weights"], preprocessing=known["preprocessing"]
        )
        twin.set_params(**twin_preprocessing(own))
    return twin


def twin_preprocessing(backbone: Backbone) -> dict[str, dict]:
    """Return the parameter with which a network's random twin sees the same pixels.

    Published weights of one architecture differ in it.
    """
    from sktransfer.networks._preprocessing import Preprocessing

    # A vision transformer's size belongs to its architecture, which differs then, too.
    if backbone.name.startswith("vit_") or not isinstance(backbone.preprocessing, Preprocessing):
        return {}
    return {"preprocessing": asdict(backbone.preprocessing)}


def without_network(part: BaseEstimator, has_many_labels: bool = False) -> BaseEstimator:
    """Return the same estimator with raw columns of its input in place of the network's.

    Each kind of input has its raw columns here: those of images are their pixels, those of texts
    their words by tf-idf.
    """
    from torch import nn

    if isinstance(part, PretrainedFeatureExtractor):
        return clone(part).set_params(
            backbone=nn.Flatten(),
            weights="DEFAULT",
            layer=None,
            cache_layers=None,
            pooling="auto",
            preprocessing=_PIXELS,
            precision="float32",
        )
    if isinstance(part, BaseFineTuning):
        if takes_texts(part):
            raw, n_columns = _tf_idf(), _MAX_WORDS
        else:
            same = ("image_shape", "value_range", "device", "n_jobs", "memory")
            pixels = PretrainedFeatureExtractor(**{name: getattr(part, name) for name in same})
            pixels.set_params(on_error="zero" if part.on_error == "skip" else "raise")
            raw, n_columns = without_network(pixels), 3 * math.prod(_SIZE)
        scaler, model = make_probe(n_columns, not is_classifier(part))
        if is_classifier(part):
            model.set_params(class_weight=part.class_weight)
            model = OneVsRestClassifier(model) if has_many_labels else model
        return make_pipeline(raw, scaler, model)
    if takes_texts(part):
        return _tf_idf()
    raise TypeError(
        f"against='pixels' needs images, and {type(part).__name__} does not take them: leave it "
        "out of `against`."
    )


def takes_texts(part: BaseEstimator) -> bool:
    """Whether the network of an estimator is one of texts."""
    from sktransfer.networks._huggingface import is_text_name

    return isinstance(part, PretrainedTextExtractor) or (
        isinstance(part, BaseFineTuning) and is_text_name(part.backbone)
    )


def _tf_idf() -> Pipeline:
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=_MAX_WORDS)
    # Neither gives a data frame, whatever the output that is set for all.
    functions = _joined_texts, _dense
    join, dense = (FunctionTransformer(f).set_output(transform="default") for f in functions)
    return make_pipeline(join, words, dense)


def _joined_texts(X) -> list[str]:
    """Return one text per row: those of its columns, joined; missing ones are left out."""
    texts = as_texts(X)
    found, _ = texts.read_all()
    n = texts.n_columns
    return [
        " ".join(found.get(i, "") for i in range(row * n, row * n + n))
        for row in range(texts.n_rows)
    ]


def _dense(columns) -> np.ndarray:
    return columns.toarray()


def images_of(estimator: BaseEstimator, X):
    """Return the images in X that the first network of an estimator gets; None if unknown."""
    if isinstance(estimator, (PretrainedFeatureExtractor, BaseFineTuning)):
        has_images = not takes_texts(estimator) and estimator.image_shape is None
        return X if has_images else None
    if isinstance(estimator, Pipeline):
        first = next(step for _, step in estimator.steps if hasattr(step, "get_params"))
        return images_of(first, X)
    if isinstance(estimator, FeatureUnion):
        return next((images_of(part, X) for _, part in estimator.transformer_list), None)
    if isinstance(estimator, ColumnTransformer):
        for _, part, columns in estimator.transformers:
            if hasattr(part, "get_params") and networks_in(part) and not callable(columns):
                return images_of(part, safe_indexing(X, columns, axis=1))
    return None
