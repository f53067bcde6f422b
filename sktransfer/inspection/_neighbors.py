"""NeighborsDisplay: images and their nearest training images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.neighbors import NearestNeighbors

from sktransfer.inspection._grid import (
    columns_of,
    draw_grid,
    grid_axes,
    one_a_row,
    parameter_of,
    read_thumbnails,
    short,
    transform,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage
    from matplotlib.text import Text


class NeighborsDisplay:
    """Images, each with the training images that an extractor's columns call nearest.

    It is made by :meth:`from_estimator` or :meth:`from_features`. All parameters are attributes.
    Images are read when they are drawn.

    Parameters
    ----------
    X_train, X : list, array, Series or data frame of images
    neighbors : array-like of shape (n_images, n_neighbors), int
        Rows of `X_train`, the nearest first.
    distances : array-like of shape (n_images, n_neighbors)
    y_train : array-like of shape (n_train,), default=None
        Labels, for the titles.
    image_shape : tuple of int, default=None
        For flat rows of pixels.

    Attributes
    ----------
    images_ : list of matplotlib AxesImage
        Line by line: the image, then its neighbours.
    texts_ : list of matplotlib Text
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import PretrainedFeatureExtractor
    >>> from sktransfer.inspection import NeighborsDisplay
    >>> X, y = load_digits(return_X_y=True)
    >>> extractor = PretrainedFeatureExtractor(image_shape=(8, 8)).fit(X / 16)
    >>> display = NeighborsDisplay.from_estimator(
    ...     extractor, X[:100] / 16, X[100:102] / 16, y_train=y[:100], n_neighbors=3
    ... )
    >>> display.neighbors.shape
    (2, 3)
    """

    images_: list[AxesImage]
    texts_: list[Text]
    ax_: Axes
    figure_: Figure | SubFigure

    def __init__(
        self,
        X_train,
        X,
        neighbors: ArrayLike,
        distances: ArrayLike,
        *,
        y_train: ArrayLike | None = None,
        image_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.X_train, self.X = X_train, X
        self.neighbors, self.distances = neighbors, distances
        self.y_train, self.image_shape = y_train, image_shape

    @classmethod
    def from_estimator(
        cls, estimator, X_train, X, *, y_train=None, n_neighbors=5, metric="cosine", ax=None
    ) -> Self:
        """Search by the columns that an extractor computes, and draw the display.

        Parameters
        ----------
        estimator : transformer
            A :class:`~sktransfer.PretrainedFeatureExtractor`, a pipeline that ends in a
            transformer, or anything else with `transform`. One that is not fitted is fitted on
            `X_train`, as a copy.
        X_train, X : list, array, Series or data frame of images
            Where neighbours are searched, and for which images.
        y_train : array-like of shape (n_train,), default=None
            Labels, for the titles.
        n_neighbors : int, default=5
        metric : str or callable, default="cosine"
            As in :class:`sklearn.neighbors.NearestNeighbors`.
        ax : matplotlib Axes, default=None
            As in `plot`.

        Returns
        -------
        display : NeighborsDisplay
        """
        both = transform(estimator, X_train), transform(estimator, X)
        shape = parameter_of(estimator, "image_shape")
        options = {"n_neighbors": n_neighbors, "metric": metric, "image_shape": shape, "ax": ax}
        return cls.from_features(*both, X_train, X, y_train=y_train, **options)

    @classmethod
    def from_features(
        cls,
        features_train,
        features,
        X_train,
        X,
        *,
        y_train=None,
        n_neighbors=5,
        metric="cosine",
        image_shape=None,
        ax=None,
    ) -> Self:
        """Search by columns that are computed already, and draw the display.

        Parameters
        ----------
        features_train, features : array-like of shape (n_images, n_features)
            The columns of `X_train` and of `X`.
        X_train, X, y_train, n_neighbors, metric, ax
            As in `from_estimator`.
        image_shape : tuple of int, default=None
            For flat rows of pixels.

        Returns
        -------
        display : NeighborsDisplay
        """
        features_train = columns_of(X_train, features_train, "features_train")
        features = columns_of(X, features, "features")
        n_neighbors = min(n_neighbors, len(features_train))
        search = NearestNeighbors(n_neighbors=n_neighbors, metric=metric).fit(features_train)
        distances, neighbors = search.kneighbors(features)
        display = cls(X_train, X, neighbors, distances, y_train=y_train, image_shape=image_shape)
        return display.plot(ax=ax)

    def plot(self, *, ax: Axes | None = None) -> Self:
        """Draw the images, a line for each.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            ``None``: those of a new figure.

        Returns
        -------
        self : NeighborsDisplay
        """
        neighbors, distances = np.asarray(self.neighbors), np.asarray(self.distances)
        n_images, n_neighbors = neighbors.shape
        self.ax_ = grid_axes("NeighborsDisplay", ax, n_images, n_neighbors + 1, 2)
        self.figure_ = self.ax_.figure
        labels = None if self.y_train is None else one_a_row(self.y_train, self.X_train)
        ours = read_thumbnails(self.X, range(n_images), self.image_shape)
        thumbnails, titles, places = [], [], []
        for i in range(n_images):
            thumbnails += [ours[i], *read_thumbnails(self.X_train, neighbors[i], self.image_shape)]
            titles.append(f"image {i}")
            for row, distance in zip(neighbors[i], distances[i], strict=True):
                label = "" if labels is None else f"{short(labels[row])}\n"
                titles.append(f"{label}row {row}, {distance:.2f}")
            # A gap separates the image from its neighbours.
            places += [(0.0, i), *((k + 1.2, i) for k in range(n_neighbors))]
        self.images_, self.texts_ = draw_grid(self.ax_, thumbnails, titles, places)
        self.ax_.set_title("Nearest training images, with their distances")
        return self
