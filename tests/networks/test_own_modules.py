"""Modules of the user's own: told apart by all they do, left as they are, run as they would."""

import functools
import importlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from sktransfer import load_backbone
from sktransfer.networks._fingerprint import architecture_digest, digest_of
from sktransfer.networks._preprocessing import CallablePreprocessing
from sktransfer.networks._stages import split_stages

pytestmark = pytest.mark.usefixtures("one_thread")

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8))
AS_IS = {"size": 32, "crop": 32, "mean": (0.0,) * 3, "std": (1.0,) * 3}
GAIN = 1.0


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
    return torch.cat(backbone.embed_batch(PIXELS), dim=1)


def fingerprint(module):
    return load_backbone(module, preprocessing=AS_IS).fingerprint


def expected(module):
    with torch.no_grad():
        return module.eval()(PIXELS / 255)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- told apart ------------------------------------------------------------------------------
def tensor_attribute(k):
    class Net(Base):
        def forward(self, x):
            return self.embedded(x) * self.scale

    return Net(scale=torch.tensor(k))


def inline_tensor(k):
    class Net(Base):
        def forward(self, x):
            return self.embedded(x - torch.tensor([k, 2.0, 3.0]).view(1, 3, 1, 1))

    return Net()


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


def in_a_list(k):
    class Net(Branching):
        def gain(self):
            return self.gains[0]

    return Net(gains=[k])


def private_in_a_dict(k):
    class Net(Branching):
        def gain(self):
            return self._settings["k"]

    return Net(_settings={"k": k})


def edited_method(k):
    class One(Branching):
        def gain(self):
            return 1.5

    class Two(Branching):
        def gain(self):
            return 2.5

    One.__qualname__ = Two.__qualname__ = "Net"
    return One() if k == 1 else Two()


def closure(k):
    class Net(Branching):
        def gain(self):
            return k

    return Net()


def class_attribute(k):
    class Net(Branching):
        factor = k

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


def hook_before_a_norm(k):
    module = Base()
    module.conv.register_forward_hook(lambda layer, args, out: out * k)
    module.conv = nn.Sequential(module.conv, nn.BatchNorm2d(4))
    module.conv[1].running_mean.fill_(0.5)
    return module


MAKERS = [
    tensor_attribute, inline_tensor, hook, layer_hook, pre_hook, instance_forward, layer_forward,
    in_a_list, private_in_a_dict, edited_method, closure, class_attribute, norm_of_its_own,
    hook_before_a_norm,
]  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
def test_modules_that_do_different_things(make):
    one, two = make(1.0), make(5.0)
    close(embed(one), expected(one))
    close(embed(two), expected(two))
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(two) == fingerprint(make(5.0))


def test_a_global_that_forward_reads(monkeypatch):
    class Net(Branching):
        def gain(self):
            return GAIN

    before = fingerprint(Net())
    assert fingerprint(Net()) == before
    monkeypatch.setattr(sys.modules[__name__], "GAIN", 3.0)
    assert fingerprint(Net()) != before
    close(embed(Net()), 3 * embed(Base()))


def test_what_was_changed_on_the_module():
    module = tensor_attribute(1.0)
    first = embed(module)
    module.scale.fill_(7.0)
    close(embed(module), 7 * first)
    handle = module.register_forward_hook(lambda layer, args, out: out + 1)
    close(embed(module), 7 * first + 1)
    handle.remove()
    close(embed(module), 7 * first)


def test_what_cannot_be_digested_is_never_shared():
    module = Branching(rows=iter([1, 2]), strange=(n for n in range(3)))
    assert architecture_digest(module) != architecture_digest(module)
    assert digest_of(module.strange) != digest_of(module.strange)


def test_modes_and_use_change_no_fingerprint():
    module = Base(tags={"a", "b"}, lock=threading.Lock())
    module.conv = nn.Sequential(module.conv, nn.Dropout())
    before = architecture_digest(module)
    module.eval()(PIXELS / 255)
    assert architecture_digest(module) == before
    module.requires_grad_(False)
    assert architecture_digest(module) == before


SCRIPT = """
import functools, torch, torchvision
from torch import nn
from sktransfer.networks._fingerprint import architecture_digest, digest_of
NAMES = {"alpha", "beta", "gamma", "delta"}
class Net(nn.Module):
    kinds = frozenset(NAMES)
    def __init__(self):
        super().__init__()
        self.lstm, self.tags = nn.LSTM(3, 4), {"p", "q", "r"}
        self.act = functools.partial(nn.functional.leaky_relu, negative_slope=0.1)
        self.pool, self.parent, self.dtype = nn.functional.max_pool2d, [self], torch.float32
        self.handle = self.lstm.register_forward_hook(self.keep)
    def keep(self, layer, args, out): pass
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x) if len(NAMES) in self.kinds or x in {"u", "v"} else x
nets = [Net(), torchvision.models.mobilenet_v3_small(), torchvision.models.swin_t()]
nets.append(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
print([architecture_digest(net) for net in nets], digest_of(Net.forward))
"""


def test_digests_are_those_of_every_process():
    runs = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != ""


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
        lambda: inline_tensor(1.0),
    ],
    ids=["keeping", "appending", "summing", "counting", "counting-in-python", "inline"],
)
def test_modules_are_left_as_they_were(make):
    module = make().train()
    before = dict(vars(module)), digest_of(module)
    backbone = load_backbone(module, preprocessing=AS_IS)
    got = torch.cat(backbone.embed_batch(PIXELS), dim=1)
    assert vars(module).keys() == before[0].keys()
    assert digest_of(module) == before[1]
    assert fingerprint(module) == backbone.fingerprint
    close(got, expected(make()))


def test_stages_read_the_constants_that_forward_makes():
    module = nn.Sequential(inline_tensor(1.0), nn.Linear(4, 2))
    stages = split_stages(module, (3, 32, 32))
    x = PIXELS / 255
    close(stages.run(x), module(x))
    assert "_tensor_constant0" not in vars(module)


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


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_old_weight_norm():
    module = Base()
    module.conv = nn.utils.weight_norm(module.conv)
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
    results.put(torch.cat(backbone.embed_batch(PIXELS), dim=1).numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_fork_while_another_thread_runs_the_network():
    module = Slow()
    backbone = load_backbone(module, preprocessing=AS_IS)
    right = torch.cat(backbone.embed_batch(PIXELS), dim=1).numpy()
    stop = threading.Event()

    def run():
        while not stop.is_set():
            backbone.embed_batch(PIXELS)

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
        (nn.Identity, ValueError, "Identity returns the picture as it gets it: a network with"),
        (Collapsing, ValueError, r"of Collapsing gives values of shape \(1, 4\) for two pictures"),
        (CollapsingUntraced, ValueError, r"'output' of Coll.* shape \(1, 4\) for two pictures"),
        (lambda: Base().double(), ValueError, r"torch.float64 \('conv'\): give a float32 module"),
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


# -- preprocessing ---------------------------------------------------------------------------
def helper(image):
    return image * GAIN


def through_helper(image):
    return helper(image)


def keyword_only(k):
    def function(image, *, factor=k):
        return image * factor

    return function


def partial(k):
    return functools.partial(keyword_only(k), offset=1)


def called(k):
    class Call:
        if k == 1:

            def __call__(self, image):
                return image * 1.5
        else:

            def __call__(self, image):
                return image * 2.5

    return Call()


def by_method(k):
    class Call:
        def __init__(self):
            self.k = k

        def scaled(self, image):
            return image * self.k

    return Call().scaled


def set_constant(k):
    names = {"a", "b", str(k)}
    return lambda image: image if image in names else 0


def identity(function):
    return CallablePreprocessing(function).identity


@pytest.mark.parametrize("make", [keyword_only, partial, called, by_method, set_constant])
def test_preprocessing_that_does_different_things(make):
    assert identity(make(1)) == identity(make(1)) != identity(make(2))


def test_globals_that_preprocessing_reads(monkeypatch):
    before = identity(through_helper)
    assert identity(through_helper) == before
    monkeypatch.setattr(sys.modules[__name__], "GAIN", 3.0)
    between = identity(through_helper)
    assert between != before
    monkeypatch.setattr(sys.modules[__name__], "helper", lambda image: image)
    assert identity(through_helper) not in (before, between)


@pytest.fixture
def helper_folder(tmp_path, monkeypatch):
    """A folder from which modules are imported, their source read anew each time."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def script(text):
    """What a script of this text defines."""
    namespace = {"__name__": "user_script"}
    exec(text, namespace)
    return namespace


HELPERS = {
    "helper_gain.py": "gain = 1.0\n",
    "helper_behind.py": "import helper_gain\n",
    "helper_package/__init__.py": "",
    "helper_package/tools.py": "gain = 1.0\n",
    "helper_package/lazy.py": "def use(x):\n    from .tools import gain\n    return x * gain\n",
}
USES = """
def by_name(image):
    import helper_gain
    return image * helper_gain.gain

def by_from(image):
    from helper_gain import gain
    return image * gain

def by_alias(image):
    helper = helper_behind.helper_gain
    return image * helper.gain

def by_path(image):
    return image * helper_package.tools.gain

def by_submodule(image):
    from helper_package import tools
    return image * tools.gain

def by_relative(image):
    return lazy.use(image)

import helper_behind, helper_package.tools
from helper_package import lazy
"""
USERS = ["by_name", "by_from", "by_alias", "by_path", "by_submodule", "by_relative"]


def test_modules_that_preprocessing_imports(helper_folder):
    """Wherever in them, and as whatever, functions take something of the user's own modules."""
    (helper_folder / "helper_package").mkdir()

    def identities(changed=None):
        for name, text in HELPERS.items():
            text = text.replace("1.0", "0.3") if name == changed else text
            (helper_folder / name).write_text(text)
        for name in [name for name in sys.modules if name.startswith("helper_")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        namespace = script(USES)
        found = {user: identity(namespace[user]) for user in USERS}
        assert found == {user: identity(namespace[user]) for user in USERS}
        return found

    before = identities()
    assert identities() == before
    for changed in ("helper_gain.py", "helper_package/tools.py"):
        now = identities(changed)
        is_of_gain = changed == "helper_gain.py"
        for user, is_user_of_gain in zip(USERS, [True] * 3 + [False] * 3, strict=True):
            assert (now[user] != before[user]) == (is_user_of_gain == is_of_gain), user


def test_imports_are_read_and_not_run(helper_folder):
    path = helper_folder / "helper_exits.py"
    use = script("def use(image, fails=False):\n    if fails:\n        import helper_exits")["use"]
    found = []
    for text in ("raise SystemExit", "raise SystemExit  # changed", "not ( Python"):
        path.write_text(text)
        found.append(identity(use))
    assert len(set(found)) == 3
    assert "helper_exits" not in sys.modules


def test_a_module_is_what_was_loaded(helper_folder):
    """An edit that was not loaded again is not what runs."""
    path = helper_folder / "helper_edited.py"
    path.write_text("import numpy\nMEAN = numpy.zeros(3)\n")
    text = "def use(image):\n    from helper_edited import MEAN\n    return image - MEAN"
    use = script(text)["use"]
    use(np.zeros(3))
    before = identity(use)
    path.write_text("import numpy\nMEAN = numpy.ones(3)\n")
    assert identity(use) == before
    importlib.invalidate_caches()
    importlib.reload(sys.modules["helper_edited"])
    assert identity(use) != before
    del sys.modules["helper_edited"]


def test_imports_in_long_code(helper_folder):
    text = "def use(image):\n" + "".join(f"    image.a{k} = {k}.5\n" for k in range(400))
    use = script(text + "    from helper_far import gain\n    return gain")["use"]
    found = set()
    for gain in (1, 2):
        (helper_folder / "helper_far.py").write_text(f"gain = {gain}")
        importlib.invalidate_caches()
        found.add(identity(use))
    assert len(found) == 2


def test_preprocessing_without_a_digest():
    rows = (n for n in range(3))
    with pytest.raises(ValueError, match=r"preprocessing uses <generator .* of which no digest"):
        _ = identity(lambda image: next(rows))
    function = keyword_only(1)
    function.fingerprint = "mine"
    assert identity(function) == "callable:mine"
