"""Training rows: images with their targets, each once, checked, and embedded."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import BaseCrossValidator

from sktransfer._progress import warn
from sktransfer._rows import BadCell, BadRow, Rows, unreadable
from sktransfer.embedding._batches import n_decoding_threads
from sktransfer.fine_tuning._head import CornerViews, stratified_sample
from sktransfer.fine_tuning._inputs import (
    EmbeddingSettings,
    FrozenStages,
    Pixels,
    Precomputed,
    TrainingSet,
    embed_rows,
    frozen_outputs,
)
from sktransfer.fine_tuning._module import TunedModule
from sktransfer.networks._backbone import Backbone
from sktransfer.store._store import as_store

Split = tuple[np.ndarray, np.ndarray]


class TrainingRows:
    """Rows of `X` for training or validation, each image and target once.

    `images`, `target`, `weight` and, if wanted, `embeddings` (n_rows, n_columns · n_features)
    contain the rows that have a weight and can be read; `bad` lists the unreadable images.
    """

    def __init__(
        self,
        images: Rows,
        target: np.ndarray,
        weight: np.ndarray,
        backbone: Backbone,
        settings: EmbeddingSettings,
        wants_embeddings: bool,
        what: str = "training",
    ):
        self._backbone, self._settings, self._what = backbone, settings, what
        self.n_columns, self._n_rows = images.n_columns, images.n_rows
        self._outputs: Precomputed | None = None
        keys, bad = _keys_of(images, settings)
        bad = [b for b in bad if weight[b.row] != 0]
        index, weight, merged = merge_rows(keys, target, weight)
        self.images = _rows_of(images, index)
        embeddings, pixels = None, None
        if wants_embeddings and len(index):
            flat, more = embed_rows(self.images, backbone, settings)
            embeddings = flat.reshape(len(index), -1)
        else:
            pixels = self._new_pixels()
            more = pixels.read_all()
        bad += more
        self.bad = sorted(bad, key=lambda b: b.row)
        report_bad(self.bad, images, settings.on_error, what)
        is_good = ~np.isin(index, [b.row for b in self.bad])
        self._index = index[is_good]
        positions = np.append(np.where(is_good, np.cumsum(is_good) - 1, -1), -1)
        self._positions = positions[merged]  # of each row of X; -1: it is left out
        if len(self) == 0:
            verb = "train" if what == "training" else "validate"
            raise ValueError(
                f"No row is left to {verb} on: {len({b.row for b in self.bad})} of {images.n_rows} "
                "could not be read, and the others have no weight."
            )
        self.images = _rows_of(images, self._index)
        self.target, self.weight = target[self._index], weight[is_good]
        self._pixels = pixels if is_good.all() else None
        self.embeddings = None if embeddings is None else embeddings[is_good]
        if self.embeddings is not None:
            check_finite(self.embeddings, self._index)

    def __len__(self) -> int:
        return len(self._index)

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Return the positions of some rows of `X`, sorted."""
        return np.setdiff1d(self._positions[rows], [-1])

    def with_corners(self, rows: np.ndarray) -> np.ndarray:
        """Return embeddings of some rows and their corners, (n, n_views, n_columns · n_features).

        A corner of an image that has become unreadable is replaced by the whole image.
        """
        assert self.embeddings is not None
        images = _rows_of(self.images, rows, self.n_columns)
        flat, _ = embed_rows(images, CornerViews(self._backbone), self._settings)
        own = self.embeddings[rows].reshape(len(rows), self.n_columns, 1, -1)
        corners = flat.reshape(len(rows), self.n_columns, -1, own.shape[-1])
        views = np.concatenate([own, np.where(np.isnan(corners), own, corners)], axis=2)
        # Of each view, the embeddings of a row's image columns follow one another.
        return views.swapaxes(1, 2).reshape(len(rows), views.shape[2], -1)

    def embedded(self) -> Precomputed:
        """Return the embeddings as inputs, (n_columns, n_features) each."""
        assert self.embeddings is not None
        return Precomputed(self.embeddings.reshape(len(self), self.n_columns, -1))

    def keep_frozen_outputs(self, module: TunedModule, stop: int) -> bool:
        """Compute the outputs of the stages before `stop`; False if they are too large."""
        # A text of the longest batch is padded to the length of the longest text.
        rows = np.arange(len(self) if self._backbone.is_text else 1)
        batches = map(self._new_pixels().take, np.array_split(rows, -(-len(rows) // 1000)))
        sample, self._pixels = max(batches, key=lambda batch: batch.shape[-1]), None
        frozen = FrozenStages(self._backbone, module, stop, sample.flatten(0, 1)[:1])
        self._outputs = frozen_outputs(self.images, self.n_columns, frozen, self._settings)
        return self._outputs is not None

    def inputs(self, input_stage: int) -> Pixels | Precomputed:
        """Return the inputs of a stage: pixels, or the outputs of the stages before it."""
        if input_stage > 0 and self._outputs is not None:
            return self._outputs
        self._pixels, self._outputs = self._pixels or self._new_pixels(), None
        return self._pixels

    def report_newly_bad(self) -> None:
        """Warn of images that have become unreadable during the training."""
        sources = [source for source in (self._pixels, self._outputs) if source is not None]
        found = {bad.where: bad for source in sources for bad in source.bad}
        if newly_bad := [bad for bad in found.values() if bad not in self.bad]:
            self.bad += newly_bad
            _report(newly_bad, self._n_rows, "skip", f"the rest of {self._what}", self.images.kind)

    def _new_pixels(self) -> Pixels:
        return Pixels(self.images, self.n_columns, self._backbone.preprocessing, self._settings)


class Part(NamedTuple):
    """The rows at the positions `rows` of `all_rows`, to train or to validate on."""

    all_rows: TrainingRows
    rows: np.ndarray
    target: np.ndarray
    weight: np.ndarray

    @property
    def embeddings(self) -> np.ndarray:
        assert self.all_rows.embeddings is not None
        return self.all_rows.embeddings[self.rows]

    def training_set(self, source: Pixels | Precomputed) -> TrainingSet:
        return TrainingSet(source, self.rows, self.target, self.weight)


def merge_rows(
    keys: Sequence[bytes | None], target: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge rows of the same images and target into one with the sum of their weights.

    So a weight of two is the row twice, and no row is on both sides of a validation split. Rows
    without a weight are left out. The order of `X` has no effect, as rows are sorted by digest.

    Return the first of each set of equal rows, the sums of weights, and the position of each row in
    these, or -1.
    """
    joined = [
        b"" if key is None or weight[i] == 0 else key + target[i].tobytes()
        for i, key in enumerate(keys)
    ]
    first: dict[bytes, int] = {}
    total: dict[bytes, float] = {}
    for i, full in enumerate(joined):
        if full:
            first.setdefault(full, i)
            total[full] = total.get(full, 0.0) + float(weight[i])
    order = sorted(first)
    position = {full: k for k, full in enumerate(order)}
    index = np.array([first[full] for full in order], dtype=int)
    weight = np.array([total[full] for full in order], dtype=float)
    return index, weight, np.array([position.get(full, -1) for full in joined], dtype=int)


def first_split(
    splitter: BaseCrossValidator,
    target: np.ndarray,
    groups: npt.ArrayLike | None,
    rng: np.random.RandomState,
    class_name: str,
) -> Split:
    """Split the rows of `X` for training and validation by the first split of `splitter`."""
    if isinstance(splitter, type):
        raise TypeError(f"early_stopping={splitter!r} is a class: give an instance of it.")
    splitter = copy.deepcopy(splitter)
    if getattr(splitter, "random_state", 0) is None:
        splitter.random_state = rng.randint(np.iinfo(np.int32).max)
    flat = target[:, 0] if target.ndim == 2 and target.shape[1] == 1 else target
    try:
        for split in splitter.split(np.empty((len(flat), 1)), flat, groups):
            return split
    except (TypeError, ValueError) as error:
        hint = (
            " Give fit(..., groups=...). cross_validate and searches pass groups on, given as "
            "params={'groups': ...} or fit(..., groups=...), after "
            "sklearn.set_config(enable_metadata_routing=True) and "
            f"{class_name}(...).set_fit_request(groups=True)."
        )
        raise ValueError(
            f"early_stopping: {type(splitter).__name__} cannot split these {len(flat)} rows "
            f"({error}).{hint if groups is None else ''}"
        ) from error
    raise ValueError(
        f"early_stopping: {type(splitter).__name__} yields no split of these {len(flat)} rows. "
        "Give a splitter that yields rows to train on and rows to validate on."
    )


def held_out_rows(
    rows: TrainingRows,
    target: np.ndarray,
    split: Split | None,
    fraction: float,
    rng: np.random.RandomState,
) -> Split:
    """Return positions in `rows` for training and validation; warn if there are none of the latter.

    A row that is equal to a validation row of `split` is a validation row, too.
    """
    n = len(rows)
    if split is None:
        held_out = stratified_sample(target if target.ndim == 1 else None, fraction, rng, n)
        index = np.setdiff1d(np.arange(n), held_out)
    else:
        held_out = rows.positions(split[1])
        index = np.setdiff1d(rows.positions(split[0]), held_out)
    if len(index) == 0:
        raise ValueError("The splitter given as early_stopping leaves no row to train on.")
    if len(held_out) == 0:
        what = f"validation_fraction={fraction}" if split is None else "the splitter's first part"
        warn(
            f"There is no early stopping: {what} of {n} different rows leaves no row to validate "
            "on. Give a larger validation_fraction, more rows of each class, or X_val and y_val."
        )
    return index, held_out


def _keys_of(images: Rows, settings: EmbeddingSettings) -> tuple[list[bytes | None], list[BadRow]]:
    """Return the digests of each row's images, joined; None if one cannot be read."""
    store = as_store(settings.memory)
    taken_at = time.time_ns()
    stats = [images.stat(i) for i in range(len(images))]
    digests = store.get_file_digests(stats)
    unknown = [i for i, digest in enumerate(digests) if digest is None]
    bad: list[BadRow] = []

    def read(i: int) -> bytes | None:
        try:
            return images.read(i).digest
        except BadCell as error:
            bad.append(BadRow(images.row(i), images.where(i), str(error)))
            return None

    with ThreadPoolExecutor(n_decoding_threads(settings.n_jobs)) as pool:
        for i, digest in zip(unknown, pool.map(read, unknown), strict=True):
            digests[i] = digest
    fresh = [(stats[i], digests[i]) for i in unknown]
    files = [(stat, digest) for stat, digest in fresh if digest is not None]
    store.put_file_digests([f[0] for f in files], [f[1] for f in files], taken_at)
    n_columns = images.n_columns
    rows = [digests[i : i + n_columns] for i in range(0, len(images), n_columns)]
    return [b"".join(row) if all(row) else None for row in rows], bad  # type: ignore[arg-type]


def _rows_of(images: Rows, index: np.ndarray, n_columns: int | None = None) -> Rows:
    """Return a view of the images of some rows, row by row."""
    n_columns = images.n_columns if n_columns is None else n_columns
    return images[(index[:, None] * n_columns + np.arange(n_columns)).reshape(-1)]


def check_finite(rows: np.ndarray, index: np.ndarray) -> None:
    """Raise ValueError for embeddings with NaN or infinity; `index` are their rows in ``X``."""
    is_finite = np.isfinite(rows).all(axis=1)
    if not is_finite.all():
        where = index[~is_finite]
        raise ValueError(
            f"The network returns NaN or infinity for {len(where)} of {len(rows)} rows, the first "
            f"of them row {where[0]}. Either it fails on these images (for example a module or "
            "`preprocessing` that divides by an image's standard deviation), or it was trained "
            "at too large an lr."
        )


def report_bad(bad: list[BadRow], images: Rows, on_error: str, what: str) -> None:
    """Raise or warn of unreadable images, and warn of assumptions about the others."""
    if bad:
        _report(bad, images.n_rows, on_error, what, images.kind)
    if assumed := images.take_warnings():
        warn(assumed)


def _report(bad: list[BadRow], n_rows: int, on_error: str, what: str, kind: str) -> None:
    is_error = on_error == "raise"
    verb = "cannot be used for" if is_error else "are left out of"
    cell = "an image" if kind == "images" else "a text"
    first = f"{len(bad)} of {n_rows} rows {verb} {what}, as {cell} could not be read:"
    remedy = 'Correct or drop these rows, or set on_error="skip" to leave them out.'
    error = unreadable(first, bad, remedy if is_error else "")
    if is_error:
        raise error
    warn(str(error).rstrip())
