"""Inference: networks loaded once per process, with folded batch norms and pooled outputs."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sktransfer._threads import global_state_lock, own_settings, process_lock
from sktransfer.networks._graph import graph_module, is_patched
from sktransfer.networks._preprocessing import AnyPreprocessing, Preprocessing
from sktransfer.networks._sources import Source
from sktransfer.networks._stages import plan_stages

# Networks kept at once, and inference copies of each (device, precision, layers, ...).
MAX_NETWORKS = 4
_MAX_COPIES = 4

_DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_networks: OrderedDict[tuple, Network] = OrderedDict()
_lock = process_lock()  # for look-ups only
# Held while CUDA's precision differs from the caller's. The global lock, which a fit holds, would
# keep other threads from predicting.
_precision_lock = process_lock()

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLINGS = ("auto", "avg", "max", "avgmax", "gem", "cls", "flatten")
TEXT_POOLINGS = ("auto", "mean", "avg", "max", "cls", "last")
_GEM_POWER = 3.0


# -- networks in memory --------------------------------------------------------------------------
class Network:
    """A source's module and the plan of its stages; its weights are loaded when first needed."""

    def __init__(self, source: Source, input_size: tuple[int, ...]):
        self.source = source
        self._module = source.build()
        self.plan = plan_stages(
            self._module, input_size, source.name, is_user_code=source.is_user_code
        )
        self._is_loaded = False
        self._lock = process_lock()
        self._copies: OrderedDict[tuple, EmbeddingNetwork] = OrderedDict()

    @property
    @own_settings()
    def module(self) -> nn.Module:
        """The module with its weights, in eval mode; it is shared, so do not alter it."""
        with self._lock:
            if not self._is_loaded:
                self.source.load(self._module, self.plan.head_layers())
                self._is_loaded = True
            return self._module

    def embedding_network(
        self,
        keys: list[str],
        poolings: list[tuple[str, str, int, int]],
        preprocessing: AnyPreprocessing,
        device: torch.device,
        precision: str,
    ) -> EmbeddingNetwork:
        """Return the network from pixels to rows, made once for each set of arguments."""
        device, normalisation = with_index(device), Normalisation(preprocessing)
        key = tuple(keys), tuple(poolings), normalisation.key, device, precision
        with self._lock:
            if key in self._copies:
                self._copies.move_to_end(key)
                return self._copies[key]
            _ = self.module  # the weights
            dtype = _DTYPES[precision]
            channels_last = device.type in ("cpu", "cuda")
            extractor = self.plan.extractor(keys, [Pooling(*p) for p in poolings])
            if isinstance(extractor, fx.GraphModule):
                extractor = inference_copy(extractor, device, dtype, channels_last=channels_last)
            else:
                extractor = extractor.copy_to(device, dtype)
            made = EmbeddingNetwork(extractor, normalisation, precision, channels_last)
            made = made.to(device).eval()
            self._copies[key] = made
            while len(self._copies) > _MAX_COPIES:
                self._copies.popitem(last=False)
            return made


def get_network(source: Source, input_size: tuple[int, ...]) -> Network:
    """Return the one network of this process for `source`; the last four used are kept."""
    key = (type(source).__name__, source.name, source.digest, input_size)
    if found := _look_up(key):
        found.source = source  # the file of the same weights may have moved
        return found
    with global_state_lock:  # first, as in building: another order could deadlock
        if found := _look_up(key):
            return found
        network = Network(source, input_size)
        with _lock:
            _networks[key] = network
            while len(_networks) > MAX_NETWORKS:
                _networks.popitem(last=False)
        return network


def is_in_memory(source: Source, input_size: tuple[int, ...]) -> bool:
    return _look_up((type(source).__name__, source.name, source.digest, input_size)) is not None


def _look_up(key: tuple) -> Network | None:
    with _lock:
        if key in _networks:
            _networks.move_to_end(key)
        return _networks.get(key)


def clear_networks() -> None:
    """Forget all networks."""
    with _lock:
        _networks.clear()


# -- devices ------------------------------------------------------------------------------------
def with_index(device: torch.device) -> torch.device:
    """Return the device with its number, as ``"cuda"`` and ``"cuda:0"`` are one."""
    if device.type == "cpu":
        return torch.device("cpu")
    if device.index is not None:
        return device
    # Asking for the current device would initialise CUDA, after which a process cannot fork.
    is_chosen = device.type == "cuda" and torch.cuda.is_initialized()
    return torch.device(device.type, torch.cuda.current_device() if is_chosen else 0)


@contextlib.contextmanager
def tensor_float_32(device: torch.device, is_allowed: bool) -> Iterator[None]:
    """Set whether CUDA rounds float32 factors to TF32 (10 bits), and restore it at the end."""
    if device.type == "cpu":
        yield
        return
    backends = torch.backends
    places: list[object] = [backends.cudnn, backends.cuda.matmul]
    name: str = "allow_tf32"
    value: bool | str = is_allowed
    if hasattr(backends.cudnn, "conv"):  # since torch 2.9, which refuses a mix of both
        places = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
        name, value = "fp32_precision", "tf32" if is_allowed else "ieee"
    with _precision_lock:  # kernels are chosen when they are queued
        before = [getattr(place, name) for place in places]
        try:
            for place in places:
                setattr(place, name, value)
            yield
        finally:
            for place, found in zip(places, before, strict=True):
                setattr(place, name, found)


# -- folding ------------------------------------------------------------------------------------
class Normalisation(nn.Module):
    """Normalise pixels of 0…255 to x · scale + shift; outputs of a callable are not changed.

    `mean` and `std` are those of pixels in 0…1:
    (x / 255 - mean) / std = x · 1 / (255 std) - mean / std.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, preprocessing: AnyPreprocessing):
        super().__init__()
        self.key: tuple | None = None
        if isinstance(preprocessing, Preprocessing):
            self.key = preprocessing.mean, preprocessing.std
            mean, std = torch.tensor(self.key, dtype=torch.float64).view(2, 1, -1, 1, 1)
            self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
            self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.key is None:
            return x
        if torch.compiler.is_compiling():  # torch 2.6 cannot export addcmul as ONNX
            return x.float() * self.scale + self.shift
        return torch.addcmul(self.shift, x.float(), self.scale)


class EmbeddingNetwork(nn.Module):
    """Computes a float32 row of each layer for each image of uint8 pixels.

    `extractor` returns the layers' pooled values as a list, see :func:`inference_copy`.
    """

    def __init__(
        self,
        extractor: nn.Module,
        normalisation: Normalisation,
        precision: str,
        channels_last: bool,
    ):
        super().__init__()
        self.extractor, self.normalisation = extractor, normalisation
        self.precision, self.dtype = precision, _DTYPES[precision]
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        if x.dtype != torch.int64:  # tokens of texts stay numbers
            x = self.normalisation(x).to(self.dtype)
            x = x.contiguous(memory_format=self.memory_format) if x.ndim == 4 else x
        with tensor_float_32(x.device, self.precision == "tf32"):
            return self.extractor(x)


def inference_copy(
    network: fx.GraphModule, device: torch.device, dtype: torch.dtype, *, channels_last: bool
) -> fx.GraphModule:
    """Copy `network`, which is in eval mode, for inference; the original is not altered.

    With `channels_last` convolutions keep their weights as N×H×W×C.
    """
    folded = graph_module(network, copy.deepcopy(network.graph))
    _fold_batch_norms(folded)
    copied = copy.deepcopy(folded).to(device=device, dtype=dtype)
    copied.graph.owning_module = None
    for layer in copied.modules():
        if channels_last and isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied.eval().requires_grad_(False)


def _fold_batch_norms(network: fx.GraphModule) -> None:
    """Fold each batch norm into the convolution that feeds it and nothing else.

    y = γ (W x + b - μ) / √(σ² + ε) + β is a convolution with W' = γ W / √(σ² + ε) and
    b' = β + γ (b - μ) / √(σ² + ε).
    """
    layers = dict(network.named_modules(remove_duplicate=False))
    calls = [layers[str(n.target)] for n in network.graph.nodes if n.op == "call_module"]
    n_calls = Counter(map(id, calls))
    for node in list(network.graph.nodes):
        before = node.args[0] if node.args else None
        if not (
            node.op == "call_module"
            and isinstance(before, fx.Node)
            and before.op == "call_module"
            and len(before.users) == 1
        ):
            continue
        conv, norm = layers[str(before.target)], layers[str(node.target)]
        if not (
            isinstance(norm, _NORMS)
            and norm.forward.__module__.startswith(("torch.", "timm."))  # not overridden by a user
            and type(conv) in _CONVS
            and n_calls[id(conv)] == 1
            and norm.running_mean is not None
            and not is_patched(conv)
            and not is_patched(norm)
        ):
            continue
        with torch.no_grad():
            network.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
        rest = _after_norm(norm)
        if rest is None:
            node.replace_all_uses_with(before)
            network.graph.erase_node(node)
        else:
            network.set_submodule(str(node.target), rest)
    network.graph.lint()
    network.recompile()
    network.delete_all_unused_submodules()


def _after_norm(norm: nn.Module) -> nn.Module | None:
    """Return the layers that a batch norm of timm applies after normalising, if any."""
    rest = [child for child in norm.children() if not isinstance(child, (nn.Identity, *_NORMS))]
    return nn.Sequential(*rest) if rest else None


# -- pooling ------------------------------------------------------------------------------------
class Pooling(nn.Module):
    """Reduce a network's value to one row per image, in float32.

    Parameters
    ----------
    kind : {"none", "avg", "max", "avgmax", "gem", "cls", "flatten"}
        ``"gem"`` is the generalised mean (mean of x^p)^(1/p) with p = 3 [1]_.
    layout : {"vector", "map", "map_last", "tokens", "texts"}
        N×C; N×C×H×W; N×H×W×C; N×places×C; N×places×(C+1), the last channel of which is 1 where
        there is a token and 0 where there is padding. For texts there is the kind ``"last"``, too,
        and ``"_unit"`` behind a kind scales rows to length 1.
    token : int, default=0
        Position of the class token, for ``"cls"``.
    n_prefix : int, default=0
        Number of tokens at the beginning that are not part of the image (class token and
        registers); the other kinds leave them out where the network does.

    References
    ----------
    .. [1] F. Radenović, G. Tolias, O. Chum: "Fine-tuning CNN image retrieval with no human
       annotation", IEEE TPAMI 41(7), 2019. :doi:`10.1109/TPAMI.2018.2846566`
    """

    def __init__(self, kind: str, layout: str, token: int = 0, n_prefix: int = 0):
        super().__init__()
        self.kind, self.layout, self.token, self.n_prefix = kind, layout, token, n_prefix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.layout == "texts":
            return self._of_texts(x)
        if self.kind == "cls":
            return x[:, self.token].float()
        if self.kind == "flatten":
            return x.flatten(1).float()
        if self.layout == "vector":
            return x.float()
        places = x[:, self.n_prefix :] if self.layout == "tokens" else x
        axes = {"map": (2, 3), "map_last": (1, 2), "tokens": (1,)}[self.layout]
        if self.kind == "gem":
            # (1/n Σ x^p)^(1/p) needs x > 0; 1e-6 as in the authors' code.
            powers = places.float().clamp(min=1e-6).pow(_GEM_POWER)
            return powers.mean(axes).pow(1.0 / _GEM_POWER)
        parts = []
        if "avg" in self.kind:  # in float32, whatever the network computes in
            parts.append(places.mean(axes, dtype=torch.float32))
        if "max" in self.kind:
            parts.append(places.amax(axes).float())
        return torch.cat(parts, dim=1)

    def _of_texts(self, x: torch.Tensor) -> torch.Tensor:
        """Pool the tokens of each text; zeros for a text without any."""
        is_token = x[..., -1:] > 0.5
        values = torch.where(is_token, x[..., :-1].float(), 0)
        n_tokens = is_token.sum(1)
        kind = self.kind.removesuffix("_unit")
        if kind == "avg":
            rows = values.sum(1) / n_tokens.clamp(min=1)
        elif kind == "max":
            lowest = values.masked_fill(~is_token, -torch.inf).amax(1)
            rows = torch.where(n_tokens > 0, lowest, 0)
        elif kind == "cls":
            rows = values[:, 0]
        else:
            rows = values[torch.arange(len(x), device=x.device), n_tokens[:, 0].clamp(min=1) - 1]
        return F.normalize(rows, dim=1) if self.kind.endswith("_unit") else rows


def layout_of(shape: tuple[int, ...], is_channels_last: bool) -> str | None:
    """Return the layout of a value by its shape; None if it is not a vector or map per image."""
    layouts = {2: "vector", 3: "tokens", 4: "map_last" if is_channels_last else "map"}
    return layouts.get(len(shape))


def resolve_pooling(pooling: str, layout: str, layer: str, class_token: int | None) -> str:
    """Return the kind of pooling for one layer; raise ValueError if it does not fit."""
    if layout == "texts":
        return {"auto": "avg", "mean": "avg"}.get(pooling, pooling)
    has_token = layout == "tokens" and class_token is not None
    if pooling == "auto":
        return "cls" if has_token else "avg"
    if pooling == "cls" and not has_token:
        what = {
            "vector": "one vector per image",
            "map": "a map with height and width",
            "map_last": "a map with height and width",
            "tokens": "a sequence of tokens, and the network classifies from all of them",
        }[layout]
        raise ValueError(
            f"pooling='cls' asks for the class token, but {layer} gives {what}: use pooling='avg', "
            "'max', 'avgmax', 'gem' or 'flatten', or a vision transformer's layer."
        )
    return pooling


def pooled_width(kind: str, layout: str, shape: tuple[int, ...]) -> int:
    """Return the number of columns that pooling a value of `shape` (with its batch axis) gives."""
    if kind == "flatten":
        return math.prod(shape[1:])
    if layout == "texts":
        return shape[-1] - 1
    channels = shape[1] if layout in ("vector", "map") else shape[-1]
    return channels * (2 if kind == "avgmax" and layout != "vector" else 1)
