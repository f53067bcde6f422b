"""Fingerprints of users' modules and functions: whatever changes an embedding changes them."""

import functools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from sktransfer import load_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8))
UNIT = {"size": 32, "crop": 32, "mean": (0.0,) * 3, "std": (1.0,) * 3}
GAIN = 1.0


class Base(nn.Module):
    """Four columns, multiplied by what the networks below say."""

    def __init__(self, **attributes):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) * self.gain()

    def gain(self):
        return 1.0


def embed(module):
    backbone = load_backbone(module, preprocessing=UNIT)
    return torch.cat(backbone.inference_module()(PIXELS), dim=1)


def fingerprint(module):
    return load_backbone(module, preprocessing=UNIT).fingerprint


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- modules ---------------------------------------------------------------------------------
def tensor_attribute(k):
    class Net(Base):
        def gain(self):
            return self.scale

    return Net(scale=torch.tensor(k))


def hook(k):
    module = Base()
    if k > 1:
        module.register_forward_hook(lambda layer, args, out: out * k)
    return module


def layer_hook(k):
    module = Base()
    module.conv.register_forward_hook(lambda layer, args, out: out * k)
    return module


def pre_hook(k):
    module = Base()
    module.conv.register_forward_pre_hook(lambda layer, args: (args[0] * k,))
    return module


def instance_forward(k):
    module = Base()
    module.forward = lambda x: x.mean((2, 3)) * k
    return module


def layer_forward(k):
    module = Base()
    inner = module.conv.forward
    module.conv.forward = lambda x: inner(x) * k
    return module


class Gains:
    def __init__(self, k):
        self.first = k


def in_an_object(k):
    class Net(Base):
        def gain(self):
            return self.gains[0].first

    return Net(gains=[Gains(k)])


def private_in_a_dict(k):
    class Net(Base):
        def gain(self):
            return self._settings["k"]

    return Net(_settings={"k": k})


def edited_method(k):
    class One(Base):
        def gain(self):
            return 1.5

    class Two(Base):
        def gain(self):
            return 2.5

    One.__qualname__ = Two.__qualname__ = "Net"
    return One() if k == 1 else Two()


def closure(k):
    class Net(Base):
        def gain(self):
            return k

    return Net()


def class_attribute(k):
    class Net(Base):
        factor = k

        def gain(self):
            return self.factor

    return Net()


def property_of_the_class(k):
    class Net(Base):
        @property
        def factor(self):
            return k

        def gain(self):
            return self.factor

    return Net()


def norm_of_its_own(k):
    class Norm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * self.gains[0]

    module = Base()
    module.conv = nn.Sequential(module.conv, Norm(4))
    module.conv[1].gains = [k]
    return module


def setting_of_a_layer(k):
    return Base(conv=nn.Conv2d(3, 4, 3, dilation=int(k)))


MAKERS = [
    tensor_attribute, hook, layer_hook, pre_hook, instance_forward, layer_forward, in_an_object,
    private_in_a_dict, edited_method, closure, class_attribute, property_of_the_class,
    norm_of_its_own, setting_of_a_layer,
]  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
def test_modules_that_do_different_things(make):
    for k in (1.0, 5.0):
        module = make(k)
        with torch.no_grad():
            expected = module.eval()(PIXELS / 255)
        close(embed(module), expected)
    assert fingerprint(make(1.0)) != fingerprint(make(5.0))
    assert fingerprint(make(5.0)) == fingerprint(make(5.0))


def gain_of_this_file(x):
    return x * GAIN


class ReadsThisFile(Base):
    def gain(self):
        return gain_of_this_file(1.0)


def test_functions_and_constants_of_the_modules_file(monkeypatch):
    before = fingerprint(ReadsThisFile())
    assert fingerprint(ReadsThisFile()) == before
    monkeypatch.setattr(sys.modules[__name__], "GAIN", 3.0)
    between = fingerprint(ReadsThisFile())
    monkeypatch.setattr(sys.modules[__name__], "gain_of_this_file", lambda x: x * 4)
    assert len({before, between, fingerprint(ReadsThisFile())}) == 3
    close(embed(ReadsThisFile()), 4 * embed(Base()))


def test_a_variable_named_as_an_attribute_does_not_count(monkeypatch):
    before = fingerprint(Base())
    monkeypatch.setattr(sys.modules[__name__], "conv", object(), raising=False)  # self.conv
    assert fingerprint(Base()) == before


def test_changes_of_a_module():
    module = tensor_attribute(1.0)
    first = embed(module)
    module.scale.fill_(7.0)
    close(embed(module), 7 * first)
    handle = module.register_forward_hook(lambda layer, args, out: out + 1)
    close(embed(module), 7 * first + 1)
    handle.remove()
    close(embed(module), 7 * first)
    with torch.no_grad():
        module.conv.weight.zero_()
        module.conv.bias.zero_()
    assert (embed(module) == 0).all()


def test_modes_and_use_change_nothing():
    module = Base(tags={"a", "b"})
    module.conv = nn.Sequential(module.conv, nn.Dropout())
    before = fingerprint(module)
    module.eval()(PIXELS / 255)
    module.requires_grad_(False)
    assert fingerprint(module) == before


class Unpicklable:
    def __reduce__(self):
        raise TypeError("no pickle of this")

    def __deepcopy__(self, memo):
        return self


def test_unpicklable_attributes_are_accepted_and_not_shared():
    module = Base(strange=Unpicklable())
    close(embed(module), embed(Base()))
    assert fingerprint(module) != fingerprint(module)
    backbone = load_backbone(module, preprocessing=UNIT)
    assert backbone.fingerprint == backbone.fingerprint


def test_objects_that_hold_each_other():
    module = Base(gains=Gains(1.0))
    module.gains.parents = [module, module.gains]
    assert fingerprint(module) == fingerprint(module)
    before = fingerprint(module)
    module.gains.first = 2.0
    assert fingerprint(module) != before


def test_a_fingerprint_of_the_users():
    modules = [Base(strange=Unpicklable(), fingerprint=name) for name in ("one", "one", "two")]
    found = [fingerprint(module) for module in modules]
    assert found[0] == found[1] != found[2]
    with torch.no_grad():
        modules[0].conv.bias.add_(1)
    assert fingerprint(modules[0]) != found[0]


def test_graph_modules():
    graph = torch.fx.symbolic_trace(Base())
    assert fingerprint(graph) == fingerprint(torch.fx.symbolic_trace(Base()))
    assert fingerprint(graph) != fingerprint(torch.fx.symbolic_trace(closure(2.0)))


SCRIPT = """
import functools, torch, torchvision
from torch import nn
from sktransfer import load_backbone
NAMES = {"alpha", "beta", "gamma", "delta"}
class Net(nn.Module):
    kinds = frozenset(NAMES)
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.tags = nn.Conv2d(3, 4, 3), {"p", "q", "r"}
        self.act = functools.partial(nn.functional.leaky_relu, negative_slope=0.1)
        self.pool, self.parent, self.dtype = nn.functional.max_pool2d, [self], torch.float32
        self.conv.register_forward_hook(self.keep)
    def keep(self, layer, args, out): pass
    @torch.no_grad()
    def forward(self, x):
        assert len(NAMES) in self.kinds or "u" not in {"u", "v"} or self.tags
        return self.act(self.conv(x)).mean((2, 3))
def half(image):
    return image.transpose(2, 0, 1)[:, :64, :64] / (510 if "alpha" in {"alpha", "omega"} else 1)
torch.manual_seed(0)
nets = [Net(), torchvision.models.squeezenet1_1()]
nets.append(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))))
print([load_backbone(net, preprocessing={"size": 64, "crop": 64}).fingerprint for net in nets])
print(load_backbone("builtin", preprocessing=half).fingerprint)
"""


def test_every_process_finds_the_same(capsys):
    exec(SCRIPT, {"__name__": "__main__"})
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == capsys.readouterr().out != ""


# -- preprocessing ---------------------------------------------------------------------------
def pixels(image):
    return np.transpose(image[:32, :32], (2, 0, 1)) / 255


SHIFT = v2.Lambda(lambda x: x)


def reads_this_file(image):
    return SHIFT(gain_of_this_file(pixels(image)))


def keyword_only(k):
    def function(image, *, factor=k, offset=0):
        return pixels(image) * factor + offset

    return function


def partial(k):
    return functools.partial(keyword_only(k), offset=1)


def cached(k):
    @functools.lru_cache
    def factor():
        return 1.5 if k == 1 else 2.5

    return lambda image: pixels(image) * factor()


def called(k):
    class Call:
        if k == 1:

            def __call__(self, image):
                return pixels(image) * 1.5
        else:

            def __call__(self, image):
                return pixels(image) * 2.5

    return Call()


def by_method(k):
    class Call:
        __slots__ = ("k",)

        def __init__(self):
            self.k = k

        def scaled(self, image):
            return pixels(image) * self.k

    return Call().scaled


def set_constant(k):
    names = {"a", "b", str(k)}
    return lambda image: pixels(image) * len(names)


def array_in_a_closure(k):
    means = np.full((3, 1, 1), k)
    return lambda image: pixels(image) - means


def of_torchvision(k):
    normalise = v2.Normalize([0.5] * 3, [float(k)] * 3)
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalise])


@pytest.mark.parametrize(
    "make",
    [
        keyword_only, partial, cached, called, by_method, set_constant, array_in_a_closure,
        of_torchvision,
    ],
)  # fmt: skip
def test_preprocessing_that_does_different_things(make):
    def of(k):
        return load_backbone("builtin", preprocessing=make(k)).fingerprint

    assert of(1) == of(1) != of(2)


def test_functions_and_constants_of_the_preprocessings_file(monkeypatch):
    def now():
        return load_backbone("builtin", preprocessing=reads_this_file).fingerprint

    before = now()
    assert now() == before
    monkeypatch.setattr(sys.modules[__name__], "GAIN", 3.0)
    found = {before, now()}
    monkeypatch.setattr(sys.modules[__name__], "SHIFT", v2.Lambda(lambda x: x + 1))
    found.add(now())
    monkeypatch.setattr(sys.modules[__name__], "pixels", lambda image: np.ones((3, 8, 8)))
    assert len(found | {now()}) == 4


class InFolder:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, image):
        return image[:8, :8].transpose(2, 0, 1) / 255


def test_equal_paths_count_as_equal():
    makers = Path("a/b"), Path("a") / "b", Path("a/c")
    first, same, other = (load_backbone(preprocessing=InFolder(p)).fingerprint for p in makers)
    assert first == same != other


def test_preprocessing_without_a_digest():
    lock = threading.Lock()

    def locked(image):
        with lock:
            return pixels(image)

    first, second = (load_backbone("builtin", preprocessing=locked) for _ in range(2))
    assert first.fingerprint != second.fingerprint
    assert first.preprocessing.identity == first.preprocessing.identity
    locked.fingerprint = "mine"
    first, second = (load_backbone("builtin", preprocessing=locked) for _ in range(2))
    assert first.fingerprint == second.fingerprint
