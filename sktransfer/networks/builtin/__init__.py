"""The small pre-trained network that ships with the package: see MODEL_CARD.md.

A published version never changes: a better network gets a new name in ``VERSIONS``, so that
results with ``weights="V1"`` stay the same.
"""

from sktransfer.networks._preprocessing import Preprocessing
from sktransfer.networks.builtin._network import Version

VERSIONS = {
    "V1": Version(
        file="v1.safetensors",
        sha256="e9bce5a037e6074900129a29eca5f04557b64887c2e042fdbc0a48f872e94419",
        preprocessing=Preprocessing((80, 80), (80, 80)),
    ),
}
DEFAULT = "V1"
