"""The network as it runs for inference: folded, channels-last, from uint8 pixels to rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sktransfer.networks._graph import is_patched

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def scale_and_shift(
    mean: Sequence[float], std: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 1×C×1×1 factors that normalise pixels of 0…255: x · scale + shift.

    `mean` and `std` are those of pixels in 0…1:
    (x / 255 - mean) / std = x · 1 / (255 std) - mean / std.
    """
    spread = torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1)
    centre = torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1)
    return (1 / (255 * spread)).float(), (-centre / spread).float()


class EmbeddingNetwork(nn.Module):
    """uint8 pixels in, one float32 row per image and layer out.

    Parameters
    ----------
    extractor : nn.Module
        Returns the layers' pooled values as a list; made by :func:`inference_copy`.
    mean, std : sequence of float, or None
        Of pixels in 0…1; None: the input comes normalised, as floats.
    dtype : torch.dtype
        What the network computes in.
    channels_last : bool
    """

    def __init__(
        self,
        extractor: nn.Module,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        dtype: torch.dtype,
        channels_last: bool,
    ):
        super().__init__()
        self.extractor = extractor
        self.dtype = dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.is_normalising = mean is not None
        if mean is not None and std is not None:
            scale, shift = scale_and_shift(mean, std)
            self.register_buffer("scale", scale, persistent=False)
            self.register_buffer("shift", shift, persistent=False)

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        if self.is_normalising:
            x = torch.addcmul(self.shift, x.float(), self.scale)
        x = x.to(self.dtype).contiguous(memory_format=self.memory_format)
        return self.extractor(x)


def inference_copy(
    network: fx.GraphModule, device: torch.device, dtype: torch.dtype, *, channels_last: bool
) -> fx.GraphModule:
    """A copy of `network` for inference alone; what it does not change it shares.

    Parameters
    ----------
    network : fx.GraphModule
        In eval mode. Neither its layers nor their tensors are altered.
    device, dtype
        Where and in what it will compute.
    channels_last : bool
        Whether convolutions keep their weights as N×H×W×C.
    """
    copied = fx.GraphModule(network, copy.deepcopy(network.graph))
    _fold_batch_norms(copied)
    done: dict[int, nn.Module] = {}
    for node in copied.graph.nodes:
        if node.op == "call_module":
            layer = copied.get_submodule(str(node.target))
            if id(layer) not in done:
                done[id(layer)] = _converted(layer, device, dtype, channels_last)
            copied.set_submodule(str(node.target), done[id(layer)])
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            holder = copied.get_submodule(owner)
            value = getattr(holder, name)
            if isinstance(value, torch.Tensor):
                _put_tensor(holder, name, _converted_tensor(value, device, dtype))
    copied.eval()
    return copied


def _fold_batch_norms(network: fx.GraphModule) -> None:
    """Fold each batch norm into the convolution that feeds it and nothing else.

    y = γ (W x + b - μ) / √(σ² + ε) + β is a convolution with W' = γ W / √(σ² + ε) and
    b' = β + γ (b - μ) / √(σ² + ε).
    """
    n_calls: dict[str, int] = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            n_calls[str(node.target)] = n_calls.get(str(node.target), 0) + 1
    layers = dict(network.named_modules(remove_duplicate=False))
    shared = _objects_in_several_places(network)
    for node in list(network.graph.nodes):
        if node.op != "call_module" or not isinstance(norm := layers[str(node.target)], _NORMS):
            continue
        before = node.args[0] if node.args else None
        if (
            not isinstance(before, fx.Node)
            or before.op != "call_module"
            or type(conv := layers[str(before.target)]) not in _CONVS
            or len(before.users) != 1
            or n_calls[str(before.target)] != 1
            or id(conv) in shared
            or is_patched(conv)
            or is_patched(norm)
            or norm.running_mean is None
            or norm.running_var is None
            or norm.training
        ):
            continue
        with torch.no_grad():
            network.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
        rest = _after_norm(norm)
        if rest is None:
            node.replace_all_uses_with(before)
            network.graph.erase_node(node)
        else:
            network.set_submodule(str(node.target), rest)
    network.graph.lint()
    network.recompile()
    network.delete_all_unused_submodules()


def _after_norm(norm: nn.Module) -> nn.Module | None:
    """What a layer that is more than a batch norm (timm's) does behind it."""
    rest = [child for child in norm.children() if not isinstance(child, (nn.Identity, *_NORMS))]
    return nn.Sequential(*rest) if rest else None


def _objects_in_several_places(network: fx.GraphModule) -> set[int]:
    seen: set[int] = set()
    twice: set[int] = set()
    for _, module in network.named_modules(remove_duplicate=False):
        (twice if id(module) in seen else seen).add(id(module))
    return twice


def _converted(
    layer: nn.Module, device: torch.device, dtype: torch.dtype, channels_last: bool
) -> nn.Module:
    tensors = [*layer.parameters(), *layer.buffers()]
    is_conv = channels_last and any(t.ndim == 4 for t in tensors)
    fits = all(t.device == device and t.dtype == dtype for t in tensors if t.is_floating_point())
    if fits and not is_conv:
        return layer
    layer = copy.deepcopy(layer).to(device=device, dtype=dtype)
    if is_conv:
        layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return layer.requires_grad_(False)


def _converted_tensor(
    value: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    moved = value.detach().to(device, dtype if value.is_floating_point() else value.dtype)
    return nn.Parameter(moved, requires_grad=False) if isinstance(value, nn.Parameter) else moved


def _put_tensor(holder: nn.Module, name: str, value: torch.Tensor) -> None:
    if name in holder._buffers:
        holder._buffers[name] = value
    else:
        setattr(holder, name, value)
