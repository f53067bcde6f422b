"""Networks as stages, and the embedding as what enters the head: every torchvision builder."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model_builder, get_model_weights, list_models

from sktransfer import load_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

BUILDERS = list_models(module=torchvision.models)
# Builder -> stage -> its number of parameters and buffers that are trained.
STAGES = json.loads(Path(__file__).with_name("stages.json").read_text())
# Where each family keeps its classification head.
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
MAX_PARAMETERS = 13e6  # beyond them values are compared in the slow run only


def is_large(name):
    return get_model_weights(name).DEFAULT.meta["num_params"] > MAX_PARAMETERS


def smallest_size(name):
    """The smallest input that a builder accepts and that no layer shrinks to nothing."""
    if name.startswith("maxvit"):
        return 224
    if name.startswith("vit_h"):
        return 28
    if name.startswith(("vit", "swin")):
        return 64
    return max(33, get_model_weights(name).DEFAULT.meta["min_size"][0])


def make(name):
    """A builder's network, if it can be without memory for its weights."""
    kwargs = {}
    if name.startswith("vit"):
        kwargs["image_size"] = smallest_size(name)
    if name in ("googlenet", "inception_v3"):
        kwargs.update(transform_input=True, aux_logits=False, init_weights=False)
    needs_values = name.startswith(("regnet", "swin"))
    with torch.device("cpu" if needs_values else "meta"):
        return get_model_builder(name)(weights=None, **kwargs)


def fill(module, variance=1.0):
    """Give a network on the meta device random weights, fast.

    Their variance keeps the values of deep networks neither vanishing nor chaotic, and batch
    norms get statistics that change what passes.
    """
    numbers = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for part in module.modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for key, tensor in own:
            if not tensor.is_floating_point():
                if tensor.is_meta:
                    part._buffers[key] = torch.zeros(tensor.shape, dtype=tensor.dtype)
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


def normalised(pixels):
    return torchvision.transforms.functional.normalize(
        pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )


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
    with torch.no_grad():
        expected, out = naive_embedding(name, module, normalised(pixels))
    backbone = load_backbone(module, preprocessing={"size": size, "crop": size})
    stages = backbone.stages
    with torch.no_grad():
        assert relative_error(stages.run(normalised(pixels)), out) < 1e-5
    assert {s.name: len(list(s.module.parameters())) for s in stages} == STAGES[name]
    (got,) = backbone.inference_module()(pixels)
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
    backbone = load_backbone(name, weights=None)
    assert backbone.stage_names == list(STAGES[name])
    module = backbone.network.source.build().to("meta")
    with torch.no_grad():
        x = torch.empty((2, *backbone.input_size), device="meta")
        expected, _ = naive_embedding(name, module, x)
    assert backbone.n_features == expected.shape[1]


def test_stages_of_the_built_in_network():
    stages = load_backbone("builtin").stages
    counts = {stage.name: len(list(stage.module.parameters())) for stage in stages}
    assert counts == STAGES["builtin"]


# -- own modules -----------------------------------------------------------------------------
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
        x = x.mean((2, 3))
        return self.linear(self.dropout(x))


def convolution(n_in, n_out):
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3), nn.BatchNorm2d(n_out), nn.ReLU())


def shared():
    relu = nn.ReLU()
    return nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Flatten())


SIZE = {"size": 32, "crop": 32}
POOL = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
CASES = {
    "residual": (CifarNet, ["stem", "layer1", "layer2", "layer3", "pool", "head"]),
    "chain": (
        lambda: nn.Sequential(convolution(3, 4), convolution(4, 5), *POOL, nn.Linear(5, 2)),
        ["stem", "1", "pool", "head"],
    ),
    "wrapped": (
        lambda: nn.Sequential(nn.Sequential(convolution(3, 9), convolution(9, 9)), *POOL,
                              nn.Dropout(), nn.Linear(9, 2)),
        ["stem", "0.1", "pool", "head"],
    ),
    "hidden layer": (
        lambda: nn.Sequential(convolution(3, 4), *POOL, nn.Linear(4, 5), nn.ReLU(),
                              nn.Linear(5, 2)),
        ["stem", "pool", "4", "head"],
    ),
    "perceptron": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 7), nn.ReLU(), nn.Linear(7, 2)),
        ["stem", "head"],
    ),
    "no head": (lambda: nn.Sequential(convolution(3, 4), convolution(4, 5)), ["stem", "1"]),
    "a layer": (lambda: nn.Conv2d(3, 4, 3), ["conv2d"]),
    "shared activation": (shared, None),
    "wrapped resnet": (
        lambda: nn.Sequential(torchvision.models.resnet18(), nn.ReLU()),
        ["stem", "layer1", "layer2", "layer3", "layer4", "pool", "head"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make_module", "names"), CASES.values(), ids=CASES)
def test_own_modules(make_module, names):
    module = make_module().eval()
    stages = load_backbone(module, preprocessing=SIZE).stages
    assert names is None or stages.names == names
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(stages.run(x), module(x), rtol=1e-6, atol=1e-6)


def test_a_changed_torchvision_network_keeps_its_stages():
    network = torchvision.models.resnet18()
    network.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 3))
    backbone = load_backbone(network, preprocessing=SIZE)
    assert backbone.stage_names == list(STAGES["resnet18"])
    assert backbone.n_features == 512


def test_stages_share_the_networks_layers():
    module, stages = load_backbone(CifarNet(), preprocessing=SIZE).copy_network()
    for stage in stages[3:]:
        stage.module.requires_grad_(True).train()
    assert not any(p.requires_grad for p in module.layer2.parameters())
    assert all(p.requires_grad for p in module.layer3.parameters())
    # Dropout just before the head belongs to it: what enters the head is never random.
    assert any(isinstance(part, nn.Dropout) for part in stages[-1].module.modules())
    assert not module.layer2[0].bn1.training
    assert module.layer3[0].bn1.training
    keys = [key for stage in stages for key in stage.module.state_dict()]
    assert sorted(keys) == sorted(module.state_dict())
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
        nn.Conv2d(3, 4, 3),
        nn.MaxPool2d(2),
        nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 8, 3)),
        nn.ReLU(inplace=True),
        *POOL,
        nn.Linear(8, 2),
    )
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for stage in load_backbone(module, preprocessing=SIZE).stages:
            before = x.clone()
            y = stage.module(x)
            assert torch.equal(x, before), stage.name
            x = y


def test_threads_use_modules_while_one_traces():
    other = nn.Sequential(nn.Linear(2, 3), nn.PReLU())
    expected = other(torch.ones(1, 2))
    seen = []

    class Slow(nn.Sequential):
        def forward(self, x):
            with ThreadPoolExecutor(1) as pool:  # while this is traced
                seen.append(pool.submit(other, torch.ones(1, 2)).result())
            return super().forward(x)

    network = Slow(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 2))
    assert load_backbone(network, preprocessing=SIZE).stage_names[-1] == "head"
    assert seen
    assert all(isinstance(found, torch.Tensor) and torch.equal(found, expected) for found in seen)


def test_threads_trace_at_once():
    call, getattr_ = nn.Module.__call__, nn.Module.__getattr__
    networks = [torchvision.models.squeezenet1_1(weights=None) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda network: load_backbone(network).stage_names, networks))
    assert found == [list(STAGES["squeezenet1_1"])] * 4
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, getattr_)


# -- timm ------------------------------------------------------------------------------------
TIMM = {
    "legacy_xception": ["stem", *(f"block{k}" for k in range(1, 13)), "act4", "pool", "head"],
    "resnet18": list(STAGES["resnet18"]),
    "vit_tiny_patch16_224": ["stem", *(f"blocks.{k}" for k in range(12)), "pool", "head"],
    "convnext_atto": ["stem", *(f"stages.{k}" for k in range(4)), "pool", "head"],
    "swin_tiny_patch4_window7_224": ["stem", *(f"layers.{k}" for k in range(4)), "pool", "head"],
}


@pytest.mark.parametrize(("name", "names"), TIMM.items(), ids=TIMM)
def test_timm(name, names):
    timm = pytest.importorskip("timm")
    module = timm.create_model(name, pretrained=False).eval()
    size = 224 if name.startswith(("vit", "swin")) else 64
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    preprocessing = {"size": size, "crop": size, "mean": (0.485, 0.456, 0.406)}
    preprocessing["std"] = (0.229, 0.224, 0.225)
    backbone = load_backbone(module, preprocessing=preprocessing)
    assert backbone.stage_names == names
    x = normalised(pixels)
    with torch.no_grad():
        expected = module.forward_head(module.forward_features(x), pre_logits=True)
        torch.testing.assert_close(backbone.stages.run(x), module(x), rtol=1e-5, atol=1e-5)
    (got,) = backbone.inference_module()(pixels)
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "ghostnet_050"])
def test_a_network_of_timm_without_its_head(name):
    timm = pytest.importorskip("timm")
    module = timm.create_model(name, num_classes=0).eval()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    (got,) = load_backbone(module, preprocessing={"size": 64}).inference_module()(pixels)
    with torch.no_grad():
        assert relative_error(got, module(normalised(pixels))) < 1e-5
