"""Packed convolutions equal plain ones; what is more than a convolution is left alone."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import fx, nn

from sktransfer import PretrainedFeatureExtractor, load_backbone
from sktransfer.networks import _inference as _networks
from sktransfer.networks import _packing
from sktransfer.networks._packing import PackedConv, can_pack, pack_convolutions

CAN_PACK = can_pack(torch.float32)
needs_kernels = pytest.mark.skipif(not CAN_PACK, reason="convolutions are packed on x86 alone")


def frozen(*args, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    conv = nn.Conv2d(*args, **kwargs).eval().requires_grad_(False)
    return conv.to(dtype).to(memory_format=torch.channels_last)


def is_packed(layer):
    """Whether weights were packed rather than the layer's own way kept."""
    return type(layer) is PackedConv and "_packed" in getattr(layer._run, "__qualname__", "")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((3, 16, 7), {"stride": 2, "padding": 3}),
        ((16, 32, 1), {"bias": False}),
        ((16, 16, 3), {"groups": 16, "padding": 1}),
        ((16, 32, 3), {"groups": 4, "padding": (1, 2), "stride": (2, 1)}),
        ((8, 12, 3), {"dilation": 2}),
        ((1, 5, (1, 7)), {"padding": (0, 3)}),
        ((6, 7, 3), {"padding": "same"}),
    ],
    ids=str,
)
def test_equals_the_plain_convolution(args, kwargs, dtype):
    conv = frozen(*args, **kwargs, dtype=dtype)
    packed = PackedConv(conv)
    with torch.inference_mode():
        for n, size in ((3, 30), (1, 30), (8, 21)):  # the first batch, and others
            x = torch.randn(n, args[0], size, size, dtype=dtype)
            for layout in (torch.channels_last, torch.contiguous_format):
                got = packed(x.contiguous(memory_format=layout))
                tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(got, conv(x), rtol=tolerance, atol=tolerance)
                assert got.dtype == dtype
    if dtype == torch.float32:
        assert is_packed(packed) == (kwargs.get("padding") != "same")
        assert packed.conv is None


class Odd(nn.Module):
    """Convolutions that are more than that, and one that is not."""

    def __init__(self):
        super().__init__()
        self.plain = frozen(3, 3, 3, padding=1)
        self.reflecting = frozen(3, 3, 3, padding=1, padding_mode="reflect")
        self.hooked, self.pre_hooked = frozen(3, 3, 1), frozen(3, 3, 1)
        self.hooked.register_forward_hook(lambda layer, args, result: result.clamp(0, 0.1))
        self.pre_hooked.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
        self.replaced = frozen(3, 3, 1)
        self.replaced.forward = lambda x: x + 1
        self.read = frozen(3, 3, 1)
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        x = self.plain(input=self.plain(x)).relu()
        x = self.hooked(self.reflecting(x)) + self.pre_hooked(x) + self.replaced(x)
        x = self.read(x) - self.read.bias.view(1, -1, 1, 1)
        return self.fc(x.mean((2, 3)))


def test_what_is_packed():
    network = fx.symbolic_trace(Odd().eval().requires_grad_(False))
    x = torch.randn(2, 3, 20, 20)
    expected = network(x)
    pack_convolutions(network)
    torch.testing.assert_close(network(x), expected)
    left_alone = ("reflecting", "hooked", "pre_hooked", "replaced", "read")
    assert all(type(getattr(network, name)) is nn.Conv2d for name in left_alone)
    if CAN_PACK:
        assert is_packed(network.plain)


@pytest.fixture
def many():
    return np.random.default_rng(0).integers(0, 256, (140, 24, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("backbone", ["resnet18", "odd"])
def test_many_images_through_a_network(backbone, many):
    odd = backbone == "odd"
    options = {"preprocessing": {"size": 24, "crop": 24}, "memory": False}
    options |= {} if odd else {"weights": None}
    extractor = PretrainedFeatureExtractor(Odd() if odd else backbone, **options).fit(many)
    got = extractor.transform(many)
    few = np.concatenate([extractor.transform(part) for part in np.split(many, 2)])
    np.testing.assert_allclose(got, few, rtol=1e-4, atol=1e-5 * np.abs(few).max())
    copies = extractor.backbone_.network._copies
    n_packed = [sum(map(is_packed, network.modules())) for network in copies.values()]
    if CAN_PACK:
        assert sorted(n_packed) == [0, 1 if odd else 20]  # the few are not worth it


def test_where_nothing_is_packed(monkeypatch):
    assert not can_pack(torch.float16)
    before = torch.backends.mkldnn.set_flags(False)
    try:
        assert not can_pack(torch.float32)
    finally:
        torch.backends.mkldnn.set_flags(before[0])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not can_pack(torch.float32)
    backbone = load_backbone("builtin")
    packed = backbone.inference_module(packed_for=(80, 80, 1))
    assert packed is backbone.inference_module()


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_a_torch_that_cannot(monkeypatch, error):
    class Missing:
        def __getattr__(self, name):
            raise error(name)

    conv = frozen(3, 4, 3)
    packed = PackedConv(conv)
    monkeypatch.setattr(_packing.torch, "ops", Missing())
    x = torch.randn(2, 3, 9, 9)
    for _ in range(2):
        torch.testing.assert_close(packed(x), conv(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_threads_at_the_first_batch(dtype):
    conv = frozen(8, 8, 3, dtype=dtype)
    x = torch.randn(2, 8, 12, 12, dtype=dtype)
    expected = conv(x)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            packed = PackedConv(copy.deepcopy(conv))
            for got in pool.map(packed, [x] * 8):
                torch.testing.assert_close(got, expected)


def test_the_network_itself_is_left_as_it_is(many):
    extractor = PretrainedFeatureExtractor("resnet18", weights=None, memory=False).fit(many)
    before = {k: v.clone() for k, v in extractor.backbone_.network.module.state_dict().items()}
    extractor.transform(many)
    after = load_backbone("resnet18", weights=None).network.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert len(list(extractor.backbone_.inference_module().parameters())) > 0
    _networks.clear_networks()
