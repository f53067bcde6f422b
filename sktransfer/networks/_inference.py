"""Networks in memory: loaded once per process, however many estimators ask."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sktransfer._threads import ProcessLock
from sktransfer.networks._compiling import CompiledNetwork
from sktransfer.networks._folding import EmbeddingNetwork, inference_copy
from sktransfer.networks._packing import can_pack, pack_convolutions
from sktransfer.networks._pooling import Pooling
from sktransfer.networks._preprocessing import AnyPreprocessing, Preprocessing
from sktransfer.networks._source import Source
from sktransfer.networks._stages import plan_stages

# Networks kept at once, and inference copies of each (device, precision, layers, ...).
MAX_NETWORKS = 4
_MAX_COPIES = 4

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Network:
    """A source's module and the plan of its stages; its weights are loaded when first needed.

    Attributes
    ----------
    plan : Plan
        Stages, names and shapes, known without weights.
    """

    def __init__(self, source: Source, input_size: tuple[int, int, int]):
        self.source = source
        self._module = source.build()
        self.plan = plan_stages(self._module, input_size, source.name, is_foreign=source.is_foreign)
        self._lock = threading.RLock()
        self._is_loaded = False
        self._copies: OrderedDict[tuple, EmbeddingNetwork | CompiledNetwork] = OrderedDict()

    @property
    def module(self) -> nn.Module:
        """The module with its weights, in eval mode; it is shared, so do not alter it."""
        with self._lock:
            if not self._is_loaded:
                self.source.load(self._module, self.plan.head_layers())
                self._is_loaded = True
            return self._module

    def embedding_network(
        self,
        keys: Sequence[str],
        poolings: Sequence[tuple[Any, ...]],
        preprocessing: AnyPreprocessing,
        device: torch.device,
        precision: str,
        *,
        is_compiled: bool = False,
        packed_for: tuple | None = None,
    ) -> Any:
        """What turns a batch of pixels into rows: made once for each set of arguments."""
        mean = std = None
        if isinstance(preprocessing, Preprocessing):
            mean, std = preprocessing.mean, preprocessing.std
        dtype = _DTYPES[precision]
        if packed_for is not None and not can_pack(dtype):
            packed_for = None  # the same as for all
        key = (
            tuple(keys), tuple(poolings), mean, std, device, precision, is_compiled, packed_for
        )  # fmt: skip
        with self._lock:
            if key in self._copies:
                self._copies.move_to_end(key)
                return self._copies[key]
            _ = self.module  # the weights
            channels_last = device.type in ("cpu", "cuda")
            extractor = self.plan.extractor(list(keys), [Pooling(*p) for p in poolings])
            if isinstance(extractor, torch.fx.GraphModule):
                extractor = inference_copy(extractor, device, dtype, channels_last=channels_last)
                if packed_for is not None:
                    pack_convolutions(extractor)
            else:
                extractor = extractor.copy_to(device, dtype)
            network = EmbeddingNetwork(extractor, mean, std, dtype, channels_last)
            network = network.to(device).eval()
            made = CompiledNetwork(network) if is_compiled else network
            self._copies[key] = made
            while len(self._copies) > _MAX_COPIES:
                self._copies.popitem(last=False)
            return made


_networks: OrderedDict[tuple, Network] = OrderedDict()
_being_made: dict[tuple, threading.Lock] = {}
_lock = ProcessLock()


def _renew_locks() -> None:
    _being_made.clear()
    for network in _networks.values():
        network._lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # the other threads' loading does not go on in the child
    os.register_at_fork(after_in_child=_renew_locks)


def get_network(source: Source, input_size: tuple[int, int, int]) -> Network:
    """The one network of this process for `source`; the least used beyond four is let go."""
    key = (*source.key, input_size)
    with _lock:
        if key in _networks:
            _networks.move_to_end(key)
            return _networks[key]
        making = _being_made.setdefault(key, threading.Lock())
    with making:
        with _lock:
            if key in _networks:
                return _networks[key]
        network = Network(source, input_size)
        with _lock:
            _networks[key] = network
            _being_made.pop(key, None)
            while len(_networks) > MAX_NETWORKS:
                _networks.popitem(last=False)
    return network


def clear_networks() -> None:
    """Let go of all networks."""
    with _lock:
        _networks.clear()
