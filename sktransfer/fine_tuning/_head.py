"""The trained network's last part: from an embedding to scores."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import nn



class LinearHead(nn.Module):
    """One linear layer, and beside it a perceptron where hidden layers are asked for.

    The perceptron's last layer starts at zero: with hidden layers, too, the head first gives
    what its linear layer gives.

    Parameters
    ----------
    n_in, n_out : int
    hidden : sequence of int
        Sizes of hidden layers.
    dropout : float
        Share of the embedding, and of each hidden layer, that is dropped in training.
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

    def drop(self, share: float) -> None:
        """Drop another share from now on."""
        for part in self.modules():
            if isinstance(part, nn.Dropout):
                part.p = share

    def start_from(self, coef: np.ndarray, intercept: np.ndarray) -> None:
        """Let the linear layer be a fitted linear model."""
        with torch.no_grad():
            self.linear.weight.copy_(torch.as_tensor(coef))
            self.linear.bias.copy_(torch.as_tensor(intercept))

    @torch.no_grad()
    def divide_scores(self, by: float) -> None:
        """Give the same scores, all of them divided."""
        for layer in [self.linear, *(self.hidden or [])[-1:]]:
            for parameter in layer.parameters():
                parameter.div_(by)


def make_head(head: Any, n_in: int, n_out: int, dropout: float) -> nn.Module:
    """The head that the parameter ``head`` stands for.

    Parameters
    ----------
    head : "linear", tuple of int or nn.Module
        A module is copied; it takes embeddings (n, n_in) and gives scores (n, n_out).
    n_in, n_out : int
    dropout : float

    Raises
    ------
    ValueError
        Where hidden sizes are no positive integers, or a module gives scores of another shape.
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
            f"head={head!r} gives scores of shape {shape} for 2 embeddings of {n_in} columns; "
            f"(2, {n_out}) is needed here."
        )
    return own


def take_settings(head: nn.Module, wanted: nn.Module) -> None:
    """Let a trained head go on as the `wanted` one, which is new, would: with its drop-out.

    Raises
    ------
    ValueError
        Where `wanted` is built otherwise.
    """
    shapes = [{k: v.shape for k, v in h.state_dict().items()} for h in (head, wanted)]
    if isinstance(head, LinearHead) and isinstance(wanted, LinearHead):
        if shapes[0] == shapes[1]:
            head.drop(wanted.dropout.p)
            return
    elif shapes[0] == shapes[1] and repr(head) == repr(wanted):
        return
    raise ValueError(
        f"The trained head is {head}, but now the parameter `head` stands for {wanted}, which "
        "cannot take over its weights. Set `head` as it was, or warm_start=False to start again."
    )
