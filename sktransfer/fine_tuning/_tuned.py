"""A fine-tuned network: the pre-trained one, its trained stages, and its head.

Its pickle holds what was trained, and how the backbone brings back the rest.
"""

from __future__ import annotations

import copy
import hashlib
import threading

import numpy as np
import torch
from skorch import NeuralNet
from torch import nn

from sktransfer.fine_tuning._module import TunedModule
from sktransfer.networks._backbone import Backbone, load_backbone
from sktransfer.networks._preprocessing import Preprocessing
from sktransfer.networks._source import GivenSource


class TunedNetwork:
    """A backbone with a head of its own and, from some stage on, weights of its own.

    Parameters
    ----------
    backbone : Backbone
        Pre-trained; it is not changed.
    head : nn.Module
    n_columns : int
        Image columns of a row.
    first_trained_stage : int
        Position of the lowest trained stage; ``len(stage_names)``: only the head is trained.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        n_columns: int,
        first_trained_stage: int,
        *,
        moves_statistics: bool = False,
        precision: str = "float32",
    ):
        self.backbone, self.head = backbone, head
        self.n_columns, self.first_trained_stage = n_columns, first_trained_stage
        self.moves_statistics, self.precision = moves_statistics, precision
        self.stage_names = backbone.stage_names_to_layer
        self.net: NeuralNet | None = None  # skorch's, of the last training in this process
        self._root: nn.Module | None = None  # the network whose layers the stages call
        self._module: TunedModule | None = None
        self._loaded: dict[str, np.ndarray] | None = None
        self._tuned: Backbone | None = None
        self._lock = threading.RLock()  # several threads may be the first to predict

    @property
    def has_own_stages(self) -> bool:
        """Whether more than the head is trained."""
        return self.first_trained_stage < len(self.stage_names)

    def module(self, *, whole: bool = False) -> TunedModule:
        """The module to train. It has no stages if only the head is trained and not `whole`."""
        with self._lock:
            if self._module is None or (whole and not self._module.stages):
                self._root, self._module = self._build(whole or self.has_own_stages)
            return self._module

    def copy(self, first_trained_stage: int, precision: str) -> TunedNetwork:
        """An independent network with these weights, to be trained from another stage on."""
        tuned = TunedNetwork(
            self.backbone,
            copy.deepcopy(self.head).cpu(),
            self.n_columns,
            min(first_trained_stage, self.first_trained_stage),
            moves_statistics=self.moves_statistics,
            precision=precision,
        )
        tuned.load_trained_state(self.trained_state())
        return tuned

    def _build(self, with_stages: bool) -> tuple[nn.Module | None, TunedModule]:
        pooling = self.backbone.make_pooling()
        if not with_stages:
            return None, TunedModule([], pooling, self.head, precision=self.precision)
        root, stages = self.backbone.copy_network()
        preprocessing = self.backbone.preprocessing
        mean = std = None
        if isinstance(preprocessing, Preprocessing):
            mean, std = preprocessing.mean, preprocessing.std
        module = TunedModule(
            [(stage.name, stage.module) for stage in stages[: len(self.stage_names)]],
            pooling,
            self.head,
            mean,
            std,
            self.moves_statistics,
            self.precision,
        )
        self._load_into(module, self._loaded or {})
        return root, module

    # -- what was trained -------------------------------------------------------------------
    def trained_state(self) -> dict[str, np.ndarray]:
        """Parameters and buffers of the trained stages, ``"<position>.<name>"`` -> array."""
        if self._module is None or not self._module.stages:
            return dict(self._loaded or {})
        return {
            f"{i}.{name}": tensor.detach().cpu().numpy().copy()
            for i in range(self.first_trained_stage, len(self.stage_names))
            for name, tensor in _weights(self._module.stages[i]).items()
        }

    def load_trained_state(self, state: dict[str, np.ndarray]) -> None:
        """Set the trained stages' parameters and buffers."""
        self._loaded = dict(state)
        self._module = self._root = self._tuned = None
        if self.has_own_stages:
            self.module()  # checks names and shapes

    def _load_into(self, module: TunedModule, state: dict[str, np.ndarray]) -> None:
        for i in range(self.first_trained_stage, len(module.stages)):
            own = {
                name.partition(".")[2]: torch.from_numpy(np.array(array))
                for name, array in state.items()
                if name.partition(".")[0] == str(i)
            }
            if not own:
                continue  # not trained so far, or without weights
            wanted = _weights(module.stages[i])
            misfits = [k for k in wanted if k not in own or own[k].shape != wanted[k].shape]
            if misfits := [*misfits, *(k for k in own if k not in wanted)]:
                raise ValueError(
                    f"The trained weights do not fit stage {module.stage_names[i]!r} of this "
                    f"network: {misfits[:10]}."
                )
            module.stages[i].load_state_dict(own, strict=False)

    def expected_state(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what :meth:`trained_state` returns."""
        if not self.has_own_stages:
            return {}
        stages = self.backbone.stages
        return {
            f"{i}.{name}": tuple(tensor.shape)
            for i in range(self.first_trained_stage, len(self.stage_names))
            for name, tensor in _weights(stages[i].module).items()
        }

    # -- embedding and scores ---------------------------------------------------------------
    def tuned_backbone(self) -> Backbone:
        """The backbone with the trained weights, for `embed` and the store."""
        if not self.has_own_stages:
            return self.backbone
        with self._lock:
            if self._tuned is None:
                self.module()
                assert self._root is not None
                # A copy: inference on another device leaves the trained module alone.
                root = copy.deepcopy(self.backbone.network.module).cpu()
                root.load_state_dict(self._root.state_dict())
                root.eval().requires_grad_(False)
                digest = _digest(self.backbone.fingerprint, self.trained_state())
                self._tuned = self.backbone.with_weights(root, digest)
            return self._tuned

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """The head's scores, in float64 so that they do not depend on the batch."""
        head = copy.deepcopy(self.head).cpu().double().eval().requires_grad_(False)
        with torch.inference_mode():
            return head(torch.from_numpy(np.asarray(embeddings, dtype=np.float64))).numpy()

    # -- pickling ---------------------------------------------------------------------------
    def __getstate__(self) -> dict[str, object]:
        state = dict(self.__dict__)
        state["_loaded"] = self.trained_state()
        state["head"] = copy.deepcopy(self.head).cpu()
        for name in ("net", "_root", "_module", "_tuned"):
            state[name] = None
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def __deepcopy__(self, memo: dict) -> TunedNetwork:
        copied = type(self).__new__(type(self))
        copied.__setstate__(self.__getstate__())
        return copied


def with_own_weights(
    name: str,
    state: dict[str, torch.Tensor],
    layer: str | list | None,
    pooling: str,
    preprocessing: Preprocessing,
) -> Backbone:
    """A backbone of a named architecture with these weights; nothing is downloaded.

    Its fingerprint is computed from the weights themselves.
    """
    base = load_backbone(name, weights=None)
    module = copy.deepcopy(base.network.module)
    module.load_state_dict(state)
    arrays = {key: tensor.contiguous().numpy() for key, tensor in state.items()}
    digest = _digest(base.fingerprint, arrays)
    module.eval().requires_grad_(False)
    assert isinstance(base.preprocessing, Preprocessing)  # the network's own
    source = GivenSource(base.name, base.preprocessing, module, f"own-{digest}")
    return Backbone(source, layer, pooling, preprocessing)


def _digest(fingerprint: str, state: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(fingerprint.encode())
    for name, array in sorted(state.items()):
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _weights(stage: nn.Module) -> dict[str, torch.Tensor]:
    """A stage's parameters and buffers, without constants that torch.fx numbered."""
    state = stage.state_dict()
    return {name: state[name] for name in state if "_tensor_constant" not in name}
