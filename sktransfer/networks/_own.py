"""Modules that the user gives as `backbone`."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sktransfer._threads import own_random_state
from sktransfer.networks import _weights
from sktransfer.networks._fingerprint import architecture_digest
from sktransfer.networks._preprocessing import Preprocessing
from sktransfer.networks._published import timm_preprocessing
from sktransfer.networks._sources import GivenSource, freeze, random_seed, weights_path
from sktransfer.networks._stages import plan_stages

# Equal modules share one copy.
_copies: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


class ModuleSource(GivenSource):
    """A copy of a user's module, which later changes of the module do not affect."""

    is_user_code = True

    def __init__(self, module: nn.Module, name: str) -> None:
        digest = f"{architecture_digest(module)}:{_weights.state_digest(module)}"
        kept = _copies.get(digest)
        if kept is None:
            kept = _copies[digest] = _copied(module, name)
        super().__init__(name, module_preprocessing(module), kept, digest)

    def __deepcopy__(self, memo: dict) -> ModuleSource:
        return self  # it is immutable


def own_source(backbone: nn.Module | Callable, weights: object) -> ModuleSource:
    """Return the source of a user's module with its own, a file's or new random weights."""
    module = backbone
    if not isinstance(module, nn.Module):
        with own_random_state():  # the caller's state is not changed if it draws random weights
            module = backbone()
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"backbone={backbone!r} returned {type(module).__name__}: a callable backbone takes no "
            "argument and returns a torch.nn.Module."
        )
    module = getattr(module, "_orig_mod", module)  # torch.compile
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        module = module.module
    name = type(module).__name__
    _check_layers(module, name)
    path = weights_path(weights)
    if path is not None:
        module = _copied(module, name)
        plan = plan_stages(module, module_preprocessing(module).input_size, name)
        state = _weights.read_state_dict(path, module.state_dict().keys())
        _weights.fit_state_dict(module, state, plan.head_layers(), f"{name}, {path}")
    elif weights is None:
        module = _reset(_copied(module, name), name)
    elif weights != "DEFAULT":
        raise ValueError(
            f"weights={weights!r} is not accepted for a torch.nn.Module: 'DEFAULT' means its own, "
            "a path of a local .pt, .pth or .safetensors file fills it, None gives it new random "
            "ones."
        )
    else:
        _weights.warn_unless_finite(module, name)
    return ModuleSource(module, name)


def module_preprocessing(module: nn.Module) -> Preprocessing:
    """Return ImageNet's usual preprocessing at 224 pixels, or that of a timm network."""
    config = getattr(module, "pretrained_cfg", None)
    if isinstance(config, dict) and "input_size" in config and "timm" in type(module).__module__:
        return timm_preprocessing(module)
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels == 1:
        # A network for grey images: the means over ImageNet's three channels.
        return Preprocessing(mean=(0.449,), std=(0.226,))
    return Preprocessing()


def _check_layers(module: nn.Module, name: str) -> None:
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                f"{name} is or holds a torch.jit module ({path or 'the network itself'!r}), which "
                "cannot be split into layers: give the torch.nn.Module it was made from."
            )
    for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor) or tensor.is_meta:
            raise ValueError(
                f"{name} holds no values in {path!r} yet: send one batch through a lazy module, or "
                "load the weights of one that was built on the meta device, first."
            )
        if fault := _weights.fault_of(tensor):
            raise ValueError(f"{name}: {path!r} {fault}. Dense tensors of numbers are needed.")
    for path, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(
                f"{name} holds weights of type {parameter.dtype} ({path!r}): give a float32 module "
                "(module.float()); precision= chooses the type for computing."
            )


def _copied(module: nn.Module, name: str) -> nn.Module:
    try:
        # On the CPU, so that a pickle made on a machine with a GPU opens on one without.
        return freeze(copy.deepcopy(module).to("cpu"))
    except Exception as error:
        raise TypeError(
            f"{name} cannot be copied ({type(error).__name__}: {error}). Give as `backbone` a "
            "function that builds it, or a module that keeps nothing of its last forward()."
        ) from error


def _reset(module: nn.Module, name: str) -> nn.Module:
    """Initialise each layer by its own method, always with the same random numbers."""
    with own_random_state(random_seed.get()):
        for path, part in module.named_modules():
            own = list(part.named_parameters(path, recurse=False))
            # nn.MultiheadAttention has the second name.
            reset = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
            if callable(reset):
                reset()
            elif own:
                raise ValueError(
                    f"weights=None asks for random weights, but {name} does not say how to "
                    f"initialise {own[0][0]!r}: give {type(part).__name__} a method "
                    "reset_parameters(), or build a new module and use weights='DEFAULT'."
                )
    return freeze(module)
