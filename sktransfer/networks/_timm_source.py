"""Networks of timm."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

from torch import nn

from sktransfer.networks import _weights
from sktransfer.networks._preprocessing import Preprocessing
from sktransfer.networks._source import (
    RANDOM_SEED,
    FromFile,
    Source,
    building,
    did_you_mean,
    file_source,
    fill_randomly,
    finish,
    random_digest,
    skeleton,
)


class TimmSource(FromFile, Source):
    """A network of timm, with its published, local or random weights."""

    def __init__(self, name: str, weights: Any):
        timm = import_timm()
        self.name = name
        self.model_name = name.removeprefix("timm:")
        if not timm.is_model(self.model_name.partition(".")[0].rpartition("/")[2]) and not (
            self.model_name.startswith(("hf-hub:", "hf_hub:"))
        ):
            known = timm.list_models()
            raise ValueError(
                f"backbone={name!r}: timm has no such network.{did_you_mean(name, known, 'timm:')}"
                f" list_backbones('timm:*') lists its {len(known)}."
            )
        self.is_random = weights is None
        self.is_published = False
        path = file_source(weights)
        if path is not None:
            self.path, self.file_digest = path, _weights.file_digest(path)
            self.is_user_file = True
            self.digest = f"sha256:{self.file_digest}"
        elif weights is None:
            self.digest = random_digest(name) + f":timm-{timm.__version__}"
        elif weights == "DEFAULT":
            self.is_published = True
            self.digest = _weights.state_digest(self._pretrained())
        else:
            raise ValueError(
                f"weights={weights!r} is not accepted for a timm network: give the tag in the name "
                "('timm:vit_base_patch16_224.augreg_in21k') with weights='DEFAULT', a path of a "
                "local .pt, .pth or .safetensors file, or None for random weights."
            )
        self.preprocessing = timm_preprocessing(self.build())

    def _pretrained(self) -> nn.Module:
        timm = import_timm()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return finish(timm.create_model(self.model_name, pretrained=True))
        except Exception as error:
            config = timm.get_pretrained_cfg(self.model_name)
            where = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
            raise OSError(
                f"The weights of {self.name} are not on this machine and could not be downloaded "
                f"({type(error).__name__}: {str(error).strip()[:200]}).\n"
                f"  from: {where}\n"
                "  put them: anywhere, and give that path as weights=PATH\n"
                "backbone='builtin' needs no network, and weights=PATH takes a local .pt, .pth or "
                ".safetensors file."
            ) from error

    def build(self) -> nn.Module:
        timm = import_timm()
        return skeleton(lambda: timm.create_model(self.model_name, pretrained=False))

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        if self.is_published:
            pretrained = self._pretrained()
            if _weights.state_digest(pretrained) != self.digest:
                raise ValueError(
                    f"timm's published weights of {self.name} are no longer those that this was "
                    "fitted with: fit again."
                )
            module.load_state_dict(pretrained.state_dict(), assign=True)
            finish(module)
        elif self.is_random:
            with building(seed=RANDOM_SEED):
                fresh = import_timm().create_model(self.model_name, pretrained=False)
            fill_randomly(module, fresh)
        else:
            self._load_file(module, head_layers)


def import_timm() -> Any:
    if importlib.util.find_spec("timm") is None:
        raise ImportError(
            "Networks named 'timm:…' need the package timm, which is not installed: "
            "pip install sktransfer[timm]"
        )
    import timm

    return timm


def timm_preprocessing(module: nn.Module) -> Preprocessing:
    """What timm's own evaluation does with the images of a network."""
    from timm.data import resolve_data_config

    config = resolve_data_config({}, model=module)
    _, height, width = config["input_size"]
    size: int | tuple[int, int] = int(max(height, width) / config["crop_pct"])
    if config.get("crop_mode", "center") == "squash" or height != width:
        size = (int(height / config["crop_pct"]), int(width / config["crop_pct"]))
    interpolation = config["interpolation"]
    return Preprocessing(
        size=size,
        crop=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bicubic" if interpolation == "random" else interpolation,
    )
