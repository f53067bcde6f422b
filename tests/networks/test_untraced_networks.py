"""Networks that no graph can hold: their stages, and fine-tuning them as their traceable twins."""

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from test_fine_tuning import assert_same_model, small, state_of
from torch import nn

from sktransfer import load_backbone
from sktransfer.networks._stages import plan_stages, split_stages

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (3, 16, 16)


class Branching(nn.Module):
    """Looks at values, which no graph can; leaves them as they are."""

    def forward(self, x):
        return x if x.abs().max() < 1e30 else -x


class Classifier(nn.Module):
    """Pools and classifies."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.fc = nn.Linear(n_in, n_out)

    def forward(self, x):
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


NETWORKS = {
    "flat": lambda body: nn.Sequential(*body, *pooled(linear(8, 3))),
    "nested": lambda body: nn.Sequential(body, pooled(linear(8, 3))),
    "deeper": lambda body: nn.Sequential(nn.Sequential(body), nn.Sequential(pooled(linear(8, 3)))),
    "hidden": lambda body: nn.Sequential(body, pooled(linear(8, 8), nn.ReLU(), linear(8, 3))),
    "narrow": lambda body: nn.Sequential(body, pooled(linear(8, 5), nn.ReLU(), linear(5, 3))),
    "dropout": lambda body: nn.Sequential(body, pooled(nn.Dropout(), linear(8, 3), nn.Softmax(1))),
    "own": lambda body: nn.Sequential(*body, Classifier(8, 3)),
}


@pytest.fixture(params=NETWORKS)
def make(request):
    return lambda is_traceable: NETWORKS[request.param](body(is_traceable)).eval()


def test_stages_run_as_the_network(make):
    network = make(False)
    x = torch.randn(2, *SIZE)
    stages = split_stages(network, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(stages.run(x), network(x), rtol=0, atol=0)
    for name, part in stages:
        assert name == "pool" or any(p.ndim > 1 for p in part.parameters()), name
    assert stages.names[-1] == "head"


def test_it_embeds_and_trains_as_its_traceable_twin(make, stripes):
    X, y = stripes
    models = [
        small(backbone=make(is_traceable), unfreeze="all", lr=1e-2, layer_decay=1.0, probe_views=1)
        for is_traceable in (True, False)
    ]
    twin, model = [model.fit(X, y) for model in models]
    assert twin.history_[-1]["train_loss"] == pytest.approx(model.history_[-1]["train_loss"], 1e-3)
    np.testing.assert_allclose(model.transform(X), twin.transform(X), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(model.predict_proba(X), twin.predict_proba(X), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*did not improve on the linear probe:UserWarning")
@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
def test_what_is_validated_is_what_predicts(make, stripes, unfreeze):
    X, y = stripes
    options = {"backbone": make(False), "probe_views": 1}
    start = small(**options, max_epochs=0).fit(X, y)
    model = small(**options, unfreeze=unfreeze, lr=1e-2, early_stopping=True)
    model.fit(X, y, X_val=X, y_val=y)

    def loss(estimator):
        rows = estimator.predict_proba(X)
        codes = np.searchsorted(estimator.classes_, y)
        return -np.log(rows[np.arange(len(y)), codes]).mean()

    assert model.history_[0]["valid_loss"] == pytest.approx(loss(start), rel=1e-3)
    assert model.history_[model.best_epoch_]["valid_loss"] == pytest.approx(loss(model), rel=1e-3)


def test_every_stage_has_weights(stripes):
    X, y = stripes
    network = NETWORKS["flat"](body(False))
    assert load_backbone(network, preprocessing={"size": 16, "crop": 16}).stages.names == [
        "4", "7", "pool", "head",
    ]  # fmt: skip
    before = network.state_dict()
    model = small(backbone=network, unfreeze=1, lr=1e-2, layer_decay=0.5).fit(X, y)
    assert {name.partition(".")[0] for name in state_of(model)} == {"1", "head"}
    rates = {group["stage"]: group["lr"] for group in model.net_.optimizer_.param_groups}
    assert rates["7"] == pytest.approx(0.5 * rates["head"])
    assert not np.array_equal(state_of(model)["1.0.weight"], before["5.weight"].numpy())
    with pytest.raises(ValueError, match=r"has 2 stages below its head: \['4', '7'\]"):
        small(backbone=network, unfreeze=3).fit(X, y)


def test_a_hook_or_a_value_of_several_tensors_keeps_parts_together():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x), x

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, pair):
            return self.conv(pair[0]) if pair[1].sum() < 1e30 else pair[0]

    network = nn.Sequential(Two(), First(), nn.Conv2d(4, 4, 3), *pooled(nn.Linear(4, 2)))
    assert split_stages(network, SIZE).names == ["1", "2", "pool", "head"]
    network.register_forward_hook(lambda module, args, out: 2 * out)
    stages = split_stages(network, SIZE)
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(stages.run(x), network(x))


def test_layers_are_called_as_they_were():
    """By its dotted name every module still is what it returns, whatever stages are called."""
    parts = OrderedDict(
        conv=nn.Conv2d(3, 4, 3), branch=Branching(), pool=nn.MaxPool2d(2),
        conv2=nn.Conv2d(4, 6, 3), head=nn.ReLU(), flat=nn.Flatten(),
        fc=nn.Linear(150, 2),
    )  # fmt: skip
    network = nn.Sequential(parts)
    plan = plan_stages(network, SIZE)
    assert plan.names == ["pool#0", "head#1", "pool", "head"]
    assert plan.resolve("pool") == "pool"
    assert plan.resolve("pool#0") == "pool"
    assert plan.shape(plan.resolve("pool"), SIZE) == (2, 4, 7, 7)
    assert plan.resolve("conv2") == "conv2"
    assert plan.embedding_key == ">fc"


def test_a_module_that_comes_twice():
    relu = nn.ReLU()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), relu, Branching(), nn.Conv2d(4, 4, 3), relu)
    network.append(nn.Flatten())
    x = torch.randn(2, *SIZE)
    stages = split_stages(network, SIZE)
    torch.testing.assert_close(stages.run(x), network(x), rtol=0, atol=0)


def test_stages_that_are_called_as_the_pooling_is_are_counted(stripes):
    """Also where a graph holds the network."""
    parts = OrderedDict(
        conv=nn.Conv2d(3, 4, 3), p=nn.MaxPool2d(2), conv2=nn.Conv2d(4, 4, 3), pool=nn.MaxPool2d(2),
        flat=nn.Flatten(), fc=nn.Linear(16, 2),
    )  # fmt: skip
    torch.manual_seed(0)
    model = small(backbone=nn.Sequential(parts), unfreeze=1, lr=1e-2).fit(*stripes)
    assert {name.partition(".")[0] for name in state_of(model)} == {"1", "head"}


def test_a_pickle_goes_on(stripes):
    X, y = stripes
    model = small(backbone=NETWORKS["nested"](body(False)), unfreeze=1, lr=1e-2).fit(X, y)
    again = pickle.loads(pickle.dumps(model))
    assert_same_model(again, model, rtol=0, atol=0)
    np.testing.assert_allclose(again.predict_proba(X), model.predict_proba(X), rtol=1e-5)
