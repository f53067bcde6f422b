"""Networks that cannot be traced: layers' values are caught by hooks while the network runs."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn

from sktransfer._threads import ProcessLock
from sktransfer.networks._graph import (
    checked_shape,
    copy_with_parameters,
    is_patched,
    not_accepted,
    unknown_layer,
)

# Hooks are on the module itself: the passes of two threads must not mix their values.
_lock = ProcessLock()


class _Reached(BaseException):
    """Ends a forward pass as soon as all values are there.

    Not an Exception: the network may catch those.
    """


class _Part(NamedTuple):
    """One module of a chain: the name of its value, whether it has weights, its output's shape."""

    key: str
    module: nn.Module
    has_weights: bool
    shape: tuple[int, ...] | None

    @property
    def is_map(self) -> bool:
        shape = self.shape or ()
        return len(shape) == 3 or (len(shape) == 4 and shape[2:] != (1, 1))


class HookedPlan:
    """The stages of a network that cannot be traced.

    They are everything before the last linear layer, and that layer (``"body"`` and ``"head"``);
    an ``nn.Sequential`` is cut at its children that have weights. A key is ``"name"`` for what a
    sub-module returns, ``">name"`` for what it gets, ``""`` for what the network returns.
    """

    def __init__(self, module: nn.Module, input_size: tuple[int, int, int], name: str):
        self.module, self.network_name = module, name
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self._runs: dict[tuple[int, ...], _Run] = {}
        parts, self._tail = self._split(self._run(input_size))
        self._groups = _grouped(parts)
        self.names: list[str] = []
        for k, group in enumerate(self._groups):
            has_weights = any(part.has_weights for part in group)
            name = group[-1].key if has_weights else "pool"
            if len(self._groups) == 1 or name.startswith(">"):
                name = "body"
            elif k == 0:
                name = "stem"
            is_taken = name in (*self.names, "head") or (name == "pool" and has_weights)
            self.names.append(f"{name}#{k}" if is_taken else name)
        self.stage_keys = [group[-1].key for group in self._groups]
        if self._tail:
            self.names.append("head")
            self.stage_keys.append("")

    def _split(self, run: _Run) -> tuple[list[_Part], list[nn.Module]]:
        """The parts before the head, and the modules from the head on, or none."""
        chain = [("", self.module)]
        if type(self.module) is nn.Sequential and not is_patched(self.module):
            chain = [(k, m) for k, m in self.modules.items() if k and "." not in k]
        parts = [
            _Part(name, part, _has_weights(part), run.shapes.get(run.first_names[id(part)]))
            for name, part in chain
        ]
        self._head = run.linear
        holds = [_is_in(self._head, name) for name, _ in chain]
        at = holds.index(True) if self._head and True in holds else len(chain)
        if any(next(m.parameters(), None) is not None for _, m in chain[at + 1 :]):
            return parts, []
        if at == len(chain) or parts[at].key not in run.returning:
            return parts, []
        tail = [self.modules[self._head], *(m for _, m in chain[at + 1 :])]
        name, module = chain[at]
        if name == self._head:
            while at > 1 and isinstance(chain[at - 1][1], (nn.Dropout, nn.Identity)):
                at -= 1
                tail.insert(0, chain[at][1])
            return (parts[:at], tail) if at else (parts, [])
        inner = self._head.removeprefix(f"{name}.") if name else self._head
        has_weights = _has_weights(module, but=self.modules[self._head])
        shape = run.shapes.get(f">{self._head}")
        return [*parts[:at], _Part(f">{self._head}", _Body(module, inner), has_weights, shape)], tail

    def pieces(self) -> list[tuple[str, nn.Module]]:
        """The stages as modules."""
        parts = [[part.module for part in group] for group in self._groups]
        parts += [self._tail] if self._tail else []
        glued = [part[0] if len(part) == 1 else nn.Sequential(*part) for part in parts]
        return list(zip(self.names, glued, strict=True))

    def head_layers(self) -> set[str]:
        """Dotted name of the head, if there is one."""
        return {self._head} if self._tail else set()

    # -- layers by name ---------------------------------------------------------------------
    @property
    def embedding_key(self) -> str:
        """What enters the head, or what the network returns."""
        return f">{self._head}" if self._tail else ""

    @property
    def last_map_key(self) -> str:
        return self.embedding_key

    def resolve(self, layer: str) -> str:
        """The key of a stage or sub-module."""
        if layer in self.names:
            return self.stage_keys[self.names.index(layer)]
        if layer not in self.modules or layer == "":
            names = [name for name in self.modules if name]
            raise unknown_layer(layer, self.network_name, self.names, names)
        return layer

    def shape(self, key: str, input_size: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of a layer's value for two images of `input_size`."""
        shapes = self._run(input_size).shapes
        if key not in shapes:
            raise ValueError(
                f"layer={key!r} of {self.network_name} does not run when an image is embedded, or "
                "does not return one tensor."
            )
        return checked_shape(shapes[key], key or "output", self.network_name)

    def is_channels_last(self, key: str, input_size: tuple[int, int, int]) -> bool:
        """Whether a 4-D value is N×H×W×C, as far as its shape tells."""
        shape = self.shape(key, input_size)
        return len(shape) == 4 and shape[1] == shape[2] != shape[3]

    def tokens(self, key: str) -> tuple[int | None, int]:
        """No class token and no prefix tokens are known."""
        return None, 0

    def extractor(self, keys: list[str], poolings: list[nn.Module]) -> HookedExtractor:
        """The network up to the last of the layers, returning their pooled values."""
        return HookedExtractor(self.module, keys, poolings)

    def _run(self, input_size: tuple[int, int, int]) -> _Run:
        if input_size not in self._runs:
            try:
                run = _Run(self.module, input_size)
            except Exception as error:
                raise not_accepted(self.network_name, input_size, error) from error
            if not isinstance(run.output, torch.Tensor):
                raise TypeError(
                    f"{self.network_name} returns {type(run.output).__name__}: its forward has to "
                    "return one tensor. Wrap it in a module that returns the one that is meant."
                )
            self._runs[input_size] = run
        return self._runs[input_size]


class _Run:
    """What two black images met in the network.

    Attributes
    ----------
    shapes : dict of str to tuple
        By key, in each module's first call.
    linear : str
        Name of the last linear layer.
    returning : set of str
        Modules that return what that layer gave.
    """

    def __init__(self, module: nn.Module, input_size: tuple[int, int, int]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.linear, self.returning = "", {""}
        self._value: object = None
        self.first_names = {id(part): name for name, part in module.named_modules()}
        copied = copy_with_parameters(module).eval()
        for name, part in copied.named_modules():
            self._watch(name, part)
        with torch.no_grad():
            self.output = copied(torch.zeros((2, *input_size)))

    def _watch(self, name: str, part: nn.Module) -> None:
        def note(layer: nn.Module, args: tuple, value: object) -> None:
            if isinstance(value, torch.Tensor):
                self.shapes.setdefault(name, tuple(value.shape))
            if isinstance(layer, nn.Linear) and args:
                self.shapes.setdefault(f">{name}", tuple(args[0].shape))
                self.linear, self._value, self.returning = name, value, {name}
            elif value is self._value:
                self.returning.add(name)

        part.register_forward_hook(note)


def _is_in(inner: str, name: str) -> bool:
    """Whether a module's dotted name is `name` or within it."""
    return name in ("", inner) or inner.startswith(f"{name}.")


def _has_weights(module: nn.Module, but: nn.Module | None = None) -> bool:
    """Whether a part has weights of two or more dimensions: norms have none."""
    others = {id(p) for p in but.parameters()} if but is not None else set()
    return any(p.ndim > 1 and id(p) not in others for p in module.parameters())


def _grouped(parts: list[_Part]) -> list[list[_Part]]:
    """The parts of each stage: one with weights, and those without that follow."""
    groups: list[list[_Part]] = []
    for part in parts:
        has_begun = groups and any(other.has_weights for other in groups[-1])
        # A value of several tensors is no place to cut.
        if not groups or (part.has_weights and has_begun and groups[-1][-1].shape):
            groups.append([])
        groups[-1].append(part)
    last = groups[-1]
    for i in range(1, len(last)):
        becomes_vector = last[i - 1].is_map and not last[i].is_map
        if becomes_vector and not any(part.has_weights for part in last[i:]):
            return [*groups[:-1], last[:i], last[i:]]
    return groups


class HookedExtractor(nn.Module):
    """Runs a network until the asked layers have given their values.

    Parameters
    ----------
    module : nn.Module
    keys : list of str
        ``"name"``: what the sub-module returns; ``">name"``: what it gets.
    poolings : list of nn.Module
        Applied to the values, one each, before the network continues.
    """

    def __init__(self, module: nn.Module, keys: list[str], poolings: list[nn.Module]):
        super().__init__()
        self.module, self.keys = module, list(keys)
        self.poolings = nn.ModuleList(poolings)

    def copy_to(self, device: torch.device, dtype: torch.dtype) -> HookedExtractor:
        """An independent copy elsewhere or in another type, in eval mode."""
        copied = copy.deepcopy(self.module).to(device=device, dtype=dtype)
        return HookedExtractor(copied.eval(), self.keys, list(self.poolings))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        values: dict[int, torch.Tensor] = {}

        def keep(k: int, value: object) -> None:
            # The first call's, whatever else is asked for.
            if k in values or not isinstance(value, torch.Tensor):
                return
            values[k] = self.poolings[k](value)
            if len(values) == len(self.keys):
                raise _Reached

        with _lock:
            hooks = []
            for k, key in enumerate(self.keys):
                layer = self.module.get_submodule(key.removeprefix(">"))
                hooks.append(
                    layer.register_forward_pre_hook(
                        lambda _, args, k=k: keep(k, args[0] if args else None)
                    )
                    if key.startswith(">")
                    else layer.register_forward_hook(lambda _, args, out, k=k: keep(k, out))
                )
            try:
                self.module(x)
            except _Reached:
                pass
            finally:
                for hook in hooks:
                    hook.remove()
        if missing := [key for k, key in enumerate(self.keys) if k not in values]:
            raise ValueError(
                f"layer {missing[0].removeprefix('>')!r} did not run for these images, though it "
                "did for others: give as `layer` one that always runs."
            )
        return [values[k] for k in range(len(self.keys))]


class _Body(nn.Module):
    """Everything before the head, as a stage."""

    def __init__(self, module: nn.Module, head: str):
        super().__init__()
        self.extractor = HookedExtractor(module, [f">{head}"], [nn.Identity()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.extractor(x)[0]
