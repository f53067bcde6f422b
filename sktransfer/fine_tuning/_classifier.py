"""FineTuningClassifier: fine-tuning for labels."""

from __future__ import annotations

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score

from sktransfer._progress import shown
from sktransfer._validation import StrOptions, fit_context
from sktransfer.fine_tuning._base import BaseFineTuning
from sktransfer.fine_tuning._targets import (
    are_strings,
    check_class_weight,
    check_y_given,
    class_factors,
    codes_of,
    column_names,
    read_classes,
    read_labels,
    sorted_classes,
)


class FineTuningClassifier(ClassifierMixin, BaseFineTuning):
    """Fine-tune a pre-trained network as a classifier.

    The network gets a new head, which starts as a logistic regression on the frozen
    embeddings. Then the head and the unfrozen stages are trained together, lower stages with
    smaller learning rates, by skorch: see `net_`.

    Read more in the :ref:`User Guide <fine_tuning>`.

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
        keys and numbers of stages or ``"all"`` as values. ``load_backbone(...).stages.names``
        lists the stages. The parameters and buffers of frozen stages do not change; without
        augmentation their outputs are computed once. Batch norms of unfrozen stages keep the
        statistics of pre-training, except with ``weights=None``.
    head : "linear", tuple of int or torch.nn.Module, default="linear"
        A linear layer; with a tuple, plus a perceptron of these hidden sizes; or a module that
        takes embeddings (n, n_features) and returns scores (n, n_classes).
    head_init : {"linear_probe", "random"}, default="linear_probe"
        ``"linear_probe"``: the head starts as scikit-learn's logistic regression on the frozen
        embeddings, which distorts pre-training less than a random start [1]_; epoch 0 is the
        linear probe. A module given as `head` starts with its own weights.
    dropout : float, default=0.0
        Share of the embedding that is dropped in training.
    loss : "auto", callable or torch.nn.Module, default="auto"
        ``"auto"``: cross-entropy; for several labels per row, binary cross-entropy of each.
        A callable takes scores (n, n_outputs) and targets, and returns one value per row (torch's
        losses with ``reduction="none"``), as equal images of the same target become one weighted
        row. A single number is accepted where all rows have the same weight. Targets are
        class indices (int64), class probabilities (where MixUp or CutMix mixed them), or rows of
        0 and 1 for several labels (float32). Label smoothing:
        ``torch.nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")``.
    max_epochs : int, default=8
        Number of epochs; with 0 the model is the linear probe.
    batch_size : int, default=32
        Number of rows of a training step.
    lr : "auto" or float, default="auto"
        Learning rate of the head; ``"auto"``: 3e-4, or 1e-4 if trained stages take texts or
        contain no normalisation (AlexNet, VGG, SqueezeNet). It rises from 1/25 of this in the
        first quarter of the training and then falls to 1e-5 of it [2]_, unless `callbacks` holds
        skorch's ``LRScheduler``.
    layer_decay : float, default=0.7
        Learning rate of each stage, divided by that of the stage above it.
    optimizer : {"adamw", "sgd"} or callable, default="adamw"
        ``"sgd"`` has a momentum of 0.9. A callable takes parameter groups and ``lr``, such as
        ``functools.partial(torch.optim.SGD, momentum=0.5)`` or ``torch.optim.NAdam``.
    weight_decay : float, default=0.01
        Weight decay of the optimizer; none on biases and norms.
    augment : {"light", "strong"}, callable, list or None, default=None
        Random changes of training images, new in each epoch. ``"light"`` mirrors and crops,
        ``"strong"`` crops more and changes colours. A callable takes and returns one uint8 tensor
        (channels, height, width) on the CPU, whatever `device` is, as the transforms of
        ``torchvision.transforms.v2`` do; draw from torch's random state to be repeatable.
        ``v2.MixUp`` and ``v2.CutMix`` mix images of a batch and their targets; not for several
        labels per row. A list holds several of these. Where `preprocessing` is a callable, its
        float images are changed, but not their colours.
    early_stopping : "auto", bool or splitter, default="auto"
        Whether the epoch with the best score on a validation part is kept. Epoch 0 counts: from
        a linear probe, the model is never worse there than the probe. ``"auto"``: if `X_val` is
        given or there are at least 1000 training rows. A splitter of scikit-learn such as
        ``GroupShuffleSplit()`` chooses the validation part, by its first split.
    validation_fraction : float, default=0.1
        Share of the rows that is held out for validation if no `X_val` is given.
    n_iter_no_change : int, default=10
        With early stopping, epochs without a better score after which training ends.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes, as in scikit-learn. A dict is for one label per row only.
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
        ``"skip"``: they are left out of training, with a warning, and `class_priors_` are
        predicted for them.
    verbose : int, default=0
        1 shows progress bars and skorch's table of epochs.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels. For several labels per row: the names or numbers of the columns of `y`.
    class_priors_ : ndarray of shape (n_classes,), float64
        Frequencies of the classes, or of each label, in training: the probabilities that are
        predicted for an unreadable image.
    net_ : skorch.NeuralNet
        The trained net; its ``module_`` is a :class:`torch.nn.Module` for training, which may
        lack frozen stages. To serve or explain the model, use :func:`to_module` or :func:`export`.
    backbone_ : Backbone
        The pre-trained network.
    history_ : list of dict
        A row per epoch, for :class:`pandas.DataFrame`: ``epoch``, ``train_loss``, ``lr`` (the
        largest), ``n_unfrozen`` (stages), ``seconds``. With a validation part, which is scored from
        epoch 0 on, also ``valid_loss`` and ``valid_score`` (accuracy).
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
    FineTuningRegressor : The same for numbers.
    PretrainedFeatureExtractor : Frozen features for a classical model.

    Notes
    -----
    Rows of the same images and target are merged into one of their joint weight, and sorted by
    their content: a weight of 2 is exactly the row twice, the order of `X` has no effect, and no
    row is on both sides of the validation split.

    If stages are trained from pre-trained weights and a linear probe, and no validation part
    chooses the epoch, then the final weights are interpolated between the start and the end of
    training [3]_: half way up to 200 rows, three quarters of the way from 600 rows on. With fewer
    than 1000 rows, the probe is then fitted on two enlarged corners of each image, too.

    Ctrl-C ends the training; the weights of that moment, or of the best epoch, are kept. A pickle
    holds the trained weights, and how to load the others; see :func:`save`.

    References
    ----------
    .. [1] A. Kumar et al. "Fine-tuning can distort pretrained features and underperform
       out-of-distribution." ICLR 2022. :doi:`10.48550/arXiv.2202.10054`
    .. [2] L. N. Smith, N. Topin. "Super-convergence: very fast training of neural networks
       using large learning rates." 2019. :doi:`10.1117/12.2520589`
    .. [3] M. Wortsman et al. "Robust fine-tuning of zero-shot models." CVPR 2022.
       :doi:`10.1109/CVPR52688.2022.00780`

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
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }

    classes_: np.ndarray
    class_priors_: np.ndarray

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
        class_weight=None,
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
        self.class_weight = class_weight
        self.random_state = random_state
        self.callbacks = callbacks
        self.device = device
        self.precision = precision
        self.n_jobs = n_jobs
        self.memory = memory
        self.on_error = on_error
        self.verbose = verbose

    @fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Train one more epoch, at constant learning rates.

        The first call after `fit` starts with a new optimizer, later ones continue with its state,
        also after pickling. A call that fails does not change the model. There is no validation
        part, averaging or early stopping. Changes of `backbone`, `weights`, `layer`, `pooling` and
        `preprocessing` have no effect until the next `fit`.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images
            As in `fit`.
        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            As in `fit`.
        classes : array-like of shape (n_classes,), default=None
            In the first call: all classes of later calls. For several labels per row they can only
            be the names or numbers of the columns of `y`.
        sample_weight : array-like of shape (n_samples,), default=None
            As in `fit`.

        Returns
        -------
        self : FineTuningClassifier
            The fitted estimator.
        """
        self._classes_given = None if classes is None else read_classes(classes)
        try:
            return self._fit(X, y, sample_weight, is_partial=True)
        finally:
            del self._classes_given

    def decision_function(self, X):
        """Return the head's scores.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images
            The same columns as in `fit`.

        Returns
        -------
        scores : ndarray of shape (n_samples,) for two classes, else (n_samples, n_classes)
            For two classes, positive scores predict the second one.
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
            The same columns as in `fit`.

        Returns
        -------
        proba : ndarray of shape (n_samples, n_classes), float64
            In the order of `classes_`. Those of classes sum to one.
        """
        return np.exp(self._log_proba(self._scores(X)))

    def predict_log_proba(self, X):
        """Return logarithms of the probabilities; finite even if a probability is rounded to 0.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images
            The same columns as in `fit`.

        Returns
        -------
        log_proba : ndarray of shape (n_samples, n_classes), float64
            In the order of `classes_`.
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
            The same columns as in `fit`.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_labels)
            Labels of the type that `fit` got; for several labels per row 0 and 1.
        """
        scores = self._scores(X)
        if self._kind == "multilabel":
            return (scores > 0).astype(np.int64)
        return self.classes_[scores.argmax(axis=1)]

    def score(self, X, y, sample_weight=None):
        """Return the accuracy; with several labels per row, the share of rows that are all right.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images
            The same columns as in `fit`.
        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            The true labels.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows.

        Returns
        -------
        score : float
            Between 0 and 1.
        """
        predicted = self.predict(X)
        labels, _ = read_labels(y, len(predicted))
        self._check_label_names(y, "y")
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
            self._set_classes(labels, column_names(y) if is_multilabel else None, is_multilabel)
        elif is_multilabel != (self._kind == "multilabel") or (
            is_multilabel and labels.shape[1] != len(self.classes_)
        ):
            raise ValueError(
                f"{name} has shape {labels.shape}, but this {type(self).__name__} was fitted "
                f"on {self._kind} targets with {len(self.classes_)} classes."
            )
        self._check_label_names(y, name)
        given = vars(self).get("_classes_given")
        if given is not None and not np.array_equal(given, sorted_classes(self.classes_)):
            raise ValueError(
                f"classes={given!r} is not the same as in the first call to partial_fit, "
                f"which was {self.classes_!r}."
            )
        check_class_weight(self.class_weight, self.classes_, is_multilabel)
        return labels if is_multilabel else codes_of(labels, self.classes_, name)

    def _check_label_names(self, y, name):
        """Raise ValueError for columns of several labels that are not those of `fit`."""
        if self._kind != "multilabel" or np.array_equal(self.classes_, range(len(self.classes_))):
            return
        names = column_names(y)
        if names is not None and not np.array_equal(names, self.classes_):
            raise ValueError(
                f"{name} has the columns {names.tolist()}, but this {type(self).__name__} was "
                f"fitted on {self.classes_.tolist()}: give the same ones in the same order."
            )

    def _set_classes(self, labels, names, is_multilabel):
        given = vars(self).get("_classes_given")
        if is_multilabel:
            classes = np.arange(labels.shape[1]) if names is None else names
            if given is not None and not np.array_equal(given, sorted_classes(classes)):
                raise ValueError(
                    f"classes={given!r}, but y has several labels per row: there the classes are "
                    f"the numbers or names of its columns, {classes!r}. Leave `classes` out."
                )
        else:
            classes = sorted_classes(labels) if given is None else given
            if len(classes) < 2:
                raise ValueError(
                    f"{type(self).__name__} needs at least two classes, but "
                    f"{'y' if given is None else '`classes`'} holds one class only: "
                    f"{shown(classes[0])}."
                    if len(classes)
                    else "`classes` is empty: it must hold all classes of later calls."
                )
        self.classes_, self._kind = classes, "multilabel" if is_multilabel else "multiclass"

    def _prepare_target(self, target, weight, *, reset):
        if self._kind == "multilabel":
            if reset:
                self.class_priors_ = (weight @ target + 0.5) / (weight.sum() + 1)
            return target.astype(np.float32)
        if reset:
            counts = np.bincount(target, weights=weight, minlength=len(self.classes_)) + 1e-3
            self.class_priors_ = counts / counts.sum()
        return target

    def _scores_without_image(self):
        if self._kind == "multilabel":
            return np.log(self.class_priors_ / (1 - self.class_priors_))
        return np.log(self.class_priors_)

    def _training_weight(self, target, weight):
        return weight * class_factors(self.class_weight, self.classes_, target, weight)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        # scikit-learn's estimator checks fit data that are not images but 1×2 pixels.
        tags.classifier_tags.poor_score = True
        return tags
