"""Networks with code that cannot be traced: their stages, layers and fine-tuning."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from sktransfer import FineTuningClassifier, load_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = {"size": 16, "crop": 16}


class Branching(nn.Module):
    """Looks at values, which no graph can; returns its input."""

    def forward(self, x):
        return x if x.abs().max() < 1e30 else -x


class Classifier(nn.Module):
    """Pools and classifies."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.fc = nn.Linear(n_in, n_out)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class Net(nn.Module):
    """Looks at values in its own forward, between its layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.unused = nn.Linear(6, 6)
        self.relu, self.fc = nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        x = self.features(x)
        if x.sum() < -1e30:
            return self.unused(x)
        x = self.relu(self.relu(x) - 0.1)
        return self.fc(x.mean((2, 3)))


def body(is_traceable):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Identity() if is_traceable else Branching(),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def pooled(*head):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


def linear(n_in, n_out):
    torch.manual_seed(1)
    return nn.Linear(n_in, n_out)


def as_one(part):
    """A module whose own code cannot be traced, around another."""

    class Whole(Branching):
        def __init__(self):
            super().__init__()
            self.part = part

        def forward(self, x):
            return super().forward(self.part(x))

    return Whole()


NETWORKS = {
    "flat": lambda body: nn.Sequential(*body, *pooled(linear(8, 3))),
    "nested": lambda body: nn.Sequential(body, pooled(linear(8, 3))),
    "hidden": lambda body: nn.Sequential(body, pooled(linear(8, 8), nn.ReLU(), linear(8, 3))),
    "dropout": lambda body: nn.Sequential(body, pooled(nn.Dropout(), linear(8, 3), nn.Softmax(1))),
    "own": lambda body: nn.Sequential(*body, Classifier(8, 3)),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_module_that_cannot_be_traced_is_one_operation(make):
    network, twin = make(body(False)).eval(), make(body(True)).eval()
    x = torch.randn(2, 3, 16, 16)
    backbone = load_backbone(network, preprocessing=SIZE)
    stages = backbone.stages
    assert stages.names == load_backbone(twin, preprocessing=SIZE).stage_names
    with torch.no_grad():
        torch.testing.assert_close(stages.run(x), network(x))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    (got,) = backbone.inference_module()(pixels)
    (expected,) = load_backbone(twin, preprocessing=SIZE).inference_module()(pixels)
    torch.testing.assert_close(got, expected)


def test_a_network_that_cannot_be_traced_is_body_and_head():
    network = Net().eval()
    backbone = load_backbone(network, preprocessing=SIZE, layer=["features.0", "relu", None])
    assert backbone.stage_names == ["body", "head"]
    assert backbone.feature_groups == [("features.0", 6), ("relu", 6), ("embedding", 6)]
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(backbone.stages.run(x), network(x), rtol=0, atol=0)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    rows = backbone.inference_module()(pixels)
    with torch.no_grad():
        x = backbone.preprocessing
        x = (pixels / 255 - torch.tensor(x.mean).view(3, 1, 1)) / torch.tensor(x.std).view(3, 1, 1)
        maps = network.features(x)
    torch.testing.assert_close(rows[0], network.features[0](x).mean((2, 3)).detach())
    torch.testing.assert_close(rows[1], maps.mean((2, 3)))  # the first of two calls
    torch.testing.assert_close(rows[2], (maps - 0.1).relu().mean((2, 3)))


@pytest.mark.parametrize("kind", [Net, as_one])
def test_what_is_behind_the_head_leaves_no_head(kind):
    class Scaled(Net):
        def forward(self, x):
            return 2 * super().forward(x)

    network = (Scaled() if kind is Net else as_one(pooled(nn.Linear(3, 2)))).eval()
    backbone = load_backbone(network, preprocessing=SIZE)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(backbone.stages.run(x), network(x))
    assert backbone.stage_names[0] == "body"


def test_hooks_act():
    network = NETWORKS["flat"](body(True)).eval()
    network[0].register_forward_hook(lambda module, args, out: 2 * out)
    network.register_forward_hook(lambda module, args, out: 3 * out)
    stages = load_backbone(network, preprocessing=SIZE).stages
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(stages.run(x), network(x))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("feature", r"layer='feature' is not in Net. Did you mean 'features'.*\['body', 'head'\]"),
        ("unused", "layer='unused' of Net does not run when an image is embedded"),
    ],
)
def test_layers_that_cannot_be_had(layer, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(Net(), preprocessing=SIZE, layer=layer)


def test_outputs_that_cannot_be_had():
    class Two(Net):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(TypeError, match="Two returns tuple: its forward has to return one tensor"):
        load_backbone(Two(), preprocessing=SIZE)
    recurrent = nn.Sequential(nn.Flatten(2), nn.LSTM(16 * 16, 5))
    with pytest.raises(TypeError, match="Sequential returns tuple: its forward has to return one"):
        load_backbone(recurrent, preprocessing=SIZE)


def test_a_layer_that_does_not_always_run():
    class Sometimes(Net):
        def forward(self, x):
            if x.max() > 0:
                x = x[:, :, :8]
                return self.fc(self.features[2](self.features[0](x)).mean((2, 3)))
            return super().forward(x)

    backbone = load_backbone(Sometimes(), preprocessing=SIZE, layer="features.1")
    with pytest.raises(ValueError, match=r"layer 'features.1' did not run for these images"):
        backbone.inference_module()(torch.full((2, 3, 16, 16), 255, dtype=torch.uint8))


def test_a_forward_that_makes_tensors_on_the_cpu():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc = nn.LSTM(16, 5, batch_first=True), nn.Linear(5, 3)

        def rows(self, x):
            start = torch.zeros(1, x.size(0), 5).to("cpu")
            return self.lstm(x[:, 0], (start, start))[0][:, -1]

        def forward(self, x):
            return self.fc(self.rows(x))

    network, pixels = Recurrent(), torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)
    how = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    (got,) = load_backbone(network, preprocessing=how).inference_module()(pixels)
    with torch.no_grad():
        torch.testing.assert_close(got, network.rows(torch.ones(2, 3, 16, 16)))


def test_a_network_that_draws_random_numbers_is_warned_of():
    class Dropping(Net):
        def forward(self, x):
            return self.fc(nn.functional.dropout(self.features(x).mean((2, 3)), 0.5))

    with pytest.warns(UserWarning, match="Dropping draws random numbers in eval mode, so that its"):
        load_backbone(Dropping(), preprocessing=SIZE)


@pytest.fixture(scope="module")
def stripes():
    """Images of vertical and horizontal stripes, and their labels."""
    rng = np.random.default_rng(0)
    X = rng.integers(0, 90, (24, 16, 16, 3), dtype=np.uint8)
    X[:12, :, ::4] += 120
    X[12:, ::4] += 120
    return X, np.repeat(["columns", "rows"], 12)


@pytest.mark.parametrize("unfreeze", [0, 1])
def test_fine_tuning(stripes, unfreeze):
    model = FineTuningClassifier(
        Net(),
        unfreeze=unfreeze,
        max_epochs=2,
        lr=1e-2,
        preprocessing=SIZE,
        memory=False,
        random_state=0,
    )
    model.fit(*stripes)
    again = pickle.loads(pickle.dumps(model))
    rows = model.predict_proba(stripes[0])
    np.testing.assert_allclose(again.predict_proba(stripes[0]), rows, rtol=1e-5)
    assert model.transform(stripes[0]).shape == (24, 6)
    with pytest.raises(ValueError, match=r"stages below this network's head are \['body'\]"):
        model.set_params(unfreeze=2).fit(*stripes)
