"""``to_module`` and ``export``: a fitted model from pixels to predictions, for other programs."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sklearn
import torch
from numpy.typing import ArrayLike
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    Ridge,
    RidgeCV,
)
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sktransfer._threads import global_state_lock
from sktransfer._version import __version__
from sktransfer.embedding._extractor import PretrainedFeatureExtractor
from sktransfer.fine_tuning._base import BaseFineTuning
from sktransfer.fine_tuning._classifier import FineTuningClassifier
from sktransfer.fine_tuning._regressor import FineTuningRegressor
from sktransfer.networks._standalone import StandaloneModule
from sktransfer.saving._archive import atomic_write

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

    from sktransfer.networks._backbone import Backbone

# Classical models, and the output of a module for them.
_LINEAR: dict[type, str] = {
    LogisticRegression: "probabilities",
    LogisticRegressionCV: "probabilities",
    LinearSVC: "scores",
    LinearRegression: "targets",
    Ridge: "targets",
    RidgeCV: "targets",
}
# Largest accepted difference of a file's results from the module's, as a share of the largest.
_TOLERANCE = 1e-4


def to_module(model: BaseEstimator) -> StandaloneModule:
    """Convert a fitted model to one torch module, from pixels to predictions.

    Parameters
    ----------
    model : estimator
        A :class:`FineTuningClassifier`, :class:`FineTuningRegressor` or
        :class:`PretrainedFeatureExtractor`, or a pipeline (or a search over one) that begins with
        one of these. ``StandardScaler`` and one of ``LogisticRegression``, ``LinearSVC``,
        ``Ridge``, ``LogisticRegressionCV``, ``RidgeCV`` and ``LinearRegression`` may follow.

    Returns
    -------
    module : torch.nn.Module
        A module with a copy of the model's weights, on the CPU, in eval mode. It takes a tensor of
        images (n, channels, height, width) and returns float32: the result of `predict_proba` for
        classifiers, of `decision_function` for ``LinearSVC``, of `predict` for regressors, and of
        `transform` for other models. ``module.metadata`` is a dict with ``input``, ``resize``,
        ``output``, ``labels`` (of the columns) and versions.

    Raises
    ------
    TypeError
        If a step of `model` cannot be exported.
    ValueError
        If `model` was fitted on several image columns, or its precision is not float32.

    See Also
    --------
    export : Write the same to a file.

    Notes
    -----
    Pixels are ``uint8``, or floating-point numbers in 0…1 for gradients with respect to the image.
    They are RGB (or grey, if the network is), of the size ``module.metadata["input"]``, and the
    module normalises them. Every image has to be resized as ``module.metadata["resize"]`` says,
    even if it has that size already: its shorter side to ``size`` pixels (or both sides to the
    pair), with antialiasing, then the centre ``crop``. The fitted ``backbone_.preprocessing`` does
    that in ``resize_crop(image)``. If `preprocessing` is a function, the module takes what it
    returns.

    For Grad-CAM and captum, ``module.network.stages`` has a module for each of the network's
    stages, which returns what the stage does; stages are those of :func:`load_backbone`. Batch
    norms are folded into convolutions, and layers run one by one, so that hooks on blocks of
    layers are not called. Predict within ``torch.inference_mode()``, as parameters require
    gradients. `net_.module_` is not the module to export: it may lack frozen stages.

    Examples
    --------
    >>> import torch
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import FineTuningClassifier, to_module
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> model = FineTuningClassifier(image_shape=(8, 8), max_epochs=0).fit(X[:60] / 16, y[:60])
    >>> module = to_module(model)
    >>> module.metadata["input"]["shape"], module.metadata["labels"]
    (['n', 3, 80, 80], [0, 1, 2])
    >>> module(torch.zeros(5, 3, 80, 80, dtype=torch.uint8)).shape
    torch.Size([5, 3])
    """
    check_is_fitted(model)
    first, *others = steps = _steps_of(model)
    backbone, n_layers = _backbone_of(first)
    predictor: list[nn.Module] = []
    output, labels = "columns", None
    if isinstance(first, BaseFineTuning) and not others:
        predictor, output, labels = _tuned_part(first)
    for step in others:
        if type(step) is StandardScaler:
            mean = step.mean_ if step.with_mean else 0
            predictor.append(_Affine(mean, 1 / step.scale_ if step.with_std else 1, 0))
        elif type(step) in _LINEAR:
            predictor += _linear_part(step)
            output, labels = _LINEAR[type(step)], getattr(step, "classes_", None)
        else:
            raise _not_exportable(step)
    module = StandaloneModule(backbone, n_layers, predictor)
    versions = {"sktransfer": __version__, "torch": str(torch.__version__)}
    module.metadata |= {
        "output": {"name": output},
        "labels": None if labels is None else [_as_json(label) for label in labels],
        "model": [type(step).__name__ for step in steps],
        "backbone": backbone.name,
        "versions": versions | {"scikit-learn": sklearn.__version__},
    }
    return module


def export(model: BaseEstimator, path: str | os.PathLike, *, format: str = "onnx") -> None:
    """Write a fitted model, from pixels to predictions, to a file for a server.

    The file holds the program of :func:`to_module`, whose documentation describes its input and
    output. It runs without sktransfer and scikit-learn, for any number of images.

    Parameters
    ----------
    model : estimator
        As in :func:`to_module`.
    path : str or Path
        By convention it ends in ``.onnx`` or ``.pt2``.
    format : {"onnx", "torch"}, default="onnx"
        ``"onnx"`` needs the extra ``export``. ``"torch"`` is for ``torch.export.load`` of the same
        version of torch or a later one.

    Raises
    ------
    TypeError, ValueError
        As in :func:`to_module`; also if torch cannot export the network, or if the file's results
        for random images differ from the module's. No file is written then.
    ImportError
        If a package is missing.
    OSError
        If `path` cannot be written.

    See Also
    --------
    to_module : The same as a torch module.
    save : Write a file that sktransfer loads again.

    Notes
    -----
    In an ONNX file the input is called ``images``, the output ``probabilities``, ``scores``,
    ``targets`` or ``columns``. The module's `metadata` is JSON there, as
    ``session.get_modelmeta().custom_metadata_map["sktransfer"]``. In torch's format it is the
    extra file ``"sktransfer"``. Labels that JSON cannot hold, such as dates, are written as
    strings.

    Examples
    --------
    >>> import tempfile, torch
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import FineTuningClassifier, export
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> model = FineTuningClassifier(image_shape=(8, 8), max_epochs=0).fit(X[:60] / 16, y[:60])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(model, f"{folder}/model.pt2", format="torch")
    ...     program = torch.export.load(f"{folder}/model.pt2")
    >>> program.module()(torch.zeros(5, 3, 80, 80, dtype=torch.uint8)).shape
    torch.Size([5, 3])
    """
    if format not in ("onnx", "torch"):
        raise ValueError(f"format={format!r} is not accepted: 'onnx' or 'torch'.")
    if format == "onnx":
        _require_onnx()
    module = to_module(model)
    metadata = json.dumps(module.metadata)
    with _quiet(), atomic_write(os.fsdecode(path)) as part:
        program = _program(module)
        if format == "onnx":
            run = _write_onnx(program, module, metadata, part)
        else:
            run = program.module()
            # torch ends the process where it cannot write a file.
            buffer = io.BytesIO()
            torch.export.save(program, buffer, extra_files={"sktransfer": metadata})
            part.write_bytes(buffer.getbuffer())
        _check_same(run, module)


# -- the parts of a model ------------------------------------------------------------------------
def _steps_of(model: object) -> list[BaseEstimator]:
    """Return the estimators of a pipeline, also of nested ones, in order."""
    if isinstance(model, Pipeline):
        return [step for _, inner in model.steps for step in _steps_of(inner)]
    if hasattr(model, "best_estimator_"):
        return _steps_of(model.best_estimator_)
    return [] if model is None or model == "passthrough" else [model]


def _backbone_of(step: BaseEstimator) -> tuple[Backbone, int]:
    """Return the network of the first step, and how many of its layers become columns."""
    if not isinstance(step, (BaseFineTuning, PretrainedFeatureExtractor)):
        raise _not_exportable(step)
    name = type(step).__name__
    if step.backbone_.is_text:
        raise ValueError(
            f"This {name} takes texts, and what is exported takes images: serve it with save and "
            "load."
        )
    if step._n_image_columns != 1:
        raise ValueError(
            f"This {name} was fitted on {step._n_image_columns} image columns, and what is "
            "exported takes one image: fit it on one column, or serve it with save and load."
        )
    if step.precision != "float32":
        raise ValueError(
            f"This {name} computes in precision={step.precision!r}, and what is exported computes "
            "in float32, so the results would differ. Call set_params(precision='float32') first, "
            "and compare the scores; it need not be fitted again."
        )
    if isinstance(step, PretrainedFeatureExtractor):
        return step.backbone_, len(step._asked_groups())
    tuned = step._tuned.tuned_backbone()
    return tuned, len(tuned.feature_groups)


def _tuned_part(step: BaseFineTuning) -> tuple[list[nn.Module], str, np.ndarray | None]:
    """Return a tuned head and the layers behind it, the output's name, and labels."""
    head = copy.deepcopy(step._tuned.head).cpu().float()
    if isinstance(step, FineTuningClassifier):
        link = nn.Sigmoid() if step._kind == "multilabel" else nn.Softmax(dim=1)
        return [head, link], "probabilities", step.classes_
    assert isinstance(step, FineTuningRegressor)
    parts = [head, _Affine(0, step._target_scale, step._target_mean)]
    return [*parts, *_flat(step._is_flat)], "targets", None


def _linear_part(step: BaseEstimator) -> list[nn.Module]:
    """Return a fitted linear model as modules."""
    coef, is_vector = np.atleast_2d(step.coef_), step.coef_.ndim == 1
    intercept = np.broadcast_to(step.intercept_, len(coef))
    parts: list[nn.Module] = []
    if isinstance(step, LogisticRegression):
        # scikit-learn 1.8 removed the parameter.
        multi_class, is_binary = getattr(step, "multi_class", "auto"), len(coef) == 1
        is_ovr = multi_class == "ovr" or (
            multi_class != "multinomial" and (is_binary or step.solver == "liblinear")
        )
        if is_binary:  # sigmoid(d) = softmax((0, d)); multinomial scores are (-d, d)
            other = 0.0 if is_ovr else -1.0
            coef = np.concatenate([other * coef, coef])
            intercept = np.concatenate([other * intercept, intercept])
        parts.append(_OneVsRest() if is_ovr and not is_binary else nn.Softmax(dim=1))
    elif isinstance(step, LinearSVC):
        is_vector = len(coef) == 1
    linear = nn.Linear(coef.shape[1], len(coef))
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(coef))
        linear.bias.copy_(torch.tensor(intercept))
    return [linear, *parts, *_flat(is_vector)]


def _flat(is_vector: bool) -> list[nn.Module]:
    return [nn.Flatten(start_dim=0)] if is_vector else []


class _Affine(nn.Module):
    """(x - centre) · scale + shift, column by column."""

    centre: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, centre: ArrayLike, scale: ArrayLike, shift: ArrayLike):
        super().__init__()
        for name, value in [("centre", centre), ("scale", scale), ("shift", shift)]:
            self.register_buffer(name, torch.tensor(np.asarray(value), dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.centre) * self.scale + self.shift


class _OneVsRest(nn.Module):
    """Probabilities of independent classifiers, scaled to sum to one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = x.sigmoid()
        return p / p.sum(dim=1, keepdim=True)


def _not_exportable(step: object) -> TypeError:
    names = ", ".join(cls.__name__ for cls in _LINEAR)
    return TypeError(
        f"{step!r} cannot be exported. A FineTuningClassifier, FineTuningRegressor or "
        f"PretrainedFeatureExtractor can, alone or before StandardScaler and one of {names} in a "
        "pipeline. Of another pipeline export the first steps, pipeline[:k], and apply the others "
        "to the columns that these return."
    )


def _as_json(label: object) -> object:
    if isinstance(label, np.generic) and label.dtype.kind not in "Mm":
        label = label.item()
    return label if isinstance(label, (bool, int, float, str)) else str(label)


# -- files ---------------------------------------------------------------------------------------
def _require_onnx() -> None:
    names = ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"format='onnx' needs {' and '.join(missing)}, which this environment lacks: pip "
            "install 'sktransfer[export]'. format='torch' needs no other package."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' warnings, logs and prints, which are about torch's code."""
    logger = logging.getLogger("torch")
    level = logger.level
    with global_state_lock, warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def _explained(module: StandaloneModule) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"torch cannot export {module.metadata['backbone']}: its forward, or that of the head, "
            "probably depends on the values of tensors, or on the number of images. "
            f"to_module(model) gives a module that runs it. (torch says: {reason})"
        ) from error


def _program(module: StandaloneModule) -> torch.export.ExportedProgram:
    example, n_images = _random_images(module, 2), torch.export.Dim("n", min=1, max=2**31)
    with _explained(module), torch.no_grad():
        return torch.export.export(
            module, (example,), dynamic_shapes=({0: n_images},), strict=False
        )


def _write_onnx(
    program: torch.export.ExportedProgram, module: StandaloneModule, metadata: str, part: Path
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Write an ONNX file, and return what runs it."""
    import onnxruntime

    output = module.metadata["output"]["name"]
    with _explained(module):
        onnx_program = torch.onnx.export(
            program, input_names=["images"], output_names=[output], dynamo=True, verbose=False
        )
    assert onnx_program is not None
    model = onnx_program.model
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter writes paths of this machine there
    model.graph.metadata_props.clear()
    model.metadata_props["sktransfer"] = metadata
    onnx_program.save(str(part), external_data=False)
    if len(os.listdir(part.parent)) > 1:  # a protocol buffer holds less than 2 GiB
        raise ValueError("The weights are too large for one ONNX file: give format='torch'.")
    session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([output], {"images": images.numpy()})[0])


def _check_same(run: Callable[[torch.Tensor], torch.Tensor], module: StandaloneModule) -> None:
    """Compare the exported program with the module, for other numbers of images."""
    images, name = _random_images(module, 4), module.metadata["output"]["name"]
    with torch.inference_mode():
        expected = module(images).double()
        got = torch.cat([run(part) for part in images.split([1, 3])])
    # Probabilities may all be tiny; columns and targets have any unit.
    largest = 1.0 if name == "probabilities" else expected.abs().max()
    error = (got - expected).abs().max()
    if not error <= _TOLERANCE * largest:
        raise ValueError(
            f"The file's {name} differ from the model's by {float(error / largest):.1g} of the "
            "largest for random images, so it was not kept. to_module(model) gives a module that "
            "returns the right ones."
        )


def _random_images(module: StandaloneModule, n_images: int) -> torch.Tensor:
    _, *size = module.metadata["input"]["shape"]
    draw = torch.Generator().manual_seed(n_images)
    images = torch.randint(0, 256, (n_images, *size), dtype=torch.uint8, generator=draw)
    return images if module.metadata["resize"] else images / 255
