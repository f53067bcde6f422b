"""export: ONNX files and torch's exported programs with the model's own results."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from tiny_networks import tiny_network
from torch import nn
from torchvision.models import VisionTransformer

from sktransfer import (
    FineTuningClassifier,
    FineTuningRegressor,
    PretrainedFeatureExtractor,
    export,
    to_module,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"preprocessing": {"size": 32, "crop": 32}, "memory": False}
LABELS = np.array(["a", "b", "c"] * 4)


def run_onnx(path, images):
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.get_outputs()
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["sktransfer"])
    assert output.name == metadata["output"]["name"]
    return session.run(None, {"images": images.numpy()})[0], metadata


def run_torch(path, images):
    extra = {"sktransfer": ""}
    program = torch.export.load(path, extra_files=extra)
    with torch.inference_mode():
        return program.module()(images).numpy(), json.loads(extra["sktransfer"])


RUN = {"onnx": run_onnx, "torch": run_torch}
both_formats = pytest.mark.parametrize("format", RUN)


@pytest.fixture(autouse=True)
def needs_onnx(request):
    if "onnx" in request.node.name:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def squares():
    """33 images of the size of the input: uint8 (33, 32, 32, 3)."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (33, 8, 8, 3), np.uint8).repeat(4, axis=1).repeat(4, axis=2)


def check(model, method, squares, path, format, atol=1e-5):
    """Export, and compare with the model for 1, 2, 7 and 33 images."""
    export(model, path, format=format)
    expected = getattr(model, method)(squares)
    images = torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous()
    for n in (1, 2, 7, 33):
        got, metadata = RUN[format](str(path), images[:n])
        assert got.shape == expected[:n].shape
        np.testing.assert_allclose(got, expected[:n], rtol=1e-4, atol=atol)
    assert metadata == to_module(model).metadata
    assert list(path.parent.iterdir()) == [path]


def tuned(cls=FineTuningClassifier, **parameters):
    return cls(tiny_network, **{**SMALL, "max_epochs": 1, "random_state": 0, **parameters})


def pipe(*steps):
    return make_pipeline(PretrainedFeatureExtractor(tiny_network, **SMALL), *steps)


MODELS = {
    "all": (tuned(), LABELS, "predict_proba"),
    "head": (tuned(unfreeze=0, head=(4,)), LABELS, "predict_proba"),
    "several labels": (tuned(), np.stack([LABELS == "a", LABELS != "c"], 1) * 1, "predict_proba"),
    "numbers": (tuned(FineTuningRegressor, unfreeze=1), np.arange(12.0), "predict"),
    "columns": (pipe(), LABELS, "transform"),
    "logistic": (pipe(StandardScaler(), LogisticRegression()), LABELS == "a", "predict_proba"),
    "svc": (pipe(StandardScaler(), LinearSVC()), LABELS, "decision_function"),
    "ridge": (pipe(StandardScaler(), Ridge()), np.arange(24.0).reshape(12, 2), "predict"),
}


@both_formats
@pytest.mark.parametrize("name", MODELS)
def test_files_return_what_the_model_does(name, format, squares, tmp_path):
    model, y, method = MODELS[name]
    model.fit(squares[:12], y)
    check(model, method, squares, tmp_path / "model", format, atol=1e-4)


def tiny_vit():
    torch.manual_seed(0)
    return VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)


NETWORKS = {
    "builtin": {"backbone": "builtin"},
    "vit": {"backbone": tiny_vit},
    "resnet18": {"backbone": "resnet18", "weights": None},
    "mobilenet_v2": {"backbone": "mobilenet_v2", "weights": None},
    "timm": {"backbone": "timm:test_vit", "weights": None, "preprocessing": {"size": (160, 160)}},
}


SLOW = ["mobilenet_v2", "timm"]


@both_formats
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NETWORKS]
)
def test_networks_of_every_kind(name, format, squares, tmp_path):
    if name == "timm":
        pytest.importorskip("timm")
        squares = squares.repeat(5, axis=1).repeat(5, axis=2)
    parameters = {**SMALL, "max_epochs": 1, "unfreeze": 1, "random_state": 0, **NETWORKS[name]}
    model = FineTuningClassifier(**parameters).fit(squares[:12], LABELS)
    check(model, "predict_proba", squares, tmp_path / "model", format)


def test_a_fresh_process_needs_torch_alone(squares, tmp_path):
    model = tuned().fit(squares[:12], LABELS)
    export(model, tmp_path / "model.pt2", format="torch")
    images = torch.from_numpy(squares).permute(0, 3, 1, 2)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        "module = torch.export.load('model.pt2').module()\n"
        "print(module(torch.load('images.pt')).tolist())\n"
        "assert not {'sktransfer', 'sklearn', 'torchvision'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    np.testing.assert_allclose(json.loads(done.stdout), model.predict_proba(squares), atol=1e-5)


def test_files_hold_no_paths_of_this_machine(squares, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    export(tuned().fit(squares[:12], LABELS), tmp_path / "model.onnx")
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)


class OnShapes(nn.Module):
    """Cannot be traced by torch.fx, but exported."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 3)

    def forward(self, x):
        if x.shape[2] < 3:
            return x
        return self.head(self.conv(x).mean((2, 3)))


class OnValues(OnShapes):
    """Cannot be exported."""

    def forward(self, x):
        return super().forward(x if x.sum() > -1e30 else -x)


@both_formats
def test_a_network_that_cannot_be_traced(format, squares, tmp_path):
    torch.manual_seed(0)
    model = FineTuningClassifier(OnShapes(), **SMALL, max_epochs=1).fit(squares[:12], LABELS)
    assert model.backbone_.stage_names == ["body", "head"]
    check(model, "predict_proba", squares, tmp_path / "model", format)


@both_formats
def test_nothing_is_written_of_a_network_that_torch_cannot_export(format, squares, tmp_path, capfd):
    model = PretrainedFeatureExtractor(OnValues(), **SMALL).fit(squares)
    path = tmp_path / "model"
    path.write_bytes(b"older")
    with pytest.raises(ValueError, match=r"torch cannot export OnValues: its forward.*to_module"):
        export(model, path, format=format)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")
    images = torch.from_numpy(squares).permute(0, 3, 1, 2)
    got = to_module(model)(images).detach()
    np.testing.assert_allclose(got, model.transform(squares), rtol=1e-4, atol=1e-5)


class OtherwiseWhenExported(nn.Linear):
    """A head whose exported program is another one."""

    def forward(self, x):
        is_exported = torch.compiler.is_compiling() or type(x) is not torch.Tensor  # torch 2.6
        return 0 * super().forward(x) + torch.arange(3) * is_exported


@pytest.mark.parametrize("unit", [1, 1e-6])
def test_a_file_with_other_results_is_not_kept(unit, squares, tmp_path):
    options = {"head": OtherwiseWhenExported(6, 3), "max_epochs": 0, "unfreeze": 0}
    y = unit * np.arange(36.0).reshape(12, 3) ** 2
    models = {
        "probabilities": tuned(**options).fit(squares[:12], LABELS),
        "targets": tuned(FineTuningRegressor, **options).fit(squares[:12], y),
    }
    for name, model in models.items():
        with pytest.raises(ValueError, match=rf"The file's {name} differ from the model's by"):
            export(model, tmp_path / "model", format="torch")
        assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(squares, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    model = tuned(max_epochs=0).fit(squares[:12], LABELS)
    with pytest.raises(ImportError, match=r"needs onnxscript, .* 'sktransfer\[export\]'"):
        export(model, tmp_path / "model.onnx")


def test_other_formats_are_refused(squares, tmp_path):
    with pytest.raises(ValueError, match="format='tflite' is not accepted: 'onnx' or 'torch'"):
        export(tuned(), tmp_path / "model", format="tflite")


def test_a_missing_folder_is_an_os_error(squares, tmp_path):
    model = pipe().fit(squares)
    with pytest.raises(FileNotFoundError, match="missing"):
        export(model, tmp_path / "missing" / "model.pt2", format="torch")


@both_formats
def test_a_full_disk(format, squares, tmp_path):
    resource = pytest.importorskip("resource")  # a limit on the size of files acts like one
    model, path = pipe().fit(squares), tmp_path / "model"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*model'"):
            export(model, path, format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
