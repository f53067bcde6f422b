"""The module that is trained: stages, pooling and a head; frozen stages stay in eval mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sktransfer.embedding._batches import cpu_batch_size
from sktransfer.networks._folding import scale_and_shift

# With more trained parameters than this a CPU runs a batch whole, as each part of a batch adds to
# all of their gradients. For 32 images of 224×224 with everything trained, parts of 8 were 1.3 to
# 1.5 times as fast up to 25 million parameters (MobileNetV2, DenseNet-121, ResNet-50; ResNet-18:
# equal), and 8 % slower from 88 million on (ViT-B/32, VGG-11).
_MANY_PARAMETERS = 50_000_000


class TunedModule(nn.Module):
    """The stages below the head, their pooling, and a new head.

    Without stages it takes embeddings; without `mean` and `std`, images that are normalised
    already. Unless `moves_statistics`, batch norms of unfrozen stages use the statistics of
    pre-training, as frozen ones always do.

    Attributes
    ----------
    entry : int
        Position of the stage whose input :meth:`forward` takes: 0 for pixels,
        ``len(stages)`` for embeddings.
    n_frozen : int
        Number of frozen stages.
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
        self.entry, self.n_frozen = 0, len(self.stages)
        self.is_normalising = mean is not None
        if mean is not None and std is not None:
            scale, shift = scale_and_shift(mean, std)
            self.register_buffer("scale", scale, persistent=False)
            self.register_buffer("shift", shift, persistent=False)
        self.freeze(self.n_frozen)

    def __getstate__(self) -> dict[str, object]:
        # A net that a callback pickles during training predicts from pixels later.
        return {**super().__getstate__(), "entry": 0}

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Scores (n, n_outputs) of rows (n, n_columns, …); `weight` is passed on to the loss."""
        scores = self.head(self.embed(x))
        return scores if weight is None else (scores, weight)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, n_columns · width), float32."""
        n_rows = len(x)
        x = x.flatten(0, 1)
        if self.entry < len(self.stages):
            x = self.run(x, self.entry, len(self.stages), self.pooling)
        return x.float().reshape(n_rows, -1)

    def run(
        self, x: torch.Tensor, start: int, stop: int, pooling: nn.Module | None = None
    ) -> torch.Tensor:
        """Send images (n, …) through the stages from `start` to before `stop`."""
        parts = []
        with torch.autocast(x.device.type, torch.bfloat16, self.precision == "bfloat16"):
            for part in x.split(self._n_at_once(x)):
                if start == 0 and self.is_normalising:
                    part = torch.addcmul(self.shift, part.float(), self.scale)
                if part.ndim == 4:
                    part = part.contiguous(memory_format=torch.channels_last)
                for stage in self.stages[start:stop]:
                    part = stage(part)
                parts.append(part if pooling is None else pooling(part))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _n_at_once(self, x: torch.Tensor) -> int:
        """How many images to run at once; the sum of the gradients is the same."""
        if x.device.type == "cpu":
            n_trained = sum(p.numel() for p in self.stages.parameters() if p.requires_grad)
            has_moving = any(p.training and _has_statistics(p) for p in self.stages.modules())
            if n_trained <= _MANY_PARAMETERS and not has_moving:
                return cpu_batch_size(x.shape[1:])
        return max(1, len(x))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def n_unfrozen(self) -> int:
        """Number of trained stages, not counting one that only pools."""
        return sum(name != "pool" for name in self.stage_names[self.n_frozen :])

    def freeze(self, n_frozen: int) -> None:
        """Freeze the first `n_frozen` stages, with what they share with others; train the rest."""
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
        """The head's learning rate for ``lr="auto"``.

        Networks that normalise no activations (AlexNet, VGG, SqueezeNet) need smaller steps.
        """
        parts = [type(part).__name__.lower() for part in self.stages.modules()]
        has_norm = any("norm" in name and "response" not in name for name in parts)
        return 3e-4 if has_norm or first_trained_stage >= len(self.stages) else 1e-4

    def groups(self, start: int) -> list[tuple[str, int, list[nn.Parameter]]]:
        """(stage, distance from the head, parameters) of the stages from `start` on, last first.

        A stage that only pools has the distance of the one below it. Parameters that several
        stages share belong to the lowest of them.
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


def _has_statistics(part: nn.Module) -> bool:
    """Whether a layer keeps running statistics of batches."""
    return any(name.startswith("running_") for name, _ in part.named_buffers(recurse=False))
