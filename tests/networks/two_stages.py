"""A small convolutional network with norms, a small transformer, and how to embed with them."""

import numpy as np
import torch
from torch import nn

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), np.uint8))


class Tiny(nn.Module):
    """Two stages and a head; batch norms that do something."""

    def __init__(self, scale=1.0, n_channels=3):
        super().__init__()
        self.scale = scale
        self.features = nn.Sequential(
            nn.Conv2d(n_channels, 6, 3, 2, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 10, 3, 2),
            nn.BatchNorm2d(10),
            nn.ReLU(),
        )
        self.fc = nn.Linear(10, 4)

    def forward(self, x):
        return self.fc(self.scale * self.features(x).mean((2, 3)))


class Tokens(nn.Module):
    """A small transformer that classifies from the mean of its tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 16, 16)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in "ab")
        )
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def tiny(**kwargs):
    torch.manual_seed(0)
    module = Tiny(**kwargs)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 2)
            nn.init.uniform_(part.bias)
    return module.eval()


SMALL = {"size": 64, "crop": 64}


def embed(backbone, pixels=PIXELS, precision="float32"):
    return torch.cat(backbone.inference_module(pixels.device, precision)(pixels), dim=1)


def normalised(pixels=PIXELS):
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (pixels / 255 - mean) / std


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
