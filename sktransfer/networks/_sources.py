"""Sources: which network, with which weights, and how to build it again in any process."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights, list_models

from sktransfer._progress import did_you_mean
from sktransfer._threads import one_at_a_time, own_random_state
from sktransfer.networks import _weights, builtin
from sktransfer.networks._preprocessing import Preprocessing, with_overrides
from sktransfer.networks.builtin._network import BuiltinNet

RANDOM_SEED = 0
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


class Source(ABC):
    """A network that can be built again.

    Attributes
    ----------
    name : str
        As the user gave it.
    preprocessing : Preprocessing
        What the weights were trained with.
    digest : str
        Changes with the weights and the architecture.
    is_user_file : bool
        Whether the weights come from a file that the user named.
    is_foreign : bool
        Whether the network's code is the user's own.
    """

    name: str
    preprocessing: Preprocessing
    digest: str
    is_user_file: bool = False
    is_foreign: bool = False

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the architecture in eval mode; its tensors may lie on the meta device."""

    @abstractmethod
    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        """Fill `module`, which :meth:`build` returned, with the weights."""


class GivenSource(Source):
    """A network whose weights are in memory.

    Parameters
    ----------
    name : str
    preprocessing : Preprocessing
        What the network's architecture came with.
    module : nn.Module
        In eval mode and frozen.
    digest : str
        Of the weights.
    """

    def __init__(
        self, name: str, preprocessing: Preprocessing, module: nn.Module, digest: str
    ) -> None:
        self.name, self.preprocessing = name, preprocessing
        self.module, self.digest = module, digest

    def build(self) -> nn.Module:
        return self.module

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        """Do nothing: the module has its weights."""


class NamedSource(Source):
    """An architecture with a name, and its published, a local file's or random weights.

    A subclass makes the architecture in `make` and finds published weights in `weights_file`.
    """

    key_report: dict[str, list[str]]

    def __init__(self, name: str, weights: object) -> None:
        self.name = name
        self.is_random = weights is None
        self.path = weights_path(weights)
        self.is_user_file = self.path is not None

    @abstractmethod
    def make(self) -> nn.Module:
        """Build the architecture with initial values."""

    def weights_file(self) -> Path:
        """Find the weights on this machine."""
        assert self.path is not None
        return self.path

    def digest_weights(self) -> str:
        if self.is_random:
            versions = f"torch-{torch.__version__}:torchvision-{torchvision.__version__}"
            return f"random:{RANDOM_SEED}:{self.name}:{versions}"
        return f"sha256:{_weights.file_digest(self.weights_file())}"

    def build(self) -> nn.Module:
        return skeleton(self.make)

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        if self.is_random:
            with own_random_state(RANDOM_SEED):
                state = self.make().state_dict()
            module.load_state_dict(state, assign=True)
        else:
            path = self.weights_file()
            if not path.is_file():
                raise FileNotFoundError(
                    f"The weights file {str(path)!r} of {self.name} is gone: put it back."
                )
            if (got := self.digest_weights()) != self.digest:
                raise ValueError(
                    f"The weights file {str(path)!r} of {self.name} has changed since this was "
                    f"fitted ({got[:19]}… now, {self.digest[:19]}… then): put the old file back, "
                    "or fit again."
                )
            state = _weights.read_state_dict(path)
            what = f"{self.name}, {path}"
            self.key_report = _weights.fit_state_dict(module, state, head_layers, what)
        freeze(module)


def weights_path(weights: object) -> Path | None:
    """Return the file, if `weights` is a path rather than the name of published weights."""
    if isinstance(weights, str):
        separators = ("/", os.sep, "~")
        if not (Path(weights).suffix or any(sign in weights for sign in separators)):
            return None
    elif not isinstance(weights, os.PathLike):
        return None
    path = Path(weights).expanduser()
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"weights={str(path)!r}: a weights file ends in one of {', '.join(_SUFFIXES)}."
        )
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"weights={str(path)!r} {what}.")
    return path


class _EmptyOnMeta(TorchFunctionMode):
    """Create layers without memory and initial values, as the weights are loaded later.

    ``with torch.device("meta")`` would also discard what an architecture computes: position
    indices of timm's networks, widths of torchvision's RegNets.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a module without its values: ResNet-50 takes 0.1 s instead of 0.8, VGG-16 0.04 of 5.

    Where building needs values, the module is built with them.
    """
    with contextlib.suppress(Exception):
        with own_random_state(), _EmptyOnMeta():
            module = make()
        loaded = module.state_dict().keys()
        if not any(b.is_meta and name not in loaded for name, b in module.named_buffers()):
            return freeze(module)
    with own_random_state(RANDOM_SEED):
        return freeze(make())


def freeze(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


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


_ACCEPTED = "a path of a local .pt, .pth or .safetensors file is accepted too, and None for random"


def named_source(name: str, weights: object) -> NamedSource:
    """Return the source of the network called `name`."""
    if name == "builtin":
        return BuiltinSource(weights)
    if name.startswith("timm:"):
        return timm_source(name, weights)
    known = torchvision_names()
    if name in known:
        return TorchvisionSource(name, weights)
    nearest = did_you_mean(name, [*known, "builtin"])
    of_timm = _nearest_of_timm(name)
    if not nearest or f"'timm:{name}'" in of_timm:
        nearest = of_timm
    raise ValueError(
        f"backbone={name!r} is not known.{nearest} "
        "list_backbones() lists the known names; 'timm:NAME' names one of timm's."
    )


class BuiltinSource(NamedSource):
    """The small network whose weights ship in the package."""

    def __init__(self, weights: object) -> None:
        super().__init__("builtin", weights)
        self.version = builtin.DEFAULT
        if not self.is_random and not self.is_user_file and weights != "DEFAULT":
            if weights not in builtin.VERSIONS:
                raise ValueError(
                    f"weights={weights!r} is not among the weights of the built-in backbone: "
                    f"{['DEFAULT', *builtin.VERSIONS]}; {_ACCEPTED} weights."
                    f"{did_you_mean(str(weights), ['DEFAULT', *builtin.VERSIONS])}"
                )
            self.version = str(weights)
        version = builtin.VERSIONS[self.version]
        is_shipped = not (self.is_random or self.is_user_file)
        self.digest = f"sha256:{version.sha256}" if is_shipped else self.digest_weights()
        self.preprocessing = Preprocessing(
            version.size, version.crop, version.mean, version.std, version.interpolation
        )

    def make(self) -> nn.Module:
        return BuiltinNet(builtin.VERSIONS[self.version].num_classes)

    def weights_file(self) -> Path:
        # Where the package is installed now: a pickle may come from another machine.
        return self.path or builtin.VERSIONS[self.version].path


# The published weights of these were trained by another library on pixels in -1…1. They are
# built without the auxiliary heads, which act in training only.
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
        if not self.is_random and not self.is_user_file:
            published = _published_weights(name, weights)
            self.url = published.url
        self.digest = self.digest_weights()
        self.arguments: dict[str, bool | int] = dict(_ARGUMENTS.get(name, {}))
        if not name.startswith("vit_"):
            self.preprocessing = _of_preset(published)
            return
        # A vision transformer is built for one input size.
        side = self.arguments["image_size"] = self._side(published.meta["min_size"][0])
        members = [published, *get_model_weights(name)]
        published = next((w for w in members if w.meta["min_size"][0] == side), published)
        self.preprocessing = with_overrides({"crop": side}, _of_preset(published))

    def _side(self, default: int) -> int:
        """Return the height and width that the weights of a vision transformer are for."""
        state = {} if self.path is None else _weights.read_state_dict(self.path)
        position = state.get("encoder.pos_embedding")
        if position is None or position.ndim != 3:
            return default
        return round((position.shape[1] - 1) ** 0.5) * int(self.name.rpartition("_")[2])

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
        f"weights={weights!r} is not among the published weights of {name}: {known}; "
        f"{_ACCEPTED} weights.{did_you_mean(str(weights), known)}"
    )


def _of_preset(published: WeightsEnum) -> Preprocessing:
    preset = published.transforms()
    size, crop = preset.resize_size[0], preset.crop_size[0]
    return Preprocessing(size, crop, preset.mean, preset.std, preset.interpolation.value)


# Building a network and digesting its published weights takes seconds: once for each name and
# weights in a process.
_timm_sources: dict[tuple[str, str], TimmSource] = {}


def timm_source(name: str, weights: object) -> TimmSource:
    """Return the one source of this process for a network of timm and these weights."""
    path = weights_path(weights)
    key = name, repr(weights) if path is None else f"{path}:{_weights.file_digest(path)}"
    with one_at_a_time:  # as building does
        if key not in _timm_sources:
            _timm_sources[key] = TimmSource(name, weights)
        return _timm_sources[key]


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
                f"backbone={name!r}: timm has no such network.{_nearest_of_timm(name)}"
                f" list_backbones('timm:*') lists its {len(known)}."
            )
        if not (self.is_published or self.is_random or self.is_user_file):
            raise ValueError(
                f"weights={weights!r} is not accepted for a timm network: give the tag in the name "
                "('timm:vit_base_patch16_224.augreg_in21k') with weights='DEFAULT'; "
                f"{_ACCEPTED} weights."
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

    def _pretrained(self) -> nn.Module:
        timm = import_timm()
        try:
            with own_random_state(RANDOM_SEED), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = freeze(timm.create_model(self.model_name, pretrained=True))
        except Exception as error:
            config = timm.get_pretrained_cfg(self.model_name)
            url = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
            reason = f"{type(error).__name__}: {error}"
            place = "anywhere, and give that path as weights=PATH"
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
