"""Which stages of a network are trained in which epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any


class UnfreezePlan:
    """The parameter ``unfreeze``, read for one network.

    A network counts its stages from the head downwards: 1 is the last stage below the head.
    What only turns the last map into a vector (``"pool"``) is no stage of its own; it goes
    with the last one.

    Parameters
    ----------
    unfreeze : int, "all", "gradual" or mapping of epoch to int or "all"
        Epochs count from 1.
    stage_names : sequence of str
        The stages below the head, in the order in which they run.
    max_epochs : int
    first_epoch : int, default=0
        Epochs that were trained before: a training begins with the one after it.

    Examples
    --------
    >>> from sktransfer.fine_tuning._unfreezing import UnfreezePlan
    >>> plan = UnfreezePlan({1: 0, 3: 2}, ["stem", "layer1", "layer2", "pool"], max_epochs=5)
    >>> [plan.first_stage(epoch) for epoch in range(1, 6)]
    [4, 4, 1, 1, 1]
    """

    def __init__(
        self, unfreeze: Any, stage_names: Sequence[str], max_epochs: int, first_epoch: int = 0
    ):
        self.stage_names, self.first_epoch = list(stage_names), first_epoch
        self._units = [i for i, name in enumerate(self.stage_names) if name != "pool"]
        self._steps = self._read(unfreeze, max_epochs)

    @property
    def n_stages(self) -> int:
        """How many stages can be unfrozen."""
        return len(self._units)

    @property
    def lowest(self) -> int:
        """Position of the lowest stage that is ever trained; one past the end: the head alone."""
        return min(self._first(k) for _, k in self._steps)

    def first_stage(self, epoch: int) -> int:
        """Position of the lowest stage trained in a training's `epoch`, which counts from 1."""
        k = 0
        for start, value in self._steps:
            if epoch + self.first_epoch >= start:
                k = value
        return self._first(k)

    def _first(self, k: int) -> int:
        return len(self.stage_names) if k == 0 else self._units[-k]

    def _read(self, unfreeze: Any, max_epochs: int) -> list[tuple[int, int]]:
        n = self.n_stages
        if isinstance(unfreeze, str) and unfreeze == "gradual":
            # Head alone, then one part after another, all of them from half time on.
            half = max(1, max_epochs // 2)
            return [(1 + e, min(n, round(n * e / half))) for e in range(half + 1)]
        if not isinstance(unfreeze, Mapping):
            return [(1, self._count(unfreeze, "unfreeze"))]
        steps = [(1, 0)]
        for epoch, value in sorted(unfreeze.items()):
            if not isinstance(epoch, Integral) or isinstance(epoch, bool) or epoch < 1:
                raise ValueError(
                    f"unfreeze={unfreeze!r}: the keys are epochs and count from 1; got {epoch!r}."
                )
            steps.append((int(epoch), self._count(value, f"unfreeze[{epoch}]")))
            if steps[-1][1] < steps[-2][1]:
                raise ValueError(
                    f"unfreeze={unfreeze!r} freezes stages again in epoch {epoch}: the numbers "
                    "of stages must not fall."
                )
        return steps

    def _count(self, value: Any, name: str) -> int:
        if isinstance(value, str) and value == "all":
            return self.n_stages
        if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 0:
            raise ValueError(
                f"{name}={value!r} is not accepted: give a number of stages from 0 to "
                f"{self.n_stages}, or 'all'."
            )
        if int(value) > self.n_stages:
            names = [self.stage_names[i] for i in self._units]
            raise ValueError(
                f"{name}={value!r}, but this network has {self.n_stages} stages below its head: "
                f"{names}. Give at most {self.n_stages}, or 'all'."
            )
        return int(value)
