"""Networks of the user's own."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sktransfer._threads import ProcessLock
from sktransfer.networks import _weights
from sktransfer.networks._copies import copied_results
from sktransfer.networks._fingerprint import architecture_digest
from sktransfer.networks._preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from sktransfer.networks._source import RANDOM_SEED, Source, building, file_source, finish
from sktransfer.networks._stages import plan_stages
from sktransfer.networks._timm_source import timm_preprocessing
from sktransfer.networks._tracing import TracingError, trace

_snapshots: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
_snapshots_lock = ProcessLock()


class ModuleSource(Source):
    """A module of the user's, copied as it is now: what they do to it later changes nothing."""

    is_foreign = True

    def __init__(self, module: nn.Module, name: str):
        self.name = name
        state = _weights.state_digest(module)
        self.digest = f"{_architecture_digest(module)}:{state}"
        with _snapshots_lock:
            kept = _snapshots.get(self.digest)
            if kept is None:
                kept = _snapshots[self.digest] = snapshot(module)
        self.module = kept
        self.preprocessing = module_preprocessing(module)

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


def snapshot(module: nn.Module) -> nn.Module:
    # On the CPU, so that a pickle made beside a GPU opens where there is none. What a forward
    # hook or a cache of the module holds beside its parameters is copied with it.
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("cpu", copy=True), requires_grad=False)
        for p in module.parameters()
    }
    memo.update({id(b): b.detach().to("cpu", copy=True) for b in module.buffers()})
    memo.update({key: value.to("cpu") for key, value in copied_results(module).items()})
    return finish(copy.deepcopy(module, memo))


def _architecture_digest(module: nn.Module) -> str:
    """Digest of classes, settings and code; of parameters and buffers only where they hang."""
    try:
        traced = trace(module)
    except TracingError:
        return architecture_digest(module, "untraced")
    return architecture_digest(module, str(traced.graph), traced.constants)


def _check_layers(module: nn.Module, name: str) -> None:
    for path, parameter in module.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ValueError(
                f"{name} holds no values in {path!r} yet: send one batch through a lazy module, or "
                "load the weights of one that was built on the meta device, first."
            )
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                f"{name} is or holds a torch.jit module ({path or 'the network itself'!r}), whose "
                "layers cannot be told apart: give the torch.nn.Module it was made from."
            )
        if isinstance(part, (nn.modules.conv._ConvNd, nn.Linear)):
            dtype = getattr(getattr(part, "weight", None), "dtype", torch.float32)
            if dtype.is_floating_point and dtype != torch.float32:
                raise ValueError(
                    f"{name} holds weights of type {dtype} ({path or type(part).__name__!r}): "
                    "give a float32 module (module.float()); precision= chooses the type that is "
                    "computed in."
                )


def module_preprocessing(module: nn.Module) -> Preprocessing:
    """ImageNet's usual one at 224 pixels, unless a timm network says otherwise."""
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    if isinstance(config, dict) and "input_size" in config and "timm" in type(module).__module__:
        return timm_preprocessing(module)
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels == 1:
        # A network of grey images: the mean over the three channels.
        return Preprocessing(mean=(0.449,), std=(0.226,))
    return Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD)


def own_source(module: nn.Module, weights: Any) -> ModuleSource:
    """The source of a module of the user's, with its own, a file's or fresh weights."""
    module = getattr(module, "_orig_mod", module)  # torch.compile
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        module = module.module
    name = type(module).__name__
    _check_layers(module, name)
    path = file_source(weights)
    if path is not None:
        module = snapshot(module)
        _weights.fit_state_dict(
            module,
            _weights.read_state_dict(path),
            head_layers=plan_stages(module, module_preprocessing(module).input_size).head_layers(),
            source=str(path),
            name=name,
        )
    elif weights is None:
        module = _reset(module, name)
    elif weights != "DEFAULT":
        raise ValueError(
            f"weights={weights!r} is not accepted for a torch.nn.Module: 'DEFAULT' means its own, "
            "a path of a local .pt, .pth or .safetensors file fills it, None starts it afresh."
        )
    return ModuleSource(module, name)


def _reset(module: nn.Module, name: str) -> nn.Module:
    """A copy with random weights, as its layers initialise themselves; always the same ones."""
    module = snapshot(module)
    with building(seed=RANDOM_SEED):
        for path, part in module.named_modules():
            own = list(part.named_parameters(recurse=False))
            reset = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
            if callable(reset):
                reset()
            elif own:
                where = f"{path}.{own[0][0]}" if path else own[0][0]
                raise ValueError(
                    f"weights=None asks for random weights, but {name} does not say how to "
                    f"initialise {where!r}: give {type(part).__name__} a method "
                    "reset_parameters(), or build a fresh module and use weights='DEFAULT'."
                )
    return finish(module)
