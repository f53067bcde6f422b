"""The border between our estimators and scikit-learn's validation.

This is the one file that touches scikit-learn's private functions, so that a
new release of scikit-learn can break one file only.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
from sklearn.base import _fit_context as fit_context
from sklearn.utils._param_validation import HasMethods, Interval, Options, StrOptions
from sklearn.utils._set_output import _get_output_config
from sklearn.utils.validation import (
    _check_feature_names,
    _check_feature_names_in,
    _check_sample_weight,
    validate_data,
)

from sktransfer._warnings import warn
from sktransfer.images._containers import is_tensor
from sktransfer.images._images import Images, as_images

try:  # scikit-learn >= 1.9
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in where scikit-learn has no callbacks yet."""

    def with_callbacks(method):  # type: ignore[no-redef]
        return method


__all__ = [
    "SHARED_CONSTRAINTS",
    "CallbackSupportMixin",
    "FitProgress",
    "HasMethods",
    "Interval",
    "Options",
    "StrOptions",
    "check_images",
    "check_weight",
    "fit_context",
    "image_column_names",
    "is_empty_part",
    "keep_index",
    "set_image_tags",
    "warn",
    "with_callbacks",
]

# Of the parameters that the extractor and fine-tuning have in common, in scikit-learn's terms.
SHARED_CONSTRAINTS: dict[str, list[Any]] = {
    "backbone": [str, HasMethods(["forward"]), callable],
    "weights": [str, HasMethods(["__fspath__"]), None],
    "pooling": [StrOptions({"auto", "avg", "max", "avgmax", "gem", "cls", "flatten"})],
    "preprocessing": [StrOptions({"auto"}), dict, callable],
    "image_shape": [tuple, list, None],
    "device": [str],
    "precision": [StrOptions({"float32", "bfloat16", "float16"})],
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


def check_images(estimator: Any, X: Any, *, reset: bool, name: str = "X") -> Images:
    """Validate ``X``, set or check what was seen in ``fit``, and wrap its images.

    No pixel is decoded here. Flat numeric rows (those that ``image_shape``
    speaks of) go through scikit-learn's own :func:`validate_data`, so that its
    messages stand for shapes, sparse input, missing values and names. Where it was given by
    another `name`, errors begin with that.
    """
    try:
        return _checked_images(estimator, X, reset)
    except (TypeError, ValueError) as error:
        if name == "X":
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error


def _checked_images(estimator: Any, X: Any, reset: bool) -> Images:
    if estimator.image_shape is not None and _is_flat(X):
        # What it returns is left aside: it makes floats of nullable and object integers.
        validate_data(estimator, X, reset=reset, ensure_all_finite=estimator.on_error == "raise")
        return as_images(X, estimator.image_shape)

    images = as_images(X, estimator.image_shape)
    if len(images) == 0:
        raise ValueError(
            f"Found array with 0 sample(s) while a minimum of 1 is required by "
            f"{type(estimator).__name__}: X holds no image."
        )
    if hasattr(X, "columns"):
        _check_feature_names(estimator, X, reset=reset)
    elif reset:
        _check_feature_names(estimator, None, reset=True)
        if images.feature_names is not None:  # a named Series
            estimator.feature_names_in_ = np.asarray(images.feature_names, dtype=object)
    if reset:
        estimator.n_features_in_ = images.n_columns
    elif images.n_columns != estimator.n_features_in_:
        raise ValueError(
            f"X has {images.n_columns} image column(s), but {type(estimator).__name__} "
            f"was fitted on {estimator.n_features_in_} columns. Give X in the form it had in fit: "
            "the same image columns, or flat rows of as many pixels."
        )
    return images


def is_empty_part(estimator: Any, X: Any) -> bool:
    """Whether ``X`` is a data frame or Series without rows, as parts of a larger one may be.

    Its columns must be those of ``fit`` all the same.
    """
    if not (hasattr(X, "columns") or hasattr(X, "to_frame")) or len(X):
        return False
    if hasattr(X, "columns"):
        _check_feature_names(estimator, X, reset=False)
    return True


def check_weight(sample_weight: Any, n_samples: int) -> np.ndarray:
    """Return one weight per row as float64; ``None``: ones. Negative ones are an error."""
    return _check_sample_weight(
        sample_weight, np.empty((n_samples, 1)), dtype=np.float64, ensure_non_negative=True
    )


def image_column_names(estimator: Any, input_features: Any) -> list[str]:
    """Return a name for each image column; a single column without one has the name ""."""
    names = _check_feature_names_in(estimator, input_features, generate_names=False)
    n_columns = estimator._n_image_columns
    if names is None or estimator.n_features_in_ != n_columns:  # pixel columns: one image
        return [f"x{j}" for j in range(n_columns)] if n_columns > 1 else [""]
    return [str(name) for name in names]


def set_image_tags(estimator: Any, tags: Any) -> Any:
    """Say in scikit-learn's tags what an estimator of images takes and gives."""
    # With image_shape X is a table of numbers; without, it may well be a list of paths.
    tags.input_tags.one_d_array = estimator.image_shape is None
    tags.input_tags.string = estimator.image_shape is None
    tags.input_tags.three_d_array = True
    tags.input_tags.allow_nan = estimator.on_error != "raise"
    tags.transformer_tags.preserves_dtype = ["float32"]
    return tags


def keep_index(estimator: Any, columns: np.ndarray, X: Any) -> Any:
    """Give the output a pandas Series' index where ``set_output("pandas")`` wants a frame.

    scikit-learn's own wrapper keeps the index of data frames only, and a ColumnTransformer
    that names its column by a string passes a Series: its blocks would be joined on
    different indices.
    """
    is_series = hasattr(X, "index") and hasattr(X, "to_frame")
    if not is_series or _get_output_config("transform", estimator)["dense"] != "pandas":
        return columns
    import pandas as pd

    return pd.DataFrame(columns, index=X.index)


class FitProgress:
    """Tells scikit-learn's callbacks, where it has them, how far ``fit`` has come."""

    def __init__(self, estimator: Any, X: Any, y: Any, n_images: int = 0) -> None:
        self._estimator, self._X, self._y, self._n_images = estimator, X, y, n_images
        # A step a percent, where somebody listens.
        self._n_steps = min(100, n_images) if getattr(estimator, "_skl_callbacks", None) else 0
        self._n_done = self._n_told = 0
        self._context = None
        if hasattr(estimator, "_init_callback_context"):
            self._context = estimator._init_callback_context(max_subtasks=self._n_steps)
            self._context.call_on_fit_task_begin(estimator=estimator, X=X, y=y)

    def advance(self, n: int) -> None:
        """Note that ``n`` more images are done."""
        self._n_done += n
        while self._context and self._n_told < self._n_done * self._n_steps // self._n_images:
            self._n_told += 1
            step = self._context.subcontext(task_name="images")
            step.call_on_fit_task_begin(estimator=self._estimator)
            step.call_on_fit_task_end(estimator=self._estimator)

    def done(self) -> None:
        if self._context is not None:
            self._context.call_on_fit_task_end(
                estimator=self._estimator, X=self._X, y=self._y, reconstruction_attributes={}
            )


def _is_flat(X: Any) -> bool:
    """Whether ``X`` is a table of numbers, or what scikit-learn should refuse as one."""
    if hasattr(X, "columns"):  # a data frame is flat unless it holds strings, bytes, images …
        return all(_is_number_dtype(dtype) for dtype in X.dtypes)
    if hasattr(X, "toarray"):  # scipy sparse
        return True
    if isinstance(X, (list, tuple)):
        row: Any = X[0] if X else None
        is_row = isinstance(row, (list, tuple)) or getattr(row, "ndim", 0) == 1
        return _is_number(row[0] if is_row and len(row) else row)
    if is_tensor(X):
        return X.ndim <= 2
    if not hasattr(X, "dtype") and hasattr(X, "__array__"):
        X = np.asarray(X)
    ndim, dtype = getattr(X, "ndim", None), getattr(X, "dtype", None)
    if ndim is None or ndim > 2 or dtype is None:
        return False
    if _is_number_dtype(dtype) or getattr(dtype, "kind", "") == "c":
        return True
    return ndim == 2 and isinstance(X, np.ndarray) and X.size > 0 and _is_number(X.flat[0])


def _is_number_dtype(dtype: Any) -> bool:
    is_numeric = getattr(dtype, "is_numeric", None)  # polars
    if callable(is_numeric):
        return bool(is_numeric())
    return getattr(dtype, "kind", "O") in "biuf"


def _is_number(value: Any) -> bool:
    """Whether a cell is a number, or a dict that is no ``{"bytes": …, "path": …}`` either."""
    if isinstance(value, dict):
        return "bytes" not in value and "path" not in value
    is_scalar = np.isscalar(value) or (is_tensor(value) and value.ndim == 0)
    return is_scalar and not isinstance(value, (str, bytes))
