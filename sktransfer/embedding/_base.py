"""Base classes of the extractors, and of all estimators whose columns are embeddings."""

from __future__ import annotations

import os

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from sktransfer._progress import warn
from sktransfer._validation import (
    SuggestionMixin,
    check_images,
    check_texts,
    column_names,
    fit_context,
    is_empty_part,
    keep_index,
)


class BaseEmbedding(SuggestionMixin, TransformerMixin, BaseEstimator):
    """A transformer whose columns are the layers of `backbone_`."""

    _content = "images"  # of X
    _name_suffix = ""  # behind the backbone's name

    # The "?" of the HTML representation leads to the class's page.
    _doc_link_module = "sktransfer"
    _doc_link_template = (
        "https://sktransfer.readthedocs.io/en/stable/api/sktransfer.{estimator_name}.html"
    )

    def transform(self, X):
        """Compute the columns of images or texts.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images or texts
            The same columns as in `fit`; see the class's Notes. A data frame may have no rows.

        Returns
        -------
        columns : ndarray of shape (n_samples, `n_features_out_`), float32
            A data frame if ``set_output`` asks for one. Unless ``on_error="raise"``, the rows of
            unreadable images are NaN, or zeros with ``on_error="zero"``.

        Raises
        ------
        ValueError
            With ``on_error="raise"``, if cells cannot be read. The message reports all of them, as
            does its attribute ``bad_rows``; the other rows are in the store.
        """
        check_is_fitted(self)
        if is_empty_part(self, X):
            setattr(self, f"bad_{self._content}_", [])
            columns = np.empty((0, self.n_features_out_), dtype=np.float32)
        else:
            columns = self._columns(X)
        return keep_index(self, columns, X)

    def get_feature_names_out(self, input_features=None):
        """Return the names of the columns of `transform`.

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Names of the columns of `X`; ``None``: `feature_names_in_`, if `fit` saw names.

        Returns
        -------
        names : ndarray of str objects of shape (`n_features_out_`,)
            ``<column>_<backbone>_007``, or ``<column>_<backbone>_tuned_007`` for a fine-tuned
            network. If several layers are joined, the layer's name precedes the number.
        """
        check_is_fitted(self)
        backbone, n_layers = self.backbone_, len(self._asked_groups())
        stem = f"{backbone.short_name}{self._name_suffix}"
        names = column_names(self, input_features)
        prefixes = [f"{name}_{stem}" if name else stem for name in names]
        out = [column for prefix in prefixes for column in backbone.column_names(prefix, n_layers)]
        return np.asarray(out, dtype=object)

    def _load(self, **given):
        """Load the network of the parameters, some of which `given` replaces."""
        from sktransfer.networks._backbone import load_backbone, with_cached_layers

        names = ("backbone", "weights", "layer", "pooling", "preprocessing")
        parameters = {name: getattr(self, name) for name in names} | given
        extra = getattr(self, "cache_layers", None)
        parameters["layer"] = with_cached_layers(parameters["layer"], extra)
        return load_backbone(**parameters)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        takes_images = hasattr(self, "image_shape")
        tags.input_tags.two_d_array = tags.input_tags.three_d_array = takes_images  # of numbers
        # With image_shape X is a table of numbers; without it X may be a list of paths or texts.
        is_list = getattr(self, "image_shape", None) is None
        tags.input_tags.one_d_array = tags.input_tags.string = is_list
        tags.input_tags.allow_nan = self.on_error != "raise"
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def __sklearn_is_fitted__(self):
        return "backbone_" in vars(self)

    def _asked_groups(self) -> range:
        """Return which of the backbone's groups are columns; the others are only stored."""
        width = self.n_features_out_ // self._n_image_columns
        widths = np.cumsum([width for _, width in self.backbone_.feature_groups])
        return range(int(np.searchsorted(widths, width)) + 1)


class Extractor(BaseEmbedding):
    """A transformer of cells to the rows of a frozen network."""

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        """Load the network and note the columns of `X`.

        Parameters
        ----------
        X : list, array, Series or data frame of n_samples images or texts
            See the class's Notes. No image is decoded; texts are read only if `pooling` needs them.
        y : None
            Ignored.

        Returns
        -------
        self : estimator
            The fitted extractor.

        Raises
        ------
        TypeError, ValueError
            If `X` cannot hold images or texts, or has two meanings, or if a parameter does not fit.
        OSError
            If the weights are not on this machine and cannot be downloaded.
        """
        return self._fit(X)

    def _check(self, X, *, reset):
        check = check_images if self._content == "images" else check_texts
        return check(self, X, reset=reset)

    def _fit(self, X):
        from sktransfer.embedding._embed import check_place

        rows = self._check(X, reset=True)
        check_place(self.memory, self.device)
        self._fit_folder = os.getcwd()
        self.backbone_ = self._load()
        self._n_image_columns = rows.n_columns
        n_asked = len(self.backbone_.layers_named(self.layer))
        widths = [width for _, width in self.backbone_.feature_groups[:n_asked]]
        self.n_features_out_ = rows.n_columns * sum(widths)
        setattr(self, f"bad_{self._content}_", [])
        return self

    def _columns(self, X):
        from sktransfer._rows import unreadable

        kind, rows = self._content, self._check(X, reset=False)
        columns = np.empty((rows.n_rows, self.n_features_out_), dtype=np.float32)
        bad = self._compute(rows, columns.reshape(len(rows), -1))
        if assumed := rows.take_warnings():
            warn(assumed)
        # This attribute is not read back, as another thread may call transform, too.
        setattr(self, f"bad_{kind}_", bad)
        if bad and self.on_error == "raise":
            are_kept = self.memory is not False and len(bad) < len(rows)
            raise unreadable(
                f"{len(bad)} of {len(rows)} {kind} could not be read:",
                bad,
                ("The others are embedded and kept, so nothing is lost.\n" if are_kept else "")
                + 'Repair or drop these rows, or set on_error="nan" or on_error="zero".',
                f", all in bad_{kind}_.",
            )
        return columns

    def _compute(self, rows, out):
        """Write the rows of all cells to `out`, and return the bad ones."""
        from sktransfer.embedding._embed import embed_images

        return embed_images(
            rows,
            self.backbone_,
            out=out,
            memory=self.memory,
            start=getattr(self, "_fit_folder", ""),
            batch_size=self.batch_size,
            device=self.device,
            precision=self.precision,
            n_jobs=self.n_jobs,
            groups=self._asked_groups(),
            fill=0.0 if self.on_error == "zero" else np.nan,
            verbose=self.verbose,
        )
