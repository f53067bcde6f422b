"""Warnings that point at the user's line."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.util import find_spec

# Frames of these packages stand between a user's line and our warning.
_SKIPPED = ("sktransfer", "sklearn", "skorch", "joblib")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the line of the user's code that called us, or our meta-estimator."""
    if sys.version_info < (3, 12):
        warnings.warn(message, category, stacklevel=3)
        return
    specs = [find_spec(name) for name in _SKIPPED]
    folders = tuple(os.path.dirname(spec.origin) for spec in specs if spec and spec.origin)
    warnings.warn(message, category, skip_file_prefixes=folders)
