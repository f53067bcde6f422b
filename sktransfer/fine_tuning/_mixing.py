"""Mixup and cutmix: pictures of a batch made of two, and their targets alike."""

from __future__ import annotations

import torch

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def mix(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    mixup: float,
    cutmix: float,
    generator: torch.Generator,
) -> Batch:
    """Mix each row of a batch with another one, by mixup or by cutmix.

    Where both have an α, one of them is drawn for the batch, each as often as the other.

    Parameters
    ----------
    x : Tensor of shape (n, n_columns, channels, height, width)
        A row's image columns are mixed alike.
    target : Tensor of shape (n, n_outputs)
        Rows of numbers already, one-hot for classes.
    weight : Tensor of shape (n,)
    mixup, cutmix : float
        α of each; 0: not this one.
    generator : torch.Generator
        On the CPU.
    """
    takes_cutmix = cutmix > 0
    if mixup and cutmix:
        takes_cutmix = bool(torch.rand((), generator=generator) < 0.5)
    order = torch.randperm(len(x), generator=generator)
    share = _draw_share(cutmix if takes_cutmix else mixup, generator)
    other = x[order.to(x.device)]
    if takes_cutmix:
        x, share = _cutmix(x, other, share, generator)
    else:
        x = share * x.float() + (1 - share) * other.float()
    return x, *_mix_targets(target, weight, order.to(target.device), share)


def _draw_share(alpha: float, generator: torch.Generator) -> float:
    """λ from Beta(α, α) [1]_, which is what two gamma variates share between them.

    References
    ----------
    .. [1] H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz: "mixup: beyond empirical risk
       minimization", ICLR 2018. https://arxiv.org/abs/1710.09412
    """
    # torch's own gamma, unlike its distributions, takes a generator.
    pair = torch._standard_gamma(torch.full((2,), float(alpha)), generator=generator)
    return float(pair[0] / pair.sum().clamp(min=1e-12))


def _cutmix(
    x: torch.Tensor, other: torch.Tensor, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Paste a box of (1 - λ) of the area from another picture [1]_; returns the share kept.

    The box has the picture's proportions and its centre anywhere, so that it may be cut off at
    the edge: what is kept is counted.

    References
    ----------
    .. [1] S. Yun et al.: "CutMix: regularization strategy to train strong classifiers with
       localizable features", ICCV 2019. https://arxiv.org/abs/1905.04899
    """
    height, width = x.shape[-2:]
    half = 0.5 * (1 - share) ** 0.5
    middle = torch.rand(2, generator=generator).tolist()
    (top, bottom), (left, right) = (
        (round(max(0.0, m - half) * size), round(min(1.0, m + half) * size))
        for m, size in zip(middle, (height, width), strict=True)
    )
    mixed = x.clone()
    mixed[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _mix_targets(
    target: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each half counts with its picture's own weight, so that the loss is the sum of both."""
    own, other = share * weight, (1 - share) * weight[order]
    mixed_weight = own + other
    while own.ndim < target.ndim:
        own, other = own[..., None], other[..., None]
    total = (own + other).clamp(min=1e-12)
    return (own * target + other * target[order]) / total, mixed_weight
