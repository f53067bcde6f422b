"""TopLossesDisplay: the most confident mistakes, as thumbnails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import is_regressor
from sklearn.utils import check_consistent_length

from sktransfer.inspection._grid import (
    draw_grid,
    grid_axes,
    method_of,
    one_a_row,
    parameter_of,
    read_thumbnails,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage
    from matplotlib.text import Text


class TopLossesDisplay:
    """The mistakes that a model is most confident of: mislabelled images, or what it cannot see.

    It is made by :meth:`from_estimator` or :meth:`from_predictions`. All parameters are attributes.
    Images are read when they are drawn, by their row.

    Parameters
    ----------
    X : list, array, Series or data frame of images
    rows : array-like of shape (n_images,), int
        Rows of `X`, the worst first.
    y_true, y_pred : array-like of shape (n_images,)
        The labels or numbers of these rows, and what was predicted.
    loss : array-like of shape (n_images,)
        The score of the predicted class, or the absolute error of a number.
    image_shape : tuple of int, default=None
        For flat rows of pixels.

    Attributes
    ----------
    images_ : list of matplotlib AxesImage
    texts_ : list of matplotlib Text
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sktransfer.inspection import TopLossesDisplay
    >>> X, y = load_digits(return_X_y=True)
    >>> model = LogisticRegression(max_iter=1000).fit(X[:500] / 16, y[:500])
    >>> scores = model.predict_proba(X[500:] / 16)
    >>> display = TopLossesDisplay.from_predictions(
    ...     X[500:] / 16, y[500:], scores, n_images=6, image_shape=(8, 8)
    ... )
    >>> len(display.images_)
    6
    """

    images_: list[AxesImage]
    texts_: list[Text]
    ax_: Axes
    figure_: Figure | SubFigure

    def __init__(
        self,
        X,
        rows: ArrayLike,
        y_true: ArrayLike,
        y_pred: ArrayLike,
        loss: ArrayLike,
        *,
        image_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.X, self.rows, self.y_true, self.y_pred = X, rows, y_true, y_pred
        self.loss, self.image_shape = loss, image_shape

    @classmethod
    def from_estimator(cls, estimator, X, y, *, n_images=12, ax=None) -> Self:
        """Predict, and draw the worst mistakes.

        Parameters
        ----------
        estimator : fitted classifier or regressor
            A pipeline from images to predictions, or a fine-tuned estimator. A classifier's
            ``predict_proba`` is used or, without one, its ``decision_function``.
        X : list, array, Series or data frame of images
        y : array-like of shape (n_samples,)
        n_images : int, default=12
            How many are drawn at most.
        ax : matplotlib Axes, default=None
            As in `plot`.

        Returns
        -------
        display : TopLossesDisplay
        """
        if is_regressor(estimator):
            scores, classes = estimator.predict(X), None
        else:
            method = method_of(estimator, ("predict_proba", "decision_function"))
            scores, classes = getattr(estimator, method)(X), estimator.classes_
        shape = parameter_of(estimator, "image_shape")
        options = {"n_images": n_images, "image_shape": shape, "ax": ax}
        return cls.from_predictions(X, y, scores, classes=classes, **options)

    @classmethod
    def from_predictions(
        cls, X, y_true, y_score, *, classes=None, n_images=12, image_shape=None, ax=None
    ) -> Self:
        """Draw the worst of predictions that are there already, such as those of cross-validation.

        Parameters
        ----------
        X : list, array, Series or data frame of images
        y_true : array-like of shape (n_samples,)
        y_score : array-like of shape (n_samples, n_classes) or (n_samples,)
            Probabilities or decision values of the classes; of the second of two classes, if
            `classes` has two; otherwise the predicted numbers of a regression.
        classes : array-like of shape (n_classes,), default=None
            The labels of the columns. ``None``: the sorted labels of `y_true`, if `y_score` has
            columns.
        n_images : int, default=12
        image_shape : tuple of int, default=None
            For flat rows of pixels.
        ax : matplotlib Axes, default=None
            As in `plot`.

        Returns
        -------
        display : TopLossesDisplay
        """
        y_true, y_score = one_a_row(y_true, X), np.asarray(y_score)
        check_consistent_length(y_true, y_score)
        y_score = y_score.ravel() if y_score.shape[1:] == (1,) else y_score
        if y_score.dtype.kind not in "fiu":
            raise ValueError("y_score holds labels: give what predict_proba returns.")
        if classes is None and y_score.ndim == 1:
            try:
                y_pred, loss = y_score, np.abs(y_score - y_true.astype(float))
            except (TypeError, ValueError):
                raise ValueError(
                    "y_true holds labels, and y_score has one column: give classes, of which "
                    "y_score is of the second"
                ) from None
            order = np.argsort(-loss, kind="stable")
        else:
            classes = np.unique(y_true) if classes is None else np.asarray(classes)
            y_pred, loss = _predicted(y_score, classes)
            order = np.argsort(-loss, kind="stable")
            order = order[(y_pred != y_true)[order]]
        rows = order[:n_images]
        display = cls(X, rows, y_true[rows], y_pred[rows], loss[rows], image_shape=image_shape)
        return display.plot(ax=ax)

    def plot(self, *, ax: Axes | None = None, n_columns: int = 4) -> Self:
        """Draw the thumbnails, the worst first.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            ``None``: those of a new figure.
        n_columns : int, default=4

        Returns
        -------
        self : TopLossesDisplay
        """
        columns = [np.asarray(c) for c in (self.rows, self.y_true, self.y_pred, self.loss)]
        n = len(columns[0])
        n_columns = min(n_columns, max(n, 1))
        n_lines = -(-max(n, 1) // n_columns)
        self.ax_ = grid_axes("TopLossesDisplay", ax, n_lines, n_columns, 3)
        self.figure_ = self.ax_.figure
        titles = [
            f"row {row}, {loss:.3g}\nis {short(true)}\npredicted {short(predicted, 14)}"
            for row, true, predicted, loss in zip(*columns, strict=True)
        ]
        thumbnails = read_thumbnails(self.X, columns[0], self.image_shape)
        places = [(float(k % n_columns), k // n_columns) for k in range(n)]
        self.images_, self.texts_ = draw_grid(self.ax_, thumbnails, titles, places)
        self.ax_.set_title("Largest errors" if n else "No mistakes")
        return self


def _predicted(y_score: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted class of each row and its score."""
    if y_score.ndim == 1:
        if len(classes) != 2:
            raise ValueError(
                f"y_score has one column, which is of two classes; got classes={classes!r}"
            )
        # A decision value is around 0, a probability around 0.5.
        is_probability = y_score.min() >= 0 and y_score.max() <= 1
        first = 1 - y_score if is_probability else -y_score
        y_score = np.column_stack([first, y_score])
    if y_score.shape[1] != len(classes):
        raise ValueError(
            f"y_score has {y_score.shape[1]} columns for {len(classes)} classes; give the labels "
            "of the columns as classes"
        )
    return classes[y_score.argmax(axis=1)], y_score.max(axis=1)
