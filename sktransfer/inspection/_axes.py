"""Axes and colours of the displays."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people with any colour vision tell apart; markers differ as well.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def style_of(k: int) -> tuple[str, str]:
    """Return the colour and marker of the `k`-th series, a pair of its own for the first 64."""
    return COLORS[k % len(COLORS)], MARKERS[(k + k // len(COLORS)) % len(MARKERS)]


def new_axes(name: str, n_rows: int = 1, size: tuple[float, float] = (6.4, 4.4)) -> list[Axes]:
    """Return the axes of a new figure, below each other; raise if matplotlib is missing."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"{name} draws with matplotlib, which is not installed: pip install sktransfer[plot]"
        ) from error
    _, axes = plt.subplots(n_rows, squeeze=False, sharex=True, figsize=size, layout="constrained")
    return list(axes[:, 0])
