"""Files of JSON and tensors, which are written atomically and checked when they are read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

_KEY, _DIGEST = "sktransfer", "sha256"


class Refused(ValueError):
    """A file cannot be loaded; the message is the reason."""


def require(is_right: bool, reason: str) -> None:
    if not is_right:
        raise Refused(reason)


def write(part: Path, header: dict, tensors: Tensors) -> None:
    """Write the safetensors file `part`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    text = json.dumps(header)
    tensors = _without_shared_memory(tensors)
    try:
        save_file(tensors, part, metadata={_KEY: text, _DIGEST: _digest(text, tensors)})
    except SafetensorError as error:  # also for a full disk
        if found := re.search(r"(?:os error|code:) (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def read(path: str) -> tuple[object, Tensors]:
    """Check the digest of a file; return its header and its tensors.

    Raises :class:`Refused` if :func:`write` did not write the file, or if it was changed later.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):
        pass  # raises an error with the path, which safetensors does not name
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            require(_KEY in metadata, "sktransfer did not write it (it has no header of ours)")
            # Copies, because safetensors maps the file, which may change after the check.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise Refused(f"it is not a readable safetensors file ({error})") from error
    text = metadata[_KEY]
    is_whole = metadata.get(_DIGEST) == _digest(text, tensors)
    require(is_whole, "it is damaged or was changed (its digest does not fit)")
    try:
        return json.loads(text), tensors
    except (ValueError, RecursionError) as error:  # also an integer with too many digits
        raise Refused(f"its header is not JSON that can be read ({error})") from error


def _digest(text: str, tensors: Tensors) -> str:
    import torch

    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_shared_memory(tensors: Tensors) -> Tensors:
    """Return contiguous tensors on the CPU that share no memory, as safetensors requires."""
    separate, taken = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if place in taken else tensor
        taken.add(place)
    return separate


@contextmanager
def atomic_write(path: str) -> Iterator[Path]:
    """Yield a temporary file, which replaces `path` in one step if no error is raised.

    Raises OSError, with the name `path`, before anything is written if `path` is not writable.
    """
    target = Path(os.path.realpath(path))  # follows symbolic links
    if target.exists() and not target.is_file():
        code = errno.EISDIR if target.is_dir() else errno.EINVAL  # a device, a pipe
        raise OSError(code, os.strerror(code), path)
    try:
        folder = TemporaryDirectory(prefix=".sktransfer-", suffix=".part", dir=target.parent)
    except OSError as error:  # its message names the temporary folder
        raise OSError(error.errno, error.strerror, path) from error
    with folder:
        part = Path(folder.name) / "part"
        part.touch()
        mode = (target if target.exists() else part).stat().st_mode
        try:
            yield part
        except OSError as error:
            if error.errno and error.filename in (None, str(part)):  # a full disk
                raise OSError(error.errno, error.strerror, path) from error
            raise
        part.chmod(stat.S_IMODE(mode))  # safetensors makes files that only their owner can read
        os.replace(part, target)
