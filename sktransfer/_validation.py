"""The border between our estimators and scikit-learn's validation.

This is the only file that uses private names of scikit-learn, so that a new release of
scikit-learn can break no other. Other files import what they need of them from here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
from sklearn.base import _fit_context as fit_context
from sklearn.utils import _safe_indexing as safe_indexing
from sklearn.utils._param_validation import (
    HasMethods,
    Interval,
    InvalidParameterError,
    Options,
    StrOptions,
)
from sklearn.utils._set_output import _get_output_config
from sklearn.utils.validation import (
    _check_feature_names,
    _check_feature_names_in,
    _check_sample_weight,
    validate_data,
)

from sktransfer._progress import did_you_mean
from sktransfer._rows import Rows
from sktransfer.images._containers import is_number_dtype, is_tensor
from sktransfer.images._images import Images, as_images
from sktransfer.texts._texts import Texts, as_texts

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

__all__ = [
    "SHARED_CONSTRAINTS",
    "HasMethods",
    "Interval",
    "Options",
    "StrOptions",
    "SuggestionMixin",
    "check_images",
    "check_parameters",
    "check_texts",
    "check_weight",
    "column_names",
    "fit_context",
    "is_empty_part",
    "keep_index",
    "safe_indexing",
]

# Of the parameters that the extractor and the fine-tuning estimators have in common.
SHARED_CONSTRAINTS: dict[str, list] = {
    "backbone": [str, HasMethods(["forward"]), callable],
    "weights": [str, HasMethods(["__fspath__"]), None],
    "pooling": [StrOptions({"auto", "avg", "max", "avgmax", "gem", "cls", "flatten"})],
    "preprocessing": [StrOptions({"auto"}), dict, callable],
    "image_shape": [tuple, list, None],
    "value_range": [tuple, list, None],
    "device": [str],
    "precision": [StrOptions({"float32", "tf32", "bfloat16", "float16"})],
    "n_jobs": [
        Interval(Integral, 1, None, closed="left"),
        Interval(Integral, None, -1, closed="right"),
        None,
    ],
    "memory": [
        str,
        HasMethods(["__fspath__"]),
        HasMethods(["cache"]),
        HasMethods(["get_into", "put_many"]),
        Options(bool, {False}),
        None,
    ],
    "verbose": ["verbose"],
}


class SuggestionMixin:
    """An estimator whose errors for parameters suggest the nearest accepted string."""

    _parameter_constraints: dict

    def _validate_params(self) -> None:
        try:
            super()._validate_params()  # type: ignore[misc]
        except InvalidParameterError as error:
            for name, constraints in self._parameter_constraints.items():
                value = getattr(self, name, None)
                if isinstance(value, str) and f"The {name!r} parameter of" in str(error):
                    known = [o for c in constraints if isinstance(c, StrOptions) for o in c.options]
                    raise InvalidParameterError(f"{error}{did_you_mean(value, known)}") from None
            raise


def check_images(estimator: BaseEstimator, X, *, reset: bool, name: str = "X") -> Images:
    """Validate ``X``, set or check what `fit` remembers of it, and wrap its images.

    No pixel is decoded. Flat numeric rows (those that `image_shape` describes) go through
    scikit-learn's :func:`validate_data`, which raises its usual errors for wrong shapes, sparse
    matrices, missing values and names. Errors begin with `name` unless it is ``"X"``.
    """
    settings = estimator.image_shape, estimator.value_range
    with _beginning_with(name):
        if estimator.image_shape is not None and _is_flat(X):
            # Its result is not used: it turns nullable and object integers into floats.
            finite = estimator.on_error == "raise"
            validate_data(estimator, X, reset=reset, ensure_all_finite=finite)
            return as_images(X, *settings)
        images = as_images(X, *settings)
        _check_columns(estimator, X, images, reset)
        return images


def check_texts(estimator: BaseEstimator, X, *, reset: bool, name: str = "X") -> Texts:
    """Validate ``X`` of texts as `check_images` validates images."""
    with _beginning_with(name):
        texts = as_texts(X)
        _check_columns(estimator, X, texts, reset)
        return texts


@contextlib.contextmanager
def _beginning_with(name: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        if name == "X":
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error


def _check_columns(estimator: BaseEstimator, X, images: Rows, reset: bool) -> None:
    """Set or check `n_features_in_` and `feature_names_in_`."""
    if hasattr(X, "columns"):
        _check_feature_names(estimator, X, reset=reset)
    elif reset:
        _check_feature_names(estimator, None, reset=True)
        if images.feature_names is not None:  # a named Series
            estimator.feature_names_in_ = np.asarray(images.feature_names, dtype=object)
    if reset:
        estimator.n_features_in_ = images.n_columns
    elif images.n_columns != estimator.n_features_in_:
        cell = images.kind[:-1]
        raise ValueError(
            f"X has {images.n_columns} {cell} column(s), but {type(estimator).__name__} was fitted "
            f"on {estimator.n_features_in_} columns. Give X in the form it had in fit: the same "
            f"{cell} columns{', or flat rows of as many pixels' if cell == 'image' else ''}."
        )


def is_empty_part(estimator: BaseEstimator, X) -> bool:
    """Whether ``X`` is a data frame or Series without rows, as a partition may be.

    A data frame must have the columns of `fit` nevertheless.
    """
    is_pandas_like = hasattr(X, "columns") or hasattr(X, "to_frame")
    if not is_pandas_like or len(X):
        return False
    if hasattr(X, "columns"):
        _check_feature_names(estimator, X, reset=False)
    return True


def check_parameters(estimator: BaseEstimator) -> None:
    """Raise scikit-learn's error for a parameter outside the estimator's constraints."""
    estimator._validate_params()


def check_weight(sample_weight, n_samples: int) -> np.ndarray:
    """Return one non-negative float64 weight per row; ``None`` gives ones."""
    rows = np.empty((n_samples, 1))
    return _check_sample_weight(sample_weight, rows, dtype=np.float64, ensure_non_negative=True)


def column_names(estimator: BaseEstimator, input_features) -> list[str]:
    """Return a name for each column; a single column without a name is ``""``."""
    names = _check_feature_names_in(estimator, input_features, generate_names=False)
    n_columns = estimator._n_image_columns
    if names is None or estimator.n_features_in_ != n_columns:  # pixel columns: one image
        return [f"x{j}" for j in range(n_columns)] if n_columns > 1 else [""]
    return [str(name) for name in names]


def keep_index(estimator: BaseEstimator, columns: np.ndarray, X):
    """Give the output a Series' index where ``set_output(transform="pandas")`` is on.

    scikit-learn keeps the index of data frames only, and a ColumnTransformer that names its
    column by a string passes a Series: its blocks would be joined on different indices.
    """
    is_series = hasattr(X, "index") and hasattr(X, "to_frame")
    if not is_series or _get_output_config("transform", estimator)["dense"] != "pandas":
        return columns
    import pandas as pd

    return pd.DataFrame(columns, index=X.index)


def _is_flat(X) -> bool:
    """Whether scikit-learn should validate ``X``, as a table of numbers."""
    if hasattr(X, "columns"):
        dtypes = X.dtypes if hasattr(X, "dtypes") else X.schema.types  # of pyarrow
        return all(map(is_number_dtype, dtypes))
    if hasattr(X, "toarray"):  # scipy sparse
        return True
    if isinstance(X, (list, tuple)):
        cell = X[0] if len(X) else ""
        is_row = isinstance(cell, (list, tuple)) or getattr(cell, "ndim", 0) == 1
        return _is_number(cell[0] if is_row and len(cell) else cell)
    if is_tensor(X):
        return X.ndim <= 2
    if not hasattr(X, "dtype") and hasattr(X, "__array__"):
        X = np.asarray(X)
    if not hasattr(X, "dtype") or getattr(X, "ndim", 3) > 2:
        return False
    if is_number_dtype(X.dtype):
        return True
    return isinstance(X, np.ndarray) and X.ndim == 2 and X.size > 0 and _is_number(X.flat[0])


def _is_number(value) -> bool:
    """Whether a cell is a number, or a dict other than ``{"bytes": …, "path": …}``."""
    if isinstance(value, dict):
        return "bytes" not in value and "path" not in value
    is_scalar = np.isscalar(value) or (is_tensor(value) and value.ndim == 0)
    return is_scalar and not isinstance(value, (str, bytes))
