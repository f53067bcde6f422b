"""Thumbnails: rows of X read again when they are drawn, and laid out in a grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_array, check_consistent_length, column_or_1d
from sklearn.utils.validation import check_is_fitted

from sktransfer.images._images import BadImage, as_images
from sktransfer.inspection._axes import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from matplotlib.text import Text

SIZE = 160  # pixels of a thumbnail's longer side
_CELL_INCHES = 1.5
_LINE_INCHES = 0.17  # of a title, at _FONT_SIZE points
_FONT_SIZE = 8


def read_thumbnails(X, rows: Iterable[int], image_shape=None, size: int = SIZE) -> list[np.ndarray]:
    """Read the images of some rows; those of several image columns are joined side by side.

    Returns
    -------
    thumbnails : list of ndarray of shape (height, width, 3), uint8
        A grey square where an image cannot be read.
    """
    images = as_images(X, image_shape)
    n = images.n_columns
    joined = []
    for row in rows:
        parts = [_thumbnail(images, int(row) * n + k, size) for k in range(n)]
        height = max(part.shape[0] for part in parts)
        parts = [np.pad(p, ((0, height - len(p)), (0, 0), (0, 0)), "edge") for p in parts]
        joined.append(np.concatenate(parts, axis=1))
    return joined


def _thumbnail(images, i: int, size: int) -> np.ndarray:
    try:
        image = images.decode(i, (size, size))
    except BadImage:
        return np.full((size, size, 3), 200, dtype=np.uint8)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    scale = size / max(image.size)
    # Pixels of small images are drawn as squares.
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    width, height = (max(1, round(scale * side)) for side in image.size)
    return np.asarray(image.resize((width, height), how))


def parameter_of(estimator, name: str):
    """Return a parameter of an estimator or of a step within it, `image_shape` for instance."""
    parameters = estimator.get_params() if hasattr(estimator, "get_params") else {}
    values = (value for key, value in parameters.items() if key.split("__")[-1] == name)
    return next((value for value in values if value is not None), None)


def method_of(estimator, methods: Sequence[str]) -> str:
    """Return the first of these methods that a fitted estimator has."""
    if hasattr(estimator, "fit"):
        check_is_fitted(estimator)
    if found := [method for method in methods if hasattr(estimator, method)]:
        return found[0]
    raise TypeError(
        f"{type(estimator).__name__} has no {' nor '.join(methods)}: give a fitted classifier or "
        "regressor, or a pipeline that ends with one."
    )


def one_a_row(y: ArrayLike, X) -> np.ndarray:
    """Return one label or number for each row of X."""
    check_consistent_length(X, y)
    return column_or_1d(y)


def columns_of(X, features: ArrayLike, name: str, n_least: int = 1) -> np.ndarray:
    """Return the computed columns of X as an array of finite numbers."""
    least = {"ensure_min_samples": n_least, "ensure_min_features": n_least}
    array = check_array(features, ensure_all_finite=False, input_name=name, **least)
    check_consistent_length(X, array)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name} holds NaN or infinity in {len(bad)} of {len(array)} rows, of which the "
            f"first is row {bad[0]}: leave these rows out of it and of the images."
        )
    return array


def transform(extractor, X) -> np.ndarray:
    """Return the columns of X; an extractor that is not fitted yet is fitted on it, as a copy."""
    if not hasattr(extractor, "transform"):
        raise TypeError(
            f"{extractor!r} has no transform; give a feature extractor, or of a pipeline with a "
            "classifier the steps before it: pipeline[:-1]"
        )
    try:
        check_is_fitted(extractor)
    except NotFittedError:
        extractor = clone(extractor).fit(X)
    columns = extractor.transform(X)
    return np.asarray(columns.toarray() if hasattr(columns, "toarray") else columns)


def grid_axes(name: str, ax: Axes | None, n_rows: int, n_columns: int, n_lines: int) -> Axes:
    """Return axes that fit a grid of thumbnails, or the given ones."""
    if ax is not None:
        return ax
    size = n_columns * _CELL_INCHES, n_rows * (_CELL_INCHES + n_lines * _LINE_INCHES) + 0.4
    return new_axes(name, size=(max(size[0], 3.0), size[1]))[0]


def short(value: object, n: int = 18) -> str:
    """Return a label or number as text that fits above a thumbnail."""
    text = f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
    return text if len(text) <= n else f"{text[: n - 1]}…"


def pair_places(n: int, n_columns: int) -> list[tuple[float, int]]:
    """Return the cells of `n` pairs, `n_columns` in a line; with a gap between pairs."""
    cells = [(2.2 * (k % n_columns), k // n_columns) for k in range(n)]
    return [place for x, row in cells for place in ((x, row), (x + 1, row))]


def draw_grid(
    ax: Axes, thumbnails: list[np.ndarray], titles: list[str], places: Sequence[tuple[float, int]]
) -> tuple[list[AxesImage], list[Text]]:
    """Draw each thumbnail into a cell (column, row) of a grid, with its title above.

    One Axes holds all, so that the caller's own can be used. A cell is one wide; its height has
    room for the titles' lines.
    """
    n_lines = max((title.count("\n") + 1 for title in titles if title), default=0)
    height = 1 + n_lines * _LINE_INCHES / _CELL_INCHES
    images, texts = [], []
    for thumbnail, title, (column, row) in zip(thumbnails, titles, places, strict=True):
        h, w = np.array(thumbnail.shape[:2]) / max(thumbnail.shape[:2]) * 0.94
        x, bottom = column + 0.5, (row + 1) * height - 0.03
        extent = (x - w / 2, x + w / 2, bottom, bottom - h)
        images.append(ax.imshow(thumbnail, extent=extent, interpolation="nearest"))
        top = bottom - h - 0.02
        texts.append(ax.text(x, top, title, ha="center", va="bottom", fontsize=_FONT_SIZE))
    n_columns = max((column for column, _ in places), default=0) + 1
    n_rows = max((row for _, row in places), default=0) + 1
    ax.set(xlim=(0, n_columns), ylim=(n_rows * height, 0), aspect="equal")
    ax.set_axis_off()
    return images, texts
