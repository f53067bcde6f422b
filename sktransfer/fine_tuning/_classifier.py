"""FineTuningClassifier: unfreeze and train, for labels."""

from __future__ import annotations

from numbers import Real

import numpy as np
from sklearn.base import ClassifierMixin, _fit_context
from sklearn.metrics import accuracy_score
from sklearn.utils._param_validation import Interval, StrOptions

from sktransfer.fine_tuning._base import BaseFineTuning
from sktransfer.fine_tuning._class_weights import balanced_factors, class_weights
from sktransfer.fine_tuning._docs import documented
from sktransfer.fine_tuning._targets import (
    are_strings,
    check_y_given,
    codes_of,
    read_classes,
    read_labels,
    shown,
    sorted_classes,
)


@documented(
    scores="one score per class",
    probe=":class:`~sklearn.linear_model.LogisticRegression`",
    blind="the shares of the classes in training",
    probe_temperature="""
    probe_temperature : "auto" or float, default=1.0
        What the scores of the linear probe are divided by before stages are trained; they predict
        the same labels, less surely. A probe that knows its rows by heart leaves the stages next
        to no gradient [5]_. ``"auto"``: so much that its loss on them is half of that of guessing
        by the classes' shares. Stages then move further, which makes for better probabilities,
        and for better labels where the pictures are like those of pre-training.
        `partial_fit` divides nothing.
""",
    more_parameters="""
    label_smoothing : float, default=0.0
        Share of each target that is spread evenly over the classes.
""",
    class_weight="""
    class_weight : dict, "balanced" or None, default=None
        As in scikit-learn.
""",
)
class FineTuningClassifier(ClassifierMixin, BaseFineTuning):
    """Fine-tune a pre-trained network as a classifier.

    The network gets a new head, which starts as a logistic regression on the frozen
    embeddings; then the head and the unfrozen stages are trained together, lower stages with
    smaller learning rates. skorch does the training inside, see `net_`.

    Read more in the :ref:`User Guide <fine_tuning>`.

    Parameters
    ----------
    %(parameters)s

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels; for several labels per row their column numbers.

    %(attributes)s

    See Also
    --------
    FineTuningRegressor : The same for numbers.
    PretrainedFeatureExtractor : Frozen features for a classical model.

    Notes
    -----
    %(notes)s

    References
    ----------
    %(references)s
    .. [5] Y. Ren, S. Guo, W. Bae, D. J. Sutherland. "How to prepare your task head for
       finetuning." ICLR 2023. https://arxiv.org/abs/2302.05779

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import FineTuningClassifier
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> model = FineTuningClassifier(
    ...     image_shape=(8, 8), unfreeze=1, max_epochs=1, random_state=0
    ... )
    >>> model.fit(X[:60] / 16, y[:60]).score(X[100:160] / 16, y[100:160]) > 0.7
    True
    """

    _parameter_constraints: dict = {  # noqa: RUF012
        **BaseFineTuning._parameter_constraints,
        "probe_temperature": [StrOptions({"auto"}), Interval(Real, 1, None, closed="left")],
        "label_smoothing": [Interval(Real, 0, 1, closed="left")],
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }

    classes_: np.ndarray

    def __init__(
        self,
        backbone="builtin",
        *,
        weights="DEFAULT",
        layer=None,
        pooling="auto",
        preprocessing="auto",
        image_shape=None,
        unfreeze="all",
        batch_norm="auto",
        head="linear",
        head_init="linear_probe",
        probe_views="auto",
        probe_temperature=1.0,
        dropout=0.0,
        max_epochs=8,
        batch_size=32,
        lr="auto",
        layer_decay=0.7,
        optimizer="adamw",
        weight_decay=0.01,
        lr_schedule="one_cycle",
        gradient_clip=None,
        augment=None,
        mixup=0.0,
        cutmix=0.0,
        label_smoothing=0.0,
        l2_sp=0.0,
        weight_averaging="auto",
        early_stopping="auto",
        validation_fraction=0.1,
        n_iter_no_change=10,
        tol=0.0,
        class_weight=None,
        n_views=1,
        random_state=None,
        warm_start=False,
        callbacks=None,
        device="auto",
        precision="float32",
        n_jobs=None,
        memory=None,
        on_error="raise",
        verbose=0,
    ):
        self.backbone = backbone
        self.weights = weights
        self.layer = layer
        self.pooling = pooling
        self.preprocessing = preprocessing
        self.image_shape = image_shape
        self.unfreeze = unfreeze
        self.batch_norm = batch_norm
        self.head = head
        self.head_init = head_init
        self.probe_views = probe_views
        self.probe_temperature = probe_temperature
        self.dropout = dropout
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.layer_decay = layer_decay
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.gradient_clip = gradient_clip
        self.augment = augment
        self.mixup = mixup
        self.cutmix = cutmix
        self.label_smoothing = label_smoothing
        self.l2_sp = l2_sp
        self.weight_averaging = weight_averaging
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.class_weight = class_weight
        self.n_views = n_views
        self.random_state = random_state
        self.warm_start = warm_start
        self.callbacks = callbacks
        self.device = device
        self.precision = precision
        self.n_jobs = n_jobs
        self.memory = memory
        self.on_error = on_error
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None, X_val=None, y_val=None):
        """Fine-tune the network.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images
            As in :class:`PretrainedFeatureExtractor`.
        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            One label of any type per row, or an indicator matrix of 0 and 1.
        sample_weight : array-like of shape (n_samples,), default=None
            A weight of 2 is the row twice.
        X_val, y_val : default=None
            A validation part, by which the best epoch is chosen.

        Returns
        -------
        self : FineTuningClassifier
        """
        return self._fit(X, y, sample_weight, X_val, y_val)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Train one more epoch, with a constant learning rate.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`.
        classes : array-like of shape (n_classes,), default=None
            All classes there will be, in the first call; for several labels per row they can
            only be the numbers of the columns of `y`.

        Returns
        -------
        self : FineTuningClassifier
        """
        self._classes_given = None if classes is None else read_classes(classes)
        try:
            return self._fit(X, y, sample_weight, goes_on=True)
        finally:
            del self._classes_given

    def decision_function(self, X):
        """Return the head's scores.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images

        Returns
        -------
        scores : ndarray of shape (n_samples,) for two classes, else (n_samples, n_classes)
        """
        scores = self._scores(X)
        if self._kind == "multiclass" and len(self.classes_) == 2:
            return scores[:, 1] - scores[:, 0]
        return scores

    def predict_proba(self, X):
        """Return probabilities of the classes, or of each label.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images

        Returns
        -------
        proba : ndarray of shape (n_samples, n_classes), float64
        """
        return np.exp(self._log_proba(self._scores(X)))

    def predict_log_proba(self, X):
        """Return logarithms of the probabilities, finite also where these are too small.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images

        Returns
        -------
        log_proba : ndarray of shape (n_samples, n_classes), float64
        """
        return self._log_proba(self._scores(X))

    def _log_proba(self, scores):
        if self._kind == "multilabel":
            return -np.logaddexp(0, -scores)  # log(1 / (1 + exp(-s)))
        scores = scores - scores.max(axis=1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))

    def predict(self, X):
        """Return labels.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_labels)
            Of the type that `fit` got.
        """
        scores = self._scores(X)
        if self._kind == "multilabel":
            return (scores > 0).astype(np.int64)
        return self.classes_[scores.argmax(axis=1)]

    def score(self, X, y, sample_weight=None):
        """Return the accuracy; of several labels per row all must be right.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images
        y : array-like of shape (n_samples,) or (n_samples, n_labels)
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        score : float
        """
        predicted = self.predict(X)
        labels, _ = read_labels(y, len(predicted))
        if predicted.dtype.kind == "O" and not are_strings(predicted):
            # scikit-learn's accuracy takes no other objects than strings.
            return float(np.average(predicted == labels, weights=sample_weight))
        return accuracy_score(labels, predicted, sample_weight=sample_weight)

    @property
    def _n_outputs(self):
        return len(self.classes_)

    def _read_target(self, y, n_rows, *, reset, name="y"):
        check_y_given(y, type(self).__name__, name)
        labels, is_multilabel = read_labels(y, n_rows, name)
        if reset:
            self._settle_classes(labels, "multilabel" if is_multilabel else "multiclass")
        elif is_multilabel != (self._kind == "multilabel") or (
            is_multilabel and labels.shape[1] != len(self.classes_)
        ):
            raise ValueError(
                f"{name} has shape {labels.shape}, but this {type(self).__name__} was fitted "
                f"on {self._kind} targets with {len(self.classes_)} classes."
            )
        given = vars(self).get("_classes_given")
        if given is not None and not np.array_equal(given, self.classes_):
            raise ValueError(
                f"classes={given!r} is not the same as in the first call to partial_fit, "
                f"which was {self.classes_!r}."
            )
        self._check_class_weight()
        return labels if is_multilabel else codes_of(labels, self.classes_, name)

    def _settle_classes(self, labels, kind):
        """Note what is told apart from now on."""
        given = vars(self).get("_classes_given")
        if kind == "multilabel":
            classes = np.arange(labels.shape[1])
            if given is not None and not np.array_equal(given, classes):
                raise ValueError(
                    f"classes={given!r}, but y has several labels per row: there the classes are "
                    f"the numbers of its columns, {classes!r}. Leave `classes` out."
                )
        else:
            classes = sorted_classes(labels) if given is None else given
            if len(classes) < 2:
                raise ValueError(
                    f"{type(self).__name__} needs at least two classes, but "
                    f"{'y' if given is None else '`classes`'} holds one class only: "
                    f"{shown(classes[0])!r}."
                )
        goes_on = self.warm_start and "_tuned" in vars(self)
        if goes_on and (kind != self._kind or not np.array_equal(classes, self.classes_)):
            raise ValueError(
                "warm_start can only be used where `self.classes_` remains the same as in the "
                f"last fit. Previously got {self._kind} targets of the classes {self.classes_}, "
                f"y has {kind} ones of {classes}."
            )
        self.classes_, self._kind = classes, kind

    def _check_class_weight(self):
        if self.class_weight in (None, "balanced"):
            return
        if self._kind == "multilabel":
            raise ValueError(
                f"class_weight={self.class_weight!r} with several labels per row: only "
                "'balanced' and None are accepted; give sample_weight for anything else."
            )
        class_weights(self.class_weight, self.classes_)

    def _prepare_target(self, target, weight, *, reset):
        if self._kind == "multilabel":
            if reset:
                share = (weight @ target + 0.5) / (weight.sum() + 1)
                self._blind_scores = np.log(share / (1 - share))
            return target.astype(np.float32)
        if reset:
            counts = np.bincount(target, weights=weight, minlength=len(self.classes_))
            self._blind_scores = np.log((counts + 1e-3) / (counts + 1e-3).sum())
        return target

    def _temperature(self, head, data, prepared, rows):
        from sktransfer.fine_tuning._tempering import N_ROWS, auto_temperature

        if self.probe_temperature != "auto":
            return float(self.probe_temperature)
        rows = rows[:N_ROWS]
        weight = self._training_weight(prepared[rows], data.weight[rows])
        embeddings = data.embeddings[rows]
        return auto_temperature(head, embeddings, prepared[rows], weight, self._kind)

    def _training_weight(self, target, weight):
        if self.class_weight is None:
            return weight
        if self._kind == "multilabel":
            # As scikit-learn's compute_sample_weight: the product over the labels.
            columns = target.astype(np.int64).T
            return weight * np.prod([balanced_factors(c, weight, 2) for c in columns], axis=0)
        if self.class_weight == "balanced":
            return weight * balanced_factors(target, weight, len(self.classes_))
        factors = class_weights(self.class_weight, self.classes_)[target]
        if not factors.any():
            alone = [shown(label) for label in self.classes_[np.unique(target)]]
            raise ValueError(
                f"class_weight={self.class_weight!r} leaves nothing to train on or to validate "
                f"on: those rows are all of the classes {alone}, which weigh 0. Add rows of other "
                "classes, or leave these out."
            )
        return weight * factors

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        # scikit-learn's tests draw points, not pictures: little can be seen in 1×2 pixels.
        tags.classifier_tags.poor_score = True
        return tags
