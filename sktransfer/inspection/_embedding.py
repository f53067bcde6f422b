"""EmbeddingDisplay: where an extractor puts images, in two dimensions, with thumbnails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler

from sktransfer.inspection._axes import COLORS, new_axes, style_of
from sktransfer.inspection._grid import (
    columns_of,
    one_a_row,
    parameter_of,
    read_thumbnails,
    transform,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.offsetbox import AnnotationBbox

_THUMBNAIL = 48  # pixels
_LEAST_DISTANCE = 0.11  # between thumbnails, as a share of the axes


class EmbeddingDisplay:
    """Images as points in two dimensions, some of them as thumbnails.

    It is made by :meth:`from_estimator` or :meth:`from_features`. All parameters are attributes.

    Parameters
    ----------
    X : list, array, Series or data frame of n_samples images
    points : array-like of shape (n_samples, 2)
    y : array-like of shape (n_samples,), default=None
        Labels: a colour and a marker each, or numbers of more than 20 values: a colour scale.
    axis_names : tuple of two str, default=("", "")
    image_shape : tuple of int, default=None
        For flat rows of pixels.

    Attributes
    ----------
    scatters_ : list of matplotlib PathCollection
        One for each label.
    thumbnails_ : list of matplotlib AnnotationBbox
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer.inspection import EmbeddingDisplay
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> display = EmbeddingDisplay.from_features(X, X / 16, y, image_shape=(8, 8))
    >>> len(display.scatters_)
    3
    """

    scatters_: list[PathCollection]
    thumbnails_: list[AnnotationBbox]
    ax_: Axes
    figure_: Figure | SubFigure

    def __init__(
        self,
        X,
        points: ArrayLike,
        y: ArrayLike | None = None,
        *,
        axis_names: tuple[str, str] = ("", ""),
        image_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.X, self.points, self.y = X, points, y
        self.axis_names, self.image_shape = axis_names, image_shape

    @classmethod
    def from_estimator(
        cls, estimator, X, y=None, *, method="pca", n_thumbnails=30, random_state=0, ax=None
    ) -> Self:
        """Compute the columns of an extractor, reduce them to two, and draw the display.

        Parameters
        ----------
        estimator : transformer
            A :class:`~sktransfer.PretrainedFeatureExtractor`, a pipeline that ends in a
            transformer, or anything else with `transform`. One that is not fitted is fitted on
            `X`, as a copy.
        X : list, array, Series or data frame of n_samples images
        y : array-like of shape (n_samples,), default=None
        method : {"pca", "tsne"} or transformer, default="pca"
            Reduces the standardised columns. ``"tsne"`` shows clusters, but distances
            between them mean nothing.
        n_thumbnails : int, default=30
            How many at most; they do not overlap.
        random_state : int, RandomState instance or None, default=0
        ax : matplotlib Axes, default=None
            As in `plot`.

        Returns
        -------
        display : EmbeddingDisplay
        """
        options = {"method": method, "n_thumbnails": n_thumbnails, "random_state": random_state}
        shape = parameter_of(estimator, "image_shape")
        features = transform(estimator, X)
        return cls.from_features(features, X, y, image_shape=shape, ax=ax, **options)

    @classmethod
    def from_features(
        cls,
        features,
        X,
        y=None,
        *,
        method="pca",
        n_thumbnails=30,
        random_state=0,
        image_shape=None,
        ax=None,
    ) -> Self:
        """Reduce columns that are computed already to two, and draw the display.

        Parameters
        ----------
        features : array-like of shape (n_samples, n_features)
        X, y, method, n_thumbnails, random_state, ax
            As in `from_estimator`.
        image_shape : tuple of int, default=None
            For flat rows of pixels.

        Returns
        -------
        display : EmbeddingDisplay
        """
        features = columns_of(X, features, "features", n_least=2)
        features = StandardScaler().fit_transform(features)
        names: tuple[str, str] = ("", "")
        if method == "pca":
            pca = PCA(n_components=2, random_state=random_state)
            points = pca.fit_transform(features)
            first, second = pca.explained_variance_ratio_
            names = f"PC 1 ({first:.0%} of the variance)", f"PC 2 ({second:.0%})"
        elif method == "tsne":
            perplexity = min(30.0, (len(features) - 1) / 3)
            tsne = TSNE(perplexity=perplexity, random_state=random_state)
            points, names = tsne.fit_transform(features), ("t-SNE 1", "t-SNE 2")
        elif hasattr(method, "fit_transform"):
            points = np.asarray(method.fit_transform(features))[:, :2]
        else:
            raise ValueError(
                f'method must be "pca", "tsne" or a transformer of scikit-learn; got {method!r}'
            )
        display = cls(X, points, y, axis_names=names, image_shape=image_shape)
        return display.plot(ax=ax, n_thumbnails=n_thumbnails)

    def plot(self, *, ax: Axes | None = None, n_thumbnails: int = 30) -> Self:
        """Draw points and thumbnails.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            ``None``: those of a new figure.
        n_thumbnails : int, default=30

        Returns
        -------
        self : EmbeddingDisplay
        """
        points = np.asarray(self.points)
        self.ax_ = ax if ax is not None else new_axes("EmbeddingDisplay", size=(8.0, 6.0))[0]
        self.figure_ = self.ax_.figure
        self._frames = np.full(len(points), "black", dtype=object)  # of thumbnails
        self.scatters_ = self._draw_points(points)
        self.thumbnails_ = self._draw_thumbnails(points, n_thumbnails)
        self.ax_.set(xlabel=self.axis_names[0], ylabel=self.axis_names[1])
        self.ax_.set(xticks=[], yticks=[], title=f"{len(points)} images")
        return self

    def _draw_points(self, points: np.ndarray) -> list[PathCollection]:
        from matplotlib import colormaps

        style: dict = {"s": 14, "linewidths": 0}
        if self.y is None:
            return [self.ax_.scatter(points[:, 0], points[:, 1], color=COLORS[0], **style)]
        y = one_a_row(self.y, points)
        y = y.astype(str) if y.dtype == object else y  # None beside labels, too
        labels, codes = np.unique(y, return_inverse=True)  # NaN is one label
        if y.dtype.kind in "fiu" and len(labels) > 20:
            style |= {"cmap": colormaps["cividis"].with_extremes(bad="0.8"), "plotnonfinite": True}
            scatter = self.ax_.scatter(points[:, 0], points[:, 1], c=y, **style)
            self.figure_.colorbar(scatter, ax=self.ax_, label="y")
            return [scatter]
        scatters = []
        for k, label in enumerate(labels):
            style["color"], style["marker"] = style_of(k)
            self._frames[codes == k] = style["color"]
            rows = points[codes == k]
            scatters.append(self.ax_.scatter(rows[:, 0], rows[:, 1], label=label, **style))
        columns = -(-len(labels) // 20)
        self.ax_.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, ncols=columns)
        return scatters

    def _draw_thumbnails(self, points: np.ndarray, n: int) -> list[AnnotationBbox]:
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage

        low, high = points.min(axis=0), points.max(axis=0)
        scaled = (points - low) / np.maximum(high - low, 1e-12)
        chosen: list[int] = []
        # In an order that has nothing to do with that of X, which is often sorted by class.
        for i in np.random.default_rng(0).permutation(len(points)):
            distances = np.abs(scaled[chosen] - scaled[i]).max(axis=1) if chosen else np.ones(1)
            if len(chosen) < n and distances.min() >= _LEAST_DISTANCE:
                chosen.append(int(i))
        boxes = []
        for i, image in zip(
            chosen, read_thumbnails(self.X, chosen, self.image_shape, _THUMBNAIL), strict=True
        ):
            box = OffsetImage(image, zoom=0.6)
            frame = {"linewidth": 1.0, "edgecolor": self._frames[i]}
            annotation = AnnotationBbox(box, points[i], pad=0.1, bboxprops=frame)
            self.ax_.add_artist(annotation)
            boxes.append(annotation)
        self.ax_.margins(0.08)
        return boxes
