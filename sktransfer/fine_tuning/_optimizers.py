"""The optimizer as a parameter, and the groups of parameters it is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sklearn.base import BaseEstimator


class Optimizer(BaseEstimator):
    """An optimizer whose settings can be searched over as ``optimizer__momentum`` and the like.

    Parameters
    ----------
    name : {"adamw", "sgd"}, default="adamw"
    momentum : float, default=0.9
        For ``"sgd"``.
    nesterov : bool, default=False
        For ``"sgd"``.
    betas : tuple of 2 floats, default=(0.9, 0.999)
        For ``"adamw"``.
    eps : float, default=1e-8
        For ``"adamw"``.

    Notes
    -----
    Learning rate and weight decay are the estimator's own: `lr`, `weight_decay`.

    Examples
    --------
    >>> from sktransfer import FineTuningClassifier, Optimizer
    >>> model = FineTuningClassifier(optimizer=Optimizer("sgd"))
    >>> model.set_params(optimizer__momentum=0.8).optimizer
    Optimizer(momentum=0.8, name='sgd')
    """

    def __init__(self, name="adamw", *, momentum=0.9, nesterov=False, betas=(0.9, 0.999), eps=1e-8):
        self.name = name
        self.momentum = momentum
        self.nesterov = nesterov
        self.betas = betas
        self.eps = eps

    def make(self, groups: list[dict[str, Any]], lr: float) -> Any:
        """The torch optimizer over `groups`."""
        import torch

        if self.name == "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=tuple(self.betas), eps=self.eps)
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=self.momentum, nesterov=self.nesterov)
        raise ValueError(
            f"The optimizer's name is {self.name!r}: 'adamw' and 'sgd' are accepted; any other "
            "torch optimizer class can be given itself, as optimizer=torch.optim.NAdam."
        )


def as_optimizer(optimizer: Any) -> Any:
    """The parameter ``optimizer`` with a name as the :class:`Optimizer` it stands for."""
    return Optimizer(optimizer) if isinstance(optimizer, str) else optimizer


def make_optimizer(optimizer: Any, groups: list[dict[str, Any]], lr: float) -> Any:
    """The torch optimizer that the parameter ``optimizer`` stands for."""
    optimizer = as_optimizer(optimizer)
    if isinstance(optimizer, Optimizer):
        return optimizer.make(groups, lr)
    return optimizer(groups, lr=lr)


def parameter_groups(
    name: str, parameters: Iterable[Any], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of one stage: its weights, and its biases and norms, which do not decay.

    ``base_lr`` is what schedules multiply. ``lr`` itself is set, not a scale beside it that
    only some schedulers would read.
    """
    kinds: dict[bool, list[Any]] = {True: [], False: []}
    for parameter in parameters:
        kinds[parameter.ndim > 1].append(parameter)
    return [
        {
            "params": kept,
            "lr": lr,
            "base_lr": lr,
            "weight_decay": weight_decay if is_weight else 0.0,
            "stage": name,
        }
        for is_weight, kept in kinds.items()
        if kept
    ]
