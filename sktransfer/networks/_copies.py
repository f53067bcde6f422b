"""Throw-away copies of a module: what runs in one leaves the user's own alone."""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def structural_copy(module: nn.Module) -> nn.Module:
    """A copy with the same parameters; buffers, containers and all else are its own."""
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    memo.update(copied_results(module))
    return copy.deepcopy(module, memo)


def copied_results(module: nn.Module) -> dict[int, torch.Tensor]:
    """Copies, by id, of the tensors that parts of `module` computed, which deepcopy refuses."""
    return {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }


def shallow_copy(module: nn.Module, attributes: dict[str, Any]) -> nn.Module:
    """Another object with the same contents, and `attributes`."""
    # copy.copy would ask the module, and a parametrised one refuses.
    copied = object.__new__(type(module))
    copied.__dict__.update(vars(module), **attributes)
    return copied


def is_patched(part: nn.Module) -> bool:
    """Whether one object does something else than its class says."""
    is_hooked = part._forward_hooks or part._forward_pre_hooks
    return bool(is_hooked) or not vars(part).keys().isdisjoint({"forward", "_conv_forward"})


def contents(module: nn.Module) -> list[tuple[Any, int]]:
    """All that hangs in a module; tensors with how often they were written to."""
    return list(_contents(module, set()))


def are_same(before: list[tuple[Any, int]], after: list[tuple[Any, int]]) -> bool:
    """Whether nothing came, went or was written to between two looks at a module's contents."""
    return len(before) == len(after) and all(
        a is b and n == m for (a, n), (b, m) in zip(before, after, strict=True)
    )


def _contents(value: Any, seen: set[int]) -> Iterator[tuple[Any, int]]:
    is_tensor = isinstance(value, torch.Tensor)
    yield value, value._version if is_tensor and not value.is_inference() else 0
    if id(value) in seen or is_tensor:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        inner: Any = [part for item in value.items() for part in item]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        inner = list(value)
    elif type(value).__module__.partition(".")[0] in sys.stdlib_module_names:
        return  # packages, functions, loggers: not the module's own
    else:
        inner = list(getattr(value, "__dict__", {}).values())
    for part in inner:
        yield from _contents(part, seen)
