"""to_module: a fitted model as one torch module, with the model's own results."""

import json

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from tiny_networks import tiny_network
from torch import nn
from torchvision.transforms import v2

from sktransfer import (
    FineTuningClassifier,
    FineTuningRegressor,
    PretrainedFeatureExtractor,
    load_backbone,
    to_module,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"preprocessing": {"size": 18, "crop": 16}, "memory": False}
LABELS = np.array(["a", "b", "c"] * 4)
CODES = np.arange(12) % 3
TARGETS = {
    "labels": LABELS,
    "two": LABELS == "a",
    "indicators": np.stack([CODES == 1, CODES != 2], 1).astype(int),
    "numbers": 1000.0 * CODES + 50_000,
    "column": (1000.0 * CODES)[:, None],
    "pairs": np.stack([CODES, -10.0 * CODES], 1),
}


def extractor(**parameters):
    return PretrainedFeatureExtractor(**{"backbone": tiny_network, **SMALL, **parameters})


def tuned(cls=FineTuningClassifier, **parameters):
    return cls(tiny_network, **{**SMALL, "max_epochs": 2, "random_state": 0, **parameters})


def pipe(*steps):
    return make_pipeline(extractor(), *steps)


def logistic(**parameters):
    return LogisticRegression(max_iter=1000, **parameters)


MODELS = {
    "head": (tuned(unfreeze=0), "labels", "predict_proba"),
    "stage": (tuned(unfreeze=1), "labels", "predict_proba"),
    "all": (tuned(), "labels", "predict_proba"),
    "hidden layer": (tuned(head=(4,), dropout=0.5), "two", "predict_proba"),
    "from scratch": (
        FineTuningClassifier("squeezenet1_1", weights=None, max_epochs=1, **SMALL).set_params(
            preprocessing={"size": 36, "crop": 32}
        ),
        "labels",
        "predict_proba",
    ),
    "inner layer": (tuned(layer="stage1", pooling="avg"), "labels", "predict_proba"),
    "several labels": (tuned(), "indicators", "predict_proba"),
    "numbers": (tuned(FineTuningRegressor), "numbers", "predict"),
    "pairs": (tuned(FineTuningRegressor, unfreeze=0), "pairs", "predict"),
    "columns": (extractor(), "labels", "transform"),
    "layers": (extractor(layer=["stage1", "stage2.0", None]), "labels", "transform"),
    "cached layers": (
        extractor(layer="stage1", cache_layers=["stage2"], pooling="gem"),
        "labels",
        "transform",
    ),
    "scaled columns": (pipe(StandardScaler(with_mean=False)), "labels", "transform"),
    "logistic": (pipe(StandardScaler(), logistic()), "labels", "predict_proba"),
    "logistic, two": (pipe(StandardScaler(), logistic()), "two", "predict_proba"),
    "logistic, no intercept": (
        pipe(StandardScaler(with_std=False), logistic(fit_intercept=False)),
        "labels",
        "predict_proba",
    ),
    "logistic, weighted": (
        pipe("passthrough", StandardScaler(), None, logistic(class_weight="balanced", C=100)),
        "two",
        "predict_proba",
    ),
    "nested": (
        make_pipeline(pipe(StandardScaler()), make_pipeline(logistic())),
        "labels",
        "predict_proba",
    ),
    "search": (
        GridSearchCV(pipe(StandardScaler(), logistic()), {"logisticregression__C": [0.1, 1]}, cv=2),
        "labels",
        "predict_proba",
    ),
    "on tuned columns": (
        make_pipeline(tuned(unfreeze=1), StandardScaler(), logistic()),
        "labels",
        "predict_proba",
    ),
    "svc": (pipe(StandardScaler(), LinearSVC()), "labels", "decision_function"),
    "svc, two": (pipe(LinearSVC(fit_intercept=False)), "two", "decision_function"),
    "ridge": (pipe(StandardScaler(), Ridge()), "numbers", "predict"),
    "ridge, one column": (pipe(StandardScaler(), Ridge(fit_intercept=False)), "column", "predict"),
    "ridge, pairs": (pipe(StandardScaler(), RidgeCV()), "pairs", "predict"),
    "least squares": (pipe(StandardScaler(), LinearRegression()), "numbers", "predict"),
}
OUTPUTS = {
    "predict_proba": "probabilities",
    "decision_function": "scores",
    "predict": "targets",
    "transform": "columns",
}


def resized(pictures, recipe):
    """Resize as the metadata says, with torchvision: uint8 (n, 3, H, W)."""
    recipe = json.loads(json.dumps(recipe))
    resize = v2.Resize(recipe["size"], v2.InterpolationMode(recipe["interpolation"]))
    resize = v2.Compose([v2.ToPILImage(), resize, v2.CenterCrop(recipe["crop"]), v2.PILToTensor()])
    return torch.stack([resize(picture) for picture in pictures])


@pytest.mark.parametrize("name", MODELS)
def test_module_returns_what_the_model_does(name, pictures):
    model, target, method = MODELS[name]
    model.fit(pictures, TARGETS[target])
    expected = getattr(model, method)(pictures)
    module = to_module(model)
    assert not module.training
    with torch.inference_mode():
        got = module(resized(pictures, module.metadata["resize"]))
    assert got.dtype == torch.float32
    assert module.metadata["output"] == {"name": OUTPUTS[method]}
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(getattr(model, method)(pictures), expected)


def test_the_built_in_network_and_its_metadata(pictures):
    model = FineTuningClassifier(unfreeze=1, max_epochs=1, memory=False).fit(pictures, LABELS)
    module = to_module(model)
    assert module.metadata["input"] == {
        "name": "images",
        "dtype": "uint8",
        "shape": ["n", 3, 80, 80],
        "channels": "RGB",
    }
    assert module.metadata["labels"] == ["a", "b", "c"]
    assert module.metadata["backbone"] == "builtin"
    with torch.inference_mode():
        got = module(resized(pictures, module.metadata["resize"]))
    np.testing.assert_allclose(got, model.predict_proba(pictures), atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "written"),
    [
        ([3, 1, 2], [1, 2, 3]),
        ([True, False, True], [False, True]),
        (["ü", "", "b"], ["", "b", "ü"]),
        ([3.0, -1.0, 2.0], [-1.0, 2.0, 3.0]),
        (np.array(["2020-01-02", "2020-01-01"], "datetime64[D]"), ["2020-01-01", "2020-01-02"]),
        ([(1, 2), (0, 1), (5, 6)], ["(0, 1)", "(1, 2)", "(5, 6)"]),
    ],
    ids=["int", "bool", "str", "float", "date", "tuple"],
)
def test_labels_of_any_type(labels, written, pictures):
    y = np.empty(12, dtype=object)
    y[:] = list(labels) * (12 // len(labels))
    y = y if isinstance(labels[0], tuple) else np.array(y.tolist())
    model = tuned(max_epochs=0).fit(pictures, y)
    metadata = json.loads(json.dumps(to_module(model).metadata))
    assert metadata["labels"] == written


def test_module_is_a_copy(pictures):
    model = tuned().fit(pictures, LABELS)
    expected = model.predict_proba(pictures)
    with torch.no_grad():
        for parameter in to_module(model).parameters():
            parameter.zero_()
    np.testing.assert_array_equal(model.predict_proba(pictures), expected)


def test_stages_can_be_hooked_and_gradients_flow(pictures):
    module = to_module(tuned().fit(pictures, LABELS))
    images = resized(pictures, module.metadata["resize"])
    names = [name for name, _ in module.network.stages.named_children()]
    assert (
        names == load_backbone(tiny_network, preprocessing=SMALL["preprocessing"]).stage_names[:-1]
    )
    seen = []
    module.network.stages.stage2.register_forward_hook(lambda *args: seen.append(args[-1]))
    (gradient,) = torch.autograd.grad(module(images)[:, 0].sum(), seen[0])
    assert gradient.shape == (12, 6, 2, 2)
    assert gradient.abs().sum() > 0
    floats = (images / 255).requires_grad_()
    scores = module(floats)
    torch.testing.assert_close(scores, module(images), rtol=1e-4, atol=1e-5)
    scores[:, 0].sum().backward()
    assert floats.grad.abs().sum() > 0


def test_grey_networks_take_one_channel(pictures):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    settings = {"size": 16, "crop": 16, "mean": 0.5, "std": 0.2}
    model = extractor(backbone=network, preprocessing=settings).fit(pictures)
    module = to_module(model)
    assert module.metadata["input"]["channels"] == "grey"
    images = np.stack([model.backbone_.preprocessing.resize_crop(p) for p in pictures])
    got = module(torch.from_numpy(images).permute(0, 3, 1, 2)).detach()
    np.testing.assert_allclose(got, model.transform(pictures), rtol=1e-5, atol=1e-6)


def shrunk(image):
    return np.moveaxis(image[:20, :20] / 255, 2, 0).astype(np.float32)


def test_a_preprocessing_function_stays_outside(pictures):
    model = extractor(preprocessing=shrunk).fit(pictures)
    module = to_module(model)
    assert module.metadata["resize"] is None
    assert module.metadata["input"]["dtype"] == "float32"
    got = module(torch.from_numpy(np.stack([shrunk(p) for p in pictures]))).detach()
    np.testing.assert_allclose(got, model.transform(pictures), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 20, 16, dtype=torch.uint8), ValueError, r"Resize them as its metadata"),
        (torch.zeros(2, 16, 16, 3, dtype=torch.uint8), ValueError, r"takes \['n', 3, 16, 16\]"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), ValueError, r"of shape \(3, 16, 16\)"),
        (torch.full((2, 3, 16, 16), 200.0), ValueError, "beyond 0…1; it takes uint8"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), TypeError, r"got torch.int64 images"),
    ],
    ids=["size", "channels last", "no batch", "floats up to 255", "int64"],
)
def test_other_images_are_refused(images, error, message, pictures):
    module = to_module(extractor().fit(pictures))
    with pytest.raises(error, match=message):
        module(images)


@pytest.mark.parametrize(
    "steps",
    [(SVC(),), (StandardScaler(), SVC())],
    ids=["svc", "behind a scaler"],
)
def test_other_steps_are_refused(steps, pictures):
    model = pipe(*steps).fit(pictures, LABELS)
    with pytest.raises(TypeError, match=r"SVC\(\) cannot be exported. A Fine.*Ridge"):
        to_module(model)


def test_other_first_steps_are_refused(pictures):
    model = make_pipeline(StandardScaler(), Ridge()).fit(np.eye(3), [1, 2, 3])
    with pytest.raises(TypeError, match=r"StandardScaler\(\) cannot be exported"):
        to_module(model)


def test_several_image_columns_are_refused(pictures):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"front": list(pictures), "back": list(pictures)})
    with pytest.raises(ValueError, match="fitted on 2 image columns"):
        to_module(extractor().fit(frame))


@pytest.mark.parametrize("model", [extractor(), tuned(max_epochs=0)], ids=["extractor", "tuned"])
def test_other_precisions_are_refused(model, pictures):
    model.set_params(precision="bfloat16").fit(pictures, LABELS)
    with pytest.raises(ValueError, match=r"set_params\(precision='float32'\) first"):
        to_module(model)
    to_module(model.set_params(precision="float32"))


@pytest.mark.parametrize("model", [tuned(), pipe(Ridge())], ids=["tuned", "pipeline"])
def test_unfitted_models_are_refused(model):
    with pytest.raises(NotFittedError, match="is not fitted yet"):
        to_module(clone(model))
