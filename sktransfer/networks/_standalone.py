"""A fitted model as one torch module from pixels to predictions, for other programs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from sktransfer.networks._blocks import END, LAST_STATES, BlockExtractor, SplitModel
from sktransfer.networks._inference import Normalisation, inference_copy
from sktransfer.networks._preprocessing import Preprocessing

if TYPE_CHECKING:
    from sktransfer.networks._backbone import Backbone


class StandaloneModule(nn.Module):
    """Computes what a fitted model returns for images; see :func:`sktransfer.to_module`.

    Attributes
    ----------
    network : nn.Module
        From normalised images to the pooled layer, or a list of them.
    predictor : nn.Sequential
        From columns to what is returned.
    metadata : dict
        JSON values: ``input``, ``resize`` and what the caller adds.
    """

    def __init__(self, backbone: Backbone, n_layers: int, predictor: Sequence[nn.Module]):
        super().__init__()
        self.network, self.predictor = _network(backbone, n_layers), nn.Sequential(*predictor)
        settings = backbone.preprocessing
        self._takes_pixels = isinstance(settings, Preprocessing)
        dtype = "uint8" if self._takes_pixels else "float32"
        taken = {"name": "images", "dtype": dtype, "shape": ["n", *backbone.input_size]}
        self.metadata: dict = {"input": taken, "resize": None}
        self.normalisation = Normalisation(settings)
        if isinstance(settings, Preprocessing):
            taken["channels"] = "RGB" if len(settings.mean) == 3 else "grey"
            size = settings.size
            self.metadata["resize"] = {
                "size": list(size) if isinstance(size, tuple) else size,
                "crop": list(settings.crop_size),
                "interpolation": settings.interpolation,
                "antialias": True,
            }
        self.eval().requires_grad_(True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self._normalised(images) if self._takes_pixels else images.float()
        columns = self.network(x)
        return self.predictor(torch.cat(columns, dim=1) if isinstance(columns, list) else columns)

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        got = f"The module got {images.dtype} images of shape {tuple(images.shape)}"
        shape = self.metadata["input"]["shape"]
        if images.ndim != 4 or list(images.shape[1:]) != shape[1:]:
            raise ValueError(
                f"{got}; it takes {shape}. Resize them as its metadata says: "
                f"{self.metadata['resize']}."
            )
        pixels = images.float()
        if images.is_floating_point():
            if images.numel() and images.detach().max() > 2:
                raise ValueError(f"{got} beyond 0…1; it takes uint8, or numbers in 0…1.")
            pixels = pixels * 255
        elif images.dtype != torch.uint8:
            raise TypeError(f"{got}; it takes uint8, or floating-point numbers in 0…1.")
        return self.normalisation(pixels)


def _network(backbone: Backbone, n_layers: int) -> nn.Module:
    """Copy the network; the copy returns the pooled values of its first `n_layers` layers."""
    module, plan = backbone.network.module, backbone.network.plan
    keys = backbone._keys[:n_layers]
    poolings: list[nn.Module] = [*backbone.make_poolings()[:n_layers]]
    device, dtype = torch.device("cpu"), torch.float32
    extractor = plan.extractor(keys, poolings)
    if isinstance(extractor, fx.GraphModule):
        _mark_stages(extractor, dict(zip(plan.stage_keys, plan.names, strict=True)))
        return inference_copy(extractor, device, dtype, channels_last=True)
    if isinstance(module, SplitModel):
        is_whole = {END, LAST_STATES}.issuperset(keys)
        return (
            BlockExtractor(module.joined(), keys, poolings)
            if is_whole
            else extractor.copy_to(device, dtype)
        )
    if keys == [plan.embedding_key]:
        # `extractor` ends the pass by an exception, which torch.export does not support.
        headless = copy.deepcopy(module)
        if head := keys[0].removeprefix(">"):
            headless.set_submodule(head, nn.Identity())
        return nn.Sequential(headless, poolings[0])
    return extractor.copy_to(device, dtype)


def _mark_stages(extractor: fx.GraphModule, names: dict[str, str]) -> None:
    """Pass the output of each stage through a module ``stages.NAME``, for hooks."""
    for node in list(extractor.graph.nodes):
        if (name := names.get(node.meta.get("key", ""))) is not None:
            extractor.add_submodule(f"stages.{name}", nn.Identity())
            with extractor.graph.inserting_after(node):
                mark = extractor.graph.call_module(f"stages.{name}", (node,))
            node.replace_all_uses_with(mark, lambda user, mark=mark: user is not mark)
