"""A fine-tuned network: the pre-trained one, what was trained of it, and its head.

It pickles as what was trained and the backbone's own recipe for the rest.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from typing import Any

import numpy as np
import torch
from torch import nn

from sktransfer.fine_tuning._head import take_settings
from sktransfer.fine_tuning._module import TunedModule
from sktransfer.networks._backbone import Backbone, load_backbone
from sktransfer.networks._preprocessing import Preprocessing
from sktransfer.networks._source import GivenSource


class TunedNetwork:
    """A backbone with a head of its own and, from some stage on, weights of its own.

    Parameters
    ----------
    backbone : Backbone
        Pre-trained; it is not altered.
    head : nn.Module
    n_columns : int
        Image columns of a row.
    lowest : int
        Position of the lowest stage that is trained.
    moves_statistics : bool
    precision : str

    Attributes
    ----------
    net : NeuralNet or None
        skorch's, while this process trains or has trained.
    net_made_for : object
        The optimizer and the callbacks that were asked for when it was made.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        n_columns: int,
        lowest: int,
        *,
        moves_statistics: bool = False,
        precision: str = "float32",
    ):
        self.backbone, self.head = backbone, head
        self.n_columns, self.lowest = n_columns, lowest
        self.moves_statistics, self.precision = moves_statistics, precision
        self.stage_names = backbone.stage_names_to_layer
        self.net: Any = None
        self.net_made_for: Any = None
        self._root: nn.Module | None = None
        self._module: TunedModule | None = None
        self._kept: dict[str, np.ndarray] | None = None
        self._tuned: Backbone | None = None
        self._lock = threading.RLock()  # several threads may be the first to predict

    @property
    def has_own_stages(self) -> bool:
        """Whether more than the head is trained."""
        return self.lowest < len(self.stage_names)

    # -- the module -------------------------------------------------------------------------
    def module(self, *, whole: bool = False) -> TunedModule:
        """What is trained. A head alone comes without stages, unless the `whole` is asked for."""
        with self._lock:
            if self._module is None or (whole and not self._module.stages):
                self._root, self._module = self._build(whole or self.has_own_stages)
                self.net = None  # it was made for another module
            return self._module

    def change(self, moves_statistics: bool, precision: str) -> None:
        """Go on with other settings."""
        for part in (self, self._module):
            if part is not None:
                part.moves_statistics, part.precision = moves_statistics, precision

    def to_go_on(
        self,
        backbone: Backbone,
        n_columns: int,
        lowest: int,
        head: nn.Module,
        moves_statistics: bool,
        precision: str,
    ) -> TunedNetwork:
        """This network, or its twin of which more stages are trained, to be trained further.

        Raises
        ------
        ValueError
            Where another backbone, other columns or a `head` that is built otherwise are asked
            for.
        """
        if self.backbone.fingerprint != backbone.fingerprint or self.n_columns != n_columns:
            raise ValueError(
                f"warm_start=True goes on with {self.backbone!r} and {self.n_columns} image "
                f"column(s), but this fit asks for {backbone!r} and {n_columns}. Set "
                "warm_start=False to start again."
            )
        take_settings(self.head, head)
        self.change(moves_statistics, precision)
        if lowest >= self.lowest:
            return self
        tuned = TunedNetwork(
            backbone,
            self.head.cpu(),
            n_columns,
            lowest,
            moves_statistics=moves_statistics,
            precision=precision,
        )
        tuned.load_trained_state(self.trained_state())
        return tuned

    def pretrained_values(self) -> dict[int, torch.Tensor]:
        """The backbone's value of each parameter of the stages, by the parameter's ``id``."""
        if self._root is None:
            return {}
        origin = dict(self.backbone.network.module.named_parameters())
        return {id(p): origin[name].detach() for name, p in self._root.named_parameters()}

    def _build(self, with_stages: bool) -> tuple[nn.Module | None, TunedModule]:
        kind = self.backbone.make_pooling()
        if not with_stages:
            return None, TunedModule([], kind, self.head, precision=self.precision)
        root, stages = self.backbone.copy_network()
        preprocessing = self.backbone.preprocessing
        mean = std = None
        if isinstance(preprocessing, Preprocessing):
            mean, std = preprocessing.mean, preprocessing.std
        module = TunedModule(
            [(stage.name, stage.module) for stage in stages[: len(self.stage_names)]],
            kind,
            self.head,
            mean,
            std,
            self.moves_statistics,
            self.precision,
        )
        if self._kept is not None:
            self.put_into(module, self._kept)
        return root, module

    # -- what was trained -------------------------------------------------------------------
    def trained_state(self) -> dict[str, np.ndarray]:
        """Parameters and buffers of the trained stages, ``"<position>.<name>"`` -> array."""
        if self._module is None or not self._module.stages:
            return dict(self._kept or {})
        return {
            f"{i}.{name}": tensor.detach().cpu().numpy().copy()
            for i in range(self.lowest, len(self.stage_names))
            for name, tensor in learnt(self._module.stages[i]).items()
        }

    def load_trained_state(self, state: dict[str, np.ndarray]) -> None:
        """Take over the trained stages' parameters and buffers."""
        self._kept = dict(state)
        self._module = self._root = self._tuned = None
        if self.has_own_stages:
            self.module()  # checks names and shapes

    def put_into(self, module: TunedModule, state: dict[str, np.ndarray]) -> None:
        """Let a module's trained stages be what :meth:`trained_state` gave."""
        for i in range(self.lowest, len(module.stages)):
            own = {
                name.partition(".")[2]: torch.from_numpy(np.array(array))
                for name, array in state.items()
                if name.partition(".")[0] == str(i)
            }
            if not own:
                continue  # never trained, or without weights
            wanted = learnt(module.stages[i])
            misfits = [k for k in wanted if k not in own or own[k].shape != wanted[k].shape]
            if misfits := [*misfits, *(k for k in own if k not in wanted)]:
                raise ValueError(
                    f"The trained weights do not fit stage {module.stage_names[i]!r} of this "
                    f"network: {misfits[:10]}."
                )
            module.stages[i].load_state_dict(own, strict=False)

    def expected_state(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what :meth:`trained_state` gives."""
        if not self.has_own_stages:
            return {}
        pieces = self.backbone.stages
        return {
            f"{i}.{name}": tuple(tensor.shape)
            for i in range(self.lowest, len(self.stage_names))
            for name, tensor in learnt(pieces[i].module).items()
        }

    def has_changed(self) -> None:
        """Say that training went on: what was made from the weights is out of date."""
        self._tuned = None

    # -- embedding and scores ---------------------------------------------------------------
    def tuned_backbone(self) -> Backbone:
        """The backbone with the trained weights, for the inference loop and the store."""
        if not self.has_own_stages:
            return self.backbone
        with self._lock:
            if self._tuned is None:
                self._tuned = self._make_tuned()
            return self._tuned

    def _make_tuned(self) -> Backbone:
        self.module()
        assert self._root is not None
        # Nobody trains the copy, and inference on another device leaves it alone.
        root = copy.deepcopy(self._root).cpu().eval().requires_grad_(False)
        digest = hashlib.sha256(self.backbone.fingerprint.encode())
        for name, array in sorted(self.trained_state().items()):
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return self.backbone.with_weights(root, digest.hexdigest())

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """What the head says to embeddings, in float64 so that no batch size shows."""
        head = copy.deepcopy(self.head).cpu().double().eval().requires_grad_(False)
        with torch.inference_mode():
            return head(torch.from_numpy(np.asarray(embeddings, dtype=np.float64))).numpy()

    # -- pickling ---------------------------------------------------------------------------
    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_kept"] = self.trained_state()
        state["head"] = copy.deepcopy(self.head).cpu()
        for name in ("net", "net_made_for", "_root", "_module", "_tuned"):
            state[name] = None
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
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

    Its fingerprint follows from the weights themselves, whatever they claim to be.
    """
    base = load_backbone(name, weights=None)
    module = copy.deepcopy(base.network.module)
    module.load_state_dict(state)
    digest = hashlib.sha256(base.fingerprint.encode())
    for key, tensor in sorted(state.items()):
        array = tensor.contiguous().numpy()
        digest.update(f"{key}{array.dtype}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    module.eval().requires_grad_(False)
    assert isinstance(base.preprocessing, Preprocessing)  # the network's own
    source = GivenSource(base.name, base.preprocessing, module, f"own-{digest.hexdigest()}")
    return Backbone(source, layer, pooling, preprocessing)


def learnt(stage: nn.Module) -> dict[str, torch.Tensor]:
    """A stage's parameters and buffers, without constants that tracing gave a number."""
    state = stage.state_dict()
    return {name: state[name] for name in state if "_tensor_constant" not in name}
