"""What a network does in training alone: stages in train mode do it, those in eval mode do not."""

import copy
import pickle
import random

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from sktransfer import load_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = {"size": 16, "crop": 16}


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
    """A layer that does more than return its input."""

    def __init__(self, conv, change):
        super().__init__()
        self.conv, self.change = conv, change

    def forward(self, x):
        return torch.relu(self.change(self.conv(x), self.training))


def drop_whole_samples(x, is_training):
    return x * (torch.rand(x.shape[0], 1, 1, 1) > 0.5) if is_training else x


def chain(change=None, layer=lambda conv: conv):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        layer(nn.Conv2d(8, 8, 3, padding=1)), *([change] if change else []), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


class Functional(nn.Module):
    """Changes values between its stages, in its own forward."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.change = change
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.fc1, self.fc2 = nn.Linear(32, 8), nn.Linear(8, 3)

    def forward(self, x):
        mode = self.training
        x = self.two(self.one(x)).flatten(1)
        return self.fc2(torch.relu(self.fc1(self.change(x, mode))))


class Auxiliary(Functional):
    """Gives a second output in training, for a loss of its own."""

    def forward(self, x):
        x = functional.dropout2d(self.one(x), 0.5, self.training)
        beside = x.mean()
        x = self.two(x).flatten(1)
        out = self.fc2(self.change(self.fc1(x), self.training))
        return (out, beside) if self.training else out


def by_name(x, is_training):
    return functional.dropout(x, 0.5, training=is_training)


def timm_vit(**rates):
    timm = pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    return timm.create_model(
        name, pretrained=False, img_size=16, patch_size=4, depth=2, num_classes=2, **rates
    )


NETWORKS = {
    "noise": lambda: chain(Noise()),
    "noise in place": lambda: chain(NoiseInPlace()),
    "noise first": lambda: nn.Sequential(Noise(), *chain()),
    "stochastic depth": lambda: chain(DropSample()),
    "functional, in a layer": lambda: chain(layer=lambda conv: Layer(conv, by_name)),
    "own code in a layer": lambda: chain(layer=lambda conv: Layer(conv, drop_whole_samples)),
    "functional": lambda: Functional(by_name),
    "torch's": lambda: Functional(lambda x, mode: torch.dropout(x, 0.5, mode)),
    "of channels": lambda: Functional(
        lambda x, mode: functional.feature_alpha_dropout(x, 0.5, mode)
    ),
    "noise between stages": lambda: Functional(
        lambda x, mode: x + torch.rand_like(x) if mode else x
    ),
    "a random activation": lambda: Functional(lambda x, mode: functional.rrelu(-x, training=mode)),
    "densenet": lambda: torchvision.models.DenseNet(8, (1, 1), 8, 2, drop_rate=0.5, num_classes=2),
    "vit": lambda: torchvision.models.VisionTransformer(
        16, 8, 2, 2, 8, 16, dropout=0.2, attention_dropout=0.2, num_classes=2
    ),
    "swin": lambda: torchvision.models.SwinTransformer(
        [2, 2], 8, [1, 1], [2, 2], [2, 2], dropout=0.2, attention_dropout=0.3, num_classes=2
    ),
    "timm's patches": lambda: timm_vit(patch_drop_rate=0.5),
    "timm's attention": lambda: timm_vit(attn_drop_rate=0.5),
    "timm's paths": lambda: timm_vit(drop_path_rate=0.5),
}


def fix_norms(*modules):
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()


def copied(network):
    """An independent copy of a network, and its stages."""
    return load_backbone(network, preprocessing=SIZE).copy_network()


def train(stages, mode=True):
    for stage in stages:
        stage.module.train(mode)
        fix_norms(stage.module)


def run(function, x, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return function(x.clone())


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_do_in_training_what_the_network_does(name):
    network, stages = copied(NETWORKS[name]())
    twin = copy.deepcopy(network).train()
    fix_norms(twin)
    x = torch.randn(4, 3, 16, 16)
    train(stages)
    for seed in (0, 1):
        torch.testing.assert_close(run(stages.run, x, seed), run(twin, x, seed))
    body = type(stages)(stages[:-1])  # the head of a vision transformer starts with zeros
    assert not torch.equal(run(body.run, x, 0), run(body.run, x, 1))
    train(stages, False)
    torch.testing.assert_close(run(stages.run, x, 0), run(twin.eval(), x, 1))


def test_frozen_stages_do_not_do_it():
    _, stages = copied(chain(layer=lambda conv: Layer(conv, by_name)))
    assert stages.names == ["stem", "3", "pool", "head"]
    x = torch.randn(4, 3, 16, 16)
    train(stages[2:])
    assert torch.equal(run(stages.run, x, 0), run(stages.run, x, 1))
    train(stages[1:])
    assert not torch.equal(run(stages.run, x, 0), run(stages.run, x, 1))


def test_stages_of_a_backbone_are_frozen():
    stages = load_backbone(Functional(by_name), preprocessing=SIZE).stages
    assert not any(stage.module.training for stage in stages)
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(run(stages.run, x, 0), run(stages.run, x, 1))


def test_the_first_of_several_outputs_counts():
    network, stages = copied(Auxiliary(by_name))
    x = torch.randn(4, 3, 16, 16)
    train(stages)
    twin = copy.deepcopy(network).train()
    torch.testing.assert_close(run(stages.run, x, 0), run(twin, x, 0)[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda x, mode: x + torch.rand(32) if mode else x,
        lambda x, mode: x * 0 if mode and torch.rand(1) < 2 else x,
        lambda x, mode: x * 0 if mode and random.random() < 2 else x,
    ],
)
def test_random_numbers_that_a_trace_would_keep(change):
    """Rather none than the same ones in each step."""
    _, stages = copied(Functional(change))
    x = torch.randn(4, 3, 16, 16)
    train(stages)
    expected = run(stages.run, x, 0)
    train(stages, False)
    torch.testing.assert_close(run(stages.run, x, 0), expected)


def test_stages_can_be_copied_and_pickled():
    _, stages = copied(Functional(by_name))
    x = torch.randn(4, 3, 16, 16)
    modules = nn.Sequential(*(stage.module for stage in stages)).train()
    for other in (copy.deepcopy(modules), pickle.loads(pickle.dumps(modules))):
        torch.testing.assert_close(run(other, x, 0), run(modules, x, 0))
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert not torch.equal(run(other, x, 0), run(modules, x, 0))


def test_a_layer_that_only_trains_is_a_layer():
    network = chain(Noise()).eval()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    rows = [
        load_backbone(network, preprocessing=SIZE, layer=layer).inference_module()(pixels)[0]
        for layer in ("3", "4")
    ]
    torch.testing.assert_close(*rows)


def test_embedding_and_tracing_leave_the_module_unchanged():
    network = chain(Noise()).train()
    network[3].eval()
    load_backbone(network, preprocessing=SIZE, layer=["3", None]).stages.run(
        torch.rand(2, 3, 16, 16)
    )
    assert network.training
    assert network[4].training
    assert not network[3].training
