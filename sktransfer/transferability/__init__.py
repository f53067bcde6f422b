"""Does transfer help, and which network: scores and comparisons before any training."""

from sktransfer.transferability._ranking import BackboneRanking, rank_backbones
from sktransfer.transferability._report import TransferReport, transfer_report
from sktransfer.transferability._scores import (
    h_score,
    leep_score,
    logme_score,
    transrate_score,
)

__all__ = [
    "BackboneRanking",
    "TransferReport",
    "h_score",
    "leep_score",
    "logme_score",
    "rank_backbones",
    "transfer_report",
    "transrate_score",
]
