"""The parameter ``unfreeze``: which stages are trained in which epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral


class UnfreezePlan:
    """The parameter ``unfreeze``, read for one network.

    Stages are counted from the head downwards: 1 is the last stage below the head. A stage that
    only pools (``"pool"``) is not counted; it is trained with the one below it.

    Parameters
    ----------
    unfreeze : int, "all", "gradual" or mapping of epoch to int or "all"
        Epochs count from 1.
    stage_names : sequence of str
        The stages below the head, in the order in which they run.
    max_epochs : int
    first_epoch : int, default=0
        Number of epochs trained before.

    Examples
    --------
    >>> from sktransfer.fine_tuning._unfreeze import UnfreezePlan
    >>> plan = UnfreezePlan({1: 0, 3: 2}, ["stem", "layer1", "layer2", "pool"], max_epochs=5)
    >>> [plan.first_stage(epoch) for epoch in range(1, 6)]
    [4, 4, 1, 1, 1]
    """

    def __init__(
        self,
        unfreeze: int | str | Mapping,
        stage_names: Sequence[str],
        max_epochs: int,
        first_epoch: int = 0,
    ):
        self.stage_names, self.first_epoch = list(stage_names), first_epoch
        self._counted = [i for i, name in enumerate(self.stage_names) if name != "pool"]
        self._steps = self._read(unfreeze, max_epochs)

    @property
    def lowest(self) -> int:
        """Position of the lowest stage that is ever trained; ``len(stage_names)``: none."""
        return min(self._position(k) for _, k in self._steps)

    def first_stage(self, epoch: int) -> int:
        """Position of the lowest stage trained in this training's `epoch`, counted from 1."""
        k = [k for start, k in self._steps if epoch + self.first_epoch >= start][-1]
        return self._position(k)

    def _position(self, k: int) -> int:
        return len(self.stage_names) if k == 0 else self._counted[-k]

    def _read(self, unfreeze: int | str | Mapping, max_epochs: int) -> list[tuple[int, int]]:
        """Pairs of an epoch and the number of stages trained from it on."""
        n = len(self._counted)
        if isinstance(unfreeze, str) and unfreeze == "gradual":
            # The head alone, then more and more stages until all are trained at half time.
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

    def _count(self, value: object, name: str) -> int:
        n = len(self._counted)
        if isinstance(value, str) and value == "all":
            return n
        if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 0:
            raise ValueError(
                f"{name}={value!r} is not accepted: give a number of stages from 0 to {n}, "
                "or 'all'."
            )
        if int(value) > n:
            names = [self.stage_names[i] for i in self._counted]
            raise ValueError(
                f"{name}={value!r}, but this network has {n} stages below its head: {names}. "
                f"Give at most {n}, or 'all'."
            )
        return int(value)
