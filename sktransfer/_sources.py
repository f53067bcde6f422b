"""Where a network comes from: torchvision, timm, the package itself, or the user."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights, list_models

from sktransfer import _weights
from sktransfer._preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

_RANDOM_SEED = 0
_build_lock = threading.RLock()


class Source(ABC):
    """A network that can be built again: what it is, and with which weights.

    Attributes
    ----------
    name : str
        As the user said it.
    preprocessing : Preprocessing
        What the weights were trained with.
    digest : str
        Tells its weights and architecture from any others.
    """

    name: str
    preprocessing: Preprocessing
    digest: str

    @property
    def key(self) -> tuple:
        """Equal for sources that give the same network."""
        return (type(self).__name__, self.name, self.digest)

    @abstractmethod
    def build(self) -> nn.Module:
        """The architecture in eval mode; its tensors may hold no values yet."""

    @abstractmethod
    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        """Fill `module`, which :meth:`build` made, with the weights."""


# -- building -------------------------------------------------------------------------------
class _EmptyOnMeta(TorchFunctionMode):
    """New layers get no memory and no initial values, as weights come from a file."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def _building(*, seed: int | None = None) -> Iterator[None]:
    """Build without moving the user's random state; `seed`: with initial values, from it."""
    with _build_lock, torch.random.fork_rng(devices=[]), contextlib.ExitStack() as stack:
        if seed is None:
            stack.enter_context(_EmptyOnMeta())
        else:
            torch.random.default_generator.manual_seed(seed)
        yield


def _finish(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def _fill_randomly(module: nn.Module, fresh: nn.Module) -> None:
    module.load_state_dict(fresh.state_dict(), assign=True)
    _finish(module)


def _file_source(weights: Any) -> Path | None:
    """The path, if `weights` is one rather than the name of published weights."""
    if isinstance(weights, os.PathLike):
        return _weights.check_weights_path(weights)
    if isinstance(weights, str) and (
        "/" in weights or os.sep in weights or Path(weights).suffix or weights.startswith("~")
    ):
        return _weights.check_weights_path(weights)
    return None


class _FileMixin:
    """Weights from a local file, and the proof that it is still the same file."""

    name: str
    path: Path
    file_digest: str
    key_report: _weights.KeyReport

    def _check_unchanged(self) -> None:
        if not self.path.is_file():
            raise FileNotFoundError(
                f"The weights file {str(self.path)!r} of {self.name} is gone: put it back."
            )
        got = _weights.file_digest(self.path)
        if got != self.file_digest:
            raise ValueError(
                f"The weights file {str(self.path)!r} of {self.name} has changed since this was "
                f"fitted (SHA-256 {got[:12]}… now, {self.file_digest[:12]}… then): put the old "
                "file back, or fit again."
            )

    def _load_file(self, module: nn.Module, head_layers: set[str]) -> None:
        self._check_unchanged()
        self.key_report = _weights.fit_state_dict(
            module,
            _weights.read_state_dict(self.path),
            head_layers=head_layers,
            source=str(self.path),
            name=self.name,
        )
        _finish(module)


def _random_digest(name: str) -> str:
    versions = f"torch-{torch.__version__}:torchvision-{torchvision.__version__}"
    return f"random:{_RANDOM_SEED}:{name}:{versions}"


# -- torchvision ----------------------------------------------------------------------------
def torchvision_names() -> list[str]:
    """Torchvision's classification builders."""
    return list_models(module=torchvision.models)


class TorchvisionSource(_FileMixin, Source):
    """A classification builder of torchvision, with published, local or random weights."""

    def __init__(self, name: str, weights: Any):
        self.name = name
        self.url: str | None = None
        self.kwargs: dict[str, Any] = {}
        members = get_model_weights(name)
        published = members.DEFAULT  # type: ignore[attr-defined]
        self.is_random = weights is None
        path = _file_source(weights)
        if weights is not None and path is None:
            published = _published(name, members, weights)
            self.url = published.url
            path = _weights.fetch(self.url, name=name)
        if "image_size" in _builder_parameters(name):
            # Vision transformers are built for one input size.
            self.kwargs["image_size"] = published.meta["min_size"][0]
            if path is not None and self.url is None:
                published = self._fit_image_size(path, members, published)
        if path is None:
            self.digest = _random_digest(name)
        else:
            self.path = path
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
        with _building():
            return _finish(get_model_builder(self.name)(weights=None, **self.kwargs))

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        if not self.is_random:
            if self.url is not None:
                self.path = _weights.fetch(self.url, name=self.name)
            self._load_file(module, head_layers | {"aux1", "aux2", "AuxLogits"})
            return
        kwargs = dict(self.kwargs)
        if "init_weights" in kwargs:
            kwargs["init_weights"] = True
        with _building(seed=_RANDOM_SEED):
            fresh = get_model_builder(self.name)(weights=None, **kwargs)
        _fill_randomly(module, fresh)


def _builder_parameters(name: str) -> set[str]:
    return {"image_size"} if name.startswith("vit_") else set()


def _published(name: str, members: Any, weights: Any) -> WeightsEnum:
    if isinstance(weights, WeightsEnum):
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


# -- the package's own ----------------------------------------------------------------------
class BuiltinSource(_FileMixin, Source):
    """The small network whose weights ship in the package."""

    name = "builtin"

    def __init__(self, weights: Any):
        from sktransfer import _builtin

        versions = _builtin.VERSIONS
        self.is_random = weights is None
        path = _file_source(weights)
        version = versions[_builtin.DEFAULT]
        if weights is not None and path is None:
            if not isinstance(weights, str) or weights not in ("DEFAULT", *versions):
                raise ValueError(
                    f"weights={weights!r} is not among the weights of the built-in backbone: "
                    f"{['DEFAULT', *versions]}. A path of a local .pt, .pth or .safetensors file "
                    "is accepted too, and None for random weights."
                )
            version = versions[_builtin.DEFAULT if weights == "DEFAULT" else weights]
            self.file_digest = version.sha256
            self.path = version.path
        elif path is not None:
            self.path, self.file_digest = path, _weights.file_digest(path)
        self.num_classes = version.num_classes
        self.is_shipped = path is None
        self.digest = _random_digest("builtin") if self.is_random else f"sha256:{self.file_digest}"
        self.preprocessing = Preprocessing(
            size=version.size,
            crop=version.crop or version.size,
            mean=version.mean,
            std=version.std,
            interpolation=version.interpolation,
        )

    def build(self) -> nn.Module:
        from sktransfer._builtin._network import BuiltinNet

        with _building():
            return _finish(BuiltinNet(self.num_classes))

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        if not self.is_random:
            if self.is_shipped:  # wherever the package is installed now
                from sktransfer import _builtin

                self.path = Path(_builtin.__file__).with_name(self.path.name)
            self._load_file(module, head_layers)
            return
        from sktransfer._builtin._network import BuiltinNet

        with _building(seed=_RANDOM_SEED):
            fresh = BuiltinNet(self.num_classes)
        _fill_randomly(module, fresh)


# -- timm -----------------------------------------------------------------------------------
class TimmSource(_FileMixin, Source):
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
                f"backbone={name!r}: timm has no such network.{_did_you_mean(name, known, 'timm:')}"
                f" list_backbones('timm:*') lists its {len(known)}."
            )
        self.is_random = weights is None
        self.is_published = False
        path = _file_source(weights)
        if path is not None:
            self.path, self.file_digest = path, _weights.file_digest(path)
            self.digest = f"sha256:{self.file_digest}"
        elif weights is None:
            self.digest = _random_digest(name) + f":timm-{timm.__version__}"
        elif weights == "DEFAULT":
            self.is_published = True
            self.digest = _weights.state_digest(self._pretrained())
        else:
            raise ValueError(
                f"weights={weights!r} is not accepted for a timm network: give the tag in the name "
                "('timm:vit_base_patch16_224.augreg_in21k') with weights='DEFAULT', a path of a "
                "local .pt, .pth or .safetensors file, or None for random weights."
            )
        self.preprocessing = timm_preprocessing(self._skeleton())

    def _skeleton(self) -> nn.Module:
        with _building():
            return import_timm().create_model(self.model_name, pretrained=False)

    def _pretrained(self) -> nn.Module:
        timm = import_timm()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _finish(timm.create_model(self.model_name, pretrained=True))
        except Exception as error:
            config = timm.get_pretrained_cfg(self.model_name)
            where = getattr(config, "url", "") or f"https://huggingface.co/{config.hf_hub_id}"
            raise OSError(
                f"The weights of {self.name} are not on this machine and could not be downloaded "
                f"({type(error).__name__}: {str(error).strip()[:200]}).\n"
                f"  from: {where}\n"
                "  put them: anywhere, and give that path as weights=PATH\n"
                "backbone='builtin' needs no network, and weights=PATH takes a local .pt, .pth or "
                ".safetensors file."
            ) from error

    def build(self) -> nn.Module:
        return _finish(self._skeleton())

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        if self.is_published:
            pretrained = self._pretrained()
            if _weights.state_digest(pretrained) != self.digest:
                raise ValueError(
                    f"timm's published weights of {self.name} are no longer those that this was "
                    "fitted with: fit again."
                )
            module.load_state_dict(pretrained.state_dict(), assign=True)
            _finish(module)
        elif self.is_random:
            with _building(seed=_RANDOM_SEED):
                fresh = import_timm().create_model(self.model_name, pretrained=False)
            _fill_randomly(module, fresh)
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


# -- the user's own -------------------------------------------------------------------------
_snapshots: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
_snapshots_lock = threading.Lock()


class ModuleSource(Source):
    """A module of the user's, copied as it is now: what they do to it later changes nothing."""

    def __init__(self, module: nn.Module, name: str):
        module = getattr(module, "_orig_mod", module)  # torch.compile
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        self.name = name
        self.digest = f"{_architecture_digest(module)}:{_weights.state_digest(module)}"
        with _snapshots_lock:
            kept = _snapshots.get(self.digest)
            if kept is None:
                kept = _snapshots[self.digest] = _snapshot(module)
        self.module = kept
        self.preprocessing = _module_preprocessing(module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with _snapshots_lock:
            self.module = _snapshots.setdefault(self.digest, self.module)

    def __deepcopy__(self, memo: dict) -> ModuleSource:
        return self  # nothing alters it

    def build(self) -> nn.Module:
        return self.module

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        return


def _snapshot(module: nn.Module) -> nn.Module:
    # On the CPU, so that a pickle made beside a GPU opens where there is none. What a forward
    # hook or a cache of the module holds beside its parameters is copied with it.
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("cpu", copy=True), requires_grad=False)
        for p in module.parameters()
    }
    memo.update({id(b): b.detach().to("cpu", copy=True) for b in module.buffers()})
    return _finish(copy.deepcopy(module, memo))


def _architecture_digest(module: nn.Module) -> str:
    """Digest of classes, settings and code; of tensors only where they hang."""
    import hashlib

    from sktransfer._tracing import TracingError, trace

    digest = hashlib.sha256()
    for path, part in module.named_modules():
        kind = type(part)
        settings = {
            name: value
            for name, value in sorted(vars(part).items())
            if not name.startswith("_")
            and name != "training"
            and isinstance(value, (int, float, str, bool, tuple, type(None)))
        }
        digest.update(f"{path}|{kind.__module__}.{kind.__qualname__}|{settings!r};".encode())
    try:
        digest.update(repr(trace(module).graph).encode())
    except TracingError:
        digest.update(b"untraced")
    return digest.hexdigest()


def _module_preprocessing(module: nn.Module) -> Preprocessing:
    """ImageNet's usual one at 224 pixels, unless a timm network says otherwise."""
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    if isinstance(config, dict) and "input_size" in config and "timm" in type(module).__module__:
        return timm_preprocessing(module)
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels == 1:
        # A network of grey images: the mean over the three channels.
        return Preprocessing(mean=(0.449,), std=(0.226,))
    return Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD)


# -- names ----------------------------------------------------------------------------------
def resolve_source(backbone: Any, weights: Any) -> Source:
    """What `backbone` and `weights` name together."""
    if isinstance(backbone, Source):
        return backbone
    if isinstance(backbone, nn.Module):
        return _own_source(backbone, type(backbone).__name__, weights)
    if isinstance(backbone, str):
        return _named_source(backbone, weights)
    if callable(backbone):
        made = backbone()
        if not isinstance(made, nn.Module):
            raise TypeError(
                f"backbone={backbone!r} returned {type(made).__name__}: a callable backbone takes "
                "no argument and returns a torch.nn.Module."
            )
        return _own_source(made, type(made).__name__, weights)
    raise TypeError(
        f"backbone={backbone!r} is a {type(backbone).__name__}: a name (see list_backbones()), a "
        "torch.nn.Module or a callable that returns one is accepted."
    )


def _named_source(name: str, weights: Any) -> Source:
    if name == "builtin":
        return BuiltinSource(weights)
    if name.startswith("timm:"):
        return TimmSource(name, weights)
    known = torchvision_names()
    if name in known:
        return TorchvisionSource(name, weights)
    raise ValueError(
        f"backbone={name!r} is not known.{_did_you_mean(name, [*known, 'builtin'])} "
        "list_backbones() lists what is; 'timm:NAME' names one of timm's."
    )


def _own_source(module: nn.Module, name: str, weights: Any) -> ModuleSource:
    path = _file_source(weights)
    if path is not None:
        from sktransfer._stages import plan_stages

        module = _snapshot(module)
        _weights.fit_state_dict(
            module,
            _weights.read_state_dict(path),
            head_layers=plan_stages(module, _module_preprocessing(module).input_size).head_layers(),
            source=str(path),
            name=name,
        )
    elif weights not in ("DEFAULT", None):
        raise ValueError(
            f"weights={weights!r} is not accepted for a torch.nn.Module: its own weights are used "
            "with 'DEFAULT', or a path of a local .pt, .pth or .safetensors file fills it."
        )
    return ModuleSource(module, name)


def _did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    bare = name.removeprefix("timm:")
    close = get_close_matches(bare.lower(), known, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(prefix + c) for c in close)}?" if close else ""
