"""Does transfer help, and which network: scores and comparisons before any training."""

from sktransfer.transferability._scores import (
    h_score,
    leep_score,
    logme_score,
    transrate_score,
)

__all__ = ["h_score", "leep_score", "logme_score", "transrate_score"]
