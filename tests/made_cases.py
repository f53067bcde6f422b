"""Networks and images of which it is known whether transfer helps."""

import numpy as np
import torch
from torch import nn

from sktransfer import PretrainedFeatureExtractor

SMALL = {"preprocessing": {"size": 24, "crop": 24}}
WAVE = torch.tensor([1.0, 1, 1, -1, -1, -1])
# What a training on stripes ends with, and what a training on brightness does: flat filters, which
# no stripes move.
ACROSS = torch.stack([WAVE.roll(k).expand(6, 6) for k in range(0, 6, 2)])
STRIPES = torch.cat([ACROSS, ACROSS.mT])
FLAT = torch.tensor([0.1, -0.1, 0.2, -0.2, 0.3, -0.3]).view(6, 1, 1).expand(6, 6, 6)


class Filters(nn.Module):
    """Six filters and the mean of what they see."""

    def __init__(self, weight=None):
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 6, 6), nn.AdaptiveAvgPool2d(1), nn.Linear(6, 2)
        if weight is not None:
            nn.init.zeros_(self.conv.bias)
            self.conv.weight.data[:] = weight[:, None]

    def forward(self, x):
        return self.fc(self.pool(self.conv(x).relu()).flatten(1))


def stripes(seed, n=80, contrast=10):
    """Faint stripes across or down in strong noise: uint8 (n, 24, 24, 3), and their names."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    wave = np.where(np.arange(24) // 3 % 2, contrast, -contrast)
    X = 128 + rng.normal(0, 50, (n, 24, 24, 1)).repeat(3, axis=3)
    for i, is_down in enumerate(y):
        moved = np.roll(wave, rng.integers(6))
        X[i] += (moved[None, :] if is_down else moved[:, None])[..., None]
    return X.clip(0, 255).astype(np.uint8), np.array(["across", "down"])[y]


def extractor(backbone, **parameters):
    return PretrainedFeatureExtractor(backbone, **{**SMALL, **parameters})
