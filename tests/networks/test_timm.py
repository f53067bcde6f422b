"""Networks of timm: found by name, loaded once in a process."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sktransfer import PretrainedFeatureExtractor, load_backbone
from sktransfer.networks._inference import clear_networks

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def made(monkeypatch):
    """The names of the networks that timm builds; published weights are random ones here."""
    names = []
    create_model = timm.create_model

    def note(name, pretrained):
        names.append(f"{name}, pretrained={pretrained}")
        return create_model(name, pretrained=False)

    monkeypatch.setattr(timm, "create_model", note)
    return names


def test_loaded_once_over_a_grid_search(made):
    X = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    y = np.arange(12) % 2
    extractor = PretrainedFeatureExtractor(
        "timm:test_resnet", layer=["layer1", "layer2"], preprocessing={"size": 32, "crop": 32}
    )
    search = GridSearchCV(
        make_pipeline(extractor, LogisticRegression()),
        {"pretrainedfeatureextractor__pooling": ["avg", "max"], "logisticregression__C": [1, 2]},
        cv=2,
    )
    search.fit(X, y).predict(X)
    assert made == ["test_resnet, pretrained=True"]


def test_random_weights_are_made_once(made):
    for _ in range(2):
        backbone = load_backbone("timm:test_vit", weights=None)
        assert (
            backbone.network.module is load_backbone("timm:test_vit", weights=None).network.module
        )
    assert made == ["test_vit, pretrained=False"] * 2  # the architecture, and its initial values
    assert all(not p.is_meta for p in backbone.network.module.parameters())


def test_published_weights_come_back_in_another_process(made):
    backbone = load_backbone("timm:test_efficientnet")
    state = backbone.network.module.state_dict()
    pickled = pickle.dumps(backbone)
    assert len(pickled) < 5000
    clear_networks()  # as a new process begins
    torch.testing.assert_close(pickle.loads(pickled).network.module.state_dict(), state)
    assert made == ["test_efficientnet, pretrained=True"] * 2


def test_published_weights_that_have_changed(made, monkeypatch):
    pickled = pickle.dumps(load_backbone("timm:test_convnext"))
    create_model = timm.create_model

    def other(*args, **kwargs):
        network = create_model(*args, **kwargs)
        next(network.parameters()).data.add_(1)
        return network

    monkeypatch.setattr(timm, "create_model", other)
    clear_networks()
    with pytest.raises(ValueError, match="published weights of timm:test_convnext have changed"):
        pickle.loads(pickled).network  # noqa: B018


def test_a_local_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    network = timm.create_model("test_resnet").eval()
    from safetensors.torch import save_file

    save_file(network.state_dict(), path)
    backbone = load_backbone("timm:test_resnet", weights=path)
    torch.testing.assert_close(backbone.network.module.state_dict(), network.state_dict())


def test_preprocessing_of_timm():
    backbone = load_backbone("timm:vit_tiny_patch16_224", weights=None)
    assert backbone.n_features == 192
    assert backbone.preprocessing.interpolation == "bicubic"
    own = load_backbone(timm.create_model("vit_tiny_patch16_224"))
    assert own.preprocessing == backbone.preprocessing
    assert load_backbone("timm:mobilenetv1_100", weights=None).n_features == 1024


@pytest.mark.parametrize("name", ["lcnet_050", "starnet_s1", "fbnetv3_b"])
def test_linear_layers_of_timm_are_heads(name):
    backbone = load_backbone(f"timm:{name}", weights=None)
    network = timm.create_model(name).eval()
    assert backbone.n_features == network.head_hidden_size
    assert backbone.stage_names[-1] == "head"


# One has no coarse groups of parameters; the other sets `forward` on instances.
@pytest.mark.parametrize("name", ["rdnet_tiny", "fasternet_t0"])
def test_networks_that_differ_from_others(name):
    backbone = load_backbone(f"timm:{name}", weights=None, preprocessing={"size": 64})
    module, pixels = backbone.network.module, torch.zeros((2, 3, 64, 64), dtype=torch.uint8)
    assert backbone.stage_names[0] == "stem"
    assert backbone.stage_names[-1] == "head"
    how = backbone.preprocessing
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (how.mean, how.std))
    with torch.no_grad():
        features = module.forward_features((pixels / 255 - mean) / std)
        expected = module.forward_head(features, pre_logits=True)
    (got,) = backbone.inference_module()(pixels)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "weights", "error", "message"),
    [
        ("timm:xception4", None, ValueError, "Did you mean 'timm:xception41'"),
        ("timm:nothing-like-it", None, ValueError, r"no such network. list_backbones\('timm:\*'\)"),
        ("timm:resnet18", "A1", ValueError, "'A1' is not accepted for a timm network: give the"),
        ("timm:resnet18.A1", None, ValueError, r"tag \(A1\) .*Known are .*'resnet18.a1_in1k'"),
        ("timm:botnet50ts_256", "DEFAULT", ValueError, "publishes no weights of this network; a "),
    ],
)
def test_errors(name, weights, error, message):
    with pytest.raises(error, match=message):
        load_backbone(name, weights=weights)


@pytest.mark.parametrize(
    ("name", "repository"),
    [("resnet26", "timm/"), ("vit_base_patch16_224_in21k", "\n")],  # an old name
)
def test_no_network(name, repository, monkeypatch):
    def fails(name, pretrained):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", fails)
    message = "no route to the hub[^$]*from: https://huggingface.co/"
    with pytest.raises(OSError, match=message + repository):
        load_backbone(f"timm:{name}")


def test_timm_is_optional(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install sktransfer\[timm\]"):
        load_backbone("timm:resnet18")
