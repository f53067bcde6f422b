"""What code reads and imports of the user's own modules; nothing is run or loaded to find out."""

from __future__ import annotations

import dis
import functools
import importlib.util
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

_LIBRARIES = frozenset({"torch", "torchvision", "timm", "numpy", "PIL", "sktransfer"})
# Of a loaded module of the user's own: its spec, and its source when it was first asked for.
_seen_sources: weakref.WeakKeyDictionary[types.ModuleType, tuple[Any, bytes]] = (
    weakref.WeakKeyDictionary()
)


def is_library(module_name: str | None) -> bool:
    """Whether a module is of the standard library or of those whose names tell enough."""
    top = (module_name or "builtins").partition(".")[0]
    return top in sys.stdlib_module_names or top in _LIBRARIES


def is_installed(module: types.ModuleType | None) -> bool:
    """Whether a module is somebody's package: what its functions read is not looked into."""
    return _is_installed_file(getattr(module, "__file__", None) or "")


def _is_installed_file(path: str) -> bool:
    return "site-packages" in path or "dist-packages" in path


def _is_own(module: Any) -> bool:
    """Whether a module is the user's own."""
    is_module = issubclass(type(module), types.ModuleType)
    return is_module and not (is_library(module.__name__) or is_installed(module))


def read_globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals that a function reads, and what it reads of the user's own modules."""
    for path in sorted(set(_global_paths(function.__code__))):
        name, *attributes = path.split(".")
        if name not in function.__globals__:  # a builtin
            continue
        value = function.__globals__[name]
        for attribute in attributes:
            if not _is_own(value):
                break
            value = getattr(value, attribute, None)
        yield path, value


def _global_paths(code: types.CodeType) -> Iterator[str]:
    """``"scale"``, ``"settings.scale"``: global names and the attributes taken of each."""
    path = ""
    for step in _steps(code):
        if path and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path += f".{step.argval}"
            continue
        if path:
            yield path
        path = str(step.argval) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") else ""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_paths(constant)


def imports(code: types.CodeType, package: str) -> Iterator[str]:
    """Full names of what code imports when it runs: modules, and what may be one of a package."""
    steps = _steps(code)
    for i, step in enumerate(steps):
        if step.opname != "IMPORT_NAME":
            continue
        level, names = (before.argval for before in steps[i - 2 : i])  # what the import is given
        try:
            name = importlib.util.resolve_name("." * level + step.argval, package)
        except (ImportError, ValueError):  # beyond the top: the import itself will say so
            continue
        yield name
        yield from (f"{name}.{part}" for part in names or ())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from imports(constant, package)


def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]


def sources_behind(names: Iterable[str]) -> list[tuple[str, bytes]]:
    """Source of those modules that are the user's own, and of all that they import in turn.

    Nothing is run or loaded.
    """
    found: dict[str, bytes] = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in found or (file := _own_file(name)) is None:
            continue
        source = found[name] = _source_of(name, file)
        parent = name.rpartition(".")[0]
        todo += [parent] if parent else []  # runs first
        todo += _imported_by(source, name if file.endswith("__init__.py") else parent)
    return sorted(found.items())


@functools.lru_cache(maxsize=1024)
def _imported_by(source: bytes, package: str) -> tuple[str, ...]:
    try:
        return tuple(imports(compile(source, "<module>", "exec", dont_inherit=True), package))
    except (SyntaxError, ValueError):
        return ()


def _own_file(name: str) -> str | None:
    """The Python file of a module of the user's own, loaded or not; None for any other."""
    if is_library(name):
        return None
    if (module := sys.modules.get(name)) is not None:
        file = getattr(module, "__file__", None) if _is_own(module) else None
    else:
        file = getattr(_find_spec(name), "origin", None)
    return file if file and file.endswith(".py") and not _is_installed_file(file) else None


def _find_spec(name: str) -> ModuleSpec | None:
    """As importlib's of this name, but without loading the packages that the module lies in."""
    parent = name.rpartition(".")[0]
    if not parent:
        return PathFinder.find_spec(name)
    package = _find_spec(parent)
    if package is None or package.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(name, package.submodule_search_locations)


def _source_of(name: str, file: str) -> bytes:
    """A module's source: of a loaded one as it was when it was first asked for.

    What is edited later does not run before it is loaded again, which gives it another spec.
    """
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is not None and module in _seen_sources and _seen_sources[module][0] is spec:
        return _seen_sources[module][1]
    try:
        source = Path(file).read_bytes()
    except OSError:
        source = b""
    if module is not None:
        _seen_sources[module] = spec, source
    return source
