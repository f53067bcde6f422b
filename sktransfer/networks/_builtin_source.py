"""The network whose weights ship in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sktransfer.networks import _weights
from sktransfer.networks import builtin as _builtin
from sktransfer.networks._preprocessing import Preprocessing
from sktransfer.networks._source import (
    RANDOM_SEED,
    FromFile,
    Source,
    building,
    file_source,
    fill_randomly,
    random_digest,
    skeleton,
)
from sktransfer.networks.builtin._network import BuiltinNet


class BuiltinSource(FromFile, Source):
    """The small network whose weights ship in the package."""

    name = "builtin"

    def __init__(self, weights: Any):
        versions = _builtin.VERSIONS
        self.is_random = weights is None
        path = file_source(weights)
        version = versions[_builtin.DEFAULT]
        if weights is not None and path is None:
            if not isinstance(weights, str) or weights not in ("DEFAULT", *versions):
                raise ValueError(
                    f"weights={weights!r} is not among the weights of the built-in backbone: "
                    f"{['DEFAULT', *versions]}. A path of a local .pt, .pth or .safetensors file "
                    "is accepted too, and None for random weights."
                )
            version = versions[_builtin.DEFAULT if weights == "DEFAULT" else weights]
            self.file_digest = version.sha256
            self.path = version.path
        elif path is not None:
            self.path, self.file_digest = path, _weights.file_digest(path)
            self.is_user_file = True
        self.num_classes = version.num_classes
        self.is_shipped = path is None
        self.digest = random_digest("builtin") if self.is_random else f"sha256:{self.file_digest}"
        self.preprocessing = Preprocessing(
            size=version.size,
            crop=version.crop or version.size,
            mean=version.mean,
            std=version.std,
            interpolation=version.interpolation,
        )

    def build(self) -> nn.Module:
        return skeleton(lambda: BuiltinNet(self.num_classes))

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        if not self.is_random:
            if self.is_shipped:  # wherever the package is installed now
                self.path = Path(_builtin.__file__).with_name(self.path.name)
            self._load_file(module, head_layers)
            return
        with building(seed=RANDOM_SEED):
            fresh = BuiltinNet(self.num_classes)
        fill_randomly(module, fresh)
