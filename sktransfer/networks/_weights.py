"""Weights files: download, digest, read without running code, and load into a module."""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping, Set
from contextvars import ContextVar
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from sktransfer._progress import warn

# Where training scripts keep the state dict in a checkpoint, the usual key first.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "module", "params")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.", "encoder_q.")

# Whether published weights that are not on this machine may be downloaded.
may_download: ContextVar[bool] = ContextVar("may_download", default=True)


def fetch(url: str, name: str) -> Path:
    """Return the local file of the published weights of `name`, which one process downloads.

    The file name in `url` ends in ``-`` and the first digits of the file's SHA-256.
    """
    path = cache_path(url)
    if path.exists():
        return path
    check_download(name, url, str(path))
    expected = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                digits = expected.group(1) if expected else None
                torch.hub.download_url_to_file(url, str(path), digits, progress=False)
    except OSError as error:
        raise not_downloaded(name, str(error), url, str(path)) from error
    except RuntimeError as error:  # torch.hub checks the hash before the file gets its name
        raise ValueError(
            f"The weights of {name} from {url} are damaged ({error}). Nothing was kept: try "
            f"again, or put the right file at {path}."
        ) from error
    return path


def cache_path(url: str) -> Path:
    """Return the path of a weights file in the cache, which torchvision and timm share."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def check_download(name: str, url: str, place: str) -> None:
    """Raise OSError if nothing may be downloaded."""
    if not may_download.get():
        reason = f"a saved file names them: load_backbone({name!r}) downloads them"
        raise not_downloaded(name, reason, url, place)


def not_downloaded(name: str, reason: str, url: str, place: str) -> OSError:
    return OSError(
        f"The weights of {name} are not on this machine and were not downloaded "
        f"({reason.strip()[:200]}).\n"
        f"  from: {url}\n"
        f"  put them at: {place}\n"
        "backbone='builtin' needs no network, and weights=PATH takes a local .pt, .pth or "
        ".safetensors file."
    )


_digests: dict[tuple[str | int, ...], str] = {}


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file's content, once while the file does not change."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _digests:
        with open(path, "rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def state_digest(module: nn.Module) -> str:
    """Return the digest of a module's parameters and buffers: names, types, shapes, values."""
    digest = hashlib.blake2b(digest_size=32)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_state_dict(path: Path, own: Set[str] = frozenset()) -> dict[str, torch.Tensor]:
    """Read the tensors of a weights file by name; floating-point ones become float32.

    Names lose the prefix of what the network was part of, unless one is in `own`, the network's
    names. No code in the file is run: the file is safetensors, or read with ``weights_only=True``.
    """
    state = _unwrap(_read(path), path)
    _check_tensors(state, path)
    names = list(state)
    while own.isdisjoint(names) and (
        prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in names)), None)
    ):
        names = [name.removeprefix(prefix) for name in names]
    values = [tensor.resolve_neg() for tensor in state.values()]
    tensors = [t.float() if t.is_floating_point() else t for t in values]
    return _with_metadata(state, dict(zip(names, tensors, strict=True)))


def _read(path: Path) -> object:
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}.") from error
    if zipfile.is_zipfile(path):  # as torch.save writes it, uncompressed
        with zipfile.ZipFile(path) as archive:
            n_bytes = sum(entry.file_size for entry in archive.infolist())
        if n_bytes > path.stat().st_size:
            raise ValueError(
                f"{path} is compressed, and holds {n_bytes:,} bytes: write it with torch.save."
            )
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
    while isinstance(state, Mapping):
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


_DTYPES = {torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
_DTYPES |= {torch.int8, torch.int16, torch.int32, torch.int64}
_DTYPES |= {torch.bfloat16, torch.float16, torch.float32, torch.float64}


def fault_of(tensor: torch.Tensor) -> str | None:
    """Return why a tensor is not a dense one of numbers, or None."""
    if tensor.is_meta:
        return "holds no values (it is on the meta device)"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"is {'nested' if tensor.is_nested else tensor.layout}, not dense"
    return None if tensor.dtype in _DTYPES else f"is of type {tensor.dtype}"


def _check_tensors(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise ValueError unless all are plain tensors by name whose values are in the file."""
    sizes: dict[int, int] = {}  # of each storage, less the bytes of its different views
    views = set()
    for name, tensor in state.items():
        fault = fault_of(tensor)
        if not isinstance(name, str):
            fault = "has a name that is not a string"
        elif fault is None and type(tensor) not in (torch.Tensor, nn.Parameter):
            fault = f"is a {type(tensor).__name__}"
        elif fault is None:
            storage = tensor.untyped_storage()
            view = storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()
            if view not in views:  # two names may share one tensor
                views.add(view)
                sizes.setdefault(view[0], storage.nbytes())
                sizes[view[0]] -= tensor.numel() * tensor.element_size()
                if sizes[view[0]] < 0:
                    fault = f"has the shape {tuple(tensor.shape)}, for which the values are missing"
        if fault is not None:
            raise ValueError(
                f"{path}: {name!r} {fault}. A state dict of plain tensors of numbers is needed, as "
                "module.state_dict() of a module that holds its weights."
            )


def warn_unless_finite(module: nn.Module, source: str, head_layers: Collection[str] = ()) -> None:
    """Warn of weights that are NaN or infinite; a mask may hold -inf."""
    in_head = tuple(f"{layer}." for layer in head_layers)
    parameters = {name for name, _ in module.named_parameters()}
    bad = []
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not name.startswith(in_head):
            is_right = tensor.isfinite()
            if not is_right.all() and name not in parameters:
                is_right |= tensor == -torch.inf
            if not is_right.all():
                bad.append(name)
    if bad:
        warn(
            f"{source}: {len(bad)} tensors hold NaN or infinity, the first of them {bad[0]!r}, so "
            "embeddings may be NaN. The weights may come from a training that diverged."
        )


def _with_metadata(
    state: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> OrderedDict[str, torch.Tensor]:
    """Return `tensors` with the format versions of `state`, which old formats need."""
    made = OrderedDict(tensors)
    made.__dict__.update(getattr(state, "__dict__", {}))
    return made


def fit_state_dict(
    module: nn.Module, state: Mapping[str, torch.Tensor], head_layers: Collection[str], source: str
) -> None:
    """Load a state dict into `module`; only the head, which is not used, may differ.

    The module may be on the meta device: its tensors are replaced. `head_layers` are dotted
    names, `source` names the file and the network in messages. ValueError lists other keys that
    differ.
    """
    own = module.state_dict()
    if any(".denselayer" in key for key in own):  # torchvision's old files say norm.1 for norm1
        pattern = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$")
        state = _with_metadata(
            state, {pattern.sub(r"\1\2", key): value for key, value in state.items()}
        )
    misshapen = {
        key: f"{key} ({_shape(state[key])} in the file, {_shape(own[key])})"
        for key in own
        if key in state and not _is_alike(state[key], own[key])
    }
    fitting = {key: value for key, value in state.items() if key not in misshapen}
    # The layers rename the keys of older versions of torchvision.
    result = module.load_state_dict(_with_metadata(state, fitting), strict=False, assign=True)
    report = {
        "in the network alone": [k for k in result.missing_keys if k not in misshapen],
        "in the file alone": result.unexpected_keys,
        "of another shape": list(misshapen.values()),
    }
    in_head = tuple(f"{layer}." for layer in head_layers)
    body = {what: [k for k in keys if not k.startswith(in_head)] for what, keys in report.items()}
    if lines := [f"  {what} ({len(k)}): {', '.join(k)}" for what, k in body.items() if k]:
        raise ValueError(
            f"{source}: the file does not hold the weights of this network. Beyond the head, these "
            "keys do not fit.\n" + "\n".join(lines)
        )
    own = module.state_dict()
    zeros = {key: torch.zeros_like(t, device="cpu") for key, t in own.items() if t.is_meta}
    module.load_state_dict(_with_metadata(own, zeros), strict=False, assign=True)  # in the head
    warn_unless_finite(module, source, head_layers)


def _is_alike(given: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether the shapes are equal, and integers do not replace floating-point numbers."""
    is_whole = own.is_floating_point() and not given.is_floating_point()
    return given.shape == own.shape and not is_whole


def _shape(tensor: torch.Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"
