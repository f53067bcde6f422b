"""Does transfer help, and which network: scores and comparisons before any training."""

from sktransfer.transferability._leaks import Leaks, find_leaks
from sktransfer.transferability._ranking import BackboneRanking, rank_backbones
from sktransfer.transferability._report import TransferReport
from sktransfer.transferability._scores import (
    h_score,
    leep_score,
    logme_score,
    transrate_score,
)
from sktransfer.transferability._transfer import transfer_report

__all__ = [
    "BackboneRanking",
    "Leaks",
    "TransferReport",
    "find_leaks",
    "h_score",
    "leep_score",
    "logme_score",
    "rank_backbones",
    "transfer_report",
    "transrate_score",
]
