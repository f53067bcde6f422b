"""The built-in network: its file, its interface, and that its features are worth having."""

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer.networks.builtin import DEFAULT, VERSIONS
from sktransfer.networks.builtin._network import BuiltinNet

STAGES = ("stem", "stage1", "stage2", "stage3", "stage4", "pool", "flatten", "head")


@pytest.fixture(scope="module")
def version():
    return VERSIONS[DEFAULT]


@pytest.fixture(scope="module")
def network(version):
    net = BuiltinNet(version.num_classes)
    net.load_state_dict(load_file(version.path))
    return net.eval()


def calibrated_twin(x):
    """The same network untrained; batch norm holds the statistics of `x`."""
    torch.manual_seed(0)
    net = BuiltinNet()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net.train()(x)
    return net.eval()


def embed(net, x):
    with torch.inference_mode():
        for name, module in net.named_children():
            if name != "head":
                x = module(x)
    return x.numpy()


@pytest.mark.parametrize("name", VERSIONS)
def test_weights_file_is_the_published_one(name):
    content = VERSIONS[name].path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == VERSIONS[name].sha256


@pytest.mark.parametrize("name", VERSIONS)
def test_weights_file_is_small(name):
    assert VERSIONS[name].path.stat().st_size <= 6_000_000


def test_matrices_are_stored_in_16_bit_and_vectors_in_32(version):
    for name, tensor in load_file(version.path).items():
        if not name.endswith("num_batches_tracked"):
            assert tensor.dtype == (torch.float16 if tensor.ndim > 1 else torch.float32), name
            assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("size", [(33, 33), (64, 64), (65, 63), (80, 80), (96, 96), (224, 160)])
def test_any_input_size(network, version, size):
    x = torch.zeros(2, 3, *size)
    assert embed(network, x).shape == (2, version.n_features)
    with torch.inference_mode():
        assert network(x).shape == (2, version.num_classes)


def test_children_are_a_chain_that_equals_the_network(network):
    assert tuple(name for name, _ in network.named_children()) == STAGES
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = network(x)
        for module in network.children():
            x = module(x)
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


def test_embedding_joins_the_last_two_stages(network):
    x = torch.rand(2, 3, 64, 64)
    embedding = embed(network, x)
    with torch.inference_mode():
        for name in ("stem", "stage1", "stage2", "stage3"):
            x = getattr(network, name)(x)
    np.testing.assert_allclose(embedding[:, :192], x.mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert (embedding >= 0).all()


def test_an_embedding_depends_on_its_image_alone(network):
    x = torch.rand(5, 3, 64, 64)
    together = embed(network, x)
    alone = np.concatenate([embed(network, x[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(together, embed(network, x))


def test_it_can_be_traced_and_exported_without_batch_norm(network):
    from torch.fx import symbolic_trace
    from torch.fx.experimental.optimization import fuse

    folded = fuse(symbolic_trace(network))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), network(x), rtol=1e-3, atol=1e-3)


def test_training_finds_every_parameter():
    net = BuiltinNet(num_classes=3)
    net(torch.rand(4, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


# --- what it is worth ------------------------------------------------------------------------

IMAGES = (
    "astronaut", "brick", "camera", "cat", "cell", "clock", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "immunohistochemistry", "moon", "page", "retina", "rocket",
)  # fmt: skip


@pytest.fixture(scope="module")
def crops(version):
    """Grey crops, the image each is from, and the quarter of the image it lies in."""
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    rng = np.random.default_rng(0)
    X, y, quarters = [], [], []
    for label, name in enumerate(IMAGES):
        image = Image.fromarray(getattr(data, name)()).convert("L")
        half_width, half_height = image.width // 2, image.height // 2
        for quarter in range(4):
            left, top = (quarter % 2) * half_width, (quarter // 2) * half_height
            for _ in range(8):
                side = rng.uniform(0.4, 0.8) * min(half_width, half_height)
                x = left + rng.uniform(0, half_width - side)
                y_ = top + rng.uniform(0, half_height - side)
                crop = image.resize(version.preprocessing.size, box=(x, y_, x + side, y_ + side))
                X.append(np.asarray(crop.convert("RGB")))
                y.append(label)
                quarters.append(quarter)
    return np.stack(X), np.array(y), np.array(quarters)


def recognised(features, y, quarters):
    """Share of crops whose image is recognised from the image's other quarters."""
    model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=100.0))
    return cross_val_score(model, features, y, groups=quarters, cv=GroupKFold(4)).mean()


def test_features_beat_pixels_and_the_untrained_twin(network, version, crops):
    """Which image is this crop from? Chance is 1/16.

    No crop shares a pixel with those it is recognised by, so that only what the images'
    parts have in common (material, grain, style) helps.
    """
    X, y, quarters = crops
    prepared = version.preprocessing
    mean, std = torch.tensor([prepared.mean, prepared.std]).view(2, 1, 3, 1, 1)
    x = (torch.from_numpy(X).permute(0, 3, 1, 2) / 255 - mean) / std
    trained = recognised(embed(network, x), y, quarters)
    untrained = recognised(embed(calibrated_twin(x), x), y, quarters)
    pixels = recognised(X[:, ::4, ::4, 0].reshape(len(X), -1) / 255.0, y, quarters)
    assert trained > untrained + 0.1
    assert trained > pixels + 0.3
    assert trained > 0.75
