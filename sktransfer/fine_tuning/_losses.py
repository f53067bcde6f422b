"""What is minimised, and what tells one epoch from a better one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class WeightedLoss(nn.Module):
    """Mean over a batch of weight · loss; weights have a mean of 1 over the whole training set.

    Parameters
    ----------
    kind : {"multiclass", "multilabel", "regression"}
        Cross-entropy; binary cross-entropy, averaged over labels; squared error, averaged over
        targets.
    label_smoothing : float
        In training alone: this share of each target is spread evenly over the classes.

    Attributes
    ----------
    scale_gradient : callable or None
        What is done to the gradient before it flows back.
    """

    scale_gradient: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __init__(self, kind: str, label_smoothing: float = 0.0):
        super().__init__()
        self.kind, self.label_smoothing = kind, label_smoothing

    def forward(self, y_pred: Any, target: torch.Tensor) -> torch.Tensor:
        scores, weight = y_pred
        smoothing = self.label_smoothing if self.training else 0.0
        if self.kind == "multiclass":
            losses = F.cross_entropy(scores, target, reduction="none", label_smoothing=smoothing)
        elif self.kind == "multilabel":
            soft = target * (1 - smoothing) + 0.5 * smoothing
            losses = F.binary_cross_entropy_with_logits(scores, soft, reduction="none").mean(1)
        else:
            losses = (scores - target).square().mean(1)
        loss = (losses * weight).mean()
        if self.scale_gradient is not None and loss.requires_grad:
            loss.register_hook(self.scale_gradient)
        return loss


def validation_score(
    kind: str, scores: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> float:
    """Accuracy (of whole rows of labels), or R² averaged over targets; larger is better."""
    if kind == "multiclass":
        return float(np.average(scores.argmax(1) == target, weights=weight))
    if kind == "multilabel":
        return float(np.average(((scores > 0) == (target > 0.5)).all(1), weights=weight))
    residual = np.average((scores - target) ** 2, axis=0, weights=weight)
    spread = np.average(
        (target - np.average(target, axis=0, weights=weight)) ** 2, axis=0, weights=weight
    )
    return float(np.mean(1 - residual / np.where(spread > 0, spread, 1.0)))
