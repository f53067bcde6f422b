"""How the learning rate changes during training: a factor of it for each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Schedule = Callable[[float], float]


def one_cycle(progress: float) -> float:
    """From 1/25 up to 1 in the first quarter and down to 1e-5, along two half cosines [1]_.

    References
    ----------
    .. [1] L. N. Smith, N. Topin: "Super-convergence: very fast training of neural networks
       using large learning rates", 2019. :doi:`10.1117/12.2520589`
    """
    if progress < 0.25:
        return _half_cosine(1 / 25, 1.0, progress / 0.25)
    return _half_cosine(1.0, 1e-5, (progress - 0.25) / 0.75)


def cosine(progress: float) -> float:
    """A straight rise in the first twentieth, then a half cosine down to 0 [1]_.

    References
    ----------
    .. [1] I. Loshchilov, F. Hutter: "SGDR: stochastic gradient descent with warm restarts",
       ICLR 2017. https://arxiv.org/abs/1608.03983
    """
    if progress < 0.05:
        return progress / 0.05
    return _half_cosine(1.0, 0.0, (progress - 0.05) / 0.95)


def constant(progress: float) -> float:
    """The same rate all the time."""
    return 1.0


SCHEDULES: dict[str, Schedule] = {"one_cycle": one_cycle, "cosine": cosine, "constant": constant}


def resolve_schedule(schedule: Any) -> Schedule:
    """The function behind the parameter ``lr_schedule``."""
    return SCHEDULES[schedule] if isinstance(schedule, str) else schedule


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
