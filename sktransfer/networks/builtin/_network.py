"""The architecture of ``backbone="builtin"``, and the properties of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sktransfer.networks._preprocessing import Preprocessing


@dataclass(frozen=True)
class Version:
    """One set of weights. ``parameters`` are millions, ``multiply_adds`` billions for one image."""

    file: str
    sha256: str
    preprocessing: Preprocessing
    num_classes: int = 200
    n_features: int = 1408
    parameters: float = 2.845256
    multiply_adds: float = 0.0888064

    @property
    def path(self) -> Path:
        return Path(__file__).with_name(self.file)


class Block(nn.Module):
    """Residual block of two 3x3 convolutions, as in ResNet-18.

    If it halves the image, the shortcut averages before its 1x1 convolution, so that every pixel
    counts (ResNet-D).
    """

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        shortcut: list[nn.Module] = []
        if stride > 1:
            # ceil_mode keeps odd sizes in step with the strided convolution.
            shortcut.append(nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False))
        if stride > 1 or n_in != n_out:
            shortcut += [nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class LastStage(nn.Module):
    """Blocks and a 1x1 expansion, joined with the input.

    So the embedding contains the pooled outputs of the last two stages, and the network is still
    a chain of stages.
    """

    def __init__(self, n_in: int, n_out: int, n_expanded: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(n_in, n_out))
        self.expand = nn.Sequential(
            nn.Conv2d(n_out, n_expanded, 1, bias=False),
            nn.BatchNorm2d(n_expanded),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.expand(self.blocks(x))], dim=1)


class MeanAndDeviation(nn.Module):
    """Mean and standard deviation of each channel over the positions, N×2C×1×1.

    The deviation, which style transfer uses as the style of an image, distinguishes textures and
    single bright spots from even surfaces; the mean alone does not.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((2, 3), keepdim=True)
        variance = (x - mean).float().square().mean((2, 3), keepdim=True)
        # A channel that is zero everywhere must not have an infinite gradient.
        return torch.cat([mean, (variance + 1e-5).sqrt().to(x.dtype)], dim=1)


class BuiltinNet(nn.Module):
    """Four-stage residual network of 2.7 million parameters for small images.

    Its children, run one after another, are the network: ``stem`` (stride 2), ``stage1``
    (stride 4, 48 channels), ``stage2`` (8, 96), ``stage3`` (16, 192), ``stage4`` (16,
    192 + 512), ``pool``, ``flatten`` and ``head``. The embedding is the head's input, the mean and
    the standard deviation of each of the last stage's channels.

    Parameters
    ----------
    num_classes : int, default=200
        Outputs of the head; V1 was trained on the 200 classes of Tiny ImageNet.
    """

    n_features = 2 * (192 + 512)

    def __init__(self, num_classes: int = 200) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        )
        self.stage1 = nn.Sequential(Block(32, 48, 2))
        self.stage2 = nn.Sequential(Block(48, 96, 2))
        self.stage3 = nn.Sequential(Block(96, 192, 2), Block(192, 192))
        self.stage4 = LastStage(192, 256, 512)
        self.pool = MeanAndDeviation()
        self.flatten = nn.Flatten(1)
        self.head = nn.Linear(self.n_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.stage1(x)
        x = self.stage2(x)
        x = self.stage3(x)
        x = self.stage4(x)
        x = self.flatten(self.pool(x))
        return self.head(x)
