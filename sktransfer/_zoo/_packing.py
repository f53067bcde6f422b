"""Convolutions on a CPU whose weights lie as its kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn


def pack_convolutions(network: fx.GraphModule) -> None:
    """Replace a network's convolutions by packed ones where those are known to be faster."""
    if not torch.backends.mkldnn.is_available() or not _has_wide_registers():
        return
    done: dict[int, PackedConv] = {}
    for node in network.graph.nodes:
        if node.op != "call_module":
            continue
        layer = network.get_submodule(str(node.target))
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
            if id(layer) not in done:
                done[id(layer)] = PackedConv(layer)
            network.set_submodule(str(node.target), done[id(layer)])


def _has_wide_registers() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


class PackedConv(nn.Module):
    """A convolution whose weights are brought into oneDNN's blocks once, not in every call.

    That is done for the shape of the first batch; other batches may be of any size. The
    operators are those that ``torch.compile`` makes use of on a CPU. Where torch lacks them, or
    refuses these settings, the convolution is computed as ever.

    Parameters
    ----------
    conv : nn.Conv2d
        Frozen, on the CPU. It is let go when its weights are packed.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv: nn.Conv2d | None = conv
        self._run: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In this order: another thread puts `_run` there before it takes `conv` away.
        conv, run = self.conv, self._run
        if run is None:
            assert conv is not None
            run = self._run = _packed(conv, x)
            self.conv = None
        return run(x)


def _packed(conv: nn.Conv2d, x: torch.Tensor) -> Any:
    """What computes `conv`, quickest for batches like `x`."""
    settings = (conv.padding, conv.stride, conv.dilation, conv.groups)
    bias = conv.bias
    try:
        weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *settings, list(x.shape))

        def run(x: torch.Tensor) -> torch.Tensor:
            return torch.ops.mkldnn._convolution_pointwise(
                x, weight, bias, *settings, "none", [], ""
            )

        run(x[:1])
    except (AttributeError, RuntimeError, TypeError):
        return conv
    return run
