"""A network that is built and trained in no time."""

import torch


class TinyNetwork:
    """Builds it: a callable backbone that is named alike in every process, as no function is."""

    def __call__(self):
        generator = torch.Generator().manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, stride=2),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(4, 6, 2),
            torch.nn.BatchNorm2d(6),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(6, 3),
        )
        for parameter in network.parameters():
            parameter.data.normal_(generator=generator)
        return network

    def __repr__(self):
        return "tiny_network"


tiny_network = TinyNetwork()
