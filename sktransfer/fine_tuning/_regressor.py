"""FineTuningRegressor: unfreeze and train, for numbers."""

from __future__ import annotations

import numpy as np
from sklearn.base import RegressorMixin, _fit_context

from sktransfer.fine_tuning._base import BaseFineTuning
from sktransfer.fine_tuning._docs import documented
from sktransfer.fine_tuning._targets import check_y_given, read_numbers

# In standard deviations; the square of what is farther from the mean is no finite float32.
_FARTHEST = 1e18


@documented(
    scores="one number per target, of targets brought to mean 0 and variance 1",
    probe="ridge regression",
    blind="the mean of the targets in training",
    probe_temperature="",
    more_parameters="",
    class_weight="",
)
class FineTuningRegressor(RegressorMixin, BaseFineTuning):
    """Fine-tune a pre-trained network as a regressor.

    The network gets a new head, which starts as a ridge regression on the frozen embeddings;
    then the head and the unfrozen stages are trained together on the squared error, lower
    stages with smaller learning rates. Targets are standardised inside.

    Read more in the :ref:`User Guide <fine_tuning>`.

    Parameters
    ----------
    %(parameters)s

    Attributes
    ----------
    %(attributes)s

    See Also
    --------
    FineTuningClassifier : The same for labels.
    PretrainedFeatureExtractor : Frozen features for a classical model.

    Notes
    -----
    %(notes)s

    References
    ----------
    %(references)s

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import FineTuningRegressor
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> model = FineTuningRegressor(
    ...     image_shape=(8, 8), unfreeze=1, max_epochs=1, random_state=0
    ... )
    >>> model.fit(X[:60] / 16, y[:60]).score(X[100:160] / 16, y[100:160]) > 0.4
    True
    """

    _parameter_constraints: dict = BaseFineTuning._parameter_constraints
    _kind = "regression"

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
        l2_sp=0.0,
        weight_averaging="auto",
        early_stopping="auto",
        validation_fraction=0.1,
        n_iter_no_change=10,
        tol=0.0,
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
        self.l2_sp = l2_sp
        self.weight_averaging = weight_averaging
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
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
        y : array-like of shape (n_samples,) or (n_samples, n_targets)
        sample_weight : array-like of shape (n_samples,), default=None
            A weight of 2 is the row twice.
        X_val, y_val : default=None
            A validation part, by which the best epoch is chosen.

        Returns
        -------
        self : FineTuningRegressor
        """
        return self._fit(X, y, sample_weight, X_val, y_val)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, sample_weight=None):
        """Train one more epoch, with a constant learning rate.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`. The first call settles mean and scale of the targets.

        Returns
        -------
        self : FineTuningRegressor
        """
        return self._fit(X, y, sample_weight, goes_on=True)

    def predict(self, X):
        """Return numbers.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_targets), float64
        """
        values = self._scores(X) * self._target_scale + self._target_mean
        return values[:, 0] if self._is_flat else values

    @property
    def _n_outputs(self):
        return self._n_targets

    def _read_target(self, y, n_rows, *, reset, name="y"):
        check_y_given(y, type(self).__name__, name)
        target = read_numbers(y, n_rows, name)
        n_targets = 1 if target.ndim == 1 else target.shape[1]
        fitted = vars(self).get("_n_targets") if not reset or self._goes_on_from_fit() else None
        if fitted is not None and n_targets != fitted:
            raise ValueError(
                f"{name} has {n_targets} target(s), but this {type(self).__name__} was fitted on "
                f"{fitted}."
            )
        if reset:
            self._n_targets, self._is_flat = n_targets, target.ndim == 1
        return target.reshape(n_rows, n_targets)

    def _goes_on_from_fit(self):
        return self.warm_start and "_tuned" in vars(self)

    def _prepare_target(self, target, weight, *, reset):
        if reset:
            # Scaled first: squares of large numbers are infinite.
            largest = np.abs(target).max(axis=0)
            largest = np.where(largest > 0, largest, 1.0)
            scaled, share = target / largest, weight / weight.sum()
            mean = share @ scaled
            scale = np.sqrt(share @ (scaled - mean) ** 2)
            self._target_mean = mean * largest
            self._target_scale = np.where(scale > 1e-12, scale * largest, 1.0)
            self._blind_scores = np.zeros(target.shape[1])
        with np.errstate(over="ignore"):
            standardised = (target - self._target_mean) / self._target_scale
        is_near = np.abs(standardised) < _FARTHEST
        if not is_near.all():
            raise ValueError(
                f"The target {target[~is_near][0]} cannot be trained on beside targets of mean "
                f"{self._target_mean} and standard deviation {self._target_scale}, to which this "
                f"{type(self).__name__} was fitted first: leave it out, or bring the targets to a "
                "smaller range."
            )
        return standardised.astype(np.float32)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        # scikit-learn's tests draw points, not pictures: little can be seen in 1×2 pixels.
        tags.regressor_tags.poor_score = True
        return tags
