"""What a user sees while a call runs: a progress bar, and warnings at their own line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec


@contextmanager
def progress_bar(n_images: int) -> Iterator[Callable[[int], object]]:
    """Show a bar; call what it gives with each number of finished images."""
    from tqdm.auto import tqdm

    with tqdm(total=n_images, unit="image", unit_scale=n_images > 10_000) as bar:
        yield bar.update


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the line of the user's code that called us, directly or not.

    Python 3.11 cannot skip frames: there the warning is at the line that called the caller.
    """
    if sys.version_info < (3, 12):
        warnings.warn(message, category, stacklevel=3)
        return
    specs = [find_spec(name) for name in ("sktransfer", "sklearn", "skorch", "joblib")]
    folders = tuple(os.path.dirname(spec.origin) for spec in specs if spec and spec.origin)
    warnings.warn(message, category, skip_file_prefixes=folders)


def shown(value: object) -> str:
    """Return the repr of a user's value for a message, cut to 80 characters."""
    try:  # not "np.str_('…')", nor "PosixPath('…')"
        text = repr(str(value) if isinstance(value, (str, os.PathLike)) else value)
    except Exception:  # of the user's own class
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:30]}…{text[-49:]}"


def words(error: BaseException) -> str:
    """Return what a foreign error says, for a message of ours."""
    # The message names the file already, and its path may be long.
    is_of_file = isinstance(error, OSError) and error.filename is not None
    text = error.strerror if is_of_file else str(error).strip()  # type: ignore[attr-defined]
    text = (text or repr(error))[:300]
    return text if isinstance(error, (OSError, SyntaxError)) else f"{type(error).__name__}: {text}"
