"""A file is written as a whole or not at all, by whoever writes it at the same time."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def whole_file(path: str) -> Iterator[Path]:
    """Give a file to write, which takes the place of `path` if nothing fails meanwhile.

    It is what ``open(path, "wb")`` would have written to: what a symbolic link names, with the
    rights of the file that is replaced, or of a new one.

    Parameters
    ----------
    path : str

    Yields
    ------
    part : Path
        Beside it, in a folder of its own; something else may be put in its place.

    Raises
    ------
    OSError
        Where `path` cannot be written, before anything is.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    try:
        folder = TemporaryDirectory(prefix=".sktransfer-", suffix=".part", dir=target.parent)
    except OSError as error:  # of the folder, whose name says nothing to the user
        raise OSError(error.errno, error.strerror, path) from error
    with folder:
        part = Path(folder.name) / "part"
        part.touch()  # with the rights that the process gives new files
        mode = (target if target.exists() else part).stat().st_mode
        yield part
        part.chmod(stat.S_IMODE(mode))
        os.replace(part, target)
