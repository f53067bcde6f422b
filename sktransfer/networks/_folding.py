"""The network as it runs for inference: folded, channels-last, from uint8 pixels to rows."""

from __future__ import annotations

import copy
from collections import Counter
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
    """A copy of `network` for inference alone.

    Parameters
    ----------
    network : fx.GraphModule
        In eval mode. Neither its layers nor their tensors are altered.
    device, dtype
        Where and in what it will compute.
    channels_last : bool
        Whether convolutions keep their weights as N×H×W×C.
    """
    folded = fx.GraphModule(network, copy.deepcopy(network.graph))
    _fold_batch_norms(folded)
    copied = copy.deepcopy(folded).to(device=device, dtype=dtype)
    for layer in copied.modules():
        if channels_last and isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied.eval().requires_grad_(False)


def _fold_batch_norms(network: fx.GraphModule) -> None:
    """Fold each batch norm into the convolution that feeds it and nothing else.

    y = γ (W x + b - μ) / √(σ² + ε) + β is a convolution with W' = γ W / √(σ² + ε) and
    b' = β + γ (b - μ) / √(σ² + ε).
    """
    layers = dict(network.named_modules(remove_duplicate=False))
    calls = [layers[str(n.target)] for n in network.graph.nodes if n.op == "call_module"]
    n_calls = Counter(map(id, calls))
    for node in list(network.graph.nodes):
        before = node.args[0] if node.args else None
        if not (
            node.op == "call_module"
            and isinstance(before, fx.Node)
            and before.op == "call_module"
            and len(before.users) == 1
        ):
            continue
        conv, norm = layers[str(before.target)], layers[str(node.target)]
        if not (
            isinstance(norm, _NORMS)
            and norm.forward.__module__.startswith(("torch.", "timm."))  # no code of a user's
            and type(conv) in _CONVS
            and n_calls[id(conv)] == 1
            and norm.running_mean is not None
            and not is_patched(conv)
            and not is_patched(norm)
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
