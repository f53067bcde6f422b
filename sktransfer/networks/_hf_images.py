"""Networks of transformers for images: their own embedding, and their processor's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import nn

from sktransfer._threads import own_random_state
from sktransfer.networks._blocks import SplitModel, read_recipe
from sktransfer.networks._huggingface import (
    files_digest,
    hf_folder,
    import_transformers,
    load_model,
    quiet,
    read_config,
    weights_files,
)
from sktransfer.networks._preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from sktransfer.networks._sources import (
    GivenSource,
    Source,
    freeze,
    random_seed,
    skeleton,
    weights_path,
)
from sktransfer.networks._weights import file_digest, read_state_dict, state_digest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_PROCESSOR_FILES = ["preprocessor_config.json", "processor_config.json"]
_CLASS_TOKENS = ("cls_token", "class_embedding", "class_token")
_USUAL_RATIO = 256 / 224  # of the sizes before and after cropping, where no file says them
_SQUEEZED_FROM = 384  # pixels: ConvNeXt crops smaller inputs only


class ImageModel(SplitModel):
    """A model of transformers from normalised images to the embedding that is its own.

    That is what ``get_image_features`` gives, else the pooled output, else the class token, else
    the mean. What goes from part to part are the hidden states.
    """

    def __init__(self, model: PreTrainedModel, recipe: dict) -> None:
        super().__init__(model, recipe)
        self.size = tuple(recipe["input_size"])
        names = [name.rpartition(".")[2] for name, _ in model.named_parameters()]
        if any(name in _CLASS_TOKENS for name in names):
            self.class_token = 0
            n_registers = getattr(_vision(model.config), "num_register_tokens", 0)
            self.n_prefix = 1 + n_registers + ("distillation_token" in names)

    def example(self, n: int) -> torch.Tensor:
        with own_random_state():
            return torch.rand((n, *self.size))

    def inputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixel_values": x}

    def pack(self, hidden: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return hidden

    def unpack(self, value: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return value, self.inputs(value.new_zeros((1, *self.size)))

    def row(self, output, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        pooled = output if isinstance(output, torch.Tensor) else output.get("pooler_output")
        if pooled is not None:
            return pooled.flatten(1).float()
        states = output.last_hidden_state.float()
        if self.class_token is not None:
            return states[:, self.class_token]
        return states.mean(1) if states.ndim == 3 else states.mean((2, 3))

    def tokens(self, output) -> torch.Tensor:
        if isinstance(output, torch.Tensor):  # get_image_features before transformers 5
            return output
        return output.last_hidden_state


class ImageSource(Source):
    """A network of transformers for images, with the preprocessing of its image processor."""

    preprocessing: Preprocessing

    def __init__(self, name: str, weights: object) -> None:
        self.name, self.is_random, self.seed = name, weights is None, random_seed.get()
        self.path = weights_path(weights)
        self.is_user_file = self.path is not None
        if not (self.is_random or self.is_user_file or weights == "DEFAULT"):
            raise ValueError(
                f"weights={weights!r} is not accepted for {name!r}: 'DEFAULT' means those of its "
                "folder, a path those of a file, None random ones."
            )
        self.config = read_config(name)
        if not hasattr(_vision(self.config), "num_channels"):
            raise ValueError(
                f"backbone={name!r} is a {self.config.model_type} network, which takes no images."
            )
        self.digest = self._digest()
        self.preprocessing = _preprocessing(hf_folder(name), name, self.config)

    def _digest(self) -> str:
        folder = hf_folder(self.name)
        files = [folder / name for name in ["config.json", *_PROCESSOR_FILES]]
        files = [path for path in files if path.is_file()]
        if self.is_random:
            versions = f"{torch.__version__}:{import_transformers().__version__}"
            return f"random:{self.seed}:{versions}:{files_digest(files)}"
        if self.path is not None:
            return f"{files_digest(files)}:{file_digest(self.path)}"
        return files_digest([*files, *weights_files(folder, self.name)])

    def check_weights(self) -> None:
        if self._digest() != self.digest:
            raise FileNotFoundError(
                f"The files of {self.name} in {str(hf_folder(self.name))!r} have changed since "
                "this was fitted: put the old ones back, or fit again."
            )

    def build(self) -> nn.Module:
        transformers = import_transformers()
        if self.is_random:
            with own_random_state(self.seed), quiet():
                model = transformers.AutoModel.from_config(self.config).float()
        else:
            state = None if self.path is None else read_state_dict(self.path)
            folder = hf_folder(self.name)
            model = load_model(folder, self.name, self.config, state, unused=("text_", "logit_"))
        is_shared = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
        recipe = {
            "kind": "images",
            "config": self.config.to_dict(),
            "preprocessing": asdict(self.preprocessing),
            "input_size": self.preprocessing.input_size,
            "method": "get_image_features" if is_shared else "forward",
            "without": _unused_parts(model),
        }
        return _made(model, recipe)

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        """Do nothing: the network is built with its weights."""


def saved_image_source(name: str, state: Mapping[str, torch.Tensor]) -> GivenSource:
    """Return the network for images whose state is in memory; no file is read."""
    transformers = import_transformers()
    recipe = read_recipe(state["recipe"])
    settings = dict(recipe["config"])
    kind = settings.pop("model_type")

    def make() -> PreTrainedModel:
        config = transformers.AutoConfig.for_model(kind, **settings)
        return transformers.AutoModel.from_config(config, trust_remote_code=False).float()

    with quiet():
        model: PreTrainedModel = skeleton(make)  # type: ignore[assignment]
    made = _made(model, recipe, state)
    preprocessing = Preprocessing(**recipe["preprocessing"])
    return GivenSource(name, preprocessing, made, f"own-{state_digest(made)}")


def _made(
    model: PreTrainedModel, recipe: dict, state: Mapping[str, torch.Tensor] | None = None
) -> ImageModel:
    for part in recipe["without"]:
        setattr(model, part, None)
    made = ImageModel(model, recipe)
    if state is not None:
        made.load_weights(state, recipe.get("blocks", ""))
    freeze(made)
    made.split()
    return made


def _unused_parts(model: PreTrainedModel) -> list[str]:
    """Name what does not act on images, or was not trained."""
    parts = ["text_model", "text_projection"]
    found = [name for name in parts if isinstance(getattr(model, name, None), nn.Module)]
    return found + (["pooler"] if getattr(model, "pooler", model) is None else [])


def _vision(config: PretrainedConfig) -> PretrainedConfig:
    return getattr(config, "vision_config", None) or config


# -- preprocessing ------------------------------------------------------------------------------
def _preprocessing(folder: Path, name: str, config: PretrainedConfig) -> Preprocessing:
    """Return what the image processor of a folder does."""
    vision = _vision(config)
    default = getattr(vision, "image_size", None) or 224
    height, width = default if isinstance(default, (list, tuple)) else (default, default)
    if not any((folder / file).is_file() for file in _PROCESSOR_FILES):
        mean, std = IMAGENET_MEAN[: vision.num_channels], IMAGENET_STD[: vision.num_channels]
        return Preprocessing(round(min(height, width) * _USUAL_RATIO), (height, width), mean, std)
    transformers = import_transformers()
    try:
        with quiet():
            processor = transformers.AutoImageProcessor.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        settings = processor.to_dict()
        size, crop = _sizes(settings, (height, width))
        mean, std = _normalisation(settings, vision.num_channels)
        method = Image.Resampling(int(settings.get("resample", Image.Resampling.BILINEAR)))
        return Preprocessing(size, crop, mean, std, method.name.lower())
    except Exception as error:
        raise ValueError(
            f"backbone={name!r}: what its image processor does cannot be read from {str(folder)!r} "
            f"({type(error).__name__}: {error!s:.300}). Give preprocessing={{…}} and remove "
            f"{' and '.join(_PROCESSOR_FILES)} there, or correct them."
        ) from error


_Size = int | tuple[int, int]


def _sizes(settings: Mapping, image_size: tuple[int, int]) -> tuple[_Size, _Size]:
    """Return the size before and after cropping."""
    size = (settings.get("size") or {}) if settings.get("do_resize") else {}
    edge = size.get("shortest_edge")
    if edge and "crop_pct" in settings and "ConvNext" in settings["image_processor_type"]:
        if edge >= _SQUEEZED_FROM:
            return (edge, edge), edge
        return int(edge / settings["crop_pct"]), edge
    resized = image_size
    if edge or size.get("height"):
        resized = edge or (size["height"], size["width"])
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    if crop:
        return resized, (crop["height"], crop["width"])
    return resized, resized


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
