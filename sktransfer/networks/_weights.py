"""Weights files: downloaded, digested, read without running their code, fitted into a module."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
# Where training scripts keep the state dict in a checkpoint, the usual key first.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "module", "params")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.", "encoder_q.")


# -- downloading ----------------------------------------------------------------------------
def fetch(url: str, name: str = "the network") -> Path:
    """Return the local file of published weights, downloaded by one process if it is absent.

    Parameters
    ----------
    url : str
        Its file name ends in ``-`` and the first digits of its SHA-256, as torchvision's do.
    name : str
        The network's name, for messages.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.exists():
        return path
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            _download(url, path, name)
    return path


def _download(url: str, path: Path, name: str) -> None:
    try:
        torch.hub.download_url_to_file(url, str(path), _hash_in_name(path), progress=False)
    except OSError as error:
        raise not_downloaded(name, str(error), url, str(path)) from error
    except RuntimeError as error:  # torch.hub checks the hash before the file gets its name
        raise ValueError(
            f"The weights of {name} from {url} are damaged ({error}). Nothing was kept: try "
            f"again, or put the right file at {path}."
        ) from error


def not_downloaded(name: str, reason: str, url: str, place: str) -> OSError:
    return OSError(
        f"The weights of {name} are not on this machine and could not be downloaded "
        f"({reason.strip()[:200]}).\n"
        f"  from: {url}\n"
        f"  put them at: {place}\n"
        "backbone='builtin' needs no network, and weights=PATH takes a local .pt, .pth or "
        ".safetensors file."
    )


def warn_of_other_content(path: Path, name: str) -> None:
    """Warn if a file in the place of a published one has another hash."""
    expected = _hash_in_name(path)
    if expected and not file_digest(path).startswith(expected):
        warnings.warn(
            f"{path} is not the published file of {name}: its SHA-256 begins with "
            f"{file_digest(path)[: len(expected)]}. It is used anyway.",
            UserWarning,
            stacklevel=2,
        )


def _hash_in_name(path: Path) -> str | None:
    found = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    return found.group(1) if found else None


# -- digests --------------------------------------------------------------------------------
_digests: dict[tuple[str | int, ...], str] = {}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, computed once while the file is not changed."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _digests:
        with open(path, "rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
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
    """Return the file that `weights` names, or raise an error that says what is accepted."""
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
    """Read the tensors of a weights file, by name, in float32 where they are floating.

    No code in the file is run: ``weights_only=True``, or safetensors.
    """
    state = _unwrap(_read(path), path)
    while state and (prefix := next((p for p in _PREFIXES if _all_start(state, p)), None)):
        state = _like(state, {name.removeprefix(prefix): state[name] for name in state})
    floats = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    return _like(state, floats)


def _read(path: Path) -> object:
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old file formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0][:200]
        raise ValueError(
            f"{path} cannot be read as a state dict ({type(error).__name__}: {reason}). Files with "
            "pickled Python objects are not opened, as opening one runs its code: save "
            "`module.state_dict()` rather than the module, with torch.save or "
            "safetensors.torch.save_file."
        ) from error


def _unwrap(state: object, path: Path) -> Mapping[str, torch.Tensor]:
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


def _all_start(state: Mapping[str, torch.Tensor], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in state)


def _like(
    state: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> OrderedDict[str, torch.Tensor]:
    """`tensors` with the format versions of `state`, which old files need (MNASNet's stem)."""
    made = OrderedDict(tensors)
    made.__dict__.update(getattr(state, "__dict__", {}))
    return made


# -- fitting --------------------------------------------------------------------------------
@dataclass
class KeyReport:
    """Keys that differ between a weights file and a network.

    Attributes
    ----------
    missing, unexpected : list of str
        In the network alone; in the file alone.
    misshapen : list of str
        In both, with different shapes.
    """

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        kinds = {
            "in the network alone": self.missing,
            "in the file alone": self.unexpected,
            "of another shape": self.misshapen,
        }
        return "\n".join(
            f"  {k} ({len(keys)}): {', '.join(keys)}" for k, keys in kinds.items() if keys
        )

    def without(self, layers: Collection[str]) -> KeyReport:
        """Return the report without the keys of some layers."""

        def others(keys: list[str]) -> list[str]:
            return [key for key in keys if not any(f"{key}.".startswith(f"{n}.") for n in layers)]

        shapes = {text.partition(" ")[0]: text for text in self.misshapen}
        return KeyReport(
            others(self.missing), others(self.unexpected), [shapes[k] for k in others([*shapes])]
        )


def fit_state_dict(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    head_layers: Collection[str],
    source: str,
    name: str,
) -> KeyReport:
    """Put a state dict into `module`; only the head may differ, as it is not used.

    Parameters
    ----------
    module : nn.Module
        May lie on the meta device: its tensors are replaced.
    state : mapping of str to tensor
    head_layers : collection of str
        Dotted names of the head's layers.
    source, name : str
        The file and the network, for messages.

    Returns
    -------
    report : KeyReport
        What did not fit, all of it in the head.

    Raises
    ------
    ValueError
        If anything else does not fit; the message lists it.
    """
    own = module.state_dict()
    state = _rename_old_densenet(state, own)
    report = _compare(state, own)
    if body := report.without(head_layers):
        raise ValueError(
            f"{source} does not hold the weights of {name}: beyond the head, these keys do not "
            f"fit.\n{body}"
        )
    # The versions of the layers' formats: a file without them is read as a current one.
    fitting = _like(state if getattr(state, "__dict__", None) else own, own)
    for key, tensor in own.items():
        if key in state and state[key].shape == tensor.shape:
            fitting[key] = state[key].to(tensor.dtype)
        elif tensor.is_meta:  # in the head, or a counter
            fitting[key] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    module.load_state_dict(fitting, assign=True)
    return report


def _compare(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> KeyReport:
    # Batch norms count their batches in files of newer torch versions only, for training.
    keys = [key for key in {**own, **state} if not key.endswith("num_batches_tracked")]
    return KeyReport(
        missing=[key for key in keys if key not in state],
        unexpected=[key for key in keys if key not in own],
        misshapen=[
            f"{key} ({tuple(state[key].shape)} in the file, {tuple(own[key].shape)})"
            for key in keys
            if key in state and key in own and state[key].shape != own[key].shape
        ],
    )


def _rename_old_densenet(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Rename ``norm.1`` in torchvision's published DenseNets to the ``norm1`` of its code."""
    if not any(".denselayer" in key for key in own):
        return state
    pattern = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.\w+)$")
    return _like(state, {pattern.sub(r"\1\2", key): tensor for key, tensor in state.items()})
