"""Weights files: found, downloaded, digested, read without trust, fitted into a module."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

_CHUNK = 1 << 20
_TIMEOUT_S = 20.0
_N_TRIES = 5
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
# Wrappers in which training scripts keep the state dict, the usual one first.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "module", "params")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.", "encoder_q.")


# -- finding and downloading ----------------------------------------------------------------
def checkpoint_path(url: str) -> Path:
    """Where torch's hub keeps the file behind `url`."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def fetch(url: str, *, name: str = "the network") -> Path:
    """The local file of published weights, downloaded if it is not there.

    Processes that ask at once wait for one of them to download. What a killed download has
    left is continued. The file appears under its name only when its hash is right.

    Parameters
    ----------
    url : str
        Its file name ends in ``-`` and the first digits of its SHA-256, as torchvision's do.
    name : str
        The network's name, for messages.
    """
    path = checkpoint_path(url)
    if path.exists():
        return path
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            _download(url, path, name)
    return path


def warn_of_other_content(path: Path, name: str) -> None:
    """Warn if a file that stands where a published one belongs is another one."""
    expected = hash_in_name(path)
    if expected and not file_digest(path).startswith(expected):
        warnings.warn(
            f"{path} is not the published file of {name}: its SHA-256 begins with "
            f"{file_digest(path)[: len(expected)]}. It is used as it is.",
            UserWarning,
            stacklevel=5,
        )


def _download(url: str, path: Path, name: str) -> None:
    part = path.with_name(path.name + ".part")
    reason: Exception | None = None
    for attempt in range(_N_TRIES):
        if attempt:
            _wait(attempt)
        had = part.stat().st_size if part.exists() else 0
        try:
            _continue_download(url, part)
            break
        except urllib.error.HTTPError as error:
            error.close()
            reason = error
            if error.code == 416:  # what is there is more than the file holds
                part.unlink(missing_ok=True)
            elif error.code not in (408, 425, 429, 500, 502, 503, 504):
                raise _unreachable(url, path, name, error) from error
        except (OSError, EOFError) as error:
            reason = error
            gone_on = part.exists() and part.stat().st_size > had
            if isinstance(error, urllib.error.URLError) and not gone_on and attempt >= 1:
                raise _unreachable(url, path, name, error) from error
    else:
        assert reason is not None
        raise _unreachable(url, path, name, reason) from reason
    expected = hash_in_name(path)
    got = file_digest(part)
    if expected and not got.startswith(expected):
        part.unlink()
        raise ValueError(
            f"The weights of {name} from {url} are damaged: their SHA-256 begins with "
            f"{got[: len(expected)]}, not {expected}. Nothing was kept; try again, or put the "
            f"right file at {path}."
        )
    os.replace(part, path)


def _wait(attempt: int) -> None:
    time.sleep(min(0.25 * 2**attempt, 5.0))


def _continue_download(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "sktransfer"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        if have and response.status != 206:  # the server begins again from the start
            have = 0
        length = response.headers.get("Content-Length")
        with open(part, "ab" if have else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
        got = part.stat().st_size - have
        if length is not None and got < int(length):
            raise EOFError(f"the connection ended after {got} of {length} bytes")


def _unreachable(url: str, path: Path, name: str, error: Exception) -> OSError:
    return OSError(
        f"The weights of {name} are not on this machine and could not be downloaded "
        f"({error}).\n"
        f"  from: {url}\n"
        f"  put them at: {path}\n"
        "backbone='builtin' needs no network, and weights=PATH takes a local .pt, .pth or "
        ".safetensors file."
    )


def hash_in_name(path: Path) -> str | None:
    """The first digits of the SHA-256 that a published file bears in its name."""
    found = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    return found.group(1) if found else None


# -- identity -------------------------------------------------------------------------------
_digests: dict[tuple, str] = {}
_digests_lock = threading.Lock()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, computed once while the file stays as it is."""
    stat = path.stat()
    times = stat.st_mtime_ns, stat.st_ctime_ns
    key = (str(path.resolve()), stat.st_size, times, stat.st_ino)
    with _digests_lock:
        if key in _digests:
            return _digests[key]
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(4 * _CHUNK):
            digest.update(chunk)
    with _digests_lock:
        _digests[key] = digest.hexdigest()
    return _digests[key]


def state_digest(module: nn.Module) -> str:
    """Digest of a module's parameters and buffers: names, types, shapes, values."""
    digest = hashlib.blake2b(digest_size=32)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- reading --------------------------------------------------------------------------------
def check_weights_path(path: str | os.PathLike) -> Path:
    """The file that `weights` names, or an error that says what is accepted."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"weights={str(path)!r}: a weights file ends in one of {', '.join(_SUFFIXES)}."
        )
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"weights={str(path)!r} {what}.")
    return path


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, by name, in float32 where they are floating.

    No code in the file is run: ``weights_only=True``, or safetensors.
    """
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: Any = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}.") from error
    else:
        try:
            with warnings.catch_warnings():
                # Of old files; what the user could do about it is not in their hands.
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read as a state dict ({type(error).__name__}: "
                f"{_first_line(error)}). Files with pickled Python objects are not opened, as "
                "opening one runs its code: save `module.state_dict()` rather than the module, "
                "with torch.save or safetensors.torch.save_file."
            ) from error
    state = _unwrap(state, path)
    metadata = getattr(state, "_metadata", None)
    state = _without_prefixes(
        {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
    )
    if metadata is not None:
        state = _StateDict(state)
        state._metadata = metadata
    return state


class _StateDict(dict):
    _metadata: Any


def _unwrap(state: Any, path: Path) -> Any:
    for _ in range(3):
        if not isinstance(state, Mapping):
            break
        if state and all(isinstance(value, torch.Tensor) for value in state.values()):
            return state
        inner = next((w for w in _WRAPPERS if isinstance(state.get(w), Mapping)), None)
        if inner is None:
            break
        state = state[inner]
    what = f"the keys {list(state)[:8]}" if isinstance(state, Mapping) else type(state).__name__
    raise ValueError(
        f"{path} holds {what}, not tensors by name: a state dict is needed, alone or under one of "
        f"{', '.join(map(repr, _WRAPPERS))}."
    )


def _without_prefixes(state: dict[str, Any]) -> dict[str, Any]:
    while True:
        prefix = next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None)
        if prefix is None or not state:
            return state
        state = {name[len(prefix) :]: tensor for name, tensor in state.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]


# -- fitting --------------------------------------------------------------------------------
@dataclass
class KeyReport:
    """Keys of a weights file and of a network that did not meet.

    Attributes
    ----------
    missing, unexpected : list of str
        In the network alone; in the file alone.
    misshapen : list of str
        In both, with different shapes.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        parts = []
        for what, keys in (
            ("in the network alone", self.missing),
            ("in the file alone", self.unexpected),
            ("of another shape", self.misshapen),
        ):
            if keys:
                parts.append(f"  {what} ({len(keys)}): {', '.join(keys)}")
        return "\n".join(parts)


def fit_state_dict(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    head_layers: Collection[str],
    source: str,
    name: str,
) -> KeyReport:
    """Put a state dict into `module`; only the head may not fit, as nobody uses it.

    Parameters
    ----------
    module : nn.Module
        May stand on the meta device: its tensors are replaced.
    state : mapping of str to tensor
    head_layers : collection of str
        Dotted names of the head's layers.
    source, name : str
        The file and the network, for messages.

    Returns
    -------
    report : KeyReport
        What did not fit, all of it of the head.

    Raises
    ------
    ValueError
        If anything else does not fit, with all of it.
    """
    own = module.state_dict()
    metadata = getattr(state, "_metadata", None)
    state = dict(_rename_old_densenet(state, own))

    def is_head(key: str) -> bool:
        return any(key == layer or key.startswith(f"{layer}.") for layer in head_layers)

    def is_countable(key: str) -> bool:
        # Written by newer torch versions only, and read by none in eval mode.
        return key.endswith("num_batches_tracked")

    report = KeyReport(
        missing=[key for key in own if key not in state and not is_countable(key)],
        unexpected=[key for key in state if key not in own and not is_countable(key)],
        misshapen=[
            f"{key} ({tuple(state[key].shape)} in the file, {tuple(own[key].shape)})"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    )
    body = KeyReport(
        missing=[key for key in report.missing if not is_head(key)],
        unexpected=[key for key in report.unexpected if not is_head(key)],
        misshapen=[text for text in report.misshapen if not is_head(text.partition(" ")[0])],
    )
    if body:
        raise ValueError(
            f"{source} does not hold the weights of {name}: beyond the head, these keys do not "
            f"fit.\n{body}"
        )
    fitting = _StateDict(
        {
            key: state[key].to(own[key].dtype)
            for key in own
            if key in state and state[key].shape == own[key].shape
        }
    )
    # Versions of the layers' formats; a file that tells none is taken for a current one.
    fitting._metadata = metadata or own._metadata  # type: ignore[attr-defined]
    module.load_state_dict(fitting, strict=False, assign=True)
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:  # of the head, or a counter
            _replace(module, key, torch.zeros(tensor.shape, dtype=tensor.dtype))
    return report


def _replace(module: nn.Module, key: str, value: torch.Tensor) -> None:
    path, _, leaf = key.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _rename_old_densenet(
    state: Mapping[str, torch.Tensor], own: Mapping[str, Any]
) -> Mapping[str, torch.Tensor]:
    """torchvision's published DenseNets still call norm1 ``norm.1``."""
    if not any(".denselayer" in key for key in own):
        return state
    pattern = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.\w+)$")
    return {pattern.sub(r"\1\2", key): tensor for key, tensor in state.items()}
