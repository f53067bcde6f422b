"""Displays in scikit-learn's manner, drawn with matplotlib (extra ``plot``)."""

from sktransfer.inspection._embedding import EmbeddingDisplay
from sktransfer.inspection._fine_tuning import FineTuningDisplay
from sktransfer.inspection._leaks import LeaksDisplay
from sktransfer.inspection._neighbors import NeighborsDisplay
from sktransfer.inspection._ranking import BackboneRankingDisplay
from sktransfer.inspection._saliency import SaliencyDisplay
from sktransfer.inspection._top_losses import TopLossesDisplay
from sktransfer.inspection._transfer_curve import TransferCurveDisplay

__all__ = [
    "BackboneRankingDisplay",
    "EmbeddingDisplay",
    "FineTuningDisplay",
    "LeaksDisplay",
    "NeighborsDisplay",
    "SaliencyDisplay",
    "TopLossesDisplay",
    "TransferCurveDisplay",
]
