"""What the fine-tuning estimators share: fit, and from images to scores."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from sktransfer._validation import (
    SHARED_CONSTRAINTS,
    check_images,
    check_weight,
    image_column_names,
    keep_index,
    set_image_tags,
)
from sktransfer.fine_tuning._probe import fit_probe, stratified_part

# From so many rows on a tenth of them is worth giving away to choose the epoch by.
_N_ROWS_TO_SPLIT = 1000
# The picture and its four corners; and what "auto" takes of them where it takes any.
_MAX_PROBE_VIEWS, _CAREFUL_PROBE_VIEWS = 5, 3


class BaseFineTuning(TransformerMixin, BaseEstimator):
    """See the two estimators."""

    _parameter_constraints: dict = {  # noqa: RUF012
        **SHARED_CONSTRAINTS,
        "layer": [str, None],
        "unfreeze": [
            Interval(Integral, 0, None, closed="left"),
            StrOptions({"all", "gradual"}),
            Mapping,
        ],
        "batch_norm": [StrOptions({"auto", "fixed", "moving"})],
        "head": [StrOptions({"linear"}), tuple, list, HasMethods(["forward"])],
        "head_init": [StrOptions({"linear_probe", "random"})],
        "probe_views": [
            StrOptions({"auto"}),
            Interval(Integral, 1, _MAX_PROBE_VIEWS, closed="both"),
        ],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "max_epochs": [Interval(Integral, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "lr": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "layer_decay": [Interval(Real, 0, 1, closed="right")],
        "optimizer": [StrOptions({"adamw", "sgd"}), HasMethods(["make"]), callable],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "lr_schedule": [StrOptions({"one_cycle", "cosine", "constant"}), callable],
        "gradient_clip": [Interval(Real, 0, None, closed="neither"), None],
        "augment": [StrOptions({"light", "strong"}), callable, None],
        "mixup": [Interval(Real, 0, None, closed="left")],
        "cutmix": [Interval(Real, 0, None, closed="left")],
        "l2_sp": [Interval(Real, 0, None, closed="left")],
        "weight_averaging": [StrOptions({"auto", "wise_ft", "ema", "last"}), None],
        "early_stopping": [StrOptions({"auto"}), "boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "n_views": [Interval(Integral, 1, 4, closed="both")],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "callbacks": ["array-like", None],
        "on_error": [StrOptions({"raise", "skip"})],
    }

    backbone_: Any
    bad_images_: list
    history_: list[dict[str, Any]]
    n_iter_: int
    best_epoch_: int
    _kind: str
    _blind_scores: np.ndarray

    # The "?" of the HTML representation leads to the class's page.
    _doc_link_module = "sktransfer"
    _doc_link_template = (
        "https://sktransfer.readthedocs.io/en/stable/api.html#sktransfer.{estimator_name}"
    )

    # -- what the two do differently --------------------------------------------------------
    @abstractmethod
    def _read_target(self, y: Any, n_rows: int, *, reset: bool, name: str = "y") -> np.ndarray:
        """Numbers for the loss; with `reset` notes the classes, or whatever there is."""

    @abstractmethod
    def _prepare_target(self, target: np.ndarray, weight: np.ndarray, *, reset: bool) -> np.ndarray:
        """What the loss gets, once rows are merged; refuses what cannot be trained on."""

    @property
    @abstractmethod
    def _n_outputs(self) -> int: ...

    def _training_weight(self, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight

    def _temperature(self, head: Any, data: Any, prepared: np.ndarray, rows: Any) -> float:
        """What the probe's scores are divided by before stages are trained."""
        return 1.0

    # -- fit --------------------------------------------------------------------------------
    def _fit(self, X, y, sample_weight=None, X_val=None, y_val=None, *, goes_on=False):
        """Fit; where that fails the estimator is what it was."""
        from sktransfer.fine_tuning._undoing import undone_on_failure

        before = dict(vars(self))
        trained = before.get("_tuned") if goes_on or self.warm_start else None
        try:
            with undone_on_failure(trained, keeps_net=goes_on):
                return self._fit_from(X, y, sample_weight, X_val, y_val, goes_on)
        except BaseException:
            self.__dict__ = before
            raise

    def _fit_from(self, X, y, sample_weight, X_val, y_val, goes_on):
        """Train from the start, from the last fit's weights, or one more epoch (`goes_on`)."""
        from sktransfer.embedding._cluster import check_place
        from sktransfer.fine_tuning._train import as_random_seed, report, train
        from sktransfer.fine_tuning._training_data import TrainingData
        from sktransfer.fine_tuning._unfreezing import UnfreezePlan

        old: Any = vars(self).get("_tuned")
        is_resumed = old is not None and (goes_on or self.warm_start)
        reset = not (goes_on and old is not None)
        images = check_images(self, X, reset=reset)
        target = self._read_target(y, images.n_rows, reset=reset)
        weight = check_weight(sample_weight, images.n_rows)
        rng, seed = as_random_seed(self.random_state)
        device = check_place(self.memory, self.device)

        # No name brings back the weights of a model that was loaded from a file of its own.
        is_own = is_resumed and old.backbone.has_own_weights and old.backbone.name == self.backbone
        backbone = old.backbone if is_own or not reset else self._load_backbone()
        max_epochs = 1 if goes_on else self.max_epochs
        first_epoch = self.n_iter_ if goes_on and is_resumed else 0
        stage_names = backbone.stage_names_to_layer
        plan = UnfreezePlan(self.unfreeze, stage_names, self.max_epochs, first_epoch)
        # `partial_fit` may reach epochs that this fit does not.
        lowest = plan.lowest if goes_on else plan.first_stage(max(1, max_epochs))
        starts_as_probe = self._starts_as_probe and not is_resumed
        # New pictures in each epoch leave nothing that could be kept.
        makes_new = self.augment is not None or self.mixup > 0 or self.cutmix > 0
        entry = 0 if makes_new else lowest
        n_stages = len(stage_names)
        begins_with_head = not makes_new and plan.first_stage(1) == n_stages
        options = {
            "backbone": backbone,
            "settings": self._embedding_settings(),
            # Stages that were trained give others than the backbone does.
            "wants_embeddings": starts_as_probe
            or (begins_with_head and not (is_resumed and old.has_own_stages)),
            "on_error": self.on_error,
        }
        data = TrainingData(images, target, weight, **options)
        self.bad_images_ = data.bad
        if len(data) == 0:
            raise ValueError(
                f"No row is left to train on: {len(data.bad)} of {images.n_rows} could not be "
                "read, and the others have no weight."
            )
        keeps_best = (
            not goes_on
            and max_epochs > 0
            and (
                (X_val is not None or len(data) >= _N_ROWS_TO_SPLIT)
                if self.early_stopping == "auto"
                else bool(self.early_stopping)
            )
        )
        valid_data = self._validation_data(X_val, y_val, options)
        prepared = self._prepare_target(data.target, data.weight, reset=not is_resumed)
        train_rows, valid_rows = np.arange(len(data)), np.arange(0)
        if keeps_best and valid_data is None:
            codes = prepared if prepared.ndim == 1 else None
            fraction = self.validation_fraction
            valid_rows = stratified_part(codes, fraction, rng, len(data))
            train_rows = np.setdiff1d(train_rows, valid_rows)
            if not len(valid_rows):
                keeps_best = False
                warnings.warn(
                    f"There is no early stopping: validation_fraction={fraction} of {len(data)} "
                    "different rows leaves no row to validate on. Give a larger "
                    "validation_fraction, more rows of each class, or X_val and y_val.",
                    UserWarning,
                    stacklevel=5,
                )

        probe_teaches = starts_as_probe and lowest < n_stages and max_epochs > 0 and not goes_on
        # Where the network's own weights move and no validation part tells when they have moved
        # too far, more care is taken of the start, and of staying near it.
        is_careful = probe_teaches and not (self._has_random_weights or keeps_best)
        if not is_resumed:
            tuned = self._new_network(backbone, images.n_columns, lowest, seed)
            if starts_as_probe:
                n_views = self.probe_views
                if n_views == "auto":
                    is_few = len(train_rows) < _N_ROWS_TO_SPLIT
                    n_views = _CAREFUL_PROBE_VIEWS if is_careful and is_few else 1
                self._start_as_probe(tuned, data, prepared, train_rows, rng, n_views)
        else:
            head = self._new_head(backbone, images.n_columns, seed)
            settings = (self._moves_statistics, self.precision)
            tuned = old.to_go_on(backbone, images.n_columns, lowest, head, *settings)
        module = tuned.module(whole=entry < n_stages)
        temperature = 1.0
        if probe_teaches:
            temperature = self._temperature(tuned.head, data, prepared, train_rows)
        parts = [part for part in (data, valid_data) if part is not None]
        sources = [part.source(module, entry, n_stages, device, tuned.lowest) for part in parts]
        if min(found for _, _, found in sources) < entry:  # one of them fits in no bound
            entry = 0
            sources = [part.source(module, 0, n_stages, device, tuned.lowest) for part in parts]
        if entry > 0:
            for part in parts:
                part.forget_pixels()
        train_set, valid_set = self._training_sets(
            data, valid_data, sources, prepared, train_rows, valid_rows,
            begins_embedded=begins_with_head and entry < n_stages,
        )  # fmt: skip
        averaging = None if goes_on else self.weight_averaging
        if averaging == "auto":
            averaging = "wise_ft" if is_careful else None
        result = train(
            tuned,
            train_set,
            valid_set,
            self._training_settings(
                module, tuned.lowest, seed + first_epoch, device, keeps_best, goes_on, averaging
            ),
            entry=entry,
            first_stage=plan.first_stage,
            max_epochs=max_epochs,
            first_epoch=first_epoch,
            keeps_net=goes_on and is_resumed,
            temperature=temperature,
        )
        for part in parts:
            part.report_lost()
        self.backbone_, self._tuned = backbone, tuned
        self._n_image_columns = images.n_columns
        self.n_features_out_ = images.n_columns * backbone.n_features
        self.history_ = [*(self.history_ if first_epoch else []), *result.history]
        self.n_iter_, self.best_epoch_ = result.n_iter, result.best_epoch
        report(result, type(self).__name__, starts_as_probe, tuned.has_own_stages)
        return self

    def _load_backbone(self):
        from sktransfer._threads import own_random_state
        from sktransfer.networks._backbone import load_backbone

        # A callable that makes a module may draw random weights before it sets others.
        with own_random_state():
            return load_backbone(
                self.backbone,
                weights=self.weights,
                layer=self.layer,
                pooling=self.pooling,
                preprocessing=self.preprocessing,
            )

    @property
    def _starts_as_probe(self) -> bool:
        return self.head_init == "linear_probe" and not hasattr(self.head, "forward")

    def _embedding_settings(self):
        from sktransfer.fine_tuning._training_data import EmbeddingSettings

        return EmbeddingSettings(
            self.memory, self.device, self.precision, self.n_jobs, self.verbose
        )

    def _validation_data(self, X_val, y_val, options):
        from sktransfer.fine_tuning._training_data import TrainingData

        if X_val is None and y_val is None:
            return None
        if X_val is None or y_val is None:
            given, missing = ("y_val", "X_val") if X_val is None else ("X_val", "y_val")
            raise ValueError(f"{given} is given without {missing}: give both, or neither.")
        images = check_images(self, X_val, reset=False, name="X_val")
        target = self._read_target(y_val, images.n_rows, reset=False, name="y_val")
        weight = np.ones(images.n_rows)
        data = TrainingData(images, target, weight, **options, what="validation")
        if len(data) == 0:
            raise ValueError(f"No row of X_val is left: none of its {images.n_rows} can be read.")
        return data

    def _new_network(self, backbone, n_columns, lowest, seed):
        from sktransfer.fine_tuning._tuned_network import TunedNetwork

        return TunedNetwork(
            backbone,
            self._new_head(backbone, n_columns, seed),
            n_columns,
            lowest,
            moves_statistics=self._moves_statistics,
            precision=self.precision,
        )

    def _new_head(self, backbone, n_columns, seed):
        from sktransfer._threads import own_random_state
        from sktransfer.fine_tuning._head import make_head

        with own_random_state(seed):
            width = n_columns * backbone.n_features
            return make_head(self.head, width, self._n_outputs, self.dropout)

    @property
    def _moves_statistics(self) -> bool:
        # Statistics of random weights say nothing.
        return self.batch_norm == "moving" or (
            self.batch_norm == "auto" and self._has_random_weights
        )

    @property
    def _has_random_weights(self) -> bool:
        return self.weights is None and isinstance(self.backbone, str)

    def _start_as_probe(self, tuned, data, prepared, rows, rng, n_views):
        coef, intercept = fit_probe(
            data.embed_views(rows, n_views),
            prepared[rows],
            self._training_weight(prepared[rows], data.weight[rows]),
            self._kind,
            self._n_outputs,
            rng,
        )
        tuned.head.start_from(coef, intercept)

    def _training_sets(
        self, data, valid_data, sources, prepared, rows, valid_rows, *, begins_embedded
    ):
        """What is trained on, and what is validated on or None; as embeddings at first."""
        from sktransfer.fine_tuning._rows import TrainingSet

        parts = [(data, sources[0], prepared, rows)]
        if valid_data is not None:
            target = self._prepare_target(valid_data.target, valid_data.weight, reset=False)
            parts.append((valid_data, sources[1], target, np.arange(len(valid_data))))
        elif len(valid_rows):
            parts.append((data, sources[0], prepared, valid_rows))
        begins_embedded &= all(part.embeddings is not None for part, *_ in parts)
        sets = []
        for part, (inputs, positions, _), target, index in parts:
            weight = self._training_weight(target[index], part.weight[index])
            sets.append(TrainingSet(inputs, positions[index], target[index], weight))
            if begins_embedded:
                sets[-1].give_first(part.embedded(), index)
        return sets[0], sets[1] if len(sets) > 1 else None

    def _training_settings(
        self, module, lowest, seed=0, device=None, keeps_best=False, goes_on=False, averaging=None
    ):
        from sktransfer.embedding._batches import resolve_device
        from sktransfer.fine_tuning._train import TrainingSettings

        taken_over = (
            "layer_decay", "optimizer", "weight_decay", "gradient_clip", "augment", "mixup",
            "cutmix", "l2_sp", "batch_size", "tol", "callbacks", "verbose",
        )  # fmt: skip
        return TrainingSettings(
            **{name: getattr(self, name) for name in taken_over},
            kind=self._kind,
            n_outputs=self._n_outputs,
            lr=module.suggested_lr(lowest) if self.lr == "auto" else self.lr,
            lr_schedule="constant" if goes_on else self.lr_schedule,
            label_smoothing=getattr(self, "label_smoothing", 0.0),
            weight_averaging=averaging,
            keeps_best=keeps_best,
            patience=self.n_iter_no_change,
            device=device or resolve_device(self.device),
            seed=seed,
        )

    # -- from images to scores --------------------------------------------------------------
    def _embed(self, X) -> tuple[np.ndarray, list]:
        """Tuned embeddings, NaN where rows are unreadable, and these."""
        from sktransfer.fine_tuning._training_data import _handle, embed_rows
        from sktransfer.fine_tuning._views import mean_over_views

        check_is_fitted(self)
        images = check_images(self, X, reset=False)
        backbone = self._tuned.tuned_backbone()
        if self.n_views > 1:
            backbone = mean_over_views(backbone, self.n_views)
        rows, bad = embed_rows(images, backbone, self._embedding_settings())
        self.bad_images_ = bad  # another thread's call may write its own
        if assumed := images.take_warnings():
            warnings.warn(assumed, UserWarning, stacklevel=4)
        if bad:
            _handle(bad, images.n_rows, self.on_error, "prediction", stacklevel=5)
        return rows.reshape(images.n_rows, -1), bad

    def _scores(self, X) -> np.ndarray:
        """What the head says, float64 (n_rows, n_outputs)."""
        from sktransfer.fine_tuning._training_data import check_finite

        rows, bad = self._embed(X)
        unreadable = np.zeros(len(rows), dtype=bool)
        unreadable[[b.row for b in bad]] = True
        is_readable = np.flatnonzero(~unreadable)
        check_finite(rows[is_readable], is_readable)
        scores = self._tuned.scores(np.where(unreadable[:, None], 0, rows))
        # Of a picture that nobody can read only the training set's average is known.
        scores[unreadable] = self._blind_scores
        return scores

    def transform(self, X):
        """Embed images with the tuned network.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images

        Returns
        -------
        columns : ndarray of shape (n_samples, n_features_out_), float32
            What enters the head. A row of NaN where an image cannot be read and
            ``on_error="skip"``.
        """
        rows, _ = self._embed(X)
        return keep_index(self, rows, X)

    def get_feature_names_out(self, input_features=None):
        """Return the names of the columns of `transform`: ``<column>_<backbone>_tuned_007``.

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Names of the image columns; ``None``: `feature_names_in_`, where there are.

        Returns
        -------
        names : ndarray of str objects of shape (n_features_out_,)
        """
        check_is_fitted(self)
        names = image_column_names(self, input_features)
        width = self.backbone_.n_features
        digits = max(3, len(str(width - 1)))
        stem = f"{self.backbone_.short_name}_tuned"
        return np.asarray(
            [f"{f'{name}_' if name else ''}{stem}_{i:0{digits}d}" for name in names
             for i in range(width)],
            dtype=object,
        )  # fmt: skip

    @property
    def net_(self):
        """The skorch net: made again, without the optimizer's state, after unpickling."""
        if "_tuned" not in vars(self):
            raise AttributeError(f"This {type(self).__name__} is not fitted yet: it has no net_.")
        if self._tuned.net is None:
            from sktransfer.fine_tuning._train import made_for, make_net

            module = self._tuned.module()
            module.freeze(min(self._tuned.lowest, len(module.stages)))
            settings = self._training_settings(module, self._tuned.lowest)
            self._tuned.net = make_net(module, settings)
            self._tuned.net_made_for = made_for(settings)
        return self._tuned.net

    def __sklearn_is_fitted__(self):
        return "_tuned" in vars(self)

    def __sklearn_tags__(self):
        return set_image_tags(self, super().__sklearn_tags__())
