"""Networks of torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchvision
from torch import nn
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights, list_models

from sktransfer.networks import _weights
from sktransfer.networks._preprocessing import Preprocessing
from sktransfer.networks._source import (
    RANDOM_SEED,
    FromFile,
    Source,
    building,
    file_source,
    fill_randomly,
    random_digest,
    skeleton,
)


def torchvision_names() -> list[str]:
    """Torchvision's classification builders."""
    return list_models(module=torchvision.models)


class TorchvisionSource(FromFile, Source):
    """A classification builder of torchvision, with published, local or random weights."""

    def __init__(self, name: str, weights: Any):
        self.name = name
        self.url: str | None = None
        self.kwargs: dict[str, Any] = {}
        members = get_model_weights(name)
        published = members.DEFAULT  # type: ignore[attr-defined]
        self.is_random = weights is None
        path = file_source(weights)
        if weights is not None and path is None:
            published = _published(name, members, weights)
            self.url = published.url
            path = _weights.fetch(self.url, name=name)
            _weights.warn_of_other_content(path, name)
        if "image_size" in _builder_parameters(name):
            # Vision transformers are built for one input size.
            self.kwargs["image_size"] = published.meta["min_size"][0]
            if path is not None and self.url is None:
                published = self._fit_image_size(path, members, published)
        if path is None:
            self.digest = random_digest(name)
        else:
            self.path = path
            self.is_user_file = self.url is None
            self.file_digest = _weights.file_digest(path)
            self.digest = f"sha256:{self.file_digest}"
        self.preprocessing = _published_preprocessing(published)
        if name in ("googlenet", "inception_v3"):
            # The published weights were trained by another library on pixels in -1…1; the
            # auxiliary heads are not run in eval mode.
            self.kwargs.update(transform_input=True, aux_logits=False, init_weights=False)

    def _fit_image_size(self, path: Path, members: Any, published: WeightsEnum) -> WeightsEnum:
        """Take the input size that a local file of a transformer was trained with."""
        position = _weights.read_state_dict(path).get("encoder.pos_embedding")
        patch = int(self.name.rpartition("_")[2])
        if position is None or position.ndim != 3:
            return published
        side = round((position.shape[1] - 1) ** 0.5) * patch
        if side == self.kwargs["image_size"]:
            return published
        self.kwargs["image_size"] = side
        return next((w for w in members if w.meta["min_size"][0] == side), published)

    def build(self) -> nn.Module:
        return skeleton(lambda: get_model_builder(self.name)(weights=None, **self.kwargs))

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        if not self.is_random:
            if self.url is not None:
                self.path = _weights.fetch(self.url, name=self.name)
            self._load_file(module, head_layers | {"aux1", "aux2", "AuxLogits"})
            return
        kwargs = dict(self.kwargs)
        if "init_weights" in kwargs:
            kwargs["init_weights"] = True
        with building(seed=RANDOM_SEED):
            fresh = get_model_builder(self.name)(weights=None, **kwargs)
        fill_randomly(module, fresh)


def _builder_parameters(name: str) -> set[str]:
    return {"image_size"} if name.startswith("vit_") else set()


def _published(name: str, members: Any, weights: Any) -> WeightsEnum:
    if isinstance(weights, members):
        weights = weights.name
    if isinstance(weights, str) and weights in members.__members__:
        return members[weights]
    known = [*dict.fromkeys(["DEFAULT", *members.__members__])]
    raise ValueError(
        f"weights={weights!r} is not among the published weights of {name}: {known}. A path of a "
        "local .pt, .pth or .safetensors file is accepted too, and None for random weights."
    )


def _published_preprocessing(published: WeightsEnum) -> Preprocessing:
    preset = published.transforms()
    return Preprocessing(
        size=preset.resize_size[0],
        crop=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )
