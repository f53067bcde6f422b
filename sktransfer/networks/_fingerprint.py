"""Digests of what modules and functions compute, equal in every process.

They contain the values of attributes, the compiled code of the user's classes and functions with
the globals that it reads, and the names of those of installed packages. Compiled code rather than
source text, because an edit of the file does not change what runs, and notebooks have no files. An
object that cannot be digested gets a random digest, so that its embeddings are not shared.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import sys
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import PurePath

import torch
from torch import fx, nn

from sktransfer.networks._weights import state_digest

_ATOMS = (int, float, complex, bool, str, bytes, type(None), type(...))
_WRAPPED = {
    staticmethod: "__func__",
    classmethod: "__func__",
    property: "fget",
    functools.cached_property: "func",
}
# Attributes of every module. Its tensors and hooks are digested separately.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def architecture_digest(module: nn.Module) -> str:
    """Return the digest of a module without the values of its parameters and buffers.

    It is the same in train and eval mode. An attribute `fingerprint`, a string, replaces it.
    """
    own = getattr(module, "fingerprint", None)
    return own if isinstance(own, str) else _Digester(module).modules(module)


def function_digest(function: Callable) -> str:
    """Return the digest of a callable, or its attribute `fingerprint`, a string."""
    own = getattr(function, "fingerprint", None)
    return own if isinstance(own, str) else _Digester().of(function)


class _Digester:
    def __init__(self, module: nn.Module | None = None) -> None:
        # An object that was seen before is digested by its name, so that circles end. The objects
        # are kept, because Python may reuse the id of one that was deleted.
        parts = [] if module is None else module.named_modules()
        self._seen: dict[int, tuple[object, str]] = {id(p): (p, name) for name, p in parts}

    def of(self, value: object) -> str:
        if type(value) in _ATOMS:
            return _hash(type(value).__name__, repr(value))
        if isinstance(value, (tuple, frozenset, types.CodeType)):
            return self._digest(value)
        if id(value) in self._seen:
            return _hash("met", self._seen[id(value)][1])
        self._seen[id(value)] = value, f"#{len(self._seen)}"
        try:
            return self._digest(value)
        except Exception:  # the object cannot be pickled
            return uuid.uuid4().hex

    def modules(self, module: nn.Module) -> str:
        """Digest the classes, attributes and forward hooks of a module's parts."""
        digests = []
        for name, part in module.named_modules():
            own = vars(part)
            hooks = [list(own[k].values()) for k in sorted(own) if k.startswith("_forward_")]
            carried = {k: own[k] for k in sorted(own) if k not in _MODULE_ATTRIBUTES}
            digests += [name, *map(self.of, (type(part), hooks, carried))]
        return _hash("modules", *digests)

    def _digest(self, value: object) -> str:
        if isinstance(value, nn.Module):
            return _hash(self.modules(value), state_digest(value))
        if isinstance(value, torch.Tensor):
            flat = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            return _hash("tensor", value.dtype, tuple(value.shape), flat.numpy().tobytes())
        if isinstance(value, fx.Graph):
            return _hash("graph", value)
        if isinstance(value, PurePath):  # equal ones may be pickled from other parts
            return _hash("path", type(value).__name__, value)
        if isinstance(value, types.CodeType):
            return _hash("code", value.co_code, *value.co_names, *map(self.of, value.co_consts))
        if isinstance(value, types.FunctionType):
            return _hash("function", *self._function(value))
        if isinstance(value, types.MethodType):
            return _hash("method", self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, type):
            return _hash("class", *(part for base in value.__mro__ for part in self._class(base)))
        if attribute := _WRAPPED.get(type(value)):
            return self.of(getattr(value, attribute))
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return _hash(type(value).__name__, *map(self.of, value))
        if isinstance(value, dict) and type(value) is dict:
            return _hash("dict", *(self.of(part) for item in value.items() for part in item))
        if isinstance(value, (set, frozenset)):
            return _hash("set", *sorted(map(self.of, value)))
        reduced = value.__reduce_ex__(4)
        if isinstance(reduced, str):  # a global, such as a function under functools.lru_cache
            name = f"{getattr(value, '__module__', '')}.{reduced}"
            return _hash("global", name, self.of(getattr(value, "__wrapped__", None)))
        parts = (list(part) if isinstance(part, Iterator) else part for part in reduced)
        return _hash("object", self.of(type(value)), *map(self.of, parts))

    def _function(self, function: types.FunctionType) -> Iterator[str]:
        if not _is_own(function) and "<" not in function.__qualname__:  # <locals>, <lambda>
            yield _name(function)
            return
        yield self.of(function.__code__)
        yield self.of(list(_globals_read(function.__code__, function.__globals__)))
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        yield self.of([function.__defaults__, function.__kwdefaults__, cells, vars(function)])

    def _class(self, kind: type) -> Iterator[str]:
        yield _name(kind) if not _is_own(kind) else kind.__qualname__
        for name, value in sorted(vars(kind).items() if _is_own(kind) else ()):
            is_method = isinstance(value, (types.FunctionType, *_WRAPPED))
            if is_method or not (name.startswith("__") or name == "_abc_impl"):
                yield from (name, self.of(value))


def _globals_read(code: types.CodeType, names: dict[str, object]) -> Iterator[tuple[str, object]]:
    """Find the globals that code reads, except modules."""
    for step in dis.get_instructions(code):
        name = step.argval
        is_read = step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and name in names
        if is_read and not isinstance(names[name], types.ModuleType):
            yield name, names[name]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_read(constant, names)


def _is_own(thing: type | types.FunctionType) -> bool:
    """Whether it is the user's code, not that of an installed package."""
    top = f"{thing.__module__}".partition(".")[0]
    if top == "__main__" or top in sys.stdlib_module_names or top == "sktransfer":
        return top == "__main__"
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return not ("site-packages" in file or "dist-packages" in file)


def _name(thing: type | types.FunctionType) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _hash(*parts: object) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
