"""Networks in memory: loaded once per process, however many estimators ask."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import fx, nn

from sktransfer._threads import one_at_a_time, process_lock
from sktransfer.networks._folding import EmbeddingNetwork, inference_copy
from sktransfer.networks._pooling import Pooling
from sktransfer.networks._preprocessing import AnyPreprocessing, Preprocessing
from sktransfer.networks._sources import Source
from sktransfer.networks._stages import plan_stages

# Networks kept at once, and inference copies of each (device, precision, layers, ...).
MAX_NETWORKS = 4
_MAX_COPIES = 4

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_networks: OrderedDict[tuple, Network] = OrderedDict()
_lock = process_lock()  # for look-ups only


class Network:
    """A source's module and the plan of its stages; its weights are loaded when first needed.

    Attributes
    ----------
    plan : StagePlan or HookedPlan
        Stages, names and shapes, known without weights.
    """

    def __init__(self, source: Source, input_size: tuple[int, int, int]):
        self.source = source
        self._module = source.build()
        self.plan = plan_stages(self._module, input_size, source.name, is_foreign=source.is_foreign)
        self._is_loaded = False
        self._lock = process_lock()
        self._copies: OrderedDict[tuple, EmbeddingNetwork] = OrderedDict()

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
        keys: list[str],
        poolings: list[tuple[str, str, int, int]],
        preprocessing: AnyPreprocessing,
        device: torch.device,
        precision: str,
    ) -> EmbeddingNetwork:
        """What turns a batch of pixels into rows: made once for each set of arguments."""
        mean = std = None
        if isinstance(preprocessing, Preprocessing):
            mean, std = preprocessing.mean, preprocessing.std
        key = tuple(keys), tuple(poolings), mean, std, device, precision
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
            made = EmbeddingNetwork(extractor, mean, std, dtype, channels_last).to(device).eval()
            self._copies[key] = made
            while len(self._copies) > _MAX_COPIES:
                self._copies.popitem(last=False)
            return made


def get_network(source: Source, input_size: tuple[int, int, int]) -> Network:
    """The one network of this process for `source`; the least used beyond four is let go."""
    key = (*source.key, input_size)
    if found := _look_up(key):
        return found
    with one_at_a_time:  # as building does: the other order could block two threads for ever
        if found := _look_up(key):
            return found
        network = Network(source, input_size)
        with _lock:
            _networks[key] = network
            while len(_networks) > MAX_NETWORKS:
                _networks.popitem(last=False)
        return network


def _look_up(key: tuple) -> Network | None:
    with _lock:
        if key in _networks:
            _networks.move_to_end(key)
        return _networks.get(key)


def clear_networks() -> None:
    """Let go of all networks."""
    with _lock:
        _networks.clear()
