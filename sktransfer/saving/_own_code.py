"""Detect that the code of a user's module has changed since a model was saved."""

from __future__ import annotations

import ast
import hashlib
import inspect
from textwrap import dedent

from torch import nn

from sktransfer._progress import warn

_LIBRARIES = ("torch", "torchvision", "timm", "builtins")


def code_of(module: nn.Module) -> dict[str, str]:
    """Return a digest of each class in a module, except those of libraries.

    Comments, docstrings, formatting and Python's version do not change it. A class without source
    text, as in a notebook of Python 3.11, has none.
    """
    classes = {base for part in module.modules() for base in type(part).__mro__}
    digests = {}
    for cls in classes:
        if cls.__module__.partition(".")[0] not in _LIBRARIES:
            try:
                tree = ast.parse(dedent(inspect.getsource(cls)))
            except (OSError, TypeError, SyntaxError):
                continue
            digests[cls.__name__] = hashlib.sha256(_stripped(tree).encode()).hexdigest()[:16]
    return dict(sorted(digests.items()))


def _stripped(tree: ast.AST) -> str:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            has_docstring = ast.get_docstring(node) is not None
            node.body = node.body[has_docstring:] or [ast.Pass()]
    return ast.unparse(tree)


def warn_of_changes(module: nn.Module, saved: dict[str, str], path: str) -> None:
    """Warn if the code of a class has changed since `path` was saved."""
    now = code_of(module)
    if changed := [name for name in saved if now.get(name, saved[name]) != saved[name]]:
        warn(
            f"The code of {', '.join(changed)} has changed since {path} was saved. If it computes "
            "something else now, so does the loaded model."
        )
