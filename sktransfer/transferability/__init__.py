"""Does transfer help, and which network: scores and comparisons before any training."""

from sktransfer.transferability._leaks import Leaks, find_leaks
from sktransfer.transferability._scores import (
    h_score,
    leep_score,
    logme_score,
    transrate_score,
)

__all__ = ["Leaks", "find_leaks", "h_score", "leep_score", "logme_score", "transrate_score"]
