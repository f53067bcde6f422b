"""Networks with a name: the built-in one, torchvision's and timm's."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import torchvision
from torch import nn
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights, list_models

from sktransfer._threads import one_at_a_time, own_random_state
from sktransfer.networks import _weights, builtin
from sktransfer.networks._preprocessing import Preprocessing
from sktransfer.networks._source import (
    RANDOM_SEED,
    NamedSource,
    did_you_mean,
    freeze,
    weights_path,
)
from sktransfer.networks.builtin._network import BuiltinNet


def named_source(name: str, weights: object) -> NamedSource:
    """Return the source of the network called `name`."""
    if name == "builtin":
        return BuiltinSource(weights)
    if name.startswith("timm:"):
        return timm_source(name, weights)
    known = torchvision_names()
    if name in known:
        return TorchvisionSource(name, weights)
    raise ValueError(
        f"backbone={name!r} is not known.{did_you_mean(name, [*known, 'builtin'])} "
        "list_backbones() lists the known names; 'timm:NAME' names one of timm's."
    )


class BuiltinSource(NamedSource):
    """The small network whose weights ship in the package."""

    def __init__(self, weights: object) -> None:
        super().__init__("builtin", weights)
        self.version = builtin.DEFAULT
        if not self.is_random and not self.is_user_file and weights != "DEFAULT":
            if not isinstance(weights, str) or weights not in builtin.VERSIONS:
                raise ValueError(
                    f"weights={weights!r} is not among the weights of the built-in backbone: "
                    f"{['DEFAULT', *builtin.VERSIONS]}. A path of a local .pt, .pth or "
                    ".safetensors file is accepted too, and None for random weights."
                )
            self.version = weights
        version = builtin.VERSIONS[self.version]
        self.digest = self.digest_weights()
        self.preprocessing = Preprocessing(
            version.size, version.crop, version.mean, version.std, version.interpolation
        )

    def make(self) -> nn.Module:
        return BuiltinNet(builtin.VERSIONS[self.version].num_classes)

    def weights_file(self) -> Path:
        # Where the package is installed now: a pickle may come from another machine.
        return self.path or builtin.VERSIONS[self.version].path


# -- torchvision ----------------------------------------------------------------------------
# The published weights of these were trained by another library on pixels in -1…1; without
# the auxiliary heads, which act in training only.
_INCEPTION = {"transform_input": True, "aux_logits": False, "init_weights": True}
_ARGUMENTS = {"googlenet": _INCEPTION, "inception_v3": _INCEPTION}
_AUXILIARY_HEADS = {"aux1", "aux2", "AuxLogits"}


def torchvision_names() -> list[str]:
    """List torchvision's classification builders."""
    return list_models(module=torchvision.models)


class TorchvisionSource(NamedSource):
    """A classification builder of torchvision."""

    def __init__(self, name: str, weights: object) -> None:
        super().__init__(name, weights)
        self.url: str | None = None
        self.arguments: dict[str, bool | int] = dict(_ARGUMENTS.get(name, {}))
        published = get_model_weights(name)["DEFAULT"]
        if not self.is_random and self.path is None:
            published = _published_weights(name, weights)
            self.url = published.url
            _weights.warn_of_other_content(self.weights_file(), name)
        if name.startswith("vit_"):  # built for one input size
            published = self._fit_image_size(published)
        self.digest = self.digest_weights()
        preset = published.transforms()
        self.preprocessing = Preprocessing(
            size=preset.resize_size[0],
            crop=preset.crop_size[0],
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            interpolation=preset.interpolation.value,
        )

    def _fit_image_size(self, published: WeightsEnum) -> WeightsEnum:
        """Take the input size from the weights, and the preprocessing of that size."""
        side = published.meta["min_size"][0]
        if self.path is not None:
            position = _weights.read_state_dict(self.path).get("encoder.pos_embedding")
            if position is not None and position.ndim == 3:
                patch = int(self.name.rpartition("_")[2])
                side = round((position.shape[1] - 1) ** 0.5) * patch
        self.arguments["image_size"] = side
        same_size = (w for w in type(published) if w.meta["min_size"][0] == side)
        return published if published.meta["min_size"][0] == side else next(same_size, published)

    def make(self) -> nn.Module:
        return get_model_builder(self.name)(weights=None, **self.arguments)

    def weights_file(self) -> Path:
        return super().weights_file() if self.url is None else _weights.fetch(self.url, self.name)

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        super().load(module, head_layers | _AUXILIARY_HEADS)


def _published_weights(name: str, weights: object) -> WeightsEnum:
    members = get_model_weights(name)
    if isinstance(weights, members):
        return weights
    if isinstance(weights, str) and weights in members.__members__:
        return members[weights]
    known = [*dict.fromkeys(["DEFAULT", *members.__members__])]
    raise ValueError(
        f"weights={weights!r} is not among the published weights of {name}: {known}. A path of a "
        "local .pt, .pth or .safetensors file is accepted too, and None for random weights."
    )


# -- timm -----------------------------------------------------------------------------------
# One source for each name and weights: building a network and digesting its published
# weights takes seconds.
_timm_sources: dict[tuple[str, str], TimmSource] = {}


def timm_source(name: str, weights: object) -> TimmSource:
    """Return the one source of this process for a network of timm and these weights."""
    path = weights_path(weights)
    what = repr(weights) if path is None else f"{path}:{_weights.file_digest(path)}"
    with one_at_a_time:  # as building does
        if (name, what) not in _timm_sources:
            _timm_sources[name, what] = TimmSource(name, weights)
        return _timm_sources[name, what]


class TimmSource(NamedSource):
    """A network of timm."""

    def __init__(self, name: str, weights: object) -> None:
        super().__init__(name, weights)
        timm = import_timm()
        self.model_name = name.removeprefix("timm:")
        self.is_published = weights == "DEFAULT"
        bare = self.model_name.partition(".")[0].rpartition("/")[2]
        if not timm.is_model(bare) and not self.model_name.startswith(("hf-hub:", "hf_hub:")):
            known = timm.list_models()
            raise ValueError(
                f"backbone={name!r}: timm has no such network.{did_you_mean(name, known, 'timm:')}"
                f" list_backbones('timm:*') lists its {len(known)}."
            )
        if not (self.is_published or self.is_random or self.is_user_file):
            raise ValueError(
                f"weights={weights!r} is not accepted for a timm network: give the tag in the name "
                "('timm:vit_base_patch16_224.augreg_in21k') with weights='DEFAULT', a path of a "
                "local .pt, .pth or .safetensors file, or None for random weights."
            )
        # Kept for the first build(), so that the network is made once.
        self._made = self._pretrained() if self.is_published else super().build()
        self.preprocessing = timm_preprocessing(self._made)
        if self.is_published:
            self.digest = _weights.state_digest(self._made)
        else:
            self.digest = self.digest_weights()
        if self.is_random:
            self.digest += f":timm-{timm.__version__}"

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key != "_made"}

    def make(self) -> nn.Module:
        return import_timm().create_model(self.model_name, pretrained=False)

    def build(self) -> nn.Module:
        made = vars(self).pop("_made", None)
        if made is not None:
            return made
        if not self.is_published:
            return super().build()
        made = self._pretrained()
        if _weights.state_digest(made) != self.digest:
            raise ValueError(
                f"timm's published weights of {self.name} have changed since this was fitted: fit "
                "again."
            )
        return made

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        if not self.is_published:
            super().load(module, head_layers)

    def _pretrained(self) -> nn.Module:
        timm = import_timm()
        try:
            with own_random_state(RANDOM_SEED), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return freeze(timm.create_model(self.model_name, pretrained=True))
        except Exception as error:
            config = timm.get_pretrained_cfg(self.model_name)
            where = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
            raise _weights.not_downloaded(
                self.name, f"{type(error).__name__}: {error}", where, "anywhere, with weights=PATH"
            ) from error


def import_timm() -> ModuleType:
    if importlib.util.find_spec("timm") is None:
        raise ImportError(
            "Networks named 'timm:…' need the package timm, which is not installed: "
            "pip install sktransfer[timm]"
        )
    import timm

    return timm


def timm_preprocessing(module: nn.Module) -> Preprocessing:
    """Return the preprocessing of timm's own evaluation of a network."""
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
