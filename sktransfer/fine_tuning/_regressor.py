"""FineTuningRegressor: fine-tuning for numbers."""

from __future__ import annotations

import numpy as np
from sklearn.base import RegressorMixin

from sktransfer._validation import StrOptions, fit_context
from sktransfer.fine_tuning._base import BaseFineTuning
from sktransfer.fine_tuning._targets import check_y_given, clip_outliers, read_numbers

# In standard deviations; the square of what is farther from the mean overflows float32.
_MAX_DISTANCE = 1e18


class FineTuningRegressor(RegressorMixin, BaseFineTuning):
    """Fine-tune a pre-trained network as a regressor.

    The network gets a new head, which starts as a ridge regression on the frozen embeddings.
    Then the head and the unfrozen stages are trained together, lower stages with smaller
    learning rates, by skorch: see `net_`. Targets are standardised inside.

    Most parameters are those of :class:`FineTuningClassifier`, which describes them in full. Read
    more in the :ref:`User Guide <fine_tuning>`.

    Parameters
    ----------
    backbone : str, torch.nn.Module or callable, default="builtin"
        The network: a torchvision classification builder (``"resnet50"``), ``"timm:NAME"``
        (extra ``timm``), ``"hf:NAME_OR_FOLDER"`` (transformers, extra ``hf``), ``"builtin"``
        (small; its weights are part of the package), a module, or a callable without
        arguments that returns one. A module is copied, not changed.
    weights : str, Path or None, default="DEFAULT"
        Name of torchvision's weights (``"IMAGENET1K_V2"``), or a local ``.pt``, ``.pth`` or
        ``.safetensors`` file. ``None``: random weights, for training from scratch.
    layer : int, str, list of them or None, default="auto"
        The stage after which the head is put: its name, or for ``"hf:…"`` networks the number of
        the hidden states. ``None``: the last one. A list, or ``"all"``: the pooled outputs of
        several stages, joined. ``"auto"``: ``"all"`` for convolutional networks given by their
        name, with ``pooling="auto"`` and a linear probe as the head's start; ``None`` for others,
        ``"builtin"`` and networks without normalisation (AlexNet, VGG, SqueezeNet).
    pooling : {"auto", "avg", "max", "avgmax", "gem", "cls", "flatten"}, default="auto"
        How a feature map becomes a row. ``"auto"``: as in the network itself. Tokens of texts:
        ``"mean"``, ``"max"``, ``"cls"`` or ``"last"``.
    preprocessing : "auto", dict or callable, default="auto"
        As in :class:`PretrainedFeatureExtractor`. Like `image_shape`, `value_range` and `augment`,
        it is for images only.
    image_shape : tuple of int or None, default=None
        Shape of one image, ``(height, width)`` or ``(height, width, channels)``, for flat
        numeric rows. One entry may be -1.
    value_range : tuple of float or None, default=None
        The values of black and white, ``(low, high)``, in all images. ``None``: according to their
        types and values, see :class:`PretrainedFeatureExtractor`.
    unfreeze : int, "all", "gradual" or mapping, default="all"
        The stages that are trained with the head: none (0), the last k, all, or more and more
        until half of the epochs (``"gradual"``). A mapping has epochs, counted from 1, as
        keys and numbers of stages or ``"all"`` as values.
    head : "linear", tuple of int or torch.nn.Module, default="linear"
        A linear layer; with a tuple, plus a perceptron of these hidden sizes; or a module that
        takes embeddings (n, n_features) and returns scores (n, n_targets).
    head_init : {"linear_probe", "random"}, default="linear_probe"
        ``"linear_probe"``: the head starts as scikit-learn's ridge regression on the frozen
        embeddings, which distorts pre-training less than a random start [1]_; epoch 0 is the
        linear probe. A module given as `head` starts with its own weights.
    dropout : float, default=0.0
        Share of the embedding that is dropped in training.
    loss : {"auto", "huber"}, callable or torch.nn.Module, default="auto"
        ``"auto"``: the squared error; ``"huber"``: less sensitive to outliers.
        A callable takes scores (n, n_outputs) and targets, and returns one value per row (torch's
        losses with ``reduction="none"``), as equal images of the same target become one weighted
        row. A single number is accepted where all rows have the same weight. Targets are
        numbers (n, n_targets), scaled to mean 0 and variance 1. With any loss but ``"auto"``,
        targets farther than three interquartile ranges from the quartiles are clipped for this
        scaling and for the ridge regression of the start.
    max_epochs : int, default=8
        Number of epochs; with 0 the model is the linear probe.
    batch_size : int, default=32
        Number of rows of a training step.
    lr : "auto" or float, default="auto"
        Largest learning rate of the head; ``"auto"``: 3e-4, or 1e-4 if trained stages take texts
        or contain no normalisation (AlexNet, VGG, SqueezeNet).
    layer_decay : float, default=0.7
        Learning rate of each stage, divided by that of the stage above it.
    optimizer : {"adamw", "sgd"} or callable, default="adamw"
        ``"sgd"`` has a momentum of 0.9. A callable takes parameter groups and ``lr``.
    weight_decay : float, default=0.01
        Weight decay of the optimizer; none on biases and norms.
    augment : {"light", "strong"}, callable, list or None, default=None
        Random changes of training images, new in each epoch. ``"light"`` mirrors and crops,
        ``"strong"`` crops more and changes colours. A callable takes and returns one uint8 tensor
        (channels, height, width) on the CPU, as the transforms of ``torchvision.transforms.v2`` do,
        except for MixUp and CutMix. A list holds several of these.
    early_stopping : "auto", bool or splitter, default="auto"
        Whether the epoch with the best score on a validation part is kept. ``"auto"``: if `X_val`
        is given or there are at least 1000 training rows. A splitter of scikit-learn such as
        ``GroupShuffleSplit()`` chooses the validation part, by its first split.
    validation_fraction : float, default=0.1
        Share of the rows that is held out for validation if no `X_val` is given.
    n_iter_no_change : int, default=10
        With early stopping, epochs without a better score after which training ends.
    random_state : int, RandomState instance or None, default=None
        Seed of shuffling, dropout, augmentation and the split. The global random states of
        torch and, with an int, of NumPy are not changed.
    callbacks : list or None, default=None
        Callbacks of skorch, or (name, callback) pairs; copies of them are used.
    device : str, default="auto"
        A torch device; ``"auto"``: the first of ``"cuda"``, ``"mps"`` and ``"cpu"`` that exists.
    precision : {"float32", "bfloat16"}, default="float32"
        Precision of the network's computations, without TF32; weights are float32.
    n_jobs : int or None, default=None
        Threads for decoding. ``None`` and -1: as many as torch uses in this process.
    memory : str, Path, joblib.Memory, store, False or None, default=None
        Where embeddings are kept, as in :class:`PretrainedFeatureExtractor`. Unless ``False``,
        outputs of frozen stages are kept in this process for later fits, up to 1 GiB.
    on_error : {"raise", "skip"}, default="raise"
        ``"raise"``: a ValueError lists all unreadable images, also as its ``bad_images``.
        ``"skip"``: they are left out of training, with a warning, and the mean of the training
        targets is predicted for them.
    verbose : int, default=0
        1 shows progress bars and skorch's table of epochs.

    Attributes
    ----------
    net_ : skorch.NeuralNet
        The trained net; its ``module_`` is a :class:`torch.nn.Module` for training, which may
        lack frozen stages. To serve or explain the model, use :func:`to_module` or :func:`export`.
    backbone_ : Backbone
        The pre-trained network.
    history_ : list of dict
        A row per epoch, for :class:`pandas.DataFrame`: ``epoch``, ``train_loss``, ``lr`` (the
        largest), ``n_unfrozen`` (stages), ``seconds``. With a validation part, which is scored from
        epoch 0 on, also ``valid_loss`` and ``valid_score`` (R²).
    n_iter_ : int
        Number of epochs trained.
    best_epoch_ : int
        The epoch whose weights are kept; 0 is the start of the training.
    bad_images_ : list of BadRow
        The images that the last call could not read, with ``row``, ``where`` and ``reason``;
        after `fit` those of `X`.
    n_features_in_ : int
        Number of image columns, or of pixel columns if `image_shape` is given.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns in `fit`, if `X` has names.
    n_features_out_ : int
        Number of columns that `transform` returns.

    See Also
    --------
    FineTuningClassifier : The same for labels.
    PretrainedFeatureExtractor : Frozen features for a classical model.

    Notes
    -----
    The notes on :class:`FineTuningClassifier` apply: equal rows are merged, trained weights may be
    interpolated with those of the start, and Ctrl-C ends the training.

    References
    ----------
    .. [1] A. Kumar et al. "Fine-tuning can distort pretrained features and underperform
       out-of-distribution." ICLR 2022. :doi:`10.48550/arXiv.2202.10054`

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

    _parameter_constraints: dict = {  # noqa: RUF012
        **BaseFineTuning._parameter_constraints,
        "loss": [StrOptions({"auto", "huber"}), callable],
    }
    _kind = "regression"

    def __init__(
        self,
        backbone="builtin",
        *,
        weights="DEFAULT",
        layer="auto",
        pooling="auto",
        preprocessing="auto",
        image_shape=None,
        value_range=None,
        unfreeze="all",
        head="linear",
        head_init="linear_probe",
        dropout=0.0,
        loss="auto",
        max_epochs=8,
        batch_size=32,
        lr="auto",
        layer_decay=0.7,
        optimizer="adamw",
        weight_decay=0.01,
        augment=None,
        early_stopping="auto",
        validation_fraction=0.1,
        n_iter_no_change=10,
        random_state=None,
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
        self.value_range = value_range
        self.unfreeze = unfreeze
        self.head = head
        self.head_init = head_init
        self.dropout = dropout
        self.loss = loss
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.layer_decay = layer_decay
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.augment = augment
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.random_state = random_state
        self.callbacks = callbacks
        self.device = device
        self.precision = precision
        self.n_jobs = n_jobs
        self.memory = memory
        self.on_error = on_error
        self.verbose = verbose

    @fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, sample_weight=None):
        """Train one more epoch, at constant learning rates.

        The first call after `fit` starts with a new optimizer, later ones continue with its state,
        also after pickling. A call that fails does not change the model. There is no validation
        part, averaging or early stopping. Changes of `backbone`, `weights`, `layer`, `pooling` and
        `preprocessing` have no effect until the next `fit`.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images
            As in `fit`.
        y : array-like of shape (n_samples,) or (n_samples, n_targets)
            As in `fit`. The mean and the scale of the targets are those of the first call.
        sample_weight : array-like of shape (n_samples,), default=None
            As in `fit`.

        Returns
        -------
        self : FineTuningRegressor
            The fitted estimator.
        """
        return self._fit(X, y, sample_weight, is_partial=True)

    def predict(self, X):
        """Return predicted targets.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images
            The same columns as in `fit`.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_targets), float64
            In the units of the targets of `fit`.
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
        if reset:
            self._n_targets, self._is_flat = n_targets, target.ndim == 1
        elif n_targets != self._n_targets:
            raise ValueError(
                f"{name} has {n_targets} target(s), but this {type(self).__name__} was fitted on "
                f"{self._n_targets}."
            )
        return target.reshape(n_rows, n_targets)

    def _prepare_target(self, target, weight, *, reset):
        if reset:
            # Another loss may have been chosen because of outliers.
            near = target if self.loss == "auto" else clip_outliers(target, weight)
            # Scaled first: squares of large numbers are infinite.
            largest = np.abs(near).max(axis=0)
            largest = np.where(largest > 0, largest, 1.0)
            scaled, share = near / largest, weight / weight.sum()
            mean = share @ scaled
            scale = np.sqrt(share @ (scaled - mean) ** 2)
            self._target_mean = mean * largest
            self._target_scale = np.where(scale > 1e-12, scale * largest, 1.0)
        with np.errstate(over="ignore"):
            standardised = (target - self._target_mean) / self._target_scale
        is_near = np.abs(standardised) < _MAX_DISTANCE
        if not is_near.all():
            raise ValueError(
                f"The target {target[~is_near][0]} is too far from the others: the "
                f"{type(self).__name__} was fitted first to targets of mean {self._target_mean} "
                f"and standard deviation {self._target_scale}. Leave it out, or scale the targets "
                "to a smaller range."
            )
        return standardised.astype(np.float32)

    def _scores_without_image(self):
        return np.zeros(self._n_targets)  # the mean

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        # scikit-learn's estimator checks fit data that are not images but 1×2 pixels.
        tags.regressor_tags.poor_score = True
        return tags
