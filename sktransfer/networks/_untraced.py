"""Networks whose ``forward`` no graph can hold: layers caught by hooks while they run."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from sktransfer.networks._copies import is_patched, structural_copy
from sktransfer.networks._stage_plan import DROPOUTS, checked_shape, not_accepted, unknown_layer

# Hooks hang on the module itself: two threads' passes must not fill each other's values.
_one_at_a_time = threading.RLock()

if hasattr(os, "register_at_fork"):
    # A fork waits for the pass under way: the child would inherit the hooks of a thread that it
    # does not have.
    os.register_at_fork(
        before=_one_at_a_time.acquire,
        after_in_parent=_one_at_a_time.release,
        after_in_child=_one_at_a_time.release,
    )


class _Reached(BaseException):
    """Ends a forward pass as soon as all that was asked for is there.

    Not an Exception: the network may catch those.
    """


class _Run(NamedTuple):
    """What two pictures met on their way."""

    shapes: dict[str, tuple[int, ...]]
    last_linear: str
    # Modules that return what that layer gave.
    returning: set[str]


class _Link(NamedTuple):
    """A part of a chain, and the key of what it gives."""

    key: str
    module: nn.Module
    has_weights: bool
    shape: tuple[int, ...] | None

    @property
    def is_map(self) -> bool:
        shape = self.shape or ()
        return len(shape) == 3 or (len(shape) == 4 and shape[2:] != (1, 1))


class HookedPlan:
    """What :class:`StagePlan` is, for a network that runs but cannot be traced.

    The last linear layer, if nothing learnt comes after it, is the ``"head"``. Of an
    ``nn.Sequential`` the parts that have weights are stages, each with what follows it and
    called by the last of that; what turns the last map into a vector is the ``"pool"``. Of any
    other network all that comes before the head is the ``"body"``. Of a layer that runs several
    times the first call counts.
    """

    def __init__(self, module: nn.Module, input_size: tuple[int, int, int], name: str):
        self.module, self.network_name = module, name
        self.modules = dict(module.named_modules())
        self._runs: dict[tuple[int, int, int], _Run] = {}
        self._run = self._run_once(input_size)
        links, self._tail = self._split()
        self._head = self._run.last_linear if self._tail else None
        self._groups = _grouped(links)
        self._keys = dict(
            zip(self._names(), [group[-1].key for group in self._groups], strict=True)
        )
        if self._tail:
            self._keys["head"] = ""

    @property
    def names(self) -> list[str]:
        return list(self._keys)

    @property
    def stage_keys(self) -> list[str]:
        """What each stage ends with."""
        return list(self._keys.values())

    @property
    def _is_chain(self) -> bool:
        return _is_plain_chain(self.module)

    def pieces(self) -> list[tuple[str, nn.Module]]:
        """The stages as modules."""
        parts = [[link.module for link in group] for group in self._groups]
        parts += [self._tail] if self._tail else []
        glued = [part[0] if len(part) == 1 else nn.Sequential(*part) for part in parts]
        return list(zip(self.names, glued, strict=True))

    def unheard_in_training(self, stages: Sequence[str]) -> list[str]:
        """None: the network's own code runs, in training as well."""
        return []

    def head_layers(self) -> set[str]:
        """Dotted name of the head, if there is one."""
        return set() if self._head is None else {self._head}

    # -- stages -----------------------------------------------------------------------------
    def _split(self) -> tuple[list[_Link], list[nn.Module]]:
        """The parts before the head, and the modules from the head on, or none."""
        chain = self._chain("", self.module)
        links = [self._link(*part) for part in chain]
        head = self._run.last_linear
        at = next((i for i, (name, _) in enumerate(chain) if head and _is_in(head, name)), None)
        if at is None or any(next(m.parameters(), None) is not None for _, m in chain[at + 1 :]):
            return links, []
        name, part = chain[at]
        tail = [self.modules[head], *(module for _, module in chain[at + 1 :])]
        if name == head:
            while at and isinstance(chain[at - 1][1], (*DROPOUTS, nn.Identity)):
                at -= 1
                tail.insert(0, chain[at][1])
            return (links[:at], tail) if at else (links, [])
        if name not in self._run.returning:
            return links, []
        inner = head.removeprefix(f"{name}.") if name else head
        body = _Body(HookedExtractor(part, [f">{inner}"], [nn.Identity()]))
        has_weights = _has_weights(part, but=self.modules[head])
        shape = self._run.shapes.get(f">{head}")
        return [*links[:at], _Link(f">{head}", body, has_weights, shape)], tail

    def _chain(self, name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The parts of nested chains; one that is neither the head's nor the most stays whole."""
        head = self._run.last_linear
        n_body = _n_parameters(self.module) - (_n_parameters(self.modules[head]) if head else 0)
        is_opened = _is_in(head, name) or _n_parameters(module) >= 0.9 * max(1, n_body)
        if not (_is_plain_chain(module) and is_opened):
            return [(name, module)]
        prefix = f"{name}." if name else ""
        # The children themselves: named_children leaves out what comes a second time.
        children = module._modules.items()
        return [part for key, m in children if m for part in self._chain(f"{prefix}{key}", m)]

    def _link(self, name: str, module: nn.Module) -> _Link:
        known = next(key for key, part in self.modules.items() if part is module)
        return _Link(name, module, _has_weights(module), self._run.shapes.get(known))

    def _names(self) -> list[str]:
        names: list[str] = []
        for k, group in enumerate(self._groups):
            key = group[-1].key
            if k and not any(link.has_weights for link in group):
                name = "pool"
            elif key == "" or key.startswith(">"):
                name = "body"
            else:
                is_taken = key == "pool" or (key == "head" and self._tail)
                name = f"{key}#{k}" if is_taken else key
            names.append(name)
        return names

    # -- layers by name ---------------------------------------------------------------------
    @property
    def embedding_key(self) -> str:
        """``">head"``: what enters the sub-module `head`; ``""``: what the network returns."""
        return "" if self._head is None else f">{self._head}"

    @property
    def last_map_key(self) -> str:
        return self.embedding_key

    def resolve(self, layer: str) -> str:
        """The sub-module that a name stands for."""
        if layer in self._keys and not (self._is_chain and layer in self.modules):
            return self._keys[layer]
        if layer not in self.modules or layer == "":
            names = [name for name in self.modules if name]
            raise unknown_layer(layer, self.network_name, self.names, names)
        return layer

    def shape(self, key: str, input_size: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of a layer's value for two pictures of `input_size`."""
        shapes = self._run_once(input_size).shapes
        if key not in shapes:
            raise ValueError(
                f"layer={key!r} of {self.network_name} does not run when a picture is embedded, or "
                "does not return one tensor."
            )
        return checked_shape(shapes[key], key or "output", self.network_name)

    def is_channels_last(self, key: str, input_size: tuple[int, int, int]) -> bool:
        """Whether a 4-D value is N×H×W×C, as far as its shape tells."""
        shape = self.shape(key, input_size)
        return len(shape) == 4 and shape[1] == shape[2] != shape[3]

    def tokens(self, key: str) -> tuple[int | None, int]:
        """Nothing is known of class tokens."""
        return None, 0

    def extractor(self, keys: list[str], poolings: list[nn.Module]) -> HookedExtractor:
        """The network up to the last of the layers, returning their pooled values."""
        return HookedExtractor(self.module, keys, poolings)

    def _run_once(self, input_size: tuple[int, int, int]) -> _Run:
        """Send two black pictures through, and note shapes and the last linear layer."""
        if input_size in self._runs:
            return self._runs[input_size]
        shapes: dict[str, tuple[int, ...]] = {}
        last: dict[str, Any] = {"name": "", "value": None}
        returning: set[str] = set()

        def note(name: str) -> Any:
            def hook(layer: nn.Module, args: Any, value: Any) -> None:
                if isinstance(value, torch.Tensor):
                    shapes.setdefault(name, tuple(value.shape))
                if isinstance(layer, nn.Linear) and args:
                    shapes.setdefault(f">{name}", tuple(args[0].shape))
                    last.update(name=name, value=value)
                    returning.clear()
                elif value is last["value"]:
                    returning.add(name)

            return hook

        try:
            module = structural_copy(self.module).eval()
            for name, part in module.named_modules():
                part.register_forward_hook(note(name))
            with torch.no_grad():
                device = next((p.device for p in module.parameters()), "cpu")
                out = module(torch.zeros((2, *input_size), device=device))
        except Exception as error:
            raise not_accepted(self.network_name, input_size, error) from error
        if not isinstance(out, torch.Tensor):
            raise TypeError(
                f"{self.network_name} returns {type(out).__name__}: its forward has to return one "
                "tensor. Wrap it in a module that returns the one that is meant."
            )
        run = self._runs[input_size] = _Run(shapes, last["name"], returning)
        return run


def _is_plain_chain(module: nn.Module) -> bool:
    """Whether a module is its children one after another and nothing else."""
    return type(module) is nn.Sequential and not is_patched(module)


def _is_in(inner: str, name: str) -> bool:
    """Whether a module's dotted name is `name` or within it."""
    return name in ("", inner) or inner.startswith(f"{name}.")


def _n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _has_weights(module: nn.Module, but: nn.Module | None = None) -> bool:
    """Whether a part has weights of two or more dimensions: no norm and no activation."""
    others = {id(p) for p in but.parameters()} if but is not None else set()
    own = [p for p in module.parameters() if id(p) not in others]
    return any(p.ndim >= 2 for p in own) and not isinstance(module, nn.LayerNorm)


def _grouped(links: list[_Link]) -> list[list[_Link]]:
    """Put the parts of a chain together into stages, cut where one tensor crosses."""
    groups: list[list[_Link]] = []
    for link in links:
        has_begun = groups and any(part.has_weights for part in groups[-1])
        if not groups or (link.has_weights and has_begun and groups[-1][-1].shape):
            groups.append([])
        groups[-1].append(link)
    last = groups[-1]
    start = next((i for i in range(len(last), 0, -1) if last[i - 1].has_weights), len(last))
    for i in range(start, len(last)):
        if last[i - 1].is_map and not last[i].is_map:
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
        Applied to the values, one each, before the network goes on.
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
        with _one_at_a_time:
            return self._forward(x)

    def _forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        values: dict[int, torch.Tensor] = {}
        modules = dict(self.module.named_modules())
        hooks = []

        def keep(k: int, value: Any) -> None:
            # The first call's, whatever else is asked for.
            if k in values or not isinstance(value, torch.Tensor):
                return
            values[k] = self.poolings[k](value)
            if len(values) == len(self.keys):
                raise _Reached

        for k, key in enumerate(self.keys):
            layer = modules[key.removeprefix(">")]
            if key.startswith(">"):
                hooks.append(
                    layer.register_forward_pre_hook(
                        lambda _, args, k=k: keep(k, args[0] if args else None)
                    )
                )
            else:
                hooks.append(layer.register_forward_hook(lambda _, args, out, k=k: keep(k, out)))
        try:
            self.module(x)
        except _Reached:
            pass
        finally:
            for handle in hooks:
                handle.remove()
        if missing := [key for k, key in enumerate(self.keys) if k not in values]:
            raise ValueError(
                f"layer {missing[0].removeprefix('>')!r} did not run for these pictures, though it "
                "did for others: give as `layer` one that always runs."
            )
        return [values[k] for k in range(len(self.keys))]


class _Body(nn.Module):
    """Everything before the head, as a stage."""

    def __init__(self, extractor: HookedExtractor):
        super().__init__()
        self.extractor = extractor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.extractor(x)[0]
