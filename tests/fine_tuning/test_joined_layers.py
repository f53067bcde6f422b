"""A head on the pooled values of several stages."""

import pickle

import numpy as np
import pytest
import torch
from small_models import assert_same_model, of_kind, small, state_of
from tiny_networks import tiny_network
from torch import nn

from sktransfer import (
    FineTuningClassifier,
    FineTuningRegressor,
    PretrainedFeatureExtractor,
    load,
    load_backbone,
    save,
    to_module,
)

LAYERS = ["all", ["stage1", None], [None, "stage1"], ["stem", "stage2", None]]
SIZE = {"preprocessing": {"size": 20, "crop": 20}}  # the images' own


class Three(nn.Module):
    """Three stages of 3, 5 and 6 maps, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer1 = nn.Sequential(nn.Conv2d(3, 3, 3, stride=2), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
        self.layer3 = nn.Sequential(nn.Conv2d(5, 6, 3), nn.ReLU(inplace=True))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def three(**parameters):
    return small(**{"backbone": Three(), "layer": ["stem", "layer2", None], **SIZE, **parameters})


def naive_columns(model, X):
    """Stage after stage of the trained network, and the mean of each map."""
    module = model.net_.module_.eval()
    x = module.normalisation(torch.from_numpy(np.stack(X)).permute(0, 3, 1, 2))
    found = []
    with torch.no_grad():
        for stage in module.stages:
            x = stage(x)
            found.append(x.mean((2, 3)) if x.ndim == 4 else x)
    return found


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("max_epochs", [0, 2])
def test_columns_are_those_of_the_extractor(stripes, layer, max_epochs):
    X, y = stripes
    frozen = PretrainedFeatureExtractor(tiny_network, layer=layer, **SIZE).fit(X)
    model = small(layer=layer, unfreeze=0, max_epochs=max_epochs, **SIZE).fit(X, y)
    np.testing.assert_array_equal(model.transform(X), frozen.transform(X))
    names = [name.replace("_tuned", "") for name in model.get_feature_names_out()]
    assert names == list(frozen.get_feature_names_out())
    assert model.n_features_out_ == len(names)


@pytest.mark.parametrize("kind", ["labels", "indicators", "numbers"])
def test_trained_columns_move_with_their_stages(coded, kind):
    cls, X, y = of_kind(coded, kind)
    model = three(cls=cls, unfreeze="all", lr=0.05, max_epochs=3).fit(X, y)
    stem, layer2, layer3, *_ = naive_columns(model, X)
    expected = torch.cat([stem, layer2, layer3], 1).numpy()
    columns = model.transform(X)
    np.testing.assert_allclose(columns, expected, rtol=1e-4, atol=1e-5)
    untrained = three(cls=cls, unfreeze=0, max_epochs=0).fit(X, y).transform(X)
    for part in np.split(np.arange(14), [3, 8]):
        assert np.abs(columns - untrained)[:, part].max() > 1e-3


@pytest.mark.parametrize("layer", [["stem", "layer2", None], [None, "layer2", "stem", "layer2"]])
@pytest.mark.parametrize("unfreeze", [1, 2, {1: 0, 2: 1}, "all"], ids=str)
def test_frozen_columns_are_computed_once_and_alike(stripes, layer, unfreeze, monkeypatch):
    settings = {"layer": layer, "unfreeze": unfreeze, "lr": 0.01, "max_epochs": 3}
    kept = three(**settings).fit(*stripes)
    monkeypatch.setattr("sktransfer.fine_tuning._inputs.MAX_KEPT_BYTES", 0)
    again = three(**settings).fit(*stripes)
    assert_same_model(kept, again, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept.transform(stripes[0]), again.transform(stripes[0]), rtol=1e-4)


def test_frozen_stages_run_once(stripes, first_inputs):
    X, y = stripes
    numbers = []
    for layer in (None, ["stem", "layer2", None]):
        first_inputs.clear()
        three(layer=layer, unfreeze=1, max_epochs=4, memory=False).fit(X, y)
        numbers.append(sum(map(len, first_inputs)))
    assert numbers[0] == numbers[1]


def test_several_image_columns_and_partial_fit(stripes):
    X, y = stripes
    pairs = [[a, b] for a, b in zip(X, X[::-1], strict=True)]
    pairs = np.stack([np.stack(pair) for pair in pairs])
    import pandas as pd

    frame = pd.DataFrame({"a": list(pairs[:, 0]), "b": list(pairs[:, 1])})
    model = three(unfreeze=1, lr=0.01).fit(frame, y)
    rows = model.transform(frame)
    assert rows.shape == (len(X), 2 * 14)
    assert list(model.get_feature_names_out())[14] == "b_Three_tuned_stem_000"
    one = three(unfreeze=1, lr=0.01).fit(X, y)
    assert one.transform(X).shape == (len(X), 14)
    copied = pickle.loads(pickle.dumps(model))
    for each in (model, copied):
        each.partial_fit(frame, y)
    assert_same_model(model, copied, rtol=0, atol=0)


@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
@pytest.mark.parametrize("standalone", [False, True])
def test_saved_and_exported(stripes, unfreeze, standalone, tmp_path):
    X, y = stripes
    model = small(layer="all", unfreeze=unfreeze, lr=0.01, **SIZE).fit(X, y)
    expected = model.predict_proba(X)
    save(model, tmp_path / "model.skt", standalone=standalone)
    loaded = load(tmp_path / "model.skt", backbone=tiny_network)
    np.testing.assert_allclose(loaded.predict_proba(X), expected, rtol=1e-5)
    np.testing.assert_array_equal(loaded.transform(X), model.transform(X))
    module = to_module(model)
    images = torch.from_numpy(np.stack(X)).permute(0, 3, 1, 2)
    np.testing.assert_allclose(module(images).detach().numpy(), expected, rtol=1e-3, atol=1e-5)


def test_a_batch_in_halves_gives_the_same_gradients(stripes):
    X, y = stripes
    whole = three(lr=0.01, max_epochs=1).fit(X, y).net_.module_
    x = torch.from_numpy(np.stack(X)).permute(0, 3, 1, 2)[:, None]
    gradients = []
    for most in (None, 3):
        whole.zero_grad()
        whole.max_at_once = most
        whole(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in whole.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["stage1.0", ["stage1.0", None], [None, "stage1.0"]])
def test_layers_within_a_stage_are_refused(stripes, layer):
    message = r"'stage1.0' ends within a stage, where fine-tuning cannot put a head. Give .* 'all'"
    with pytest.raises(ValueError, match=message):
        small(layer=layer).fit(*stripes)


@pytest.mark.parametrize(
    "backbone", ["builtin", "timm:resnet10t", "timm:test_vit", "mobilenet_v2", "squeezenet1_1"]
)
def test_known_networks(stripes, backbone):
    X, y = stripes
    weights = "DEFAULT" if backbone == "builtin" else None
    size = 160 if backbone == "timm:test_vit" else 64
    settings = {"weights": weights, "preprocessing": {"size": size, "crop": size}}
    model = FineTuningClassifier(
        backbone, layer="all", unfreeze=1, max_epochs=1, random_state=0, lr=1e-4, **settings
    ).fit(X[:6], y[:6])
    widths = [w for _, w in load_backbone(backbone, layer="all", **settings).feature_groups]
    assert model.transform(X[:2]).shape == (2, sum(widths))
    below = sum(widths[:-1])
    frozen = PretrainedFeatureExtractor(backbone, layer="all", **settings).fit_transform(X[:2])
    moved = np.abs(model.transform(X[:2]) - frozen).max(0)
    assert moved[:below].max() < 1e-4 * max(1, np.abs(frozen).max()) < moved[below:].max() * 1e4
    assert state_of(model)


@pytest.mark.parametrize(
    ("parameters", "layer"),
    [
        ({"backbone": "builtin"}, None),
        ({"backbone": "resnet18", "weights": None}, "all"),
        ({"backbone": "squeezenet1_1", "weights": None}, None),  # without normalisation
        ({"backbone": "vit_b_16", "weights": None}, None),  # stages of tokens
        ({"backbone": tiny_network}, None),
        ({"backbone": "resnet18", "weights": None, "pooling": "max"}, None),
        ({"backbone": "resnet18", "weights": None, "head_init": "random"}, None),
    ],
    ids=["builtin", "resnet", "squeezenet", "tokens", "own network", "own pooling", "random head"],
)
def test_auto_joins_the_stages_of_published_convolutional_networks(parameters, layer):
    X = list(np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8))
    settings = {"max_epochs": 0, "unfreeze": 0, "random_state": 0, **parameters}
    if parameters["backbone"] != "vit_b_16":  # which takes images of one size
        settings["preprocessing"] = {"size": 32, "crop": 32}
    for cls in (FineTuningClassifier, FineTuningRegressor):
        model = cls(**settings).fit(X, np.arange(6) % 2)
        expected = cls(**settings, layer=layer).fit(X, np.arange(6) % 2)
        assert model.backbone_.layer == layer
        np.testing.assert_array_equal(model.transform(X), expected.transform(X))


def test_an_own_head_takes_the_networks_own_embedding():
    X = list(np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8))
    settings = {"weights": None, "preprocessing": {"size": 32, "crop": 32}, "max_epochs": 1}
    model = FineTuningClassifier("resnet18", head=nn.Linear(512, 2), **settings)
    assert model.fit(X, np.arange(6) % 2).transform(X).shape == (6, 512)


def test_a_file_of_auto_gives_the_same_columns(tmp_path):
    X = list(np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8))
    settings = {"preprocessing": {"size": 32, "crop": 32}, "max_epochs": 1, "random_state": 0}
    model = FineTuningClassifier("resnet18", weights=None, **settings)
    model.fit(X, np.arange(6) % 2)
    for is_standalone in (False, True):
        save(model, tmp_path / "model.skt", standalone=is_standalone)
        loaded = load(tmp_path / "model.skt")
        np.testing.assert_allclose(loaded.predict_proba(X), model.predict_proba(X))
