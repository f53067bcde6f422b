"""The module that is trained: stages below, pooling, a head; what is frozen stands still."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sktransfer.embedding._batches import cpu_batch_size
from sktransfer.networks._folding import scale_and_shift

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Trained parameters above which a batch goes through a CPU whole: each part adds to all of their
# gradients. Of 32 pictures of 224×224, with everything trained, parts of 8 were 1.3 to 1.5 times
# as fast up to 25 million (MobileNetV2, DenseNet-121, ResNet-50; ResNet-18 as fast), and a twelfth
# slower from 88 million on (ViT-B/32, VGG-11).
_MANY_PARAMETERS = 50_000_000


class TunedModule(nn.Module):
    """A network's stages, its pooling, and a new head, from any stage's input on.

    Parameters
    ----------
    stages : sequence of (str, nn.Module)
        Those below the head, or none: what comes in are embeddings.
    pooling : nn.Module
    head : nn.Module
    mean, std : sequence of float, or None
        Of pixels in 0…1; None: the input comes normalised.
    moves_statistics : bool
        Whether unfrozen batch norms go on with their running statistics. Otherwise they use
        those of pre-training, as frozen ones always do.
    precision : {"float32", "bfloat16", "float16"}

    Attributes
    ----------
    entry : int
        Position of the stage whose input :meth:`forward` takes: 0 for pixels.
    n_frozen : int
        How many of the stages are frozen.
    takes_embeddings : bool
        Whether what comes in are embeddings although there are stages: all of them are frozen.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        stages: Sequence[tuple[str, nn.Module]],
        pooling: nn.Module,
        head: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        moves_statistics: bool = False,
        precision: str = "float32",
    ):
        super().__init__()
        self.stage_names = [name for name, _ in stages]
        self.stages = nn.ModuleList([module for _, module in stages])
        self.pooling, self.head = pooling, head
        self.moves_statistics, self.precision = moves_statistics, precision
        self.entry, self.takes_embeddings = 0, False
        self.n_frozen = len(self.stages)
        self.is_normalising = mean is not None
        if mean is not None and std is not None:
            scale, shift = scale_and_shift(mean, std)
            self.register_buffer("scale", scale, persistent=False)
            self.register_buffer("shift", shift, persistent=False)
        self.freeze(self.n_frozen)

    def __getstate__(self) -> dict[str, Any]:
        # A net that is pickled while it is trained will be given pictures.
        return {**super().__getstate__(), "entry": 0, "takes_embeddings": False}  # type: ignore

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> Any:
        """Scores (n, n_outputs) of rows (n, n_columns, …): each image column goes the same way.

        The rows' weights, where they are given, are handed on to the loss.
        """
        scores = self.head(self.embed(x))
        return scores if weight is None else (scores, weight)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, n_columns · width), float32."""
        n_rows = len(x)
        x = x.flatten(0, 1)
        if self.stages and not self.takes_embeddings:
            with torch.autocast(x.device.type, _DTYPES.get(self.precision), self._is_mixed):
                x = self._run(x, self.entry, len(self.stages), self.pooling)
        return x.float().reshape(n_rows, -1)

    @torch.no_grad()
    def run_frozen(self, x: torch.Tensor, stop: int) -> torch.Tensor:
        """What the stages before `stop` make of pixels, (n, n_columns, …) to the same."""
        n_rows, n_columns = x.shape[:2]
        with torch.autocast(x.device.type, _DTYPES.get(self.precision), self._is_mixed):
            x = self._run(x.flatten(0, 1), 0, stop, nn.Identity())
        return x.float().unflatten(0, (n_rows, n_columns))

    def _run(self, x: torch.Tensor, start: int, stop: int, pooling: nn.Module) -> torch.Tensor:
        parts = []
        for part in x.split(self._n_at_once(x)):
            if start == 0 and self.is_normalising:
                part = torch.addcmul(self.shift, part.float(), self.scale)
            if part.ndim == 4:
                part = part.contiguous(memory_format=torch.channels_last)
            for stage in self.stages[start:stop]:
                part = stage(part)
            parts.append(pooling(part))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _n_at_once(self, x: torch.Tensor) -> int:
        """How much of a batch to send through at once; the sum of the gradients is the same."""
        if x.device.type == "cpu":
            n_trained = sum(p.numel() for p in self.stages.parameters() if p.requires_grad)
            has_moving = any(p.training and _has_statistics(p) for p in self.stages.modules())
            if n_trained <= _MANY_PARAMETERS and not has_moving:
                return cpu_batch_size(x.shape[1:])
        return max(1, len(x))

    @property
    def _is_mixed(self) -> bool:
        return self.precision in _DTYPES

    @property
    def n_unfrozen(self) -> int:
        """Stages that are trained; what only pools is none of its own."""
        return sum(name != "pool" for name in self.stage_names[self.n_frozen :])

    def freeze(self, n_frozen: int) -> None:
        """Freeze the first `n_frozen` stages and thaw the others.

        What a frozen stage shares with another stands still.
        """
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

    def suggested_lr(self, lowest: int) -> float:
        """The head's learning rate where none is given, and stages from `lowest` on are trained.

        Where nothing normalises the activations (AlexNet, VGG, SqueezeNet) the steps that others
        take well lead astray.
        """
        parts = [type(part).__name__.lower() for part in self.stages.modules()]
        has_norm = any("norm" in name and "response" not in name for name in parts)
        return 3e-4 if has_norm or lowest >= len(self.stages) else 1e-4

    def groups(self, start: int, stop: int | None = None) -> list[tuple[str, int, list[Any]]]:
        """(stage, distance from the head, parameters) of the stages from `start` to `stop`.

        What only pools is as far from the head as the stage below it. What several stages share
        belongs to the lowest of them.
        """
        found: list[tuple[str, int, list[Any]]] = []
        lowest: dict[int, int] = {}
        for i, stage in enumerate(self.stages):
            for parameter in stage.parameters():
                lowest.setdefault(id(parameter), i)
        distance = 0
        for i in range(len(self.stages) - 1, -1, -1):
            if self.stage_names[i] != "pool":
                distance += 1
            own = [p for p in self.stages[i].parameters() if lowest[id(p)] == i]
            if start <= i < (len(self.stages) if stop is None else stop) and own:
                found.append((self.stage_names[i], max(1, distance), own))
        return found


def _has_statistics(part: nn.Module) -> bool:
    """Whether a layer keeps running statistics, those of whole batches."""
    return any(name.startswith("running_") for name, _ in part.named_buffers(recurse=False))
