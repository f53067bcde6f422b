"""Networks as stages, and the embedding as what enters the head: every torchvision builder."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model_builder, get_model_weights, list_models

from sktransfer.networks._backbone import Backbone
from sktransfer.networks._inference import clear_networks
from sktransfer.networks._preprocessing import Preprocessing
from sktransfer.networks._source import Source, skeleton
from sktransfer.networks._stages import split_stages

BUILDERS = list_models(module=torchvision.models)
# Where each family keeps its classification head. The reference knows nothing of tracing.
HEADS = {
    r"(resnet|resnext|wide_resnet|regnet|googlenet|inception|shufflenet)": "fc",
    r"(alexnet|vgg)": "classifier.6",
    r"squeezenet": "classifier.1",
    r"densenet": "classifier",
    r"(efficientnet|mobilenet_v2|mnasnet)": "classifier.1",
    r"mobilenet_v3": "classifier.3",
    r"convnext": "classifier.2",
    r"maxvit": "classifier.5",
    r"swin": "head",
    r"vit": "heads.head",
}
# Beyond this many parameters values are compared in the slow run only, shapes always.
MAX_PARAMETERS = 70e6


def is_large(name):
    return get_model_weights(name).DEFAULT.meta["num_params"] > MAX_PARAMETERS


def smallest_size(name):
    """The smallest input that a builder accepts and that no layer shrinks to nothing."""
    if name.startswith("vit_h"):
        return 28
    if name.startswith("vit"):
        return 64
    if name.startswith("maxvit"):
        return 224
    if name.startswith("swin"):
        return 64
    return max(33, get_model_weights(name).DEFAULT.meta["min_size"][0])


def make(name):
    """A builder's network without memory for its weights."""
    kwargs = {}
    if name.startswith("vit"):
        kwargs["image_size"] = smallest_size(name)
    if name in ("googlenet", "inception_v3"):
        kwargs.update(transform_input=True, aux_logits=False, init_weights=False)
    return skeleton(lambda: get_model_builder(name)(weights=None, **kwargs))


def fill(module, variance=1.0):
    """Give a network that stands on the meta device random weights, fast.

    Their variance keeps the values of deep networks neither vanishing nor chaotic, and batch
    norms get statistics that change what passes.
    """
    numbers = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for part in module.modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for key, tensor in own:
            if not tensor.is_floating_point():
                continue
            values = numbers.repeat(-(-tensor.numel() // len(numbers)))[: tensor.numel()]
            values = values.view(tensor.shape)
            if key == "running_var" or (tensor.ndim == 1 and key == "weight"):
                values = 0.75 + 0.5 * torch.sigmoid(values)
            elif tensor.ndim >= 2:
                values = values * (variance / tensor[0].numel()) ** 0.5
            else:
                values = 0.1 * values
            if key in part._buffers:
                part._buffers[key] = values
            else:
                part._parameters[key] = nn.Parameter(values)
    return module.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def no_networks_left(one_thread):
    yield
    clear_networks()  # of the test: some hold gigabytes


class Given(Source):
    """A network that the test made."""

    def __init__(self, name, module, size):
        self.name, self.module, self.digest = name, module, f"test:{id(module)}"
        self.preprocessing = Preprocessing(size=size, crop=size)

    def build(self):
        return self.module

    def load(self, module, head_layers):
        pass


def naive_embedding(name, module, x):
    """What enters the head, caught by a hook; of a map the mean over its places."""
    head = next(path for family, path in HEADS.items() if re.match(family, name))
    caught = []
    hook = module.get_submodule(head).register_forward_pre_hook(
        lambda _, args: caught.append(args[0])
    )
    out = module(x)
    hook.remove()
    (entering,) = caught
    return entering.mean((2, 3)) if entering.ndim == 4 else entering, out


def relative_error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def check_by_value(name):
    size = smallest_size(name)
    # Without shortcuts, every ReLU halves what passes.
    has_shortcuts = not re.match(r"alexnet|vgg|squeezenet|googlenet|inception", name)
    variance = 1.0 if has_shortcuts else 2.0
    if name == "efficientnet_v2_l":
        variance = 0.5  # seventy-nine blocks, each adding to the last
    module = fill(make(name), variance)
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    x = torchvision.transforms.functional.normalize(
        pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    with torch.no_grad():
        expected, out = naive_embedding(name, module, x)
    backbone = Backbone(Given(name, module, size), None, "auto", Preprocessing(size, size))
    with torch.no_grad():
        assert relative_error(backbone.stages.run(x), out) < 1e-5
    (got,) = backbone.embed_batch(pixels)
    assert got.dtype == torch.float32
    assert got.shape == (2, backbone.n_features)
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("name", [name for name in BUILDERS if not is_large(name)])
def test_embedding_and_stages_equal_the_network(name):
    check_by_value(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUILDERS if is_large(name)])
def test_embedding_and_stages_equal_the_network_where_it_is_large(name):
    check_by_value(name)


@pytest.mark.parametrize("name", [name for name in BUILDERS if is_large(name)])
def test_large_networks_by_shape(name):
    size = smallest_size(name)
    module = make(name)
    module.to("meta")
    x = torch.empty((2, 3, size, size), device="meta")
    with torch.no_grad():
        expected, out = naive_embedding(name, module, x)
        stages = split_stages(module, (3, size, size))
        assert stages.run(x).shape == out.shape
        assert stages[:-1].run(x).shape[:2] == expected.shape
    backbone = Backbone(Given(name, module, size), None, "auto", Preprocessing(size, size))
    assert backbone.n_features == expected.shape[1]


# -- how stages are called and used ----------------------------------------------------------
def test_names_of_stages():
    def names(name):
        size = smallest_size(name)
        return split_stages(make(name), (3, size, size)).names

    assert names("resnet50") == ["stem", "layer1", "layer2", "layer3", "layer4", "pool", "head"]
    blocks = [f"denseblock{k}" for k in (1, 2, 3, 4)]
    assert names("densenet121") == ["stem", *blocks, "pool", "head"]
    layers = [f"encoder_layer_{k}" for k in range(12)]
    assert names("vit_b_32") == ["stem", *layers, "pool", "head"]
    hidden = ["classifier.1", "classifier.4"]
    assert names("vgg11")[-4:] == ["pool", *hidden, "head"]
    assert names("squeezenet1_1")[-1] == "head"
    assert names("convnext_tiny")[1:-2] == ["features.1", "features.3", "features.5", "features.7"]


def test_every_builder_has_stages_to_unfreeze():
    for name in ("alexnet", "mobilenet_v3_small", "maxvit_t", "googlenet", "mnasnet0_5"):
        size = smallest_size(name)
        stages = split_stages(make(name), (3, size, size))
        assert len(stages) >= 5
        assert sum(stages.n_parameters) == sum(p.numel() for p in make(name).parameters())


class Residual(nn.Module):
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.stride, self.n_more = stride, n_out - n_in

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, 0, self.n_more))
        return torch.relu(self.bn2(self.conv2(y)) + shortcut)


class CifarNet(nn.Module):
    """A ResNet-20 as for CIFAR: shortcuts without parameters, functional pooling."""

    def __init__(self, n=3, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)

        def stage(n_in, n_out, stride):
            return nn.Sequential(
                Residual(n_in, n_out, stride), *(Residual(n_out, n_out, 1) for _ in range(n - 1))
            )

        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = nn.functional.avg_pool2d(x, x.shape[3]).flatten(1)
        return self.linear(self.dropout(x))


class Branching(nn.Module):
    """Decides by the pixels' values: no graph can hold it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3)
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        x = self.first(x)
        if x.mean() > 0:
            x = torch.relu(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (CifarNet(), ["stem", "layer1", "layer2", "layer3", "pool", "head"]),
        (Branching(), ["body", "head"]),
        (nn.Sequential(Branching(), nn.ReLU(), nn.Linear(2, 3)), ["1", "head"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7), nn.ReLU(), nn.Linear(7, 2)), None),
        (nn.Conv2d(3, 4, 3), None),
    ],
    ids=["residual", "branching", "branching-chain", "perceptron", "layer"],
)
def test_own_modules(module, names):
    module.eval()
    x = torch.randn(3, 3, 32, 32)
    stages = split_stages(module, (3, 32, 32))
    assert names is None or stages.names == names
    with torch.no_grad():
        torch.testing.assert_close(stages.run(x), module(x), rtol=1e-6, atol=1e-6)
        k = len(stages) // 2
        kept = stages[:k].run(x)
        torch.testing.assert_close(stages[k:].run(kept), module(x), rtol=1e-6, atol=1e-6)


def test_stages_share_the_networks_layers():
    module = CifarNet()
    stages = split_stages(module, (3, 32, 32))
    stages.freeze(3)
    assert not any(p.requires_grad for p in module.layer2.parameters())
    assert all(p.requires_grad for p in module.layer3.parameters())
    # Dropout just before the head belongs to it: what is kept before it is never random.
    assert any(isinstance(part, nn.Dropout) for part in stages["head"].module.modules())
    assert not module.layer2[0].bn1.training
    assert module.layer3[0].bn1.training
    before = {key: value.clone() for key, value in module.state_dict().items()}
    stages.run(torch.randn(4, 3, 32, 32)).sum().backward()
    assert module.layer3[0].conv1.weight.grad is not None
    assert module.layer1[0].conv1.weight.grad is None
    after = module.state_dict()
    frozen = [key for key in after if key.startswith(("conv1", "bn1", "layer1", "layer2"))]
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    assert not torch.equal(before["layer3.0.bn1.running_mean"], after["layer3.0.bn1.running_mean"])


def test_stages_do_not_write_over_what_they_are_given():
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 3, 2),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    stages = split_stages(module, (3, 64, 64))
    assert stages.names[:2] == ["stem", "4"]
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        for stage in stages:
            before = x.clone()
            y = stage.module(x)
            assert torch.equal(x, before), stage.name
            x = y


def test_stages_by_name():
    stages = split_stages(CifarNet(), (3, 32, 32))
    assert stages.until("layer1").names == ["stem", "layer1"]
    assert stages.after("layer3").names == ["pool", "head"]
    assert stages["layer2"].name == "layer2"
    with pytest.raises(ValueError, match=r"no stage 'layer9'; the stages are \['stem'"):
        stages.until("layer9")


def test_threads_use_modules_while_one_traces():
    other = nn.Sequential(nn.Linear(2, 3), nn.PReLU())
    x = torch.ones(1, 2)
    expected = other(x)
    seen = []

    class Slow(nn.Sequential):
        def forward(self, x):
            with ThreadPoolExecutor(1) as pool:  # while this is traced
                seen.append(pool.submit(other, torch.ones(1, 2)).result())
            return super().forward(x)

    network = Slow(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2))
    assert split_stages(network, (3, 5, 5)).names[-1] == "head"
    assert seen
    assert all(isinstance(found, torch.Tensor) and torch.equal(found, expected) for found in seen)


def test_threads_trace_at_once():
    call, getattr_ = nn.Module.__call__, nn.Module.__getattr__
    networks = [torchvision.models.squeezenet1_1(weights=None) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda network: split_stages(network).names, networks))
    assert found == [found[0]] * 4
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, getattr_)


def test_tracing_leaves_the_module_as_it_was():
    module = CifarNet().train()
    module.layer1.eval()
    split_stages(module, (3, 32, 32))
    assert module.training
    assert module.layer2.training
    assert not module.layer1.training


@pytest.mark.parametrize(
    "name", ["legacy_xception", "mobilenetv1_100", "vit_tiny_patch16_224", "convnext_atto"]
)
def test_timm(name):
    timm = pytest.importorskip("timm")
    module = timm.create_model(name, pretrained=False).eval()
    size = 224 if name.startswith("vit") else 64
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    backbone = Backbone(Given(name, module, size), None, "auto", Preprocessing(size, size))
    assert len(backbone.stages) >= 6
    x = torchvision.transforms.functional.normalize(
        pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    with torch.no_grad():
        expected = module.forward_head(module.forward_features(x), pre_logits=True)
        torch.testing.assert_close(backbone.stages.run(x), module(x), rtol=1e-5, atol=1e-5)
    (got,) = backbone.embed_batch(pixels)
    assert relative_error(got, expected) < 1e-5
