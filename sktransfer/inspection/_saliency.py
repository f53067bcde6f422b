"""SaliencyDisplay: which parts of an image a prediction depends on, by hiding them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logit

from sktransfer.images._images import BadImage, as_images
from sktransfer.inspection._grid import (
    draw_grid,
    grid_axes,
    method_of,
    pair_places,
    parameter_of,
    read_thumbnails,
    short,
)
from sktransfer.store._store import keep_nothing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage
    from matplotlib.text import Text

_LEAST = 1e-6  # probability; forests give 0 and 1
_METHODS = ("predict_proba", "decision_function", "predict")


class SaliencyDisplay:
    """How much a score falls when a part of the image is hidden.

    Occlusion [1]_ needs no gradient, and so explains any pipeline from images to scores, an
    extractor with a random forest as well as a fine-tuned network. It is made by
    :meth:`from_estimator`. All parameters are attributes.

    Parameters
    ----------
    X : list, array, Series or data frame of n_images images
    maps : array-like of shape (n_images, n_patches, n_patches)
        How much the score falls.
    names : list of str of length n_images
        What is explained, for instance the class and its score.
    score_name : str, default="score"
    image_shape : tuple of int, default=None
        For flat rows of pixels.

    Attributes
    ----------
    images_ : list of matplotlib AxesImage of length 2 * n_images
        Each image, and once more below its map.
    maps_ : list of matplotlib AxesImage of length n_images
    texts_ : list of matplotlib Text
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    References
    ----------
    .. [1] M. D. Zeiler and R. Fergus. "Visualizing and understanding convolutional networks."
       ECCV 2014. https://doi.org/10.1007/978-3-319-10590-1_53

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sktransfer.inspection import SaliencyDisplay
    >>> X, y = load_digits(return_X_y=True)
    >>> model = LogisticRegression(max_iter=1000).fit(X / 16, y)
    >>> display = SaliencyDisplay.from_estimator(model, X[:2] / 16, image_shape=(8, 8))
    >>> display.maps.shape
    (2, 8, 8)
    """

    images_: list[AxesImage]
    maps_: list[AxesImage]
    texts_: list[Text]
    ax_: Axes
    figure_: Figure | SubFigure

    def __init__(
        self,
        X,
        maps: ArrayLike,
        names: list[str],
        *,
        score_name: str = "score",
        image_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.X, self.maps, self.names = X, maps, names
        self.score_name, self.image_shape = score_name, image_shape

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        *,
        target=None,
        column=None,
        n_patches=8,
        batch_size=64,
        image_shape=None,
        ax=None,
    ) -> Self:
        """Hide parts of each image, predict, and draw the display.

        A window of two patches a side, filled with the image's mean colour, moves over the image
        patch by patch: 81 predictions an image with the default. A patch gets the mean fall of
        the score over the windows that cover it. No embedding of these images is kept, whatever
        `memory` the estimator's extractor has.

        Parameters
        ----------
        estimator : fitted classifier, regressor or outlier detector
            The log-odds of ``predict_proba`` are explained, else ``decision_function``, else,
            without classes, ``predict``.
        X : list, array, Series or data frame of images
            The few images to explain. A data frame may hold other columns, too.
        target : label, default=None
            The class whose score is explained. ``None``: of each image the predicted class.
        column : str, default=None
            The image column of a data frame that has several columns.
        n_patches : int, default=8
            Patches a side.
        batch_size : int, default=64
            Images given to the estimator at once.
        image_shape : tuple of int, default=None
            For flat rows of pixels. ``None``: that of the estimator, or of its extractor.
        ax : matplotlib Axes, default=None
            As in `plot`.

        Returns
        -------
        display : SaliencyDisplay
        """
        shape = image_shape if image_shape is not None else parameter_of(estimator, "image_shape")
        rows = _Rows(X, column, shape, parameter_of(estimator, "value_range"))
        classes = list(getattr(estimator, "classes_", []))
        method = method_of(estimator, _METHODS[:2] if classes else _METHODS)
        if target is not None and target not in classes:
            known = f"one of {classes}" if classes else "None for an estimator without classes"
            raise ValueError(f"target must be {known}; got {target!r}")
        predict, maps, names = getattr(estimator, method), [], []
        with keep_nothing():
            for i in range(len(rows)):
                pixels = rows.pixels(i)
                cells = [pixels, *_hidden(pixels, n_patches)]
                scores = np.concatenate(
                    [
                        _scores(predict, rows.like(i, cells[k : k + batch_size]), len(classes))
                        for k in range(0, len(cells), batch_size)
                    ]
                )
                k = scores[0].argmax() if target is None else classes.index(target)
                shown = f"{scores[0, k]:.2f}" if classes else f"{scores[0, k]:.4g}"
                names.append(f"{short(classes[k])}: {shown}" if classes else shown)
                of_target = scores[:, k]
                if method == "predict_proba":
                    # Probabilities near 1 hardly fall, whatever is hidden.
                    of_target = logit(of_target.clip(_LEAST, 1 - _LEAST))
                maps.append(_spread(of_target[0] - of_target[1:], n_patches))
        name = {"predict_proba": "log-odds", "predict": "prediction"}.get(method, "score")
        display = cls(rows.images_only, np.array(maps), names, score_name=name, image_shape=shape)
        return display.plot(ax=ax)

    def plot(self, *, ax: Axes | None = None, n_columns: int = 3) -> Self:
        """Draw each image, and beside it the image below its map.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            ``None``: those of a new figure.
        n_columns : int, default=3
            Number of images in a line.

        Returns
        -------
        self : SaliencyDisplay
        """
        maps = np.asarray(self.maps)
        n = len(maps)
        n_columns = min(n_columns, n)
        n_lines = -(-n // n_columns)
        self.ax_ = grid_axes("SaliencyDisplay", ax, n_lines, 2 * n_columns + 1, 1)
        self.figure_ = self.ax_.figure
        thumbnails = read_thumbnails(self.X, range(n), self.image_shape)
        grey = [np.repeat(t.mean(axis=2, keepdims=True), 3, 2).astype(np.uint8) for t in thumbnails]
        twice = [image for pair in zip(thumbnails, grey, strict=True) for image in pair]
        titles = [title for name in self.names for title in (name, "")]
        places = pair_places(n, n_columns)
        self.images_, self.texts_ = draw_grid(self.ax_, twice, titles, places)
        most = max(float(np.abs(maps).max()), 1e-12)
        self.maps_ = [
            self.ax_.imshow(
                m, extent=image.get_extent(), cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.6
            )
            for m, image in zip(maps, self.images_[1::2], strict=True)
        ]
        self.ax_.set(xlim=(0, max(x for x, _ in places) + 1))
        label = f"fall of the\n{self.score_name} if hidden"
        self.figure_.colorbar(self.maps_[0], ax=self.ax_, label=label, shrink=0.8)
        self.ax_.set_title("What the prediction depends on")
        return self


class _Rows:
    """Rows of X whose image can be replaced."""

    def __init__(self, X, column: str | None, image_shape, value_range) -> None:
        self._X, self._column, self._value_range = X, column, value_range
        self.images_only, self._values = X, None
        if hasattr(X, "columns") and image_shape is None:
            if not hasattr(X, "iloc"):
                raise TypeError(f"X is a {type(X).__name__}; give X.to_pandas()")
            if column is None and X.shape[1] > 1:
                raise ValueError(f"X has the columns {list(X.columns)}; name one as column")
            self._column = X.columns[0] if column is None else column
            self.images_only = list(X[self._column])
        elif image_shape is not None or getattr(getattr(X, "dtype", None), "kind", "O") in "biuf":
            self._values = np.asarray(X)  # the estimator may expect just such numbers
        self._images = as_images(self.images_only, image_shape, value_range)
        flat = self._values is not None and self._values.ndim == 2
        self._shape = np.asarray(self._images.decode(0)).shape[:2] if flat else None

    def __len__(self) -> int:
        return len(self._images)

    def pixels(self, i: int) -> np.ndarray:
        """Return an image as an array (height, width) or (height, width, channels)."""
        if self._values is None:
            try:
                pixels = np.asarray(self._images.decode(i))
            except BadImage as error:
                raise ValueError(f"{self._images.where(i)}: {error}") from None
            if self._value_range is None:
                return pixels
            low, high = self._value_range  # in which the estimator reads any image
            return low + pixels / 255 * (high - low)
        values = self._values[i]
        return values if self._shape is None else values.reshape(*self._shape, -1)

    def like(self, i: int, cells: list[np.ndarray]) -> object:
        """Return row `i` once for each of these images, in the form of X."""
        if self._values is not None:
            stack = np.stack(cells)
            if self._shape is None:
                return stack
            stack = stack.reshape(len(cells), -1)
            is_frame = hasattr(self._X, "columns")
            return type(self._X)(stack, columns=self._X.columns) if is_frame else stack
        if not hasattr(self._X, "columns"):
            return cells
        rows = self._X.iloc[[i] * len(cells)].reset_index(drop=True)
        column = np.empty(len(cells), dtype=object)
        column[:] = cells
        rows[self._column] = column
        return rows


def _hidden(pixels: np.ndarray, n_patches: int) -> list[np.ndarray]:
    """Return the image with each window hidden: those that end at patch 0…n_patches, in lines."""
    mean = pixels.mean(axis=(0, 1)).astype(pixels.dtype)
    edges = [np.linspace(0, side, n_patches + 1).round().astype(int) for side in pixels.shape[:2]]
    hidden = []
    for i in range(n_patches + 1):
        for j in range(n_patches + 1):
            copy = pixels.copy()
            (top, bottom), (left, right) = (
                (edge[max(k - 1, 0)], edge[min(k + 1, n_patches)])
                for edge, k in zip(edges, (i, j), strict=True)
            )
            copy[top:bottom, left:right] = mean
            hidden.append(copy)
    return hidden


def _spread(falls: np.ndarray, n_patches: int) -> np.ndarray:
    """Return for each patch the mean over the four windows that cover it."""
    falls = falls.reshape(n_patches + 1, n_patches + 1)
    return (falls[:-1, :-1] + falls[1:, :-1] + falls[:-1, 1:] + falls[1:, 1:]) / 4


def _scores(predict: Callable, X, n_classes: int) -> np.ndarray:
    """Return scores of shape (n_samples, n_classes or 1)."""
    scores = np.asarray(predict(X))
    scores = scores[:, None] if scores.ndim == 1 else scores
    is_of_second = n_classes == 2 and scores.shape[1] == 1  # a decision_function
    return np.hstack([-scores, scores]) if is_of_second else scores
