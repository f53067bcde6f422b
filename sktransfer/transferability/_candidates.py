"""Candidates of rank_backbones: networks, their random twins, and what is measured of them."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import cross_val_score

from sktransfer._progress import progress_bar, warn
from sktransfer.embedding._extractor import PretrainedFeatureExtractor
from sktransfer.embedding._text_extractor import PretrainedTextExtractor
from sktransfer.images._images import Images
from sktransfer.networks._huggingface import is_text_name
from sktransfer.transferability._baselines import make_probe, twin_preprocessing
from sktransfer.transferability._folds import Folds, estimate
from sktransfer.transferability._scores import h_score, logme_score, spectrum, transrate_of

if TYPE_CHECKING:
    from sktransfer._rows import BadRow, Rows
    from sktransfer.networks._backbone import Backbone

_CHUNK = 64  # images that are in memory for all networks at once
_N_TIMED = 16
AnyExtractor = PretrainedFeatureExtractor | PretrainedTextExtractor
Layer = str | list | None
Layers = str | list | dict | None


@dataclass
class Candidate:
    """A network to embed with, and its twin with random weights.

    Attributes
    ----------
    layers : list of str, None or list
        What becomes a row of the table.
    blocks : dict of str or None to ndarray of int
        The columns of each layer.
    columns : dict of str to ndarray of shape (n_images, n_features)
        Rows of ``"own"`` and, if there is one, of ``"random"``.
    """

    extractor: AnyExtractor
    label: str
    layers: list[Layer] = field(default_factory=list)
    blocks: dict[str | None, np.ndarray] = field(default_factory=dict)
    networks: dict[str, Backbone] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, object]:
        """Arguments of `embed_images`."""
        names = ("memory", "batch_size", "device", "precision", "n_jobs")
        return {"verbose": 0} | {name: getattr(self.extractor, name) for name in names}

    def load(self, layers: Layers, images: Rows) -> None:
        from sktransfer.embedding._embed import check_place
        from sktransfer.transferability._shared import HeldBackbone

        own = self.extractor.get_params(deep=False)
        check_place(own["memory"], own["device"])
        if isinstance(layers, dict):
            layers = layers.get(_name_of(own["backbone"]))
        if layers is None:
            # Of texts a layer may be a number, which the backbone knows by its name.
            self.layers = [own["layer"] if self.is_of_images else self._loaded().layer]  # type: ignore[list-item]
        elif layers == "stages":
            # The last stage ends with the embedding.
            self.layers = [*self._loaded(layer=None).stage_names_to_layer[:-1], None]
        else:
            self.layers = _names_of(layers)  # type: ignore[assignment]
        flat = [*dict.fromkeys(name for layer in self.layers for name in _names_of(layer))]
        loaded = self._loaded(layer=flat)
        self.networks["own"] = HeldBackbone(loaded)
        ends = np.cumsum([width for _, width in loaded.feature_groups])
        parts = np.split(np.arange(ends[-1]), ends[:-1])
        self.blocks = dict(zip(loaded.layers_named(flat), parts, strict=True))
        try:
            same = twin_preprocessing(loaded)
            twin = self._loaded(layer=flat, weights=None, **same)
            self.networks["random"] = HeldBackbone(twin)
        except ValueError as error:
            warn(f"{self.label} has no twin with random weights, and so no gain: {error}")
        for name, network in self.networks.items():
            self.columns[name] = np.empty((len(images), network.n_features), dtype=np.float32)

    @property
    def is_of_images(self) -> bool:
        return isinstance(self.extractor, PretrainedFeatureExtractor)

    def _with(self, **changes: object) -> AnyExtractor:
        """Return the extractor with other parameters, unfitted."""
        if "layer" in changes and self.is_of_images:
            changes["cache_layers"] = None
        return clone(self.extractor).set_params(**changes)

    def _loaded(self, **changes: object) -> Backbone:
        return self._with(**changes)._load()

    def measure(
        self,
        images: Rows,
        sample: Rows,
        target: np.ndarray,
        is_regression: bool,
        folds: Folds,
        scoring: object,
    ) -> list[dict]:
        """Return a row of the table for each layer."""
        rows = []
        for layer in self.layers:
            names = self.networks["own"].layers_named(layer)
            used = np.concatenate([self.blocks[name] for name in names])
            columns = {
                kind: rows_[:, used].reshape(images.n_rows, -1).astype(float)
                for kind, rows_ in self.columns.items()
            }
            scores = {
                kind: evaluate(block, target, is_regression, folds, scoring)
                for kind, block in columns.items()
            }
            score = estimate(scores["own"], folds)
            gain = estimate(scores["own"] - scores.get("random", np.nan), folds)
            row = {
                "backbone": self.label,
                "layer": " + ".join(name or "embedding" for name in names),
                "columns": columns["own"].shape[1],
                "score": score.value,
                "score_se": score.error,
                "gain": gain.value,
                "gain_se": gain.error,
                "seconds": self._seconds(layer, sample) * images.n_columns,
                **_other_scores(columns["own"], target, is_regression),
            }
            rows.append(row | {"extractor": self._with(layer=layer)})
        return rows

    def _seconds(self, layer: Layer, sample: Rows) -> float:
        """Measure resizing and the network, for 1,000 cells; decoding is the same for all."""
        from sktransfer.embedding._embed import embed_images

        backbone = self.networks["own"]
        if len(self.layers) > 1:  # a lower layer needs but a part of the network
            backbone = self._loaded(layer=layer)
        out = np.empty((len(sample), backbone.n_features), dtype=np.float32)
        settings = self.settings | {"memory": False}
        seconds = []
        for _ in range(3):  # the first one decodes images whose rows were in the store
            since = time.perf_counter()
            embed_images(sample, backbone, out=out, **settings)  # type: ignore[arg-type]
            seconds.append(time.perf_counter() - since)
        return min(seconds) * 1000 / len(sample)


def make_candidates(
    backbones: Sequence, weights: object, layers: Layers, memory: object
) -> list[Candidate]:
    """Return a candidate for each backbone, with a name of its own."""
    if not isinstance(backbones, (list, tuple)) or not backbones:
        raise ValueError(
            f"backbones={backbones!r} must be a list with at least one backbone, such as "
            "['builtin', 'resnet18']."
        )
    each = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(backbones)
    if len(each) != len(backbones):
        raise ValueError(
            f"weights has {len(each)} entries and backbones {len(backbones)}: give one for each "
            "backbone, or a single one for all."
        )
    candidates: list[Candidate] = []
    for backbone, own in zip(backbones, each, strict=True):
        if isinstance(backbone, (PretrainedFeatureExtractor, PretrainedTextExtractor)):
            extractor = clone(backbone)
            if memory is not None:
                extractor.set_params(memory=memory)
        else:
            is_table = isinstance(backbone, str) and backbone.startswith(("vectors:", "static:"))
            is_of_texts = is_table or is_text_name(backbone)
            kind = PretrainedTextExtractor if is_of_texts else PretrainedFeatureExtractor
            extractor = kind(backbone, weights=own, memory=memory)
        if extractor.pooling in ("sif", "tfidf"):
            raise ValueError(
                f"pooling={extractor.pooling!r} depends on the texts of fit: rank with 'mean'."
            )
        candidates.append(Candidate(extractor, _name_of(extractor.backbone)))
    names = [candidate.label for candidate in candidates]
    if isinstance(layers, dict) and (unknown := [key for key in layers if key not in names]):
        raise ValueError(f"layers names {unknown}, and the backbones are {names}.")
    _tell_apart(candidates)
    of_images = [candidate.is_of_images for candidate in candidates]
    if not any(of_images):
        return candidates
    if not all(of_images):
        raise ValueError("Some of the backbones take images and others texts: rank them apart.")
    for name in ("image_shape", "value_range"):  # X is read in one way
        values = [getattr(candidate.extractor, name) for candidate in candidates]
        given = {tuple(value) for value in values if value is not None}
        if len(given) > 1:
            raise ValueError(f"The extractors' {name} differ: {sorted(given)}.")
        for candidate in candidates:
            candidate.extractor.set_params(**{name: next(iter(given), None)})
    return candidates


def _tell_apart(candidates: list[Candidate]) -> None:
    """Add the settings that differ, or a number, to equal labels."""
    settings = [(c.label, c.extractor.get_params(deep=False)) for c in candidates]
    taken: Counter[tuple[str, str]] = Counter()
    for candidate, (name, own) in zip(candidates, settings, strict=True):
        default = type(candidate.extractor)(own["backbone"]).get_params(deep=False)
        for key in ("weights", "preprocessing", "pooling", "precision"):
            differs = any(n == name and o.get(key) != own.get(key) for n, o in settings)
            if differs and own[key] != default[key]:
                shown = own[key] if isinstance(own[key], dict) else {key: own[key]}
                # The end of a path is more specific than its start.
                candidate.label += "".join(f", {k}={str(v)[-40:]}" for k, v in shown.items())
        known = candidate.label, repr(own["layer"])  # the layer has a column of its own
        taken[known] += 1
        if taken[known] > 1:
            candidate.label += f" #{taken[known]}"


def _names_of(layer: Layer) -> list[str | None]:
    """Return the layers that are joined as the columns of a candidate."""
    return list(layer) if isinstance(layer, (list, tuple)) else [layer]  # type: ignore[list-item]


def _name_of(backbone: object) -> str:
    named = backbone if isinstance(backbone, str) else getattr(backbone, "__name__", None)
    return named or type(backbone).__name__


# -- columns and scores ----------------------------------------------------------------------
def embed_all(candidates: list[Candidate], images: Rows) -> Rows:
    """Fill in the columns of all networks, a part of the images after the other.

    Returns the first part, in memory, to measure the time with.
    """
    from sktransfer._rows import unreadable
    from sktransfer.embedding._embed import embed_images
    from sktransfer.transferability._shared import SharedImages

    bad: dict[tuple[int, str], BadRow] = {}

    def held(part: slice) -> Rows:
        return SharedImages(images, part) if isinstance(images, Images) else images[part]

    sample = held(slice(0, _N_TIMED))
    starts = [0, *range(_N_TIMED, len(images), _CHUNK)]
    is_shown = any(candidate.extractor.verbose for candidate in candidates)
    with progress_bar(len(images), images.kind[:-1]) if is_shown else nullcontext() as progress:
        for start, stop in itertools.pairwise([*starts, len(images)]):
            part = slice(start, stop)
            shared = held(part) if start else sample
            for candidate in candidates:
                for name, network in candidate.networks.items():
                    out = candidate.columns[name][part]
                    found = embed_images(shared, network, out=out, **candidate.settings)  # type: ignore[arg-type]
                    bad |= {(row.row, row.where): row for row in found}
            if progress:
                progress(len(shared))
    if assumed := images.take_warnings():
        warn(assumed)
    if bad:
        rows = [bad[place] for place in sorted(bad)]
        first = f"{len(rows)} of {len(images)} {images.kind} could not be read:"
        where = ", all in the error's bad_images."
        raise unreadable(first, rows, "Repair or drop these rows.", where)
    return sample


def evaluate(
    columns: np.ndarray, target: np.ndarray, is_regression: bool, folds: Folds, scoring: object
) -> np.ndarray:
    """Return the probe's score in each fold; NaN for columns that are not finite."""
    if not np.isfinite(columns).all():
        return np.full(len(folds), np.nan)
    probe = make_probe(columns.shape[1], is_regression)
    return cross_val_score(probe, columns, target, cv=folds, scoring=scoring, error_score="raise")


def _other_scores(columns: np.ndarray, target: np.ndarray, is_regression: bool) -> dict[str, float]:
    scores = dict.fromkeys(("logme", "h_score", "transrate"), np.nan)
    if not np.isfinite(columns).all():
        return scores
    spectrum_ = spectrum(columns)
    task = "regression" if is_regression else "classification"
    scores["logme"] = logme_score(spectrum_, target, task=task)
    if not is_regression:
        scores["h_score"] = h_score(spectrum_, target)
        scale = np.sqrt(columns.var(axis=0).mean())
        alike = spectrum_._replace(s=spectrum_.s / scale) if scale > 0 else spectrum_
        scores["transrate"] = transrate_of(alike, target)
    return scores
