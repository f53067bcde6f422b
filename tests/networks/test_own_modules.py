"""Modules of the user's own: left as they are, run as they would, or refused."""

import copy
import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from sktransfer import load_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8))
AS_IS = {"size": 32, "crop": 32, "mean": (0.0,) * 3, "std": (1.0,) * 3}


class Base(nn.Module):
    """Four columns; what the networks below do to them is the test."""

    def __init__(self, **attributes):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def embedded(self, x):
        return self.conv(x).mean((2, 3))

    def forward(self, x):
        return self.embedded(x)


class Branching(Base):
    def forward(self, x):
        if x.sum() < -1e9:  # no graph can hold this
            return x
        return self.embedded(x) * self.gain()

    def gain(self):
        return 1.0


def embed(module, **kwargs):
    backbone = load_backbone(module, preprocessing=AS_IS, **kwargs)
    return torch.cat(backbone.inference_module()(PIXELS), dim=1)


def fingerprint(module):
    return load_backbone(module, preprocessing=AS_IS).fingerprint


def expected(module):
    with torch.no_grad():
        return module.eval()(PIXELS / 255)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- left alone ------------------------------------------------------------------------------
class Keeping(Base):
    def forward(self, x):
        self.last = self.embedded(x)
        return self.last


class Appending(Base):
    def forward(self, x):
        self.shapes.append(x.shape)
        return self.embedded(x)


class Summing(Base):
    def forward(self, x):
        self.seen += x.sum()
        return self.embedded(x)


class Counting(Base):
    def forward(self, x):
        self.n += 1
        return self.embedded(x)


class Inline(Base):
    def forward(self, x):
        return self.embedded(x - torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1))


def with_buffer(module, name, value):
    module.register_buffer(name, value)
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: Keeping(last=None),
        lambda: Appending(shapes=[]),
        lambda: with_buffer(Summing(), "seen", torch.zeros(())),
        lambda: with_buffer(Counting(), "n", torch.zeros((), dtype=torch.long)),
        lambda: Counting(n=0),
        Inline,
    ],
    ids=["keeping", "appending", "summing", "counting", "counting-in-python", "inline"],
)
def test_modules_are_left_as_they_were(make):
    module = make().train()
    before = copy.deepcopy(module)
    backbone = load_backbone(module, preprocessing=AS_IS)
    got = torch.cat(backbone.inference_module()(PIXELS), dim=1)
    assert vars(module).keys() == vars(before).keys()
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in module.state_dict().items())
    assert fingerprint(module) == fingerprint(before) == backbone.fingerprint
    close(got, expected(make()))


def test_a_hook_that_wants_values_gets_them():
    module, seen = Base(), []
    module.conv.register_forward_hook(lambda layer, args, out: seen.append(out.detach().numpy()))
    close(embed(module), expected(module))


# -- run as they would -----------------------------------------------------------------------
class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.relu = nn.ReLU()

    def forward(self, x):
        if x.sum() < -1e9:
            return x
        return self.c(self.relu(self.b(self.relu(self.a(x)) - 0.1)))


def test_of_a_layer_that_runs_twice_the_first_call_counts():
    module = Twice()
    with torch.no_grad():
        first = torch.relu(module.a(PIXELS / 255)).mean((2, 3))
    close(embed(module, layer="relu"), first)
    close(embed(module, layer=["relu", "c"])[:, :4], first)
    close(embed(module, layer=["c", "relu"])[:, 4:], first)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_parametrised_layers(name):
    module = Base()
    module.conv = nn.Sequential(
        getattr(nn.utils.parametrizations, name)(module.conv), nn.BatchNorm2d(4)
    )
    module.conv[1].running_mean.fill_(0.5)
    close(embed(module), expected(module))


def test_not_a_number():
    class Net(Base):
        def forward(self, x):
            return self.embedded(x) / 0 * 0

    assert embed(Net()).isnan().all()


def test_a_forward_that_catches_exceptions():
    class Net(Branching):
        def forward(self, x):
            try:
                return super().forward(self.conv(x)[:, :3])
            except Exception as error:
                raise RuntimeError("something went wrong") from error

    module = Net()
    with torch.no_grad():
        first = module.conv(PIXELS / 255).mean((2, 3))
    close(embed(module, layer="conv"), first)


class Slow(Branching):
    def gain(self):
        time.sleep(0.05)
        return 1.0


def _embed_in_child(backbone, results):
    results.put(torch.cat(backbone.inference_module()(PIXELS), dim=1).numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_fork_while_another_thread_runs_the_network():
    module = Slow()
    backbone = load_backbone(module, preprocessing=AS_IS)
    right = torch.cat(backbone.inference_module()(PIXELS), dim=1).numpy()
    stop = threading.Event()

    def run():
        while not stop.is_set():
            backbone.inference_module()(PIXELS)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        context = multiprocessing.get_context("fork")
        for _ in range(3):
            results = context.Queue()
            child = context.Process(target=_embed_in_child, args=(backbone, results))
            child.start()
            try:
                np.testing.assert_allclose(results.get(timeout=20), right, rtol=1e-5)
            finally:
                child.kill()
                child.join()
    finally:
        stop.set()
        thread.join()


# -- refused ---------------------------------------------------------------------------------
class Collapsing(Base):
    def forward(self, x):
        return self.embedded(x).mean(0, keepdim=True)


class CollapsingUntraced(Branching):
    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (nn.Identity, ValueError, "Identity returns the (image|picture) as"),
        (
            Collapsing,
            ValueError,
            r"of Collapsing gives values of shape \(1, 4\) for two (images|pictures)",
        ),
        (
            CollapsingUntraced,
            ValueError,
            r"'output' of Coll.* shape \(1, 4\) for two (images|pictures)",
        ),
        (
            lambda: Base().double(),
            ValueError,
            r"torch.float64 \('conv.weight'\): give a float32 module",
        ),
        (lambda: Base().bfloat16(), ValueError, r"Base holds weights of type torch.bfloat16"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), ValueError, "no values in '0.weight' yet"),
        (lambda: Base().to("meta"), ValueError, "Base holds no values in 'conv.weight' yet: send"),
    ],
)
def test_modules_that_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        load_backbone(make(), preprocessing=AS_IS)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torch_jit_is_refused():
    module = torch.jit.trace(Base(), torch.zeros(1, 3, 32, 32))
    with pytest.raises(TypeError, match=r"is or holds a torch.jit module .*it was made from"):
        load_backbone(module, preprocessing=AS_IS)


def test_a_module_that_keeps_what_it_computed_cannot_be_copied():
    module = Keeping(last=None)
    module(PIXELS / 255)
    with pytest.raises(
        TypeError, match=r"Keeping cannot be copied \(RuntimeError: .*function that"
    ):
        load_backbone(module, preprocessing=AS_IS)


def test_weights_of_another_kind():
    with pytest.raises(ValueError, match="'V1' is not accepted for a torch"):
        load_backbone(Base(), weights="V1")
