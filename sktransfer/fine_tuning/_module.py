"""Fine-tuned networks: the module to train, and a backbone with trained stages and a head."""

from __future__ import annotations

import copy
import hashlib
import math
import threading
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from skorch import NeuralNet
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sktransfer._threads import own_settings
from sktransfer.embedding._batches import cpu_batch_size
from sktransfer.fine_tuning._training_state import TrainingState, training_state_of
from sktransfer.networks._backbone import Backbone
from sktransfer.networks._inference import Normalisation, Pooling
from sktransfer.networks._preprocessing import AnyPreprocessing
from sktransfer.networks._tokens import Tokens

# With more trained parameters than this a CPU runs a batch whole, as each part of a batch adds to
# all of their gradients. For 32 images of 224×224 with everything trained, parts of 8 were 1.3 to
# 1.5 times as fast up to 25 million parameters (MobileNetV2, DenseNet-121, ResNet-50; ResNet-18:
# equal), and 8 % slower from 88 million on (ViT-B/32, VGG-11).
_MANY_PARAMETERS = 50_000_000
_VALUE = -1


class TunedModule(nn.Module):
    """The stages below the head, the pooling of some of their values, and a new head.

    The head takes the pooled values joined in the order of `poolings`: the first is that of the
    stage at the position ``pooled_stages[0]``. Without stages the module takes embeddings. Unless
    `moves_statistics`, batch norms of unfrozen stages use the statistics of pre-training, as
    frozen ones always do.

    :meth:`forward` takes the input of the stage at the position `input_stage`: 0 for pixels,
    ``len(stages)`` for embeddings, otherwise what :meth:`run_frozen` returns. The first `n_frozen`
    stages are frozen.
    """

    def __init__(
        self,
        stages: Sequence[tuple[str, nn.Module]],
        poolings: Sequence[Pooling],
        pooled_stages: Sequence[int],
        head: nn.Module,
        preprocessing: AnyPreprocessing,
        moves_statistics: bool = False,
        precision: str = "float32",
    ):
        super().__init__()
        self.stage_names = [name for name, _ in stages]
        self.stages = nn.ModuleList([module for _, module in stages])
        self.poolings, self.pooled_stages = nn.ModuleList(poolings), list(pooled_stages)
        self.head = head
        self.moves_statistics, self.precision = moves_statistics, precision
        self.input_stage, self.n_frozen = 0, len(self.stages)
        # Of the last result of run_frozen: the shape of an image's value, the widths before it.
        self.frozen_shape: tuple[int, ...] = ()
        self.frozen_widths: tuple[int, ...] = ()
        self.max_at_once: int | None = None  # images, after memory did not suffice for a batch
        self.normalisation = Normalisation(preprocessing)
        self.is_text = isinstance(preprocessing, Tokens)
        self.freeze(self.n_frozen)

    def __getstate__(self) -> dict[str, object]:
        # A net that a callback pickles during training predicts from pixels later.
        return {**super().__getstate__(), "input_stage": 0}

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return scores (n, n_outputs) of rows (n, n_columns, …), and `weight` for the loss."""
        scores = self.head(self.embed(x))
        return scores if weight is None else (scores, weight)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Return embeddings (n, n_columns · width), float32."""
        n_rows = len(x)
        x = x.flatten(0, 1)
        if self.input_stage < len(self.stages):
            known = dict[int, torch.Tensor]()
            if self.input_stage > 0:
                below = [k for k, i in enumerate(self.pooled_stages) if i < self.input_stage]
                *rows, x = x.split([*self.frozen_widths, math.prod(self.frozen_shape)], dim=1)
                known = dict(zip(below, rows, strict=True))
                x = x.unflatten(1, self.frozen_shape)
                if self.is_text:  # the last channel is 1 where there is a token
                    x = x[:, : max(1, int(x[..., -1].any(0).sum()))]
            pooled = known | self._run(x, self.input_stage, len(self.stages))
            x = torch.cat([pooled[k] for k in range(len(self.poolings))], dim=1)
        return x.float().reshape(n_rows, -1)

    def run_frozen(self, x: torch.Tensor, stop: int, length: int | None = None) -> torch.Tensor:
        """Apply the stages before `stop` to pixels or texts.

        A row has the pooled values of these stages, then all values of the last one, padded to
        `length` tokens.
        """
        found = self._run(x, 0, stop)
        value = found.pop(_VALUE)
        if length is not None:
            value = F.pad(value, (0, 0, 0, length - value.shape[1]))
        self.frozen_shape = tuple(value.shape[1:])
        parts = [found[k] for k in sorted(found)]
        self.frozen_widths = tuple(part.shape[1] for part in parts)
        return torch.cat([*parts, value.flatten(1)], dim=1).float()

    def _run(self, x: torch.Tensor, start: int, stop: int) -> dict[int, torch.Tensor]:
        """Apply the stages from `start` to before `stop` to values (n, …).

        Return the pooled values by their position in `poolings`, and under _VALUE the value of the
        last stage if other stages follow it.
        """
        function = partial(self._run_part, start=start, stop=stop)
        is_short = self.max_at_once is not None and torch.is_grad_enabled()
        if is_short and not self._has_moving_statistics():
            # One part after another is computed again for its gradients.
            function = partial(checkpoint, function, use_reentrant=False)
        with torch.autocast(x.device.type, torch.bfloat16, self.precision == "bfloat16"):
            parts = [function(part) for part in x.split(self._n_at_once(x))]
        return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}

    def _run_part(self, x: torch.Tensor, *, start: int, stop: int) -> dict[int, torch.Tensor]:
        if start == 0:
            x = self.normalisation(x)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        found = dict[int, torch.Tensor]()
        for i in range(start, stop):
            x = self.stages[i](x)
            own = [k for k, pooled in enumerate(self.pooled_stages) if pooled == i]
            found |= {k: self.poolings[k](x) for k in own}
        return found if stop == len(self.stages) else found | {_VALUE: x}

    def halve(self, n_images: int) -> bool:
        """Halve the number of images that run at once; return False if that is impossible.

        Batch norms that use the statistics of a batch cannot run it in parts.
        """
        n_before = min(n_images, self.max_at_once or n_images)
        if n_before < 2 or self.input_stage == len(self.stages) or self._has_moving_statistics():
            return False
        self.max_at_once = -(-n_before // 2)
        return True

    def _has_moving_statistics(self) -> bool:
        return any(part.training and _has_statistics(part) for part in self.stages.modules())

    def _n_at_once(self, x: torch.Tensor) -> int:
        """Return how many images to run at once, which does not change the sum of gradients."""
        n = max(1, len(x))
        if self._has_moving_statistics():
            return n
        if x.device.type == "cpu":
            n_trained = sum(p.numel() for p in self.stages.parameters() if p.requires_grad)
            if n_trained <= _MANY_PARAMETERS:
                n = min(n, cpu_batch_size(x.shape[1:]))
        return min(n, self.max_at_once or n)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def n_unfrozen(self) -> int:
        """Number of trained stages, not counting one that only pools."""
        return sum(name != "pool" for name in self.stage_names[self.n_frozen :])

    def freeze(self, n_frozen: int) -> None:
        """Freeze the first `n_frozen` stages, also parameters that others share; train the rest."""
        self.n_frozen = n_frozen
        self.stages[n_frozen:].requires_grad_(True)
        self.stages[:n_frozen].requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> TunedModule:
        super().train(mode)
        # requires_grad=False does not stop batch norm from moving its running
        # statistics; only eval mode does.
        for stage in self.stages[: self.n_frozen]:
            stage.eval()
        if not self.moves_statistics:
            for stage in self.stages[self.n_frozen :]:
                for part in stage.modules():
                    if _has_statistics(part):
                        part.training = False
        return self

    def auto_lr(self, first_trained_stage: int) -> float:
        """Return the head's rate for ``lr="auto"``: smaller for texts, or without normalisation."""
        is_robust = normalises(self.stages) and not self.is_text
        return 3e-4 if is_robust or first_trained_stage >= len(self.stages) else 1e-4

    def groups(self, start: int) -> list[tuple[str, int, list[nn.Parameter]]]:
        """Return (stage, distance from the head, parameters) of the stages from `start` on.

        The last stage comes first. A stage that only pools has the distance of the one below it.
        Parameters that several stages share belong to the lowest of them.
        """
        found: list[tuple[str, int, list[nn.Parameter]]] = []
        owner: dict[int, int] = {}
        for i, stage in enumerate(self.stages):
            for parameter in stage.parameters():
                owner.setdefault(id(parameter), i)
        distance = 0
        for i in range(len(self.stages) - 1, start - 1, -1):
            distance += self.stage_names[i] != "pool"
            if own := [p for p in self.stages[i].parameters() if owner[id(p)] == i]:
                found.append((self.stage_names[i], max(1, distance), own))
        return found


def normalises(network: nn.Module) -> bool:
    """Whether a network normalises activations, other than AlexNet, VGG and SqueezeNet."""
    parts = [type(part).__name__.lower() for part in network.modules()]
    return any("norm" in name and "response" not in name for name in parts)


def _has_statistics(part: nn.Module) -> bool:
    """Whether a layer keeps running statistics of batches."""
    return any(name.startswith("running_") for name, _ in part.named_buffers(recurse=False))


class TunedNetwork:
    """A backbone with a new head and, from some stage on, trained weights.

    Its pickle contains the trained weights, and how the backbone, which is not changed, loads the
    others.
    `n_columns` are the image columns of a row, `first_trained_stage` the position of the lowest
    trained stage; with ``len(stage_names)`` only the head is trained.
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
        self._training_state: TrainingState | None = None  # of another process
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
        """Return the module to train; only the head, if no stage is trained and not `whole`."""
        with self._lock:
            if self._module is None or (whole and not self._module.stages):
                self._root, self._module = self._build(whole or self.has_own_stages)
                self._module.eval()
            return self._module

    def copy(self, head: nn.Module, first_trained_stage: int, precision: str) -> TunedNetwork:
        """Return an independent network with these weights, to be trained from another stage on.

        The trained head's weights are loaded into `head`: ValueError if they do not fit.
        """
        try:
            head.load_state_dict(self.head.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"The trained head's weights do not fit the parameter `head` any more ({error}). "
                "Set `head` to what it was, or call fit to start again."
            ) from error
        tuned = TunedNetwork(
            self.backbone,
            head,
            self.n_columns,
            min(first_trained_stage, self.first_trained_stage),
            moves_statistics=self.moves_statistics,
            precision=precision,
        )
        tuned.load_trained_state(self.trained_state())
        return tuned

    def _build(self, with_stages: bool) -> tuple[nn.Module | None, TunedModule]:
        root, stages = self.backbone.copy_network() if with_stages else (None, [])
        module = TunedModule(
            stages[: len(self.stage_names)],
            self.backbone.make_poolings(),
            self.backbone.layer_stages,
            self.head,
            self.backbone.preprocessing,
            self.moves_statistics,
            self.precision,
        )
        self._load_into(module, self._loaded or {})
        return root, module

    # -- what was trained -------------------------------------------------------------------
    def trained_state(self) -> dict[str, np.ndarray]:
        """Return the trained stages' parameters and buffers by ``"<position>.<name>"``."""
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
        """Return the names and shapes of :meth:`trained_state`."""
        if not self.has_own_stages:
            return {}
        stages = self.backbone.network.plan.stages()  # without weights
        return {
            f"{i}.{name}": tuple(tensor.shape)
            for i in range(self.first_trained_stage, len(self.stage_names))
            for name, tensor in _weights(stages[i].module).items()
        }

    def training_state(self) -> TrainingState | None:
        """Return the state for the next epoch of ``partial_fit``; None before any training."""
        if self.net is None:
            return self._training_state
        return training_state_of(self.net)

    def set_training_state(self, state: TrainingState) -> None:
        """Set the result of :meth:`training_state` in another process."""
        self.net, self._training_state = None, state

    # -- embedding and scores ---------------------------------------------------------------
    def tuned_backbone(self) -> Backbone:
        """Return the backbone with the trained weights, for `embed` and the store."""
        if not self.has_own_stages:
            return self.backbone
        with self._lock:
            if self._tuned is None:
                self.module()
                assert self._root is not None
                # A copy, so that inference on another device does not move the trained module.
                root = copy.deepcopy(self.backbone.network.module).cpu()
                root.load_state_dict(self._root.state_dict())
                root.eval().requires_grad_(False)
                digest = _digest(self.backbone.fingerprint, self.trained_state())
                self._tuned = self.backbone.with_weights(root, digest)
            return self._tuned

    @own_settings()
    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the head's scores, in float64 so that they do not depend on the batch."""
        head = copy.deepcopy(self.head).cpu().double().eval().requires_grad_(False)
        with torch.inference_mode():
            return head(torch.from_numpy(np.asarray(embeddings, dtype=np.float64))).numpy()

    # -- pickling ---------------------------------------------------------------------------
    def __getstate__(self) -> dict[str, object]:
        state = dict(self.__dict__)
        state["_loaded"], state["_training_state"] = self.trained_state(), self.training_state()
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


def _digest(fingerprint: str, state: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(fingerprint.encode())
    for name, array in sorted(state.items()):
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _weights(stage: nn.Module) -> dict[str, torch.Tensor]:
    """Return a stage's parameters and buffers, without torch.fx's numbered constants."""
    state = stage.state_dict()
    return {name: state[name] for name in state if "_tensor_constant" not in name}
