"""The parameters and attributes that both fine-tuning estimators have, described once."""

from __future__ import annotations

PARAMETERS = """\
    backbone : str, torch.nn.Module or callable, default="builtin"
        The network: the name of a torchvision classification builder (``"resnet50"``),
        ``"timm:NAME"`` (needs the extra ``timm``), ``"builtin"`` (small, its weights ship
        with the package and need no network connection), an ``nn.Module``, or a callable
        without arguments that returns one. A module is copied, never altered.

    weights : str, Path or None, default="DEFAULT"
        The name of torchvision's weights (``"IMAGENET1K_V2"``), a local ``.pt``, ``.pth``
        or ``.safetensors`` file, or ``None`` for random ones: the twin from scratch that
        transfer is compared with.

    layer : str or None, default=None
        The stage behind which the head is put; ``None``: behind the last.

    pooling : {"auto", "avg", "max", "avgmax", "gem", "cls", "flatten"}, default="auto"
        How a map of features becomes a row. ``"auto"`` is what the network itself does.

    preprocessing : "auto", dict or callable, default="auto"
        As in :class:`PretrainedFeatureExtractor`.

    image_shape : tuple of int or None, default=None
        The shape of one image, ``(height, width)`` or ``(height, width, channels)``, for
        flat numeric rows. One entry may be -1.

    unfreeze : int, "all", "gradual" or mapping, default="all"
        What is trained beside the head: nothing (0), the last k stages, all of them, one
        part after another until half time (``"gradual"``), or what a mapping says: epoch,
        counted from 1, to number of stages or ``"all"``. ``load_backbone(...).stages``
        shows a network's stages. What is frozen stays bit-identical, with batch norm's
        statistics, and is computed once rather than in each epoch where there is no
        augmentation.

    batch_norm : {"auto", "fixed", "moving"}, default="auto"
        Whether batch norms of unfrozen stages keep the statistics of pre-training or go on
        moving theirs. ``"auto"``: fixed, except where ``weights=None``.

    head : "linear", tuple of int or torch.nn.Module, default="linear"
        A linear layer; one with a perceptron of these hidden sizes beside it; or a module
        that takes embeddings and gives {scores}.

    head_init : {"linear_probe", "random"}, default="linear_probe"
        ``"linear_probe"``: the head starts as scikit-learn's {probe},
        fitted on the frozen embeddings, so that epoch 0 is the linear probe; this keeps
        more of the pre-training than a random start does [1]_. A module as `head` starts
        as it is.

    probe_views : "auto" or int, default="auto"
        Views of each picture that the linear probe of the start is fitted on, up to 5: the
        picture, and its corners (85 % of its sides) enlarged. ``"auto"``: 3 where fewer than
        1000 pictures move pre-trained weights and no validation part chooses the epoch; else,
        and in `partial_fit`, the picture alone.
{probe_temperature}
    dropout : float, default=0.0
        Share of the embedding that is dropped in training.

    max_epochs : int, default=8
        With 0 the model is what the head starts as: the linear probe of the pictures alone,
        unless `probe_views` says otherwise.

    batch_size : int, default=32
        Rows of one training step.

    lr : "auto" or float, default="auto"
        Learning rate of the head. ``"auto"``: 3e-4, and 1e-4 where stages are trained that
        nothing normalises (those of AlexNet, VGG without batch norm, SqueezeNet).

    layer_decay : float, default=0.7
        Each stage's learning rate against that of the stage above it.

    optimizer : {"adamw", "sgd"}, Optimizer or callable, default="adamw"
        An :class:`Optimizer` has settings that can be searched over as
        ``optimizer__momentum``. A torch optimizer class, or whatever takes a list of
        groups and ``lr``, is accepted, too.

    weight_decay : float, default=0.01
        Of weights; biases and norms do not decay.

    lr_schedule : {"one_cycle", "cosine", "constant"} or callable, default="one_cycle"
        A callable takes the progress of training, 0…1, and returns a factor.

    gradient_clip : float or None, default=None
        Largest norm of the gradient.

    augment : {"light", "strong"}, callable or None, default=None
        Changes to training pictures, new in each epoch: ``"light"`` mirrors and crops,
        ``"strong"`` crops more and changes colours; a callable takes and returns one uint8
        tensor (channels, height, width), and draws from torch's random state to be repeatable.
        Where `preprocessing` is a callable, what it returns is changed, its colours apart.
        Validation rows and predictions see none of it.

    mixup : float, default=0.0
        α of mixup: each training picture is blended with another of its batch, λ of the one
        and 1 - λ of the other, λ drawn from Beta(α, α) for the batch; so are their targets.
        0: none.

    cutmix : float, default=0.0
        α of cutmix: a box of 1 - λ of the area is pasted from another picture, and the
        targets are mixed as in mixup. 0: none. With both, one of them is drawn for each batch.
{more_parameters}
    l2_sp : float, default=0.0
        Strength of the pull of trained stages towards their pre-trained weights [2]_.

    weight_averaging : {"auto", "wise_ft", "ema", "last"} or None, default="auto"
        Whether an average of the trained weights is validated and kept rather than the weights
        themselves. ``"wise_ft"``: half way from where the training began to where it is
        [4]_, and with more than 200 training rows further, up to three quarters of the way
        from 600 on; ``"ema"``: an exponential moving average that looks back over a tenth of the
        training; ``"last"``: the mean over the last quarter of the epochs [3]_. ``"auto"``:
        ``"wise_ft"`` where pre-trained stages are trained from a linear-probe start and no
        validation part chooses the epoch, else none. `partial_fit` takes no averages.

    early_stopping : "auto" or bool, default="auto"
        Whether the epoch with the best score on a validation part is kept, epoch 0
        included: with ``head_init="linear_probe"`` the model is then never below the
        linear probe there. ``"auto"``: where `X_val` is given or there are at least 1000
        training rows.

    validation_fraction : float, default=0.1
        Share of the rows that become the validation part where no `X_val` is given.

    n_iter_no_change : int, default=10
        With early stopping, epochs without gain after which training ends.

    tol : float, default=0.0
        What is less than this is no gain.
{class_weight}
    n_views : int, default=1
        Views of each image whose embeddings are averaged at prediction, up to 4: the
        image, its mirror image, an enlarged centre, and that one's mirror image.

    random_state : int, RandomState instance or None, default=None
        Settles shuffling, dropout, augmentation and the split. The caller's random states
        of torch and, with an int, of NumPy are left alone.

    warm_start : bool, default=False
        Whether `fit` goes on from the weights of the last fit. `unfreeze`, `lr`, `dropout`,
        `batch_norm` and the like may have been changed in between; another network, other
        classes or a `head` that is built otherwise are errors.

    callbacks : list or None, default=None
        skorch callbacks, or (name, callback) pairs; copies of them are used.

    device : str, default="auto"
        ``"auto"``: ``"cuda"``, then ``"mps"``, then ``"cpu"``; or any torch device.

    precision : {"float32", "bfloat16", "float16"}, default="float32"
        What the network computes in; weights stay float32. Gradients of ``"float16"`` are
        scaled. On a CPU it is slower than the others.

    n_jobs : int or None, default=None
        Threads for decoding. ``None`` and -1 mean as many as torch uses in this process.

    memory : str, Path, joblib.Memory, store, False or None, default=None
        Where embeddings are kept, as in :class:`PretrainedFeatureExtractor`. What other frozen
        stages make of pictures is kept in this process, within a bound of its own, unless
        ``False``.

    on_error : {"raise", "skip"}, default="raise"
        What an unreadable image does: an error that lists all of them; or its row is left
        out of training, with a warning, and predicted as what is known without an image:
        {blind}. An image that can be read at first and no more in a later epoch counts
        nothing from then on.

    verbose : int, default=0
        1 shows skorch's table of epochs and progress bars.
"""

ATTRIBUTES = """\
    net_ : skorch net
        The trained net; its ``module_`` is a :class:`torch.nn.Module`.

    backbone_ : Backbone
        The pre-trained network.

    history_ : list of dict
        A row per epoch, for :class:`pandas.DataFrame`. With a validation part it begins
        with epoch 0.

    n_iter_ : int
        Epochs trained.

    best_epoch_ : int
        The epoch whose weights were kept; 0 is the start.

    bad_images_ : list of BadRow
        The images that the last call could not read; of `fit` those of `X`.

    n_features_in_ : int
        Number of image columns, or of pixel columns where `image_shape` is given.

    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns seen in `fit`, where `X` has names.

    n_features_out_ : int
        Number of columns that `transform` returns.
"""

NOTES = """\
    Rows of the same images and the same target are merged into one of their joint weight, and
    the rows are brought into an order of their own: a weight of 2 is exactly the row twice,
    the order of `X` does not matter, and no row is on both sides of the validation split.

    A pickle holds what was trained and how to bring back the rest, see :func:`save`.
"""

REFERENCES = """\
    .. [1] A. Kumar, A. Raghunathan, R. Jones, T. Ma, P. Liang. "Fine-tuning can distort
       pretrained features and underperform out-of-distribution." ICLR 2022.
       https://arxiv.org/abs/2202.10054
    .. [2] X. Li, Y. Grandvalet, F. Davoine. "Explicit inductive bias for transfer learning
       with convolutional networks." ICML 2018. https://arxiv.org/abs/1802.01483
    .. [3] P. Izmailov, D. Podoprikhin, T. Garipov, D. Vetrov, A. G. Wilson. "Averaging weights
       leads to wider optima and better generalization." UAI 2018.
       https://arxiv.org/abs/1803.05407
    .. [4] M. Wortsman, G. Ilharco, J. W. Kim et al. "Robust fine-tuning of zero-shot models."
       CVPR 2022. https://arxiv.org/abs/2109.01903
"""


def documented(**parts: str):
    """Fill a class's docstring in: its own parts, and those that both estimators share."""

    def decorate(cls):
        texts = {
            "parameters": PARAMETERS,
            "attributes": ATTRIBUTES,
            "notes": NOTES,
            "references": REFERENCES,
        }
        parameters = texts["parameters"]
        for name, text in parts.items():
            parameters = parameters.replace("{" + name + "}", text)
        doc = cls.__doc__
        for name, text in (texts | {"parameters": parameters}).items():
            doc = doc.replace("    %(" + name + ")s\n", text)
        cls.__doc__ = doc
        return cls

    return decorate
