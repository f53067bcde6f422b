"""What a network does in training alone: stages that are trained do it, frozen ones do not."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from test_fine_tuning import small
from torch import nn
from torch.nn import functional

from sktransfer import load_backbone
from sktransfer.networks import _training_only
from sktransfer.networks._stages import plan_stages, split_stages
from sktransfer.networks._tracing import trace

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (3, 16, 16)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class NoiseInPlace(nn.Module):
    def forward(self, x):
        return x.add_(torch.randn(x.shape[1:])) if self.training else x


class DropSample(nn.Module):
    """Stochastic depth, as code that no graph can hold."""

    def forward(self, x):
        n = x.shape[0]
        if not self.training or torch.rand(1) > 0.9:
            return x
        return x * (torch.rand(n, 1, 1, 1) > 0.5)


class Layer(nn.Module):
    """A layer that does more than return what it was given."""

    def __init__(self, conv, change):
        super().__init__()
        self.conv, self.change = conv, change

    def forward(self, x):
        return torch.relu(self.change(self.conv(x), self.training))


def drop_whole_samples(x, is_training):
    return x * (torch.rand(x.shape[0], 1, 1, 1) > 0.5) if is_training else x


class AuxiliaryLayer(nn.Module):
    """Gives a second value in training, for a loss of its own."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        x = self.conv(x)
        if self.training:
            self.last = functional.dropout(x)
            return self.last, x.mean()
        return x


def chain(change=None, layer=lambda conv: conv):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        layer(nn.Conv2d(8, 8, 3, padding=1)), *([change] if change else []), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


class Functional(nn.Module):
    """Drops between its stages, in a forward that no stage holds as a whole."""

    def __init__(self, drop):
        super().__init__()
        torch.manual_seed(0)
        self.drop = drop
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.fc1, self.fc2 = nn.Linear(32, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.two(self.one(x)).flatten(1)
        return self.fc2(torch.relu(self.fc1(self.drop(x, self.training))))


def by_name(x, is_training):
    return functional.dropout(x, 0.5, training=is_training)


CHANGES = {
    "noise": lambda: chain(Noise()),
    "noise in place": lambda: chain(NoiseInPlace()),
    "noise first": lambda: nn.Sequential(Noise(), *chain()),
    "stochastic depth": lambda: chain(DropSample()),
    "functional, in a layer": lambda: chain(layer=lambda conv: Layer(conv, by_name)),
    "own code in a layer": lambda: chain(layer=lambda conv: Layer(conv, drop_whole_samples)),
    "functional": lambda: Functional(by_name),
    "torch's": lambda: Functional(lambda x, is_training: torch.dropout(x, 0.5, is_training)),
    "of channels": lambda: Functional(
        lambda x, is_training: functional.feature_alpha_dropout(x, 0.5, is_training)
    ),
}  # fmt: skip


def densenet():
    return torchvision.models.DenseNet(8, (1, 1), 8, 2, drop_rate=0.5, num_classes=2)


def vit():
    model = torchvision.models.VisionTransformer
    return model(16, 8, 2, 2, 8, 16, dropout=0.2, attention_dropout=0.2, num_classes=2)


def swin():
    return torchvision.models.SwinTransformer(
        [2, 2], 8, [1, 1], [2, 2], [2, 2], dropout=0.2, attention_dropout=0.3, num_classes=2
    )


def timm_vit(**rates):
    timm = pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    return timm.create_model(
        name, pretrained=False, img_size=16, patch_size=4, depth=2, num_classes=2, **rates
    )


NETWORKS = CHANGES | {
    "densenet": densenet, "vit": vit, "swin": swin,
    "patches": lambda: timm_vit(patch_drop_rate=0.5),
    "attention": lambda: timm_vit(attn_drop_rate=0.5),
    "paths": lambda: timm_vit(drop_path_rate=0.5),
}  # fmt: skip


def fixed_norms(network):
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    return network


def run(function, x, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return function(x.clone())


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_do_in_training_what_the_network_does(name):
    network = NETWORKS[name]()
    stages = split_stages(network, SIZE)
    x = torch.randn(4, *SIZE)
    fixed_norms(network.train())
    stages.freeze(0)
    fixed_norms(network)
    for seed in (0, 1):
        torch.testing.assert_close(run(stages.run, x, seed), run(network, x, seed))
    assert not torch.equal(run(stages[:-1].run, x, 0), run(stages[:-1].run, x, 1))
    stages.freeze(len(stages))
    torch.testing.assert_close(run(stages.run, x, 0), run(network.eval(), x, 1))
    assert plan_stages(network, SIZE).unheard_in_training(stages.names) == []


@pytest.mark.parametrize("name", CHANGES)
def test_fine_tuning_does_it_where_it_trains(name, stripes):
    model = small(backbone=CHANGES[name](), unfreeze="all", memory=False).fit(*stripes)
    module = model.net_.module_.train()
    module.entry = 0
    x = torch.rand(4, 1, *SIZE)
    assert not torch.equal(run(module, x, 0), run(module, x, 1))
    module.freeze(len(module.stages))
    assert torch.equal(run(module, x, 0), run(module, x, 1))
    np.testing.assert_array_equal(model.predict_proba(stripes[0]), model.predict_proba(stripes[0]))


def test_what_is_kept_for_the_next_epoch_is_not_written_over():
    stages = split_stages(nn.Sequential(NoiseInPlace(), *chain()), SIZE)
    x = torch.randn(4, *SIZE)
    before = x.clone()
    stages.freeze(0)
    stages.run(x)
    assert torch.equal(x, before)


def test_what_comes_beside_in_training_is_left_out(stripes):
    network = chain(layer=AuxiliaryLayer)
    model = small(backbone=network, unfreeze="all", lr=1e-2).fit(*stripes)
    assert np.isfinite(model.history_[-1]["train_loss"])
    model.fit(*stripes).partial_fit(*stripes)
    assert copy.deepcopy(model).predict_proba(stripes[0]).shape == (len(stripes[1]), 3)


class OwnNorm(nn.Module):
    """A batch norm that somebody wrote."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x):
        return functional.batch_norm(x, self.running_mean, self.running_var, training=self.training)


@pytest.mark.parametrize("batch_norm", ["fixed", "moving"])
def test_own_batch_norms_are_as_asked(batch_norm, stripes):
    model = small(backbone=chain(OwnNorm()), unfreeze="all", batch_norm=batch_norm).fit(*stripes)
    means = [v for k, v in model._tuned.trained_state().items() if k.endswith("running_mean")]
    assert (np.abs(means).max() > 0) == (batch_norm == "moving")


# -- what no stage can ------------------------------------------------------------------------
class Between(Functional):
    """Code of its own between the stages."""

    def __init__(self):
        super().__init__(lambda x, is_training: x + torch.rand_like(x) if is_training else x)


class Early(nn.Module):
    """Looks at the mode long before what depends on it; or tells it to what is no dropout."""

    def __init__(self, function, is_early):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))
        self.function, self.is_early = function, is_early

    def forward(self, x):
        mode = self.training if self.is_early else None
        x = self.hidden(self.two(self.one(x)).flatten(1))
        x = self.function(self, x, self.training if mode is None else mode)
        return self.head(torch.relu(x))


@pytest.mark.parametrize(
    "network",
    [
        Between(),
        Early(lambda net, x, mode: functional.dropout(x, 0.5, mode), True),
        Early(lambda net, x, mode: functional.rrelu(x, training=mode), False),
        Early(lambda net, x, mode: functional.batch_norm(x, net.mean, net.var, None, None, mode),
              False),
    ],
    ids=["branch", "early", "rrelu", "batch norm"],
)  # fmt: skip
def test_what_no_stage_can_is_told(stripes, network):
    name = type(network).__name__
    with pytest.warns(
        UserWarning, match=rf"The forward of {name} does something in training alone"
    ):
        small(backbone=network, unfreeze="all").fit(*stripes)
    small(backbone=network, unfreeze=0).fit(*stripes)  # a warning is an error


def test_looks_are_noted_by_the_innermost():
    outer, inner = [], []
    module = nn.Dropout()
    with _training_only.noting_reads(lambda: outer.append(1)):
        with _training_only.noting_reads(lambda: inner.append(1)):
            assert module.training
        assert (outer, inner) == ([], [1])
        assert module.training
    assert (outer, inner) == ([1], [1])
    assert module.train(False).training is False
    assert "training" not in vars(nn.Module)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::DeprecationWarning")
def test_scripted_modules_load_while_a_network_is_traced():
    with _training_only.noting_reads(lambda: None):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
        copied = copy.deepcopy(scripted).eval()
    assert not copied.training
    assert copied(torch.zeros(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_no_loss(name):
    network = torchvision.models.get_model(name, weights=None, init_weights=False)
    plan = plan_stages(network, (3, 96, 96))
    assert plan.unheard_in_training(plan.names) == []
    assert not any("aux" in name.lower() for name in network.train() and plan.traced.names)


# -- what stays as it was --------------------------------------------------------------------
def test_graphs_hold_what_they_did():
    """Whole layers are for training: names, and what is folded for inference, are as before."""
    network = chain(layer=lambda conv: Layer(conv, by_name))
    assert {"3.conv", "3.dropout", "3.relu", "3"} <= set(trace(network).names)
    backbone = load_backbone(network, preprocessing={"size": 16, "crop": 16}, layer="3.conv")
    assert backbone.n_features == 8
    assert "training" not in vars(nn.Module)


def test_a_layer_that_only_trains_is_a_layer():
    network = chain(Noise()).eval()
    pixels = torch.randint(0, 256, (2, *SIZE), dtype=torch.uint8)
    rows = [
        load_backbone(network, preprocessing={"size": 16, "crop": 16}, layer=layer)
        .embed_batch(pixels)[0]
        for layer in ("3", "4")
    ]  # fmt: skip
    torch.testing.assert_close(*rows)
