"""PretrainedFeatureExtractor: images in, columns out."""

from __future__ import annotations

from numbers import Integral

from sktransfer._validation import SHARED_CONSTRAINTS, Interval, StrOptions
from sktransfer.embedding._base import Extractor


class PretrainedFeatureExtractor(Extractor):
    """Compute feature columns for images with a frozen pre-trained network.

    An image's row is the input of the network's classification head, or the pooled output of
    inner stages. The network runs in evaluation mode and is not trained, so a row depends on its
    image alone, not on the batch, the fold or the process. Each image goes through the network
    once: clones, folds and candidates of a grid search find its row in a store (see `memory`).

    Read more in the :ref:`User Guide <feature_extraction>`.

    Parameters
    ----------
    backbone : str, torch.nn.Module or callable, default="builtin"
        The network: the name of a torchvision classification builder (``"resnet50"``),
        ``"timm:NAME"`` (extra ``timm``), ``"hf:NAME"`` or ``"hf:FOLDER"`` (a network of the
        package transformers, such as DINOv2 or CLIP, from a folder or the hub's local cache; extra
        ``hf``), ``"builtin"`` (small, its weights ship with the package), an ``nn.Module``, or a
        callable without arguments that returns one. :func:`list_backbones` lists the names.

    weights : str, Path or None, default="DEFAULT"
        The name of torchvision's weights (``"IMAGENET1K_V2"``), a local ``.pt``, ``.pth``
        or ``.safetensors`` file, or ``None`` for random ones, to compare
        transfer with.

    layer : int, str, list of them or None, default=None
        Which layer gives the columns. ``None``: the input of the classification head. The name
        of a stage or module (``"layer3"``), or for ``"hf:…"`` networks the number of the hidden
        states: its pooled output; lower stages give low-level features. A list: their pooled
        outputs, joined. ``"all"``: those of all stages between the stem and the head, joined;
        scale them by a :class:`~sklearn.preprocessing.StandardScaler`.

    pooling : {"auto", "avg", "max", "avgmax", "gem", "cls", "flatten"}, default="auto"
        How a feature map becomes a row. ``"auto"``: as in the network itself; ``"gem"``: the
        generalised mean; ``"cls"``: the class token of a vision transformer.

    preprocessing : "auto", dict or callable, default="auto"
        ``"auto"``: what the weights were trained with. A dict overrides parts of it
        (``size``, ``crop``, ``mean``, ``std``, ``interpolation``, ``fast_decode``,
        ``resize_on``). A callable takes the uint8 H×W×3 array and returns a float 3×H×W array;
        `fit` copies it.

    image_shape : tuple of int or None, default=None
        The shape of one image, ``(height, width)`` or ``(height, width, channels)``, for
        flat numeric rows as :func:`sklearn.datasets.load_digits` gives them. One entry may
        be -1.

    value_range : tuple of float or None, default=None
        The values of black and white, ``(low, high)``: ``(0, 4095)`` for 12 bits, ``(-1, 1)`` for
        floats of this range, or a window of intensities in radiology. Other values are clipped.
        It applies to every image, also to arrays and files of 8 bits, where ``(0, 255)`` changes
        nothing, but not to bool and not to transparency. ``None``: see Notes.

    batch_size : int or "auto", default="auto"
        Images sent through the network at once. It changes speed and memory, not results.
        ``"auto"``: on an accelerator 32 to 256, on a CPU 4 to 32, fewer of larger images.
        Halved, with a warning, as often as the device runs out of memory.

    device : str, default="auto"
        ``"auto"``: ``"cuda"``, then ``"mps"``, then ``"cpu"``; or any torch device by its name.
        With ``"auto"`` the worker processes of a machine are spread over its CUDA devices.

    precision : {"float32", "tf32", "bfloat16", "float16"}, default="float32"
        Number format of the network's computations; the columns are always float32. ``"tf32"``:
        float32, but CUDA rounds the factors of products to 10 bits; with ``"float32"`` it does not.

    n_jobs : int or None, default=None
        Threads for decoding and, on a CPU, for the network. ``None`` and -1 mean as many
        as torch uses in this process. Under a joblib backend of a cluster (dask, ray,
        spark) the images are distributed to its workers.

    memory : str, Path, joblib.Memory, store, False or None, default=None
        Where embeddings are kept, one row per image. ``None``: in this process, at most 512 MiB.
        A folder: on disk, for other processes and later runs; all workers of a cluster must have
        access to it. ``False``: nowhere. :func:`embedding_store` shows what is kept, deletes it,
        or sets another bound.

    cache_layers : list of str or None, default=None
        Further layers whose columns are computed in the same pass and kept in the store. Name
        here all candidates of a grid search over `layer`: one pass serves them all.

    on_error : {"raise", "nan", "zero"}, default="raise"
        What to do with unreadable and missing images: raise one error that lists them, after the
        others are embedded and kept; return a row of NaN, which
        :class:`~sklearn.impute.SimpleImputer` can fill; or return a row of zeros.

    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    backbone_ : Backbone
        The frozen network, cut.

    n_features_in_ : int
        Number of image columns, or of pixel columns where `image_shape` is given.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen in `fit`, where `X` has names.

    n_features_out_ : int
        Number of columns that `transform` returns.

    bad_images_ : list of BadRow
        The images that the last `transform` could not read, with ``row`` (from 0), ``where``
        (row, column, path) and ``reason``.

    See Also
    --------
    list_backbones : Names that `backbone` accepts.
    load_backbone : Load the network of a name.
    FineTuningClassifier : Train the network as well.

    Notes
    -----
    `X` may hold paths, URLs, encoded bytes, PIL images, arrays (H×W or H×W×C) or torch
    tensors (C×H×W), as a list, array, Series or data frame with one or several image
    columns; any object with ``__len__`` and ``__getitem__``; a 3-D or 4-D array;
    ``{"bytes": …, "path": …}`` cells of parquet image sets; or flat numeric rows with
    `image_shape`. The same image gives the same columns in any form. The exception: a JPEG file
    much larger than the network's input is decoded at a reduced size, and then differs slightly
    from an array of its pixels, unless ``preprocessing={"fast_decode": False}``.

    Files are JPEG, PNG, GIF, WebP, BMP, TIFF, JPEG 2000, AVIF, PPM or, once
    ``pillow_heif.register_heif_opener()`` was called, HEIC. An image counts as unreadable if its
    file is larger than 256 MB, if decoding it may take more than 1 GB, or if an HTTP server sends
    nothing for 30 s or not all within 5 minutes.

    Without `value_range` numbers are read image by image: uint8 as 0…255, uint16 as 0…65535,
    floats within 0…1 as such. Other numbers are clipped to 0…1 or 0…255 where they exceed it
    slightly, else stretched from their minimum to their maximum, and a warning says which images
    were read in which way, as it does of uint16 images that use less than a quarter of 16 bits.

    References
    ----------
    .. [1] J. Yosinski, J. Clune, Y. Bengio and H. Lipson. "How transferable are features in
       deep neural networks?" NeurIPS 2014. https://arxiv.org/abs/1411.1792
    .. [2] S. Kornblith, J. Shlens and Q. V. Le. "Do better ImageNet models transfer
       better?" CVPR 2019. https://doi.org/10.1109/CVPR.2019.00277

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from sktransfer import PretrainedFeatureExtractor
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> model = make_pipeline(
    ...     PretrainedFeatureExtractor(image_shape=(8, 8)),
    ...     LogisticRegression(max_iter=1000),
    ... )
    >>> model.fit(X[:200] / 16, y[:200]).score(X[200:400] / 16, y[200:400]) > 0.9
    True
    """

    _parameter_constraints: dict = {  # noqa: RUF012
        **SHARED_CONSTRAINTS,
        "layer": [Integral, str, "array-like", None],
        "batch_size": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "cache_layers": ["array-like", None],
        "on_error": [StrOptions({"raise", "nan", "zero"})],
    }

    def __init__(
        self,
        backbone="builtin",
        *,
        weights="DEFAULT",
        layer=None,
        pooling="auto",
        preprocessing="auto",
        image_shape=None,
        value_range=None,
        batch_size="auto",
        device="auto",
        precision="float32",
        n_jobs=None,
        memory=None,
        cache_layers=None,
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
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.n_jobs = n_jobs
        self.memory = memory
        self.cache_layers = cache_layers
        self.on_error = on_error
        self.verbose = verbose

    def _load(self, **given):
        from sktransfer.networks._huggingface import is_text_name

        if is_text_name(given.get("backbone", self.backbone)):
            raise ValueError(
                f"backbone={self.backbone!r} is a network of texts: use PretrainedTextExtractor."
            )
        return super()._load(**given)
