"""The small pre-trained network that ships with the package: see MODEL_CARD.md.

A published version never changes: a better network gets a new name in ``VERSIONS``, so that
nobody's results move under ``weights="V1"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Version:
    """One set of weights, and how its images are prepared.

    ``size`` is (height, width): the whole picture is squeezed into it, and a ``crop`` of the
    same size leaves nothing out. ``mean`` and ``std`` apply to RGB in 0...1.
    """

    file: str
    sha256: str
    size: tuple[int, int]
    crop: tuple[int, int]
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    num_classes: int = 200
    n_features: int = 1408

    @property
    def path(self) -> Path:
        return Path(__file__).with_name(self.file)


VERSIONS = {
    "V1": Version(
        file="v1.safetensors",
        sha256="e9bce5a037e6074900129a29eca5f04557b64887c2e042fdbc0a48f872e94419",
        size=(80, 80),
        crop=(80, 80),
    ),
}
DEFAULT = "V1"
