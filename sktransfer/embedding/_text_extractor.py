"""PretrainedTextExtractor: texts in, columns out."""

from __future__ import annotations

from numbers import Integral

import numpy as np

from sktransfer._validation import SHARED_CONSTRAINTS, Interval, StrOptions
from sktransfer.embedding._base import Extractor

_FITTED = ("sif", "tfidf")  # their rows depend on the texts of fit


class PretrainedTextExtractor(Extractor):
    """Compute feature columns for texts with frozen pre-trained word vectors or transformers.

    A row depends on its text alone (with ``pooling="sif"`` and ``"tfidf"`` also on the texts of
    `fit`), not on the batch, the fold or the process. Each text goes through the network once:
    clones, folds and candidates of a grid search find its row in a store (see `memory`).

    Read more in the :ref:`User Guide <texts>`.

    Parameters
    ----------
    backbone : str
        ``"hf:NAME"`` or ``"hf:FOLDER"``: an encoder or decoder that the package transformers
        loads (BERT, RoBERTa, MiniLM, E5, GPT-2), from a folder or the hub's local cache.
        ``"vectors:PATH"``: a table of word vectors (text or binary of GloVe, word2vec and
        fastText, or ``.npy`` with a list of words beside it). ``"static:FOLDER"``: a static table
        of tokens (model2vec). Nothing is downloaded; see Notes.

    weights : "DEFAULT" or None, default="DEFAULT"
        ``None``: random weights, to compare transfer with.

    pooling : {"auto", "mean", "cls", "last", "max", "sif", "tfidf"}, default="auto"
        How the vectors of a text's tokens become a row. ``"auto"``: as the network's own
        configuration for sentences says, else their mean. ``"cls"``: the first one; ``"last"``:
        the last one, for decoders. For word vectors also ``"sif"``, a mean that weights
        frequent words less, without the first principal component of the texts of `fit` [1]_; and
        ``"tfidf"``, a mean weighted by the inverse document frequency in the texts of `fit`.

    layer : int, str, list of them or None, default=None
        For a transformer, the hidden states whose pooled vectors are the columns. ``None``: the
        last ones. 0: before the first block; 3: after the third; -1: the last ones. A list: their
        pooled vectors, joined. ``"all"``: those after each block.

    max_length : int or "auto", default="auto"
        Tokens after which a text is cut. ``"auto"``: what the network was trained with.
        ``pooling="sif"`` and ``"tfidf"`` take whole texts.

    batch_size : int or "auto", default="auto"
        Texts sent through the network at once. It changes speed and memory, not results.

    device : str, default="auto"
        ``"auto"``: ``"cuda"``, then ``"mps"``, then ``"cpu"``; or any torch device by its name.

    precision : {"float32", "tf32", "bfloat16", "float16"}, default="float32"
        Number format of the network's computations; the columns are always float32.

    n_jobs : int or None, default=None
        Threads. ``None`` and -1 mean as many as torch uses in this process. Under a joblib
        backend of a cluster (dask, ray, spark) the texts are distributed to its workers.

    memory : str, Path, joblib.Memory, store, False or None, default=None
        Where rows are kept. ``None``: in this process, at most 512 MiB. A folder: on disk, for
        other processes and later runs. ``False``: nowhere. See :func:`embedding_store`.

    on_error : {"raise", "nan", "zero"}, default="raise"
        What to do with missing texts (None, NaN) and cells of other types: raise one error
        that lists them, return a row of NaN, or a row of zeros. An empty string is a text.

    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    backbone_ : Backbone
        The frozen network.

    n_features_in_ : int
        Number of text columns.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen in `fit`, where `X` has names.

    n_features_out_ : int
        Number of columns that `transform` returns.

    bad_texts_ : list of BadRow
        The cells that the last `transform` could not read, with ``row`` (from 0), ``where`` (row,
        column) and ``reason``.

    See Also
    --------
    PretrainedFeatureExtractor : The same for images.

    Notes
    -----
    `X` may be a list, array, Series or data frame (pandas, polars) of strings, with one or several
    text columns, whose columns are joined in that order.

    References
    ----------
    .. [1] S. Arora, Y. Liang and T. Ma. "A simple but tough-to-beat baseline for sentence
       embeddings." ICLR 2017. https://openreview.net/forum?id=SyK00v5xx
    .. [2] N. Reimers and I. Gurevych. "Sentence-BERT: sentence embeddings using siamese
       BERT-networks." EMNLP 2019. https://doi.org/10.18653/v1/D19-1410

    Examples
    --------
    >>> import os, tempfile
    >>> from sktransfer import PretrainedTextExtractor
    >>> path = os.path.join(tempfile.mkdtemp(), "vectors.txt")
    >>> with open(path, "w") as file:
    ...     _ = file.write("good 1.0 0.0\\nbad -1.0 0.0\\nfilm 0.0 1.0\\n")
    >>> extractor = PretrainedTextExtractor(f"vectors:{path}")
    >>> extractor.fit_transform(["A good film", "a bad, bad film"]).round(2)
    array([[ 0.5 ,  0.5 ],
           [-0.67,  0.33]], dtype=float32)
    """

    _content = "texts"
    _parameter_constraints: dict = {  # noqa: RUF012
        **{name: SHARED_CONSTRAINTS[name] for name in ("device", "precision", "n_jobs")},
        **{name: SHARED_CONSTRAINTS[name] for name in ("memory", "verbose")},
        "backbone": [str],
        "weights": [StrOptions({"DEFAULT"}), None],
        "pooling": [StrOptions({"auto", "mean", "cls", "last", "max", "sif", "tfidf"})],
        "layer": [Integral, str, "array-like", None],
        "max_length": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "batch_size": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "on_error": [StrOptions({"raise", "nan", "zero"})],
    }

    def __init__(
        self,
        backbone,
        *,
        weights="DEFAULT",
        pooling="auto",
        layer=None,
        max_length="auto",
        batch_size="auto",
        device="auto",
        precision="float32",
        n_jobs=None,
        memory=None,
        on_error="raise",
        verbose=0,
    ):
        self.backbone = backbone
        self.weights = weights
        self.pooling = pooling
        self.layer = layer
        self.max_length = max_length
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.n_jobs = n_jobs
        self.memory = memory
        self.on_error = on_error
        self.verbose = verbose

    def _load(self, **given):
        from sktransfer.networks._backbone import load_text_backbone

        return load_text_backbone(
            given.get("backbone", self.backbone),
            weights=self.weights,
            layer=self.layer,
            pooling="mean" if self.pooling in _FITTED else self.pooling,
            max_length=self.max_length,
        )

    def _fit(self, X):
        super()._fit(X)
        self._word_weights = {}
        if self.pooling in _FITTED:
            from sktransfer.networks._word_vectors import fit_word_weights

            texts, _ = self._check(X, reset=False).read_all()
            self._word_weights = fit_word_weights(self.pooling, self._lookup(), texts.values())
        return self

    def _lookup(self):
        lookup = self.backbone_.lookup()
        if lookup is None or self.layer is not None:
            raise ValueError(
                f"pooling={self.pooling!r} weights the words of a table ('vectors:…', 'static:…'), "
                f"with layer=None: use 'mean' for backbone={self.backbone!r}, layer={self.layer!r}."
            )
        return lookup

    def _compute(self, rows, out):
        if self.pooling not in _FITTED:
            return super()._compute(rows, out)
        from sktransfer.networks._word_vectors import weighted_row

        texts, bad = rows.read_all()
        lookup = self._lookup()
        out[:] = 0.0 if self.on_error == "zero" else np.nan
        for i, text in texts.items():
            out[i] = weighted_row(self.pooling, self._word_weights, lookup, text)
        return bad
