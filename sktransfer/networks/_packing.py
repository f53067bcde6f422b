"""Convolutions on a CPU whose weights lie as its kernels read them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from sktransfer.networks._copies import is_patched


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine gains by packed convolutions."""
    mkldnn = torch.backends.mkldnn
    has_wide_registers = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    is_on = mkldnn.is_available() and mkldnn.enabled
    return bool(is_on and has_wide_registers and dtype in (torch.float32, torch.bfloat16))


def pack_convolutions(network: fx.GraphModule) -> None:
    """Replace a network's convolutions by packed ones.

    Those that are more than a convolution stay: subclasses, and what has hooks, another
    ``forward`` or tensors that the graph reads as well.
    """
    are_read = {
        str(node.target).rpartition(".")[0] for node in network.graph.nodes if node.op == "get_attr"
    }
    done: dict[int, PackedConv] = {}
    for node in network.graph.nodes:
        path = str(node.target)
        if node.op != "call_module" or path in are_read:
            continue
        layer = network.get_submodule(path)
        is_plain = type(layer) is nn.Conv2d and layer.padding_mode == "zeros"
        if is_plain and not is_patched(layer):
            if id(layer) not in done:
                done[id(layer)] = PackedConv(layer)
            network.set_submodule(path, done[id(layer)])


class PackedConv(nn.Module):
    """A convolution whose weights are brought into oneDNN's blocks once, not in every call.

    The blocks are those for the height, width and number of torch threads of the first batch:
    other ones give the same numbers, but slowly. The operators are those that ``torch.compile``
    makes use of on a CPU. Where torch lacks them, or refuses these settings, the convolution is
    computed as ever.

    Parameters
    ----------
    conv : nn.Module
        A plain Conv2d, frozen, on the CPU. It is let go when its weights are packed.
    """

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv: nn.Module | None = conv
        self._run: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # In this order: another thread puts `_run` there before it takes `conv` away.
        conv, run = self.conv, self._run
        if run is None:
            assert conv is not None
            run = self._run = _packed(conv, input)
            self.conv = None
        return run(input)


def _packed(conv: nn.Module, first: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What computes `conv`, quickest for batches like the first."""
    settings = (conv.padding, conv.stride, conv.dilation, conv.groups)
    bias = conv.bias
    try:
        weight = torch.ops.mkldnn._reorder_convolution_weight(
            conv.weight, *settings, list(first.shape)
        )

        def run(x: torch.Tensor) -> torch.Tensor:
            return torch.ops.mkldnn._convolution_pointwise(
                x, weight, bias, *settings, "none", [], ""
            )

        run(first[:1])
    except (AttributeError, RuntimeError, TypeError):
        return conv.forward
    return run
