"""Networks of transformers for images: their own embedding, and their processor's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import nn

from sktransfer._threads import own_random_state
from sktransfer.networks._blocks import SplitModel, read_recipe
from sktransfer.networks._huggingface import (
    FolderSource,
    import_transformers,
    make_skeleton,
    quiet,
)
from sktransfer.networks._preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from sktransfer.networks._sources import GivenSource
from sktransfer.networks._weights import state_digest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_PROCESSOR_FILES = ["preprocessor_config.json", "processor_config.json"]
_CLASS_TOKENS = ("cls_token", "class_embedding", "class_token")
_USUAL_RATIO = 256 / 224  # of the sizes before and after cropping, where no file says them


class ImageModel(SplitModel):
    """A model of transformers from normalised images to the embedding that is its own.

    That is what ``get_image_features`` gives, else the pooled output, else the class token, else
    the mean. What goes from part to part are the hidden states.
    """

    kind = "images"

    def __init__(self, model: PreTrainedModel, recipe: dict) -> None:
        super().__init__(model, recipe)
        self.size = tuple(recipe["input_size"])  # of what the stages get
        self.takes_bgr = recipe.get("takes_bgr", False)
        names = [name.rpartition(".")[2] for name, _ in model.named_parameters()]
        if any(name in _CLASS_TOKENS for name in names):
            self.class_token = 0
            n_registers = getattr(_vision(model.config), "num_register_tokens", 0)
            self.n_prefix = 1 + n_registers + ("distillation_token" in names)

    def example(self, n: int) -> torch.Tensor:
        with own_random_state():
            return torch.rand((n, *self.size))

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        return x[-1:]

    def inputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixel_values": x.flip(1) if self.takes_bgr else x}

    def few(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"pixel_values": inputs["pixel_values"][:1]}

    def pack(self, hidden: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return hidden

    def unpack(self, value: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return value, self.inputs(value.new_zeros((1, *self.size)))

    def row(self, output, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if isinstance(output, torch.Tensor):
            return output.float()
        for name in ("image_embeds", "pooler_output"):
            if (pooled := output.get(name)) is not None:
                return pooled.flatten(1).float()
        states = output.last_hidden_state.float()
        if self.class_token is not None:
            return states[:, self.class_token]
        return states.mean(1) if states.ndim == 3 else states.mean((2, 3))


class ImageSource(FolderSource):
    """A network of transformers for images, with the preprocessing of its image processor."""

    preprocessing: Preprocessing
    files = _PROCESSOR_FILES

    def __init__(self, name: str, weights: object) -> None:
        super().__init__(name, weights)
        if not any(hasattr(_vision(self.config), key) for key in ("num_channels", "image_size")):
            raise ValueError(
                f"backbone={name!r} is a {self.config.model_type} network, which takes no images."
            )
        self.digest = self.digest_files()
        self.preprocessing, self.takes_bgr = _preprocessing(self.folder, name, self.config)

    def build(self) -> nn.Module:
        model = self.make(unused=("text_", "logit_"))
        is_shared = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
        recipe = {
            "kind": "images",
            "config": self.config.to_dict(),
            "preprocessing": asdict(self.preprocessing),
            "input_size": self.preprocessing.input_size,
            "takes_bgr": self.takes_bgr,
            "method": "get_image_features" if is_shared else "forward",
            "without": _unused_parts(model),
        }
        return _made(model, recipe)


def saved_image_source(name: str, state: Mapping[str, torch.Tensor]) -> GivenSource:
    """Return the network for images whose state is in memory; no file is read."""
    recipe = read_recipe(state["recipe"])
    made = _made(make_skeleton(recipe["config"]), recipe, state)
    preprocessing = Preprocessing(**recipe["preprocessing"])
    return GivenSource(name, preprocessing, made, f"own-{state_digest(made)}")


def _made(
    model: PreTrainedModel, recipe: dict, state: Mapping[str, torch.Tensor] | None = None
) -> ImageModel:
    for part in recipe["without"]:
        setattr(model, part, None)
    return ImageModel(model, recipe).ready(state)


def _unused_parts(model: PreTrainedModel) -> list[str]:
    """Name what does not act on images, or was not trained."""
    parts = ["text_model", "text_projection"]
    found = [name for name in parts if isinstance(getattr(model, name, None), nn.Module)]
    return found + (["pooler"] if getattr(model, "pooler", model) is None else [])


def _vision(config: PretrainedConfig) -> PretrainedConfig:
    return getattr(config, "vision_config", None) or config


# -- preprocessing ------------------------------------------------------------------------------
def _preprocessing(folder: Path, name: str, config: PretrainedConfig) -> tuple[Preprocessing, bool]:
    """Return what the image processor of a folder does, and whether it swaps red and blue."""
    vision = _vision(config)
    default = getattr(vision, "image_size", None) or 224
    height, width = default if isinstance(default, (list, tuple)) else (default, default)
    n_channels = getattr(vision, "num_channels", 3)
    if not any((folder / file).is_file() for file in _PROCESSOR_FILES):
        mean, std = IMAGENET_MEAN[:n_channels], IMAGENET_STD[:n_channels]
        size = round(min(height, width) * _USUAL_RATIO)
        return Preprocessing(size, (height, width), mean, std), False
    transformers = import_transformers()
    try:
        with quiet():
            processor = transformers.AutoImageProcessor.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            settings = processor.to_dict()
            takes_bgr = bool(settings.get("do_flip_channel_order"))
            asked = _candidates(settings, (height, width), n_channels)
            return _most_similar(asked, processor, takes_bgr), takes_bgr
    except Exception as error:
        raise ValueError(
            f"backbone={name!r}: what its image processor does cannot be read from {str(folder)!r} "
            f"({type(error).__name__}: {error!s:.300}). Give preprocessing={{…}} and remove "
            f"{' and '.join(_PROCESSOR_FILES)} there, or correct them."
        ) from error


def _candidates(
    settings: Mapping, image_size: tuple[int, int], n_channels: int
) -> list[Preprocessing]:
    """List what the settings of a processor may mean; classes read the same names differently."""
    method = Image.Resampling(int(settings.get("resample", Image.Resampling.BILINEAR)))
    size = (settings.get("size") or {}) if settings.get("do_resize") else {}
    edge = size.get("shortest_edge")
    resized = edge or ((size["height"], size["width"]) if size.get("height") else image_size)
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    crop = (crop["height"], crop["width"]) if crop else resized
    sizes: list = [(resized, crop)]
    if edge:  # ConvNeXt and LeViT resize to more; large inputs of ConvNeXt are not cropped
        more = int(edge / (settings.get("crop_pct") or 1 / _USUAL_RATIO))
        sizes += [(more, crop), ((edge, edge), crop)]
    mean, std = _normalisation(settings, n_channels)
    deviations = [std, tuple(s * s for s in std)]  # EfficientNet divides twice
    return [
        Preprocessing(size, crop, mean, std, method.name.lower())
        for std in deviations
        for size, crop in sizes
    ]


def _most_similar(candidates: list[Preprocessing], processor, takes_bgr: bool) -> Preprocessing:
    """Return the one that does with an image what the processor does."""
    if len(candidates[0].mean) == 1:  # processors do not make images grey
        return candidates[0]
    height, width = candidates[0].crop_size
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    resizes = getattr(processor, "do_resize", True)
    size = (2 * width + 40, 2 * height) if resizes else (width, height)
    image = image.resize(size, Image.Resampling.BICUBIC)
    expected = np.asarray(processor(images=image, return_tensors="pt")["pixel_values"][0])
    expected = expected[::-1] if takes_bgr else expected
    distances = []
    for how in candidates:
        if expected.shape != how.input_size:
            distances.append(np.inf)
            continue
        pixels = (expected.transpose(1, 2, 0) * how.std + how.mean) * 255
        distances.append(np.abs(pixels - how.resize_crop(image)).mean())
    best = int(np.argmin(distances))
    # Crops may differ by a pixel, as their place is rounded; that is not another size.
    values = candidates[best].resize_crop(image).astype(float)
    if distances[best] > 2 + 1.5 * np.abs(np.diff(values, axis=1)).mean():
        raise ValueError(
            f"{type(processor).__name__} does more than to resize, crop and normalise: of an image "
            f"of {image.height}×{image.width} pixels it makes an array of shape {expected.shape}"
        )
    return candidates[best]


def _normalisation(settings: Mapping, n_channels: int) -> tuple[tuple, tuple]:
    """Return mean and standard deviation for pixels in 0…1.

    The processor computes (x · factor - offset - mean) / std of pixels x in 0…255.
    """
    is_scaled, is_normalised = settings.get("do_rescale"), settings.get("do_normalize")
    factor = 255 * (settings["rescale_factor"] if is_scaled else 1)
    offset = float(bool(is_scaled and settings.get("rescale_offset")))
    mean = settings["image_mean"] if is_normalised else [0.0] * n_channels
    std = settings["image_std"] if is_normalised else [1.0] * n_channels
    values = [(m + offset) / factor for m in mean], [s / factor for s in std]
    return tuple(values[0][:n_channels]), tuple(values[1][:n_channels])
