"""Averages of the trained weights over the steps of a training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from skorch.callbacks import Callback
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

# Of the whole training: how far back an exponential average looks, what "last" means.
_EMA_SHARE = 0.1
_LAST_SHARE = 0.25
# How far along the way from the start to the end "wise_ft" goes, by the number of rows: what many
# rows have taught can be trusted further (docs/fine_tuning.md, "The defaults").
_WISE_FT_ROWS, _WISE_FT_SHARES = (200, 600), (0.5, 0.75)


class WeightAverage(Callback):
    """Averages the trained weights; between epochs the module holds the average.

    The optimizer steps on from the weights as they are. The average stands in the module from
    the end of an epoch's training on until the next epoch begins, so that it is what is
    validated, kept as the best epoch and left behind. This callback stands before all others.

    Parameters
    ----------
    kind : {"wise_ft", "ema", "last"}
        ``"wise_ft"``: half way between where the stages began and where they are [2]_, and from
        200 rows on further, up to three quarters of the way with 600.
        ``"ema"``: from the first step on an exponential moving average that looks back over a
        tenth of the training's steps. ``"last"``: the mean over the steps of the last quarter
        of the epochs [1]_; before these there is no average.
    lowest : int
        Position of the lowest stage that is ever trained.
    max_epochs, n_batches : int
        Epochs, and steps of one.
    n_rows : int
        Rows that are trained on.

    References
    ----------
    .. [1] P. Izmailov et al.: "Averaging weights leads to wider optima and better
       generalization", UAI 2018. https://arxiv.org/abs/1803.05407
    .. [2] M. Wortsman et al.: "Robust fine-tuning of zero-shot models", CVPR 2022.
       https://arxiv.org/abs/2109.01903
    """

    def __init__(self, kind: str, lowest: int, max_epochs: int, n_batches: int, n_rows: int):
        self.lowest = lowest
        self.share = float(np.interp(n_rows, _WISE_FT_ROWS, _WISE_FT_SHARES))
        n_steps = max(1, max_epochs * n_batches)
        self.kind, self.first_step = kind, 1
        if kind == "last":
            self.first_step = 1 + int(max_epochs * (1 - _LAST_SHARE)) * n_batches
        self.decay = max(0.0, 1 - 1 / (_EMA_SHARE * n_steps))
        self.step, self._has_begun, self._n_averaged = 0, False, 0
        self._trained: list[torch.Tensor] = []
        self._start: list[torch.Tensor] = []
        self._mean: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []  # as they were, while the average stands there

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        module = net.module_
        parts = [module.head, *module.stages[self.lowest :]]
        # Of a stage that joins later its weights until then count as well: the same each step.
        # Batch norms' statistics go with the weights, their counts of batches do not.
        self._trained = [
            tensor
            for part in parts
            for tensor in (*part.parameters(), *part.buffers())
            if tensor.is_floating_point()
        ]

    @torch.no_grad()
    def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
        if self._weights:
            torch._foreach_copy_(self._trained, self._weights)
            self._weights = []

    @torch.no_grad()
    def on_batch_end(self, net: Any, training: bool = False, **kwargs: Any) -> None:
        if not training:
            return
        self.step += 1
        if self.kind == "wise_ft":
            return
        if self.step < self.first_step:
            return
        if self._n_averaged == 0:
            self._mean = [tensor.detach().clone() for tensor in self._trained]
        else:
            is_ema = self.kind == "ema"
            average = get_ema_multi_avg_fn(self.decay) if is_ema else get_swa_multi_avg_fn()
            average(self._mean, self._trained, self._n_averaged)
        self._n_averaged += 1

    def on_batch_begin(self, net: Any, training: bool = False, **kwargs: Any) -> None:
        if not training:
            self._put_average()
        elif not self._has_begun:
            # Where stages join a head that was trained alone, the way begins there.
            module = net.module_
            self._has_begun = module.n_frozen < len(module.stages)
            if self._has_begun or self.step == 0:
                self._n_averaged = 0
                if self.kind == "wise_ft":
                    self._start = [tensor.detach().clone() for tensor in self._trained]

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        self._put_average()

    def on_train_end(self, net: Any, **kwargs: Any) -> None:
        self._put_average()
        self._start, self._mean, self._weights, self._trained = [], [], [], []

    @torch.no_grad()
    def _put_average(self) -> None:
        if self._start and self.step and not self._weights:
            self._mean = list(torch._foreach_lerp(self._start, self._trained, self.share))
        if self._mean and not self._weights:
            self._weights = [tensor.detach().clone() for tensor in self._trained]
            torch._foreach_copy_(self._trained, self._mean)
