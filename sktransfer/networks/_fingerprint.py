"""Digests of code and of what objects carry, equal in every process.

Of the standard library, torch and the like the names tell enough; everybody else's functions and
methods are told by their bytecode, with the globals, defaults and closures they read, and modules
of the user's own by their source. Nothing here depends on an ``id()``, an address in a ``repr`` or
the order of a set.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import types
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from sktransfer.networks._own_code import (
    imports,
    is_installed,
    is_library,
    read_globals,
    sources_behind,
)

_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None), type(...)})
# A lock carries nothing that a result could depend on; a handle holds a counter of the process.
_BY_TYPE_ALONE = (type(threading.Lock()), type(threading.RLock()), RemovableHandle)
# What every module has: tensors and parts are told apart elsewhere, hooks one by one.
_BOOKKEEPING = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
_MAX_DEPTH = 64


def unique(value: Any) -> bytes:
    """For what cannot be digested: equal to nothing, not even to itself."""
    return uuid.uuid4().bytes


def digest_of(value: Any, on_unknown: Callable[[Any], bytes] = unique) -> str:
    """Digest of a value with all that it carries and the code it runs.

    Parameters
    ----------
    value : object
    on_unknown : callable, default=unique
        Gets what cannot be digested and returns a digest for it, or raises.
    """
    return _Digester(on_unknown).finish(value)


def architecture_digest(module: nn.Module, *others: Any) -> str:
    """Digest of all that sets a module apart but the values of its parameters and buffers.

    Whether it is in train or eval mode makes no difference.
    """
    digester = _Digester(unique)
    digester.known.update({id(part): path for path, part in module.named_modules()})
    tensors = [*module.named_parameters(), *module.named_buffers()]
    digester.known.update({id(tensor): name for name, tensor in tensors})
    return digester.finish([digester.parts(module), *others])


class _Digester:
    """One digest in the making; it remembers what it has met, so that circles end."""

    def __init__(self, on_unknown: Callable[[Any], bytes]):
        self._on_unknown = on_unknown
        self.known: dict[int, str] = {}  # parts and tensors of the module, by id
        self._done: dict[int, tuple[Any, bytes]] = {}  # holds the value: an id may be used again
        self._open: dict[int, int] = {}
        self._classes: dict[type, None] = {}
        self._names = {"forward"}  # all attributes that any code met so far might read

    def finish(self, value: Any) -> str:
        """Digest of `value` and of the methods that may run for it."""
        got = self.of(value)
        methods: dict[tuple[type, str], bytes] = {}
        while todo := [
            (kind, name)
            for kind in self._classes
            for name, attribute in vars(kind).items()
            if (kind, name) not in methods and self._may_be_read(kind, name, attribute)
        ]:
            for kind, name in todo:
                methods[kind, name] = _hash(_name_of(kind), name, self.of(vars(kind)[name]))
        return _hash(got, *sorted(methods.values())).hex()

    def of(self, value: Any) -> bytes:
        if type(value) in _ATOMS:
            return _hash(type(value).__name__, repr(value))
        key = id(value)
        if key in self._done:
            return self._done[key][1]
        if key in self._open:
            return _hash("circle", len(self._open) - self._open[key])
        if len(self._open) >= _MAX_DEPTH:
            return self._on_unknown(value)
        self._open[key] = len(self._open)
        try:
            got = self._structure(value)
        finally:
            del self._open[key]
        self._done[key] = value, got
        return got

    def _structure(self, value: Any) -> bytes:
        if id(value) in self.known:
            return _hash("own", self.known[id(value)])
        if isinstance(value, nn.Module):
            tensors = [*value.named_parameters(), *value.named_buffers()]
            return _hash("module", self.of(self.parts(value)), self.of(tensors))
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return _hash("array", value.dtype, value.shape, value.tobytes())
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return _hash("method", self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, types.CodeType):
            self._names.update(value.co_names)
            constants = map(self.of, value.co_consts)
            return _hash("code", value.co_code, *value.co_names, *constants)
        if isinstance(value, types.ModuleType):
            return _hash("package", value.__name__, self.of(sources_behind([value.__name__])))
        if isinstance(value, type):
            made = [vars(c).get(n) for c in _own_bases(value) for n in ("__init__", "__new__")]
            return _hash("class", self._kind(value), *map(self.of, made))
        if isinstance(value, (staticmethod, classmethod)):
            return _hash(type(value).__name__, self.of(value.__func__))
        if isinstance(value, property):
            return _hash("property", self.of(value.fget))
        if type(value) in (list, tuple):
            return _hash(type(value).__name__, *map(self.of, value))
        if type(value) is dict:
            return _hash("dict", *(self.of(part) for item in value.items() for part in item))
        if isinstance(value, (set, frozenset)):
            return _hash("set", *sorted(map(self.of, value)))
        if isinstance(value, weakref.ref):
            return _hash("reference", self.of(value()))
        if isinstance(value, _BY_TYPE_ALONE):
            return _hash("type", _name_of(type(value)))
        if isinstance(value, fx.Graph):
            return _hash("graph", str(value))
        return self._instance(value)

    def parts(self, module: nn.Module) -> list[bytes]:
        """A digest for each part of a module, without the values of parameters and buffers."""
        return [self._part(path, part) for path, part in module.named_modules()]

    def _part(self, path: str, part: nn.Module) -> bytes:
        own = vars(part)
        tables = [
            [(name, value is None) for name, value in own[table].items()]
            for table in ("_parameters", "_buffers", "_modules")
        ]
        hooks = [
            (hook, key in own[f"{table}_with_kwargs"], key in own["_forward_hooks_always_called"])
            for table in ("_forward_pre_hooks", "_forward_hooks")
            for key, hook in own[table].items()
        ]
        n_before = len(own["_forward_pre_hooks"])  # the rest of them run behind
        # What a graph module's nodes are annotated with comes and goes with copies.
        skipped = _BOOKKEEPING | {"meta"} if isinstance(part, fx.GraphModule) else _BOOKKEEPING
        carried = [(name, own[name]) for name in sorted(own) if name not in skipped]
        details = (tables, n_before, hooks, carried)
        return _hash(path, self._kind(type(part)), *map(self.of, details))

    def _tensor(self, value: torch.Tensor) -> bytes:
        try:
            flat = value.detach().to("cpu").contiguous().reshape(-1)
            data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        except Exception:  # on the meta device, sparse, quantised
            return self._on_unknown(value)
        return _hash("tensor", value.dtype, tuple(value.shape), data)

    def _function(self, function: types.FunctionType) -> bytes:
        name = _name_of(function)
        home = sys.modules.get(function.__module__)
        if is_library(function.__module__) and (
            getattr(home, function.__qualname__, None) is function
        ):
            return _hash("function", name)
        parts: list[Any] = [function.__defaults__, function.__kwdefaults__]
        for variable, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            try:
                held = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            # super() holds the class, and makes none.
            parts.append(self._kind(held) if variable == "__class__" else held)
        if not is_library(function.__module__):
            carried = {k: v for k, v in vars(function).items() if k != "__wrapped__"}
            parts += [function.__code__, carried]
            if not is_installed(home):
                parts.append(list(read_globals(function)))
                package = function.__globals__.get("__package__") or ""
                if sources := sources_behind(imports(function.__code__, package)):
                    parts.append(sources)
        return _hash("function", name, *map(self.of, parts))

    def _instance(self, value: Any) -> bytes:
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:
            return self._on_unknown(value)
        if isinstance(reduced, str):  # found again by this name
            inner = getattr(value, "__wrapped__", None)
            return _hash("global", getattr(value, "__module__", None), reduced, self.of(inner))
        make, arguments, *state = reduced
        kind = self._kind(type(value))
        arguments = [part for part in arguments if part is not type(value)]
        state = [list(part) if isinstance(part, Iterator) else part for part in state]
        return _hash("instance", kind, *map(self.of, (make, arguments, *state)))

    def _kind(self, kind: type) -> bytes:
        """What a value's type is; which of its methods count is known at the end."""
        self._classes.update(dict.fromkeys(_own_bases(kind)))
        return _hash("type", *map(_name_of, kind.__mro__))

    def _may_be_read(self, kind: type, name: str, attribute: Any) -> bool:
        if name.startswith("__") and name.endswith("__"):
            # Operators; how an instance came about shows in what it carries.
            is_function = isinstance(attribute, types.FunctionType)
            return is_function and name not in ("__init__", "__init_subclass__")
        if name in self._names or ("getattr" in self._names and name != "_abc_impl"):
            return True
        libraries = [c for c in kind.__mro__ if c is not object and is_library(c.__module__)]
        return any(hasattr(base, name) for base in libraries)  # it calls what replaces its own


def _hash(*parts: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def _name_of(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _own_bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if not is_library(base.__module__)]
