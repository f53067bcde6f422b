"""Packed convolutions equal plain ones, whatever their settings, and give way where they cannot."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import fx, nn

from sktransfer import load_backbone
from sktransfer._zoo import _networks, _packing
from sktransfer._zoo._packing import PackedConv, pack_convolutions

needs_kernels = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not _packing._has_wide_registers(),
    reason="convolutions are packed on x86 alone",
)


def frozen(*args, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    conv = nn.Conv2d(*args, **kwargs).eval().requires_grad_(False)
    return conv.to(dtype).to(memory_format=torch.channels_last)


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
        ((6, 7, 3), {"padding": "valid"}),
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


@needs_kernels
def test_weights_are_held_once():
    packed = PackedConv(frozen(3, 4, 3))
    packed(torch.randn(1, 3, 9, 9))
    assert packed.conv is None


def test_what_is_packed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = frozen(3, 4, 3)
            self.reflecting = frozen(4, 4, 3, padding=1, padding_mode="reflect")
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(self.reflecting(self.plain(self.plain(x)[:, :3])).mean((2, 3)))

    network = fx.symbolic_trace(Net().eval().requires_grad_(False))
    x = torch.randn(2, 3, 20, 20)
    expected = network(x)
    before = copy.deepcopy(network)
    pack_convolutions(network)
    if torch.backends.mkldnn.is_available() and _packing._has_wide_registers():
        assert type(network.plain) is PackedConv
    assert type(network.reflecting) is nn.Conv2d
    assert type(before.plain) is nn.Conv2d
    torch.testing.assert_close(network(x), expected)


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


@needs_kernels
def test_many_threads_at_the_first_batch():
    conv = frozen(8, 8, 3)
    x = torch.randn(2, 8, 12, 12)
    expected = conv(x)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            packed = PackedConv(conv)
            for got in pool.map(packed, [x] * 8):
                torch.testing.assert_close(got, expected)


def test_the_network_itself_is_left_as_it_is(monkeypatch):
    backbone = load_backbone("resnet18", weights=None)
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    _networks.clear_networks()
    got = backbone.embed_batch(x)[0]
    assert not any(isinstance(m, PackedConv) for m in backbone.network.module.modules())
    monkeypatch.setattr(_networks, "pack_convolutions", lambda network: None)
    backbone.network._copies.clear()
    torch.testing.assert_close(backbone.embed_batch(x)[0], got, rtol=1e-5, atol=1e-6)
