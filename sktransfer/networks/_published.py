"""Networks by name: the built-in one, torchvision's and timm's."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights, list_models

from sktransfer._progress import did_you_mean, shown
from sktransfer._threads import global_state_lock, own_random_state
from sktransfer.networks import _weights, builtin
from sktransfer.networks._blocks import read_recipe
from sktransfer.networks._hf_images import ImageSource, saved_image_source
from sktransfer.networks._huggingface import is_text_name
from sktransfer.networks._preprocessing import Preprocessing, with_overrides
from sktransfer.networks._sources import (
    RANDOM_SEED,
    GivenSource,
    NamedSource,
    Source,
    freeze,
    random_seed,
    weights_path,
)
from sktransfer.networks._text import TextSource, saved_text_source
from sktransfer.networks._word_vectors import WordVectors
from sktransfer.networks.builtin._network import BuiltinNet


def _nearest_of_timm(name: str) -> str:
    """Name timm's networks that are nearest to an unknown one, for an error.

    The name of another hub may be part of one of timm's (``"google/vit-base-patch16-224"``), or
    share a word with it (``"dinov2_vits14"``).
    """
    if importlib.util.find_spec("timm") is None:
        return ""
    known = import_timm().list_models()
    wanted = re.sub(r"\W+", "_", name.removeprefix("timm:").rpartition("/")[2].lower())
    close = get_close_matches(wanted, known, n=3, cutoff=0.8)
    pattern = ""
    if not close:
        sharing = {w: [k for k in known if w in k] for w in re.findall(r"[a-z]{3,}\d*", wanted)}
        if found := {word: names for word, names in sharing.items() if names}:
            word = min(found, key=lambda w: len(found[w]))
            close = get_close_matches(wanted, found[word], n=3, cutoff=0.0)
            pattern = f" list_backbones('timm:*{word}*') lists {len(found[word])}."
    close = close or get_close_matches(wanted, known, n=3, cutoff=0.6)
    names = " or ".join(repr(f"timm:{name}") for name in close)
    return f" Did you mean {names}?{pattern}" if close else ""


_ACCEPTED = (
    "a path of a local .pt, .pth or .safetensors file is accepted too, and None for random weights."
)


def _unknown_weights(weights: object, of: str, known: Iterable[str]) -> ValueError:
    known = [*dict.fromkeys(["DEFAULT", *known])]
    hint = did_you_mean(str(weights), known)
    return ValueError(f"weights={shown(weights)} is not among {of}: {known}; {_ACCEPTED}{hint}")


def named_source(name: str, weights: object) -> Source:
    """Return the source of the network called `name`."""
    if name == "builtin":
        return BuiltinSource(weights)
    if name.startswith("timm:"):
        return timm_source(name, weights)
    if name.startswith("hf:"):
        return TextSource(name, weights) if is_text_name(name) else ImageSource(name, weights)
    if name.startswith(("vectors:", "static:")):
        raise ValueError(
            f"backbone={shown(name)} is a table of vectors, which is not fine-tuned: put "
            "PretrainedTextExtractor in a pipeline before a classifier or regressor."
        )
    known = torchvision_names()
    if name in known:
        return TorchvisionSource(name, weights)
    nearest = did_you_mean(name, [*known, "builtin"])
    of_timm = _nearest_of_timm(name)
    if not nearest or f"'timm:{name}'" in of_timm:
        nearest = of_timm
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) or (Path(name) / "config.json").is_file():
        nearest = f" Did you mean {'hf:' + name!r}, with the package transformers?{nearest}"
    raise ValueError(
        f"backbone={shown(name)} is not known.{nearest} "
        "list_backbones() lists the known names; 'timm:NAME' names one of timm's, "
        "'hf:NAME_OR_FOLDER' one of transformers'."
    )


class BuiltinSource(NamedSource):
    """The small network whose weights ship in the package."""

    def __init__(self, weights: object) -> None:
        super().__init__("builtin", weights)
        self.version = builtin.DEFAULT
        if self.is_published and weights != "DEFAULT":
            if weights not in builtin.VERSIONS:
                of = "the weights of the built-in backbone"
                raise _unknown_weights(weights, of, builtin.VERSIONS)
            self.version = str(weights)
        version = builtin.VERSIONS[self.version]
        self.digest = f"sha256:{version.sha256}" if self.is_published else self.digest_weights()
        self.preprocessing = version.preprocessing

    def make(self) -> nn.Module:
        return BuiltinNet(builtin.VERSIONS[self.version].num_classes)

    def weights_file(self) -> Path:
        # A pickle may come from a machine where the package is installed elsewhere.
        return self.path or builtin.VERSIONS[self.version].path


# Another library trained the published weights of these on pixels in -1…1. They are built without
# the auxiliary heads, which are used in training only.
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
        published = get_model_weights(name)["DEFAULT"]
        self.url: str | None = None
        if self.is_published:
            published = _published_weights(name, weights)
            self.url = published.url
        self.digest = self.digest_weights()
        self.arguments: dict[str, bool | int] = dict(_ARGUMENTS.get(name, {}))
        self.preprocessing = _preset_preprocessing(published)
        if name.startswith("vit_"):
            state = {} if self.path is None else _weights.read_state_dict(self.path)
            self.set_image_size(state, published)

    def set_image_size(self, state: Mapping[str, torch.Tensor], published: WeightsEnum) -> None:
        """Build a vision transformer for the only input size that its weights fit."""
        side, position = published.meta["min_size"][0], state.get("encoder.pos_embedding")
        if position is not None and position.ndim == 3:
            side = round((position.shape[1] - 1) ** 0.5) * int(self.name.rpartition("_")[2])
        self.arguments["image_size"] = side
        members = [published, *get_model_weights(self.name)]
        published = next((w for w in members if w.meta["min_size"][0] == side), published)
        self.preprocessing = with_overrides({"crop": side}, _preset_preprocessing(published))

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
    raise _unknown_weights(weights, f"the published weights of {name}", members.__members__)


def _preset_preprocessing(published: WeightsEnum) -> Preprocessing:
    preset = published.transforms()
    size, crop = preset.resize_size[0], preset.crop_size[0]
    return Preprocessing(size, crop, preset.mean, preset.std, preset.interpolation.value)


# Building a network and digesting its published weights takes seconds: once for each name and
# weights in a process.
_timm_sources: dict[tuple[str, str, int], TimmSource] = {}


def timm_source(name: str, weights: object) -> TimmSource:
    """Return the one source of this process for a network of timm and these weights."""
    path = weights_path(weights)
    which = repr(weights) if path is None else f"{path}:{_weights.file_digest(path)}"
    key = name, which, random_seed.get()
    with global_state_lock:  # as building does
        if key not in _timm_sources:
            _timm_sources[key] = TimmSource(name, weights)
        return _timm_sources[key]


_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


class TimmSource(NamedSource):
    """A network of timm."""

    def __init__(self, name: str, weights: object) -> None:
        super().__init__(name, weights)
        timm = import_timm()
        self.model_name = name.removeprefix("timm:")
        bare = self.model_name.partition(".")[0].rpartition("/")[2]
        if not timm.is_model(bare) and not self.model_name.startswith(("hf-hub:", "hf_hub:")):
            known = timm.list_models()
            raise ValueError(
                f"backbone={shown(name)}: timm has no such network.{_nearest_of_timm(name)}"
                f" list_backbones('timm:*') lists its {len(known)}."
            )
        if self.is_published and weights != "DEFAULT":
            raise ValueError(
                f"weights={weights!r} is not accepted for a timm network: give the tag in the name "
                "('timm:vit_base_patch16_224.augreg_in21k') with weights='DEFAULT'; "
                f"{_ACCEPTED}"
            )
        try:
            config = timm.get_pretrained_cfg(self.model_name)
        except RuntimeError as error:  # about the tag
            known = timm.list_pretrained(f"{bare}.*")
            raise ValueError(f"backbone={shown(name)}: {error} Known are {known}.") from error
        if self.is_published and config and not config.has_weights:
            raise ValueError(
                f"backbone={shown(name)}: timm publishes no weights of this network; {_ACCEPTED}"
            )
        # Kept for the first build(), so that the network is made once.
        self._made = self._pretrained() if self.is_published else super().build()
        self.digest = self.digest_weights()
        self.preprocessing = timm_preprocessing(self._made)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key != "_made"}

    def digest_weights(self) -> str:
        if self.is_published:
            return _weights.state_digest(self._made)
        version = f":timm-{import_timm().__version__}" if self.is_random else ""
        return super().digest_weights() + version

    def make(self) -> nn.Module:
        return import_timm().create_model(self.model_name, pretrained=False)

    def build(self) -> nn.Module:
        made = vars(self).pop("_made", None)
        if made is not None or not self.is_published:
            return super().build() if made is None else made
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

    def check_weights(self) -> None:
        if not self.is_published:
            super().check_weights()
        elif not self._is_downloaded():
            self._made = self.build()

    def _is_downloaded(self) -> bool:
        from huggingface_hub import try_to_load_from_cache

        place = self._place()
        if not place:
            return False
        if place.startswith("https:"):
            return _weights.cache_path(place).exists()
        found = [try_to_load_from_cache(place, name) for name in _HUB_FILES]
        return any(isinstance(path, str) for path in found)

    def _place(self) -> str:
        """Return the name of a repository of the hub, or a file's address; ``""`` if unknown."""
        config = import_timm().get_pretrained_cfg(self.model_name)
        return config.hf_hub_id or config.url if config else self.model_name.partition(":")[2]

    def _pretrained(self) -> nn.Module:
        timm = import_timm()
        url = self._place()
        url = url if url.startswith("https:") else f"https://huggingface.co/{url}"
        place = "anywhere, and give that path as weights=PATH"
        if not self._is_downloaded():
            _weights.check_download(self.name, url, place)
        try:
            with own_random_state(RANDOM_SEED), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = freeze(timm.create_model(self.model_name, pretrained=True))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise _weights.not_downloaded(self.name, reason, url, place) from error
        _weights.warn_unless_finite(made, self.name)
        return made


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
    method = config["interpolation"]
    method = "bicubic" if method == "random" else method
    return Preprocessing(size, (height, width), config["mean"], config["std"], method)


def text_source(name: str, weights: object) -> TextSource | WordVectors:
    """Return the source of a network for texts."""
    if name.startswith("hf:"):
        return TextSource(name, weights)
    if name.startswith(("vectors:", "static:")):
        return WordVectors(name, weights)
    kind = "vectors" if Path(name).expanduser().is_file() else "hf"
    hint = "" if ":" in name else f" Did you mean {shown(f'{kind}:{name}')}?"
    raise ValueError(
        f"backbone={shown(name)} is not known: 'hf:NAME_OR_FOLDER' (transformers), 'vectors:PATH' "
        f"(a table of word vectors) or 'static:FOLDER' (model2vec) is accepted.{hint}"
    )


def saved_source(name: str, state: Mapping[str, torch.Tensor]) -> Source:
    """Return the network called `name` with weights in memory, without a download.

    ValueError if the weights do not fit the network.
    """
    if "recipe" in state:
        if name.startswith(("vectors:", "static:")):
            return WordVectors.of(name, state)
        is_of_images = read_recipe(state["recipe"]).get("kind") == "images"
        return (saved_image_source if is_of_images else saved_text_source)(name, state)
    source = named_source(name, None)
    if isinstance(source, TorchvisionSource) and "image_size" in source.arguments:
        source.set_image_size(state, get_model_weights(name)["DEFAULT"])
    module = source.build()
    kinds = {key: tensor.dtype for key, tensor in module.state_dict().items()}
    if kinds != {key: tensor.dtype for key, tensor in state.items()}:
        raise ValueError(f"its weights are not those of {name!r}")
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"its weights do not fit {name!r}: {error}") from error
    return GivenSource(
        name, source.preprocessing, freeze(module), f"own-{_weights.state_digest(module)}"
    )
