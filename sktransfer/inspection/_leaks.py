"""LeaksDisplay: pairs of images that a training set shares with a test set."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike

from sktransfer.inspection._grid import draw_grid, grid_axes, pair_places, read_thumbnails

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage
    from matplotlib.text import Text


class LeaksDisplay:
    """Pairs of images side by side: a test image, and its twin in the training set.

    It is made by :meth:`from_leaks`, or from plain arrays. All parameters are attributes. Images
    are read when they are drawn.

    Read more in the :ref:`User Guide <leaks>`.

    Parameters
    ----------
    X_train : list, array, Series or data frame of n_train images
    X_test : list, array, Series or data frame of n_test images, or None
        ``None``: both images of a pair are of `X_train`.
    test_row, train_row : array-like of shape (n_pairs,), int
        Positions in them.
    similarity : array-like of shape (n_pairs,)
    kind : array-like of shape (n_pairs,), str

    Attributes
    ----------
    images_ : list of matplotlib AxesImage of length 2 * n_pairs
        Of each pair the test image, then the training image.
    texts_ : list of matplotlib Text of length 2 * n_pairs
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    See Also
    --------
    sktransfer.transferability.find_leaks : Finds the pairs.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer.inspection import LeaksDisplay
    >>> X_train = load_sample_images().images
    >>> X_test = [image[:, ::-1] for image in X_train]
    >>> display = LeaksDisplay(X_train, X_test, [0, 1], [0, 1], [1.0, 1.0], ["flip", "flip"])
    >>> len(display.plot().images_)
    4
    """

    images_: list[AxesImage]
    texts_: list[Text]
    ax_: Axes
    figure_: Figure | SubFigure

    def __init__(
        self,
        X_train,
        X_test,
        test_row: ArrayLike,
        train_row: ArrayLike,
        similarity: ArrayLike,
        kind: ArrayLike,
    ) -> None:
        self.X_train, self.X_test = X_train, X_test
        self.test_row, self.train_row = test_row, train_row
        self.similarity, self.kind = similarity, kind

    @classmethod
    def from_leaks(
        cls, leaks, X_train, X_test=None, *, n_pairs: int = 12, ax: Axes | None = None
    ) -> Self:
        """Draw pairs that :func:`find_leaks` found, the most similar of each kind.

        Parameters
        ----------
        leaks : Leaks, DataFrame or dict
            Its result, or a table with its columns, for instance a part of ``table_``.
        X_train, X_test : list, array, Series or data frame of images
            What `find_leaks` got.
        n_pairs : int, default=12
            How many pairs are drawn at most.
        ax : matplotlib Axes, default=None
            As in `plot`.

        Returns
        -------
        display : LeaksDisplay
        """
        table = getattr(leaks, "table_", leaks)
        names = ("test_row", "train_row", "similarity", "kind")
        # The most similar pair of each kind, then the second ones: exact copies may be many.
        seen: Counter[str] = Counter()
        rank = []
        for kind in table["kind"]:
            rank.append(seen[kind])
            seen[kind] += 1
        chosen = np.sort(np.argsort(rank, kind="stable")[:n_pairs])
        columns = [np.asarray(table[name])[chosen] for name in names]
        return cls(X_train, X_test, *columns).plot(ax=ax)

    def plot(self, *, ax: Axes | None = None, n_columns: int = 4) -> Self:
        """Draw the pairs.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            ``None``: those of a new figure.
        n_columns : int, default=4
            Number of pairs in a line.

        Returns
        -------
        self : LeaksDisplay
        """
        columns = (self.test_row, self.train_row, self.similarity, self.kind)
        test_row, train_row, similarity, kind = map(np.asarray, columns)
        n = len(test_row)
        n_columns = min(n_columns, max(n, 1))
        n_lines = -(-max(n, 1) // n_columns)
        self.ax_ = grid_axes("LeaksDisplay", ax, n_lines, 2 * n_columns, 2)
        self.figure_ = self.ax_.figure
        X_test = self.X_train if self.X_test is None else self.X_test
        first = read_thumbnails(X_test, test_row)
        second = read_thumbnails(self.X_train, train_row)
        titles = []
        names = ("test row", "train row") if self.X_test is not None else ("row", "row")
        pairs = zip(test_row, train_row, similarity, kind, strict=True)
        for a, b, value, what in pairs:
            number = "" if np.isnan(value) else f" {value:.2f}"
            titles += [f"{what}{number}\n{names[0]} {a}", f"\n{names[1]} {b}"]
        thumbnails = [image for pair in zip(first, second, strict=True) for image in pair]
        places = pair_places(n, n_columns)
        self.images_, self.texts_ = draw_grid(self.ax_, thumbnails, titles, places)
        self.ax_.set_title(f"{n} pairs of similar images" if n else "No similar images")
        return self
