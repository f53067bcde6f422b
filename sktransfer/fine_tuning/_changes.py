"""What augmentation, mixup and cutmix make of a training batch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from sktransfer.fine_tuning._augment import resolve_augment
from sktransfer.fine_tuning._mixing import mix


class BatchChange:
    """Changes each batch's pictures, and its targets and weights with them.

    Parameters
    ----------
    augment, mixup, cutmix
        The estimators' own.
    n_classes : int or None
        Where targets are codes of so many classes: mixed ones are shares of them.
    generator : torch.Generator
    """

    def __init__(
        self,
        augment: Any,
        mixup: float,
        cutmix: float,
        n_classes: int | None,
        generator: torch.Generator,
    ):
        self.augment = resolve_augment(augment, generator)
        self.mixup, self.cutmix = mixup, cutmix
        self.n_classes, self.generator = n_classes, generator

    def __call__(self, x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> tuple:
        if self.augment is not None:
            n_columns = x.shape[1]
            x = self.augment(x.flatten(0, 1)).unflatten(0, (-1, n_columns))
        if not (self.mixup or self.cutmix):
            return x, target, weight
        if self.n_classes is not None:
            target = F.one_hot(target, self.n_classes).float()
        return mix(x, target, weight, self.mixup, self.cutmix, self.generator)
