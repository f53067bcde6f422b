"""A linear probe is made less sure before it teaches stages: what it knows leaves no gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq

from sktransfer.fine_tuning._losses import WeightedLoss

# Of the loss of guessing by the classes' shares: docs/fine_tuning.md, "The defaults".
_LOSS_SHARE = 0.5
_HIGHEST = 1e4
N_ROWS = 10_000  # so many tell it


def auto_temperature(
    head: Any, rows: np.ndarray, target: np.ndarray, weight: np.ndarray, kind: str
) -> float:
    """The temperature at which a probe's loss on its own rows is half of that of guessing.

    A probe of few rows and many columns knows them by heart. What its loss says to the stages
    below, p - y, is then next to nothing, and they stay as they were [1]_.

    Parameters
    ----------
    head : nn.Module
        The probe.
    rows : ndarray of shape (n, n_features)
    target, weight : ndarray
    kind : {"multiclass", "multilabel"}

    Returns
    -------
    temperature : float
        At least 1; its inverse is what the scores are to be multiplied by.

    References
    ----------
    .. [1] Y. Ren, S. Guo, W. Bae, D. J. Sutherland: "How to prepare your task head for
       finetuning", ICLR 2023. https://arxiv.org/abs/2302.05779
    """
    loss = WeightedLoss(kind).eval()
    with torch.no_grad():
        scores = head.eval()(torch.from_numpy(rows)).double()  # without drop-out
        y = torch.from_numpy(target)
        shares = torch.from_numpy(weight / weight.mean())
        if kind == "multiclass":
            mean = np.bincount(target, weights=weight, minlength=scores.shape[1]) / weight.sum()
            guess = torch.from_numpy(mean.clip(1e-12)).log()
        else:
            y = y.double()
            mean = (weight @ target / weight.sum()).clip(1e-12, 1 - 1e-12)
            guess = torch.from_numpy(mean).logit()
        wanted = _LOSS_SHARE * float(loss((guess.expand(len(y), -1), shares), y))

        def excess(log_temperature: float) -> float:
            return float(loss((scores / np.exp(log_temperature), shares), y)) - wanted

        if excess(0.0) >= 0:
            return 1.0
        highest = np.log(_HIGHEST)
        return float(np.exp(brentq(excess, 0.0, highest) if excess(highest) > 0 else highest))
