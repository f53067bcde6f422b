"""Base class of the fine-tuning estimators: fit, transform, and scores."""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Self

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from sktransfer._progress import shown
from sktransfer._threads import own_random_state, own_settings
from sktransfer._validation import (
    SHARED_CONSTRAINTS,
    HasMethods,
    Interval,
    StrOptions,
    check_images,
    check_texts,
    check_weight,
    fit_context,
)
from sktransfer.embedding._base import BaseEmbedding
from sktransfer.fine_tuning._targets import clip_outliers

if TYPE_CHECKING:
    from skorch import NeuralNet
    from torch import nn

    from sktransfer._rows import BadRow, Rows
    from sktransfer.fine_tuning._callbacks import EpochLog
    from sktransfer.fine_tuning._inputs import EmbeddingSettings
    from sktransfer.fine_tuning._module import TunedNetwork
    from sktransfer.fine_tuning._rows import Part, Split, TrainingRows
    from sktransfer.fine_tuning._train import Phase, TrainingSettings, UnfreezePlan
    from sktransfer.networks._backbone import Backbone

# With this many rows a tenth of them is held out to choose the best epoch.
_N_ROWS_TO_SPLIT = 1000
# Numbers of rows, and for each the weight of the trained network in its interpolation with the
# start: it grows with the number of rows (docs/benchmarks/fine_tuning.md).
_WISE_FT = (200, 600), (0.5, 0.75)
# Parameters that apply to images only, and their defaults.
_OF_IMAGES = {"augment": None, "image_shape": None, "value_range": None, "preprocessing": "auto"}


class BaseFineTuning(BaseEmbedding):
    """See the two estimators."""

    _name_suffix = "_tuned"
    _parameter_constraints: dict = {  # noqa: RUF012
        **SHARED_CONSTRAINTS,
        "pooling": [*SHARED_CONSTRAINTS["pooling"], StrOptions({"mean", "last"})],
        "precision": [StrOptions({"float32", "bfloat16"})],
        "layer": [Integral, str, "array-like", None],
        "unfreeze": [
            Interval(Integral, 0, None, closed="left"),
            StrOptions({"all", "gradual"}),
            Mapping,
        ],
        "head": [StrOptions({"linear"}), tuple, list, HasMethods(["forward"])],
        "head_init": [StrOptions({"linear_probe", "random"})],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "loss": [StrOptions({"auto"}), callable],
        "max_epochs": [Interval(Integral, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "lr": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "layer_decay": [Interval(Real, 0, 1, closed="right")],
        "optimizer": [StrOptions({"adamw", "sgd"}), callable],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "augment": [StrOptions({"light", "strong"}), callable, list, tuple, None],
        "early_stopping": [StrOptions({"auto"}), "boolean", HasMethods(["split", "get_n_splits"])],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "random_state": ["random_state"],
        "callbacks": ["array-like", None],
        "on_error": [StrOptions({"raise", "skip"})],
    }

    backbone_: Backbone
    bad_images_: list[BadRow]
    history_: list[dict[str, float]]
    n_iter_: int
    best_epoch_: int
    _kind: str
    _tuned: TunedNetwork

    # -- what the two do differently --------------------------------------------------------
    @abstractmethod
    def _read_target(self, y, n_rows: int, *, reset: bool, name: str = "y") -> np.ndarray:
        """Convert ``y`` to numbers; with `reset` set the classes, or the number of targets."""

    @abstractmethod
    def _prepare_target(self, target: np.ndarray, weight: np.ndarray, *, reset: bool) -> np.ndarray:
        """Convert targets of merged rows for the loss; with `reset` set their statistics."""

    @abstractmethod
    def _scores_without_image(self) -> np.ndarray:
        """Return the scores of an unreadable image."""

    @property
    @abstractmethod
    def _n_outputs(self) -> int: ...

    def _training_weight(self, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight

    # -- fit --------------------------------------------------------------------------------
    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None, X_val=None, y_val=None, groups=None):
        """Fine-tune the network.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images
            As in :class:`PretrainedFeatureExtractor`; or texts, if `backbone` takes these, as in
            :class:`PretrainedTextExtractor`.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            For a classifier one label of any type per row, or an indicator matrix of 0 and 1; for
            a regressor numbers.
        sample_weight : array-like of shape (n_samples,), default=None
            A weight of 2 is the row twice.
        X_val, y_val : as `X` and `y`, default=None
            A validation part, on which the best epoch is chosen.
        groups : array-like of shape (n_samples,), default=None
            Groups of rows (patients, tiles) that `early_stopping` keeps whole.

        Returns
        -------
        self : estimator
            The fitted estimator.

        Raises
        ------
        ValueError
            If images cannot be read, or if `X`, `y` or a parameter does not fit.
        OSError
            If the weights are not on this machine and cannot be downloaded.
        """
        return self._fit(X, y, sample_weight, X_val, y_val, groups)

    @own_settings()
    def _fit(
        self, X, y, sample_weight=None, X_val=None, y_val=None, groups=None, *, is_partial=False
    ) -> Self:
        """Fit a copy and take its attributes, so that a failed fit changes nothing."""
        fitted = copy.copy(self)
        old = vars(self).get("_tuned") if is_partial else None
        fitted._fit_in_place(X, y, sample_weight, X_val, y_val, groups, old, is_partial)
        self.__dict__ = fitted.__dict__
        return self

    def _fit_in_place(
        self, X, y, sample_weight, X_val, y_val, groups, old: TunedNetwork | None, is_partial: bool
    ) -> None:
        from sktransfer.embedding._embed import check_place
        from sktransfer.fine_tuning._train import train

        rng = check_random_state(self.random_state)
        seed = int(rng.randint(np.iinfo(np.int32).max))
        device = check_place(self.memory, self.device)
        self._fit_folder = os.getcwd()
        max_epochs, first_epoch = self.max_epochs, 0
        if is_partial:
            max_epochs, first_epoch = 1, self.n_iter_ if old is not None else 0

        # 1. Data: each image once, embedded if a probe is fitted.
        data = self._read_data(X, y, sample_weight, X_val, y_val, groups, old, is_partial, rng)
        plan, n_stages = data.plan, len(data.plan.stage_names)

        # 2. Start: from the linear probe, or from the network of the last epoch.
        first_stage = (
            plan.first_trained_stage if is_partial else plan.first_stage(max(1, max_epochs))
        )
        # Pre-trained stages are trained from a probe, without a validation part to stop them early.
        uses_wise_ft = (
            self._starts_as_probe and first_stage < n_stages and max_epochs > 0 and not is_partial
        ) and not (self._has_random_weights or data.keeps_best)
        if old is not None:
            head = self._new_head(data.backbone, data.train.all_rows.n_columns, seed)
            tuned = old.copy(head, first_stage, self.precision)
        else:
            tuned = self._new_network(data, first_stage, seed)
            if self._starts_as_probe:
                has_corners = uses_wise_ft and not data.backbone.is_text
                self._start_as_probe(tuned.head, data.train, rng, has_corners)

        # 3. Freeze: the outputs of frozen stages are computed once.
        phases = self._phases(tuned, data, max_epochs)

        # 4. Train.
        settings = self._training_settings(
            tuned,
            device=device,
            seed=seed + first_epoch,
            keeps_best=data.keeps_best,
            is_continued=is_partial,
            wise_ft_share=np.interp(len(data.train.rows), *_WISE_FT) if uses_wise_ft else None,
        )
        old_state = None if old is None else old.training_state()
        log = train(tuned, phases, settings, plan.first_stage, first_epoch, old_state)

        # 5. Keep.
        self._keep(data, tuned, log, first_epoch)

    def _read_data(self, X, y, sample_weight, X_val, y_val, groups, old, is_partial, rng) -> _Data:
        from sktransfer.fine_tuning._rows import TrainingRows, held_out_rows
        from sktransfer.fine_tuning._train import UnfreezePlan
        from sktransfer.networks._huggingface import is_text_name

        if old is None:
            is_text = is_text_name(self.backbone)
            self._check_image_parameters(is_text)
        else:
            is_text = old.backbone.is_text
        images = self._as_rows(X, is_text, reset=old is None)
        target = self._read_target(y, images.n_rows, reset=old is None)
        weight = check_weight(sample_weight, images.n_rows)
        validation = self._check_validation(X_val, y_val, is_text)
        given, split = target, None
        if self._has_splitter and validation is None and not is_partial:
            split = self._split(given, groups, rng)  # before a network is loaded
        backbone = self._load() if old is None else old.backbone
        stage_names = backbone.stage_names_to_layer
        first_epoch = 0 if old is None else self.n_iter_
        plan = UnfreezePlan(self.unfreeze, stage_names, self.max_epochs, first_epoch)
        begins_with_head = self.augment is None and plan.first_stage(1) == len(stage_names)
        if old is None:
            wants_embeddings = begins_with_head or self._starts_as_probe
        else:  # the embeddings of trained stages differ from the backbone's
            wants_embeddings = begins_with_head and not old.has_own_stages
        settings = self._embedding_settings()
        rows = TrainingRows(images, target, weight, backbone, settings, wants_embeddings)
        target = self._prepare_target(rows.target, rows.weight, reset=old is None)
        valid = None
        if validation is not None:
            images, target_val = validation
            weight = np.ones(images.n_rows)
            valid_rows = TrainingRows(
                images, target_val, weight, backbone, settings, wants_embeddings, "validation"
            )
            target_val = self._prepare_target(valid_rows.target, valid_rows.weight, reset=False)
            valid = self._part(valid_rows, target_val, np.arange(len(valid_rows)))
        keeps_best = self._has_splitter or bool(self.early_stopping)
        if self.early_stopping == "auto":
            keeps_best = valid is not None or len(rows) >= _N_ROWS_TO_SPLIT
        keeps_best = keeps_best and not is_partial and self.max_epochs > 0
        index = np.arange(len(rows))
        if keeps_best and valid is None:
            if split is None and groups is not None:
                split = self._split(given, groups, rng)
            index, held_out = held_out_rows(rows, target, split, self.validation_fraction, rng)
            keeps_best = len(held_out) > 0
            valid = self._part(rows, target, held_out) if keeps_best else None
        return _Data(backbone, plan, self._part(rows, target, index), valid, keeps_best)

    def _as_rows(self, X, is_text: bool, *, reset: bool, name: str = "X") -> Rows:
        check = check_texts if is_text else check_images
        return check(self, X, reset=reset, name=name)

    def _check_image_parameters(self, is_text: bool) -> None:
        """Raise ValueError if a parameter for images was given with a network for texts."""
        for name, default in _OF_IMAGES.items():
            value = getattr(self, name)
            if is_text and not (value is default or (isinstance(value, str) and value == default)):
                raise ValueError(
                    f"{name}={shown(value)} is for images, but backbone={self.backbone!r} takes "
                    f"texts: leave `{name}` out."
                )

    def _check_validation(self, X_val, y_val, is_text) -> tuple[Rows, np.ndarray] | None:
        if X_val is None and y_val is None:
            return None
        if X_val is None or y_val is None:
            given, missing = ("y_val", "X_val") if X_val is None else ("X_val", "y_val")
            raise ValueError(f"{given} is given without {missing}: give both, or neither.")
        images = self._as_rows(X_val, is_text, reset=False, name="X_val")
        return images, self._read_target(y_val, images.n_rows, reset=False, name="y_val")

    def _split(self, target: np.ndarray, groups, rng) -> Split:
        """Split the rows of `X` for training and validation by scikit-learn's splitter."""
        from sklearn.model_selection import GroupShuffleSplit

        from sktransfer.fine_tuning._rows import first_split

        by_groups = GroupShuffleSplit(1, test_size=self.validation_fraction)
        splitter = self.early_stopping if self._has_splitter else by_groups
        return first_split(splitter, target, groups, rng, type(self).__name__)

    def _part(self, all_rows: TrainingRows, target: np.ndarray, rows: np.ndarray) -> Part:
        from sktransfer.fine_tuning._rows import Part

        weight = self._training_weight(target[rows], all_rows.weight[rows])
        return Part(all_rows, rows, target[rows], weight)

    @property
    def _has_splitter(self) -> bool:
        return hasattr(self.early_stopping, "get_n_splits")

    @property
    def _starts_as_probe(self) -> bool:
        return self.head_init == "linear_probe" and not hasattr(self.head, "forward")

    @property
    def _has_random_weights(self) -> bool:
        return self.weights is None and isinstance(self.backbone, str)

    def _load(self, **given) -> Backbone:
        if not (isinstance(self.layer, str) and self.layer == "auto"):
            return super()._load(**given)
        from sktransfer.fine_tuning._module import normalises

        # The built-in network joins two stages itself. A user's own head fits the last stage alone.
        is_published = isinstance(self.backbone, str) and self.backbone != "builtin"
        may_join = is_published and self._starts_as_probe and self.pooling == "auto"
        backbone = super()._load(**given, layer=None)
        if may_join and backbone.has_maps and normalises(backbone.network.module):
            backbone = super()._load(**given, layer="all")
        return backbone

    def _new_head(self, backbone: Backbone, n_columns: int, seed: int) -> nn.Module:
        from sktransfer.fine_tuning._head import make_head

        width = n_columns * backbone.n_features
        with own_random_state(seed):
            return make_head(self.head, width, self._n_outputs, self.dropout)

    def _new_network(self, data: _Data, first_trained_stage: int, seed: int) -> TunedNetwork:
        from sktransfer.fine_tuning._module import TunedNetwork

        n_columns = data.train.all_rows.n_columns
        return TunedNetwork(
            data.backbone,
            self._new_head(data.backbone, n_columns, seed),
            n_columns,
            first_trained_stage,
            # Batch norms keep the statistics of pre-training; random weights have none.
            moves_statistics=self._has_random_weights,
            precision=self.precision,
        )

    def _start_as_probe(self, head: nn.Module, part: Part, rng, has_corners: bool) -> None:
        from sktransfer.fine_tuning._head import fit_probe

        views = part.embeddings[:, None]
        if has_corners and len(part.rows) < _N_ROWS_TO_SPLIT:
            views = part.all_rows.with_corners(part.rows)
        target = part.target
        if self._kind == "regression" and self.loss != "auto":
            target = clip_outliers(target, part.weight)
        probe = fit_probe(views, target, part.weight, self._kind, self._n_outputs, rng)
        head.start_from(*probe)  # type: ignore[operator]

    def _phases(self, tuned: TunedNetwork, data: _Data, max_epochs: int) -> list[Phase]:
        """Return the epochs that train the head alone, on embeddings, and those of stages."""
        from sktransfer.fine_tuning._train import Phase

        n_stages, input_stage = len(tuned.stage_names), tuned.first_trained_stage
        if self.augment is not None or (max_epochs == 0 and input_stage < n_stages):
            input_stage = 0  # new images in each epoch, or none
        parts = [data.train] if data.valid is None else [data.train, data.valid]
        sources = list(dict.fromkeys(part.all_rows for part in parts))
        module = tuned.module(whole=input_stage < n_stages)
        phases, n_head = [], 0
        if self.augment is None and data.train.all_rows.embeddings is not None:
            first_stages = [data.plan.first_stage(epoch) for epoch in range(1, max_epochs + 1)]
            n_head = first_stages.count(n_stages)
            if n_head or input_stage == n_stages:
                sets = [part.training_set(part.all_rows.embedded()) for part in parts]
                phases.append(Phase(n_head, n_stages, *sets))
        if n_head < max_epochs or not phases:
            if input_stage > 0 and not all(
                rows.keep_frozen_outputs(module, input_stage) for rows in sources
            ):
                input_stage = 0  # too large to be kept
            sets = [part.training_set(part.all_rows.inputs(input_stage)) for part in parts]
            phases.append(Phase(max_epochs - n_head, input_stage, *sets))
        return phases

    def _training_settings(self, tuned: TunedNetwork, **chosen) -> TrainingSettings:
        from sktransfer.fine_tuning._train import TrainingSettings

        module, first = tuned.module(), tuned.first_trained_stage
        names = [field.name for field in fields(TrainingSettings) if hasattr(self, field.name)]
        own = {name: getattr(self, name) for name in names}
        own["lr"] = module.auto_lr(first) if self.lr == "auto" else self.lr
        return TrainingSettings(**own | chosen, kind=self._kind, n_outputs=self._n_outputs)

    def _keep(self, data: _Data, tuned: TunedNetwork, log: EpochLog, first_epoch: int) -> None:
        from sktransfer.fine_tuning._train import report

        for part in (data.train, data.valid):
            if part is not None:
                part.all_rows.report_newly_bad()
        rows = data.train.all_rows
        self.backbone_, self._tuned, self.bad_images_ = data.backbone, tuned, rows.bad
        self._n_image_columns = rows.n_columns
        self.n_features_out_ = rows.n_columns * data.backbone.n_features
        self.history_ = [*(self.history_ if first_epoch else []), *log.history]
        self.n_iter_, self.best_epoch_ = log.epoch, log.kept_epoch
        start = "linear probe" if self._starts_as_probe else "initial network"
        report(log, type(self).__name__, start, tuned.has_own_stages)

    # -- from images to scores --------------------------------------------------------------
    def _embedding_settings(self) -> EmbeddingSettings:
        from sktransfer.fine_tuning._inputs import EmbeddingSettings
        from sktransfer.store._store import resolve_memory

        memory = resolve_memory(self.memory, getattr(self, "_fit_folder", ""))
        return EmbeddingSettings(
            memory, self.device, self.precision, self.n_jobs, self.on_error, self.verbose
        )

    @own_settings()
    def _embed(self, X) -> tuple[np.ndarray, list[BadRow]]:
        """Return tuned embeddings, with NaN for unreadable images, and a list of these."""
        from sktransfer.fine_tuning._inputs import embed_rows
        from sktransfer.fine_tuning._rows import report_bad

        check_is_fitted(self)
        images = self._as_rows(X, self.backbone_.is_text, reset=False)
        backbone = self._tuned.tuned_backbone()
        rows, bad = embed_rows(images, backbone, self._embedding_settings())
        self.bad_images_ = bad
        report_bad(bad, images, self.on_error, "prediction")
        return rows, bad

    def _scores(self, X) -> np.ndarray:
        """Return the head's scores, float64 (n_rows, n_outputs)."""
        from sktransfer.fine_tuning._rows import check_finite

        rows, bad = self._embed(X)
        is_readable = ~np.isin(np.arange(len(rows)), [b.row for b in bad])
        check_finite(rows[is_readable], np.flatnonzero(is_readable))
        scores = self._tuned.scores(np.where(is_readable[:, None], rows, 0))
        scores[~is_readable] = self._scores_without_image()
        return scores

    def _columns(self, X) -> np.ndarray:
        return self._embed(X)[0]

    @property
    @own_settings()
    def net_(self) -> NeuralNet:
        """The skorch net, which is made again on first use after unpickling."""
        if "_tuned" not in vars(self):
            raise AttributeError(
                f"This {type(self).__name__} is not fitted yet, so it has no net_."
            )
        tuned = self._tuned
        if tuned.net is None:
            from sktransfer.embedding._batches import resolve_device
            from sktransfer.fine_tuning._train import has_scheduler, make_net
            from sktransfer.fine_tuning._training_state import continue_from

            settings = self._training_settings(tuned, device=resolve_device(self.device), seed=0)
            module, first = tuned.module(), tuned.first_trained_stage
            module.freeze(first)
            net = make_net(module, first, settings)
            if (state := tuned.training_state()) is not None:
                continue_from(net, state, has_scheduler(self.callbacks))
            tuned.net = net
        return tuned.net


@dataclass
class _Data:
    """The data of a training, and the network that embedded them."""

    backbone: Backbone
    plan: UnfreezePlan
    train: Part
    valid: Part | None
    keeps_best: bool  # the best epoch on the validation part
