"""Messages: progress bars, warnings at the user's line, and parts of error messages."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec

import numpy as np


@contextmanager
def progress_bar(n: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Show a progress bar; yield a function to call with each number of finished units."""
    from tqdm.auto import tqdm

    with tqdm(total=n, unit=unit, unit_scale=n > 10_000) as bar:
        yield bar.update


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the line of the user's code that called us, directly or indirectly.

    Python 3.11 cannot skip frames: there the warning is at the line that called the caller.
    """
    if sys.version_info < (3, 12):
        warnings.warn(message, category, stacklevel=3)
        return
    specs = [find_spec(name) for name in ("sktransfer", "sklearn", "skorch", "joblib")]
    folders = (os.path.dirname(spec.origin) for spec in specs if spec and spec.origin)
    # Decorators made by contextlib call some of our functions.
    warnings.warn(message, category, skip_file_prefixes=(*folders, contextlib.__file__))


def shown(value: object) -> str:
    """Return the repr of a user's value for a message, cut to 80 characters."""
    try:  # not "np.str_('…')", nor "PosixPath('…')"
        if isinstance(value, np.generic) and value.dtype.kind not in "mM":  # would be numbers
            value = value.item()
        is_text = isinstance(value, (str, os.PathLike, np.datetime64, np.timedelta64))
        text = repr(str(value)) if is_text else " ".join(repr(value).split())
    except Exception:  # of the user's own class
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:30]}…{text[-49:]}"


def error_text(error: BaseException) -> str:
    """Return the message of another library's error, for a message of ours."""
    # Ours names the file already, whose path may be long.
    is_of_file = isinstance(error, OSError) and error.filename is not None
    text = error.strerror if is_of_file else str(error).strip()  # type: ignore[attr-defined]
    text = (text or repr(error))[:300]
    return text if isinstance(error, (OSError, SyntaxError)) else f"{type(error).__name__}: {text}"


# Names in other libraries.
_SYNONYMS = {"mean": "avg", "half": "float16", "fp16": "float16"}


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """Suggest the known values nearest to an unknown one, for an error; ``""`` if none is near."""
    lower = {name.lower(): name for name in known}
    wanted = _SYNONYMS.get(value.lower(), value.lower())
    close = [lower[name] for name in get_close_matches(wanted, lower, n=3, cutoff=0.6)]
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
