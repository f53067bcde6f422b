"""The head, from embeddings to scores, and the loss of its scores."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from numbers import Integral

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Loss = str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LinearHead(nn.Module):
    """A linear layer and, where `hidden` is given, a perceptron whose output is added to it.

    The perceptron's last layer starts at zero, so that the head starts as its linear layer.
    `dropout` is the share of the embedding, and of each hidden layer, that is dropped.
    """

    def __init__(self, n_in: int, n_out: int, hidden: Sequence[int] = (), dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(n_in, n_out)
        self.hidden: nn.Sequential | None = None
        if hidden:
            layers: list[nn.Module] = []
            sizes = [n_in, *hidden]
            for width, next_width in itertools.pairwise(sizes):
                layers += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(dropout)]
            last = nn.Linear(sizes[-1], n_out)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.hidden = nn.Sequential(*layers, last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(x)
        out = self.linear(x)
        return out if self.hidden is None else out + self.hidden(x)

    def start_from(self, coef: np.ndarray, intercept: np.ndarray) -> None:
        """Set the linear layer to a fitted linear model."""
        with torch.no_grad():
            self.linear.weight.copy_(torch.as_tensor(coef))
            self.linear.bias.copy_(torch.as_tensor(intercept))

    @torch.no_grad()
    def divide_scores(self, temperature: float) -> None:
        """Divide all scores by a temperature from now on."""
        for layer in [self.linear, *(self.hidden or [])[-1:]]:
            for parameter in layer.parameters():
                parameter.div_(temperature)


def make_head(
    head: str | Sequence[int] | nn.Module, n_in: int, n_out: int, dropout: float
) -> nn.Module:
    """Make the head that the parameter ``head`` asks for; a module is copied.

    Raises ValueError if a hidden size is not a positive integer, or a module does not turn
    embeddings (n, n_in) into scores (n, n_out).
    """
    if isinstance(head, str):
        return LinearHead(n_in, n_out, (), dropout)
    if not isinstance(head, nn.Module):
        for size in head:
            if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
                raise ValueError(
                    f"head={head!r} has the hidden size {size!r}: give positive integers, as in "
                    'head=(256,), or "linear" for no hidden layer.'
                )
        return LinearHead(n_in, n_out, tuple(head), dropout)
    own = copy.deepcopy(head)
    try:
        with torch.no_grad():
            shape = tuple(own.eval()(torch.zeros(2, n_in)).shape)
    except Exception as error:
        error.add_note(f"The head was called with embeddings of shape (2, {n_in}).")
        raise
    if shape != (2, n_out):
        raise ValueError(
            f"head={head!r} returns scores of shape {shape} for 2 embeddings of {n_in} columns; "
            f"(2, {n_out}) is needed here."
        )
    return own


class WeightedLoss(nn.Module):
    """Mean over a batch of weight · loss; weights have a mean of 1 over the whole training set.

    `loss` is ``"auto"`` (cross-entropy; binary cross-entropy, averaged over labels; squared
    error, averaged over targets), ``"huber"``, or takes scores and targets and returns a value
    per row.
    """

    def __init__(self, kind: str, loss: Loss = "auto"):
        super().__init__()
        self.kind = kind
        self.loss = copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss

    def forward(
        self, y_pred: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor
    ) -> torch.Tensor:
        scores, weight = y_pred
        losses = self._losses(scores, target)
        if losses.ndim == 0:
            if ((weight - 1).abs() > 1e-6).any():
                raise ValueError(
                    f"loss={self.loss!r} returns a single number for a batch, but the rows have "
                    "different weights (from sample_weight, class_weight or equal images, which "
                    "become one row): it must return one value per row. Losses of torch do with "
                    'reduction="none".'
                )
            return losses
        if len(losses) != len(weight):
            raise ValueError(
                f"loss={self.loss!r} returns values of shape {tuple(losses.shape)} for "
                f"{len(weight)} rows: it must return one value per row."
            )
        return (losses.reshape(len(weight), -1).mean(1) * weight).mean()

    def _losses(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if callable(self.loss):
            return self.loss(scores, target)
        if self.loss == "huber":
            return F.huber_loss(scores, target, reduction="none")
        if self.kind == "multiclass":
            return F.cross_entropy(scores, target, reduction="none")
        if self.kind == "multilabel":
            return F.binary_cross_entropy_with_logits(scores, target, reduction="none")
        return (scores - target).square()


def validation_score(
    kind: str, scores: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> float:
    """Accuracy (of whole rows of labels), or R² averaged over targets; larger is better."""
    if kind == "multiclass":
        return float(np.average(scores.argmax(1) == target, weights=weight))
    if kind == "multilabel":
        return float(np.average(((scores > 0) == (target > 0.5)).all(1), weights=weight))
    residual = np.average((scores - target) ** 2, axis=0, weights=weight)
    mean = np.average(target, axis=0, weights=weight)
    spread = np.average((target - mean) ** 2, axis=0, weights=weight)
    return float(np.mean(1 - residual / np.where(spread > 0, spread, 1.0)))
