"""A network as an ordered list of stages, cut where a single tensor crosses.

Running the stages one after another is running the network. The first is the ``"stem"``, the
last the ``"head"`` (the last linear layer and what follows it), and what turns the last map
into the vector that the head gets is the ``"pool"``. Every other stage bears the name of the
layer whose output it ends with: ``"layer3"``, ``"features.6"``, ``"encoder_layer_11"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import torch
from torch import nn

from sktransfer.networks._stage_plan import StagePlan
from sktransfer.networks._tracing import TracingError, trace
from sktransfer.networks._untraced import HookedPlan


class Stage(NamedTuple):
    """One part of a network."""

    name: str
    module: nn.Module


class Stages(Sequence[Stage]):
    """The parts of a network in the order in which they run.

    Parameters
    ----------
    stages : list of Stage

    Examples
    --------
    >>> from torch import nn
    >>> from sktransfer.networks._stages import split_stages
    >>> network = nn.Sequential(
    ...     nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2),
    ...     nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    ... )
    >>> split_stages(network, (3, 32, 32)).names
    ['stem', '4', 'pool', 'head']
    """

    def __init__(self, stages: list[Stage]):
        self._stages = list(stages)

    def __len__(self) -> int:
        return len(self._stages)

    @overload
    def __getitem__(self, index: int | str) -> Stage: ...
    @overload
    def __getitem__(self, index: slice) -> Stages: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return Stages(self._stages[index])
        return self._stages[self.index(index) if isinstance(index, str) else index]

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages)

    def __repr__(self) -> str:
        parts = ", ".join(f"{s.name}: {n:,}" for s, n in zip(self, self.n_parameters, strict=True))
        return f"Stages({parts})"

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self._stages]

    @property
    def n_parameters(self) -> list[int]:
        """Number of parameters of each stage."""
        return [sum(p.numel() for p in stage.module.parameters()) for stage in self._stages]

    def index(self, name: object, *args: int) -> int:
        """Position of the stage called `name`."""
        if name not in self.names:
            raise ValueError(f"There is no stage {name!r}; the stages are {self.names}.")
        return self.names.index(str(name))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Send `x` through these stages, one after another."""
        for stage in self._stages:
            x = stage.module(x)
        return x

    def until(self, name: str) -> Stages:
        """The stages up to and including `name`."""
        return self[: self.index(name) + 1]

    def after(self, name: str) -> Stages:
        """The stages behind `name`."""
        return self[self.index(name) + 1 :]

    def freeze(self, k: int) -> None:
        """Freeze the first `k` stages and thaw the others.

        Frozen: no gradient and eval mode, so that batch norm keeps its statistics. A later
        ``train()`` of the whole network has to be followed by another call.
        """
        for i, stage in enumerate(self._stages):
            stage.module.requires_grad_(i >= k)
            stage.module.train(i >= k)


def split_stages(module: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> Stages:
    """Split a network into stages.

    Parameters
    ----------
    module : nn.Module
        Takes one batch of pictures (N×C×H×W) and returns one tensor. The stages call the
        module's own layers, so that training or freezing a stage does so in `module`.
    input_size : tuple of 3 ints, default=(3, 224, 224)
        Channels, height and width of a picture that the network accepts. Where the map halves
        tells where a stage ends; nothing is computed.

    Returns
    -------
    stages : Stages
        ``stages.run(x)`` equals ``module(x)``. A module that cannot be traced is split into
        those children that have weights if it is an ``nn.Sequential``, and else into
        everything before its last linear layer and that layer.
    """
    pieces = plan_stages(module, input_size).pieces()
    return Stages([Stage(name, part) for name, part in pieces])


def plan_stages(
    module: nn.Module,
    input_size: tuple[int, int, int],
    name: str = "the network",
    *,
    is_foreign: bool = False,
) -> StagePlan | HookedPlan:
    """Find a network's stages without computing anything; see :func:`split_stages`.

    With `is_foreign` two random pictures are sent through, as code that nobody here has seen
    may do what a graph does not tell.
    """
    try:
        traced = trace(module)
    except TracingError:
        return HookedPlan(module, input_size, name)
    plan = StagePlan(traced, input_size, name)
    if is_foreign and not traced.agrees_with_module(input_size):
        return HookedPlan(module, input_size, name)
    return plan
