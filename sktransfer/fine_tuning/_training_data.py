"""From images and targets to rows that can be trained on: merged, checked, embedded, decoded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sktransfer.embedding._batches import n_decoding_threads
from sktransfer.embedding._cluster import embed_anywhere
from sktransfer.embedding._embed import BadRow
from sktransfer.fine_tuning._boundary import boundary_rows, keeps_anything
from sktransfer.fine_tuning._rows import Kept, Pixels, digest_rows, merge_rows, rows_of
from sktransfer.fine_tuning._views import each_corner
from sktransfer.images._images import Images
from sktransfer.networks._backbone import Backbone
from sktransfer.store._store import as_store

_N_REPORTED = 10


@dataclass
class EmbeddingSettings:
    """How images are embedded; the names are the estimators' own."""

    memory: Any
    device: str
    precision: str
    n_jobs: int | None
    verbose: int


def embed_rows(
    images: Images, backbone: Any, settings: EmbeddingSettings
) -> tuple[np.ndarray, list[BadRow]]:
    """One row per image (not per row of images), and those that could not be read."""
    from sktransfer._progress import progress_bar

    out = np.empty((len(images), backbone.n_features), dtype=np.float32)
    with progress_bar(len(images), settings.verbose) as tick:
        bad = embed_anywhere(
            images,
            backbone,
            out=out,
            memory=settings.memory,
            device=settings.device,
            precision=settings.precision,
            n_jobs=settings.n_jobs,
            progress=tick,
        )
    return out, bad


class TrainingData:
    """Rows for training or validation.

    Parameters
    ----------
    images : Images
    target : ndarray of shape (n_rows,) or (n_rows, n_outputs)
    weight : ndarray of shape (n_rows,)
    backbone : Backbone
    settings : EmbeddingSettings
    wants_embeddings : bool
    on_error : {"raise", "skip"}
    what : str
        What the rows are, for messages.

    Attributes
    ----------
    target, weight : ndarray
        Of the rows that are left: each once, those without weight and unreadable ones gone.
    embeddings : ndarray of shape (n_rows, n_columns · n_features) or None
        Of the same rows.
    bad : list of BadRow
    """

    def __init__(
        self,
        images: Images,
        target: np.ndarray,
        weight: np.ndarray,
        backbone: Backbone,
        settings: EmbeddingSettings,
        *,
        wants_embeddings: bool,
        on_error: str,
        what: str = "training",
    ):
        self._backbone, self._n_columns = backbone, images.n_columns
        self._memory, self._n_rows, self._what = settings.memory, images.n_rows, what
        n_threads = n_decoding_threads(settings.n_jobs)
        keys, bad = digest_rows(images, as_store(settings.memory), n_threads)
        bad = [b for b in bad if weight[b.row] != 0]
        index, weight = merge_rows(keys, target, weight)
        view = rows_of(images, index)
        self._pixels = Pixels(view, images.n_columns, backbone.preprocessing, n_threads, on_error)
        rows = None
        if wants_embeddings and len(index):
            flat, more = embed_rows(view, backbone, settings)
            rows = flat.reshape(len(index), -1)
            bad += more
        elif len(index):
            self._pixels.read_all()
            bad += self._pixels.bad
        self.bad = sorted({b.where: b for b in bad}.values(), key=lambda b: b.row)
        if self.bad:
            _handle(self.bad, images.n_rows, on_error, what)
        if assumed := images.take_warnings():
            warnings.warn(assumed, UserWarning, stacklevel=6)
        unreadable = {b.row for b in self.bad}
        self._positions = np.array(
            [k for k, i in enumerate(index) if int(i) not in unreadable], dtype=int
        )
        self._keys = [keys[i] for i in index[self._positions]]
        self._images, self._index, self._settings = images, index[self._positions], settings
        self.target = target[index][self._positions]
        self.weight = weight[self._positions]
        self.embeddings = None if rows is None else rows[self._positions]
        if self.embeddings is not None:
            check_finite(self.embeddings, self._index)

    def __len__(self) -> int:
        return len(self._positions)

    def embed_views(self, rows: np.ndarray, n_views: int) -> np.ndarray:
        """Embeddings of `rows` and their corners: (len(rows), n_views, n_columns · n_features).

        The whole picture stands in for the corners of one that cannot be read any more; should
        training read it again, that will tell.
        """
        assert self.embeddings is not None
        n_rows, width = len(rows), self.embeddings.shape[1]
        own = self.embeddings[rows].reshape(n_rows, self._n_columns, 1, -1)
        if n_views > 1:
            images = rows_of(self._images, self._index[rows])
            flat, _ = embed_rows(images, each_corner(self._backbone, n_views - 1), self._settings)
            corners = flat.reshape(n_rows, self._n_columns, n_views - 1, -1)
            corners = np.where(np.isnan(corners), own, corners)
            own = np.concatenate([own, corners], axis=2)
        # Columns of images stand beside each other in each view.
        return own.swapaxes(1, 2).reshape(n_rows, n_views, width)

    def embedded(self) -> Kept:
        """The rows' embeddings as inputs: (n_columns, n_features) each."""
        assert self.embeddings is not None
        return Kept(self.embeddings.reshape(len(self), self._n_columns, -1))

    def source(
        self, module: Any, entry: int, n_stages: int, device: torch.device, n_pretrained: int
    ) -> tuple[Any, np.ndarray, int]:
        """Inputs from the stage `entry` on, as they can be had.

        Parameters
        ----------
        module : TunedModule
        entry, n_stages : int
        device : torch.device
        n_pretrained : int
            How many of the module's first stages are as the backbone brought them.

        Returns
        -------
        source : Pixels or Kept
        positions : ndarray of int
            Where each of our rows stands in it.
        entry : int
            0 where what was asked for fits in no bound.
        """
        everywhere = np.arange(len(self))
        # Stages that are there pool by themselves, and may have been trained before.
        if entry == n_stages and self.embeddings is not None and not module.stages:
            return self.embedded(), everywhere, entry
        if entry > 0:
            module.to(device)
            fingerprint = None
            if entry <= n_pretrained and keeps_anything(self._memory):
                fingerprint = f"{self._backbone.fingerprint}-{module.precision}-until{entry}"
            kept = boundary_rows(
                self._pixels, self._positions, self._keys, module, entry, device, fingerprint
            )
            if kept is not None:
                self.weight = np.where(self._pixels.is_bad[self._positions], 0.0, self.weight)
                return kept, everywhere, entry
        return self._pixels, self._positions, 0

    def forget_pixels(self) -> None:
        """Let go of decoded pictures: what was made of them is there."""
        self._pixels.forget()

    def report_lost(self) -> None:
        """Warn of pictures that could be read at the start and no more later on."""
        known = {bad.row for bad in self.bad}
        if lost := [bad for bad in self._pixels.bad if bad.row not in known]:
            self.bad += lost
            _handle(lost, self._n_rows, "skip", f"the rest of {self._what}")


def check_finite(rows: np.ndarray, index: np.ndarray) -> None:
    """Refuse embeddings that are no numbers; `index` tells where each row stands in ``X``."""
    is_finite = np.isfinite(rows).all(axis=1)
    if not is_finite.all():
        where = index[~is_finite]
        raise ValueError(
            f"The network gives NaN or infinity for {len(where)} of {len(rows)} rows, the first "
            f"of them row {where[0]}. Either it cannot deal with these pictures (a module or "
            "`preprocessing` that divides by the spread of an even one), its numbers grow too "
            "large for precision='float16', or it was trained at too large an lr."
        )


def _handle(bad: list[BadRow], n_rows: int, on_error: str, what: str, stacklevel: int = 7) -> None:
    lines = [f"  {row}" for row in bad[:_N_REPORTED]]
    if len(bad) > _N_REPORTED:
        lines.append(f"  … and {len(bad) - _N_REPORTED} more")
    listed = "\n".join(lines)
    if on_error == "raise":
        raise ValueError(
            f"{len(bad)} of {n_rows} rows cannot be used for {what}, as an image could not be "
            f'read:\n{listed}\nMend or drop these rows, or set on_error="skip" to leave them out.'
        )
    warnings.warn(
        f"{len(bad)} of {n_rows} rows are left out of {what}, as an image could not be read:\n"
        f"{listed}",
        UserWarning,
        stacklevel=stacklevel,
    )
