"""find_leaks: images that a training set shares with a test set, or with itself."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from sktransfer._rows import BadRow, unreadable
from sktransfer.embedding._batches import n_decoding_threads
from sktransfer.embedding._extractor import PretrainedFeatureExtractor
from sktransfer.images._images import BadImage, as_images
from sktransfer.transferability._alignment import (
    SIZE,
    correlate,
    find_alignments,
    have_equal_levels,
    other_orientations,
)
from sktransfer.transferability._folds import group_numbers
from sktransfer.transferability._table import as_frame

if TYPE_CHECKING:
    import pandas as pd

    from sktransfer.inspection._leaks import LeaksDisplay
    from sktransfer.transferability._table import Table

_N_NEIGHBORS = 10  # candidates of an image, and most partners of a row in the table
_N_LOOKED_AT = 2  # of these, the nearest, which are tried mirrored, turned and cropped
_N_DRAWN = 20_000  # pairs of different images, for the threshold
_FEWEST_PAIRS = 45
_FEW_IMAGES_THRESHOLD = 0.5
_CHANCE = 1e-6
_THRESHOLDS = 0.3, 0.95  # least and largest default
_CERTAIN = 0.8  # no other alignment is tried
_MARGIN = 2.0  # over the similarity in other orientations, of pairs that are not certain
_NEARLY_ONE = 0.97  # of pairs whose pixels may be equal
_BLOCK = 1024  # rows of the matrix of similarities that are in memory at once
_DTYPE = np.dtype([("test_row", int), ("train_row", int), ("similarity", float), ("kind", object)])
_KINDS = ("exact", "copy", "near", "crop", "flip", "rotation", "group")


def find_leaks(X_train, X_test=None, *, groups=None, threshold="auto", memory=None):
    """Find images that a training set shares with a test set, or with itself.

    The same file, the same pixels in another file, re-saved, resized, brightened, mirrored, turned
    and cropped copies, and shots of the same thing from the same place. Scores on test images that
    have such a twin in the training set are too high.

    Read more in the :ref:`User Guide <leaks>`.

    Parameters
    ----------
    X_train : list, array, Series or data frame of n_train images
        As :class:`~sktransfer.PretrainedFeatureExtractor` takes them; flat rows of pixels as
        ``X.reshape(-1, height, width)``. With several image columns each image of a row is
        compared with each of another row.
    X_test : list, array, Series or data frame of n_test images, default=None
        ``None``: compare the rows of `X_train` with each other.
    groups : array-like of shape (n_train,) or (n_train + n_test,), default=None
        What is known to belong together, one label a row, training rows first; None or NaN where
        nothing is known. Pairs of a group are not listed within one set, since
        :class:`~sklearn.model_selection.GroupKFold` keeps them together. A group with rows on both
        sides of a split is listed as ``"group"``.
    threshold : "auto" or float, default="auto"
        Least similarity of a pair that is listed, within 0…1. ``"auto"``: what a pair of different
        images of this data exceeds with a probability of 1e-6; see Notes.
    memory : str, Path, joblib.Memory, store, False or None, default=None
        Where embeddings are kept, as in :class:`~sktransfer.PretrainedFeatureExtractor`.

    Returns
    -------
    leaks : Leaks
        With `table_`, `groups_`, `threshold_`, `bad_images_` and `plot()`.

    Raises
    ------
    TypeError, ValueError
        If X is not a collection of images, none of its images can be read, or a parameter has
        another value.

    See Also
    --------
    sktransfer.inspection.LeaksDisplay : The pairs side by side.

    Notes
    -----
    The candidates of an image are its ten nearest images by the built-in network's columns,
    standardised, in cosine. Each is then compared pixel by pixel: the similarity is the peak of
    their phase correlation [1]_ at 64×64 pixels, over all shifts, and for the two nearest also over
    flips, quarter turns and crops to 0.95…0.5 of each side. It is 1 for equal images, about 0.9 for
    copies, above 0.4 for most crops, and 0.1 to 0.2 for different images. A similarity below 0.8
    must also be twice that of the pair in the other orientations: stripes, chequers and single
    round objects match others of their kind in any.

    Peaks of different images follow a Gumbel distribution, the law of maxima. ``"auto"`` draws up
    to 20,000 pairs of rows, fits the distribution to the median and the upper quartile, which
    leaks among the drawn pairs hardly move, and takes the value that is exceeded with a
    probability of 1e-6. It is kept within 0.3…0.95, and is 0.5 for fewer than ten images. Images
    that all have the same layout, such as aligned scans, give a higher threshold.

    References
    ----------
    .. [1] C. D. Kuglin and D. C. Hines. "The phase correlation image alignment method." IEEE
       International Conference on Cybernetics and Society, 1975.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer.transferability import find_leaks
    >>> china, flower = load_sample_images().images
    >>> leaks = find_leaks([china, flower], [china[:, ::-1], flower[::2, ::2]])
    >>> leaks.table_["kind"].tolist()
    ['flip', 'copy']
    >>> leaks.groups_.tolist()
    [0, 1, 0, 1]
    """
    is_auto = isinstance(threshold, str) and threshold == "auto"
    if not is_auto and not (isinstance(threshold, Real) and 0 <= float(threshold) <= 1):
        raise ValueError(f'threshold must be "auto" or a number within 0…1; got {threshold!r}')
    sides = [_Side(X_train, "X_train")]
    if X_test is not None:
        sides.append(_Side(X_test, "X_test"))
    groups = group_numbers(groups, sum(side.images.n_rows for side in sides))
    for side in sides:
        side.embed(memory)
    search = _Search(sides, groups)
    threshold = search.default_threshold() if is_auto else float(threshold)
    pairs = search.pairs(threshold)
    listed = search.listed(*pairs)
    return Leaks(
        table_=as_frame({name: listed[name] for name in _DTYPE.names or ()}),
        groups_=search.components(pairs[0]),
        threshold_=threshold,
        bad_images_=[bad for side in sides for bad in side.bad],
        n_rows_=tuple(side.images.n_rows for side in sides),
        _X=(X_train, X_test),
    )


@dataclass(frozen=True)
class Leaks:
    """Result of :func:`find_leaks`.

    Attributes
    ----------
    table_ : DataFrame, or Table where pandas is not installed
        One row a pair, the most similar first: ``test_row``, ``train_row`` (positions; within one
        set, of the later and the earlier row of the pair), ``similarity`` (NaN for a group) and
        ``kind``: ``"exact"`` (the same file or pixels), ``"copy"`` (re-saved, resized),
        ``"near"`` (shifted, or with another brightness), ``"crop"``, ``"flip"``, ``"rotation"`` or
        ``"group"``. A row has at most its ten most similar partners. Dropping the rows in
        ``test_row`` leaves one of each.
    groups_ : ndarray of shape (n_train + n_test,), int
        Rows connected by pairs, through any number of them, have the same number, training rows
        first: `groups` for :class:`~sklearn.model_selection.GroupKFold`.
    threshold_ : float
        Least similarity of a listed pair.
    bad_images_ : list of BadRow
        Images that could not be read, with ``row``, ``where`` and ``reason``. They are in no pair.
    n_rows_ : tuple of int
        Number of training rows and, across a split, of test rows.
    """

    table_: pd.DataFrame | Table
    groups_: np.ndarray
    threshold_: float
    bad_images_: list[BadRow]
    n_rows_: tuple[int, ...]
    _X: tuple = field(repr=False)

    def plot(self, *, ax=None, n_pairs=12) -> LeaksDisplay:
        """Show the most similar pairs of each kind: :class:`~sktransfer.inspection.LeaksDisplay`.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            ``None``: those of a new figure.
        n_pairs : int, default=12
            How many pairs are shown.
        """
        from sktransfer.inspection._leaks import LeaksDisplay

        return LeaksDisplay.from_leaks(self, *self._X, n_pairs=n_pairs, ax=ax)

    def __str__(self) -> str:
        return "\n".join(
            [self._summary(), *([str(self.table_)] if len(self.table_["kind"]) else [])]
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{self._summary()}</p>{self.table_._repr_html_()}"  # type: ignore[operator]

    def _summary(self) -> str:
        kinds = np.asarray(self.table_["kind"])
        counts = [f"{n} {kind}" for kind in _KINDS if (n := int((kinds == kind).sum()))]
        n_leaked = len(np.unique(self.table_["test_row"]))
        if len(self.n_rows_) == 2:
            text = f"{n_leaked} of {self.n_rows_[1]} test rows have a twin in the training set"
        else:
            text = f"{n_leaked} of {self.n_rows_[0]} rows have an earlier twin"
        found = f"; pairs: {', '.join(counts)}" if counts else ""
        bad = f"; {len(self.bad_images_)} unreadable images" if self.bad_images_ else ""
        return f"{text} (similarity ≥ {self.threshold_:.2f}{found}{bad})."


class _Side:
    """One set: its images, their digests, thumbnails and columns."""

    def __init__(self, X, name: str) -> None:
        self.X, self.name = X, name
        try:
            self.images = as_images(X)
        except (TypeError, ValueError) as error:
            error.add_note(f"This is about {name} of find_leaks.")
            if "image_shape" in str(error):
                error.add_note("It takes no image_shape: give X.reshape(-1, height, width).")
            raise

    def embed(self, memory: object) -> None:
        extractor = PretrainedFeatureExtractor(on_error="nan", memory=memory)
        columns = extractor.fit(self.X).transform(self.X)
        self.columns = np.asarray(columns).reshape(len(self.images), -1)
        with ThreadPoolExecutor(n_decoding_threads(None)) as pool:
            read = list(pool.map(self._read, range(len(self.images))))
        self.digests = [digest for digest, _ in read]
        self.thumbnails = [thumbnail for _, thumbnail in read]
        # A file may have changed since the extractor read it.
        reasons = {bad.where: bad.reason for bad in extractor.bad_images_}
        self.good, self.bad = [], []
        for i, (digest, _) in enumerate(read):
            where = self.images.where(i)
            if digest is not None and where not in reasons:
                self.good.append(i)
                continue
            reason = reasons.get(where) or str(read[i][1])
            self.bad.append(BadRow(self.images.row(i), f"{self.name}, {where}", reason))
        if not self.good:
            first = f"{self.name} has no image that can be read:"
            last = "find_leaks compares images: pandas' duplicated() finds equal texts."
            raise unreadable(first, self.bad, last)

    def _read(self, i: int):
        try:
            cell = self.images.read(i)
            return cell.digest, _thumbnail(cell.decode((SIZE, SIZE)))
        except BadImage as error:
            return None, error


def _thumbnail(image: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    return np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


class _Search:
    """The readable images of both sets, rows numbered through; equal files are one image."""

    def __init__(self, sides: list[_Side], groups: np.ndarray | None) -> None:
        self.is_split = len(sides) == 2
        self.n_train = sides[0].images.n_rows
        self.n_rows = sum(side.images.n_rows for side in sides)
        self.groups = groups
        images: list[tuple[_Side, int]] = []
        rows: list[list[int]] = []
        first: dict[bytes | None, int] = {}
        for n_before, side in zip((0, self.n_train), sides, strict=False):
            for i in side.good:
                u = first.setdefault(side.digests[i], len(first))
                if u == len(images):
                    images.append((side, i))
                    rows.append([])
                rows[u].append(n_before + side.images.row(i))
        self.images = images
        # Of each image: the rows that are looked for, and those that they may be found in.
        self.training = [[row for row in r if row < self.n_train] for r in rows]
        testing = [[row for row in r if row >= self.n_train] for r in rows]
        self.queries = testing if self.is_split else self.training
        self.rows = rows
        self.thumbnails = np.array([side.thumbnails[i] for side, i in images], dtype=np.uint8)
        columns = np.array([side.columns[i] for side, i in images], dtype=np.float32)
        if len(images):
            columns -= columns.mean(axis=0)
            columns /= columns.std(axis=0) + 1e-6
            columns /= np.maximum(np.linalg.norm(columns, axis=1, keepdims=True), 1e-6)
        self.columns = torch.from_numpy(columns)
        # Images of one row, or of one group, are not candidates of each other.
        first_rows = np.array([r[0] for r in rows], dtype=np.intp)
        self.unit = first_rows if self.groups is None else self.groups[first_rows]

    def default_threshold(self) -> float:
        """Return what different images exceed with a probability of 1e-6; see find_leaks."""
        n = len(self.images)
        if n < 200:
            pairs = np.stack(np.triu_indices(n, 1), axis=1)
        else:
            pairs = np.random.default_rng(0).integers(n, size=(_N_DRAWN, 2))
        pairs = pairs[self.unit[pairs[:, 0]] != self.unit[pairs[:, 1]]]
        if len(pairs) < _FEWEST_PAIRS:
            return _FEW_IMAGES_THRESHOLD
        peaks, _ = correlate(self.thumbnails, pairs)
        # Quantiles of the Gumbel distribution: location - scale * log(-log(q)).
        median, quartile = np.quantile(peaks, [0.5, 0.75])
        at_median, at_quartile, at_chance = -np.log(-np.log1p([-0.5, -0.25, -_CHANCE]))
        scale = (quartile - median) / (at_quartile - at_median)
        return float(np.clip(median + scale * (at_chance - at_median), *_THRESHOLDS))

    def pairs(self, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return pairs of images, their similarities and kinds."""
        pairs, are_nearest = self._candidates()
        if len(pairs) == 0:
            return pairs, np.empty(0, dtype=np.float32), np.empty(0, dtype="<U8")
        similarities, are_in_place = correlate(self.thumbnails, pairs)
        are_copies = are_in_place & have_equal_levels(self.thumbnails, pairs)
        kinds = np.where(are_copies, "copy", "near").astype("<U8")
        looked_at = np.flatnonzero(are_nearest & (similarities < _CERTAIN))
        better, how = find_alignments(self.thumbnails, pairs[looked_at], similarities[looked_at])
        similarities[looked_at] = better
        kinds[looked_at] = np.where(how == "", kinds[looked_at], how)
        for k in np.flatnonzero(are_copies & (similarities > _NEARLY_ONE)):
            if self._are_equal(*pairs[k]):
                similarities[k], kinds[k] = 1, "exact"
        is_found = similarities >= threshold
        doubtful = np.flatnonzero(is_found & (similarities < _CERTAIN))
        are_turned = np.isin(kinds[doubtful], ["flip", "rotation"])
        others = other_orientations(self.thumbnails, pairs[doubtful], are_turned)
        is_found[doubtful] = similarities[doubtful] >= _MARGIN * others
        return pairs[is_found], similarities[is_found], kinds[is_found]

    def _candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """Return pairs of images with near columns, and which are among the nearest of all."""
        training = np.flatnonzero([len(r) > 0 for r in self.training])
        queries = np.flatnonzero([len(r) > 0 for r in self.queries])
        sets = [(queries, training)]
        if self.is_split:  # pairs within each set join the groups
            sets += [(training, training), (queries, queries)]
        nearest, near = [np.empty((0, 2), dtype=np.intp)], [np.empty((0, 2), dtype=np.intp)]
        unit = torch.from_numpy(self.unit)
        for ours, theirs in sets:
            for start in range(0, len(ours), _BLOCK):
                q = ours[start : start + _BLOCK]
                cosines = self.columns[q] @ self.columns[theirs].T
                cosines[unit[q][:, None] == unit[theirs]] = -torch.inf
                top = cosines.topk(min(_N_NEIGHBORS, len(theirs)), dim=1)
                for n, found in ((_N_LOOKED_AT, nearest), (_N_NEIGHBORS, near)):
                    is_one = torch.isfinite(top.values[:, :n]).numpy()
                    partners = theirs[top.indices[:, :n].numpy()]
                    found.append(np.stack([np.repeat(q, is_one.sum(1)), partners[is_one]], axis=1))
        first, pairs = (np.unique(np.sort(np.concatenate(p)), axis=0) for p in (nearest, near))
        n = len(self.images)
        return pairs, np.isin(pairs @ [n, 1], first @ [n, 1])

    def _are_equal(self, first: int, second: int) -> bool:
        """Whether two images have the same pixels at full size."""
        a, b = (
            np.asarray(side.images.decode(i))
            for side, i in map(self.images.__getitem__, (first, second))
        )
        return np.array_equal(a, b)

    def listed(self, pairs, similarities, kinds) -> np.ndarray:
        """Return the table: pairs of rows."""
        found: dict[tuple[int, int], tuple[float, str]] = {}

        def add(u: int, v: int, similarity: float, kind: str) -> None:
            for row in self.queries[u]:
                for other in self.training[v][:_N_NEIGHBORS]:
                    pair = (row, other) if self.is_split else (max(row, other), min(row, other))
                    if pair[0] != pair[1] and (self.is_split or not self._are_grouped(*pair)):
                        found[pair] = max(found.get(pair, (0.0, "")), (similarity, kind))

        for u in range(len(self.images)):
            add(u, u, 1.0, "exact")
        for (u, v), similarity, kind in zip(pairs, similarities, kinds, strict=True):
            add(u, v, float(similarity), str(kind))
            add(v, u, float(similarity), str(kind))
        if self.is_split and self.groups is not None:
            for pair in self._grouped_pairs(self.groups, set(found)):
                found[pair] = np.nan, "group"
        order = sorted(found, key=lambda pair: (-np.nan_to_num(found[pair][0]), pair))
        n_listed: Counter[int] = Counter()
        table = []
        for row, other in order:
            n_listed[row] += 1
            if n_listed[row] <= _N_NEIGHBORS:
                test_row = row - self.n_train if self.is_split else row
                table.append((test_row, other, *found[row, other]))
        return np.array(table, dtype=_DTYPE)

    def _are_grouped(self, row: int, other: int) -> bool:
        return self.groups is not None and self.groups[row] == self.groups[other]

    def _grouped_pairs(
        self, groups: np.ndarray, found: set[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Return a pair for each test row whose group is in training, and is not found yet."""
        first: dict[int, int] = {}
        for row, group in enumerate(groups[: self.n_train]):
            first.setdefault(group, row)
        known = {row for row, other in found if self._are_grouped(row, other)}
        test = [row for row in range(self.n_train, self.n_rows) if row not in known]
        return [(row, first[g]) for row in test if (g := groups[row]) in first]

    def components(self, pairs: np.ndarray) -> np.ndarray:
        """Return a number for each row, the same for rows that pairs or groups connect."""
        edges = [(r[0], row) for r in self.rows for row in r[1:]]
        edges += [(self.rows[u][0], self.rows[v][0]) for u, v in pairs]
        if self.groups is not None:
            edges += [(row, self.n_rows + group) for row, group in enumerate(self.groups)]
        a, b = np.array(edges, dtype=np.intp).reshape(-1, 2).T
        n = self.n_rows + (0 if self.groups is None else self.groups.max() + 1)
        graph = coo_matrix((np.ones(len(a), dtype=bool), (a, b)), shape=(n, n))
        return connected_components(graph, directed=False)[1][: self.n_rows]
